"""How rows become batches, and what logits say of them, against fp64."""

import random

import pytest
import torch

from ngpt.evaluation.rows import Row, add_scores, answers, batches, padded, predicted, readings

VOCABULARY = 37


def rows_of(count: int, seed: int) -> list[Row]:
    rng = random.Random(seed)
    return [Row(tuple(rng.randrange(VOCABULARY) for _ in range(rng.randrange(2, 12))), 1) for _ in range(count)]


def test_every_row_is_read_once_by_one_rank_and_all_have_as_many_batches():
    rows = rows_of(29, seed=1) + [Row((1, 2, 3, 4), 2), Row((1, 2, 3, 9), 1)]  # the last two share their inputs
    found = readings(rows)
    assert len(found) < len(rows) and len(found[0].inputs) == max(len(row.inputs) for row in rows)
    shares = [batches(found, size=3, rank=rank, ranks=4) for rank in range(4)]
    assert len({len(share) for share in shares}) == 1, "a collective in each batch would otherwise wait for ever"
    seen = [number for share in shares for batch in share for reading in batch for number, _ in reading.rows]
    assert sorted(seen) == list(range(len(rows)))


def test_a_row_that_would_predict_its_own_first_token_is_refused():
    with pytest.raises(AssertionError, match="3 scored of 3 tokens"):
        readings([Row((1, 2, 3), 3)])


def test_scores_are_those_of_fp64(dtype=torch.float32):
    """A table gives the logits that follow each token, so that the expected sum needs no model."""
    generator = torch.Generator().manual_seed(3)
    table_VV = torch.randn(VOCABULARY, VOCABULARY, generator=generator) * 5
    best = table_VV.argmax(1)
    rows = [Row((4, 5, 6, 7), 3), Row((4, 5, 6, 8), 1), Row((9, int(best[9])), 1), Row((9, int(best[9]), int(best[best[9]]) ^ 1), 2)]
    scores_R2 = torch.zeros(len(rows), 2, dtype=torch.float64)
    for batch in batches(readings(rows), size=2):
        add_scores(scores_R2, batch, table_VV[padded(batch, length=6, rows=2)])
    log_VV = table_VV.double().log_softmax(1)
    for row, (score, greedy) in zip(rows, answers(scores_R2), strict=True):
        pairs = list(zip(row.tokens, row.tokens[1:], strict=False))[-row.scored :]
        assert score == pytest.approx(sum(log_VV[pair].item() for pair in pairs), abs=1e-5)
        assert greedy == all(best[one] == other for one, other in pairs)
    assert [greedy for _, greedy in answers(scores_R2)] == [False, False, True, False]


def test_of_equal_logits_the_first_entry_is_the_most_probable_one():
    _, best_T = predicted(torch.tensor([[1.0, 3.0, 3.0]]), torch.tensor([2]))
    assert best_T.tolist() == [1]
