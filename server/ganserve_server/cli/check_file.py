"""`ganserve-server check`: whether a server would serve a model file, and how the model runs, without a server."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from ganserve.v1 import generation_pb2 as pb
from ganserve_server.compute.batching import Batching, batch_limits
from ganserve_server.compute.engine import Engine, ProviderUnavailable
from ganserve_server.compute.gpu import gpu_options
from ganserve_server.machine import cores
from ganserve_server.repository.verify import Examination, examine, one_line
from ganserve_server.settings import ServerSettings

_TRIES = 3  # of a timing
_GOOD_TO_HAVE = {
    "golden_images": "the server makes them each time it loads the file, and rejects the file if they differ",
    "architecture": "the kind of the generator",
    "dataset": "what it was trained with",
    "training": "how long it was trained, on what, and with which settings",
    "metrics": "its measured quality",
    "created_at": "when it was made",
}
_TRUNCATION = {
    "latent": "a factor on the latents",
    "input": "an input of the model",
    "none": "without effect: the server refuses requests for a truncation other than 1",
}


def report_on(path: Path, settings: ServerSettings) -> dict[str, Any]:
    """Check a file as a server with these settings does; return what `--json` prints."""
    threads = settings.threads or cores().usable
    try:
        found = examine(
            path,
            max_model_mib=settings.max_model_mib,
            provider=settings.provider,
            threads=threads,
            limits=batch_limits(settings),
            gpu=gpu_options(settings),
        )
    except ProviderUnavailable as error:
        found = Examination([str(error)])
    except Exception as error:  # a file from outside can cause any exception in the libraries
        found = Examination([f"the file could not be read ({error})"])
    report = {
        "file": str(path),
        "served": not found.problems,
        "problems": found.problems,
        "unknown_keys": found.unknown_keys,
        "unchecked": found.unchecked,
        "size_bytes": found.size_bytes,
        "digest": found.digest,
        "inputs": {name: str(kind) for name, kind in found.inputs.items()},
        "outputs": {name: str(kind) for name, kind in found.outputs.items()},
    }
    return report if found.problems else report | _figures(found, threads)


def _figures(found: Examination, threads: int) -> dict[str, Any]:
    """Return how a model runs."""
    engine, card, batches = found.engine, found.card, found.batches
    assert engine is not None
    assert card is not None
    assert batches is not None
    batch = engine.largest_batch
    return {
        "provider": engine.provider.removesuffix("ExecutionProvider"),
        "image_s": engine.seconds_for(1),
        "threads": threads,
        "image_all_threads_s": _all_threads_s(engine) if engine.wide_is_faster else None,
        "one_thread_operator": batches.one_thread_operator,
        "batch_images": batch,
        "images_per_s": batch / engine.seconds_for(batch),
        "image_bytes": engine.image_bytes or None,
        "batching": engine.batching.value,
        "batching_operator": batches.batching_operator if engine.batching is batches.batching else "",
        "batch_difference": found.batch_difference,
        "truncation": pb.TruncationEffect.Name(engine.inputs.truncation).removeprefix("TRUNCATION_EFFECT_").lower(),
        "golden_images": len(card.golden_images),
        "exact_golden_images": found.exact_golden_images,
        "good_to_have": [name for name in _GOOD_TO_HAVE if not _has(card, name)],
    }


def _all_threads_s(engine: Engine) -> float:
    """Return the time of one image on all cores."""
    draw, took = engine.inputs.timed(1), []
    for _ in range(_TRIES):
        started = time.perf_counter()
        engine.run([draw], wide=True)
        took.append(time.perf_counter() - started)
    return min(took)


def _has(card: pb.ModelCard, name: str) -> bool:
    value = getattr(card, name)
    return card.HasField(name) if isinstance(value, Message) else bool(value)


def lines_of(report: dict[str, Any]) -> list[str]:
    """Return a report for a terminal."""
    problems = report["problems"]
    verdict = "served" if report["served"] else f"rejected, for {len(problems)} problem{'s' * (len(problems) > 1)}"
    lines = [f"{one_line(report['file'])} would be {verdict}"]
    return lines + [f"  {label:<14} {one_line(text)}" for label, text in _rows(report)]


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the rows of a report: a label and a text each."""
    yield from (("problem", text) for text in report["problems"])
    yield from (("warning", text) for text in report["unknown_keys"])
    yield from (("not checked", text) for text in report["unchecked"])
    if report["digest"]:
        yield "size", f"{report['size_bytes']:,} bytes, {report['digest']}"
    for kind in ("input", "output"):
        yield from ((kind, f"{name}: {text}") for name, text in report[f"{kind}s"].items())
    if report["served"]:
        yield from _figure_rows(report)


def _figure_rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    on_cpu, threads = report["provider"] == "CPU", report["threads"]
    yield "runs on", report["provider"]
    time_of_image = f"{1000 * report['image_s']:.3g} ms an image" + " on one core" * on_cpu
    if report["image_all_threads_s"]:
        time_of_image += f", {1000 * report['image_all_threads_s']:.3g} ms on {threads}"
    elif on_cpu and report["one_thread_operator"]:
        time_of_image += f"; always on one core, because {report['one_thread_operator']} rounds otherwise on several"
    elif on_cpu and threads > 1:
        time_of_image += f"; {threads} are not faster"
    yield "time", time_of_image
    images_per_s = report["images_per_s"]
    throughput = f"{images_per_s:,.{0 if images_per_s >= 10 else 2}f} images a second in batches"
    yield "throughput", f"{throughput} of {report['batch_images']}" + " on one core" * on_cpu
    if report["image_bytes"]:
        yield "memory", f"{report['image_bytes'] / (1 << 20):.3g} MiB for an image while it is made"
    because = ""
    if report["batching_operator"]:
        because = f", because of the operator {report['batching_operator']}"
    elif report["batching"] != Batching.TOGETHER.value:
        limited = report["batch_images"] == 1
        because = f", because {'a batch may have one image only' if limited else 'a trial showed rounding errors'}"
    yield "batches", f"images are computed {report['batching']}{because}"
    difference = f"{report['batch_difference']} grey level of difference" if report["batch_difference"] else "the same"
    among = f"; {difference} alone and among others" * (report["batch_images"] > 1)
    yield "determinism", f"an image has the same bytes twice{among}"
    yield "truncation", _TRUNCATION[report["truncation"]]
    if count := report["golden_images"]:
        exact = report["exact_golden_images"]
        yield "golden images", f"all {count} agree: {exact} to the byte, {count - exact} within one grey level"
    yield from (("good to have", f"{name} in the card: {_GOOD_TO_HAVE[name]}") for name in report["good_to_have"])
