"""Compares the trainer with a plain training loop: its speed, and the quality of its images after some minutes.

`speed` trains each preset by both loops, each in a separate process, in alternation, and prints images per second and
their ratio. `quality` trains by both loops from scratch, measures after 1, 5 and 20 minutes of training, and draws the
plot.

The plain loop is that of most tutorials: torchvision's data set, a DataLoader with ToTensor and Normalize, two workers
and shuffling, fp32, and separate passes for real and generated images. For `speed`, it trains the same networks with
the same batch size. For `quality`, it also follows the plain recipe: networks of the same widths without spectral
normalisation, label channels, Adam with a learning rate of 2e-4 and beta1 0.5, no EMA.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import matplotlib as mpl
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms

from ganserve_trainer.data.datasets import Dataset, load_dataset
from ganserve_trainer.networks.discriminator import build_discriminator
from ganserve_trainer.networks.generator import Generator, build_generator
from ganserve_trainer.settings import Settings, from_preset
from ganserve_trainer.train.devices import best_device, bf16_is_fast
from ganserve_trainer.train.run import Run

mpl.use("Agg")
from matplotlib import pyplot as plt

MINUTES = (1, 5, 20)
Step = Callable[[], None]


def our_steps(settings: Settings, dataset: Dataset, device: torch.device) -> tuple[Step, Generator]:
    run = Run(settings, dataset, device)

    def step() -> None:
        run.step()

    return step, run.ema.network


def plain_steps(settings: Settings, dataset: Dataset, device: torch.device, data_root: Path) -> tuple[Step, Generator]:
    source = torchvision.datasets.MNIST if settings.dataset == "mnist" else torchvision.datasets.FashionMNIST
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    loader = torch.utils.data.DataLoader(
        source(str(data_root), train=True, transform=transform),
        batch_size=settings.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        pin_memory=device.type == "cuda",
        persistent_workers=True,
    )

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    batches = endless()
    torch.manual_seed(settings.seed)
    generator = build_generator(settings, dataset.spec).to(device)
    discriminator = build_discriminator(settings, dataset.spec).to(device)
    betas = (settings.beta1, settings.beta2)
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=settings.learning_rate, betas=betas)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=settings.learning_rate, betas=betas)
    size, classes = settings.batch_size, len(dataset.spec.class_names)
    ones, zeros = torch.ones(size, device=device), torch.zeros(size, device=device)

    def step() -> None:
        real, label = (part.to(device) for part in next(batches))
        latent = torch.randn(size, settings.latent_dim, device=device)
        fake_label = torch.randint(classes, (size,), device=device)
        if not settings.conditional:
            label = fake_label = None
        fake = generator(latent, fake_label)

        d_optimizer.zero_grad()
        real_loss = F.binary_cross_entropy_with_logits(discriminator(real, label), ones)
        fake_loss = F.binary_cross_entropy_with_logits(discriminator(fake.detach(), fake_label), zeros)
        (real_loss + fake_loss).backward()
        d_optimizer.step()

        g_optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(discriminator(fake, fake_label), ones).backward()
        g_optimizer.step()

    return step, generator


def plain_recipe(settings: Settings) -> Settings:
    return dataclasses.replace(
        settings, spectral_norm=False, conditioning="label-channels", learning_rate=2e-4, beta1=0.5, beta2=0.999
    )


def multiply_adds(network: nn.Module, *inputs: Tensor | None) -> int:
    """Return the multiply-adds of one forward pass over one image."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(*inputs)
    return counter.get_total_flops() // 2


def flops_a_training_image(settings: Settings, dataset: Dataset) -> int:
    """Return the operations of a step for one image: G forward and backward, D on real and fake, and G through D."""
    spec = dataset.spec
    label = torch.zeros(1, dtype=torch.int64) if settings.conditional else None
    image = torch.zeros(1, spec.channels, spec.height, spec.width)
    g = multiply_adds(build_generator(settings, spec), torch.zeros(1, settings.latent_dim), label)
    d = multiply_adds(build_discriminator(settings, spec), image, label)
    return 2 * (3 * g + 2 * 3 * d + 2 * d)


def device_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations per second of a large matrix product in this precision."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def images_per_s(step: Step, settings: Settings, seconds: float, device: torch.device) -> float:
    for _ in range(5):
        step()
    synchronize(device)
    started, steps = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        step()
        steps += 1
    synchronize(device)
    return steps * settings.batch_size / (time.perf_counter() - started)


def serve_rates(loop: str, settings: Settings, data_root: Path, pipe: Connection) -> None:
    """Train by one loop in a separate process: for each request with a number of seconds, answer with images/s."""
    device = best_device()
    dataset = load_dataset(settings.dataset, data_root, train=True)
    if loop == "plain":
        step, _ = plain_steps(settings, dataset, device, data_root)
    else:
        step, _ = our_steps(settings, dataset, device)
    while seconds := pipe.recv():
        pipe.send(images_per_s(step, settings, seconds, device))


