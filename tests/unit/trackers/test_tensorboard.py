"""TensorBoard's event files, read back by its own reader."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ngpt.config import compose
from ngpt.trackers import trackers_of


def launch(folder: Path, first: int, last: int, offset: float) -> None:
    cfg = compose(["experiment=ngpt_tiny", f"run.dir={folder}"])
    said: list[str] = []
    trackers = trackers_of(cfg, said.append)
    trackers.open(first - 1)
    for step in range(first, last + 1):
        trackers.log(step, {"train/loss": offset + step})
        if step == last:
            trackers.log(step, {"megatron/throughput": 7.0})
    trackers.close("stopped")
    assert not said


def test_a_resumed_launch_supersedes_what_it_trains_again(tmp_path):
    launch(tmp_path, 1, 3, offset=0.0)
    launch(tmp_path, 3, 4, offset=0.5)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5)]
    assert [(event.step, event.value) for event in events.Scalars("megatron/throughput")] == [(4, 7.0)]
    assert b"hidden_size: 64" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the thread of its writer
def test_a_disk_without_room_costs_figures_and_nothing_else(tmp_path, monkeypatch):
    import tensorboard.summary.writer.record_writer as record_writer

    written = record_writer.RecordWriter.write

    def full(writer, data):
        if written_bytes := getattr(writer, "bytes", 0):
            raise OSError(28, "No space left on device")
        writer.bytes = written_bytes + len(data)
        written(writer, data)

    monkeypatch.setattr(record_writer.RecordWriter, "write", full)
    said: list[str] = []
    trackers = trackers_of(compose(["experiment=ngpt_tiny", f"run.dir={tmp_path}"]), said.append)
    trackers.open(0)
    for step in range(1, 50):
        trackers.log(step, {"train/loss": 1.0})
    trackers.close("finished")
    assert len(said) == 1 and "TensorBoard takes no more figures" in said[0] and "No space left" in said[0]


@pytest.mark.parametrize("asked", [True, False])
def test_it_is_written_where_it_is_asked_for(tmp_path, asked):
    trackers = trackers_of(compose(["experiment=ngpt_tiny", f"run.dir={tmp_path}", f"logging.tensorboard={asked}"]), print)
    assert bool(trackers) == asked
    trackers.open(0)
    trackers.close("finished")
    assert (tmp_path / "tensorboard").exists() == asked
