"""The learning rate of every step, under every schedule: what the optimizer used and what the run reports, against rates by hand.

Megatron's schedule gives step k the rate of k - 1 steps: a warm-up begins with a step of rate 0, and no step has the last rate.
"""

import pytest
from cases import RATES

ROOT_HALF, LR = 0.5**0.5, 1e-2
BY_HAND = {
    "constant": [0, 0.5, 1, 1, 1],  # two steps of warm-up
    "linear": [0, 0.5, 1, 0.75, 0.5, 0.25],
    "cosine": [1, 0.2 + 0.4 * (1 + ROOT_HALF), 0.6, 0.2 + 0.4 * (1 - ROOT_HALF)],  # to a fifth
    "wsd_linear": [1, 1, 1, 1, 1, 0.75, 0.5, 0.25],  # the last 4 of 8 steps decay
    "wsd_minus_sqrt": [1, 1, 1, 1, 1, 0.5, 1 - ROOT_HALF, 1 - 0.75**0.5],
    "wsd_cosine": [1, 1, 1, 1, 1, (1 + ROOT_HALF) / 2, 0.5, (1 - ROOT_HALF) / 2],
    "wsd_without_decay": [1, 1, 1],
    "wsd_exponential": [1, 1, 1, 1, 1, 2 * 0.5**0.25 - 1, 2 * ROOT_HALF - 1, 2 * 0.5**0.75 - 1],
}


@pytest.mark.parametrize("schedule", BY_HAND)
def test_the_rate_that_is_reported_is_the_one_that_was_used(results, schedule):
    wanted = [pytest.approx(LR * part, rel=1e-6, abs=1e-12) for part in BY_HAND[schedule]]
    assert [row["learning_rate"] for row in results.rows(f"rate_{schedule}")] == wanted
    (result,) = results.results(f"rate_{schedule}")
    assert [step["lr"] for step in result["applied"]] == wanted
    assert {(step["eps"], *step["betas"], step["weight_decay"]) for step in result["applied"]} == {(3e-5, 0.8, 0.9, 0.0)}


def test_every_schedule_is_among_them():
    assert set(RATES) == set(BY_HAND)


@pytest.mark.parametrize("name", ["valid_small", "valid_large"])
def test_an_evaluation_reads_the_same_text_whatever_the_seed_and_the_batch(results, name):
    assert results.rows(name)[-1]["val_loss"] == pytest.approx(results.rows("valid_one")[-1]["val_loss"], rel=1e-6)


def test_another_evaluation_seed_is_other_text(results):
    assert results.rows("valid_other")[-1]["val_loss"] != pytest.approx(results.rows("valid_one")[-1]["val_loss"], rel=1e-4)


def test_fresh_weights_do_not_depend_on_the_micro_batch(results):
    one, two = (results.rows(f"fresh_micro{size}")[0] for size in (1, 2))
    for key in ("train_loss", "grad_norm"):
        assert one[key] == pytest.approx(two[key], rel=1e-5)
