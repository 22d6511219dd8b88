"""Tokenizers of the Hugging Face Hub: ORG/NAME, or ORG/NAME@REVISION for a branch, a tag or a commit.

The library keeps what it fetched and reads HF_HOME, HF_TOKEN and HF_HUB_OFFLINE itself. Prepared data has its own copy of the
vocabulary, and its manifest says where that came from: training on it asks the Hub for nothing.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from ngpt.config.errors import ConfigError

_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")
_FILE_ENDINGS = (".json", ".model")  # data/tokenizer.json is a mistyped file, not a repository


@dataclass(frozen=True)
class Origin:
    """Where a vocabulary came from: `hub` is what the user named, `commit` what it pointed to."""

    hub: str
    commit: str


def is_hub_id(path: str) -> bool:
    """Whether a tokenizer's path names a repository of the Hub: it has the form of such a name, and nothing local has this name."""
    return _ID.fullmatch(path) is not None and not path.endswith(_FILE_ENDINGS) and not Path(path).exists()


def is_same(path: str, hub: str, commit: str) -> bool:
    """Whether the Hub's `path` is what a manifest calls `hub` and `commit`: the same words, or that very commit."""
    return bool(hub) and path.removesuffix("@main") in (hub.removesuffix("@main"), f"{hub.partition('@')[0]}@{commit}")


def fetch_tokenizer(path: str, names: list[str]) -> tuple[Path, Origin]:
    """A local folder with those files of `names` that the repository has, all of one commit.

    Raises:
        ConfigError: It cannot be fetched and was not fetched before.
    """
    from huggingface_hub import snapshot_download  # slow to import

    match = _ID.fullmatch(path)
    assert match, path
    repository, revision = match.groups()
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=names))
    except Exception as error:  # the library's, the network's, the disk's
        got = f"neither a local file nor could it be fetched from the Hugging Face Hub: {_first_line(error)}"
        rule = "A path is a file, a folder with a tokenizer, or ORG/NAME[@REVISION] of the Hub"
        way_out = "Correct it, check network and HF_TOKEN, or copy the tokenizer here and name its file"
        raise ConfigError("tokenizer.path", f"{path}: {got}", rule, way_out) from error
    return folder, Origin(path, folder.name)  # a snapshot's folder has the name of its commit


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
