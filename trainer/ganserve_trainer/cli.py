"""The `ganserve-trainer` program: train, evaluate, export."""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.settings import PRESETS

if TYPE_CHECKING:
    from ganserve_trainer.training import Report

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


class Preset(StrEnum):
    """The presets of settings.PRESETS."""

    MLP = "mlp"
    DCGAN = "dcgan"
    CDCGAN = "cdcgan"


class DatasetName(StrEnum):
    """The data sets that the trainer knows."""

    MNIST = "mnist"
    FASHION_MNIST = "fashion-mnist"


class PrecisionName(StrEnum):
    """How the networks compute; auto is bf16 autocast where the device has it in hardware, else fp32."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


DataRoot = Annotated[Path, typer.Option(help="Folder with the data set, as torchvision lays it out.")]


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for the run: checkpoint.pt, samples/, losses.png, settings.json.")],
    preset: Annotated[Preset, typer.Option(help="The networks; cdcgan is conditional on the label.")],
    dataset: Annotated[DatasetName, typer.Option(help="What to learn from.")] = DatasetName.MNIST,
    data_root: DataRoot = Path("data"),
    images: Annotated[
        int | None, typer.Option(min=1, help="Train until this many images are seen", show_default="1200000")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Real images a step", show_default="64")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="Adam's", show_default="0.0002")] = None,
    width: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Channels of dcgan's and cdcgan's last hidden layer", show_default="64"),
    ] = None,
    precision: Annotated[PrecisionName | None, typer.Option(show_default="auto")] = None,
    sample_every_images: Annotated[
        int | None, typer.Option(min=1, help="Write contact sheet and checkpoint this often", show_default="60000")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Decides weights, order and latents.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, if there is one.")] = False,
) -> None:
    """Train a generator on a data set; on the GPU if there is one."""
    from ganserve_trainer import training
    from ganserve_trainer.datasets import load_dataset

    given: dict[str, Any] = {
        "images": images,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "width": width,
        "precision": str(precision) if precision else None,
        "sample_every_images": sample_every_images,
    }
    settings = dataclasses.replace(
        PRESETS[preset],
        dataset=str(dataset),
        seed=seed,
        **{name: value for name, value in given.items() if value is not None},
    )
    data = load_dataset(settings.dataset, data_root, train=True)
    with _progress(settings.images) as report:
        complete = training.train(settings, data, out, resume=resume, report=report)
    if not complete:
        print("stopped; the same command with --resume goes on", file=sys.stderr)
        raise typer.Exit(130)
    if settings.conditional:
        print(f"next: ganserve-trainer evaluate {out} --data-root {data_root}")
    print(f"next: ganserve-trainer export {out} --repository DIR --name NAME")


@contextmanager
def _progress(total: int) -> Iterator["Report"]:
    """Show a progress bar, or without a terminal a line every few thousand images."""
    text = "{task.completed:,.0f} of {task.total:,.0f} images  D {task.fields[d]:.3f}  G {task.fields[g]:.3f}"
    columns = (BarColumn(), TextColumn(text), TextColumn("{task.fields[rate]:,.0f} images/s"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, d=float("nan"), g=float("nan"), rate=0.0)
        last_line = 0

        def report(images_seen: int, d_loss: float, g_loss: float, images_per_s: float) -> None:
            nonlocal last_line
            progress.update(task, completed=images_seen, d=d_loss, g=g_loss, rate=images_per_s)
            if not console.is_terminal and (images_seen - last_line >= total / 100 or images_seen >= total):
                last_line = images_seen
                print(
                    f"{images_seen} of {total} images  D {d_loss:.3f}  G {g_loss:.3f}  {images_per_s:.0f} images/s",
                    file=sys.stderr,
                    flush=True,
                )

        yield report


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A run's folder, a checkpoint, or a model.onnx.")],
    data_root: DataRoot = Path("data"),
    dataset: Annotated[
        DatasetName | None, typer.Option(help="What it was trained on", show_default="as it says")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="How many images to generate.")] = 10_000,
) -> None:
    """Measure a conditional generator's label accuracy, by a classifier trained on the real training images.

    A run's evaluation is kept beside its checkpoint, and its export writes it into the model card.
    """
    from ganserve_trainer import evaluation

    for metric in evaluation.evaluate(model, str(dataset) if dataset else None, data_root, images):
        print(f"{metric['name']} {metric['value']:.4f}  ({metric['method']})")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint.")],
    repository: Annotated[Path, typer.Option(help="Model repository: REPOSITORY/NAME/VERSION/model.onnx.")],
    name: Annotated[str, typer.Option(help="The model's name: lower-case letters, digits, '-', '_' and '.'.")],
) -> None:
    """Publish the averaged generator as the model's next version, after comparing it with PyTorch."""
    from ganserve_trainer import exporting

    print(exporting.export(checkpoint, repository, name))
    print(f"next: ganserve-server --models {repository}", file=sys.stderr)


def main() -> None:
    """Run the program; what the user can put right ends it with one message and exit status 2."""
    try:
        app()
    except TrainerError as error:
        print(f"ganserve-trainer: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"ganserve-trainer: {place}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        # torch's own errors, OutOfMemoryError on a GPU and a plain RuntimeError on the CPU, are RuntimeErrors.
        kinds = ("MemoryError", "OutOfMemoryError")
        if type(error).__name__ not in kinds and "allocate memory" not in str(error):
            raise
        print("ganserve-trainer: out of memory; try a smaller --batch-size or --width", file=sys.stderr)
        sys.exit(2)
