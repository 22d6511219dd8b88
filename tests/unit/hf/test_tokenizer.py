"""Written tokenizers, opened by AutoTokenizer as a user opens them, against ours."""

import base64
import importlib.util
import io
import json
import random

import huggingface_hub.constants
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

import ngpt.hf.tokenizer
from ngpt.config.errors import ConfigError
from ngpt.config.schema import TokenizerConfig
from ngpt.data.pieces import SentencePieceTokenizer
from ngpt.data.tokenizers import EOD, BytesTokenizer, HuggingFaceTokenizer, TiktokenTokenizer, from_config, train_bpe
from ngpt.hf.byte_pairs import last_merge
from ngpt.hf.probes import PROBES
from ngpt.hf.tokenizer import check_written, write_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

LENGTH = 2048
TEXTS = ["The norm of a row is one.\n", "Größe, naïve, 数学, 🙂 and the rest of the row.\n", "the the the norm norm norm\n"] * 20
WORDS = ["the", "norm", "of", "row", "größe", "数学", "one", "is", "matrix", "scale", "token", "aaa", "a"]
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
EXACT = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "vocab_size": 340,
}


def trained_file(path):
    path.write_text(train_bpe(TEXTS, 300))
    return path


def published_file(path):
    """As published ones are: special tokens of its own around a text, which is cut and padded."""
    backend = Backend.from_str(train_bpe(TEXTS, 300))
    backend.add_special_tokens(["[CLS]", "[SEP]", "</s>"])
    backend.add_tokens(["norm of"])
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 300), ("[SEP]", 301)])
    backend.enable_truncation(8)
    backend.enable_padding(length=32)
    backend.save(str(path))
    path.with_name("tokenizer_config.json").write_text('{"eos_token": "</s>", "add_prefix_space": true}')
    return path


def ranks_file(path, tokens=(b"aa", b"aaa", b"th", b"the", b" the", b"aba", b"ab", b"no", b"norm", b"norms")):
    entries = [*(bytes([byte]) for byte in range(256)), *tokens]
    vocabulary = [{"rank": i, "token_bytes": base64.b64encode(token).decode()} for i, token in enumerate(entries)]
    path.write_text(json.dumps({"config": {"pattern": PATTERN, "default_num_special_tokens": 10}, "vocab": vocabulary}))
    return path


def pieces_file(path, **options):
    rng, written = random.Random(1), io.BytesIO()
    sentences = [" ".join(rng.choices(WORDS, k=8)) + "." for _ in range(300)]
    options = {"hard_vocab_limit": False, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=written, **options)
    path.write_bytes(written.getvalue())
    return path


def pieces(folder, **options):
    return SentencePieceTokenizer(pieces_file(folder / "tokenizer.model", **{**EXACT, **options}), "s")


MAKE = {
    "bytes": lambda folder: BytesTokenizer(),
    "bpe": lambda folder: HuggingFaceTokenizer(trained_file(folder / "tokenizer.json"), "b", "bpe"),
    "huggingface": lambda folder: HuggingFaceTokenizer(published_file(folder / "tokenizer.json"), "h"),
    "tiktoken": lambda folder: TiktokenTokenizer(ranks_file(folder / "tekken.json"), "t", 10 + 256 + 9),
    "pieces": pieces,
    "one_space": lambda folder: pieces(folder, remove_extra_whitespaces=True),
    "no_prefix": lambda folder: pieces(folder, remove_extra_whitespaces=True, add_dummy_prefix=False),
    "unknown": lambda folder: pieces(folder, byte_fallback=False, vocab_size=100),
}


