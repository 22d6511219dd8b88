"""A preparation killed anywhere and started again ends in the same bytes as one never interrupted."""

import json
import os
import shutil
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
from tests.unit.data.shards import assert_marks_were_taken_up, mark_finished

REPOSITORY = Path(__file__).parents[3]
BPE = TokenizerConfig(name="bpe", kind="bpe", vocab_size=270)
# Prepares into a folder for each point, and dies without any clean-up when the n-th file is about to appear under its name, or has
# appeared. One process imports what takes long; those that die are forked from it.
DIE_AT_REPLACE = """
import os, sys
from pathlib import Path
source, folder, *points = sys.argv[1:]
from ngpt.config.schema import TokenizerConfig
from ngpt.data.prepare import prepare
replace = os.replace
def dies(at, when):
    count = 0
    def dying(*arguments):
        nonlocal count
        count += 1
        if when == "after":
            replace(*arguments)
        if count == at:
            os._exit(9)
        if when == "before":
            replace(*arguments)
    return dying
for point in points:
    when, at = point.split(":")
    child = os.fork()
    if child == 0:
        os.replace = dies(int(at), when)
        bpe = TokenizerConfig(name="bpe", kind="bpe", vocab_size=270)
        prepare([Path(source)], Path(folder) / (when + at), bpe, workers=1, chunk_bytes=6000)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
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
    points = [("before", at) for at in range(1, last + 1)] + [("after", last), ("before", last + 1)]
    command = [sys.executable, "-c", DIE_AT_REPLACE, str(source), str(tmp_path), *(f"{when}:{at}" for when, at in points)]
    died = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert died.stdout.split() == ["9"] * (last + 1) + ["0"], died.stderr
    for when, at in points[:-1]:
        out = tmp_path / f"{when}{at}"
        assert (out / "manifest.json").exists() == (when == "after")
        assert prepare([source], out, BPE, workers=2 if at == 4 else 1, chunk_bytes=6000) == replace(whole, folder=out)
        assert files(out) == reference, (at, when)


def test_sigkill_with_workers_loses_no_finished_shard_and_leaves_no_process(source, tmp_path):
    """What was finished is taken up, also for other splits."""
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
    marked = shutil.copytree(out, tmp_path / "marked")
    marks = mark_finished(marked)
    prepare([source], marked, TokenizerConfig(name="bytes", kind="bytes"), Options(split="80,10,10"), workers=1, chunk_bytes=2000)
    assert_marks_were_taken_up(marked, tmp_path / "whole", marks)
    released.touch()
    resumed = subprocess.run(command, env=environment(), capture_output=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert files(out) == files(tmp_path / "whole")


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
