"""Guards an address with TLS and tokens. Their files may change while the server runs."""

import asyncio
import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from socket import AF_INET6, socket

from ganserve_server.auth.tls import Certificates
from ganserve_server.auth.token_file import Role
from ganserve_server.auth.tokens import Tokens
from ganserve_server.observe.metrics import Metrics
from ganserve_server.settings import ServerSettings
from ganserve_server.shared.rates import SharedRates
from ganserve_server.start_errors import StartError
from ganserve_server.transport.credentials import Pem
from ganserve_server.transport.interface import Call

_log = logging.getLogger(__name__)

_LOOK_EVERY_S = 2.0

_State = list[tuple[int, ...] | None]


class Security:
    """The certificates and tokens of a process; either may be None.

    Args:
        settings: the settings, which name the files.
        metrics: the metrics of this process; None in a supervisor, whose workers have metrics.
        rates: the shared memory that counts the tokens' rates.

    Raises:
        StartError: a file cannot be used.
    """

    def __init__(self, settings: ServerSettings, metrics: Metrics | None, rates: SharedRates) -> None:
        self._files = {
            "certificates": _named(settings.tls_certificate_file, settings.tls_key_file, settings.tls_client_ca_file),
            "tokens": _named(settings.tokens_file),
        }
        # Before the files are read, so that `refresh` notices a change during the reading.
        self._seen: dict[str, _State | None] = {kind: _state(files) for kind, files in self._files.items() if files}
        self.certificates = certificates_of(settings, metrics)
        self.tokens = tokens_of(settings, metrics, rates)
        self._metrics = metrics
        self._rejected: dict[str, str] = {}  # kinds of files that cannot be used, each with the reason
        self._log_expired()
        self._parts = {"certificates": self.certificates, "tokens": self.tokens}

    @property
    def context(self) -> Callable[[], ssl.SSLContext] | None:
        """Returns the TLS context for a new connection; None without TLS."""
        certificates = self.certificates
        return None if certificates is None else lambda: certificates.context

    @property
    def pem(self) -> Callable[[], Pem] | None:
        """Returns the same as PEM, for a transport that does TLS itself; None without TLS."""
        certificates = self.certificates
        return None if certificates is None else lambda: certificates.pem

    def guard(self, role: Role) -> Callable[[Call], None] | None:
        """Return a function that identifies the caller and checks its role and rate; None if everyone may call.

        The function raises a ServingError if the call is not allowed.
        """
        tokens = self.tokens
        if tokens is None:
            return None

        def check(call: Call) -> None:
            call.caller = caller = tokens.identify(call.metadata)
            caller.check(role)
            if call.method is not None and not call.method.counts_images:
                caller.take(1)

        return check

    def refresh(self) -> None:
        """Read changed files again; if one cannot be used, log that and keep its earlier content."""
        for kind, seen in self._seen.items():
            part = self._parts[kind]
            assert part is not None
            if (state := _state(self._files[kind])) == seen:
                continue
            self._seen[kind] = state
            try:
                facts, rejected = part.reload(), False
            except StartError as error:
                if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, ssl.SSLError):
                    # It cannot be read, for example for want of file descriptors. It may be readable later without a
                    # change.
                    self._seen[kind] = None
                if self._rejected.get(kind) == str(error):
                    continue
                self._rejected[kind], rejected = str(error), True
                _log.error("what was read before stays in use", extra={"kind": kind, "reason": str(error)})
            else:
                self._rejected.pop(kind, None)
                _log.info("read again", extra={"kind": kind} | facts)
                if kind == "certificates":
                    self._log_expired()
            if self._metrics is not None:
                self._metrics.file_reloads.labels(kind, "rejected" if rejected else "loaded").inc()
                self._metrics.files_rejected.labels(kind).set(rejected)

    def _log_expired(self) -> None:
        for kind, end in (self.certificates.expired if self.certificates else {}).items():
            _log.error("a certificate has expired", extra={"certificate": kind, "since": end.isoformat()})

    async def watch(self) -> None:
        """Refresh every two seconds: not every kernel reports changes to mounted secrets, which are links."""
        while self._seen:
            await asyncio.sleep(_LOOK_EVERY_S)
            self.refresh()

    def warn_if_open(self, sockets: list[socket], flag: str) -> None:
        """Log a warning if anyone on the network may call, or if tokens travel in plain text."""
        if all(_is_loopback(bound) for bound in sockets):
            return
        if self.tokens is None and not (self.certificates and self.certificates.asks_callers):
            _log.warning(
                "anyone who reaches this address may call: neither --tokens-file nor --tls-client-ca-file is set",
                extra={"flag": flag},
            )
        elif self.certificates is None:
            _log.warning(
                "clients send their tokens in plain text: --tls-certificate-file is not set", extra={"flag": flag}
            )


def certificates_of(settings: ServerSettings, metrics: Metrics | None) -> Certificates | None:
    """Read the certificates, if the settings name any.

    Raises:
        StartError: they cannot be used.
    """
    named = settings.tls_certificate_file or settings.tls_key_file or settings.tls_client_ca_file
    return Certificates(settings, metrics) if named else None


def tokens_of(settings: ServerSettings, metrics: Metrics | None, rates: SharedRates) -> Tokens | None:
    """Read the tokens, if the settings name a file.

    Raises:
        StartError: it cannot be used.
    """
    if not settings.tokens_file:
        return None
    return Tokens(settings.tokens_file, rates, None if metrics is None else metrics.caller_limited)


def _named(*files: str) -> tuple[Path, ...]:
    return tuple(Path(file) for file in files if file)


def _state(files: tuple[Path, ...]) -> _State:
    """Return values that differ if a file has changed."""
    states: _State = []
    for file in files:
        try:
            status = file.stat()
            states.append((status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev))
        except OSError:
            states.append(None)
    return states


def _is_loopback(bound: socket) -> bool:
    host = str(bound.getsockname()[0])
    return host == "::1" if bound.family == AF_INET6 else host.startswith("127.")
