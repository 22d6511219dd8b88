"""What a study trains and analyses at a size: every run, with its words and the run it waits for."""

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ngpt.config.errors import ConfigError
from ngpt.config.overrides import key_of
from ngpt.config.study import SEED, Arm, Study, matching, partner

_UNTIL, _SEED_KEY = "train.stop_after", "train.seed"
# Keys that may change between two calls for one run: they say where it executes. Layout and micro-batch may not: NVFP4 blocks along
# tokens depend on them, and arms must differ in one thing only.
OF_EXECUTION = ("cluster", "logging", "run.", "data.num_workers")


@dataclass(frozen=True)
class PlannedRun:
    """One run.

    Attributes:
        name: its folder's name below the study's, `ARM/KEY=VALUE_seed=1`.
        point: scanned key -> its value in this run.
        seed: its train.seed, by which runs are paired.
        words: the words of its config, except those that name folders.
        after: name of the run whose checkpoint it continues.
    """

    name: str
    arm: str
    point: Mapping[str, Any]
    seed: int
    words: tuple[str, ...]
    after: str | None = None

    def located(self, folder: Path, study: str) -> list[str]:
        """Its words plus those for folders: its own below `folder`, and that of the checkpoint it continues."""
        words = [*self.words, f"run.name={study}_{flat(self.name)}", f"run.dir={folder / self.name}"]
        if self.after is not None:
            words += [f"checkpoint.load={folder / self.after / 'checkpoints'}", "checkpoint.load_optimizer=true"]
        return words


@dataclass(frozen=True)
class PlannedAnalysis:
    """A call of `ngpt analyze` on a run; it waits for that run."""

    analysis: str
    run: str
    options: tuple[str, ...]

    @property
    def path(self) -> str:
        """The file of its result, below the run's folder. Studies that share a run share it, if they ask for the same."""
        asked = hashlib.sha256("\0".join(self.options).encode()).hexdigest()[:8]
        return f"analysis/study_{self.analysis}_{asked}.json"

    @property
    def file(self) -> str:
        """The same below the study's folder."""
        return f"{self.run}/{self.path}"

    def command(self, folder: Path) -> list[str]:
        return ["analyze", str(folder / self.run), *self.options, "--out", str(folder / self.file)]


@dataclass(frozen=True)
class Plan:
    """A study at a size.

    Attributes:
        study: the study with the lists in use, and one arm for each value of the lists that its arms name.
        words: the words of the command line.
    """

    name: str
    size: str
    study: Study
    words: tuple[str, ...]
    runs: tuple[PlannedRun, ...] = field(default=())
    analyses: tuple[PlannedAnalysis, ...] = field(default=())

    @property
    def points(self) -> list[PlannedRun]:
        """One run of each arm and point; the others differ only in their seed."""
        return list({(run.arm, *run.point.items()): run for run in reversed(self.runs)}.values())[::-1]

    def is_trunk(self, run: PlannedRun) -> bool:
        return self.study.arms[run.arm].until is not None

    def without(self, names: Collection[str]) -> "Plan":
        """The plan less the runs of these names and their analyses."""
        runs = tuple(run for run in self.runs if run.name not in names)
        return dataclasses.replace(self, runs=runs, analyses=tuple(one for one in self.analyses if one.run not in names))


def plan(name: str, study: Study, size: str | None, words: Sequence[str] = ()) -> Plan:
    """The runs and analyses of a study.

    Args:
        size: None: the first of its sizes.
        words: from the command line: `LIST=[...]` or `LIST+=VALUE` for one of the study's lists; others go into every run's config.

    Raises:
        ConfigError: an unknown size, words that no run can have or that change none, or names that match no arm.
    """
    size = size or next(iter(study.sizes))
    if size not in study.sizes:
        raise ConfigError("--size", size, f"{name} has the sizes {', '.join(study.sizes)}", "Choose one of them")
    before = {**study.lists, **study.sizes[size].lists}
    lists, of_config = _lists(before, words)
    made = _plan(name, study, size, words, lists, of_config)
    for key in (key for key in lists if lists[key] != before[key]):
        other = _plan(name, study, size, words, {**lists, key: before[key]}, of_config)
        if (made.runs, made.analyses) == (other.runs, other.analyses):
            rule, sizes = f"No run of size {size} depends on it", ", ".join(study.sizes)
            raise ConfigError(key, lists[key], rule, f"Choose a size that has its arms, --size, of {sizes}; or leave it out")
    return made


