"""Decides which versions are served, at the start and whenever the repository changes, without a failed call.

One process decides: the only one, or the supervisor. A new file is probed in a process of its own (`prober`), and only
a file that passed is opened where calls are answered (`served`). A new version is opened in all of these processes
before it takes new calls; the old one finishes its running calls. A file that breaks a rule is rejected and logged
once; the version that was served before stays.
"""

import asyncio
import contextlib
import hashlib
import logging
import math
import os
import stat
from collections.abc import Coroutine, Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any

from ganserve_server.errors import ModelNotFound, ModelNotLoaded, Unavailable
from ganserve_server.machine import memory_left
from ganserve_server.repository.changes import UNKNOWN, Changes
from ganserve_server.repository.probed import Probed, one_line
from ganserve_server.repository.prober import Prober
from ganserve_server.repository.scan import MODEL_FILE_NAME, Key, Stamp, look
from ganserve_server.repository.state_folder import StateFolder
from ganserve_server.repository.states import ProbedVersion, Served, Servers, VersionState
from ganserve_server.repository.threads import LOOK_TIMEOUT_S, Limited
from ganserve_server.settings import ServerSettings
from ganserve_server.spelling import nearest
from ganserve_server.start_errors import StartError

_log = logging.getLogger(__name__)

_LONG_S = 5.0  # a probe that takes longer is logged, also at the start
_MORE = 1.25  # times the memory with which a probe failed: then it is tried again
_UNTIL = "it is not loaded again until the file changes, or an operator loads it (`ganserve-server admin load {}`)"
_MAX_REPORTED = 10  # paths that cannot be read, of one look


