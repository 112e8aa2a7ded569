"""`AsyncClient`: the methods of `Client` for asyncio."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, SupportsFloat, SupportsIndex

from numpy.typing import ArrayLike

from ganserve._arguments import MOST_PIXELS, Attributes, Labels, integer, seed_iterator
from ganserve._base_client import (
    NOT_READY_YET,
    OF_ONE_REPLICA,
    REPLICA_TIMEOUT_S,
    REPLICAS_AT_ONCE,
    STREAM_ABOVE,
    BaseClient,
    FilePath,
    Source,
)
from ganserve._calls import AsyncCalls
from ganserve._each import each_async
from ganserve._endpoint import endpoint
from ganserve._messages import (
    health_request,
    image_count,
    images_request,
    model_request,
    models_request,
    next_models_request,
    to_batch,
    to_model,
    to_models,
)
from ganserve._readiness import Readiness
from ganserve._replicas import Replica, awaited, not_everywhere, refusal, targets
from ganserve._streams import one_by_one_async, stream_async
from ganserve.errors import GanserveError, InvalidRequestError, UnavailableError
from ganserve.images import GeneratedImage, ImageBatch, concatenate, gathered
from ganserve.models import Model

if TYPE_CHECKING:
    from PIL.Image import Image


class AsyncClient(BaseClient):
    """A client for asyncio, with the methods of `Client`.

    It belongs to the event loop of its first call until that loop is closed.

    >>> async with AsyncClient("127.0.0.1:50051") as client:
    ...     batch = await client.generate("cdcgan-mnist", count=4, label=7)
    """

    _calls: AsyncCalls

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
        """Make a client, as `Client` does."""
        where = endpoint(
            address, token=token, tls=tls, ca_file=ca_file, certificate_file=certificate_file, key_file=key_file
        )
        super().__init__(where.address, timeout_s)
        self._calls = AsyncCalls(where, retries=retries)

    async def generate(
        self,
        model: str,
        *,
        count: SupportsIndex | None = None,
        seed: SupportsIndex | None = None,
        label: Labels | None = None,
        latents: ArrayLike | None = None,
        truncation: SupportsFloat = 1.0,
        attributes: Attributes | None = None,
        input_seeds: Mapping[str, SupportsIndex] | None = None,
        version: SupportsIndex | None = None,
        timeout_s: float | None = None,
    ) -> ImageBatch:
        """Make images, as Client.generate does.

        >>> batch = await client.generate("cdcgan-mnist", count=2, seed=1)
        """
        request = images_request(
            model,
            count=count,
            seed=seed,
            latents=latents,
            label=label,
            truncation=truncation,
            attributes=attributes,
            input_seeds=input_seeds,
            version=version,
        )
        images = image_count(request)
        timeout_s = self._timeout_s(timeout_s, images)
        if images <= STREAM_ABOVE:
            try:
                return to_batch(await self._calls.unary("generate_images", request, timeout_s), images)
            except InvalidRequestError as error:
                if error.field != "count" or images == 1:  # otherwise so many large images do not fit in one answer
                    raise
        return concatenate([batch async for batch in stream_async(self._calls, request, timeout_s)])

    def stream(
        self,
        model: str,
        *,
        count: SupportsIndex,
        seed: SupportsIndex | None = None,
        label: Labels | None = None,
        truncation: SupportsFloat = 1.0,
        attributes: Attributes | None = None,
        input_seeds: Mapping[str, SupportsIndex] | None = None,
        version: SupportsIndex | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[GeneratedImage, None]:
        """Yield images one by one, as Client.stream does.

        >>> async for image in client.stream("mlp-mnist", count=3, seed=1):
        ...     print(image.seed)
        """
        batches = self.stream_batches(
            model,
            count=count,
            seed=seed,
            label=label,
            truncation=truncation,
            attributes=attributes,
            input_seeds=input_seeds,
            version=version,
            timeout_s=timeout_s,
        )
        return one_by_one_async(batches)

    def stream_batches(
        self,
        model: str,
        *,
        count: SupportsIndex,
        seed: SupportsIndex | None = None,
        label: Labels | None = None,
        truncation: SupportsFloat = 1.0,
        attributes: Attributes | None = None,
        input_seeds: Mapping[str, SupportsIndex] | None = None,
        version: SupportsIndex | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[ImageBatch, None]:
        """Yield images in batches, as Client.stream_batches does.

        >>> async for batch in client.stream_batches("mlp-mnist", count=1000):
        ...     print(len(batch))
        """
        request = images_request(
            model,
            count=count,
            seed=seed,
            latents=None,
            label=label,
            truncation=truncation,
            attributes=attributes,
            input_seeds=input_seeds,
            version=version,
        )
        return stream_async(self._calls, request, self._timeout_s(timeout_s, image_count(request)))

    def generate_each(
        self,
        model: str,
        seeds: Iterable[SupportsIndex] | AsyncIterable[SupportsIndex],
        *,
        label: Labels | Iterable[int | str] | None = None,
        truncation: SupportsFloat = 1.0,
        attributes: Attributes | None = None,
        input_seeds: Mapping[str, SupportsIndex] | None = None,
        version: SupportsIndex | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[GeneratedImage, None]:
        """Yield the image of each seed, as Client.generate_each does; the seeds may be an async iterable.

        >>> async for image in client.generate_each("cdcgan-mnist", [3, 99, 17]):
        ...     print(image.seed)
        """
        progress = self._each_progress(model, label, truncation, version, timeout_s, attributes, input_seeds)
        reader = aiter(seeds) if isinstance(seeds, AsyncIterable) else seed_iterator(seeds)
        return each_async(self._calls, progress, reader)

    async def interpolate(
        self,
        model: str,
        seed_a: SupportsIndex,
        seed_b: SupportsIndex,
        steps: SupportsIndex = 16,
        *,
        kind: Literal["slerp", "linear"] | None = None,
        label: Labels | None = None,
        truncation: SupportsFloat = 1.0,
        attributes: Attributes | None = None,
        input_seeds: Mapping[str, SupportsIndex] | None = None,
        version: SupportsIndex | None = None,
        timeout_s: float | None = None,
    ) -> ImageBatch:
        """Make the images between those of two seeds, as Client.interpolate does.

        >>> batch = await client.interpolate("cdcgan-mnist", 1, 2, 8, label=7)
        """
        way = self._way(seed_a, seed_b, steps, kind)
        described = await self.model(model, version, timeout_s=timeout_s)
        way = self._way_through(described, way, kind)
        batch = await self.generate(
            model,
            latents=self._latents_on(way, described),
            label=self._nearer_labels(way, described) if label is None else label,
            truncation=truncation,
            attributes=attributes,
            input_seeds=input_seeds,
            version=described.version,
            timeout_s=timeout_s,
        )
        return replace(batch, interpolation=way)

    async def reproduce(self, source: Source, *, timeout_s: float | None = None) -> ImageBatch:
        """Make images again, as Client.reproduce does.

        >>> batch = await client.generate("cdcgan-mnist", count=4, label=7)
        >>> again = await client.reproduce(batch)
        """
        provenance = self._provenance_of(source)
        seeds, labels = self._sources(provenance)
        how: Any = {
            "label": labels,
            "truncation": provenance.truncation,
            "input_seeds": provenance.input_seeds,
            "version": provenance.version,
            "timeout_s": timeout_s,
        }
        if (way := provenance.interpolation) is not None:
            described = await self.model(provenance.model, provenance.version, timeout_s=timeout_s)
            latents, attributes = self._latents_on(way, described), provenance.attributes
            batch = await self.generate(provenance.model, latents=latents, attributes=attributes, **how)
            return replace(batch, interpolation=way)
        if self._consecutive(seeds):
            return await self.generate(
                provenance.model, count=len(seeds), seed=seeds[0], attributes=provenance.attributes, **how
            )
        if (alone := self._each_alone(seeds, provenance, how)) is not None:
            return concatenate([await self.generate(provenance.model, **one) for one in alone])
        how["attributes"] = provenance.attributes
        images = [image async for image in self.generate_each(provenance.model, seeds, **how)]
        return gathered(images)

    async def contact_sheet(
        self,
        model: str,
        *,
        columns: SupportsIndex = 10,
        label: Labels | None = None,
        seed: SupportsIndex | None = None,
        truncation: SupportsFloat = 1.0,
        attributes: Attributes | None = None,
        input_seeds: Mapping[str, SupportsIndex] | None = None,
        version: SupportsIndex | None = None,
        scale: SupportsIndex = 2,
        timeout_s: float | None = None,
    ) -> "Image":
        """Make a picture of many images, as Client.contact_sheet does.

        >>> (await client.contact_sheet("cdcgan-mnist", columns=5)).save("digits.png")
        """
        columns, scale = integer("columns", columns, 1, MOST_PIXELS), integer("scale", scale, 1, MOST_PIXELS)
        described = await self.model(model, version, timeout_s=timeout_s)
        count, labels, names = self._sheet_rows(described, label, columns, scale)
        batch = await self.generate(
            model,
            count=count,
            seed=seed,
            label=labels,
            truncation=truncation,
            attributes=attributes,
            input_seeds=input_seeds,
            version=described.version,
            timeout_s=timeout_s,
        )
        return batch.sheet(columns, row_names=names, scale=scale)

    async def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """List the server's models, as Client.models does.

        >>> names = [model.name for model in await client.models()]
        """
        deadline = time.monotonic() + self._timeout_s(timeout_s)
        listed: list[Model] = []
        page: Any = models_request()
        while page is not None:
            response = await self._calls.unary("list_models", page, deadline - time.monotonic())
            listed += to_models(response)
            page = next_models_request(response)
        return listed

    async def model(self, name: str, version: SupportsIndex | None = None, *, timeout_s: float | None = None) -> Model:
        """Describe a model, as Client.model does.

        >>> latent_dim = (await client.model("cdcgan-mnist")).latent_dim
        """
        request = model_request(name, version)
        return to_model(await self._calls.unary("get_model", request, self._timeout_s(timeout_s)))

    async def health(self, model: str | None = None, *, timeout_s: float | None = None) -> bool:
        """Return whether the server, or one of its models, is serving now, as Client.health does.

        >>> serving = await client.health()
        """
        return await self._calls.serving(health_request(model), self._timeout_s(timeout_s))

    async def wait_until_ready(self, timeout_s: float = 60.0, *, model: str | None = None) -> None:
        """Wait until the server, or one of its models, is serving, as Client.wait_until_ready does.

        >>> await client.wait_until_ready(10, model="cdcgan-mnist")
        """
        request = health_request(model)
        readiness = Readiness(self._timeout_s(timeout_s), self.address if model is None else f"model {model}")
        while True:
            last = None
            try:
                if await self._calls.serving(request, readiness.remaining_s()):
                    readiness.ready()
                    return
            except NOT_READY_YET as error:
                last = error
            await asyncio.sleep(readiness.delay_s(last))

    async def replicas(
        self, model: str | None = None, version: SupportsIndex | None = None, *, timeout_s: float | None = None
    ) -> list[Replica]:
        """Ask every address that this client calls in turn whether it serves, as Client.replicas does.

        >>> found = await client.replicas("cdcgan-mnist", 1)
        """
        health, request = health_request(model), None if version is None else model_request(model, version)
        timeout_s = self._timeout_s(timeout_s)
        self._calls.check_open()
        places = asyncio.Semaphore(REPLICAS_AT_ONCE)

        async def ask(target: str) -> Replica:
            async with places:
                one = self._calls.to_one_address(target)
                try:
                    serving = await one.serving(health, timeout_s)
                    if request is not None:
                        await one.unary("get_model", request, timeout_s, once=True)
                except OF_ONE_REPLICA as error:
                    return Replica(one.address, False, error)
                finally:
                    await one.close()
                return Replica(one.address, serving)

        found = await asyncio.to_thread(targets, self._calls.endpoint.target)
        answers = await asyncio.gather(*(ask(target) for target in found), return_exceptions=True)
        asked = []
        for answer in answers:  # all tasks have ended: an error leaves none behind
            if isinstance(answer, BaseException):
                raise answer
            asked.append(answer)
        return asked

    async def wait_for_version(
        self, model: str | None, version: SupportsIndex | None, timeout_s: float = 60.0
    ) -> list[Replica]:
        """Wait until every replica serves this version of a model, as Client.wait_for_version does.

        >>> found = await client.wait_for_version("cdcgan-mnist", 1, 10)
        """
        readiness = Readiness(self._timeout_s(timeout_s), awaited(self.address, model, version))
        while True:
            last: GanserveError | None
            try:
                found = await self.replicas(model, version, timeout_s=min(REPLICA_TIMEOUT_S, readiness.remaining_s()))
                if (hopeless := refusal(found)) is not None:
                    raise hopeless
                if (last := not_everywhere(found)) is None:
                    readiness.ready()
                    return found
            except UnavailableError as error:
                last = error
            await asyncio.sleep(readiness.delay_s(last))

    async def close(self) -> None:
        """Close the connections; running calls end with RequestCancelledError.

        >>> await client.close()
        """
        await self._calls.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
