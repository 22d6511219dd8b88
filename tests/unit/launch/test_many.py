"""Many commands side by side: order, dependencies, failures, signals, GPUs. The commands are small Python programs."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from launch import environment, many
from launch.environment import member_environment, visible_gpus
from launch.many import Member, check_per_gpu, run_members
from ngpt.config.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
# Runs its command, a line of Python, in the folder that the test is about.
PROGRAM = (sys.executable, "-c", "import os, signal, sys, time; from pathlib import Path; exec(sys.argv[2])")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(many, "POLL_SECONDS", 0.01)
    return tmp_path


def member(name: str, code: str, after: tuple[str, ...] = (), gpus: int = 0, is_done=lambda: False) -> Member:
    return Member(name, Path(name), (code,), gpus, is_done, after)


def run(*members: Member, parallel: int = 1, report=lambda states: None, per_gpu: int = 1) -> dict[str, tuple]:
    states = run_members(members, parallel, report, PROGRAM, per_gpu)
    assert [state.member for state in states] == list(members)
    return {state.member.name: (state.status, state.exit_code) for state in states}


SAY = "open('order', 'a').write(sys.argv[2][-1])"


def test_they_run_in_order_and_a_failure_stops_none_but_those_behind_it():
    assert run(
        member("d", f"{SAY} #d", after=("b",)),  # blocked, and so is what comes after it
        member("e", f"{SAY} #e", after=("d",)),
        member("a", f"{SAY} #a"),
        member("b", f"{SAY}; print('no'); sys.exit('the reason') #b"),
        member("f", f"{SAY} #f", after=("a", "done")),
        member("c", f"{SAY} #c"),
        member("done", "sys.exit(9)", is_done=lambda: True),
        member("killed", "os.kill(os.getpid(), 9)"),
    ) == {
        "a": ("done", 0),
        "b": ("failed", 1),
        "c": ("done", 0),
        "d": ("blocked", None),
        "e": ("blocked", None),
        "f": ("done", 0),
        "done": ("done", None),
        "killed": ("failed", 137),
    }  # fmt: skip
    assert Path("order").read_text() == "abcf"


def test_a_member_that_ends_without_error_and_has_not_done_its_work_has_failed_where_it_says_so():
    def leaves_file(name: str, code: str) -> Member:
        return Member(name, Path(name), (code,), 0, Path(f"made_{name}").exists, undone="It made no file")

    members = [leaves_file("a", "Path('made_a').touch()"), leaves_file("b", ""), member("c", "")]
    states = run_members(members, 1, lambda states: None, PROGRAM)
    assert [(state.status, state.exit_code, state.why) for state in states] == [
        ("done", 0, ""),
        ("failed", 0, "It made no file"),
        ("done", 0, ""),
    ]


def test_a_failure_is_told_by_the_last_line_of_its_own_output_which_is_kept():
    Path("a").mkdir()
    Path("a/console.log").write_text("of an earlier start\n")
    failed, silent = run_members([member("a", "print('1'); sys.exit('2\\n')"), member("b", "sys.exit(3)")], 2, lambda states: None, PROGRAM)
    assert (failed.why, silent.why) == ("2", "ended with exit code 3")
    assert Path("a/console.log").read_text() == "of an earlier start\n1\n2\n\n"


def test_a_member_that_leaves_as_if_a_signal_had_asked_is_stopped_and_not_failed():
    assert run(member("a", "sys.exit(75)"), member("b", ""), member("c", "", after=("a",))) == {
        "a": ("stopped", 75),
        "b": ("done", 0),
        "c": ("blocked", None),
    }


MEET = "Path(sys.argv[2][-1]).touch()\nwhile not Path({!r}).exists(): time.sleep(0.01)\n#{}"


def test_as_many_run_side_by_side_as_is_asked():
    """Two of them wait for each other; a third would be seen beside them."""
    seen = []

    def report(states):
        seen.append(sum(state.status == "running" for state in states))

    done = run(member("p", MEET.format("y", "x")), member("q", MEET.format("x", "y")), member("r", ""), parallel=2, report=report)
    assert set(done.values()) == {("done", 0)} and max(seen) == 2


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(environment, "gpu_names", lambda: ("a GPU",) * 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 5,GPU-6,7,-1,8")


def test_members_that_run_at_a_time_have_gpus_of_their_own(four_gpus):
    """Each leaves what it sees, and stays until the others are there."""
    code = "Path(os.environ['CUDA_VISIBLE_DEVICES']).touch()\nwhile sum(1 for _ in Path('.').glob('*[0-9]')) < 2: time.sleep(0.01)"
    done = run(*(member(name, code, gpus=2) for name in "abc"), parallel=9)
    assert set(done.values()) == {("done", 0)}
    assert {path.name for path in Path(".").glob("*[0-9]")} == {"4,5", "GPU-6,7"}


def test_several_members_share_a_gpu_and_each_gets_the_one_with_the_fewest(four_gpus, monkeypatch):
    """All stay until six are there: the last two wait for room, on which GPU cannot be known."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    monkeypatch.setattr(environment, "gpu_names", lambda: ("a GPU",) * 3)
    code = (
        "Path(os.environ['CUDA_VISIBLE_DEVICES'] + '_' + os.environ['NGPT_PER_GPU'] + '_' + sys.argv[2][-1]).touch()\n"
        "while sum(1 for _ in Path('.').glob('[456]_*')) < 6: time.sleep(0.01)\n#{}"
    )
    most: dict[str, int] = {}

    def report(states):
        for gpu in "456":
            most[gpu] = max(most.get(gpu, 0), sum(state.gpus == (gpu,) for state in states if state.status == "running"))

    members = [member(name, code.format(name), gpus=1) for name in "abcdefgh"]
    assert set(run(*members, parallel=9, report=report, per_gpu=2).values()) == {("done", 0)}
    first_six = {path.name for name in "abcdef" for path in Path(".").glob(f"?_2_{name}")}
    assert first_six == {"4_2_a", "5_2_b", "6_2_c", "4_2_d", "5_2_e", "6_2_f"}
    assert most == {"4": 2, "5": 2, "6": 2} and len(list(Path(".").glob("[456]_*"))) == 8


