"""Prints what setup.py asks for, one requirement a line: `requirements.py base|EXTRA ...`. The image has its versions from there alone.

`gpu` comes spelt out for an installation without dependencies: Transformer Engine's parts are packages of its version.
"""

import re
import sys
from pathlib import Path

import setuptools

TRANSFORMER_ENGINE_PARTS = {"core_cu13": "transformer-engine-cu13", "pytorch": "transformer-engine-torch"}


def requirements(setup_file: Path, groups: list[str]) -> list[str]:
    """The requirements of `groups`: base (those of every installation) or names of extras."""
    given: dict = {}
    setuptools.setup = given.update  # setup.py calls it once, with everything
    code = compile(setup_file.read_text(encoding="utf-8"), str(setup_file), "exec")
    exec(code, {"__name__": "__main__"})
    wanted = {"base": given["install_requires"], **given["extras_require"]}
    return [spelt for group in groups for requirement in wanted[group] for spelt in _spelt_out(requirement)]


def _spelt_out(requirement: str) -> list[str]:
    match = re.fullmatch(r"(transformer-engine)\[([\w,-]+)\](.*)", requirement)
    if match is None:
        return [requirement]
    name, parts, version = match.groups()
    return [f"{package}{version}" for package in (name, *(TRANSFORMER_ENGINE_PARTS[part] for part in parts.split(",")))]


if __name__ == "__main__":
    print("\n".join(requirements(Path(__file__).with_name("setup.py"), sys.argv[1:])))
