"""A preparation killed anywhere and started again ends in the same bytes as one never interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ngpt.config.errors import ConfigError
from ngpt.config.schema import TokenizerConfig
from ngpt.data.plan import Options, locked
from ngpt.data.prepare import prepare
from tests.unit.data.shards import saved_shards

REPOSITORY = Path(__file__).parents[3]
BPE = TokenizerConfig(name="bpe", kind="bpe", vocab_size=270)
# Dies without any clean-up when the n-th file is about to appear under its name, or has appeared.
DIE_AT_REPLACE = """
import os, sys
from pathlib import Path
source, out, at, when = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
from ngpt.config.schema import TokenizerConfig
from ngpt.data.prepare import prepare
replace, count = os.replace, 0
def dying(*arguments):
    global count
    count += 1
    if when == "after":
        replace(*arguments)
    if count == at:
        os._exit(9)
    if when == "before":
        replace(*arguments)
os.replace = dying
prepare([source], out, TokenizerConfig(name="bpe", kind="bpe", vocab_size=270), workers=1, chunk_bytes=6000)
"""
# The fourth shard waits for a file, so that this preparation never ends by itself before it is killed.
HELD_TWO_WORKERS = """
import sys, time
from pathlib import Path
from ngpt.config.schema import TokenizerConfig
from ngpt.data import encode
from ngpt.data.prepare import prepare
save = encode.save_shard
def held(path, shard):
    while len(list(path.parent.glob("*.npz"))) >= 3 and not Path(sys.argv[3]).exists():
        time.sleep(0.01)
    save(path, shard)
encode.save_shard = held
if __name__ == "__main__":
    prepare([sys.argv[1]], sys.argv[2], TokenizerConfig(name="bytes", kind="bytes"), workers=2, chunk_bytes=2000)
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"Line {i}. " + "abc abd " * (i % 29)}) + "\n" for i in range(200)))
    return path


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".checked")}


def environment():
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def test_killed_at_every_file_and_resumed(source, tmp_path, monkeypatch):
    replaced = []
    os_replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (replaced.append(paths), os_replace(*paths)))
    whole = prepare([source], tmp_path / "whole", BPE, workers=1, chunk_bytes=6000)
    reference, last = files(tmp_path / "whole"), len(replaced)
    assert last >= 2 + 3 + 6 + 2, "plan, tokenizer; shards; .bin and .idx of the splits; tokenizer, manifest"
    # Before each file appears; after the last one, the manifest, only the shards' removal is left.
    points = [(at, "before") for at in range(1, last + 1)] + [(last, "after")]
    for at, when in points:
        out = tmp_path / f"{when}{at}"
        command = [sys.executable, "-c", DIE_AT_REPLACE, str(source), str(out), str(at), when]
        killed = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert killed.returncode == 9, killed.stderr
        assert (out / "manifest.json").exists() == (when == "after")
        assert prepare([source], out, BPE, workers=2 if at == 4 else 1, chunk_bytes=6000) == replace(whole, folder=out)
        assert files(out) == reference, (at, when)
    command[-2] = str(last + 1)
    command[4] = str(tmp_path / "never")
    assert subprocess.run(command, env=environment(), capture_output=True, check=False).returncode == 0


def test_sigkill_with_workers_loses_no_finished_shard_and_leaves_no_process(source, tmp_path):
    prepare([source], tmp_path / "whole", TokenizerConfig(name="bytes", kind="bytes"), workers=1)
    script, out, released = tmp_path / "held.py", tmp_path / "out", tmp_path / "released"
    script.write_text(HELD_TWO_WORKERS)
    command = [sys.executable, str(script), str(source), str(out), str(released)]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(out.glob(".prepare/*.npz"))) >= 3)
    children = children_of(process.pid)
    assert len(children) >= 2
    with pytest.raises(ConfigError, match="--out: .*is being prepared there by another process"), locked(out):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(is_alive(child) for child in children))
    shards = {path: path.stat().st_mtime_ns for path in out.glob(".prepare/*.npz")}
    with pytest.raises(ConfigError, match=r"unfinished preparation: options.text_key: 'text' -> 'body'"):
        prepare([source], out, TokenizerConfig(name="bytes", kind="bytes"), Options(text_key="body"), workers=1, chunk_bytes=2000)
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    released.touch()
    resumed = subprocess.run(command, env=environment(), capture_output=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert files(out) == files(tmp_path / "whole")


def test_finished_shards_are_not_made_again(source, tmp_path, monkeypatch):
    first = saved_shards(monkeypatch, interrupted_after=4)
    bytes_tokenizer = TokenizerConfig(name="bytes", kind="bytes")
    with pytest.raises(KeyboardInterrupt):
        prepare([source], tmp_path / "out", bytes_tokenizer, workers=1, chunk_bytes=2000)
    then = saved_shards(monkeypatch)
    prepare([source], tmp_path / "out", bytes_tokenizer, Options(split="80,10,10"), workers=1, chunk_bytes=2000)
    made = first + then
    assert len(made) == len(set(made)) > len(first) == 4


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
