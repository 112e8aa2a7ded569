"""What a probe finds out about a model file; plain values, which go through pipes and into files as JSON."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

# passed: it can be served. rejected: it breaks a rule. unreadable: it cannot be read now, or somebody ended or
# stopped the probe; the next look tries again. died: the probe was killed by
# what the file made it do. timeout: it took too long. memory: it needed more memory than is left.
Outcome = Literal["passed", "rejected", "unreadable", "died", "timeout", "memory"]


@dataclass(frozen=True, slots=True)
class Probed:
    """One file that was probed.

    Attributes:
        outcome: whether the file can be served.
        problems: why not: a text for each problem.
        reasons: the same, short enough for a log, with the unknown keys of the card.
        digest: of the bytes that were probed; empty if they could not be read.
        card: the model card, serialised, in base64; its golden images are thumbnails.
        figures: the fields of `compute.engine.Figures`, with the name of the batching.
        truncation: what truncation does, as the number of the enum.
        one_thread: whether the bytes of an image depend on the number of threads.
        largest_batch: how many images a batch can have.
        peak_bytes: the most memory that the probe took for this file.
        kept_bytes: the memory that the model takes once it is open, in the probe.
        warnings: log lines about the model: a message and a reason each.
        report: what `ganserve-server check` prints.
    """

    outcome: Outcome
    problems: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    digest: str = ""
    size_bytes: int = 0
    card: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    truncation: int = 0
    one_thread: bool = False
    largest_batch: int = 0
    peak_bytes: int = 0
    kept_bytes: int = 0
    warnings: list[tuple[str, str]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """Why the file cannot be served, in one line."""
        return "; ".join(self.reasons or self.problems)

    def opening_bytes(self, processes: int) -> int:
        """Estimate the memory that so many processes need to open the model at the same time.

        Each reads the file, and onnxruntime copies it before it keeps what it needs.
        """
        return processes * (self.kept_bytes + 2 * self.size_bytes)

    def to_json(self) -> dict[str, Any]:
        """Return the values as JSON has them."""
        return dataclasses.asdict(self)


def one_line(text: str, characters: int | None = None) -> str:
    """Return a text in one line, without control characters, and cut after so many characters.

    onnxruntime's and protobuf's reasons have several lines, and names in a file any characters.
    """
    line = "".join(each if each.isprintable() else "?" for each in " ".join(text.split()))
    return line if characters is None or len(line) <= characters else f"{line[:characters]} …"