def _plan(name: str, study: Study, size: str, words: Sequence[str], lists: dict[str, list[Any]], of_config: Sequence[str]) -> Plan:
    """The plan with these lists, and these words of a config in every run."""
    chosen = study.sizes[size]
    used = dataclasses.replace(study, lists=lists, arms=_arms(study.arms, lists))
    _check_names(used)
    used.arms = _kept(used.arms, chosen.arms)
    of_arms = [word for arm in study.arms.values() for word in arm.words]
    _check_effect(of_config, used, of_arms, f"DIR/study/{name}.yaml with --config-dir DIR")
    common = [*study.words, *chosen.words, *of_config]
    runs = tuple(run for arm in used.arms for run in _runs(used, arm, common))
    return Plan(name, size, used, tuple(words), runs, tuple(_analyses(used, runs)))


def flat(name: str) -> str:
    """A run's name as part of another: without slashes."""
    return re.sub(r"[^\w.+=,@-]", "_", name)


def merged(words: Sequence[str]) -> list[str]:
    """Words with each key once, at its first position and with its last value, since Hydra refuses a key that is given twice."""
    last = {key_of(word): word for word in words}
    return list(dict.fromkeys(last[key_of(word)] for word in words))


def differing(words: Sequence[str], others: Sequence[str]) -> list[str]:
    """Words that only one of two runs has, but for those that say where a run executes."""
    first, second = ({word for word in merged(each) if not word.startswith(OF_EXECUTION)} for each in (words, others))
    return sorted(first ^ second)


def is_ended(status: str, trunk: bool) -> bool:
    """Whether a run of this status has trained all its steps; a trunk stops before the end of its schedule."""
    return status == "finished" or (trunk and status == "stopped")


def _lists(lists: dict[str, list[Any]], words: Sequence[str]) -> tuple[dict[str, list[Any]], list[str]]:
    """The lists as changed by the words, and the remaining words, which belong to the config."""
    rest = []
    for word in words:
        key, _, text = word.partition("=")
        name = key.removesuffix("+")
        if name not in lists:
            rest.append(word)
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(name, text, "Cannot be read as a list", f"Give {name}=[A,B], or {name}+=A") from None
        added = value if isinstance(value, list) else [value]
        lists = lists | {name: [*lists[name], *added] if key.endswith("+") else added}
    for name, values in lists.items():
        if not values or len(set(map(str, values))) < len(values) or not all(isinstance(value, str | int | float) for value in values):
            raise ConfigError(name, values, "Must be a list of different values", f"Give {name}=[A,B], or {name}+=A")
    wrong = [seed for seed in lists[SEED] if not isinstance(seed, int) or isinstance(seed, bool)]
    if wrong:
        raise ConfigError(SEED, wrong[0], "Must be a whole number", f"Give {SEED}=[1,2,3]")
    return lists, rest


