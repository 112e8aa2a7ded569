"""Bounds the memory that the server keeps for its peers: counts it by caller, and decides what to evict first.

Each kept byte belongs to one `Holding`. Each holding belongs to one pool, and in it to one share: that of its caller
or connection. Only `Holding.resize` changes these counts, so that they cannot drift apart.
"""

import time
from collections.abc import Callable, Hashable, Iterator

Evict = Callable[[], object]

_LEAST_AGE_S, _MOST_AGE_S = 0.01, 60.0  # bounds of the age in a share's weight


class Holding:
    """The bytes that one owner keeps.

    Args:
        pool: the pool that counts them.
        key: identifies the share of the pool.
        evict: called when the owner must give up what it keeps; afterwards the holding is empty.
    """

    __slots__ = ("_evict", "_key", "_pool", "since", "size")

    def __init__(self, pool: "Pool", key: Hashable, evict: Evict) -> None:
        self._pool, self._key, self._evict = pool, key, evict
        self.size = 0
        self.since = 0.0  # by time.monotonic: the last progress, or the start

    def resize(self, size: int) -> None:
        """Keep `size` bytes from now on; growth may evict this or other holdings."""
        if size != self.size:
            self._pool.resize(self, self._key, size)

    def progress(self) -> None:
        """Record that the peer made progress: holdings without progress are evicted first."""
        if self.size:
            self._pool.renew(self, self._key)

    def evict(self) -> None:
        """Make the owner give up what it keeps."""
        self._evict()
        self.resize(0)


class _Share:
    __slots__ = ("bytes", "holdings")

    def __init__(self) -> None:
        self.bytes = 0
        self.holdings: dict[Holding, None] = {}  # the longest without progress first

    def weight(self, now: float) -> float:
        """Return the share's bytes times the seconds since its stalest holding made progress (0.01 to 60)."""
        age_s = now - next(iter(self.holdings)).since
        return self.bytes * min(max(age_s, _LEAST_AGE_S), _MOST_AGE_S)


class Pool:
    """A bound on memory, shared fairly.

    If a share exceeds its bound, one of its holdings is evicted. If the pool exceeds its bound, a holding of the share
    with the largest weight is evicted: bytes times seconds without progress. So a caller that holds little, or makes
    progress, does not lose memory to callers that hoard it.

    Args:
        limit: bytes of all shares.
        share_limit: bytes of one share.
        of_answers: evict the holding that grows, if it belongs to that share, rather than the one without progress for
            longest; and keep a holding that is alone, however large.
    """

    __slots__ = ("_of_answers", "_shares", "bytes", "evictions", "limit", "peak", "share_limit")

    def __init__(self, limit: int, share_limit: int, *, of_answers: bool = False) -> None:
        self.limit, self.share_limit, self._of_answers = limit, share_limit, of_answers
        self.bytes = 0
        self.peak = 0  # the most bytes since it was last reset
        self.evictions = 0
        self._shares: dict[Hashable, _Share] = {}

    def __iter__(self) -> Iterator[Holding]:
        """Iterate over a snapshot of all holdings."""
        return iter([one for share in self._shares.values() for one in share.holdings])

    def share(self, key: Hashable) -> int:
        """Return the bytes of one share."""
        share = self._shares.get(key)
        return 0 if share is None else share.bytes

    def resize(self, holding: Holding, key: Hashable, size: int) -> None:
        """Change a holding's size; only `Holding.resize` calls this."""
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
        """Move a holding to the end of its share; only `Holding.progress` calls this."""
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
    """A token bucket: limits the rate of something that a peer may do in bursts, but not continuously.

    Args:
        burst: the most at once.
        rate: the most per second in the long run.
    """

    __slots__ = ("_burst", "_rate", "_since", "left")

    def __init__(self, burst: float, rate: float) -> None:
        self._burst, self._rate = burst, rate
        self.left = burst
        self._since = time.monotonic()

    def take(self, count: float = 1.0) -> float:
        """Take `count` tokens; return how many are left. Below zero, the limit is exceeded by that many."""
        now = time.monotonic()
        self.left = min(self._burst, self.left + (now - self._since) * self._rate) - count
        self._since = now
        return self.left
