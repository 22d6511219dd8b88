"""Results of a synchronous save come back without a process; upstream starts one."""

import pickle
import queue

import pytest

from megatron_ext.compat import results_queue

_FILE = "core/dist_checkpointing/strategies/filesystem_async.py"


def test_upstream_still_starts_a_manager_for_the_results(upstream_source):
    source = upstream_source(_FILE, "get_write_results_queue")
    assert "global _results_queue" in source and "ctx.Manager().Queue()" in source


def test_upstream_still_writes_with_threads_alone(upstream_source):
    writing = upstream_source(_FILE, "FileSystemWriterAsync.write_preloaded_data_multithread")
    assert "threading.Thread(" in writing and "Process(" not in writing


def test_a_save_gets_the_queue_of_this_process(monkeypatch):
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    assert results_queue.install()
    results = filesystem_async.get_write_results_queue()
    results_queue.install()
    assert results is filesystem_async.get_write_results_queue()
    results.put({0: []})
    assert results.get_nowait() == {0: []}
    with pytest.raises(queue.Empty):
        results.get_nowait()


def test_in_the_worker_the_queue_is_the_channel_to_the_trainer(monkeypatch):
    sent = pickle.dumps(results_queue.ResultsQueue())
    channel = queue.Queue()
    monkeypatch.setattr(results_queue, "_of_this_process", None)
    with pytest.raises(AssertionError):
        pickle.loads(sent)
    results_queue.report_through(channel)
    assert pickle.loads(sent) is channel