def _check_effect(words: Sequence[str], used: Study, of_arms: Sequence[str], copy: str) -> None:
    """Refuses words that would do nothing, since the study itself sets their keys.

    Args:
        words: those of the command line that go into configs.
        of_arms: the words of all arms, with {LIST} in them.
        copy: where a copy of the study may be changed.
    """
    for key, word in {key_of(word): word for word in words}.items():
        if key == _SEED_KEY:
            raise ConfigError(key, word, f"The list {SEED} sets it in every run", f"Change that list: {SEED}=[1,2]")
        if key in ("run.name", "run.dir"):
            raise ConfigError(key, word, "A study names its runs and their folders", "Say where the study belongs, --out DIR")
        setters = [_setter(used, name, key) for name in used.arms]
        if not setters or None in setters:
            continue
        name, kind = next((setter for setter in setters if setter and setter[1] != "words"), setters[0])
        arm = used.arms[name]
        if kind == "over":
            rule = f"arms.{name}.over sets it to the values of the list {arm.over[key]}"
            raise ConfigError(key, word, rule, f"Change that list: {arm.over[key]}=[A,B]")
        if kind == "by":
            rule = f"arms.{name}.by sets it, by the value of the list {next(iter(arm.over.values()))}"
            raise ConfigError(key, word, rule, f"Change `by` in a copy of the study, {copy}")
        setting = [text for text in of_arms if key_of(text) == key]
        lists = [f"{each}=[A,B]" for each in used.lists if any(f"{{{each}}}" in text for text in setting)]
        way_out = f"Change {', '.join(lists)}" if lists else f"Change them in a copy of the study, {copy}"
        raise ConfigError(key, word, f"The words of every arm set it: {', '.join(dict.fromkeys(setting))}", way_out)


def _setter(study: Study, name: str, key: str) -> tuple[str, str] | None:
    """Which arm, this one or its trunk, sets a key, and by what: over, by or words. None: neither does."""
    chain = [each for each in (name, study.arms[name].after) if each]
    for each in chain:
        kinds = {"over": study.arms[each].over, "by": study.arms[each].by, "words": [key_of(word) for word in study.arms[each].words]}
        for kind, keys in kinds.items():
            if key in keys:
                return each, kind
    return None


def _arms(arms: Mapping[str, Arm], lists: Mapping[str, list[Any]]) -> dict[str, Arm]:
    """The arms; one with `{LIST}` in its name or words becomes one arm per value."""
    made: dict[str, Arm] = {}
    for name, arm in arms.items():
        texts = [name, *arm.words, arm.after or "", arm.label or ""]
        used = [key for key in lists if any(f"{{{key}}}" in text for text in texts)]
        for values in itertools.product(*(lists[key] for key in used)):
            fill = functools.partial(_filled, values=dict(zip(used, values, strict=True)))
            after, label = (fill(text) if text else None for text in (arm.after, arm.label))
            if (filled := fill(name)) in made:
                raise ConfigError(f"arms.{name}", filled, "Is the name of two arms", "Put {LIST} of what differs into the name")
            made[filled] = dataclasses.replace(arm, words=list(map(fill, arm.words)), after=after, label=label)
    return made


def _filled(text: str, values: Mapping[str, Any]) -> str:
    for key, value in values.items():
        text = text.replace(f"{{{key}}}", str(value))
    return text


def _check_names(study: Study) -> None:
    """Refuses globs that match no arm: a comparison would silently be empty."""
    names = list(study.arms)
    if misnamed := [name for name in names if re.fullmatch(r"[\w.+-]+", name) is None]:
        raise ConfigError("arms", misnamed[0], "Names a folder: letters, digits and _ . + -", "Rename it")
    for name, arm in study.arms.items():
        trunk = study.arms.get(arm.after or "")
        if arm.after is not None and (trunk is None or trunk.until is None or trunk.after is not None):
            rule = f"Arms continue a trunk: an arm with `until`, and without `after`. There are {', '.join(names)}"
            raise ConfigError(f"arms.{name}.after", arm.after, rule, "Name one, or set its `until`")
    globs = [(f"analyses.{key}.arms", glob) for key, analysis in study.analyses.items() for glob in analysis.arms]
    for key, comparison in study.comparisons.items():
        globs += [(f"comparisons.{key}.arms", glob) for glob in comparison.arms]
        for part in ("less", "divided_by"):
            globs += [(f"comparisons.{key}.{part}", arm) for pair in getattr(comparison, part).items() for arm in pair]
    globs += [(f"verdict[{index}].arms", glob) for index, rule in enumerate(study.verdict) for glob in rule.arms]
    for path, glob in globs:
        if not matching(names, [glob]):
            raise ConfigError(path, glob, f"Matches none of the arms {', '.join(names)}", "Correct it")


