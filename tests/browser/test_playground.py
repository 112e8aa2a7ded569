"""`ganserve playground` in a real browser. Needs the extra, playwright and the system's chromium: see .ci/run."""

import base64
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from tests.conftest import RunningServer, run_server
from tests.server.test_further_inputs import model_of, save

from ganserve import Client, Interpolation, Provenance, read_provenance

# The program, and a word on standard error for each address it asks for that is not on this machine.
# Ctrl-C works as in a terminal, even where the tests run in the background: there it would be ignored.
WATCHED = """
import signal
import sys
from ganserve._cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[0] if event != "socket.connect" else arguments[1]
        host = address[0] if isinstance(address, tuple) else address
        if host not in ("127.0.0.1", "localhost", "::1", None):
            print("ELSEWHERE", event, address, file=sys.stderr, flush=True)

sys.addaudithook(watch)
main()
"""
WAIT_MS = 30_000


@contextmanager
def run_playground(address: str, *, server_is_there: bool = True) -> Iterator[str]:
    """Run the program; yield the page's URL. It may ask nobody but this machine."""
    port = free_port()
    command = [sys.executable, "-c", WATCHED, "playground", "--address", address, "--port", str(port), "--no-browser"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GRADIO", "HF_"))}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            url = f"http://127.0.0.1:{port}"
            printed = process.stdout.readline()
            assert f"{url}; Ctrl-C" in printed, printed or process.communicate()[1]
            if not server_is_there:
                assert f"no answer from {address}" in process.stderr.readline()
            yield url
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130  # as the help says
        finally:
            process.kill()
            errors = process.communicate()[1]
    assert "ELSEWHERE" not in errors, errors
    assert "Traceback" not in errors, errors


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "there is no chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        # Chromium's own sandbox does not start as root.
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def opened(browser: Browser, url: str) -> Iterator[Page]:
    """Open the page; it may ask nobody but its own server."""
    asked: list[str] = []
    with browser.new_context(accept_downloads=True) as context:
        context.on("request", lambda request: asked.append(request.url))
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        expect.set_options(timeout=WAIT_MS)
        page.goto(url)
        yield page
    elsewhere = {each for each in asked if urlsplit(each).scheme not in ("data", "blob") and not each.startswith(url)}
    assert asked
    assert not elsewhere


@pytest.fixture(scope="module")
def url(server: RunningServer) -> Iterator[str]:
    with run_playground(server.address) as running:
        yield running


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    with opened(browser, url) as page:
        yield page


def picture(page: Page) -> Locator:
    return page.locator("#picture img")


def file_of(image: Locator) -> bytes:
    return base64.b64decode((image.get_attribute("src") or "").partition(";base64,")[2])


def pixels_of(file: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(file)))


def choose_model(page: Page, name: str) -> None:
    page.locator("#model input").click()
    page.get_by_role("option", name=name, exact=True).click()


def test_dragging_the_seed_changes_the_picture_and_dragging_back_brings_it_again(page: Page) -> None:
    image = picture(page)
    expect(image).to_have_attribute("alt", "cdcgan-fashion-mnist version 1, class 0, seed 1, truncation 1")
    first = image.get_attribute("src")
    slider = page.locator("#seed input[type=range]")
    box = slider.bounding_box()
    assert box
    assert first
    page.mouse.move(box["x"] + 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=10)
    page.mouse.up()
    expect(image).not_to_have_attribute("src", first)
    seed = int(slider.input_value())
    assert 4000 < seed < 6000
    expect(image).to_have_attribute("alt", f"cdcgan-fashion-mnist version 1, class 0, seed {seed}, truncation 1")
    slider.fill("1")
    expect(image).to_have_attribute("src", first)


def test_any_seed_can_be_written_into_the_box(page: Page, client: Client) -> None:
    image, box, slider = picture(page), page.locator("#seed-box input"), page.locator("#seed input[type=range]")
    expect(image).to_be_visible()
    box.fill("4294967295")
    expect(image).to_have_attribute("alt", "cdcgan-fashion-mnist version 1, class 0, seed 4294967295, truncation 1")
    expect(slider).to_have_value("9999")
    wanted = client.generate("cdcgan-fashion-mnist", seed=2**32 - 1, label=0)
    np.testing.assert_array_equal(pixels_of(file_of(image)), wanted.pixels[0, :, :, 0])
    box.fill("")  # on the way to another: the picture stays
    box.fill("77")
    expect(image).to_have_attribute("alt", "cdcgan-fashion-mnist version 1, class 0, seed 77, truncation 1")
    expect(slider).to_have_value("77")
    slider.fill("5")
    expect(box).to_have_value("5")
    expect(image).to_have_attribute("alt", "cdcgan-fashion-mnist version 1, class 0, seed 5, truncation 1")


def test_the_picture_is_the_servers_for_the_model_class_and_truncation_chosen(page: Page, client: Client) -> None:
    choose_model(page, "cdcgan-mnist")
    image = picture(page)
    expect(image).to_have_attribute("alt", "cdcgan-mnist version 1, class 0, seed 1, truncation 1")
    page.locator("#classes").get_by_text("7", exact=True).click()
    page.locator("#truncation input[type=range]").fill("0.5")
    expect(image).to_have_attribute("alt", "cdcgan-mnist version 1, class 7, seed 1, truncation 0.5")
    wanted = client.generate("cdcgan-mnist", seed=1, label=7, truncation=0.5)
    np.testing.assert_array_equal(pixels_of(file_of(image)), wanted.pixels[0, :, :, 0])
    choose_model(page, "dcgan-mnist")
    expect(image).to_have_attribute("alt", "dcgan-mnist version 1, class None, seed 1, truncation 0.5")
    expect(page.locator("#classes")).not_to_be_visible()


