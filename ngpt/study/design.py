"""What a study ran, and with which code, as rows of its page."""

from collections.abc import Mapping, Sequence
from typing import Any

from ngpt.analysis import formats
from ngpt.study.drawing import Results

_SEED = "train.seed="
_BYTES = "bytes"  # tokenizer.kind


def design_rows(results: Results) -> list[tuple[str, str]]:
    """What was run, as rows of a table."""
    study, runs = results["study"], results["runs"]
    seeds = list(dict.fromkeys(run["seed"] for run in runs))
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    scans = {key: list(dict.fromkeys(run["point"][key] for run in runs if key in run["point"])) for run in runs for key in run["point"]}
    tokens = [run["tokens"] for run in runs if run["tokens"] and study["arms"][run["arm"]]["until"] is None]
    lengths = " to ".join(formats.count(value) for value in sorted({min(tokens), max(tokens)})) if tokens else formats.MISSING
    trunks = [name for name in arms if study["arms"][name]["until"] is not None]
    common = [word for word in runs[0]["words"] if all(word in run["words"] for run in runs)] if runs else []
    numbers = ", ".join(map(str, seeds))
    rows = [
        ("Size", ": ".join(filter(None, (results["size"], study["sizes"][results["size"]]["says"])))),
        *((study["arms"][arm]["label"] or arm, _own_words(runs, arm, common)) for arm in arms),
        *((f"Scan of {key}", ", ".join(map(str, values))) for key, values in scans.items()),
        ("All arms", " ".join(word for word in common if not word.startswith(_SEED))),
        ("Seeds", f"{len(seeds)} an arm (train.seed {numbers}). A seed sets initial weights and data order, alike in all arms"),
        ("Tokens of a run", lengths),
        ("A token", "; ".join(dict.fromkeys(_token(run.get("tokenizer")) for run in runs if run["tokens"])) or formats.MISSING),
    ]
    if trunks:
        parts = ", ".join(f"{name} at {study['arms'][name]['until']:.0%} of the steps" for name in trunks)
        rows.append(("Branches", f"Arms continue the checkpoint of {parts}, with its optimizer state"))
    return [*rows, ("Tuning effort", study["tuning"]), ("Left out", study["left_out"] or "The study names nothing")]


def _token(tokenizer: str | None) -> str:
    """What a token is, of which the units speak. Older results do not say the tokenizer."""
    if tokenizer is None:
        return f"What the tokenizer of its text makes: with tokenizer={_BYTES} a byte. These results do not say which it is"
    return "A byte, or the end of a document" if tokenizer == _BYTES else f"A piece of text of the vocabulary of tokenizer.kind={tokenizer}"


def _own_words(runs: Sequence[Mapping[str, Any]], arm: str, common: Sequence[str]) -> str:
    """The words of an arm that not all arms have, and those that change along its scan."""
    of_point = {}
    for run in runs:
        if run["arm"] == arm:
            scanned = {f"{key}={value}" for key, value in run["point"].items()}
            own = [word for word in run["words"] if word not in common and word not in scanned and not word.startswith(_SEED)]
            of_point.setdefault(tuple(run["point"].items()), own)
    shared = [word for word in next(iter(of_point.values())) if all(word in own for own in of_point.values())]
    places = []
    for point, own in of_point.items():
        rest = [word for word in own if word not in shared]
        if rest:
            places.append(f"{' '.join(rest)} at {', '.join(f'{key} {value}' for key, value in point)}")
    return "; ".join([" ".join(shared), *places] if shared else places) or formats.MISSING


def provenance_rows(results: Results) -> list[tuple[str, str]]:
    """With which code, on what, the runs were made, and with which code the results were computed from them."""
    made = list(dict.fromkeys(_provenance(run["provenance"]) for run in results["runs"] if run["provenance"]))
    return [*(("Runs", line) for line in made), ("Results", _provenance(results["provenance"]))]


def _provenance(found: Mapping[str, Any]) -> str:
    git, versions, gpus = (found.get(key) for key in ("git", "versions", "gpus"))
    commit = f"commit {git['commit']}" + (", with uncommitted changes" if git.get("dirty") else "") if git else "commit unknown"
    names = ", ".join(f"{name} {version}" for name, version in (versions or {}).items() if version)
    return "; ".join(part for part in (commit, ", ".join(dict.fromkeys(gpus or [])), names) if part)
