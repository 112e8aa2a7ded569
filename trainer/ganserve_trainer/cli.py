"""The `ganserve-trainer` program: train, evaluate, export, import, sweep, presets."""

import dataclasses
import functools
import importlib.metadata
import inspect
import os
import re
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.settings import (
    FREE_ON_RESUME,
    PRESETS,
    ExportPrecision,
    Settings,
    choices_of,
    from_preset,
    read_config,
    unused_settings,
)

if TYPE_CHECKING:
    from ganserve_trainer.evaluation.progress import Report as EvaluationReport
    from ganserve_trainer.importing.source import Layout
    from ganserve_trainer.report.history import Point
    from ganserve_trainer.train.loop import Report
    from ganserve_trainer.wrap import ValueRange

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"ganserve-trainer {importlib.metadata.version('ganserve')}")
        raise typer.Exit


@app.callback(help=__doc__)
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the program's version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None: ...


def _check_is_path(path: Path | None) -> Path | None:
    """Refuse a URL, which would become a folder called "s3:"."""
    if url := re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", str(path)):
        raise typer.BadParameter(f"it must be a path on this machine, not a {url[1]}:// URL: copy the files")
    return path


DataRoot = Annotated[
    Path, typer.Option(callback=_check_is_path, help="Folder with the data sets, in torchvision's layout.")
]
_PRESET = typer.Option(
    "--preset",
    help=f"Settings to start from: {', '.join(PRESETS)}; see `presets`. Required, except to resume or with a "
    "--config that has a preset.",
)


class _Checkpoint(StrEnum):
    BEST = "best"
    LAST = "last"


_CHECKPOINT = typer.Option(
    "--checkpoint",
    help="Checkpoint of a run's folder: the best one, which is the last one if the run was not measured, or the last.",
)


class _ValueRange(StrEnum):
    TANH = "tanh"
    SIGMOID = "sigmoid"
    BYTE = "byte"


class _Layout(StrEnum):
    NCHW = "NCHW"
    NHWC = "NHWC"


class _Search(StrEnum):
    GRID = "grid"
    TPE = "tpe"


class _Pruner(StrEnum):
    MEDIAN = "median"
    HYPERBAND = "hyperband"
    NONE = "none"


_CONFIG = typer.Option(help="TOML file of settings, such as a run's run.toml; flags take precedence over it.")


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's `**` parameter with one option for every setting."""
    signature = inspect.signature(command)
    parameters = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    for field in dataclasses.fields(Settings):
        if field.name == "preset":
            continue
        shown = "none" if field.default in (None, "") else str(field.default)
        option = typer.Option(
            help=field.metadata["help"],
            rich_help_panel=field.metadata["panel"],
            show_default=shown,
        )
        annotation: Any = Annotated[_option_type(field), option]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def _option_type(field: "dataclasses.Field[Any]") -> Any:
    kind: Any = field.type
    if isinstance(kind, types.UnionType):
        kind = next(each for each in typing.get_args(kind) if each is not types.NoneType)
    if choices := choices_of(field):
        # mypy knows enumerations only as literals.
        make: Any = StrEnum
        kind = make(field.name, {value: value for value in choices})
    return kind | None


def _settings(preset: str | None, config: Path | None, given: dict[str, Any], resumed: Settings | None) -> Settings:
    """Combine the settings. Precedence: flags, configuration file, the resumed run or the preset."""
    changes = {name: str(value) if isinstance(value, StrEnum) else value for name, value in given.items()}
    changes = {name: value for name, value in changes.items() if value is not None}
    if config is not None:
        changes = read_config(config) | changes
    named = changes.pop("preset", None)
    preset = preset or named
    if preset is None and resumed is not None:
        return dataclasses.replace(resumed, **changes)
    if preset is None:
        raise TrainerError(
            f"no preset is given; add --preset {'|'.join(PRESETS)}, or --config FILE with a preset in the file"
        )
    if not isinstance(preset, str):
        raise TrainerError(f"preset is {preset!r}; it must be one of {', '.join(PRESETS)}")
    settings = from_preset(preset, changes)
    if resumed is not None:
        # Settings that may change on resuming keep the run's values, unless they are given.
        kept = {name: getattr(resumed, name) for name in FREE_ON_RESUME if name not in changes}
        settings = dataclasses.replace(settings, **kept)
    return settings


