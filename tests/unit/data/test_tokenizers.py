import base64
import importlib.util
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.tokenizers.text.libraries import tiktoken_tokenizer as megatrons
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ngpt.config.errors import ConfigError
from ngpt.config.schema import TokenizerConfig
from ngpt.data.tokenizers import EOD, BytesTokenizer, HuggingFaceTokenizer, TiktokenTokenizer, from_config, train_bpe
from ngpt.data.vocabulary import TEKKEN_FILE

TEXTS = ["The norm of a row is one.\n", "Größe, naïve, 数学, 🙂 and the rest of the row.\n", "the the the norm norm norm\n"] * 20
AWKWARD = ["", " ", "\n\n \t", "ünïcödé 数学 🙂", "a" * 500, f"spelled {EOD} and </s> inside", "\x00\x7f", "\ufeffbom"]


def tekken_file(path, tokens=(b"th", b"the", b" the", b"no", b"norm"), **settings):
    entries = [*(bytes([byte]) for byte in range(256)), *tokens]
    vocab = [{"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None} for i, token in enumerate(entries)]
    config = {"pattern": megatrons._PATTERN_TIKTOKEN_V2, "default_vocab_size": 131072, "default_num_special_tokens": 1000, **settings}
    path.write_text(json.dumps({"config": config, "vocab": vocab}))
    return path


def bpe_file(path, vocab_size=300):
    path.write_text(train_bpe(TEXTS, vocab_size))
    return path


def make(kind, folder):
    if kind == "bytes":
        return BytesTokenizer()
    if kind == "tiktoken":
        return TiktokenTokenizer(tekken_file(folder / "tekken.json"), "t")
    return HuggingFaceTokenizer(bpe_file(folder / "tokenizer.json"), "h", kind)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_are_utf8(text):
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode("utf-8"))
    assert tokenizer.decode([*ids.tolist(), tokenizer.eod_id]) == text


@pytest.mark.parametrize("kind", ["bytes", "bpe", "huggingface", "tiktoken"])
@pytest.mark.parametrize("text", AWKWARD + TEXTS[:3])
def test_round_trip_and_no_special_token_from_text(kind, text, tmp_path):
    tokenizer = make(kind, tmp_path)
    ids = tokenizer.encode(text).tolist()
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod_id not in ids
    assert tokenizer.eod_id < tokenizer.vocab_size and all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == text


def test_tiktoken_numbers_as_megatron_does(tmp_path):
    path = tekken_file(tmp_path / "tekken.json")
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(json.loads(path.read_text())["vocab"]))
    ours = TiktokenTokenizer(path, "t", vocab_size=1259)  # the last two entries are cut
    theirs = megatrons.TikTokenTokenizer(str(bare), num_special_tokens=1000, vocab_size=1259)
    for text in [text for text in AWKWARD if "</s>" not in text] + TEXTS[:3]:
        assert ours.encode(text).tolist() == theirs.text_to_ids(text)
    assert ours.eod_id == theirs.eos_id
    assert ours.vocab_size == 1259


@pytest.mark.skipif(importlib.util.find_spec("mistral_common") is None, reason="mistral-common, an optional extra, is not installed")
def test_default_tekken_numbers_as_megatron_does(tmp_path):
    ours = from_config(TokenizerConfig(name="tekken", kind="tiktoken"))
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(json.loads(ours.path.read_text())["vocab"]))
    theirs = megatrons.TikTokenTokenizer(str(bare))
    assert ours.path.name == TEKKEN_FILE
    assert ours.vocab_size == 131072
    for text in TEXTS[:3]:
        assert ours.encode(text).tolist() == theirs.text_to_ids(text)


def test_trained_bpe_is_the_librarys_and_repeats(tmp_path):
    path = bpe_file(tmp_path / "tokenizer.json")
    assert train_bpe(TEXTS, 300) == path.read_text()
    tokenizer, library = HuggingFaceTokenizer(path, "h"), Backend.from_file(str(path))
    assert tokenizer.vocab_size == library.get_vocab_size() == 300
    assert tokenizer.eod_id == library.token_to_id(EOD)
    assert tokenizer.encode(TEXTS[0]).tolist() == library.encode(TEXTS[0]).ids
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0])


