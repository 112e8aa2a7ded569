"""The base class of `Client` and `AsyncClient`: what does not depend on threads or asyncio."""

import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, SupportsFloat, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from ganserve._arguments import (
    UINT32_LIMIT,
    Attributes,
    Label,
    Labels,
    check_picture_size,
    integer,
    invalid,
    label_list,
    uint32,
)
from ganserve._attributes import of_image
from ganserve._calls import AsyncCalls, Calls
from ganserve._each import EachProgress
from ganserve._latents import WAYS, between
from ganserve._messages import EachRequests, images_request
from ganserve.errors import (
    AuthenticationError,
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    NoProvenanceError,
    OverloadedError,
    ServerError,
    UnavailableError,
)
from ganserve.images import GeneratedImage, ImageBatch
from ganserve.models import Model
from ganserve.provenance import Interpolation, Provenance, read_provenance

DEFAULT_TIMEOUT_S = 30.0
STREAM_ABOVE = 256  # images: more come as a stream, so that no message gets too large
REPLICAS_AT_ONCE = 16
REPLICA_TIMEOUT_S = 5.0  # for one replica, while waiting for all
NOT_READY_YET = (UnavailableError, OverloadedError, DeadlineExceededError, ModelNotFoundError)
# Errors of one replica, which say nothing about the others.
OF_ONE_REPLICA = (*NOT_READY_YET, AuthenticationError, ServerError)
_TIMEOUT_S_PER_IMAGE = 0.02  # added to the default timeout for each image
_LONGEST_TIMEOUT_S = 86_400.0 * 365  # gRPC treats much longer timeouts as none
_SHEET_ROWS_UNCONDITIONAL = 4
_MOST_STEPS = 65_536  # of an interpolation: their latents are made here, and the server has a lower limit

FilePath = str | os.PathLike[str]
Source = Provenance | GeneratedImage | ImageBatch | FilePath | bytes | BinaryIO  # of images to make again


