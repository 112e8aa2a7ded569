"""The clients: `Client` for threads, `AsyncClient` for asyncio. Twins: every method exists in both."""

import asyncio
import functools
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc
from numpy.typing import ArrayLike

from ganserve.conversion import Label, to_batch, to_model, to_request
from ganserve.errors import InvalidRequestError, RequestCancelledError, translate
from ganserve.images import ImageBatch, concatenate
from ganserve.models import Model
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 30.0
_TIMEOUT_S_PER_IMAGE = 0.02  # what a call for many images may take longer
_STREAM_ABOVE = 256  # more images than this come as a stream: one message should not hold them
_SHEET_ROWS_UNCONDITIONAL = 4
_LONGEST_TIMEOUT_S = 86_400.0 * 365  # gRPC takes much longer ones for none at all
# The server decides how large an answer is, by its limit on images a request.
_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


class _Twin:
    """What both clients share: where to, how long, and how to ask for a sheet."""

    def __init__(self, address: str | None = None, *, timeout_s: float | None = None) -> None:
        """Make a client; it connects with the first call.

        Args:
            address: HOST:PORT; None takes the environment's GANSERVE_ADDRESS, or 127.0.0.1:50051.
            timeout_s: for each call; None gives 30 s, and 0.02 s more for each image.

        Raises:
            InvalidRequestError: the address is not one.
        """
        self.address = address or os.environ.get("GANSERVE_ADDRESS") or DEFAULT_ADDRESS
        if ":" not in self.address or self.address.startswith(("http://", "https://")):
            raise InvalidRequestError(f"address is {self.address!r}; it must be HOST:PORT, such as {DEFAULT_ADDRESS}")
        self.timeout_s = timeout_s
        self._closed = False

    def _timeout_s(self, given: float | None, images: int = 0) -> float:
        timeout_s = self.timeout_s if given is None else given
        if timeout_s is None:
            timeout_s = DEFAULT_TIMEOUT_S + _TIMEOUT_S_PER_IMAGE * images
        if not timeout_s > 0:
            raise InvalidRequestError(f"timeout_s is {timeout_s}; it must be above 0")
        return min(timeout_s, _LONGEST_TIMEOUT_S)

    def _check_open(self) -> None:
        if self._closed:
            raise RequestCancelledError("this client is closed")

    @staticmethod
    def _sheet_rows(
        model: Model, labels: Sequence[Label] | None, columns: int
    ) -> tuple[int, list[Label] | None, list[str]]:
        """Return the number of images, the label of each, and the rows' names."""
        if not model.conditional:
            return _SHEET_ROWS_UNCONDITIONAL * columns, None, []
        rows = [model.label(row) for row in (range(len(model.class_names)) if labels is None else labels)]
        each: list[Label] = [row for row in rows for _ in range(columns)]
        return len(each), each, [model.class_names[row] for row in rows]