@pytest.mark.parametrize(
    ("per_gpu", "parallel", "most", "told"),
    [
        (0, 2, 1, "--per-gpu: 0. Members that share a GPU are 1 or more"),
        (2, 2, 2, "one needs 2 .cluster.gpus_per_node."),
        (2, 1, 1, "No more than 1 run at a time .--parallel.. Set --parallel 8"),
    ],
)
def test_members_that_cannot_share_a_gpu_end_in_one_line(monkeypatch, per_gpu, parallel, most, told):
    monkeypatch.setattr(many, "gpu_names", lambda: ("a GPU",) * 4)
    with pytest.raises(ConfigError, match=told):
        check_per_gpu(per_gpu, parallel, most)
    check_per_gpu(2, 2, 1)
    check_per_gpu(1, 1, 2)
    monkeypatch.setattr(many, "gpu_names", lambda: ())
    check_per_gpu(1, 4, 8)
    with pytest.raises(ConfigError, match="--per-gpu: 2. No GPU is visible here"):
        check_per_gpu(2, 2, 1)


def test_gpus_are_named_as_the_user_names_them_and_hidden_from_who_needs_none(four_gpus, monkeypatch):
    assert visible_gpus() == ("4", "5", "GPU-6", "7")
    assert visible_gpus({}) == ("0", "1", "2", "3")
    assert member_environment([], 1)["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setattr(environment, "gpu_names", lambda: ())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == () and "CUDA_VISIBLE_DEVICES" not in member_environment([], 1)


def test_more_gpus_than_there_are_end_before_anything_starts(four_gpus):
    with pytest.raises(ConfigError, match="It needs 5 GPUs, and 4 are visible"):
        run(member("a", SAY), member("b", "", gpus=5))
    assert not Path("order").exists()


def test_members_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(12))
    threads = {number: environment._threads(2, {"NGPT_SIDE_BY_SIDE": number}) for number in ("", "1", "3", "50")}
    assert threads == {"": "6", "1": "6", "3": "2", "50": "1"}


SAVES = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('ready', flush=True); time.sleep(600)"


def when_ready(*names: str, then) -> None:
    """Acts from another thread once members have printed `ready`."""

    def wait():
        while not all(Path(name, "console.log").exists() and "ready" in Path(name, "console.log").read_text() for name in names):
            time.sleep(0.01)
        then()

    threading.Thread(target=wait, daemon=True).start()


def test_a_signal_reaches_all_that_run_and_nothing_new_starts():
    when_ready("a", "b", then=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(member("a", SAVES), member("b", SAVES), member("c", SAY), parallel=2) == {
        "a": ("stopped", 75),
        "b": ("stopped", 75),
        "c": ("waiting", None),
    }


def test_a_second_ctrl_c_kills_what_does_not_leave(monkeypatch):
    monkeypatch.setattr(many, "KILL_SECONDS", 0.1)
    stubborn = "signal.signal(signal.SIGINT, lambda *_: print('heard', flush=True)); print('ready', flush=True)\nwhile True: time.sleep(1)"

    def interrupt_twice():
        os.kill(os.getpid(), signal.SIGINT)
        while "heard" not in Path("a/console.log").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    when_ready("a", then=interrupt_twice)
    assert run(member("a", stubborn)) == {"a": ("stopped", 137)}


def test_members_end_with_a_runner_that_is_killed(workplace):
    """The real program in front of the command, which asks the kernel for that: here `ngpt` is one that sleeps."""
    code = (
        "from pathlib import Path; from launch.many import *\n"
        "run_members([Member('a', Path('a'), (), 0, lambda: False)], 1, lambda states: None)\n"
    )
    (workplace / "sitecustomize.py").write_text(
        "import sys, types; fake = types.ModuleType('launch.cli'); sys.modules['launch.cli'] = fake\n"
        "def main(words):\n    import os, time; print(os.getpid(), flush=True); time.sleep(600)\n"
        "fake.main = main\n"
    )
    path = os.pathsep.join([str(workplace), str(ROOT)])
    runner = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    log = Path("a/console.log")
    while not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.01)
    runner.kill()
    runner.wait()
    process = int(log.read_text())
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)


def test_a_place_that_cannot_be_written_fails_its_member_alone():
    Path("a").touch()
    states = run_members([member("a", ""), member("b", "")], 1, lambda states: None, PROGRAM)
    assert [state.status for state in states] == ["failed", "done"] and "a" in states[0].why
