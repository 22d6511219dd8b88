"""Runs a list of training cases in one launch: `torchrun --nproc-per-node N case_runner.py CASES.json`.

Importing Megatron costs more than a tiny run, so all cases of a world size share one launch. A case is
    {"name": ..., "overrides": [...], "randomize_scales": bool, "starve_experts": bool, "probe_layers": bool,
     "probe_padding": bool, "upstream_state": bool, "requantise": bool}
and leaves, beside the run's own files, `result-rank<N>.json`: weight fingerprints and the norms seen when the model was built. A
probe also leaves what layer_probe.py measures once the model is trained.
"""

import contextlib
import gc
import hashlib
import json
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main(cases_file: str) -> None:
    import torch.distributed as dist

    from launch.environment import current_world
    from launch.worker import install_compat

    install_compat()
    from megatron.training.training import destroy_global_state
    from repeats import keep_what_repeats

    keep_what_repeats()
    rank = current_world().rank
    for case in json.loads(Path(cases_file).read_text()):
        run_case(case, rank)
        destroy_global_state()
        if dist.is_initialized():
            dist.barrier()
            destroy_subgroups()
        gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def empty(chunks: list) -> None:
    """Take the modules apart: hooks in autograd's graph, which the collector cannot see, keep them and their process groups alive."""
    for module in [module for chunk in chunks for module in chunk.modules()]:
        vars(module).clear()


def destroy_subgroups() -> None:
    """End the groups that a case made: their threads would slow every later case down."""
    import torch.distributed as dist

    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def run_case(case: dict, rank: int) -> None:
    """Train one case and leave its result file; an error of the case is part of the result."""
    import torch
    from layer_probe import operand_norms, padding_effects, starve_experts, token_0_leaks
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    from megatron_ext.training.run import train
    from ngpt.config import compose, dump

    began = time.time()
    cfg = compose(case["overrides"])
    run_dir = Path(cfg.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        dump(cfg, run_dir / "config.yaml")
    result = {"name": case["name"]}

    def look(chunks: list) -> None:
        if case.get("randomize_scales"):
            randomize_scales(chunks)
        if case.get("starve_experts"):
            starve_experts(chunks)
        result["built"] = model_norms(chunks)
        result["unit_axes"] = unit_axes(chunks)

    def keep_settings(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        kept = ("lr", "eps", "betas", "weight_decay")
        result.setdefault("applied", []).append({name: optimizer.param_groups[0][name] for name in kept})

    watching = register_optimizer_step_pre_hook(keep_settings)
    try:
        with contextlib.ExitStack() as changed:
            for option in filter(case.get, CHANGES):
                changed.enter_context(CHANGES[option]())
            session = train(cfg, rank, [look])
        result["padded_buckets"] = padded_buckets(session.chunks)
        result["weights"] = fingerprints(session.hook.parameters)
        result["model_norms"] = model_norms(session.chunks)
        named = [(name, param) for chunk in session.chunks for name, param in chunk.named_parameters()]
        result["added_in_place"] = [name for name, param in named if param.grad_added_to_main_grad]
        result["rng"] = rng_fingerprints()
        if case.get("probe_layers"):
            result["operands"] = operand_norms(session.chunks)
            result["token_0"] = token_0_leaks(session.chunks)
        if case.get("probe_padding"):
            result["padding"] = padding_effects(session.chunks)
        empty(session.chunks)
    except BaseException as error:  # some of torch's checkpoint errors do not derive from Exception
        result["error"] = f"{type(error).__name__}: {error}"
        result["traceback"] = traceback.format_exc()
    finally:
        watching.remove()
    result["seconds"] = time.time() - began
    (run_dir / f"result-rank{rank}.json").write_text(json.dumps(result))


@contextlib.contextmanager
def upstream_state() -> Iterator[None]:
    """Save and load the optimizer state by Megatron's own code, and publish it whatever norms the masters have by then."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_ext.training import checkpoint_save

    norms_of, checkpoint_save.unit_dims_of = checkpoint_save.unit_dims_of, lambda *_, **__: {}
    names = ("sharded_param_state_fully_reshardable", "load_parameter_state_from_fully_reshardable")
    ours = {name: getattr(DistributedOptimizer, name) for name in names}
    try:
        for name in names:
            setattr(DistributedOptimizer, name, ours[name].__wrapped__)
        yield
    finally:
        for name in names:
            setattr(DistributedOptimizer, name, ours[name])
        checkpoint_save.unit_dims_of = norms_of


@contextlib.contextmanager
def requantise() -> Iterator[None]:
    """Quantise weights in every pass."""
    from megatron_ext.training import run

    keeps, run.keeps_quantized_weights = run.keeps_quantized_weights, lambda cfg: False
    try:
        yield
    finally:
        run.keeps_quantized_weights = keeps


CHANGES = {"upstream_state": upstream_state, "requantise": requantise}  # what a case may change in our code


def padded_buckets(chunks: list) -> int:
    """Gradient buckets that end in padding and are followed by another bucket."""
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    return sum(bucket.numel_unpadded < bucket.grad_data.numel() for buffer in buffers for bucket in buffer.buckets[:-1])


def randomize_scales(chunks: list) -> None:
    """Give every scale entry its own value: a fresh, uniform vector would hide a wrong shard."""
    import torch

    from ngpt.functional import ScaledParameter

    generator = torch.Generator().manual_seed(7)
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, ScaledParameter):
                factors = torch.rand(module.stored.shape, generator=generator) + 0.5
                module.stored.data.mul_(factors.to(module.stored.device))


def model_norms(chunks: list) -> dict[str, float]:
    """Worst | ||w|| - 1 | of each marked model weight, in fp64."""
    found = {}
    for index, chunk in enumerate(chunks):
        for name, param in chunk.named_parameters():
            dim = getattr(param, "unit_dim", None)
            if dim is not None:
                norms = param.detach().view(param.num_matrices, -1, param.size(1)).double().norm(dim=1 + dim)
                found[f"{index}.{name}"] = (norms - 1).abs().max().item()
    return found


def unit_axes(chunks: list) -> dict[str, tuple[list[int], int]]:
    """(shape of a matrix, axis of unit norm) of each marked weight."""
    named = [(name, param) for chunk in chunks for name, param in chunk.named_parameters() if hasattr(param, "unit_dim")]
    return {name: ([param.size(0) // param.num_matrices, param.size(1)], param.unit_dim) for name, param in named}


def rng_fingerprints() -> dict[str, str]:
    """SHA-256 of the state of each of Megatron's random streams."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = get_cuda_rng_tracker().get_states()
    return {name: hashlib.sha256(state.cpu().numpy().tobytes()).hexdigest() for name, state in states.items()}


def fingerprints(parameters: list) -> dict[str, str]:
    """SHA-256 of every model parameter's bytes."""
    import torch

    return {
        name: hashlib.sha256(param.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, param, _ in parameters
    }


if __name__ == "__main__":
    main(sys.argv[1])
