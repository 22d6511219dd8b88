"""Trained models ready for text: from a training checkpoint straight into `NGPTForCausalLM`, or from a folder that transformers opens."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ngpt.checkpoint_tensors import CheckpointTensors
from ngpt.checkpoints.choice import Choice
from ngpt.config.checkpoints import check_same_model
from ngpt.config.errors import ConfigError
from ngpt.config.one_process import run_checkpoint, run_config
from ngpt.config.schema import Config
from ngpt.data.tokenizers import run_tokenizer
from ngpt.hf.configuration_ngpt import NGPTConfig
from ngpt.hf.links import links
from ngpt.hf.modeling_ngpt import NGPTForCausalLM
from ngpt.hf.targets import CODE, target_of
from ngpt.hf.weights import DTYPES, is_kept, read_link

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class TextModel:
    """A model in evaluation mode, and what turns text into its tokens and back.

    Attributes:
        start: the token that begins each document; None: there is none.
        ends: tokens that end one.
        encode: text to tokens, without `start`. decode: tokens to text, without special tokens.
        window: tokens in a row of training; None: unknown.
        notes: lines for the person at the terminal.
        step: of a run's checkpoint. tokenizer: of a folder, transformers' own.
    """

    model: PreTrainedModel
    start: int | None
    ends: frozenset[int]
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    window: int | None
    notes: tuple[str, ...] = ()
    step: int | None = None
    tokenizer: Any = None


def open_run(run_dir: Path, step: int | None = None, dtype: str = "float32", device: str = "cpu") -> TextModel:
    """The model of a run's checkpoint with the tokenizer of its data.

    Args:
        step: None: the newest checkpoint. dtype: of `ngpt.hf.weights.DTYPES`.

    Raises:
        ConfigError: no run folder, no such checkpoint, a damaged one or one of another model; or the data or its tokenizer are gone.
    """
    cfg = run_config(run_dir)
    choice = run_checkpoint(cfg, step)
    check_same_model(cfg, choice)
    tokenizer = run_tokenizer(cfg)
    model = load_run(cfg, choice, DTYPES[dtype], device)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text).tolist()

    notes = tuple(note for note in [choice.note()] if note is not None)
    window, ends = cfg.train.seq_length, frozenset([tokenizer.eod_id])
    return TextModel(model, tokenizer.eod_id, ends, encode, tokenizer.decode, window, notes, step=choice.step)


def load_run(cfg: Config, choice: Choice, dtype: torch.dtype = torch.float32, device: str = "cpu") -> NGPTForCausalLM:
    """The model of a checkpoint, whatever layout saved it. Host memory holds it once, or with a GPU one tensor at a time.

    Args:
        cfg: of the run, resolved.
        dtype: float32 takes the fp32 masters; bfloat16 the trained copy, whose small vectors stay fp32.

    Raises:
        ConfigError: a tensor is missing, damaged or of another shape; or there are no fp32 masters.
    """
    with torch.device("meta"):
        model = NGPTForCausalLM(NGPTConfig(**target_of(cfg, in_tree=False).config))
    source = CheckpointTensors(choice.folder)
    for link in links(cfg.model):
        if not link.names[0].startswith("mtp."):  # prediction depths are for training
            for name, tensor in read_link(link, source, dtype).items():
                _assign(model, name, tensor.to(device), choice.folder, keeps_type=is_kept(name))
    model.tie_weights()
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not empty, f"no link gives {empty}"
    return model.eval()


def _assign(model: nn.Module, name: str, tensor: Tensor, folder: Path, keeps_type: bool) -> None:
    """Puts a tensor where the model has an empty one, in its own type if `keeps_type`: training may have rounded the model's fp32."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    place = getattr(module, leaf)
    if place.shape != tensor.shape:
        got = f"{name} has shape {tuple(tensor.shape)}"
        rule = f"The model of the run's config has {tuple(place.shape)} there"
        raise ConfigError(str(folder), got, rule, "Restore config.yaml or the checkpoint from a copy")
    tensor = tensor.to(place.dtype) if keeps_type else tensor
    setattr(module, leaf, nn.Parameter(tensor) if isinstance(place, nn.Parameter) else tensor)


def open_folder(folder: Path, dtype: str | None = None, device: str = "cpu") -> TextModel:
    """A model with its tokenizer from a folder of Hugging Face's form: an export of ours, or of a class that transformers ships.

    No code in the folder is run: for nGPT this installation's code is used.

    Args:
        dtype: None: as the folder says.

    Raises:
        ConfigError: no such folder, a class that would need code of its own, or files that transformers does not take.
    """
    config, notes = _config_of(folder), []
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else DTYPES[dtype], "local_files_only": True, "use_safetensors": True}
    opener: Any = AutoModelForCausalLM
    if config.get("model_type") == "ngpt":
        opener = NGPTForCausalLM
        others = [name for name in CODE if (folder / name).exists() and (folder / name).read_bytes() != _own_code(name)]
        notes += [f"note: {folder / name} is of another version of ngpt; this installation's is used" for name in others]
    else:
        options["trust_remote_code"] = False
    other = "Name an export of ngpt, or a folder of a class that transformers ships"
    model, told = _opened(folder, "model", other, lambda: opener.from_pretrained(str(folder), output_loading_info=True, **options))
    if told["missing_keys"]:
        rule = "Every tensor of the model must be in the folder"
        raise ConfigError(str(folder), f"no {min(told['missing_keys'])}", rule, "Restore the folder from a copy, or export it again")
    safely = dict(local_files_only=True, trust_remote_code=False)
    way_out = "Copy a tokenizer's files there, or export with one"
    tokenizer = _opened(folder, "tokenizer", way_out, lambda: AutoTokenizer.from_pretrained(str(folder), **safely))

    def encode(text: str) -> list[int]:
        return without_start(tokenizer(text)["input_ids"], tokenizer.bos_token_id)

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    ends = ends_of(tokenizer.eos_token_id, model.generation_config.eos_token_id, model.config.eos_token_id)
    window = getattr(model.config, "max_position_embeddings", None)
    model = model.to(device).eval()
    return TextModel(model, tokenizer.bos_token_id, ends, encode, decode, window, tuple(notes), tokenizer=tokenizer)


def without_start(ids: Sequence[int], start: int | None) -> list[int]:
    """Tokens without the document start that some tokenizers add: the caller adds exactly one."""
    return list(ids[1:] if start is not None and len(ids) and ids[0] == start else ids)


def ends_of(*found: int | list[int] | None) -> frozenset[int]:
    """Tokens that end a document. Transformers gives one, several or none."""
    lists = ([] if entry is None else [entry] if isinstance(entry, int) else entry for entry in found)
    return frozenset(token for entry in lists for token in entry)


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(str(path), error, "It must be the JSON that transformers wrote", "Restore it from a copy") from error
    if not isinstance(config, dict):
        raise ConfigError(str(path), type(config).__name__, "It must be a JSON object", "Restore it from a copy")
    return config


def _own_code(name: str) -> bytes:
    return (Path(__file__).parent / name).read_bytes()


def _opened(folder: Path, what: str, way_out: str, opener: Callable[[], Any]) -> Any:
    """What transformers makes of a folder. Where it fails, the error is one line."""
    try:
        return opener()
    except UNREADABLE as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        rule = f"transformers must be able to open its {what}, without code of the folder"
        raise ConfigError(str(folder), first.rstrip(":. "), rule, way_out) from error
