"""Both clients against a real server; what one can do the other can too."""

import asyncio
import dataclasses
import inspect
import pickle
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.client.servers import Twin, ask, both
from tests.conftest import RunningServer

from ganserve import (
    AsyncClient,
    Client,
    DeadlineExceededError,
    GanserveError,
    Interpolation,
    InvalidRequestError,
    MessageTooLargeError,
    ModelNotFoundError,
    NoProvenanceError,
    OverloadedError,
    UnavailableError,
    latents,
    linear,
    slerp,
)
from ganserve._endpoint import DEFAULT_ADDRESS
from ganserve.v1 import generation_pb2 as pb

NOBODY = "127.0.0.1:1"  # where no server is


@pytest.fixture
async def async_client(server: RunningServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address) as connected:
        yield connected


def test_the_twins_have_the_same_methods() -> None:
    def public(kind: type) -> dict[str, list[Any]]:
        methods = {name: method for name, method in inspect.getmembers(kind, callable) if not name.startswith("_")}
        methods["__init__"] = kind
        return {
            name: [(each.name, each.kind, each.default) for each in inspect.signature(method).parameters.values()]
            for name, method in methods.items()
        }

    assert public(Client) == public(AsyncClient)


def test_what_says_which_classes_is_called_the_same_everywhere() -> None:
    makers = (Client.generate, Client.stream, Client.generate_each, Client.interpolate, Client.contact_sheet)
    for method in makers:
        assert {"label", "labels"} & set(inspect.signature(method).parameters) == {"label"}


def test_images_come_with_seeds_labels_and_their_model(client: Client) -> None:
    batch = client.generate("cdcgan-mnist", count=3, seed=2**32 - 2)
    assert batch.pixels.shape == (3, 28, 28, 1)
    assert batch.pixels.dtype == np.uint8
    assert batch.seeds == (2**32 - 2, 2**32 - 1, 0)
    assert batch.labels == (4, 5, 0)
    assert batch.digest == client.model("cdcgan-mnist").digest
    assert batch.provider == "CPUExecutionProvider"
    assert batch.compute_s > 0


def test_seed_zero_is_a_seed(client: Client) -> None:
    assert client.generate("mlp-mnist", seed=0).seeds == (0,)


def test_an_absent_seed_is_drawn_and_reported(client: Client) -> None:
    first, second = client.generate("mlp-mnist"), client.generate("mlp-mnist")
    assert first.seeds is not None
    assert first.seeds != second.seeds
    assert np.array_equal(client.generate("mlp-mnist", seed=first.seeds[0]).pixels, first.pixels)


def test_labels_go_by_name_or_index(client: Client) -> None:
    by_name = client.generate("cdcgan-fashion-mnist", count=2, seed=1, label="Sneaker")
    by_index = client.generate("cdcgan-fashion-mnist", count=2, seed=1, label=7)
    assert by_name.labels == by_index.labels == (7, 7)
    assert np.array_equal(by_name.pixels, by_index.pixels)
    each = client.generate("cdcgan-fashion-mnist", count=2, seed=1, label=["Sneaker", "Bag"])
    assert each.labels == (7, 8)
    assert np.array_equal(each.pixels[0], by_name.pixels[0])
    assert client.generate("cdcgan-fashion-mnist", seed=1, label=["Sneaker", "Bag", "Coat"]).labels == (7, 8, 4)


def test_own_latents_give_what_their_seed_gives(client: Client) -> None:
    latent_dim = client.model("dcgan-mnist").latent_dim
    latents = [np.random.RandomState(seed).standard_normal(latent_dim) for seed in (5, 6)]
    own = client.generate("dcgan-mnist", latents=latents, truncation=0.7)
    assert own.seeds is None
    assert np.array_equal(own.pixels, client.generate("dcgan-mnist", count=2, seed=5, truncation=0.7).pixels)


def test_truncation_zero_makes_every_image_the_same(client: Client) -> None:
    pixels = client.generate("mlp-mnist", count=3, seed=1, truncation=0.0).pixels
    assert np.array_equal(pixels[0], pixels[2])
    assert not np.array_equal(pixels[0], client.generate("mlp-mnist", seed=1).pixels[0])


