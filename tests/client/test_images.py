import base64
import copy
import dataclasses
import html
import io
import json
import pickle
import re
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

from ganserve import Client, GeneratedImage, ImageBatch, Interpolation, InvalidRequestError, read_provenance
from ganserve.images import concatenate

KNOWN_ENDINGS = r"the known extensions are \.png, \.jpg, \.jpeg, \.webp, \.gif, \.tif, \.tiff"


def batch(count: int = 3, channels: int = 1, *, labels: bool = True, model: str = "digits") -> ImageBatch:
    pixels = np.arange(count * 4 * 5 * channels).astype(np.uint8).reshape(count, 4, 5, channels)
    return ImageBatch(
        pixels=pixels,
        seeds=tuple(range(7, 7 + count)),
        labels=tuple(range(count)) if labels else None,
        model=model,
        version=2,
        digest="sha256:0",
        provider="CPUExecutionProvider",
        truncation=1.0,
        queue_s=0.0125,
        compute_s=0.5,
    )


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pil_images_have_the_same_pixels(channels: int, mode: str) -> None:
    images = batch(channels=channels)
    pictures = images.pil()
    assert [picture.mode for picture in pictures] == [mode] * 3
    assert np.array_equal(np.stack(pictures).reshape(images.pixels.shape), np.asarray(images))


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
def test_saved_files_say_how_to_make_them_again(tmp_path: Path, ending: str) -> None:
    paths = batch().save(tmp_path / "new" / f"{{label}}-{{seed}}.{ending}")
    assert [path.name for path in paths] == [f"0-7.{ending}", f"1-8.{ending}", f"2-9.{ending}"]
    with Image.open(paths[1]) as image:
        text = image.info["ganserve"] if ending == "png" else image.getexif()[0x010E]
        if ending != "jpg":
            assert np.array_equal(np.asarray(image.convert("L")), batch().pixels[1, :, :, 0])
    identity = json.loads(text)
    assert (identity["model"], identity["version"], identity["seed"], identity["label"]) == ("digits", 2, 8, 1)


def with_alpha(count: int = 3) -> ImageBatch:
    """Images whose first pixel is transparent, with a colour, and whose second is opaque."""
    images = batch(count, channels=4)
    images.pixels[:, 0, 0], images.pixels[:, 0, 1] = (9, 8, 7, 0), (6, 5, 4, 255)
    return images


@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
def test_files_keep_alpha_and_the_colour_of_transparent_pixels(tmp_path: Path, ending: str) -> None:
    path = with_alpha()[1].save(tmp_path / f"one.{ending}")
    assert np.array_equal(np.asarray(Image.open(path)), with_alpha().pixels[1])
    assert read_provenance(path).seed == 8


def test_a_sheet_of_images_with_alpha_is_transparent_between_them(tmp_path: Path) -> None:
    with_alpha().sheet(columns=2, scale=2).save(tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    wanted = with_alpha().pixels.repeat(2, 1).repeat(2, 2)  # images of 8x10 pixels
    assert np.array_equal(sheet[:8, :10], wanted[0])
    assert np.array_equal(sheet[10:, :10], wanted[2])
    assert not sheet[8:10].any()
    assert not sheet[:, 10:12].any()


@pytest.mark.parametrize("ending", ["jpg", "gif"])
def test_a_format_without_alpha_is_refused_for_images_that_have_it(tmp_path: Path, ending: str) -> None:
    with pytest.raises(ValueError, match="PNG, WEBP or TIFF"):
        with_alpha()[0].save(tmp_path / f"one.{ending}")
    with pytest.raises(ValueError, match="PNG, WEBP or TIFF"):
        with_alpha().sheet().save(tmp_path / f"sheet.{ending}")
    assert not list(tmp_path.iterdir())


def test_an_animation_of_images_with_alpha_is_a_webp(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"use WEBP$"):
        with_alpha().gif(tmp_path / "walk.gif")
    path = with_alpha().gif(tmp_path / "walk.webp", bounce=False)
    with Image.open(path) as animation:
        frames = [np.asarray(frame.convert("RGBA")) for frame in ImageSequence.Iterator(animation)]
    assert np.array_equal(np.stack(frames)[..., 3], with_alpha().pixels[..., 3])


@pytest.mark.parametrize("pattern", ["same.png", "{label}.png", "{nonsense}.png", "{seed.png"])
def test_a_pattern_that_cannot_name_every_image_is_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match=r"\{"):
        batch(labels=False).save(tmp_path / pattern)
    assert not list(tmp_path.iterdir())