@app.command()
@_with_settings
def train(
    out: Annotated[
        Path,
        typer.Option(
            callback=_check_is_path, help="Folder for the run: run.toml, checkpoints/, samples/, report.html, …"
        ),
    ],
    preset: Annotated[str | None, _PRESET] = None,
    config: Annotated[Path | None, _CONFIG] = None,
    data_root: DataRoot = Path("data"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in --out, if there is one, with its settings.")
    ] = False,
    **given: Any,
) -> None:
    """Train a generator on a data set, on the GPU if there is one.

    The defaults below are those without a preset; `presets` lists what each preset changes.

    For several GPUs or machines: torchrun --nproc-per-node 2 -m ganserve_trainer train …; each process has its own
    batch.
    """
    if not resume:
        _settings(preset, config, given, None)  # before torch is imported, so that errors are found at once

    from ganserve_trainer.data.datasets import load_dataset
    from ganserve_trainer.evaluation.evaluate import quick_measure
    from ganserve_trainer.report.page import FILE_NAME
    from ganserve_trainer.train import loop, processes
    from ganserve_trainer.train.checkpoints import checkpoint_files, load_checkpoint
    from ganserve_trainer.train.stopping import outlive_terminal

    outlive_terminal()
    processes.start()
    with processes.failing_together():
        begun = resume and bool(checkpoint_files(out))
        if resume and not begun and preset is None and config is None:
            raise TrainerError(f"there is no run in {out} to resume; to start one there, add --preset or --config")
        resumed = load_checkpoint(out) if begun else None
        settings = _settings(preset, config, given, resumed.settings if resumed else None)
        for unused in unused_settings(settings):
            print(f"warning: {unused}", file=sys.stderr)
        if resumed and settings.are_fulfilled(resumed.images_seen, resumed.elapsed_s):
            print(
                f"the run is complete, with {resumed.images_seen:,} images; to continue it, increase --images",
                file=sys.stderr,
            )
        data = load_dataset(
            settings.dataset, data_root, train=True, image_size=settings.image_size, reading=settings.reading()
        )
        measure = quick_measure(settings, data, data_root, report=_say) if settings.evaluate_every_images else None
    with _progress(settings) as report:
        try:
            complete = loop.train(settings, data, out, resume=resume, report=report, measure=measure)
        except OSError:
            if kept := checkpoint_files(out):
                print(f"the last complete checkpoint is {kept[0]}; --resume continues from it", file=sys.stderr)
            raise
    if not complete:
        print(
            f"stopped; to resume: ganserve-trainer train --resume --out {out} --data-root {data_root}", file=sys.stderr
        )
        raise typer.Exit(130)
    if os.environ.get("RANK", "0") == "0":
        print(f"the run's report: {out / FILE_NAME}")
        print(f"next: ganserve-trainer evaluate {out} --data-root {data_root}")
        print(f"next: ganserve-trainer export {out} --repository DIR --name NAME")


def _say(stage: str, done: float = 0.0) -> None:
    if not done:
        print(f"{stage} …", file=sys.stderr, flush=True)


