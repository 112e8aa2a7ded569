"""The settings of a training run: their meanings, their allowed values, and the presets.

This table is the only source for the flags of `ganserve-trainer train`, for the keys of a `--config` file, and for the
configuration in checkpoints and model cards.
"""

import dataclasses
import difflib
import importlib.metadata
import math
import platform
import tomllib
import types
import typing
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from ganserve_trainer.data.reading import Reading
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.losses import LOSSES, AdversarialLoss

Architecture = Literal["mlp", "dcgan", "progressive"]
Conditioning = Literal["label-channels", "projection"]
InitialNetworks = Literal["generator", "both"]
MinibatchLayer = Literal["none", "stddev", "discrimination"]
Precision = Literal["auto", "fp32", "bf16"]
Schedule = Literal["auto", "constant", "linear", "cosine"]


class ExportPrecision(StrEnum):
    """The precision in which an exported model computes."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


_VERSIONS_OF = ("ganserve", "torch", "torchvision", "numpy")
SELECTABLE = ("fid", "fid_over_floor", "precision", "recall", "label_accuracy")
AUGMENTATIONS = ("color", "translation", "cutout")
TRACKERS = ("tensorboard", "wandb", "mlflow")


def _setting(
    default: Any,
    panel: str,
    text: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Collection[str] = (),
) -> Any:
    metadata = {"panel": panel, "help": text, "minimum": minimum, "maximum": maximum, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """Everything that determines the result of a run. Counts are in images shown to the discriminator.

    The defaults were chosen by measurement (docs/training.md): Adam without momentum (StyleGAN's betas, Karras et al.,
    2019), a light R1 penalty, and conditioning by projection.

    Raises:
        TrainerError: a value is out of its range, or two settings contradict each other.
    """

    preset: str

    dataset: str = _setting(
        "mnist", "Data", "Data set: mnist, fashion-mnist, cifar10, stacked-mnist, or files such as ./photos or ./a.zip."
    )
    train_folder: str = _setting("", "Data", "Folder of the training images, in the data set.")
    test_folder: str = _setting("", "Data", "Folder of the test images, in the data set or elsewhere.")
    split: float | None = _setting(
        None,
        "Data",
        "Share of all images to train on; the others are for testing. Without it, folders called train and test or "
        "val are the parts, or else 0.9 trains.",
        minimum=0.01,
        maximum=0.99,
    )
    train_on_all: bool = _setting(False, "Data", "Train on all images, and keep none for testing.")
    channels: int | None = _setting(
        None,
        "Data",
        "1 for grey, 3 for colour, 4 for colour and transparency; by itself 1 if all images are grey, else 3.",
        minimum=1,
        maximum=4,
    )
    background: str = _setting("white", "Data", "Colour behind transparent pixels, such as black or #a0c0ff.")
    image_size: int | None = _setting(
        None, "Data", "Resize and crop images to this many pixels on each side.", minimum=4, maximum=1024
    )
    augment: str = _setting(
        "", "Data", "Differentiable augmentation (DiffAugment): any of color, translation, cutout, joined by +."
    )

    architecture: Architecture = _setting("dcgan", "Networks", "Architecture of both networks.")
    conditional: bool = _setting(False, "Networks", "Make images of a requested class.")
    conditioning: Conditioning = _setting("projection", "Networks", "How a conditional discriminator sees the label.")
    clusters: int = _setting(
        0,
        "Networks",
        "Unconditional networks: number of k-means clusters to train on as if they were classes; 0 is none.",
        minimum=0,
    )
    latent_dim: int = _setting(64, "Networks", "Number of values in a latent.", minimum=1, maximum=4096)
    width: int = _setting(
        32,
        "Networks",
        "Channels of the generator's last hidden layer; for mlp, a quarter of the first hidden layer's width.",
        minimum=1,
        maximum=4096,
    )
    discriminator_width: int | None = _setting(
        None,
        "Networks",
        "Channels of the discriminator's first layer; the same as width if not given.",
        minimum=1,
        maximum=4096,
    )
    dense_width: int = _setting(
        256,
        "Networks",
        "dcgan: number of values in a hidden dense layer in both networks; 0 is no such layer.",
        minimum=0,
        maximum=65_536,
    )
    attention: bool = _setting(False, "Networks", "Self-attention in both convolutional networks (SAGAN).")
    spectral_norm: bool = _setting(False, "Networks", "Spectral normalisation of the discriminator.")
    minibatch: MinibatchLayer = _setting(
        "none", "Networks", "How the discriminator compares the images of its minibatch."
    )
    dropout: float = _setting(0.0, "Networks", "Dropout in the discriminator.", minimum=0, maximum=0.9)
    growth_images: int = _setting(
        60_000,
        "Networks",
        "progressive: number of images to fade in a resolution, and to train it before the next one.",
        minimum=1,
    )

    init_from: str = _setting(
        "",
        "Initial weights",
        "Run, checkpoint, or file of weights (.pt, .pth, .safetensors) whose weights the run starts from.",
    )
    init_networks: InitialNetworks = _setting(
        "both", "Initial weights", "Which networks start from init_from: the generator, or both."
    )
    init_digest: str = _setting(
        "", "Initial weights", "Digest of the weights of init_from; the run records it, and checks it if it is given."
    )
    freeze_discriminator: int = _setting(
        0,
        "Initial weights",
        "Number of the discriminator's lowest layers that keep their initial weights (FreezeD).",
        minimum=0,
    )

    loss: str = _setting("non-saturating", "Loss", "The adversarial loss.", choices=LOSSES)
    label_smoothing: float = _setting(
        0.0, "Loss", "The discriminator's target for real images is 1 minus this.", minimum=0, maximum=0.49
    )
    two_sided_smoothing: bool = _setting(False, "Loss", "Smooth the target for generated images too.")
    r1: float = _setting(0.1, "Loss", "Weight of the R1 gradient penalty; 0 is none.", minimum=0)
    r1_every_steps: int = _setting(16, "Loss", "Compute R1 only every n steps, n times as strong.", minimum=1)
    gradient_penalty: float = _setting(10.0, "Loss", "Weight of the gradient penalty of wasserstein-gp.", minimum=0)
    weight_clip: float = _setting(0.01, "Loss", "Bound of wasserstein-clip on the critic's weights.", minimum=0)
    feature_matching: float = _setting(0.0, "Loss", "Weight of feature matching; 0 is none.", minimum=0)
    mismatched_labels: float = _setting(
        0.0,
        "Loss",
        "Share of real images that the discriminator also sees with a wrong label, as fakes.",
        minimum=0,
        maximum=1,
    )

    learning_rate: float = _setting(1e-3, "Optimisation", "Adam's learning rate for both networks.", minimum=0)
    discriminator_learning_rate: float | None = _setting(
        None,
        "Optimisation",
        "Learning rate of the discriminator (TTUR); the same as learning_rate if not given.",
        minimum=0,
    )
    schedule: Schedule = _setting(
        "auto",
        "Optimisation",
        "How the learning rates fall to 0 at the end of the run; auto is linear if decay_from is below 1, otherwise "
        "constant.",
    )
    decay_from: float = _setting(
        1.0,
        "Optimisation",
        "Share of the run, by images or by minutes, after which the learning rates start to fall; with schedule linear "
        "or cosine, 1 is from the start on.",
        minimum=0,
        maximum=1,
    )
    warm_up_images: int = _setting(
        0, "Optimisation", "The learning rates rise from 0 over this many images; 0 is no warm-up.", minimum=0
    )
    beta1: float = _setting(0.0, "Optimisation", "Adam's decay rate of the first moment.", minimum=0, maximum=0.9999)
    beta2: float = _setting(0.99, "Optimisation", "Adam's decay rate of the second moment.", minimum=0, maximum=0.99999)
    batch_size: int = _setting(64, "Optimisation", "Real images per step and process.", minimum=2, maximum=65_536)
    accumulate: int = _setting(
        1,
        "Optimisation",
        "Compute a batch in this many parts and add up their gradients, which takes less memory.",
        minimum=1,
        maximum=65_536,
    )
    discriminator_steps: int = _setting(
        1, "Optimisation", "Number of discriminator steps before the generator steps.", minimum=1, maximum=100
    )
    generator_steps: int = _setting(
        1, "Optimisation", "Number of generator steps after the discriminator steps.", minimum=1, maximum=100
    )
    ema_half_life_images: int = _setting(
        200_000, "Optimisation", "Half-life of the generator's moving average, in images.", minimum=1
    )
    ema_warm_up: float = _setting(
        0.1, "Optimisation", "The half-life is at most this share of the images seen; 0 is no warm-up.", minimum=0
    )
    precision: Precision = _setting(
        "auto", "Optimisation", "auto is bf16 autocast if the device has it in hardware, otherwise fp32."
    )
    compile: bool = _setting(False, "Optimisation", "Compile the networks; worthwhile in long runs.")

    images: int = _setting(1_200_000, "Run", "Train until this many images are seen.", minimum=1)
    minutes: float = _setting(0.0, "Run", "Stop after this many minutes of training; 0 is no limit.", minimum=0)
    seed: int = _setting(0, "Run", "Seed that determines weights, order and latents.", minimum=0, maximum=2**32 - 1)
    sample_every_images: int = _setting(
        60_000, "Run", "Number of images between two contact sheets and reports.", minimum=1
    )
    sample_every_minutes: float = _setting(
        10.0, "Run", "Minutes between two sheets and reports; the first come after one minute. 0 is never.", minimum=0
    )
    checkpoint_every_images: int = _setting(60_000, "Run", "Number of images between two checkpoints.", minimum=1)
    checkpoint_every_minutes: float = _setting(
        10.0, "Run", "Minutes between two checkpoints; the first comes after one minute. 0 is never.", minimum=0
    )
    evaluate_every_images: int = _setting(
        0,
        "Run",
        "Number of images between two measurements of FID, recall and label accuracy on 2,000 images; 0 is never.",
        minimum=0,
    )
    select: str = _setting(
        "fid",
        "Run",
        "Metric by which the best of the measured checkpoints is chosen, which export and evaluate use.",
        choices=SELECTABLE,
    )
    patience: int = _setting(
        0, "Run", "End the run after so many measurements without a better one; 0 is never.", minimum=0
    )
    keep: int = _setting(2, "Run", "Number of newest checkpoints to keep, beside the best one.", minimum=1)
    stop_on_collapse: bool = _setting(False, "Run", "End the run when it raises the alarm for mode collapse.")
    log: str = _setting(
        "tensorboard",
        "Run",
        "Trackers to send the history to: any of tensorboard, wandb, mlflow, joined by a comma; or none.",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_value(field, getattr(self, field.name))
        _check_together(self)

    def are_fulfilled(self, images_seen: int, elapsed_s: float) -> bool:
        """Return whether a run with the given progress is complete."""
        return images_seen >= self.images or (self.minutes > 0 and elapsed_s >= 60 * self.minutes)

    @property
    def decays(self) -> bool:
        """Whether the learning rates fall; the length of the run then determines its weights."""
        return self.schedule in ("linear", "cosine") or (self.schedule == "auto" and self.decay_from < 1)

    def learning_rates(self, images_seen: int, elapsed_s: float = 0.0) -> tuple[float, float]:
        """Return the learning rates of the generator and of the discriminator at a point of the run.

        The progress of the run is its share of `images` or, if that is more, of `minutes`.
        """
        share = 1.0
        if self.decays:
            start = self.decay_from if self.decay_from < 1 else 0.0
            progress = images_seen / self.images
            if self.minutes:
                progress = max(progress, elapsed_s / (60 * self.minutes))
            share = min(max((1 - progress) / (1 - start), 0.0), 1.0)
            if self.schedule == "cosine":
                # Loshchilov & Hutter, 2017, eq. 5, without restarts.
                share = (1 - math.cos(math.pi * share)) / 2
        if images_seen < self.warm_up_images:
            share *= images_seen / self.warm_up_images
        of_discriminator = self.discriminator_learning_rate
        if of_discriminator is None:
            of_discriminator = self.learning_rate
        return share * self.learning_rate, share * of_discriminator

    def reading(self) -> Reading:
        """Return how a data set of files is read."""
        return Reading(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Reading)})

    @property
    def adversarial_loss(self) -> AdversarialLoss:
        """The loss that `loss` names."""
        return LOSSES[self.loss]

    def augmentations(self) -> tuple[str, ...]:
        """Return the differentiable augmentations to apply, in order."""
        return tuple(name for name in self.augment.split("+") if name)

    def trackers(self) -> tuple[str, ...]:
        """Return the trackers to send the history to."""
        return () if self.log == "none" else tuple(name.strip() for name in self.log.split(","))


# Settings that may change on resuming: the length of a run, and how often it reports.
FREE_ON_RESUME = (
    "images",
    "minutes",
    "sample_every_images",
    "sample_every_minutes",
    "checkpoint_every_images",
    "checkpoint_every_minutes",
    "evaluate_every_images",
    "select",
    "patience",
    "keep",
    "stop_on_collapse",
    "log",
)


def free_on_resume(settings: Settings) -> tuple[str, ...]:
    """Return the settings that may change on resuming: not the run's length, if the learning rates depend on it."""
    return tuple(name for name in FREE_ON_RESUME if not (settings.decays and name in ("images", "minutes")))


