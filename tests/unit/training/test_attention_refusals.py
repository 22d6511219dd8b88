"""What Transformer Engine's attention cannot do is refused by name; the local backend does it."""

import pytest

from megatron_ext.layers.backend import check_attention
from ngpt.config import ConfigError, compose

SPLIT = ["parallel.context=2", "cluster.gpus_per_node=2"]
TEXT = ["data.mock=false", "data.train=[{path: x}]", "data.valid=[{path: x}]"]
CONFINED = [*TEXT, "data.confine_attention=true", "train.micro_batch_size=2"]


def config(*overrides: str):
    return compose(["experiment=ngpt_tiny", *overrides])


@pytest.mark.parametrize(
    ("overrides", "path", "way_out"),
    [([*SPLIT, "precision=fp32"], "parallel.context", "precision=bf16"), (CONFINED, "train.micro_batch_size", "train.micro_batch_size=1")],
    ids=["fp32 over a split sequence", "documents of two sequences"],
)
def test_refused_by_name(overrides, path, way_out):
    cfg = config(*overrides)
    with pytest.raises(ConfigError) as caught:
        check_attention(cfg, "transformer_engine")
    assert caught.value.path == path and way_out in caught.value.way_out
    check_attention(cfg, "local")
    check_attention(config(*overrides, way_out), "transformer_engine")


def test_layers_without_attention_may_be_split():
    words = ["experiment=ngpt_hybrid_tiny", "model.layer_pattern=ME", "model.num_layers=2", "precision=fp32", *SPLIT]
    check_attention(compose(words), "transformer_engine")
