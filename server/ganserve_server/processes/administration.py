"""Forwards operators' requests from the supervisor to every worker, and returns the answers."""

import dataclasses
from typing import Any

from ganserve_server.errors import ModelNotFound, ModelNotLoaded, ServingError, Unavailable
from ganserve_server.processes.supervisor import Supervisor
from ganserve_server.repository.states import Administration, VersionState

_ERRORS: dict[str, type[ServingError]] = {error.reason: error for error in (ModelNotFound, ModelNotLoaded)}


class WorkersAdministration:
    """Loads and unloads models in all workers, as `Administration`."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def load(self, name: str) -> list[VersionState]:
        """Load a model in all workers."""
        self._supervisor.unloaded.discard(name)
        return await self._ask({"do": "load", "model": name})

    async def unload(self, name: str) -> None:
        """Unload a model in all workers, and in workers that replace them."""
        before = name in self._supervisor.unloaded
        self._supervisor.unloaded.add(name)  # first: for workers that start meanwhile, and if the caller disconnects
        try:
            await self._ask({"do": "unload", "model": name})
        except ModelNotFound:
            if not before:
                self._supervisor.unloaded.discard(name)
            raise

    async def reload(self) -> list[VersionState]:
        """Load new versions and drop removed ones in all workers."""
        return await self._ask({"do": "reload"})

    async def _ask(self, request: dict[str, Any]) -> list[VersionState]:
        answers = await self._supervisor.ask_all(request)
        if not answers:
            raise Unavailable("no worker is running that can do it; try again")
        for answer in answers:
            if "reason" in answer:
                raise _ERRORS[answer["reason"]](answer["text"])
        return [VersionState(**state) for state in answers[0]["versions"]]


async def answer(administration: Administration, request: dict[str, Any]) -> dict[str, Any]:
    """Handle a supervisor's request in a worker; return the answer to send."""
    states: list[VersionState] = []
    try:
        if request["do"] == "load":
            states = await administration.load(request["model"])
        elif request["do"] == "unload":
            await administration.unload(request["model"])
        else:
            states = await administration.reload()
    except ServingError as error:
        return {"reason": error.reason, "text": str(error)}
    return {"versions": [dataclasses.asdict(state) for state in states]}
