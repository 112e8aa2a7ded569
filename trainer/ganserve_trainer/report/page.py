"""The report of a run: `report.html`, one self-contained file that is complete without JavaScript."""

import base64
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from ganserve_trainer.data.spec import ImageSpec
from ganserve_trainer.files import replace_atomically
from ganserve_trainer.report.charts import Mark, Series, bar_chart, line_chart
from ganserve_trainer.report.history import History
from ganserve_trainer.settings import Settings

FILE_NAME = "report.html"

_TIMELINE_LENGTH = 24
# Sizes before base64, which turns 3 bytes into 4: the whole page stays below 5 MB.
_TIMELINE_BYTES = 2_200_000
_PICTURE_BYTES = 400_000
_TABLE_ROWS = 50

T = TypeVar("T")


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
        out: the run's folder; the page shows its `samples/*.png`, named by images seen, `interpolations.png`,
            `neighbours.png` and `evaluation.json`, if they exist and are readable.
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
    sections = [
        ("alarms", "Alarms", _alarms(history)),
        ("timeline", "Timeline", _timeline(sheets)),
        ("curves", "Curves", _curves(history)),
        ("metrics", "Metrics over time", _metrics(history)),
        ("final", "Final contact sheet", _final(sheets)),
        ("interpolations", "Latent interpolations", _picture(out / "interpolations.png", "Spherical interpolations.")),
        (
            "neighbours",
            "Nearest training images",
            _picture(
                out / "neighbours.png",
                "Each row has a generated image, then its nearest training images, nearest first.",
            ),
        ),
        ("evaluation", "Evaluation", _evaluation(out / "evaluation.json", spec, checkpoint_digest)),
        ("configuration", "Configuration", _configuration(settings, preset, spec)),
        ("versions", "Versions", _table(("software", "version"), versions.items())),
    ]
    contents = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{escape(title)}</h2>{content}</section>' for name, title, content in sections
    )
    headline = _headline(settings, images_seen, elapsed_s, device, finished)
    title = escape(f"{settings.preset} on {settings.dataset}")
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        # The page may load nothing from outside, even if a class's name contains HTML.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title} · ganserve</title><style>{_STYLE}</style></head><body>"
        f'<nav aria-label="Contents"><ol>{contents}</ol></nav>'
        f"<main><header><h1>{title}</h1>{headline}</header>{body}</main>"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )
    with replace_atomically(out / FILE_NAME) as file:
        # A folder's name may be invalid text: characters that cannot be encoded are written as escapes.
        file.write(page.encode("utf-8", "backslashreplace"))


def _headline(settings: Settings, images_seen: int, elapsed_s: float, device: str, finished: bool) -> str:
    share = math.floor(100 * images_seen / settings.images)
    facts = (
        ("state", "finished" if finished else f"unfinished: {share} % of {settings.images:,} images"),
        ("images seen", f"{images_seen:,}"),
        ("time", _duration(elapsed_s)),
        ("images/s", f"{images_seen / elapsed_s:,.0f}" if elapsed_s > 0 else "–"),
        ("device", device),
    )
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{tiles}</dl>'


def _alarms(history: History) -> str:
    if not history.alarms:
        return '<p class="calm">No alarms.</p>'
    return "".join(
        f'<div class="alarm" role="alert"><strong>{escape(alarm.name)}</strong> at {alarm.images_seen:,} images'
        f"<p>{escape(alarm.message)}</p></div>"
        for alarm in history.alarms
    )


def _curves(history: History) -> str:
    points = history.points
    x = [point.images_seen for point in points]
    events = [Mark(alarm.images_seen, f"{alarm.name} at {alarm.images_seen:,} images") for alarm in history.alarms]

    def lines(discriminator: str, generator: str, kind: str) -> list[Series]:
        return [
            Series(name, x, [getattr(point, f"{name.split()[0]}_{kind}") for point in points])
            for name in (discriminator, generator)
        ]

    charts = (
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
    )
    note = (
        "The last values are next to the names; a red line is an alarm. Accuracy: the share of real images with a "
        "positive logit, and of generated ones with a negative logit; it means nothing for a Wasserstein critic. "
        "Diversity: how far the generated images of a class lie from one another, compared with real ones; 0 is a "
        "collapsed generator."
    )
    return f'<div class="grid">{"".join(charts)}</div><p class="note">{note}</p>'


def _metrics(history: History) -> str:
    if not history.measurements:
        return '<p class="none">None measured yet.</p>'
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
        (
            f"{measurement.images_seen:,}",
            _duration(measurement.elapsed_s),
            *(f"{measurement.metrics[name]:.4g}" if name in measurement.metrics else "–" for name in names),
        )
        for measurement in _evenly(history.measurements, _TABLE_ROWS)
    ]
    table = _table(("images seen", "time", *names), rows, numbers=True)
    return f'<div class="grid">{"".join(charts)}</div>{table}'


def _sheets(folder: Path) -> list[tuple[int, Path]]:
    """Return the contact sheets with their images seen, oldest first."""
    return sorted((int(path.stem), path) for path in folder.glob("*.png") if path.stem.isdecimal())