@contextmanager
def _stages() -> Iterator["EvaluationReport"]:
    """Show a bar for each stage, with its remaining time, or a line at its start and every ten seconds."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task, current, started, shown, first = None, "", 0.0, 0.0, 0.0

        def report(stage: str, done: float = 0.0) -> None:
            nonlocal task, current, started, shown, first
            now = time.monotonic()
            if stage != current:
                if task is not None:
                    progress.update(task, completed=1.0)
                current, started, shown, first = stage, now, now, done
                task = progress.add_task(escape(stage), total=1.0)
                if not console.is_terminal:
                    _say(stage)
            if task is not None:
                progress.update(task, completed=done)
            if not console.is_terminal and done > first and now - shown >= 10:
                shown = now
                left = (now - started) * (1 - done) / (done - first)
                print(f"{stage}: {done:.0%}, about {left:.0f} s left", file=sys.stderr, flush=True)

        yield report


@contextmanager
def _progress(settings: Settings) -> Iterator["Report"]:
    """Show a progress bar or, without a terminal, a line for every hundredth of the run; D and G are the networks."""
    text = "{task.fields[seen]:,.0f} images{task.fields[losses]}"
    columns = (BarColumn(), TextColumn(text), TextColumn("{task.fields[rate]:,.0f} images/s"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=1.0, seen=0, losses="", rate=0.0)
        last_share = 0.0

        def report(point: "Point", images_per_s: float) -> None:
            nonlocal last_share
            share = point.images_seen / settings.images
            if settings.minutes:
                share = max(share, point.elapsed_s / (60 * settings.minutes))
            losses = f"  losses D {point.discriminator_loss:.3f} G {point.generator_loss:.3f}"
            progress.update(task, completed=share, seen=point.images_seen, rate=images_per_s, losses=losses)
            if not console.is_terminal and (share - last_share >= 0.01 or share >= 1):
                last_share = share
                print(
                    f"{point.images_seen} images ({min(share, 1):.0%}){losses}  {images_per_s:.0f} images/s",
                    file=sys.stderr,
                    flush=True,
                )

        yield report


@app.command()
def presets() -> None:
    """List the presets and what each of them sets."""
    console = Console()
    table = Table("preset", "what it is", "its settings", show_lines=True)
    for name, preset in PRESETS.items():
        changed = [
            f"{field.name} {getattr(preset.settings, field.name)}"
            for field in dataclasses.fields(Settings)
            if field.name != "preset"
            # The learning rate is what people look for first, so it is shown for each preset.
            and (field.name == "learning_rate" or getattr(preset.settings, field.name) != field.default)
        ]
        table.add_row(name, preset.summary, "\n".join(changed))
    console.print(table)
    console.print("All other settings have the defaults that `ganserve-trainer train --help` shows.")


@app.command()
@_with_settings
def sweep(
    out: Annotated[
        Path, typer.Option(callback=_check_is_path, help="Folder for the runs, results.md and results.json.")
    ],
    vary: Annotated[
        list[str],
        typer.Option(
            help="Setting and its values, such as loss=hinge,minimax or, with --search tpe, learning_rate=1e-4..1e-2; "
            "repeat --vary for more settings."
        ),
    ],
    preset: Annotated[str | None, _PRESET] = None,
    config: Annotated[Path | None, _CONFIG] = None,
    data_root: DataRoot = Path("data"),
    measured_images: Annotated[int, typer.Option(min=10, help="Number of images to measure each run on.")] = 10_000,
    search: Annotated[
        _Search, typer.Option(help="grid: all combinations; tpe: Optuna's search for the lowest FID.")
    ] = _Search.GRID,
    trials: Annotated[int, typer.Option(min=1, help="tpe: number of trials, of all processes together.")] = 20,
    pruner: Annotated[
        _Pruner, typer.Option(help="tpe: which trials to end early, by their FID every --evaluate-every-images.")
    ] = _Pruner.MEDIAN,
    storage: Annotated[
        str | None,
        typer.Option(help="tpe: database URL of the study, such as postgresql://…", show_default="a file in --out"),
    ] = None,
    **given: Any,
) -> None:
    """Train all combinations of some values of some settings, or search for good ones; compare the runs in a table.

    A stopped sweep resumes where it was, and keeps its complete runs. With --search tpe, the same command on another
    machine that shares --out takes part in the same search.
    """
    from ganserve_trainer.data.datasets import load_dataset
    from ganserve_trainer.evaluation import judge
    from ganserve_trainer.evaluation.evaluate import quick_measure
    from ganserve_trainer.train import loop
    from ganserve_trainer.train.checkpoints import load_checkpoint
    from ganserve_trainer.train.stopping import outlive_terminal
    from ganserve_trainer.train.sweep import Runner, Watch, parse_axis
    from ganserve_trainer.train.sweep import sweep as run_sweep

    outlive_terminal()
    load = functools.lru_cache(maxsize=1)(load_dataset)

    @functools.lru_cache(maxsize=1)
    def digest(dataset: str, image_size: int | None) -> str:
        return load(dataset, data_root, train=True, image_size=image_size).digest()

    def settings_of(values: dict[str, Any]) -> Settings:
        values = dict(values)
        named = values.pop("preset", preset)
        return _settings(named, config, given | values, None)

    def train_one(settings: Settings, folder: Path, watch: Watch) -> None:
        data = load(settings.dataset, data_root, train=True, image_size=settings.image_size, reading=settings.reading())
        measure, seen = None, 0
        if settings.evaluate_every_images:
            quick = quick_measure(settings, data, data_root, report=_say)

            def measure(generator: Any) -> dict[str, float]:
                metrics = quick(generator)
                watch(seen, metrics)
                return metrics

        with _progress(settings) as show:

            def report(point: "Point", images_per_s: float) -> None:
                nonlocal seen
                seen = point.images_seen
                show(point, images_per_s)

            if not loop.train(settings, data, folder, resume=True, report=report, measure=measure):
                print("stopped; the same command resumes", file=sys.stderr)
                raise typer.Exit(130)

    def measure_one(folder: Path) -> dict[str, float]:
        checkpoint = load_checkpoint(folder)
        settings = checkpoint.settings
        data = load(settings.dataset, data_root, train=True, image_size=settings.image_size, reading=settings.reading())
        measure = quick_measure(settings, data, data_root, images=measured_images, report=_say)
        return measure(checkpoint.ema_generator())

    runner = Runner(
        out,
        lambda settings: digest(settings.dataset, settings.image_size),
        train_one,
        measure_one,
        (measured_images, judge._RECIPE),
    )
    if search is _Search.GRID:
        values = [parse_axis(axis) for axis in vary]
        print(run_sweep(runner, cast("list[tuple[str, list[Any]]]", values), settings_of), end="")
        return
    try:
        from ganserve_trainer.train.search import search as run_search
    except ModuleNotFoundError as error:
        raise TrainerError(f"--search tpe needs {error.name}: install 'ganserve[search]'") from error
    axes = [parse_axis(axis, ranges=True) for axis in vary]
    print(run_search(runner, axes, settings_of, trials=trials, pruner=pruner.value, storage=storage), end="")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A run's folder, a checkpoint, or a model.onnx.")],
    data_root: DataRoot = Path("data"),
    dataset: Annotated[
        str | None, typer.Option(help="Data set that the model was trained on.", show_default="as the model says")
    ] = None,
    images: Annotated[int, typer.Option(min=2, help="Number of images to generate.")] = 10_000,
    out: Annotated[
        Path | None,
        typer.Option(
            callback=_check_is_path,
            help="Folder for evaluation.json and neighbours.png.",
            show_default="the run's folder; none for a file",
        ),
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(
            metavar="judge|inception=FILE|clip=FILE|FILE",
            help="Networks to compare images with, besides the judge; repeat --features for more. inception and clip "
            "take the file of their weights. FILE alone is a network (TorchScript, .pt2, .onnx) that maps uint8 "
            "[n, channels, height, width] to features [n, d].",
            show_default="judge",
        ),
    ] = None,
    which: Annotated[_Checkpoint, _CHECKPOINT] = _Checkpoint.BEST,
) -> None:
    """Measure a generator: FID, KID, precision, recall and more, with a network trained on the real training images.

    A run's evaluation is stored next to its checkpoint, and `export` writes it into the model card. Each figure has its
    standard error. A figure that would say nothing is withheld, and the reason is printed. A killed evaluation resumes
    with the same command.
    """
    from ganserve_trainer.evaluation.evaluate import evaluate as evaluate_model
    from ganserve_trainer.evaluation.measure import FEATURES, JUDGE
    from ganserve_trainer.train.best import Choice

    with _stages() as report:
        found = evaluate_model(
            model,
            str(dataset) if dataset else None,
            data_root,
            images,
            out,
            report,
            features or ["judge"],
            Choice(which),
        )
    networks: dict[str, None] = {}  # in order, without repetitions
    for metric in found.metrics:
        how, _, network = metric["method"].replace(FEATURES, JUDGE).partition(JUDGE)
        print(f"{metric['name']} {metric['value']:.4f} ± {metric['standard_error']:.2g}  ({how})")
        networks[network] = None
    for withheld in found.withheld:
        print(f"{withheld['name']} is withheld: {withheld['reason']}")
    for network in networks:
        print(network)
    if model.suffix != ".onnx":
        print(f"next: ganserve-trainer export {model} --repository DIR --name NAME")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint.")],
    repository: Annotated[
        Path, typer.Option(callback=_check_is_path, help="Model repository: REPOSITORY/NAME/VERSION/model.onnx.")
    ],
    name: Annotated[str, typer.Option(help="The model's name: lower-case letters, digits, '-', '_' and '.'.")],
    precision: Annotated[ExportPrecision, typer.Option(help="Precision: fp32, int8 (for CPUs) or fp16 (for GPUs).")] = (
        ExportPrecision.FP32
    ),
    data_root: DataRoot = Path("data"),
    gate_images: Annotated[
        int, typer.Option(min=1000, help="Number of images to compare with those in fp32.")
    ] = 10_000,
    which: Annotated[_Checkpoint, _CHECKPOINT] = _Checkpoint.BEST,
) -> None:
    """Publish the averaged generator as the model's next version, after comparing it with PyTorch.

    In fp16 and int8, only if its images are as good as in fp32, measured as `evaluate` does; this needs the data set.
    """
    from ganserve_trainer.export import publish, variants
    from ganserve_trainer.train.best import Choice

    if precision is ExportPrecision.FP32:
        file = publish.export(checkpoint, repository, name, Choice(which))
    else:
        file = variants.export(checkpoint, repository, name, precision, data_root, gate_images, _say, Choice(which))
    print(file)
    print(f"next: ganserve-server --models {repository}", file=sys.stderr)


@app.command("import")
def import_file(
    file: Annotated[
        Path,
        typer.Argument(
            help="An ONNX file; of torch: a checkpoint, a TorchScript module or a .pt2 file; a .safetensors file."
        ),
    ],
    models: Annotated[
        Path,
        typer.Option(
            "--models",
            "--repository",
            callback=_check_is_path,
            help="Model repository: REPOSITORY/NAME/VERSION/model.onnx.",
        ),
    ],
    name: Annotated[str, typer.Option(help="The model's name: lower-case letters, digits, '-', '_' and '.'.")],
    yes: Annotated[bool, typer.Option("--yes", help="Publish without asking.")] = False,
    sheet: Annotated[
        Path | None,
        typer.Option(callback=_check_is_path, help="PNG to show images in.", show_default="NAME-import.png"),
    ] = None,
    latent_dim: Annotated[int | None, typer.Option(min=1, help="Number of values in a latent.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Names of the classes, such as cat,dog, or their number, in a generator's order.")
    ] = None,
    class_names: Annotated[
        Path | None, typer.Option(callback=_check_is_path, help="File with the name of a class on each line.")
    ] = None,
    value_range: Annotated[
        _ValueRange | None,
        typer.Option("--range", help="What the images' values mean: tanh is -1 to 1, sigmoid 0 to 1, byte 0 to 255."),
    ] = None,
    layout: Annotated[_Layout | None, typer.Option(help="Order of the images' axes.")] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="NAME=ROLE",
            help="What an input of an ONNX file is: latent, label, truncation, noise, attributes[:NAME,NAME], "
            "latent:DISTRIBUTION or constant:VALUE. Once for each input.",
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Name of the images' output in the file, or its key in what a module returns.")
    ] = None,
    module: Annotated[
        str | None,
        typer.Option(help="Class of a checkpoint's network: package.module:Class, or path/to/file.py:Class."),
    ] = None,
    call: Annotated[
        str | None,
        typer.Option(
            help="How to call a module, in Python: g is the network, z its latents, y the labels, psi the truncation, "
            "with the functions of ganserve_trainer.wrap. Example: 'g(z, one_hot(y, 10))'."
        ),
    ] = None,
    script_arguments: Annotated[
        str, typer.Option(help="Command line of a training script that has the class: '--img_size 64'.")
    ] = "",
    arguments: Annotated[str, typer.Option(help="""JSON of the class's arguments, such as '{"nz": 100}'.""")] = "{}",
    trust: Annotated[
        bool, typer.Option("--trust", help="Run code in FILE: needed for a pickled network; only if you trust it.")
    ] = False,
) -> None:
    """Publish a generator that was trained elsewhere as the model's next version.

    The command reports what it understood, writes a picture with some images, and asks. What it cannot guess, or
    guesses wrongly, is set by an option.
    """
    from ganserve_trainer.export.publish import check_name
    from ganserve_trainer.importing.command import prepare
    from ganserve_trainer.importing.reading import read
    from ganserve_trainer.importing.source import Wishes, parse_arguments, parse_classes, parse_roles

    check_name(name)
    wishes = Wishes(
        latent_dim=latent_dim,
        roles=parse_roles(inputs or []),
        call=call,
        output=output,
        values=cast("ValueRange | None", value_range),
        layout=cast("Layout | None", layout),
        class_names=parse_classes(classes, class_names),
    )
    source = read(
        file,
        wishes,
        module=module,
        arguments=parse_arguments(arguments),
        trusted=trust,
        script_arguments=script_arguments,
    )
    found = prepare(source)
    for line in found.lines():
        print(line, file=sys.stderr)
    sheet = sheet or Path(f"{name}-import.png")
    found.save_sheet(sheet)
    print(f"images of seeds 0 to {len(found.pixels) - 1}: {sheet}", file=sys.stderr)
    if not yes and not typer.confirm("publish?", err=True):
        print("nothing is published", file=sys.stderr)
        raise typer.Exit(1)
    print(found.publish(models, name))
    print(f"next: ganserve-server --models {models}", file=sys.stderr)