@both
def test_any_number_of_labels_and_latents_is_taken(twin: Twin, server: RunningServer, client: Client) -> None:
    labels = [seed % 10 for seed in range(2100)]
    by_list = ask(twin, server.address, "generate", "cdcgan-mnist", seed=0, label=labels)
    by_name = ask(twin, server.address, "generate", "cdcgan-mnist", seed=0, label=[str(label) for label in labels])
    in_turn = client.generate("cdcgan-mnist", count=2100, seed=0)
    assert by_list.seeds == tuple(range(2100))
    assert by_list.labels == by_name.labels == in_turn.labels
    assert np.array_equal(by_list.pixels, in_turn.pixels)
    assert np.array_equal(by_name.pixels, in_turn.pixels)
    own = ask(twin, server.address, "generate", "cdcgan-mnist", latents=latents(range(2100), 64), label=labels)
    assert np.array_equal(own.pixels, in_turn.pixels)
    way = ask(twin, server.address, "interpolate", "cdcgan-mnist", 1, 2, 1500, label=3)
    assert (len(way), way.interpolation.steps) == (1500, 1500)


@both
def test_images_are_made_again_by_their_provenance(twin: Twin, server: RunningServer, client: Client) -> None:
    labels = [seed % 7 for seed in range(1500)]
    many = client.generate("cdcgan-mnist", seed=2**32 - 3, label=labels, truncation=0.7)
    walk = client.interpolate("cdcgan-mnist", 1, 2, 9, kind="linear")
    unconditional = client.generate("mlp-mnist", count=5)
    for made in (many, many[::3], many[::-1][:4], many[7:8], walk, walk[2:7:2], unconditional, unconditional[::2]):
        again = ask(twin, server.address, "reproduce", made.provenance)
        assert (again.provenance, again.digest) == (made.provenance, made.digest)
        assert np.array_equal(again.pixels, made.pixels)
    for image in (many[5], walk[4], unconditional[0]):
        again = ask(twin, server.address, "reproduce", image.provenance)
        assert np.array_equal(again.pixels, image.pixels[None])
        assert again[0].provenance == image.provenance


@both
def test_what_a_provenance_does_not_say_cannot_be_made_again(twin: Twin, server: RunningServer, client: Client) -> None:
    own = client.generate("mlp-mnist", latents=np.zeros((2, 100))).provenance
    labelled = client.generate("cdcgan-mnist", count=2).provenance
    for provenance, told in (
        (own, "latents of the caller's own"),
        (dataclasses.replace(own, count=None), "latents of the caller's own"),
        (dataclasses.replace(labelled, labels=None), "the first of its labels"),
    ):
        with pytest.raises(NoProvenanceError, match=told):
            ask(twin, server.address, "reproduce", provenance)
    with pytest.raises(ModelNotFoundError, match="no version 7"):
        ask(twin, server.address, "reproduce", dataclasses.replace(labelled, version=7))


def test_many_images_come_as_one_batch(client: Client) -> None:
    batch = client.generate("cdcgan-mnist", count=1000, seed=3)
    assert batch.seeds == tuple(range(3, 1003))
    assert batch.labels is not None
    assert len(batch.labels) == len(batch.pixels) == 1000


def test_a_stream_can_be_left_early(client: Client) -> None:
    stream = client.stream_batches("mlp-mnist", count=1_000_000, seed=1)
    first = next(stream)
    assert isinstance(stream, Iterator)
    stream.close()  # type: ignore[attr-defined]
    assert np.array_equal(first.pixels, client.generate("mlp-mnist", count=len(first), seed=1).pixels)


def test_a_stream_gives_images_one_by_one(client: Client) -> None:
    together = client.generate("cdcgan-mnist", count=200, seed=3)
    images = list(client.stream("cdcgan-mnist", count=200, seed=3))
    assert [image.seed for image in images] == list(together.seeds or ())
    assert [image.label for image in images] == list(together.labels or ())
    assert all(np.array_equal(image.pixels, pixels) for image, pixels in zip(images, together.pixels, strict=True))


def test_latents_are_those_of_the_server(client: Client) -> None:
    own = latents([2**32 - 1, 0], client.model("mlp-mnist").latent_dim)
    assert own.dtype == np.float32
    made = client.generate("mlp-mnist", count=2, seed=2**32 - 1, truncation=0.5)
    assert np.array_equal(client.generate("mlp-mnist", latents=own, truncation=0.5).pixels, made.pixels)
    for seeds, latent_dim in (([-1], 4), ([2**32], 4), (["1"], 4), ([1], 0), ([1], "4")):
        with pytest.raises(InvalidRequestError):
            latents(seeds, latent_dim)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["slerp", "linear"])
