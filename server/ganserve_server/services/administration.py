"""AdministrationService: what an operator may have the server do with its models, on an address of its own."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from ganserve.v1 import administration_pb2 as pb
from ganserve.v1 import administration_pb2_grpc as pb_grpc
from ganserve_server.errors import InvalidRequest, ModelNotFound, ModelNotLoaded, ServingError, Unavailable
from ganserve_server.inference import grpc_service_pb2 as inference_pb
from ganserve_server.processes.supervisor import Supervisor
from ganserve_server.transport.interface import Call, Server

SERVICE = pb.DESCRIPTOR.services_by_name["AdministrationService"].full_name
_ERRORS: dict[str, type[ServingError]] = {error.reason: error for error in (ModelNotFound, ModelNotLoaded)}


@dataclass(frozen=True, slots=True)
class VersionState:
    """A version in the repository, and whether it is served."""

    model: str
    version: int
    served: bool
    digest: str
    reason: str


class Administration(Protocol):
    """What changes which models are served."""

    async def load(self, name: str) -> list[VersionState]:
        """Load a model from its folder, anew if it is served.

        Raises:
            ModelNotFound: it has no folder.
            ModelNotLoaded: none of its versions can be served.
        """

    async def unload(self, name: str) -> None:
        """Stop serving a model until it is loaded again.

        Raises:
            ModelNotFound: it is not served.
        """

    async def reload(self) -> list[VersionState]:
        """Look for new and removed versions."""


class AdministrationServicer(pb_grpc.AdministrationServiceServicer):
    """The service."""

    def __init__(self, administration: Administration) -> None:
        self._administration = administration

    async def LoadModel(self, request: pb.LoadModelRequest, context: Call) -> pb.LoadModelResponse:  # noqa: N802
        """Load one model."""
        context.model = request.model
        return pb.LoadModelResponse(versions=_states(await self._administration.load(request.model)))

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Call) -> pb.UnloadModelResponse:  # noqa: N802
        """Unload one model."""
        context.model = request.model
        await self._administration.unload(request.model)
        return pb.UnloadModelResponse()

    async def ReloadModels(  # noqa: N802
        self, request: pb.ReloadModelsRequest, context: Call
    ) -> pb.ReloadModelsResponse:
        """Look for changes."""
        return pb.ReloadModelsResponse(versions=_states(await self._administration.reload()))


class RepositoryServicer:
    """The two calls of the Open Inference Protocol that load and unload models, as Triton's clients make them."""

    def __init__(self, administration: Administration) -> None:
        self._administration = administration

    def add_to(self, server: Server) -> None:
        """Answer both."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "RepositoryModelLoad": grpc.unary_unary_rpc_method_handler(
                self._load,
                inference_pb.RepositoryModelLoadRequest.FromString,
                inference_pb.RepositoryModelLoadResponse.SerializeToString,
            ),
            "RepositoryModelUnload": grpc.unary_unary_rpc_method_handler(
                self._unload,
                inference_pb.RepositoryModelUnloadRequest.FromString,
                inference_pb.RepositoryModelUnloadResponse.SerializeToString,
            ),
        }
        service = inference_pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
        server.add_registered_method_handlers(service, handlers)

    async def _load(
        self, request: inference_pb.RepositoryModelLoadRequest, context: Call
    ) -> inference_pb.RepositoryModelLoadResponse:
        context.model = request.model_name
        check_repository(request.repository_name)
        if request.parameters:
            raise InvalidRequest(
                "parameters",
                f"there is no parameter {min(request.parameters)!r}: a model is loaded as its folder has it",
            )
        await self._administration.load(request.model_name)
        return inference_pb.RepositoryModelLoadResponse()

    async def _unload(
        self, request: inference_pb.RepositoryModelUnloadRequest, context: Call
    ) -> inference_pb.RepositoryModelUnloadResponse:
        context.model = request.model_name
        check_repository(request.repository_name)
        await self._administration.unload(request.model_name)
        return inference_pb.RepositoryModelUnloadResponse()


def check_repository(name: str) -> None:
    """Refuse a repository's name: a server has one.

    Raises:
        InvalidRequest: there is a name.
    """
    if name:
        raise InvalidRequest(
            "repository_name", f"there is no repository {name!r}; a server has one, leave its name out"
        )


def _states(states: list[VersionState]) -> list[pb.VersionState]:
    return [pb.VersionState(**dataclasses.asdict(state)) for state in states]


class OfAllWorkers:
    """Has every worker do the same."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def load(self, name: str) -> list[VersionState]:
        """Load a model in all workers."""
        self._supervisor.unloaded.discard(name)
        return await self._ask({"do": "load", "model": name})

    async def unload(self, name: str) -> None:
        """Unload a model in all workers, and in those that replace them."""
        before = name in self._supervisor.unloaded
        self._supervisor.unloaded.add(name)  # first: for a worker that starts meanwhile, and if the caller leaves
        try:
            await self._ask({"do": "unload", "model": name})
        except ModelNotFound:
            if not before:
                self._supervisor.unloaded.discard(name)
            raise

    async def reload(self) -> list[VersionState]:
        """Look for changes in all workers."""
        return await self._ask({"do": "reload"})

    async def _ask(self, request: dict[str, Any]) -> list[VersionState]:
        answers = await self._supervisor.ask_all(request)
        if not answers:
            raise Unavailable("no worker is there that could do it; ask again")
        for answer in answers:
            if "reason" in answer:
                raise _ERRORS[answer["reason"]](answer["text"])
        return [VersionState(**state) for state in answers[0]["versions"]]


async def answer(administration: Administration, request: dict[str, Any]) -> dict[str, Any]:
    """Do in a worker what its supervisor asks; return what it is told."""
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
