"""Upstream numbers the parameters of a group in one order and hands them to the inner optimizer in another; the patch makes them one.

A run that needs it: `resume_ep2` in tests/distributed.
"""

OPTIMIZER = "core/optimizer/distrib_optimizer.py"


def test_upstream_still_has_the_two_orders(upstream_source):
    numbering = upstream_source(OPTIMIZER, "DistributedOptimizer._build_optimizer_group_ranges")
    assert "local_param_group_map[param] = (group_index, len(group_range" in numbering and "dtype ==" not in numbering
    handing = upstream_source(OPTIMIZER, "DistributedOptimizer._build_model_and_main_param_groups")
    assert handing.index("*shard_fp32_params_this_group") < handing.index("*shard_fp32_from_float16_params_this_group")


def test_fp32_parameters_are_numbered_first_and_keep_their_order(run_installed):
    out = run_installed(
        """
        import torch
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

        names = {}
        for name, dtype in (("a", torch.bfloat16), ("b", torch.float32), ("c", torch.bfloat16), ("d", torch.float32)):
            names[torch.nn.Parameter(torch.zeros(1, dtype=dtype))] = name
        a, b, c, d = names
        buffers = [{"bf16": [{"param_map": {a: 0, c: 0}}]}, {"fp32": [{"param_map": {b: 0, d: 0}}]}]
        places, groups = DistributedOptimizer._build_optimizer_group_ranges([{"params": [a, b, d]}, {"params": [c]}], buffers)
        print([[names[param] for param in group["params"]] for group in groups], {names[param]: place for param, place in places.items()})
        """
    )
    assert out.splitlines()[-1] == "[['b', 'd', 'a'], ['c']] {'a': (0, 2), 'c': (1, 0), 'b': (0, 0), 'd': (0, 1)}"
