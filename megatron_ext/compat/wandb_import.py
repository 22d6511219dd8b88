"""Megatron imports without wandb's client.

Upstream (megatron-core 0.19.2): `core/timers.py` imports wandb wherever it is installed, to tell its writer from TensorBoard's.
Reason: the import takes half a second or more in every process, and Megatron has no writer here: figures go to `ngpt.trackers`, which
imports the client where a run asks for it.
Goes when: upstream imports it with its writer.
"""

import importlib
import sys


def install() -> bool:
    """Imports Megatron's core as if wandb were not installed. Returns whether its timers do without."""
    if "megatron.core" not in sys.modules and "wandb" not in sys.modules:
        sys.modules["wandb"] = None
        try:
            importlib.import_module("megatron.core")
        finally:
            del sys.modules["wandb"]
    from megatron.core import timers

    return timers.wandb is None
