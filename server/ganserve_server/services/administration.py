"""AdministrationService, with which operators load, unload and reload models, on an address of its own."""

import dataclasses
from typing import Any

import grpc

from ganserve.v1 import administration_pb2 as pb
from ganserve.v1 import administration_pb2_grpc as pb_grpc
from ganserve_server.errors import InvalidRequest
from ganserve_server.inference import grpc_service_pb2 as inference_pb
from ganserve_server.repository.states import Administration, VersionState
from ganserve_server.transport.interface import Call, Server

SERVICE = pb.DESCRIPTOR.services_by_name["AdministrationService"].full_name


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
        """Look for new and removed versions."""
        return pb.ReloadModelsResponse(versions=_states(await self._administration.reload()))


class RepositoryServicer:
    """The calls RepositoryModelLoad and RepositoryModelUnload of the Open Inference Protocol."""

    def __init__(self, administration: Administration) -> None:
        self._administration = administration

    def add_to(self, server: Server) -> None:
        """Answer both calls."""
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
        refuse_repository_name(request.repository_name)
        if request.parameters:
            raise InvalidRequest(
                "parameters",
                f"there is no parameter {min(request.parameters)!r}: the server loads the model from its folder "
                "as it is",
            )
        await self._administration.load(request.model_name)
        return inference_pb.RepositoryModelLoadResponse()

    async def _unload(
        self, request: inference_pb.RepositoryModelUnloadRequest, context: Call
    ) -> inference_pb.RepositoryModelUnloadResponse:
        context.model = request.model_name
        refuse_repository_name(request.repository_name)
        await self._administration.unload(request.model_name)
        return inference_pb.RepositoryModelUnloadResponse()


def refuse_repository_name(name: str) -> None:
    """Check that a request names no repository: a server has one repository, without a name.

    Raises:
        InvalidRequest: the request has a name.
    """
    if name:
        raise InvalidRequest(
            "repository_name", f"there is no repository {name!r}; the server has only one, so leave its name out"
        )


def _states(states: list[VersionState]) -> list[pb.VersionState]:
    return [pb.VersionState(**dataclasses.asdict(state)) for state in states]
