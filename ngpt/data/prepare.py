"""Text files to Megatron's indexed datasets: parallel, resumable, the same bytes however it ran.

The sources' records are read in order and cut into chunks, whose borders depend on the sources alone. Workers turn each chunk into a
shard file in OUT/.prepare, which appears whole or not at all: the shards are the journal. When all are there, one pass joins them,
in order, into the splits. manifest.json is written last, and the shards go after it. An interruption at any point loses at most the
chunks under way; the same command continues.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from ngpt.config.errors import ConfigError
from ngpt.config.schema import TokenizerConfig
from ngpt.config.vocabularies import FILES
from ngpt.data import encode
from ngpt.data.assemble import assemble
from ngpt.data.files import atomic_write, progress, sha256_of_stream
from ngpt.data.manifest import NAME, Manifest, SourceInfo
from ngpt.data.plan import PLAN, TOKENIZER, WORK, Options, clear, find_finished, is_trained, locked, make_plan, open_shards
from ngpt.data.readers import Record, read_records
from ngpt.data.sources import AT_A_URL, Source, find_sources, shortened
from ngpt.data.tokenizers import train_bpe
from ngpt.data.vocabulary import located
from ngpt.places import check_place

CHUNK_BYTES = 4 << 20  # of text, in a chunk


def prepare(
    inputs: Sequence[Path | str],
    out: Path | str,
    tokenizer: TokenizerConfig,
    options: Options | None = None,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> Manifest:
    """Prepare files into OUT/{train,valid,test}.{bin,idx} and OUT/manifest.json, or find them prepared already.

    Needs free space for the tokens twice. The result does not depend on `workers`, `chunk_bytes` or interruptions.

    Args:
        inputs: Files, folders or URLs of them (see `find_sources`), in the order of the documents.
        out: The folder to write.
        tokenizer: Kind `bpe` without a path trains one, on the first texts of the train split's share.
        options: See `Options`; null: its defaults.
        workers: Processes; null: one a CPU.
        overwrite: Replace what other options or sources left in `out`.
        chunk_bytes: Granularity of parallel work and of resumption.

    Raises:
        ConfigError: An unusable input, tokenizer or option; no documents, or none for a split; `out` holds something else or is no place.
    """
    out, options = Path(out), options or Options()
    options.check()
    if overwrite or not os.path.isfile(out / NAME):  # what is prepared already may be on a disk that takes no files
        check_place("--out", out)
    origin = None
    if tokenizer.path is not None and tokenizer.kind in FILES:
        path, origin = located(tokenizer)  # once: the workers read the file
        tokenizer = replace(tokenizer, path=str(path))
    sources, left_out = find_sources(inputs)
    infos = _hash_sources(sources)
    plan = make_plan(infos, tokenizer, options, chunk_bytes)
    with _made(out), locked(out):
        if overwrite:
            clear(out, Path(tokenizer.path) if tokenizer.path is not None and tokenizer.kind in FILES else None)
        manifest = find_finished(out, plan)
        if manifest is None:
            folder = open_shards(out, plan)
            job = encode.Job(sources, tokenizer, options.text_key, options.strict, folder)
            if is_trained(tokenizer):
                spec = plan["result"]["options"]["tokenizer"]
                job = replace(job, tokenizer=_trained_bpe(job, options, spec["vocab_size"], spec["sample_bytes"]))
            # A process more than there are chunks would only cost its start.
            size = sum(info.bytes for info in infos)
            chunks = 1 + size // chunk_bytes
            try:
                count = _encode_all(job, options, size, chunk_bytes, min(workers or len(os.sched_getaffinity(0)), chunks))
            except ConfigError:
                if os.listdir(folder) == [PLAN]:  # a mistake leaves nothing behind that a corrected command would stumble over
                    shutil.rmtree(folder)
                raise
            notes = [f"{len(left_out):,} left out of the sources: {shortened(left_out)}"] if left_out else []
            try:
                manifest = assemble(out, job, infos, plan["result"]["options"], count, notes, origin)
            except ConfigError:  # too few documents: what makes more of them makes other shards
                shutil.rmtree(folder)
                raise
        shutil.rmtree(out / WORK, ignore_errors=True)
    return manifest


@contextmanager
def _made(out: Path) -> Iterator[None]:
    """Makes a folder and those above it. A mistake leaves none of them empty."""
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except ConfigError:
        with suppress(OSError):  # one that holds something stays
            for folder in missing:
                folder.rmdir()
        raise


def _hash_sources(sources: Sequence[Source]) -> list[SourceInfo]:
    with progress(sum(_read_or_refused(source, Source.known_size) for source in sources), "checksums") as bar:
        return [_read_or_refused(source, partial(_hash, bar=bar)) for source in sources]


def _hash(source: Source, bar: tqdm) -> SourceInfo:
    if source.checksum and source.size is not None:
        bar.update(source.size)
        return SourceInfo(source.name, source.size, "", checksum=source.checksum)
    with source.open() as stream:
        sha256, size = sha256_of_stream(stream, bar)
    return SourceInfo(source.name, size, sha256)


def _read_or_refused[T](source: Source, read: Callable[[Source], T]) -> T:
    try:
        return read(source)
    except OSError as error:
        got = f"unreadable: {error.strerror or error}"
        way_out = "Check its permissions" if isinstance(source.path, Path) else AT_A_URL
        raise ConfigError(source.place, got, "A source must be readable", way_out) from error


def _records(job: encode.Job, options: Options) -> Iterator[Record]:
    for index, source in enumerate(job.sources):
        yield from read_records(index, source, options.text_key, options.documents)


def _trained_bpe(job: encode.Job, options: Options, vocab_size: int, sample_bytes: int) -> TokenizerConfig:
    path = job.folder / TOKENIZER
    if not path.is_file():
        with progress(sample_bytes, "training the bpe") as bar:
            trained = train_bpe(encode.sample_texts(_records(job, options), job, sample_bytes, bar), vocab_size)
        with atomic_write(path) as stream:
            stream.write(trained.encode())
    return replace(job.tokenizer, path=str(path))


def _chunks(records: Iterator[Record], chunk_bytes: int) -> Iterator[tuple[list[Record], int]]:
    """Records in groups, each with the bytes of its sources that it covers."""
    group: list[Record] = []
    consumed = held = 0
    for record in records:
        group.append(record)
        consumed += record.consumed
        held += len(record.payload or "")
        if held >= chunk_bytes:
            yield group, consumed
            group, consumed, held = [], 0, 0
    if group:
        yield group, consumed


def _encode_all(job: encode.Job, options: Options, size: int, chunk_bytes: int, workers: int) -> int:
    """Write every shard that is not there yet; returns how many there are."""
    count = 0
    with progress(size, "tokenizing") as bar, _pool(job, workers) as pool:
        running: dict[Future[None], int] = {}
        for records, consumed in _chunks(_records(job, options), chunk_bytes):
            index, count = count, count + 1
            if encode.shard_path(job.folder, index).is_file():
                bar.initial += consumed  # from an earlier run, so not part of this run's rate
                bar.update(consumed)
            elif pool is None:
                encode.run_chunk(index, records)
                bar.update(consumed)
            else:
                running[pool.submit(encode.run_chunk, index, records)] = consumed
                _collect(running, bar, at_most=2 * workers)
        _collect(running, bar, at_most=0)
    return count


@contextmanager
def _pool(job: encode.Job, workers: int) -> Iterator[ProcessPoolExecutor | None]:
    if workers <= 1:
        encode.set_job(job)
        yield None
        return
    # Spawned: a forked worker would hold the lock of a killed parent.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=encode.start_worker, initargs=(job,))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise RuntimeError("A worker process died, perhaps for lack of memory; the same command with fewer --workers continues.") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(running: dict[Future[None], int], bar: tqdm, at_most: int) -> None:
    while len(running) > at_most:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            future.result()
            bar.update(running.pop(future))
