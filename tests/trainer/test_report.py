import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ganserve_trainer.data.spec import ImageSpec
from ganserve_trainer.report.charts import Series, bar_chart, line_chart
from ganserve_trainer.report.history import Alarm, History, Measurement, Modes, Point
from ganserve_trainer.report.page import write_report
from ganserve_trainer.report.pictures import save_contact_sheet, save_interpolations, slerp
from ganserve_trainer.settings import Settings

SECTIONS = (
    "alarms",
    "timeline",
    "curves",
    "metrics",
    "final",
    "interpolations",
    "neighbours",
    "evaluation",
    "configuration",
    "versions",
)
VOID = {"meta", "img", "input", "br"}
HOSTILE = (
    "</script></style></title><script src=//evil.example>alert(1)</script><img src='https://evil.example' onerror=x>\"&"
)

PRESET = Settings("mlp", architecture="mlp", conditional=False)
SPEC = ImageSpec(1, 28, 28, ("zero", "one"))


class Page(HTMLParser):
    """A page that must be well formed: every element is closed, in order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not set(self.open) & {"script", "style"}:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def point(n: int, value: float = 0.5) -> Point:
    return Point(n * 1000, float(n), value, value, value, value, value, value, value)


def report(out: Path, history: History | None = None, spec: ImageSpec = SPEC, **changes: Any) -> Page:
    settings = dataclasses.replace(PRESET, **changes.pop("settings", {}))
    details = {"preset": PRESET, "images_seen": 600_000, "elapsed_s": 300.0, "device": "cpu", "finished": False}
    versions = {"torch": "2.9.1"} | changes.pop("versions", {})
    write_report(out, settings, spec, history or History(), versions, **(details | changes))
    content = (out / "report.html").read_bytes()
    assert len(content) < 5_000_000
    page = Page(content.decode())
    assert_self_contained(page)
    assert [attributes["id"] for attributes in page.all("section")] == list(SECTIONS)
    return page


def assert_self_contained(page: Page) -> None:
    """Check that nothing is loaded from anywhere, and that nothing in the page came in from a name."""
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form", "audio", "video", "use"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "srcset", "href", "xlink:href", "action", "data", "poster"}:
                assert value is not None
                assert value.startswith("#" if name == "href" else "data:image/"), value[:80]
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert "src" not in page.all("script")[0]


def sheets(out: Path, count: int, size: int = 40, noise: bool = False) -> None:
    (out / "samples").mkdir(parents=True)
    for n in range(1, count + 1):
        pixels = torch.randint(256, (size, size, 3), dtype=torch.uint8) if noise else torch.zeros(size, size, 3).byte()
        Image.fromarray(pixels.numpy()).save(out / "samples" / f"{n * 1000:09d}.png")


def full_history() -> History:
    return History(
        [point(n) for n in range(1, 50)],
        [Measurement(n * 10_000, n * 60.0, {"fid": 10.0 / n, "recall": 0.5}) for n in range(1, 4)],
        [Alarm(25_000, "mode collapse", "all the same since 20,000 images; try something")],
        [Modes(20_000, ("zero", "one"), (3.0, 997.0), (500.0, 500.0), 0.6, 0.9)],
    )


def test_a_report_shows_all_there_is(tmp_path: Path) -> None:
    sheets(tmp_path, 3)
    for name in ("interpolations", "neighbours", "real"):
        Image.new("L", (30, 20)).save(tmp_path / f"{name}.png")
    figures = [{"name": "label_accuracy", "value": 0.98765, "standard_error": 0.00123, "method": "by 10 images"}]
    withheld = [{"name": "precision", "reason": "only 23 test images"}]
    (tmp_path / "evaluation.json").write_text(
        json.dumps({"checkpoint": "sha256:abc", "metrics": figures, "withheld": withheld, "class_histogram": [40, 60]})
    )
    page = report(tmp_path, full_history(), settings={"learning_rate": 0.0125})
    for text in ("mlp on mnist", "unfinished: 50 %", "600,000", "5 min 00 s", "2,000", "cpu", "torch", "2.9.1"):
        assert text in page.text
    for text in (
        "mode collapse",
        "all the same since",
        "fid",
        "3.333",
        "recall",
        "label_accuracy",
        "0.98765 ± 0.0012",
        "zero",
    ):
        assert text in page.text
    assert "only 23 test images" in page.text
    for setting in dataclasses.fields(PRESET):
        assert setting.name in page.text
    assert [row["class"] for row in page.all("tr") if "class" in row] == ["changed"]
    assert "0.0125" in page.text
    # Three in the timeline, the last once more, and three other pictures, each with a text.
    assert len(page.all("img")) == 7
    assert all(image["alt"] for image in page.all("img"))
    assert "one, expected: 500" in page.text
    # Losses, accuracies, gradient norms, diversity, modes; fid, recall; the classes.
    assert [chart["aria-label"] for chart in page.all("svg")] == [
        "Losses",
        "Discriminator accuracy",
        "Gradient norms",
        "Diversity",
        "Modes in generated images",
        "Coverage, and distance to training images",
        "fid",
        "recall",
        "Classes of the generated images",
    ]
    assert not list(tmp_path.glob(".*"))
    assert {link["href"] for link in page.all("a")} == {f"#{name}" for name in SECTIONS}


def test_a_report_mentions_no_address(tmp_path: Path) -> None:
    report(tmp_path, full_history())
    content = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|//|url\(|@import|file:", content)


def test_no_name_from_outside_becomes_markup(tmp_path: Path) -> None:
    names = tuple(f"{HOSTILE}{n}" for n in range(12))
    history = History(
        [point(1), point(2)],
        [Measurement(1000, 1.0, {HOSTILE: 1.0})],
        [Alarm(1500, HOSTILE, HOSTILE)],
    )
    figures = [{"name": HOSTILE, "value": 1.0, "method": HOSTILE}]
    (tmp_path / "evaluation.json").write_text(
        json.dumps({"checkpoint": HOSTILE, "metrics": figures, "class_histogram": dict.fromkeys(names, 1)})
    )
    # A folder's name need not be text: \udcff is a byte that is not UTF-8.
    spec = ImageSpec(1, 28, 28, (*names, "\udcff"))
    page = report(
        tmp_path, history, spec, settings={"dataset": f"./{HOSTILE}"}, device=HOSTILE, versions={HOSTILE: HOSTILE}
    )
    assert page.text.count(HOSTILE) > 12
    assert r"\udcff" in page.text
    # Its own elements only: no names made any.
    assert len(page.all("img")) == 0


def test_text_from_outside_is_escaped_in_each_place(tmp_path: Path) -> None:
    hostile = """<script>alert("it's")</script>"""
    history = History(
        [point(1), point(2)],
        [Measurement(1000, 1.0, {f"metric {hostile}": 1.0})],
        [Alarm(1500, f"name {hostile}", f"message {hostile}")],
    )
    (tmp_path / "evaluation.json").write_text(
        json.dumps({"checkpoint": "x", "metrics": [], "class_histogram": {f"class {hostile}": 1}})
    )
    spec = ImageSpec(1, 28, 28, (f"class {hostile}",))
    write_report(
        tmp_path,
        dataclasses.replace(PRESET, dataset=f"./{hostile}"),
        spec,
        history,
        {},
        preset=PRESET,
        images_seen=2000,
        elapsed_s=1.0,
        device="cpu",
        finished=True,
    )
    content = (tmp_path / "report.html").read_text()
    assert not re.search(r"""<script>alert|alert\(["']""", content)
    page = Page(content)
    assert_self_contained(page)
    places = {
        f"./{hostile}": 3,  # the title, the headline, the setting
        f"name {hostile}": 5,  # the alarm, a line in each of four charts
        f"message {hostile}": 1,
        f"class {hostile}": 3,  # the list, the bar's title and label
        f"metric {hostile}": 3,  # the chart's caption and label, the table
    }
    assert {text: page.text.count(text) for text in places} == places
    assert f"metric {hostile}" in [chart["aria-label"] for chart in page.all("svg")]


def test_a_run_without_a_past_has_a_report(tmp_path: Path) -> None:
    page = report(tmp_path, images_seen=0, elapsed_s=0.0)
    assert page.text.count("No values yet.") == 4
    for text in ("No alarms.", "No contact sheets yet.", "None measured yet.", "Not evaluated yet"):
        assert text in page.text
    assert page.all("svg") == page.all("img") == []


def test_one_point_is_drawn_as_a_dot(tmp_path: Path) -> None:
    page = report(tmp_path, History([point(1)], [Measurement(1000, 1.0, {"fid": 3.0})]))
    lines = [path["d"] for path in page.all("path") if (path["class"] or "").startswith("line")]
    assert len(lines) == 8
    for line in lines:
        assert line is not None
        start, end = line.removeprefix("M").split("L")
        assert start == end


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    values = [1.0, 2.0, math.nan, 3.0, math.inf, 4.0, 5.0, -math.inf, 1e308, -1e308]
    history = History(
        [point(n, value) for n, value in enumerate(values)],
        [Measurement(n, n, {"fid": value, f"only{n}": math.nan}) for n, value in enumerate(values)],
        [Alarm(3000, "mode collapse", "nan")],
    )
    page = report(tmp_path, history, elapsed_s=math.nan)
    drawn = [path["d"] or "" for path in page.all("path")]
    assert not any("nan" in d or "inf" in d or "e" in d for d in drawn)
    losses = next(path["d"] or "" for path in page.all("path") if (path["class"] or "").startswith("line"))
    assert losses.count("M") == 3
    assert "No values yet." in page.text


@pytest.mark.parametrize("bad", [[], {}, {"checkpoint": "x"}, {"checkpoint": "x", "metrics": [1]}, "text", None])
def test_an_evaluation_that_cannot_be_read_is_said_to_be(tmp_path: Path, bad: object) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(bad))
    assert "cannot be read" in report(tmp_path).text
    (tmp_path / "evaluation.json").write_text("{")
    assert "cannot be read" in report(tmp_path).text


