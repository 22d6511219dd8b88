"""Entropies of a text under simple models of itself: the marks that a trained model must beat."""

import math

import numpy as np

MAX_TABLE = 1 << 22  # n-grams counted in a table, ten times faster than by sorting


def ngram_bits_per_byte(tokens: np.ndarray, order: int) -> float:
    """Conditional entropy of a token given the `order - 1` tokens before it, from the counts of these very tokens (plug-in).

    Counted and measured on the same split, it is the least loss that any table of n-grams can reach there. One fitted to the training
    split would reach less, so this is the stricter mark. On a short split a high order comes out far too low: its table knows the text.

    Args:
        tokens: Byte tokens of a split, [tokens]; an end-of-document token counts as one more byte, as in the training loss.
        order: 1 for unigrams, 2 for bigrams, and so on.

    Returns:
        Bits per token, which is per byte for byte tokens.

    Raises:
        ValueError: Fewer than `order` tokens, or counts that 64 bits cannot name.
    """
    if order < 1 or len(tokens) < order:
        raise ValueError(f"order {order} with {len(tokens)} tokens: it must be 1 to their number")
    return max(0.0, _block_entropy(tokens, order, order) - _block_entropy(tokens, order - 1, order))


def _block_entropy(tokens: np.ndarray, length: int, order: int) -> float:
    """Entropy in bits of the first `length` tokens of all windows of `order` tokens."""
    if length == 0:
        return 0.0
    alphabet = int(tokens.max()) + 1
    if length * math.log2(alphabet) >= 63:
        raise ValueError(f"order {order} over {alphabet} tokens: too many n-grams to count")
    windows = len(tokens) - order + 1
    codes = np.zeros(windows, dtype=np.int64)
    for offset in range(length):
        codes = codes * alphabet + tokens[offset : offset + windows]
    if alphabet**length <= MAX_TABLE:
        counts = np.bincount(codes)
        counts = counts[counts > 0]
    else:
        counts = np.unique(codes, return_counts=True)[1]
    return float(math.log2(windows) - (counts * np.log2(counts)).sum() / windows)
