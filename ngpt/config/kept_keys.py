"""What a checkpoint holds a resumed run to: Megatron would ignore another value, or stop at an assertion."""

from pathlib import Path

from ngpt.config.errors import ConfigError
from ngpt.config.identity import diff, flatten, listed
from ngpt.config.schema import Config

OVERRIDE = "override_opt_param_scheduler"
_OF_OPTIMIZER = frozenset({"optim.optimizer", "optim.beta1", "optim.beta2", "optim.eps", "parallel.distributed_optimizer"})
_OF_SCHEDULE = frozenset(
    {
        *("optim.lr", "optim.min_lr", "optim.weight_decay", "train.steps", "train.global_batch_size"),
        *("megatron.start_weight_decay", "megatron.end_weight_decay", "megatron.weight_decay_incr_style"),
    }
)


def check_kept_keys(old: Config, new: Config, checkpoint: Path) -> None:
    """Refuses to change values that come back with a checkpoint.

    Args:
        old: The config that the checkpoint was saved with.
        new: The config of this launch.
        checkpoint: Its iteration folder, for the message.

    Raises:
        ConfigError: with every such key that differs, old and new.
    """
    changes = diff(flatten(old), flatten(new))
    source = "checkpoint.load" if new.checkpoint.load_optimizer else "run.dir"
    if fixed := {key: change for key, change in changes.items() if key in _OF_OPTIMIZER}:
        raise ConfigError(
            source,
            f"{checkpoint} is a checkpoint of another optimizer ({listed(fixed)})",
            "A checkpoint brings its own back with the optimizer's state, whatever the config says",
            f"Restore the values; or {_weights_only(new)}",
        )
    scheduled = {key: change for key, change in changes.items() if key in _OF_SCHEDULE or _names_schedule(key)}
    if scheduled and not new.megatron.get(OVERRIDE):
        raise ConfigError(
            source,
            f"{checkpoint} is a checkpoint of another schedule ({listed(scheduled)})",
            "With the optimizer's state come its schedule, weight decay and batch",
            f"Restore the values; or {_weights_only(new)}; or replace them at the checkpoint's step with megatron.{OVERRIDE}=true",
        )


def _names_schedule(key: str) -> bool:
    return key.startswith("schedule.") and key != "schedule.name"


def _weights_only(new: Config) -> str:
    if new.checkpoint.load_optimizer:
        return "start from its weights alone, checkpoint.load_optimizer=false"
    return f"start a new run.name from its weights, checkpoint.load={new.checkpoint.dir}"
