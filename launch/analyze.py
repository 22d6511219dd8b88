"""`ngpt analyze`: studies of a trained model in this process, on the CPU or one GPU. It needs no Megatron."""

import argparse
import difflib
import json
import math
import re
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ngpt.config.errors import ConfigError
from ngpt.config.one_process import run_checkpoint, run_config
from ngpt.config.schema import Config
from ngpt.model_analysis import ANALYSES, DEFAULT_RECIPE, results
from ngpt.model_analysis.recipes import recipe_named
from ngpt.model_analysis.request import DIRECTIONS, FIT_RADIUS, RADII, Request, available, sequences_wanted
from ngpt.model_analysis.tables import table
from ngpt.places import check_place
from ngpt.progress import write_json
from ngpt.shell import in_shell

from .arguments import DTYPES, config_dirs, recorded_command
from .devices import gpu_names
from .models import device_of, is_run, quiet_transformers
from .provenance import SOURCE, git_state, versions

if TYPE_CHECKING:
    from ngpt.hf.load import TextModel


@dataclass(frozen=True)
class Subject:
    """The requested model, before it is opened.

    Attributes:
        cfg: the run's config. step: the step of its checkpoint.
        length: tokens per sequence. batch_size: sequences per GEMM in training.
    """

    path: Path
    cfg: Config | None
    step: int | None
    length: int
    batch_size: int = 1
    notes: list[str] = field(default_factory=list)


def run_analyses(options: argparse.Namespace) -> int:
    """Lists the analyses and their results, or runs one and keeps its result.

    Args:
        options: as launch/commands/analyze.py reads them.

    Raises:
        ConfigError: an option, the model, the text or the recipe is invalid; or kept results would be lost.
    """
    run = is_run(options.path, options.step)
    if options.what is None:
        _list(options.path)
        return 0
    _check(options)
    whats = _whats(options)
    subject = _subject(options, run)
    planned = [(request := _request(options, subject, what), _path(options, subject, request)) for what in whats]
    found = [None if path is None else results.kept(path, request.options()) for request, path in planned]
    source = _opened(options, subject) if None in found else None
    for (request, path), earlier in zip(planned, found, strict=True):
        if earlier is not None:
            print(f"note: {path} has the same request already; move it away to measure again", file=sys.stderr)
        _tell(options, earlier or _measured(options, subject, source, request, path))
    return 0


def _list(path: Path) -> None:
    """Prints the available analyses and the kept results."""
    width = max(map(len, ANALYSES))
    print("\n".join(f"{name:<{width}}  {line}" for name, line in ANALYSES.items()))
    for kept in results.listed(path):
        of = f", {kept.recipe}" if kept.recipe else ""
        print(f"kept: {kept.path} ({kept.what}, step {kept.step}, {kept.tokens:,} tokens{of})")
    print(f"For instance: ngpt analyze {in_shell(str(path))} --what snr")


def _check(options: argparse.Namespace) -> None:
    for name, least in {"tokens": 1, "seed": 0, "step": 0, "batch_size": 1, "directions": 2}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')}", value, f"It is at least {least}", "Give such a number, or leave it out")
    if options.seed >= 2**32:
        raise ConfigError("--seed", options.seed, "It is below 2^32", "Give a smaller number")
    if options.name is not None and not re.fullmatch(r"[\w.-]+", options.name):
        raise ConfigError("--name", options.name, "It is part of a file's name: letters, digits and . _ -", "Choose another one")
    if options.out is not None:
        check_place("--out", options.out, is_file=True)
    _radii(options)


def _whats(options: argparse.Namespace) -> list[str]:
    names = [name for name in options.what.split(",") if name]
    for name in names or [options.what]:
        if name not in ANALYSES:
            near = difflib.get_close_matches(name, ANALYSES, n=1)
            meant = f"Did you mean {near[0]}? " if near else ""
            raise ConfigError("--what", name, "There is no such analysis", f"{meant}Choose from {', '.join(ANALYSES)}")
    if options.out is not None and len(names) > 1:
        raise ConfigError("--out", options.out, "It is the file of one analysis", "Leave it out, or ask for one")
    return list(dict.fromkeys(names))


def _radii(options: argparse.Namespace) -> tuple[float, ...]:
    if options.radii is None:
        return RADII
    try:
        radii = tuple(sorted({float(part) for part in options.radii.split(",")}))
    except ValueError:
        radii = ()
    if not radii or not all(0 < radius < math.inf for radius in radii) or radii[0] > FIT_RADIUS:
        rule = f"They are numbers above 0, one at least up to {FIT_RADIUS}, where the curvature is taken"
        raise ConfigError("--radii", options.radii, rule, "For instance --radii 0.02,0.05,0.1,0.2")
    return radii


