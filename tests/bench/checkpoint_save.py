"""What a checkpoint's hashes, checks, read-back and publication cost of a save: `python tests/bench/checkpoint_save.py [FOLDER]`.

Saves the state of a model (weights, fp32 masters and two moments, as names and shapes of a real one, one rank, on the CPU) by turns with
Megatron's writer as it is and with all that this project adds, and compares the medians. FOLDER is on the disk to be measured.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_ext import compat
from ngpt.checkpoints import publish
from ngpt.checkpoints.manifest import Manifest

WIDTH, HIDDEN = 1024, 4096
BAR = 0.05


def state_of(millions: float) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Tensors of about so many parameters times four, and the masters with unit norms."""
    tensors, unit_dims, layer = {}, {}, 0
    while sum(tensor.numel() for tensor in tensors.values()) < 4e6 * millions:
        for name, shape in (("attention.qkv", (3 * WIDTH, WIDTH)), ("mlp.fc1", (HIDDEN, WIDTH)), ("mlp.fc2", (WIDTH, HIDDEN))):
            key, dim = f"decoder.layers.{layer}.{name}.weight", 0 if name == "mlp.fc2" else 1
            weight = torch.nn.functional.normalize(torch.randn(shape), dim=dim)
            tensors[key], tensors[f"optimizer.state.param.{key}"] = weight, weight.clone()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"optimizer.state.{moment}.{key}"] = torch.randn(shape).square_()
            unit_dims |= {key: dim, f"optimizer.state.param.{key}": dim}
        layer += 1
    return tensors, unit_dims


@contextlib.contextmanager
def upstream_writer() -> Iterator[None]:
    """Megatron's writer without the patch."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer, opened = filesystem_async.FileSystemWriterAsync, filesystem_async.open
    names = ("write_preloaded_data", "prepare_write_data", "get_save_function_and_args", "finish")
    patched = {name: writer.__dict__[name] for name in names} | {"save_config": serialization.save_config}
    for name in names:
        function = patched[name]
        is_static = isinstance(function, staticmethod)
        original = (function.__func__ if is_static else function).__wrapped__
        setattr(writer, name, staticmethod(original) if is_static else original)
    serialization.save_config = serialization.save_config.__wrapped__
    del filesystem_async.open
    try:
        yield
    finally:
        for name in names:
            setattr(writer, name, patched[name])
        serialization.save_config, filesystem_async.open = patched["save_config"], opened


def save(folder: Path, tensors: dict[str, torch.Tensor], checked: bool) -> float:
    """Seconds of one save, tracker included."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    from megatron_ext.compat import shard_writer

    state = {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()}
    begin = time.perf_counter()
    if checked:
        staging = publish.make_staging(folder, 1)
        shard_writer.expect_outcome(staging)
        dist_checkpointing.save(state, str(staging))
        outcome = shard_writer.take_outcome(staging)
        assert outcome.problem is None, outcome.problem
        publish.publish(folder, Manifest(1, {}), "", outcome.files)
        shard_writer.forget_outcome(staging)
    else:
        target = folder / "iter_0000001"
        target.mkdir(parents=True)
        with upstream_writer():
            dist_checkpointing.save(state, str(target))
        (folder / "latest_checkpointed_iteration.txt").write_text("1")
    seconds = time.perf_counter() - begin
    shutil.rmtree(folder)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(tempfile.gettempdir()), help="a folder on the disk to be measured")
    parser.add_argument("--millions", type=float, default=120, help="parameters, in millions (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="saves of each kind (default: %(default)s)")
    options = parser.parse_args()
    compat.install(cpu=not torch.cuda.is_available())
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from megatron_ext.compat import shard_writer

    tensors, unit_dims = state_of(options.millions)
    shard_writer.set_rules(unit_dims, 1e-4)
    times: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        for repeat in range(options.repeats + 1):  # the first pair warms up
            for checked in (False, True) if repeat % 2 else (True, False):
                seconds = save(Path(work) / "checkpoints", tensors, checked)
                if repeat:
                    times[checked].append(seconds)
    plain, checked = statistics.median(times[False]), statistics.median(times[True])
    size = sum(tensor.nbytes for tensor in tensors.values())
    result = {
        "gigabytes": round(size / 1e9, 2),
        "threads": torch.get_num_threads(),
        "plain_s": [round(seconds, 2) for seconds in times[False]],
        "checked_s": [round(seconds, 2) for seconds in times[True]],
        "overhead_of_medians": round(checked / plain - 1, 4),
        "overhead_of_fastest": round(min(times[True]) / min(times[False]) - 1, 4),
        "bar": BAR,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
