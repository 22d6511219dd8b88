"""`make quickstart`: real text, a small nGPT trained on it, and what came out. Every step is skipped when its result is there."""

import argparse
import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ngpt.config.compose import compose, load
from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config

from .ending import figures
from .generate import SAMPLE_FILE, printable
from .run_folder import CONFIG_FILE, SUMMARY_FILE

TEXT = "enwik8_small"
EXPERIMENT = "quickstart"
PROMPT = "The history of "
SAMPLE_TOKENS = 300
NGPT = [sys.executable, "-m", f"{__package__}.cli"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the steps and prints the table.

    Returns:
        0; the exit code of the step that failed; 1 if the model learned less than a bigram model knows.
    """
    parser = argparse.ArgumentParser(prog="quickstart", description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="train again even if the run is finished")
    parser.add_argument("--precision", metavar="NAME", help="a file of conf/precision; the run is then named quickstart_NAME")
    options = parser.parse_args(arguments)
    overrides = [f"experiment={EXPERIMENT}"]
    try:
        if not options.precision:
            return run(overrides, options.fresh)
        recipe = [*overrides, f"precision={options.precision}", f"run.name={EXPERIMENT}_{options.precision}"]
        compose(recipe)  # a wrong name fails here, not after the run that it is compared with
        return run(recipe, options.fresh, beside=train(overrides))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as failure:  # the step has printed what failed
        return failure.returncode


def run(overrides: list[str], fresh: bool, beside: Path | None = None) -> int:
    """Prepares, trains, samples and reports one quickstart run.

    Args:
        beside: another run, whose curves and figures are shown beside this one's.
    """
    from ngpt.analysis.report import write_report

    run_dir = train(overrides, fresh)
    text = sample(run_dir)
    page = write_report([run_dir] if beside is None else [beside, run_dir], None)
    summary = summary_of(run_dir)
    print(table(summary, text, page, overrides, summary_of(beside) if beside else None))
    return 0 if summary["val_bits_per_byte"] < summary["bigram_bits_per_byte"] else 1


def train(overrides: list[str], fresh: bool = False) -> Path:
    """The folder of a finished run. Trains it unless that was done before; with `fresh`, always."""
    config = compose(overrides)
    run_dir = Path(config.run.dir)
    prepare_data(Path(config.data.train[0].path).parent)
    if fresh and run_dir.exists():
        shutil.rmtree(run_dir)
    if is_finished(config):
        print(f"{run_dir} is finished" + ("" if fresh else "; FRESH=1 trains the run that is asked for again"))
    else:
        step("train", *overrides)
    return run_dir


def step(*words: str, stdout: int | None = None) -> None:
    """Runs an ngpt command to its end. A Ctrl-C reaches it, too: `ngpt train` saves before it leaves, and must not be killed meanwhile.

    Raises:
        CalledProcessError: it failed, or left because it was interrupted.
    """
    command = [*NGPT, *words]
    with subprocess.Popen(command, stdout=stdout) as process:
        while process.returncode is None:
            with suppress(KeyboardInterrupt):
                process.wait()
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)


def summary_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / SUMMARY_FILE).read_text(encoding="utf-8"))


def prepare_data(folder: Path) -> None:
    """Fetches the text and turns it into byte tokens. Both steps verify and keep existing files."""
    from ngpt.data.fetch import fetch

    source = fetch(TEXT)
    step("data", "prepare", str(source), "--out", str(folder), "--tokenizer", "bytes")


def is_finished(config: Config) -> bool:
    """Whether the run folder holds exactly this run, fully trained."""
    run_dir = Path(config.run.dir)
    if not (run_dir / SUMMARY_FILE).exists() or load(run_dir / CONFIG_FILE) != config:
        return False
    return summary_of(run_dir)["status"] == "finished"


def sample(run_dir: Path) -> str:
    """Text by the trained model. The copy in the run folder is reused while it is newer than the run's summary."""
    kept = run_dir / SAMPLE_FILE
    if not kept.exists() or kept.stat().st_mtime_ns < (run_dir / SUMMARY_FILE).stat().st_mtime_ns:
        # The command writes its text into the run folder.
        step("sample", str(run_dir), "--prompt", PROMPT, "--tokens", str(SAMPLE_TOKENS), stdout=subprocess.DEVNULL)
    return kept.read_text(encoding="utf-8", errors="replace")


def table(summary: dict[str, Any], text: str, page: Path, overrides: Sequence[str], beside: dict[str, Any] | None = None) -> str:
    """The run's result, in words and figures a newcomer can judge; `beside` is the summary of the run it is compared with."""
    run_name = summary["run_name"]
    two_processes = [*overrides, "parallel=tp2", "cluster.gpus_per_node=2", f"run.name={run_name}_tp2"]
    # Only the last run.name is kept, since Hydra refuses a key given twice.
    two_processes = [part for part in two_processes if not part.startswith("run.name=") or part.endswith("_tp2")]
    rows = [
        ("parameters", f"{summary['parameters']:,}"),
        *figures(summary).items(),
        *([(f"{beside['run_name']}", f"{beside['val_bits_per_byte']:.3f} bits per byte in {beside['precision']}")] if beside else []),
        ("knowing bytes", f"{summary['unigram_bits_per_byte']:.3f} bits per byte (unigram entropy)"),
        ("report", str(page)),
        ("on 2 processes", f"{Path(sys.executable).parent / 'ngpt'} train {' '.join(two_processes)}"),
    ]
    lines = [f"  {name:<20}{value}" for name, value in rows]
    shown = textwrap.indent(printable(text.strip()), "  | ")
    return "\n".join(["", f"{run_name}: a small nGPT, from text to text", *lines, "  a sample", shown])


if __name__ == "__main__":
    sys.exit(main())
