"""`ngpt doctor`: what this machine has, what works on it, and whether it computes the right numbers.

Whatever may crash or hang runs in child processes (launch/doctor_worker.py). Each kind runs on its own, since a GPU may admit only one
process.
"""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ngpt.config.compose import compose
from ngpt.findings import ABSENT, FAILED, OK, UNAVAILABLE, Finding

from .devices import driver_version, gpu_names
from .environment import worker_environment, worker_variables
from .extras import is_installed
from .provenance import versions
from .world import single_world

WORKER = f"{__package__}.doctor_worker"
IMPORT_SECONDS, NUMBERS_SECONDS, REDUCTION_SECONDS = 120, 600, 240
MAX_RANKS = 8
CPU_RANKS = 2
TINY_RUN = "ngpt train experiment=ngpt_tiny precision=nvfp4_paper run.name=doctor"
MENDING = "mend what FAILED, then ngpt doctor again"


@dataclass(frozen=True)
class Package:
    """A distribution to check.

    Attributes:
        distribution: its name. module: the module to import. installed: the module whose presence shows that it is installed (finding a
            module imports its parents). needed: whether every run needs it. on_gpu: whether its import needs a GPU. extra: the extra of
            setup.py that installs it.
    """

    distribution: str
    module: str
    installed: str
    needed: bool = False
    on_gpu: bool = False
    extra: str | None = None


PACKAGES = (
    Package("torch", "torch", "torch", needed=True),
    Package("megatron-core", "megatron.core", "megatron.core", needed=True),
    Package("triton", "triton", "triton"),
    Package("transformer-engine", "transformer_engine.pytorch", "transformer_engine", on_gpu=True, extra="gpu"),
    Package("mamba-ssm", "mamba_ssm", "mamba_ssm", on_gpu=True, extra="gpu"),
    Package("causal-conv1d", "causal_conv1d", "causal_conv1d", on_gpu=True, extra="gpu"),
    Package("mistral-common", "mistral_common", "mistral_common", extra="tekken"),
    Package("s3fs", "s3fs", "s3fs", extra="s3"),
    Package("gcsfs", "gcsfs", "gcsfs", extra="gs"),
    Package("aiohttp", "aiohttp", "aiohttp", extra="http"),
    Package("lm-eval", "lm_eval", "lm_eval", extra="eval"),
    Package("wandb", "wandb", "wandb", extra="wandb"),
)


@dataclass(frozen=True)
class Report:
    """What was found. `machine` holds figures, the other three a line for each thing checked."""

    machine: dict[str, Any]
    packages: list[Finding]
    numbers: list[Finding]
    formats: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether everything works that should work here."""
        return not any(finding.status == FAILED for finding in (*self.packages, *self.numbers, *self.formats))

    @property
    def next(self) -> str:
        """What to run next."""
        return TINY_RUN if self.ok else MENDING

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps({"ok": self.ok, **asdict(self), "next": self.next}, indent=2)

    def to_text(self) -> str:
        """The report for people."""
        lines = ["Machine", *(f"  {name:<18}{_shown(value)}" for name, value in self.machine.items())]
        for title, findings in (("Packages", self.packages), ("Numbers", self.numbers), ("Formats", self.formats)):
            width = max((len(_name(finding)) for finding in findings), default=0) + 2
            lines += ["", title, *(f"  {finding.status:<13}{_name(finding):<{width}}{finding.figure}".rstrip() for finding in findings)]
        verdict = "All that should work here works." if self.ok else "Something that should work here does not."
        return "\n".join([*lines, "", f"{verdict} Next: {self.next}"])


def print_report(as_json: bool) -> int:
    """Checks this machine and prints the report: as one JSON object, or for people.

    Returns:
        0 if everything works that should work here, else 1.
    """
    print("Probing this machine ...", file=sys.stderr)
    report = examine()
    print(report.to_json() if as_json else report.to_text())
    return 0 if report.ok else 1


def examine() -> Report:
    """Checks everything; takes about 20 seconds on a CPU."""
    report = Report(describe_machine(), check_packages(), [], [])
    if report.packages[0].status == OK:  # torch: nothing computes without it
        run_numbers(report)
        report.numbers.append(check_all_reduce())
    return report


def describe_machine() -> dict[str, Any]:
    """Figures that are known without torch."""
    return {
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "CPU cores": len(os.sched_getaffinity(0)),
        "NVIDIA driver": driver_version(),
    }


def check_packages() -> list[Finding]:
    """Version of each package, and whether it imports. Each is imported in its own process."""
    names = [package.distribution for package in PACKAGES]
    found, environment = versions(names), worker_environment(_variables(1), None)
    with ThreadPoolExecutor(len(PACKAGES)) as pool:
        return list(pool.map(lambda package: _check_package(package, found[package.distribution], environment), PACKAGES))


def _check_package(package: Package, version: str | None, environment: Mapping[str, str]) -> Finding:
    if version is None and not is_installed(package.installed):
        if package.needed:
            return Finding(package.distribution, "", FAILED, "not installed, and every run needs it")
        return Finding(package.distribution, "", ABSENT, f"pip install 'ngpt-megatron[{package.extra}]'" if package.extra else "")
    version = version or "of unknown version"
    if package.on_gpu and not gpu_names():
        return Finding(package.distribution, version, UNAVAILABLE, "not imported: no GPU here")
    problem = run_child([sys.executable, "-c", f"import {package.module}"], environment, IMPORT_SECONDS)
    return Finding(package.distribution, version, FAILED if problem else OK, f"does not import: {problem}" if problem else "")


def run_numbers(report: Report) -> None:
    """Adds to the report what the probes of this device find."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "told")
        told.touch()
        command = [sys.executable, "-m", WORKER, "numbers", str(told)]
        problem = run_child(command, worker_environment(_variables(1), None), NUMBERS_SECONDS)
        lines = [json.loads(line) for line in told.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        for section, content in line.items():
            if section == "machine":
                report.machine.update(content)
            else:
                getattr(report, section).append(Finding(**content))
    if problem:
        report.numbers.append(Finding("probes", "run to their end", FAILED, problem))


def check_all_reduce() -> Finding:
    """An all-reduce over all GPUs of this host, one process each; on a CPU, over two processes."""
    gpus = len(gpu_names())
    ranks = min(gpus, MAX_RANKS) or CPU_RANKS
    variables, command = _variables(ranks), [sys.executable, "-m", WORKER, "all_reduce"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        alone = replace(single_world(), master_port=probe.getsockname()[1])
    worlds = [replace(alone, rank=rank, size=ranks, local_rank=rank, local_size=ranks) for rank in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        problems = list(pool.map(lambda world: run_child(command, worker_environment(variables, world), REDUCTION_SECONDS), worlds))
    told = "; ".join(f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem)
    what = f"{'NCCL' if gpus else 'gloo'}, {ranks} process{'es' if ranks > 1 else ''}"
    return Finding("all-reduce", what, FAILED if told else OK, told or "every sum exact")


def _variables(processes: int) -> dict[str, str]:
    """The environment variables that a run gives its workers."""
    return worker_variables(compose(["experiment=ngpt_tiny"]), processes, cuda=bool(gpu_names()))


def run_child(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> str | None:
    """Runs a process until it ends, for at most `seconds`.

    Returns:
        None, or why it failed: its last line on stderr, and the signal that ended it.
    """
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds} seconds"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    ended = f"ended by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"exit code {done.returncode}"
    return lines[-1] if lines and done.returncode > 0 else ", ".join([ended, *lines[-1:]])


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _name(finding: Finding) -> str:
    return f"{finding.subject}, {finding.what}" if finding.what else finding.subject
