"""For all tests: what the workers of `make test` share, and that processes which tests start hear a hangup."""

import signal

import pytest

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves were started under nohup


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A worker takes a whole file; of the distributed tests, which run their cases once for all of them, the whole folder."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/distributed" if nodeid.startswith("tests/distributed/") else super()._split_scope(nodeid)

    return Scheduling(config, log)
