"""A tracker's client that dies, hangs or finds no server costs figures there, and neither the run's end nor its code."""

import signal
import socket
from collections.abc import Iterator

import pytest

from ngpt.trackers.weights_and_biases import own_run_id
from tests.unit.trackers.wandb_launches import launch, launches, needs_client

pytestmark = needs_client
GIVEN_UP = "note: Weights & Biases takes no more figures"
ONLINE = "logging.wandb.mode=online"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_client_that_dies_is_started_again_and_knows_all_figures(tmp_path, number):
    """A scheduler's signal reaches its process, too."""
    assert launch(tmp_path, "signalled", 1, 3, number=number) == ""
    last = launches(tmp_path / "run")[-1]
    assert [row["step"] for row in last.history] == [1, 2, 3]
    assert (last.run.run_id, last.preempting, last.exit_code) == (own_run_id(tmp_path / "run"), True, 1)


def test_a_client_that_hangs_is_given_up_with_one_note(tmp_path):
    said = launch(tmp_path, "failed", 1, 3, waits=3, number=signal.SIGSTOP)
    assert said.count(GIVEN_UP) == 1 and "the run goes on" in said


@pytest.fixture
def silent_server() -> Iterator[dict[str, str]]:
    """The environment of a client whose server takes connections and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {"WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}", "WANDB_API_KEY": "0123456789" * 4}


def test_a_run_that_ends_before_the_server_answers_does_not_wait_for_it(tmp_path, silent_server):
    assert launch(tmp_path, "failed", 1, 2, ONLINE, waits=3, **silent_server).count(GIVEN_UP) == 1


def test_figures_that_no_server_takes_are_kept(tmp_path, silent_server):
    said = launch(tmp_path, "finished", 1, 2, ONLINE, WANDB_INIT_TIMEOUT="2", **silent_server)
    assert said.count("note: W&B has no run for this one") == 1 and "wandb sync" in said
    (kept,) = launches(tmp_path / "run")
    assert [row["step"] for row in kept.history] == [1, 2] and kept.exit_code == 0
    assert kept.run.run_id == own_run_id(tmp_path / "run")
