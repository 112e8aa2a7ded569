"""Prints what encoding a large picture costs: the server's own formats, beside other settings and other encoders.

The pictures are small ones, enlarged smoothly: those of a .tar or a folder (`--pictures`), or else images of a bundled
model. `--grain` adds noise, as photographs have it: with 1.5 grey levels, a PNG has 40 % of the pixels' bytes, as the
1024x1024 PNGs of FFHQ have (1.3 MB a picture; Karras et al., 2019); without it, 15 %.

Columns: pictures a second by one thread, CPU time of a picture, size in percent of RAW, and for how long another Python
thread stood still meanwhile (the longest pause). Times are the least of three rounds, and means of three pictures.
Encoders that are not installed are left out: `pip install imagecodecs opencv-python-headless pyvips pyvips-binary
zlib-ng`.

    python benchmarks/encoding.py [--pictures cifar10.tar] [--sides 256 512 1024] [--grain 0 1.5] [--channels 3]
"""

import argparse
import io
import statistics
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from running import serving

from ganserve import Client
from ganserve._formats import ENCODED
from ganserve_server.services.formats import encode

COUNT, ROUNDS = 3, 3
TICK_S = 0.0002
IDENTITY = {"model": "m", "version": 1, "digest": "sha256:" + "0" * 64, "seed": 1, "label": None, "truncation": 1.0}
Pixels = NDArray[np.uint8]  # [height, width, channels]
Encoder = Callable[[Pixels], bytes]


def small_pictures(source: Path | None) -> Iterator[Image.Image]:
    if source is None:
        with serving() as running, Client(running.address) as client:
            yield from client.generate("cdcgan-fashion-mnist", count=COUNT, seed=1).pil()
    elif source.is_dir():
        yield from map(Image.open, sorted(path for path in source.rglob("*") if path.suffix in (".jpg", ".png")))
    else:
        with tarfile.open(source) as archive:
            for member in archive:
                if (file := archive.extractfile(member) if member.isfile() else None) is not None:
                    yield Image.open(io.BytesIO(file.read()))


def enlarged(picture: Image.Image, side: int, channels: int, grain: float) -> Pixels:
    large = picture.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]).resize((side, side), Image.Resampling.LANCZOS)
    noise = np.random.default_rng(side).normal(0, grain, (side, side, channels))
    noise[:, :, 3:] = 0
    pixels = np.asarray(large).reshape(side, side, channels) + noise
    return pixels.round().clip(0, 255).astype(np.uint8)


def by_pillow(name: str, **options: Any) -> Encoder:
    def encode_one(pixels: Pixels) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, name, **options)
        return file.getvalue()

    return encode_one


def by_opencv(cv2: Any, ending: str, *options: int) -> Encoder:
    cv2.setNumThreads(1)

    def encode_one(pixels: Pixels) -> bytes:
        order = pixels[:, :, ::-1] if pixels.shape[2] == 3 else pixels[:, :, [2, 1, 0, 3][: pixels.shape[2]]]
        return bytes(cv2.imencode(ending, order, options)[1])

    return encode_one


def by_numpy(compress: Callable[[bytes], bytes]) -> Encoder:
    """The pixel data of a PNG, with the filter "average" on all rows: what an own writer would cost."""

    def encode_one(pixels: Pixels) -> bytes:
        height, width, channels = pixels.shape
        flat = pixels.reshape(height, width * channels)
        above, left = np.zeros_like(flat), np.zeros_like(flat)
        above[1:], left[:, channels:] = flat[:-1], flat[:, :-channels]
        rows = np.full((height, 1 + width * channels), 3, np.uint8)
        np.subtract(flat, (above >> 1) + (left >> 1) + (above & left & 1), out=rows[:, 1:])
        return compress(rows.tobytes())

    return encode_one


