"""All that a host of eight GPUs of 141 GB has to show of the large hybrids, in one session that can be interrupted.

    ngpt data fetch enwik8 && ngpt data prepare enwik8 --tokenizer tekken      # data/enwik8_tekken: 20 steps take 10.5M tokens
    python tests/bench/eight_gpus.py --out FOLDER [--checkpoints /dev/shm/FOLDER] [WORD ...]
    python tests/bench/eight_gpus.py --out FOLDER --dry-run     the commands, with what `ngpt estimate` says of each
    python tests/bench/eight_gpus.py --out FOLDER --layers 26   half of the model: on four GPUs 0.86 of the whole's memory on eight
    python tests/bench/eight_gpus.py --out FOLDER --gpus 0 --cut 'data.train=[{path: data/texts_bytes/train}]'     seconds a step on a CPU

1. The 3B-active hybrids, nGPT in BF16 and emulated NVFP4, and the control: 20 steps of text at sequence 8192 and batch 64. Loss, norms,
   tokens per second, MFU, memory and time beside their estimates, and of steps 18 and 19 the share of exposed communication.
2. A checkpoint of the first 13 layers: a run that stops at step 10 and resumes, beside one straight through, bit for bit.
3. The checkpoint of step 10 on half of the GPUs, and exported, its logits beside the trainer's.
4. Weak scaling of the dense 1.2B model: data-parallel, and with tensor parallelism 2.

Words for data and tokenizer go to every training (`data=NAME tokenizer=NAME`, or `data.train=[...]`; add `debug=deterministic` to see
whether bits that differ come from kernels). Fewer GPUs share the experts among them; `--gpus 0` is two processes of a CPU. `--cut` has tiny
widths and texts in bytes (`ngpt data prepare FOLDER --out data/texts_bytes`).

A step leaves STEP.json and STEP.log in FOLDER. The same command again runs what is missing or failed. A check that did not hold is a
finding and is not repeated: remove STEP.json to do so. Checkpoints need 28 bytes a parameter at most, 195 GiB for the 13 layers;
that of step 10 stays.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

from step import HERE

sys.path.insert(0, str(HERE))
from eight_gpus_measures import MEASURES, result  # noqa: E402
from eight_gpus_plan import LAYERS, Host, Step, plan  # noqa: E402

from launch.devices import gpu_names  # noqa: E402
from launch.environment import member_environment, visible_gpus  # noqa: E402
from launch.provenance import git_state, versions  # noqa: E402
from ngpt.config.compose import compose  # noqa: E402
from ngpt.config.errors import ConfigError  # noqa: E402
from ngpt.estimate.counts import count_parameters  # noqa: E402
from ngpt.estimate.hardware import GPUS, gpu_of_device  # noqa: E402
from ngpt.estimate.report import estimate  # noqa: E402
from ngpt.files import replacing  # noqa: E402
from ngpt.locks import locked  # noqa: E402

_GIB = 2**30
_SAVE_S = 120  # that a command has to leave after its time is over


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, help="folder for them (default: OUT/checkpoints)")
    parser.add_argument("--gpus", type=int, choices=(0, 1, 2, 4, 8), help="0: two processes of a CPU (default: all that are visible)")
    parser.add_argument("--gpu", choices=sorted(GPUS), help="for estimates (default: detected)")
    parser.add_argument("--cut", action="store_true", help="tiny widths")
    parser.add_argument("--layers", type=int, help="of the trainings, the first of their pattern (default: all; with --cut 13)")
    parser.add_argument("--no-recompute", action="store_true", help="parallel=ep8 in place of ep8_recompute")
    parser.add_argument("--full-save", action="store_true", help="also save a checkpoint of the whole hybrid, 440 GB")
    parser.add_argument("--steps-only", metavar="LIST", help="names with commas between, of those that --dry-run shows")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    options = parser.parse_args(arguments)
    host = host_of(options)
    steps = plan(host)
    chosen = options.steps_only.split(",") if options.steps_only else [step.name for step in steps]
    if unknown := set(chosen) - {step.name for step in steps}:
        parser.error(f"--steps-only: no step {', '.join(sorted(unknown))}; there are {', '.join(step.name for step in steps)}")
    if options.dry_run:
        show([step for step in steps if step.name in chosen])
        return 0
    check_session(host)
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: the command that runs is ended, too
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    with locked(host.out, "--out", "One session at a time writes a folder; {holder} does", "Wait for its end, or give another folder"):
        for step in missing(host, [step for step in steps if step.name in chosen]):
            print(f"== {step.name}, at most {step.limit_s // 60} min", flush=True)
            found = carry_out(host, step)
            with replacing(host.out / f"{step.name}.json") as file:
                file.write((json.dumps(found, indent=1) + "\n").encode())
            print("  ", found["state"], shown(found["figures"]), flush=True)
            (host.out / "table.md").write_text(table(host, steps))
    print(table(host, steps))
    return int(any(result(host, name).get("state") != "done" for name in chosen))


def host_of(options: argparse.Namespace) -> Host:
    names, cpu = gpu_names(), options.gpus == 0
    ranks = 2 if cpu else options.gpus or len(names) or (8 if options.dry_run else 0)
    if ranks not in (1, 2, 4, 8):
        sys.exit(f"--gpus: {ranks} GPUs are visible; experts are shared by 1, 2, 4 or 8. Give --gpus one of these, or 0 for a CPU.")
    if not cpu and not options.dry_run and ranks > len(names):
        sys.exit(f"--gpus: {ranks}, but {len(names)} are visible. Give fewer, 0 for a CPU, or only look at the commands with --dry-run.")
    gpu = None if cpu else options.gpu or (gpu_of_device(names[0]) if names else "h200")
    out = options.out.resolve()
    checkpoints = (options.checkpoints or out / "checkpoints").resolve()
    words = tuple(options.words)
    layers = options.layers if options.layers is not None else LAYERS if options.cut else None
    return Host(ranks, cpu, gpu, options.cut, layers, not options.no_recompute, options.full_save, words, out, checkpoints)


def show(steps: list[Step]) -> None:
    """Every command, composed and checked, with its estimate."""
    for step in steps:
        told = ""
        if step.command[0] == "train":
            said = estimate(compose(step.command[1:]))
            memory, rate = said["memory"], said["step"]
            told = f", estimated: {memory['peak_bytes'] / _GIB:.1f} GiB ({'fits' if memory['fits'] else 'does not fit'}), "
            told += f"{rate['seconds']:.2f} s, {rate['tokens_per_second']:,.0f} tokens/s, MFU {rate['mfu']:.1%}"
            told += f"; leaves {said['parameters_total'] * step.writes / _GIB:.1f} GiB" if step.writes else ""
        print(f"# {step.name}: {step.ranks} ranks, at most {step.limit_s // 60} min{told}\nngpt {shlex.join(step.command)}")


def check_session(host: Host) -> None:
    """Figures of one folder are of one host and of one set of options, but for those that no figure depends on."""
    host.out.mkdir(parents=True, exist_ok=True)
    file, mine = host.out / "session.json", json.loads(json.dumps(asdict(host) | {"full_save": None, "checkpoints": None}, default=str))
    if not file.exists():
        file.write_text(json.dumps(mine, indent=1) + "\n")
    before = json.loads(file.read_text())
    if different := [key for key in mine if mine[key] != before.get(key)]:
        got = ", ".join(f"{key} {mine[key]} after {before.get(key)}" for key in different)
        sys.exit(f"--out: {host.out} has figures of another session: {got}. Give another folder, or the same options.")


def missing(host: Host, steps: list[Step]) -> list[Step]:
    """Those that have not run to their end."""
    return [step for step in steps if result(host, step.name).get("state") != "done"]


def carry_out(host: Host, step: Step) -> dict:
    """Runs a step and reads its figures. Whatever goes wrong is what it leaves: the next step is tried all the same."""
    found = {"state": "done", "command": shlex.join(("ngpt", *step.command)), "commit": revision(), "figures": {}, "checks": {}}
    began = time.monotonic()
    try:
        if not step.goes_on:
            for folder in (host.run(step.name), host.checkpoints / step.name):
                shutil.rmtree(folder, ignore_errors=True)
        check_needs(host, step)
        execute(host, step)
        found["figures"], found["checks"] = MEASURES[step.kind](host, step)
    except Exception as error:
        found["state"] = f"failed: {error if isinstance(error, RuntimeError) else repr(error)}"
    return found | {"minutes": (time.monotonic() - began) / 60}


def revision() -> str | None:
    """The commit; "+" behind it: with changes."""
    state, _ = git_state(HERE)
    return state and f"{state['commit']}{'+' if state['dirty'] else ''}"


def check_needs(host: Host, step: Step) -> None:
    """Raises RuntimeError where a step before, or room for what it writes, is missing."""
    for name in step.needs:
        if result(host, name).get("state") != "done":
            raise RuntimeError(f"needs {name}, which is not done")
    if step.writes:
        host.checkpoints.mkdir(parents=True, exist_ok=True)
        trained = step if step.command[0] == "train" else next(other for other in plan(host) if other.name == "half")
        needed = count_parameters(compose(trained.command[1:]).model).total * step.writes
        free = shutil.disk_usage(host.checkpoints).free
        if free < needed:
            lacking = f"{(needed - free) / _GIB:.1f} of {needed / _GIB:.1f} GiB are lacking"
            raise RuntimeError(f"{host.checkpoints}: {lacking}; name a larger folder by --checkpoints")


def execute(host: Host, step: Step) -> None:
    """Runs the command, on the first GPUs that are visible here. Raises RuntimeError unless it ends well and in time."""
    environment = member_environment([] if host.cpu else visible_gpus()[: step.ranks], 1)
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    log = host.out / f"{step.name}.log"
    with log.open("a" if step.goes_on else "w") as stream:
        process = subprocess.Popen([sys.executable, "-m", "launch.cli", *step.command], env=environment, stdout=stream, stderr=stream)
        try:
            code = process.wait(step.limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
    if code != 0:
        lines = log.read_text(errors="replace").strip().splitlines() or ["nothing was printed"]
        ended = f"exit code {code}" if code is not None else f"still running after {step.limit_s // 60} min"
        raise RuntimeError(f"{ended}; {log.name}: {lines[-1]}")


def stop(process: subprocess.Popen) -> None:
    """Ends a command that still runs, and waits: the next one needs its GPUs."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_SAVE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def shown(figures: dict) -> str:
    """Numbers and words on one line, without lists."""
    plain = {name: value for name, value in figures.items() if not isinstance(value, list | dict)}
    return ", ".join(f"{name} {value if isinstance(value, int | str) else format(value, '.4g')}" for name, value in plain.items())


