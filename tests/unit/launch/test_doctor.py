"""`ngpt doctor`: what is broken, missing or unavailable ends in the right line and exit code, never in a traceback."""

import importlib.metadata
import json
import os
from dataclasses import asdict
from importlib.metadata import distribution
from pathlib import Path

import pytest

from launch import cli, doctor
from launch.doctor import PACKAGES, Package, Report
from ngpt.config import config_dir
from ngpt.findings import ABSENT, FAILED, OK, UNAVAILABLE, Finding, attempt

NVFP4_RECIPES = sorted(path.stem for path in (config_dir() / "precision").glob("nvfp4_*.yaml"))
ROOT = Path(__file__).resolve().parents[3]
BROKEN_WORKER = """
import sys, torch
from launch import doctor_worker
from megatron_ext.precision import linear, probe
quantize, emulate = probe.quantize_packed, linear.emulate
def wrong_code(x, spec, **options):
    row, column = quantize(x, spec, **options)
    row.codes[0, 0] ^= 1
    return row, column
def zeros(x, spec, **options):
    row, column = emulate(x, spec, **options)
    for operand in (row, column):
        operand.values.zero_()
    return row, column
probe.quantize_packed, linear.emulate, probe.M, probe.K, probe.N = wrong_code, zeros, 64, 64, 128
torch.distributed.all_reduce = lambda total: None
print("noise of a library")
sys.exit(doctor_worker.main(sys.argv[1:]))
"""
CRASHING_WORKER = """
import json, os, signal, sys
print(json.dumps({"machine": {"NCCL": "9.9"}}), file=open(sys.argv[2], "a"), flush=True)
print(json.dumps({"numbers": {"subject": "a", "what": "b", "status": "ok", "figure": "c"}}), file=open(sys.argv[2], "a"), flush=True)
print("Fatal: kernel panic", file=sys.stderr, flush=True)
os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    """Writes modules that the child processes find."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)

    return write


@pytest.fixture
def gpus(monkeypatch):
    def pretend(*names: str) -> None:
        monkeypatch.setattr(doctor, "gpu_names", lambda: names)

    return pretend


def report(*findings: Finding) -> Report:
    return Report({"Python": "3.12"}, list(findings), [], [])


def checked(monkeypatch, *packages: Package) -> list[Finding]:
    monkeypatch.setattr(doctor, "PACKAGES", packages)
    monkeypatch.setattr(doctor, "versions", lambda names: dict.fromkeys(names, None))
    return doctor.check_packages()


def test_what_is_absent_unavailable_or_sound_passes_and_what_failed_does_not(monkeypatch, capsys):
    fine = [Finding("x", "", status, "") for status in (OK, ABSENT, UNAVAILABLE)]
    for findings, code in ((fine, 0), ([*fine, Finding("x", "", FAILED, "why")], 1)):
        monkeypatch.setattr(doctor, "examine", lambda findings=findings: report(*findings))
        assert cli.main(["doctor"]) == code
        assert cli.main(["doctor", "--json"]) == code
    for section in ("packages", "numbers", "formats"):
        assert not Report(**{"machine": {}, "packages": [], "numbers": [], "formats": []} | {section: [Finding("", "", FAILED, "")]}).ok
    capsys.readouterr()


def test_json_is_one_object_with_every_finding(monkeypatch, capsys):
    findings = [Finding("torch", "2.11", OK, ""), Finding("triton", "", FAILED, "does not import: no libc")]
    monkeypatch.setattr(doctor, "examine", lambda: report(*findings))
    assert cli.main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "ok": False,
        "machine": {"Python": "3.12"},
        "packages": [asdict(finding) for finding in findings],
        "numbers": [],
        "formats": [],
        "next": doctor.MENDING,
    }


def test_the_report_for_people_has_a_line_for_each_finding():
    lines = report(Finding("torch", "2.11", OK, ""), Finding("nvfp4", "quantise", FAILED, "differ: input")).to_text().splitlines()
    assert "  ok           torch, 2.11" in lines
    assert "  FAILED       nvfp4, quantise  differ: input" in lines
    assert lines[-1] == f"Something that should work here does not. Next: {doctor.MENDING}"
    assert report().to_text().endswith(f"All that should work here works. Next: {doctor.TINY_RUN}")


def test_the_command_suggested_at_the_end_composes():
    from ngpt.config.compose import compose

    assert doctor.TINY_RUN.startswith("ngpt train ")
    assert compose(doctor.TINY_RUN.split()[2:]).precision.format == "nvfp4"


def test_optional_packages_may_be_absent_and_needed_ones_may_not(monkeypatch):
    optional, needed = Package("no-such", "no_such.inner", "no_such.inner"), Package("none", "none_such", "none_such", needed=True)
    found = checked(monkeypatch, optional, needed)
    assert [(finding.subject, finding.status) for finding in found] == [("no-such", ABSENT), ("none", FAILED)]


def test_without_torch_nothing_is_probed(monkeypatch):
    monkeypatch.setattr(doctor, "check_packages", lambda: [Finding("torch", "", FAILED, "not installed"), Finding("triton", "3", OK, "")])
    monkeypatch.setattr(doctor, "run_child", None)
    told = doctor.examine()
    assert (told.ok, told.numbers, told.formats) == (False, [], [])