class Client(_Twin):
    """A blocking client; safe to share between threads.

    >>> with Client("127.0.0.1:50051") as client:
    ...     client.generate("cdcgan-mnist", count=4, label=7).pixels.shape
    (4, 28, 28, 1)
    """

    def __init__(self, address: str | None = None, *, timeout_s: float | None = None) -> None:
        super().__init__(address, timeout_s=timeout_s)
        self._channel = grpc.insecure_channel(self.address, options=_OPTIONS)
        self._stub = pb_grpc.GenerationServiceStub(self._channel)

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

        Args:
            model: the model's name, as `models()` lists it.
            count: how many; None makes 1, or one for each of several labels or latents. More than 256 come as a stream.
            seed: of the first image; image i has seed + i, modulo 2^32. None lets the server draw one, which the
                batch reports.
            label: for conditional models: an index or a class name, for all images, or a list with one an image. None
                takes the classes in turn: the image of seed s has class s modulo the number of classes.
            latents: instead of a seed: your own, float32 [count, latent_dim].
            truncation: factor on the latents, 0 to 2; below 1 gives more typical, less varied images.
            version: of the model; None takes the newest.
            timeout_s: for this call.

        Raises:
            InvalidRequestError: an argument is wrong.
            ModelNotFoundError: there is no such model or version.
            OverloadedError: the server's queue is full.
            UnavailableError: the server cannot be reached.
            DeadlineExceededError: the timeout passed.
            ServerError: the server failed.
        """
        request = to_request(
            model, count=count, seed=seed, latents=latents, label=label, truncation=truncation, version=version
        )
        timeout_s = self._timeout_s(timeout_s, request.count)
        if request.count > _STREAM_ABOVE:
            return concatenate(list(self._stream(request, timeout_s)))
        return to_batch(self._call("GenerateImages", request, timeout_s))

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
    ) -> Iterator[ImageBatch]:
        """Make any number of images, and yield them in batches, in order, as they come.

        Arguments and errors are `generate`'s. Closing the iterator cancels what is left.
        """
        request = to_request(
            model, count=count, seed=seed, latents=None, label=label, truncation=truncation, version=version
        )
        return self._stream(request, self._timeout_s(timeout_s, count))

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
        """List the server's models, in alphabetical order, each in its newest version."""
        response = self._call("ListModels", pb.ListModelsRequest(), self._timeout_s(timeout_s))
        return [to_model(model) for model in response.models]

    def model(self, name: str, version: int | None = None, *, timeout_s: float | None = None) -> Model:
        """Describe a model; None takes its newest version.

        Raises:
            ModelNotFoundError: there is no such model or version.
        """
        request = pb.GetModelRequest(model=name, version=version)
        return to_model(self._call("GetModel", request, self._timeout_s(timeout_s)).model)

    def close(self) -> None:
        """Close the connection; calls that are running end with RequestCancelledError."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: str, request: Any, timeout_s: float) -> Any:
        self._check_open()
        try:
            return getattr(self._stub, method)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise translate(error, self.address, closed=self._closed) from None

    def _stream(self, request: pb.GenerateImagesRequest, timeout_s: float) -> Iterator[ImageBatch]:
        self._check_open()
        call = self._stub.StreamImages(pb.StreamImagesRequest(generate=request), timeout=timeout_s)
        try:
            for response in call:
                yield to_batch(response.chunk)
        except grpc.RpcError as error:
            raise translate(error, self.address, closed=self._closed) from None
        finally:
            call.cancel()


class AsyncClient(_Twin):
    """The same for asyncio.

    >>> async with AsyncClient("127.0.0.1:50051") as client:
    ...     batch = await client.generate("cdcgan-mnist", count=4, label=7)
    """

    def __init__(self, address: str | None = None, *, timeout_s: float | None = None) -> None:
        super().__init__(address, timeout_s=timeout_s)
        self._channel: grpc.aio.Channel | None = None

    @functools.cached_property
    def _stub(self) -> Any:
        # With the first call, in its event loop: a channel belongs to the loop it was made in.
        self._channel = grpc.aio.insecure_channel(self.address, options=_OPTIONS)
        return pb_grpc.GenerationServiceStub(self._channel)

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
        """Make images, as Client.generate does."""
        request = to_request(
            model, count=count, seed=seed, latents=latents, label=label, truncation=truncation, version=version
        )
        timeout_s = self._timeout_s(timeout_s, request.count)
        if request.count > _STREAM_ABOVE:
            return concatenate([batch async for batch in self._stream(request, timeout_s)])
        return to_batch(await self._call("GenerateImages", request, timeout_s))

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
    ) -> AsyncIterator[ImageBatch]:
        """Yield images in batches, as Client.stream does."""
        request = to_request(
            model, count=count, seed=seed, latents=None, label=label, truncation=truncation, version=version
        )
        return self._stream(request, self._timeout_s(timeout_s, count))

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
        """Make a picture of many images, as Client.contact_sheet does."""
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
        """List the server's models, as Client.models does."""
        response = await self._call("ListModels", pb.ListModelsRequest(), self._timeout_s(timeout_s))
        return [to_model(model) for model in response.models]

    async def model(self, name: str, version: int | None = None, *, timeout_s: float | None = None) -> Model:
        """Describe a model, as Client.model does."""
        request = pb.GetModelRequest(model=name, version=version)
        return to_model((await self._call("GetModel", request, self._timeout_s(timeout_s))).model)

    async def close(self) -> None:
        """Close the connection."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: str, request: Any, timeout_s: float) -> Any:
        self._check_open()
        try:
            return await getattr(self._stub, method)(request, timeout=timeout_s)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            # The channel's end cancels its calls; a caller that was cancelled itself must see just that.
            if self._closed and task is not None and not task.cancelling():
                raise RequestCancelledError("the client was closed during the call") from None
            raise
        except grpc.RpcError as error:
            raise translate(error, self.address, closed=self._closed) from None

    async def _stream(self, request: pb.GenerateImagesRequest, timeout_s: float) -> AsyncIterator[ImageBatch]:
        self._check_open()
        call = self._stub.StreamImages(pb.StreamImagesRequest(generate=request), timeout=timeout_s)
        try:
            async for response in call:
                yield to_batch(response.chunk)
        except grpc.RpcError as error:
            raise translate(error, self.address, closed=self._closed) from None
        finally:
            call.cancel()
