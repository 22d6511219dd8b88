"""Whether the trunk of a branch is finished, asked when the branch's job starts: `python -m launch.slurm.trunk TRUNK BRANCH`.

The job waits for the end of the trunk's, however that ends, since a dependency on its success would leave a job that never starts.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from ..study_shared import is_done
from .after import USER_ERROR, log


def main(arguments: Sequence[str]) -> int:
    """Returns 0, or the code of a mistake that a restart would repeat. Then the branch's log says why."""
    trunk, branch = map(Path, arguments)
    if is_done(trunk, trunk=True):
        return 0
    log(branch, f"not started: its trunk {trunk} is not finished; ngpt study --slurm submits what is missing")
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