class BaseClient:
    """The base class of `Client` and `AsyncClient`: settings, and the arithmetic of methods with several calls."""

    _calls: Calls | AsyncCalls

    def __init__(self, address: str, timeout_s: float | None) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._timeout_s(None)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address}{' closed' if self._calls.closed else ''}>"

    def __reduce__(self) -> Any:
        name = type(self).__name__
        raise TypeError(f"a {name} cannot be pickled, because it has connections; make one in each process")

    def _timeout_s(self, given: float | None, images: int = 0) -> float:
        timeout_s = self.timeout_s if given is None else given
        if timeout_s is None:
            timeout_s = DEFAULT_TIMEOUT_S + _TIMEOUT_S_PER_IMAGE * images
        try:
            if timeout_s > 0:
                return min(float(timeout_s), _LONGEST_TIMEOUT_S)
        except (TypeError, ValueError):
            pass
        raise InvalidRequestError(f"timeout_s is {timeout_s!r}; it must be a number above 0")

    def _each_progress(
        self,
        model: str,
        label: Labels | Iterable[Label] | None,
        truncation: SupportsFloat,
        version: SupportsIndex | None,
        timeout_s: float | None,
        attributes: Attributes | None,
        input_seeds: Mapping[str, SupportsIndex] | None,
    ) -> EachProgress:
        request = images_request(
            model,
            count=None if attributes is None else 1,
            seed=None,
            latents=None,
            label=None,
            truncation=truncation,
            version=version,
            attributes=attributes,
            input_seeds=input_seeds,
        )
        return EachProgress(EachRequests(request), label, self._timeout_s(timeout_s), self.address)

    @staticmethod
    def _sheet_rows(
        model: Model, label: Labels | None, columns: int, scale: int
    ) -> tuple[int, list[Label] | None, list[str]]:
        """Return the number of images, the label of each, and the rows' names.

        Raises:
            InvalidRequestError: the model has no such class, or the sheet would be too large.
        """
        if not model.conditional and label is None:
            rows = [0] * _SHEET_ROWS_UNCONDITIONAL
        else:
            rows = [model.label(row) for row in (range(len(model.class_names)) if label is None else label_list(label))]
        check_picture_size(model.width * columns * scale, model.height * len(rows) * scale)
        if not model.conditional:
            return len(rows) * columns, None, []
        each: list[Label] = [row for row in rows for _ in range(columns)]
        return len(each), each, [model.class_names[row] for row in rows]

    @staticmethod
    def _way(
        seed_a: SupportsIndex, seed_b: SupportsIndex, steps: SupportsIndex, kind: Literal["slerp", "linear"] | None
    ) -> Interpolation:
        """Check the arguments of an interpolation."""
        kind = "slerp" if kind is None else kind
        if not isinstance(kind, str) or kind not in WAYS:
            raise InvalidRequestError(f"kind is {kind!r}; it must be slerp or linear")
        steps = integer("steps", steps, 2, _MOST_STEPS)
        return Interpolation(kind, uint32("seed_a", seed_a), uint32("seed_b", seed_b), steps, tuple(range(steps)))

    @staticmethod
    def _way_through(model: Model, way: Interpolation, kind: Literal["slerp", "linear"] | None) -> Interpolation:
        """Return the way with the kind that suits the model's latents, unless the caller chose one."""
        straight = kind is None and model.distribution == "uniform"
        return replace(way, kind="linear") if straight else way

    @staticmethod
    def _nearer_labels(way: Interpolation, model: Model) -> list[Label] | None:
        """Return the label of each image: the class of the seed at its nearer end."""
        if not model.conditional:
            return None
        ends: list[Label] = [seed % len(model.class_names) for seed in (way.seed_a, way.seed_b)]
        return [ends[step >= way.steps - step] for step in range(way.steps)]

    @staticmethod
    def _latents_on(way: Interpolation, model: Model) -> NDArray[np.float32]:
        """Return the latents [n, latent_dim] of an interpolation's images."""
        places = np.linspace(0, 1, way.steps)[list(way.shown)]
        return between(way.seed_a, way.seed_b, places, way.kind, model.latent_dim, model.distribution)

    @staticmethod
    def _provenance_of(source: Source) -> Provenance:
        """Return a provenance, or that of images or of a file.

        Raises:
            InvalidRequestError: `source` is something else, or an empty batch.
            NoProvenanceError: the file has none.
        """
        if isinstance(source, Provenance):
            return source
        if isinstance(source, GeneratedImage | ImageBatch):
            return source.provenance
        if isinstance(source, str | os.PathLike):
            return read_provenance(Path(source))
        if isinstance(source, bytes) or hasattr(source, "read"):
            return read_provenance(source)
        raise invalid(
            "source",
            f"source is a {type(source).__name__}; it must be a provenance, an image, a batch, or a file",
        )

    @staticmethod
    def _sources(provenance: Provenance) -> tuple[tuple[int, ...], list[Label] | None]:
        """Return the seeds of images, or no seeds for an interpolation, and their labels.

        Raises:
            NoProvenanceError: the provenance does not say what each image was made from.
        """
        seeds: tuple[int, ...] | None = ()
        if provenance.interpolation is None:
            one = provenance.count is None and provenance.seed is not None
            seeds = (provenance.seed or 0,) if one else provenance.seeds
        if seeds is None:
            raise NoProvenanceError(
                "it can't be made again, because its source is not in the file: latents of the caller's own, or more "
                "seeds than the file can hold"
            )
        labels: list[Label] | None = None
        if provenance.labels is not None:
            labels = list(provenance.labels)
        elif provenance.label is not None:
            labels = [provenance.label]
            if provenance.count not in (None, 1):
                raise NoProvenanceError(
                    "it can't be made again, because the file has only the first of its labels; set them all with "
                    "dataclasses.replace(provenance, labels=…)"
                )
        return seeds, labels

    @staticmethod
    def _each_alone(seeds: tuple[int, ...], provenance: Provenance, how: dict[str, Any]) -> list[dict[str, Any]] | None:
        """Return how to make each image of scattered seeds alone; None if `generate_each` can make them together.

        Args:
            seeds: the seeds.
            provenance: the provenance of the images.
            how: the arguments for all images.
        """
        if provenance.attributes is None or all(isinstance(each, float) for each in provenance.attributes.values()):
            return None
        labels = how["label"] or [None]
        return [
            {
                **how,
                "seed": seed,
                "label": labels[index % len(labels)],
                "attributes": of_image(provenance.attributes, index),
            }
            for index, seed in enumerate(seeds)
        ]

    @staticmethod
    def _consecutive(seeds: tuple[int, ...]) -> bool:
        return all((a + 1) % UINT32_LIMIT == b for a, b in itertools.pairwise(seeds))
