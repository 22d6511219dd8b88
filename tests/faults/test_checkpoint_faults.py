"""Damaged, half-written and refused checkpoints through the real command: nothing is lost, and one line says what happened.

Every kind of damage of every file, and every tracker content, is tried in tests/unit/checkpoints: here the command takes the same way.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ngpt.checkpoints.choice import choose_by_sizes
from ngpt.checkpoints.manifest import Manifest, read

REPOSITORY = Path(__file__).parents[2]
INJECT = Path(__file__).parent / "checkpoint_inject"
RUN = ["experiment=ngpt_tiny", "train.steps=12", "train.eval_steps=0", "checkpoint=periodic", "checkpoint.interval=4", "run.name=r"]
SHARD = "__0_0.distcp"


def ngpt(root: Path, *overrides: str, command: tuple[str, ...] = ("train", *RUN), fault: str | None = None) -> tuple[int, str]:
    """Exit code and all output of a command over the run folder in `root`."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{INJECT}:{REPOSITORY}"}
    if fault is not None:
        environment["CHECKPOINT_FAULT"] = fault
    arguments = [*command, *overrides, *([f"run.root={root}"] if command[0] == "train" else [])]
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments], cwd=REPOSITORY, env=environment, text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of steps 4, 8 and 12: the uninterrupted twin of every case."""
    root = tmp_path_factory.mktemp("trained")
    code, output = ngpt(root)
    assert code == 0, output
    return root


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Callable[[int], Path]:
    """A copy of the run as it was when the checkpoint of `newest` was published."""

    def copy(newest: int) -> Path:
        root = tmp_path / "copied"
        shutil.copytree(trained, root)
        for step in (4, 8, 12):
            if step > newest:
                shutil.rmtree(checkpoints(root) / f"iter_{step:07d}")
        (checkpoints(root) / "latest_checkpointed_iteration.txt").write_text(str(newest))
        return root

    return copy


def checkpoints(root: Path) -> Path:
    return root / "r" / "checkpoints"


def assert_same_end(root: Path, trained: Path) -> None:
    """The shards of step 12 are those of the twin, bit for bit, and the tracker names them."""
    choice = choose_by_sizes(checkpoints(root))
    assert choice.step == 12 and choice.note() is None
    ours, theirs = read(choice.folder), read(checkpoints(trained) / choice.folder.name)
    assert isinstance(ours, Manifest)
    assert tensors(choice.folder) == tensors(checkpoints(trained) / choice.folder.name)
    assert ours.data == theirs.data
    assert not (checkpoints(root) / ".saving").exists()


def tensors(folder: Path) -> dict[str, bytes]:
    """The bytes of each tensor of a one-rank checkpoint. The objects beside them hold paths and times."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    metadata = FileSystemReader(folder).read_metadata()
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    assert state
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def one_line(output: str, *words: str) -> str:
    """The line with all of `words`; the output has no traceback."""
    assert "Traceback" not in output, output
    lines = [line for line in output.splitlines() if all(word in line for word in words)]
    assert lines, output
    return lines[0]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "missing": lambda path: path.unlink(),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize(("damage", "file"), [("flipped", SHARD), ("zeroed", ".metadata"), ("missing", "manifest.json")])
def test_a_damaged_checkpoint_is_passed_over_and_nothing_else_changes(copied, trained, damage, file):
    root = copied(8)
    DAMAGES[damage](checkpoints(root) / "iter_0000008" / file)
    code, output = ngpt(root)
    assert code == 0, output
    one_line(output, "note: ", f"iter_0000008/{file}", "newest intact checkpoint is taken instead", "iter_0000004")
    assert_same_end(root, trained)


@pytest.mark.parametrize(("damage", "file"), [("flipped", SHARD), ("truncated", SHARD), ("flipped", "config.yaml")])
def test_a_damaged_only_checkpoint_ends_with_2(copied, damage, file):
    root = copied(4)
    DAMAGES[damage](checkpoints(root) / "iter_0000004" / file)
    before = (checkpoints(root) / "iter_0000004" / SHARD).read_bytes()
    code, output = ngpt(root)
    assert code == 2, output
    one_line(output, f"iter_0000004/{file}", "Restore")
    assert (checkpoints(root) / "iter_0000004" / SHARD).read_bytes() == before


def test_sample_and_load_take_the_same_way(copied, tmp_path):
    root = copied(8)
    flip(checkpoints(root) / "iter_0000008" / SHARD)
    code, output = ngpt(root, command=("sample", str(root / "r"), "--tokens", "2"))
    assert code == 0, output
    one_line(output, "note: ", SHARD, "iter_0000004")
    code, output = ngpt(tmp_path / "other", f"checkpoint.load={checkpoints(root)}", "train.stop_after=1", "checkpoint.fallback=false")
    assert code == 2, output
    one_line(output, SHARD, "checkpoint.fallback=true")


