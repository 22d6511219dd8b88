"""What `ngpt eval` prints."""

import pytest

from ngpt.evaluation.run import table


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [(0.25, 0.0125, "0.2500 ± 0.0125"), (12.3456789, 1.0, "12.3457 ± 1.0000"), (271828182845904.5, 4e13, "2.718e+14 ± 4e+13")],
)
def test_figures_have_few_digits_however_large_they_are(value: float, error: float, shown: str):
    results = {"tasks": {"ngpt_copying": {"perplexity": value, "perplexity_stderr": error, "samples": 40}}, "splits": {}}
    assert table(results) == f"ngpt_copying  perplexity  {shown}"
