"""A tour in one minute: start a server on free ports, ask it for images, write demo.png, stop the server."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ganserve import Client

OUT = Path("demo.png")
MEASURE_S = 3.0


@contextmanager
def server() -> Iterator[str]:
    """Run ganserve-server with the bundled models on free ports; yield its address."""
    program = Path(sys.executable).with_name("ganserve-server")
    command = [program, "--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0", "--log-format", "json"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:
                lines.append(line)
                if '"event": "serving"' in line:
                    event = json.loads(line)
                    print(f"started ganserve-server at {event['address']} on {event['provider']}")
                    yield event["address"]
                    break
            else:
                sys.exit("".join(["ganserve-server did not start:\n", *lines]))
        finally:
            process.terminate()
            process.communicate()
    print(f"stopped the server (exit status {process.returncode})")


def beside(pictures: dict[str, Image.Image]) -> Image.Image:
    """Put titled pictures next to each other."""
    font = ImageFont.load_default(20)
    gap, title = 24, 40
    width = sum(picture.width for picture in pictures.values()) + gap * (len(pictures) + 1)
    whole = Image.new("L", (width, max(picture.height for picture in pictures.values()) + title + gap))
    left = gap
    for text, picture in pictures.items():
        ImageDraw.Draw(whole).text((left, 10), text, fill="white", font=font)
        whole.paste(picture, (left, title))
        left += picture.width + gap
    return whole


def main() -> None:
    with server() as address, Client(address) as client:
        for model in client.models():
            print(f"  {model.name} version {model.version}: {model.height}x{model.width}, from {model.dataset}")
        names = {"digits": "cdcgan-mnist", "clothes": "cdcgan-fashion-mnist"}
        sheets = {
            f"{title}: {name}, seed 1": client.contact_sheet(name, columns=10, seed=1, scale=2)
            for title, name in names.items()
        }
        beside(sheets).save(OUT)
        print(f"wrote {OUT}: ten images of every class, a row each; the same seeds give the same pixels every time")

        started, images = time.perf_counter(), 0
        while time.perf_counter() - started < MEASURE_S:
            images += len(client.generate("cdcgan-mnist", count=64, seed=images))
        rate = images / (time.perf_counter() - started)
        print(f"one client, 64 images a call: {rate:,.0f} images per second")
    print(
        "\nnext:\n"
        "  1. run a server:       .venv/bin/ganserve-server\n"
        "  2. ask it for sevens:  .venv/bin/ganserve generate cdcgan-mnist --label 7 --seed 1 --out sevens.png\n"
        "  3. train your own:     docs/get-started.md"
    )


if __name__ == "__main__":
    main()
