"""Which activation the kernels compute."""

from typing import NamedTuple

import torch.distributed as dist


class Form(NamedTuple):
    """What is computed of v = scale * factor * u.

    Attributes:
        function: f, by its name in `ngpt.kernels.activation.functions`.
        gated: v is (gate, up), two halves: function(gate) * up.
        normalize: the result gets unit norm over its features.
        group: ranks that share the features of a row; each half of a gated row is shared.
    """

    function: str
    gated: bool
    normalize: bool
    group: dist.ProcessGroup | None
