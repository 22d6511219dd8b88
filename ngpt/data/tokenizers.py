"""Tokenizers: bytes, a BPE trained on the spot, Hugging Face's tokenizer.json, SentencePiece, tiktoken vocabularies (Tekken)."""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config, TokenizerConfig
from ngpt.config.vocabularies import FILES
from ngpt.data.hub import Origin
from ngpt.data.manifest import Manifest, TokenizerInfo, split_of
from ngpt.data.pieces import SentencePieceTokenizer
from ngpt.data.vocabulary import EOD, MAX_VOCAB, cannot_encode, default_tekken, end_of_document, located, unreadable

KINDS = ("bytes", "bpe", "huggingface", "sentencepiece", "tiktoken")
BPE_DEFAULT_VOCAB = 4096
BPE_MAX_VOCAB = 1 << 22  # the library allocates memory for all entries at once, and aborts where there is not enough
TIKTOKEN_DEFAULT_VOCAB = 131_072
TIKTOKEN_SPECIAL_TOKENS = 1000  # ids before the first rank, unless the file says otherwise
TIKTOKEN_EOD = 2  # Tekken's and Megatron's numbering: <unk>, <s>, </s>


class Tokenizer(Protocol):
    """Text to token ids and back. `encode` adds no special token and never makes one out of text that spells it.

    `encode` raises a ConfigError for a text that has no tokens.

    Attributes:
        kind: One of `KINDS`.
        name: The config's name.
        vocab_size: Ids are below it.
        eod_id: The end-of-document token, which preparation puts after each document.
        identity: SHA-256 of all that defines the numbering: equal identities give equal tokens.
        path: Vocabulary file, if there is one.
        notes: What its user should know.
    """

    @property
    def kind(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod_id(self) -> int: ...

    @property
    def identity(self) -> str: ...

    @property
    def path(self) -> Path | None: ...

    @property
    def notes(self) -> Sequence[str]: ...

    def encode(self, text: str) -> np.ndarray: ...

    def dropped(self, text: str) -> Counter[str]:
        """How often each character occurs in a text that has no token and is lost: it leaves no trace in `encode(text)`.

        Of a SentencePiece model also those whose only trace is the unknown token.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str: ...


class BytesTokenizer:
    """UTF-8 bytes, and 256 for the end of a document."""

    kind = "bytes"
    vocab_size = 257
    eod_id = 256
    path = None
    notes = ()

    def __init__(self, name: str = "bytes") -> None:
        self.name = name
        self.identity = hashlib.sha256(b"utf-8 bytes, end of document 256").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def dropped(self, text: str) -> Counter[str]:
        return Counter()

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if i < self.eod_id).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer.json. The end-of-document token is named by tokenizer_config.json beside it, or is a special token of a usual name."""

    def __init__(self, path: Path, name: str, kind: str = "huggingface", eod_id: int | None = None) -> None:
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import BPE

        self.kind, self.name, self.path = kind, name, path
        content = path.read_bytes()
        try:
            self._backend = Backend.from_str(content.decode("utf-8"))
        except BaseException as error:  # the library raises bare Exception, and its panics do not derive from Exception
            raise unreadable(error, path, "Not a tokenizer.json", "Name a file that the tokenizers library wrote") from error
        # Text that spells a special token stays text: a document cannot end itself.
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=MAX_VOCAB) + 1
        if self.vocab_size > MAX_VOCAB:
            got = f"{path}: largest id {self.vocab_size - 1}" if vocabulary else f"{path}: no entries"
            raise ConfigError("tokenizer.path", got, f"Its tokens have ids below {MAX_VOCAB}", "Name an undamaged file")
        self.eod_id, self.notes = end_of_document(path, vocabulary) if eod_id is None else (eod_id, [])
        self.identity = hashlib.sha256(content + f"\neod {self.eod_id}".encode()).hexdigest()
        model = self._backend.model  # the other models have an unknown token, or fail
        self._may_drop = isinstance(model, BPE) and model.unk_token is None
        self._lost_alone: dict[str, str] = {}  # what the normaliser makes of each character seen, where no token is left of it

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        except BaseException as error:
            raise cannot_encode(error, self.path) from error

    def dropped(self, text: str) -> Counter[str]:
        if not self._may_drop:
            return Counter()
        characters = set(text)
        for character in characters - self._lost_alone.keys():
            wanted = self._normalized(character)
            self._lost_alone[character] = wanted if wanted and not self._decoded(character) else ""
        if not any(self._lost_alone[character] for character in characters):
            return Counter()
        # Inside a text a normaliser may change it, and another token may contain it.
        there, left, counts = set(self._normalized(text)), set(self._decoded(text)), Counter(text)
        wanted_of = {character: set(self._lost_alone[character]) for character in characters}
        return Counter({c: counts[c] for c, wanted in wanted_of.items() if wanted and wanted <= there and not wanted & left})

    def _normalized(self, text: str) -> str:
        return _bare(self._backend.normalizer.normalize_str(text) if self._backend.normalizer else text)

    def _decoded(self, text: str) -> str:
        return _bare(self.decode(self.encode(text).tolist()))

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(i) for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=True)


