"""Seconds from SIGTERM to the published checkpoint, and to the end of the command: `python tests/bench/stop_latency.py [WORD ...]`.

Trains the model of the quickstart on random tokens, signals every process of the run in a step, and waits for the tracker. The save is part
of the figure. Words go to `ngpt train`, for instance `cluster.gpus_per_node=2`.
"""

import json
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))

from runs import start

REPEATS = 5
WORDS = ["experiment=quickstart", "data=mock", "train.steps=1000", "train.eval_interval=1000", "checkpoint.interval=1000"]


def measure(folder: Path, words: list[str]) -> tuple[float, float]:
    """(to the tracker, to the end of the command) in seconds."""
    training = start(folder, *WORDS, "logging.interval=1", *words)
    training.wait_for(lambda t: "step    3/" in t.text)
    everybody = training.tree()
    began = time.perf_counter()
    training.send(signal.SIGTERM, everybody)
    training.wait_for(lambda t: t.newest_step is not None)
    published = time.perf_counter() - began
    code = training.end()
    assert code == 75, training.text
    return published, time.perf_counter() - began


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        times = [measure(Path(work) / f"run{number}", sys.argv[1:]) for number in range(REPEATS)]
    published, ended = zip(*times, strict=True)
    figures = {"to_published_s": published, "to_end_s": ended}
    rounded = {name: [round(seconds, 2) for seconds in values] for name, values in figures.items()}
    print(json.dumps({"words": sys.argv[1:], **rounded, "median_to_published_s": round(statistics.median(published), 2)}))


if __name__ == "__main__":
    main()
