"""The keys of the checkpoint section that say how a checkpoint is loaded and kept."""

import pytest

from ngpt.config.compose import compose
from ngpt.config.errors import ConfigError


@pytest.mark.parametrize(
    "override",
    ["verify=half", "on_full_disk=wait", "keep_last=0", "keep_every=-4", "keep_every=4"],
)
def test_values_without_a_meaning_are_refused(override):
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        compose(["experiment=ngpt_tiny", f"checkpoint.{override}"])


def test_defaults_verify_all_and_keep_all():
    checkpoint = compose(["experiment=ngpt_tiny"]).checkpoint
    assert (checkpoint.verify, checkpoint.fallback, checkpoint.keep_last, checkpoint.on_full_disk) == ("full", True, None, "stop")


@pytest.mark.parametrize("argument", ["ckpt_step=4", "save_retain_interval=4", "verify_integrity=true"])
def test_arguments_of_megatron_that_would_go_around_it_are_refused(argument):
    with pytest.raises(ConfigError, match="Refused"):
        compose(["experiment=ngpt_tiny", f"megatron.{argument}"])