# Settings that have an effect only with some values of others: what they need, and whether the settings have it.
_NEEDS: dict[str, tuple[str, Callable[[Settings], bool]]] = {
    "conditioning": ("conditional or clusters", lambda settings: settings.conditional or settings.clusters > 0),
    "dense_width": ("architecture dcgan", lambda settings: settings.architecture == "dcgan"),
    "growth_images": ("architecture progressive", lambda settings: settings.architecture == "progressive"),
    "two_sided_smoothing": ("label_smoothing above 0", lambda settings: settings.label_smoothing > 0),
    "r1_every_steps": ("r1 above 0", lambda settings: settings.r1 > 0),
    "gradient_penalty": ("loss wasserstein-gp", lambda settings: settings.adversarial_loss.penalises_gradient),
    "weight_clip": ("loss wasserstein-clip", lambda settings: settings.adversarial_loss.clips_weights),
}

# The group size of each minibatch layer; 4 is from Karras et al., 2018, section 3.
MINIBATCH_GROUPS: dict[MinibatchLayer, int] = {"none": 1, "stddev": 4, "discrimination": 16}


def choices_of(field: "dataclasses.Field[Any]") -> tuple[str, ...]:
    """Return the allowed values of a setting, or none if there is no list of them."""
    named = typing.get_args(field.type) if typing.get_origin(field.type) is Literal else ()
    return (*named, *field.metadata.get("choices", ()))


