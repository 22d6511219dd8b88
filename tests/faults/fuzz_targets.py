"""What the fuzzer feeds: each target writes one damaged input and hands it to the code that a command would."""

import io
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from fuzz_mutators import json_bytes, mutate_bytes, override, yaml_bytes
from sentencepiece import SentencePieceTrainer

from launch.resumable import check_resumable, resume_notes
from launch.resume_checks import SOURCES_FILE
from launch.run_folder import nothing_left, record_launch
from ngpt.analysis.compare import config_diff, environment_rows, load_run
from ngpt.analysis.groups import group_runs
from ngpt.analysis.metrics import MetricsWriter, truncate_after
from ngpt.analysis.results import final_rows, leads, not_measured
from ngpt.config.compose import compose, load
from ngpt.config.schema import DataSource, TokenizerConfig
from ngpt.config.translate import leaf_types
from ngpt.data.inspect import blend, data_lines
from ngpt.data.manifest import Manifest, check_against_model
from ngpt.data.prepare import prepare
from ngpt.data.tokenizers import from_config, from_manifest
from ngpt.data.verify import CHECKED, verify

BYTES = TokenizerConfig(name="bytes", kind="bytes")
TINY = "experiment=ngpt_tiny"
KEYS = [key for key, _ in leaf_types()]


class Fixtures:
    """Intact inputs, made once in `folder`; `work` is emptied before each case."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        folder.mkdir(parents=True, exist_ok=True)
        self.text = folder / "x.jsonl"
        self.text.write_text("".join(json.dumps({"text": f"hello {i} " * (i % 5 + 1)}) + "\n" for i in range(120)))
        self.data, self.bpe = folder / "bytes", folder / "bpe"
        prepare([self.text], self.data, BYTES, workers=1)
        prepare([self.text], self.bpe, TokenizerConfig(name="bpe", kind="bpe", vocab_size=262), workers=1)
        pieces = io.BytesIO()
        sentences = (f"hello {i} größe" for i in range(120))
        trained = {"vocab_size": 280, "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2}
        SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=pieces, **trained)
        self.pieces = pieces.getvalue()
        run = folder / "run"
        sources = [f"data.train=[{{path: {self.data / 'train'}}}]", "data.valid=[]", "data.mock=false", "train.eval_steps=0"]
        self.config = compose([TINY, f"run.dir={run}", *sources])
        record_launch(self.config, ["ngpt"], {})
        self.run = run
        with MetricsWriter(run / "metrics.jsonl") as writer:
            for step in range(1, 6):
                writer.write({"step": step, "tokens": step * 256, "train_loss": 5.0 - step / 10, "val_loss": 4.0, "tokens_per_second": 9.0})
        self.summary = {"run_name": "x", "status": "finished", "steps": 5, "tokens": 1280, "val_loss": 4.0, "wall_time_s": 3.0}
        (run / "summary.json").write_text(json.dumps(self.summary))

    def fresh(self, source: Path | None = None) -> Path:
        """The work folder, empty or a copy."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(source, self.work) if source else self.work.mkdir()
        return self.work


def overrides(rng: random.Random, fixtures: Fixtures) -> None:
    compose([*rng.choice([[TINY], [TINY], []]), *(override(rng, KEYS) for _ in range(rng.choice([1, 1, 2, 4])))])


def config_file(rng: random.Random, fixtures: Fixtures) -> None:
    group = rng.choice(["experiment", "model", "optim", "data"])
    folder = fixtures.fresh() / group
    folder.mkdir()
    section = asdict(fixtures.config)
    tree = {"train": section["train"], "optim": section["optim"]} if group == "experiment" else section[group]
    header = b"# @package _global_\n" if group == "experiment" else b""
    (folder / "zz.yaml").write_bytes(header + yaml_bytes(rng, tree))
    words = ["experiment=zz"] if group == "experiment" else [TINY, f"{group}=zz"]
    compose(words, [fixtures.work])


def run_config(rng: random.Random, fixtures: Fixtures) -> None:
    path = fixtures.fresh() / "config.yaml"
    path.write_bytes(yaml_bytes(rng, asdict(fixtures.config)))
    load(path)


def manifest(rng: random.Random, fixtures: Fixtures) -> None:
    work = fixtures.fresh(rng.choice([fixtures.data, fixtures.bpe]))
    path = work / "manifest.json"
    path.write_bytes(json_bytes(rng, json.loads(path.read_bytes())))
    _use_data(work)


def data_files(rng: random.Random, fixtures: Fixtures) -> None:
    work = fixtures.fresh(rng.choice([fixtures.data, fixtures.bpe]))
    path = work / rng.choice(["train.idx", "train.idx", "train.bin", "valid.idx"])
    path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    if rng.random() < 0.5:
        _use_data(work)
    else:  # `ngpt data inspect` looks at data that no launch has checked
        list(data_lines(work, 3, 30))


def records(rng: random.Random, fixtures: Fixtures) -> None:
    """What launches keep of the data."""
    work = fixtures.fresh(fixtures.data)
    (work / CHECKED).write_bytes(json_bytes(rng, {"train.bin": {"sha256": "0" * 64, "blocks": "0:0123456789abcdef"}}))
    verify(work / "train")
    run = fixtures.fresh(fixtures.run)
    _checkpoint(run, b"2")
    recorded = json.loads((run / SOURCES_FILE).read_bytes())
    (run / SOURCES_FILE).write_bytes(json_bytes(rng, recorded))
    resume_notes(_config_of(fixtures, run))


