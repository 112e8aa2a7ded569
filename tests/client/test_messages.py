"""Answers of the server that do not match the request, and what an answer becomes."""

from collections.abc import Callable

import pytest
from google.protobuf import duration_pb2

from ganserve import ServerError
from ganserve._messages import to_batch
from ganserve.v1 import generation_pb2 as pb

Edit = Callable[[pb.GenerateImagesResponse], object]


def answer() -> pb.GenerateImagesResponse:
    """Two images of 3x2 pixels with 3 channels."""
    return pb.GenerateImagesResponse(
        model="any",
        version=3,
        count=2,
        height=3,
        width=2,
        channels=3,
        seeds=[5, 6],
        labels=[1, 0],
        pixels=bytes(range(36)),
        queue_time=duration_pb2.Duration(seconds=2, nanos=500_000_000),
        compute_time=duration_pb2.Duration(seconds=1, nanos=250_000_000),
    )


def test_an_answer_becomes_a_batch() -> None:
    batch = to_batch(answer(), 2)
    assert batch.pixels.shape == (2, 3, 2, 3)
    assert batch.pixels.ravel().tolist() == list(range(36))
    assert (batch.seeds, batch.labels, batch.queue_s, batch.compute_s) == ((5, 6), (1, 0), 2.5, 1.25)


@pytest.mark.parametrize("wanted", [1, 3])
def test_an_answer_with_another_number_of_images_is_an_error(wanted: int) -> None:
    with pytest.raises(ServerError, match=f"has 2 images, 2 seeds and 2 labels, but {wanted} images were requested"):
        to_batch(answer(), wanted)
    made = answer()
    made.ClearField("seeds")
    made.ClearField("labels")
    with pytest.raises(ServerError, match=f"has 2 images, 0 seeds and 0 labels, but {wanted} images were requested"):
        to_batch(made, wanted)


WRONG: dict[str, tuple[Edit, str]] = {
    "too few pixels": (lambda made: setattr(made, "pixels", bytes(35)), "35 bytes of pixels"),
    "too many pixels": (lambda made: setattr(made, "pixels", bytes(37)), "37 bytes of pixels"),
    "no pixels": (lambda made: (made.ClearField("pixels"), made.ClearField("height")), "0 bytes of pixels"),
    "too few seeds": (lambda made: made.seeds.pop(), "2 images, 1 seeds and 2 labels"),
    "too many labels": (lambda made: made.labels.append(1), "2 images, 2 seeds and 3 labels"),
    "files": (lambda made: setattr(made, "encoding", pb.ENCODING_PNG), "encoding 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_contradicts_itself_is_an_error(name: str) -> None:
    edit, text = WRONG[name]
    made = answer()
    edit(made)
    with pytest.raises(ServerError, match=text):
        to_batch(made, 2)
