"""A server's descriptions of its models."""

import html
import operator
from dataclasses import dataclass, field
from typing import Any, Literal, SupportsIndex

from ganserve._names import did_you_mean, matching
from ganserve.errors import InvalidRequestError

Truncation = Literal["latent", "input", "none"]


@dataclass(frozen=True, slots=True)
class Attribute:
    """A property of a model's images that requests can set: from `minimum` to `maximum`; if `binary`, one of the two.

    >>> Attribute("smiling", 0.0, 1.0, 0.5, False).maximum
    1.0
    """

    name: str
    minimum: float
    maximum: float
    default: float
    binary: bool


@dataclass(frozen=True, slots=True)
class QualityMetric:
    """One quality metric of a model, and how it was measured.

    >>> client.model("cdcgan-mnist").metrics[0].name
    'label_accuracy'
    """

    name: str
    value: float
    method: str = field(repr=False)  # for people: which images were measured, and against which
    standard_error: float | None = field(default=None, repr=False)  # None if it was not estimated

    def text(self, digits: int = 4) -> str:
        """Return the value with some significant digits and, if there is one, its standard error: "0.9967 ± 0.0006"."""
        error = "" if self.standard_error is None else f" ± {self.standard_error:.2g}"
        return f"{self.value:.{digits}g}{error}"


@dataclass(frozen=True, slots=True, repr=False)
class Model:
    """One version of a model, as its card describes it. `card` holds the card, with JSON's types.

    From `Client.model`, this is the whole card; `Client.models` leaves out the golden images and the training
    configuration.

    `distribution` is that of the latents, as `latents` takes it. `truncation` says what truncation does: it scales the
    "latent", it is an "input" of the model, or it does nothing ("none"), and the server refuses any but 1.
    `further_latents` have seeds of their own in `input_seeds`.

    >>> model = client.model("cdcgan-fashion-mnist")
    >>> model.label("Sneaker"), model.dataset
    (7, 'fashion-mnist')
    """

    name: str
    version: int
    versions: tuple[int, ...]  # all versions that the server has, ascending
    digest: str
    provider: str
    architecture: str
    dataset: str
    latent_dim: int
    height: int
    width: int
    channels: int
    class_names: tuple[str, ...]  # empty for an unconditional model
    metrics: tuple[QualityMetric, ...]
    card: dict[str, Any]
    attributes: tuple[Attribute, ...] = ()
    further_latents: tuple[str, ...] = ()
    distribution: str = "normal"
    truncation: Truncation = "latent"

    @property
    def conditional(self) -> bool:
        """Whether images have labels."""
        return bool(self.class_names)

    def label(self, name: str | int) -> int:
        """Return the index of a class, given its index or its name. Case matters only if it distinguishes two classes.

        Raises:
            InvalidRequestError: the model has no such class, or several with this name.
        """
        if isinstance(name, str):
            if (known := matching(name, self.class_names)) is not None:
                labels = [label for label, each in enumerate(self.class_names) if each == known]
                if len(labels) > 1:
                    text = f"model {self.name} has several classes called {known!r}: {', '.join(map(str, labels))}"
                    raise InvalidRequestError(f"{text}; give the index of one")
                return labels[0]
        elif isinstance(name, SupportsIndex) and 0 <= operator.index(name) < len(self.class_names):
            return operator.index(name)
        raise self.no_class(name)

    def no_class(self, *names: str | int) -> InvalidRequestError:
        """Return the error for classes that the model does not have."""
        if not self.conditional:
            return InvalidRequestError(f"model {self.name} is unconditional: it takes no labels")
        meant = did_you_mean([name for name in names if isinstance(name, str)], self.class_names)
        unknown = " or ".join(map(repr, names))
        return InvalidRequestError(
            f"model {self.name} has no class {unknown}; it has {', '.join(self.class_names)}{meant}"
        )

    def __repr__(self) -> str:
        classes = f"{len(self.class_names)} classes" if self.conditional else "unconditional"
        return (
            f"<Model {self.name} version {self.version}: {self.architecture} on {self.dataset}, "
            f"{self.height}x{self.width}x{self.channels}, {classes}, latents of {self.latent_dim}>"
        )

    def _repr_html_(self) -> str:
        facts = {
            "architecture": self.architecture,
            "data set": self.dataset,
            "images": f"{self.height} × {self.width} × {self.channels}",
            "classes": ", ".join(self.class_names) or "none",
            "latents": f"{self.latent_dim} numbers",
        }
        if self.attributes:
            facts["attributes"] = ", ".join(each.name for each in self.attributes)
        rows = [(name, value, "") for name, value in facts.items()]
        rows += [(metric.name, metric.text(), metric.method) for metric in self.metrics]
        cells = "".join(
            f'<tr title="{html.escape(title)}"><td>{html.escape(name)}</td>'
            f'<td style="text-align: left">{html.escape(value)}</td></tr>'
            for name, value, title in rows
        )
        return f"<table><caption>{html.escape(self.name)} version {self.version}</caption>{cells}</table>"
