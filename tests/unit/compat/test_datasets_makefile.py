"""A run needs no `make`: the helper in the wheel is checked instead."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.compat import datasets_makefile
from ngpt.config.errors import ConfigError


@pytest.fixture
def utils(monkeypatch):
    from megatron.core.datasets import utils

    monkeypatch.setattr(utils, "compile_helpers", utils.compile_helpers)  # undone after the test
    return utils


def test_upstream_still_runs_make_and_looks_the_function_up_when_called(upstream_source):
    assert '"make", "-C"' in upstream_source("core/datasets/utils.py", "compile_helpers")
    caller = upstream_source("training/initialize.py", "_compile_dependencies")
    assert "from megatron.core.datasets.utils import compile_helpers" in caller
    assert "compile_helpers()" in caller


def test_the_wheel_still_lacks_the_makefile(utils):
    assert not (Path(utils.__file__).parent / "Makefile").exists()


def test_patched_initialisation_starts_no_process(utils, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("started a process"))
    assert datasets_makefile.install()
    utils.compile_helpers()


def test_a_missing_helper_is_told_at_installation(utils, monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
    with pytest.raises(ConfigError, match="helpers_cpp does not import"):
        datasets_makefile.install()
