"""A run's tokenizer as `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` opens without code of ours.

| what | in the folder |
|---|---|
| ids of a text | those of training, with the end-of-document token before them: every document of training follows one |
| `add_special_tokens=False` | the ids alone |
| text that spells a special token | stays text, as in training; `split_special_tokens=False` in a call makes tokens of it |
| bos, eos, pad | the end-of-document token; batches are padded on the left, so that all of them continue at the end |
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from ngpt.config.errors import ConfigError
from ngpt.data.pieces import SentencePieceTokenizer
from ngpt.data.tokenizers import BytesTokenizer, HuggingFaceTokenizer, TiktokenTokenizer, Tokenizer
from ngpt.data.vocabulary import EOD, SETTINGS
from ngpt.files import write_synced
from ngpt.hf.byte_pairs import last_merge
from ngpt.hf.pieces import pieces_backend
from ngpt.hf.probes import texts

FILE = "tokenizer.json"
WITHOUT = "Export the weights alone with --no-tokenizer"


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write a tokenizer for `transformers`, open it again and compare it with ours. If they differ, its files are removed.

    Args:
        tokenizer: The run's own.
        folder: An existing folder.
        max_length: Tokens that the model was trained on at a time.

    Raises:
        ConfigError: It cannot be expressed, or what was written encodes or decodes some text differently.
    """
    backend = _backend_of(tokenizer)
    eod = backend.id_to_token(tokenizer.eod_id)
    _start_documents(backend, eod, tokenizer.eod_id)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that 4.x and 5.x know
        "model_max_length": max_length,
        "bos_token": eod,
        "eos_token": eod,
        "pad_token": eod,
        "add_bos_token": True,
        "add_eos_token": False,
        "split_special_tokens": True,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    try:
        write_synced(folder / FILE, backend.to_str(pretty=False))
        write_synced(folder / SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        check_written(tokenizer, folder)
    except BaseException:
        for name in (FILE, SETTINGS):
            with suppress(OSError):
                (folder / name).unlink()
        raise


def check_written(tokenizer: Tokenizer, folder: Path) -> None:
    """Compare ids and decoded texts of a written tokenizer with ours, on awkward texts and on those that the vocabulary spells.

    Raises:
        ConfigError: They differ; the message names the first text.
    """
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(folder / FILE))
    backend.encode_special_tokens = True  # as split_special_tokens says
    if (start := backend.encode("").ids) != [tokenizer.eod_id, *(_ids(tokenizer, "") or ())]:
        raise _differs(tokenizer, folder, "", f"ids {start} as a document", f"documents start with {tokenizer.eod_id}")
    for text in texts(tokenizer, backend):
        wanted = _ids(tokenizer, text)
        got = _theirs(backend, text)
        if got != wanted:
            raise _differs(tokenizer, folder, text, f"ids {_shown(got, wanted)}", f"training had {_shown(wanted, got)}")
        if wanted is None:
            continue
        back, own = backend.decode(wanted, skip_special_tokens=True), tokenizer.decode(wanted)
        if back != own:
            raise _differs(tokenizer, folder, text, f"decoded {back[:60]!r}", f"ours decodes {own[:60]!r}")


def _backend_of(tokenizer: Tokenizer) -> Any:
    """The same tokenizer for the tokenizers library, without a start of documents."""
    from tokenizers import Tokenizer as Backend

    if isinstance(tokenizer, BytesTokenizer):
        return _bytes_backend(tokenizer)
    if isinstance(tokenizer, TiktokenTokenizer):
        return _ranks_backend(tokenizer)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return pieces_backend(tokenizer.path, tokenizer.eod_id)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        backend = Backend.from_file(str(tokenizer.path))
        backend.no_truncation()
        backend.no_padding()
        return backend
    raise ConfigError("tokenizer.kind", tokenizer.kind, "There is no conversion of it for transformers", WITHOUT)


def _bytes_backend(tokenizer: BytesTokenizer) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in enumerate(_characters_of_bytes())} | {EOD: tokenizer.eod_id}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _ranks_backend(tokenizer: TiktokenTokenizer) -> Any:
    """A BPE with one merge for each token, the one that forms it, in the order of ranks."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    characters = _characters_of_bytes()
    written = {token: "".join(characters[byte] for byte in token) for token in tokenizer.ranks}
    names = _special_names(tokenizer.specials)
    vocabulary = {name: i for i, name in enumerate(names)} | {written[token]: rank + len(names) for token, rank in tokenizer.ranks.items()}
    if len(vocabulary) != tokenizer.vocab_size:
        raise ConfigError(str(tokenizer.path), "a token spelled like a special one", "Names of tokens differ in a tokenizer.json", WITHOUT)
    merges = [last_merge(token, tokenizer.ranks) for token in tokenizer.ranks if len(token) > 1]
    pairs = [(written[left], written[right]) for left, right in (merge for merge in merges if merge)]
    try:
        pattern = Regex(tokenizer.pattern)
    except Exception as error:  # the library knows no other
        raise ConfigError(str(tokenizer.path), error, "Its pattern must be one for the tokenizers library, too", WITHOUT) from error
    # ignore_merges: a match of the pattern that is a token stays whole, whatever merges would make of it.
    backend = Backend(models.BPE(vocabulary, pairs, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # What the pattern does not match has no tokens in tiktoken either.
            pre_tokenizers.Split(pattern, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(names)
    return backend


def _special_names(count: int) -> list[str]:
    """Tekken's names of the first special tokens, and placeholders."""
    return ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, count))][:count]


def _characters_of_bytes() -> list[str]:
    """The character for each byte in a byte-level vocabulary: the byte's own where that is visible, else one from U+0100 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


def _start_documents(backend: Any, eod: str, eod_id: int) -> None:
    """Makes the end-of-document token special, and has it start every text. A file's own post-processor is dropped."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    if not any(token.special and i == eod_id for i, token in backend.get_added_tokens_decoder().items()):
        backend.add_special_tokens([AddedToken(eod, special=True, normalized=False)])
    token = {"id": "eod", "ids": [eod_id], "tokens": [eod]}  # a name of its own: a template is read by its spaces, colons and dollars
    backend.post_processor = TemplateProcessing(single="eod $A", pair="eod $A eod:1 $B:1", special_tokens=[token])


def _ids(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """Ids of a text; None where it has none, in which case training refused it."""
    try:
        return tokenizer.encode(text).tolist()
    except ConfigError:
        return None


def _theirs(backend: Any, text: str) -> list[int] | None:
    try:
        return backend.encode(text, add_special_tokens=False).ids
    except BaseException as error:  # the library raises bare Exception, and its panics do not derive from Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        return None


def _shown(ids: list[int] | None, others: list[int] | None) -> str:
    """Some ids around the first difference."""
    if ids is None:
        return "none"
    pairs = zip(ids, others or (), strict=False)
    same = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(ids), len(others or ())))
    return f"{'... ' if same > 2 else ''}{ids[max(0, same - 2) : same + 6]}"


def _differs(tokenizer: Tokenizer, folder: Path, text: str, got: str, wanted: str) -> ConfigError:
    shown = repr(text if len(text) <= 80 else text[:80] + "…")
    rule = f"Tokenizer {tokenizer.name} ({tokenizer.kind}) must number and decode text as in training: {wanted}"
    return ConfigError(str(folder / FILE), f"{shown} gives {got}", rule, WITHOUT)