@pytest.fixture(scope="module", params=MAKE)
def pair(request, tmp_path_factory):
    """A tokenizer of ours, and the same as AutoTokenizer opens it."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("export")
    tokenizer = MAKE[request.param](source)
    write_tokenizer(tokenizer, folder, LENGTH)
    return tokenizer, opened(folder)


def opened(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        return transformers.AutoTokenizer.from_pretrained(folder)


def same(tokenizer, theirs, text):
    ids = tokenizer.encode(text).tolist()
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs(text)["input_ids"] == [tokenizer.eod_id, *ids]
    assert theirs.decode(ids) == tokenizer.decode(ids)
    assert theirs.decode([tokenizer.eod_id, *ids, tokenizer.eod_id], skip_special_tokens=True) == tokenizer.decode(ids)


def test_ids_and_text_are_ours(pair):
    for text in [*PROBES, *TEXTS[:3], "x" + TEXTS[1] * 40]:
        same(*pair, text)


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]))
    | st.lists(st.sampled_from([*WORDS, " ", "  ", "\n", "ab", "a", EOD])).map("".join)
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_ids_and_text_are_ours_for_any_text(pair, text):
    same(*pair, text)


@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_any_ids_are_decoded(pair, data):
    """What a model generates may end inside a character, and starts anywhere."""
    tokenizer, theirs = pair
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    got = theirs.decode(ids, skip_special_tokens=True)
    if tokenizer.kind != "sentencepiece":  # there the libraries write different numbers of marks for bytes that are no text
        assert got == tokenizer.decode(ids)


def test_a_batch_is_padded_on_the_left_and_goes_into_a_model(pair):
    tokenizer, theirs = pair
    batch = theirs(["", "the norm of"], padding=True)
    ids = tokenizer.encode("the norm of").tolist()
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"] == [[tokenizer.eod_id] * (len(ids) + 1), [tokenizer.eod_id, *ids]]
    assert batch["attention_mask"] == [[0] * len(ids) + [1], [1] * (len(ids) + 1)]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eod_id,) * 3
    assert theirs.model_max_length == LENGTH
    assert len(theirs(["the norm of " * LENGTH], truncation=True)["input_ids"][0]) == LENGTH
    assert len(theirs) == tokenizer.vocab_size


def test_two_texts_are_two_documents(pair):
    tokenizer, theirs = pair
    parts = [[tokenizer.eod_id, *tokenizer.encode(text).tolist()] for text in ("the", "norm")]
    assert theirs("the", "norm")["input_ids"] == parts[0] + parts[1]


def test_a_special_token_in_a_text_is_one_on_request_alone(pair):
    tokenizer, theirs = pair
    assert tokenizer.eod_id not in theirs(f"a{theirs.eos_token}b", add_special_tokens=False)["input_ids"]
    assert tokenizer.eod_id in theirs(f"a{theirs.eos_token}b", add_special_tokens=False, split_special_tokens=False)["input_ids"]


def test_opened_and_saved_again_it_is_the_same(pair, tmp_path):
    tokenizer, theirs = pair
    theirs.save_pretrained(tmp_path)
    again = opened(tmp_path)
    for text in PROBES:
        same(tokenizer, again, text)


@pytest.mark.parametrize("model_type", ["llama", "nemotron_h", "nemotron"])
def test_a_models_own_config_beside_it_changes_nothing(model_type, tmp_path):
    for name in ("bytes", "tiktoken", "pieces"):
        folder = tmp_path / name
        folder.mkdir()
        tokenizer = MAKE[name](folder)
        write_tokenizer(tokenizer, folder, LENGTH)
        (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": tokenizer.vocab_size}))
        theirs = opened(folder)
        for text in PROBES:
            same(tokenizer, theirs, text)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "a normaliser that changes characters (nmt_nfkc)"),
        ({"treat_whitespace_as_suffix": True}, "spaces that are not marked before words"),
        ({"user_defined_symbols": ["<|user|>"]}, "user-defined or unused pieces ('<|user|>')"),
        ({"model_type": "char", "byte_fallback": False}, "a model of words or characters"),
        ({"model_type": "unigram"}, "a unigram model: SentencePiece adds its scores in single precision, the tokenizers library in double"),
    ],
)
def test_a_sentencepiece_model_without_a_counterpart_is_refused(options, named, tmp_path):
    tokenizer, folder = pieces(tmp_path, **options), tmp_path / "export"
    folder.mkdir()
    with pytest.raises(ConfigError) as error:
        write_tokenizer(tokenizer, folder, LENGTH)
    assert str(error.value).startswith(f"{tokenizer.path}: {named}. ") and "--no-tokenizer" in str(error.value)
    assert not list(folder.iterdir())


def broken_merges(tokenizer):
    backend = ngpt.hf.tokenizer._ranks_backend(tokenizer)
    content = json.loads(backend.to_str())
    content["model"]["merges"].reverse()
    return Backend.from_str(json.dumps(content))


def broken_decoder(tokenizer):
    backend = ngpt.hf.tokenizer._ranks_backend(tokenizer)
    backend.decoder = decoders.Fuse()
    return backend


def prefixed(tokenizer):
    backend = ngpt.hf.tokenizer._ranks_backend(tokenizer)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return backend


@pytest.mark.parametrize(("broken", "named"), [(broken_merges, "gives ids"), (broken_decoder, "gives decoded"), (prefixed, "gives ids")])
def test_a_wrong_conversion_does_not_leave(broken, named, tmp_path, monkeypatch):
    tokenizer = MAKE["tiktoken"](tmp_path)
    wrong = broken(tokenizer)
    monkeypatch.setattr(ngpt.hf.tokenizer, "_backend_of", lambda tokenizer: wrong)
    folder = tmp_path / "export"
    folder.mkdir()
    with pytest.raises(ConfigError, match=f"tokenizer.json: .*{named}.*Tokenizer t .tiktoken. must.*--no-tokenizer"):
        write_tokenizer(tokenizer, folder, LENGTH)
    assert not list(folder.iterdir())


def test_a_changed_file_is_found(tmp_path):
    write_tokenizer(BytesTokenizer(), tmp_path, LENGTH)
    check_written(BytesTokenizer(), tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="gives ids"):
        check_written(BytesTokenizer(), tmp_path)


def test_an_end_of_document_that_is_a_word_of_texts_is_refused(tmp_path):
    path = trained_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "!"}')
    folder = tmp_path / "export"
    folder.mkdir()
    with pytest.raises(ConfigError, match="decode"):
        write_tokenizer(HuggingFaceTokenizer(path, "h"), folder, LENGTH)


def test_an_end_of_document_of_any_spelling(tmp_path):
    path = tmp_path / "tokenizer.json"
    backend = Backend(models.BPE({character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<a:b $c>"])
    backend.save(str(path))
    path.with_name("tokenizer_config.json").write_text('{"eos_token": "<a:b $c>"}')
    tokenizer, folder = HuggingFaceTokenizer(path, "h"), tmp_path / "export"
    folder.mkdir()
    write_tokenizer(tokenizer, folder, LENGTH)
    theirs = opened(folder)
    for text in PROBES:
        same(tokenizer, theirs, text)


def test_a_pattern_that_the_library_does_not_read_is_named(tmp_path):
    path = ranks_file(tmp_path / "tekken.json")
    path.write_text(path.read_text().replace(json.dumps(PATTERN), json.dumps(r"\p{gc=L}+|.")))
    tokenizer, folder = TiktokenTokenizer(path, "t"), tmp_path / "export"
    folder.mkdir()
    with pytest.raises(ConfigError, match="tekken.json: .*character property.*Its pattern must be one for the tokenizers library, too"):
        write_tokenizer(tokenizer, folder, LENGTH)


def test_a_token_comes_from_its_parts_by_rank():
    ranks = {token: i for i, token in enumerate(["a", "b", "c", "ab", "bc", "abc", "cab"])}
    assert last_merge("ab", ranks) == ("a", "b")
    assert last_merge("abc", ranks) == ("ab", "c")
    assert last_merge("abc", ranks | {"bc": 2.5}) == ("a", "bc")
    assert last_merge("ccc", ranks) is None


@pytest.mark.skipif(importlib.util.find_spec("mistral_common") is None, reason="mistral-common, an optional extra, is not installed")
def test_tekken_is_ours(tmp_path):
    tokenizer = from_config(TokenizerConfig(name="tekken", kind="tiktoken", vocab_size=32768))
    write_tokenizer(tokenizer, tmp_path, LENGTH)
    theirs = opened(tmp_path)
    assert len(theirs) == tokenizer.vocab_size == 32768
    for text in [*PROBES, *TEXTS[:3]]:
        same(tokenizer, theirs, text)
