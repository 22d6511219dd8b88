"""Tokenizers named by a repository of the Hugging Face Hub: the real library, offline, with a cache as it writes one."""

import json
import shutil

import pytest
from huggingface_hub import constants

from ngpt.config.errors import ConfigError
from ngpt.config.schema import DataSource, TokenizerConfig
from ngpt.data import hub
from ngpt.data.manifest import Manifest, check_against_model
from ngpt.data.plan import Options
from ngpt.data.prepare import prepare
from ngpt.data.tokenizers import from_config, from_manifest, train_bpe

COMMIT, TAGGED = "c" * 40, "d" * 40
TEXTS = [f"line {i} of the text" for i in range(40)]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """org/name with a tokenizer.json that needs its tokenizer_config.json, in the cache of a machine without a network."""
    cache = tmp_path / "cache" / "models--org--name"
    for revision, commit, end in (("main", COMMIT, "<end>"), ("v1", TAGGED, "<other>")):
        folder = cache / "snapshots" / commit
        folder.mkdir(parents=True)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / revision).write_text(commit)
        (folder / "tokenizer.json").write_text(train_bpe(TEXTS * 5, 262).replace("<|endoftext|>", end))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return cache


def config(path, kind="huggingface"):
    return TokenizerConfig(name="h", kind=kind, path=path)


def prepared(tmp_path, path, **keywords):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return prepare([source], tmp_path / "out", config(path), Options(split="100,0,0"), **{"workers": 1, **keywords})


@pytest.mark.parametrize(
    ("path", "commit"), [("org/name", COMMIT), ("org/name@v1", TAGGED), (f"org/name@{TAGGED}", TAGGED), ("org/name@main", COMMIT)]
)
def test_the_manifest_has_the_commit(path, commit, repository, tmp_path):
    manifest = prepared(tmp_path, path)
    assert manifest == Manifest.load(tmp_path / "out")
    assert (manifest.tokenizer.hub, manifest.tokenizer.commit) == (path, commit)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (repository / "snapshots" / commit / "tokenizer.json").read_bytes()


def test_training_on_prepared_data_asks_the_hub_for_nothing(repository, tmp_path):
    prepared(tmp_path, "org/name", workers=2, chunk_bytes=100)
    shutil.rmtree(repository)  # and there is no network
    sources = [DataSource(str(tmp_path / "out/train"))]
    for path in ("org/name", f"org/name@{COMMIT}", "out/tokenizer.json", "out"):
        check_against_model(sources, config(path), 300)
    assert from_manifest(Manifest.load(tmp_path / "out")).decode([*range(1, 5)])


def test_another_revision_is_compared_by_its_tokens(repository, tmp_path):
    prepared(tmp_path, "org/name")
    sources = [DataSource(str(tmp_path / "out/train"))]
    check_against_model(sources, config("org/name@main"), 300)
    with pytest.raises(ConfigError, match="other tokens under the same numbers"):
        check_against_model(sources, config("org/name@v1"), 300)


def test_local_paths_win(repository, tmp_path):
    folder = tmp_path / "org/name"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(train_bpe(TEXTS * 5, 260))
    tokenizer = from_config(config("org/name"))
    assert tokenizer.vocab_size == 260 and tokenizer.path.resolve() == folder / "tokenizer.json"
    assert prepared(tmp_path, "org/name").tokenizer.hub == ""


def test_what_cannot_be_fetched_is_one_line(repository):
    with pytest.raises(ConfigError) as error:
        from_config(config("org/absent@v2"))
    text = str(error.value)
    assert text.startswith("tokenizer.path: org/absent@v2: neither a local file nor could it be fetched") and "\n" not in text
    assert "HF_TOKEN" in text
    with pytest.raises(ConfigError, match="Name the tokenizer's vocabulary file"):
        from_config(config("data/tokenizer.json"))  # a mistyped file is not looked for elsewhere


def test_a_repository_with_the_other_kind_of_file_says_so(repository):
    snapshot = repository / "snapshots" / COMMIT
    (snapshot / "tokenizer.json").rename(snapshot / "tokenizer.model")
    with pytest.raises(ConfigError, match="org/name: no tokenizer.json. No such file. Choose tokenizer=sentencepiece"):
        from_config(config("org/name"))


@pytest.mark.parametrize(
    ("path", "named"),
    [("org/name", True), ("org/name@v1", True), ("o-r.g/n_a.me@refs/pr/1", True), ("org/name@", False), ("name", False), ("a/b/c", False)]
    + [("./name", False), ("../name", False), ("/org/name", False), ("org/x.json", False), ("org/x.model", False)],
)
def test_names_of_the_hub(path, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_hub_id(path) == named
