"""A replaced file is the old one or the whole new one, and an error names it."""

import errno
import os

import pytest

from ngpt import files
from ngpt.files import new_folder, partial_folder, replacing


@pytest.mark.parametrize("synced", [True, False])
def test_a_file_is_replaced_when_the_block_ends(tmp_path, synced):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with replacing(path, synced) as stream:
        stream.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def test_only_a_synced_file_and_its_name_are_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    with replacing(tmp_path / "a", synced=False):
        pass
    assert not flushed
    with replacing(tmp_path / "a"):
        pass
    content, folder = flushed
    assert os.path.dirname(content) == folder == str(tmp_path)


def test_a_failure_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as stream:
        stream.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_an_error_of_the_disk_names_the_file(tmp_path):
    with pytest.raises(OSError) as failure, replacing(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert failure.value.filename == str(tmp_path / "a") and failure.value.errno == errno.ENOSPC
    with pytest.raises(OSError) as failure, replacing(tmp_path / "no folder" / "a"):
        pass
    assert failure.value.filename == str(tmp_path / "no folder" / "a")


def test_an_error_of_fsync_names_its_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")

    def refuse(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError) as refusal:
        files.sync(tmp_path / "file")
    assert refusal.value.filename == str(tmp_path / "file")


def test_a_new_folder_has_its_name_when_it_is_whole_and_otherwise_leaves_nothing(tmp_path):
    path = tmp_path / "above" / "folder"
    with new_folder(path) as folder:
        (folder / "file").write_text("content")
        assert not path.exists() and folder.parent == path.parent
    assert (path / "file").read_text() == "content"
    with pytest.raises(RuntimeError, match="broken"), new_folder(tmp_path / "other") as folder:
        (folder / "file").write_text("content")
        raise RuntimeError("broken")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["above"] and [path] == list(path.parent.iterdir())


def test_all_of_a_new_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync", lambda path: synced.append((path.name, (tmp_path / "folder").exists())))
    with new_folder(tmp_path / "folder", alone=True) as folder:
        assert folder == partial_folder(tmp_path / "folder")
        (folder / "below").mkdir()
        (folder / "below" / "file").touch()
    assert sorted(synced[:-1]) == [("below", False), ("file", False), ("folder.partial", False)]
    assert synced[-1] == (tmp_path.name, True)


def test_a_new_folder_of_one_writer_is_made_in_a_folder_that_is_there(tmp_path):
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "gone" / "folder", alone=True):
        pass
    assert list(tmp_path.iterdir()) == []
