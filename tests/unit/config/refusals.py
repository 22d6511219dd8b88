"""What a refusal must say, for the tables of bad inputs."""

from typing import NamedTuple

import pytest

from ngpt.config import ConfigError, compose


class Bad(NamedTuple):
    overrides: list[str]
    path: str
    got: str
    rule: str
    fix: list[str]  # overrides that follow the way out: with them the config composes
    way_out: str = ""


def check(bad: Bad) -> None:
    """The error has path, value, rule and a way out; with `fix` applied the same config composes."""
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=ngpt_tiny", *bad.overrides])
    found = {error.path: error for error in getattr(caught.value, "errors", [caught.value])}
    assert bad.path in found
    error = found[bad.path]
    line = str(error)
    assert "\n" not in line and line.startswith(f"{bad.path}: ")
    assert bad.got in str(error.got)
    assert bad.rule.lower() in error.rule.lower()
    assert error.way_out and bad.way_out in error.way_out
    if bad.fix:
        corrected = {override.split("=")[0]: override for override in (*bad.overrides, *bad.fix)}
        compose(["experiment=ngpt_tiny", *corrected.values()])
