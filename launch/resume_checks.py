"""What a resumed run may change, and checks for data that changed meanwhile.

| keys | on resume from a checkpoint |
|---|---|
| `model.*` (but its name, transformer_impl, expert_impl, mamba_chunk_size), `train.seq_length`, tokenizer kind and size | refused |
| `optim.optimizer`, `optim.beta1`, `optim.beta2`, `optim.eps` | refused: the checkpoint's own come back with the optimizer's state |
| `parallel.distributed_optimizer` | refused: the two optimizers do not read each other's state |
| `optim.lr`, `optim.min_lr`, `optim.weight_decay`, `schedule.*`, `train.steps`, `train.global_batch_size` and Megatron's weight decay |
  ramp | refused; with megatron.override_opt_param_scheduler=true they take effect at the checkpoint's step |
| `train.seed`, `data.*` that say which tokens and how they are read | take effect, with a note |
| other tokens under the same path of `data.train` | refused; with data.accept_changed=true they take effect, with a note |
| everything else: `optim.clip_grad`, `precision.*`, `parallel.*`, `logging.*`, `checkpoint.*`, `cluster.*`, ... | takes effect |
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ngpt.config.compose import load
from ngpt.config.errors import ConfigError
from ngpt.config.identity import Changes, diff, flatten, listed
from ngpt.config.schema import Config, DataSource
from ngpt.data.manifest import content_of, split_of
from ngpt.files import replacing

SOURCES_FILE = "data_sources.json"
_NOT_OF_THE_DATA = frozenset({"data.name", "data.num_workers", "data.cache_dir", "data.accept_changed"})
_SURPLUS = 0.005  # Megatron draws this fraction more from each source of a blend
_LAST_EPOCH_APART = 0.8  # Megatron shuffles the last epoch separately if less than this fraction of it is needed


def data_changes(old: Config, new: Config) -> Changes:
    """The changed keys that make a resumed run go on with other tokens, or in another order."""
    changes = diff(flatten(old), flatten(new))
    return {
        key: change for key, change in changes.items() if key == "train.seed" or (key.startswith("data.") and key not in _NOT_OF_THE_DATA)
    }


def check_content(config: Config) -> Iterator[str]:
    """Compares the data with the data of the folder's last launch, for a run that has a checkpoint.

    Yields:
        A note for each source whose tokens changed and are accepted.

    Raises:
        ConfigError: the path of a training source now holds other tokens.
    """
    before = _recorded(Path(config.run.dir))
    for split, sources in _sources(config):
        for source in sources:
            old = before.get(split, {}).get(source.path)
            new = _described(source)
            if old is None or old.get("content") == new["content"]:
                continue
            what = f"{_counts(old)} at the last launch, {_counts(new)} now"
            if split == "train" and not config.data.accept_changed:
                raise ConfigError(
                    f"data.{split}",
                    f"{source.path} was prepared again: {what}",
                    f"{config.run.dir} holds a checkpoint, which has seen a part of the old data; the order of samples is another one now",
                    "Restore the data; or go on with the new with data.accept_changed=true; or choose another run.name",
                )
            yield f"note: {source.path} (data.{split}) was prepared again: {what}"


def has_data_of(config: Config, folder: Path) -> bool:
    """Whether a run's last launch read the very tokens that now lie under the paths of `config`."""
    before = _recorded(folder)
    try:
        return all(
            before.get(split, {}).get(source.path, {}).get("content") == content_of(source.path)
            for split, sources in _sources(config)
            for source in sources
        )
    except ConfigError:  # the data is not here
        return False


def reordered_samples(old: Config, new: Config) -> str | None:
    """A note for a run whose changed length changes the order of its samples; None if the order stays.

    Megatron shuffles documents and samples over all epochs that the whole run will draw. Another number of epochs is another shuffle.
    """
    if new.data.mock or old.data.mock or old.train.seq_length != new.train.seq_length:
        return None
    rows = []
    for source in new.data.train:
        manifest, name = split_of(source.path)
        before, now = (_epochs(manifest.splits[name].tokens, _drawn(config, source), config.train.seq_length) for config in (old, new))
        if before != now:
            rows.append(
                f"{source.path}: {before[0]} -> {now[0]} epochs{'' if before[0] != now[0] else ', the last one shuffled otherwise'}"
            )
    if not rows:
        return None
    return f"note: the run's other length reorders its samples ({'; '.join(rows)}): some it has seen come again, others come later or never"


def record_sources(config: Config) -> None:
    """Records what the launch's data holds, for the next launch to compare with. A missing source is reported by whatever reads it."""
    content: dict[str, dict[str, Any]] = {}
    for split, sources in _sources(config):
        for source in sources:
            with suppress(ConfigError):
                content.setdefault(split, {})[source.path] = _described(source)
    with replacing(Path(config.run.dir) / SOURCES_FILE) as stream:
        stream.write((json.dumps(content, indent=2) + "\n").encode())


def notes(config: Config, own: Path) -> Iterator[str]:
    """Notes on the data of a resumed run. `own` is the config of the folder's last launch.

    Raises:
        ConfigError: see `check_content`.
    """
    old = load(own)
    if changes := data_changes(old, config):
        yield f"note: the run goes on with {listed(changes)}"
    yield from check_content(config)
    if (note := reordered_samples(old, config)) is not None:
        yield note


def _sources(config: Config) -> list[tuple[str, Sequence[DataSource]]]:
    return [] if config.data.mock else [("train", config.data.train), ("valid", config.data.valid)]


def _described(source: DataSource) -> dict[str, Any]:
    manifest, name = split_of(source.path)
    split = manifest.splits[name]
    return {"content": content_of(source.path), "documents": split.documents, "tokens": split.tokens}


def _counts(described: dict[str, Any]) -> str:
    return f"{described.get('documents')} documents of {described.get('tokens')} tokens ({str(described.get('content'))[:8]})"


def _recorded(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """What `record_sources` kept; {} for a run of an earlier version, or if it cannot be read."""
    try:
        content = json.loads((folder / SOURCES_FILE).read_bytes())
        return {split: {path: dict(described) for path, described in sources.items()} for split, sources in content.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _drawn(config: Config, source: DataSource) -> int:
    """How many samples Megatron takes from a source for the whole run."""
    samples = config.train.steps * config.train.global_batch_size
    if len(config.data.train) == 1:
        return samples
    share = source.weight / sum(other.weight for other in config.data.train)
    return math.ceil(math.ceil(samples * share) * (1 + _SURPLUS))


def _epochs(tokens: int, samples: int, seq_length: int) -> tuple[int, bool]:
    """How many epochs Megatron lays out for this many samples, and whether it shuffles the last one separately."""
    epochs = max(1, -(-(samples * seq_length + 1) // tokens))
    if epochs == 1:
        return 1, False
    of_last = samples - ((epochs - 1) * tokens - 1) // seq_length
    return epochs, of_last < int(_LAST_EPOCH_APART * ((tokens - 1) // seq_length))