def _subject(options: argparse.Namespace, run: bool) -> Subject:
    if run:
        cfg = run_config(options.path)
        choice = run_checkpoint(cfg, options.step)
        return Subject(options.path, cfg, choice.step, cfg.train.seq_length, cfg.train.micro_batch_size)
    path = options.path / "config.json"
    try:
        config = json.loads(path.read_bytes())
        kind, length = config["model_type"], int(config.get("max_position_embeddings", 0))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(str(path), error, "It must be the JSON that transformers wrote", "Restore it from a copy") from error
    if kind != "ngpt":
        rule = "Analyses know the layers of ngpt's own class"
        raise ConfigError(str(path), f"model_type {kind}", rule, "Analyse the run, or export the control with --remote-code")
    if not options.split:
        raise ConfigError("--split", "none", f"{options.path} is no run, whose text that could be", "Name a prefix of prepared data")
    if options.out is None and not options.json:
        raise ConfigError("--out", "none", f"{options.path} is no run, which keeps results", "Name a file, or set --json")
    return Subject(options.path, None, None, length)


def _splits(options: argparse.Namespace, subject: Subject) -> tuple[str, ...]:
    if options.split:
        return tuple(options.split)
    assert subject.cfg is not None
    data = subject.cfg.data
    if data.mock or not (data.valid or data.train):
        got = "mock data" if data.mock else "neither data.valid nor data.train"
        raise ConfigError(str(subject.path), got, "The run has no text that could be read", "Name a prefix of prepared data by --split")
    if not data.valid:
        subject.notes.append("note: the run has no data.valid; what it was trained on is read")
    return tuple(source.path for source in data.valid or data.train)


def _request(options: argparse.Namespace, subject: Subject, what: str) -> Request:
    splits, batch_size = _splits(options, subject), options.batch_size or subject.batch_size
    sequences = sequences_wanted(what, options.tokens, subject.length, available(splits, subject.length), batch_size)
    return Request(
        what=what,
        splits=splits,
        length=subject.length,
        sequences=sequences,
        batch_size=batch_size,
        dtype=options.dtype or (DTYPES[0] if subject.cfg else "own"),
        recipe=recipe_named(options.recipe, config_dirs(options)),
        seed=options.seed,
        directions=options.directions or DIRECTIONS,
        radii=_radii(options),
        hvp=options.hvp,
    )


def _path(options: argparse.Namespace, subject: Subject, request: Request) -> Path | None:
    """The file that keeps the result, or None if it is not kept."""
    if options.out is not None or subject.step is None:
        return options.out
    named = None if request.what == "curvature" or options.recipe == DEFAULT_RECIPE else options.recipe
    return results.path_of(subject.path, request.what, options.name or named, subject.step)


def _opened(options: argparse.Namespace, subject: Subject) -> "TextModel":
    """Prints notes about the model, then returns it on its device."""
    from ngpt.evaluation.split import check_tokenizer, notes_on
    from ngpt.hf.load import open_folder, open_run

    quiet_transformers()
    device = device_of(options.device)
    if subject.cfg is not None:
        source = open_run(options.path, subject.step, options.dtype or DTYPES[0], device)
        notes = notes_on(subject.cfg.data)
    else:
        source, notes = open_folder(options.path, options.dtype, device), []
    for note in dict.fromkeys([*subject.notes, *source.notes, *notes]):
        print(note, file=sys.stderr, flush=True)
    for prefix in options.split:
        check_tokenizer(source.encode, prefix)
    return source


def _measured(
    options: argparse.Namespace, subject: Subject, source: "TextModel | None", request: Request, path: Path | None
) -> dict[str, Any]:
    """Runs the analysis, adds the provenance to the result, and keeps it if asked to."""
    from ngpt.model_analysis.run import measure

    assert source is not None
    git, _ = git_state(SOURCE)
    origin: dict[str, Any] = {"model": str(options.path), "step": subject.step, "command": in_shell(*recorded_command(options))}
    origin |= {"started": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(), "git": git, "gpus": list(gpu_names())}
    with redirect_stdout(sys.stderr):  # what libraries print must not mix with the results
        found = measure(source.model, request, lambda line: print(line, file=sys.stderr, flush=True))
    found |= origin
    if path is not None:
        write_json(path, found, indent=1)
        print(f"kept in {path}", file=sys.stderr)
    return found


def _tell(options: argparse.Namespace, found: dict[str, Any]) -> None:
    print(json.dumps(found) if options.json else table(found), flush=True)