def test_eos_token_beside_the_file_names_the_end_of_document(tmp_path):
    path = bpe_file(tmp_path / "tokenizer.json")
    default = HuggingFaceTokenizer(path, "h")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "!"}}))
    declared = HuggingFaceTokenizer(path, "h")
    assert declared.eod_id == Backend.from_file(str(path)).token_to_id("!") != default.eod_id
    assert declared.identity != default.identity


def test_a_declared_end_of_document_that_the_vocabulary_lacks_is_named(tmp_path):
    path, beside = bpe_file(tmp_path / "tokenizer.json"), tmp_path / "tokenizer_config.json"
    beside.write_text('{"eos_token": "<|im_end|>"}')
    (note,) = HuggingFaceTokenizer(path, "h").notes
    assert note == f"{beside} declares eos_token '<|im_end|>', which the vocabulary lacks: '{EOD}' (id 0) ends documents instead"
    beside.write_text(json.dumps({"eos_token": EOD}))
    assert not HuggingFaceTokenizer(path, "h").notes
    beside.write_text('{"eos_token": "<|im_end|>"}')
    path.write_text(path.read_text().replace(EOD, "<none>"))
    with pytest.raises(ConfigError, match=r"has none, not the '<\|im_end\|>' of tokenizer_config.json either"):
        HuggingFaceTokenizer(path, "h")


def backend_of(characters, suffix=None, **parts):
    tokens = [EOD, *characters, *(f"{character}{suffix}" for character in characters if suffix)]
    suffixes = {"end_of_word_suffix": suffix} if suffix else {}
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, [], **suffixes))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend


def in_bytes(**parts):
    return {"pre_tokenizer": pre_tokenizers.ByteLevel(**parts), "decoder": decoders.ByteLevel()}


SPACES_MARKED = {"pre_tokenizer": pre_tokenizers.Metaspace(), "decoder": decoders.Metaspace()}
COMPOSED = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
PLAIN = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])


@pytest.mark.parametrize(
    ("backend", "text", "dropped"),
    [
        (backend_of("helo"), "hello 7 Zoé 7", {"7": 2, "Z": 1, "é": 1}),
        (backend_of("helo", normalizer=COMPOSED), "HELLO ｈｅｌｌｏ Zoe", {"Z": 1}),
        (backend_of("zoé", normalizer=COMPOSED), "Zoe\u0301", {}),
        (backend_of("zoe", normalizer=PLAIN), "zoé zoe\u0301 \u0301", {}),
        (backend_of("zo", suffix="</w>", decoder=decoders.BPEDecoder("</w>")), "zo zoo zé", {"é": 1}),
        (backend_of("▁helo", **SPACES_MARKED), "hello o日 日", {"日": 2}),
        (backend_of("Ġheol", **in_bytes(add_prefix_space=True)), "hello é", {"é": 1}),
        (backend_of("Ġheol©", **in_bytes(add_prefix_space=False)), "hello é", {"é": 1}),
        (backend_of(sorted(pre_tokenizers.ByteLevel.alphabet()), **in_bytes()), " \ufffd é\u0301 日\u200d\x00\n", {}),
        (Backend(models.WordLevel({EOD: 0, "<unk>": 1, "hello": 2}, "<unk>")), "hello 7", {}),
        (Backend(models.BPE({EOD: 0, "<unk>": 1, "h": 2}, [], unk_token="<unk>")), "hé", {}),
    ],
)
def test_characters_without_a_token_are_counted_and_no_others(backend, text, dropped, tmp_path):
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    assert HuggingFaceTokenizer(path, "h").dropped(text) == dropped


