"""How much of the validation split an evaluation reads: the same sequences for every run that asks for as many."""

from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config
from ngpt.data.manifest import split_of


def evaluation_sequences(cfg: Config) -> int:
    """Sequences of one evaluation; 0: there is none.

    Raises:
        ConfigError: the whole split is asked for, and its manifest cannot be read or it holds no sequence.
    """
    train = cfg.train
    if not (cfg.data.valid or cfg.data.mock):
        return 0
    if train.eval_whole_split:
        return sum(sequences_of_split(source.path, train.seq_length) for source in cfg.data.valid)
    return train.eval_steps * train.global_batch_size if train.eval_sequences is None else train.eval_sequences


def evaluation_batches(cfg: Config) -> int:
    """Global batches that hold `evaluation_sequences`. The last one is filled up with sequences that do not count."""
    return -(-evaluation_sequences(cfg) // cfg.train.global_batch_size)


def sequences_of_split(prefix: str, seq_length: int) -> int:
    """Whole sequences in a prepared split; the last token of each is the first label of the next.

    Raises:
        ConfigError: the manifest cannot be read, or the split holds no sequence.
    """
    manifest, name = split_of(prefix)
    sequences = (manifest.splits[name].tokens - 1) // seq_length
    if sequences < 1:
        rule = f"A sequence takes train.seq_length {seq_length} tokens and the one behind it"
        raise ConfigError("data.valid", f"{prefix}: {manifest.splits[name].tokens} tokens", rule, "Give it more text, or shorten sequences")
    return sequences


def repeats(cfg: Config) -> list[str]:
    """A note for each source of `data.valid` that an evaluation reads more than once."""
    sequences, weights = evaluation_sequences(cfg), sum(source.weight for source in cfg.data.valid)
    notes = []
    for source in cfg.data.valid if not cfg.train.eval_whole_split else []:
        wanted, there = sequences * source.weight / weights, sequences_of_split(source.path, cfg.train.seq_length)
        if wanted > there:
            seen = f"{wanted:,.0f} sequences of {cfg.train.seq_length} tokens from {source.path}, which has {there:,}"
            notes.append(f"note: an evaluation reads {seen}: text repeats. train.eval_whole_split=true reads each once")
    return notes
