"""What this machine's memory cannot hold by far is told before processes start."""

import psutil

from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config
from ngpt.estimate.rank import chunks_by_rank
from ngpt.estimate.states import rank_parameters

BYTES_A_PARAMETER = 6  # the least that a rank holds: a weight in two bytes and its gradient in four
BYTES_AN_ENTRY = 2  # the least of a hidden state
BYTES_A_SEQUENCE = 8  # its number in the order in which all sequences are read


def check_memory(config: Config, processes: int, cuda: bool) -> None:
    """Refuses a run whose least need is beyond this machine's memory. `ngpt estimate` has the whole need.

    Args:
        processes: of this host.
        cuda: they train on GPUs, which are not looked at.

    Raises:
        ConfigError: with the need and the memory.
    """
    memory = psutil.virtual_memory().total
    sequences = config.train.steps * config.train.global_batch_size
    if sequences * BYTES_A_SEQUENCE > memory:
        what = f"{config.train.steps:,} * {config.train.global_batch_size:,} sequences"
        rule = f"Their order takes {sequences * BYTES_A_SEQUENCE / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f}"
        raise ConfigError("train.steps * train.global_batch_size", what, rule, "Set smaller ones")
    if cuda:
        return
    held = max(rank_parameters(config, chunks).total for chunks in chunks_by_rank(config))
    need = held * processes * BYTES_A_PARAMETER
    of_all = "one process" if processes == 1 else f"{processes} processes"
    if need > memory:
        rule = f"Weights and gradients of {of_all} take {need / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f}"
        raise ConfigError("model", f"{held:,} parameters a process", rule, "Choose a smaller model; ngpt estimate says what one needs")
    train, parallel = config.train, config.parallel
    tokens = train.micro_batch_size * train.seq_length
    states = tokens // (parallel.tensor * parallel.context) * config.model.hidden_size * processes * BYTES_AN_ENTRY
    if states > memory:
        what = f"{train.micro_batch_size:,} * {train.seq_length:,} tokens"
        rule = f"Their hidden states of one layer take {states / 1e9:,.0f} GB in {of_all}, and this machine has {memory / 1e9:,.0f}"
        raise ConfigError("train.micro_batch_size * train.seq_length", what, rule, "Set smaller ones; ngpt estimate says what they need")
