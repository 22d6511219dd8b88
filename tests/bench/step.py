"""Training steps side by side on one card, in one run: tokens per second and peak memory of every arm.

    python tests/bench/step.py --out FOLDER ARM [ARM...]     an arm: NAME[@CHECKOUT]="WORDS OF ngpt train"
    python tests/bench/step.py --out FOLDER --compare NAME NAME

    python tests/bench/step.py --out steps 'gpt=experiment=gpt_1p2b_dense_bf16 train.micro_batch_size=2' \\
        'ngpt=experiment=ngpt_1p2b_dense_bf16 train.micro_batch_size=2' \\
        'before@../old=experiment=ngpt_1p2b_dense_bf16 train.micro_batch_size=2'

Every arm trains on random tokens in a process of its own, in `--rounds` interleaved rounds; CHECKOUT runs the code of another checkout of
this repository. Step times are those of metrics.jsonl after the first `--warm-up` steps; the first round of an arm also compiles kernels.
`--last` leaves steps behind it out: those of a trace (`debug=profile`) that the same run takes at its end, for overlap.py.
Clock and power of the first GPU under load are sampled by nvidia-smi; copy bandwidth and a product of 8192^3 are measured at the start
and at the end. Refuses to measure where tests/gpu is red, unless --unchecked. MFU here: tokens/s * FLOPs a token over the rate of
`cluster.gpu` that metrics.jsonl counts with.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
COMMON = "data=mock train.eval_steps=0 checkpoint=none logging.interval=1 logging.tensorboard=false train.global_batch_size=8".split()


@dataclass(frozen=True)
class Arm:
    name: str
    words: list[str]
    checkout: Path

    @classmethod
    def parse(cls, text: str) -> "Arm":
        name, equals, words = text.partition("=")
        if not equals:
            sys.exit(f"{text}: must be NAME[@CHECKOUT]=WORDS")
        name, _, checkout = name.partition("@")
        return cls(name, shlex.split(words), Path(checkout).resolve() if checkout else HERE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", metavar="ARM")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--last", type=int, help="the last step that counts")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=float, default=200, help="seconds that a round of an arm may take")
    parser.add_argument("--unchecked", action="store_true", help="do not run tests/gpu first")
    parser.add_argument("--compare", nargs=2, metavar="NAME")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "step.json"
    if options.compare:
        compare(json.loads(results.read_text()), *options.compare)
        return
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "tests" / "gpu")]
    if not options.unchecked and subprocess.run(tests).returncode:
        sys.exit("tests/gpu is red: nothing is measured.")
    arms = [Arm.parse(text) for text in options.arms]
    known = {arm.name: {"words": arm.words, "commit": commit(arm.checkout), "rounds": []} for arm in arms}
    found = {"command": shlex.join(sys.argv), "checked": not options.unchecked, "before": card(), "arms": known}
    for number in range(options.rounds):
        for arm in arms:
            found["arms"][arm.name]["rounds"].append(one_round(arm, number, options))
            results.write_text(json.dumps(found, indent=1) + "\n")
    found["after"] = card()
    results.write_text(json.dumps(found, indent=1) + "\n")
    table(found)


def one_round(arm: Arm, number: int, options: argparse.Namespace) -> dict:
    """Medians of the steps behind the warm-up; what went wrong where none are there."""
    name = f"{arm.name}_{number}"
    words = [*COMMON, *arm.words, f"train.steps={options.steps}", f"run.root={options.out.resolve() / 'runs'}", f"run.name={name}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(arm.checkout), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])}
    with open(options.out / f"{name}.log", "w") as log, sampled(options.out / f"{name}.clocks.csv"):
        command = [sys.executable, "-m", "launch.cli", "train", *words]
        try:
            status = subprocess.run(command, cwd=arm.checkout, env=environment, stdout=log, stderr=log, timeout=options.limit).returncode
        except subprocess.TimeoutExpired:
            status = "timed out"
    found = figures(options.out / "runs" / name, options.warm_up, options.last or options.steps)
    if status != 0 or not found["steps"]:
        return {"status": status}
    return {"status": status} | found | clocks(options.out / f"{name}.clocks.csv")


def figures(run: Path, warm_up: int, last: int) -> dict:
    """Of a run: medians of the steps behind the warm-up and up to the last, how many these are, the peak memory and losses of all."""
    metrics = run / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    steps = [line for line in lines if "step_time_s" in line and warm_up < line["step"] <= last]
    keys = ("step_time_s", "tokens_per_second", "mfu")
    values = {key: [line[key] for line in steps if line.get(key) is not None] for key in keys}
    medians = {key: statistics.median(found) if found else None for key, found in values.items()}  # no mfu on a GPU without rates
    memory = max((line.get("memory_gib") or 0 for line in lines), default=0)
    return {"steps": len(steps), **medians, "peak_gib": memory, "losses": [line.get("train_loss") for line in lines]}


@contextmanager
def sampled(path: Path) -> Iterator[None]:
    """Within it, nvidia-smi writes the first GPU's clock and power into a file, ten times a second; nothing without it."""
    query = ["nvidia-smi", "-i", "0", "-lms", "100", "--format=csv,noheader,nounits", "--query-gpu=clocks.sm,power.draw.instant"]
    if shutil.which(query[0]) is None:
        yield
        return
    with path.open("w") as file:
        sampler = subprocess.Popen(query, stdout=file, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            sampler.terminate()
            sampler.wait()


def clocks(path: Path) -> dict[str, float]:
    """Mean clock and power of the samples under load, those of more than half of the largest power; {} where there are none."""
    rows = [line.split(",") for line in path.read_text().splitlines()] if path.is_file() else []
    pairs = [(float(row[0]), float(row[1])) for row in rows if len(row) == 2 and row[1].strip()[:1].isdigit()]
    busy = [pair for pair in pairs if pair[1] > 0.5 * max(power for _, power in pairs)]
    if not busy:
        return {}
    return {"sm_mhz": statistics.mean(pair[0] for pair in busy), "watts": statistics.mean(pair[1] for pair in busy), "samples": len(busy)}


def commit(checkout: Path) -> str | None:
    """Of a checkout, or what its file COMMIT says where it is a copy without git; "+" behind it: with changes."""
    file = checkout / "COMMIT"
    if file.is_file():  # git would describe the repository that the copy lies in
        return file.read_text().strip()
    described = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=checkout, capture_output=True, text=True)
    return described.stdout.strip() if described.returncode == 0 else None


