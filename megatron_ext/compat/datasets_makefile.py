"""No `make` when training starts: check that Megatron's compiled dataset helper imports.

Upstream (megatron-core 0.19.2): `training/initialize.py: _compile_dependencies` calls `core/datasets/utils.py: compile_helpers` on rank 0,
which runs `make -C megatron/core/datasets` and exits with status 1 where that fails. The wheel brings the compiled `helpers_cpp` but
neither the Makefile nor, on most machines, a compiler, so every run from the wheel would exit.
Reason: the helper is there already; importing it is the only thing that can be checked.
Goes when: the wheel brings its Makefile, or upstream looks for the helper before it builds it.
"""

import importlib
from pathlib import Path

from ngpt.config.errors import ConfigError


def install() -> bool:
    """Replaces the build by a check of the import, made now, on every rank.

    Raises:
        ConfigError: The helper does not import.
    """
    from megatron.core.datasets import utils

    _check_helper(Path(utils.__file__).parent)
    utils.compile_helpers = _already_compiled
    return True


def _check_helper(folder: Path) -> None:
    try:
        importlib.import_module("megatron.core.datasets.helpers_cpp")
    except ImportError as error:
        raise ConfigError(
            str(folder),
            f"its compiled helper helpers_cpp does not import ({error})",
            "Megatron builds its sample indices with it",
            "Reinstall megatron-core for this Python and platform, or run make in that folder of a source checkout",
        ) from error


def _already_compiled() -> None:
    """Stands in for `compile_helpers`."""
