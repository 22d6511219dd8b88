"""Which checkpoint is exported when. The exports are real processes that write a file and wait to be told how to end."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import hf_exports as module
from launch import train
from launch.hf_exports import SUPERSEDED, HfExports, check_exportable, weights_folder
from launch.hf_exports import hf_exports as open_exports
from ngpt.checkpoints.choice import folder_of
from ngpt.checkpoints.tracker import TRACKER_FILE
from ngpt.config.compose import compose
from ngpt.config.errors import ConfigError

SECONDS = 60  # a hang ends here; no statement about speed
# Writes the folder, says so, and waits for the file that tells how it ends.
EXPORT = """
import json, sys, time
from pathlib import Path
folder, request = Path(sys.argv[1]), json.loads(sys.argv[2])
partial = Path(request["run"]) / "checkpoints" / f"iter_{request['step']:07d}" / "hf.partial"
partial.mkdir()
(partial / "model").touch()
(folder / f"started{request['step']}").write_text(sys.argv[2])
end = folder / f"end{request['step']}"
while not end.exists():
    time.sleep(0.01)
code = int(end.read_text())
if code == 0:
    partial.rename(partial.with_name("hf"))
print("more words\\nthe cause.\\n")
sys.exit(code)
"""

# A rank that publishes two checkpoints and leaves as a run's last one does, or after the first one as a signal asks.
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
folder, checkpoints, end = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def publish(step):
    own = checkpoints / f"iter_{step:07d}"
    own.mkdir(parents=True)
    for name, content in ((".metadata", "__0_0.distcp"), ("metadata.json", "{}"), ("__0_0.distcp", "x")):
        (own / name).write_text(content)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(step))
publish(10)
while not (folder / "started10").exists():
    time.sleep(0.01)
print("step 10", flush=True)
if "signal" in end:
    os.kill(os.getppid(), signal.SIGTERM)
    assert signal.sigwait([signal.SIGTERM])  # the launcher has passed it on
if end != "signalled":
    publish(50)
outcome = {"status": end.split()[0], "step": 10, "signal": "SIGTERM", "saved": True}
(checkpoints.parent / "outcome.json").write_text(json.dumps(outcome))
"""


