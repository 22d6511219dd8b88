"""`ngpt import`: a folder of Hugging Face's form becomes a run folder with a checkpoint of step 0, which holds weights alone."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args, training
from torch import Tensor, nn

from megatron_ext.optim.norm_check import worst_norm_deviation
from megatron_ext.training.checkpoint_save import CheckpointSaver
from megatron_ext.training.parity import build_trainer
from megatron_ext.training.run import megatron_log
from ngpt.checkpoints.manifest import WEIGHTS_ONLY
from ngpt.config import ConfigError
from ngpt.config.compose import dump
from ngpt.config.one_process import CONFIG_FILE
from ngpt.files import new_folder
from ngpt.hf.importing import CONF, OPTION, Source, read_source
from ngpt.hf.links import links, shapes_of

UNIT_TOLERANCE = 2.0**-8  # tolerance of norms: rounding an entry to bf16 changes it by at most 2^-9 of itself
OF_VOCABULARY = {"embedding.word_embeddings.weight", "output_layer.weight", "sz.stored"}


@dataclass(frozen=True)
class Request:
    """What to import, and the run that it becomes; see `ngpt import --help`."""

    folder: str
    run: str
    root: str


def main(request: Request) -> None:
    """Makes the run folder, which must not exist, or leaves none.

    Raises:
        ConfigError: the folder is not a model of ours, or not whole.
    """
    run_dir = Path(request.root) / request.run
    with new_folder(run_dir) as folder:
        source = read_source(Path(request.folder), request.run, request.root, folder / CONF)
        with megatron_log(folder / "logs" / "megatron-import.log") as say:
            for line in source.notes:
                say(line)
            parameters = _import(source, folder, say)
            dump(source.cfg, folder / CONFIG_FILE)
            say(f"{request.folder}: {source.folder.config['model_type']}, {parameters:,} parameters, is step 0 of {run_dir}")
            batch = " ".join(f"train.{key}=..." for key in ("micro_batch_size", "global_batch_size", "steps"))
            say(f"continue it: {command(source)} run.name=NAME data.mock=false data.train=... data.valid=... {batch}")


def command(source: Source) -> str:
    """What starts a run from the imported weights, as far as the import knows it."""
    cfg = source.cfg
    options = f"model={OPTION} tokenizer={OPTION} checkpoint.load={cfg.checkpoint.dir} train.seq_length={cfg.train.seq_length}"
    return f"ngpt train --config-dir {Path(cfg.run.dir) / CONF} {options}"


def _import(source: Source, folder: Path, say: Callable[[str], None]) -> int:
    """Builds the model, fills it and saves it. Host memory: the model once in fp32, one link of tensors, and what the writer buffers."""
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    model = build_trainer(source.cfg, save=str(checkpoints), save_interval=1, no_save_optim=True, no_save_rng=True)
    parameters = fill(model, source)
    check_norms(model, source)
    get_args().iteration = 0
    mark = {WEIGHTS_ONLY: True, "imported_from": str(source.folder.path.absolute())}
    saver = CheckpointSaver(source.cfg, say, folder=checkpoints, norm_tolerance=UNIT_TOLERANCE, extra=mark)
    with saver.installed():
        training.save_checkpoint(0, [model], None, None, 0)
    return parameters


@torch.no_grad()
def fill(model: nn.Module, source: Source) -> int:
    """Copies every tensor of the folder into the model, a link at a time. Rows that pad the vocabulary stay as they were built.

    Returns:
        How many numbers were taken over.
    """
    parts = _parts(model)
    sizes = {key: tuple(each[0].global_shape) for key, each in parts.items()}
    count, left = 0, set(parts)
    for link in links(source.cfg.model):
        for name, shape in shapes_of(link, sizes).items():
            source.folder.check_shape(source.names[name], shape)
        if any(key not in parts for key in link.keys):  # the folder's are zeros, and the model has none
            continue
        tensors = [source.folder.read(source.names[name]) for name in link.names]
        count += sum(tensor.numel() for tensor in tensors)
        for key, whole in zip(link.keys, link.to_checkpoint(tensors), strict=True):
            rows = source.cfg.model.vocab_size if key in OF_VOCABULARY else None
            for part in parts[key]:
                _place(part, whole)[:rows].copy_(_cut(part, whole)[:rows])
        left -= set(link.keys)
    assert not left, f"of the model and not of the folder: {left}"
    return count


def _parts(model: nn.Module) -> dict[str, list[ShardedTensor]]:
    """Key in a checkpoint -> the views of the model's tensors that Megatron saves under it."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    state = model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
    apply_factories(state)
    storages = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    parts: dict[str, list[ShardedTensor]] = {}
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            assert value.data.untyped_storage().data_ptr() in storages, f"{value.key} is a copy of what the model holds"
            parts.setdefault(value.key, []).append(value)
    return parts


def _place(part: ShardedTensor, whole: Tensor) -> Tensor:
    assert part.data.dtype == whole.dtype == torch.float32, f"{part.key}: {part.data.dtype}"
    return part.data


def _cut(part: ShardedTensor, whole: Tensor) -> Tensor:
    """The part of a whole tensor that a sharded one stands for. Axes in front of its own, of experts, have length 1 there."""
    shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    cut = whole[tuple(slice(start, start + length) for start, length in zip(part.global_offset, shape, strict=True))]
    return cut.view(part.local_shape)


def check_norms(model: nn.Module, source: Source) -> None:
    """Raises ConfigError where a matrix has rows or columns without unit norm: then the folder is not an nGPT model."""
    deviation, name = worst_norm_deviation((name, weight, None) for name, weight in model.named_parameters())
    if deviation > UNIT_TOLERANCE:
        got, rule = f"the norms of {name} differ from 1 by {deviation:.3g}", "Matrices of nGPT have unit norm, up to rounding"
        raise ConfigError(str(source.folder.path), got, rule, "Import the folder as it was exported")
