"""Seeds of stochastic rounding: every quantised tensor of a run draws from a stream of its own."""

import hashlib

_MASK = 0xFFFFFFFFFFFFFFFF
_GOLDEN_RATIO = 0x9E3779B97F4A7C15


def stream_seed(run_seed: int, rank: int, module: str | int, step: int, call: int) -> int:
    """A seed that differs in about half of its bits if any argument differs, the same in every run and process.

    Args:
        run_seed: of the run.
        rank: of the process.
        module: the layer's name or number.
        step: of training.
        call: which of the layer's calls in this step, micro-batches and recomputation included.

    Returns:
        0 .. 2^63 - 1.

    Source: the finaliser of SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators", 2014) over the chained arguments.
    """
    if isinstance(module, str):
        module = int.from_bytes(hashlib.blake2b(module.encode(), digest_size=8).digest(), "little")
    state = 0
    for value in (run_seed, rank, module, step, call):
        state = _mix((state + _GOLDEN_RATIO) ^ value)
    return state >> 1


def _mix(value: int) -> int:
    value &= _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def operand_seed(seed: int, operand: str) -> int:
    """The seed of input | weight | grad_output in a backward pass with `seed`, so that the two operands of a product err independently."""
    return seed ^ {"grad_output": 0, "input": 1, "weight": 2}[operand]
