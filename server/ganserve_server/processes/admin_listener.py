"""Answers operators, who load, unload and reload models, on an address of its own."""

import logging
from dataclasses import replace
from typing import Any

import grpc

from ganserve_server.auth.security import Security
from ganserve_server.machine import free_descriptors
from ganserve_server.observe.call_recorder import log_internal_error, log_tls_failure
from ganserve_server.repository.states import Administration
from ganserve_server.settings import ServerSettings
from ganserve_server.transport import new_server
from ganserve_server.transport.addresses import bind, name, refused
from ganserve_server.transport.interface import Call, Server

_log = logging.getLogger(__name__)

_CONNECTIONS = 100
_LONGEST_NAME = 64  # of a model; a longer text is not a model's name, and may have megabytes


class AdminListener:
    """Answers AdministrationService, and the equivalent calls of the Open Inference Protocol, if it has an address."""

    def __init__(self, settings: ServerSettings, security: Security) -> None:
        self._settings, self._security = settings, security
        # Before the models are loaded, so that a taken address is reported at once.
        off = settings.admin_address == "off"
        self._sockets = [] if off else bind(settings.admin_address, "--admin-address")
        security.warn_if_open(self._sockets, "--admin-address")
        self._server: Server | None = None

    def start(self, administration: Administration) -> str | None:
        """Listen; return the address, or None if there is none.

        Raises:
            StartError: the address is taken.
        """
        if not self._sockets:
            return None
        # Imported here, because it takes long, and a supervisor starts its workers first.
        from ganserve.v1 import administration_pb2_grpc
        from ganserve_server.services.administration import AdministrationServicer, RepositoryServicer

        connections = min(_CONNECTIONS, max(1, free_descriptors() // 8))
        self._server = server = new_server(
            self._settings.transport,
            self._security,
            on_finished=_log_admin_call,
            on_refused=lambda *_: None,
            on_tls_failure=log_tls_failure,
            on_internal_error=log_internal_error,
            limits=replace(self._settings.limits, max_connections=connections, max_streams=_CONNECTIONS),
            guard=self._security.guard("admin"),
        )
        grpcs: Any = server
        servicer = AdministrationServicer(administration)
        administration_pb2_grpc.add_AdministrationServiceServicer_to_server(servicer, grpcs)
        RepositoryServicer(administration).add_to(server)
        try:
            server.start(self._sockets)
        except OSError as error:
            raise refused(self._settings.admin_address, "--admin-address", error) from error
        return name(self._sockets[0], self._settings.admin_address)

    async def stop(self) -> None:
        """Finish running calls, and close."""
        if self._server is not None:
            await self._server.drain(self._settings.drain_timeout_s)


def _log_admin_call(call: Call, code: grpc.StatusCode, text: str) -> None:
    """Log every call, as a record of who changed which models."""
    fields = {
        "method": call.path.rpartition("/")[2],
        "model": call.model if len(call.model) <= _LONGEST_NAME else f"{call.model[:_LONGEST_NAME]}…",
        "code": code.name,
        "caller": call.caller.name if call.caller else None,
        "peer": call.peer,
        "request_id": call.request_id,
        "reason": text,
    }
    _log.info("admin call", extra={key: value for key, value in fields.items() if value})
