"""Is a written folder the model that was trained? Megatron's own modules and transformers' read the same text, in fp32 on the CPU.

Shapes: B batch, S sequence, D hidden, V vocabulary, E experts.
"""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.training.initialize import initialize_megatron
from safetensors import safe_open
from torch import Tensor, nn

from megatron_ext.models.builder import PluginModelBuilder
from megatron_ext.training.bridge import setup_megatron
from ngpt.checkpoint_tensors import CheckpointTensors
from ngpt.config import Config
from ngpt.config.errors import ConfigError
from ngpt.config.one_process import on_one_process
from ngpt.config.pattern import parse
from ngpt.config.schema import PrecisionConfig
from ngpt.hf.links import links
from ngpt.hf.weights import is_kept

BOUND = 1e-5  # of the largest logit, at least of 1
STREAM_BOUND = 1e-4  # of the largest entry of the stream: beyond it, a layer is named as the first to differ
DISAGREEING = 0.01  # of the tokens may go to other experts, whose scores are equal up to rounding
ROWS = 2048  # of the output matrix at a time


@dataclass
class Parity:
    """What was compared.

    Attributes:
        mode: full | layers. tokens: read. disagreeing: tokens left out, since a token they see was sent to other experts.
        logit_difference: the largest. largest_logit: of the trainer. bound: what the difference must not exceed.
        loss_trainer, loss_export: mean cross entropy of the next token, in nats.
        layer: the first whose output differs, counted from 0 as in the layer pattern; None where none does.
    """

    mode: str
    tokens: int
    disagreeing: int
    logit_difference: float
    largest_logit: float
    loss_trainer: float
    loss_export: float
    layer: int | None

    @property
    def bound(self) -> float:
        return BOUND * max(1.0, self.largest_logit)

    @property
    def holds(self) -> bool:
        return self.logit_difference <= self.bound and self.disagreeing <= DISAGREEING * self.tokens

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"bound": self.bound, "holds": self.holds}

    def __str__(self) -> str:
        verdict = "agree" if self.holds else "DIFFER"
        others = f", {self.disagreeing} tokens behind another choice of experts left out" if self.disagreeing else ""
        return (
            f"trainer and export {verdict} on {self.tokens} tokens{others} ({self.mode}, fp32): logits differ by at most "
            f"{self.logit_difference:.2e} (bound {self.bound:.1e}, largest {self.largest_logit:.2f}), "
            f"losses are {self.loss_trainer:.6f} and {self.loss_export:.6f}"
        )


