import io
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tests.client.program import environment, ganserve
from tests.conftest import RunningServer

from ganserve import Client
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc


@pytest.fixture
def picture(client: Client, tmp_path: Path) -> Path:
    """A PNG of one image."""
    return client.generate("cdcgan-mnist", seed=5, label=7)[0].save(tmp_path / "seven.png")


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
@pytest.mark.parametrize("layout", [(), ("--columns", "3", "--scale", "3")])
def test_a_picture_can_be_made_again(
    server: RunningServer, tmp_path: Path, ending: str, layout: tuple[str, ...]
) -> None:
    out = tmp_path / f"a.{ending}"
    made = ("--count", "7", "--label", "Bag", "--label", "Dress", "--truncation", "0.7", *layout)
    assert ganserve("generate", "cdcgan-fashion-mnist", *made, "-o", out, address=server.address).returncode == 0
    done = ganserve("reproduce", out, address=server.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the same: all" in done.stdout


def save_sheet_with_names(client: Client, path: Path) -> None:
    client.contact_sheet("cdcgan-fashion-mnist", columns=3, seed=2).save(path)


def save_unlike_seeds(client: Client, path: Path) -> None:
    client.generate("cdcgan-mnist", count=9, seed=3)[::2].sheet().save(path)


def save_more_than_a_request(client: Client, path: Path) -> None:
    client.generate("cdcgan-mnist", count=1100, seed=3).sheet().save(path)


def save_grey_animation(client: Client, path: Path) -> None:
    client.generate("mlp-mnist", count=5, seed=4).gif(path, scale=2, bounce=False)


def save_interpolation(client: Client, path: Path) -> None:
    client.interpolate("cdcgan-mnist", 4, 2**32 - 1, 7, kind="linear", truncation=0.7).gif(path)


def save_part_of_an_interpolation(client: Client, path: Path) -> None:
    client.interpolate("mlp-mnist", 4, 9, 8)[::-3].sheet(columns=2).save(path)


def save_one_of_an_interpolation(client: Client, path: Path) -> None:
    client.interpolate("cdcgan-fashion-mnist", 4, 9, 8, label="bag")[3].save(path)


def save_more_of_an_interpolation_than_a_request(client: Client, path: Path) -> None:
    client.interpolate("mlp-mnist", 4, 9, 1024).sheet().save(path)


def save_file_of_the_server(encoding: "pb.Encoding", layout: "pb.Layout", label: int | None) -> Callable[..., None]:
    def save(client: Client, path: Path) -> None:
        request = pb.GenerateImagesRequest(model="cdcgan-mnist", count=6, seed=8, encoding=encoding, layout=layout)
        request.labels.extend([] if label is None else [label])
        with grpc.insecure_channel(client.address) as channel:
            path.write_bytes(pb_grpc.GenerationServiceStub(channel).GenerateImages(request).files[-1])

    return save


@pytest.mark.parametrize(
    ("save", "name"),
    [
        (save_sheet_with_names, "names.png"),
        (save_unlike_seeds, "seeds.png"),
        (save_more_than_a_request, "many.png"),
        (save_grey_animation, "walk.gif"),
        (save_grey_animation, "walk.webp"),
        (save_interpolation, "between.gif"),
        (save_part_of_an_interpolation, "part.jpg"),
        (save_one_of_an_interpolation, "one.webp"),
        (save_more_of_an_interpolation_than_a_request, "many.png"),
        (save_file_of_the_server(pb.ENCODING_JPEG, pb.LAYOUT_ONE_EACH, None), "one.jpg"),
        (save_file_of_the_server(pb.ENCODING_PNG, pb.LAYOUT_CONTACT_SHEET, None), "classes.png"),
        (save_file_of_the_server(pb.ENCODING_WEBP, pb.LAYOUT_CONTACT_SHEET, 3), "threes.webp"),
    ],
)
def test_what_the_sdk_and_the_server_write_can_be_made_again(
    server: RunningServer, client: Client, tmp_path: Path, save: Callable[..., None], name: str
) -> None:
    save(client, tmp_path / name)
    done = ganserve("reproduce", tmp_path / name, address=server.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the same: all" in done.stdout


def changed(picture: Path, *, by: int = 0, size: int = 28, **provenance: str | int) -> None:
    """Write the picture with one pixel so many levels off, of another size, or with another provenance."""
    with Image.open(picture) as image:
        pixels, text = np.array(image), json.loads(image.info["ganserve"])
    pixels[3, 4] = (int(pixels[3, 4]) + by) % 256
    info = PngInfo()
    info.add_text("ganserve", json.dumps({**text, **provenance}))
    Image.fromarray(pixels).resize((size, size)).save(picture, pnginfo=info)


def test_a_pixel_that_is_not_the_same_is_found(server: RunningServer, picture: Path) -> None:
    assert ganserve("reproduce", picture, address=server.address).returncode == 0
    changed(picture, by=1)
    done = ganserve("reproduce", picture, address=server.address)
    assert done.returncode == 1
    assert "different: 1 of 784 pixels differ, by at most 1 levels" in done.stdout
    done = ganserve("reproduce", picture, "--json", address=server.address)
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert (told["same"], told["compared"]) == (False, {"pixels": 784, "differing": 1, "largest": 1})
    assert ganserve("reproduce", picture, "--tolerance", "1", address=server.address).returncode == 0
    with picture.open("rb") as file:
        assert ganserve("reproduce", "-", stdin=file, address=server.address).returncode == 1


def test_a_picture_of_another_seed_or_size_is_not_the_same(server: RunningServer, picture: Path) -> None:
    changed(picture, seed=6)
    assert "different: " in ganserve("reproduce", picture, address=server.address).stdout
    changed(picture, seed=5, size=30)
    done = ganserve("reproduce", picture, address=server.address)
    assert done.returncode == 1
    assert "cropped or scaled" in done.stdout


def test_another_file_under_the_same_version_is_told(server: RunningServer, picture: Path) -> None:
    changed(picture, digest="sha256:" + 64 * "0")
    done = ganserve("reproduce", picture, address=server.address)
    assert done.returncode == 0
    assert "the server's version 1 " in done.stdout


def test_what_cannot_be_made_again_is_said_in_a_line(server: RunningServer, client: Client, tmp_path: Path) -> None:
    plain, own, gone = tmp_path / "plain.png", tmp_path / "own.png", tmp_path / "gone.png"
    Image.new("L", (28, 28)).save(plain)
    client.generate("mlp-mnist", latents=np.zeros((1, client.model("mlp-mnist").latent_dim)))[0].save(own)
    client.generate("mlp-mnist")[0].save(gone)
    changed(gone, version=7)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    refused = client.generate("cdcgan-mnist", seed=1)[0].save(tmp_path / "refused.png")
    changed(refused, label=77)
    for path, told in (
        (plain, "doesn't say how it was made"),
        (own, "not in the file: latents of the caller's own"),
        (gone, "no version 7"),
        (refused, "the server can't make it: there is no label 77"),
        (text, "text.png: this is not an image"),
    ):
        done = ganserve("reproduce", path, address=server.address)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert done.stderr.startswith(f"ganserve: {path}: ")
        assert told in done.stderr


def test_inspect_reads_a_picture_without_a_server(client: Client, picture: Path, tmp_path: Path) -> None:
    elsewhere = environment(GANSERVE_ADDRESS="127.0.0.1:1")
    done = ganserve("inspect", picture, env=elsewhere)
    assert done.returncode == 0
    facts = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[1:])
    assert (facts["model"], facts["seed"], facts["label"]) == ("cdcgan-mnist", "5", "7")
    with picture.open("rb") as file:
        told = json.loads(ganserve("inspect", "-", "--json", env=elsewhere, stdin=file).stdout)
    assert (told["format"], told["width"], told["provenance"]["seed"]) == ("PNG", 28, 5)
    walk = tmp_path / "walk.gif"
    client.interpolate("cdcgan-mnist", 1, 2, 4)[1:].gif(walk)
    told = ganserve("inspect", walk, env=elsewhere).stdout
    assert re.search(r"^seed +from 1 to 2 by slerp in 4 steps, shown 1 to 3$", told, re.MULTILINE)
    made = json.loads(ganserve("inspect", walk, "--json", env=elsewhere).stdout)["provenance"]["interpolation"]
    assert made == {"kind": "slerp", "seed_a": 1, "seed_b": 2, "steps": 4, "shown": [1, 2, 3]}
    empty = io.BytesIO()
    Image.new("L", (28, 28)).save(empty, "PNG")
    picture.write_bytes(empty.getvalue())
    assert ganserve("inspect", picture, env=elsewhere).returncode == 1


@pytest.fixture
def archive(server: RunningServer, tmp_path: Path) -> Path:
    """A data set of 2,500 clothes of two classes, in one file."""
    out = tmp_path / "clothes.npz"
    made = ("cdcgan-fashion-mnist", "--label", "bag", "--label", "3", "--seed", str(2**32 - 9), "--truncation", "0.7")
    done = ganserve("stream", *made, "--count", "2500", "--to", out, address=server.address)
    assert done.returncode == 0, done.stderr
    return out


def with_images(archive: Path, out: Path, change: Callable[["np.ndarray"], "np.ndarray"], **others: object) -> Path:
    """Write an archive of ours again, as programs do: with its images changed, or other arrays."""
    with np.load(archive) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    np.savez_compressed(out, **{**content, "images": change(content["images"]), **others})  # type: ignore[arg-type]
    return out


def test_a_data_set_in_an_npz_can_be_inspected_and_made_again(
    server: RunningServer, archive: Path, tmp_path: Path
) -> None:
    done = ganserve("inspect", archive, env=environment(GANSERVE_ADDRESS="127.0.0.1:1"))
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    facts = dict(line.split(maxsplit=1) for line in rest)
    assert first == f"{archive}: NPZ, 2500 images of 28x28"
    assert (facts["seed"], facts["label"], facts["truncation"]) == ("4294967287 to 2490", "8, 3, in turn", "0.7")
    done = ganserve("reproduce", archive, address=server.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"the same: all {2500 * 784} pixels agree" in done.stdout

    def one_pixel(images: "np.ndarray") -> "np.ndarray":
        images[2000, 5, 5] ^= 1
        return images

    other = with_images(archive, tmp_path / "other.npz", one_pixel)
    compressed = other.read_bytes()
    done = ganserve("reproduce", other, "--json", address=server.address)
    assert (done.returncode, json.loads(done.stdout)["compared"]["differing"]) == (1, 1)
    with other.open("rb") as file:
        done = ganserve("reproduce", "-", "--count", "2000", stdin=file, address=server.address)
    assert done.returncode == 0
    assert f"all {2000 * 784} pixels of the first 2000 images agree" in done.stdout
    assert ganserve("reproduce", other, "--tolerance", "1", address=server.address).returncode == 0
    assert other.read_bytes() == compressed


@pytest.mark.slow
def test_a_large_npz_is_made_again_without_reading_it_whole(server: RunningServer, tmp_path: Path) -> None:
    files = {count: tmp_path / f"{count}.npz" for count in (100, 60_000)}
    for count, out in files.items():
        arguments = ("stream", "mlp-mnist", "--count", str(count), "--seed", "1", "--to", out)
        assert ganserve(*arguments, address=server.address).returncode == 0
    program = (
        "import resource, sys\n"
        "from ganserve._cli import main\n"
        "try: main()\n"
        "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
    )
    peaks = []
    for out in files.values():
        arguments = [sys.executable, "-c", program, "reproduce", str(out), "--address", server.address]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment())
        assert "the same: all" in done.stdout
        peaks.append(int(done.stderr))
    assert files[60_000].stat().st_size > 45 << 20
    assert peaks[1] - peaks[0] < 20 << 10  # KiB


def test_an_npz_that_is_not_ours_is_told(server: RunningServer, archive: Path, tmp_path: Path) -> None:
    foreign, cut = tmp_path / "foreign.npz", tmp_path / "cut.npz"
    np.savez(foreign, images=np.zeros((2, 28, 28, 1), np.uint8))
    cut.write_bytes(archive.read_bytes()[:-500])
    broken = bytearray(archive.read_bytes())
    broken[5000] ^= 1  # an image: the file's own checksum finds it
    (tmp_path / "broken.npz").write_bytes(broken)
    with np.load(archive) as arrays:
        plan = json.loads(str(arrays["provenance"]))
    files: list[tuple[Path, str]] = [
        (foreign, "not an .npz that `ganserve stream` wrote"),
        (cut, "truncated"),
        (tmp_path / "broken.npz", "damaged or truncated"),
        (with_images(archive, tmp_path / "a.npz", lambda images: images[:, 1:]), "its images do not match"),
        (with_images(archive, tmp_path / "b.npz", lambda images: images.astype(int)), "its images do not match"),
        (with_images(archive, tmp_path / "c.npz", lambda images: images[:0]), "its images do not match"),
    ]
    for number, change in enumerate(
        (
            {"model": 5},
            {"seed": None},
            {"seed": 2**32},
            {"labels": [99]},
            {"labels": []},
            {"labels": "12"},
            {"class_names": None},
            {"class_names": ["a\x1b[31m"] * 10},
            {"height": 0},
            {"truncation": "1"},
            {"version": 0},
        )
    ):
        text = np.array(json.dumps({**plan, **change}))
        path = with_images(archive, tmp_path / f"plan-{number}.npz", lambda images: images, provenance=text)
        files.append((path, "" if "labels" not in change else "its fields are not those of a data set"))
    for text in ("[]", "", "{}", json.dumps(plan)[:-5]):
        path = tmp_path / f"text-{len(files)}.npz"
        files.append((with_images(archive, path, lambda images: images, provenance=np.array(text)), ""))
    long = with_images(archive, tmp_path / "long.npz", lambda images: images, provenance=np.array(" " * (1 << 20)))
    files.append((long, "longer"))
    done = ganserve("reproduce", *(path for path, _ in files), address=server.address)
    assert done.returncode == 1
    assert done.stdout == f"{len(files)} files: {len(files)} impossible to make again\n"
    for line, (path, told) in zip(done.stderr.splitlines(), files, strict=True):
        assert line.startswith(f"ganserve: {path}: ")
        assert told in line
    assert "Traceback" not in done.stderr


def test_several_files_are_looked_at_and_the_worst_is_the_exit_status(
    server: RunningServer, client: Client, picture: Path, archive: Path, tmp_path: Path
) -> None:
    other = client.generate("mlp-mnist", count=3, seed=2**32 - 1).sheet()
    other.save(tmp_path / "[b]other.png")
    wrong = client.generate("mlp-mnist", seed=1)[0].save(tmp_path / "wrong.png")
    changed(wrong, by=7)
    plain = tmp_path / "plain.png"
    Image.new("L", (28, 28)).save(plain)
    good = (picture, archive, tmp_path / "[b]other.png")

    done = ganserve("inspect", *good)
    assert (done.returncode, done.stderr) == (0, "")
    header, *rows = done.stdout.splitlines()
    assert header.split() == ["file", "model", "version", "images", "seed", "label", "truncation"]
    assert [row.split()[:4] for row in rows] == [
        [str(picture), "cdcgan-mnist", "1", "1"],
        [str(archive), "cdcgan-fashion-mnist", "1", "2500"],
        [str(tmp_path / "[b]other.png"), "mlp-mnist", "1", "3"],
    ]
    done = ganserve("inspect", *good, plain, "--json")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["picture"] for each in told] == list(map(str, (*good, plain)))
    assert "doesn't say how it was made" in told[-1]["error"]
    assert told[1]["images"] == 2500

    done = ganserve("reproduce", *good, address=server.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "3 files: 3 the same"
    done = ganserve("reproduce", wrong, plain, picture, address=server.address)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stdout.splitlines()[-1] == "3 files: 1 the same, 1 different, 1 impossible to make again"
    done = ganserve("reproduce", wrong, tmp_path / "nothing.png", picture, "--json", address=server.address)
    assert done.returncode == 4
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each.get("same") for each in told] == [False, None, True]
    done = ganserve("reproduce", *good, address="127.0.0.1:1")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)


def test_a_broken_header_in_an_npz_is_told(archive: Path, tmp_path: Path) -> None:
    files = []
    for number, header in enumerate((b"", b"\x93NUMPY\x09\x00", b"\x93NUMPY\x01\x00\x02\x00{}", b"no numpy")):
        files.append(tmp_path / f"{number}.npz")
        with zipfile.ZipFile(archive) as whole, zipfile.ZipFile(files[-1], "w") as part:
            part.writestr("provenance.npy", whole.read("provenance.npy"))
            part.writestr("images.npy", header)
    done = ganserve("inspect", *files)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 4), done.stderr
