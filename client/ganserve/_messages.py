"""Between the SDK's types and the wire's messages: the only place of the SDK that knows both."""

import math
import reprlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from itertools import repeat
from typing import Any

import numpy as np
from google.protobuf import json_format
from grpc_health.v1 import health_pb2
from numpy.typing import ArrayLike, NDArray

from ganserve._latents import uint32
from ganserve._names import did_you_mean, matching
from ganserve._statuses import translate_answer
from ganserve.errors import (
    GanserveError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    ServerError,
    UnavailableError,
)
from ganserve.images import GeneratedImage, ImageBatch
from ganserve.models import Model, QualityMetric
from ganserve.v1 import generation_pb2 as pb

Label = int | str

_UINT32_LIMIT = 1 << 32
# Of `generate_each`: enough to keep a server busy, which has as many of one stream in its queue.
_MOST_IN_FLIGHT = 256
_REFILL_BELOW = 0.75  # of what may be in flight: requests that come together are made together
_READING_S = 0.005  # for which seeds may be read while an answer may be waiting
_MOST_VALUES_A_CALL = 1024  # labels or latents: a server takes no more, unless it is told otherwise
_A_LABEL = "it must be an index, 0 or more, or a name of a class"
_END: Any = object()


def to_request(
    model: str,
    *,
    count: int | None,
    seed: int | None,
    latents: ArrayLike | None,
    label: Label | Sequence[Label] | None,
    truncation: float,
    version: int | None,
) -> pb.GenerateImagesRequest:
    """Write the message.

    Raises:
        InvalidRequestError: an argument cannot be written; whether the model takes it is the server's to judge.
    """
    if seed is not None and latents is not None:
        raise _invalid("seed", "give a seed or latents, not both")
    try:
        if truncation is None or isinstance(truncation, bool):  # protobuf takes them for none, and for a number
            raise TypeError
        request = pb.GenerateImagesRequest(model=_name(model), truncation=truncation)
    except (TypeError, ValueError) as error:
        raise _invalid("truncation", f"truncation is {truncation!r}; it must be a number from 0 to 2") from error
    if count is not None:
        request.count = uint32("count", count, least=1)
    if version is not None:
        request.version = uint32("version", version)
    if seed is not None:
        request.seed = uint32("seed", seed)
    if latents is not None:
        rows = _latents(latents)
        if count not in (None, len(rows)):
            raise _invalid("count", f"count is {count}, but there are {len(rows)} latents; leave count out")
        request.latents.values.extend(rows.ravel().tolist())
        request.count = len(rows)
    if label is not None:
        labels = [_label(item) for item in to_labels(label)]
        names = [item for item in labels if isinstance(item, str)]
        if not labels or 0 < len(names) < len(labels):
            mixed = "; this list mixes indices and names: write them all as one or the other" if labels else ""
            raise _invalid("label", f"label is one index or name, or a list with one for each image{mixed}")
        request.label_names.extend(names)
        request.labels.extend(item for item in labels if not isinstance(item, str))
        if count is None and latents is None:
            request.count = len(labels)
        if len(labels) not in (1, request.count):
            raise _invalid(
                "label", f"label has {len(labels)} values for {request.count} images; give one, or one for each image"
            )
    return request


def to_seeds(seeds: Iterable[int]) -> Iterator[int]:
    """Begin to read seeds.

    Raises:
        InvalidRequestError: they cannot be iterated over.
    """
    try:
        if isinstance(seeds, str | bytes | bytearray | Mapping):
            raise TypeError
        return iter(seeds)
    except TypeError as error:
        text = f"seeds is {reprlib.repr(seeds)}; it must be an iterable of integers"
        raise _invalid("seeds", text) from error


def to_model_request(name: str | None, version: int | None) -> pb.GetModelRequest:
    """Write the message.

    Raises:
        InvalidRequestError: an argument cannot be written.
    """
    return pb.GetModelRequest(model=_name(name), version=None if version is None else uint32("version", version))


