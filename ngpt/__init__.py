"""nGPT: normalised transformers, the method on plain torch (imports neither Megatron nor Transformer Engine)."""

from pathlib import Path

# Installed, launch/ lies in this package; in a checkout it stands beside it. A job names its modules ngpt.launch.NAME, and finds them in
# either: where a container has an installation of its own, none but the container knows which one it is.
if not Path(__file__).with_name("launch").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

__version__ = "0.1.0"
