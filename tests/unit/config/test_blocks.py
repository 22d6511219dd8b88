"""`model.num_layers` counts blocks; configs that counted the symbols of a layer pattern mean what they meant."""

from pathlib import Path

import pytest
import yaml

from ngpt.config import compose, dump, load, to_yaml
from ngpt.config.linears import recipe_by_linear

PAPER = "precision=nvfp4_paper"
MIXED = ["experiment=ngpt_tiny", "model.layer_pattern='**-*--'"]  # *, *-, *-, -


@pytest.mark.parametrize("layers", [4, 6], ids=["blocks", "symbols"])
def test_blocks_or_symbols_of_a_pattern_are_the_same_config(layers: int):
    assert compose([*MIXED, f"model.num_layers={layers}"]).model.num_layers == 4


def quantised(cfg) -> list[int]:
    return sorted({int(name.split(".")[1]) for name in recipe_by_linear(cfg)})


def test_an_earlier_run_keeps_the_symbols_in_bf16_that_it_kept(tmp_path: Path):
    sections = yaml.safe_load(to_yaml(compose([*MIXED, PAPER, "model.num_layers=4"])))
    sections["model"]["num_layers"] = 6
    sections["precision"] |= {"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 2, "bf16_modules": ["layers.1.*_proj"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections))
    cfg = load(tmp_path / "config.yaml")
    assert cfg.model.num_layers == 4
    assert quantised(cfg) == [1, 2, 3]
    assert not any(name.startswith("layers.1.") and name.endswith("_proj") for name in recipe_by_linear(cfg))
    dump(cfg, tmp_path / "again.yaml")
    assert to_yaml(load(tmp_path / "again.yaml")) == to_yaml(cfg)


def test_a_run_of_now_keeps_its_blocks(tmp_path: Path):
    cfg = compose([*MIXED, PAPER, "model.num_layers=4", "precision.num_layers_at_end_in_bf16=2"])
    dump(cfg, tmp_path / "config.yaml")
    assert quantised(cfg) == quantised(load(tmp_path / "config.yaml")) == [0, 1, 2]
