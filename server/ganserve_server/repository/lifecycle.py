"""Decides which versions are served, at the start and whenever the repository changes, without a failed call.

A new version is loaded and verified while the old one serves. Then the new version takes new calls, and the old one
finishes its running calls. A file that breaks a rule is rejected and logged once; the version that was served before
stays.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection
from pathlib import Path

from watchfiles import awatch

from ganserve_server.compute.batching import batch_limits
from ganserve_server.compute.engine import ProviderUnavailable
from ganserve_server.compute.gpu import gpu_options
from ganserve_server.compute.model import ModelVersion
from ganserve_server.errors import ModelNotFound, ModelNotLoaded
from ganserve_server.machine import cores, give_back_memory
from ganserve_server.observe.metrics import Metrics
from ganserve_server.queueing.batcher import Batcher
from ganserve_server.queueing.scheduler import Scheduler
from ganserve_server.repository.scan import MODEL_FILE_NAME, Stamp, look
from ganserve_server.repository.states import VersionState
from ganserve_server.repository.table import ModelTable
from ganserve_server.repository.verify import ModelRejected, load_version
from ganserve_server.settings import ServerSettings
from ganserve_server.shared.scoreboard import Scoreboard

_log = logging.getLogger(__name__)


class Lifecycle:
    """Keeps a table of models in line with the repository.

    Args:
        settings: the server's settings.
        metrics: the metrics of this process.
        table: the served versions; only this class changes it.
        on_status: called with the name of a model, or "" for the server, and whether it is served.
        board: the workers' scoreboard, if there are several workers.
        unloaded: models that an operator has unloaded.
    """

    def __init__(
        self,
        settings: ServerSettings,
        metrics: Metrics,
        table: ModelTable,
        on_status: Callable[[str, bool], None],
        board: Scoreboard | None = None,
        unloaded: Collection[str] = (),
    ) -> None:
        self._board = board
        self._unloaded = set(unloaded)  # by an operator
        self._settings = settings
        self._metrics = metrics
        self._table = table
        self._on_status = on_status
        self._stamps: dict[tuple[str, int], Stamp] = {}  # of files that were loaded or rejected
        self._reasons: dict[tuple[str, int], str] = {}  # why a file was rejected
        self._awaited: set[tuple[str, int]] = set()  # have no file yet; not logged, because a copy may be under way
        self._misplaced: dict[Path, str] = {}  # files that were probably meant as models, and why they are not served
        self._reported: set[str] = set()
        self._refreshing = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()
        self._threads = settings.threads or cores().usable
        self._schedulers: dict[bool, Scheduler] = {}  # by whether it is for the CPU

    async def refresh(self, *, starting: bool = False) -> None:
        """Load new versions, and drop removed ones.

        Raises:
            ProviderUnavailable: CUDA or TensorRT is required and missing; only at the start.
            OSError: the repository cannot be listed; only at the start.
        """
        # One worker at a time: loading measures the models' speed, and the callers of other workers need cores, too.
        async with self._refreshing, self._board.alone() if self._board else contextlib.nullcontext():
            try:
                found, self._awaited, misplaced = await asyncio.to_thread(look, self._settings.models)
            except OSError as error:
                if starting:
                    raise
                _log.error("the repository cannot be listed", extra={"reason": str(error)})
                return
            for path, reason in misplaced.items():
                if self._misplaced.get(path) != reason:
                    _log.warning("model rejected", extra={"path": str(path), "reason": reason})
            self._misplaced = misplaced
            wanted: set[tuple[str, int]] = set()
            for name in sorted({name for name, _ in found} - self._unloaded):
                versions = sorted((number for other, number in found if other == name), reverse=True)
                wanted |= await self._choose(name, versions, found, starting=starting)
            for key in self._table.batchers().keys() - wanted:
                self._retire(self._table.remove(*key))
                self._metrics.model_loads.labels("unloaded").inc()
                _log.info("model unloaded", extra={"model": key[0], "version": key[1]})
            await asyncio.to_thread(give_back_memory)
            self._stamps = {key: stamp for key, stamp in self._stamps.items() if key in found}
            self._reasons = {key: reason for key, reason in self._reasons.items() if key in found}
            self._metrics.files_rejected.labels("models").set(len(self._reasons))
            self._report({name for name, _ in found.keys() | self._awaited})

    async def load(self, name: str) -> list[VersionState]:
        """Load a model from its folder, even if it is already served.

        Raises:
            ModelNotFound: it has no folder.
            ModelNotLoaded: none of its versions can be served.
        """
        self._unloaded.discard(name)
        self._stamps = {key: stamp for key, stamp in self._stamps.items() if key[0] != name}
        states = [state for state in await self.reload() if state.model == name]
        if not states:
            raise ModelNotFound(f"the repository {self._settings.models} has no model {name!r}")
        if not any(state.served for state in states):
            raise ModelNotLoaded(
                f"no version of model {name} can be served: version {states[-1].version}: {states[-1].reason}"
            )
        return states

    async def unload(self, name: str) -> None:
        """Stop serving a model until it is loaded again.

        Raises:
            ModelNotFound: it is not served.
        """
        self._table.find(name, None)
        self._unloaded.add(name)
        await self.refresh()

    async def reload(self) -> list[VersionState]:
        """Load new versions and drop removed ones; return the state of each version in the repository."""
        await self.refresh()
        served = self._table.batchers()
        states: list[VersionState] = []
        for name, number in sorted(self._stamps.keys() | served.keys() | self._reasons.keys() | self._awaited):
            batcher = served.get((name, number))
            digest = batcher.model.digest if batcher else ""
            reason = self._reasons.get((name, number), "")
            if (name, number) in self._awaited:
                reason = f"there is no {MODEL_FILE_NAME} in its folder yet"
            if name in self._unloaded:
                reason = "an operator unloaded it; LoadModel loads it again"
            states.append(VersionState(name, number, batcher is not None, digest, reason))
        return states

    @property
    def serves(self) -> bool:
        """Whether there is a model that can be called."""
        return bool(self._table.names)

    async def watch(self, stop: asyncio.Event) -> None:
        """Refresh whenever something changes in the repository, until `stop` is set."""
        try:
            async for _ in awatch(self._settings.models, stop_event=stop):
                await self.refresh()
        except (OSError, RuntimeError) as error:
            _log.error("the repository is no longer watched; SIGHUP still reloads it", extra={"reason": str(error)})

    async def close(self) -> None:
        """End the schedulers. No caller may be waiting."""
        await asyncio.gather(*self._retiring)
        for scheduler in self._schedulers.values():
            await asyncio.to_thread(scheduler.close)

    def _scheduler(self, model: ModelVersion) -> Scheduler:
        """Return the scheduler that shares the cores, or the GPU, among the models."""
        on_cpu = model.engine.on_cpu
        if on_cpu not in self._schedulers:
            self._schedulers[on_cpu] = Scheduler(self._threads, self._board) if on_cpu else Scheduler(1)
        return self._schedulers[on_cpu]

    async def _choose(
        self, name: str, versions: list[int], found: dict[tuple[str, int], Stamp], *, starting: bool
    ) -> set[tuple[str, int]]:
        """Serve the N newest valid versions, where N is `settings.most_versions`; return them."""
        chosen: set[tuple[str, int]] = set()
        for number in versions:
            if len(chosen) == self._settings.most_versions:
                break
            key = (name, number)
            changed = key not in self._stamps or self._stamps[key] != found[key]
            self._stamps[key] = found[key]
            if changed and (model := await self._load(name, number, starting=starting)):
                settings = self._settings
                engine, scheduler = model.engine, self._scheduler(model)
                batcher = Batcher(model, engine.largest_batch, settings.max_queue_images, self._metrics, scheduler)
                if before := self._table.put(batcher):
                    self._retire(before)
                labels = (name, str(number), model.digest, engine.provider)
                self._metrics.model_info.labels(*labels).set(1)
                self._metrics.model_image_bytes.labels(name, str(number)).set(engine.image_bytes)
                if not starting:
                    how = {
                        "digest": model.digest,
                        "batching": engine.batching.value,
                        "image_mib": round(engine.image_bytes / (1 << 20), 3),
                        "largest_batch": engine.largest_batch,
                    }
                    _log.info("model loaded", extra={"model": name, "version": number, **how})
            # If a file was replaced by a bad one, rather than removed, the version that is loaded stays.
            if found[key] is not None and key in self._table.batchers():
                chosen.add(key)
        return chosen

    async def _load(self, name: str, number: int, *, starting: bool) -> ModelVersion | None:
        settings, path = self._settings, self._settings.models / name / str(number) / MODEL_FILE_NAME
        try:
            model = await asyncio.to_thread(
                load_version,
                name,
                number,
                path,
                max_model_mib=settings.max_model_mib,
                provider=settings.provider,
                threads=self._threads,
                limits=batch_limits(settings),
                gpu=gpu_options(settings),
            )
        except (ModelRejected, ProviderUnavailable) as error:
            if starting and isinstance(error, ProviderUnavailable):
                raise
            reason = str(error)
            _log.error("model rejected", extra={"path": str(path), "reason": reason})
        except Exception:
            # An untrusted file must not affect other models, whatever exception it causes in the libraries.
            reason = "the file could not be read"
            _log.exception("model rejected", extra={"path": str(path), "reason": reason})
        else:
            self._reasons.pop((name, number), None)
            self._metrics.model_loads.labels("loaded").inc()
            return model
        self._reasons[name, number] = reason
        self._metrics.model_loads.labels("rejected").inc()
        return None

    def _retire(self, batcher: Batcher) -> None:
        model = batcher.model
        labels = (model.name, str(model.version), model.digest, model.engine.provider)
        if self._board:
            self._metrics.model_info.labels(*labels).set(0)  # prometheus-client's multiprocess mode has no removal
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


async def _let_go(batcher: Batcher) -> None:
    await batcher.retire()
    del batcher  # frees its model, once finished calls are freed
    await asyncio.to_thread(give_back_memory)