# Names of settings in other programs, with the equivalent here.
OTHER_NAMES = {
    "--epochs": "--images, the total number seen: an epoch of MNIST is 60000 images",
    "--steps": "--images, the total number seen: a step is --batch-size images",
    "--iterations": "--images, the total number seen: a step is --batch-size images",
    "--lr": "--learning-rate, and --discriminator-learning-rate if it differs",
    "--batch": "--batch-size",
    "--bs": "--batch-size",
    "--nz": "--latent-dim",
    "--ngf": "--width",
    "--ndf": "--discriminator-width",
    "--device": "no flag: the trainer uses a GPU if there is one; CUDA_VISIBLE_DEVICES= hides it",
    "--gpu": "no flag: the trainer uses a GPU if there is one; CUDA_VISIBLE_DEVICES= hides it",
    "--model": "--preset",
    "--output": "--out",
    "--outdir": "--out",
    "--data": "--dataset, and --data-root for the folder that contains it",
}


def main() -> None:
    """Run the program; errors that the user can fix end it with one message and exit status 2."""
    try:
        for word in sys.argv[2:]:
            if (name := word.partition("=")[0]) in OTHER_NAMES and sys.argv[1:2] != ["import"]:
                raise TrainerError(f"there is no {name}; use {OTHER_NAMES[name]}")
        app()
    except TrainerError as error:
        print(f"ganserve-trainer: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"ganserve-trainer: {place}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        # torch raises RuntimeErrors when memory runs out: OutOfMemoryError on a GPU, a plain RuntimeError on the CPU.
        kinds = ("MemoryError", "OutOfMemoryError")
        if type(error).__name__ not in kinds and "allocate memory" not in str(error):
            raise
        print("ganserve-trainer: out of memory; try a smaller --batch-size or --width", file=sys.stderr)
        sys.exit(2)
