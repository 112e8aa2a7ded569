"""Labels as people give them on the command line: names, indices, and numbers that may be either."""

from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
from google.protobuf import json_format
from tests.client.program import ganserve
from tests.conftest import RunningServer, run_server

from ganserve import Client, InvalidRequestError, read_provenance
from ganserve.v1 import generation_pb2 as pb
from ganserve_server.repository.verify import CARD_KEY
from ganserve_server.settings import BUNDLED_MODELS

NAMES = {
    "padded": [f"{number:02}" for number in range(1, 11)],  # 01 to 10
    "from-one": [str(number) for number in range(1, 11)],
    "words": ["ant, red", "ant", "bee", "Bee", "cat", "dog", "eel", "fox", "gnu", "hen"],
    "twice": ["ant", "ant", *"bcdefghi"],
}


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with one model under several names, whose classes have other names."""
    repository = tmp_path_factory.mktemp("models")
    model = onnx.load(BUNDLED_MODELS / "cdcgan-mnist" / "1" / "model.onnx")
    (entry,) = (entry for entry in model.metadata_props if entry.key == CARD_KEY)
    card = json_format.Parse(entry.value, pb.ModelCard())
    for name, class_names in NAMES.items():
        card.class_names[:] = class_names
        entry.value = json_format.MessageToJson(card)
        file = repository / name / "1" / "model.onnx"
        file.parent.mkdir(parents=True)
        onnx.save(model, file)
    with run_server("--workers=1", f"--models={repository}") as server:
        yield server


@pytest.fixture
def labels_made(named: RunningServer, tmp_path: Path) -> Callable[..., tuple[int, ...] | None]:
    """Return the labels of the images that `ganserve generate` makes."""

    def made(model: str, *labels: str) -> tuple[int, ...] | None:
        out = tmp_path / "out.png"
        options = [part for label in labels for part in ("--label", label)]
        done = ganserve("generate", model, "--count", "3", *options, "-o", out, address=named.address)
        assert done.returncode == 0, done.stderr
        return read_provenance(out).labels

    return made


@pytest.mark.parametrize(
    ("model", "label", "wanted"),
    [
        ("padded", "07", (6, 6, 6)),
        ("padded", "07,02", (6, 1, 6)),
        ("from-one", "2", (1, 1, 1)),
        ("from-one", "10,1", (9, 0, 9)),
        ("words", "7", (7, 7, 7)),
        ("words", "ant, red", (0, 0, 0)),
        ("words", "bee,Bee", (2, 3, 2)),
        ("words", " HEN , 1", (9, 1, 9)),
    ],
)
def test_the_exact_name_of_a_class_wins_over_an_index(
    labels_made: Callable[..., tuple[int, ...] | None], model: str, label: str, wanted: tuple[int, ...]
) -> None:
    assert labels_made(model, label) == wanted


@pytest.mark.parametrize(
    ("model", "label", "parts"),
    [
        ("padded", "7", ["--label 7 is ambiguous", "class 7, counted from 0, is called '08'"]),
        ("from-one", "0", ["--label 0 is ambiguous", "class 0, counted from 0, is called '1'"]),
        ("from-one", "07", ["has no class '07'"]),
        ("words", "07", ["has no class '07'"]),
        ("words", "10", ["has no class '10'"]),
        ("words", "BEE", ["has no class 'BEE'", "did you mean"]),
        ("words", "ant,red", ["has no class 'red'"]),
        ("twice", "ant", ["several classes called 'ant': 0, 1", "give the index"]),
    ],
)
@pytest.mark.parametrize("command", ["generate", "interpolate", "stream", "bench"])
def test_what_may_mean_two_classes_or_none_is_refused(
    named: RunningServer, tmp_path: Path, command: str, model: str, label: str, parts: list[str]
) -> None:
    arguments = {
        "generate": ["-o", tmp_path / "out.png"],
        "interpolate": ["1", "2", "-o", tmp_path / "out.gif"],
        "stream": ["--count", "3", "--to", tmp_path / "out"],
        "bench": ["--duration", "0.1"],
    }[command]
    done = ganserve(command, model, *arguments, "--label", label, address=named.address)
    assert done.returncode in (1, 2)
    text = " ".join(done.stderr.split())
    assert all(part in text for part in parts), text
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_a_class_is_printed_beside_its_index(named: RunningServer, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    done = ganserve("generate", "padded", "--label", "07,02", "-o", out, address=named.address)
    assert "labels 6 (07), 1 (02), seed" in done.stdout
    done = ganserve("interpolate", "words", "1", "2", "--label", "7", "-o", tmp_path / "a.gif", address=named.address)
    assert "label 7 (fox)" in done.stdout


def test_a_name_that_two_classes_have_is_refused_by_the_server_and_the_sdk(named: RunningServer) -> None:
    with Client(named.address) as client:
        with pytest.raises(InvalidRequestError, match="several classes 'ant': give a label: 0, 1"):
            client.generate("twice", label="ant")
        with pytest.raises(InvalidRequestError, match="several classes 'ant'"):
            list(client.generate_each("twice", [1], label="ant"))
        assert client.generate("twice", label="b").labels == (2,)
        assert client.model("twice").label("b") == 2
        with pytest.raises(InvalidRequestError, match="0, 1; give the index"):
            client.model("twice").label("ant")
