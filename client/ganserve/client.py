"""The clients: `Client` for threads, `AsyncClient` for asyncio. Twins: every method exists in both."""

import asyncio
import contextlib
import copy
import os
import threading
import time
import uuid
import weakref
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import grpc
import numpy as np
from grpc_health.v1 import health_pb2_grpc
from numpy.typing import ArrayLike

from ganserve.conversion import (
    EachProgress,
    Label,
    StreamProgress,
    correct,
    question_about,
    to_batch,
    to_health,
    to_health_request,
    to_model,
    to_model_request,
    to_request,
)
from ganserve.errors import (
    REQUEST_ID_KEY,
    AuthenticationError,
    DeadlineExceededError,
    GanserveError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    RequestCancelledError,
    ServerError,
    UnavailableError,
    too_late,
    translate,
)
from ganserve.images import GeneratedImage, ImageBatch, concatenate
from ganserve.latents import WAYS, between, uint32
from ganserve.models import Model
from ganserve.provenance import Interpolation
from ganserve.replicas import Replica, awaited, not_everywhere, refusal, targets
from ganserve.transport import (
    DEFAULT_ADDRESS,
    Attempts,
    Readiness,
    RetryPolicy,
    check_fork,
    endpoint,
    enter_call,
    leave_call,
    lose_in_fork,
)
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DEFAULT_ADDRESS", "DEFAULT_TIMEOUT_S", "AsyncClient", "Client"]

DEFAULT_TIMEOUT_S = 30.0
_TIMEOUT_S_PER_IMAGE = 0.02  # what a call for many images may take longer
_STREAM_ABOVE = 256  # more images than this come as a stream: one message should not hold them
_SHEET_ROWS_UNCONDITIONAL = 4
_SHORTEST_TIMEOUT_S = 0.001
_LONGEST_TIMEOUT_S = 86_400.0 * 365  # gRPC takes much longer ones for none at all
_NOT_READY_YET = (UnavailableError, OverloadedError, DeadlineExceededError, ModelNotFoundError)
# What is so of one replica, and says nothing of the others.
_OF_ONE_REPLICA = (*_NOT_READY_YET, AuthenticationError, ServerError)
_REPLICAS_AT_ONCE = 16
_REPLICA_TIMEOUT_S = 5.0  # for one of them, where all are waited for
_GENERATE_EACH = f"/{pb.DESCRIPTOR.services_by_name['GenerationService'].full_name}/GenerateEach"

FilePath = str | os.PathLike[str]


