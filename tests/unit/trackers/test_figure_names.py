"""Figures of metrics.jsonl under the names that trackers show."""

import pytest

from ngpt.trackers import figure_name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("train_loss", "train/loss"),
        ("val_loss", "valid/loss"),
        ("mtp_1_loss", "train/mtp_1_loss"),
        ("tokens_per_second", "train/tokens_per_second"),
        ("worst_norm_deviation", "health/worst_norm_deviation"),
        ("health/sqk/mean", "health/sqk/mean"),
        ("precision/input/snr_db", "precision/input/snr_db"),
        ("precision/fprop/noise_correlation_lower", None),
        ("precision/fprop/noise_correlation_upper", None),
        ("step", None),
    ],
)
def test_each_figure_has_its_group_and_bounds_have_none(name, shown):
    assert figure_name(name) == shown