def encoders() -> Iterator[tuple[str, Encoder]]:
    yield "RAW", lambda pixels: pixels.tobytes()
    for number, each in ENCODED.items():
        yield f"{each.name} of the server", lambda pixels, number=number: encode(pixels, number, IDENTITY)
    yield "PNG, Pillow's defaults (level 6)", by_pillow("PNG")
    for level in (1, 3, 4):
        yield f"PNG, Pillow, level {level}", by_pillow("PNG", compress_level=level)
    yield "PNG, Pillow, level 1, Huffman only", by_pillow("PNG", compress_level=1, compress_type=zlib.Z_HUFFMAN_ONLY)
    yield "PNG, Pillow, level 1, RLE", by_pillow("PNG", compress_level=1, compress_type=zlib.Z_RLE)
    yield "WEBP, Pillow's defaults, lossless", by_pillow("WEBP", lossless=True)
    for method, effort in ((0, 0), (0, 20), (1, 0), (1, 20), (2, 20), (3, 20)):
        yield (
            f"WEBP, Pillow, method {method}, effort {effort}",
            by_pillow("WEBP", lossless=True, method=method, quality=effort),
        )
    if cv2 := found("cv2"):
        level, strategy = cv2.IMWRITE_PNG_COMPRESSION, cv2.IMWRITE_PNG_STRATEGY
        yield "PNG, OpenCV's defaults", by_opencv(cv2, ".png")
        yield "PNG, OpenCV, level 1, RLE", by_opencv(cv2, ".png", level, 1, strategy, zlib.Z_RLE)
        yield "WEBP, OpenCV, lossless", by_opencv(cv2, ".webp", cv2.IMWRITE_WEBP_QUALITY, 101)
        yield "JPEG, OpenCV, quality 95", by_opencv(cv2, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 95)
    if codecs := found("imagecodecs"):
        yield "PNG, imagecodecs, level 1", lambda pixels: bytes(codecs.png_encode(pixels, level=1))
        rle = {"level": 1, "strategy": zlib.Z_RLE, "filter": 0xF8}
        yield "PNG, imagecodecs, level 1, RLE", lambda pixels: bytes(codecs.png_encode(pixels, **rle))
    if vips := found("pyvips"):
        for level in (1, 6):
            yield f"PNG, libvips, level {level}", by_vips(vips, compression=level, filter=0xF8)
    if zlib_ng := found("zlib_ng.zlib_ng"):
        yield "PNG, NumPy's filter, zlib-ng, level 3", by_numpy(lambda rows: bytes(zlib_ng.compress(rows, 3)))

        def rle_of(rows: bytes) -> bytes:
            compressor = zlib_ng.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
            return bytes(compressor.compress(rows) + compressor.flush())

        yield "PNG, NumPy's filter, zlib-ng, RLE", by_numpy(rle_of)


def by_vips(vips: Any, **options: Any) -> Encoder:
    def encode_one(pixels: Pixels) -> bytes:
        height, width, channels = pixels.shape
        image = vips.Image.new_from_memory(pixels.tobytes(), width, height, channels, "uchar")
        return bytes(image.pngsave_buffer(**options))

    return encode_one


def found(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        return None


class Ticks:
    """The longest pause of a thread that wants to run every 0.2 ms."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Ticks":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        last = time.perf_counter()
        while not self._ended.is_set():
            time.sleep(TICK_S)
            now = time.perf_counter()
            self.longest_s, last = max(self.longest_s, now - last - TICK_S), now


def least(encode_one: Encoder, pixels: Pixels) -> tuple[float, float, float]:
    """Return the least wall time, CPU time and pause of several rounds, in seconds."""
    walls, cpus, pauses = [], [], []
    for _ in range(ROUNDS):
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        encode_one(pixels)
        walls.append(time.perf_counter() - wall_s)
        cpus.append(time.process_time() - cpu_s)
        with Ticks() as ticks:
            encode_one(pixels)
        pauses.append(ticks.longest_s)
    return min(walls), min(cpus), min(pauses)


def measure(name: str, encode_one: Encoder, pictures: list[Pixels]) -> str:
    size = sum(len(encode_one(pixels)) for pixels in pictures)
    wall_s, cpu_s, pause_s = map(statistics.mean, zip(*(least(encode_one, each) for each in pictures), strict=True))
    percent = 100 * size / sum(pixels.nbytes for pixels in pictures)
    return f"| {name} | {1 / wall_s:,.1f} | {1000 * cpu_s:.1f} ms | {percent:.1f} % | {1000 * pause_s:.1f} ms |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="a folder, or a .tar file, of small pictures")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--grain", type=float, nargs="+", default=[0.0, 1.5], help="standard deviation, in grey levels")
    parser.add_argument("--channels", type=int, choices=(1, 3, 4), default=3)
    parser.add_argument("--only", default="", help="measure only the encoders with this text in their name")
    options = parser.parse_args()
    source = small_pictures(options.pictures)
    small = [picture for picture, _ in zip(source, range(COUNT), strict=False)]
    source.close()  # type: ignore[attr-defined]
    for side in options.sides:
        for grain in options.grain:
            pictures = [enlarged(picture, side, options.channels, grain) for picture in small]
            print(f"\n{side}x{side}, {options.channels} channels, grain {grain:g}\n")
            print("| encoder | pictures/s | CPU | size | pause |")
            print("|---|---|---|---|---|")
            for name, encode_one in encoders():
                if options.only in name and not (options.channels == 4 and "JPEG" in name):
                    print(measure(name, encode_one, pictures), flush=True)


if __name__ == "__main__":
    main()