def test_what_is_downloaded_says_how_it_was_made(page: Page, client: Client, tmp_path: Path) -> None:
    expect(picture(page)).to_be_visible()
    with page.expect_download() as download:
        page.locator("#picture a.download").click()
    assert download.value.suggested_filename == "cdcgan-fashion-mnist-0-1.png"
    download.value.save_as(tmp_path / "picture.png")
    wanted = client.generate("cdcgan-fashion-mnist", seed=1, label=0)
    assert read_provenance(tmp_path / "picture.png") == Provenance(
        "cdcgan-fashion-mnist", 1, wanted.digest, seed=1, label=0, truncation=1.0
    )
    np.testing.assert_array_equal(pixels_of((tmp_path / "picture.png").read_bytes()), wanted.pixels[0, :, :, 0])


def test_a_film_goes_from_one_seed_to_the_other(page: Page, client: Client, tmp_path: Path) -> None:
    choose_model(page, "cdcgan-mnist")
    page.get_by_role("tab", name="Between two pictures").click()
    page.locator("#seed-b input[type=range]").fill("9")
    page.locator("#steps input[type=range]").fill("5")
    expect(page.get_by_alt_text("all 5 pictures")).to_be_visible()
    ends = [pixels_of(file_of(page.get_by_alt_text(name))) for name in ("the first", "the last")]
    for end, seed in zip(ends, (1, 9), strict=True):
        np.testing.assert_array_equal(end, client.generate("cdcgan-mnist", seed=seed, label=0).pixels[0, :, :, 0])
    with page.expect_download() as download:
        page.locator("#film a.download").click()
    assert download.value.suggested_filename == "cdcgan-mnist-0-1-9.gif"
    download.value.save_as(tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        assert getattr(film, "n_frames", 1) == 2 * 5 - 2
    found = read_provenance(tmp_path / "film.gif")
    assert (found.model, found.interpolation) == ("cdcgan-mnist", Interpolation("slerp", 1, 9, 5, (0, 1, 2, 3, 4)))


def test_the_card_the_quality_and_the_latency_are_shown(page: Page, client: Client) -> None:
    expect(picture(page)).to_be_visible()
    model = client.model("cdcgan-fashion-mnist")
    card = page.locator("#card")
    expect(card).to_contain_text(f"{int(model.card['training']['imagesSeen']):,}")
    for metric in model.metrics:
        expect(card).to_contain_text(f"{metric.name.replace('_', ' ')}{metric.text()}")
    latency = page.locator("#latency")
    expect(latency).to_contain_text("ms round trip")
    expect(latency).to_contain_text("median of 1:")
    page.locator("#seed input[type=range]").fill("2")
    expect(latency).to_contain_text("median of 2:")


def test_a_server_that_does_not_answer_is_told_and_found_again(
    browser: Browser, start_server: Callable[..., RunningServer]
) -> None:
    address = f"127.0.0.1:{free_port()}"
    with run_playground(address, server_is_there=False) as url, opened(browser, url) as page:
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text(f"no answer from {address}")
        for _ in range(2):
            running = start_server("--address", address)
            expect(alert).not_to_be_visible()
            expect(picture(page)).to_be_visible()
            running.process.kill()
            running.process.wait()
            expect(alert).to_contain_text(f"no answer from {address}")


def test_two_programs_cannot_have_one_port(server: RunningServer) -> None:
    with ExitStack() as stack:
        taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = taken.getsockname()[1]
        command = [sys.executable, "-c", WATCHED, "playground", "--address", server.address, "--port", str(port)]
        done = subprocess.run([*command, "--no-browser"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 4
    assert f"the page at 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_each_attribute_of_a_model_has_a_control(browser: Browser, tmp_path: Path) -> None:
    attributes = [{"name": "age", "minimum": 10, "maximum": 90, "defaultValue": 40}, {"name": "hat", "binary": True}]
    inputs = [
        {"name": "latent", "latent": {"shape": [2]}},
        {"name": "attributes", "attributes": {"attributes": attributes}},
    ]
    save(model_of(inputs, [], scale=0), tmp_path / "models", "people")  # scale 0: truncation has no effect
    with run_server("--workers=1", f"--models={tmp_path / 'models'}") as server, ExitStack() as stack:
        page = stack.enter_context(opened(browser, stack.enter_context(run_playground(server.address))))
        image = picture(page)
        made = "people version 1, class None, seed 1, truncation 1"
        expect(image).to_have_attribute("alt", f"{made}, age 40, hat 0")
        expect(page.locator("#truncation")).not_to_be_visible()
        page.locator(".attribute input[type=range]").fill("74")
        page.get_by_label("hat").check()
        expect(image).to_have_attribute("alt", f"{made}, age 74, hat 1")
        assert pixels_of(file_of(image)).tolist() == [[100, 100, 74, 1]]
