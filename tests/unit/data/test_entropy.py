import math
from collections import Counter

import numpy as np
import pytest

from ngpt.data.entropy import ngram_bits_per_byte


def by_definition(tokens, order):
    """Minus the mean log2 of the conditional frequency, over all windows."""
    windows = [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]
    whole, context = Counter(windows), Counter(window[:-1] for window in windows)
    return -sum(math.log2(whole[window] / context[window[:-1]]) for window in windows) / len(windows)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_entropy_is_that_of_its_definition(order, dtype):
    generator = np.random.default_rng(0)
    tokens = np.minimum(generator.geometric(0.1, 3000), 256).astype(dtype, casting="unsafe")
    assert ngram_bits_per_byte(tokens, order) == pytest.approx(by_definition(tokens.tolist(), order), abs=1e-10)


def test_known_sources():
    assert ngram_bits_per_byte(np.tile(np.arange(256), 4), 1) == pytest.approx(8)
    cycle = np.tile([5, 9, 256, 1], 100)
    assert ngram_bits_per_byte(cycle, 1) == pytest.approx(2)
    assert ngram_bits_per_byte(cycle, 2) == pytest.approx(0, abs=1e-9)
    coin = np.random.default_rng(1).integers(0, 2, 100_000)
    assert ngram_bits_per_byte(coin, 2) == pytest.approx(1, abs=1e-3)


def test_a_table_fitted_elsewhere_is_never_better():
    generator = np.random.default_rng(2)
    train, valid = (generator.choice(5, 4000, p=[0.4, 0.3, 0.15, 0.1, 0.05]) for _ in range(2))
    frequency = Counter(train.tolist())
    fitted = -sum(math.log2(frequency[token] / len(train)) for token in valid.tolist()) / len(valid)
    assert ngram_bits_per_byte(valid, 1) < fitted


def test_impossible_orders_are_refused():
    with pytest.raises(ValueError, match="order 0"):
        ngram_bits_per_byte(np.arange(5), 0)
    with pytest.raises(ValueError, match="order 6 with 5 tokens"):
        ngram_bits_per_byte(np.arange(5), 6)
    with pytest.raises(ValueError, match="too many n-grams"):
        ngram_bits_per_byte(np.arange(131_072), 4)