def test_a_sheet_lays_images_out_row_by_row() -> None:
    sheet = np.asarray(batch(4).sheet(columns=2))
    assert sheet.shape == (4 + 2 + 4, 5 + 2 + 5)
    assert np.array_equal(sheet[:4, 7:], batch(4).pixels[1, :, :, 0])
    assert np.array_equal(sheet[6:, :5], batch(4).pixels[2, :, :, 0])


def test_a_sheet_names_its_rows_beside_the_images() -> None:
    assert batch(4).sheet(columns=9).size == batch(4).sheet(columns=4).size
    plain, named = batch(4).sheet(2, scale=8), batch(4).sheet(2, row_names=["one", "two"], scale=8)
    assert named.height == plain.height
    margin = named.width - plain.width
    assert np.array_equal(np.asarray(named)[:, margin:], np.asarray(plain))
    assert np.asarray(named)[:32, :margin].any()


def test_no_images_make_no_picture(tmp_path: Path) -> None:
    empty = batch()[5:]
    assert (len(empty), list(empty), empty.pil(), empty.save(tmp_path / "{seed}.png")) == (0, [], [], [])
    with pytest.raises(ValueError, match="no images"):
        empty.sheet()
    with pytest.raises(ValueError, match="no images"):
        empty.gif(tmp_path / "walk.gif")
    assert empty._repr_png_() is None
    assert "0 images" in empty._repr_html_()


def test_a_sheet_is_a_pillow_image_like_others() -> None:
    sheet = batch(4).sheet(columns=2)
    assert isinstance(sheet, Image.Image)
    again = pickle.loads(pickle.dumps(sheet))
    assert np.array_equal(np.asarray(again), np.asarray(sheet))
    file = io.BytesIO()
    again.save(file, "PNG")
    assert Image.open(file).info["ganserve"] == batch(4).provenance.to_json()
    assert sheet.resize((3, 3)).size == (3, 3)
    assert sheet.convert("RGB").getpixel((8, 1)) == (26, 26, 26)


def test_saving_a_sheet_takes_what_pillow_takes(tmp_path: Path) -> None:
    sheet = batch(4).sheet(scale=20)
    for name, parameters in (("good.jpg", {}), ("bad.jpg", {"quality": 5})):
        sheet.save(tmp_path / name, **parameters)
    assert (tmp_path / "bad.jpg").stat().st_size < (tmp_path / "good.jpg").stat().st_size
    Image.fromarray(np.asarray(sheet)).save(tmp_path / "plain.jpg", quality=95)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "good.jpg")), np.asarray(Image.open(tmp_path / "plain.jpg")))
    with (tmp_path / "file").open("wb") as file:
        sheet.save(file, format="webp")
    # Lossless, as the server's.
    assert np.array_equal(np.asarray(Image.open(tmp_path / "file").convert("L")), np.asarray(sheet))
    with pytest.raises(ValueError, match=KNOWN_ENDINGS):
        sheet.save(tmp_path / "sheet.nonsense")


@pytest.mark.parametrize("index", [0, 2, -1, -3, np.int64(1)])
def test_an_index_gives_one_image(index: int) -> None:
    images, place = batch(), int(index) % 3
    image = images[index]
    assert isinstance(image, GeneratedImage)
    assert np.array_equal(image.pixels, images.pixels[place])
    assert np.array_equal(np.asarray(image), images.pixels[place])
    assert np.array_equal(np.asarray(image.pil()), images.pixels[place, :, :, 0])
    assert (image.seed, image.label) == (7 + place, place)
    assert (image.model, image.version, image.digest) == ("digits", 2, "sha256:0")
    assert (image.provider, image.truncation) == ("CPUExecutionProvider", 1.0)
    assert repr(image) == f"<GeneratedImage 4x5x1 by digits version 2, seed {7 + place}, label {place}>"


