"""Damaged inputs of every kind: none may end in a traceback, a hang, or a half-written file.

    python tests/faults/fuzz.py [--count 10000] [--commands 200] [--seed 0] [--keep FOLDER] [--target NAME ...]

Each target runs in a process of its own, under an alarm for each input and a limit of memory; a ConfigError is the right end. The seed
decides everything: the number of a finding makes its input again (`--target NAME --only NUMBER`).
"""

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from fuzz_targets import TARGETS, Fixtures  # noqa: E402

from ngpt.config.errors import ConfigError  # noqa: E402

ALARM_S = 30  # for milliseconds of work: the machine may be busy
MEMORY_BYTES = 6 << 30
COMMAND_S = 120


class Hang(BaseException):
    """The alarm; nothing may catch it."""


def _alarm(_number: int, _frame: object) -> None:
    raise Hang


def run_target(name: str, numbers: range, seed: int, folder: Path) -> Counter[str]:
    """Feed one target. Returns how often each ending occurred, and prints each new kind of failure once."""
    target = TARGETS[name][0]
    fixtures = Fixtures(folder)
    signal.signal(signal.SIGALRM, _alarm)
    ends: Counter[str] = Counter()
    for number in numbers:
        signal.alarm(ALARM_S)
        try:
            target(random.Random(f"{seed} {name} {number}"), fixtures)
            ends["accepted"] += 1
        except ConfigError as error:
            ends["refused"] += 1
            str(error)
        except BaseException as error:
            signal.alarm(0)
            if isinstance(error, KeyboardInterrupt):
                raise
            frame = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {frame.filename}:{frame.lineno}"
            ends["failed"] += 1
            if not ends[kind]:
                print(f"{name} {number}: {kind}: {str(error)[:200]}\n{_ours(error)}", flush=True)
            ends[kind] += 1
        finally:
            signal.alarm(0)
    return ends


def _ours(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if str(ROOT) in frame.filename]
    return "\n".join(f"    {frame.filename}:{frame.lineno} {frame.line}" for frame in frames[-4:])


def run_commands(count: int, seed: int, folder: Path) -> Counter[str]:
    """Damaged inputs to real commands: exit codes 0 and 2 are right, and nothing else is."""
    fixtures = Fixtures(folder)
    ends: Counter[str] = Counter()
    for number in range(count):
        rng = random.Random(f"{seed} command {number}")
        words = _command(rng, fixtures)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "launch.cli", *words]
        try:
            done = subprocess.run(
                command, cwd=fixtures.work, env=environment, capture_output=True, timeout=COMMAND_S, errors="replace", text=True
            )
            right = done.returncode in (0, 2) and "Traceback" not in done.stdout + done.stderr
            end = {0: "accepted", 2: "refused"}[done.returncode] if right else "failed"
            words_of_failure = done.stderr[-500:]
        except subprocess.TimeoutExpired:
            end, words_of_failure = "failed", f"no end within {COMMAND_S} s"
        ends[end] += 1
        if end == "failed":
            print(f"command {number}: {words}\n{words_of_failure}", flush=True)
    return ends


def _command(rng: random.Random, fixtures: Fixtures) -> list[str]:
    """Writes one damaged input as a target would, and says which command reads it."""
    kind = rng.choice(["overrides", "config_file", "manifest", "data_files", "metrics", "sources"])
    words: dict[str, list[str]] = {
        "manifest": ["data", "inspect", "."],
        "data_files": ["data", "inspect", ".", "--deep"],
        "metrics": ["report", ".", "--out", "report"],
        "sources": ["data", "prepare", ".", "--out", "again", "--workers", "1"],
    }
    if kind == "overrides":
        from fuzz_mutators import override
        from fuzz_targets import KEYS

        fixtures.fresh()
        typed = override(rng, KEYS).encode(errors="replace").decode().replace("\0", "")  # what a command line can hold
        return [rng.choice(["config", "estimate"]), "experiment=ngpt_tiny", typed]
    try:
        TARGETS[kind][0](rng, fixtures)
    except ConfigError:
        pass
    if kind == "config_file":
        group = next(path.name for path in fixtures.work.iterdir())
        return ["config", "--config-dir", ".", *(["experiment=zz"] if group == "experiment" else ["experiment=ngpt_tiny", f"{group}=zz"])]
    return words[kind]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="inputs in all, or of the one target with --only")
    parser.add_argument("--commands", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=None)
    parser.add_argument("--only", type=int, help="one input by its number")
    parser.add_argument("--keep", type=Path, help="folder whose work/ keeps the last input")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        return _run(options, options.keep or Path(folder))


def _run(options: argparse.Namespace, folder: Path) -> int:
    if options.child or options.only is not None:
        numbers = range(options.count) if options.only is None else range(options.only, options.only + 1)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        ends = run_target(options.target[0], numbers, options.seed, folder)
        print(f"{options.target[0]}: {sum(ends[end] for end in ('accepted', 'refused', 'failed'))} inputs, {_counts(ends)}", flush=True)
        return int(ends["failed"] > 0)
    failed = 0
    for name in options.target if options.target is not None else TARGETS:
        count = TARGETS[name][1] * options.count // 10_000
        words = ["--child", "--target", name, "--count", str(count), "--seed", str(options.seed), "--keep", str(folder / name)]
        failed += subprocess.run([sys.executable, __file__, *words], check=False, stdin=subprocess.DEVNULL).returncode != 0
    if options.commands:
        ends = run_commands(options.commands, options.seed, folder / "commands")
        print(f"commands: {options.commands}, {_counts(ends)}", flush=True)
        failed += ends["failed"] > 0
    return int(failed > 0)


def _counts(ends: Counter[str]) -> str:
    return ", ".join(f"{ends[end]} {end}" for end in ("accepted", "refused", "failed"))


if __name__ == "__main__":
    sys.exit(main())