@torch.no_grad()
def compare(cfg: Config, checkpoint: Path, folder: Path, tokens_BS: Tensor, *, rounded: bool, layers: bool) -> Parity:
    """Runs the trainer's model and the exported one on the same tokens.

    Args:
        cfg: of the run. checkpoint: its iteration folder. folder: what was written; it holds Hugging Face's config, weights and code.
        tokens_BS: int64, from the first token of a document on.
        rounded: the folder holds the weights as they were trained in bf16, not the fp32 masters.
        layers: one layer of both at a time, so that host memory holds one layer and the embedding. Otherwise both are held whole, and the
            folder is opened as a user would.

    Parallelism: none; one process. Megatron must not be initialised yet.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # which kernels are not installed
    reads = Weights(cfg, checkpoint, rounded)
    return _by_layers(cfg, reads, folder, tokens_BS) if layers else _whole(cfg, reads, folder, tokens_BS)


class Weights:
    """A checkpoint's weights, rounded as the export has them, for Megatron's modules."""

    def __init__(self, cfg: Config, folder: Path, rounded: bool) -> None:
        self.source, self.rounded = CheckpointTensors(folder), rounded
        self._exact = {key for link in links(cfg.model) if all(map(is_kept, link.names)) for key in link.keys}

    def read(self, key: str) -> Tensor:
        """One whole tensor in fp32."""
        return self._as_exported(key, self.source.read(self._stored(key)).float())

    def load(self, model: nn.Module, rename: Callable[[str], str | None]) -> None:
        """Loads weights in Megatron's own way.

        Args:
            rename: a key of the model -> the key in the checkpoint; None: leave the weight alone.
        """
        state, keys = {}, {}
        groups = ProcessGroupCollection.use_mpu_process_groups()
        for name, value in model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp}).items():
            key = rename(value.key) if isinstance(value, ShardedTensor | ShardedTensorFactory) else None
            if key is not None:
                value.key = self._stored(key)
                state[name], keys[name] = value, key
        loaded = dist_checkpointing.load(state, str(self.source.folder))
        assert set(keys) <= set(loaded), f"not loaded: {set(keys) - set(loaded)}"
        model.load_state_dict({name: self._as_exported(keys[name], loaded[name]) for name in keys}, strict=False)

    def _as_exported(self, key: str, tensor: Tensor) -> Tensor:
        exact = any(name == key or name.startswith(f"{key}.") for name in self._exact)
        return tensor if exact or not self.rounded else tensor.to(torch.bfloat16).to(tensor.dtype)

    def _stored(self, key: str) -> str:
        return key if self.rounded else self.source.master(key)


def _whole(cfg: Config, weights: Weights, folder: Path, tokens_BS: Tensor) -> Parity:
    from transformers import AutoModelForCausalLM

    trainer = build_trainer(cfg)
    weights.load(trainer, lambda key: key)
    with _outputs(trainer.decoder.layers) as trained, _trainer_choices(trainer.decoder) as chosen:
        logits = _call(trainer, tokens_BS)[..., : cfg.model.vocab_size]
    del trainer
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    with _outputs(model.model.layers) as exported, _export_choices(model) as chosen_too:
        logits_too = model(tokens_BS, use_cache=False).logits
    agree_BS = _agreeing(chosen, chosen_too, tokens_BS)
    per_layer = len(trained) // len(exported)
    seen = _FirstParting(per_layer)
    for number, h_too in enumerate(exported[:-1]):  # what leaves the last one is judged by its logits
        seen.compare(number, trained[(number + 1) * per_layer - 1].transpose(0, 1), h_too, agree_BS)
    head = _HeadComparison(tokens_BS, agree_BS)
    head.add(0, logits, logits_too)
    return head.result("full", seen.layer)


def _by_layers(cfg: Config, weights: Weights, folder: Path, tokens_BS: Tensor) -> Parity:
    """Embedding, layers and output matrix one after the other. Each is freed before the next one comes."""
    export = _Export(folder)
    h_BSD, h_too = weights.read("embedding.word_embeddings.weight")[tokens_BS], export.rows(export.embedding, tokens_BS)
    h_BSD, h_too, agree_BS, layer = _through_layers(cfg, weights, export, h_BSD, h_too)
    gc.collect()  # modules refer to one another in circles
    head = _HeadComparison(tokens_BS, agree_BS)
    _compare_heads(cfg, weights, export, head, h_BSD, h_too)
    return head.result("layers", layer)


def _through_layers(
    cfg: Config, weights: Weights, export: "_Export", h_BSD: Tensor, h_too: Tensor
) -> tuple[Tensor, Tensor, Tensor, int | None]:
    """Both streams after the last norm, whether each token counts [B, S], and the first layer that differs. One layer of both at a time."""
    trunk = parse(cfg.model.layer_pattern).trunk
    per_layer = len(trunk) // export.num_layers
    steps = [trunk[i : i + per_layer] for i in range(0, len(trunk), per_layer)]
    kinds = sorted(set(steps))
    small = _small(cfg, "".join(kinds))
    trainer, model = build_trainer(small), export.small_model(small)
    all_layers, all_layers_too = list(trainer.decoder.layers), list(model.model.layers)
    seen, agree_BS = _FirstParting(per_layer), torch.ones(h_BSD.shape[:-1], dtype=torch.bool)
    for number, symbols in enumerate(steps):
        place, last = kinds.index(symbols), number == len(steps) - 1
        trainer.decoder.layers = nn.ModuleList(all_layers)
        _load_step(weights, trainer, place * per_layer, number * per_layer, per_layer)
        export.load_layer(all_layers_too[place], number)
        if last:
            weights.load(trainer, lambda key: key if key.startswith("decoder.final_norm.") else None)
            export.load_final_norm(model)
        trainer.decoder.layers = nn.ModuleList(all_layers[place * per_layer : (place + 1) * per_layer])
        model.model.layers = nn.ModuleList([all_layers_too[place]])
        with _outputs([trainer.decoder if last else trainer.decoder.layers[-1]]) as out, _trainer_choices(trainer.decoder) as chosen:
            trainer(None, None, None, decoder_input=h_BSD.transpose(0, 1).contiguous())
        with _outputs(model.model.layers) as out_too, _export_choices(model) as chosen_too:
            whole = model.model(inputs_embeds=h_too, use_cache=False)
        h_BSD, h_too = out[0].transpose(0, 1), whole.last_hidden_state if last else out_too[0]
        agree_BS &= _agreeing(chosen, chosen_too, agree_BS)
        if not last:
            seen.compare(number, h_BSD, h_too, agree_BS)
    return h_BSD, h_too, agree_BS, seen.layer


def build_trainer(cfg: Config, **arguments: Any) -> nn.Module:
    """Megatron's local modules in fp32 with fresh weights, in this process, which is initialised for them.

    Args:
        arguments: of Megatron, which win over what follows from the config.
    """
    cfg = on_one_process(cfg)
    cfg.precision = PrecisionConfig(name="fp32", dtype="fp32")
    cfg.model.transformer_impl = "local"
    nothing = dict(load=None, save=None, save_interval=None, tensorboard_dir=None, skip_train=True, eval_iters=0)
    _, container = setup_megatron(cfg, "local", **(nothing | arguments))
    initialize_megatron()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return PluginModelBuilder(container.model).build_model(groups, pre_process=True, post_process=True).eval()


def _small(cfg: Config, pattern: str) -> Config:
    """A model with one layer of each kind and hardly any vocabulary."""
    cfg = on_one_process(cfg)
    cfg.model = replace(cfg.model, layer_pattern=pattern, vocab_size=1, vocab_padding_multiple=1)
    return cfg


def _call(model: nn.Module, tokens_BS: Tensor) -> Tensor:
    return model(tokens_BS, torch.arange(tokens_BS.size(1)).expand_as(tokens_BS), None)


def _load_step(weights: Weights, trainer: nn.Module, place: int, number: int, count: int) -> None:
    """Layers `number` to `number + count` of the checkpoint into those at `place` of a small model."""

    def rename(key: str) -> str | None:
        for offset in range(count):
            if key.startswith(f"decoder.layers.{place + offset}."):
                return key.replace(f"decoder.layers.{place + offset}.", f"decoder.layers.{number + offset}.", 1)
        return None

    weights.load(trainer, rename)


def _compare_heads(cfg: Config, weights: Weights, export: "_Export", head: "_HeadComparison", h_BSD: Tensor, h_too: Tensor) -> None:
    """Logits of both, some rows of the output matrices at a time."""
    model, width = cfg.model, math.sqrt(cfg.model.hidden_size)
    key = "embedding.word_embeddings.weight" if model.tied_embeddings else "output_layer.weight"
    weight = weights.read(key)[: model.vocab_size]
    scale = weights.read("sz.stored") * (model.sz_init * width) if model.architecture == "ngpt" else torch.ones(model.vocab_size)
    scale_too = torch.ones(model.vocab_size)
    if export.config.get("logit_scale"):
        scale_too = export.tensor("logit_scale") * (export.config["sz_init"] * width)
    for start in range(0, model.vocab_size, ROWS):
        rows = slice(start, min(start + ROWS, model.vocab_size))
        logits = scale[rows] * (h_BSD @ weight[rows].T)
        head.add(start, logits, scale_too[rows] * (h_too @ export.slice(export.output, rows).T))


class _HeadComparison:
    """Compares logits as they come, some columns at a time.

    Args:
        agree_BS: tokens that count.
    """

    def __init__(self, tokens_BS: Tensor, agree_BS: Tensor) -> None:
        self.targets_BT, self.agree_BS = tokens_BS[:, 1:], agree_BS
        self.difference = self.largest = 0.0
        self.sums = [torch.full(self.targets_BT.shape, -math.inf) for _ in range(2)]
        self.picked = [torch.zeros(self.targets_BT.shape) for _ in range(2)]

    def add(self, first: int, *logits_BSV: Tensor) -> None:
        """Args: first: which column of the vocabulary they begin with."""
        trained, exported = (logits[self.agree_BS].float() for logits in logits_BSV)
        if trained.numel():
            difference = (trained - exported).abs().max().item()
            self.difference = max(self.difference, difference) if difference == difference else math.inf
            self.largest = max(self.largest, trained.abs().max().item())
        columns = self.targets_BT - first
        inside = (columns >= 0) & (columns < logits_BSV[0].size(-1))
        for which, logits in enumerate(logits_BSV):
            before = logits[:, :-1].float()
            self.sums[which] = torch.logaddexp(self.sums[which], before.logsumexp(-1))
            self.picked[which] += before.gather(-1, columns.where(inside, 0)[..., None])[..., 0] * inside

    def result(self, mode: str, layer: int | None) -> Parity:
        losses = [(total - picked).mean().item() for total, picked in zip(self.sums, self.picked, strict=True)]
        count, others = self.agree_BS.numel(), int((~self.agree_BS).sum())
        return Parity(mode, count, others, self.difference, self.largest, *losses, layer)


class _FirstParting:
    """Remembers the first layer whose outputs are not the same."""

    def __init__(self, per_layer: int) -> None:
        self.layer, self._per_layer = None, per_layer

    def compare(self, number: int, h_BSD: Tensor, h_too: Tensor, agree_BS: Tensor) -> None:
        difference = (h_BSD - h_too)[agree_BS].abs()
        if self.layer is None and difference.numel() and not difference.max() <= STREAM_BOUND * h_BSD.abs().max():
            self.layer = number * self._per_layer


class _Export:
    """A written folder, tensor by tensor."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig

        self.folder = folder
        loaded = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        self.config_class, self.config = type(loaded), loaded.to_dict()
        self.num_layers = loaded.num_hidden_layers
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                self._files |= dict.fromkeys(opened.keys(), file)
        self.embedding = next(name for name in ("model.embeddings.weight", "model.embed_tokens.weight") if name in self._files)
        self.output = self.embedding if loaded.tie_word_embeddings else "lm_head.weight"

    # Each file is mapped only while it is read, since mapped pages count as this process's memory.
    def tensor(self, name: str) -> Tensor:
        """A whole tensor in fp32 that owns its memory."""
        with safe_open(self._files[name], "pt") as opened:
            return opened.get_tensor(name).to(torch.float32, copy=True)

    def slice(self, name: str, rows: slice) -> Tensor:
        """Some rows of a matrix, in fp32 with their own memory."""
        with safe_open(self._files[name], "pt") as opened:
            return opened.get_slice(name)[rows].to(torch.float32, copy=True)

    def rows(self, name: str, tokens_BS: Tensor) -> Tensor:
        """[B, S, D]: a row of a matrix for each token."""
        with safe_open(self._files[name], "pt") as opened:
            matrix = opened.get_slice(name)
            each = [matrix[token : token + 1].to(torch.float32, copy=True) for token in tokens_BS.flatten().tolist()]
        return torch.cat(each).unflatten(0, tokens_BS.shape)

    def small_model(self, cfg: Config) -> nn.Module:
        """The folder's class with the layers of a small config, in fp32."""
        import transformers
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        from ngpt.hf.targets import target_of

        target = target_of(cfg, in_tree="auto_map" not in self.config)
        if target.remote_code:
            model_class = get_class_from_dynamic_module(self.config["auto_map"]["AutoModelForCausalLM"], str(self.folder))
        else:
            model_class = getattr(transformers, target.name)
        return model_class(self.config_class(**target.config)).float().eval()

    def load_layer(self, layer: nn.Module, number: int) -> None:
        prefix = f"model.layers.{number}."
        layer.load_state_dict({name.removeprefix(prefix): self.tensor(name) for name in self._files if name.startswith(prefix)})

    def load_final_norm(self, model: nn.Module) -> None:
        names = {name for name in ("model.norm_f.weight", "model.norm.weight") if name in self._files}
        model.load_state_dict({name: self.tensor(name) for name in names}, strict=False)


