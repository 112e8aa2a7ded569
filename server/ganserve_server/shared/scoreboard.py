"""How busy each worker process is, in shared memory, and which worker accepts the next connection."""

import asyncio
import mmap
import time

_CELL_BYTES = 8
# For each worker: its connections, its running batches, its running calls, its models, the connections it has accepted,
# its connections that had a call recently, and the time of its last beat.
_CELLS = 7
_ABSENT = 1 << 60  # connections of a worker that cannot accept any
_PATIENCE_S = 0.05  # before a worker that has fewer connections and does not accept the next counts as stalled
_POLL_S, _LOAD_TIMEOUT_S = 0.005, 5.0


def scoreboard_bytes(workers: int) -> int:
    """Return how much memory a scoreboard needs."""
    return workers * _CELLS * _CELL_BYTES


class Scoreboard:
    """Memory that all workers see: how busy each of them is. A worker writes only its own cells.

    Args:
        descriptor: the shared memory, of `scoreboard_bytes`.
        workers: the number of workers.
        mine: the index of this worker.
    """

    def __init__(self, descriptor: int, workers: int, mine: int) -> None:
        self._cells = memoryview(mmap.mmap(descriptor, scoreboard_bytes(workers))).cast("q")
        self._mine = mine
        self.workers = workers
        self._others = [number for number in range(workers) if number != mine]

    def set_connections(self, count: int) -> None:
        """Publish how many connections this worker has."""
        self._cells[self._mine * _CELLS] = count

    def set_running(self, batches: int) -> None:
        """Publish how many batches this worker computes."""
        self._cells[self._mine * _CELLS + 1] = batches

    def set_calls(self, calls: int) -> None:
        """Publish how many calls this worker answers."""
        self._cells[self._mine * _CELLS + 2] = calls

    def set_models(self, count: int) -> None:
        """Publish how many models this worker serves."""
        self._cells[self._mine * _CELLS + 3] = count

    @property
    def mine(self) -> int:
        """This worker's number of connections in use."""
        return self._in_use(self._mine)

    def set_in_use(self, count: int) -> None:
        """Publish how many of this worker's connections had a call recently, or are new."""
        self._cells[self._mine * _CELLS + 5] = count

    def _in_use(self, worker: int) -> int:
        first = worker * _CELLS
        return _ABSENT if self._cells[first] == _ABSENT else self._cells[first + 5]

    def set_accepted(self, connections: int) -> None:
        """Publish how many connections this worker has accepted since it started."""
        self._cells[self._mine * _CELLS + 4] = connections

    def set_beat(self, time_ns: int) -> None:
        """Publish when this worker's event loop ran last; 0: it does not beat any more."""
        self._cells[self._mine * _CELLS + 6] = time_ns

    def beat_of(self, worker: int) -> int:
        """Return when a worker's event loop ran last, in nanoseconds by time.monotonic_ns; 0: it does not beat."""
        return self._cells[worker * _CELLS + 6]

    def load(self) -> tuple[int, int]:
        """Return the connections and the calls of all present workers, added up."""
        cells = self._cells
        present = [one for one in range(0, self.workers * _CELLS, _CELLS) if cells[one] != _ABSENT]
        return sum(cells[one] for one in present), sum(cells[one + 2] for one in present)

    def serving(self) -> int:
        """Count the present workers that have a model."""
        cells = self._cells
        return sum(cells[one] != _ABSENT and cells[one + 3] > 0 for one in range(0, self.workers * _CELLS, _CELLS))

    def others_serving(self) -> bool:
        """Return whether any other worker has a model."""
        cells = self._cells
        firsts = [other * _CELLS for other in self._others]
        return any(cells[one] != _ABSENT and cells[one + 3] > 0 for one in firsts)

    def connections(self) -> dict[int, int]:
        """Return how many connections in use each of the other workers has."""
        return {other: self._in_use(other) for other in self._others}

    def accepted(self) -> dict[int, int]:
        """Return how many connections each of the other workers has accepted since it started."""
        return {other: self._cells[other * _CELLS + 4] for other in self._others}

    async def all_loaded(self) -> None:
        """Wait until the others have loaded their models: otherwise the first to serve gets all waiting connections."""
        until = time.monotonic() + _LOAD_TIMEOUT_S
        models = [worker * _CELLS + 3 for worker in self._others]
        while not all(self._cells[cell] for cell in models) and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)  # processes share no Event

    def others_running(self) -> int:
        """Count the batches that the other workers compute."""
        return sum(self._cells[other * _CELLS + 1] for other in self._others)

    def absent(self, worker: int) -> None:
        """Record that a worker is not there; only the supervisor calls this."""
        self._cells[worker * _CELLS] = _ABSENT
        for cell in range(1, _CELLS):
            self._cells[worker * _CELLS + cell] = 0


class AcceptOrder:
    """Decides which worker accepts next: the one with the fewest connections, skipping stalled workers."""

    def __init__(self, board: Scoreboard) -> None:
        self._board = board
        self._accepted = 0
        self._since = self._asked = 0.0
        # Workers, each with the number of connections that it had accepted at that time.
        self._waited_for: dict[int, int] = {}
        self._stalled: dict[int, int] = {}

    def accepted(self) -> None:
        """Count a connection that this worker accepted."""
        self._accepted += 1
        self._board.set_accepted(self._accepted)

    def may_accept(self) -> bool:
        """Return whether this worker may accept the waiting connection; if not, ask again soon."""
        now, accepted = time.monotonic(), self._board.accepted()
        self._stalled = {worker: count for worker, count in self._stalled.items() if accepted[worker] == count}
        candidates = {
            worker: count for worker, count in self._board.connections().items() if worker not in self._stalled
        }
        fewest = min(candidates.values(), default=_ABSENT)
        if fewest >= self._board.mine:
            self._waited_for = {}
            return True
        pause = now - self._asked > 2 * _PATIENCE_S
        progress = any(accepted[worker] != count for worker, count in self._waited_for.items())
        if pause or not self._waited_for or progress:
            self._since = now  # the waiting connection is another one
        self._asked = now
        self._waited_for = {worker: accepted[worker] for worker, count in candidates.items() if count == fewest}
        if now - self._since >= _PATIENCE_S:
            self._stalled |= self._waited_for
            self._waited_for = {}
        return False