class TiktokenTokenizer:
    """A tiktoken vocabulary in JSON: Tekken's object with `config` and `vocab`.

    Ids are the special tokens, then the ranks, cut at `vocab_size` in all.

    Attributes:
        specials: Ids before the first rank.
        pattern: Regular expression whose matches are encoded one by one.
        ranks: Rank of each token. Of the neighbours that form a token, those of the lowest rank are joined first.
    """

    kind = "tiktoken"
    notes = ()

    def __init__(self, path: Path, name: str, vocab_size: int | None = None) -> None:
        import tiktoken

        self.name, self.path = name, path
        try:
            content = json.loads(path.read_bytes())
            entries, settings = content["vocab"], content["config"]
            pattern = settings["pattern"]
            self.specials = int(settings.get("default_num_special_tokens", TIKTOKEN_SPECIAL_TOKENS))
            largest = self.specials + len(entries)
            self.vocab_size = vocab_size or min(int(settings.get("default_vocab_size", TIKTOKEN_DEFAULT_VOCAB)), largest)
            kept = entries[: max(0, self.vocab_size - self.specials)]
            ranks = {base64.b64decode(entry["token_bytes"]): rank for rank, entry in enumerate(kept)}
            ordered = all(entry["rank"] == rank for rank, entry in enumerate(kept))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            rule = 'It must be a JSON object {"config": {"pattern": ...}, "vocab": [{"rank": ..., "token_bytes": ...}, ...]}'
            raise ConfigError("tokenizer.path", f"{path}: {error!r}", rule, "Name a Tekken file") from error
        if not ordered or len(ranks) != len(kept):
            raise ConfigError("tokenizer.path", path, "Ranks must count from 0 and tokens must differ", "Name an undamaged file")
        smallest = self.specials + 256
        if not smallest <= self.vocab_size <= largest:
            rule = f"{path.name} allows {smallest} to {largest}, {self.specials} special tokens included"
            raise ConfigError("tokenizer.vocab_size", self.vocab_size, rule, "Set a size in this range, or null for the default")
        self.eod_id, self.pattern, self.ranks = TIKTOKEN_EOD, pattern, ranks
        try:
            self._backend = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        except BaseException as error:
            raise unreadable(error, path, "Its pattern cannot be used", "Name an undamaged file") from error
        digest = hashlib.sha256(f"{self.vocab_size} {self.specials} {self.eod_id} {pattern}\n".encode())
        for token in ranks:
            digest.update(len(token).to_bytes(4, "little") + token)
        self.identity = digest.hexdigest()

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.array(self._backend.encode_ordinary(text), dtype=np.int32) + np.int32(self.specials)
        except BaseException as error:
            raise cannot_encode(error, self.path) from error

    def dropped(self, text: str) -> Counter[str]:
        return Counter()

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(i) - self.specials for i in ids if self.specials <= i < self.vocab_size])