@pytest.mark.parametrize(
    "model",
    [models.WordLevel({EOD: 0, "hello": 1}), models.Unigram([(EOD, 0.0), ("h", -1.0)]), models.BPE({EOD: 0}, [], unk_token="<unk>")],
)
def test_a_tokenizer_without_an_unknown_token_is_named(model, tmp_path):
    path = tmp_path / "tokenizer.json"
    Backend(model).save(str(path))
    with pytest.raises(ConfigError, match="no unknown token to take its place") as error:
        HuggingFaceTokenizer(path, "h").encode("hello world")
    assert error.value.path == str(path)


def test_identity_follows_the_numbering_alone(tmp_path):
    first = TiktokenTokenizer(tekken_file(tmp_path / "a.json"), "a")
    same = TiktokenTokenizer(tekken_file(tmp_path / "b.json", version="renamed"), "b")
    cut = TiktokenTokenizer(tmp_path / "a.json", "a", vocab_size=1260)
    other = TiktokenTokenizer(tekken_file(tmp_path / "c.json", tokens=(b"th", b"the", b"thex", b"no", b"norm")), "a")
    assert first.identity == same.identity
    assert len({first.identity, cut.identity, other.identity, BytesTokenizer().identity}) == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "words"}, "tokenizer.kind: words. It is one of bytes, bpe"),
        ({"kind": "huggingface"}, "tokenizer.path: null. Kind huggingface needs a file"),
        ({"kind": "bpe"}, "tokenizer.path: null. Kind bpe needs a file"),
        ({"kind": "tiktoken", "path": "nowhere.json"}, "tokenizer.path: nowhere.json. No such file"),
        ({"kind": "tiktoken", "path": "empty.json"}, "It must be a JSON object"),
        ({"kind": "huggingface", "path": "empty.json"}, "Not a tokenizer.json"),
        ({"kind": "tiktoken", "path": "tekken.json", "vocab_size": 1255}, "tokenizer.vocab_size: 1255. tekken.json allows 1256 to 1261"),
        ({"kind": "tiktoken", "path": "tekken.json", "vocab_size": 1262}, "tokenizer.vocab_size: 1262"),
        ({"kind": "huggingface", "path": "no_eod.json"}, "needs an end-of-document token"),
    ],
)
def test_bad_configs_say_what_to_do(config, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").write_text("[]")
    tekken_file(tmp_path / "tekken.json")
    bpe = json.loads(train_bpe(TEXTS, 300).replace(EOD, "<none>"))
    (tmp_path / "no_eod.json").write_text(json.dumps(bpe))
    with pytest.raises(ConfigError) as error:
        from_config(TokenizerConfig(name="x", **config))
    assert message in str(error.value)


def test_absent_default_vocabulary_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install mistral-common"):
        from_config(TokenizerConfig(name="tekken", kind="tiktoken"))


@pytest.mark.parametrize("size", [257, 100_000])
def test_bpe_size_must_suit_the_text(size):
    with pytest.raises(ConfigError, match=f"tokenizer.vocab_size: {size}"):
        train_bpe(TEXTS, size)


@pytest.mark.parametrize("size", [2**22 + 1, 99_999_999_999])
def test_a_vocabulary_beyond_memory_is_refused_before_the_library_aborts(size):
    with pytest.raises(ConfigError, match="tokenizer.vocab_size"):
        train_bpe(["text"], size)


@pytest.mark.parametrize("content", ["", "null", "[", "{}", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "[" * 100_000])
def test_a_damaged_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    for kind in ("huggingface", "tiktoken"):
        with pytest.raises(ConfigError, match="tokenizer.path"):
            from_config(TokenizerConfig(name="x", kind=kind, path=str(path)))


@pytest.mark.parametrize("content", ["", '{"eos_token": "', "[]", "null", "[" * 100_000])
def test_a_damaged_tokenizer_config_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(train_bpe(["some text some text"], 260))
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ConfigError, match="tokenizer_config.json: unreadable: .*. A JSON object names"):
        from_config(TokenizerConfig(name="x", kind="huggingface", path=str(tmp_path / "tokenizer.json")))
