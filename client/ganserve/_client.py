"""`Client`: images by blocking calls. `AsyncClient` in `_async_client` has the same methods for asyncio."""

import time
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
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
from ganserve._calls import Calls
from ganserve._each import each
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
from ganserve._streams import one_by_one, stream
from ganserve.errors import GanserveError, InvalidRequestError, UnavailableError
from ganserve.images import GeneratedImage, ImageBatch, concatenate, gathered
from ganserve.models import Model

if TYPE_CHECKING:
    from PIL.Image import Image


class Client(BaseClient):
    """A blocking client. Threads may share it, and so may child processes that are forked between its calls.

    >>> with Client("127.0.0.1:50051") as client:
    ...     client.generate("cdcgan-mnist", count=4, label=7).pixels.shape
    (4, 28, 28, 1)
    """

    _calls: Calls

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
            address: HOST:PORT; several IP:PORT with commas; or a gRPC target such as unix:/run/ganserve.sock. Calls to
                HOST:PORT go in turn to all replicas that DNS lists for the name. None takes GANSERVE_ADDRESS from the
                environment, or 127.0.0.1:50051.
            timeout_s: for each call, including its retries; None: 30 s, plus 0.02 s for each image.
            retries: whether to repeat calls that no server answered, or that a server rejected for lack of room.
            token: sent with every call as `authorization: Bearer TOKEN`; None takes GANSERVE_TOKEN. The client sends it
                in plain text only on this machine, or with tls=False.
            tls: whether to encrypt; None takes GANSERVE_TLS (1 or 0), or encrypts if one of the files is given.
            ca_file: certificates (PEM) of the authorities that may sign the server's certificate; None takes
                GANSERVE_CA_FILE, or the system's.
            certificate_file: this client's certificate (PEM), for servers that require one; None takes
                GANSERVE_CERTIFICATE_FILE.
            key_file: the certificate's key (PEM); None takes GANSERVE_KEY_FILE.

        Raises:
            InvalidRequestError: an argument is invalid, a file cannot be read, or the token would be sent in plain
                text.
        """
        where = endpoint(
            address, token=token, tls=tls, ca_file=ca_file, certificate_file=certificate_file, key_file=key_file
        )
        super().__init__(where.address, timeout_s)
        self._calls = Calls(where, retries=retries)

    def generate(
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
        """Make images.

        >>> client.generate("cdcgan-mnist", count=2, seed=1).seeds
        (1, 2)

        Args:
            model: the model's name, as `models()` lists it.
            count: the number of images; None makes 1, or one for each of several labels or latents. More than 256 come
                as a stream, and so do more than fit in one answer, 64 MiB.
            seed: the seed of the first image; image i has seed + i, modulo 2^32. None lets the server draw a seed,
                which the batch reports. A retry of the call then gets other images, but nobody saw the first ones.
            label: for conditional models: an index or a class name for all images, or a list with one for each image.
                None takes the classes in turn: the image of seed s has class s modulo the number of classes.
            latents: your own latents instead of a seed, float32 [count, latent_dim].
            truncation: 0 to 2; below 1 gives more typical, less varied images. `Model.truncation` says how.
            attributes: for models that have attributes: a number for each name, or a list with one for each image.
                Attributes that are not given have the default of the model's card.
            input_seeds: for models with further latents, such as noise: a seed for each name, for all images.
            version: the version of the model; None takes the newest.
            timeout_s: for this call, including its retries.

        Raises:
            InvalidRequestError: an argument is wrong.
            ModelNotFoundError: there is no such model or version.
            AuthenticationError: the server rejects the token, or one side rejects the other's certificate.
            OverloadedError: the server's queue is full.
            UnavailableError: the server cannot be reached.
            DeadlineExceededError: the timeout passed.
            ServerError: the server failed.
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
                return to_batch(self._calls.unary("generate_images", request, timeout_s), images)
            except InvalidRequestError as error:
                if error.field != "count" or images == 1:  # otherwise so many large images do not fit in one answer
                    raise
        return concatenate(list(stream(self._calls, request, timeout_s)))

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
    ) -> Generator[GeneratedImage, None, None]:
        """Make any number of images, and yield them one by one and in order, as they arrive.

        The server stays at most one message ahead of the reader, so memory holds no more than that. Closing the
        iterator cancels the rest. A stream that breaks resumes with the next image, of the same version.

        >>> for image in client.stream("mlp-mnist", count=3, seed=1):
        ...     print(image.seed)
        1
        2
        3

        Arguments and errors are those of `generate`; `timeout_s` is for all images, and includes the reader's time.
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
        return one_by_one(batches)

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
    ) -> Generator[ImageBatch, None, None]:
        """Yield images in batches of the server's size: like `stream`, but with less work for each image.

        >>> sum(len(batch) for batch in client.stream_batches("mlp-mnist", count=1000))
        1000
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
        return stream(self._calls, request, self._timeout_s(timeout_s, image_count(request)))

    def generate_each(
        self,
        model: str,
        seeds: Iterable[SupportsIndex],
        *,
        label: Labels | Iterable[int | str] | None = None,
        truncation: SupportsFloat = 1.0,
        attributes: Attributes | None = None,
        input_seeds: Mapping[str, SupportsIndex] | None = None,
        version: SupportsIndex | None = None,
        timeout_s: float | None = None,
    ) -> Generator[GeneratedImage, None, None]:
        """Make the image of each of these seeds, which need not be consecutive, and yield the images in their order.

        This is one call, whereas a loop of `generate` makes a call for each seed: several times as many images per
        second. The client reads seeds as it needs them, at most 256 ahead of the images, so the iterable may be
        endless. Closing the iterator cancels the rest. If the call breaks, the client repeats it for the missing
        images, with the same version.

        >>> for image in client.generate_each("cdcgan-mnist", [3, 99, 17], label=[7, 7, 1]):
        ...     print(image.seed, image.label)
        3 7
        99 7
        17 1

        Args:
            model: the model's name.
            seeds: any iterable of integers from 0 to 2^32-1.
            label: for conditional models: an index or a class name for all images, or an iterable with one for each
                seed. None: the image of seed s has class s modulo the number of classes.
            truncation: as for `generate`.
            attributes: as for `generate`.
            input_seeds: as for `generate`.
            version: as for `generate`.
            timeout_s: for the next image, including its retries, from the time when the client waits for it; None:
                30 s. The time that the reader and the seeds take does not count.

        Raises:
            InvalidRequestError: an argument is wrong. Or, raised after the images of the earlier seeds: a seed or a
                label is wrong, or the numbers of seeds and labels differ.
            GanserveError: as `generate` does.
            Exception: any exception that `seeds` or `label` raises, after the images of the earlier seeds.
        """
        progress = self._each_progress(model, label, truncation, version, timeout_s, attributes, input_seeds)
        return each(self._calls, progress, seed_iterator(seeds))

    def interpolate(
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
        """Make the images between those of two seeds; the first and the last image are those of the seeds.

        >>> len(client.interpolate("cdcgan-mnist", 1, 2, 8, label=7))
        8

        Args:
            model: the model's name.
            seed_a: the seed of the first image.
            seed_b: the seed of the last image.
            steps: the number of images including both ends, 2 or more.
            kind: "slerp", along the great circle, on which all latents are as typical as the ends; or "linear". None:
                "linear" for models whose latents are uniform, "slerp" for all others.
            label: as for `generate`; None gives each image the class of the nearer seed.
            truncation: as for `generate`.
            attributes: as for `generate`.
            input_seeds: as for `generate`.
            version: as for `generate`.
            timeout_s: for each of two calls.

        Raises:
            GanserveError: as `generate` does.
        """
        way = self._way(seed_a, seed_b, steps, kind)
        described = self.model(model, version, timeout_s=timeout_s)
        way = self._way_through(described, way, kind)
        batch = self.generate(
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

    def reproduce(self, source: Source, *, timeout_s: float | None = None) -> ImageBatch:
        """Make the images of a file or of a batch again, from their provenance.

        The pixels are identical if the server's version is the same file (`digest`) and runs on the same kind of
        machine; on another kind they may differ by a grey level.

        >>> client.generate("cdcgan-mnist", count=4, seed=1, label=7).sheet().save("sevens.png")
        >>> client.reproduce("sevens.png").seeds
        (1, 2, 3, 4)

        Args:
            source: a file that has its provenance (its path, its bytes, or the open file), an image, a batch, or what
                `read_provenance` returns.
            timeout_s: for each of at most two calls; if the seeds are not consecutive, as for `generate_each`.

        Raises:
            NoProvenanceError: the provenance does not say what each image was made from.
            GanserveError: as `generate` does.
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
            described = self.model(provenance.model, provenance.version, timeout_s=timeout_s)
            latents, attributes = self._latents_on(way, described), provenance.attributes
            batch = self.generate(provenance.model, latents=latents, attributes=attributes, **how)
            return replace(batch, interpolation=way)
        if self._consecutive(seeds):
            return self.generate(
                provenance.model, count=len(seeds), seed=seeds[0], attributes=provenance.attributes, **how
            )
        if (alone := self._each_alone(seeds, provenance, how)) is not None:
            return concatenate([self.generate(provenance.model, **one) for one in alone])
        how["attributes"] = provenance.attributes
        return gathered(self.generate_each(provenance.model, seeds, **how))

    def contact_sheet(
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
        """Make a picture of many images, with a named row for each class of a conditional model.

        >>> client.contact_sheet("cdcgan-mnist", columns=5).save("digits.png")

        Args:
            model: the model's name.
            columns: the number of images in a row; an unconditional model gets four rows.
            label: the label of the rows: an index or a class name, or a list with one for each row. None: all classes.
            seed: the seed of the first image, at the upper left; the next images follow row by row.
            truncation: as for `generate`.
            attributes: as for `generate`.
            input_seeds: as for `generate`.
            version: as for `generate`.
            scale: enlarges every pixel to a square of scale x scale.
            timeout_s: for each of two calls.

        Raises:
            GanserveError: as `generate` does.
        """
        columns, scale = integer("columns", columns, 1, MOST_PIXELS), integer("scale", scale, 1, MOST_PIXELS)
        described = self.model(model, version, timeout_s=timeout_s)
        count, labels, names = self._sheet_rows(described, label, columns, scale)
        batch = self.generate(
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

    def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """List the server's models, in alphabetical order, each in its newest version.

        Their cards lack the golden images and the training configuration, which `model` returns.

        >>> [model.name for model in client.models()][:2]
        ['cdcgan-fashion-mnist', 'cdcgan-mnist']
        """
        deadline = time.monotonic() + self._timeout_s(timeout_s)
        listed: list[Model] = []
        page: Any = models_request()
        while page is not None:
            response = self._calls.unary("list_models", page, deadline - time.monotonic())
            listed += to_models(response)
            page = next_models_request(response)
        return listed

    def model(self, name: str, version: SupportsIndex | None = None, *, timeout_s: float | None = None) -> Model:
        """Describe a version of a model; None takes the newest one.

        >>> client.model("cdcgan-mnist").latent_dim
        64

        Raises:
            ModelNotFoundError: there is no such model or version.
        """
        request = model_request(name, version)
        return to_model(self._calls.unary("get_model", request, self._timeout_s(timeout_s)))

    def health(self, model: str | None = None, *, timeout_s: float | None = None) -> bool:
        """Return whether the server, or one of its models, is serving now. There are no retries.

        >>> client.health()
        True

        Raises:
            ModelNotFoundError: the server has no such model.
            UnavailableError: the server cannot be reached.
        """
        return self._calls.serving(health_request(model), self._timeout_s(timeout_s))

    def wait_until_ready(self, timeout_s: float = 60.0, *, model: str | None = None) -> None:
        """Wait until the server, or one of its models, is serving; the server may not be running yet.

        >>> client.wait_until_ready(10, model="cdcgan-mnist")

        Raises:
            DeadlineExceededError: the wait took longer than `timeout_s`; the text has the last problem.
            AuthenticationError: the server rejects the token, or one side rejects the other's certificate.
        """
        request = health_request(model)
        readiness = Readiness(self._timeout_s(timeout_s), self.address if model is None else f"model {model}")
        while True:
            last = None
            try:
                if self._calls.serving(request, readiness.remaining_s()):
                    readiness.ready()
                    return
            except NOT_READY_YET as error:
                last = error
            self._calls.pause(readiness.delay_s(last))

    def replicas(
        self, model: str | None = None, version: SupportsIndex | None = None, *, timeout_s: float | None = None
    ) -> list[Replica]:
        """Ask every address that this client calls in turn, and not only the next one, whether it serves.

        The addresses are those of the list, or those that DNS lists for the name now; a proxy has one address. Each
        address gets one question, on its own connection.

        >>> [replica.serving for replica in client.replicas("cdcgan-mnist", 1)]
        [True]

        Args:
            model: the model to ask for; None asks for the server.
            version: the version of the model; None asks for any.
            timeout_s: for each address.

        Raises:
            InvalidRequestError: an argument is invalid, or the address is of a kind that cannot be listed.
            UnavailableError: DNS does not know the name.
        """
        health, request = health_request(model), None if version is None else model_request(model, version)
        timeout_s = self._timeout_s(timeout_s)
        self._calls.check_open()

        def ask(target: str) -> Replica:
            with closing(self._calls.to_one_address(target)) as one:
                try:
                    serving = one.serving(health, timeout_s)
                    if request is not None:
                        one.unary("get_model", request, timeout_s, once=True)
                except OF_ONE_REPLICA as error:
                    return Replica(one.address, False, error)
                return Replica(one.address, serving)

        with ThreadPoolExecutor(REPLICAS_AT_ONCE) as threads:
            return list(threads.map(ask, targets(self._calls.endpoint.target)))

    def wait_for_version(
        self, model: str | None, version: SupportsIndex | None, timeout_s: float = 60.0
    ) -> list[Replica]:
        """Wait until every replica that `replicas` lists serves this version of a model.

        Each round asks DNS again: the wait includes replicas that start meanwhile, but not replicas that stop.

        >>> len(client.wait_for_version("cdcgan-mnist", 1, 10))
        1

        Args:
            model: the model's name; None waits until every replica serves.
            version: the version of the model; None waits for any version.
            timeout_s: for the whole wait.

        Raises:
            DeadlineExceededError: the wait took longer than `timeout_s`; the text names the replicas that do not serve
                the version, with the reasons.
            InvalidRequestError: as `replicas` does.
            AuthenticationError: a replica rejects the token, or one side rejects the other's certificate.
        """
        readiness = Readiness(self._timeout_s(timeout_s), awaited(self.address, model, version))
        while True:
            last: GanserveError | None
            try:
                found = self.replicas(model, version, timeout_s=min(REPLICA_TIMEOUT_S, readiness.remaining_s()))
                if (hopeless := refusal(found)) is not None:
                    raise hopeless
                if (last := not_everywhere(found)) is None:
                    readiness.ready()
                    return found
            except UnavailableError as error:
                last = error
            self._calls.pause(readiness.delay_s(last))

    def close(self) -> None:
        """Close the connections; running calls end with RequestCancelledError. Closing again does nothing.

        >>> client.close()
        """
        self._calls.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
