"""Where a run comes from: the state of the code, the versions, the device and the command. Names neither a host nor a user."""

import importlib.metadata
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch.devices import gpu_names

PACKAGES = (
    "ngpt-megatron",
    "megatron-core",
    "torch",
    "triton",
    "transformer-engine",
    "transformer-engine-torch",
    "mamba-ssm",
    "causal-conv1d",
    "numpy",
    "hydra-core",
    "omegaconf",
)
SOURCE = Path(__file__).resolve().parent.parent


def describe_launch(command: Sequence[str], variables: dict[str, str]) -> tuple[dict[str, Any], str]:
    """What `environment.json` holds, and the difference of the code to its commit (empty where there is none).

    Args:
        command: The command line as given.
        variables: Environment variables of the workers worth recording.
    """
    git, diff = git_state(SOURCE)
    description = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "git": git,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpus": list(gpu_names()),
        "versions": versions(),
        "environment": variables,
    }
    return description, diff


def versions() -> dict[str, str | None]:
    """Installed version of each package that matters, None where it is absent."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_state(source: Path) -> tuple[dict[str, Any] | None, str]:
    """Commit, branch, whether the tree differs, and the difference itself. (None, "") where `source` is not a checkout."""
    if not (source / ".git").exists():
        return None, ""
    status = _git(source, "status", "--porcelain").splitlines()
    state = {
        "commit": _git(source, "rev-parse", "--verify", "--quiet", "HEAD").strip() or None,
        "branch": _git(source, "branch", "--show-current").strip() or None,
        "dirty": bool(status),
        "untracked": [line[3:] for line in status if line.startswith("??")],
    }
    return state, _git(source, "diff", "HEAD")


def _git(source: Path, *arguments: str) -> str:
    """Output of a git command; empty where git is not installed or refuses (a checkout without a commit)."""
    try:
        done = subprocess.run(["git", *arguments], cwd=source, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""