def _kept(arms: Mapping[str, Arm], globs: Sequence[str]) -> dict[str, Arm]:
    """The arms of a size, including the trunks that they need."""
    chosen = set(matching(list(arms), globs or ["*"]))
    chosen |= {arms[name].after for name in chosen} - {None}
    return {name: arm for name, arm in arms.items() if name in chosen}


def _runs(study: Study, name: str, common: Sequence[str]) -> Iterator[PlannedRun]:
    """The runs of an arm: its scan times the seeds."""
    arm = study.arms[name]
    trunk = study.arms[arm.after] if arm.after else None
    over, by = ({**getattr(trunk, key, {}), **getattr(arm, key)} for key in ("over", "by"))
    if trunk and trunk.over != over:
        raise ConfigError(f"arms.{name}.over", arm.over, f"{arm.after} has no run for each of its values", f"Scan in {arm.after}")
    words = [*common, *_words(study, name)]
    if arm.until is not None:
        words.append(f"{_UNTIL}='${{fraction:${{train.steps}},{arm.until}}}'")
    for values in itertools.product(*(study.lists[used] for used in over.values())):
        point = dict(zip(over, values, strict=True))
        for seed in study.lists[SEED]:
            scanned = [f"{key}={value}" for key, value in point.items()] + list(_by(name, by, values))
            where = "_".join([*(f"{key.rpartition('.')[2]}={value}" for key, value in point.items()), f"seed={seed}"])
            final = tuple(merged([*words, *scanned, f"{_SEED_KEY}={seed}"]))
            yield PlannedRun(f"{name}/{where}", name, point, seed, final, f"{arm.after}/{where}" if arm.after else None)


def _words(study: Study, name: str) -> list[str]:
    """The words of an arm, behind those of its trunk."""
    arm = study.arms[name]
    return [*(study.arms[arm.after].words if arm.after else []), *arm.words]


def _by(name: str, tables: Mapping[str, Mapping[str, float]], values: Sequence[Any]) -> Iterator[str]:
    """The words that depend on the value of the scanned key."""
    for key, table in tables.items():
        if str(values[0]) not in table:
            raise ConfigError(f"arms.{name}.by.{key}", values[0], f"There is a value for {', '.join(table)}", "Add one for this")
        yield f"{key}={table[str(values[0])]}"


def _analyses(study: Study, runs: Sequence[PlannedRun]) -> Iterator[PlannedAnalysis]:
    for name, analysis in study.analyses.items():
        options = filled_options(analysis.options, study.lists)
        arms = set(matching(list(study.arms), analysis.arms))
        step = [] if analysis.step is None else ["--step", str(analysis.step)]
        for run in runs:
            if run.arm in arms:
                yield PlannedAnalysis(name, run.name, ("--what", analysis.what, *step, *options))


def filled_options(options: Sequence[str], lists: Mapping[str, Sequence[Any]]) -> list[str]:
    """The options of an analysis with the lists that have one value, which differs between sizes, filled in."""
    single = {key: values[0] for key, values in lists.items() if len(values) == 1}
    return [_filled(option, single) for option in options]


def label(study: Study, arm: str) -> str:
    """The name of an arm on the page."""
    return study.arms[arm].label or arm


def reference(table: Mapping[str, str], arm: str) -> str | None:
    """The arm that `arm` is compared with; None if that is `arm` itself."""
    found = partner(arm, table)
    return None if found == arm else found


def compared(study: Study, globs: Sequence[str]) -> list[str]:
    """The arms that a comparison's globs match. Trunks end early, so they are left out unless named in full."""
    return [name for name in matching(list(study.arms), globs or ["*"]) if study.arms[name].until is None or name in globs]
