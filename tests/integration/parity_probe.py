"""One process: writes exports of a run, breaks them, and says what the comparison with the trainer finds.

Arguments: RUN FOLDER OUT. OUT gets {name of the change: {holds, layer, logit_difference, bound, disagreeing}}.
"""

import json
import sys
from pathlib import Path

from launch.worker import install_compat

install_compat()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.training.training import destroy_global_state  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from megatron_ext.training import parity  # noqa: E402
from megatron_ext.training.export import sample_text  # noqa: E402
from ngpt.config.one_process import run_checkpoint, run_config  # noqa: E402
from ngpt.hf.export import Options, write_folder  # noqa: E402


def nothing(tensors: dict[str, torch.Tensor]) -> None:
    """Leaves the folder as it was written."""


def swapped_keys(tensors: dict[str, torch.Tensor]) -> None:
    """Two heads' keys in each other's place: the function differs, no norm does."""
    name = "model.layers.2.mixer.k_proj.weight"
    tensors[name] = tensors[name].roll(16, 0).contiguous()


def one_scale(tensors: dict[str, torch.Tensor]) -> None:
    """One entry of the logits' scale off by a thousandth."""
    tensors["logit_scale"][7] *= 1.001


def other_experts(tensors: dict[str, torch.Tensor]) -> None:
    """The router's rows in another order: tokens go to other experts."""
    name = "model.layers.1.mixer.gate.weight"
    tensors[name] = tensors[name].flip(0).contiguous()


run, folder, out = sys.argv[1:]
cfg = run_config(Path(run))
choice = run_checkpoint(cfg)
write_folder(cfg, choice, Options(tokenizer=False), Path(folder))
weights = Path(folder) / "model.safetensors"
written, found = load_file(weights), {}
for change in (nothing, swapped_keys, one_scale, other_experts):
    tensors = {name: tensor.clone() for name, tensor in written.items()}
    change(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})
    for layers in (False, True):
        seen = parity.compare(cfg, choice.folder, Path(folder), sample_text(cfg), rounded=False, layers=layers)
        found[f"{change.__name__} {seen.mode}"] = seen.as_dict()
        destroy_global_state()  # a comparison initialises Megatron
        parallel_state.destroy_model_parallel()
Path(out).write_text(json.dumps(found))
