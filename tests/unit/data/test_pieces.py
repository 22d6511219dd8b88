"""SentencePiece tokenizers, against the library used directly."""

import io
import json
import random
import shlex
from collections import Counter

import pytest
import sentencepiece

from launch import cli
from ngpt.config.errors import ConfigError
from ngpt.config.schema import DataSource, TokenizerConfig
from ngpt.data.indexed import IndexedReader
from ngpt.data.manifest import Manifest, check_against_model
from ngpt.data.pieces import SentencePieceTokenizer
from ngpt.data.plan import Options
from ngpt.data.prepare import prepare
from ngpt.data.tokenizers import from_config, from_manifest

WORDS = ["the", "norm", "of", "row", "größe", "数学", "one", "is", "matrix", "scale", "token", "layer"]
EXACT = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "vocab_size": 320}
ONE_SPACE = {**EXACT, "remove_extra_whitespaces": True}
NFKC = {"byte_fallback": True, "vocab_size": 320}  # nmt_nfkc is the library's default
UNKNOWN = {**EXACT, "byte_fallback": False, "vocab_size": 100}
AWKWARD = [
    *("", " ", "  ", "\n\n \t", "a\r\nb\rc", "\t a", " leading", "trailing ", "two  spaces", "🙂👩‍👩‍👧", "e\u0301 \u0301", "ﬁ①Ⅷ"),
    *("\x00\x7f\x01", "\ufeffbom", "</s> and <s> and <unk>", "<0x41>", "\u00a0\u200b", "a" * 500, "日本 the norm"),
]


def sentences(count=300):
    rng = random.Random(1)
    return [" ".join(rng.choices(WORDS, k=8)) + "." for _ in range(count)]


def model_file(path, **options):
    """A tiny tokenizer.model; the same options give the same bytes."""
    written = io.BytesIO()
    options = {"vocab_size": 100, "hard_vocab_limit": False, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences()), model_writer=written, **options)
    path.write_bytes(written.getvalue())
    return path


def both(tmp_path, **options):
    path = model_file(tmp_path / "tokenizer.model", **options)
    return SentencePieceTokenizer(path, "s"), sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.mark.parametrize("options", [EXACT, NFKC, UNKNOWN, {"model_type": "bpe", **EXACT}, {"treat_whitespace_as_suffix": True, **EXACT}])
def test_ids_are_the_librarys_and_none_is_special(options, tmp_path):
    ours, library = both(tmp_path, **options)
    for text in AWKWARD + sentences()[:20]:
        ids = ours.encode(text).tolist()
        assert ids == library.encode(text)
        assert not {library.bos_id(), library.eos_id()} & {*ids}
        assert ours.decode(ids) == ours.decode([*ids, ours.eod_id]) == library.decode(ids)
    assert (ours.eod_id, ours.vocab_size) == (library.eos_id(), library.get_piece_size())


@pytest.mark.parametrize("options", [EXACT, {"model_type": "bpe", **EXACT}])
def test_with_byte_fallback_and_no_normaliser_every_text_comes_back(options, tmp_path):
    tokenizer, _ = both(tmp_path, **options)
    for text in AWKWARD + sentences()[:20]:
        assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
        assert not tokenizer.dropped(text)
    assert tokenizer.notes == []
    pieces = tokenizer.encode(" ".join(WORDS)).tolist()  # what `ngpt sample` decodes begins anywhere
    assert tokenizer.decode(pieces[: len(pieces) // 2]) + " " + tokenizer.decode(pieces[len(pieces) // 2 :]) == " ".join(WORDS)


@pytest.mark.parametrize(
    ("options", "named", "unnamed"),
    [
        (NFKC, ["line ends", "tabs", "runs of spaces", "compatibility", "accents", "zero-width"], ["capital"]),
        ({**NFKC, "normalization_rule_name": "nfkc_cf"}, ["compatibility", "accents", "capital letters"], ["line ends", "tabs"]),
        (ONE_SPACE, ["runs of spaces and those at either end"], ["line ends", "tabs", "compatibility", "accents"]),
    ],
)
def test_what_a_normaliser_changes_is_named(options, named, unnamed, tmp_path):
    tokenizer, _ = both(tmp_path, **options)
    (note,) = tokenizer.notes
    assert note.startswith("the tokenizer's normaliser changes the text") and all(word in note for word in named), note
    assert not any(word in note for word in unnamed), note


def test_characters_of_the_unknown_token_are_counted(tmp_path):
    tokenizer, _ = both(tmp_path, **UNKNOWN)
    text = "the 日本 norm日 \x00 🙂🙂 of row"
    assert tokenizer.dropped(text) == Counter({"日": 2, "本": 1, "\x00": 1, "🙂": 2})
    tokenizer.encode("the norm")
    assert tokenizer.dropped(text).total() == 6 and not tokenizer.dropped("the norm")


@pytest.mark.parametrize("options", [EXACT, UNKNOWN])
def test_the_mark_of_a_space_comes_back_as_one_and_is_counted(options, tmp_path):
    tokenizer, _ = both(tmp_path, **options)
    assert tokenizer.decode(tokenizer.encode("the\u2581norm").tolist()) == "the norm"
    assert tokenizer.dropped("the\u2581norm") == Counter("\u2581")


def test_a_model_without_an_end_of_document_needs_one_beside_it(tmp_path):
    options = {"eos_id": -1, "control_symbols": ["<end>"], "user_defined_symbols": ["<|endoftext|>"]}
    path = model_file(tmp_path / "tokenizer.model", **options)
    with pytest.raises(ConfigError, match="tokenizer.model has none. It needs an end-of-document token: eos_token in"):
        SentencePieceTokenizer(path, "s")  # any text may hold <|endoftext|>
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    tokenizer = SentencePieceTokenizer(path, "s")
    assert tokenizer.eod_id == sentencepiece.SentencePieceProcessor(model_file=str(path)).piece_to_id("<end>")
    assert tokenizer.identity != SentencePieceTokenizer(path, "s", eod_id=1).identity


def test_a_declared_end_of_document_may_have_any_name(tmp_path):
    ours, library = both(tmp_path, eos_piece="<finis>")
    assert ours.eod_id == library.eos_id() == library.piece_to_id("<finis>")


def test_identity_is_that_of_the_bytes(tmp_path):
    first = SentencePieceTokenizer(model_file(tmp_path / "a.model"), "a")
    same = SentencePieceTokenizer(model_file(tmp_path / "b.model"), "b")
    other = SentencePieceTokenizer(model_file(tmp_path / "c.model", vocab_size=30), "a")
    assert first.identity == same.identity != other.identity


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-7], lambda b: b"\0" * 100, lambda b: b"{}", lambda b: b[:40]])
def test_a_damaged_model_is_one_line(damage, tmp_path):
    path = model_file(tmp_path / "tokenizer.model")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=r"tokenizer.path: .*tokenizer.model. Not a SentencePiece model: ") as error:
        from_config(TokenizerConfig(name="s", kind="sentencepiece", path=str(path)))
    assert "\n" not in str(error.value)


