"""Text to tokens on disk: fetch, tokenizers, preparation into Megatron's indexed format, manifests, inspection.

Nothing here imports torch: data is prepared and inspected on any machine.
"""
