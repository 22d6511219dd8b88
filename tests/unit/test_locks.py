"""A folder is free as soon as those that write it are gone."""

import os
import signal
import subprocess
import sys

from ngpt.locks import LOCK_FILE, holder

# A rank: it shares the lock of its launcher, and forks a loader of data that outlives it.
RANK = """
import os, sys, time
from pathlib import Path
from ngpt.locks import join_lock
join_lock(Path(sys.argv[1]))
pid = os.fork()
if pid == 0:
    print("ready", os.getpid(), flush=True)
    time.sleep(600)
time.sleep(600)
"""


def test_a_forked_loader_that_outlives_its_killed_rank_does_not_hold_the_folder(tmp_path):
    (tmp_path / LOCK_FILE).write_text("process 7 on elsewhere\n")
    with subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path)], stdout=subprocess.PIPE, text=True) as rank:
        loader = int(rank.stdout.readline().split()[1])
        try:
            assert holder(tmp_path) == {"pid": 7, "host": "elsewhere"}
            rank.kill()
            rank.wait()
            assert holder(tmp_path) is None
        finally:
            os.kill(loader, signal.SIGKILL)