def _timeline(sheets: list[tuple[int, Path]]) -> str:
    chosen = _evenly(sheets, _TIMELINE_LENGTH)
    figures = []
    for images_seen, path in chosen:
        text = f"{images_seen:,} images"
        if image := _image(path, f"Images of the fixed latents after {text}", _TIMELINE_BYTES // len(chosen)):
            figures.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")
    if not figures:
        return '<p class="none">No contact sheets yet.</p>'
    note = "The same latents throughout the run" + (
        f"; {len(chosen)} of {len(sheets)} sheets" if len(chosen) < len(sheets) else ""
    )
    # The script shows the slider; without JavaScript all sheets are shown.
    last = len(figures) - 1
    return (
        f'<p class="note">{note}.</p><div id="slider" hidden><button type="button">Play</button>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="Images seen"></div>'
        f'<div id="sheets">{"".join(figures)}</div>'
    )


def _final(sheets: list[tuple[int, Path]]) -> str:
    if not sheets:
        return '<p class="none">No contact sheets yet.</p>'
    images_seen, path = sheets[-1]
    return _picture(path, f"The EMA generator after {images_seen:,} images.")


def _picture(path: Path, caption: str) -> str:
    image = _image(path, caption, _PICTURE_BYTES)
    if not image:
        return '<p class="none">Not available yet.</p>'
    return f'<figure class="picture">{image}<figcaption>{escape(caption)}</figcaption></figure>'


def _image(path: Path, text: str, limit: int) -> str:
    """Return an HTML element with the picture in at most `limit` bytes, or an empty text if it cannot be read."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            width, height = image.size
            kind = "png"
            if len(content) > limit:
                kind, content = "jpeg", _smaller(image.convert("RGB"), limit)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # PIL's errors for a damaged file
        return ""
    data = base64.b64encode(content).decode()
    source = f"data:image/{kind};base64,{data}"
    return f'<img src="{source}" width="{width}" height="{height}" alt="{escape(text)}" loading="lazy">'


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


def _evaluation(path: Path, spec: ImageSpec, checkpoint_digest: str | None) -> str:
    if not path.exists():
        return '<p class="none">Not evaluated yet. To evaluate it: <code>ganserve-trainer evaluate</code>.</p>'
    try:
        evaluation = json.loads(path.read_bytes())
        digest = str(evaluation["checkpoint"])
        rows = [
            (str(metric["name"]), f"{metric['value']:.6g}", str(metric["method"])) for metric in evaluation["metrics"]
        ]
        histogram = _histogram(evaluation.get("class_histogram"), spec)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return '<p class="none">evaluation.json cannot be read.</p>'
    other = ""
    if checkpoint_digest not in (None, digest):
        other = '<p class="alarm">These metrics are those of an earlier checkpoint of this run.</p>'
    table = _table(("metric", "value", "method"), rows)
    return f'{other}{table}{histogram}<p class="note">Checkpoint <code>{escape(digest)}</code></p>'


def _histogram(counts: Any, spec: ImageSpec) -> str:
    """Draw the number of generated images of each class; `counts` is by name, or in the order of the classes."""
    if not counts:
        return ""
    bars = counts.items() if isinstance(counts, dict) else zip(spec.class_names, counts, strict=True)
    return bar_chart("Classes of the generated images", "images", [(str(name), float(count)) for name, count in bars])


def _configuration(settings: Settings, preset: Settings, spec: ImageSpec) -> str:
    rows = []
    for setting in dataclasses.fields(settings):
        value, usual = getattr(settings, setting.name), getattr(preset, setting.name)
        mark = ' class="changed"' if value != usual else ""
        cells = "".join(f"<td>{escape(str(text))}</td>" for text in (value, usual, setting.metadata.get("help", "")))
        rows.append(f'<tr{mark}><th scope="row">{escape(setting.name)}</th>{cells}</tr>')
    shape = f"{spec.width} × {spec.height} pixels, {spec.channels} {'channel' if spec.channels == 1 else 'channels'}"
    names = ", ".join(spec.class_names)
    head = "".join(f'<th scope="col">{name}</th>' for name in ("setting", "value", "preset", "what it is"))
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        f'<p class="note">Images: {shape}.</p>'
        f"<details><summary>{len(spec.class_names):,} classes</summary><p>{escape(names)}</p></details>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    kind = ' class="numbers"' if numbers else ""
    return f'<div class="wide"><table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


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


# Okabe and Ito's colours (2008), which colour-blind people can distinguish; lighter variants on a dark page.
_STYLE = """
:root{color-scheme:light dark;--page:#fff;--card:#f6f7f9;--ink:#1b1f24;--dim:#5b6570;--rule:#d8dde3;
--a:#0072b2;--b:#d55e00;--bad:#b3123b;--badcard:#fdecef;--good:#12734f}
@media(prefers-color-scheme:dark){:root{--page:#13161a;--card:#1c2127;--ink:#e4e8ec;--dim:#9aa5b1;--rule:#343b44;
--a:#56b4e9;--b:#f0a044;--bad:#ff6b8b;--badcard:#3a1720;--good:#4fc69a}}
*{box-sizing:border-box}
html{scroll-behavior:smooth}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:1180px;margin:0 auto;padding:0 20px 60px}
nav{position:sticky;top:0;z-index:1;background:var(--page);border-bottom:1px solid var(--rule)}
nav ol{display:flex;gap:4px 18px;list-style:none;margin:0 auto;padding:9px 20px;max-width:1180px;overflow-x:auto;
font-size:14px;white-space:nowrap}
a{color:var(--a);text-decoration:none}
a:hover{text-decoration:underline}
h1{font-size:30px;line-height:1.2;margin:30px 0 16px}
h2{font-size:20px;margin:44px 0 12px}
section{scroll-margin-top:40px}
.facts{display:flex;flex-wrap:wrap;gap:10px;margin:0}
.facts div{background:var(--card);border-radius:8px;padding:9px 16px;flex:1 1 auto}
dt,.note,.none,figcaption{color:var(--dim);font-size:14px}
dd{margin:0;font-size:19px;font-variant-numeric:tabular-nums}
.alarm{background:var(--badcard);border-left:5px solid var(--bad);border-radius:4px;padding:12px 16px;margin:0 0 10px}
.alarm strong{color:var(--bad);text-transform:uppercase;letter-spacing:.04em}
.alarm p{margin:4px 0 0}
.calm{color:var(--good)}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:16px}
figure{margin:0}
.chart{background:var(--card);border-radius:8px;padding:12px 12px 6px;max-width:580px}
.chart figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 14px;color:var(--ink);font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:0 14px;font-weight:400;color:var(--dim)}
.legend b{color:var(--ink);font-weight:500;font-variant-numeric:tabular-nums}
.legend i{display:inline-block;width:16px;height:3px;border-radius:2px;margin-right:6px;vertical-align:middle}
i.s0{background:var(--a)}
i.s1{background:var(--b)}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--dim);font:13px system-ui,sans-serif}
text.x,text.label{text-anchor:middle}
text.y{text-anchor:end;dominant-baseline:middle}
text.level{text-anchor:end}
path{fill:none}
path.grid{stroke:var(--rule);stroke-width:1}
path.level{stroke:var(--dim);stroke-width:1;stroke-dasharray:4 4}
path.event{stroke:var(--bad);stroke-width:2}
path.line{stroke-width:1.6;stroke-linejoin:round;stroke-linecap:round}
path.s0{stroke:var(--a)}
path.s1{stroke:var(--b)}
@media(max-width:520px){svg text{font-size:17px}}
rect.bar{fill:var(--a)}
img{display:block;max-width:100%;height:auto;border-radius:4px;image-rendering:pixelated}
.picture img{width:min(100%,640px)}
#sheets{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr));gap:14px}
#sheets.one{display:block;max-width:640px}
#sheets.one figure{display:none}
#sheets.one figure.shown{display:block}
#sheets.one img{width:100%}
#slider{display:flex;gap:12px;max-width:640px;margin:0 0 10px}
#slider[hidden]{display:none}
#slider input{flex:1;accent-color:var(--a)}
#slider button{font:inherit;font-size:14px;min-width:72px;padding:4px 14px;border:1px solid var(--rule);
border-radius:6px;background:var(--card);color:var(--ink);cursor:pointer}
.wide{overflow-x:auto}
.grid+.wide{margin-top:16px}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 18px 5px 0;border-bottom:1px solid var(--rule);vertical-align:top}
thead th{color:var(--dim);font-weight:500}
tbody th{font-weight:400}
.numbers th,.numbers td{text-align:right;white-space:nowrap}
tbody th{white-space:nowrap}
.changed th{font-weight:600}
.changed td:nth-child(2){color:var(--b);font-weight:600}
td:nth-child(n+3){color:var(--dim)}
.numbers td:nth-child(n){color:inherit}
td{min-width:90px}
code{font-size:13px}
@media print{nav,#slider{display:none}}
"""

_SCRIPT = """
(()=>{const slider=document.getElementById("slider");if(!slider)return;
const range=slider.querySelector("input"),button=slider.querySelector("button"),box=document.getElementById("sheets");
const figures=[...box.children];let timer=0;
const show=()=>figures.forEach((figure,i)=>figure.classList.toggle("shown",i==range.value));
const stop=()=>{clearInterval(timer);timer=0;button.textContent="Play"};
figures.forEach(figure=>figure.querySelector("img").loading="eager");
range.addEventListener("input",()=>{stop();show()});
button.addEventListener("click",()=>{if(timer)return stop();
if(range.value==range.max)range.value=0;show();button.textContent="Pause";
timer=setInterval(()=>{range.value=+range.value+1;show();if(range.value==range.max)stop()},250)});
if(figures.length>1){box.classList.add("one");slider.hidden=false;show()}})();
"""
