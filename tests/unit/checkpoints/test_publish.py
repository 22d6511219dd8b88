"""A checkpoint appears whole, and what a failed or killed save leaves does no harm."""

import errno
import os
import shutil

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


STEPS = {
    "config": (publish, "write_synced"),
    "index": (publish, "sync"),
    "manifest": (manifest, "replacing"),
    "coming tracker": (tracker, "write_synced"),
    "tracker": (tracker, "sync"),
}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("step", STEPS)
def test_a_refused_write_leaves_the_previous_checkpoint(folder, save, monkeypatch, step, number):
    save(4)
    module, function = STEPS[step]

    def refuse(path, *_):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(module, function, refuse)
    with pytest.raises(OSError) as refusal:
        save(8)
    assert refusal.value.filename
    monkeypatch.undo()
    publish.discard(publish.staging_folder(folder, 8))
    # The tracker is replaced before its folder is flushed: then the new one may already be what it names.
    assert choose_by_sizes(folder).step == (8 if step == "tracker" else 4)
    save(12)
    assert choose_by_sizes(folder).note() is None


def test_an_interrupted_publication_leaves_the_previous_or_the_new_one(folder, save, monkeypatch):
    """Killed before each rename and each flush in turn: what is then loaded is whole."""
    for when in range(20):
        calls = 0

        class Killed(BaseException):
            pass

        def die(function, counted=when):
            def wrapped(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == counted + 1:
                    raise Killed
                return function(*args, **kwargs)

            return wrapped

        save(4)
        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.rename", die(os.rename))
            patch.setattr("pathlib.Path.replace", die(os.replace))
            patch.setattr(os, "fsync", die(os.fsync))
            try:
                save(8)
            except Killed:
                pass
            else:
                assert when > 8  # all of them were tried
                return
        choice = choose_by_sizes(folder)
        assert choice.step in (4, 8)
        if (folder / "iter_0000008").exists():
            assert manifest.inspect(folder / "iter_0000008") is None
            shutil.rmtree(folder / "iter_0000008")
    pytest.fail("the publication was interrupted at every call")


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
