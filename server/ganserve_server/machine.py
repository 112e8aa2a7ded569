"""The cores, the memory and the file descriptors that this process may use."""

import contextlib
import ctypes
import gc
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60  # cgroups of version 1 report this or more if there is no limit
# In memory.stat: what the kernel frees before it refuses memory. Version 1 has sums of all groups below, total_….
_RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")


@dataclass(frozen=True, slots=True)
class Cores:
    """The number of cores, and the limits on how many this process may use."""

    machine: int
    affinity: int
    quota: float | None  # of the cgroup, in cores; None is no limit

    @property
    def usable(self) -> int:
        """The affinity, or the quota rounded up if that is less."""
        return self.affinity if self.quota is None else max(1, min(self.affinity, -int(-self.quota // 1)))


def cores() -> Cores:
    """Count the cores."""
    machine = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    quotas = [quota for group in _cgroups("cpu") if (quota := _quota(group)) is not None]
    return Cores(machine, affinity, min(quotas, default=None))


def memory_limit() -> int | None:
    """Return the cgroup's limit in bytes; None is no limit."""
    limits = [_NO_LIMIT]
    for group in _cgroups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((group / name).read_text()))
    return None if (limit := min(limits)) == _NO_LIMIT else limit


def processes_killed_for_memory() -> int | None:
    """Return how many processes of the machine the kernel has killed since its start because memory was short.

    This includes the limits of cgroups. None: the kernel does not count them.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return None


def memory_left() -> int:
    """Return how many more bytes this process can take: of the machine's memory, and of the limit of each cgroup."""
    left = [_NO_LIMIT]
    with contextlib.suppress(OSError, ValueError):
        left += [kib << 10 for name, kib in _fields(Path("/proc/meminfo")) if name == "MemAvailable:"]
    for group in _cgroups("memory"):
        for most, taken in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):
                limit = int((group / most).read_text())  # "max" is no limit, and raises ValueError
                used = int((group / taken).read_text())
                cache = dict(_fields(group / "memory.stat"))
                used -= sum(cache.get(f"total_{kind}", cache.get(kind, 0)) for kind in _RECLAIMABLE)
                left.append(limit - max(used, 0))
    return max(0, min(left))


def _fields(file: Path) -> list[tuple[str, int]]:
    """Return the names and numbers of a file that has a pair in each line."""
    return [(row[0], int(row[1])) for row in map(str.split, file.read_text().splitlines())]


def _cgroups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and of its ancestors, which also limit it; for version 2 or 1."""
    with contextlib.suppress(OSError, ValueError):
        for line in _OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                root = _CGROUPS / (controller if controllers else "")
                own = root / path.lstrip("/")
                yield from (own, *(above for above in own.parents if above.is_relative_to(root)))


def _quota(group: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)  # the quota "max" is no limit, and raises ValueError
    with contextlib.suppress(OSError, ValueError):
        quota_us, period_us = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota_us / period_us if quota_us > 0 else None
    return None


def raise_open_files_limit() -> int:
    """Raise this process's limit on open files as far as it may; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return _NO_LIMIT if soft == resource.RLIM_INFINITY else soft


def free_descriptors() -> int:
    """Return how many more files this process may open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        opened = len(os.listdir("/proc/self/fd"))
    except OSError:  # there is not even one
        return 0
    return _NO_LIMIT if limit == resource.RLIM_INFINITY else max(0, limit - opened)


def give_back_memory() -> None:
    """Collect garbage, and make the C library return its free memory to the system.

    Reading a model takes several times its size for a moment.
    """
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Make the C library return its free memory to the system, in less than a millisecond if it has little."""
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