def _check_value(field: "dataclasses.Field[Any]", value: Any) -> None:
    kind: Any = field.type
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and types.NoneType in allowed:
        return
    (kind,) = (option for option in allowed if option is not types.NoneType)
    minimum, maximum = field.metadata.get("minimum"), field.metadata.get("maximum")
    if choices := choices_of(field):
        if value not in choices:
            raise TrainerError(f"{field.name} is {value!r}; choose one of {', '.join(choices)}")
        return
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise TrainerError(f"{field.name} is {value!r}; it must be of type {kind.__name__}")
    if kind in (int, float) and not (
        math.isfinite(value) and (minimum is None or value >= minimum) and (maximum is None or value <= maximum)
    ):
        upper = "" if maximum is None else f" and at most {maximum}"
        raise TrainerError(f"{field.name} is {value}; it must be at least {minimum}{upper}")


def _check_together(settings: Settings) -> None:
    settings.reading()
    unknown = [name for name in settings.augmentations() if name not in AUGMENTATIONS]
    if unknown:
        raise TrainerError(f"augment is {settings.augment!r}; choose from {', '.join(AUGMENTATIONS)}, joined by +")
    if not set(settings.trackers()) <= set(TRACKERS):
        raise TrainerError(f"log is {settings.log!r}; choose from {', '.join(TRACKERS)}, joined by a comma, or none")
    group = MINIBATCH_GROUPS[settings.minibatch]
    if settings.batch_size % group:
        raise TrainerError(
            f"minibatch {settings.minibatch} compares groups of {group} images; batch_size {settings.batch_size} is "
            "not a multiple of that"
        )
    if settings.batch_size % (group * settings.accumulate):
        needed = f"a multiple of {settings.accumulate}" + (f" times the group of {group}" if group > 1 else "")
        raise TrainerError(
            f"accumulate {settings.accumulate} divides a batch into equal parts; batch_size {settings.batch_size} must "
            f"be {needed}"
        )
    if settings.accumulate > 1 and settings.feature_matching:
        raise TrainerError("feature_matching compares the means of whole batches; leave accumulate out")
    if settings.schedule == "constant" and settings.decay_from < 1:
        raise TrainerError(f"schedule constant never falls, but decay_from is {settings.decay_from}; leave out one")
    if settings.label_smoothing and not settings.adversarial_loss.has_targets:
        raise TrainerError(f"label_smoothing needs a loss that has targets; {settings.loss} has none")
    if settings.attention and settings.architecture != "dcgan":
        raise TrainerError("attention is for the dcgan architecture; leave it out, or use architecture dcgan")
    if settings.architecture == "progressive" and settings.minibatch == "discrimination":
        raise TrainerError("architecture progressive compares its minibatch by stddev; leave minibatch out")
    if settings.architecture == "progressive" and settings.compile:
        raise TrainerError("architecture progressive changes during training, so it cannot be compiled")
    if settings.clusters and (settings.conditional or settings.clusters == 1):
        raise TrainerError(
            "clusters must be 2 or more, and need an unconditional network, because they replace its classes"
        )
    if settings.init_digest and not settings.init_from:
        raise TrainerError("init_digest is the digest of init_from: add init_from")
    if settings.freeze_discriminator and (not settings.init_from or settings.init_networks != "both"):
        raise TrainerError(
            "freeze_discriminator keeps weights that were trained: add init_from, with init_networks both"
        )
    if settings.freeze_discriminator and settings.architecture == "progressive":
        raise TrainerError("freeze_discriminator is for architectures that do not grow: leave it out")
    if settings.select == "label_accuracy" and not settings.conditional:
        raise TrainerError("select label_accuracy needs labels: add conditional, or select another metric")
    if settings.patience and not settings.evaluate_every_images:
        raise TrainerError("patience counts measurements: add evaluate_every_images, or leave patience out")
    if settings.mismatched_labels and not settings.conditional:
        raise TrainerError("mismatched_labels needs labels: add conditional")


