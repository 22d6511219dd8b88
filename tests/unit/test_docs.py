"""The pages: links that lead somewhere, a README that is read in minutes, and commands that the command line takes."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import cli
from ngpt.config import compose
from ngpt.config.sweep import points, sweep_words

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
FOLDERS = (".github", "conf", "docker", "launch", "megatron_ext", "ngpt", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
WRITTEN_BY_A_PROGRAM = ROOT / "conf/README.md"
OF_CONFIGS = ("config", "estimate", "launch", "train")  # commands whose words are a config

_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """(target, anchor) of each link to a file; the anchor is empty where the link names none."""
    for address in _LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
        if not re.match(r"[a-z]+:", address):
            path, _, anchor = address.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them: small letters, no punctuation, spaces as hyphens."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> Iterator[list[str]]:
    """The words behind each `ngpt` of the shell blocks that stand there whole: without ... for what the reader fills in."""
    for language, block in _FENCE.findall(page.read_text(encoding="utf-8")):
        if language != "sh":
            continue
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words[:1] == ["ngpt"] and not any(word.endswith("...") for word in words):
                    yield words[1:]


def of(page: Path) -> str:
    return str(page.relative_to(ROOT))


LINKED = [README, *sorted({target for target, _ in links(README) if target.suffix == ".md"})]


@pytest.mark.parametrize("page", PAGES, ids=of)
def test_links_lead_to_files_and_headings(page):
    for target, anchor in links(page):
        assert target.exists(), f"{of(page)} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{of(page)}: no heading of {of(target)} is #{anchor}"


def test_readme_leads_to_every_page_that_stands_for_itself():
    lead = {target for target, _ in links(README)}
    apart = {page for page in PAGES if "kernels" in page.parts or "results" in page.parts}  # of one kernel, of one measurement
    assert set(PAGES) - apart - lead == {README}
    assert {page for page in apart if "kernels" in page.parts} <= {target for target, _ in links(ROOT / "megatron_ext/EXTENDING.md")}


def test_readme_is_read_in_minutes():
    assert len(README.read_text(encoding="utf-8").split()) <= 1200


@pytest.mark.parametrize("page", [page for page in LINKED if page != WRITTEN_BY_A_PROGRAM], ids=of)
def test_no_cell_is_a_paragraph(page):
    for line in prose(page).splitlines():
        if line.startswith("|"):
            for cell in re.split(r"(?<!\\)\|", line):
                assert len(cell.split()) <= 40, f"{of(page)}: {cell.strip()}"


def test_lines_of_the_readme_are_short():
    assert [line for line in prose(README).splitlines() if len(line) > 200] == []


@pytest.mark.parametrize("page", LINKED, ids=of)
def test_the_command_line_takes_every_command(page):
    reader = cli.parser()
    for words in commands(page):
        reader.read(words)  # leaves where it cannot


def test_named_commands_exist():
    known = {command.name for command in cli.COMMANDS}
    for page in LINKED:
        for code in re.findall(r"`([^`\n]+)`", prose(page)):
            for name in re.findall(r"^ngpt ([a-z]\w*)\b", code):
                assert name in known, f"{of(page)}: `{code}`"


def test_configs_of_the_readme_compose():
    reader, composed = cli.parser(), 0
    for words in commands(README):
        if words[0] in OF_CONFIGS:
            options = reader.read(words)
            fixed, axes = sweep_words(options.overrides) if getattr(options, "multirun", False) else (options.overrides, [])
            compose([*fixed, *points(axes)[0].words])
            composed += 1
    assert composed >= 8
