"""The last part of a preparation: shards to splits, and the manifest."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ngpt.config.errors import ConfigError
from ngpt.config.vocabularies import FILES
from ngpt.data.encode import Counts, Job, load_header, load_shard, shard_path
from ngpt.data.files import atomic_write, progress
from ngpt.data.hub import Origin
from ngpt.data.indexed import bin_path, dtype_for, idx_path, write_indexed
from ngpt.data.manifest import SPLITS, Manifest, SourceInfo, SplitInfo
from ngpt.data.plan import TOKENIZER, parse_split
from ngpt.data.readers import keys_of_first_record
from ngpt.data.sources import shortened
from ngpt.data.tokenizers import Tokenizer, describe, from_config
from ngpt.data.vocabulary import SETTINGS


def assemble(
    out: Path, job: Job, infos: Sequence[SourceInfo], options: dict[str, Any], count: int, notes: list[str], origin: Origin | None = None
) -> Manifest:
    """Join `count` shards into the splits and write the manifest, `notes` and the tokenizer's `origin` in it.

    Raises:
        ConfigError: No documents at all, or none for a split that has a share.
    """
    headers = [load_header(shard_path(job.folder, index)) for index in range(count)]
    sources = _with_counts(infos, [counts for _, counts, _ in headers])
    text_bytes = [sizes for sizes, _, _ in headers]
    members = split_documents(text_bytes, options["split"])
    _refuse_empty(job, sources, members, options)
    tokenizer = from_config(job.tokenizer)
    dtype = dtype_for(tokenizer.vocab_size)
    splits: dict[str, SplitInfo] = {}
    with progress(sum(map(len, text_bytes)), "joining", "document") as bar:
        for number, name in enumerate(SPLITS):
            inside = [member == number for member in members]
            documents = int(sum(mask.sum() for mask in inside))
            if not documents:
                idx_path(out / name).unlink(missing_ok=True)
                bin_path(out / name).unlink(missing_ok=True)
                continue
            written = write_indexed(out / name, _parts(job.folder, inside), dtype)
            size = int(sum(sizes[mask].sum() for sizes, mask in zip(text_bytes, inside, strict=True)))
            splits[name] = SplitInfo(
                documents=documents,
                tokens=written.bin_bytes // dtype.itemsize,
                bytes_of_text=size,
                bin_bytes=written.bin_bytes,
                bin_sha256=written.bin_sha256,
                idx_bytes=written.idx_bytes,
                idx_sha256=written.idx_sha256,
                bin_blocks=written.bin_blocks,
                idx_blocks=written.idx_blocks,
            )
            bar.update(documents)
    vocabulary = _keep_vocabulary(out, tokenizer)
    notes = [*notes, *tokenizer.notes, *_dropped_note(sum((dropped for _, _, dropped in headers), Counter[str]()))]
    manifest = Manifest(describe(tokenizer, vocabulary, origin), sources, splits, dtype.name, options, notes)
    manifest.save(out)
    return manifest


def _keep_vocabulary(out: Path, tokenizer: Tokenizer) -> str | None:
    """Keeps the vocabulary, and the file that names its last token, beside the data. So the data can be decoded anywhere by itself."""
    if tokenizer.path is None:
        return None
    name = FILES.get(tokenizer.kind, TOKENIZER)
    copies = {name: tokenizer.path, SETTINGS: tokenizer.path.with_name(SETTINGS)}
    for copied, original in copies.items():
        if original.is_file() and (copied == name or tokenizer.kind in FILES):
            with atomic_write(out / copied) as stream:
                stream.write(original.read_bytes())
    return name


def split_documents(text_bytes: Sequence[np.ndarray], split: str) -> list[np.ndarray]:
    """The split of each document of each shard: 0 train, 1 valid, 2 test.

    A document belongs to the split in which its first byte falls when all texts lie end to end. A split that has a share and would be
    empty by that gets its nearest document, if there are enough of them.
    """
    total = sum(int(sizes.sum()) for sizes in text_bytes)
    train, valid, _ = parse_split(split)
    borders = np.array([math.ceil(train * total), math.ceil((train + valid) * total)])
    members: list[np.ndarray] = []
    start = 0
    for sizes in text_bytes:
        ends = start + np.cumsum(sizes)
        members.append(np.searchsorted(borders, ends - sizes, side="right"))
        start = int(ends[-1]) if len(ends) else start
    return _without_empty(members, split)


def _without_empty(members: list[np.ndarray], split: str) -> list[np.ndarray]:
    """The same with at least one document in each split that has a share; unchanged if all have one, or there are too few documents."""
    _, valid, test = (int(share > 0) for share in parse_split(split))
    total, train_end, valid_end = (sum(int((member < bound).sum()) for member in members) for bound in (len(SPLITS), 1, 2))
    if total < 1 + valid + test:
        return members
    train_end = min(max(train_end, 1), total - valid - test)
    valid_end = min(max(valid_end, train_end + valid), total - test)
    numbers = np.split(np.arange(total), np.cumsum([len(member) for member in members])[:-1])
    return [np.searchsorted([train_end, valid_end], number, side="right") for number in numbers]


def _parts(folder: Path, inside: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for index, mask in enumerate(inside):
        if mask.any():
            shard = load_shard(shard_path(folder, index))
            yield shard.tokens[np.repeat(mask, shard.lengths)], shard.lengths[mask]


def _with_counts(infos: Sequence[SourceInfo], counts: Sequence[Counts]) -> list[SourceInfo]:
    documents: Counter[int] = Counter()
    skipped = [Counter[str]() for _ in infos]
    for shard in counts:
        for source, (taken, reasons) in shard.items():
            documents[source] += taken
            skipped[source].update(reasons)
    return [replace(info, documents=documents[index], skipped=dict(sorted(skipped[index].items()))) for index, info in enumerate(infos)]


def _dropped_note(dropped: Counter[str]) -> list[str]:
    if not dropped:
        return []
    most_first = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    examples = shortened([f"{character!r} x {count:,}" for character, count in most_first])
    return [f"the tokenizer has no token for {dropped.total():,} characters of the text and drops them: {examples}"]


def _refuse_empty(job: Job, sources: Sequence[SourceInfo], members: Sequence[np.ndarray], options: dict[str, Any]) -> None:
    if not any(source.documents for source in sources):
        reasons = sum((Counter(source.skipped) for source in sources), Counter[str]())
        skipped = ", ".join(f"{number} x {reason}" for reason, number in reasons.items()) or "nothing there"
        names = ", ".join(source.place for source in job.sources[:3])
        way_out = "Check format, encoding and --text-key"
        found = (keys_of_first_record(source) for source in job.sources if source.format == "jsonl")
        if (keys := next(filter(None, found), [])) and job.text_key not in keys:
            way_out = f"Name the text's key with --text-key; the first record has {shortened(keys)}"
        raise ConfigError(names, f"no documents ({skipped})", "There must be one at least", way_out)
    for number, (name, share) in enumerate(zip(SPLITS, parse_split(options["split"]), strict=True)):
        if share and not any((member == number).any() for member in members):
            total = sum(source.documents for source in sources)
            rule = f"{name} gets no document of {total}: a document is never cut, and each split with a share needs one"
            way_out = f"Use 100,0,0, or more documents: {_more_documents(job, options['documents'])}"
            raise ConfigError("--split", options["split"], rule, way_out)


def _more_documents(job: Job, documents: str) -> str:
    """What would give more of them, from sources that were read with this --documents."""
    if all(source.format != "txt" for source in job.sources):
        return "more records or files"
    if documents == "file":
        return "--documents blank-line, by which a document of a .txt ends at a blank line, or more files"
    return "more blank lines in the text, where its documents end, or more files"
