"""What peers make the server keep in memory: who holds how much, how much in all, and who loses it first.

Each kept byte belongs to one `Holding`, and each holding to one pool and one share of it: its caller's or connection's.
`Holding.resize` is the only place that changes these counts, so that they cannot drift apart.
"""

import time
from collections.abc import Callable, Hashable, Iterator

Evict = Callable[[], object]

_LEAST_AGE_S, _MOST_AGE_S = 0.01, 60.0  # of what is weighed


class Holding:
    """What one owner keeps.

    Args:
        pool: where it counts.
        key: whose share of the pool it is.
        evict: called when the owner must give up what it keeps; afterwards the holding is empty.
    """

    __slots__ = ("_evict", "_key", "_pool", "since", "size")

    def __init__(self, pool: "Pool", key: Hashable, evict: Evict) -> None:
        self._pool, self._key, self._evict = pool, key, evict
        self.size = 0
        self.since = 0.0  # by time.monotonic: the last progress, or the begin

    def resize(self, size: int) -> None:
        """Keep this many bytes from now on; this or other holdings may be evicted by it."""
        if size != self.size:
            self._pool.resize(self, self._key, size)

    def progress(self) -> None:
        """Take note that the peer did its part: holdings without progress are evicted first."""
        if self.size:
            self._pool.renew(self, self._key)

    def evict(self) -> None:
        """Take from the owner what it keeps."""
        self._evict()
        self.resize(0)


class _Share:
    __slots__ = ("bytes", "holdings")

    def __init__(self) -> None:
        self.bytes = 0
        self.holdings: dict[Holding, None] = {}  # without progress for longest first

    def weight(self, now: float) -> float:
        """Return how much this share is in the way of others, in bytes times seconds."""
        age_s = now - next(iter(self.holdings)).since
        return self.bytes * min(max(age_s, _LEAST_AGE_S), _MOST_AGE_S)


class Pool:
    """A bound of memory, shared fairly.

    Beyond a share's bound, a holding of that share is evicted; beyond the pool's, one of the share that has held most
    for longest, in bytes times seconds. So whoever holds little, or makes progress, is not hurt by those who hoard.

    Args:
        limit: bytes of all shares.
        share_limit: bytes of one share.
        of_answers: a share gives up what it wants to add, rather than what made no progress for longest, and a holding
            that is alone stays, however large.
    """

    __slots__ = ("_of_answers", "_shares", "bytes", "evictions", "limit", "peak", "share_limit")

    def __init__(self, limit: int, share_limit: int, *, of_answers: bool = False) -> None:
        self.limit, self.share_limit, self._of_answers = limit, share_limit, of_answers
        self.bytes = 0
        self.peak = 0  # of bytes, since it was set to 0
        self.evictions = 0
        self._shares: dict[Hashable, _Share] = {}

    def __iter__(self) -> Iterator[Holding]:
        """All holdings, as they are now."""
        return iter([one for share in self._shares.values() for one in share.holdings])

    def share(self, key: Hashable) -> int:
        """Return the bytes of one share."""
        share = self._shares.get(key)
        return 0 if share is None else share.bytes

    def resize(self, holding: Holding, key: Hashable, size: int) -> None:
        """Change what a holding keeps; for `Holding.resize` alone."""
        if size < 0:
            raise ValueError(f"a holding cannot have {size} bytes")
        more = size - holding.size
        share = self._shares.get(key)
        if share is None:
            share = self._shares[key] = _Share()
        if not holding.size:
            holding.since = time.monotonic()
            share.holdings[holding] = None
        holding.size = size
        share.bytes += more
        self.bytes += more
        if not size:
            del share.holdings[holding]
            if not share.holdings:
                del self._shares[key]
        if more > 0:
            self.peak = max(self.peak, self.bytes)
            if share.bytes > self.share_limit or self.bytes > self.limit:
                self._relieve(holding, share)

    def renew(self, holding: Holding, key: Hashable) -> None:
        """Put a holding last in its share; for `Holding.progress` alone."""
        holdings = self._shares[key].holdings
        holdings[holding] = holdings.pop(holding)
        holding.since = time.monotonic()

    def _relieve(self, newest: Holding, share: _Share) -> None:
        least = 1 if self._of_answers else 0
        while share.bytes > self.share_limit and len(share.holdings) > least:
            self._evict_of(share, newest)
        while self.bytes > self.limit:
            now = time.monotonic()
            worst = max(self._shares.values(), key=lambda one: one.weight(now))
            if len(self._shares) == 1 and len(worst.holdings) <= least:
                break
            self._evict_of(worst, newest)

    def _evict_of(self, share: _Share, newest: Holding) -> None:
        victim = newest if self._of_answers and newest in share.holdings else next(iter(share.holdings))
        self.evictions += 1
        victim.evict()


class Bucket:
    """Counts what a peer may do now and then, and not all the time (a token bucket).

    Args:
        burst: how often at once.
        rate: how often a second, in the long run.
    """

    __slots__ = ("_burst", "_rate", "_since", "left")

    def __init__(self, burst: float, rate: float) -> None:
        self._burst, self._rate = burst, rate
        self.left = burst
        self._since = time.monotonic()

    def take(self, count: float = 1.0) -> float:
        """Count, and return how many are left; below zero: by how many there were too many."""
        now = time.monotonic()
        self.left = min(self._burst, self.left + (now - self._since) * self._rate) - count
        self._since = now
        return self.left