@pytest.mark.parametrize(("model", "label"), [("mlp-mnist", None), ("cdcgan-mnist", None), ("cdcgan-mnist", "7")])
def test_an_interpolation_ends_with_the_images_of_the_seeds(
    client: Client, kind: Literal["slerp", "linear"], model: str, label: str | None
) -> None:
    way = client.interpolate(model, 4, 2**32 - 1, 5, kind=kind, label=label, truncation=0.8)
    assert len(way) == 5
    for index, seed in ((0, 4), (4, 2**32 - 1)):
        end = client.generate(model, seed=seed, label=label, truncation=0.8)
        assert np.array_equal(way.pixels[index], end.pixels[0])
        assert end.labels is None or (way.labels or ())[index] == end.labels[0]
    if label is None and way.labels is not None:
        assert way.labels == (4, 4, 4, 5, 5)
    assert len({image.tobytes() for image in way.pixels}) == 5


def test_a_slerp_stays_as_far_from_the_origin_as_its_ends() -> None:
    start, end = latents([1, 2], 64)
    way = slerp(start, end, np.linspace(0, 1, 9))
    assert np.array_equal(way[[0, -1]], [start, end])
    lengths = np.linalg.norm(way, axis=1)
    assert min(np.linalg.norm(start), np.linalg.norm(end)) * 0.99 < lengths.min()
    assert np.linalg.norm(linear(start, end, 0.5)) < 0.85 * lengths.min()
    cosines = (way[:-1] * way[1:]).sum(1) / lengths[:-1] / lengths[1:]
    unit = slerp(start / np.linalg.norm(start), end / np.linalg.norm(end), np.linspace(0, 1, 9))
    assert (unit[:-1] * unit[1:]).sum(1) == pytest.approx(float((unit[0] * unit[1]).sum()), abs=1e-5)
    assert cosines.min() > 0.9
    assert np.array_equal(slerp(start, start, 0.5), start)
    assert np.array_equal(slerp(start, -start, [0, 1]), [start, -start])


