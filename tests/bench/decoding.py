"""Tokens per second of the exported model's greedy decoding on a CPU, with its caches and without, and their ratio.

    python tests/bench/decoding.py [--experiment quickstart] [--tokens 512] [--threads 1] [--repeats 5] [--beside FILE...] [--profile]

A model of random weights in an experiment's shape continues one token by transformers' `generate`. Rounds are interleaved: each decodes
cached and uncached with every code. Figures are medians of rounds: wall time, and CPU time of the process, which on a shared machine is the
one to compare, with one thread. --beside names other versions of ngpt/hf/modeling_ngpt.py, which share the configuration of this tree;
their tokens must be the same. --profile shows where the time of cached decoding goes instead, in Python and in torch's operators.
"""

import argparse
import cProfile
import importlib.util
import pstats
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2]))
from ngpt.config import compose  # noqa: E402
from ngpt.hf import modeling_ngpt  # noqa: E402
from ngpt.hf.configuration_ngpt import NGPTConfig  # noqa: E402
from ngpt.hf.targets import target_of  # noqa: E402

Times = tuple[float, float]  # wall and CPU seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="quickstart", help="quickstart; ngpt_hybrid_tiny has layers of every kind")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--beside", type=Path, nargs="+", default=[])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--cached-only", action="store_true", help="uncached decoding takes most of the time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = models_of(options.experiment, options.beside)
    if options.profile:
        show_profile(models["this"], options.tokens)
        return
    ways = [(name, use_cache) for name in models for use_cache in ((True,) if options.cached_only else (True, False))]
    times: dict[tuple[str, bool], list[Times]] = {way: [] for way in ways}
    for _ in range(options.repeats):
        expected = None
        for name, use_cache in ways:
            tokens, *spent = decode(models[name], options.tokens, use_cache)
            times[name, use_cache].append((spent[0], spent[1]))
            expected = tokens if expected is None else expected
            assert torch.equal(tokens, expected), f"{name}, {use_cache=}: other tokens"
    print(f"{options.experiment}, {options.tokens} tokens, {options.threads} threads: tokens/s, medians of {options.repeats} (range)")
    for name in models:
        for number, clock in enumerate(("wall", "CPU")):
            cached, uncached = ([each[number] for each in times.get((name, use_cache), [])] for use_cache in (True, False))
            line = f"{name:24s} {clock:4s} cached {speed(options.tokens, cached)}"
            if uncached:
                ratio = statistics.median(uncached) / statistics.median(cached)
                line += f"  uncached {speed(options.tokens, uncached)}  ratio {ratio:.2f}"
            print(line)


def models_of(experiment: str, others: list[Path]) -> dict[str, PreTrainedModel]:
    """The same random model by this tree's code and by other versions of it."""
    config = target_of(compose([f"experiment={experiment}"]), in_tree=False).config
    torch.manual_seed(0)
    models = {"this": modeling_ngpt.NGPTForCausalLM(NGPTConfig(**config)).eval()}
    for number, path in enumerate(others):
        spec = importlib.util.spec_from_file_location(f"ngpt.hf.beside_{number}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # transformers looks classes up by their module
        spec.loader.exec_module(module)
        models[path.stem] = module.NGPTForCausalLM(NGPTConfig(**config)).eval()
        models[path.stem].load_state_dict(models["this"].state_dict())
    return models


@torch.inference_mode()
def decode(model: PreTrainedModel, tokens: int, use_cache: bool) -> tuple[Tensor, float, float]:
    """Tokens [1, 1 + tokens], wall and CPU seconds."""
    ids = torch.tensor([[model.config.vocab_size - 1]])
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, use_cache=use_cache, pad_token_id=0)
    wall, cpu = time.perf_counter(), time.process_time()
    made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return made, time.perf_counter() - wall, time.process_time() - cpu


def speed(tokens: int, seconds: list[float]) -> str:
    slowest, median, fastest = (tokens / pick(seconds) for pick in (max, statistics.median, min))
    return f"{median:6.1f} ({slowest:.1f} to {fastest:.1f})"


def show_profile(model: PreTrainedModel, tokens: int) -> None:
    decode(model, tokens, True)
    with cProfile.Profile() as python:
        decode(model, tokens, True)
    pstats.Stats(python).sort_stats("tottime").print_stats(45)
    with profile(activities=[ProfilerActivity.CPU]) as operators:
        decode(model, tokens, True)
    print(operators.key_averages().table(sort_by="self_cpu_time_total", row_limit=35, max_name_column_width=48))


if __name__ == "__main__":
    main()
