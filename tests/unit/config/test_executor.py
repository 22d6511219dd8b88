"""Which executor is decided on, written out."""

import pytest

from ngpt.config import compose
from ngpt.config.executor import decide_executor, expected_executor
from ngpt.config.recipes import recipe_of
from ngpt.config.schema import Config, PrecisionConfig
from ngpt.estimate.hardware import GPUS

BLACKWELL = {"b200", "b300", "gb200", "gb300"}


@pytest.mark.parametrize(
    ("format", "asked", "with_kernels", "without"),
    [
        ("none", "auto", "none", "none"),
        ("fp8", "auto", "native", "native"),
        ("mxfp8", "auto", "native", "native"),
        ("nvfp4", "auto", "native", "emulated"),
        ("nvfp4", "native", "native", "native"),
        ("nvfp4", "emulated", "emulated", "emulated"),
    ],
)
def test_only_nvfp4_left_to_the_run_follows_the_kernels(format, asked, with_kernels, without):
    recipe = recipe_of(PrecisionConfig(name="test", dtype="bf16", format=format))
    assert [decide_executor(recipe, asked, has_kernels) for has_kernels in (True, False)] == [with_kernels, without]


@pytest.fixture(scope="module")
def nvfp4() -> Config:
    return compose(["experiment=ngpt_tiny", "precision=nvfp4_paper"])


@pytest.mark.parametrize("gpu", [None, *GPUS])
@pytest.mark.parametrize("impl", ["auto", "local"])
def test_a_config_expects_kernels_on_blackwell_with_transformer_engine(nvfp4, gpu, impl):
    nvfp4.cluster.gpu, nvfp4.model.transformer_impl = gpu, impl
    expected = "native" if gpu in BLACKWELL and impl == "auto" else "emulated"
    assert expected_executor(nvfp4, recipe_of(nvfp4.precision)) == expected
