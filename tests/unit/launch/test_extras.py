"""What is not installed is told before a run starts, in one line."""

import importlib.machinery

import pytest

from launch.extras import check_extras
from ngpt.config import compose
from ngpt.config.errors import ConfigError

ASKING = {"wandb": "logging.wandb.mode=offline", "eval": "train.eval_tasks=[ngpt]"}


@pytest.mark.parametrize("extra", ASKING)
@pytest.mark.parametrize("spec", [None, importlib.machinery.ModuleSpec("package", None)], ids=["missing", "a folder of that name"])
def test_a_missing_package_is_told_with_its_extra(monkeypatch, extra, spec):
    monkeypatch.setattr("launch.extras.find_spec", lambda name: spec)
    check_extras(compose(["experiment=ngpt_tiny"]))
    with pytest.raises(ConfigError) as caught:
        check_extras(compose(["experiment=ngpt_tiny", ASKING[extra]]))
    assert f"pip install 'ngpt-megatron[{extra}]'" in str(caught.value) and "\n" not in str(caught.value)
