"""Where results of analyses are kept, and checks that none is overwritten. Imports no torch."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ngpt.config.errors import ConfigError
from ngpt.model_analysis import ANALYSES

FOLDER = "analysis"
MEASURED = "tokens"  # an option that a later measurement may increase


def path_of(run_dir: Path, what: str, name: str | None, step: int) -> Path:
    """For instance RUN/analysis/snr_iter_0000250.json, or with a name RUN/analysis/snr_NAME_iter_0000250.json."""
    return run_dir / FOLDER / f"{what}{f'_{name}' if name else ''}_iter_{step:07d}.json"


def kept(path: Path, options: dict[str, Any]) -> dict[str, Any] | None:
    """The result of an earlier measurement with exactly these options. None: the path is free, or has the same result on less text.

    Raises:
        ConfigError: the path holds something else, which a new measurement would overwrite.
    """
    if not path.exists():
        return None
    way_out = "Give the new one a --name or an --out, or move that file"
    try:
        found = json.loads(path.read_bytes())
        before = found["options"]
        measured = before[MEASURED]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(str(path), error, "What is there is no result of ngpt analyze", way_out) from error
    for key in sorted({*before, *options} - {MEASURED}):
        if before.get(key) != options.get(key):
            rule = f"Kept results have {key}={before.get(key)}, and {key}={options.get(key)} was asked for"
            raise ConfigError(str(path), "it exists", rule, way_out)
    if measured == options[MEASURED]:
        return found
    if measured > options[MEASURED]:
        rule = f"Kept results are of {measured:,} tokens, and {options[MEASURED]:,} were asked for"
        raise ConfigError(str(path), "it exists", rule, way_out)
    return None


@dataclass(frozen=True)
class Kept:
    """A kept result, as listed."""

    path: Path
    what: str
    step: int
    tokens: int
    recipe: str | None


def listed(run_dir: Path) -> Iterator[Kept]:
    """The results in a run folder, by name. Other files are left out."""
    for path in sorted((run_dir / FOLDER).glob("*_iter_*.json")):
        try:
            found = json.loads(path.read_bytes())
            if found["what"] in ANALYSES:
                yield Kept(path, found["what"], int(found["step"]), int(found["options"][MEASURED]), found["options"].get("recipe"))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
