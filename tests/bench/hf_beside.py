"""Whether `checkpoint.hf` slows steps: the same run with and without, in turn (with, without, without, with, ...).

    python tests/bench/hf_beside.py [--rounds 2] [--steps 1500] [--interval 300] [WORD ...]

Trains the model of the quickstart on random tokens. Words go to `ngpt train` after those, so that a larger model can be measured:
`--steps 24 --interval 8 experiment=ngpt_1p2b_dense_bf16 data=mock train.global_batch_size=4`. Both save at the same steps, asynchronously.
Step times are those of metrics.jsonl behind the first checkpoint, up to the last step; the time that a save itself takes is not among them.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = ["experiment=quickstart", "data=mock", "train.eval_steps=0", "logging.tensorboard=false", "checkpoint.async_save=true"]
_USED = re.compile(r"step (\d+): .* ([\d.]+) s, ([\d.]+) s of a CPU")


@dataclass(frozen=True)
class Figures:
    """Of one run: milliseconds of its steps, and (seconds, seconds of a CPU) of its exports."""

    steps: list[float]
    exports: list[tuple[float, float]]

    @property
    def median(self) -> float:
        return statistics.median(self.steps)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.steps)


def train(folder: Path, options: argparse.Namespace, hf: bool) -> Figures:
    """Runs `ngpt train` to its end."""
    words = [f"train.steps={options.steps}", f"train.eval_interval={options.steps}", f"checkpoint.interval={options.interval}"]
    words += ["checkpoint.keep_last=2", "logging.interval=1", f"logging.health_interval={options.steps}", f"run.dir={folder}"]
    command = [sys.executable, "-m", "launch.cli", "train", *WORDS, *words, f"checkpoint.hf={str(hf).lower()}", *options.words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step_time_s"] * 1e3 for row in rows if options.interval < row["step"] < options.steps]
    log = folder / "logs" / "hf-export.log"
    exports = [(float(found[2]), float(found[3])) for found in _USED.finditer(log.read_text() if log.exists() else "")]
    if hf and not exports:
        sys.exit(f"nothing was exported: {done.stderr[-2000:]}")
    return Figures(steps, exports)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--interval", type=int, default=300, help="steps between checkpoints")
    parser.add_argument("words", nargs="*", metavar="WORD")
    options = parser.parse_args()
    if options.interval + 2 > options.steps:
        parser.error("--interval: some steps must follow the first checkpoint")
    found: dict[bool, list[Figures]] = {True: [], False: []}
    print(f"{'checkpoint.hf':<14}{'median ms':>11}{'mean ms':>11}{'exports':>9}{'s each':>9}{'CPU s':>8}")
    for number in range(2 * options.rounds):
        hf = number % 4 in (0, 3)
        with tempfile.TemporaryDirectory() as work:
            figures = train(Path(work) / "run", options, hf)
        found[hf].append(figures)
        used = [statistics.fmean(column) for column in zip(*figures.exports, strict=True)] or [0.0, 0.0]
        row = f"{str(hf).lower():<14}{figures.median:>11.2f}{figures.mean:>11.2f}{len(figures.exports):>9}{used[0]:>9.1f}{used[1]:>8.1f}"
        print(row, flush=True)
    for name in ("median", "mean"):
        ratios = [getattr(one, name) / getattr(other, name) for one, other in zip(found[True], found[False], strict=True)]
        print(f"{name} step, with over without: {statistics.median(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f})")


if __name__ == "__main__":
    main()
