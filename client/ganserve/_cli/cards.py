"""`ganserve models`: describes the server's models in a table, one model's card, JSON, or an HTML page."""

import base64
import html
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.columns import Columns
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ganserve._cli.connection import Connection, with_connection
from ganserve._cli.output import console_on_stdout, print_json, show, write_file
from ganserve._cli.terminal_pictures import TerminalPicture
from ganserve.models import Attribute, Model

_TRUNCATIONS = {"latent": "scales the latent", "input": "is an input of the model", "none": "has no effect"}
# The metrics that have a column in the table.
_TABLE_METRICS = {"label_accuracy": "accuracy", "fid": "FID", "precision": "precision", "recall": "recall"}
# The order in which columns are left out if the terminal is too narrow: truncated figures would be wrong.
_LEFT_OUT_FIRST = ("classes", "data set", "images", "recall", "precision")
_NARROWEST_CLASSES = 24  # characters; the column of classes wraps
_GAP = 2
_WIDEST_PICTURE = 32  # characters: three pictures fit side by side in most terminals


@with_connection
def models(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Model to show, with its card and its golden images.",
            show_default="all models, one line each",
        ),
    ] = None,
    version: Annotated[int | None, typer.Option(min=1, help="Version of the model.", show_default="the newest")] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write the card to this file, as a self-contained HTML page.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    *,
    connection: Connection,
) -> None:
    """List the server's models with their measured quality, or show one's card.

    Example: ganserve models cdcgan-mnist --html card.html
    """
    if name is None:
        if version is not None or html_file is not None:
            raise typer.BadParameter("--version and --html need a MODEL")
        with connection.client() as client:
            listed = client.models()
        if as_json:
            print_json([_described(model) for model in listed])
        else:
            show(_table(listed, console_on_stdout().width))
        return
    with connection.client() as client:
        model = client.model(name, version)
    if html_file is not None:
        write_file(html_file, card_page(model).encode())
    if as_json:
        print_json({**_described(model), "card": model.card})
    elif html_file is not None:
        print(f"{html_file}: the card of {model.name} version {model.version}")
    else:
        show(_card(model), piped_width=120)


def _described(model: Model) -> dict[str, Any]:
    described = asdict(model)
    del described["card"]
    return described


def _table(listed: list[Model], width: int) -> Table:
    rows = []
    for model in listed:
        figures = {metric.name: f"{metric.value:.4g}" for metric in model.metrics}
        cells = {
            "model": model.name,
            "versions": ", ".join(map(str, model.versions)),
            "images": _size(model),
            "data set": model.dataset,
            **{title: figures.get(metric, "") for metric, title in _TABLE_METRICS.items()},
            "classes": ", ".join(model.class_names),
        }
        # Names come from model files. In a Text, rich does not interpret their brackets as markup.
        rows.append({title: _plain(text) for title, text in cells.items()})
    titles = ["model", "versions", "images", "data set", *_TABLE_METRICS.values(), "classes"]
    widths = {title: max(len(title), *(row[title].cell_len for row in rows), 0) + _GAP for title in titles}
    widths["classes"] = min(widths["classes"], _NARROWEST_CLASSES)
    for title in _LEFT_OUT_FIRST:
        if sum(widths.values()) - _GAP > width:
            del widths[title]
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for title in widths:
        table.add_column(title, no_wrap=title != "classes", overflow="fold")
    for row in rows:
        table.add_row(*(row[title] for title in widths))
    return table


def _plain(text: str) -> Text:
    """Return text from a model file without control characters, so that a card cannot control the terminal."""
    return Text("".join(character if character.isprintable() else "�" for character in text))


def _size(model: Model) -> str:
    return f"{model.width}x{model.height} { {1: 'grey', 4: 'colour and alpha'}.get(model.channels, 'colour') }"


@dataclass(frozen=True, slots=True)
class _GoldenImage:
    caption: str
    png: bytes


def _golden_images(model: Model) -> list[_GoldenImage]:
    golden = []
    for image in model.card.get("goldenImages", []):
        caption = f"seed {image.get('seed', 0)}"
        if "label" in image and image["label"] < len(model.class_names):
            caption += f", {model.class_names[image['label']]}"
        golden.append(_GoldenImage(caption, base64.b64decode(image.get("png", ""))))
    return golden


def _facts(model: Model) -> dict[str, str]:
    card, training = model.card, model.card.get("training", {})
    facts = {
        "version": f"{model.version} (served: {', '.join(map(str, model.versions))})",
        "images": _size(model),
        "data set": model.dataset,
        "classes": ", ".join(model.class_names),
        "architecture": model.architecture,
        "latents": f"{model.latent_dim} numbers, {model.distribution.replace('_', ' ')}",
        "input seeds": ", ".join(model.further_latents),
        "attributes": ", ".join(map(_attribute, model.attributes)),
        "truncation": _TRUNCATIONS[model.truncation],
        "parameters": f"{int(card.get('generatorParameters', 0)):,}",
        "precision": card.get("precision") or "fp32",
        "trained on": f"{int(training.get('imagesSeen', 0)):,} images, {_duration(training)} on "
        f"{training.get('device', 'an unknown device')}",
        "exported": f"{card.get('createdAt', '?')}, by version {card.get('trainerVersion', '?')} of the trainer",
        "digest": model.digest,
        "runs on": model.provider,
    }
    return {name: value for name, value in facts.items() if value}


