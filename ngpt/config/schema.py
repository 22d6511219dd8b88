"""The configuration of one run: a tree of dataclasses, composed by Hydra from `conf/`.

This module imports no torch, so that a config composes and validates anywhere in well under a second. The types are checked by
OmegaConf when a config is merged into `Config`; `ngpt.config.checks` holds the rules that a type cannot say.

The comment in front of a field or behind it says what the field is, and the first sentence of a class what the section is:
`ngpt.config.describe` reads them for `ngpt list keys`, completion and conf/README.md.

A field of type `Derived` may be null (None) until `ngpt.config.resolve` fills it in; its comment says from what. Any other null stays.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from ngpt.config.activations import ACTIVATIONS
from ngpt.estimate.hardware import GPUS

if TYPE_CHECKING:
    type Derived[T] = T  # what whoever has a resolved config reads
else:

    class Derived:
        def __class_getitem__(cls, kind: type) -> Any:
            return kind | None  # what OmegaConf takes


def choice(default: Any, described: Mapping[Any, str]) -> Any:
    """A field that takes some values only.

    Args:
        described: each value with one line on it.
    """
    return field(default=default, metadata={"choices": described})


def derived() -> Any:
    """A field that `ngpt.config.resolve` fills in where it is left null."""
    return field(default=None, metadata={"derived": True})


_RECOMPUTED = {
    "core_attn": "attention without its projections",
    "mlp": "the MLPs",
    "moe": "the routed experts, their router and dispatch",
    "shared_experts": "the experts that see every token",
}
_AMAX = {
    "dynamic": "the largest magnitude of the tensor",
    "dynamic_pow2": "that, rounded up so that scales are powers of two",
    "static": "a constant: 1.3125, of grad_output static_grad_amax, or static_amax of operands",
}
_BLOCKS = {"16x16": "nvfp4: the same scales both ways", "1x16": "nvfp4: scales of their own each way"}
_AS_RECIPE = {None: "as the recipe's other options say"}
_LEFT_OUT = {"skip": "the step is left out", "rollback": "back to the newest checkpoint, then on behind the batches since"}


@dataclass
class ModelConfig:
    """The architecture, and whose modules compute it. All but `EXECUTION_FIELDS` defines the function that is trained."""

    name: str = MISSING  # of the file of conf/model
    # which of the two models
    architecture: str = choice(
        "ngpt", {"ngpt": "matrices and hidden states of unit norm", "gpt": "the control: pre-norm RMSNorm, additive residuals"}
    )
    num_layers: int = MISSING  # blocks before the first / of the pattern: an attention with the MLP behind it, or any other layer alone
    # M Mamba-2, E experts, * attention, - MLP, | pipeline cut, / before the layers of each multi-token prediction depth: ME*E/*E
    layer_pattern: Derived[str] = derived()  # null: "*-" * num_layers
    hidden_size: int = MISSING  # D: features of a token between layers
    ffn_hidden_size: int = MISSING  # F: features inside an MLP
    num_attention_heads: int = MISSING  # N: query heads of each * layer
    num_query_groups: Derived[int] = derived()  # G: key and value heads of each * layer; null: num_attention_heads
    head_dim: Derived[int] = derived()  # K: features of a head; null: hidden_size / num_attention_heads
    # of MLPs and experts
    activation: str = choice("squared_relu", {name: activation.description for name, activation in ACTIVATIONS.items()})
    tied_embeddings: bool = False  # the output layer uses the embedding's matrix
    # how attention learns of positions
    position_embedding: str = choice("rope", {"rope": "queries and keys are rotated", "none": "positions show in the causal mask only"})
    rope_base: int = 10_000  # rope: the slowest rotation takes some 2 * pi * rope_base tokens
    vocab_size: int = MISSING  # entries of the vocabulary without padding; at least the tokenizer's
    vocab_padding_multiple: int = 128  # the padded vocabulary is the next multiple, whatever the tensor parallel size
    init_std: float = 0.02  # standard deviation of the initial weights
    norm_epsilon: float = 1e-5  # the control's RMSNorm; nGPT's own epsilon is fixed (ngpt.functional)
    fine_grained: bool = True  # nGPT: normalise the input of every output projection
    alpha_init: float = 0.05  # nGPT: eigen learning rates, of order 1 / num_layers
    sz_init: float = 1.0  # nGPT: scale of the logits at the start; with 1 they are in [-1, 1]
    # whose modules compute attention, linear layers and norms
    transformer_impl: str = choice(
        "auto",
        {
            "auto": "transformer_engine where CUDA and it are present, else local",
            "local": "plain torch modules of Megatron",
            "transformer_engine": "modules of Transformer Engine",
        },
    )
    num_experts: int = 0  # routed experts of each E layer
    moe_top_k: int = 2  # experts that a token is sent to
    moe_ffn_hidden_size: Derived[int] = derived()  # F of a routed expert; null: ffn_hidden_size
    moe_shared_ffn_hidden_size: int = 0  # F of the expert that sees every token; 0: there is none
    # how a router scores experts
    moe_score: str = choice("sigmoid", {"sigmoid": "router scores, each expert's by itself", "softmax": "router scores over all experts"})
    moe_scaling: float = 1.0  # factor of the selected, normalised scores
    moe_expert_bias: bool = False  # selection by score + bias, and the bias follows the load instead of a loss
    moe_expert_bias_rate: float = 1e-3  # change of the bias a step
    # loss that balances the experts
    moe_aux_loss: str = choice(
        "none",
        {
            "none": "no balancing loss",
            "seq_aux_loss": "experts are balanced within each sequence",
            "aux_loss": "experts are balanced within a micro-batch",
        },
    )
    moe_aux_loss_coeff: float = 0.0  # weight of moe_aux_loss in the loss
    # nGPT: what a router sees of a hidden state h
    moe_router_input: str = choice("scaled", {"scaled": "nGPT: sqrt(D) * h", "unit": "nGPT: h"})
    moe_router_normalized: bool = False  # nGPT: the router's rows are kept at unit norm, too
    # nGPT: scales suv of the routed experts
    moe_suv: str = choice("per_expert", {"per_expert": "nGPT: a vector each", "shared": "nGPT: one for all routed experts of a layer"})
    # how the routed experts of a rank are computed
    expert_impl: str = choice(
        "auto",
        {
            "auto": "grouped where precision and widths allow it",
            "sequential": "one expert after the other",
            "grouped": "all experts of a rank together",
        },
    )
    mamba_num_heads: int = 0  # heads of each M layer
    mamba_head_dim: int = 64  # features of a head
    mamba_state_dim: int = 128  # states of each feature
    mamba_num_groups: int = 8  # heads of a group share B and C
    mamba_conv_kernel: int = choice(4, {tokens: f"{tokens} tokens" for tokens in (2, 3, 4)})  # width of the causal convolution
    mamba_chunk_size: int = 128  # tokens; how the scan is cut, no part of the function
    mtp_loss_coeff: float = 0.1  # weight of the mean of the losses of all prediction depths, added to the loss that trains
    mamba_gated_norm: bool = False  # nGPT: bring back Mamba's RMSNorm after the gate; the control always has it


@dataclass
class OperandConfig:
    """How an operand of the products is quantised (nvfp4), where that differs from what the recipe says; null: it does not."""

    amax: str | None = choice(None, _AMAX | _AS_RECIPE)  # what counts as the largest magnitude of the tensor
    static_amax: float | None = None  # with amax=static: magnitude that saturates, 1.3125 * 2^j
    blocks: str | None = choice(None, _BLOCKS | _AS_RECIPE)  # shape of the blocks that share a scale
    # of values to 4 bits
    rounding: str | None = choice(None, {"nearest": "ties to even", "stochastic": "up or down by chance, right in the mean"} | _AS_RECIPE)
    # random Hadamard transform of columnwise operands
    rht: str | None = choice(
        None, {"none": "no transform", "signed": "Hadamard with fixed signs", "unsigned": "plain Hadamard", **_AS_RECIPE}
    )
    # what the largest value of a block becomes
    four_over_six: str | None = choice(
        None,
        {
            "none": "the largest value of a block becomes 6",
            "mae": "6 or 4, by the smaller sum of magnitudes of errors",
            "mse": "6 or 4, by the smaller sum of squares of errors",
            **_AS_RECIPE,
        },
    )
    # four_over_six: block scale of the tensor's amax
    bound: int | None = choice(None, {256: "four_over_six: block scale of the amax", 448: "the same, at the end of E4M3", **_AS_RECIPE})


@dataclass
class RecipeConfig:
    """A recipe: the format of the linear layers of the blocks, and how each operand of their products is quantised."""

    name: str = MISSING  # of the file of conf/precision
    # of weights, activations and all that is not quantised
    dtype: str = choice(MISSING, {"fp32": "model weights and activations", "bf16": "model weights and activations; masters stay fp32"})
    # of the operands of the products of the linear layers in the blocks
    format: str = choice(
        "none", {"none": "as dtype", "fp8": "8 bits", "mxfp8": "8 bits, scales of 32 values", "nvfp4": "4 bits, scales of 16 or 16x16"}
    )
    input_amax: str = choice("dynamic", _AMAX)  # nvfp4: what counts as the largest magnitude of an input
    weight_amax: str = choice("dynamic", _AMAX)  # nvfp4: what counts as the largest magnitude of a weight
    grad_output_amax: str = choice("dynamic", _AMAX)  # nvfp4: what counts as the largest magnitude of a gradient
    static_grad_amax: float = 1.3125  # nvfp4 with grad_output_amax=static: magnitude that saturates, 1.3125 * 2^j
    weight_blocks: str = choice("16x16", _BLOCKS)  # nvfp4: shape of the blocks of a weight that share a scale
    rht: bool = False  # nvfp4: random Hadamard transform of both operands of the weight gradient
    stochastic_rounding: bool = True  # nvfp4: grad_output is rounded by chance, right in the mean
    # nvfp4, what the options above do not say: input, weight or grad_output, and with _rowwise (blocks along features) or _columnwise one
    # of its directions, which counts more: {grad_output_columnwise: {rounding: nearest}}
    operands: dict[str, OperandConfig] = field(default_factory=dict)


@dataclass
class PrecisionConfig(RecipeConfig):
    """The recipe of a run, where it holds, and what executes it."""

    grad_reduce_in_fp32: bool = True  # gradients are summed up in fp32
    # what computes the quantised products
    executor: str = choice(
        "auto",
        {
            "auto": "nvfp4: native where the GPU and Transformer Engine have the recipe, else emulated",
            "native": "nvfp4: Transformer Engine on Blackwell",
            "emulated": "nvfp4: quantised operands, multiplied in dtype",
        },
    )
    num_layers_at_start_in_bf16: int = 0  # first blocks that stay in dtype, as model.num_layers counts them
    num_layers_at_end_in_bf16: int = 0  # last blocks that stay in dtype
    bf16_modules: list[str] = field(default_factory=list)  # globs of linear layers that stay in dtype: "layers.*.mlp.linear_fc2"
    # Globs of linear layers with another recipe of conf/precision, by its name; of those that match, the last: {"layers.*.mixer.*": mxfp8}
    layers: dict[str, str] = field(default_factory=dict)
    recipes: dict[str, RecipeConfig] = field(default_factory=dict)  # those that `layers` names, as they were read
    bf16_tail: float = 0.0  # the last part of the steps trains without `format`
    diagnostics: bool = False  # nvfp4: quantisation errors of every linear layer at each health step


@dataclass
class OptimConfig:
    """The optimizer and its learning rates."""

    name: str = MISSING  # of the file of conf/optim
    optimizer: str = choice("adam", {"adam": "AdamW: weight decay is decoupled"})  # rule of the update
    lr: float = MISSING  # the highest learning rate, up to 2^24
    min_lr: float = 0.0  # the learning rate that the schedule decays to
    beta1: float = 0.9  # decay of Adam's mean of gradients
    beta2: float = 0.95  # decay of Adam's mean of squared gradients
    eps: float = 1e-8  # what Adam adds to the root of that mean
    weight_decay: float = 0.0  # decoupled; a step takes lr * weight_decay of the weights, less than 1
    clip_grad: float = 1.0  # largest norm of all gradients together; 0: they are not clipped


@dataclass
class ScheduleConfig:
    """How the learning rate changes over the run."""

    name: str = MISSING  # of the file of conf/schedule
    # of the learning rate after the warm-up
    decay: str = choice(
        MISSING,
        {
            "constant": "lr to the end",
            "linear": "to min_lr along a line",
            "cosine": "to min_lr along half a cosine",
            "wsd": "lr, then decay_fraction of the steps to min_lr as wsd_decay says",
        },
    )
    warmup_steps: int = 0  # steps from rate 0 to optim.lr
    decay_fraction: float = 0.15  # wsd: the last part of the run decays
    # wsd: the way from optim.lr to optim.min_lr
    wsd_decay: str = choice(
        "minus_sqrt",
        {
            "minus_sqrt": "1 - sqrt(r) of the way is left after a part r of the decay",
            "linear": "1 - r of it",
            "cosine": "(1 + cos(pi * r)) / 2 of it",
            "exponential": "2 * 2^-r - 1 of it",
        },
    )


@dataclass
class DataSource:
    """A prepared text."""

    path: str = MISSING  # prefix of PREFIX.bin and PREFIX.idx, as `ngpt data prepare` writes it
    weight: float = 1.0  # its part of the samples, relative to other sources


@dataclass
class DataConfig:
    """The text that is trained and evaluated on."""

    name: str = MISSING  # of the file of conf/data
    mock: bool = False  # random tokens made on the fly: benchmarks and tests of the loop, never a result
    train: list[DataSource] = field(default_factory=list)  # sources to train on
    valid: list[DataSource] = field(default_factory=list)  # sources to evaluate on
    confine_attention: bool = False  # attention stays inside a document
    # positions restart at each document; needs confine_attention. The control's rope sees distances alone, so this changes nothing there.
    # nGPT's sqk comes behind the rotation: its scores depend on the positions themselves
    reset_positions: bool = False
    mask_eod_loss: bool = False  # no loss on predicting what follows an end-of-document token
    num_workers: int = 2  # processes that load data, of each rank; 0: the rank itself does
    cache_dir: Derived[str] = derived()  # sample indices; null: <run.dir>/data_cache
    accept_changed: bool = False  # a run that resumes goes on though the tokens under a path of train are others than at its last launch


@dataclass
class TokenizerConfig:
    """How text becomes tokens."""

    name: str = MISSING  # of the file of conf/tokenizer
    # of the tokenizer
    kind: str = choice(
        MISSING,
        {
            "bytes": "UTF-8 bytes and an end of document",
            "bpe": "a byte-pair vocabulary that `ngpt data prepare` trains",
            "huggingface": "a tokenizer.json",
            "sentencepiece": "a tokenizer.model",
            "tiktoken": "a vocabulary file of tiktoken",
        },
    )
    # Vocabulary file, or its folder; huggingface, sentencepiece: also ORG/NAME[@REVISION] of the Hugging Face Hub. null: the kind's default
    path: str | None = None
    vocab_size: int | None = None  # bpe: size to train; tiktoken: where to cut; null: all


@dataclass
class ParallelConfig:
    """How model, batch and optimizer are spread over processes."""

    name: str = MISSING  # of the file of conf/parallel
    tensor: int = 1  # ranks that share each matrix
    pipeline: int = 1  # ranks that share the layers, one behind the other
    virtual_pipeline: int | None = None  # model chunks on each pipeline rank; null: one
    expert: int = 1  # ranks that share the experts of a layer
    expert_tensor: int | None = None  # ranks that share one expert; null: tensor
    # how tokens reach the experts of other ranks
    token_dispatcher: str = choice(
        "alltoall", {"alltoall": "each token goes to its experts' ranks", "allgather": "every rank gets all tokens and picks its own"}
    )
    shared_expert_overlap: bool = False  # the shared expert runs while tokens travel
    context: int = 1  # ranks that share each sequence
    sequence_parallel: Derived[bool] = derived()  # tensor ranks also share the activations between their matrices; null: tensor > 1
    distributed_optimizer: bool = True  # data-parallel ranks share masters and optimizer state
    overlap_grad_reduce: bool = False  # gradients are reduced while the backward pass goes on
    overlap_param_gather: bool = False  # weights are gathered while the forward pass goes on
    # activations that the backward pass computes again
    recompute: str = choice(
        "none", {"none": "all activations are kept", "selective": "recompute_modules run again", "full": "whole layers run again"}
    )
    # selective: what runs again; empty: core_attn
    recompute_modules: list[str] = field(default_factory=list, metadata={"choices": _RECOMPUTED})
    # full: which layers run again
    recompute_method: str = choice(
        "uniform",
        {
            "uniform": "full: every layer, in groups of recompute_num_layers",
            "block": "full: the first recompute_num_layers of each pipeline stage",
        },
    )
    recompute_num_layers: int = 1  # full: layers of a group, or of each stage


@dataclass
class ClusterConfig:
    """Where the run executes. World size = nodes * gpus_per_node (processes, whatever the device)."""

    name: str = MISSING  # of the file of conf/cluster
    nodes: int = 1  # hosts
    gpus_per_node: int = 1  # processes on each host
    # GPU whose peak rates MFU and estimates take
    gpu: str | None = choice(None, {None: "detected; none on a CPU"} | dict.fromkeys(GPUS, "as in ngpt/estimate/hardware.py"))
    rendezvous_port: int | None = None  # null: 29500; under srun one that follows from the job
    # A rank without progress for so long ends the run, and the rank that is behind is named; start-up, loads, saves and the first step may
    # take 6 times as long. null: only the heartbeat is written, and collectives have Megatron's own timeout.
    hang_timeout_s: float | None = 600.0
    environment: dict[str, str] = field(default_factory=dict)  # variables of the workers; a value that the user has exported wins
    # who starts the processes
    scheduler: str = choice("none", {"none": "`ngpt train` starts the processes", "slurm": "`ngpt launch` submits a job, a task a process"})
    account: str | None = None  # that SLURM charges; null: the site's default
    partition: str | None = None  # of SLURM; null: the site's default
    qos: str | None = None  # of SLURM; null: the site's default
    time_limit: str | None = None  # as sbatch takes it: "90" (minutes), "04:00:00", "2-12:00:00"; null: the site's default
    cpus_per_task: int | None = None  # CPU cores of each process; null: the site's default
    sbatch: list[str] = field(default_factory=list)  # further options of sbatch: --exclusive, --mem=0, --array=1-10%1
    container_image: str | None = None  # of enroot and pyxis: a file or a registry's name; null: the ranks run on the host
    container_mounts: list[str] = field(default_factory=list)  # HOST:CONTAINER[:ro], beside the folder ngpt launch is called in
    save_time_s: int = 60  # seconds that a checkpoint takes at most: the job is warned this long, and the margin, before its time is over
    save_margin_s: int = 30  # seconds of the warning beside save_time_s
    max_restarts: int = 3  # restarts of a job that crashes or runs out of time, in a row without a newer checkpoint


@dataclass
class WandbConfig:
    """Weights & Biases, with the extra `wandb`. The run is named run.name there; its id is kept in <run.dir>/wandb_run.json."""

    # where the figures go, beside TensorBoard
    mode: str = choice(
        "disabled",
        {
            "disabled": "no figures go there",
            "online": "figures are uploaded as they come",
            "offline": "into <run.dir>/wandb, from where `wandb sync` uploads them",
        },
    )
    project: str = "ngpt"  # that the run is shown in
    entity: str | None = None  # user or team; null: the account's default
    group: str | None = None  # runs that are shown together
    tags: list[str] = field(default_factory=list)  # of the run


@dataclass
class LoggingConfig:
    """What a run records, and how often."""

    name: str = MISSING  # of the file of conf/logging
    interval: int = 10  # steps between progress lines, which metrics.jsonl records
    tensorboard: bool = True  # the same figures for TensorBoard
    wandb: WandbConfig = field(default_factory=WandbConfig)
    straggler_ratio: float | None = 1.25  # a rank this much slower than its peers for 5 intervals is named; null: none
    health_interval: int = 100  # steps between health panels (scales, norms), which step 1 has, too; a multiple of interval


@dataclass
class CheckpointConfig:
    """When checkpoints are saved, how they are checked, and how many stay."""

    name: str = MISSING  # of the file of conf/checkpoint
    dir: Derived[str] = derived()  # folder of the checkpoints; null: <run.dir>/checkpoints
    interval: int | None = None  # steps between checkpoints; null: only at the end
    save_at_end: bool = True  # also save the last step, or the one that train.stop_after names
    resume: bool = True  # continue from the newest checkpoint in dir
    load: str | None = None  # start from the weights of another run's checkpoint folder
    load_optimizer: bool = False  # with load: also optimizer state, schedule position and RNG
    async_save: bool = False  # files are written while training goes on
    hf: bool = False  # beside training, each checkpoint's fp32 weights are written into its folder for transformers, without a comparison
    # How a checkpoint is compared with its manifest before it is loaded.
    verify: str = choice("full", {"full": "every byte is read", "sizes": "sizes of its files", "none": "not at all"})
    fallback: bool = True  # where the published checkpoint is damaged, take the newest intact one before it
    keep_last: int | None = None  # newest checkpoints that stay; null: all
    keep_every: int | None = None  # steps; with keep_last: multiples of it stay, too
    # what a save without space leads to
    on_full_disk: str = choice("stop", {"stop": "the run ends", "continue": "without the checkpoint that found no space"})


@dataclass
class TrainConfig:
    """Batch, length, evaluation, and what to do with bad steps."""

    micro_batch_size: int = MISSING  # sequences per data-parallel rank and forward pass
    global_batch_size: int = MISSING  # sequences per step
    steps: int = MISSING  # optimizer steps of the whole run
    seq_length: int = MISSING  # tokens of a sequence
    seed: int = 1234  # of initial weights, data order and stochastic rounding
    eval_interval: int = 100  # steps between evaluations
    eval_steps: int = 10  # global batches per evaluation; 0: no evaluation
    eval_sequences: int | None = None  # sequences per evaluation whatever the batch size, in place of eval_steps; null: eval_steps batches
    eval_whole_split: bool = False  # every sequence of data.valid once; eval_steps and eval_sequences are not read
    eval_seed: int = 1234  # of the order in which sequences of data.valid are taken: runs with other seeds evaluate the same text
    eval_tasks: list[str] = field(default_factory=list)  # of lm-eval (extra `eval`), evaluated behind data.valid; ngpt: those shipped here
    eval_tasks_interval: int | None = None  # steps, a multiple of eval_interval; null: at every evaluation
    eval_tasks_limit: int | None = None  # documents of each task at most; null: all
    eval_tasks_include: list[str] = field(default_factory=list)  # folders with task files of your own
    # Of a step whose loss or gradients are not finite, before the optimizer moves.
    on_nonfinite: str = choice("stop", {"stop": "the run ends"} | _LEFT_OUT)
    spike_threshold: float | None = None  # standard deviations above the mean loss of the last 100 steps; null: no loss is a spike
    on_spike: str = choice("note", {"note": "a line in the log"} | _LEFT_OUT)  # what to do with a step whose loss is a spike
    max_rollbacks: int = 3  # rollbacks to one and the same checkpoint
    stop_after: int | None = None  # save and leave after this step of a longer schedule; a run beyond it has nothing to do


@dataclass
class RunConfig:
    """Name and folder of a run."""

    name: str = MISSING  # of the run; not set: the experiment's
    root: str = "runs"  # folder of run folders
    dir: Derived[str] = derived()  # folder of everything that the run writes; null: <root>/<name>


@dataclass
class DebugConfig:
    """To see what a run does: deterministic kernels, plain torch, profiles."""

    name: str = MISSING  # of the file of conf/debug
    deterministic: bool = False  # deterministic kernels: bitwise repeatable, slower
    row_kernels: bool = True  # false: all but NVFP4's quantisers in plain torch, to see whether a kernel is at fault
    norm_tolerance: float = 1e-4  # largest | ||w|| - 1 | of the fp32 masters after the first step
    profile: bool = False  # torch.profiler trace into <run.dir>/torch_profile
    profile_start: int = 10  # step that the trace begins with
    profile_stop: int = 12  # step that it ends before
    profile_ranks: list[int] = field(default_factory=lambda: [0])  # ranks that write a trace


@dataclass
class Config:
    """All of a run, a section each."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    megatron: dict[str, Any] = field(default_factory=dict)  # any other Megatron argument, by its argparse name


# Fields of `model` that choose how, not what, is computed: they may change on resume.
EXECUTION_FIELDS = frozenset({"name", "transformer_impl", "expert_impl", "mamba_chunk_size"})
# Fields of `model` that say how it learns, not what it computes: a run that starts from weights alone may choose others.
LEARNING_FIELDS = frozenset({"init_std", "mtp_loss_coeff", "moe_expert_bias_rate", "moe_aux_loss", "moe_aux_loss_coeff"})
# Fields of `model` that the control does not read.
NGPT_FIELDS = frozenset(
    {"fine_grained", "alpha_init", "sz_init", "moe_router_input", "moe_router_normalized", "moe_suv", "mamba_gated_norm"}
)
