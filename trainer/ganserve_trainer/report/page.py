"""The report of a run: `report.html`, one self-contained file that is complete without JavaScript."""

import base64
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from ganserve_trainer.data.spec import ImageSpec
from ganserve_trainer.files import replace_atomically
from ganserve_trainer.report.charts import Mark, Series, bar_chart, line_chart
from ganserve_trainer.report.history import History, best_of
from ganserve_trainer.settings import Settings

FILE_NAME = "report.html"
REAL_FILE_NAME = "real.png"

_TIMELINE_LENGTH = 24
# Sizes before base64, which turns 3 bytes into 4: the whole page stays below 5 MB.
_TIMELINE_BYTES = 2_200_000
_PICTURE_BYTES = 400_000
_TABLE_ROWS = 50

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters["thousands"] = "{:,}".format
# Read here, not when a report is due: an upgrade during a run must not give this code another template.
_TEMPLATE = _ENVIRONMENT.get_template("page.html.jinja")

T = TypeVar("T")


class _Image(NamedTuple):
    source: str  # a data: URL
    width: int
    height: int


class _Sheet(NamedTuple):
    images_seen: int
    image: _Image | None  # None if the file cannot be read


class _Metrics(NamedTuple):
    names: list[str]
    charts: list[Markup]
    rows: list[list[str]]


class _Evaluation(NamedTuple):
    digest: str
    metrics: list[tuple[str, str, str]]  # name, value with its standard error, method
    withheld: list[tuple[str, str]]  # name, reason
    histogram: Markup


