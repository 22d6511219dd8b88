"""Compatibility patches of megatron-core, one file each: what upstream does, why it is patched, when the patch goes.

Every patch has a test in `tests/unit/compat` that fails when upstream moves.
"""

import importlib.metadata
from collections.abc import Callable

from megatron_ext.compat import (
    async_worker,
    checkpoint_pickles,
    cuda_on_cpu,
    datasets_makefile,
    distrib_optimizer_load,
    distrib_optimizer_order,
    distrib_optimizer_rows,
    document_index,
    expert_rng,
    jit_warmup,
    mamba_on_cpu,
    param_group_lr,
    prediction_loss,
    results_queue,
    shard_writer,
    wandb_import,
    weight_gradient,
)
from ngpt.config.errors import ConfigError

MEGATRON_VERSION = "0.19.2"

# In the order in which they are applied: cuda_on_cpu comes before everything that imports Megatron, and wandb_import imports it.
_PATCHES: dict[str, Callable[[], bool]] = {
    "cuda_on_cpu": cuda_on_cpu.install,
    "wandb_import": wandb_import.install,
    "mamba_on_cpu": mamba_on_cpu.install,
    "async_worker": async_worker.install,
    "checkpoint_pickles": checkpoint_pickles.install,
    "datasets_makefile": datasets_makefile.install,
    "distrib_optimizer_load": distrib_optimizer_load.install,
    "distrib_optimizer_order": distrib_optimizer_order.install,
    "distrib_optimizer_rows": distrib_optimizer_rows.install,
    "document_index": document_index.install,
    "expert_rng": expert_rng.install,
    "jit_warmup": jit_warmup.install,
    "param_group_lr": param_group_lr.install,
    "prediction_loss": prediction_loss.install,
    "results_queue": results_queue.install,
    "shard_writer": shard_writer.install,
    "weight_gradient": weight_gradient.install,
}
_ON_CPU = {"cuda_on_cpu", "mamba_on_cpu"}


def install(cpu: bool) -> list[str]:
    """Applies the patches this process needs, once each. Call it before anything imports Megatron.

    Args:
        cpu: The run takes the CPU for its device.

    Returns:
        Names of the patches in force.

    Raises:
        ConfigError: Another version of megatron-core is installed, or its dataset helper does not import.
    """
    check_version(importlib.metadata.version("megatron-core"))
    return [name for name, apply in _PATCHES.items() if (cpu or name not in _ON_CPU) and apply()]


def check_version(installed: str) -> None:
    """Refuses a version of megatron-core that the patches were not written for.

    Raises:
        ConfigError: `installed` is not the version of the patches; names the patches to review.
    """
    if installed.partition("+")[0] == MEGATRON_VERSION:
        return
    names = ", ".join(_PATCHES)
    raise ConfigError(
        "megatron-core",
        f"version {installed} is installed",
        f"The patches in megatron_ext/compat are written for {MEGATRON_VERSION}",
        f"Install megatron-core=={MEGATRON_VERSION}, or review each patch against the new version ({names}) and run tests/unit/compat",
    )
