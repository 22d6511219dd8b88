"""Rounding streams: every backward pass of every linear, rank and step draws from its own, and a resumed run from the same."""

import math

import pytest

from megatron_ext.precision import state as state_module
from megatron_ext.precision.state import PrecisionState


def make(rank=0, seed=1, steps=10, tail=0.0):
    return PrecisionState(seed, rank, steps, tail)


def seeds(state, steps=(1, 2), linears=3, passes=2):
    found = []
    for step in steps:
        state.begin_step(step)
        found += [state.next_rounding_seed(linear) for _ in range(passes) for linear in range(linears)]
    return found


def test_every_pass_of_every_linear_rank_and_step_has_a_seed_of_its_own():
    everything = [seed for rank in range(4) for run in (1, 2) for seed in seeds(make(rank, run))]
    assert len(set(everything)) == len(everything) == 4 * 2 * 2 * 3 * 2


def test_a_resumed_run_draws_what_the_run_that_never_stopped_draws():
    assert seeds(make(), steps=(1, 2))[6:] == seeds(make(), steps=(2,))


def test_forward_passes_within_a_step_do_not_restart_the_streams():
    state = make()
    state.begin_step(1)
    first = state.next_rounding_seed(0)
    state.begin_step(1)
    assert state.next_rounding_seed(0) != first


@pytest.mark.parametrize(("tail", "last"), [(0.0, 10), (0.25, 8), (0.5, 5)])
def test_the_tail_is_the_last_part_of_the_steps(tail, last):
    state = make(tail=tail)
    active = []
    for step in range(1, 11):
        state.begin_step(step)
        active.append(state.active)
    assert active == [step <= last for step in range(1, 11)]


def test_a_figure_is_the_mean_over_the_ranks_that_have_a_finite_one_with_its_bounds(monkeypatch):
    bounded = {"e": 20.0, "e_lower": 19.0, "e_upper": 21.0}
    ranks = [
        {"a": 1.0, "b": math.inf, "c": math.nan, "e": 30.0, "e_lower": -math.inf, "e_upper": math.inf},
        {"a": 3.0, "b": 5.0} | bounded,
        {"d": 7.0},
    ]

    def gather(everyone, own):
        everyone[:] = ranks

    monkeypatch.setattr(state_module.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(state_module.dist, "all_gather_object", gather)
    state = make()
    state.begin_step(1, watched=True)
    assert state.figures() == {"a": 2.0, "b": 5.0, "d": 7.0} | bounded
