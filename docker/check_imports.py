"""Imports everything a GPU run needs and compares the versions with setup.py. Run when the image is built, so without a GPU."""

import importlib
import importlib.metadata
import sys
from pathlib import Path

from packaging.requirements import Requirement
from requirements import requirements

MODULES = (
    "torch",
    "triton",
    "transformer_engine.pytorch",
    "mamba_ssm",
    "causal_conv1d",
    "megatron.core",
    "megatron.training",
    "hydra",
    "wandb",
    "ngpt",
    "megatron_ext",
    "ngpt.launch.cli",
)


def main() -> int:
    """Prints one line a finding; 1 when anything is missing or of another version."""
    problems = []
    for requirement in map(Requirement, requirements(Path(__file__).with_name("setup.py"), ["base", "gpu", "tekken", "wandb"])):
        found = importlib.metadata.version(requirement.name)
        print(f"{requirement.name} {found}")
        if not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name}: {found}, not {requirement.specifier}")
    for name in MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken binary fails in many ways, and each must be listed
            problems.append(f"{name}: {type(error).__name__}: {error}")
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
