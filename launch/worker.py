"""One worker process: `python -m launch.worker PARENT train CONFIG | eval REQUEST FILE | export REQUEST | importing REQUEST`.

Started by `ngpt`, not by hand. PARENT is the id of the process that starts the worker, which ends when the parent ends. Imports at the
top stay cheap: an asynchronous checkpoint save spawns a process that imports this file again.
"""

import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ngpt.config.compose import load
from ngpt.config.errors import ConfigError
from ngpt.lifetime import end_with_parent
from ngpt.rollbacks import RefusedStep, RolledBack
from ngpt.stopping import StopRequest

from .environment import own_world
from .outcome import SIGNALLED, SIGNALLED_CODE, Outcome, record_outcome
from .run_folder import join_locks, record_failure

USER_ERROR = 2
FAILURE = 1


def install_compat() -> None:
    """Patches upstream where needed, and makes Megatron run without CUDA if there is none. Call it before any import of Megatron."""
    import torch

    # At import, Megatron warns about every optional package that is missing; the run header says what is used.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    # From Megatron's use of torch's checkpoint library: loading in one process is intended, and the argument order is upstream's.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled|The argument order of load")
    warnings.filterwarnings("ignore", message="Please use DTensor instead")

    from megatron_ext import compat

    compat.install(cpu=not torch.cuda.is_available())


def train(config_path: Path) -> int:
    """Trains the run of a resolved config as one rank of the world that the environment describes.

    Returns:
        0 if it finished, or left with its newest step saved, as recorded in the run folder (launch/outcome.py).
    """
    config, rank = load(config_path), own_world().rank
    run_dir = Path(config.run.dir)

    def leave(number: signal.Signals) -> None:
        """Leaves at once: before training starts there is nothing to save, and the main thread may wait for ranks that never come."""
        try:
            record_outcome(run_dir, Outcome(SIGNALLED, signal=number.name))
        finally:
            os._exit(SIGNALLED_CODE)

    request = StopRequest(leave)
    request.listen()

    def body() -> None:
        install_compat()
        from megatron_ext.training import run

        gc.freeze()  # exempts the 340,000 objects of imported modules from garbage collection: saves 0.2 to 0.4 s per full collection
        session = run.train(config, rank, on_built=[lambda chunks: join_locks(config)], stop_request=request)
        if rank == 0:
            saves = config.checkpoint.save_at_end or config.checkpoint.interval is not None
            name = request.signal.name if request.signal else None
            with suppress(OSError):  # a full disk does not harm what is already saved
                record_outcome(run_dir, Outcome(session.status, session.step, name, saves))
        run.leave(session)

    return _report_errors(body, lambda error: record_failure(run_dir, rank, error, time.time()))


def task(name: str, request: str) -> int:
    """Runs the part of a command that needs Megatron.

    Args:
        name: a module of `megatron_ext.training` with `main` and the class of its argument, `Request`.
        request: the argument as JSON.
    """

    def body() -> None:
        install_compat()
        module = importlib.import_module(f"megatron_ext.training.{name}")
        module.main(module.Request(**json.loads(request)))

    return _report_errors(body)


def evaluate(request: str, results_file: str) -> int:
    """Takes part in `ngpt eval`.

    Args:
        request: an `ngpt.evaluation.run.Request` as JSON. results_file: where the results are written as JSON.
    """

    world = own_world()

    def body() -> None:
        from ngpt.evaluation.run import Request

        from .eval import evaluate

        evaluate(Request(**json.loads(request)), world, Path(results_file))

    return _report_errors(body, tells=world.rank == 0)


def _report_errors(body: Callable[[], None], record: Callable[[BaseException], None] = lambda error: None, tells: bool = True) -> int:
    """Runs `body`. A user's error is printed as one line, any other as a traceback.

    Args:
        body: What to run.
        record: Records the failure for the launcher to summarise.
        tells: Whether this rank reports user errors, which all ranks meet.

    Returns:
        The exit code.
    """
    try:
        body()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's checkpoint errors are not subclasses of Exception
        expected = isinstance(error, ConfigError)
        decided = expected or isinstance(error, RolledBack | RefusedStep)
        if tells or not expected:
            print(error if decided else traceback.format_exc(), file=sys.stderr)
        record(error)
        return USER_ERROR if expected else FAILURE
    return 0


def main(arguments: Sequence[str]) -> int:
    """Runs one mode; the launcher has checked the arguments."""
    parent, mode, *rest = arguments
    end_with_parent(int(parent))
    if mode == "train":
        return train(Path(rest[0]))
    return evaluate(*rest) if mode == "eval" else task(mode, rest[0])


if __name__ == "__mp_main__":  # spawned by an asynchronous save; it unpickles Megatron's classes next
    install_compat()

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