@pytest.mark.parametrize(
    "arguments",
    [{"steps": 1}, {"steps": 2.0}, {"kind": "round"}, {"seed_a": -1}, {"seed_b": "x"}, {"label": 10}, {"version": 0.5}],
)
def test_interpolations_that_make_no_sense_are_refused(client: Client, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        client.interpolate("cdcgan-mnist", **{"seed_a": 1, "seed_b": 2, **arguments})


async def test_the_health_of_the_server_and_its_models_is_told(client: Client, async_client: AsyncClient) -> None:
    client.wait_until_ready(10, model="mlp-mnist")
    await async_client.wait_until_ready(10)
    assert client.health()
    assert client.health("mlp-mnist")
    assert await async_client.health("mlp-mnist")
    with pytest.raises(ModelNotFoundError, match=r"no model of this name: it has cdcgan-fashion-mnist, .*, mlp-mnist$"):
        client.health("nothing")
    with pytest.raises(InvalidRequestError):
        client.health("\ud800")


def test_a_contact_sheet_has_a_row_a_class(client: Client) -> None:
    sheet = client.contact_sheet("cdcgan-mnist", columns=3, seed=1, scale=1)
    assert sheet.height == 10 * 28 + 9 * 2
    assert client.contact_sheet("mlp-mnist", columns=3, scale=1).width == 3 * 28 + 2 * 2
    fewer = client.contact_sheet("cdcgan-fashion-mnist", columns=3, label=["Bag", 9], scale=1)
    assert fewer.height == 2 * 28 + 2
    assert client.contact_sheet("cdcgan-fashion-mnist", columns=3, label="Bag", scale=1).height == 28
    for label in (10, -1, "Hat", 1.5, None):
        with pytest.raises(InvalidRequestError, match="it has T-shirt"):
            client.contact_sheet("cdcgan-fashion-mnist", label=[label])
    with pytest.raises(InvalidRequestError, match="unconditional: it takes no labels"):
        client.contact_sheet("mlp-mnist", label=3)


def test_models_are_described(client: Client) -> None:
    models = {model.name: model for model in client.models()}
    assert list(models) == ["cdcgan-fashion-mnist", "cdcgan-mnist", "dcgan-mnist", "mlp-mnist"]
    digits = models["cdcgan-mnist"]
    assert digits.conditional
    assert (digits.height, digits.width, digits.channels) == (28, 28, 1)
    figures = {metric.name: metric.value for metric in digits.metrics}
    assert figures["label_accuracy"] >= 0.99
    assert figures["classification_accuracy_score"] >= 0.975
    assert "recall" in {metric.name for metric in models["mlp-mnist"].metrics}
    assert not models["mlp-mnist"].conditional
    described = client.model("cdcgan-mnist", 1)
    assert described.card["training"]["configuration"]["preset"] == "cdcgan"
    assert len(described.card["goldenImages"]) == 10
    shorter = {**described.card, "training": {**described.card["training"]}}
    del shorter["training"]["configuration"], shorter["goldenImages"]
    assert digits == dataclasses.replace(described, card=shorter)


@pytest.mark.parametrize("field", ["seed", "count", "version", "label"])
@pytest.mark.parametrize("value", [-1, 2**32, 1.5, True])
def test_numbers_that_no_message_can_hold_are_refused(client: Client, field: str, value: float) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        client.generate("cdcgan-mnist", **{field: value})  # type: ignore[arg-type]


@both
@pytest.mark.parametrize(
    ("argument", "value", "told"),
    [
        ("label", b"Bag", "label is b'Bag'; it must be an index, 0 or more, or a name of a class, or a list"),
        ("label", {3}, "label is {3}; it must be an index, 0 or more, or a name of a class, or a list"),
        ("label", {3: 4}, "label is {3: 4}; it must be"),
        ("label", np.zeros((2, 2), int), "or a list with one for each image"),
        ("label", [3, b"Bag"], "label is b'Bag'; it must be an index, 0 or more, or a name of a class"),
        ("label", -1, "label is -1; it must be an index, 0 or more, or a name of a class"),
        ("label", [], "label is one index or name, or a list with one for each image"),
        ("label", [1, 2, 3], "label has 3 values for 2 images; give one, or one for each image"),
        ("label", ["1", "2", "3"], "label has 3 values for 2 images"),
        ("truncation", None, "truncation is None; it must be a number from 0 to 2"),
        ("truncation", True, "truncation is True; it must be a number from 0 to 2"),
        ("latents", b"12", "latents is not an array of numbers"),
        ("latents", {1.0}, "latents is not an array of numbers"),
        ("latents", [["1", "2"]], "latents is not an array of numbers"),
        ("count", 0, "count is 0; it must be an integer from 1 to 4294967295"),
    ],
)
def test_what_is_no_argument_is_refused_by_its_name(
    twin: Twin, server: RunningServer, argument: str, value: Any, told: str
) -> None:
    arguments = {"count": None if argument == "latents" else 2, argument: value}
    with pytest.raises(InvalidRequestError, match=re.escape(told)) as caught:
        ask(twin, server.address, "generate", "cdcgan-mnist", **arguments)
    assert (caught.value.field, caught.value.code) == (argument, None)
    if argument != "latents":
        with pytest.raises(InvalidRequestError, match=re.escape(told)):
            ask(twin, server.address, "stream", "cdcgan-mnist", **arguments)


@both
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"seeds": b"12"}, "seeds is b'12'; it must be an iterable of integers"),
        ({"seeds": {1: 2}}, "seeds is {1: 2}; it must be an iterable of integers"),
        ({"seeds": [1], "label": b"1"}, "label is b'1'; it must be an index"),
        ({"seeds": [1], "label": {1}}, "label is {1}; it must be an index"),
        ({"seeds": [1], "label": [-1]}, "label is -1; it must be an index"),
    ],
)
def test_what_is_no_argument_of_generate_each_is_refused(
    twin: Twin, server: RunningServer, arguments: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(told)):
        ask(twin, server.address, "generate_each", "cdcgan-mnist", **arguments)


@both
def test_latents_without_a_label_are_told_by_the_arguments_names(twin: Twin, server: RunningServer) -> None:
    for rows in (1, 300):
        with pytest.raises(InvalidRequestError) as caught:
            ask(twin, server.address, "generate", "cdcgan-mnist", latents=np.zeros((rows, 64)))
        assert caught.value.text == (
            "model cdcgan-mnist is conditional: latents need a label, one for all or a list with one for each"
        )
        assert caught.value.field == "label"


def test_an_argument_that_is_unknown_is_told_of_the_client() -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(TypeError, match=rf"^{kind.__name__}\.__init__\(\) got an unexpected .*'host'"):
            kind(host="127.0.0.1")  # type: ignore[call-arg]


def test_errors_are_typed(client: Client) -> None:
    with pytest.raises(ModelNotFoundError, match="cdcgan-mnist") as caught:
        client.generate("nothing")
    assert caught.value.request_id
    with pytest.raises(InvalidRequestError, match="0 to 9") as invalid:
        client.generate("cdcgan-mnist", label=10)
    assert invalid.value.field == "label"
    with pytest.raises(InvalidRequestError, match="unconditional"):
        list(client.stream("mlp-mnist", count=5, label=1))


