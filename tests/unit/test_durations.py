"""Time spans are short and carry over."""

import pytest

from ngpt.durations import duration

SPANS = [(0, "0.0 s"), (48.24, "48.2 s"), (59.99, "1 min 00 s"), (75, "1 min 15 s"), (725, "12 min 05 s"), (3599.7, "1 h 00 min")]
SPANS += [(12_000, "3 h 20 min"), (172_799, "47 h 59 min"), (172_799.6, "2 days 00 h"), (160 * 86400 + 7300, "160 days 02 h")]


@pytest.mark.parametrize(("seconds", "text"), SPANS)
def test_durations_carry_over(seconds, text):
    assert duration(seconds) == text
