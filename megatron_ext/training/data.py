"""Batches for Megatron's loop: prepared token files through Megatron's GPTDataset, read by every rank that needs them.

Every tensor-parallel rank reads its own copy from the page cache; nothing is broadcast. The training order continues where a
checkpoint stopped; every evaluation sees the same sequences.

Shapes: tokens_BS, labels_BS, loss_mask_BS, positions_BS [micro-batch, sequence]; with context parallelism the sequence is this rank's part.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.training import get_args
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from torch.utils.data import DataLoader, Dataset

from megatron_ext.device import on_gpu
from megatron_ext.training.sample_index import ContentKeyedDataset, DatasetBuilder
from ngpt.config import Config, ConfigError
from ngpt.config.schema import DataSource
from ngpt.data.manifest import split_of
from ngpt.data.validation import evaluation_batches, evaluation_sequences


class _DatasetTokenizer:
    """The three facts that GPTDataset asks of a tokenizer. The text was tokenised when the data was prepared."""

    def __init__(self, vocab_size: int, eod: int):
        self.vocab_size, self.eod, self.eos, self.pad = vocab_size, eod, eod, -1
        self.unique_identifiers = {"vocab_size": vocab_size, "eod": eod}


class MockDataset(Dataset):
    """Random tokens, the same for the same index and seed, for tests and benchmarks of the loop.

    Args:
        as_mask: attention is confined to documents, two in each sequence, cut at a random place.

    Returns:
        What GPTDataset returns: tokens, labels, loss_mask, position_ids, each [seq_length], and attention_mask [1, seq_length,
        seq_length], True where attention is not allowed.
    """

    def __init__(self, size: int, seq_length: int, vocab_size: int, seed: int, as_mask: bool):
        self.size, self.seq_length, self.vocab_size, self.seed, self.as_mask = size, seq_length, vocab_size, seed, as_mask

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(index))
        text = torch.randint(0, self.vocab_size, (self.seq_length + 1,), generator=generator)
        position = torch.arange(self.seq_length)
        sample = dict(tokens=text[:-1], labels=text[1:], loss_mask=torch.ones(self.seq_length), position_ids=position)
        if self.as_mask:
            second = position >= torch.randint(1, self.seq_length, (), generator=generator)
            sample["attention_mask"] = ((position[None, :] > position[:, None]) | (second[None, :] != second[:, None]))[None]
        return sample


class FilledDataset(Dataset):
    """The first `size` sequences of a dataset, then as many as fill the last batch. The tokens of the latter do not count."""

    def __init__(self, dataset: Dataset, size: int, filled_size: int):
        self.dataset, self.size, self.filled_size = dataset, size, filled_size

    def __len__(self) -> int:
        return self.filled_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index < self.size:
            return self.dataset[index]
        sample = self.dataset[0]
        return sample | {"loss_mask": torch.zeros_like(sample["loss_mask"])}


def _blend(sources: list[DataSource], weighted: bool = True) -> tuple[list[str], list[float] | None]:
    return [source.path for source in sources], [source.weight for source in sources] if weighted else None


def build_datasets(cfg: Config, train_size: int, valid_size: int, backend: str) -> tuple[Dataset, Dataset | None]:
    """Training and validation datasets with these numbers of sequences (0: none), on every rank. Rank 0 builds the sample indices first.

    The order of validation sequences follows `train.eval_seed`. Attention confined to the document reaches the local backend as a mask,
    Transformer Engine as the documents' boundaries.
    """
    as_mask = cfg.data.confine_attention and backend == "local"
    if cfg.data.mock:
        if cfg.data.confine_attention and not as_mask:
            raise ConfigError("data.mock", True, "Mock documents are for the local backend", "Set data.confine_attention=false")
        seq_length, vocab_size = cfg.train.seq_length, cfg.model.vocab_size
        train = MockDataset(train_size, seq_length, vocab_size, cfg.train.seed, as_mask)
        return train, MockDataset(valid_size, seq_length, vocab_size, cfg.train.eval_seed + 1, as_mask) if valid_size else None
    train = _prepared(cfg, 0, _blend(cfg.data.train), train_size, cfg.train.seed, as_mask)
    if not valid_size:
        return train, None
    whole = cfg.train.eval_whole_split
    blend = _blend(cfg.data.valid, weighted=not whole)  # without weights and size, Megatron takes each source once
    return train, _prepared(cfg, 1, blend, None if whole else valid_size, cfg.train.eval_seed, as_mask)


def _prepared(cfg: Config, split: int, blend: tuple, size: int | None, seed: int, as_mask: bool) -> Dataset:
    """Megatron's dataset over prepared sources. `split`: 0 training, 1 validation."""
    tokenizer = split_of(cfg.data.train[0].path)[0].tokenizer
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=cfg.train.seq_length,
        blend_per_split=[blend if index == split else None for index in range(3)],
        path_to_cache=cfg.data.cache_dir,
        tokenizer=_DatasetTokenizer(tokenizer.vocab_size, tokenizer.eod_id),
        reset_position_ids=cfg.data.reset_positions,
        reset_attention_mask=as_mask,
        eod_mask_loss=cfg.data.mask_eod_loss,
        create_attention_mask=as_mask,
        inter_document_masking=cfg.data.confine_attention and not as_mask,
    )
    sizes = [size if index == split else 0 for index in range(3)]
    return DatasetBuilder(ContentKeyedDataset, sizes, lambda: True, config).build()[split]


def _loader(dataset: Dataset, size: int, consumed: int, cfg: Config) -> DataLoader:
    sampler = MegatronPretrainingSampler(
        total_samples=size,
        consumed_samples=consumed,
        micro_batch_size=cfg.train.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )
    workers = cfg.data.num_workers
    return DataLoader(dataset, batch_sampler=sampler, num_workers=workers, pin_memory=on_gpu(), persistent_workers=workers > 0)


def make_iterators_provider(cfg: Config, backend: str):
    """The dataset provider that Megatron's `pretrain` calls: (train, valid, test) iterators over micro-batches."""

    def provider(num_samples: tuple[int, int, int], vp_stage: int | None = None) -> tuple[Iterator, Iterator | None, None]:
        train_size = cfg.train.steps * cfg.train.global_batch_size
        valid_size = evaluation_sequences(cfg)
        train, valid = build_datasets(cfg, train_size, valid_size, backend)
        train_batches = iter(_loader(train, train_size, get_args().consumed_train_samples, cfg))
        if not valid_size:
            return train_batches, None, None
        filled_size = evaluation_batches(cfg) * cfg.train.global_batch_size
        valid_loader = _loader(FilledDataset(valid, valid_size, filled_size), filled_size, 0, cfg)
        return train_batches, itertools.chain.from_iterable(itertools.repeat(valid_loader)), None

    provider.is_distributed = True  # every rank builds its own
    return provider


def to_device(batch: dict[str, torch.Tensor], keys: tuple[str, ...]) -> dict[str, Any]:
    """The batch's tensors on this rank's device."""
    return {key: batch[key].to(torch.cuda.current_device(), non_blocking=True) for key in keys}