def test_figures_of_an_earlier_checkpoint_are_marked(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps({"checkpoint": "sha256:old", "metrics": []}))
    assert "earlier checkpoint" in report(tmp_path, checkpoint_digest="sha256:new").text
    assert "earlier checkpoint" not in report(tmp_path, checkpoint_digest="sha256:old").text
    assert "earlier checkpoint" not in report(tmp_path).text


def test_a_picture_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    sheets(tmp_path, 2)
    whole = (tmp_path / "samples" / "000001000.png").read_bytes()
    (tmp_path / "samples" / "000001000.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "samples" / "notes.png").write_text("not a sheet")
    (tmp_path / "neighbours.png").write_text("not a picture")
    page = report(tmp_path)
    assert [image["alt"] for image in page.all("img")] == [
        "Images of the fixed latents after 2,000 images",
        "The EMA generator after 2,000 images.",
    ]


def test_a_long_run_of_large_sheets_stays_small(tmp_path: Path) -> None:
    # Noise: the worst that can be packed. 26 sheets of 400 x 400 are 12 MB as they lie there.
    torch.manual_seed(0)
    sheets(tmp_path, 26, size=400, noise=True)
    for name in ("interpolations", "neighbours"):
        (tmp_path / f"{name}.png").write_bytes((tmp_path / "samples" / "000026000.png").read_bytes())
    history = History(
        [point(n, 1 + n % 7) for n in range(20_000)],
        [Measurement(n, n, {f"metric {m}": 1.0 for m in range(8)}) for n in range(2000)],
    )
    spec = ImageSpec(3, 64, 64, tuple(f"class {n}" for n in range(1000)))
    (tmp_path / "evaluation.json").write_text(
        json.dumps({"checkpoint": "x", "metrics": [], "class_histogram": [1] * 1000})
    )
    page = report(tmp_path, history, spec)
    shown = [image["alt"] or "" for image in page.all("img")][:24]
    assert shown[0].endswith("after 1,000 images")
    assert shown[-1].endswith("after 26,000 images")
    assert "24 of 26 sheets" in page.text
    for path in page.all("path"):
        assert len(re.findall("[ML]", path["d"] or "")) <= 600
    assert "class 999" in page.text


def test_a_chart_places_values_where_its_axes_say() -> None:
    page = Page(line_chart("Losses", "loss", [Series("only", [0, 100], [0.0, 4.0])]))
    d = next(path["d"] or "" for path in page.all("path") if (path["class"] or "").startswith("line"))
    (left, bottom), (right, top) = ((float(v) for v in pair.split()) for pair in d.removeprefix("M").split("L"))
    texts = {}
    for tag, attributes in page.elements:
        if tag == "text" and attributes.get("class") == "y":
            texts[float(attributes["y"] or 0)] = len(texts)
    assert left < right
    assert bottom == max(texts)
    assert top == min(texts)
    # On a logarithmic axis the mean of 1 and 100 is 10; a value of 0 has no place.
    log = Page(line_chart("Norms", "norm", [Series("only", [0, 1, 2, 3], [1.0, 10.0, 100.0, 0.0])], log=True))
    d = next(path["d"] or "" for path in log.all("path") if (path["class"] or "").startswith("line"))
    low, middle, high = (float(pair.split()[1]) for pair in d.removeprefix("M").split("L"))
    assert middle == pytest.approx((low + high) / 2, abs=0.11)


def test_many_points_become_the_means_of_neighbours() -> None:
    # 0, 2, 0, 2, …: the means of pairs are 1, a flat line; a value that is missing changes the mean of its pair only.
    values = [float(n % 2 * 2) for n in range(1200)]
    values[7] = math.nan
    page = Page(line_chart("Losses", "loss", [Series("only", list(range(1200)), values)], y_range=(0, 2)))
    d = next(path["d"] or "" for path in page.all("path") if (path["class"] or "").startswith("line"))
    heights = [float(pair.split()[1]) for pair in d.removeprefix("M").split("L")]
    assert len(heights) == 600
    assert heights[3] > heights[2] == heights[4] == heights[599]


def test_bars_are_as_high_as_their_values() -> None:
    page = Page(bar_chart("Classes", "images", [("a", 1), ("b", 2), ("c", math.nan), ("d", -1)]))
    heights = [float(bar["height"] or 0) for bar in page.all("rect")]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert heights[2:] == [0, 0]


def test_interpolations_keep_the_length_of_latents() -> None:
    torch.manual_seed(0)
    start, end = torch.randn(2, 5, 1, 64)
    walk = slerp(start, end, torch.linspace(0, 1, 7)[:, None])
    assert walk.shape == (5, 7, 64)
    assert torch.allclose(walk[:, 0], start[:, 0], atol=1e-5)
    assert torch.allclose(walk[:, -1], end[:, 0], atol=1e-5)
    lengths = walk.norm(dim=-1)
    assert (lengths > 0.9 * lengths[:, [0, -1]].amin(1, keepdim=True)).all()
    # Half-way between (2, 0) and (0, 2) lies (√2, √2), not (1, 1).
    middle = slerp(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[0.5]]))
    assert middle[0].tolist() == pytest.approx([math.sqrt(2)] * 2, abs=1e-5)
    same = slerp(start, start, torch.tensor([[0.5]]))
    assert torch.allclose(same, start, atol=1e-5)
    opposite = slerp(torch.tensor([[1.0]]), torch.tensor([[-2.0]]), torch.linspace(0, 1, 3)[:, None])
    assert opposite[:, 0].tolist() == pytest.approx([1.0, -0.5, -2.0], abs=1e-5)


