"""`ngpt import`: one worker, on the CPU."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from launch.cpu_worker import run_task
from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config, RunConfig

EPILOG = """\
A new run goes on from the imported weights, with a fresh optimizer:

  ngpt train --config-dir ROOT/NAME/conf model=imported tokenizer=imported checkpoint.load=ROOT/NAME/checkpoints run.name=... \\
    data.train=... train.seq_length=... train.micro_batch_size=... train.global_batch_size=... train.steps=...

checkpoint.load_optimizer stays false: the checkpoint holds weights alone. What says how a model learns and config.json does not carry
(model.moe_aux_loss, model.mtp_loss_coeff, ...) may be set there. An experiment with the same model can be named in place of model=imported.
"""


def main(arguments: Sequence[str]) -> int:
    """Makes a run folder of a folder of Hugging Face's form.

    Raises:
        ConfigError: it is no such folder, or the run folder exists.
    """
    parser = argparse.ArgumentParser(
        prog="ngpt import",
        description="Makes a run folder with a checkpoint of step 0 of what `ngpt export` wrote, or of a folder of transformers' classes "
        "llama, arcee and nemotron_h that our GPT control computes exactly.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with config.json and *.safetensors")
    parser.add_argument("--run", required=True, metavar="NAME", help="name of the run; its folder must not exist")
    parser.add_argument("--root", default=RunConfig.root, help="where run folders are (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not (options.folder / "config.json").exists():
        raise ConfigError(str(options.folder), "no config.json there", "What `ngpt export` wrote is imported", "Name such a folder")
    run_dir = Path(options.root) / options.run
    if run_dir.exists():
        raise ConfigError("--run", run_dir, "It exists, and an import makes a new run", "Name another one, or remove it")
    request = {"folder": str(options.folder), "run": options.run, "root": options.root}
    return run_task("importing", request, Config(), run_dir)
