"""A text larger than enwik8 from what package registries have: documents of Debian packages and of JSON lines, shuffled, as JSON lines.

    python tests/bench/mixed_text.py data/raw/mixed.jsonl linux-doc-6.1 dict-gcide anarchism python3.11-doc data/raw/enwik8/enwik8.jsonl
    ngpt data prepare data/raw/mixed.jsonl --tokenizer bpe --vocab-size 8192        # data/mixed_bpe

Needs apt-get and dpkg, which Debian and Ubuntu have. Of a package it takes the files in reStructuredText, Markdown and plain text, and
dictionaries of dictd, whose entries make documents of about 8,000 characters. Documents are ordered by their SHA-256, so that every split
has of each source, and the same documents give the same file. The texts have licences of their own: GFDL, GPL, PSF.
"""

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

KINDS = (".rst", ".md", ".txt", ".rst.gz", ".md.gz", ".txt.gz")
DICTIONARY, ENTRIES = ".dict.dz", 8_000  # characters of a document
SHORTEST = 500  # characters; below it files are stubs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    parser.add_argument("sources", nargs="+", metavar="PACKAGE|FILE.jsonl")
    options = parser.parse_args()
    documents = {}
    for source in options.sources:
        before, found = len(documents), of_lines(Path(source)) if source.endswith(".jsonl") else of_package(source)
        documents |= {hashlib.sha256(text.encode()).digest(): text for text in found}
        print(f"{source}: {len(documents) - before} documents", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": documents[key]}, ensure_ascii=False) + "\n" for key in sorted(documents))
    print(f"{options.out}: {len(documents)} documents, {options.out.stat().st_size:,} bytes")


def of_lines(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as stream:
        yield from (json.loads(line)["text"] for line in stream)


def of_package(package: str) -> Iterator[str]:
    """Downloads and unpacks it in a folder that goes again; nothing is installed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if subprocess.run(["apt-get", "download", "-qq", package], cwd=folder).returncode:
            sys.exit(f"{package}: apt-get cannot download it; `apt-cache policy {package}` shows whether your Debian has it")
        subprocess.run(["dpkg", "-x", next(folder.glob("*.deb")), folder / "files"], check=True)
        for file in sorted(path for path in (folder / "files").rglob("*") if path.is_file()):
            if file.name.endswith(DICTIONARY):
                yield from in_entries(read(file))
            elif file.name.endswith(KINDS) and len(text := read(file)) >= SHORTEST:
                yield text


def in_entries(text: str) -> Iterator[str]:
    """Paragraphs in their order, joined to documents."""
    some, size = [], 0
    for paragraph in text.split("\n\n"):
        some.append(paragraph)
        size += len(paragraph)
        if size >= ENTRIES:
            yield "\n\n".join(some)
            some, size = [], 0
    if size:
        yield "\n\n".join(some)


def read(file: Path) -> str:
    """Of UTF-8, plain or compressed (dictzip is gzip); what is not UTF-8 becomes a replacement character."""
    data = file.read_bytes()
    return (gzip.decompress(data) if file.suffix in (".gz", ".dz") else data).decode(errors="replace")


if __name__ == "__main__":
    main()
