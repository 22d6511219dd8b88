"""Asynchronous saves are written by a process that works without CUDA and does not outlive its trainer."""

import re
import signal

import psutil

_SAVE = """
    from pathlib import Path

    def stage():
        import torch
        torch.cuda.synchronize()
        return torch.cuda.get_device_name()

    def main():
        from megatron_ext.compat import async_worker, cuda_on_cpu
        cuda_on_cpu.install()
        async_worker.install()
        import torch
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest, PersistentAsyncCaller
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        queue = AsyncCallsQueue(persistent=True)
        queue.warmup_persistent_caller(0, mp_mode="forkserver")
        finalised = []
        request = AsyncRequest(Path.write_text, (Path("written"), None, None), [lambda: finalised.append(True)], preload_fn=stage)
        queue.schedule_async_request(request)
        queue.maybe_finalize_async_calls(blocking=True)
        # END
        queue.close()
        print(Path("written").read_text(), finalised)

    if __name__ == "__main__":
        main()
"""

_KILL = """
        import os, signal
        print("worker", PersistentAsyncCaller._persistent_process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""

_FILE = "core/dist_checkpointing/strategies/async_utils.py"


def test_upstream_worker_still_divides_by_the_device_count_in_a_process_started_by_name(upstream_source):
    assert "torch.cuda.set_device(rank % torch.cuda.device_count())" in upstream_source(_FILE, "PersistentAsyncCaller.async_loop")
    assert "target=PersistentAsyncCaller.async_loop" in upstream_source(_FILE, "PersistentAsyncCaller._get_process")


def test_upstream_worker_still_waits_for_requests_alone(upstream_source):
    assert "item = queue.get()" in upstream_source(_FILE, "PersistentAsyncCaller.async_loop")


def test_the_worker_writes_what_the_trainer_schedules(run_script):
    assert run_script(_SAVE).splitlines()[-1] == "cpu [True]"


def test_the_worker_ends_with_a_killed_trainer(run_script):
    said = run_script(_SAVE.replace("        # END\n", _KILL), returncode=-signal.SIGKILL)
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
