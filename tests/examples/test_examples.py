"""The examples against a real server. They need the extra `examples`, and httpx: .ci/run has them."""

import base64
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from tests.conftest import RunningServer
from tests.examples import notebook

from ganserve import Client, read_provenance

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def run_example(name: str, *arguments: str | Path) -> str:
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_latent_walk_passes_through_its_seeds(server: RunningServer, client: Client, tmp_path: Path) -> None:
    out = tmp_path / "walk.webp"
    run_example(
        *("latent_walk.py", "--address", server.address, "--seeds", "5", "9", "--steps", "4", "--label", "7"),
        *("--out", out),
    )
    with Image.open(out) as walk:
        assert getattr(walk, "n_frames", 1) == 8
        for frame, seed in ((0, 5), (4, 9)):
            walk.seek(frame)
            shown = np.asarray(walk.convert("L").resize((28, 28), Image.Resampling.NEAREST))
            wanted = client.generate("cdcgan-mnist", seed=seed, label=7).pixels[0, :, :, 0]
            assert np.abs(shown.astype(int) - wanted).max() <= 1
    assert read_provenance(out).count == 8


def test_the_notebook_shows_what_its_cells_give(server: RunningServer, tmp_path: Path) -> None:
    committed, made = notebook.read(), notebook.read()
    notebook.run(made, server.address, tmp_path)
    pictures = 0
    for old, new in zip(committed.cells, made.cells, strict=True):
        for shown, given in zip(old.get("outputs", ()), new.get("outputs", ()), strict=True):
            assert shown.output_type == given.output_type
            assert shown.data.keys() == given.data.keys(), "run `python -m tests.examples.notebook`"
            if "IPython" not in given.data["text/plain"]:  # the address of an object
                assert shown.data["text/plain"] == given.data["text/plain"]
            if "image/png" in given.data:
                pictures += 1
                assert np.abs(pixels(shown.data["image/png"]) - pixels(given.data["image/png"])).max() <= 1
    assert pictures == 5


def pixels(png: str) -> "np.ndarray[Any, np.dtype[np.int16]]":
    """Decode a notebook's picture."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        return np.asarray(picture, np.int16)


@contextmanager
def avatars(address: str) -> Iterator[httpx.Client]:
    """Run the service by uvicorn."""
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), "--port", "0", "avatars:app"]
    environment = {**os.environ, "GANSERVE_ADDRESS": address, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"running on (http://\S+)", line):
                    break
            else:
                pytest.fail("".join(lines))
            with httpx.Client(base_url=found[1], timeout=30) as client:
                yield client
        finally:
            process.kill()
            process.communicate()


def test_an_avatar_is_its_names_and_can_be_cached(server: RunningServer) -> None:
    with avatars(server.address) as service:
        first, again, other = (service.get(f"/avatar/{name}.png") for name in ("ada", "ada", "grace"))
        assert first.status_code == 200
        assert first.headers["content-type"] == "image/png"
        assert first.content == again.content != other.content
        assert first.headers["etag"] == again.headers["etag"] != other.headers["etag"]
        assert "max-age" in first.headers["cache-control"]
        assert read_provenance(first.content).seed == 0xFDEE430D  # sha256("ada") starts so, in every process
        unchanged = service.get("/avatar/ada.png", headers={"If-None-Match": first.headers["etag"]})
        assert (unchanged.status_code, unchanged.content) == (304, b"")
        assert service.get("/avatar/ada.png?size=5").status_code == 422


def test_an_avatar_without_a_server_is_503(start_server: Callable[..., RunningServer]) -> None:
    running = start_server()
    with avatars(running.address) as service:
        assert service.get("/avatar/ada.png").status_code == 200
        running.process.kill()
        running.process.wait()
        refused = service.get("/avatar/ada.png")
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"] == "UnavailableError"
