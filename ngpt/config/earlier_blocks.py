"""Blocks kept in bf16 by runs from before an attention with the MLP behind it was one block in every layer pattern."""

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
    ends = [precision.get(f"num_layers_at_{end}_in_bf16", 0) for end in ("start", "end")]
    globs = precision.get("bf16_modules", [])
    counted_symbols = layers == len(pattern.trunk) != len(pattern.blocks)
    if counted_symbols and any(ends) and all(isinstance(end, int) and 0 <= end <= layers for end in ends) and isinstance(globs, list):
        kept = [*range(ends[0]), *range(layers - ends[1], layers)]
        precision["bf16_modules"] = [*globs, *(f"layers.{index}.*" for index in kept)]
        precision |= {"num_layers_at_start_in_bf16": 0, "num_layers_at_end_in_bf16": 0}
