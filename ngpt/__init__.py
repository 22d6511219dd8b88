"""nGPT: normalised transformers, the method on plain torch (imports neither Megatron nor Transformer Engine)."""

from pathlib import Path

# An installation has launch/ inside this package, a checkout has it beside the package. A job names its modules ngpt.launch.NAME, which
# works in both. A container may have its own installation, and only the container knows which of the two it is.
if not Path(__file__).with_name("launch").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

__version__ = "0.1.0"