def _name(model: Any) -> str:
    try:
        model.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise _invalid("model", f"model is {model!a}; it must be a name, as models() lists them") from error
    return str(model)


def _latents(given: ArrayLike) -> NDArray[np.float32]:
    """Return one latent or several as [count, latent_dim]."""
    try:
        if np.asarray(given).dtype.kind not in "fiu":
            raise TypeError
        rows = np.asarray(given, np.float32)
    except (TypeError, ValueError) as error:
        raise _invalid("latents", "latents is no array of numbers; it must be [count, latent_dim]") from error
    if rows.ndim not in (1, 2) or not rows.size:
        raise _invalid("latents", f"latents is {list(rows.shape)}; it must be [count, latent_dim]")
    return np.atleast_2d(rows)


def to_labels(label: Any) -> list[Any]:
    """Return a list of labels, or of one label alone.

    Raises:
        InvalidRequestError: what holds them is not a list or the like.
    """
    _check_listed(label)
    alone = isinstance(label, str) or not hasattr(label, "__len__")
    return [label] if alone or getattr(label, "ndim", 1) == 0 else list(label)


def _check_listed(label: Any) -> None:
    """Refuse what can be iterated over, but not as one label after the other."""
    if isinstance(label, bytes | bytearray | memoryview | Set | Mapping) or getattr(label, "ndim", 1) > 1:
        raise _invalid("label", f"label is {reprlib.repr(label)}; {_A_LABEL}, or a list with one for each image")


def _label(label: Any) -> Label:
    try:
        if isinstance(label, str):
            label.encode()
            return label
        return uint32("label", label)
    except (UnicodeEncodeError, InvalidRequestError) as error:  # half of a surrogate pair is no text
        text = ascii(label) if isinstance(label, str) else reprlib.repr(label)
        raise _invalid("label", f"label is {text}; {_A_LABEL}") from error


def _invalid(field: str, text: str) -> InvalidRequestError:
    error = InvalidRequestError(text)
    error.field = field
    return error


def to_batch(response: pb.GenerateImagesResponse, count: int) -> ImageBatch:
    """Read a RAW answer.

    Args:
        response: the answer.
        count: how many images it must have.

    Raises:
        ServerError: the answer is not what was asked for.
    """
    shape = (response.count, response.height, response.width, response.channels)
    pixels: NDArray[np.uint8] = np.frombuffer(response.pixels, np.uint8)
    if pixels.size != shape[0] * shape[1] * shape[2] * shape[3] or not pixels.size:
        raise ServerError(f"the server's answer has {pixels.size} bytes of pixels, but says it is {shape}")
    if response.encoding > pb.ENCODING_RAW:
        raise ServerError(f"the server's answer is in encoding {response.encoding}; this client asked for raw pixels")
    # A list of all is read in one step, a repeated field number by number.
    seeds, labels = tuple(response.seeds[:]) or None, tuple(response.labels[:]) or None
    if shape[0] != count or (seeds and len(seeds) != count) or (labels and len(labels) != count):
        told = f"{shape[0]} images, {len(seeds or ())} seeds and {len(labels or ())} labels"
        raise ServerError(f"the server's answer has {told}, for {count} images")
    queued, computed = response.queue_time, response.compute_time
    return ImageBatch(
        pixels=pixels.reshape(shape),
        seeds=seeds,
        labels=labels,
        model=response.model,
        version=response.version,
        digest=response.digest,
        provider=response.provider,
        truncation=response.truncation,
        queue_s=queued.seconds + queued.nanos / 1e9,
        compute_s=computed.seconds + computed.nanos / 1e9,
    )


def reword(error: GanserveError, request: Any) -> None:
    """Name what a request lacks as the argument is called, where the server's word for it is another."""
    if getattr(error, "field", None) != "label" or not isinstance(request, pb.GenerateImagesRequest):
        return
    if request.HasField("latents") and not (request.labels or request.label_names):
        text = f"model {request.model} is conditional: latents need a label, one for all or a list with one for each"
        error.args = (text,)


