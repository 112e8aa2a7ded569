"""Calls for a look at the repository when something may have changed there.

The kernel reports changes of folders, not of paths: it says nothing if a link on the way to a folder is set to another
folder, or if a folder is removed and created again. So the folders are found anew before each look, also those that
contain the links. Some file systems report no changes (NFS, FUSE), and the kernel limits how many folders a user may
watch, so there is a look every few seconds in any case. No error ends the watch.

The class of watchfiles that is used here is private; `tests/server/test_watching.py` fails, and names the version, if
it has changed. The public functions begin to watch only when they wait, so a change during a look would be missed.
"""

import asyncio
import contextlib
import errno
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from watchfiles._rust_notify import RustNotify

from ganserve_server.repository.scan import MODEL_FILE_NAME, is_model_name, is_version
from ganserve_server.repository.threads import LOOK_TIMEOUT_S, Limited

_log = logging.getLogger(__name__)

_SOON_S = 0.5  # until the next look, if folders have come or gone during a look
_QUIET_MS, _DEBOUNCE_MS = 100, 1600  # changes are reported together, after a pause or at the latest after a time
_MOST_LINKS = 40  # on the way to one path, as in the kernel

Places = dict[Path, set[str] | None]  # folders, each with the names in it whose changes matter; None: all


class Watch:
    """Calls for a look at the start, at each change, and at least every few seconds.

    Args:
        repository: the repository's folder. It may be a link, be missing, and change into another folder.
        look: looks at the repository; returns in how many seconds it wants to look again at the latest.
        every_s: the longest time between two looks.
    """

    def __init__(self, repository: Path, look: Callable[[], Awaitable[float]], every_s: float) -> None:
        self._repository, self._look, self._every_s = repository, look, every_s
        self._find_places = Limited(lambda: find_places(repository), LOOK_TIMEOUT_S)
        self._problems: dict[str, str] = {}  # what was logged, by event

    async def run(self, stop: asyncio.Event) -> None:
        """Watch until `stop` is set."""
        stopped = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                await self._look_and_wait(stopped)
        finally:
            stopped.cancel()

    async def _look_and_wait(self, stopped: "asyncio.Task[bool]") -> None:
        within_s, places, notify = self._every_s, Places(), None
        with self._logged("the kernel does not report changes of the repository", every_s=self._every_s):
            places = await self._find_places()
            try:
                notify = await asyncio.to_thread(_notify, places)  # before the look, so that no change is missed
            except FileNotFoundError:  # a folder has gone meanwhile
                within_s = min(within_s, _SOON_S)
        with self._logged("a look at the repository failed"):
            within_s = min(within_s, await self._look())
            if places != await self._find_places():
                within_s = min(within_s, _SOON_S)
        if notify is None:
            await asyncio.wait((stopped,), timeout=within_s)
            return
        ended = threading.Event()
        changed = asyncio.create_task(asyncio.to_thread(_wait_for_change, notify, places, ended))
        try:
            await asyncio.wait((stopped, changed), timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.set()
            await asyncio.wait((changed,))
        with self._logged("waiting for changes of the repository failed"):
            changed.result()
            return
        await asyncio.wait((stopped,), timeout=within_s)

    @contextlib.contextmanager
    def _logged(self, event: str, **facts: float) -> Iterator[None]:
        """Log an exception, once as long as it repeats, and go on."""
        try:
            yield
        except Exception as error:
            if self._problems.get(event) != str(error):
                unexpected = not isinstance(error, OSError | RuntimeError)
                _log.error(event, extra={"reason": str(error), **facts}, exc_info=unexpected)
            self._problems[event] = str(error)
        else:
            self._problems.pop(event, None)


def find_places(repository: Path) -> Places:
    """Return the folders whose changes may change what the repository contains."""
    places = Places()
    root = _follow(Path("/"), repository.relative_to("/"), places)
    for name in _entries(root, places):
        if is_model_name(name):
            folder = _follow(root, Path(name), places)
            for number in _entries(folder, places):
                if is_version(number):
                    version = _follow(folder, Path(number), places)
                    if os.path.isdir(version):
                        places[version] = None
                        _follow(version, Path(MODEL_FILE_NAME), places)
    return places


def _entries(folder: Path, places: Places) -> list[str]:
    try:
        entries = os.listdir(folder)
    except OSError:
        return []
    places[folder] = None
    return entries


def _follow(folder: Path, path: Path, places: Places) -> Path:
    """Follow a path from a folder, which has no links on the way to it; return where it leads.

    Add the folders of all links on the way, and of the end, or of the first name that does not exist.
    """
    left = list(reversed(path.parts))
    links = 0
    while left:
        if (name := left.pop()) == "..":
            folder = folder.parent
            continue
        here = folder / name
        try:
            target = Path(os.readlink(here))
        except OSError as error:
            if error.errno == errno.EINVAL and left:  # no link
                folder = here
                continue
            _add(places, here)
            return here
        _add(places, here)
        links += 1
        if links > _MOST_LINKS:
            return here
        if target.is_absolute():
            folder, target = Path("/"), target.relative_to("/")
        left += reversed(target.parts)
    return folder


def _add(places: Places, path: Path) -> None:
    names = places.setdefault(path.parent, set())
    if names is not None:
        names.add(path.name)


def _notify(places: Places) -> RustNotify:
    """Begin to watch the folders.

    Raises:
        OSError: the kernel cannot watch a folder, for example because of its limit.
    """
    return RustNotify(
        [str(folder) for folder in places],
        debug=False,
        force_polling=False,
        poll_delay_ms=0,
        recursive=False,
        ignore_permission_denied=True,
    )


def _wait_for_change(notify: RustNotify, places: Places, ended: threading.Event) -> None:
    """Wait for a change that matters, or for `ended`."""
    with notify:
        while not ended.is_set():
            changes = notify.watch(_DEBOUNCE_MS, _QUIET_MS, 0, ended)
            if isinstance(changes, set) and any(_matters(Path(path), places) for _, path in changes):
                return


def _matters(path: Path, places: Places) -> bool:
    if path in places:  # a folder itself, which may have been removed
        return True
    names = places.get(path.parent, set())
    return names is None or path.name in names
