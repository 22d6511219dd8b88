"""The steps of eight_gpus.py: their commands, time limits and what each needs, as plain data that can be looked at before anything runs."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

STEPS, STOP = 20, 10  # of every run of a hybrid; where the half run leaves
TRACED = (18, 20)  # the step that a trace begins with, and that it ends before
WARM_UP = 3  # steps that no median counts
LAYERS = 13  # of the checkpointed model, the first of its pattern: all kinds of layers in a fifth of the experts
SAVED, EXPORTED = 14, 4  # bytes a parameter: BF16 weights, fp32 masters and two moments; an fp32 export
TRAININGS = ("ngpt_hybrid_3b30b_bf16", "ngpt_hybrid_3b30b_nvfp4", "gpt_hybrid_3b30b_bf16")

COMMON = ["train.eval_steps=0", "data.valid=[]", "logging.interval=1", "logging.health_interval=10", "logging.tensorboard=false"]
FULL = ["train.seq_length=8192"]
# --cut: seconds a step on a CPU, and widths that the kernels of GPUs take.
CUT = [
    "model.hidden_size=128", "model.ffn_hidden_size=128", "model.num_attention_heads=4", "model.num_query_groups=2", "model.head_dim=64",
    "train.seq_length=128", "data.num_workers=0",
]  # fmt: skip
CUT_DENSE = ["model.num_layers=2"]
CUT_HYBRID = [
    "model.num_experts=8", "model.moe_top_k=2", "model.moe_ffn_hidden_size=64", "model.moe_shared_ffn_hidden_size=64",
    "model.mamba_num_heads=16", "model.mamba_head_dim=64", "model.mamba_state_dim=64", "model.mamba_num_groups=2",
    "model.mamba_chunk_size=64",
]  # fmt: skip


@dataclass(frozen=True)
class Host:
    """Where the session runs, and what it was asked for.

    Attributes:
        ranks: processes of the largest run, a GPU each.
        cpu: no GPU is used.
        gpu: its name in ngpt/estimate/hardware.py; None: unknown, and nothing is compared with an estimate.
        cut: tiny widths in place of the models' own.
        layers: of the trainings of the hybrids, the first of their pattern; None: all.
        recompute: parallel=ep8_recompute, else ep8.
        full_save: also save and measure a checkpoint of the whole hybrid.
        words: of the user, for data and tokenizer.
        out, checkpoints: folders.
    """

    ranks: int
    cpu: bool
    gpu: str | None
    cut: bool
    layers: int | None
    recompute: bool
    full_save: bool
    words: tuple[str, ...]
    out: Path
    checkpoints: Path

    def run(self, step: str) -> Path:
        return self.out / "runs" / step


@dataclass(frozen=True)
class Step:
    """One command of `ngpt` and what is read from what it leaves.

    Attributes:
        kind: which function of eight_gpus_measures.py reads the figures.
        ranks: GPUs that the command sees.
        limit_s: when it is ended.
        needs: steps that must be done.
        writes: bytes a parameter that it leaves in the folder of checkpoints.
        goes_on: continues what lies in its run folder, which others empty first.
    """

    name: str
    kind: str
    command: tuple[str, ...]
    ranks: int
    limit_s: int
    needs: tuple[str, ...] = ()
    writes: int = 0
    goes_on: bool = False


def plan(host: Host) -> list[Step]:
    """All steps, in their order."""
    return [*_trainings(host), *_checkpoints(host), *_scaling(host)]


def _trainings(host: Host) -> list[Step]:
    trace = ["debug=profile", f"debug.profile_start={TRACED[0]}", f"debug.profile_stop={TRACED[1]}"]
    layers = _first_layers(host.layers)
    return [
        Step(name, "training", _train(host, name, _hybrid(host, name, host.ranks), layers, ["checkpoint=none"], trace), host.ranks, 1800)
        for name in TRAININGS
    ]


def _checkpoints(host: Host) -> list[Step]:
    """A run straight through, one that stops, its resume, its reshard to half of the ranks, and its export."""
    ranks, half = host.ranks, host.ranks // 2
    model = [*_hybrid(host, TRAININGS[0], ranks), *_first_layers(LAYERS)]
    straight = _train(host, "straight", model, ["checkpoint=at_end", f"checkpoint.dir={host.checkpoints / 'straight'}"])
    resumed = _train(host, "half", model, ["checkpoint=at_end", f"checkpoint.dir={host.checkpoints / 'half'}"])
    fewer = [*_hybrid(host, TRAININGS[0], half), *_first_layers(LAYERS)]
    load = ["checkpoint=none", f"checkpoint.load={host.checkpoints / 'half'}", "checkpoint.load_optimizer=true"]
    export = ("export", str(host.run("half")), "--step", str(STOP), "--out", str(host.checkpoints / "export"), "--no-tokenizer")
    steps = [
        Step("straight", "straight", straight, ranks, 1500, writes=SAVED),
        Step("half", "half", (*resumed, f"train.stop_after={STOP}"), ranks, 1500, writes=SAVED),
        Step("resume", "resume", resumed, ranks, 1500, ("straight", "half"), SAVED, goes_on=True),
    ]
    if half:
        steps.append(Step("reshard", "reshard", _train(host, "reshard", fewer, load), half, 1500, ("straight", "half")))
    steps.append(Step("export", "export", export, ranks, 3600, ("half",), EXPORTED))
    if host.full_save:
        save = ["checkpoint=at_end", f"checkpoint.dir={host.checkpoints / 'full_save'}", "train.stop_after=2"]
        words = _train(host, "full_save", _hybrid(host, TRAININGS[0], ranks), _first_layers(host.layers), save)
        steps.append(Step("full_save", "full_save", words, ranks, 3600, writes=SAVED))
    return steps


def _scaling(host: Host) -> list[Step]:
    """The dense model with a fixed batch a GPU; the first, of one GPU, is what the others are compared with."""
    sizes = [size for size in (1, 2, 4, 8) if size <= host.ranks]
    layouts = [(f"dp{size}", size, ["parallel=dp_overlap"]) for size in sizes]
    tp2 = ["parallel=tp2", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
    layouts += [(f"tp2_dp{size // 2}", size, tp2) for size in sizes if size > 1]
    steps = []
    for name, size, parallel in layouts:
        each = 2 if host.cut else 8  # sequences of a GPU
        batch = ["train.micro_batch_size=2", f"train.global_batch_size={each * size}", "train.steps=12", "checkpoint=none"]
        model = ["experiment=ngpt_1p2b_dense_bf16", *(CUT + CUT_DENSE if host.cut else FULL)]
        command = _train(host, name, model, parallel, _cluster(host, size), batch)
        steps.append(Step(name, "scaling", command, size, 900, () if name == "dp1" else ("dp1",)))
    return steps


def _hybrid(host: Host, experiment: str, ranks: int) -> list[str]:
    parallel = ["parallel=ep8_recompute" if host.recompute else "parallel=ep8", f"parallel.expert={ranks}"]
    batch = ["train.micro_batch_size=1", f"train.global_batch_size={8 if host.cut else 64}", f"train.steps={STEPS}"]
    widths = CUT + CUT_HYBRID if host.cut else FULL
    return [f"experiment={experiment}", *parallel, *_cluster(host, ranks), *batch, *widths]


def _cluster(host: Host, ranks: int) -> list[str]:
    return ["cluster=local", f"cluster.gpus_per_node={ranks}", *([f"cluster.gpu={host.gpu}"] if host.gpu else [])]


@cache
def _first_layers(count: int | None) -> list[str]:
    """Words for that many; [] for None, all."""
    if count is None:
        return []
    from ngpt.config.compose import compose

    pattern = compose([f"experiment={TRAININGS[0]}"]).model.layer_pattern
    return [f"model.layer_pattern={pattern[:count]}", f"model.num_layers={count}"]


def _train(host: Host, name: str, *words: list[str]) -> tuple[str, ...]:
    """The user's words come first: what a step needs to be comparable stays as it is."""
    vocabulary = ["tokenizer=bytes", "model.vocab_size=257"] if host.cut else []
    own = [word for group in words for word in group]
    return ("train", *vocabulary, *host.words, *COMMON, *own, f"run.name={name}", f"run.dir={host.run(name)}")
