"""A checkpoint with code in it: the commands that load it refuse it in one line, and the code does not run."""

import io
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, WORDS, finish

from ngpt.checkpoint_metadata import read_metadata
from ngpt.checkpoints import manifest

STEP = 3


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def poison_index(folder: Path, marker: Path) -> Path:
    """The true index, and a call around it."""
    file = folder / ".metadata"
    true = file.read_bytes()
    code = f"(__import__('pathlib').Path({str(marker)!r}).touch(), __import__('pickle').loads({true!r}))[1]"
    file.write_bytes(pickle.dumps(Call(eval, code)))
    return file


def poison_objects(folder: Path, marker: Path) -> Path:
    """The true index, whose objects lie where a call has been written."""
    buffer = io.BytesIO()
    torch.save(Call(os.system, f"touch {marker}"), buffer)
    metadata, shard = read_metadata(folder), folder / "__0_0.distcp"
    place = shard.stat().st_size
    shard.write_bytes(shard.read_bytes() + buffer.getvalue())
    for index, stored in metadata.storage_data.items():
        if type(metadata.state_dict_metadata[index.fqn]).__name__ == "BytesStorageMetadata":
            stored.relative_path, stored.offset, stored.length = shard.name, place, len(buffer.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return shard


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    finish(folder, f"train.stop_after={STEP}")
    return folder


@pytest.mark.parametrize("command", ["train", "sample"])
@pytest.mark.parametrize("poison", [poison_index, poison_objects])
def test_code_in_a_checkpoint_is_refused_and_not_run(trained, tmp_path, poison, command):
    run, marker = tmp_path / "run", tmp_path / "marker"
    shutil.copytree(trained, run)
    folder = run / "checkpoints" / f"iter_{STEP:07d}"
    file = poison(folder, marker)
    for name in (manifest.NAME, manifest.CONFIG_FILE):  # as one of an earlier version: whoever writes it can write hashes, too
        (folder / name).unlink()
    words = {"train": [*WORDS, f"run.dir={run}", "run.name=run"], "sample": [str(run), "--prompt", "a", "--tokens", "2"]}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", command, *words[command]], cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300, check=False,
    )  # fmt: skip
    assert not marker.exists()
    if command == "sample" and poison is poison_objects:  # it reads tensors alone
        assert done.returncode == 0, done.stdout
        return
    assert done.returncode == 2 and "Traceback" not in done.stdout, done.stdout
    assert [line for line in done.stdout.splitlines() if f"{file}: the file asks for" in line], done.stdout
