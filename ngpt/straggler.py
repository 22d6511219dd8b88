"""Which rank is slower than its peers, for long enough and by enough to be told. Pure: times in, lines out; needs no torch.

Steps take every rank equally long, since the fast ones wait for the slow one. What differs is how long a rank works until it arrives at the
step's first synchronisation with its data-parallel peers, which compute the same on other data.
"""

import statistics
from collections import deque
from collections.abc import Mapping, Sequence

REPORTS = 5  # so many in a row make a straggler; a garbage collection or a page fault makes none
_BACK = 0.5  # it has recovered once less than this part of the margin is left, so that it does not flicker


class StragglerWatch:
    """Follows the ranks' busy times over reports, each over one logging interval.

    Args:
        ratio: Of a rank's busy time to its peers' median, from which on it is slow; None: nobody is.
    """

    def __init__(self, ratio: float | None):
        self.ratio = ratio
        self.history: dict[int, deque[float]] = {}
        self.slow: set[int] = set()
        self.slowest: tuple[int, float] | None = None  # rank and ratio of the newest report

    def report(self, busy: Mapping[int, float], peers: Sequence[Sequence[int]]) -> list[str]:
        """Lines for what has changed; none where there is nothing to say.

        Args:
            busy: Seconds of each rank.
            peers: Groups of ranks that are compared with each other.
        """
        ratios: dict[int, float] = {}
        for group in peers:
            if len(group) > 1:
                # Of two ranks the faster one: the mean of both would halve the difference.
                median = statistics.median_low(busy[rank] for rank in group)
                ratios |= {rank: busy[rank] / median for rank in group if median > 0}
        self.slowest = max(ratios.items(), key=lambda item: item[1], default=None)
        if self.ratio is None:
            return []
        return [line for rank in sorted(ratios) if (line := self._follow(rank, ratios[rank], self.ratio))]

    def figures(self) -> dict[str, float]:
        """Of the newest report, for metrics.jsonl."""
        return dict(zip(("slowest_rank", "slowest_rank_ratio"), self.slowest, strict=True)) if self.slowest else {}

    def _follow(self, rank: int, ratio: float, limit: float) -> str | None:
        last = self.history.setdefault(rank, deque(maxlen=REPORTS))
        last.append(ratio)
        if len(last) < REPORTS:
            return None
        typical = statistics.median(last)
        if rank not in self.slow and min(last) >= limit:
            self.slow.add(rank)
            return f"rank {rank} is slow: {typical:.2f}x the median step of its peers for the last {REPORTS} reports"
        if rank in self.slow and max(last) < 1 + _BACK * (limit - 1):
            self.slow.remove(rank)
            return f"rank {rank} is no longer slow: {typical:.2f}x the median step of its peers"
        return None
