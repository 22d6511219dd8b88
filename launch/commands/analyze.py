"""`ngpt analyze`."""

import argparse

from ngpt.model_analysis import ANALYSES, DEFAULT_RECIPE

from ..arguments import DEVICES, DTYPES, add_config_dir, add_path

SEED = 0
METHODS = ("double_backward", "differences")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measures what quantisation and small steps do to a trained model, on held-out text, with 95 % intervals."
    parser.epilog = "Without --what: what there is, and what is kept already. A run keeps its results in analysis/<what>_iter_<step>.json."
    add_path(parser, "path", metavar="RUN|DIR", help="run folder, or an exported folder of ngpt's own class")
    parser.add_argument("--what", metavar="NAME,...", help="; ".join(f"{name}: {line}" for name, line in ANALYSES.items()))
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="PREFIX",
        help="prepared data, data/NAME/valid for instance; may be given several times (default: the run's valid, else its train)",
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="read so many, in whole sequences (default: a few sequences)")
    parser.add_argument("--seed", type=int, default=SEED, help="of the text and of all that is drawn (default: %(default)s)")
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, metavar="NAME", help="a file of conf/precision (default: %(default)s)")
    add_config_dir(parser)
    parser.add_argument("--batch-size", type=int, metavar="N", help="snr: sequences of a GEMM (default: the run's micro-batch; 1)")
    parser.add_argument("--directions", type=int, metavar="N", help="flatness: random directions, and draws of noise (default: 6)")
    parser.add_argument("--radii", metavar="R,...", help="flatness: steps, of the weights' norm (default: 0.02,0.05,0.1,0.2,0.4)")
    parser.add_argument("--hvp", choices=METHODS, default=METHODS[0], help="curvature: how H v is computed (default: %(default)s)")
    parser.add_argument("--step", type=int, help="which checkpoint of a run (default: the newest)")
    parser.add_argument("--dtype", choices=DTYPES, help="of a run: the fp32 masters (default), or what was trained; of a folder: its own")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="(default: a GPU where there is one)")
    parser.add_argument("--name", metavar="NAME", help="kept as <what>_<NAME>_iter_<step>.json (default: the recipe's, if another one)")
    add_path(parser, "--out", kind="file", metavar="FILE", help="JSON file for the result of one analysis, in place of the run's own")
    parser.add_argument("--json", action="store_true", help="print each result as one line of JSON")


def run(options: argparse.Namespace) -> int:
    from ..analyze import run_analyses

    return run_analyses(options)
