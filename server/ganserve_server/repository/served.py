"""Opens, serves and drops versions in a process that answers calls, as the lifecycle decides.

A version was probed before, so this process does not examine its file: it reads it, makes sure that it is the file that
was probed, and opens it with what the probe measured. On a GPU, which the probe does not use, the model is warmed up
and compared with its golden images here.
"""

import asyncio
import base64
import functools
import hashlib
import logging
import os
import weakref
from collections.abc import Callable
from typing import IO

from ganserve.v1 import generation_pb2 as pb
from ganserve_server.compute.batching import Batching, batch_limits
from ganserve_server.compute.cuda import nvidia_driver
from ganserve_server.compute.engine import Engine, Figures, ProviderUnavailable
from ganserve_server.compute.gpu import gpu_options
from ganserve_server.compute.inputs import Inputs
from ganserve_server.compute.model import ModelVersion
from ganserve_server.machine import cores, give_back_memory
from ganserve_server.observe.metrics import Metrics
from ganserve_server.queueing.batcher import Batcher
from ganserve_server.queueing.scheduler import Scheduler
from ganserve_server.repository.probed import Probed, one_line
from ganserve_server.repository.scan import MODEL_FILE_NAME
from ganserve_server.repository.state_folder import AtRisk
from ganserve_server.repository.states import ProbedVersion, Served
from ganserve_server.repository.table import ModelTable
from ganserve_server.repository.threads import in_thread_of_its_own
from ganserve_server.settings import ServerSettings
from ganserve_server.shared.scoreboard import Scoreboard
from ganserve_server.start_errors import StartError

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 20
_CLOSE_S = 1.0  # for the memory of versions that are no longer served


