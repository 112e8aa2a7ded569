"""`ganserve-server check`: whether a server would serve a model file, and how the model runs, without a server."""

import asyncio
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ganserve_server.compute.batching import Batching
from ganserve_server.repository.probed import one_line
from ganserve_server.repository.prober import Prober
from ganserve_server.settings import ServerSettings

_GOOD_TO_HAVE = {
    "golden_images": "the server makes them each time it loads the file, and rejects the file if they differ",
    "architecture": "the kind of the generator",
    "dataset": "what it was trained with",
    "training": "how long it was trained, on what, and with which settings",
    "metrics": "its measured quality",
    "created_at": "when it was made",
}
_UNKNOWN = {"unknown_keys": [], "unchecked": [], "size_bytes": 0, "digest": "", "inputs": {}, "outputs": {}}
_TRUNCATION = {
    "latent": "a factor on the latents",
    "input": "an input of the model",
    "none": "without effect: the server refuses requests for a truncation other than 1",
}


def reports_on(paths: Iterable[Path], settings: ServerSettings) -> Iterator[dict[str, Any]]:
    """Check files as a server with these settings does; yield what `--json` prints for each.

    Each file is checked in a process of its own, which a file can end, or keep busy for `load_timeout_s`.
    """
    with asyncio.Runner() as runner:
        prober = Prober(settings, provider=settings.provider)
        for path in paths:
            probed = runner.run(prober.probe(path))
            verdict = {"file": str(path), "served": probed.outcome == "passed", "problems": probed.problems}
            yield verdict | (probed.report or _UNKNOWN)
        runner.run(prober.close())


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
