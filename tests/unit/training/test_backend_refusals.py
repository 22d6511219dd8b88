"""What a backend or a device cannot do is refused by name."""

import pytest

from megatron_ext.layers.backend import check_backend
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
        check_backend(cfg, "transformer_engine")
    assert caught.value.path == path and way_out in caught.value.way_out
    check_backend(cfg, "local")
    check_backend(config(*overrides, way_out), "transformer_engine")


def test_layers_without_attention_may_be_split():
    words = ["experiment=ngpt_hybrid_tiny", "model.layer_pattern=ME", "model.num_layers=2", "precision=fp32", *SPLIT]
    check_backend(compose(words), "transformer_engine")


def test_no_graphs_without_cuda():
    cfg = config("megatron.cuda_graph_impl=local")
    with pytest.raises(ConfigError, match="megatron.cuda_graph_impl: local.*CUDA GPU"):
        check_backend(cfg, "local")


def test_collectives_inside_of_products_are_transformer_engines():
    words = ["precision=bf16", "parallel.tensor=2", "cluster.gpus_per_node=2", "megatron.tp_comm_overlap=true"]
    check_backend(config(*words), "transformer_engine")
    with pytest.raises(ConfigError, match="megatron.tp_comm_overlap"):
        check_backend(config(*words), "local")


@pytest.mark.parametrize("overrides", [[*SPLIT, "precision=fp32"], CONFINED], ids=str)
def test_a_config_that_names_the_backend_is_refused_before_workers_start(overrides):
    with pytest.raises(ConfigError, match="Transformer Engine"):
        config(*overrides, "model.transformer_impl=transformer_engine")