class ServedVersions:
    """The versions of one process, as `Servers`.

    Args:
        settings: the server's settings.
        metrics: the metrics of this process.
        table: the served versions; only this class changes it.
        on_status: called with the name of a model, or "" for the server, and whether it is served.
        on_withdrawn: called with a version that `withdraw` took out of service, its digest, and the reason.
        on_thread_lost: called when a computing thread does not come back, with whether it computes on the CPU.
        risk: records which files this process opens and tries.
        board: the workers' scoreboard, if there are several workers.
    """

    processes = 1

    def __init__(
        self,
        settings: ServerSettings,
        metrics: Metrics,
        table: ModelTable,
        on_status: Callable[[str, bool], None],
        on_withdrawn: Callable[[str, int, str, str], None],
        on_thread_lost: Callable[[bool], None],
        risk: AtRisk,
        board: Scoreboard | None = None,
    ) -> None:
        self._settings, self._metrics, self._table, self._board = settings, metrics, table, board
        self._on_status, self._on_withdrawn, self._risk = on_status, on_withdrawn, risk
        self._on_thread_lost = on_thread_lost
        self._opened: dict[tuple[str, int], Batcher] = {}  # not served yet
        self._reported: set[str] = set()
        self._retiring: set[asyncio.Task[None]] = set()
        self._threads = settings.threads or cores().usable
        self._schedulers: dict[bool, Scheduler] = {}  # by whether it is for the CPU

    @property
    def serves(self) -> bool:
        """Whether there is a model that can be called."""
        return bool(self._table.names)

    async def open(self, version: ProbedVersion) -> str:
        """Open a version, without serving it; return why that is not possible, or an empty text.

        Raises:
            StartError: the required provider is missing.
        """
        settings, limit_s = self._settings, self._settings.load_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                model = await in_thread_of_its_own(lambda: self._open(version))
        except TimeoutError:
            return f"opening it takes longer than {limit_s:g} s, the limit set by --load-timeout-s"
        except ProviderUnavailable as error:
            raise StartError(str(error)) from error
        except (OSError, ValueError) as error:
            return one_line(f"the file cannot be opened: {error}")
        except Exception as error:  # onnxruntime's exceptions have no common root
            return one_line(f"onnxruntime refuses the model: {error}")
        engine = model.engine
        batcher = Batcher(model, engine.largest_batch, settings.max_queue_images, self._metrics, self._scheduler(model))
        self._opened[version.key] = batcher
        self._metrics.model_loads.labels("loaded").inc()
        return ""

    async def serve(self, versions: list[ProbedVersion], served: Served) -> None:
        """Serve these versions, which were opened, and no others."""
        del versions  # they are open
        for key, batcher in list(self._opened.items()):
            if served.digests.get(key) == batcher.model.digest:
                self._put(self._opened.pop(key))
            elif key not in served.opening:
                del self._opened[key]
        for key, batcher in self._table.batchers().items():
            if served.digests.get(key) != batcher.model.digest:
                self._remove(*key, served.withdrawn.get(key))
        self._table.keep_reasons(served.withdrawn)
        self._metrics.files_rejected.labels("models").set(served.rejected)
        self._metrics.files_quarantined.set(served.quarantined)
        self._metrics.repository_unreadable.set(served.unreadable)
        if served.newly_rejected:
            self._metrics.model_loads.labels("rejected").inc(served.newly_rejected)
        self._report(set(served.models))
        await asyncio.to_thread(give_back_memory)

    def withdraw(self, batcher: Batcher, reason: str) -> None:
        """Take a version out of service at once, here and in all other processes.

        Args:
            batcher: the queue of the version; it must refuse new jobs.
            reason: what callers get.
        """
        model = batcher.model
        if self._table.batchers().get((model.name, model.version)) is batcher:  # no other file has taken its place
            self._remove(model.name, model.version, reason)
            self._report(self._reported)
            self._on_withdrawn(model.name, model.version, model.digest, reason)

    async def close(self) -> None:
        """End the schedulers. No caller may be waiting."""
        if self._retiring:
            await asyncio.wait(self._retiring, timeout=_CLOSE_S)
        for scheduler in self._schedulers.values():
            await asyncio.to_thread(scheduler.close)
        self._risk.close()

    def _open(self, version: ProbedVersion) -> ModelVersion:
        """Read and open the file of a version.

        Raises:
            ProviderUnavailable: the required provider is missing.
            OSError: the file cannot be read.
            ValueError: it has changed, or the model does not run as it must on a GPU.
        """
        settings, probed = self._settings, version.probed
        path = settings.models / version.model / str(version.version) / MODEL_FILE_NAME
        source = version.source if os.path.exists(version.source) else path
        card = pb.ModelCard.FromString(base64.b64decode(probed.card))
        # A copy in memory, because the file may change. By its path, because onnxruntime holds Python's lock while it
        # parses bytes, 0.3 s for 400 MB, but not while it parses a file.
        with open(source, "rb") as file, open(os.memfd_create("ganserve-model"), "w+b") as copy:
            if _copy(file, copy, probed.size_bytes) != probed.digest:
                raise ValueError("it has changed since it was checked")
            with self._risk.of(probed.digest, probed.size_bytes, str(path), "opened the file"):
                engine = self._engine(f"/proc/self/fd/{copy.fileno()}", card, probed)

        opened = weakref.ref(engine)  # objects that refer to each other in a circle may never be freed: see gc.freeze

        def proven() -> None:
            if (tried := opened()) is not None:
                tried.trial = None

        engine.trial = self._risk.trial(probed, str(path), proven)
        return ModelVersion.of(version.model, version.version, probed.digest, card, engine)

    def _engine(self, model: str, card: pb.ModelCard, probed: Probed) -> Engine:
        settings, limits = self._settings, batch_limits(self._settings)
        inputs, threads = Inputs.of(card), 1 if probed.one_thread else self._threads
        inputs.truncation = pb.Model(truncation=pb.TruncationEffect.Name(probed.truncation)).truncation
        figures = Figures(**{**probed.figures, "batching": Batching[probed.figures["batching"]]})
        if settings.provider == "cpu" or (settings.provider == "auto" and not nvidia_driver()):
            return Engine(model, inputs, "cpu", threads, limits=limits, figures=figures)
        from ganserve_server.repository.verify import problems_of_images  # imports onnx, which nothing else needs here

        gpu = gpu_options(settings)
        engine = Engine(
            model,
            inputs,
            settings.provider,
            threads,
            batching=figures.batching,
            loops=not figures.image_bytes,  # if the GPU is not used after all: the probe could not measure it either
            limits=limits,
            gpu=gpu,
        )
        if problems := problems_of_images(engine, card):
            raise ValueError("; ".join(problems))
        return engine

    def _put(self, batcher: Batcher) -> None:
        model, engine = batcher.model, batcher.model.engine
        if before := self._table.put(batcher):
            self._retire(before)
        labels = (model.name, str(model.version), model.digest, engine.provider)
        self._metrics.model_info.labels(*labels).set(1)
        self._metrics.model_image_bytes.labels(*labels[:2]).set(engine.image_bytes)

    def _remove(self, name: str, version: int, withdrawn: str | None) -> None:
        if withdrawn is None:
            self._retire(self._table.remove(name, version))
        else:
            self._retire(self._table.withdraw(name, version, withdrawn))
        self._metrics.model_loads.labels("unloaded").inc()

    def _scheduler(self, model: ModelVersion) -> Scheduler:
        """Return the scheduler that shares the cores, or the GPU, among the models."""
        on_cpu = model.engine.on_cpu
        if on_cpu not in self._schedulers:
            self._schedulers[on_cpu] = Scheduler(
                self._threads if on_cpu else 1,
                self._board if on_cpu else None,
                limit_s=self._settings.batch_timeout_s,
                on_overdue=self.withdraw,
                on_lost=functools.partial(self._thread_lost, on_cpu),
            )
        return self._schedulers[on_cpu]

    def _thread_lost(self, on_cpu: bool) -> None:
        self._metrics.threads_lost.inc()
        self._on_thread_lost(on_cpu)

    def _retire(self, batcher: Batcher) -> None:
        model = batcher.model
        labels = (model.name, str(model.version), model.digest, model.engine.provider)
        if self._board:
            self._metrics.model_info.labels(*labels).set(0)  # the memory of workers' metrics has no removal
            self._metrics.model_image_bytes.labels(*labels[:2]).set(0)
        else:
            self._metrics.model_info.remove(*labels)
            self._metrics.model_image_bytes.remove(*labels[:2])
        task = asyncio.create_task(_let_go(batcher))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    def _report(self, known: set[str]) -> None:
        """Report the status of the server, and of each model that is or was in the repository."""
        self._on_status("", bool(self._table.names))
        for name in known | self._reported:
            self._on_status(name, name in self._table)
        self._reported = known
        if self._board is not None:
            self._board.set_models(len(self._table.names))


def _copy(file: IO[bytes], copy: IO[bytes], size_bytes: int) -> str:
    """Copy a file of a known size; return the digest of the copy. More bytes than expected change the digest."""
    digest, left = hashlib.sha256(), size_bytes + 1
    while chunk := file.read(min(left, _CHUNK_BYTES)):
        digest.update(chunk)
        copy.write(chunk)
        left -= len(chunk)
    copy.flush()
    return f"sha256:{digest.hexdigest()}"


async def _let_go(batcher: Batcher) -> None:
    await batcher.retire()
    del batcher  # frees its model, once finished calls are freed
    await asyncio.to_thread(give_back_memory)