class Lifecycle:
    """Keeps the served versions in line with the repository.

    Args:
        settings: the server's settings.
        state: what is known of files from before.
        prober: checks new files; its process may have been started.
    """

    def __init__(self, settings: ServerSettings, state: StateFolder, prober: Prober) -> None:
        self._settings, self._state, self._prober = settings, state, prober
        self._servers: asyncio.Future[Servers] = asyncio.get_running_loop().create_future()
        self._served: dict[Key, ProbedVersion] = {}
        # Their files, held open: a worker that starts later opens the same bytes, though the file was replaced.
        self._files: dict[Key, BufferedReader] = {}
        self._opening: set[Key] = set()
        self._unloaded: set[str] = set()  # by an operator
        self._stamps: dict[Key, Stamp] = {}  # of files that were loaded or rejected
        self._reasons: dict[Key, str] = {}  # why a file was rejected
        self._short: dict[Key, int] = {}  # the memory that files need, or that was not enough for their probe
        self._quarantined: set[Key] = set()
        self._withdrawn: dict[Key, str] = {}  # whose batch did not end, each with the reason
        self._newly_rejected = 0
        self._models: set[str] = set()  # in the repository
        self._changes = Changes(settings.models)
        self._look = Limited(lambda: look(settings.models), LOOK_TIMEOUT_S)
        self._notes: dict[Key, str] = {}  # why a version is not as in the repository; not logged
        self._unreadable: dict[Path, str] = {}  # what cannot be read, and why
        self._misplaced: dict[Path, str] = {}  # files that were probably meant as models, and why they are not served
        self._refreshing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        if state.problem:
            _log.warning(
                "files that end a process are not remembered: there is no folder for it; set --state-dir",
                extra={"reason": state.problem},
            )

    async def start(self) -> None:
        """Load all models. The processes that serve them may be made known meanwhile, by `serve_by`.

        Raises:
            StartError: no model can be served, or the required provider is missing.
        """
        self._state.collect_deaths()
        try:
            await self._refresh(settled=True, starting=True)
        except OSError as error:
            reason = f"the model repository {self._settings.models} cannot be listed: {error.strerror}"
            raise StartError(reason) from error
        if not self._served:
            raise StartError(
                f"{self._settings.models} has no model that can be served: the log has the reason for each file"
            )

    def serve_by(self, servers: Servers) -> None:
        """Take the processes that serve what this class decides."""
        self._servers.set_result(servers)

    async def refresh(self) -> None:
        """Load new versions, and drop removed ones; look twice before the last version of a model is dropped.

        Raises:
            Unavailable: the server ends.
        """
        # A task of its own: whoever asked for it, for example an operator, may disconnect.
        task = self._begin(self._look_twice())
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise Unavailable("the server shuts down; ask another one") from None
            raise

    async def load(self, name: str) -> list[VersionState]:
        """Load a model from its folder, even if it is already served or quarantined.

        Raises:
            ModelNotFound: it has no folder.
            ModelNotLoaded: none of its versions can be served.
        """
        self._unloaded.discard(name)
        async with self._refreshing:
            for key in [key for key in self._stamps if key[0] == name]:
                self._stamps[key] = UNKNOWN
                self._short.pop(key, None)
                if key in self._quarantined:
                    with contextlib.suppress(OSError):  # the reload reports it
                        self._state.release(await asyncio.to_thread(_digest, self._path(key)))
        states = [state for state in await self.reload() if state.model == name]
        if not states:
            raise ModelNotFound(f"the repository {self._settings.models} has no model {name!r}")
        if not any(state.served for state in states):
            raise ModelNotLoaded(
                f"no version of model {name} can be served: version {states[-1].version}: {states[-1].reason}"
            )
        return states

    async def unload(self, name: str) -> None:
        """Stop serving a model until it is loaded again; do not wait for files that are being probed.

        Raises:
            ModelNotFound: it is not served.
        """
        names = sorted({model for model, _ in self._served.keys() | self._withdrawn.keys()})
        if name not in names:
            raise ModelNotFound(
                f"there is no model {name!r}; there are {', '.join(names) or 'none at all'}{nearest(name, names)}"
            )
        self._unloaded.add(name)
        await self._drop([key for key in self._served if key[0] == name])

    async def reload(self) -> list[VersionState]:
        """Load new versions and drop removed ones; return the state of each version in the repository."""
        await self.refresh()
        states: list[VersionState] = []
        for name, number in sorted(
            self._stamps.keys() | self._served.keys() | self._reasons.keys() | self._notes.keys()
        ):
            version = self._served.get((name, number))
            reason = self._notes.get((name, number)) or self._reasons.get((name, number), "")
            if name in self._unloaded:
                reason = "an operator unloaded it; LoadModel loads it again"
            digest = version.probed.digest if version else ""
            states.append(VersionState(name, number, version is not None, digest, one_line(reason)))
        return states

    async def withdraw(self, name: str, number: int, digest: str, reason: str) -> None:
        """Stop serving a version in all processes; load its file again if it changes, or if an operator loads it."""
        key = (name, number)
        if (version := self._served.get(key)) and version.probed.digest == digest:
            self._withdrawn[key] = self._reasons[key] = reason
            await self._drop([key])
            self._begin(self._look_twice())  # an older version may take its place

    async def unopened(self, version: ProbedVersion, reason: str) -> None:
        """Stop serving a version that a process which started later cannot open: all serve the same."""
        if self._served.get(version.key) == version:
            self._reject(version.key, f"a worker that started later cannot open it: {reason}")
            await self._drop([version.key])

    async def process_ended(self, pid: int, status: int) -> None:
        """Quarantine the files that probably ended a process that served them."""
        await self._drop_quarantined(await asyncio.to_thread(self._state.collect_deaths, pid, status))

    async def watch(self, stop: asyncio.Event) -> None:
        """Refresh whenever something may have changed in the repository, until `stop` is set."""
        from ganserve_server.repository.watching import Watch  # late, because a supervisor starts its workers first

        await Watch(self._settings.models, self._refresh, self._settings.reload_interval_s).run(stop)

    async def close(self) -> None:
        """Stop loading."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._prober.close()
        for key in list(self._files):
            self._close_file(key)

    @property
    def names(self) -> list[str]:
        """The names of the served models, in alphabetical order."""
        return sorted({name for name, _ in self._served})

    async def _look_twice(self) -> None:
        if math.isfinite(again_s := await self._refresh(settled=True)):
            await asyncio.sleep(again_s)
            await self._refresh(settled=True)

    async def _refresh(self, *, settled: bool = False, starting: bool = False) -> float:
        """Look once; return in how many seconds another look may decide more."""
        async with self._refreshing:
            misplaced, served = self._misplaced, self._served.keys()
            try:
                seen = await self._look()
            except OSError as error:
                if starting:
                    raise
                decision = self._changes.blind(error, self._stamps, served)
            else:
                decision = self._changes.decide(seen, self._stamps, served, settled=settled)
                misplaced = seen.misplaced
            found, self._notes = decision.found, decision.notes
            self._report_unreadable(decision.unreadable)
            for path, reason in misplaced.items():
                if self._misplaced.get(path) != reason:
                    _log.warning("model rejected", extra={"path": str(path), "reason": reason})
            self._misplaced = misplaced
            self._models = {name for name, _ in found.keys() | self._notes.keys()}
            wanted: set[Key] = set()
            try:
                for name in sorted({name for name, _ in found} - self._unloaded):
                    versions = sorted((number for other, number in found if other == name), reverse=True)
                    wanted |= await self._choose(name, versions, found, starting=starting)
            finally:
                await self._prober.close()
            self._stamps = {key: stamp for key, stamp in self._stamps.items() if key in found}
            self._reasons = {key: reason for key, reason in self._reasons.items() if key in found}
            self._short = {key: size for key, size in self._short.items() if key in found}
            self._quarantined &= found.keys()
            self._withdrawn = {key: reason for key, reason in self._withdrawn.items() if key in found}
            await self._drop(sorted(self._served.keys() - wanted))
            return decision.again_s

    async def _choose(self, name: str, versions: list[int], found: dict[Key, Stamp], *, starting: bool) -> set[Key]:
        """Serve the N newest valid versions, where N is `settings.most_versions`; return them."""
        chosen: set[Key] = set()
        for number in versions:
            if len(chosen) == self._settings.most_versions:
                break
            key = (name, number)
            stamp = self._stamps.get(key, UNKNOWN)
            changed = stamp != found[key] and (stamp == UNKNOWN or not await self._serves_content(key))
            if changed:
                self._short.pop(key, None)
                self._quarantined.discard(key)
            self._stamps[key] = found[key]
            again = key in self._short and await asyncio.to_thread(memory_left) > self._short[key]
            if (changed or again) and name not in self._unloaded:
                await self._load(key, starting=starting)
            # If a file was replaced by a bad one, rather than removed, the version that is loaded stays.
            if found[key] is not None and key in self._served:
                chosen.add(key)
        return chosen

    async def _serves_content(self, key: Key) -> bool:
        """Return whether a new file has the content that is served, as after a swap of a link to the repository."""
        if not (version := self._served.get(key)):
            return False
        with contextlib.suppress(OSError):  # the probe reports it
            if await asyncio.to_thread(_digest, self._path(key)) == version.probed.digest:
                self._reasons.pop(key, None)
                return True
        return False

    async def _load(self, key: Key, *, starting: bool) -> None:
        """Probe a file, and have it opened and served if it passes."""
        path = self._path(key)
        if not starting:
            _log.info("model loading", extra={"path": str(path)})
        try:
            probed, reason = await self._probed(key, path, gently=not starting), ""
        except OSError as error:
            self._reject(key, f"the process that checks files cannot be started: {error.strerror}")
            self._stamps[key] = UNKNOWN  # the next look tries again
            return
        if probed.outcome == "unreadable":
            self._stamps[key] = UNKNOWN  # the next look tries again
            if self._reasons.get(key) == probed.reason:
                return
        if probed.outcome != "passed":
            self._reject(key, await asyncio.to_thread(self._why_not, key, path, probed))
            return
        for message, why in probed.warnings:
            _log.warning(message, extra={"path": str(path), "reason": why})
        servers = await self._servers
        left, needed = await asyncio.to_thread(memory_left), probed.opening_bytes(servers.processes)
        if needed > left:
            self._short[key] = needed
            self._reject(
                key,
                f"opening the model takes {needed >> 20} MiB of memory in {servers.processes} processes, and "
                f"{left >> 20} MiB are left of the machine's memory and of the cgroup's limit: export a smaller model, "
                "raise the limit, or use fewer --workers",
            )
            return
        try:
            file = await asyncio.to_thread(_opened, path)
        except OSError as error:
            self._reject(key, f"the file cannot be read: {error.strerror or error}")
            return
        version = ProbedVersion(*key, probed, f"/proc/{os.getpid()}/fd/{file.fileno()}")
        try:
            reason = await self._open(version, starting=starting)
            if reason or key[0] in self._unloaded:  # meanwhile, by an operator
                file.close()
        except BaseException:
            file.close()
            raise
        if reason:
            self._reject(key, reason)
        if file.closed:
            return
        self._reasons.pop(key, None)
        self._withdrawn.pop(key, None)
        self._close_file(key)
        self._served[key], self._files[key] = version, file
        if not starting:
            await self._serve()
            how = {
                "digest": probed.digest,
                "batching": probed.report["batching"],
                "image_mib": round(probed.figures["image_bytes"] / (1 << 20), 3),
                "largest_batch": probed.largest_batch,
            }
            _log.info("model loaded", extra={"model": key[0], "version": key[1], **how})

    async def _open(self, version: ProbedVersion, *, starting: bool) -> str:
        """Have a version opened where calls are answered; return why that is not possible, or an empty text.

        Raises:
            StartError: the required provider is missing; only at the start.
        """
        servers = await self._servers
        self._opening.add(version.key)
        try:
            reason = await servers.open(version)
        except StartError as error:
            if starting:
                raise
            reason = str(error)
        finally:
            self._opening.discard(version.key)
        if mark := self._mark(version.probed.digest):
            return self._of_quarantine(version.key, mark)
        return reason

    def _close_file(self, key: Key) -> None:
        if file := self._files.pop(key, None):
            file.close()

    async def _probed(self, key: Key, path: Path, *, gently: bool) -> Probed:
        """Return what a probe found, now or when it probed the same file before."""
        if kept := await asyncio.to_thread(self._kept, key, path):
            return kept
        slow = asyncio.get_running_loop().call_later(
            _LONG_S, _log.info, "checking a model file takes long", {"path": str(path)}
        )
        try:
            probed = await self._prober.probe(path, gently=gently)
        finally:
            slow.cancel()
        if probed.outcome == "passed" and not probed.warnings:  # such as a full disk, which may have room next time
            await asyncio.to_thread(self._state.keep, probed)
        return probed

    def _kept(self, key: Key, path: Path) -> Probed | None:
        """Return what is known of a file from before, if anything."""
        with contextlib.suppress(OSError):  # the probe reports it
            size = path.stat().st_size
            known = self._state.has_passed or size in self._state.marked_sizes()
            if known and size <= self._settings.max_model_mib << 20:
                digest = _digest(path)
                if mark := self._mark(digest):
                    return Probed("rejected", [self._of_quarantine(key, mark)], digest=digest)
                return self._state.passed(digest)
        return None

    def _why_not(self, key: Key, path: Path, probed: Probed) -> str:
        """Return why a file that did not pass is rejected; quarantine it if it ended the probe, or kept it busy."""
        if probed.outcome == "memory":
            self._short[key] = int(_MORE * memory_left())
        if probed.outcome not in ("died", "timeout"):
            return probed.reason
        with contextlib.suppress(OSError):
            digest = _digest(path)
            limit_s = self._settings.load_timeout_s if probed.outcome == "timeout" else None
            self._state.quarantine(digest, path.stat().st_size, str(path), probed.reason, limit_s=limit_s)
            self._quarantined.add(key)
        return f"{probed.reason}; {_UNTIL.format(key[0])}"

    def _mark(self, digest: str) -> dict[str, Any] | None:
        """Return why a file is quarantined, or None; a file that took too long is tried again with a longer limit."""
        mark = self._state.quarantined(digest)
        limit_s = (mark or {}).get("limit_s")
        return None if limit_s is not None and limit_s < self._settings.load_timeout_s else mark

    def _of_quarantine(self, key: Key, mark: dict[str, Any]) -> str:
        self._quarantined.add(key)
        return f"quarantined at {mark['since']}: {mark['reason']}; {_UNTIL.format(key[0])}"

    def _report_unreadable(self, unreadable: dict[Path, str]) -> None:
        new = [path for path, reason in unreadable.items() if self._unreadable.get(path) != reason]
        for path in new[:_MAX_REPORTED]:
            more = {"more_paths": len(new) - _MAX_REPORTED} if len(new) > _MAX_REPORTED else {}
            _log.error("cannot read the repository", extra={"path": str(path), "reason": unreadable[path], **more})
        if self._unreadable and not unreadable:
            _log.info("can read the repository again", extra={"path": str(self._settings.models)})
        self._unreadable = unreadable

    def _reject(self, key: Key, reason: str) -> None:
        self._reasons[key] = reason
        self._newly_rejected += 1
        _log.error("model rejected", extra={"path": str(self._path(key)), "reason": reason})

    async def _drop(self, keys: Iterable[Key]) -> None:
        """Serve all versions but these."""
        dropped = [key for key in keys if self._served.pop(key, None)]
        await self._serve()
        for key in dropped:
            self._close_file(key)
        for name, number in dropped:
            _log.info("model unloaded", extra={"model": name, "version": number})

    async def _drop_quarantined(self, digests: Iterable[str]) -> None:
        """Stop serving files that are quarantined now, and serve other versions instead where there are any."""
        dropped = {
            key: self._state.quarantined(version.probed.digest)
            for key, version in self._served.items()
            if version.probed.digest in set(digests)
        }
        for key, mark in dropped.items():
            self._reasons[key] = self._of_quarantine(key, mark or {})
            self._newly_rejected += 1
            _log.error("model quarantined", extra={"path": str(self._path(key)), "reason": self._reasons[key]})
        if dropped:
            await self._drop(dropped)
            self._begin(self._look_twice())

    async def _serve(self) -> None:
        """Have all processes serve what is decided."""
        servers = await self._servers
        newly, self._newly_rejected = self._newly_rejected, 0
        served = Served(
            {key: version.probed.digest for key, version in self._served.items()},
            sorted(self._opening),
            sorted(self._models | set(self.names)),
            len(self._reasons),
            newly,
            len(self._quarantined),
            len(self._unreadable),
            self._withdrawn,
        )
        await servers.serve(list(self._served.values()), served)

    def _begin(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Do some work in a task that `close` ends."""
        self._tasks.add(task := asyncio.create_task(work))
        task.add_done_callback(self._tasks.discard)
        return task

    def _path(self, key: Key) -> Path:
        return self._settings.models / key[0] / str(key[1]) / MODEL_FILE_NAME


def _opened(path: Path) -> BufferedReader:
    """Open a file.

    Raises:
        OSError: it cannot be read, is empty, or is no regular file, such as a pipe, which would never end.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or not status.st_size:  # a file of /proc has no size, and may never end
        file.close()
        raise OSError("it is not a regular file, or empty")
    return file


def _digest(path: Path) -> str:
    with _opened(path) as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
