import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tests.conftest import RunningServer

from ganserve import Client, GanserveError, ImageBatch, Interpolation, NoProvenanceError, Provenance, read_provenance
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc

ONE = Provenance("digits", 2, "sha256:0", seed=7, label=3, truncation=0.5)
FIELDS = json.loads(ONE.to_json())
PLACES = {"png": "PNG text chunk", "jpg": "EXIF", "webp": "EXIF", "tiff": "EXIF", "gif": "GIF comment"}


def batch(seeds: tuple[int, ...] | None, labels: tuple[int, ...] | None = None) -> ImageBatch:
    count = 3 if seeds is None else len(seeds)
    pixels = np.random.RandomState(0).randint(0, 256, (count, 4, 5, 1)).astype(np.uint8)
    return ImageBatch(pixels, seeds, labels, "digits", 2, "sha256:0", "CPUExecutionProvider", 0.5, 0.0, 0.0)


def png(text: str) -> bytes:
    info, file = PngInfo(), io.BytesIO()
    info.add_text("ganserve", text)
    Image.new("L", (2, 2)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


@pytest.mark.parametrize("ending", PLACES)
def test_a_saved_file_says_how_to_make_its_image_again(tmp_path: Path, ending: str) -> None:
    images = batch((7, 8, 9), (3, 4, 5))
    paths = images.save(tmp_path / f"{{seed}}.{ending}")
    assert read_provenance(paths[0]) == ONE
    assert read_provenance(str(paths[2])) == dataclasses.replace(ONE, seed=9, label=5)
    assert read_provenance(paths[1].read_bytes()) == images[1].provenance
    with paths[1].open("rb") as file:
        assert read_provenance(file) == images[1].provenance


@pytest.mark.parametrize("ending", PLACES)
@pytest.mark.parametrize(
    ("seeds", "labels"),
    [
        ((7, 8, 9), (3, 3, 3)),
        ((2**32 - 2, 2**32 - 1, 0, 1), None),
        ((5, 1, 9, 10, 11, 11, 11, 11, 2, 1, 0), (0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1)),
        ((0, 2, 4, 6), (9, 7, 5, 3)),
        ((7,), (3,)),
        (None, (3, 3, 4)),
    ],
)
def test_a_sheet_says_the_seed_and_label_of_each_image(
    tmp_path: Path, ending: str, seeds: tuple[int, ...] | None, labels: tuple[int, ...] | None
) -> None:
    images = batch(seeds, labels)
    images.sheet().save(tmp_path / f"sheet.{ending}")
    found = read_provenance(tmp_path / f"sheet.{ending}")
    assert found == images.provenance
    assert (found.count, found.seeds, found.labels) == (len(images), seeds, labels)


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_an_animation_says_its_seeds(tmp_path: Path, ending: str) -> None:
    images = batch((7, 8, 9), (3, 4, 5))
    assert read_provenance(images.gif(tmp_path / f"walk.{ending}")) == images.provenance


@pytest.mark.parametrize("ending", PLACES)
@pytest.mark.parametrize("shown", [(0, 1, 2), (2, 0, 1), (7, 7, 7)])
def test_a_picture_of_an_interpolation_says_between_which_seeds_it_lies(
    tmp_path: Path, ending: str, shown: tuple[int, ...]
) -> None:
    way = Interpolation("linear", 2**32 - 1, 5, 3 if max(shown) < 3 else 8, shown)
    images = dataclasses.replace(batch(None, (3, 3, 4)), interpolation=way)
    images.sheet().save(tmp_path / f"sheet.{ending}")
    found = read_provenance(tmp_path / f"sheet.{ending}")
    assert found == images.provenance
    assert (found.interpolation, found.seed, found.labels) == (way, None, (3, 3, 4))
    one = read_provenance(images[1].save(tmp_path / f"one.{ending}"))
    assert one.interpolation == dataclasses.replace(way, shown=shown[1:2])


def test_an_interpolation_can_be_made_again_from_its_file(client: Client, tmp_path: Path) -> None:
    images = client.interpolate("cdcgan-mnist", 4, 9, 5, kind="linear", truncation=0.7)
    found = read_provenance(images.gif(tmp_path / "walk.gif"))
    way = found.interpolation
    assert way is not None
    again = client.interpolate(
        *(found.model, way.seed_a, way.seed_b, way.steps),
        kind=way.kind,
        label=found.labels,
        truncation=found.truncation,
        version=found.version,
    )
    assert np.array_equal(again.pixels, images.pixels)
    assert again.provenance == found


@pytest.mark.parametrize("ending", PLACES)
def test_provenance_can_be_left_out(tmp_path: Path, ending: str) -> None:
    images = batch((7, 8, 9))
    paths = images.save(tmp_path / f"{{seed}}.{ending}", provenance=False)
    paths.append(images[0].save(tmp_path / f"one.{ending}", provenance=False))
    paths.append(tmp_path / f"sheet.{ending}")
    images.sheet().save(paths[-1], provenance=False)
    if ending in ("gif", "webp"):
        paths.append(images.gif(tmp_path / f"walk.{ending}", provenance=False))
    for path in paths:
        with pytest.raises(NoProvenanceError, match=r"PNG text chunk 'ganserve', no EXIF ImageDescription and no GIF"):
            read_provenance(path)
        assert b"digits" not in path.read_bytes()


def test_a_changed_copy_of_a_sheet_claims_nothing(tmp_path: Path) -> None:
    sheet = batch((7, 8, 9)).sheet()
    for changed in (sheet.resize((3, 3)), sheet.convert("RGB"), sheet.crop((0, 0, 2, 2))):
        changed.save(tmp_path / "changed.png")
        with pytest.raises(NoProvenanceError):
            read_provenance(tmp_path / "changed.png")


@pytest.mark.parametrize("encoding", ["PNG", "JPEG", "WEBP"])
def test_the_servers_files_are_read_too(server: RunningServer, client: Client, encoding: str) -> None:
    fields: dict[str, Any] = {"count": 4, "seed": 2**32 - 2, "labels": [1, 2, 3, 4], "truncation": 0.7}
    wanted = client.generate("cdcgan-mnist", count=4, seed=2**32 - 2, label=[1, 2, 3, 4], truncation=0.7)
    with grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        request = pb.GenerateImagesRequest(model="cdcgan-mnist", encoding=f"ENCODING_{encoding}", **fields)
        files = stub.GenerateImages(request).files
        request.layout = pb.LAYOUT_CONTACT_SHEET
        (sheet,) = stub.GenerateImages(request).files
        own = pb.Latents(values=[0.0] * 200)
        request = pb.GenerateImagesRequest(model="mlp-mnist", encoding=f"ENCODING_{encoding}", latents=own, count=2)
        (own_latents, _) = stub.GenerateImages(request).files
    assert [read_provenance(file) for file in files] == [image.provenance for image in wanted]
    found = read_provenance(sheet)
    assert found == wanted.provenance
    assert (found.labels, found.seeds) == ((1, 2, 3, 4), (2**32 - 2, 2**32 - 1, 0, 1))
    assert (read_provenance(own_latents).model, read_provenance(own_latents).seed) == ("mlp-mnist", None)


def test_an_image_can_be_made_again_from_its_file(client: Client, tmp_path: Path) -> None:
    client.generate("cdcgan-mnist", count=3, label=7, truncation=0.7).save(tmp_path / "{index}.png")
    found = read_provenance(tmp_path / "2.png")
    again = client.generate(
        found.model, seed=found.seed, label=found.label, truncation=found.truncation, version=found.version
    )
    assert again.digest == found.digest
    with Image.open(tmp_path / "2.png") as image:
        assert np.array_equal(np.asarray(image), again.pixels[0, :, :, 0])


def test_a_thousand_consecutive_seeds_take_no_more_room_than_two() -> None:
    thousand = batch(tuple(range(1000)), (7,) * 1000).provenance
    assert len(thousand.to_json()) < len(batch((0, 1), (7, 7)).provenance.to_json()) + 20
    assert Provenance.from_json(thousand.to_json()) == thousand


def test_more_irregular_seeds_than_a_jpeg_holds_are_left_out(tmp_path: Path) -> None:
    seeds = tuple(np.random.RandomState(0).randint(0, 2**32, 10_000, np.uint32).tolist())
    way = Interpolation("slerp", 1, 2, 2**19, tuple(seed % 2**19 for seed in seeds))
    for images in (
        batch(seeds, tuple(range(10)) * 1000),
        dataclasses.replace(batch(seeds, tuple(range(10)) * 1000), seeds=None, interpolation=way),
    ):
        images.sheet().save(tmp_path / "large.jpg")
        found = read_provenance(tmp_path / "large.jpg")
        assert (found.model, found.count) == ("digits", 10_000)
        assert (found.seed, found.seeds, found.label, found.labels, found.interpolation) == (None,) * 5


def test_what_is_printed_is_what_is_known_and_short() -> None:
    assert repr(ONE) == "Provenance(model='digits', version=2, digest='sha256:0', seed=7, label=3, truncation=0.5)"
    assert eval(repr(ONE)) == ONE
    many = repr(batch(tuple(range(1000)), (7,) * 1000).provenance)
    assert "count=1000, seeds=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, …), labels=(7, 7, " in many
    assert len(repr(Interpolation("slerp", 1, 2, 1000, tuple(range(1000))))) < 150


def test_keys_of_later_versions_are_left_alone() -> None:
    assert Provenance.from_json(json.dumps({**FIELDS, "licence": {"name": "CC0"}})) == ONE


SHEET = {**FIELDS, "count": 3}
WAY: dict[str, object] = {"kind": "slerp", "seed_a": 1, "seed_b": 2, "steps": 3}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (json.dumps(FIELDS)[:-9], "not JSON"),
        ("", "not JSON"),
        ("Made by hand", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5000, "not JSON"),
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        (json.dumps({**FIELDS, "more": "x" * 120_000}), "characters"),
        *((json.dumps({key: FIELDS[key] for key in FIELDS if key != lost}), f"no '{lost}'") for lost in FIELDS),
        *(
            (json.dumps({**fields, key: value}), f"'{key}'")
            for fields, key, values in [
                (FIELDS, "model", (None, 5, "", ["digits"], "digits\x1b[31m", "a\nb")),
                (FIELDS, "digest", (None, 0, {})),
                (FIELDS, "version", (None, 0, -1, 1.5, "2", True, 2**32)),
                (FIELDS, "seed", ("7", 7.0, -1, 2**32, True, [7])),
                (FIELDS, "label", ("3", -1, 2**32, False)),
                (FIELDS, "truncation", (None, "1", -0.1, 2.1, True, float("nan"), float("inf"))),
                (SHEET, "count", (0, -1, "3", 10**6 + 1, 2**31, 1.0)),
                (SHEET, "seeds", (5, "567", [1, 2], [1, 2, 3, 4], ["1", 2, 3], [[1, 4, 1]], [[1, 2**31, 1]])),
                (SHEET, "seeds", ([[1, 3, 2]], [[1, 3]], [[1, 3, -1]], [[2**32 - 1, 3, 1]], [[True, 3, 1]], {})),
                (SHEET, "labels", ([None] * 3, [], [-1, 0, 1])),
                (SHEET, "interpolation", (5, "slerp", [], [WAY])),
            ]
            for value in values
        ),
        *(
            (json.dumps({**fields, "attributes": {"age": value}}), "attribute 'age'")
            for fields, values in [
                (FIELDS, (None, "1", True, [1], float("nan"), float("inf"), 10**400)),
                (SHEET, ([1, 2], [1, 2, 10**400], [1, 2, None])),
            ]
            for value in values
        ),
        (json.dumps({**FIELDS, "attributes": {"x" * 50_000: None}}), "attribute 'x"),
        (json.dumps({**FIELDS, "attributes": {"a\nb": 1}}), "'attributes'"),
        (json.dumps({**FIELDS, "input_seeds": {"noise": 2**32}}), "'input_seeds'"),
        *(
            (json.dumps({**fields, "interpolation": {**WAY, **change}}), reason)
            for fields, change, reason in [
                (SHEET, {"kind": "round"}, "'kind'"),
                (SHEET, {"kind": None}, "'kind'"),
                (SHEET, {"seed_a": None}, "'interpolation'"),
                (SHEET, {"seed_a": -1}, "'seed_a'"),
                (SHEET, {"seed_b": 2**32}, "'seed_b'"),
                (SHEET, {"steps": 1}, "'interpolation'"),
                (SHEET, {"steps": 10**6 + 1}, "'interpolation'"),
                (SHEET, {"steps": 4}, "'shown'"),
                (FIELDS, {}, "'shown'"),
                (FIELDS, {"shown": [3]}, "'shown'"),
                (FIELDS, {"shown": []}, "'shown'"),
                (FIELDS, {"shown": None}, "'shown'"),
                (FIELDS, {"shown": [[0, 3, 1]]}, "'shown'"),
            ]
        ),
        *(
            (json.dumps({**SHEET, "interpolation": {key: WAY[key] for key in WAY if key != lost}}), f"no '{lost}'")
            for lost in WAY
        ),
    ],
)
def test_broken_metadata_is_an_error_that_says_what_is_wrong(text: str, reason: str) -> None:
    with pytest.raises(NoProvenanceError) as raised:
        read_provenance(png(text))
    assert reason in str(raised.value)
    assert "PNG text chunk 'ganserve'" in str(raised.value)
    assert len(str(raised.value)) < 300