class _Stubs:
    """The methods of a channel."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        service = pb_grpc.GenerationServiceStub(channel)
        self.generate_images = service.GenerateImages
        self.stream_images = service.StreamImages
        # Requests that are alike are serialised by who makes them.
        self.generate_each = channel.stream_stream(
            _GENERATE_EACH, response_deserializer=pb.GenerateEachResponse.FromString
        )
        self.list_models = service.ListModels
        self.get_model = service.GetModel
        self.health = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]


class _Twin:
    """What both clients share: where to, how long, how often, and how to ask for what takes several calls."""

    def __init__(
        self,
        address: str | None = None,
        *,
        timeout_s: float | None = None,
        retries: bool = True,
        token: str | None = None,
        tls: bool | None = None,
        ca_file: FilePath | None = None,
        certificate_file: FilePath | None = None,
        key_file: FilePath | None = None,
    ) -> None:
        """Make a client; it connects with the first call.

        Args:
            address: HOST:PORT, whose calls go to all replicas that DNS knows under the name, in turn; or several
                IP:PORT with commas; or a gRPC target such as unix:/run/ganserve.sock. None takes the environment's
                GANSERVE_ADDRESS, or 127.0.0.1:50051.
            timeout_s: for each call, with its retries; None gives 30 s, and 0.02 s more for each image.
            retries: whether to make calls again that no server answered, or that one sent away.
            token: sent with every call as `authorization: Bearer TOKEN`; None takes GANSERVE_TOKEN. It is sent in plain
                text only on this machine, or with tls=False.
            tls: whether to encrypt; None takes GANSERVE_TLS (1 or 0), or encrypts if one of the files is given.
            ca_file: certificates (PEM) of those who may sign the server's; None takes GANSERVE_CA_FILE, or the
                system's.
            certificate_file: this client's certificate (PEM), for servers that want one; None takes
                GANSERVE_CERTIFICATE_FILE.
            key_file: its key (PEM); None takes GANSERVE_KEY_FILE.

        Raises:
            InvalidRequestError: an argument makes no sense, a file cannot be read, or the token would go in plain text.
        """
        self._endpoint = endpoint(
            address, token=token, tls=tls, ca_file=ca_file, certificate_file=certificate_file, key_file=key_file
        )
        self.address = self._endpoint.address
        self.timeout_s = timeout_s
        self._timeout_s(None)
        self._metadata = self._endpoint.metadata
        self._policy = RetryPolicy(enabled=retries)
        self._closing = threading.Event()
        self._stubs: _Stubs | None = None
        self._lock = threading.Lock()
        _clients.add(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address}{' closed' if self._closing.is_set() else ''}>"

    def _after_fork(self) -> None:
        """Begin anew in a child process: the parent's connections are not its own."""
        closed, self._closing = self._closing.is_set(), threading.Event()
        if closed:
            self._closing.set()
        self._lock = threading.Lock()
        self._policy.after_fork()
        if self._stubs is not None:
            _channels_of_parents.append(self._stubs.channel)
            self._stubs = None

    def _alone(self, target: str) -> Self:
        """Return a client of one of the addresses alone, which does not retry."""
        one = copy.copy(self)
        one._endpoint = self._endpoint.alone(target)
        one.address = one._endpoint.address
        one._policy, one._closing = RetryPolicy(enabled=False), threading.Event()
        one._stubs, one._lock = None, threading.Lock()
        _clients.add(one)
        return one

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

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise RequestCancelledError("this client is closed", reason="closed")

    def _closed_meanwhile(self) -> RequestCancelledError:
        return RequestCancelledError("the client was closed during the call", reason="closed")

    def _translated(self, error: grpc.RpcError) -> GanserveError:
        return translate(error, self.address, closed=self._closing.is_set())

    def _each_progress(
        self,
        model: str,
        labels: Label | Iterable[Label] | None,
        truncation: float,
        version: int | None,
        timeout_s: float | None,
    ) -> EachProgress:
        request = to_request(
            model, count=None, seed=None, latents=None, label=None, truncation=truncation, version=version
        )
        return EachProgress(request, labels, self._timeout_s(timeout_s), self.address)

    def _named(self, request_id: str) -> tuple[tuple[str, str], ...]:
        """Return the metadata of a call that is to have this id."""
        return (*(self._metadata or ()), (REQUEST_ID_KEY, request_id))

    @staticmethod
    def _sheet_rows(
        model: Model, labels: Sequence[Label] | None, columns: int
    ) -> tuple[int, list[Label] | None, list[str]]:
        """Return the number of images, the label of each, and the rows' names."""
        if not isinstance(columns, int) or columns < 1:
            raise InvalidRequestError(f"columns is {columns!r}; it must be an integer, 1 or more")
        if not model.conditional:
            return _SHEET_ROWS_UNCONDITIONAL * columns, None, []
        rows = [model.label(row) for row in (range(len(model.class_names)) if labels is None else labels)]
        each: list[Label] = [row for row in rows for _ in range(columns)]
        return len(each), each, [model.class_names[row] for row in rows]

    @staticmethod
    def _way(seed_a: int, seed_b: int, steps: int, kind: Literal["slerp", "linear"]) -> Interpolation:
        """Check the arguments of an interpolation."""
        if kind not in WAYS:
            raise InvalidRequestError(f"kind is {kind!r}; it must be slerp or linear")
        if not isinstance(steps, int) or steps < 2:
            raise InvalidRequestError(f"steps is {steps!r}; it must be an integer, 2 or more")
        return Interpolation(kind, uint32("seed_a", seed_a), uint32("seed_b", seed_b), steps, tuple(range(steps)))

    @staticmethod
    def _nearer_labels(way: Interpolation, model: Model) -> list[Label] | None:
        """Return for each image the class that the seed of its nearer end has."""
        if not model.conditional:
            return None
        ends: list[Label] = [seed % len(model.class_names) for seed in (way.seed_a, way.seed_b)]
        return [ends[step >= way.steps - step] for step in range(way.steps)]


