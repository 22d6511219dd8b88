"""nGPT: normalised transformers, the method on plain torch (imports neither Megatron nor Transformer Engine)."""

__version__ = "0.1.0"
