"""Imports go one way, launch -> megatron_ext -> ngpt, and the environment is touched in one file. Read from the source, nothing is run."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = {"launch", "ngpt.launch"}  # from a checkout, installed
FORBIDDEN = {
    "ngpt": {"megatron", "transformer_engine", "mamba_ssm", "causal_conv1d", "megatron_ext"} | LAUNCH,
    "megatron_ext": LAUNCH,
    "launch": LAUNCH,  # its own modules go by relative names: one process must not have two copies of one
}
TORCH_FREE = ("ngpt/config", "ngpt/data", "ngpt/analysis", "ngpt/estimate", "ngpt/trackers", "launch")
ENVIRONMENT_FILE = "launch/environment.py"
ENVIRONMENT_NAMES = {"environ", "environb", "getenv", "putenv", "unsetenv"}
SOURCES = sorted(path for package in FORBIDDEN for path in (ROOT / package).rglob("*.py"))


def imported_modules(tree: ast.AST, depth: int = 0) -> Iterator[str]:
    """What is imported by absolute names. Relative ones may go up to `depth` folders, counted from the source's own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if depth and node.level:
                assert node.level <= depth, "a relative import that leaves its package"
                continue
            # Exported beside weights, a model's code finds its configuration in its own folder, whatever package it becomes part of.
            assert node.level == 0 or node.module == "configuration_ngpt", "relative imports hide their direction"
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def environment_uses(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT_NAMES and ast.unparse(node.value) == "os":
            yield f"line {node.lineno}: os.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (f"line {node.lineno}: {alias.name}" for alias in node.names if alias.name in ENVIRONMENT_NAMES)


def imported_by(path: Path) -> Iterator[str]:
    package, *folders, _ = path.relative_to(ROOT).parts
    return imported_modules(ast.parse(path.read_text(encoding="utf-8")), depth=1 + len(folders) if package == "launch" else 0)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_is_source_to_check():
    assert {relative(path).split("/")[0] for path in SOURCES} == set(FORBIDDEN)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_go_one_way(path):
    names = [name.split(".") for name in imported_by(path)]
    tops = {part for name in names for part in (name[0], ".".join(name[:2]))}
    assert not tops & FORBIDDEN[relative(path).split("/")[0]]


def test_no_module_of_launch_is_started_by_the_name_that_only_a_checkout_has():
    for path in SOURCES:
        constants = [node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Constant)]
        assert not [text for text in constants if isinstance(text, str) and re.fullmatch(r"launch\.[a-z_.]*", text)], relative(path)


@pytest.mark.parametrize("path", [path for path in SOURCES if relative(path) != ENVIRONMENT_FILE], ids=relative)
def test_environment_is_touched_in_one_file(path):
    assert not list(environment_uses(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("path", [path for path in SOURCES if relative(path).startswith(TORCH_FREE)], ids=relative)
def test_commands_do_not_wait_for_torch(path):
    """No import of torch or Megatron when a module of the command line loads; functions may import it."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    names = [name for node in body if isinstance(node, ast.Import | ast.ImportFrom) for name in imported_modules(node, depth=9)]
    assert not {name.split(".")[0] for name in names} & {"torch", "megatron", "megatron_ext"}


def test_the_checks_see_a_violation():
    tree = ast.parse("import os\nfrom os import getenv\nimport megatron.core as m\nx = os.environ['A']\ndef f():\n    import torch.nn\n")
    assert set(imported_modules(tree)) == {"os", "os.getenv", "megatron.core", "torch.nn"}
    assert set(imported_modules(ast.parse("from .. import cli\nfrom ngpt import launch"), depth=2)) == {"ngpt", "ngpt.launch"}
    with pytest.raises(AssertionError, match="leaves its package"):
        list(imported_modules(ast.parse("from ...other import cli"), depth=2))
    assert sorted(environment_uses(tree)) == ["line 2: getenv", "line 4: os.environ"]
