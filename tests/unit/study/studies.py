"""A small study for tests: a trunk and two branches of each architecture, and a scan."""

from pathlib import Path
from typing import Any

from ngpt.config.study import Study, load_study
from ngpt.study import results
from ngpt.study.plan import Plan, plan

TEXT = """\
# A study of tests.
claim: It works.
paper: It says so.
tuning: None.
words: [experiment=ngpt_tiny]
lists:
  seed: [1, 2]
  recipe: [nvfp4_nvidia]
  width: [64, 128]
arms:
  gpt_trunk: {words: [experiment=gpt_tiny, precision=bf16], until: 0.5}
  gpt_bf16: {after: gpt_trunk}
  "gpt_{recipe}": {after: gpt_trunk, words: ["precision={recipe}"], label: "GPT, {recipe}"}
  wide: {over: {model.hidden_size: width}}
analyses:
  snr: {what: snr, arms: [wide], options: [--tokens, "64"], step: 4}
measures:
  loss: {key: val_loss, unit: nats}
comparisons:
  gap: {measure: loss, arms: ["gpt_*"], less: {"gpt_*": gpt_bf16}}
figures:
  - {title: The gap, kind: tokens, of: [gap]}
verdict:
  - {comparison: gap, must: be_above, value: 0.0}
sizes:
  small: {words: [train.steps=8, optim.lr=1e-3]}
  large: {words: [train.steps=80], lists: {seed: [1, 2, 3]}, arms: ["gpt_*bf16", wide]}
"""

FIGURES = """\
figures:
  - {title: How large the gap is, kind: intervals, of: [gap]}
  - {title: The gap, kind: tokens, of: [gap]}
  - {title: Over the width, kind: axis, of: [widths, gain], over: model.hidden_size, model: averaging, rho: [rho, rho_noise]}
  - {title: Layers, kind: layers, of: [gain]}
"""
MEASURES = """\
  gain: {source: snr, key: "linears/*/gain", unit: dB}
  rho: {source: snr, key: "linears/*/rho"}
  rho_noise: {source: snr, key: "linears/*/noise"}
comparisons:
  widths: {measure: loss, arms: [wide]}
  gain: {measure: gain, arms: [wide]}
"""
SHOWN = TEXT.replace("comparisons:\n", MEASURES).replace("figures:\n  - {title: The gap, kind: tokens, of: [gap]}\n", FIGURES)


# What the studies of other tests begin and end with: their own words, lists, arms and analyses stand between.
HEAD = """\
# A study of tests.
claim: It works.
paper: None.
tuning: None.
"""
TAIL = """\
measures:
  loss: {key: val_loss}
comparisons:
  loss: {measure: loss}
figures:
  - {title: Loss, kind: intervals, of: [loss]}
verdict:
  - {comparison: loss, must: be_above, value: 0}
sizes:
  small: {}
"""


def write_study(folder: Path, text: str = TEXT, name: str = "mine") -> Path:
    """A folder of the user with this study in it."""
    (folder / "study").mkdir(parents=True, exist_ok=True)
    (folder / "study" / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def loaded(folder: Path, text: str = TEXT) -> Study:
    return load_study("mine", [write_study(folder, text)])


def planned(folder: Path, *words: str, size: str | None = None, text: str = TEXT) -> Plan:
    return plan("mine", loaded(folder, text), size, words)


def gathered(study: tuple[Plan, Path]) -> dict[str, Any]:
    """The results of the fixture `study`."""
    plan, folder = study
    provenance = {"git": {"commit": "0123abcd", "dirty": False}, "versions": {"numpy": "2"}, "gpus": []}
    return results.gather(plan, folder, "A study of tests.", "ngpt study mine --size small", provenance)
