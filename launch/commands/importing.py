"""`ngpt import`."""

import argparse

from ..arguments import Parser, add_path

EPILOG = """\
A new run goes on from the imported weights, with a fresh optimizer:

  ngpt train --config-dir ROOT/NAME/conf model=imported tokenizer=imported checkpoint.load=ROOT/NAME/checkpoints run.name=NAME \\
    data.mock=false data.train=... data.valid=... train.seq_length=... train.micro_batch_size=... train.global_batch_size=... \\
    train.steps=...

checkpoint.load_optimizer stays false: the checkpoint holds weights alone. What says how a model learns and config.json does not carry
(model.moe_aux_loss, model.mtp_loss_coeff, ...) may be set there. An experiment with the same model can be named in place of model=imported.
"""


def add_arguments(parser: Parser) -> None:
    parser.description = (
        "Makes a run folder with a checkpoint of step 0 of what `ngpt export` wrote, or of a folder of transformers' classes "
        "llama, arcee and nemotron_h that our GPT control computes exactly."
    )
    parser.explain = EPILOG.strip
    add_path(parser, "folder", metavar="DIR", help="folder with config.json and *.safetensors")
    parser.add_argument("--run", dest="name", required=True, metavar="NAME", help="name of the run; its folder must not exist")
    add_path(parser, "--root", metavar="DIR", help="where run folders are (default: runs)")


def run(options: argparse.Namespace) -> int:
    from ..importing import import_folder

    return import_folder(options.folder, options.name, options.root)
