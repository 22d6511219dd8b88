"""What is printed at the end of a run: where it is, what it has learned, and which commands come next."""

import json
import math
from pathlib import Path
from typing import Any

from ngpt.durations import duration
from ngpt.shell import in_shell

from .run_folder import SUMMARY_FILE


def summary_of(run_dir: Path) -> dict[str, Any] | None:
    """summary.json; None if it is missing or cannot be read."""
    try:
        summary = json.loads((run_dir / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


def ending(run_dir: Path) -> str:
    """The lines for a run that has finished; empty if it has left no summary."""
    summary = summary_of(run_dir)
    if summary is None or summary.get("status") not in ("finished", "stopped"):
        return ""
    rows = {"run folder": str(run_dir), **figures(summary), "next": ""}
    rows |= {f"  {what}": words for what, words in next_commands(run_dir, summary["run_name"]).items()}
    return "\n".join(["", f"{summary['run_name']}: {summary['status']} after step {summary['steps']:,}", *table(rows)])


def table(rows: dict[str, str]) -> list[str]:
    """Names and values in two columns."""
    width = max(map(len, rows))
    return [f"  {name:<{width}}  {value}".rstrip() for name, value in rows.items()]


def figures(summary: dict[str, Any]) -> dict[str, str]:
    """Name -> value of the results in a summary; missing ones are left out."""
    bits = "{:.3f} bits per byte".format
    losses = [f"{summary['val_loss']:.4f} nats per token"] if _is_number(summary.get("val_loss")) else []
    losses += [bits(summary["val_bits_per_byte"])] if _is_number(summary.get("val_bits_per_byte")) else []
    rows = {
        "validation loss": ", ".join(losses),
        "knowing byte pairs": _shown(summary, "bigram_bits_per_byte", lambda value: f"{bits(value)} (bigram entropy of the same text)"),
        "training loss": "" if losses else _shown(summary, "train_loss", "{:.4f} nats per token, the last; not validated".format),
        "trained on": f"{summary['tokens']:,} tokens in {duration(summary['wall_time_s'])}",
    }
    return {name: value for name, value in rows.items() if value}


def _shown(summary: dict[str, Any], key: str, form: Any) -> str:
    return form(summary[key]) if _is_number(summary.get(key)) else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def next_commands(run_dir: Path, name: str) -> dict[str, str]:
    """What to do next with a trained run -> the command for it."""
    run = in_shell(str(run_dir))
    commands = {"see its curves": f"ngpt report {run}"}
    if any((run_dir / "checkpoints").glob("iter_*")):
        out = in_shell(f"exported/{name}")
        commands |= {"have it write": f'ngpt generate {run} --prompt "The "', "hand it over": f"ngpt export {run} --out {out}"}
    return commands