@pytest.mark.parametrize("index", [3, -4, 2**40])
def test_an_index_beyond_the_images_is_an_index_error(index: int) -> None:
    with pytest.raises(IndexError, match=f"image {index} of a batch of 3"):
        batch()[index]


def test_a_slice_gives_a_batch() -> None:
    some = batch(6)[4:0:-2]
    assert isinstance(some, ImageBatch)
    assert (some.seeds, some.labels, some.model) == ((11, 9), (4, 2), "digits")
    assert np.array_equal(some.pixels, batch(6).pixels[[4, 2]])
    assert batch(labels=False)[1:].labels is None


def test_iteration_gives_the_images_in_order() -> None:
    assert [image.seed for image in batch()] == [7, 8, 9]
    assert [image.label for image in batch(labels=False)] == [None] * 3
    assert np.array_equal(np.stack(list(batch())), batch().pixels)


def test_batches_and_images_are_equal_if_their_pixels_and_provenance_are() -> None:
    again = dataclasses.replace(batch(), queue_s=9.0, compute_s=9.0)
    assert batch() == again
    assert hash(batch()) == hash(again)
    assert batch()[1] == again[1]
    assert len({batch()[1], again[1], batch()[2]}) == 2
    other = batch().pixels.copy()
    other[1, 3, 4] += 1
    for different in (
        dataclasses.replace(batch(), pixels=other),
        dataclasses.replace(batch(), seeds=(7, 9, 9)),
        dataclasses.replace(batch(), truncation=0.5),
        batch(2),
        batch(model="letters"),
    ):
        assert batch() != different
    assert batch()[0] == dataclasses.replace(batch(), pixels=other)[0]
    assert batch()[1] != dataclasses.replace(batch(), pixels=other)[1]
    assert batch() != "digits"


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("scale", {"scale": 0}),
        ("scale", {"scale": "2"}),
        ("scale", {"scale": 2000}),  # 15 x 4 times 2,000 x 2,000 pixels
        ("columns", {"columns": 0}),
        ("columns", {"columns": 1.5}),
        ("columns", {"columns": True}),
        ("row_names", {"columns": 3, "row_names": ["a", "b"]}),
        ("row_names", {"columns": 3, "row_names": [1]}),
    ],
)
def test_a_sheet_that_cannot_be_is_refused_before_it_is_drawn(field: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        batch().sheet(**arguments)
    assert caught.value.field == field
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("frame_ms", [19, 655_351, 40.0])
def test_a_frame_that_no_animation_can_have_is_refused(tmp_path: Path, frame_ms: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"frame_ms.*20 to 655350"):
        batch().gif(tmp_path / "walk.gif", frame_ms=frame_ms)
    assert not list(tmp_path.iterdir())


def test_a_batch_is_not_saved_to_a_folder_alone(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"is a folder; .*\{index\}\.png"):
        batch().save(tmp_path)


def test_an_image_cannot_be_changed() -> None:
    image = batch()[0]
    for name in ("pixels", "seed", "model", "anything"):
        with pytest.raises(AttributeError):
            setattr(image, name, 1)


def test_a_copied_or_pickled_image_leaves_its_batch_behind() -> None:
    images = batch(1000)
    content = pickle.dumps(images[500])
    assert len(content) < 1500
    assert pickle.loads(pickle.dumps(images[-1])).seed == 1006
    for one in (pickle.loads(content), copy.deepcopy(images[500])):
        assert (one.seed, one.label) == (507, 500)
        assert np.array_equal(one.pixels, images.pixels[500])
        assert not np.shares_memory(one.pixels, images.pixels)


def test_one_image_is_saved_where_it_is_wanted(tmp_path: Path) -> None:
    path = batch(channels=3)[1].save(tmp_path / "new" / "one.webp")
    assert path == tmp_path / "new" / "one.webp"
    assert np.array_equal(np.asarray(Image.open(path)), batch(channels=3).pixels[1])
    assert batch()[1].save(tmp_path / "{label}" / "{seed}.png") == tmp_path / "1" / "8.png"
    with pytest.raises(ValueError, match="these images have"):
        batch(labels=False)[1].save(tmp_path / "{label}.png")


def test_an_image_is_written_into_an_open_file_as_into_one_by_name(tmp_path: Path) -> None:
    image = batch(channels=3)[1]
    for kind in ("PNG", "jpeg", "WebP"):
        file = io.BytesIO()
        assert image.save(file, kind) is None  # type: ignore[func-returns-value]
        assert file.getvalue() == image.save(tmp_path / f"one.{kind}").read_bytes()
        image.save(file := io.BytesIO(), kind, provenance=False)
        assert file.getvalue() == image.save(tmp_path / f"one.{kind}", provenance=False).read_bytes()
    assert image.save(tmp_path / "no-ending", "PNG").read_bytes() == image.save(tmp_path / "one.png").read_bytes()
    for wrong in ("docx", "", None):
        with pytest.raises(ValueError, match=f"format is {wrong!r}; it must be PNG, JPEG, WEBP"):
            image.save(io.BytesIO(), wrong)  # type: ignore[arg-type]


class Place:
    """A path of another library."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize("kind", [str, PurePath, Place])
def test_any_path_is_a_path(tmp_path: Path, kind: type) -> None:
    assert batch()[1].save(kind(tmp_path / "new" / "{seed}.png")) == tmp_path / "new" / "8.png"
    assert batch().save(kind(tmp_path / "{seed}.webp"))[1] == tmp_path / "8.webp"
    path = walk(3).gif(kind(tmp_path / "newer" / "walk.webp"))
    assert path == tmp_path / "newer" / "walk.webp"
    assert path.read_bytes()[8:12] == b"WEBP"


def test_what_is_neither_a_path_nor_a_file_is_refused() -> None:
    with pytest.raises(TypeError, match="not a bytes"):
        batch()[1].save(b"one.png", "PNG")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="not a bytes"):
        walk(1).gif(b"walk.gif")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"not to a BytesIO; .* sheet\(\)\.save\(file, 'PNG'\)"):
        batch().save(io.BytesIO())  # type: ignore[arg-type]


def test_an_ending_of_no_picture_is_told_before_a_folder_is_made(tmp_path: Path) -> None:
    for name in ("one.nonsense", "one", "one.png.txt", "one.docx"):
        with pytest.raises(ValueError, match=KNOWN_ENDINGS):
            batch()[1].save(tmp_path / "new" / name)
        with pytest.raises(ValueError, match=KNOWN_ENDINGS):
            batch().save(tmp_path / "new" / f"{{seed}}-{name}")
    assert not list(tmp_path.iterdir())
    for name in ("one.PNG", "one.bmp", "one.tif"):
        assert batch()[1].save(tmp_path / name).exists()


def test_one_name_for_several_images_points_to_a_sheet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"put \{index\}.* sheet\(\)\.save\('all\.png'\)$"):
        batch().save("all.png")
    with pytest.raises(ValueError, match=r"put \{index\} or \{seed\} into it$"):
        batch().save("{model}.png")
    assert batch()[:1].save(tmp_path / "one.png") == [tmp_path / "one.png"]


def test_what_lies_between_two_seeds_is_kept_through_slices_and_told() -> None:
    way = Interpolation("slerp", 4, 9, 3, (0, 1, 2))
    images = dataclasses.replace(batch(), seeds=None, interpolation=way)
    assert images[2].provenance.interpolation == dataclasses.replace(way, shown=(2,))
    assert images[::-2].provenance.interpolation == dataclasses.replace(way, shown=(2, 0))
    assert repr(images[1]).endswith("step 1 of 3 from seed 4 to 9, label 1>")
    assert "slerp from seed 4 to 9" in images._repr_html_()
    assert "own latents" not in images._repr_html_()
    assert concatenate([images[1:], images[:1]]).interpolation == dataclasses.replace(way, shown=(1, 2, 0))
    other = dataclasses.replace(images, interpolation=dataclasses.replace(way, seed_b=8))
    for mixed in ([images, other], [images, dataclasses.replace(images, interpolation=None)]):
        assert concatenate(mixed).interpolation is None
    assert pickle.loads(pickle.dumps(images[2])).provenance == images[2].provenance


def frames(path: Path) -> tuple[list[np.ndarray], list[int]]:
    """Return each frame as RGB, and how many ms it is shown."""
    pictures, durations = [], []
    with Image.open(path) as animation:
        assert animation.info["loop"] == 0
        for index in range(getattr(animation, "n_frames", 1)):
            animation.seek(index)
            pictures.append(np.asarray(animation.convert("RGB")).astype(int))
            durations.append(animation.info["duration"])
    return pictures, durations


def walk(channels: int) -> ImageBatch:
    """Five pictures that change smoothly, as those of an interpolation do."""
    seen = batch(5, channels)
    rows, columns, times = np.mgrid[:32, :32, :5].astype(float)
    waves = [np.sin((rows * (c + 1) + times * 9) / 11) * np.cos((columns + times * 5 * c) / 7) for c in range(channels)]
    pixels = (127.5 + 127 * np.stack(waves, axis=3)).astype(np.uint8).transpose(2, 0, 1, 3)
    return ImageBatch(
        np.ascontiguousarray(pixels),
        seen.seeds,
        seen.labels,
        seen.model,
        seen.version,
        seen.digest,
        seen.provider,
        1.0,
        0.0,
        0.0,
    )


@pytest.mark.parametrize(("ending", "channels"), [("gif", 1), ("webp", 1), ("webp", 3), ("GIF", 1)])
def test_an_animation_goes_there_and_back_exactly(tmp_path: Path, ending: str, channels: int) -> None:
    images = walk(channels)
    path = images.gif(tmp_path / "new" / f"walk.{ending}", frame_ms=120, scale=3)
    pictures, durations = frames(path)
    assert durations == [120] * 8
    for picture, index in zip(pictures, (0, 1, 2, 3, 4, 3, 2, 1), strict=True):
        wanted = images.pixels[index].repeat(3, axis=0).repeat(3, axis=1)
        assert np.array_equal(picture, np.broadcast_to(wanted, picture.shape))


def test_an_animation_is_written_into_an_open_file_as_into_one_by_name(tmp_path: Path) -> None:
    file = io.BytesIO()
    walk(3).gif(file)
    assert file.getvalue() == walk(3).gif(tmp_path / "walk.gif").read_bytes()
    walk(3).gif(file := io.BytesIO(), "WebP", scale=2)
    assert file.getvalue() == walk(3).gif(tmp_path / "walk.webp", scale=2).read_bytes()
    for wrong in ("PNG", ""):
        with pytest.raises(ValueError, match="must be WEBP or GIF"):
            walk(3).gif(io.BytesIO(), wrong)


def test_an_animation_may_jump_back(tmp_path: Path) -> None:
    pictures, _ = frames(walk(1).gif(tmp_path / "walk.gif", bounce=False))
    assert [int(picture.sum()) // 3 for picture in pictures] == [int(image.pixels.sum()) for image in walk(1)]


def test_a_colour_gif_comes_close(tmp_path: Path) -> None:
    pictures, _ = frames(walk(3).gif(tmp_path / "walk.gif", bounce=False))
    wanted = walk(3).pixels
    error = np.mean((np.stack(pictures) - wanted) ** 2)
    plain = [
        np.asarray(picture.convert("P", palette=Image.Palette.ADAPTIVE).convert("RGB")) for picture in walk(3).pil()
    ]
    assert error < 0.7 * np.mean((np.stack(plain).astype(int) - wanted) ** 2)


def test_few_colours_stay_as_they_are_in_a_gif(tmp_path: Path) -> None:
    pictures, _ = frames(batch(3, channels=3).gif(tmp_path / "walk.gif", bounce=False))
    assert np.array_equal(np.stack(pictures), batch(3, channels=3).pixels)


@pytest.mark.parametrize(
    ("name", "wrong", "text"),
    [
        ("walk.png", {}, r"must end in \.webp or \.gif"),
        ("walk", {}, r"must end in \.webp or \.gif"),
        ("walk.gif", {"frame_ms": 19}, "frame_ms is 19"),
        ("walk.gif", {"scale": 0}, "scale is 0"),
    ],
)
def test_an_animation_that_cannot_be_is_refused(tmp_path: Path, name: str, wrong: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        batch().gif(tmp_path / "new" / name, **wrong)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def shown(page: str) -> Image.Image:
    found = re.search('src="data:image/png;base64,([^"]+)"', page)
    assert found is not None
    return Image.open(io.BytesIO(base64.b64decode(found[1])))


def test_a_notebook_shows_the_images_enlarged() -> None:
    images = batch(4)
    content = images._repr_png_()
    assert content is not None
    picture = np.asarray(Image.open(io.BytesIO(content)))
    assert np.array_equal(picture, np.asarray(images.sheet(columns=2, scale=8)))
    one = np.asarray(Image.open(io.BytesIO(images[2]._repr_png_())))
    assert np.array_equal(one, images.pixels[2, :, :, 0].repeat(8, axis=0).repeat(8, axis=1))


def test_a_notebook_says_what_the_images_are() -> None:
    page = batch()._repr_html_()
    assert np.array_equal(np.asarray(shown(page)), np.asarray(batch().sheet(columns=3, scale=8)))
    text = html.unescape(re.sub("<[^>]*>", "", page))
    facts = ("digits version 2", "3 images", "seeds 7 to 9", "labels 0 to 2", "truncation 1")
    for fact in (*facts, "12.5 ms queued, 500.0 ms computed by CPUExecutionProvider"):
        assert fact in text
    assert "not shown" not in text
    assert "labels" not in batch(labels=False)._repr_html_()
    assert "seeds 9, 8, 7" in batch()[::-1]._repr_html_()
    assert "seeds 8 · labels 1 ·" in batch()[1:2]._repr_html_()


def test_a_notebook_shows_a_hundred_images_and_says_how_many_more_there_are() -> None:
    images = batch(1000)
    page = images._repr_html_()
    assert "1000 images · 900 not shown" in page
    picture = shown(page)
    assert picture.info["ganserve"] == images[:100].provenance.to_json()
    assert max(picture.size) < 800
    caption = images[::-1]._repr_html_().partition("<figcaption>")[2]
    assert "996, 995, …" in caption
    assert len(caption) < 500


def test_a_notebook_shows_fewer_of_large_images() -> None:
    large = ImageBatch(
        np.zeros((9, 1024, 1024, 3), np.uint8),
        None,
        None,
        "large",
        1,
        "sha256:0",
        "CPUExecutionProvider",
        1.0,
        0.0,
        0.0,
    )
    page = large._repr_html_()
    assert "6 not shown · own latents" in page
    assert shown(page).size == (2 * 1024 + 2, 2 * 1024 + 2)


def test_names_from_a_server_are_no_markup() -> None:
    page = batch(model="<script>alert('&')</script>\"")._repr_html_()
    tags = re.findall(r"<(/?\w+)", page)
    assert tags == ["figure", "img", "figcaption", "/figcaption", "/figure"]
    assert page.count('"') == 6
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;&quot; version 2" in page


def test_the_images_of_a_real_call_are_the_batchs(client: Client) -> None:
    made = client.generate("cdcgan-mnist", count=12, seed=2**32 - 6)
    for image, index in zip(made, range(12), strict=True):
        assert (image.seed, image.label) == ((2**32 - 6 + index) % 2**32, (2**32 - 6 + index) % 2**32 % 10)
        alone = client.generate("cdcgan-mnist", seed=image.seed, label=image.label)
        assert np.array_equal(alone.pixels[0], image.pixels)
