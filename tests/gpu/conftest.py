"""What the tests of this folder share: a GPU, or they are skipped; random numbers on it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def need_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.cuda.empty_cache()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(5)