def write_report(
    out: Path,
    settings: Settings,
    spec: ImageSpec,
    history: History,
    versions: dict[str, str],
    *,
    preset: Settings,
    images_seen: int,
    elapsed_s: float,
    device: str,
    finished: bool,
    checkpoint_digest: str | None = None,
) -> None:
    """Write `report.html` into a run's folder, from the history and the files in the folder.

    Args:
        out: the run's folder; the page shows its `samples/*.png`, named by images seen, `real.png`,
            `interpolations.png`, `neighbours.png` and `evaluation.json`, if they exist and are readable.
        settings: the settings of the run.
        spec: the shape and the classes of the data set's images.
        history: the history of the run.
        versions: the versions of the software, by name.
        preset: the settings of the run's preset; settings that differ from it are marked.
        images_seen: the number of images that the run has seen.
        elapsed_s: the training time so far, in seconds.
        device: the device of the run.
        finished: whether the run ended as planned.
        checkpoint_digest: the digest of the EMA generator; an evaluation of another generator is marked.

    Raises:
        OSError: the page cannot be written.
    """
    sheets = _sheets(out / "samples")
    chosen = _evenly(sheets, _TIMELINE_LENGTH)
    timeline = [_sheet(sheet, _TIMELINE_BYTES // len(chosen)) for sheet in chosen]
    evaluation = out / "evaluation.json"
    page = _TEMPLATE.render(
        title=f"{settings.preset} on {settings.dataset}",
        facts=_facts(settings, images_seen, elapsed_s, device, finished) | _best(settings, history),
        alarms=history.alarms,
        timeline=[sheet for sheet in timeline if sheet.image],
        chosen=len(chosen),
        sheets=len(sheets),
        curves=[*_curves(history), *_modes(history)],
        metrics=_metrics(history),
        final=_sheet(sheets[-1], _PICTURE_BYTES) if sheets else None,
        real=_image(out / REAL_FILE_NAME, _PICTURE_BYTES),
        interpolations=_image(out / "interpolations.png", _PICTURE_BYTES),
        neighbours=_image(out / "neighbours.png", _PICTURE_BYTES),
        evaluated=evaluation.exists(),
        evaluation=_evaluation(evaluation, spec),
        checkpoint_digest=checkpoint_digest,
        settings=_settings(settings, preset),
        spec=spec,
        versions=versions,
    )
    with replace_atomically(out / FILE_NAME) as file:
        # A folder's name may be invalid text: characters that cannot be encoded are written as escapes.
        file.write(page.encode("utf-8", "backslashreplace"))


def _facts(settings: Settings, images_seen: int, elapsed_s: float, device: str, finished: bool) -> dict[str, str]:
    share = math.floor(100 * images_seen / settings.images)
    return {
        "state": "finished" if finished else f"unfinished: {share} % of {settings.images:,} images",
        "images seen": f"{images_seen:,}",
        "time": _duration(elapsed_s),
        "images/s": f"{images_seen / elapsed_s:,.0f}" if elapsed_s > 0 else "–",
        "device": device,
    }


def _best(settings: Settings, history: History) -> dict[str, str]:
    """Return the figure of the best checkpoint beside that of the last measurement."""
    best = best_of(history.measurements, settings.select)
    if best is None:
        return {}
    last = history.measurements[-1].metrics.get(settings.select, math.nan)
    return {
        f"best {settings.select}": f"{best.metrics[settings.select]:.4g} at {best.images_seen:,} images",
        f"last {settings.select}": f"{last:.4g}",
    }


def _curves(history: History) -> list[Markup]:
    points = history.points
    x = [point.images_seen for point in points]
    events = [Mark(alarm.images_seen, f"{alarm.name} at {alarm.images_seen:,} images") for alarm in history.alarms]

    def lines(discriminator: str, generator: str, kind: str) -> list[Series]:
        return [
            Series(name, x, [getattr(point, f"{name.split()[0]}_{kind}") for point in points])
            for name in (discriminator, generator)
        ]

    return [
        line_chart("Losses", "loss", lines("discriminator", "generator", "loss"), events=events),
        line_chart(
            "Discriminator accuracy",
            "right answers",
            lines("real", "fake", "accuracy"),
            y_range=(0, 1),
            events=events,
        ),
        line_chart(
            "Gradient norms", "norm", lines("discriminator", "generator", "gradient_norm"), log=True, events=events
        ),
        line_chart(
            "Diversity",
            "share of the data's",
            [Series("EMA generator", x, [point.diversity for point in points])],
            y_range=(0, 1),
            levels=[Mark(1, "real images")],
            events=events,
        ),
    ]


def _modes(history: History) -> list[Markup]:
    """Draw the last count of modes, and how near generated and real images are in each count."""
    counts = history.modes
    if not counts:
        return []
    last, x = counts[-1], [count.images_seen for count in counts]
    bars = list(zip(last.names, last.generated, strict=True))
    return [
        bar_chart("Modes in generated images", "images", bars, last.expected, "expected"),
        line_chart(
            "Coverage, and distance to training images",
            "share of real images'",
            [
                Series("coverage", x, [count.coverage for count in counts]),
                Series("distance", x, [count.distance for count in counts]),
            ],
            y_range=(0, 1),
        ),
    ]


def _metrics(history: History) -> _Metrics:
    names = list(dict.fromkeys(name for measurement in history.measurements for name in measurement.metrics))
    charts = [
        line_chart(
            name,
            name,
            [
                Series(
                    "last",
                    [measurement.images_seen for measurement in history.measurements],
                    [measurement.metrics.get(name, math.nan) for measurement in history.measurements],
                )
            ],
        )
        for name in names
    ]
    rows = [
        [
            f"{measurement.images_seen:,}",
            _duration(measurement.elapsed_s),
            *(f"{measurement.metrics[name]:.4g}" if name in measurement.metrics else "–" for name in names),
        ]
        for measurement in _evenly(history.measurements, _TABLE_ROWS)
    ]
    return _Metrics(names, charts, rows)


def _sheets(folder: Path) -> list[tuple[int, Path]]:
    """Return the contact sheets with their images seen, oldest first."""
    return sorted((int(path.stem), path) for path in folder.glob("*.png") if path.stem.isdecimal())


def _sheet(sheet: tuple[int, Path], limit: int) -> _Sheet:
    images_seen, path = sheet
    return _Sheet(images_seen, _image(path, limit))


def _image(path: Path, limit: int) -> _Image | None:
    """Return the picture in at most `limit` bytes, or None if it cannot be read."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            width, height = image.size
            kind = "png"
            if len(content) > limit:
                kind, content = "jpeg", _smaller(image.convert("RGB"), limit)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # PIL's errors for a damaged file
        return None
    return _Image(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", width, height)


def _smaller(image: Image.Image, limit: int) -> bytes:
    """Encode as JPEG; reduce the quality, and then the size, until the file fits the limit."""
    quality = 90
    while True:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        if file.tell() <= limit or max(image.size) <= 16:
            return file.getvalue()
        if quality > 60:
            quality -= 15
        else:
            image = image.resize(
                (max(image.width * 3 // 4, 1), max(image.height * 3 // 4, 1)), Image.Resampling.LANCZOS
            )


def _evaluation(path: Path, spec: ImageSpec) -> _Evaluation | None:
    """Return the figures of `evaluation.json`, or None if it cannot be read."""
    try:
        evaluation = json.loads(path.read_bytes())
        metrics = [
            (str(metric["name"]), _with_error(metric), str(metric["method"])) for metric in evaluation["metrics"]
        ]
        withheld = [(str(each["name"]), str(each["reason"])) for each in evaluation.get("withheld", [])]
        histogram = _histogram(evaluation.get("class_histogram"), spec)
        return _Evaluation(str(evaluation["checkpoint"]), metrics, withheld, histogram)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _with_error(metric: dict[str, Any]) -> str:
    error = metric.get("standard_error")
    return f"{metric['value']:.6g}" + ("" if error is None else f" ± {error:.2g}")


def _histogram(counts: Any, spec: ImageSpec) -> Markup:
    """Draw the number of generated images of each class; `counts` is by name, or in the order of the classes."""
    if not counts:
        return Markup()
    bars = counts.items() if isinstance(counts, dict) else zip(spec.class_names, counts, strict=True)
    return bar_chart("Classes of the generated images", "images", [(str(name), float(count)) for name, count in bars])


def _settings(settings: Settings, preset: Settings) -> list[tuple[str, Any, Any, str]]:
    """Return the name of each setting, its value in this run and in the preset, and what it is."""
    return [
        (field.name, getattr(settings, field.name), getattr(preset, field.name), field.metadata.get("help", ""))
        for field in dataclasses.fields(settings)
    ]


def _evenly(items: Sequence[T], count: int) -> list[T]:
    """Choose at most `count` items, evenly spaced, including the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[index * (len(items) - 1) // (count - 1)] for index in range(count)]


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
