"""A file is whole or not there, and a full disk is told with its path and a way out."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli
from ngpt.data.files import atomic_write


def test_a_failure_leaves_neither_the_file_nor_its_beginning(tmp_path):
    with pytest.raises(ValueError), atomic_write(tmp_path / "a") as stream:
        stream.write(b"x")
        raise ValueError
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_disk_names_the_file(tmp_path):
    with pytest.raises(OSError) as failure, atomic_write(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert failure.value.filename == str(tmp_path / "a") and failure.value.errno == errno.ENOSPC


def test_prepare_on_a_full_disk_names_path_and_way_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.txt").write_text("hello\n" * 100)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ngpt.files.os.fsync", full)
    assert cli.main(["data", "prepare", str(tmp_path / "x.txt"), "--out", str(tmp_path / "out"), "--split", "1,0,0", "--workers", "1"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / 'out'}" in line and "No space left on device" in line and "the same command continues" in line
    assert not list(tmp_path.rglob("*.partial"))


def test_a_full_disk_without_a_path_is_one_line(tmp_path):
    """The one that takes what is printed has none."""
    (tmp_path / "x.txt").write_text("hello\n" * 100)
    command = [sys.executable, "-u", "-c", "import sys; from launch import cli; sys.exit(cli.main(sys.argv[1:]))"]
    words = ["data", "prepare", "x.txt", "--out", "out", "--split", "1,0,0", "--workers", "1"]
    with open("/dev/full", "wb") as full:
        options = {"stdout": full, "stderr": subprocess.PIPE, "cwd": tmp_path, "env": environment()}
        done = subprocess.run([*command, *words], text=True, check=False, **options)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("A disk: No space left on device. Make room there")
    assert cli.main(["data", "inspect", str(tmp_path / "out"), "--deep"]) == 0  # what was finished is kept


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}


def test_prepare_on_a_small_disk(tmp_path):
    """A disk of 1 MiB, where the machine lets a test mount one; with room, the same command ends well."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        (tmp_path / "x.txt").write_text("hello world\n" * 100_000)
        words = ["data", "prepare", str(tmp_path / "x.txt"), "--out", str(disk / "out"), "--split", "1,0,0", "--workers", "1"]
        assert cli.main(words) == 2
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        assert cli.main(words) == 0
    finally:
        subprocess.run(["umount", str(disk)], check=False)