@both
@pytest.mark.parametrize(
    ("method", "arguments", "meant"),
    [
        ("generate", {"model": "mpl-mnist"}, "mlp-mnist"),
        ("stream", {"model": "MLP-mnits", "count": 5}, "mlp-mnist"),
        ("model", {"name": "cdcgan-mnits"}, "cdcgan-mnist"),
        ("interpolate", {"model": "cdcgan-mnits", "seed_a": 1, "seed_b": 2}, "cdcgan-mnist"),
        ("health", {"model": "fashion"}, "cdcgan-fashion-mnist"),
        ("generate", {"model": "cdcgan-fashion-mnist", "label": "Snaeker"}, "Sneaker"),
        ("generate", {"model": "cdcgan-fashion-mnist", "label": ["Bag", "boot"]}, "Ankle boot"),
        ("stream_batches", {"model": "cdcgan-fashion-mnist", "count": 5, "label": "Snaeker"}, "Sneaker"),
        ("contact_sheet", {"model": "cdcgan-fashion-mnist", "label": ["dres"]}, "Dress"),
    ],
)
def test_a_name_that_is_nearly_right_is_told(
    server: RunningServer, twin: Twin, method: str, arguments: dict[str, Any], meant: str
) -> None:
    with pytest.raises((ModelNotFoundError, InvalidRequestError)) as caught:
        ask(twin, server.address, method, **arguments)
    assert str(caught.value).endswith(f"; did you mean {meant!r}?")


@pytest.mark.parametrize("arguments", [{"model": "hats"}, {"model": "mlp-mnist", "version": 7}, {"model": ""}])
def test_what_nothing_is_like_is_not_guessed_at(client: Client, arguments: dict[str, Any]) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        client.generate(**arguments)
    assert "did you mean" not in str(caught.value)


@both
def test_a_label_may_be_in_another_case(server: RunningServer, twin: Twin) -> None:
    batch = ask(
        twin, server.address, "generate", "cdcgan-fashion-mnist", seed=1, label=["sneaker", "ANKLE boot", "Bag"]
    )
    assert batch.labels == (7, 9, 8)
    images = ask(twin, server.address, "stream", "cdcgan-fashion-mnist", count=300, seed=1, label="t-shirt/TOP")
    assert [image.seed for image in images] == list(range(1, 301))
    assert {image.label for image in images} == {0}


def test_a_model_knows_its_labels_by_index_name_or_nearly(client: Client) -> None:
    clothes, digits = client.model("cdcgan-fashion-mnist"), client.model("mlp-mnist")
    assert [clothes.label(name) for name in (3, "Sneaker", "sneaker", "ANKLE BOOT")] == [3, 7, 7, 9]
    with pytest.raises(InvalidRequestError, match=r"no class 'Snaeker'; it has T-shirt.*; did you mean 'Sneaker'\?"):
        clothes.label("Snaeker")
    with pytest.raises(InvalidRequestError, match="unconditional"):
        digits.label("Sneaker")
    both_cases = dataclasses.replace(clothes, class_names=("a", "A"))
    assert [both_cases.label("a"), both_cases.label("A")] == [0, 1]
    assert dataclasses.replace(clothes, class_names=("a", "b")).label("A") == 0
    with pytest.raises(InvalidRequestError):
        dataclasses.replace(clothes, class_names=("ab", "Ab")).label("AB")


def test_a_model_and_its_figures_are_told_in_a_line(client: Client) -> None:
    model = client.model("cdcgan-fashion-mnist")
    told = "<Model cdcgan-fashion-mnist version 1: cdcgan on fashion-mnist, 28x28x1, 10 classes, latents of 64>"
    assert repr(model) == told
    assert "unconditional" in repr(client.model("mlp-mnist"))
    assert all(len(repr(metric)) < 80 for metric in model.metrics)
    assert repr(model.metrics[0]).startswith("QualityMetric(name='label_accuracy', value=0.9")
    page = dataclasses.replace(model, name="<script>", class_names=("&",))._repr_html_()
    assert re.findall(r"<(\w+)", page)[:3] == ["table", "caption", "tr"]
    assert "&lt;script&gt;" in page
    text = re.sub("<[^>]*>", "|", page)
    assert "|classes||&amp;||" in text
    assert all(f"|{metric.name}||{metric.text()}||" in text for metric in model.metrics)
    measured = dataclasses.replace(model.metrics[0], value=0.98765, standard_error=0.00123)
    assert measured.text() == "0.9877 ± 0.0012"
    assert "|0.9877 ± 0.0012||" in re.sub("<[^>]*>", "|", dataclasses.replace(model, metrics=(measured,))._repr_html_())