@contextmanager
def _outputs(modules: Any) -> Iterator[list[Tensor]]:
    """What each module returns, in the order of the calls."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _arguments: tuple, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    with _hooks([module.register_forward_hook(keep) for module in modules]):
        yield kept


@contextmanager
def _trainer_choices(model: nn.Module) -> Iterator[list[Tensor]]:
    """[S * B, E] of each router: whether a token was sent to an expert."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _arguments: tuple, output: Any) -> None:
        kept.append(output[1].bool())

    with _hooks([module.register_forward_hook(keep) for module in model.modules() if isinstance(module, TopKRouter)]):
        yield kept


@contextmanager
def _export_choices(model: nn.Module) -> Iterator[list[Tensor]]:
    """[B * S, k] of each layer's experts: the chosen ones."""
    kept: list[Tensor] = []
    experts = [module for name, module in model.named_modules() if name.endswith(".mixer.experts")]

    def keep(_module: nn.Module, arguments: tuple) -> None:
        kept.append(arguments[1])

    with _hooks([module.register_forward_pre_hook(keep) for module in experts]):
        yield kept


@contextmanager
def _hooks(handles: list) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _agreeing(chosen: list[Tensor], chosen_too: list[Tensor], like_BS: Tensor) -> Tensor:
    """[B, S]: whether a token and all that it sees were sent to the same experts by both."""
    agree_BS = torch.ones_like(like_BS, dtype=torch.bool)
    batch, length = like_BS.shape
    for maps_TE, index_TK in zip(chosen, chosen_too, strict=True):
        maps_BSE = maps_TE.view(length, batch, -1).transpose(0, 1)
        maps_too = torch.zeros_like(maps_BSE).scatter(-1, index_TK.view(batch, length, -1), True)
        agree_BS &= (maps_BSE == maps_too).all(-1)
    return agree_BS.cummin(1).values


def check(parity: Parity, out: Path) -> None:
    """Raises ConfigError where what was to become the folder `out` is not the trained model."""
    if parity.holds:
        return
    if parity.logit_difference > parity.bound:
        where = "the output layer" if parity.layer is None else f"layer {parity.layer} of the pattern"
        got = f"logits differ by {parity.logit_difference:.2e}, {parity.bound:.1e} is allowed; the first to differ is {where}"
    else:
        got = f"{parity.disagreeing} of {parity.tokens} tokens stand behind another choice of experts, {DISAGREEING:.0%} are allowed"
    way_out = "Report it with the run's config.yaml; --parity none writes the folder without the comparison"
    raise ConfigError(str(out), got, "An export computes what was trained", way_out)
