"""Which rank is slower than its peers, for long enough and by enough to report. Pure: times in, lines out; needs no torch.

A step takes every rank equally long, since fast ranks wait for the slow one. What differs is how long a rank works before the step's first
synchronisation with its data-parallel peers, which do the same work on other data.
"""

import statistics
from collections import deque
from collections.abc import Mapping, Sequence

REPORTS = 5  # slow reports in a row that make a straggler; a garbage collection or a page fault does not
_BACK = 0.5  # a straggler has recovered once less than this part of the margin is left, so that its state does not flicker


class StragglerWatch:
    """Follows the ranks' busy times over reports; each report covers one logging interval.

    Args:
        ratio: Busy time over the peers' median from which a rank is slow; None: no rank is.
    """

    def __init__(self, ratio: float | None):
        self.ratio = ratio
        self.history: dict[int, deque[float]] = {}
        self.slow: set[int] = set()
        self.slowest: tuple[int, float] | None = None  # rank and ratio of the newest report

    def report(self, busy: Mapping[int, float], peers: Sequence[Sequence[int]]) -> list[str]:
        """Lines for what has changed; none where there is nothing to say.

        Args:
            busy: Busy seconds of each rank.
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
        """Figures of the newest report, for metrics.jsonl."""
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
