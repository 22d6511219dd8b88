"""Philox against published vectors, the place of its bits, and the seeds of streams."""

import numpy as np
import pytest
import torch

from ngpt.precision.philox import philox4x32, random_bits, uniforms
from ngpt.precision.rounding import stream_seed


@pytest.mark.parametrize(
    ("rounds", "counter", "seed", "words"),
    [
        (7, (0, 0, 0, 0), 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (10, (0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (10, (2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (10, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0_A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_known_answers(rounds, counter, seed, words):
    """Random123's own vectors."""
    drawn = philox4x32(tuple(np.array([word], np.uint64) for word in counter), seed, rounds)
    assert [int(word[0]) & 0xFFFFFFFF for word in drawn] == list(words)


def test_bits_depend_on_place_stream_and_seed_alone():
    whole = random_bits(7, 0, range(40), 64)
    assert torch.equal(whole[8:24].int(), random_bits(7, 0, range(8, 24), 64).int())
    assert torch.equal(whole[:, :24].int(), random_bits(7, 0, range(40), 24).int())
    for other in (random_bits(7, 1, range(40), 64), random_bits(8, 0, range(40), 64), random_bits(7 + 2**40, 0, range(40), 64)):
        assert (whole.int() == other.int()).float().mean() < 0.01


def test_first_draw_lies_in_the_first_eight_columns():
    low, high = 0x5F6FB709 & 0xFFFF, 0x5F6FB709 >> 16
    assert random_bits(0, 0, range(1), 16)[0, :2].tolist() == [low, high]


def test_uniforms_are_centred_and_exact():
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    values = uniforms(bits)
    assert torch.equal(values.double(), (torch.arange(2**16).double() + 0.5) / 2**16)
    assert values.double().mean() == 0.5


def test_a_seed_changes_with_every_argument_and_never_otherwise():
    base = {"run_seed": 1, "rank": 2, "module": "layers.3.mlp.linear_fc1", "step": 4, "call": 5}
    others = [{"run_seed": 2}, {"rank": 3}, {"module": "layers.3.mlp.linear_fc2"}, {"module": 3}, {"step": 5}, {"call": 4}]
    others += [{"rank": 4, "step": 2}, {"run_seed": 2, "rank": 1}]  # swapped values
    seeds = [stream_seed(**(base | change)) for change in [{}, *others]]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert stream_seed(**base) == seeds[0] == 6567505503038972650


def test_seeds_of_neighbouring_steps_differ_in_half_of_their_bits():
    seeds = [stream_seed(0, 0, 0, step, 0) for step in range(2000)]
    flips = [(a ^ b).bit_count() for a, b in zip(seeds, seeds[1:], strict=False)]
    assert 31.2 < sum(flips) / len(flips) < 31.8