def question_about(error: GanserveError, request: Any) -> pb.ListModelsRequest | pb.GetModelRequest | None:
    """Return what to ask the server, to learn what a request that it refused probably meant; None if nothing."""
    if isinstance(error, ModelNotFoundError):
        # Other calls' errors say it themselves; to ask would take another replica's turn, call for call.
        return pb.ListModelsRequest() if isinstance(request, health_pb2.HealthCheckRequest) else None
    field = getattr(error, "field", None)
    if field not in ("label", "latents", "count") or not isinstance(request, pb.GenerateImagesRequest):
        return None
    given = request.label_names if field == "label" else request.HasField("latents")
    return pb.GetModelRequest(model=request.model, version=request.version or None) if given else None


def correct(error: GanserveError, request: Any, answer: pb.ListModelsResponse | pb.GetModelResponse) -> Any:
    """Return the request as it was meant, which has other label names; all else is for the caller to put right.

    Raises:
        GanserveError: the error; its text says what was probably meant.
    """
    if isinstance(answer, pb.ListModelsResponse):
        name, known = request.service, [model.name for model in answer.models]
        if name and known and name not in known:
            error.add_text(f": it has {', '.join(known)}{did_you_mean([name], known)}")
            error.advice = ""
        raise error
    card = answer.model.card
    if getattr(error, "field", None) == "label":
        given, known = list(request.label_names), list(card.class_names)
        meant = [match for name in given if (match := matching(name, known)) is not None]
        if len(meant) < len(given) or meant == given:
            error.add_text(did_you_mean(given, known))
            raise error
        corrected = pb.GenerateImagesRequest()
        corrected.CopyFrom(request)
        corrected.label_names[:] = meant
        return corrected
    shape = [request.count, len(request.latents.values) // request.count]
    if shape[1] != card.latent_dim:
        error.args = (f"latents is {shape}; model {request.model} takes [count, {card.latent_dim}]",)
    raise error


class StreamProgress:
    """What streams have brought of a request, so that the rest can be asked of another server.

    A request with more labels or latents than one call may bring is cut into several, one after the other.
    """

    def __init__(self, request: pb.GenerateImagesRequest) -> None:
        self.request = request
        self._wanted = request.count if request.HasField("count") else 1
        self._done = 0
        self._asked = 0  # with those that are done: what the call, once it has ended, has brought
        self._first: ImageBatch | None = None

    @property
    def complete(self) -> bool:
        """Whether all images are there."""
        return self._done == self._wanted

    def take(self, chunk: pb.GenerateImagesResponse) -> ImageBatch:
        """Read the next images.

        Raises:
            ServerError: they are not the next ones, or not by the model of those before.
        """
        if not 1 <= chunk.count <= self._asked - self._done:
            raise ServerError(
                f"the server sends {chunk.count} images after {self._done} of {self._asked}; it must send the rest"
            )
        batch = to_batch(chunk, chunk.count)
        first = self._first = self._first or batch
        if (batch.version, batch.digest) != (first.version, first.digest):
            raise ServerError(
                f"the images after the first {self._done} are of version {batch.version} ({batch.digest}), those "
                f"before of version {first.version} ({first.digest}); ask again for all"
            )
        seed = self._next_seed()
        if seed is not None and (batch.seeds is None or batch.seeds[0] != seed):
            raise ServerError(f"the server's images after the first {self._done} are not of seed {seed}")
        self._done += len(batch)
        return batch

    def end(self) -> None:
        """Check that nothing is missing of what the call was asked for.

        Raises:
            ServerError: it is, and the server thinks that all is well.
        """
        if self._done < self._asked:
            raise ServerError(f"the server ended the stream after {self._done} of {self._asked} images")

    def rest(self) -> pb.StreamImagesRequest:
        """Ask for what is missing, or as much of it as one call may bring: of the same version, and the next seeds."""
        request = pb.GenerateImagesRequest()
        request.CopyFrom(self.request)
        given: tuple[Any, ...] = (request.labels, request.label_names)
        labels = [each for each in given if len(each) > 1]
        at_once = _MOST_VALUES_A_CALL if labels or request.HasField("latents") else self._wanted
        self._asked = min(self._wanted, self._done + at_once)
        if self._first is not None:
            request.version = self._first.version
            if (seed := self._next_seed()) is not None:
                request.seed = seed
        if self._first is not None or self._asked < self._wanted:
            request.count = self._asked - self._done
            if request.HasField("latents"):
                dim = len(request.latents.values) // self._wanted
                request.latents.values[:] = request.latents.values[self._done * dim : self._asked * dim]
            for each in labels:
                each[:] = each[self._done : self._asked]
        return pb.StreamImagesRequest(generate=request)

    def _next_seed(self) -> int | None:
        if self.request.HasField("seed"):
            seed = self.request.seed
        elif self._first is not None and self._first.seeds is not None:
            seed = self._first.seeds[0]
        else:
            return None
        return (seed + self._done) % _UINT32_LIMIT


class _Asked:
    """One image that was asked for, and what came of it: the image, or why there is none yet."""

    __slots__ = ("label", "outcome", "seed")

    def __init__(self, seed: int, label: Label | None) -> None:
        self.seed, self.label = seed, label
        self.outcome: ImageBatch | GanserveError | None = None


class EachProgress:
    """What was asked for image by image, and what of it has come: in order, a bounded number at a time.

    Args:
        request: what all images have in common.
        label: of all, or an iterable with one for each; None leaves them to the server.
        timeout_s: for the next image, from when it is waited for.
        address: of the server, for the texts of errors.
    """

    def __init__(self, request: pb.GenerateImagesRequest, label: Any, timeout_s: float, address: str) -> None:
        self.error: BaseException | None = None  # why no seeds follow, if not because they are all
        self.timeout_s = timeout_s
        self._common, self._address = request, address
        self._labelled = label is not None
        _check_listed(label)
        self._alone = isinstance(label, str) or not isinstance(label, Iterable) or getattr(label, "ndim", 1) == 0
        self._labels: Iterator[Any] = repeat(self._label(label)) if self._alone else iter(label)
        self._spelled: dict[Label | None, Label] = {}  # names as the model has them
        self._requests: dict[Label | None, pb.GenerateEachRequest] = {}  # of which only the seed changes
        self._first: ImageBatch | None = None
        self._ended = False
        self._asked: deque[_Asked] = deque()  # all that the reader has not got, of these:
        self._unsent: deque[_Asked] = deque()
        self._sent: deque[_Asked] = deque()  # whose answers will come, in this order
        self._got = 0
        self._room = 1.0  # in flight: the first alone, for all others are to be of its version
        self._refused = False
        self._send: Callable[[bytes | None], object] = _nowhere
        self._request_id = ""
        self._deadline = math.inf
        self._waiting_since = self._last_wait_s = 0.0

    @property
    def complete(self) -> bool:
        """Whether the reader has got all images that he can get."""
        return self._ended and not self._asked

    @property
    def idle(self) -> bool:
        """Whether there is nothing to wait for until another seed has been read."""
        return not self._asked and not self._ended

    @property
    def full(self) -> bool:
        """Whether as many seeds have been read as may be unanswered."""
        return len(self._sent) + len(self._unsent) >= self._room or len(self._asked) >= _MOST_IN_FLIGHT

    @property
    def hungry(self) -> bool:
        """Whether it is time to read on in the seeds."""
        few = len(self._sent) + len(self._unsent) <= _REFILL_BELOW * self._room
        return few and not (self._ended or self._refused)

    @property
    def late(self) -> bool:
        """Whether the next image has been waited for too long."""
        return time.monotonic() >= self._deadline

    @property
    def deadline(self) -> float:
        """When it will have been, by time.monotonic, should it be waited for from now on."""
        return min(self._deadline, time.monotonic() + self.timeout_s)

    @property
    def request(self) -> pb.GenerateImagesRequest:
        """The next image's."""
        return self._request(self._asked[0].label).generate if self._asked else self._common

    @property
    def failure(self) -> GanserveError | None:
        """Why the next image will not come by this call; None if it may."""
        outcome = self._asked[0].outcome if self._refused and self._asked else None
        if not isinstance(outcome, GanserveError):
            return None
        # What else is in flight is not wasted on a refusal that need not be the end.
        return None if self._sent and isinstance(outcome, OverloadedError | UnavailableError) else outcome

    @property
    def over(self) -> bool:
        """Whether it is of no use to read on in this call: the next image will not come, or no other follows."""
        return self.failure is not None or (self.complete and self.error is not None)

    def read(self, seeds: Iterator[int]) -> None:
        """Read on in the seeds while there is room, and ask for their images.

        It takes no longer than the last answer did: where seeds come slowly, the images of those before do not wait.
        """
        if self.hungry:
            until = time.monotonic() + max(_READING_S, self._last_wait_s)
            while not self.full:
                try:
                    seed = next(seeds)
                except StopIteration:
                    self.end()
                    break
                except Exception as error:
                    self.end(error)
                    break
                if not self.add(seed) or time.monotonic() > until:
                    break
        self.ask()

    def add(self, seed: Any) -> bool:
        """Take the next seed; tell whether another may follow."""
        try:
            if (label := next(self._labels, _END)) is _END:
                raise _invalid("label", f"label is shorter than seeds: it has {self._count()}; give one for each seed")
            asked = _Asked(uint32("seed", seed), label if self._alone else self._label(label))
        except Exception as error:
            self.end(error)
            return False
        self._asked.append(asked)
        self._unsent.append(asked)
        return True

    def end(self, error: BaseException | None = None) -> None:
        """Note that no seeds follow: they are all, or `error`, which is for the reader once he has what was before."""
        try:
            if error is None and not self._alone and next(self._labels, _END) is not _END:
                text = f"seeds is shorter than label: it has {self._count()}; give one for each label"
                error = _invalid("seeds", text)
        except Exception as of_labels:
            error = of_labels
        self._ended, self.error = True, error

    def begin(self, send: Callable[[bytes | None], object], request_id: str) -> None:
        """Begin a call, with what was asked for and has not come.

        Args:
            send: takes its requests, and None after the last.
            request_id: by which the server's log has it.
        """
        if self._refused and isinstance(self._asked[0].outcome, OverloadedError):
            self._room = max(1.0, self._room / 2)
        self._send, self._request_id, self._refused = send, request_id, False
        self._sent.clear()
        self._unsent = deque(asked for asked in self._asked if not isinstance(asked.outcome, ImageBatch))
        for asked in self._unsent:
            asked.outcome = None
        self.ask()

    def ask(self) -> None:
        """Send what there is room for."""
        if self._refused or self._send is _nowhere:
            return
        while self._unsent and len(self._sent) < self._room:
            self._sent.append(asked := self._unsent.popleft())
            request = self._request(asked.label)
            request.generate.seed = asked.seed
            self._send(request.SerializeToString())
        if self._ended and not self._unsent:
            self._send(None)
            self._send = _nowhere

    def wait(self) -> None:
        """Note that the next image is being waited for: its time runs."""
        self._waiting_since = time.monotonic()
        if self._deadline == math.inf:
            self._deadline = self._waiting_since + self.timeout_s

    def patience_s(self) -> float:
        """Return for how long nothing can be late that is not late yet."""
        left_s = self._deadline - time.monotonic()
        return left_s if 0 < left_s < math.inf else self.timeout_s

    def take(self, answer: pb.GenerateEachResponse) -> bool:
        """Read the next answer; tell whether it has an image.

        Raises:
            ServerError: it is not what was asked for, or not by the model of those before.
        """
        self._last_wait_s = time.monotonic() - self._waiting_since
        if not self._sent:
            raise ServerError(f"the server sends more answers than the {self._count()} that it was asked for")
        asked = self._sent.popleft()
        if answer.HasField("error"):
            asked.outcome, self._refused = self._translated(answer.error, asked), True
            return False
        batch = to_batch(answer.response, 1)
        first = self._first
        if first is None:
            first = self._first = batch
            self._common.version = batch.version
            self._requests.clear()
            self._room = _MOST_IN_FLIGHT
        if batch.version != first.version or batch.digest != first.digest:
            raise ServerError(
                f"the image of seed {asked.seed} is of version {batch.version} ({batch.digest}), those before of "
                f"version {first.version} ({first.digest}); ask again for all"
            )
        if batch.seeds != (asked.seed,):
            raise ServerError(f"the server's answer is of seed {batch.seeds}, and not of {asked.seed}")
        self._room = min(_MOST_IN_FLIGHT, self._room + 1 / self._room)
        asked.outcome = batch
        return True

    def next_image(self) -> GeneratedImage | None:
        """Return the next image for the reader, if it is there; its wait is over."""
        outcome = self._asked[0].outcome if self._asked else None
        if not isinstance(outcome, ImageBatch):
            return None
        self._asked.popleft()
        self._got += 1
        self._deadline = math.inf
        return GeneratedImage(outcome, 0)

    def check_end(self) -> None:
        """Check that nothing is missing.

        Raises:
            ServerError: it is, and the server thinks that all is well.
        """
        if not self.complete:
            raise ServerError(f"the server ended the stream after {self._got} of {self._count()} images")

    def correct(self, request: pb.GenerateImagesRequest) -> None:
        """Ask for the next image's label, wherever it comes, as this request has it."""
        label = self._asked[0].label
        self._spelled[label] = request.label_names[0]
        self._requests.pop(label)

    def _count(self) -> int:
        return self._got + len(self._asked)

    def _label(self, label: Any) -> Label | None:
        return None if label is None and not self._labelled else _label(label)

    def _request(self, label: Label | None) -> pb.GenerateEachRequest:
        request = self._requests.get(label)
        if request is None:
            request = self._requests[label] = pb.GenerateEachRequest(generate=self._common)
            spelled = self._spelled.get(label, label)
            if isinstance(spelled, str):
                request.generate.label_names.append(spelled)
            elif spelled is not None:
                request.generate.labels.append(spelled)
        return request

    def _translated(self, error: pb.Error, asked: _Asked) -> GanserveError:
        failure = translate_answer(error.code, error.reason, error.message, self._address, self._request_id)
        if isinstance(failure, InvalidRequestError) and isinstance(asked.label, str):
            # The answer does not say which field is wrong.
            failure.field = "label" if repr(asked.label) in error.message else None
        return failure


def _nowhere(request: bytes | None) -> None:
    """Stand for a call, while there is none to send requests by."""


def to_health(answer: health_pb2.HealthCheckResponse) -> bool:
    """Say whether the server, or the model, is serving. A status that this SDK does not know is not."""
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def to_health_request(model: str | None) -> health_pb2.HealthCheckRequest:
    """Ask for a model's health, or for the server's.

    Raises:
        InvalidRequestError: the model is no name.
    """
    return health_pb2.HealthCheckRequest(service="" if model is None else _name(model))


def to_model(message: pb.Model) -> Model:
    """Read a model's description."""
    card = message.card
    return Model(
        name=message.name,
        version=message.version,
        versions=tuple(message.versions),
        digest=message.digest,
        provider=message.provider,
        architecture=card.architecture,
        dataset=card.dataset,
        latent_dim=card.latent_dim,
        height=card.height,
        width=card.width,
        channels=card.channels,
        class_names=tuple(card.class_names),
        metrics=tuple(QualityMetric(metric.name, metric.value, metric.method) for metric in card.metrics),
        card=json_format.MessageToDict(card),
    )
