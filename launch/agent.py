"""Several workers on one machine: torch's elastic agent, with what `torchrun` cannot be told.

`python -m launch.agent PARENT PROCESSES RUN_DIR WORKER_ARGUMENT...`. Unlike `torchrun` it leaves the signals that mean "save and
leave" to the workers (it would end them 30 s later), ends with the launcher, and tells which worker died first, and of what.
"""

import os
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from ngpt.lifetime import end_with_parent
from ngpt.stopping import block_stop_signals

from .run_folder import record_death

RANK_ROLE = "rank"  # the agent writes [<role><local rank>]: before each line
FAILURE = 1


def main(arguments: Sequence[str]) -> int:
    """Runs the workers to their end.

    Returns:
        0, or the code of the worker that failed first; 128 + n where signal n ended it.
    """
    parent, processes, run_dir, *worker = arguments
    end_with_parent(int(parent))
    block_stop_signals()
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Only through files does the agent put each worker's name before its lines; what they hold is in the launcher's log.
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=int(processes),
            role=RANK_ROLE,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # a port that is free when it is bound
            local_addr="127.0.0.1",  # the workers would otherwise look for the machine by its name, which many cannot resolve
            max_restarts=0,  # a rank that fails ends the run: its checkpoint is where it goes on
            logs_specs=DefaultLogsSpecs(log_dir=folder, tee=Std.ALL),
            signals_to_handle="SIGQUIT",
        )
        try:
            elastic_launch(config, sys.executable)("-m", f"{__package__}.worker", str(os.getpid()), *worker)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            record_death(Path(run_dir), rank, failure.exitcode, failure.timestamp)
            return 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode or FAILURE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
