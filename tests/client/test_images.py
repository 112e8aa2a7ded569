import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ganserve import ImageBatch


def batch(count: int = 3, channels: int = 1, *, labels: bool = True) -> ImageBatch:
    pixels = np.arange(count * 4 * 5 * channels, dtype=np.uint8).reshape(count, 4, 5, channels)
    return ImageBatch(
        pixels=pixels,
        seeds=tuple(range(7, 7 + count)),
        labels=tuple(range(count)) if labels else None,
        model="digits",
        version=2,
        digest="sha256:0",
        provider="CPUExecutionProvider",
        truncation=1.0,
        queue_s=0.0,
        compute_s=0.0,
    )


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
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
    plain, named = batch(4).sheet(2, scale=8), batch(4).sheet(2, row_names=["one", "two"], scale=8)
    assert named.height == plain.height
    margin = named.width - plain.width
    assert np.array_equal(np.asarray(named)[:, margin:], np.asarray(plain))
    assert np.asarray(named)[:32, :margin].any()
