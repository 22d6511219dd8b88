"""The last screen of a run: figures from its summary, and commands that the command line takes."""

import json
import shlex

import pytest

from launch import cli
from launch.ending import ending

SUMMARY = {"run_name": "a", "status": "finished", "steps": 1250, "tokens": 2_048_000, "wall_time_s": 330.0, "train_loss": 2.5}
VALIDATED = {"val_loss": 1.7329, "val_bits_per_byte": 2.5, "bigram_bits_per_byte": 3.627}


@pytest.fixture
def end(tmp_path):
    run = tmp_path / "it's a run"
    (run / "checkpoints" / "iter_0001250").mkdir(parents=True)

    def shown(summary) -> str:
        (run / "summary.json").write_text(json.dumps(summary))
        return ending(run)

    return shown


def test_the_result_stands_beside_what_byte_pairs_tell(end):
    shown = end(SUMMARY | VALIDATED)
    assert "finished after step 1,250" in shown and "2,048,000 tokens in 5 min 30 s" in shown
    assert "1.7329 nats per token, 2.500 bits per byte" in shown and "3.627 bits per byte (bigram" in shown
    assert "training loss" not in shown and len(shown.splitlines()) < 15


def test_a_run_that_was_not_validated_shows_its_training_loss(end):
    shown = end(SUMMARY | {"val_loss": None})
    assert "2.5000 nats per token, the last; not validated" in shown and "validation loss" not in shown


def test_every_next_command_is_one(end, tmp_path):
    commands = [line[line.index("ngpt ") :] for line in end(SUMMARY).splitlines() if "ngpt " in line]
    read = [shlex.split(command)[1:] for command in commands]
    assert [words[0] for words in read] == ["report", "generate", "export"]
    for words in read:
        assert words[1] == str(tmp_path / "it's a run")
        cli.parser().read(words)  # leaves where it cannot
    (tmp_path / "it's a run" / "checkpoints" / "iter_0001250").rmdir()
    assert "ngpt export" not in end(SUMMARY)  # there is nothing to hand over


def test_a_failed_run_has_no_such_end(end, tmp_path):
    assert end(SUMMARY | {"status": "failed"}) == "" and ending(tmp_path) == ""
