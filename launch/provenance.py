"""Where a run comes from: the state of the code, the versions, the device and the command. Names neither a host nor a user."""

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ngpt
from ngpt.shell import in_shell

from .devices import gpu_names

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
MAX_DIFF_BYTES = 4 << 20  # most that is kept of the difference between a launch's code and the commit
MAX_FILE_BYTES = 1 << 18  # most that is kept of an untracked file
SOURCE_SUFFIXES = frozenset({".py", ".yaml", ".yml", ".toml", ".cfg", ".sh", ".sbatch", ".md", ".cpp", ".cu", ".h", ".j2", ".txt"})
COMMIT_FILE = Path("ngpt/commit.json")  # in an installed package; written by setup.py
SOURCE = Path(ngpt.__file__).resolve().parents[1]  # a checkout, or site-packages


def describe_launch(command: Sequence[str], variables: dict[str, str]) -> tuple[dict[str, Any], str]:
    """What `environment.json` holds, and the difference between the code and its commit (empty if there is none).

    Args:
        command: The command line as given.
        variables: Environment variables of the workers worth recording.
    """
    git, diff = git_state(SOURCE)
    description = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": in_shell(*command),
        "git": git,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpus": list(gpu_names()),
        "versions": versions(),
        "environment": variables,
    }
    return description, diff


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Installed version of each package, None if it is absent."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_state(source: Path) -> tuple[dict[str, Any] | None, str]:
    """Commit, branch, whether the tree differs, and the difference itself.

    If `source` is not a checkout: the commit it was built from, as setup.py recorded it, or (None, "").

    The difference ends with a patch that adds the untracked source files. At most `MAX_DIFF_BYTES` are kept in all.
    """
    if not (source / ".git").exists():
        return _recorded_commit(source), ""
    status = _git(source, "status", "--porcelain").splitlines()
    untracked = _git(source, "ls-files", "--others", "--exclude-standard", "-z").split("\0")[:-1]
    state = {
        "commit": _git(source, "rev-parse", "--verify", "--quiet", "HEAD").strip() or None,
        "branch": _git(source, "branch", "--show-current").strip() or None,
        "dirty": bool(status),
        "untracked": [line[3:] for line in status if line.startswith("??")],
    }
    # Otherwise the user's git config could change the format, or run another program.
    difference = _git(source, "diff", "--no-ext-diff", "--no-color", "--no-textconv", "HEAD", limit=MAX_DIFF_BYTES)
    return state, "".join(_bounded([difference, *(_as_patch(source, name) for name in untracked)]))


def _recorded_commit(source: Path) -> dict[str, Any] | None:
    try:
        known = json.loads((source / COMMIT_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(known, dict):
        return None
    return {"commit": known.get("commit"), "branch": None, "dirty": known.get("dirty"), "untracked": [], "installed": True}


def _as_patch(source: Path, name: str) -> str:
    """An untracked source file as a patch that adds it; a one-line note if it is too large or not text; "" for other files."""
    path = source / name
    if path.suffix not in SOURCE_SUFFIXES or path.is_symlink() or not path.is_file():
        return ""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        return f"# untracked: {name}, {size} bytes, left out\n"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        return f"# untracked: {name}, no readable text, left out\n"
    end = "" if not lines[-1] else "\n\\ No newline at end of file"
    lines = lines if lines[-1] else lines[:-1]
    header = f"diff --git a/{name} b/{name}\nnew file mode 100644\n"
    if not lines:
        return header
    return header + f"--- /dev/null\n+++ b/{name}\n@@ -0,0 +1,{len(lines)} @@\n" + "\n".join(f"+{line}" for line in lines) + end + "\n"


def _bounded(parts: Iterable[str]) -> Iterator[str]:
    room = MAX_DIFF_BYTES
    for part in parts:
        if len(part) > room:
            yield part[:room] + f"\n# cut off here: more than {MAX_DIFF_BYTES} characters\n"
            return
        room -= len(part)
        yield part


def _git(source: Path, *arguments: str, limit: int = -1) -> str:
    """Output of a git command, at most its first `limit` bytes; empty if git is missing or refuses (no commit yet)."""
    try:
        with subprocess.Popen(["git", *arguments], cwd=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            output = process.stdout.read(limit + 1 if limit >= 0 else -1)
            cut = 0 <= limit < len(output)
            if cut:
                process.kill()
    except OSError:
        return ""
    return output.decode("utf-8", errors="replace") if cut or process.returncode == 0 else ""
