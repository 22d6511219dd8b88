"""The runs of a study as configs: checked before the first run starts, and shown in a table with tokens and time."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from pathlib import Path

from ngpt.analysis import formats
from ngpt.config.compose import compose
from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config
from ngpt.config.sizes import tokens_per_step
from ngpt.durations import duration
from ngpt.study.analyses import has_result
from ngpt.study.plan import Plan, PlannedRun

from .study_shared import digest

_WAITS = "* the host's time to launch kernels, whatever their size: the GPU waits for it"


@dataclasses.dataclass(frozen=True)
class PlannedConfig:
    """What the plan needs of a run's config.

    Attributes:
        first, last: it trains the steps after `first`, up to and including `last`.
        seconds: the estimated time of these steps; None if the cluster names no GPU.
        waits: whether that is the host's time to launch kernels, which the GPU waits for.
    """

    config: Config
    first: int
    last: int
    seconds: float | None
    waits: bool

    @property
    def gpus(self) -> int:
        return self.config.cluster.gpus_per_node

    @property
    def tokens(self) -> int:
        return (self.last - self.first) * tokens_per_step(self.config)


def checked(
    planned: Plan, folder: Path, config_dirs: Sequence[Path], with_data: bool = True, here: bool = True
) -> dict[str, PlannedConfig]:
    """The config of every run, by name. Runs that differ only in their seed or a scanned key of `optim` share one, composed once.

    Args:
        with_data: whether the text must be prepared.
        here: whether the runs are to run on this machine.

    Raises:
        ConfigError: a run's words do not make a valid config (the error names the run), or the text is not prepared.
    """
    from .train import check_prepared  # imports the code that reads manifests

    of_points: dict[tuple[object, ...], PlannedConfig] = {}
    for run in planned.points:
        if _key(run) in of_points:
            continue
        try:
            config = composed(run, planned, folder, config_dirs)
            if with_data:
                check_prepared(config)
        except ConfigError as error:
            raise ConfigError(f"{run.name}: {error.path}", error.got, error.rule, error.way_out) from error
        if config.cluster.nodes > 1 and here:
            way_out = "Choose a cluster of one host, or submit it: --slurm"
            raise ConfigError("cluster.nodes", config.cluster.nodes, "A study runs on this machine", way_out)
        trunk = of_points.get((planned.study.arms[run.arm].after, *_key(run)[1:]))
        first, last = trunk.last if trunk else 0, config.train.stop_after or config.train.steps
        of_points[_key(run)] = PlannedConfig(config, first, last, *_time(config, last - first))
    return {run.name: of_points[_key(run)] for run in planned.runs}


def composed(run: PlannedRun, planned: Plan, folder: Path, config_dirs: Sequence[Path]) -> Config:
    """The config of one run.

    Raises:
        ConfigError: its words do not make a valid config.
    """
    return compose(run.located(folder, planned.name), config_dirs)


def digests(planned: Plan, folder: Path, config_dirs: Sequence[Path]) -> Callable[[PlannedRun, str], bool]:
    """Tells whether the config of a run, as it is composed now, has a digest.

    Composing takes a third of a second. So the seed is put into the config of the first run of its point; only if that has another
    digest, since its words may use the seed for other keys, is the run's own composed.
    """
    runs = {run.name: run for run in planned.runs}
    own = cache(lambda name: composed(runs[name], planned, folder, config_dirs))
    firsts = {(run.arm, *run.point.items()): run.name for run in planned.points}

    def has_config(run: PlannedRun, known: str) -> bool:
        config = own(firsts[(run.arm, *run.point.items())])
        seeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=run.seed))
        return known == digest(seeded) or known == digest(own(run.name))

    return has_config


def _key(run: PlannedRun) -> tuple[object, ...]:
    """What determines tokens, time and processes."""
    return (run.arm, *(entry for entry in run.point.items() if not entry[0].startswith("optim.")))


def _time(config: Config, steps: int) -> tuple[float | None, bool]:
    """Estimated time of that many steps, and whether the GPU waits for the host in it."""
    if config.cluster.gpu is None:
        return None, False
    from ngpt.estimate.report import estimate

    step = estimate(config, None)["step"]
    return steps * float(step["seconds"]), step["micro_batch_s"]["waiting_for_host"] > 0


def table(planned: Plan, configs: Mapping[str, PlannedConfig]) -> str:
    """One line per arm and point: its runs with steps, tokens and time; then the sums, and what bounds the time."""
    lines = []
    for run in planned.points:
        one, seeds = configs[run.name], [other for other in planned.runs if (other.arm, other.point) == (run.arm, run.point)]
        where = ", ".join([run.arm, *(f"{key}={value}" for key, value in run.point.items())])
        analyses = sum(analysis.run == run.name for analysis in planned.analyses)
        steps = f"steps {one.first + 1} to {one.last}" if one.first else f"{one.last} steps"
        time = "" if one.seconds is None else duration(one.seconds) + (" *" if one.waits else "")
        tokens = f"{formats.count(one.tokens)} tokens"
        lines.append((where, f"{len(seeds)} x {steps}", tokens, time, f"{analyses} analyses" if analyses else ""))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    everything = [configs[run.name] for run in planned.runs]
    tokens = formats.count(sum(one.tokens for one in everything))
    total = f"{len(planned.runs)} runs, {len(planned.analyses)} analyses, {tokens} tokens{_total(everything)}"
    waits = [_WAITS] if any(one.waits for one in everything) else []
    title = ": ".join(filter(None, (f"{planned.name}, size {planned.size}", planned.study.sizes[planned.size].says)))
    return "\n".join([title, *shown, *waits, total])


def there(
    planned: Plan, configs: Mapping[str, PlannedConfig], folder: Path, places: Mapping[str, Path | None], outdated: Collection[str]
) -> list[str]:
    """A line for each run that is finished, and what is left; none if everything is left.

    Args:
        places: the folder in which each run is finished; None for those that are not.
        outdated: those of them that are trained again, since their trunk is.
    """
    known = {name: place for name, place in places.items() if place is not None}
    if not known and not outdated:
        return []
    width = max(map(len, [*known, *outdated]))
    lines = [f"{name:<{width}}  {'is finished' if place == folder / name else f'is taken from {place}'}" for name, place in known.items()]
    lines += [f"{name:<{width}}  is trained again: it continued a trunk that is not there any more" for name in outdated]
    left = [configs[run.name] for run in planned.runs if run.name not in known]
    analyses = sum(one.run not in known or not has_result(known[one.run] / one.path) for one in planned.analyses)
    return [*lines, f"left: {len(left)} runs, {analyses} analyses, {formats.count(sum(one.tokens for one in left))} tokens{_total(left)}"]


def _total(runs: Sequence[PlannedConfig]) -> str:
    """The estimated time of these runs, in words; empty if it is unknown."""
    known = [run.seconds for run in runs]
    return "" if None in known else f", {duration(sum(filter(None, known)))} of steps by estimate"