def card() -> dict:
    """This GPU, its copy bandwidth and rate in a product, measured in a process that leaves its memory."""
    code = """
import json, torch
from bench_tools import copy_bandwidth, environment, median_ms
a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
print(json.dumps(environment() | {"copy_gb_per_s": copy_bandwidth(), "product_tflops": 2 * 8192**3 / median_ms(lambda: a @ b) / 1e9}))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout)


def table(found: dict) -> None:
    for when in ("before", "after"):
        print(f"{when}: {found[when]['gpu']}, copy {found[when]['copy_gb_per_s']:.0f} GB/s, {found[when]['product_tflops']:.0f} TFLOP/s")
    for name, arm in found["arms"].items():
        rounds = [one for one in arm["rounds"] if "steps" in one]
        if not rounds:
            print(f"{name:24s} no steps: {arm['rounds']}")
            continue
        rates = [one["tokens_per_second"] for one in rounds]
        spread = f"{min(rates):8.0f} to {max(rates):8.0f}"
        memory = max(one["peak_gib"] for one in rounds)
        mfu = statistics.median(one["mfu"] or 0 for one in rounds)
        load = [one for one in rounds if "sm_mhz" in one]
        shown = f", {statistics.mean(o['sm_mhz'] for o in load):.0f} MHz, {statistics.mean(o['watts'] for o in load):.0f} W" if load else ""
        print(f"{name:24s} {statistics.median(rates):8.0f} tokens/s ({spread}), MFU {100 * mfu:5.1f} %, {memory:6.2f} GiB{shown}")


def compare(found: dict, first: str, second: str) -> None:
    """Rounds in pairs: the ratio of the tokens per second, and its range."""
    pairs = zip(found["arms"][first]["rounds"], found["arms"][second]["rounds"], strict=True)
    ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs if "steps" in a and "steps" in b]
    print(f"{first} / {second}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} pairs)")


if __name__ == "__main__":
    main()