def tracker(rng: random.Random, fixtures: Fixtures) -> None:
    run = fixtures.fresh(fixtures.run)
    _checkpoint(run, rng.choice([mutate_bytes(rng, b"2"), str(rng.choice([0, 1, 2, 3, -1, 10**40])).encode(), "²".encode(), b"release"]))
    if rng.random() < 0.3:
        (run / "checkpoints" / rng.choice(["iter_0000002.bak", "iter_", "iter_x", "iter_99999999999999999999"])).mkdir()
    if rng.random() < 0.3:
        (run / "checkpoints" / "latest_checkpointed_iteration.txt").unlink()
    config = _config_of(fixtures, run)
    check_resumable(config)
    nothing_left(config)


def tokenizer(rng: random.Random, fixtures: Fixtures) -> None:
    work = fixtures.fresh()
    kind = rng.choice(["huggingface", "huggingface", "tiktoken", "sentencepiece"])
    if kind == "tiktoken":
        vocabulary = [{"rank": i, "token_bytes": "QQ=="[:0] + _base64(i)} for i in range(256)]
        tree = {"config": {"pattern": r"\w+|\W", "default_num_special_tokens": 3, "default_vocab_size": 259}, "vocab": vocabulary}
    else:
        tree = json.loads((fixtures.bpe / "tokenizer.json").read_bytes())
    path = work / "tokenizer.json"
    path.write_bytes(mutate_bytes(rng, fixtures.pieces) if kind == "sentencepiece" else json_bytes(rng, tree))
    if rng.random() < 0.3:
        (work / "tokenizer_config.json").write_bytes(json_bytes(rng, {"eos_token": "<|endoftext|>"}))
    built = from_config(TokenizerConfig(name="x", kind=kind, path=str(path)))
    built.decode([0, 1, 5, 300, 2**31 - 1])
    for text in ("the größe 数学", "\x00\ufffd"):
        built.encode(text)
        built.dropped(text)


def metrics(rng: random.Random, fixtures: Fixtures) -> None:
    """A run folder as `ngpt report` and a resume read it."""
    run = fixtures.fresh(fixtures.run)
    name = rng.choice(["metrics.jsonl", "metrics.jsonl", "summary.json", "environment.json", "config.yaml"])
    path = run / name
    if name == "metrics.jsonl":
        lines = path.read_bytes().splitlines()
        place = rng.randrange(len(lines))
        lines[place] = json_bytes(rng, json.loads(lines[place]))
        path.write_bytes(b"\n".join(lines) + rng.choice([b"\n", b""]))
    elif name == "config.yaml":
        path.write_bytes(yaml_bytes(rng, asdict(fixtures.config)))
    else:
        path.write_bytes(json_bytes(rng, json.loads(path.read_bytes())))
    runs = [load_run(run), load_run(fixtures.run)]
    config_diff(runs), environment_rows(runs)
    groups = group_runs(runs)
    final_rows(groups), leads(groups), not_measured(groups)
    truncate_after(run / "metrics.jsonl", 3)


def sources(rng: random.Random, fixtures: Fixtures) -> None:
    """Texts to prepare: what fails leaves no manifest and no temporary file."""
    work = fixtures.fresh()
    name = rng.choice(["a.jsonl", "a.txt", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
    content = fixtures.text.read_bytes() if rng.random() < 0.7 else _packed(name, fixtures.text.read_bytes())
    (work / name).write_bytes(mutate_bytes(rng, content))
    kind = rng.choice([BYTES, TokenizerConfig(name="bpe", kind="bpe", vocab_size=rng.choice([258, 260, 10**11, -1, 2**22]))])
    try:
        prepare([work / name], work / "out", kind, workers=1)
    except BaseException:
        left = [path.name for path in work.rglob("*") if path.name == "manifest.json" or path.name.endswith(".partial")]
        assert not left, f"a failure left {left}"
        raise


def _use_data(work: Path) -> None:
    list(data_lines(work, 2, 30))
    loaded = Manifest.load(work)
    for name in loaded.splits:
        verify(work / name)
    source = DataSource(str(work / "train"))
    blend([source], 1000)
    check_against_model([source], TokenizerConfig(name="x", kind=loaded.tokenizer.kind), 300)
    from_manifest(loaded)


def _checkpoint(run: Path, content: bytes) -> None:
    own = run / "checkpoints" / "iter_0000002"
    own.mkdir(parents=True)
    for name, text in ((".metadata", "__0_0.distcp"), ("__0_0.distcp", "shard"), ("metadata.json", "{}")):
        (own / name).write_text(text)
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_bytes(content)


def _config_of(fixtures: Fixtures, run: Path):
    config = load(fixtures.run / "config.yaml")
    config.run.dir, config.checkpoint.dir = str(run), str(run / "checkpoints")
    return config


def _base64(number: int) -> str:
    import base64

    return base64.b64encode(bytes([number])).decode()


def _packed(name: str, content: bytes) -> bytes:
    """The content in the format that the name promises."""
    if name.endswith(".gz"):
        import gzip

        return gzip.compress(content)
    if name.endswith(".zst"):
        import zstandard

        return zstandard.compress(content)
    return content + os.linesep.encode()


TARGETS: dict[str, tuple[Callable[[random.Random, Fixtures], None], int]] = {  # and how many of 10,000 inputs
    "overrides": (overrides, 1500),
    "config_file": (config_file, 1000),
    "run_config": (run_config, 1000),
    "manifest": (manifest, 2000),
    "data_files": (data_files, 1500),
    "records": (records, 500),
    "tracker": (tracker, 500),
    "tokenizer": (tokenizer, 800),
    "metrics": (metrics, 700),
    "sources": (sources, 500),
}
