"""Weights of a training checkpoint as safetensors, written as a stream: host memory holds one file's tensors at a time."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ngpt.checkpoint_tensors import CheckpointTensors
from ngpt.config.errors import ConfigError
from ngpt.config.schema import ModelConfig
from ngpt.hf.links import Link, Tensors, links
from ngpt.hf.targets import Target

FILE_BYTES = 2**30  # of a file; a larger tensor gets its own file
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Few numbers that matter much: they keep the checkpoint's precision.
KEPT = {"alpha", "sqk", "suv", "in_scale", "logit_scale", "e_score_correction_bias", "A_log", "D", "dt_bias"}


@dataclass(frozen=True)
class Written:
    """What was written: entries of the model, bytes of its files, and names of tensors that the target has no place for."""

    parameters: int
    bytes: int
    left_out: tuple[str, ...]


def model_links(model: ModelConfig, fold_logit_scale: bool) -> Iterator[Link]:
    """The links of a model; with `fold_logit_scale` the rows of the output matrix are multiplied with the logits' scale."""
    if not fold_logit_scale:
        yield from links(model)
        return
    factor = model.sz_init * math.sqrt(model.hidden_size)
    matrix = "embedding.word_embeddings.weight" if model.tied_embeddings else "output_layer.weight"

    def fold(tensors: Tensors) -> Tensors:
        weight, scale = (tensor[: model.vocab_size] for tensor in tensors)
        if weight.is_meta:
            return [weight]
        return [(weight.float() * (scale * factor)[:, None]).to(weight.dtype)]

    for link in links(model):
        if link.names == ("logit_scale",):
            yield Link((matrix, *link.keys), ("lm_head.weight",), fold)
        elif link.names != ("lm_head.weight",):
            yield link


def read_link(link: Link, source: CheckpointTensors, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's tensors of a link by name.

    Args:
        dtype: float32 reads the fp32 masters; bfloat16 the trained copy, whose small vectors stay fp32.

    Raises:
        ConfigError: there are no masters; or a tensor is missing or damaged.
    """
    tensors = []
    for key in link.keys:
        if link.missing is not None and key not in source.sizes:
            tensors.append(link.missing())
            continue
        name = source.master(key) if dtype is torch.float32 else key
        if dtype is torch.float32 and name in source.sizes and source.dtype(name) != torch.float32:
            got, rule = f"no fp32 master of {key}", "Weights are those of the masters by default, and this checkpoint has none"
            raise ConfigError(str(source.folder), got, rule, "Set --dtype bfloat16 for the weights as they were trained with")
        tensors.append(source.read(name))
    made = dict(zip(link.names, link.to_model(tensors), strict=True))
    return {name: (tensor if is_kept(name) else tensor.to(dtype)).contiguous() for name, tensor in made.items()}


def is_kept(name: str) -> bool:
    return name.rpartition(".")[2] in KEPT or name.endswith(".gate.weight")


def write_weights(source: CheckpointTensors, model: ModelConfig, target: Target, folder: Path, dtype: torch.dtype, fold: bool) -> Written:
    """Writes `model.safetensors`, or its numbered parts and their index, into a folder.

    Args:
        model: of the checkpoint, resolved. fold: the logits' scale goes into the output matrix.

    Raises:
        ConfigError: as `read_link`.
        OSError: the folder cannot be written.
    """
    files, left_out = _files(source, model, target, dtype, fold)
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    names = names if len(names) > 1 else ["model.safetensors"]
    places: dict[str, str] = {}
    parameters = size = 0
    for file, members in zip(names, files, strict=True):
        tensors: dict[str, Tensor] = {}
        for link in members:
            for name, tensor in read_link(link, source, dtype).items():
                renamed = target.rename(name)
                if renamed is not None:
                    tensors[renamed] = tensor
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        parameters += sum(tensor.numel() for tensor in tensors.values())
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(names) > 1:
        index = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return Written(parameters, size, left_out)


def _files(
    source: CheckpointTensors, model: ModelConfig, target: Target, dtype: torch.dtype, fold: bool
) -> tuple[list[list[Link]], tuple[str, ...]]:
    """Which links go into which file, and the names that the target has no place for."""
    files: list[list[Link]] = []
    room, left_out = 0, []
    for link in model_links(model, fold):
        size = sum(math.prod(source.sizes.get(key, ())) for key in link.keys) * dtype.itemsize
        homeless = [name for name in link.names if target.rename(name) is None]
        left_out += homeless
        if len(homeless) == len(link.names):
            continue
        if not files or size > room:
            files.append([])
            room = FILE_BYTES
        files[-1].append(link)
        room -= size
    return files, tuple(left_out)
