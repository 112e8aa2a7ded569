"""Names that are nearly right: used as the model spells them, or named in the error."""

from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from tests.client.servers import (
    Twin,
    answer,
    ask,
    both,
    fails_first,
    serving,
)

from ganserve import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
)
from ganserve.v1 import generation_pb2 as pb

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def knows(class_names: list[str], refusals: int) -> Any:
    """Refuse so many requests for their label names, and describe the model."""

    def refuse(request: Any, context: Any) -> None:
        violation = error_details_pb2.BadRequest.FieldViolation(field="label_names")
        packed = any_pb2.Any()
        packed.Pack(error_details_pb2.BadRequest(field_violations=[violation]))
        details = status_pb2.Status(details=[packed]).SerializeToString()
        context.set_trailing_metadata((("grpc-status-details-bin", details),))
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no such class: {', '.join(request.label_names)}")

    def behave(number: int, request: Any, context: Any) -> Any:
        if isinstance(request, pb.GetModelRequest):
            return pb.GetModelResponse(model=pb.Model(name="any", card=pb.ModelCard(class_names=class_names)))
        if number < refusals:
            refuse(request, context)
        return answer(request)

    return behave


@both
def test_a_label_that_is_right_but_for_its_case_is_asked_for_as_it_is_written(twin: Twin) -> None:
    with serving(knows(["Bag", "Ankle boot", "Coat"], 1)) as (address, servicer):
        ask(twin, address, "generate", "any", label=["ankle Boot", "Coat"])
        assert [list(request.label_names) for request in servicer.requests[::2]] == [
            ["ankle Boot", "Coat"],
            ["Ankle boot", "Coat"],
        ]


@both
@pytest.mark.parametrize(
    ("class_names", "label", "end"),
    [
        (["BAG", "Bag"], "bag", "; did you mean 'Bag'?"),  # not one of the two at a guess
        (["Bag", "Coat"], "bga", "; did you mean 'Bag'?"),
        (["Bag", "Coat"], "hat at all", "no such class: hat at all"),
        (["Bag", "Coat"], "Bag", "no such class: Bag"),  # a server that refuses what it has
        ([], "bag", "no such class: bag"),
    ],
)
def test_a_label_that_is_not_sure_is_told(twin: Twin, class_names: list[str], label: str, end: str) -> None:
    with serving(knows(class_names, 10**6)) as (address, servicer):
        with pytest.raises(InvalidRequestError) as caught:
            ask(twin, address, "generate", "any", label=label)
        assert str(caught.value).endswith(end)
        assert len(servicer.requests) == 2


@both
def test_a_server_that_refuses_what_it_has_itself_is_asked_twice_at_most(twin: Twin) -> None:
    with serving(knows(["Bag"], 10**6)) as (address, servicer):
        with pytest.raises(InvalidRequestError):
            ask(twin, address, "generate", "any", label="bag")
        assert len([each for each in servicer.requests if isinstance(each, pb.GenerateImagesRequest)]) == 2


@both
@pytest.mark.parametrize(("method", "asked"), [("generate", 1), ("health", 2)])  # health's own error tells no names
def test_a_server_that_does_not_know_a_model_leaves_the_error_as_it_is(twin: Twin, method: str, asked: int) -> None:
    with serving(fails_first(grpc.StatusCode.NOT_FOUND, 10**6)) as (address, servicer):
        with pytest.raises(ModelNotFoundError, match=r"^what was wrong$"):
            ask(twin, address, method, "any")
        assert len(servicer.requests) == asked


@both
def test_pages_of_models_are_read_until_the_last(twin: Twin) -> None:
    def behave(number: int, request: Any, context: Any) -> Any:
        if isinstance(request, health_pb2.HealthCheckRequest):
            context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        name, after = {"": ("a", "1"), "1": ("b", "2"), "2": ("c", "")}[request.page_token]
        return pb.ListModelsResponse(models=[pb.Model(name=name)], next_page_token=after)

    with serving(behave) as (address, servicer):
        assert [model.name for model in ask(twin, address, "models")] == ["a", "b", "c"]
        assert len(servicer.requests) == 3
        with pytest.raises(ModelNotFoundError, match=r"^no such model$"):  # the names of one page are not all
            ask(twin, address, "health", "any")


@both
def test_pages_without_end_are_read_until_the_timeout(twin: Twin) -> None:
    def behave(number: int, request: Any, context: Any) -> Any:
        return pb.ListModelsResponse(next_page_token="more")

    with serving(behave) as (address, _), pytest.raises(DeadlineExceededError):
        ask(twin, address, "models", timeout_s=0.5)