class Client(_Twin):
    """A blocking client; safe to share between threads, and with child processes that are forked between its calls.

    >>> with Client("127.0.0.1:50051") as client:
    ...     client.generate("cdcgan-mnist", count=4, label=7).pixels.shape
    (4, 28, 28, 1)
    """

    def generate(
        self,
        model: str,
        *,
        count: int | None = None,
        seed: int | None = None,
        label: Label | Sequence[Label] | None = None,
        latents: ArrayLike | None = None,
        truncation: float = 1.0,
        version: int | None = None,
        timeout_s: float | None = None,
    ) -> ImageBatch:
        """Make images.

        >>> client.generate("cdcgan-mnist", count=2, seed=1).seeds
        (1, 2)

        Args:
            model: the model's name, as `models()` lists it.
            count: how many; None makes 1, or one for each of several labels or latents. More than 256 come as a stream.
            seed: of the first image; image i has seed + i, modulo 2^32. None lets the server draw one, which the
                batch reports. A call that is made again then gets other images; nobody saw the first ones.
            label: for conditional models: an index or a class name, for all images, or a list with one an image. None
                takes the classes in turn: the image of seed s has class s modulo the number of classes.
            latents: instead of a seed: your own, float32 [count, latent_dim].
            truncation: factor on the latents, 0 to 2; below 1 gives more typical, less varied images.
            version: of the model; None takes the newest.
            timeout_s: for this call, with its retries.

        Raises:
            InvalidRequestError: an argument is wrong.
            ModelNotFoundError: there is no such model or version.
            AuthenticationError: the token, or a certificate, is not accepted.
            OverloadedError: the server's queue is full.
            UnavailableError: the server cannot be reached.
            DeadlineExceededError: the timeout passed.
            ServerError: the server failed.
        """
        request = to_request(
            model, count=count, seed=seed, latents=latents, label=label, truncation=truncation, version=version
        )
        images = request.count or 1
        timeout_s = self._timeout_s(timeout_s, images)
        if images > _STREAM_ABOVE:
            return concatenate(list(self._stream(request, timeout_s)))
        return to_batch(self._call("generate_images", request, timeout_s), images)

    def stream(
        self,
        model: str,
        *,
        count: int,
        seed: int | None = None,
        label: Label | Sequence[Label] | None = None,
        truncation: float = 1.0,
        version: int | None = None,
        timeout_s: float | None = None,
    ) -> Generator[GeneratedImage, None, None]:
        """Make any number of images, and yield them one by one, in order, as they come.

        The server makes no more than a message ahead of the reader, and memory holds no more. Closing the iterator
        cancels what is left. A stream that breaks is resumed with the next image, of the same version.

        >>> for image in client.stream("mlp-mnist", count=3, seed=1):
        ...     print(image.seed)
        1
        2
        3

        Arguments and errors are `generate`'s; `timeout_s` is for all images, and includes what the reader takes.
        """
        batches = self.stream_batches(
            model, count=count, seed=seed, label=label, truncation=truncation, version=version, timeout_s=timeout_s
        )
        return self._flattened(batches)

    def stream_batches(
        self,
        model: str,
        *,
        count: int,
        seed: int | None = None,
        label: Label | Sequence[Label] | None = None,
        truncation: float = 1.0,
        version: int | None = None,
        timeout_s: float | None = None,
    ) -> Generator[ImageBatch, None, None]:
        """Do as `stream` does, but yield the images in batches, as large as the server makes them: less work for each.

        >>> sum(len(batch) for batch in client.stream_batches("mlp-mnist", count=1000))
        1000
        """
        request = to_request(
            model, count=count, seed=seed, latents=None, label=label, truncation=truncation, version=version
        )
        return self._stream(request, self._timeout_s(timeout_s, request.count))

    def generate_each(
        self,
        model: str,
        seeds: Iterable[int],
        *,
        labels: Label | Iterable[Label] | None = None,
        truncation: float = 1.0,
        version: int | None = None,
        timeout_s: float | None = None,
    ) -> Generator[GeneratedImage, None, None]:
        """Make the image of each of these seeds, which need not follow one another, and yield them in their order.

        One call for all of them, where a loop of `generate` makes one for each: several times as many images a second.
        Seeds are read as they are needed, at most 256 ahead of the images, and may be endless. Closing the iterator
        cancels what is left. A call that breaks is made again for what has not come, of the same version.

        >>> for image in client.generate_each("cdcgan-mnist", [3, 99, 17], labels=[7, 7, 1]):
        ...     print(image.seed, image.label)
        3 7
        99 7
        17 1

        Args:
            model: the model's name.
            seeds: any iterable of integers from 0 to 2^32-1.
            labels: for conditional models: an index or a class name, for all images, or an iterable with one for each
                seed. None gives the image of seed s class s modulo the number of classes.
            truncation: as for `generate`.
            version: as for `generate`.
            timeout_s: for the next image, from when it is waited for, with its retries; None gives 30 s. What the
                reader takes, and the seeds, is not counted.

        Raises:
            InvalidRequestError: an argument is wrong, or a seed or a label, after the images of those before; or there
                are more of one than of the other.
            GanserveError: as `generate` does.
            Exception: what `seeds` or `labels` raises, after the images of those before.
        """
        progress = self._each_progress(model, labels, truncation, version, timeout_s)
        return self._each(progress, _iterator(seeds))

    def interpolate(
        self,
        model: str,
        seed_a: int,
        seed_b: int,
        steps: int = 16,
        *,
        kind: Literal["slerp", "linear"] = "slerp",
        label: Label | Sequence[Label] | None = None,
        truncation: float = 1.0,
        version: int | None = None,
        timeout_s: float | None = None,
    ) -> ImageBatch:
        """Make the images between those of two seeds; the first and the last are just theirs.

        >>> len(client.interpolate("cdcgan-mnist", 1, 2, 8, label=7))
        8

        Args:
            model: the model's name.
            seed_a: of the first image.
            seed_b: of the last image.
            steps: how many images, with both ends; 2 or more.
            kind: "slerp", on the great circle, along which all latents are as typical as the ends; or "linear".
            label: as for `generate`; None gives each image the class that the seed of its nearer end has.
            truncation: as for `generate`.
            version: as for `generate`.
            timeout_s: for each of the two calls that it makes.

        Raises:
            GanserveError: as `generate` does.
        """
        way = self._way(seed_a, seed_b, steps, kind)
        described = self.model(model, version, timeout_s=timeout_s)
        batch = self.generate(
            model,
            latents=between(way.seed_a, way.seed_b, np.linspace(0, 1, steps), kind, described.latent_dim),
            label=self._nearer_labels(way, described) if label is None else label,
            truncation=truncation,
            version=described.version,
            timeout_s=timeout_s,
        )
        return replace(batch, interpolation=way)

    def contact_sheet(
        self,
        model: str,
        *,
        columns: int = 10,
        labels: Sequence[Label] | None = None,
        seed: int | None = None,
        truncation: float = 1.0,
        version: int | None = None,
        scale: int = 2,
        timeout_s: float | None = None,
    ) -> "Image":
        """Make a picture of many images: for a conditional model a named row for each class.

        >>> client.contact_sheet("cdcgan-mnist", columns=5).save("digits.png")

        Args:
            model: the model's name.
            columns: images a row; an unconditional model gets four rows.
            labels: of the rows, by index or name; None takes all classes.
            seed: of the first image, which is at the upper left; row by row.
            truncation: as for `generate`.
            version: as for `generate`.
            scale: enlarges every pixel to a square of scale x scale.
            timeout_s: for each of the two calls that it makes.

        Raises:
            GanserveError: as `generate` does.
        """
        described = self.model(model, version, timeout_s=timeout_s)
        count, label, names = self._sheet_rows(described, labels, columns)
        batch = self.generate(
            model,
            count=count,
            seed=seed,
            label=label,
            truncation=truncation,
            version=described.version,
            timeout_s=timeout_s,
        )
        return batch.sheet(columns, row_names=names, scale=scale)

    def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """List the server's models, in alphabetical order, each in its newest version.

        >>> [model.name for model in client.models()][:2]
        ['cdcgan-fashion-mnist', 'cdcgan-mnist']
        """
        response = self._call("list_models", pb.ListModelsRequest(), self._timeout_s(timeout_s))
        return [to_model(model) for model in response.models]

    def model(self, name: str, version: int | None = None, *, timeout_s: float | None = None) -> Model:
        """Describe a model; None takes its newest version.

        >>> client.model("cdcgan-mnist").latent_dim
        64

        Raises:
            ModelNotFoundError: there is no such model or version.
        """
        request = to_model_request(name, version)
        return to_model(self._call("get_model", request, self._timeout_s(timeout_s)).model)

    def health(self, model: str | None = None, *, timeout_s: float | None = None) -> bool:
        """Say whether the server, or one of its models, is serving. Not retried: it tells what is now.

        >>> client.health()
        True

        Raises:
            ModelNotFoundError: the server knows no such model.
            UnavailableError: the server cannot be reached.
        """
        request, timeout_s = to_health_request(model), self._timeout_s(timeout_s)
        try:
            return to_health(self._call("health", request, timeout_s, once=True))
        except ModelNotFoundError as error:
            self._corrected(error, request, time.monotonic() + timeout_s)
            raise

    def wait_until_ready(self, timeout_s: float = 60.0, *, model: str | None = None) -> None:
        """Return as soon as the server, or one of its models, is serving; it need not be there yet.

        >>> client.wait_until_ready(10, model="cdcgan-mnist")

        Raises:
            DeadlineExceededError: it took longer than `timeout_s`; the text says what was wrong last.
            AuthenticationError: the token, or a certificate, is not accepted.
        """
        request = to_health_request(model)
        readiness = Readiness(self._timeout_s(timeout_s), self.address if model is None else f"model {model}")
        while True:
            last = None
            try:
                if to_health(self._call("health", request, readiness.remaining_s(), once=True)):
                    readiness.over()
                    return
            except _NOT_READY_YET as error:
                last = error
            self._pause(readiness.delay_s(last))

    def replicas(
        self, model: str | None = None, version: int | None = None, *, timeout_s: float | None = None
    ) -> list[Replica]:
        """Ask every address that this client calls in turn whether it serves, not just the next one.

        They are those of the list, or all that DNS has for the name now; behind a proxy there is one, the proxy's. Each
        is asked once, on a connection of its own.

        >>> [replica.serving for replica in client.replicas("cdcgan-mnist", 1)]
        [True]

        Args:
            model: ask for this model; None for the server.
            version: ask for this version of it; None for any.
            timeout_s: for each address.

        Raises:
            InvalidRequestError: an argument makes no sense, or the address is of a kind that has no list.
            UnavailableError: DNS does not know the name.
        """
        health, request = to_health_request(model), None if version is None else to_model_request(model, version)
        timeout_s = self._timeout_s(timeout_s)
        self._check_open()

        def ask(target: str) -> Replica:
            with self._alone(target) as one:
                try:
                    serving = to_health(one._call("health", health, timeout_s, once=True))
                    if request is not None:
                        one._call("get_model", request, timeout_s, once=True)
                except _OF_ONE_REPLICA as error:
                    return Replica(one.address, False, error)
                return Replica(one.address, serving)

        with ThreadPoolExecutor(_REPLICAS_AT_ONCE) as threads:
            return list(threads.map(ask, targets(self._endpoint.target)))

    def wait_for_version(self, model: str | None, version: int | None, timeout_s: float = 60.0) -> list[Replica]:
        """Return as soon as every replica serves this version of a model: what `replicas` lists.

        DNS is asked again and again: replicas that come meanwhile are waited for, those that go are not.

        >>> len(client.wait_for_version("cdcgan-mnist", 1, 10))
        1

        Args:
            model: the model's name; None waits for every replica to serve anything.
            version: of the model; None waits for any.
            timeout_s: for all of it.

        Raises:
            DeadlineExceededError: it took longer than `timeout_s`; the text says which replicas lack it, and why.
            InvalidRequestError: as `replicas` does.
            AuthenticationError: a replica does not accept the token, or a certificate is not accepted.
        """
        readiness = Readiness(self._timeout_s(timeout_s), awaited(self.address, model, version))
        while True:
            last: GanserveError | None
            try:
                found = self.replicas(model, version, timeout_s=min(_REPLICA_TIMEOUT_S, readiness.remaining_s()))
                if (hopeless := refusal(found)) is not None:
                    raise hopeless
                if (last := not_everywhere(found)) is None:
                    readiness.over()
                    return found
            except UnavailableError as error:
                last = error
            self._pause(readiness.delay_s(last))

    def close(self) -> None:
        """Close the connections; calls that are running end with RequestCancelledError. Closing again does nothing.

        >>> client.close()
        """
        with self._lock:
            self._closing.set()
            stubs, self._stubs = self._stubs, None
        if stubs is not None:
            stubs.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connected(self) -> _Stubs:
        if (stubs := self._stubs) is not None:
            return stubs
        with self._lock:
            self._check_open()
            if self._stubs is None:
                check_fork()
                credentials, target, options = (
                    self._endpoint.credentials,
                    self._endpoint.target,
                    self._endpoint.options(),
                )
                self._stubs = _Stubs(
                    grpc.insecure_channel(target, options)
                    if credentials is None
                    else grpc.secure_channel(target, credentials, options)
                )
            return self._stubs

    def _call(self, method: str, request: Any, timeout_s: float, *, once: bool = False) -> Any:
        deadline = time.monotonic() + timeout_s
        attempts = None
        while True:
            send = getattr(self._connected(), method)
            thread = threading.get_ident()
            enter_call(thread)
            try:
                response = send(request, timeout=timeout_s, metadata=self._metadata)
            except grpc.RpcError as error:
                failure = self._translated(error)
            except ValueError:
                if not self._closing.is_set():
                    raise
                raise self._closed_meanwhile() from None
            else:
                self._policy.succeeded()
                if attempts is not None:
                    attempts.over()
                return response
            finally:
                leave_call(thread)
            if once:
                raise failure
            if (corrected := self._corrected(failure, request, deadline)) is not None:
                request = corrected
            else:
                attempts = attempts or Attempts(self._policy, deadline)
                self._pause(attempts.delay_s(failure))
            timeout_s = deadline - time.monotonic()

    def _corrected(self, failure: GanserveError, request: Any, deadline: float) -> Any:
        """Return what was meant by a request that the server refused; None if asking the server can't tell.

        Raises:
            GanserveError: the failure, which then says what was probably meant.
        """
        question = question_about(failure, request)
        if question is None:
            return None
        method = "list_models" if isinstance(question, pb.ListModelsRequest) else "get_model"
        try:
            answer = self._call(method, question, max(_SHORTEST_TIMEOUT_S, deadline - time.monotonic()), once=True)
        except GanserveError:
            raise failure from None
        return correct(failure, request, answer)

    def _stream(self, request: pb.GenerateImagesRequest, timeout_s: float) -> Generator[ImageBatch, None, None]:
        deadline = time.monotonic() + timeout_s
        progress, attempts = StreamProgress(request), None
        while True:
            stubs = self._connected()
            call = None
            try:
                call = stubs.stream_images(progress.rest(), timeout=timeout_s, metadata=self._metadata)
                enter_call(call)
                for response in call:
                    if attempts is not None:
                        attempts.over()
                    attempts, self._policy.answered = None, True
                    yield progress.take(response.chunk)
                progress.end()
                self._policy.succeeded()
                return
            except grpc.RpcError as error:
                failure = self._translated(error)
            except ValueError:
                if not self._closing.is_set():
                    raise
                raise self._closed_meanwhile() from None
            finally:
                if call is not None:
                    call.cancel()
                    leave_call(call)
            if progress.complete:
                return  # how the call ends no longer matters
            if (corrected := self._corrected(failure, progress.request, deadline)) is not None:
                progress.request = corrected
            else:
                attempts = attempts or Attempts(self._policy, deadline)
                self._pause(attempts.delay_s(failure))
            timeout_s = deadline - time.monotonic()

    def _each(self, progress: EachProgress, seeds: Iterator[int]) -> Generator[GeneratedImage, None, None]:
        progress.read(seeds)
        attempts, call, over = None, None, threading.Event()

        def watch() -> None:
            """End a call whose next answer takes too long: gRPC's own deadlines are for a whole call."""
            while not over.wait(progress.patience_s()):
                if progress.late and call is not None:
                    call.cancel()

        watching = threading.Thread(target=watch, name="ganserve-watch", daemon=True)
        try:
            while not progress.complete:
                if watching.ident is None:
                    watching.start()
                stubs = self._connected()
                requests: SimpleQueue[bytes | None] = SimpleQueue()
                request_id, failure = uuid.uuid4().hex, None
                progress.wait()
                try:
                    call = stubs.generate_each(iter(requests.get, None), metadata=self._named(request_id))
                    enter_call(call)
                    progress.begin(requests.put, request_id)
                    for answer in call:
                        if progress.take(answer):
                            self._policy.succeeded()
                            if attempts is not None:
                                attempts.over()
                                attempts = None
                            while (image := progress.next_image()) is not None:
                                yield image
                        progress.read(seeds)
                        progress.wait()
                        if (failure := progress.failure) is not None or (progress.complete and progress.error):
                            break
                    else:
                        progress.check_end()
                except grpc.RpcError as error:
                    failure = too_late(self.address) if progress.late else self._translated(error)
                except ValueError:
                    if not self._closing.is_set():
                        raise
                    raise self._closed_meanwhile() from None
                finally:
                    requests.put(None)
                    if call is not None:
                        call.cancel()
                        leave_call(call)
                if failure is None or progress.complete:
                    break
                if (corrected := self._corrected(failure, progress.request, progress.deadline)) is not None:
                    progress.correct(corrected)
                else:
                    attempts = attempts or Attempts(self._policy, progress.deadline)
                    self._pause(attempts.delay_s(failure))
        finally:
            over.set()  # nobody waits for the thread: where the program ends before the iterator, it is no more
        if progress.error is not None:
            raise progress.error

    @staticmethod
    def _flattened(batches: Generator[ImageBatch, None, None]) -> Generator[GeneratedImage, None, None]:
        with contextlib.closing(batches):
            for batch in batches:
                yield from batch

    def _pause(self, delay_s: float) -> None:
        if self._closing.wait(delay_s):
            raise self._closed_meanwhile()


