"""A study: what is trained, measured and compared to test one claim. Read from `conf/study/NAME.yaml`, checked before anything starts.

ngpt/study/README.md explains the file. The comment in front of a field or behind it says what the field is.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ngpt.config.containers import instance_of
from ngpt.config.errors import ConfigError, ConfigErrors
from ngpt.config.folders import STUDY, config_dir, description_of
from ngpt.config.schema import choice
from ngpt.config.translate import translate
from ngpt.config.values import choice_errors
from ngpt.config.yaml_limits import check_yaml
from ngpt.config.yaml_lines import Lines, unreadable

SEED = "seed"  # the list that every study has
METRICS = "metrics"


@dataclass
class Arm:
    """Runs that differ in their seed, and in what `over` scans."""

    words: list[str] = field(default_factory=list)  # of the config, beside those of the study
    after: str | None = None  # arm whose checkpoint of the same seed and scan it continues, with optimizer state, words and `over`
    until: float | None = None  # part of train.steps after which it stops: a trunk for others
    over: dict[str, str] = field(default_factory=dict)  # config key: the list of its values
    by: dict[str, dict[str, float]] = field(default_factory=dict)  # config key: its value for each value of the one key in `over`
    label: str | None = None  # on the page; null: its name


@dataclass
class Analysis:
    """A call of `ngpt analyze` on each run of some arms."""

    what: str = choice(
        MISSING,
        {
            "snr": "signal-to-noise of operands, products and dot products",
            "ptq": "losses with quantised weights and activations",
            "flatness": "losses along random directions",
            "curvature": "Hessian's largest eigenvalue and trace",
        },
    )
    arms: list[str] = field(default_factory=list)  # globs of their names
    options: list[str] = field(default_factory=list)  # further words of the command; {LIST} is the only value of a list
    step: int | None = None  # of the checkpoint; null: the newest


@dataclass
class Measure:
    """One number of a run."""

    # Key of metrics.jsonl, or dotted path in an analysis' JSON. With * the mean over all that match, which are kept as layers
    key: str = MISSING
    source: str = METRICS  # metrics, or the name of an analysis
    # of what was logged over the run
    take: str = choice(
        "last",
        {
            "last": "the newest value",
            "first": "the oldest",
            "mean": "the mean",
            "least": "the smallest",
            "largest": "the largest",
            "count": "how many values are above `above`",
            "spikes": "how many times a loss jumps above its running median: `loss_spikes` of ngpt/spikes.py",
        },
    )
    above: float = 0.0  # with take=count
    unit: str = ""  # in words: nats per token
    says: str = ""  # definition, one sentence


@dataclass
class Comparison:
    """What is estimated from a measure, with an interval over seeds."""

    measure: str = MISSING  # its name
    title: str = ""  # on the page
    # what is estimated for each arm
    kind: str = choice(
        "mean",
        {
            "mean": "the mean, or mean paired difference with `less`",
            "ratio": "the mean over that of `divided_by`, by Fieller",
            "slope": "the rise per doubling of `over`",
            "optimum": "log2 of the value of `over` with the least measure; with `less` its shift, in doublings",
            "reach": "steps until the arm's validation loss is the last one of `less`, as a part of the steps of that run",
        },
    )
    arms: list[str] = field(default_factory=list)  # globs of their names
    less: dict[str, str] = field(default_factory=dict)  # glob of arms: arm that is taken off, seed by seed; itself it leaves as it is
    divided_by: dict[str, str] = field(default_factory=dict)  # ratio; glob of arms: arm of the divisor
    over: str | None = None  # slope, optimum: the scanned config key
    relative: bool = False  # mean with `less`: in percent of what is taken off
    says: str = ""  # how to read it, one sentence


@dataclass
class Figure:
    """A figure of the page; the first is the main one."""

    title: str = MISSING  # above it
    # what it shows
    kind: str = choice(
        MISSING,
        {
            "intervals": "comparisons, a line a row",
            "tokens": "a comparison of metrics over the tokens trained on",
            "axis": "a comparison over a scanned key",
            "layers": "the measure of a comparison by layer, of its arms at their last point",
        },
    )
    of: list[str] = field(default_factory=list)  # comparisons; layers: one
    over: str | None = None  # axis: the scanned config key
    # axis: what is drawn beside the data
    model: str = choice("none", {"none": "nothing", "averaging": "10 lg of the averaging gain that `rho` predicts"})
    rho: list[str] = field(default_factory=list)  # averaging: measures of signal and noise correlation
    caption: str = ""  # below it


@dataclass
class Rule:
    """What must hold for the claim to be reproduced: of every row of a comparison that the globs match."""

    comparison: str = MISSING  # its name
    arms: list[str] = field(default_factory=lambda: ["*"])  # globs of their names
    # of the whole interval
    must: str = choice(MISSING, {"be_above": "all of it is above", "be_below": "all of it is below", "stay_within": "in [-value, value]"})
    value: float = 0.0  # the bound


@dataclass
class Size:
    """How large a study is run."""

    words: list[str] = field(default_factory=list)  # of the config, behind those of the study
    lists: dict[str, list[Any]] = field(default_factory=dict)  # in place of the study's
    arms: list[str] = field(default_factory=list)  # globs of those that are run; empty: all
    judges: bool = True  # whether it can test the claim; else the page has no verdict
    says: str = ""  # what it is for, one sentence


@dataclass
class Study:
    """All of a study."""

    claim: str = MISSING  # one sentence that can be wrong
    paper: str = MISSING  # what the source says, with its figures
    tuning: str = MISSING  # how each architecture's rate and schedule were chosen
    left_out: str = ""  # what belongs to the claim and is not measured, and why
    words: list[str] = field(default_factory=list)  # of the config of every run
    lists: dict[str, list[Any]] = field(default_factory=dict)  # name: values; `seed` is train.seed of every arm's runs
    arms: dict[str, Arm] = field(default_factory=dict)  # {LIST} in a name, a label or a word makes an arm of each value
    analyses: dict[str, Analysis] = field(default_factory=dict)
    measures: dict[str, Measure] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    verdict: list[Rule] = field(default_factory=list)
    sizes: dict[str, Size] = field(default_factory=dict)


def studies(config_dirs: Sequence[Path] = ()) -> dict[str, Path]:
    """The files of all studies by name, the user's after the shipped ones."""
    return {path.stem: path for folder in (config_dir(), *config_dirs) for path in sorted(Path(folder).glob(f"{STUDY}/*.yaml"))}


