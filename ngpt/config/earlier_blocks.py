"""Blocks kept in bf16 by runs from before attention and the MLP behind it counted as one block in every layer pattern."""

from typing import Any

from ngpt.config.pattern import parse


def keep_blocks_of_earlier_run(sections: dict[str, Any]) -> None:
    """Names the layers that such a run kept in bf16, in place.

    It counted the symbols of a pattern that was not `*-` repeated, in `model.num_layers` and at both ends of
    `precision.num_layers_at_*_in_bf16`. Sections that are damaged are left for the checks to name.
    """
    model, precision = sections.get("model"), sections.get("precision")
    if not isinstance(model, dict) or not isinstance(precision, dict) or not isinstance(model.get("layer_pattern"), str):
        return
    pattern, layers = parse(model["layer_pattern"]), model.get("num_layers")
    globs = precision.get("bf16_modules", [])
    if layers != len(pattern.trunk) or layers == len(pattern.blocks) or not isinstance(globs, list):
        return
    symbols, kept = range(len(pattern.trunk)), set()
    for end in ("start", "end"):
        number = precision.get(f"num_layers_at_{end}_in_bf16", 0)
        if not isinstance(number, int) or not 0 <= number <= len(symbols):
            return
        kept |= set(symbols[:number] if end == "start" else symbols[len(symbols) - number :])
    if kept:
        precision["bf16_modules"] = [*globs, *(f"layers.{index}.*" for index in sorted(kept))]
        precision |= {"num_layers_at_start_in_bf16": 0, "num_layers_at_end_in_bf16": 0}