class AsyncClient(_Twin):
    """The same for asyncio. It belongs to the event loop of its first call, until that is closed.

    >>> async with AsyncClient("127.0.0.1:50051") as client:
    ...     batch = await client.generate("cdcgan-mnist", count=4, label=7)
    """

    _loop: asyncio.AbstractEventLoop | None = None

    def _after_fork(self) -> None:
        if self._stubs is not None:
            # Its thread waits inside gRPC, whether there are calls or not.
            lose_in_fork("an AsyncClient connected")
        super()._after_fork()

    async def generate(
        self,
        model: str,
        *,
        count: int | None = None,
        seed: int | None = None,
        label: Label | Sequence[Label] | None = None,
        latents: ArrayLike | None = None,
        truncation: float = 1.0,
        version: int | None = None,
        timeout_s: float | None = None,
    ) -> ImageBatch:
        """Make images, as Client.generate does.

        >>> batch = await client.generate("cdcgan-mnist", count=2, seed=1)
        """
        request = to_request(
            model, count=count, seed=seed, latents=latents, label=label, truncation=truncation, version=version
        )
        images = request.count or 1
        timeout_s = self._timeout_s(timeout_s, images)
        if images > _STREAM_ABOVE:
            return concatenate([batch async for batch in self._stream(request, timeout_s)])
        return to_batch(await self._call("generate_images", request, timeout_s), images)

    def stream(
        self,
        model: str,
        *,
        count: int,
        seed: int | None = None,
        label: Label | Sequence[Label] | None = None,
        truncation: float = 1.0,
        version: int | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[GeneratedImage, None]:
        """Yield images one by one, as Client.stream does.

        >>> async for image in client.stream("mlp-mnist", count=3, seed=1):
        ...     print(image.seed)
        """
        batches = self.stream_batches(
            model, count=count, seed=seed, label=label, truncation=truncation, version=version, timeout_s=timeout_s
        )
        return self._flattened(batches)

    def stream_batches(
        self,
        model: str,
        *,
        count: int,
        seed: int | None = None,
        label: Label | Sequence[Label] | None = None,
        truncation: float = 1.0,
        version: int | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[ImageBatch, None]:
        """Yield images in batches, as Client.stream_batches does.

        >>> async for batch in client.stream_batches("mlp-mnist", count=1000):
        ...     print(len(batch))
        """
        request = to_request(
            model, count=count, seed=seed, latents=None, label=label, truncation=truncation, version=version
        )
        return self._stream(request, self._timeout_s(timeout_s, request.count))

    def generate_each(
        self,
        model: str,
        seeds: Iterable[int] | AsyncIterable[int],
        *,
        labels: Label | Iterable[Label] | None = None,
        truncation: float = 1.0,
        version: int | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[GeneratedImage, None]:
        """Yield the image of each seed, as Client.generate_each does; the seeds may be an async iterable.

        >>> async for image in client.generate_each("cdcgan-mnist", [3, 99, 17]):
        ...     print(image.seed)
        """
        progress = self._each_progress(model, labels, truncation, version, timeout_s)
        return self._each(progress, aiter(seeds) if isinstance(seeds, AsyncIterable) else _iterator(seeds))

    async def interpolate(
        self,
        model: str,
        seed_a: int,
        seed_b: int,
        steps: int = 16,
        *,
        kind: Literal["slerp", "linear"] = "slerp",
        label: Label | Sequence[Label] | None = None,
        truncation: float = 1.0,
        version: int | None = None,
        timeout_s: float | None = None,
    ) -> ImageBatch:
        """Make the images between those of two seeds, as Client.interpolate does.

        >>> batch = await client.interpolate("cdcgan-mnist", 1, 2, 8, label=7)
        """
        way = self._way(seed_a, seed_b, steps, kind)
        described = await self.model(model, version, timeout_s=timeout_s)
        batch = await self.generate(
            model,
            latents=between(way.seed_a, way.seed_b, np.linspace(0, 1, steps), kind, described.latent_dim),
            label=self._nearer_labels(way, described) if label is None else label,
            truncation=truncation,
            version=described.version,
            timeout_s=timeout_s,
        )
        return replace(batch, interpolation=way)

    async def contact_sheet(
        self,
        model: str,
        *,
        columns: int = 10,
        labels: Sequence[Label] | None = None,
        seed: int | None = None,
        truncation: float = 1.0,
        version: int | None = None,
        scale: int = 2,
        timeout_s: float | None = None,
    ) -> "Image":
        """Make a picture of many images, as Client.contact_sheet does.

        >>> (await client.contact_sheet("cdcgan-mnist", columns=5)).save("digits.png")
        """
        described = await self.model(model, version, timeout_s=timeout_s)
        count, label, names = self._sheet_rows(described, labels, columns)
        batch = await self.generate(
            model,
            count=count,
            seed=seed,
            label=label,
            truncation=truncation,
            version=described.version,
            timeout_s=timeout_s,
        )
        return batch.sheet(columns, row_names=names, scale=scale)

    async def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """List the server's models, as Client.models does.

        >>> names = [model.name for model in await client.models()]
        """
        response = await self._call("list_models", pb.ListModelsRequest(), self._timeout_s(timeout_s))
        return [to_model(model) for model in response.models]

    async def model(self, name: str, version: int | None = None, *, timeout_s: float | None = None) -> Model:
        """Describe a model, as Client.model does.

        >>> latent_dim = (await client.model("cdcgan-mnist")).latent_dim
        """
        request = to_model_request(name, version)
        return to_model((await self._call("get_model", request, self._timeout_s(timeout_s))).model)

    async def health(self, model: str | None = None, *, timeout_s: float | None = None) -> bool:
        """Say whether the server, or one of its models, is serving, as Client.health does.

        >>> serving = await client.health()
        """
        request, timeout_s = to_health_request(model), self._timeout_s(timeout_s)
        try:
            return to_health(await self._call("health", request, timeout_s, once=True))
        except ModelNotFoundError as error:
            await self._corrected(error, request, time.monotonic() + timeout_s)
            raise

    async def wait_until_ready(self, timeout_s: float = 60.0, *, model: str | None = None) -> None:
        """Return as soon as the server, or one of its models, is serving, as Client.wait_until_ready does.

        >>> await client.wait_until_ready(10, model="cdcgan-mnist")
        """
        request = to_health_request(model)
        readiness = Readiness(self._timeout_s(timeout_s), self.address if model is None else f"model {model}")
        while True:
            last = None
            try:
                if to_health(await self._call("health", request, readiness.remaining_s(), once=True)):
                    readiness.over()
                    return
            except _NOT_READY_YET as error:
                last = error
            await asyncio.sleep(readiness.delay_s(last))

    async def replicas(
        self, model: str | None = None, version: int | None = None, *, timeout_s: float | None = None
    ) -> list[Replica]:
        """Ask every address that this client calls in turn whether it serves, as Client.replicas does.

        >>> found = await client.replicas("cdcgan-mnist", 1)
        """
        health, request = to_health_request(model), None if version is None else to_model_request(model, version)
        timeout_s = self._timeout_s(timeout_s)
        self._check_open()
        places = asyncio.Semaphore(_REPLICAS_AT_ONCE)

        async def ask(target: str) -> Replica:
            async with places, self._alone(target) as one:
                try:
                    serving = to_health(await one._call("health", health, timeout_s, once=True))
                    if request is not None:
                        await one._call("get_model", request, timeout_s, once=True)
                except _OF_ONE_REPLICA as error:
                    return Replica(one.address, False, error)
                return Replica(one.address, serving)

        found = await asyncio.to_thread(targets, self._endpoint.target)
        answers = await asyncio.gather(*(ask(target) for target in found), return_exceptions=True)
        asked = []
        for answer in answers:  # all have ended: no task is left behind an error
            if isinstance(answer, BaseException):
                raise answer
            asked.append(answer)
        return asked

    async def wait_for_version(self, model: str | None, version: int | None, timeout_s: float = 60.0) -> list[Replica]:
        """Return as soon as every replica serves this version of a model, as Client.wait_for_version does.

        >>> found = await client.wait_for_version("cdcgan-mnist", 1, 10)
        """
        readiness = Readiness(self._timeout_s(timeout_s), awaited(self.address, model, version))
        while True:
            last: GanserveError | None
            try:
                found = await self.replicas(model, version, timeout_s=min(_REPLICA_TIMEOUT_S, readiness.remaining_s()))
                if (hopeless := refusal(found)) is not None:
                    raise hopeless
                if (last := not_everywhere(found)) is None:
                    readiness.over()
                    return found
            except UnavailableError as error:
                last = error
            await asyncio.sleep(readiness.delay_s(last))

    async def close(self) -> None:
        """Close the connections; calls that are running end with RequestCancelledError.

        >>> await client.close()
        """
        self._closing.set()
        stubs, self._stubs = self._stubs, None
        if stubs is not None and self._loop is asyncio.get_running_loop():
            await stubs.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _connected(self) -> _Stubs:
        loop = asyncio.get_running_loop()
        if (stubs := self._stubs) is not None and self._loop is loop:
            return stubs
        self._check_open()
        check_fork()
        if stubs is not None and self._loop is not None and not self._loop.is_closed():
            raise InvalidRequestError("this AsyncClient is in use by another event loop; make one for each")
        credentials, target, options = self._endpoint.credentials, self._endpoint.target, self._endpoint.options()
        self._stubs = stubs = _Stubs(
            grpc.aio.insecure_channel(target, options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options)
        )
        self._loop = loop
        return stubs

    async def _call(self, method: str, request: Any, timeout_s: float, *, once: bool = False) -> Any:
        deadline = time.monotonic() + timeout_s
        attempts = None
        while True:
            send = getattr(self._connected(), method)
            try:
                response = self._read(await send(request, timeout=timeout_s, metadata=self._metadata))
            except grpc.RpcError as error:
                failure = self._translated(error)
            except (asyncio.CancelledError, grpc.aio.UsageError) as error:
                self._raise_if_closed(error)
                raise
            else:
                self._policy.succeeded()
                if attempts is not None:
                    attempts.over()
                return response
            if once:
                raise failure
            if (corrected := await self._corrected(failure, request, deadline)) is not None:
                request = corrected
            else:
                attempts = attempts or Attempts(self._policy, deadline)
                await asyncio.sleep(attempts.delay_s(failure))
            timeout_s = deadline - time.monotonic()

    async def _corrected(self, failure: GanserveError, request: Any, deadline: float) -> Any:
        question = question_about(failure, request)
        if question is None:
            return None
        method = "list_models" if isinstance(question, pb.ListModelsRequest) else "get_model"
        try:
            answer = await self._call(
                method, question, max(_SHORTEST_TIMEOUT_S, deadline - time.monotonic()), once=True
            )
        except GanserveError:
            raise failure from None
        return correct(failure, request, answer)

    async def _stream(self, request: pb.GenerateImagesRequest, timeout_s: float) -> AsyncGenerator[ImageBatch, None]:
        deadline = time.monotonic() + timeout_s
        progress, attempts = StreamProgress(request), None
        while True:
            stubs = self._connected()
            call = None
            try:
                call = stubs.stream_images(progress.rest(), timeout=timeout_s, metadata=self._metadata)
                async for response in call:
                    if attempts is not None:
                        attempts.over()
                    attempts, self._policy.answered = None, True
                    yield progress.take(self._read(response).chunk)
                progress.end()
                self._policy.succeeded()
                return
            except grpc.RpcError as error:
                failure = self._translated(error)
            except (asyncio.CancelledError, grpc.aio.UsageError) as error:
                self._raise_if_closed(error)
                raise
            finally:
                if call is not None:
                    call.cancel()
            if progress.complete:
                return
            if (corrected := await self._corrected(failure, progress.request, deadline)) is not None:
                progress.request = corrected
            else:
                attempts = attempts or Attempts(self._policy, deadline)
                await asyncio.sleep(attempts.delay_s(failure))
            timeout_s = deadline - time.monotonic()

    async def _each(
        self, progress: EachProgress, seeds: Iterator[int] | AsyncIterator[int]
    ) -> AsyncGenerator[GeneratedImage, None]:
        attempts, call, feeding, timer = None, None, None, None
        fed, room, loop = asyncio.Event(), asyncio.Event(), asyncio.get_running_loop()

        async def feed(seeds: AsyncIterator[int]) -> None:
            """Read on while there is room: no answer waits for a seed, and no call's end reaches who makes them."""
            try:
                async for seed in seeds:
                    if not progress.add(seed):
                        return
                    progress.ask()
                    fed.set()
                    while progress.full:
                        room.clear()
                        await room.wait()
                progress.end()
            except (Exception, asyncio.CancelledError) as error:
                progress.end(error)
                raise
            finally:
                progress.ask()
                fed.set()

        async def read() -> None:
            if not isinstance(seeds, AsyncIterator):
                progress.read(seeds)
                return
            if progress.hungry:
                room.set()
            while progress.idle:
                fed.clear()
                await fed.wait()

        def watch() -> None:
            """End a call whose next answer takes too long: gRPC's own deadlines are for a whole call."""
            nonlocal timer
            if progress.late and call is not None:
                call.cancel()
            timer = loop.call_later(progress.patience_s(), watch)

        try:
            watch()
            if isinstance(seeds, AsyncIterator):
                feeding = asyncio.create_task(feed(seeds))
            await read()
            while not progress.complete:
                stubs = self._connected()
                requests: asyncio.Queue[bytes | None] = asyncio.Queue()
                request_id, failure = uuid.uuid4().hex, None
                progress.wait()
                try:
                    call = stubs.generate_each(_until_none(requests), metadata=self._named(request_id))
                    progress.begin(requests.put_nowait, request_id)
                    async for answer in call:
                        if progress.take(self._read(answer)):
                            self._policy.succeeded()
                            if attempts is not None:
                                attempts.over()
                                attempts = None
                            while (image := progress.next_image()) is not None:
                                yield image
                        await read()
                        progress.wait()
                        if (failure := progress.failure) is not None or (progress.complete and progress.error):
                            break
                    else:
                        progress.check_end()
                except grpc.RpcError as error:
                    failure = too_late(self.address) if progress.late else self._translated(error)
                except (asyncio.CancelledError, grpc.aio.UsageError) as error:
                    self._raise_if_closed(error)
                    if not progress.late or _cancelled():
                        raise
                    failure = too_late(self.address)
                finally:
                    requests.put_nowait(None)
                    if call is not None:
                        call.cancel()
                if failure is None or progress.complete:
                    break
                if (corrected := await self._corrected(failure, progress.request, progress.deadline)) is not None:
                    progress.correct(corrected)
                else:
                    attempts = attempts or Attempts(self._policy, progress.deadline)
                    await asyncio.sleep(attempts.delay_s(failure))
        finally:
            if timer is not None:
                timer.cancel()
            if feeding is not None:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
        if progress.error is not None:
            raise progress.error

    @staticmethod
    def _read(response: Any) -> Any:
        if response is None:  # so grpc.aio tells of bytes that are no message
            raise ServerError("the server's answer cannot be read: it is of another protocol")
        return response

    def _raise_if_closed(self, error: BaseException) -> None:
        """Tell the channel's end, which cancels its calls, from a caller that was cancelled and must see just that."""
        if self._closing.is_set() and not (isinstance(error, asyncio.CancelledError) and _cancelled()):
            raise self._closed_meanwhile() from None

    @staticmethod
    async def _flattened(batches: AsyncGenerator[ImageBatch, None]) -> AsyncGenerator[GeneratedImage, None]:
        async with contextlib.aclosing(batches):
            async for batch in batches:
                for image in batch:
                    yield image


def _cancelled() -> bool:
    """Whether somebody has cancelled the task that runs."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _until_none(requests: "asyncio.Queue[bytes | None]") -> AsyncGenerator[bytes, None]:
    while (request := await requests.get()) is not None:
        yield request


def _iterator(seeds: Iterable[int]) -> Iterator[int]:
    try:
        return iter(seeds)
    except TypeError as error:
        raise InvalidRequestError(f"seeds is {seeds!r}; it must be an iterable of integers") from error


# Of the processes that this one was forked off: closing them would end their connections' calls.
_channels_of_parents: list[Any] = []
_clients: "weakref.WeakSet[_Twin]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for client in tuple(_clients):
        client._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
