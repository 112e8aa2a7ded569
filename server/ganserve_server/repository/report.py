"""The report on a model file that `ganserve-server check` prints, from what the checks found."""

from typing import Any

from google.protobuf.message import Message

from ganserve.v1 import generation_pb2 as pb
from ganserve_server.repository.verify import Examination

GOOD_TO_HAVE = ("golden_images", "architecture", "dataset", "training", "metrics", "created_at")  # in a card


def report_of(found: Examination, threads: int) -> dict[str, Any]:
    """Return what `ganserve-server check --json` prints of a file, but its path and its problems.

    Args:
        found: what the checks of the file found.
        threads: the threads that a model may compute with.
    """
    report = {
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
        "image_all_threads_s": engine.figures.wide_image_s or None,
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
        "good_to_have": [name for name in GOOD_TO_HAVE if not _has(card, name)],
    }


def _has(card: pb.ModelCard, name: str) -> bool:
    value = getattr(card, name)
    return card.HasField(name) if isinstance(value, Message) else bool(value)