def test_latents_of_another_shape_are_told_with_both_shapes(client: Client) -> None:
    wanted = r"model mlp-mnist takes \[count, 100\]"
    for shape, told in (
        ((3, 65), rf"latents is \[3, 65\]; {wanted}"),
        ((25, 64), rf"latents is \[25, 64\]; {wanted}"),  # as many numbers as 16 latents have
        ((300, 64), rf"latents is \[300, 64\]; {wanted}"),
        ((64,), rf"latents is \[1, 64\]; {wanted}"),
        ((3, 1, 100), r"latents is \[3, 1, 100\]; it must be \[count, latent_dim\]"),
        ((0, 100), r"latents is \[0, 100\]; it must be"),
        ((), r"latents is \[\]; it must be"),
    ):
        with pytest.raises(InvalidRequestError, match=told) as caught:
            client.generate("mlp-mnist", latents=np.zeros(shape))
        assert caught.value.field in ("latents", "count")
    with pytest.raises(InvalidRequestError, match="count is 2, but there are 3 latents"):
        client.generate("mlp-mnist", count=2, latents=np.zeros((3, 100)))
    with pytest.raises(InvalidRequestError, match="latents is not an array of numbers") as caught:
        client.generate("mlp-mnist", latents=[[1, 2], [3]])
    assert "inhomogeneous" not in str(caught.value)


@both
def test_a_seed_that_is_none_is_told_before_the_server_is_asked(twin: Twin) -> None:
    for seeds, told in (((-1, 2), "seed_a is -1"), ((1, 2**32), "seed_b is 4294967296"), ((1, "x"), "seed_b is 'x'")):
        with pytest.raises(InvalidRequestError, match=rf"^{told}; it must be an integer from 0 to 4294967295$"):
            ask(twin, "127.0.0.1:1", "interpolate", "mlp-mnist", *seeds)
    with pytest.raises(InvalidRequestError, match=r"^seed is -1; it must be an integer from 0 to 4294967295$"):
        latents([-1], 4)


@both
def test_an_interpolation_knows_between_which_seeds_it_lies(server: RunningServer, twin: Twin) -> None:
    way = ask(twin, server.address, "interpolate", "cdcgan-mnist", 4, 9, 5, kind="linear", label=3)
    assert way.interpolation == Interpolation("linear", 4, 9, 5, (0, 1, 2, 3, 4))
    assert way.provenance.interpolation == way.interpolation
    own = ask(twin, server.address, "generate", "mlp-mnist", latents=np.zeros((2, 100)))
    assert own.interpolation is None


def test_the_limits_of_an_answer_and_of_a_stream_are_told_apart(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="count is 10000001; a stream may ask for 1 to 10000000 images here"):
        client.generate("mlp-mnist", count=10**7 + 1)
    with pytest.raises(grpc.RpcError) as caught:
        client._calls.connected().generate_images(pb.GenerateImagesRequest(model="mlp-mnist", count=1025))
    assert caught.value.details() == "count is 1025; a call without a stream may ask for 1 to 1024 images here"  # type: ignore[attr-defined]


@both
def test_more_images_than_fit_in_an_answer_come_as_a_stream(
    twin: Twin, start_server: Callable[..., RunningServer]
) -> None:
    """As 22 images of 1024x1024 pixels do, which have more than 64 MiB."""
    running = start_server("--max-images-per-request", "3", "--max-images-per-stream", "5")
    batch = ask(twin, running.address, "generate", "mlp-mnist", count=5, seed=1)
    assert (batch.seeds, len(batch.pixels)) == ((1, 2, 3, 4, 5), 5)
    with pytest.raises(InvalidRequestError, match="a stream may ask for 1 to 5 images"):
        ask(twin, running.address, "generate", "mlp-mnist", count=6, seed=1)


def test_labels_are_all_names_or_all_indices(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="mixes indices and names: write them all as one or the other"):
        client.generate("cdcgan-fashion-mnist", label=["Bag", 1])
    with pytest.raises(InvalidRequestError, match=r"for each image$"):
        client.generate("cdcgan-fashion-mnist", label=[])


def test_nobody_at_the_address_is_unavailable() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        with Client(address) as alone, pytest.raises(UnavailableError, match=address):
            alone.models()


def test_a_client_that_never_gets_an_answer_gives_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with Client(address, timeout_s=0.2) as waiting, pytest.raises(GanserveError) as caught:
            waiting.models()
    assert type(caught.value).__name__ in ("DeadlineExceededError", "UnavailableError")