class Run:
    """A run folder whose checkpoints the test publishes."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.said = folder, []
        words = ["experiment=ngpt_tiny", f"run.dir={folder / 'run'}", "train.steps=50", "checkpoint.hf=true"]
        self.config = compose(words)
        self.checkpoints = Path(self.config.checkpoint.dir)
        monkeypatch.setattr(module, "export_command", self.command)

    def command(self, request: module.Request) -> list[str]:
        return [sys.executable, "-S", "-c", EXPORT, str(self.folder), json.dumps(vars(request))]

    def publish(self, step: int) -> Path:
        """The folder where its weights are to be."""
        checkpoint = folder_of(self.checkpoints, step)
        checkpoint.mkdir(parents=True)
        (self.checkpoints / TRACKER_FILE).write_text(str(step))
        return weights_folder(checkpoint)

    def exports(self) -> HfExports:
        return HfExports(self.config, self.said.append)

    def ends(self, step: int, code: int = 0) -> None:
        """The export of a step ends so, now or when it is started."""
        path = self.folder / f"end{step}"
        path.with_suffix(".new").write_text(str(code))
        path.with_suffix(".new").rename(path)

    def started(self, step: int) -> dict | None:
        path = self.folder / f"started{step}"
        return json.loads(path.read_text()) if path.exists() and path.stat().st_size else None

    def train(self, end: str, monkeypatch: pytest.MonkeyPatch) -> int:
        """The exit code of `ngpt train` with a stand-in for its rank."""
        worker = [sys.executable, "-S", "-c", WORKER, str(self.folder), str(self.checkpoints), end]
        monkeypatch.setattr(train, "worker_command", lambda *_: worker)
        return train.train_config(self.config, ["ngpt", "train"])

    def until(self, exports: HfExports, happened) -> None:
        """Looks again and again, as the launcher does."""
        deadline = time.monotonic() + SECONDS
        while not happened():
            exports.look()
            assert time.monotonic() < deadline, self.said
            time.sleep(0.01)


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    return Run(tmp_path, monkeypatch)


def test_each_checkpoint_is_exported_and_the_last_one_when_the_ranks_have_left(run):
    with open_exports(run.config, run.said.append) as exports:
        exports.look()
        for step in (10, 20):
            out = run.publish(step)
            run.ends(step)
            run.until(exports, out.exists)
        last = run.publish(50)
        run.ends(50)
        run.until(exports, lambda: exports.running is None)
        exports.look()
        assert run.said == [] and run.started(50) is None
        exports.finish([])
    assert last.exists()
    assert run.said == ["writing the Hugging Face weights of step 50", f"Hugging Face weights of step 50: {last}"]
    asked = {step: run.started(step) for step in (10, 20, 50)}
    assert all(request["run"] == run.config.run.dir and not request["check"] for request in asked.values())
    assert [request["beside"] for request in asked.values()] == [True, True, False]


def test_one_runs_at_a_time_and_the_newest_replaces_the_one_that_waits(run):
    exports = run.exports()
    first = run.publish(10)
    run.until(exports, lambda: run.started(10))
    replaced = run.publish(20)
    exports.look()
    newest = run.publish(30)
    exports.look()
    assert run.started(20) is None and run.started(30) is None
    for step in (10, 20, 30):
        run.ends(step)
    run.until(exports, newest.exists)
    exports.end()
    assert first.exists() and not replaced.exists() and run.started(20) is None
    by_hand = f"By hand: ngpt export {run.config.run.dir} --step 20 --out {replaced}"
    assert run.said == [f"note: no Hugging Face weights of step 20: those of step 30 are newer. {by_hand}"]


def test_a_failed_one_is_one_line_with_its_cause_and_the_next_follows(run):
    exports = run.exports()
    for step, code in ((10, 1), (20, SUPERSEDED), (30, 0)):
        out = run.publish(step)
        run.ends(step, code)
        run.until(exports, lambda step=step: run.started(step) and exports.running is None)
        assert out.exists() == (code == 0) and not (code == 1 and out.with_name("hf.partial").exists())
    by_hand = f"By hand: ngpt export {run.config.run.dir} --step 10 --out {weights_folder(folder_of(run.checkpoints, 10))}"
    assert run.said == [
        f"note: no Hugging Face weights of step 10: the cause. {by_hand}",
        "note: no Hugging Face weights of step 20: its checkpoint was removed or replaced meanwhile",
    ]


def test_one_that_is_killed_or_cannot_be_started_is_told_as_well(run, monkeypatch):
    exports = run.exports()
    out = run.publish(10)
    run.until(exports, lambda: run.started(10))
    exports.running.process.kill()
    run.until(exports, lambda: run.said)
    assert "ended by SIGKILL" in run.said.pop() and not out.with_name("hf.partial").exists()
    monkeypatch.setattr(module, "export_command", lambda request: ["/no/such/program"])
    run.publish(20)
    run.until(exports, lambda: run.said)
    assert "no Hugging Face weights of step 20: [Errno 2]" in run.said[0] and exports.running is None


def test_a_file_system_that_does_not_answer_ends_no_run(run, monkeypatch):
    def stale(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")

    exports = run.exports()
    run.publish(10)
    with monkeypatch.context() as broken:
        broken.setattr(os, "stat", stale)
        exports.look()
    assert "Stale file handle" in run.said[0] and len(run.said) == 1 and exports.running is None


def test_a_signal_ends_it_at_once_and_leaves_nothing_half_written(run):
    exports = run.exports()
    out = run.publish(10)
    run.until(exports, lambda: run.started(10))
    process = exports.running.process
    run.publish(20)
    exports.look(leaving=True)
    assert process.poll() == -signal.SIGKILL and list(out.parent.iterdir()) == []
    exports.look(leaving=True)
    assert exports.running is None and run.started(20) is None and run.said == []


def test_an_error_of_the_launcher_ends_it_too(run):
    out = run.publish(10)
    with pytest.raises(RuntimeError), open_exports(run.config, run.said.append) as exports:
        run.until(exports, lambda: run.started(10))
        process = exports.running.process
        raise RuntimeError
    assert process.poll() == -signal.SIGKILL and list(out.parent.iterdir()) == []


def test_a_signal_while_the_end_waits_ends_the_waiting(run):
    exports, before = run.exports(), signal.getsignal(signal.SIGTERM)
    out = run.publish(50)

    def terminate():
        while run.started(50) is None:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    exports.finish([])
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before and list(out.parent.iterdir()) == []
    assert run.said[-1] == "note: no Hugging Face weights of step 50: ended by SIGTERM. The same command writes them"


def test_the_next_launch_repeats_what_was_cut_short_and_reads_the_checkpoint_through_first(run):
    whole, out = run.publish(10), run.publish(20)
    whole.mkdir()
    out.with_name("hf.partial").mkdir()
    (out.with_name("hf.partial") / "left").touch()
    exports = run.exports()
    run.ends(20)
    run.until(exports, out.exists)
    assert run.started(20)["check"] and run.started(10) is None
    assert [path.name for path in out.iterdir()] == ["model"]
    again = run.exports()
    again.look()
    again.finish([])
    assert again.running is None and run.said == [f"Hugging Face weights of step 20: {out}"]


def test_nothing_happens_without_the_key_or_without_a_checkpoint(run):
    exports = run.exports()
    exports.look()
    exports.finish([])
    run.config.checkpoint.hf = False
    out = run.publish(10)
    out.with_name("hf.partial").mkdir()
    without = run.exports()
    without.look()
    without.finish([])
    assert run.started(10) is None and run.said == [] and out.with_name("hf.partial").exists()


def test_it_ends_with_the_launcher_and_hears_no_signal_itself(run):
    """A launcher that is killed can end nothing; and signals to all processes of a job are for the ranks."""
    code = (
        "import json, subprocess, sys, time; from launch import hf_exports as module\n"
        "from ngpt.config.compose import compose; from ngpt.lifetime import end_with_parent\n"
        f"config = compose(['experiment=ngpt_tiny', 'run.dir={run.config.run.dir}', 'train.steps=50', 'checkpoint.hf=true'])\n"
        "child = 'import os, sys, time; from ngpt.lifetime import end_with_parent; end_with_parent(int(sys.argv[1]));'\n"
        "child += 'print(os.getpid(), flush=True); time.sleep(600)'\n"
        "module.export_command = lambda request: [sys.executable, '-c', child, str(module.os.getpid())]\n"
        "exports = module.HfExports(config, print); exports.look(); print(exports.running.process.pid, flush=True); time.sleep(600)\n"
    )
    run.publish(10)
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        child = int(launcher.stdout.readline())
        log = Path(run.config.run.dir) / module.LOG_FILE
        while not log.read_text():  # it is under way
            time.sleep(0.01)
        status = dict(line.split(":", 1) for line in Path(f"/proc/{child}/status").read_text().splitlines())
        assert int(status["SigBlk"], 16) >> (signal.SIGTERM - 1) & 1 and os.getsid(child) == child
    finally:
        launcher.kill()
        launcher.wait()
    deadline = time.monotonic() + SECONDS
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_tokenizer_that_does_not_go_along_is_refused_before_the_start(tmp_path):
    words = ["experiment=ngpt_tiny", f"run.dir={tmp_path / 'run'}", "checkpoint.hf=true"]
    check_exportable(compose(words))
    gone = [*words, "tokenizer=huggingface", f"tokenizer.path={tmp_path / 'gone.json'}", "tokenizer.vocab_size=256"]
    with pytest.raises(ConfigError, match="^checkpoint.hf: True.*gone.json.*ngpt export --no-tokenizer$") as refusal:
        check_exportable(compose(gone))
    assert "\n" not in str(refusal.value)
    check_exportable(compose([*gone, "checkpoint.hf=false"]))


def test_a_run_ends_well_though_an_export_fails_and_the_same_command_writes_what_is_missing(run, monkeypatch, capfd):
    run.ends(10, 1)
    run.ends(50)
    assert run.train("finished", monkeypatch) == 0
    out = weights_folder(folder_of(run.checkpoints, 50))
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 3, told
    assert told[0].startswith("note: no Hugging Face weights of step 10: the cause. By hand: ngpt export ")
    assert told[1:] == ["writing the Hugging Face weights of step 50", f"Hugging Face weights of step 50: {out}"] and out.exists()
    assert all(line in (run.folder / "run" / "console.log").read_text().splitlines() for line in told)
    shutil.rmtree(out)
    assert run.train("is not started", monkeypatch) == 0
    shown = capfd.readouterr()
    assert "nothing to train" in shown.out and shown.err.splitlines() == told[1:] and out.exists() and run.started(50)["check"]


def test_a_run_that_a_signal_ends_waits_for_no_export(run, monkeypatch, capfd):
    assert run.train("signalled", monkeypatch) == 75
    assert capfd.readouterr().err == "ngpt train ended by SIGTERM after step 10, which is saved; the same command goes on\n"
    names = {path.name for path in folder_of(run.checkpoints, 10).iterdir()}
    assert names == {".metadata", "metadata.json", "__0_0.distcp"}


def test_a_run_that_ends_well_after_a_signal_waits_for_no_export_either(run, monkeypatch, capfd):
    run.ends(50)
    assert run.train("finished after a signal", monkeypatch) == 0
    told = "note: no Hugging Face weights of step 50: ended by SIGTERM. The same command writes them\n"
    assert capfd.readouterr().err == told and run.started(50) is None
