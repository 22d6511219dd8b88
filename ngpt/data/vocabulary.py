"""What tokenizers of several kinds share: where a vocabulary file lies, which of its tokens ends documents, how its library fails."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ngpt.config.errors import ConfigError
from ngpt.config.schema import TokenizerConfig
from ngpt.config.vocabularies import FILES, NAMED_BY_PATH
from ngpt.data.hub import Origin, fetch_tokenizer, is_hub_id

SETTINGS = "tokenizer_config.json"  # beside the vocabulary file, names the end-of-document token
EOD = "<|endoftext|>"
EOD_NAMES = (EOD, "</s>", "<|end_of_text|>", "<eos>", "<|eod|>", "<|end|>", "<｜end▁of▁sentence｜>")
MAX_VOCAB = 1 << 31  # token ids are int32
TEKKEN_FILE = "tekken_240911.json"


def located(config: TokenizerConfig) -> tuple[Path, Origin | None]:
    """The vocabulary file that a config's path names, and where it was fetched from.

    A path is a file, or a folder that holds one with the usual name. Else it is ORG/NAME[@REVISION] of the Hugging Face Hub.

    Raises:
        ConfigError: No path, no such file, or it cannot be fetched.
    """
    name = FILES.get(config.kind, "vocabulary file")
    if config.path is None:
        here = " in the prepared data's folder" if config.kind == "bpe" else ""
        raise ConfigError("tokenizer.path", "null", f"Kind {config.kind} needs a file", f"Set it to a {name}{here}")
    path, origin = Path(config.path), None
    if config.kind in NAMED_BY_PATH and is_hub_id(config.path):
        path, origin = fetch_tokenizer(config.path, [*sorted({*FILES.values()}), SETTINGS])
    if path.is_dir() and config.kind in FILES:
        path = path / name
    if not path.is_file():
        others = [kind for kind, usual in FILES.items() if (path.parent / usual).is_file() and usual != name]
        way_out = f"Choose tokenizer={others[-1]}, whose file is there" if others else "Name the tokenizer's vocabulary file"
        raise ConfigError("tokenizer.path", f"{config.path}: no {name}" if origin else path, "No such file", way_out)
    return path, origin


def default_tekken() -> Path:
    """The vocabulary file that the package mistral-common ships.

    Raises:
        ConfigError: The package is not installed.
    """
    spec = importlib.util.find_spec("mistral_common")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / "data" / TEKKEN_FILE).is_file():
            return path
    raise ConfigError(
        "tokenizer.path",
        "null",
        f"The default, {TEKKEN_FILE}, comes with mistral-common",
        "Run `pip install mistral-common`, or set a path",
    )


def end_of_document(path: Path, vocabulary: Mapping[str, int]) -> tuple[int, list[str]]:
    """The token that ends documents, and what the user should know of that choice.

    It is the eos_token of a tokenizer_config.json beside the vocabulary file, or has one of the usual names.

    Raises:
        ConfigError: There is none, or the settings cannot be read.
    """
    names: Sequence[str] = EOD_NAMES
    declared = None
    beside = path.with_name(SETTINGS)
    if beside.is_file():
        try:
            settings = json.loads(beside.read_text(encoding="utf-8"))
            if not isinstance(settings, dict):
                raise ValueError(f"a JSON {type(settings).__name__}, no object")
        except (OSError, ValueError, RecursionError) as error:
            got = f"unreadable: {error}"
            raise ConfigError(str(beside), got, "A JSON object names the end-of-document token", "Restore or remove it") from error
        declared = settings.get("eos_token")
        declared = declared.get("content") if isinstance(declared, dict) else declared
        names = (declared, *names) if isinstance(declared, str) else names
    for token in names:
        if token in vocabulary:
            notes = []
            if declared is not None and token != declared:
                used = f"{token!r} (id {vocabulary[token]}) ends documents instead"
                notes.append(f"{beside} declares eos_token {declared!r}, which the vocabulary lacks: {used}")
            return vocabulary[token], notes
    got = f"{path} has none" + ("" if declared is None else f", not the {declared!r} of {beside.name} either")
    rule = f"It needs an end-of-document token: eos_token in {beside.name} beside it, or one of {', '.join(EOD_NAMES)}"
    raise ConfigError("tokenizer.path", got, rule, f"Put a {beside.name} with an eos_token beside it")


def unreadable(error: BaseException, path: Path, what: str, way_out: str) -> BaseException:
    """The error that the user sees for one of a tokenizer library. What ends the process passes unchanged."""
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
        return error
    return ConfigError("tokenizer.path", path, f"{what}: {error}", way_out)


def cannot_encode(error: BaseException, path: Path) -> BaseException:
    """The same for a text that a library refuses."""
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
        return error
    rule = "It has no token for a part of this text"
    if "unk" in str(error).lower():
        rule += ", and no unknown token to take its place"
    return ConfigError(str(path), error, rule, "Add an unknown token to its vocabulary, or choose another tokenizer")
