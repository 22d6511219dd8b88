"""The grammar of `model.layer_pattern`: TRUNK/DEPTH/DEPTH, layers of the model and of its multi-token prediction heads.

A symbol is a layer of Megatron's hybrid model; an attention with the MLP behind it, `*-`, is one block of ours. `|` cuts the trunk into
pipeline stages; each `/` begins the layers of one more prediction depth, which run on the last stage.
"""

import re
from typing import NamedTuple


class Pattern(NamedTuple):
    """A layer pattern taken apart. Nothing is checked here, see `check_pattern` in ngpt/config/checks.py.

    Attributes:
        stages: layers of the trunk, cut into pipeline stages where the pattern has `|`.
        depths: layers of each prediction depth; all are equal in a valid pattern, and there are none without `/`.
    """

    stages: tuple[str, ...]
    depths: tuple[str, ...]

    @property
    def trunk(self) -> str:
        """The layers of the model itself."""
        return "".join(self.stages)

    @property
    def blocks(self) -> list[str]:
        """The trunk in the units that `model.num_layers` counts: an attention with the MLP behind it, or any other layer alone."""
        return re.findall(r"\*-|.", self.trunk, re.DOTALL)

    @property
    def layers(self) -> str:
        """Every layer that trains: trunk and prediction depths."""
        return self.trunk + "".join(self.depths)


def parse(pattern: str) -> Pattern:
    """Takes a layer pattern apart."""
    trunk, *depths = pattern.split("/")
    return Pattern(tuple(trunk.split("|")), tuple(depths))


def cut_pattern(pattern: str, stages: int) -> str:
    """Insert the pipeline cuts `|` into a dense layer pattern that has none: equal numbers of attention + MLP pairs per stage.

    If they do not divide evenly, the number of parts is not `stages`, which the checks refuse.
    """
    trunk, *depths = pattern.split("/")
    if stages > 1 and "|" not in trunk:
        size = max(1, len(trunk) // stages)
        trunk = "|".join(trunk[i : i + size] for i in range(0, len(trunk), size))
    return "/".join([trunk, *depths])


def without_cuts(pattern: str) -> str:
    """The pattern without `|`, which says where a layer runs, not what it computes."""
    return pattern.replace("|", "")
