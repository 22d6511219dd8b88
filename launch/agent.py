"""Several workers on one machine: torch's elastic agent, with settings that `torchrun` does not offer.

`python -m launch.agent PARENT PROCESSES RUN_DIR WORKER_ARGUMENT...`. It leaves the signals that mean "save and leave" to the workers;
`torchrun` would kill them 30 s later. It ends when the launcher ends. It records which worker died first, and why.
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

RANK_ROLE = "rank"  # the agent prefixes each line with [<role><local rank>]:
FAILURE = 1


def main(arguments: Sequence[str]) -> int:
    """Runs the workers until they end.

    Returns:
        0, or the exit code of the worker that failed first; 128 + n if signal n ended it.
    """
    parent, processes, run_dir, *worker = arguments
    end_with_parent(int(parent))
    block_stop_signals()
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The agent prefixes lines with the worker's name only if it also logs to files. The launcher keeps a log of its own.
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=int(processes),
            role=RANK_ROLE,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # 0: any free port
            local_addr="127.0.0.1",  # otherwise the workers look up the machine's host name, which many machines cannot resolve
            max_restarts=0,  # a failed rank ends the run, which continues from its checkpoint
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