def _attribute(attribute: Attribute) -> str:
    values = f"{attribute.minimum:g} {'or' if attribute.binary else 'to'} {attribute.maximum:g}"
    return f"{attribute.name} ({values}, default {attribute.default:g})"


def _methods(model: Model) -> tuple[list[str], str]:
    """Return how each metric was measured, without the common suffix of all methods, and that suffix."""
    parts = [metric.method.split("; ") for metric in model.metrics]
    shared: list[str] = []
    while len(parts) > 1 and all(len(each) > 1 and each[-1] == parts[0][-1] for each in parts):
        shared.insert(0, parts[0][-1])
        parts = [each[:-1] for each in parts]
    return ["; ".join(each) for each in parts], "; ".join(shared)


def _duration(training: dict[str, Any]) -> str:
    minutes = float(str(training.get("duration", "0s")).rstrip("s")) / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _card(model: Model) -> Group:
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for fact, value in _facts(model).items():
        facts.add_row(fact, _plain(value))
    metrics = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    metrics.add_column(no_wrap=True)
    metrics.add_column(justify="right")
    metrics.add_column(style="dim", overflow="fold")
    methods, shared = _methods(model)
    for metric, method in zip(model.metrics, methods, strict=True):
        metrics.add_row(_plain(metric.name), metric.text(6), _plain(method))
    pictures = [Group(_drawn(image.png), _plain(image.caption)) for image in _golden_images(model)]
    title = Text(model.name, style="bold")
    end = _plain(f"all with this {shared}" if shared else "")
    end.stylize("dim")
    return Group(title, "", facts, "", metrics, end, "", Columns(pictures, padding=(1, 2)))


def _drawn(png: bytes) -> TerminalPicture | Text:
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            picture = image.convert("L" if image.mode == "L" else "RGBA")
    except (OSError, ValueError, Image.DecompressionBombError):
        return Text("(not readable)")
    if picture.width > _WIDEST_PICTURE:
        height = max(1, round(picture.height * _WIDEST_PICTURE / picture.width))
        picture = picture.resize((_WIDEST_PICTURE, height), Image.Resampling.BOX)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture).convert("RGB")
    return TerminalPicture(np.asarray(picture))


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{name}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse }}
td, th {{ padding: .2rem 1rem .2rem 0; vertical-align: top; text-align: left; overflow-wrap: anywhere }}
tr + tr {{ border-top: 1px solid #8884 }}
th {{ font-weight: normal; white-space: nowrap }}
.value {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }}
.method {{ font-size: .85em; opacity: .75 }}
.images {{ display: flex; flex-wrap: wrap; gap: 1rem }}
figure {{ margin: 0; text-align: center; font-size: .85em }}
img {{ width: 112px; image-rendering: pixelated; display: block; margin: auto }}
</style>
<h1>{name}</h1>
<table>{facts}</table>
<h2>Golden images</h2>
<p>A server must get these images from the model before it serves the model. Images of more than 64 pixels on a side are
shown as thumbnails.</p>
<div class="images">{images}</div>
<h2>Quality</h2>
<table>{metrics}</table>
<p class="method">{shared}</p>
<details><summary>Training configuration</summary><table>{configuration}</table></details>
</html>
"""


def card_page(model: Model) -> str:
    """Return a model's card as a self-contained HTML page. Text from the model file is escaped."""
    images = "".join(
        f'<figure><img alt="" src="data:image/png;base64,{base64.b64encode(image.png).decode()}">'
        f"<figcaption>{html.escape(image.caption)}</figcaption></figure>\n"
        for image in _golden_images(model)
    )
    methods, shared = _methods(model)
    metrics = "".join(
        f'<tr><th>{html.escape(metric.name)}<td class="value">{metric.text(6)}'
        f'<td class="method">{html.escape(method)}\n'
        for metric, method in zip(model.metrics, methods, strict=True)
    )
    configuration = model.card.get("training", {}).get("configuration", {})
    return _PAGE.format(
        name=html.escape(model.name),
        facts=_rows(_facts(model)),
        images=images,
        metrics=metrics,
        shared=html.escape(f"All with this {shared}." if shared else ""),
        configuration=_rows(dict(sorted(configuration.items()))),
    )


def _rows(facts: dict[str, str]) -> str:
    return "".join(f"<tr><th>{html.escape(name)}<td>{html.escape(value)}\n" for name, value in facts.items())
