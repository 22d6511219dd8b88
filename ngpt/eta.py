"""How long a run still takes, from what its steps have taken."""

from statistics import median

RECENT = 9  # logged intervals that count: a change of speed shows after five of them, four slow ones by themselves move nothing


class Eta:
    """Seconds to the end of a run, from the steps that it logs.

    The first logged interval is left out: kernels are compiled and caches filled in it. Of the recent others the median counts, so that
    a few slow steps move nothing. Evaluations and saves between steps are added at their mean cost so far.

    Args:
        steps: the last step of the run.
    """

    def __init__(self, steps: int):
        self.steps = steps
        self._step_times: list[float] = []
        self._first: tuple[int, float] | None = None  # step and time of the end of the first interval
        self._step, self._now, self._in_steps = 0, 0.0, 0.0

    def add(self, step: int, step_time_s: float, now: float) -> None:
        """A step was logged.

        Args:
            step_time_s: mean over the steps since the last logged one, without evaluations and saves.
            now: seconds of a monotonic clock at the end of the step.
        """
        if self._first is None:
            self._first = (step, now)
        else:
            self._step_times = [*self._step_times, step_time_s][-RECENT:]
            self._in_steps += (step - self._step) * step_time_s
        self._step, self._now = step, now

    def seconds_left(self) -> float | None:
        """None before the second logged step, the first that counts."""
        if self._first is None or not self._step_times:
            return None
        first_step, since = self._first
        between = max(0.0, self._now - since - self._in_steps) / (self._step - first_step)
        return (self.steps - self._step) * (median(self._step_times) + between)