@dataclasses.dataclass(frozen=True, slots=True)
class Preset:
    """A named starting point: its settings, and its purpose."""

    settings: Settings
    summary: str


PRESETS = {
    "mlp": Preset(
        Settings("mlp", architecture="mlp", latent_dim=100, width=64),
        "Dense networks (Goodfellow et al., 2014, with BatchNorm): the fastest to train and to serve, with the "
        "lowest quality.",
    ),
    "dcgan": Preset(
        Settings("dcgan"),
        "Convolutional networks (Radford et al., 2015), with as many doublings as the image size needs.",
    ),
    "cdcgan": Preset(
        Settings("cdcgan", conditional=True),
        "dcgan that makes images of a requested class, which the discriminator sees by projection (Miyato & "
        "Koyama, 2018).",
    ),
    "sagan": Preset(
        Settings("sagan", attention=True),
        "dcgan whose networks attend to the whole image (Zhang et al., 2019).",
    ),
    "pggan": Preset(
        Settings(
            "pggan",
            architecture="progressive",
            image_size=64,
            latent_dim=128,
            width=16,
            minibatch="stddev",
            loss="wasserstein-gp",
            r1=0.0,
        ),
        "Progressive growing to 64 pixels (Karras et al., 2018): starts at 4 pixels and doubles.",
    ),
}


