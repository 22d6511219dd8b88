"""Upstream takes a prediction loss's mean over a context-parallel rank; the patch over the sequences.

One rank against fp64: tests/numerics/test_model_against_reference.py; several: tests/distributed.
"""

import ast
import inspect
import textwrap

from megatron_ext.compat.prediction_loss import process_mtp_loss

PREDICTION, MODEL = "core/transformer/multi_token_prediction.py", "core/models/hybrid/hybrid_model.py"


def test_upstream_still_counts_the_tokens_of_one_rank(upstream_source):
    source = upstream_source(PREDICTION, "process_mtp_loss")
    assert "original_num_tokens = loss_mask.sum()" in source and "original_num_tokens / num_tokens_safe" in source
    assert "all_reduce" not in source and "all_reduce" not in upstream_source(PREDICTION, "roll_tensor")


def test_upstream_still_calls_it_with_these_names_and_weighs_it_so(upstream_source):
    call = next(
        node
        for node in ast.walk(ast.parse(textwrap.dedent(upstream_source(MODEL, "HybridModel.forward"))))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "process_mtp_loss"
    )
    assert not call.args
    assert {keyword.arg for keyword in call.keywords} == set(inspect.signature(process_mtp_loss).parameters)
    assert "config.mtp_loss_scaling_factor / config.mtp_num_layers" in upstream_source(PREDICTION, "process_mtp_loss")