def descriptions(config_dirs: Sequence[Path] = ()) -> dict[str, str]:
    """Name -> first comment of each study."""
    return {name: description_of(path) for name, path in studies(config_dirs).items()}


def load_study(name: str, config_dirs: Sequence[Path] = ()) -> Study:
    """Reads a study and checks what can be known without composing its runs.

    Raises:
        ConfigError: an unknown name, a file that cannot be read, or one that breaks a rule; with file and line.
    """
    known = studies(config_dirs)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2)
        way_out = f"Did you mean {' or '.join(near)}?" if near else "ngpt list studies shows them"
        raise ConfigError("ngpt study", name, f"There are {', '.join(known) or 'none'}", way_out)
    return read_study(known[name])


def read_study(path: Path) -> Study:
    """Reads the file of a study: see `load_study`.

    Raises:
        ConfigError: it cannot be read, or breaks a rule; with file and line.
    """
    try:
        check_yaml(path)
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_EachKeyOnce)
        if not isinstance(loaded, dict):
            raise ConfigError(str(path), type(loaded).__name__, "Holds the keys of a study", "Correct it")
        typed = OmegaConf.merge(OmegaConf.structured(Study), _literal(loaded))
        if missing := sorted(OmegaConf.missing_keys(typed)):
            raise _at(path, [ConfigError(key, "Not set", "Has no default", f"Add {key}") for key in missing])
        study = instance_of(Study, typed)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise unreadable(path, error, "Correct it") from error
    except OmegaConfBaseException as error:
        raise _at(path, [translate(error)]) from error
    if errors := [*choice_errors(study), *_errors(study)]:
        raise _at(path, errors)
    return study


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a key that is given twice; plain YAML keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[Any]()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _literal(value: Any) -> Any:
    """Interpolations in the words of a study are those of the runs' configs: here they are text."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _at(path: Path, errors: Sequence[ConfigError]) -> ConfigError:
    lines = Lines(path)
    rules = [one.rule.replace("ngpt/config/schema.py", "ngpt/config/study.py") for one in errors]  # of another tree of dataclasses
    found = zip(errors, rules, strict=True)
    return ConfigErrors([ConfigError(f"{lines.place(one.path)}: {one.path}", one.got, rule, one.way_out) for one, rule in found])


def _errors(study: Study) -> Iterator[ConfigError]:
    """Errors for unknown names, wherever an arm, a list, a measure or a comparison is named."""
    if not study.arms or not study.sizes:
        yield ConfigError("arms" if not study.arms else "sizes", "None", "A study has arms, and sizes to run them at", "Add one")
    if SEED not in study.lists:
        yield ConfigError("lists", f"No list {SEED}", "Every run has a seed", f"Add {SEED}: [1, 2, 3]")
    for size_name, size in study.sizes.items():
        yield from _unknown(f"sizes.{size_name}.lists", size.lists, study.lists, "list", "lists")
    for name, arm in study.arms.items():
        if arm.until is not None and not 0 < arm.until < 1:
            yield ConfigError(f"arms.{name}.until", arm.until, "Is a part of the steps, above 0 and below 1", "Correct it")
        yield from _unknown(f"arms.{name}.over", arm.over.values(), study.lists, "list", "lists")
        if arm.by and len(arm.over) != 1:
            yield ConfigError(f"arms.{name}.by", ", ".join(arm.by), "Goes by the one key in `over`", "Scan one key, or write a word")
    for name, measure in study.measures.items():
        yield from _unknown(f"measures.{name}.source", [measure.source], {METRICS, *study.analyses}, "source", "analyses")
    for name, comparison in study.comparisons.items():
        yield from _unknown(f"comparisons.{name}.measure", [comparison.measure], study.measures, "measure", "measures")
        yield from _needs(name, comparison)
    for index, figure in enumerate(study.figures):
        yield from _unknown(f"figures[{index}].of", figure.of, study.comparisons, "comparison", "comparisons")
        yield from _unknown(f"figures[{index}].rho", figure.rho, study.measures, "measure", "measures")
    for index, rule_ in enumerate(study.verdict):
        yield from _unknown(f"verdict[{index}].comparison", [rule_.comparison], study.comparisons, "comparison", "comparisons")


def _needs(name: str, comparison: Comparison) -> Iterator[ConfigError]:
    needed = {"ratio": ["divided_by"], "slope": ["over"], "optimum": ["over"], "reach": ["less"]}.get(comparison.kind, [])
    for key in needed:
        if not getattr(comparison, key):
            yield ConfigError(f"comparisons.{name}", f"No {key}", f"kind={comparison.kind} needs it", f"Add {key}")
    if comparison.relative and not (comparison.kind == "mean" and comparison.less):
        yield ConfigError(f"comparisons.{name}.relative", True, "Is for kind=mean with less", "Leave it out")


def _unknown(path: str, names: Any, known: Any, kind: str, where: str) -> Iterator[ConfigError]:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(map(str, known)), n=1)
            yield ConfigError(path, name, f"No {kind} has this name", f"Did you mean {near[0]}?" if near else f"Add it to {where}")


def matching(names: Sequence[str], globs: Sequence[str]) -> list[str]:
    """Names that one of the globs matches, in their own order."""
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]


def partner(name: str, table: Mapping[str, str]) -> str | None:
    """What a table of globs gives for a name: the last entry that matches it."""
    found = [value for glob, value in table.items() if fnmatchcase(name, glob)]
    return found[-1] if found else None


def as_plain(study: Study) -> dict[str, Any]:
    """The whole definition, as it goes into the results."""
    return dataclasses.asdict(study)
