"""The patches are refused for another Megatron, and each says what it is."""

import importlib
import importlib.metadata
from pathlib import Path

import pytest

from megatron_ext import compat
from ngpt.config.errors import ConfigError

PATCHES = list(compat._PATCHES)


def test_every_patch_of_the_folder_is_applied():
    files = Path(compat.__file__).parent.glob("*.py")
    assert set(PATCHES) == {file.stem for file in files if "\ndef install(" in file.read_text() and file.stem != "__init__"}


def test_the_installed_megatron_is_the_one_the_patches_are_for():
    compat.check_version(importlib.metadata.version("megatron-core"))


def test_a_build_of_the_same_version_is_accepted():
    compat.check_version("0.19.2+4f3c")


@pytest.mark.parametrize("version", ["0.19.1", "0.19.20", "0.20.0", "0.19.2rc1"])
def test_another_version_is_refused_with_the_patches_to_review(version):
    with pytest.raises(ConfigError) as refusal:
        compat.check_version(version)
    assert version in str(refusal.value)
    assert all(name in str(refusal.value) for name in PATCHES)


def test_install_checks_the_version_before_it_patches(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.0")
    monkeypatch.setattr(compat, "_PATCHES", {"patch": lambda: pytest.fail("patched an unknown version")})
    with pytest.raises(ConfigError):
        compat.install(cpu=False)


def test_install_names_the_patches_in_force_and_leaves_the_cpu_ones_to_cpu_runs(monkeypatch):
    monkeypatch.setattr(compat, "_ON_CPU", {"for_cpu"})
    monkeypatch.setattr(compat, "_PATCHES", {"for_cpu": lambda: True, "needed": lambda: True, "not_needed": lambda: False})
    assert compat.install(cpu=True) == ["for_cpu", "needed"]
    assert compat.install(cpu=False) == ["needed"]


@pytest.mark.parametrize("name", PATCHES)
def test_every_patch_says_what_upstream_does_why_and_when_it_goes(name):
    text = importlib.import_module(f"megatron_ext.compat.{name}").__doc__
    assert f"megatron-core {compat.MEGATRON_VERSION}" in text
    assert "Reason:" in text
    assert "Goes when:" in text
