"""Injects a fault into the workers of a run: found on PYTHONPATH, told by NGPT_FAULT, {"kind": ..., "step": 3, "rank": 1, "seconds": 0.5}.

kind: nan (the loss) | slow_start | slow_step | slow_micro_batch (in the model) | slow_evaluation | slow_save (each fsync) | kill | exit |
memory | error | hang | clock (back an hour). All but the slow ones act once, in the forward pass of `step`. Without `rank` on every rank.
"""

import importlib.util
import json
import math
import os
import signal
import sys
import time


def _act(fault: dict) -> None:
    kind = fault["kind"]
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exit":
        os._exit(137)
    if kind == "memory":
        raise MemoryError("injected")
    if kind == "error":
        raise RuntimeError("injected")
    if kind == "hang":
        time.sleep(3600)
    if kind == "clock":
        true_time = time.time
        time.time = lambda: true_time() - 3600


def _patch(run: object, fault: dict) -> None:
    upstream, acted = run.Session.forward_step, []

    def forward_step(self, batches, model):
        step = run.get_args().curr_iteration + 1
        if fault["kind"] == ("slow_step" if model.training else "slow_evaluation"):
            print(f"injected: {fault['kind']}", file=sys.stderr, flush=True)
            time.sleep(fault["seconds"])
        if model.training and step == fault.get("step") and not acted:
            acted.append(step)
            _act(fault)
            if fault["kind"] == "nan":
                hook = model.register_forward_hook(lambda _model, _arguments, losses: (hook.remove(), losses * math.nan)[1])
        if fault["kind"] == "slow_micro_batch" and model.training and not acted:
            acted.append(step)
            model.register_forward_pre_hook(lambda *_: time.sleep(fault["seconds"]))
        return upstream(self, batches, model)

    run.Session.forward_step = forward_step


class _Finder:
    """Patches megatron_ext.training.run once it is imported."""

    def __init__(self, fault: dict):
        self.fault, self.busy = fault, False

    def find_spec(self, name, path=None, target=None):
        if name != "megatron_ext.training.run" or self.busy:
            return None
        self.busy = True
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            if self.fault["kind"] == "slow_start":
                time.sleep(self.fault["seconds"])
            execute(module)
            _patch(module, self.fault)

        spec.loader.exec_module = exec_module
        return spec


def _slow_fsync(seconds: float) -> None:
    fsync = os.fsync

    def slow(file) -> None:
        if "/iter_" in os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}"):
            time.sleep(seconds)
        fsync(file)

    os.fsync = slow


def install() -> None:
    text = os.environ.get("NGPT_FAULT")
    if not text:
        return
    fault = json.loads(text)
    if fault.get("rank") is not None and os.environ.get("RANK") != str(fault["rank"]):
        return
    if fault["kind"] == "slow_save":
        _slow_fsync(fault["seconds"])
    else:
        sys.meta_path.insert(0, _Finder(fault))


install()
