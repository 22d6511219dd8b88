"""nGPT as a plug-in of Megatron-core: the only package that imports Megatron and Transformer Engine."""
