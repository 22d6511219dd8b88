"""Groups find their own under another learning rate and take it. Whole runs: tests/faults/test_data_under_a_run.py."""

import pytest

from megatron_ext.compat.param_group_lr import with_own_rates

DISTRIBUTED = "core/optimizer/distrib_optimizer.py"
OPTIMIZER = "core/optimizer/optimizer.py"


def test_upstream_still_pairs_groups_by_learning_rates(upstream_source):
    assert "param_groups_map[needed_groups]" in upstream_source(DISTRIBUTED, "DistributedOptimizer.load_state_dict")
    assert "loaded_groups_map[key]" in upstream_source(OPTIMIZER, "MegatronOptimizer._filter_and_reorder_param_groups")
    assert "max_lr: float" in upstream_source("core/optimizer_param_scheduler.py", "ParamGroupOverride")


def groups(*rates, **more):
    return [{"max_lr": high, "min_lr": low, "wd_mult": float(index), **more} for index, (high, low) in enumerate(rates)]


def test_shared_rates_are_replaced_and_the_rest_is_kept():
    replaced = with_own_rates(groups((2.0, 0.2), (2.0, 0.2), lr=5.0), groups((1.0, 0.1), (1.0, 0.1), lr=7.0))
    assert replaced == groups((2.0, 0.2), (2.0, 0.2), lr=7.0)


@pytest.mark.parametrize("side", ["current", "saved"])
def test_rates_that_tell_groups_apart_stay(side):
    one, two = groups((2.0, 0.2), (2.0, 0.2)), groups((1.0, 0.1), (3.0, 0.1))
    current, saved = (two, one) if side == "current" else (one, two)
    assert with_own_rates(current, saved) == saved


def test_upstream_fails_without_the_patch_and_pairs_with_it(run_installed):
    out = run_installed(
        """
        from megatron.core.optimizer.optimizer import MegatronOptimizer
        from megatron_ext import compat

        def pair(how):
            saved = [{"max_lr": 1.0, "min_lr": 0.1, "wd_mult": wd, "params": [int(wd)], "betas": 1} for wd in (1.0, 0.0)]
            current = [{"max_lr": 2.0, "min_lr": 0.2, "wd_mult": wd, "params": [int(wd)]} for wd in (1.0, 0.0)]
            try:
                return [(group["max_lr"], group["wd_mult"], group["betas"]) for group in how(current, saved)]
            except ValueError as error:
                return str(error)[:30]

        compat.param_group_lr.install()  # once more
        patched = MegatronOptimizer._filter_and_reorder_param_groups
        print(pair(patched.__wrapped__))
        print(pair(patched))
        """
    )
    assert out.splitlines() == ["Could not find parameter group", "[(2.0, 1.0, 1), (2.0, 0.0, 1)]"]