def test_a_timeout_is_kept_to_by_every_call(server: RunningServer) -> None:
    with Client(server.address, timeout_s=0.001) as hasty:
        for call in (
            lambda: hasty.generate("cdcgan-mnist", count=250),
            lambda: hasty.generate("cdcgan-mnist", count=1000),
            lambda: list(hasty.stream("cdcgan-mnist", count=1000)),
            lambda: hasty.contact_sheet("cdcgan-mnist", columns=100),
        ):
            # The server refuses at once what it cannot make in time for what waits: the calls before this one may.
            with pytest.raises((DeadlineExceededError, OverloadedError)):
                call()


@pytest.mark.parametrize("address", ["localhost", "http://localhost:50051"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(InvalidRequestError, match="HOST:PORT"):
            kind(address)


def test_the_address_comes_from_argument_environment_or_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GANSERVE_ADDRESS", raising=False)
    assert Client().address == DEFAULT_ADDRESS
    monkeypatch.setenv("GANSERVE_ADDRESS", "there:1")
    assert Client().address == "there:1"
    assert Client("here:1").address == "here:1"
    with pytest.raises(InvalidRequestError, match="address is ''"):
        Client("")  # of an empty configuration, which must not lead to another server
    monkeypatch.setenv("GANSERVE_ADDRESS", "bad")
    with pytest.raises(InvalidRequestError, match="GANSERVE_ADDRESS is 'bad'"):
        Client()


def test_a_client_is_not_pickled() -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(TypeError, match="make one in each process"):
            pickle.dumps(kind(NOBODY))


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.lists(st.one_of(st.integers(-2, 2**33), st.text(max_size=2), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=2), st.one_of(st.integers(), st.text(max_size=2)), max_size=2),
    st.just(object()),
    st.just(np.array([[1, 2], [3, 4]])),
    st.just(np.array(["a"])),
)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_whatever_the_arguments_are_only_errors_of_the_sdk_come(data: st.DataObject) -> None:
    with Client(NOBODY, retries=False) as client:
        name = data.draw(st.sampled_from(["generate", "stream", "generate_each", "interpolate", "contact_sheet"]))
        method = getattr(client, name)
        known = list(inspect.signature(method).parameters)
        needed = {"generate_each": {"seeds": [1]}, "interpolate": {"seed_a": 1, "seed_b": 2}, "stream": {"count": 2}}
        odd = data.draw(st.dictionaries(st.sampled_from(known), ODD, min_size=1, max_size=3))
        with pytest.raises(GanserveError):
            list(method(**{"model": "digits", "timeout_s": 0.01, **needed.get(name, {}), **odd}))


@pytest.mark.parametrize(
    "arguments",
    [
        {"label": []},
        {"label": ["1", 2]},
        {"label": np.array([1.5])},
        {"truncation": "much"},
        {"latents": [[1, 2], [3]]},
        {"latents": "x"},
        {"seed": 1, "latents": [0.0] * 64},
        {"label": [[1], [2, 3]]},
        {"label": [None]},
        {"label": "\ud800"},
        {"label": {}},
        {"latents": [[1j] * 64]},
        {"model": "\ud800"},
        {"model": None},
        {"model": b"cdcgan-mnist"},
        {"truncation": float("nan")},
        {"timeout_s": 0},
        {"timeout_s": "soon"},
        {"timeout_s": float("nan")},
    ],
)
def test_arguments_that_make_no_sense_are_refused(client: Client, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        client.generate(**{"model": "cdcgan-mnist", **arguments})


def test_a_request_larger_than_the_server_takes_is_not_called_an_overload(client: Client) -> None:
    with pytest.raises(MessageTooLargeError, match="fewer latents") as caught:
        client.generate("cdcgan-mnist", latents=np.zeros((30, 64_000)))
    assert caught.value.limit_bytes == 4 << 20
    assert (caught.value.size_bytes or 0) > 30_000 * 64 * 4


@pytest.mark.parametrize(("name", "version"), [(None, None), ("\ud800", None), ("mlp-mnist", "1"), ("mlp-mnist", -1)])
def test_models_that_no_message_can_name_are_refused(client: Client, name: Any, version: Any) -> None:
    with pytest.raises(InvalidRequestError):
        client.model(name, version)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2"])
def test_what_a_contact_sheet_cannot_have_is_refused_before_any_call(wrong: Any) -> None:
    with Client(NOBODY) as client:
        for argument in ("columns", "scale"):
            with pytest.raises(InvalidRequestError, match=argument):
                client.contact_sheet("cdcgan-mnist", **{argument: wrong})


def test_a_contact_sheet_that_is_too_large_is_refused_before_its_images_are_made(client: Client) -> None:
    for size in ({"scale": 10**6}, {"columns": 10**7}):
        with pytest.raises(InvalidRequestError, match="pixels; it may have at most 178956970"):
            client.contact_sheet("cdcgan-mnist", **size)


def test_files_images_and_batches_are_made_again(client: Client, tmp_path: Path) -> None:
    batch = client.generate("cdcgan-mnist", count=3, seed=5, label=[1, 2, 3])
    batch.sheet().save(tmp_path / "sheet.png")
    content = (tmp_path / "sheet.png").read_bytes()
    for source in (batch, batch.provenance, tmp_path / "sheet.png", str(tmp_path / "sheet.png"), content):
        assert client.reproduce(source) == batch
    assert client.reproduce(batch[1])[0] == batch[1]
    with open(tmp_path / "sheet.png", "rb") as file:
        assert client.reproduce(file) == batch
    for wrong in (7, None, {}):
        with pytest.raises(InvalidRequestError, match="source is a"):
            client.reproduce(wrong)  # type: ignore[arg-type]


def test_numpy_scalars_are_numbers(client: Client) -> None:
    batch = client.generate("cdcgan-mnist", seed=np.uint32(3), label=np.array(4), timeout_s=float("inf"))
    assert (batch.seeds, batch.labels) == ((3,), (4,))


async def test_a_closed_client_says_so(server: RunningServer) -> None:
    closed, async_closed = Client(server.address), AsyncClient(server.address)
    closed.close()
    await async_closed.close()
    with pytest.raises(GanserveError, match="closed"):
        closed.models()
    with pytest.raises(GanserveError, match="closed"):
        next(closed.stream("mlp-mnist", count=1))
    with pytest.raises(GanserveError, match="closed"):
        await async_closed.models()


def test_an_async_client_may_be_made_before_its_loop(server: RunningServer) -> None:
    made_early = AsyncClient(server.address)

    async def use() -> int:
        async with made_early:
            return len(await made_early.models())

    assert asyncio.run(use()) == 4


def test_an_async_client_goes_on_in_the_next_loop_once_its_own_is_over(server: RunningServer) -> None:
    client = AsyncClient(server.address)
    for seed in (1, 2):
        assert asyncio.run(client.generate("mlp-mnist", seed=seed)).seeds == (seed,)
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    first.run_until_complete(client.models())
    with pytest.raises(InvalidRequestError, match="another event loop"):
        second.run_until_complete(client.models())
    first.run_until_complete(client.close())
    first.close()
    second.close()


def test_one_client_serves_many_threads(client: Client) -> None:
    results: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(
            target=lambda seed=seed: results.update({seed: client.generate("mlp-mnist", seed=seed).pixels})
        )
        for seed in range(32)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = client.generate("mlp-mnist", count=32, seed=0).pixels
    assert all(np.array_equal(results[seed][0], together[seed]) for seed in range(32))


async def test_the_async_client_gives_the_same(client: Client, async_client: AsyncClient) -> None:
    wanted = client.generate("cdcgan-mnist", count=300, seed=9, label="3")
    got = await async_client.generate("cdcgan-mnist", count=300, seed=9, label="3")
    assert np.array_equal(got.pixels, wanted.pixels)
    assert (got.seeds, got.labels) == (wanted.seeds, wanted.labels)
    streamed = [batch async for batch in async_client.stream_batches("cdcgan-mnist", count=300, seed=9, label="3")]
    assert np.array_equal(np.concatenate([batch.pixels for batch in streamed]), wanted.pixels)
    assert await async_client.models() == client.models()
    images = [image async for image in async_client.stream("cdcgan-mnist", count=300, seed=9, label="3")]
    assert np.array_equal(np.stack([image.pixels for image in images]), wanted.pixels)
    way = await async_client.interpolate("cdcgan-mnist", 1, 2, 3)
    assert np.array_equal(way.pixels, client.interpolate("cdcgan-mnist", 1, 2, 3).pixels)
    sheet = await async_client.contact_sheet("cdcgan-mnist", columns=2, seed=4)
    assert np.array_equal(np.asarray(sheet), np.asarray(client.contact_sheet("cdcgan-mnist", columns=2, seed=4)))
    with pytest.raises(ModelNotFoundError):
        await async_client.model("nothing")
    with pytest.raises(InvalidRequestError):
        _ = [batch async for batch in async_client.stream_batches("mlp-mnist", count=5, label=1)]
