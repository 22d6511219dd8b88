"""The writer's files are hashed and checked on their way, and what goes wrong comes back as an outcome instead of a hang."""

import json

_SAVES = """
    import errno, json, shutil
    from pathlib import Path
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron_ext.compat import shard_writer
    from ngpt.checkpoints import hashing

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    generator = torch.Generator().manual_seed(1)
    unit = torch.nn.functional.normalize(torch.randn(300, 400, generator=generator), dim=1)
    shard_writer.set_rules({"master": 1, "split": 1}, 1e-4)

    def save(name, expect=True, **changed):
        folder = Path(name)
        folder.mkdir()
        tensors = {"master": unit, "split.x": unit.clone(), "moment": torch.full((5,), 3e38), "step": torch.tensor([3])} | changed
        state = {key: ShardedTensor.from_rank_offsets(key, value) for key, value in tensors.items()}
        if expect:
            shard_writer.expect_outcome(folder)
        try:
            dist_checkpointing.save(state, str(folder))
        except shard_writer.NotEnoughSpace as error:
            return f"{error.folder}: {error.needed > 900_000} {error.free}"
        except OSError as error:
            return f"raised {error}"
        outcome = shard_writer.take_outcome(folder)
        shard_writer.forget_outcome(folder)
        present = sorted(path.name for path in folder.iterdir())
        if outcome.problem:
            return [outcome.problem.path, outcome.problem.what, outcome.problem.errno, present]
        return {"same": {n: hashing.hash_file(folder / n) == record for n, record in outcome.files.items()}, "all": present}

    found = {"right": save("right")}
    found["norm"] = save("norm", master=unit * 1.01)
    found["split"] = save("split", **{"split.x": unit * 0.5})
    found["nan"] = save("nan", moment=torch.tensor([1.0, float("nan")]))
    write, difference, free = hashing.HashingFile._write, hashing.Samples.first_difference, shard_writer._free_bytes

    def full(self, data):
        if self.tell() > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    hashing.HashingFile._write = full
    found["full"] = save("full")
    found["nobody asks"] = save("nobody", expect=False)
    hashing.HashingFile._write = write
    hashing.Samples.first_difference = lambda self, path: 77
    found["read back"] = save("back")
    hashing.Samples.first_difference = difference
    shard_writer._free_bytes = lambda folder: 1000
    found["no room"] = save("room")
    print(json.dumps(found))
"""


def test_outcomes_of_saves(run_installed):
    found = json.loads(run_installed(_SAVES).splitlines()[-1])
    assert found["right"] == {"same": {"__0_0.distcp": True}, "all": [".metadata", "__0_0.distcp", "metadata.json"]}
    path, what, number, files = found["norm"]
    assert path.endswith("norm/__0_0.distcp") and "master: its vectors have unit norm up to 0.01" in what and number == 0
    assert files == ["__0_0.distcp"]  # nothing says that this is a checkpoint
    assert "split.x: its vectors have unit norm up to 0.5" in found["split"][1]
    assert "moment: 1 of its 2 numbers are not finite" in found["nan"][1]
    assert found["full"][0].endswith("full/__0_0.distcp") and found["full"][2] == 28
    assert found["nobody asks"].startswith("raised [Errno 28]")
    assert "other bytes than were written, at 77" in found["read back"][1] and found["read back"][2] == 0
    assert found["no room"] == "room: True 1000"


def test_upstream_still_opens_and_flushes_as_it_is_patched_for(upstream_source):
    file = "core/dist_checkpointing/strategies/filesystem_async.py"
    write = upstream_source(file, "FileSystemWriterAsync.write_preloaded_data")
    assert "open_file = open" in write and 'open_file(file_name, "wb")' in write
    assert "os.fsync(stream.fileno())" in write and "stream.flush" not in write
    loop = upstream_source(file, "FileSystemWriterAsync.write_preloaded_data_multithread")
    assert "assert isinstance(local_results_or_exc, list), type(local_results_or_exc)" in loop
    finalize = upstream_source("core/dist_checkpointing/strategies/state_dict_saver.py", "save_state_dict_async_finalize")
    assert "storage_writer.finish(global_metadata, all_results)" in finalize
    save = upstream_source("training/checkpointing.py", "save_checkpoint")
    assert "maybe_msc.open(tracker_filename, 'w')" in save and "get_checkpoint_tracker_filename(save_dir)" in save
    assert "schedule_async_save(async_save_request)" in save and "generate_state_dict(" in save
