"""Imports everything a GPU run needs and compares the versions with the pins. Run when the image is built, so without a GPU."""

import importlib
import importlib.metadata
import sys

MODULES = (
    "torch",
    "triton",
    "transformer_engine.pytorch",
    "mamba_ssm",
    "causal_conv1d",
    "megatron.core",
    "megatron.training",
    "hydra",
    "ngpt",
    "megatron_ext",
    "launch.cli",
)
VERSIONS = {
    "torch": "2.11.",
    "transformer-engine": "2.20.2",
    "mamba-ssm": "2.3.2.post1",
    "causal-conv1d": "1.7.0",
    "megatron-core": "0.19.2",
    "hydra-core": "1.3.8",
}


def main() -> int:
    """Prints one line a finding; 1 when anything is missing or of another version."""
    problems = []
    for name, wanted in VERSIONS.items():
        found = importlib.metadata.version(name)
        print(f"{name} {found}")
        if not found.startswith(wanted):
            problems.append(f"{name}: {found}, not {wanted}")
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
