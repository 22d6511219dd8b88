"""Decoding with caches over many tokens, beside decoding without, by transformers' `generate`."""

import pytest
import torch

from ngpt.config import compose
from ngpt.hf.configuration_ngpt import NGPTConfig
from ngpt.hf.modeling_ngpt import STORED, NGPTForCausalLM
from ngpt.hf.targets import target_of

TOKENS = 256


@pytest.mark.parametrize("experiment", ["ngpt_tiny", "ngpt_hybrid_tiny", "gpt_tiny"])
def test_cached_decoding_gives_the_tokens_and_logits_of_uncached(experiment):
    torch.manual_seed(1)
    model = NGPTForCausalLM(NGPTConfig(**target_of(compose([f"experiment={experiment}"]), in_tree=False).config)).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.rpartition(".")[2] in STORED:
                param.mul_(0.5 + 2 * torch.rand_like(param))  # else scales and logits hardly differ
    prompt = torch.tensor([list(b"The history of")])
    options = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    options |= dict(output_logits=True, return_dict_in_generate=True)
    cached, uncached = (model.generate(prompt, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    new = cached.sequences[0, prompt.shape[1] :].tolist()
    assert len(new) == TOKENS and len(set(new)) > 8
    for one, other in zip(cached.logits, uncached.logits, strict=True):
        assert (one - other).abs().max() < 1e-5 * max(1, other.abs().max())
