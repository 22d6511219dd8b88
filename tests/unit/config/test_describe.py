"""Every part of a config says what it is, in one line, at one place."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

from ngpt.config import config_dir
from ngpt.config.describe import Key, groups, keys, reference, sections
from ngpt.config.folders import description_of, options
from ngpt.config.schema import Config
from ngpt.config.translate import leaf_types

SOURCE = '''
from dataclasses import dataclass, field

def choice(default, described):
    return field(default=default, metadata={"choices": described})

@dataclass
class Base:
    inherited: int = 1  # from the base, # and all

@dataclass
class Section(Base):
    """A part. Its second sentence."""
    behind: float | None = None  # é behind
    # in front,
    # on two lines.
    front: str = "#"
    # first
    both: bool = True  # second
    # of a choice
    several: str = choice(
        "a",  # not this
        {"a": "the first", "b": "the second"},
    )
    none: list[int] = field(default_factory=list)

@dataclass
class Root:
    part: Section = field(default_factory=Section)
'''


def test_every_section_key_and_value_has_one_line():
    for name, line in [*sections().items(), *((key.name, key.description) for key in keys())]:
        assert line and "\n" not in line and "Config(" not in line, name
    assert groups().keys() == {option.group for option in options()}


@pytest.mark.parametrize("path", sorted(config_dir().rglob("*.yaml")), ids=lambda path: "/".join(path.parts[-2:]))
def test_every_file_says_in_its_first_comment_what_it_is(path: Path):
    """A sentence: `ngpt list` shows no more than this line."""
    assert description_of(path).endswith(".")


def test_all_keys_are_there():
    listed = [key.name for key in keys()]
    assert len(listed) == len(set(listed))
    assert {name for name in listed if "[]" not in name and "NAME" not in name} == {name for name, _ in leaf_types()}


def test_comments_are_read_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "described.py"
    file.write_text(SOURCE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("described", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "described", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr("ngpt.config.describe.Config", module.Root)
    choices = {"a": "the first", "b": "the second"}
    assert keys() == [
        Key("part.inherited", "whole number", "1", "from the base, # and all", {}),
        Key("part.behind", "number | null", "null", "é behind", {}),
        Key("part.front", "text", "#", "in front, on two lines", {}),
        Key("part.both", "true | false", "true", "first; second", {}),
        Key("part.several", "a | b", "a", "of a choice", choices),
        Key("part.none", "[whole number, ...]", "[]", "", {}),
    ]
    assert sections()["part"] == "A part."


def test_files_of_a_user_are_options_with_or_without_a_comment(tmp_path: Path):
    for group, text in {"model": "name: mine\n# late\n", "experiment": "# @package _global_\n# Mine.\n# More.\n"}.items():
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text(text)
    found = {option.word: option.description for option in options([tmp_path])}
    assert (found["model=mine"], found["experiment=mine"]) == ("", "Mine.")
    assert "experiment=quickstart" in found


def test_the_written_reference_is_up_to_date():
    """`python -m ngpt.config.describe > conf/README.md` writes it."""
    assert (config_dir() / "README.md").read_text(encoding="utf-8") == reference()
    assert all(f"`{entry.name}." in reference() for entry in dataclasses.fields(Config) if entry.name != "megatron")
