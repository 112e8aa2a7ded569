"""The evaluation that is stored beside a run's checkpoints: `evaluate` writes it, `export` reads it for the card."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from google.protobuf import json_format
from torch import Tensor

from ganserve.v1 import generation_pb2 as pb
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.files import replace_atomically
from ganserve_trainer.report.pictures import save_contact_sheet
from ganserve_trainer.train.checkpoints import Checkpoint, run_folder

EVALUATION_FILE_NAME = "evaluation.json"
NEIGHBOURS_FILE_NAME = "neighbours.png"


class Metric(TypedDict):
    """One metric of a model card."""

    name: str
    value: float
    method: str
    standard_error: NotRequired[float]  # absent if it cannot be estimated


class Withheld(TypedDict):
    """A metric that was not measured, because its value would say nothing."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The metrics; `details` describes the measured images, and has the results that are not single numbers."""

    metrics: list[Metric]
    withheld: list[Withheld]
    details: dict[str, Any]
    neighbours: Tensor  # uint8 [rows, columns, channels, height, width]: a sample and its nearest training images


def images_evaluated(path: Path, checkpoint: Checkpoint) -> int:
    """Return the number of images that this checkpoint was evaluated on; 0 if it has no readable evaluation."""
    try:
        kept = json.loads(path.read_text())
        return int(kept["images"]) if kept["checkpoint"] == checkpoint.digest() else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def write_evaluation(evaluation: Evaluation, checkpoint: Checkpoint | None, folder: Path) -> None:
    """Write evaluation.json and neighbours.png; `checkpoint` is the measured one, or None for a model file."""
    content: dict[str, Any] = {"checkpoint": checkpoint.digest()} if checkpoint else {}
    content |= {**evaluation.details, "metrics": evaluation.metrics, "withheld": evaluation.withheld}
    neighbours = evaluation.neighbours.float() / 127.5 - 1
    save_contact_sheet(neighbours.flatten(0, 1), neighbours.shape[1], folder / NEIGHBOURS_FILE_NAME)
    with replace_atomically(folder / EVALUATION_FILE_NAME) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False).encode())


def read_metrics(checkpoint_path: Path, checkpoint: Checkpoint) -> list[pb.QualityMetric]:
    """Return the metrics that `evaluate` measured on exactly this checkpoint; none if it has not run.

    Raises:
        TrainerError: the stored evaluation cannot be read.
    """
    path = run_folder(checkpoint_path) / EVALUATION_FILE_NAME
    try:
        evaluation = json.loads(path.read_text())
        metrics = [json_format.ParseDict(metric, pb.QualityMetric()) for metric in evaluation["metrics"]]
        measured = evaluation["checkpoint"]
    except FileNotFoundError:
        print(
            f"the card has no quality metrics; to measure them: ganserve-trainer evaluate {checkpoint_path}",
            file=sys.stderr,
        )
        return []
    except (ValueError, KeyError, TypeError, json_format.ParseError) as error:
        raise TrainerError(f"{path} cannot be read; delete it, or evaluate again") from error
    if measured != checkpoint.digest():
        print(f"{path} is of another checkpoint, so the card has no quality metrics; evaluate again", file=sys.stderr)
        return []
    return metrics