def test_a_package_that_does_not_import_gives_its_reason(monkeypatch, on_path, gpus):
    gpus("NVIDIA H100")
    on_path("torn", "def f():\n    raise ImportError('libtorn.so: undefined symbol: _Z3foo')\nf()\n")
    on_path("crash", "import os, signal, sys\nprint('abort called', file=sys.stderr)\nos.kill(os.getpid(), signal.SIGABRT)\n")
    on_path("sound", "")
    found = checked(monkeypatch, *(Package(name, name, name, on_gpu=True) for name in ("torn", "crash", "sound")))
    assert [(finding.status, finding.figure) for finding in found] == [
        (FAILED, "does not import: ImportError: libtorn.so: undefined symbol: _Z3foo"),
        (FAILED, "does not import: ended by SIGABRT, abort called"),
        (OK, ""),
    ]


def test_packages_for_gpus_are_not_imported_without_one(monkeypatch, on_path, gpus):
    gpus()
    on_path("torn", "raise ImportError('no libcuda')")
    (found,) = checked(monkeypatch, Package("torn", "torn", "torn", on_gpu=True))
    assert (found.status, found.figure) == (UNAVAILABLE, "not imported: no GPU here")


def test_an_import_that_hangs_is_ended(monkeypatch, on_path):
    on_path("endless", "import time\ntime.sleep(60)\n")
    monkeypatch.setattr(doctor, "IMPORT_SECONDS", 0.5)
    (found,) = checked(monkeypatch, Package("endless", "endless", "endless"))
    assert (found.status, found.figure) == (FAILED, "does not import: not done after 0.5 seconds")


def test_versions_come_from_what_is_installed():
    names = {package.distribution for package in PACKAGES}
    assert names >= {"torch", "triton", "megatron-core", "transformer-engine", "mamba-ssm", "causal-conv1d"}
    assert doctor.versions(["torch", "no-such"]) == {"torch": importlib.metadata.version("torch"), "no-such": None}


def test_what_an_extra_brings_is_looked_at_and_told_with_it(monkeypatch, tmp_path):
    extras = distribution("ngpt-megatron").metadata.get_all("Provides-Extra")
    assert {package.extra for package in PACKAGES if package.extra} <= set(extras)
    (tmp_path / "wandb").mkdir()  # as its client leaves behind
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = checked(monkeypatch, Package("wandb", "wandb.none", "wandb.none", extra="wandb"))
    assert (found.status, found.figure) == (ABSENT, "pip install 'ngpt-megatron[wandb]'")


def test_probes_that_crash_keep_what_they_found_and_fail(monkeypatch, on_path):
    on_path("crashing_worker", CRASHING_WORKER)
    monkeypatch.setattr(doctor, "WORKER", "crashing_worker")
    told = report()
    doctor.run_numbers(told)
    assert told.machine["NCCL"] == "9.9"
    assert told.numbers == [
        Finding("a", "b", OK, "c"),
        Finding("probes", "run to their end", FAILED, "ended by SIGSEGV, Fatal: kernel panic"),
    ]


def test_an_exception_is_a_failed_finding():
    def raises(what: str) -> tuple[bool, str]:
        raise ValueError(f"\n{what} is odd\nand long")

    assert attempt("s", "w", raises, "it") == Finding("s", "w", FAILED, "ValueError: it is odd")


def run_doctor(monkeypatch, capsys) -> tuple[int, dict]:
    monkeypatch.setattr(doctor, "check_packages", lambda: [Finding("torch", "2.11", OK, "")])
    code = cli.main(["doctor", "--json"])
    return code, json.loads(capsys.readouterr().out)


def status_of(told: dict) -> dict[str, str]:
    return {f"{finding['subject']}, {finding['what']}": finding["status"] for finding in told["numbers"] + told["formats"]}


def test_a_sound_machine_passes(monkeypatch, capsys):
    code, told = run_doctor(monkeypatch, capsys)
    assert code == 0
    statuses = status_of(told)
    assert FAILED not in statuses.values()
    assert {name for name, status in statuses.items() if status == OK} >= {
        "bf16, product",
        "nvfp4 emulated, gradients",
        "nvfp4 emulated in Megatron's modules, ",
        "nvfp4 emulated, chosen for precision.executor=auto",
        "all-reduce, gloo, 2 processes",
    }
    assert told["machine"]["CUDA of torch"]


def test_wrong_numbers_fail(monkeypatch, capsys, on_path):
    on_path("broken_worker", BROKEN_WORKER)
    monkeypatch.setattr(doctor, "WORKER", "broken_worker")
    code, told = run_doctor(monkeypatch, capsys)
    assert code == 1
    statuses = status_of(told)
    failed = {name for name, status in statuses.items() if status == FAILED}
    kinds = ("quantise", "stochastic rounding", "gradient rounding", "three products")
    probes = [f"{kind}, {recipe}" for kind in kinds for recipe in NVFP4_RECIPES if f"nvfp4 emulated, {kind}, {recipe}" in statuses]
    assert len(probes) == 3 * len(NVFP4_RECIPES)
    assert failed == {f"nvfp4 emulated, {what}" for what in [*probes, "gradients", "chosen for precision.executor=auto"]} | {
        "nvfp4 emulated in Megatron's modules, ",
        "all-reduce, gloo, 2 processes",
    }
    assert told["numbers"][-1]["figure"] == ("rank 0: 4,194,304 of 4,194,304 sums are wrong; rank 1: 4,190,208 of 4,194,304 sums are wrong")