def test_a_folder_stands_for_its_model(tmp_path):
    config = TokenizerConfig(name="s", kind="sentencepiece", path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"tokenizer.model. No such file. Name the tokenizer's"):
        from_config(config)
    model_file(tmp_path / "tokenizer.model")
    assert from_config(config).path == tmp_path / "tokenizer.model"
    with pytest.raises(ConfigError, match=r"tokenizer.json. No such file. Choose tokenizer=sentencepiece, whose file is there"):
        from_config(TokenizerConfig(name="h", kind="huggingface", path=str(tmp_path)))


@pytest.mark.parametrize("workers", [1, 2])
def test_prepared_data_decodes_without_the_original(workers, tmp_path):
    folder, out, texts = tmp_path / "t", tmp_path / "out", [f"the norm {i}🙂" for i in range(40)]
    folder.mkdir()
    model_file(folder / "tokenizer.model", **EXACT, eos_id=-1, control_symbols=["<end>"])
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = TokenizerConfig(name="sentencepiece", kind="sentencepiece", path=str(folder))
    manifest = prepare([source], out, config, Options(split="100,0,0"), workers=workers, chunk_bytes=300)
    for file in folder.iterdir():
        file.unlink()
    assert manifest.tokenizer.path == "tokenizer.model" and manifest.tokenizer.hub == ""
    tokenizer = from_manifest(Manifest.load(out))
    documents = [document.tolist() for document in IndexedReader(out / "train")]
    assert [tokenizer.decode(document) for document in documents] == texts
    assert {document[-1] for document in documents} == {tokenizer.eod_id} == {manifest.tokenizer.eod_id}
    copied = TokenizerConfig(name="sentencepiece", kind="sentencepiece", path=str(out / "tokenizer.model"))
    check_against_model([DataSource(str(out / "train"))], copied, 400)
    kept = (out / "tokenizer.model").read_bytes()
    (out / "tokenizer.model").write_bytes(model_file(tmp_path / "other.model", **ONE_SPACE).read_bytes())
    with pytest.raises(ConfigError, match="changed since the preparation"):
        from_manifest(manifest)
    (out / "tokenizer.model").write_bytes(kept)
    prepare([source], out, copied, Options(split="100,0,0"), workers=1, overwrite=True)  # the vocabulary asked for is not removed before
    assert {"tokenizer.model", "tokenizer_config.json"} <= {path.name for path in out.iterdir()}
    prepare([source], out, TokenizerConfig(name="bytes", kind="bytes"), Options(split="100,0,0"), workers=1, overwrite=True)
    assert not [path for path in out.iterdir() if path.name.startswith("tokenizer")]


def test_the_command_prints_how_to_train_and_notes_what_is_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model_file(tmp_path / "tokenizer.model")
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "the norm 日 {i}"}}\n' for i in range(40)))
    words = ["data", "prepare", "x.jsonl", "--tokenizer", "sentencepiece", "--tokenizer-path", "tokenizer.model", "--workers", "1"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "note: the tokenizer's normaliser changes the text" in out and "'日' x 40" in out
    assert {"tokenizer=sentencepiece", "tokenizer.path=data/x_sentencepiece/tokenizer.model"} < set(shlex.split(out.splitlines()[-1]))