@contextlib.contextmanager
def loop_in_a_process(loop: str, settings: Settings, data_root: Path) -> Iterator[Callable[[float], float]]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=serve_rates, args=(loop, settings, data_root, theirs))
    process.start()
    theirs.close()  # so that the end of a failed process is noticed

    def rate(seconds: float) -> float:
        try:
            mine.send(seconds)
            found: float = mine.recv()
        except (EOFError, OSError):
            sys.exit(f"the {loop} loop failed; its own message is above")
        return found

    try:
        yield rate
    finally:
        with contextlib.suppress(OSError):
            mine.send(0.0)
        process.join()


def speed(arguments: argparse.Namespace, device: torch.device, precision: str) -> None:
    peak = device_peak_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    print(f"{device.type}, {torch.get_num_threads()} threads, {precision}; matrix products: {peak / 1e9:,.0f} GFLOP/s")
    print("medians of alternating rounds, images/s: | preset | plain | ganserve | ratio | share of the peak |")
    for preset in arguments.presets.split(","):
        settings = from_preset(preset, {"precision": precision, "dataset": arguments.dataset})
        root = arguments.data_root
        with loop_in_a_process("plain", settings, root) as plain, loop_in_a_process("ours", settings, root) as ours:
            rounds = [(plain(arguments.seconds), ours(arguments.seconds)) for _ in range(arguments.rounds)]
        ratio = statistics.median(b / a for a, b in rounds)
        plain_rate, our_rate = (statistics.median(rates) for rates in zip(*rounds, strict=True))
        share = our_rate * flops_a_training_image(settings, load_dataset(settings.dataset, root, train=True)) / peak
        print(f"| {preset} | {plain_rate:,.0f} | {our_rate:,.0f} | {ratio:.2f} | {share:.0%} |", flush=True)


def quality(arguments: argparse.Namespace, device: torch.device, precision: str) -> None:
    from ganserve_trainer.evaluation.evaluate import quick_measure

    settings = from_preset(arguments.preset, {"precision": precision, "dataset": arguments.dataset})
    dataset = load_dataset(settings.dataset, arguments.data_root, train=True)
    measure = quick_measure(settings, dataset, arguments.data_root, images=10_000)
    # The results of the other loop are kept, so that the loops may be measured in separate processes at the same time.
    kept = arguments.plot.with_suffix(".json")
    for name in arguments.loops.split(","):
        mine: dict[str, dict[str, float]] = {}
        if name == "plain":
            step, network = plain_steps(plain_recipe(settings), dataset, device, arguments.data_root)
        else:
            step, network = our_steps(settings, dataset, device)
        trained_s, steps = 0.0, 0
        for minutes in arguments.minutes:
            started = time.perf_counter() - trained_s
            while time.perf_counter() - started < 60 * minutes:
                step()
                steps += 1
            synchronize(device)
            trained_s = time.perf_counter() - started
            found = measure(network.eval()) | {"images": steps * settings.batch_size}
            network.train(name == "plain")  # the trainer's network is the EMA, which stays in evaluation mode
            mine[f"{minutes:g}"] = found
            shown = "  ".join(f"{key} {value:.4g}" for key, value in found.items())
            print(f"{name} after {minutes:g} min on {torch.get_num_threads()} threads: {shown}", flush=True)
        figures = (json.loads(kept.read_text()) if kept.exists() else {}) | {name: mine}
        kept.write_text(json.dumps(figures, indent=2))
    draw(figures, arguments.plot, f"{arguments.preset} on {arguments.dataset}, {device.type}")


def draw(figures: dict[str, dict[str, dict[str, float]]], path: Path, title: str) -> None:
    measured = [found for loop in figures.values() for found in loop.values()]
    names = [name for name in ("label_accuracy", "fid_over_floor", "recall") if name in measured[0]]
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.6), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for loop, found in sorted(figures.items()):
            axis.plot([float(key) for key in found], [values[name] for values in found.values()], "o-", label=loop)
        axis.set(xlabel="minutes of training", title=name.replace("_", " "), xscale="log")
        ticks = sorted({float(key) for loop in figures.values() for key in loop})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        if name == "fid_over_floor":
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("speed", "images per second of both loops"), ("quality", "quality after so many minutes")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--data-root", type=Path, default=Path("data"))
        command.add_argument("--dataset", choices=("mnist", "fashion-mnist"), default="mnist")
        if name == "speed":
            command.add_argument("--presets", default="mlp,dcgan,cdcgan")
            command.add_argument("--rounds", type=int, default=5)
            command.add_argument("--seconds", type=float, default=10.0, help="of each loop in each round")
        else:
            command.add_argument("--preset", default="cdcgan")
            command.add_argument("--loops", default="plain,ganserve")
            command.add_argument("--minutes", type=float, nargs="+", default=list(MINUTES))
            command.add_argument("--plot", type=Path, default=Path("docs/quality-per-minute.png"))
    arguments = parser.parse_args()
    device = best_device()
    precision = "bf16" if bf16_is_fast(device) else "fp32"
    {"speed": speed, "quality": quality}[arguments.command](arguments, device, precision)


if __name__ == "__main__":
    main()