def test_null_seeds_of_a_picture_of_several_are_none() -> None:
    found = Provenance.from_json(json.dumps({**SHEET, "seeds": None}))
    assert (found.seed, found.seeds) == (7, None)


def _foreign(description: object) -> bytes:
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x010E] = description
    Image.new("RGB", (2, 2)).save(file, "JPEG", exif=exif, comment=b"taken in June")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "image"),
        (b"no image at all", "not an image"),
        (b'{"model": "digits"}', "not an image"),
        (png(ONE.to_json())[:60], "image"),
        (_foreign("SONY DSC"), "EXIF ImageDescription isn't ganserve's; it is not JSON"),
        (_foreign('{"camera": 1}'), "no 'version'"),
    ],
)
def test_a_file_from_elsewhere_is_an_error_that_names_it(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "found.png"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(NoProvenanceError) as raised:
            read_provenance(source)
        assert reason in str(raised.value)
        assert ("found.png" if source is path else "this ") in str(raised.value)
    assert issubclass(NoProvenanceError, GanserveError)


def test_no_damaged_file_is_more_than_an_error(tmp_path: Path) -> None:
    draw = np.random.RandomState(0)
    outcomes = {"read": 0, "refused": 0}
    for ending in PLACES:
        whole = batch((7,), (3,))[0].save(tmp_path / f"whole.{ending}").read_bytes()
        for _ in range(200):
            damaged = bytearray(whole[: draw.randint(1, len(whole) + 1)] if draw.rand() < 0.3 else whole)
            for place in draw.randint(0, len(damaged), draw.randint(1, 4)):
                damaged[place] = draw.randint(0, 256)
            try:
                read_provenance(bytes(damaged))
                outcomes["read"] += 1
            except NoProvenanceError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 100


def test_a_picture_too_large_to_be_meant_well_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with pytest.raises(NoProvenanceError, match="decompression bomb"):
        read_provenance(png(ONE.to_json()))


def test_a_file_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_provenance(tmp_path / "nothing.png")
    with pytest.raises(IsADirectoryError):
        read_provenance(tmp_path)