def test_two_ranks_share_the_reading_and_agree(copied):
    root = copied(8)
    flip(checkpoints(root) / "iter_0000008" / SHARD)
    code, output = ngpt(root, "cluster.gpus_per_node=2", "train.stop_after=10")
    assert code == 0, output
    one_line(output, "note: ", SHARD, "iter_0000004")
    assert choose_by_sizes(checkpoints(root)).step == 10


# The fault strikes the first or a later save (COUNT or step), and the same command goes on afterwards.
MOMENTS = {
    "mid shard": r"kill fsync 1 iter_%07d/.*distcp",
    "before manifest": r"kill open 1 iter_%07d/\.manifest",
    "before tracker": r"kill rename 1 iter_%07d$",
    "before the tracker's rename": r"kill rename {count} latest_checkpointed_iteration.txt$",
    "after tracker": r"kill rmtree 1 iter_%07d.replaced",
}


@pytest.mark.parametrize("step", [4, 8], ids=["first", "later"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_in_a_save(tmp_path, trained, moment, step):
    fault = MOMENTS[moment].replace("{count}", str(step // 4))
    code, output = ngpt(tmp_path, fault=fault % step if "%" in fault else fault)
    assert code != 0, f"the fault did not strike: {output}"
    code, output = ngpt(tmp_path)
    assert code == 0, output
    assert_same_end(tmp_path, trained)
    if step == 4 and moment in ("mid shard", "before manifest"):
        one_line(output, "note: ", "interrupted first save", "step 0")


REFUSALS = {
    "shard": "fsync 2 iter_.*distcp",
    "index": r"fsync 2 iter_.*\.metadata",
    "manifest": r"open 2 \.manifest\.json\..*\.partial",
    "tracker": "open 2 latest_checkpointed_iteration.txt.partial",
}


@pytest.mark.parametrize("number", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("file", REFUSALS)
def test_a_refused_write_names_itself_and_the_same_command_goes_on(tmp_path, trained, file, number):
    count = REFUSALS[file].replace(" 2 ", " 3 ") if file == "index" else REFUSALS[file]  # torch flushes it, and so do we
    code, output = ngpt(tmp_path, fault=f"{number} {count}")
    assert code == 2, output
    problem = "No space left on" if number == "ENOSPC" else "cannot be written"
    one_line(output, problem, "the previous checkpoint of step 4 is intact; the same command continues")
    assert not (checkpoints(tmp_path) / ".saving").exists()
    code, output = ngpt(tmp_path)
    assert code == 0, output
    assert_same_end(tmp_path, trained)


def test_a_skipped_save_lets_the_run_go_on(tmp_path, trained):
    code, output = ngpt(tmp_path, "checkpoint.on_full_disk=continue", fault="ENOSPC fsync 2 iter_.*distcp")
    assert code == 0, output
    one_line(output, "note: the save of step 8 is skipped", "No space left on", "step 4 is intact")
    assert_same_end(tmp_path, trained)
    assert not (checkpoints(tmp_path) / "iter_0000008").exists()


def test_a_run_whose_last_save_was_skipped_does_not_end_well(tmp_path):
    code, output = ngpt(tmp_path, "checkpoint.on_full_disk=continue", fault="ENOSPC fsync 3 iter_.*distcp")
    assert code == 2, output
    one_line(output, "No space left on", "step 8 is intact")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of the tiny model."""
    mount = tmp_path / "small"
    mount.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3500k", "tmpfs", str(mount)], capture_output=True, check=False)
    except OSError as error:
        pytest.skip(f"mount cannot be run: {error}")
    if done.returncode:
        pytest.skip(f"no right to mount a file system: {done.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_full_disk_names_itself_before_it_is_written_to(tmp_path, small_disk):
    code, output = ngpt(tmp_path, f"checkpoint.dir={small_disk / 'ck'}")
    assert code == 2, output
    one_line(output, f"No space left on {small_disk / 'ck'}", "are free", "step 4 is intact; the same command continues")
    assert choose_by_sizes(small_disk / "ck").step == 4


def test_asynchronous_saves_are_published_whole(trained, tmp_path):
    asynchronous = ("checkpoint.async_save=true", "checkpoint.keep_last=2")
    code, output = ngpt(tmp_path / "async", *asynchronous)
    assert code == 0, output
    assert_same_end(tmp_path / "async", trained)
    assert sorted(path.name for path in checkpoints(tmp_path / "async").glob("iter_*")) == ["iter_0000008", "iter_0000012"]


def test_a_refused_asynchronous_save_names_itself(tmp_path):
    code, output = ngpt(tmp_path, "checkpoint.async_save=true", fault="ENOSPC fsync 2 iter_.*distcp")
    assert code == 2, output
    one_line(output, "No space left on", "step 4 is intact; the same command continues")
    assert choose_by_sizes(checkpoints(tmp_path)).step == 4
