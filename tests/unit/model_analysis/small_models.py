"""Small models of random weights, whose scales differ from each other, and text for them."""

import torch
from torch import Tensor

from ngpt.config import compose
from ngpt.hf.configuration_ngpt import NGPTConfig
from ngpt.hf.modeling_ngpt import STORED, NGPTForCausalLM
from ngpt.hf.targets import target_of
from ngpt.model_analysis.recipes import recipe_named

NVIDIA = recipe_named("nvfp4_nvidia")
VOCABULARY = 257


def model_of(experiment: str, *words: str, seed: int = 1) -> NGPTForCausalLM:
    """fp32, in evaluation mode."""
    torch.manual_seed(seed)
    target = target_of(compose([f"experiment={experiment}", *words]), in_tree=False)
    model = NGPTForCausalLM(NGPTConfig(**target.config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in STORED:
                parameter.mul_(0.5 + 2 * torch.rand_like(parameter))
    return model


def ids(sequences: int, length: int, seed: int = 3) -> Tensor:
    """[sequences, length + 1]"""
    return torch.randint(VOCABULARY, (sequences, length + 1), generator=torch.Generator().manual_seed(seed))