def table(host: Host, steps: list[Step]) -> str:
    """The page for tests/bench/results: a row a step that has run, versions and commands."""
    found = {step.name: result(host, step.name) for step in steps}
    found = {name: left for name, left in found.items() if left}
    device = f"{host.ranks} processes of a CPU" if host.cpu else f"{host.ranks} x {gpu_names()[0]}"
    installed = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    commits = ", ".join(sorted({str(left["commit"]) for left in found.values()}))
    models = "Cut models" if host.cut else f"{f'{host.layers} layers of the' if host.layers else 'The'} large hybrids and weak scaling"
    lines = [f"# {models} on {device}, {date.today()}", ""]
    lines += [f"Commit {commits}. Python {platform.python_version()}, {installed}.", ""]
    lines += ["| step | state | figures | checks that did not hold | minutes |", "|---|---|---|---|---|"]
    for name, left in found.items():
        failed = ", ".join(check for check, holds in left["checks"].items() if not holds) or ("none" if left["checks"] else "-")
        cells = (left["state"].replace("|", "/"), shown(left["figures"]), failed, f"{left['minutes']:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = "\n".join([*lines, "", "```sh", *(left["command"] for left in found.values()), "```", ""])
    return text.replace(str(host.out), "OUT").replace(str(host.checkpoints), "CHECKPOINTS")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        sys.exit(str(error))
