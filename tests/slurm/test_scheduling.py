"""What a job does when SLURM or a person ends it: the script and the decisions are those of `ngpt launch`, the ranks are stand-ins."""

import subprocess

import pytest

from launch.slurm import scheduler
from launch.status import status
from launch.stop import stop

pytestmark = pytest.mark.usefixtures("tracking")


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def is_back(node: str) -> bool:
    """Asks for a node that was set down; the controller refuses where it has come back by itself."""
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], capture_output=True, check=False)
    return "State=DOWN" not in slurm("scontrol", "--oneliner", "show", "node", node)


def test_a_job_that_finishes_ends_with_0_and_does_not_come_back(submit_stand_in):
    run = submit_stand_in(steps=3)
    run.ended()
    assert run.step() == 3 and len(run.starts()) == 1
    assert run.exit_code() == 0 and "finished" in run.log()


def test_a_job_out_of_time_saves_before_its_end_and_continues(submit_stand_in):
    run = submit_stand_in('cluster.time_limit="1"')
    run.started(2)
    first, second = run.starts()[:2]
    assert 0 < second["step"] and first["step"] == 0 and second["restarts"] == 1
    assert "ended by SIGTERM after step" in run.log()
    stop(run.folder)
    run.ended()


def test_a_job_whose_save_outlasts_its_time_comes_back(submit_stand_in):
    run = submit_stand_in('cluster.time_limit="1"', save_s=1000, save_every=1)
    run.started(1)
    slurm("scancel", "--batch", "--signal=TERM", run.job)  # not the end of the time, which must still be heard
    run.started(2)
    assert "the time was over before the run had left; starts again" in run.log()
    assert run.starts()[1]["step"] > 0
    scheduler.cancel(run.job)
    run.ended()


@pytest.mark.parametrize("partition", ["patient", "hasty", "cancelling"])
def test_a_preempted_job_comes_back_once_and_continues(submit_stand_in, partition):
    run = submit_stand_in(f"cluster.partition={partition}", 'cluster.sbatch=["--exclusive"]', save_every=1)
    run.started(1)
    run.until(lambda: run.step() > 1, "a checkpoint")
    slurm("srun", "--partition=urgent", "--nodes=2", "--exclusive", "true")
    run.started(2)
    assert run.starts()[1] == {"step": run.starts()[1]["step"], "restarts": 1, "task": None}
    assert run.starts()[1]["step"] > 1
    scheduler.cancel(run.job)
    run.ended()


@pytest.mark.parametrize("when", ["running", "waiting"])
def test_a_cancelled_job_never_comes_back(submit_stand_in, when):
    run = submit_stand_in()
    run.started(1)
    if when == "waiting":
        assert scheduler.signal_tasks(run.job) is None
        run.until(lambda: "PENDING" in run.waiting_or_running(), "the wait for the next start")
    assert scheduler.cancel(run.job) is None
    run.ended()
    run.until(lambda: scheduler.job_state(run.job).state == "CANCELLED", "CANCELLED")
    assert len(run.starts()) == 1
    assert ("starts again" in run.log()) == (when == "waiting")


def test_ngpt_stop_saves_and_the_job_does_not_come_back(submit_stand_in):
    run = submit_stand_in()
    run.started(1)
    assert status(run.folder)["state"] == "running"
    assert "save and leave" in stop(run.folder)
    run.ended()
    assert run.step() > 0 and len(run.starts()) == 1 and run.exit_code() == 75
    found = status(run.folder)
    assert found["state"] == "signalled" and found["stop_requested"] and "`ngpt stop`" in found["job_log"]
    # Not even where SLURM starts it once more by itself.
    slurm("scontrol", "requeue", run.job)
    run.ended()
    assert len(run.starts()) == 1 and run.exit_code() == 0


def test_a_lost_node_costs_a_restart_that_slurm_makes(submit_stand_in):
    run = submit_stand_in(save_every=1)
    run.started(1)
    run.until(lambda: run.step() > 1, "a checkpoint")
    slurm("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    try:
        run.until(lambda: "RUNNING" not in run.waiting_or_running(), "the end of the first start")
    finally:
        run.until(lambda: is_back("n2"), "the node's return")
    run.started(2)
    assert run.starts()[1]["step"] > 1 and run.starts()[1]["restarts"] == 1
    scheduler.cancel(run.job)
    run.ended()


def test_a_job_that_crashes_without_progress_stops_after_the_limit(submit_stand_in):
    run = submit_stand_in("cluster.max_restarts=1", fail_after=2)
    run.ended()
    assert [start["restarts"] for start in run.starts()] == [0, 1]
    assert "rank 1: RuntimeError: as asked; not started again: 1 restarts in a row without a newer checkpoint" in run.log()
    assert run.exit_code() not in (0, 2, 75)
    assert status(run.folder)["failure"] == "rank 1: RuntimeError: as asked"


def test_progress_between_crashes_allows_further_restarts(submit_stand_in):
    run = submit_stand_in("cluster.max_restarts=1", fail_after=4, save_every=3)
    run.started(3)
    assert [start["step"] for start in run.starts()[:3]] == [0, 3, 6]
    scheduler.cancel(run.job)
    run.ended()


def test_a_mistake_of_the_users_is_not_repeated(submit_stand_in):
    run = submit_stand_in(fail_after=1, failure="ConfigError")
    run.ended()
    assert len(run.starts()) == 1 and run.exit_code() == 2 and "a restart would repeat it" in run.log()


def test_a_task_of_an_array_comes_back_alone(submit_stand_in):
    run = submit_stand_in('cluster.sbatch=["--array=0-1%1"]')
    run.started(1)
    first = f"{run.job}_0"
    assert scheduler.signal_tasks(first) is None
    run.until(lambda: len(run.starts()) >= 2, "the next start")
    second = f"{run.job}_1"
    run.until(lambda: scheduler.job_state(first).restarts == 1, "the first task's restart")
    assert scheduler.job_state(second).restarts == 0
    assert not scheduler.cancel(run.job)
    run.ended()
