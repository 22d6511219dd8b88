"""Runs every training case once a session, one launch per world size, and hands the tests what the runs wrote."""

import cases
import hybrid_cases
import mtp_cases
import pytest
from results import Results


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> Results:
    """All cases, run in the order of world sizes: larger worlds start from checkpoints of smaller ones."""
    root = tmp_path_factory.mktemp("distributed")
    names = ("ONE_PROCESS", "TWO_PROCESSES", "FOUR_PROCESSES")
    one, two, four = ([case for module in (cases, hybrid_cases, mtp_cases) for case in getattr(module, name, [])] for name in names)
    found = Results(root)
    for processes, group in ((1, one), (2, two), (4, four)):
        found.run(group, processes)
    return found
