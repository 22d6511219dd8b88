"""Asynchronous saves are written by a process that works without CUDA, survives signals, does not outlive its trainer, and is missed."""

import multiprocessing
import queue
import re
import signal
from types import SimpleNamespace

import psutil
import pytest

from megatron_ext.compat import async_worker, results_queue

_FILE = "core/dist_checkpointing/strategies/async_utils.py"

_SAVE = """
    import os, signal
    from argparse import Namespace
    from pathlib import Path

    def stage():
        import torch
        torch.cuda.synchronize()
        return torch.cuda.get_device_name()

    def write(path, staged, results):
        Path(path).write_text(staged)
        results.put({0: ["x" * 1_000_000]})  # more than a pipe holds

    def main():
        from megatron_ext.compat import async_worker, cuda_on_cpu, results_queue
        cuda_on_cpu.install()
        async_worker.install()
        results_queue.install()
        import torch
        from megatron.core.dist_checkpointing.strategies import filesystem_async
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest, PersistentAsyncCaller
        from megatron.training import global_vars
        global_vars._GLOBAL_ARGS = Namespace(save=".")
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        queue = AsyncCallsQueue(persistent=True)
        queue.warmup_persistent_caller(0, mp_mode="forkserver")
        worker = PersistentAsyncCaller._persistent_process
        # START
        finalised = []
        results = filesystem_async.get_write_results_queue()
        request = AsyncRequest(write, ("written", None, results), [lambda: finalised.append(True)], preload_fn=stage)
        queue.schedule_async_request(request)
        queue.maybe_finalize_async_calls(blocking=True)
        print(Path("written").read_text(), finalised, len(results.get_nowait()[0][0]), flush=True)
        queue.close()
        assert worker.exitcode == 0, worker.exitcode
        # END

    if __name__ == "__main__":
        main()
"""

_SIGNALS = """
        for number in async_worker.STOP_SIGNALS:
            os.kill(worker.pid, number)
"""

_DEATH = """
        queue.warmup_persistent_caller(0)  # a second worker, killed while it starts
        worker = PersistentAsyncCaller._persistent_process
        os.kill(worker.pid, signal.SIGKILL)
        Path("latest_checkpointed_iteration.txt").write_text("8")
        worker.join()
        queue.maybe_finalize_async_calls(blocking=False)
"""

_KILL = """
        import os, signal
        print("worker", worker.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_upstream_worker_still_divides_by_the_device_count_in_a_process_started_by_name(upstream_source):
    assert "torch.cuda.set_device(rank % torch.cuda.device_count())" in upstream_source(_FILE, "PersistentAsyncCaller.async_loop")
    assert "target=PersistentAsyncCaller.async_loop" in upstream_source(_FILE, "PersistentAsyncCaller._get_process")


def test_upstream_still_waits_for_the_worker_without_looking_whether_it_lives(upstream_source):
    assert "item = queue.get()" in upstream_source(_FILE, "PersistentAsyncCaller.async_loop")
    assert "self._persistent_comp_q.get_nowait()" in upstream_source(_FILE, "PersistentAsyncCaller.is_current_async_call_done")
    assert "self._persistent_preload_q.join()" in upstream_source(_FILE, "PersistentAsyncCaller.schedule_async_call")
    for name in ("is_current_async_call_done", "schedule_async_call", "close"):
        assert "is_alive()" not in upstream_source(_FILE, f"PersistentAsyncCaller.{name}")


def test_the_worker_ends_with_a_killed_trainer(run_script):
    said = run_script(_SAVE.replace("        # START\n", _KILL), returncode=-signal.SIGKILL)
    worker = int(re.search(r"worker (\d+)", said)[1])
    try:
        left_behind = psutil.Process(worker)
    except psutil.NoSuchProcess:
        return
    try:
        left_behind.wait(timeout=60)
    finally:
        if left_behind.is_running():
            left_behind.kill()


def test_the_worker_writes_and_closes_after_every_signal_of_a_job_and_a_killed_one_ends_its_trainer_with_the_reason(run_script):
    script = _SAVE.replace("        # START\n", _SIGNALS).replace("        # END\n", _DEATH)
    words = "checkpoint writer of rank 0 died (signal 9, SIGKILL); the newest checkpoint is that of step 8"
    said = run_script(script.replace("        main()\n", f"""
        from megatron_ext.compat.async_worker import CheckpointWriterDied
        try:
            main()
        except CheckpointWriterDied as error:
            assert str(error) == "{words}", error
            raise SystemExit(3)
"""), returncode=3)  # fmt: skip
    assert "cpu [True] 1000000" in said.splitlines()


class Process:
    """A worker that has ended, or lives."""

    def __init__(self, exitcode: int | None):
        self.exitcode = exitcode

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self, timeout: float) -> None: ...


@pytest.fixture
def channel(monkeypatch):
    """A queue of the worker's answers, the end of the worker, and the trainer's end for a process of a given exit code."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    monkeypatch.setattr(filesystem_async, "_results_queue", results_queue.ResultsQueue())
    monkeypatch.setattr(async_worker, "_newest_checkpoint", lambda: "")
    channels = []

    def make(exitcode: int | None) -> SimpleNamespace:
        answers = multiprocessing.get_context("spawn").Queue()
        workers_end = answers._writer
        answers._writer = SimpleNamespace(close=lambda: None)  # the trainer's copy of it
        watched = async_worker._Completed(answers, async_worker._Watch(Process(exitcode), 0))
        channels.append(workers_end)

        def answer(item: object) -> None:
            answers._sem.acquire()
            workers_end.send(item)

        results = filesystem_async._results_queue
        return SimpleNamespace(answer=answer, workers_end=workers_end, get_nowait=watched.get_nowait, results=results)

    yield make
    for end in channels:
        end.close()


def test_waiting_for_a_living_worker_goes_on(channel):
    with pytest.raises(queue.Empty):
        channel(exitcode=None).get_nowait()


@pytest.mark.parametrize(("exitcode", "how"), [(-9, "signal 9, SIGKILL"), (7, "exit code 7")])
def test_waiting_for_a_dead_worker_ends_with_how_it_died(channel, exitcode, how):
    with pytest.raises(async_worker.CheckpointWriterDied, match=how):
        channel(exitcode).get_nowait()


def test_what_a_dead_worker_completed_counts(channel):
    dead = channel(exitcode=-9)
    dead.answer({0: ["result"]})
    dead.answer(5)
    assert dead.get_nowait() == 5
    assert dead.results.get_nowait() == {0: ["result"]}
    with pytest.raises(async_worker.CheckpointWriterDied):
        dead.get_nowait()


def test_an_answer_cut_short_by_the_death_is_no_answer(channel):
    dying = channel(exitcode=None)
    dying.workers_end._send((1000).to_bytes(4, "big") + b"beginning")
    dying.workers_end.close()
    with pytest.raises(async_worker.CheckpointWriterDied):
        dying.get_nowait()


def test_waiting_until_tensors_are_staged_ends_with_the_worker():
    requests = multiprocessing.get_context("spawn").JoinableQueue()
    watched = async_worker._Requests(requests, async_worker._Watch(Process(exitcode=None), 0))
    watched.join()  # nothing to wait for
    watched.put("request")
    watched.watch.process.exitcode = -9
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_worker, "_newest_checkpoint", lambda: "")
        with pytest.raises(async_worker.CheckpointWriterDied):
            watched.join()
