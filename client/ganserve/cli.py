"""The `ganserve` program: images from a server, on the command line."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ganserve.client import Client
from ganserve.errors import GanserveError

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

Address = Annotated[
    str | None,
    typer.Option(help="HOST:PORT of the server.", envvar="GANSERVE_ADDRESS", show_default="127.0.0.1:50051"),
]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout", min=0.001, help="Seconds a call may take.", show_default="30, and 0.02 more an image"),
]


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="The model's name, as `ganserve models` lists it.")],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            help="The file to write: one picture of all images; or, with {index}, {seed}, {label}, {model} or "
            "{version} in it, one file an image. Its ending decides the format.",
            show_default="MODEL.png",
        ),
    ] = "",
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 16,
    seed: Annotated[int | None, typer.Option(help="Of the first image.", show_default="drawn by the server")] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Class of all images, by index or name.", show_default="the classes in turn"),
    ] = None,
    truncation: Annotated[float, typer.Option(help="0 to 2; below 1: more typical, less varied images.")] = 1.0,
    version: Annotated[int | None, typer.Option(min=1, help="Of the model.", show_default="the newest")] = None,
    columns: Annotated[int | None, typer.Option(min=1, help="Images a row.", show_default="nearly square")] = None,
    scale: Annotated[int, typer.Option(min=1, max=64, help="Enlarge the pixels of the one picture.")] = 2,
    address: Address = None,
    timeout_s: Timeout = None,
) -> None:
    """Make images and write them to a file, or to one file each."""
    out = out or f"{model}.png"
    with Client(address, timeout_s=timeout_s) as client:
        batch = client.generate(
            model,
            count=count,
            seed=seed,
            label=int(label) if label is not None and label.isdecimal() else label,
            truncation=truncation,
            version=version,
        )
    if "{" in out:
        paths = batch.save(out)
        written = str(paths[0]) if len(paths) == 1 else f"{paths[0]} to {paths[-1]}"
    else:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        batch.sheet(columns, scale=scale).save(out)
        written = out
    seeds = f"seed {batch.seeds[0]}" if batch.seeds else ""
    more = f" to {batch.seeds[-1]}" if batch.seeds and len(batch) > 1 else ""
    print(f"{written}: {len(batch)} images of {batch.model} version {batch.version}, {seeds}{more}")


@app.command()
def models(address: Address = None, timeout_s: Timeout = None) -> None:
    """List the server's models."""
    with Client(address, timeout_s=timeout_s) as client:
        described = client.models()
    table = Table()
    for column in ("model", "version", "images", "data set", "classes", "accuracy"):
        table.add_column(column, no_wrap=True)
    for model in described:
        accuracy = next((f"{m.value:.4f}" for m in model.metrics if m.name == "label_accuracy"), "")
        size = f"{model.height}x{model.width}x{model.channels}"
        classes = str(len(model.class_names) or "")
        # Names come from model files: brackets in them are no markup.
        table.add_row(model.name, str(model.version), size, escape(model.dataset), classes, accuracy)
    console = Console()
    console.print(table)
    for model in described:
        if model.conditional:
            console.print(escape(f"{model.name}: {', '.join(model.class_names)}"), highlight=False, soft_wrap=True)


def main() -> None:
    """Run the program; an error is one line, exit status 1, or 2 if the command line was wrong."""
    try:
        app()
    except (GanserveError, ValueError) as error:
        print(f"ganserve: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"ganserve: {error}", file=sys.stderr)
        sys.exit(1)
