import json
import math
import os
import subprocess
import sys

import pytest

from ngpt.analysis import metrics
from ngpt.config.errors import ConfigError


def write(path, steps):
    with metrics.MetricsWriter(path) as writer:
        for step in steps:
            writer.write({"step": step, "train_loss": 1 / step})


def steps_of(path):
    return [record["step"] for record in metrics.read(path)]


def test_each_record_can_be_read_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    writer = metrics.MetricsWriter(path)
    for step in (1, 2):
        writer.write({"step": step, "mfu": None})
        assert metrics.read(path)[-1] == {"step": step, "mfu": None}
    writer.close()


def test_non_finite_values_become_null_and_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics.MetricsWriter(path) as writer:
        writer.write({"step": 1, "train_loss": math.nan, "grad_norm": math.inf, "mfu": None, "val_loss": 2.0})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    nulls = {"train_loss": None, "grad_norm": None, "mfu": None}
    assert record == {"step": 1, "val_loss": 2.0, "nonfinite": ["train_loss", "grad_norm"]} | nulls


def test_scalars_of_array_libraries_are_written_as_numbers(tmp_path):
    numpy = pytest.importorskip("numpy")
    with metrics.MetricsWriter(tmp_path / "m") as writer:
        writer.write({"step": numpy.int64(3), "train_loss": numpy.float32(0.5), "grad_norm": numpy.float32("nan")})
    assert metrics.read(tmp_path / "m") == [{"step": 3, "train_loss": 0.5, "grad_norm": None, "nonfinite": ["grad_norm"]}]


def test_a_record_without_a_step_is_refused(tmp_path):
    with metrics.MetricsWriter(tmp_path / "m") as writer, pytest.raises(AssertionError, match="integer step"):
        writer.write({"tokens": 5})


def test_stopped_and_resumed_gives_the_bytes_of_a_run_never_stopped(tmp_path):
    write(tmp_path / "whole", range(1, 21))
    write(tmp_path / "resumed", range(1, 17))
    metrics.truncate_after(tmp_path / "resumed", 12)
    write(tmp_path / "resumed", range(13, 21))
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_kill_at_any_byte_leaves_a_file_that_reads_and_continues(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, (1, 2, 3))
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        finished = list(range(1, whole[:length].count(b"\n") + 1))
        assert steps_of(path) == finished
        write(path, (9,))
        assert steps_of(path) == [*finished, 9]

        path.write_bytes(whole[:length])
        metrics.truncate_after(path, 2)
        assert steps_of(path) == finished[:2]
        assert not path.read_bytes() or path.read_bytes().endswith(b"\n")


def test_truncation_can_empty_a_file_and_ignores_one_that_is_missing(tmp_path):
    write(tmp_path / "m", (1, 2))
    metrics.truncate_after(tmp_path / "m", -1)
    assert metrics.read(tmp_path / "m") == []
    metrics.truncate_after(tmp_path / "missing", 3)
    assert not (tmp_path / "missing").exists()


def test_a_kill_during_truncation_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write(path, (1, 2, 3))
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        metrics.truncate_after(path, 1)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damaged", [b"{broken", b"[1, 2]", b'{"tokens": 4}', b"\xff\xfe", b""])
def test_a_damaged_line_is_named_and_never_skipped(tmp_path, damaged):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n')
    for action in (metrics.read, lambda path: metrics.truncate_after(path, 1)):
        with pytest.raises(ConfigError, match="metrics.jsonl:2: .*integer step.*Delete the line"):
            action(path)


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        metrics.read(tmp_path / "metrics.jsonl")


def test_importing_metrics_and_the_command_imports_no_heavy_library():
    code = "import sys, ngpt.analysis.metrics, launch.commands.report; print(sorted({'torch', 'matplotlib', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("line", ['{"step": true}', '{"step": 1e3}', '{"step": -1}', '{"step": 1, "nonfinite": 5}', "[" * 100_000, "7"])
def test_a_line_of_another_type_is_refused_by_its_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(ConfigError, match="metrics.jsonl:2"):
        metrics.read(path)