def from_config(config: TokenizerConfig) -> Tokenizer:
    """Build the tokenizer that a config names.

    Raises:
        ConfigError: Unknown kind, missing or damaged file, no end-of-document token.
    """
    if config.kind not in KINDS:
        raise ConfigError("tokenizer.kind", config.kind, f"It is one of {', '.join(KINDS)}", "Choose one of these")
    if config.kind == "bytes":
        return BytesTokenizer(config.name)
    if config.kind == "tiktoken" and config.path is None:
        config = replace(config, path=str(default_tekken()))
    return _from_file(located(config)[0], config)


def _from_file(path: Path, config: TokenizerConfig, eod_id: int | None = None) -> Tokenizer:
    """The tokenizer of a vocabulary file. `eod_id`: the token that ends documents, where it is known already."""
    if config.kind == "tiktoken":
        return TiktokenTokenizer(path, config.name, config.vocab_size)
    if config.kind == "sentencepiece":
        return SentencePieceTokenizer(path, config.name, eod_id)
    return HuggingFaceTokenizer(path, config.name, config.kind, eod_id)


def from_manifest(manifest: Manifest) -> Tokenizer:
    """Build the tokenizer that made some prepared data, from the data's own folder.

    Raises:
        ConfigError: The vocabulary file is missing or is not the one that made the data.
    """
    info = manifest.tokenizer
    path = manifest.folder / info.path if manifest.folder is not None and info.path else None
    config = TokenizerConfig(name=info.name, kind=info.kind, path=str(path) if path else None)
    config.vocab_size = info.vocab_size if info.kind == "tiktoken" else None
    tokenizer = from_config(config) if path is None or info.kind not in FILES else _from_file(located(config)[0], config, info.eod_id)
    if tokenizer.identity != info.identity:
        rule = "The manifest names another tokenizer: the vocabulary file changed since the preparation"
        raise ConfigError(str(path or manifest.folder), tokenizer.identity[:12], rule, "Restore the file, or prepare the data again")
    return tokenizer


def run_tokenizer(cfg: Config) -> Tokenizer:
    """The tokenizer of a run: the one that made its data.

    Raises:
        ConfigError: the data or its vocabulary file are gone.
    """
    return from_config(cfg.tokenizer) if cfg.data.mock else from_manifest(split_of(cfg.data.train[0].path)[0])


def describe(tokenizer: Tokenizer, path: str | None, origin: Origin | None = None) -> TokenizerInfo:
    """The manifest's entry for a tokenizer whose vocabulary file lies at `path` in the data's folder, fetched from `origin`."""
    hub, commit = (origin.hub, origin.commit) if origin else ("", "")
    return TokenizerInfo(tokenizer.kind, tokenizer.name, tokenizer.vocab_size, tokenizer.eod_id, tokenizer.identity, path, hub, commit)


def check_bpe_size(vocab_size: int) -> None:
    """Raise a ConfigError for a vocabulary that no text can reach, or that would make the library abort."""
    if vocab_size <= 257:
        raise ConfigError("tokenizer.vocab_size", vocab_size, "257 entries are the bytes and the end of document", "Set more, or use bytes")
    if vocab_size > BPE_MAX_VOCAB:
        raise ConfigError("tokenizer.vocab_size", vocab_size, f"At most {BPE_MAX_VOCAB} entries are trained", "Set fewer")


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Train a byte-level BPE and return its tokenizer.json; the same texts give the same tokenizer.

    Args:
        texts: Documents.
        vocab_size: Entries in all: the end-of-document token (id 0), 256 bytes, merges.

    Raises:
        ConfigError: The size leaves no room for a merge, or the texts are too few for it.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    check_bpe_size(vocab_size)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet: Sequence[str] = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOD], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() < vocab_size:
        got = f"{vocab_size}, but the text gives {backend.get_vocab_size()} entries"
        raise ConfigError(
            "tokenizer.vocab_size", got, "A BPE needs enough text to find its merges", "Set a smaller size, or give more text"
        )
    return backend.to_str(pretty=False)


def _bare(text: str) -> str:
    """Text without white space, the mark that stands for it, and the one that stands for incomplete bytes."""
    return "".join(text.replace("\u2581", " ").replace("\ufffd", " ").split())
