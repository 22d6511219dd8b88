"""`ngpt export`: one worker, on the CPU."""

import argparse
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launch.environment import worker_environment, worker_variables
from launch.processes import worker_command
from launch.world import single_world
from ngpt.config.one_process import run_config

DTYPES = {"float32": "the fp32 masters", "bfloat16": "the weights as they were trained with; scales stay fp32"}
PARITY = {"full": "both models whole", "layers": "a layer of both at a time", "none": "no comparison"}


def main(arguments: Sequence[str]) -> int:
    """Writes a run's checkpoint as a folder that transformers opens.

    Raises:
        ConfigError: `run` is not a run folder.
    """
    parser = argparse.ArgumentParser(
        prog="ngpt export",
        description="Writes a checkpoint as a folder that transformers opens, and proves that it computes what was trained.",
        epilog="The comparison runs on the CPU in fp32: the same text through the trainer's modules and through the written folder.",
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; it must not exist")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help=_listed(DTYPES) + " (default: %(default)s)")
    parser.add_argument(
        "--fold-logit-scale", action="store_true", help="nGPT: multiply the output matrix with the logits' scale; cannot be imported again"
    )
    parser.add_argument("--remote-code", action="store_true", help="a control: our code, even where a class of transformers fits")
    parser.add_argument("--no-tokenizer", dest="tokenizer", action="store_false", help="write no tokenizer")
    parser.add_argument("--parity", choices=PARITY, help=_listed(PARITY) + " (default: full where memory allows it, else layers)")
    options = parser.parse_args(arguments)
    variables = worker_variables(run_config(options.run), local_processes=1, cuda=False) | {"CUDA_VISIBLE_DEVICES": ""}
    request = vars(options) | {"out": str(options.out)}
    request["run_dir"] = str(request.pop("run"))
    command = worker_command(["export", json.dumps(request)], processes=1, run_dir=options.run)
    environment = worker_environment(variables, single_world()) | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, check=False).returncode


def _listed(described: dict[str, str]) -> str:
    return "; ".join(f"{name}: {line}" for name, line in described.items())