def test_a_sheet_of_interpolations_has_a_walk_a_row_and_a_class_a_row(tmp_path: Path) -> None:
    asked: list[tuple[torch.Size, list[int] | None]] = []

    def generate(latent: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        asked.append((latent.shape, None if label is None else label.tolist()))
        return latent[:, :1, None, None].expand(-1, 1, 8, 8).tanh()

    before = torch.get_rng_state()
    save_interpolations(generate, 16, tmp_path / "interpolations.png", rows=3, columns=5)
    save_interpolations(generate, 16, tmp_path / "classes.png", label=torch.tensor([4, 7]), columns=3)
    assert asked == [((15, 16), None), ((6, 16), [4, 4, 4, 7, 7, 7])]
    assert torch.equal(torch.get_rng_state(), before)
    with Image.open(tmp_path / "interpolations.png") as image:
        assert image.size == (5 * 10 + 2, 3 * 10 + 2)


def test_a_sheet_has_the_name_of_the_class_before_each_row(tmp_path: Path) -> None:
    images = torch.full((4, 1, 28, 28), -1.0)
    save_contact_sheet(images, 2, tmp_path / "plain.png")
    save_contact_sheet(images, 2, tmp_path / "named.png", ["a", "a class whose name is far too long"])
    plain, named = (Image.open(tmp_path / f"{name}.png").convert("L") for name in ("plain", "named"))
    margin = named.width - plain.width
    assert named.height == plain.height
    written = [named.crop((0, top, margin, top + 30)).getbbox() for top in (0, 30)]
    assert written[0] is not None
    assert written[1] is not None
    assert written[0][2] < written[1][2] <= margin
