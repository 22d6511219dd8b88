"""A checkpoint appears whole, and what a failed or killed save leaves does no harm."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from ngpt.checkpoints import hashing, manifest, publish, tracker
from ngpt.checkpoints.choice import choose_by_sizes
from ngpt.checkpoints.hashing import FileRecord
from ngpt.checkpoints.manifest import Damage, Manifest

SHARD = "__0_0.distcp"


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    written = Manifest(4, {"a": FileRecord(3, "ab")}, {"torch": "2"}, {"consumed_samples": 5}, {"layout": "padded"})
    written.save(tmp_path)
    assert manifest.read(tmp_path) == written
    assert written.bytes == 3


def test_another_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT", 2)
    Manifest(4, {}, format=2).save(tmp_path)
    monkeypatch.undo()
    found = manifest.read(tmp_path)
    assert isinstance(found, Damage) and "format 2" in found.what


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"checksum": 1}', '{"format": 1, "files": 3}'])
def test_any_manifest_content_is_damage_or_a_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    assert isinstance(manifest.read(tmp_path), Damage)


def test_every_file_is_described(folder, save):
    path = save(4)
    assert manifest.read(path).files.keys() == {SHARD, ".metadata", "metadata.json", "config.yaml"}
    assert not (folder / ".saving").exists()
    assert sorted(os.listdir(folder)) == ["iter_0000004", tracker.TRACKER_FILE]


def test_a_file_that_is_shorter_on_the_disk_is_not_published(folder, save):
    staging = publish.make_staging(folder, 4)
    for name in (SHARD, ".metadata", "metadata.json"):
        (staging / name).write_bytes(b"12345")
    with pytest.raises(OSError, match="5 bytes are on the disk, 6 were written"):
        publish.publish(folder, Manifest(4, {}), "", {SHARD: FileRecord(6, "x")})
    with pytest.raises(OSError, match="not on the disk"):
        publish.publish(folder, Manifest(4, {}), "", {"__1_0.distcp": FileRecord(6, "x")})
    assert choose_by_sizes(folder) is None


def test_a_second_save_of_a_step_replaces_the_first_with_all_its_files(folder, save):
    save(4), save(8)
    (folder / "iter_0000008" / "__7_0.distcp").write_bytes(b"of another layout")
    save(8, b"new")
    assert (folder / "iter_0000008" / SHARD).read_bytes() == b"new"
    assert "__7_0.distcp" not in os.listdir(folder / "iter_0000008")
    assert choose_by_sizes(folder).step == 8
    assert sorted(os.listdir(folder)) == ["iter_0000004", "iter_0000008", tracker.TRACKER_FILE]


def test_leftovers_of_an_interrupted_save_of_another_layout_do_not_stay(folder, save):
    staging = publish.make_staging(folder, 4)
    (staging / "__7_0.distcp").write_bytes(b"stale")
    assert "__7_0.distcp" not in manifest.read(save(4)).files


def test_what_interrupted_saves_left_is_cleared_and_nothing_else(folder, save):
    save(4)
    publish.make_staging(folder, 8)
    (folder / "iter_0000004.replaced").mkdir()
    (folder / "iter_0000008.bak").mkdir()
    publish.clear(folder)
    assert sorted(os.listdir(folder)) == ["iter_0000004", "iter_0000008.bak", tracker.TRACKER_FILE]


@pytest.mark.parametrize("exchanged", [True, False])
def test_a_step_that_is_saved_once_more_is_replaced(folder, save, monkeypatch, exchanged):
    save(4, b"first")
    if not exchanged:  # a network file system, say
        monkeypatch.setattr(publish, "exchange", lambda *_: False)
    final = save(4, b"second")
    assert (final / "__0_0.distcp").read_bytes() == b"second" and manifest.inspect(final) is None
    assert sorted(os.listdir(folder)) == ["iter_0000004", tracker.TRACKER_FILE]


def test_killed_between_two_renames_the_old_checkpoint_gets_its_name_back(folder, save):
    save(4).rename(folder / "iter_0000004.replaced")
    publish.clear(folder)
    assert sorted(os.listdir(folder)) == ["iter_0000004", tracker.TRACKER_FILE]


class Killed(BaseException):
    pass


CALLS = [("pathlib.Path.open", Path.open), ("pathlib.Path.rename", os.rename), ("pathlib.Path.replace", os.replace), ("os.fsync", os.fsync)]


def interrupted_at(monkeypatch, count: int, error) -> list[str]:
    """The next call but `count` of those that change or flush something raises `error(path)`. Names of the calls that came, in order."""
    came = []

    def wrapped(name, call):
        def dying(*args, **kwargs):
            if name == "pathlib.Path.open" and "w" not in kwargs.get("mode", args[1] if len(args) > 1 else "r"):
                return call(*args, **kwargs)
            came.append(name)
            if len(came) == count + 1:
                raise error(None if name == "os.fsync" else str(args[0]))  # as the system: it does not say what it could not flush
            return call(*args, **kwargs)

        return dying

    for name, call in CALLS:
        monkeypatch.setattr(name, wrapped(name, call))
    return came


def disturbed_saves(folder, save, monkeypatch, error):
    """Saves of step 8 after one of step 4, with each call in turn raising `error(path)`; yields that and whether it was the last.

    Calls that nothing disturbs are counted first.
    """
    save(4)
    with monkeypatch.context() as patch:
        calls = interrupted_at(patch, 10**6, error)
        save(8)
    assert set(calls) == {name for name, _ in CALLS}
    for count in range(len(calls)):
        shutil.rmtree(folder)
        save(4)
        with monkeypatch.context() as patch:
            interrupted_at(patch, count, error)
            with pytest.raises((OSError, Killed)) as refusal:
                save(8)
        yield refusal.value, count + 1 == len(calls)


def test_an_interrupted_publication_leaves_the_previous_or_the_new_one(folder, save, monkeypatch):
    """Killed before each of the calls that change or flush something, in turn: what is then loaded is whole."""
    for _ in disturbed_saves(folder, save, monkeypatch, lambda _: Killed()):
        assert choose_by_sizes(folder).step in (4, 8)
        if (folder / "iter_0000008").exists():
            assert manifest.inspect(folder / "iter_0000008") is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_refused_call_leaves_the_previous_checkpoint_and_names_a_file(folder, save, monkeypatch, number):
    """All but the last, after which the tracker names the new one; it is then only not known to be on the disk."""
    for refusal, last in disturbed_saves(folder, save, monkeypatch, lambda path: OSError(number, os.strerror(number), path)):
        assert refusal.errno == number and refusal.filename
        publish.discard(publish.staging_folder(folder, 8))
        assert choose_by_sizes(folder).step == (8 if last else 4)
        save(12)
        assert choose_by_sizes(folder).note() is None


@pytest.mark.parametrize("file", [f".saving/iter_0000008/{manifest.CONFIG_FILE}", f"{tracker.TRACKER_FILE}.partial"])
def test_a_full_disk_leaves_the_previous_checkpoint(folder, save, file):
    """/dev/full in place of a file: the system itself refuses what is written."""
    save(4)
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    staging = publish.make_staging(folder, 8)
    for name in (SHARD, ".metadata", "metadata.json"):
        (staging / name).write_bytes(b"12345")
    (folder / file).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        publish.publish(folder, Manifest(8, {}), "run: {}\n", {})
    publish.discard(staging)
    assert choose_by_sizes(folder).step == 4
    save(12)
    assert choose_by_sizes(folder).note() is None


def test_the_line_of_a_full_disk():
    full = publish.CheckpointNotWritten("/x/ck", os.strerror(errno.ENOSPC), True, 8)
    assert str(full) == "No space left on /x/ck; the previous checkpoint of step 8 is intact; the same command continues"
    assert "no checkpoint was published before" in str(publish.CheckpointNotWritten("/x", "needs 2 GB", True, None))
    assert "cannot be written: Input/output error" in str(publish.CheckpointNotWritten("/x", os.strerror(errno.EIO), False, 8))


def test_hashes_in_flight_are_those_of_the_file(tmp_path):
    content = os.urandom(3 << 20)
    with hashing.HashingFile(tmp_path / "file") as stream:
        for start, end in ((0, 10), (10, 70_000), (70_000, 70_000), (70_000, 2 << 20), (2 << 20, 3 << 20)):
            assert stream.tell() == start
            stream.write(memoryview(content)[start:end])
        os.fsync(stream.fileno())
        assert (tmp_path / "file").stat().st_size == len(content)  # flushed to the descriptor that is fsynced
    assert stream.record == hashing.hash_file(tmp_path / "file") and stream.record.size == len(content)
    assert stream.samples.first_difference(stream.path) is None


def test_a_changed_block_is_read_back(tmp_path):
    with hashing.HashingFile(tmp_path / "file") as stream:
        stream.write(bytes(1000))
    with (tmp_path / "file").open("r+b") as file:
        file.seek(500)
        file.write(b"1")
    assert stream.samples.first_difference(stream.path) == 0


def test_samples_stay_within_their_limit_and_reach_the_end(tmp_path):
    samples = hashing.Samples(limit=8, stride=hashing.BLOCK_BYTES)
    block = memoryview(bytes(hashing.BLOCK_BYTES))
    for index in range(100):
        samples.take(block, index * len(block))
    assert len(samples.blocks) <= 8
    assert samples.blocks[0][0] == 0 and samples.blocks[-1][0] > 70 * len(block)


def test_a_full_disk_is_an_error_of_the_writer(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with pytest.raises(OSError, match="No space left"), hashing.HashingFile("/dev/full") as stream:
        stream.write(bytes(1 << 20))
    assert stream.error.errno == errno.ENOSPC
