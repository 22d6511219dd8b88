"""Texts on which two tokenizers are compared: awkward ones, and what the vocabulary itself spells."""

from collections.abc import Iterator
from typing import Any

from ngpt.data.tokenizers import Tokenizer
from ngpt.data.vocabulary import EOD

PROBES = (
    *(
        "",
        " ",
        "  ",
        "   \t  ",
        "\n",
        "\r\n",
        "a\r\nb\rc\nd\r\n\r\n",
        " leading",
        "trailing ",
        "two  spaces   three",
        "\n\n \t\n a",
        "\u00a0a\u3000b",
    ),
    *(
        "The norm of a row is one.",
        "don't we'll I'M it's",
        "camelCase snake_case HTTPServer",
        "3.14159 1,000,000 0x1F 12345678901",
        "x = {'a': [1, 2]}\n\tif x:",
    ),
    *("Größe naïve façade", "数学と言語", "한국어 텍스트", "Привет, мир", "مرحبا بالعالم", "שָׁלוֹם", "हिन्दी में", "ไทยภาษา", "ﬁ①Ⅷ½"),
    *(
        "e\u0301 \u0301a\u0323\u0307 Z\u0351\u036b\u0343",
        "🙂👩‍👩‍👧‍👦🏳️‍🌈👍🏽",
        "\x00\x01\x7f\x1b[0m",
        "\ufeffbom\u200b\u200d\u2028\u2029\u0085",
        "\ufffd\ufffe\ue000\U0010ffff",
    ),
    *(
        f"{EOD}",
        f"a{EOD}b </s> <s> <unk> <pad>",
        "<0x41><0xE2><SPECIAL_3>",
        "▁a ▁ b▁ ▁",
        "Ġa Ċ",
        "a" * 600,
        " " * 70 + "x",
        "\n" * 40,
        "=-" * 50,
        "ab" * 300,
    ),
)
TEXTS_OF = 16  # tokens of the vocabulary that make one text
MAX_TOKENS = 1 << 16  # of a larger vocabulary only this many tokens are tried, evenly spread


def texts(tokenizer: Tokenizer, backend: Any) -> Iterator[str]:
    """Texts to compare: awkward ones, names of special tokens, and tokens of the vocabulary in their order and in another."""
    yield from PROBES
    for token in backend.get_added_tokens_decoder().values():
        yield token.content
        yield f"a {token.content}b"
    size = min(tokenizer.vocab_size, MAX_TOKENS)
    words = [tokenizer.decode([i * tokenizer.vocab_size // size]) for i in range(size)]
    yield from words[:: max(1, size // 4096)]
    for stride in (1, _coprime(size)):
        for first in range(0, size, TEXTS_OF):
            yield "".join(words[i * stride % size] for i in range(first, min(first + TEXTS_OF, size)))


def _coprime(size: int) -> int:
    return next(prime for prime in (7919, 7927) if size % prime)