def from_preset(name: str, changes: Mapping[str, Any]) -> Settings:
    """Return the settings of a preset, with some of them changed.

    Raises:
        TrainerError: there is no such preset or setting, or a value is not allowed.
    """
    if name not in PRESETS:
        raise TrainerError(f"there is no preset {name!r}{_similar(name, PRESETS)}; choose one of {', '.join(PRESETS)}")
    known = [field.name for field in dataclasses.fields(Settings) if field.name != "preset"]
    for key in changes:
        if key not in known:
            raise TrainerError(f"there is no setting {key!r}{_similar(key, known)}; see ganserve-trainer train --help")
    return dataclasses.replace(PRESETS[name].settings, **changes)


def unused_settings(settings: Settings) -> list[str]:
    """Return a sentence for each setting that differs from its preset's value and has no effect on this run."""
    preset = PRESETS[settings.preset].settings
    return [
        f"{name} {getattr(settings, name)} has no effect: it needs {needs}"
        for name, (needs, are_met) in _NEEDS.items()
        if getattr(settings, name) != getattr(preset, name) and not are_met(settings)
    ]


def read_config(path: Path) -> dict[str, Any]:
    """Read the settings of a TOML file; ignore the table [versions], which is in a run's own file.

    Raises:
        TrainerError: the file is not valid TOML.
        OSError: it cannot be read.
    """
    try:
        content = tomllib.loads(path.read_text())
    except ValueError as error:  # including files that are not UTF-8
        raise TrainerError(f"{path} is not a TOML file: {error}") from error
    content.pop("versions", None)
    return content


def versions() -> dict[str, str]:
    """Return the software versions on which a run's results depend."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _VERSIONS_OF}}


def write_config(settings: Settings) -> str:
    """Return the settings and the versions as TOML for `read_config`; omit settings that are None."""
    lines = ["# All settings that determine this run. To repeat it: ganserve-trainer train --config FILE --out DIR"]
    values = dataclasses.asdict(settings)
    lines += [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]
    lines += ["", "[versions]", *(f"{_toml(name)} = {_toml(version)}" for name, version in versions().items())]
    return "\n".join(lines) + "\n"


def _toml(value: str | float | bool) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'
    return repr(value)


def _similar(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
