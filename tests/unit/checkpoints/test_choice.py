"""Which checkpoint is taken, for every state of the folder and of the tracker."""

import os
import shutil

import pytest

from ngpt.checkpoints import manifest
from ngpt.checkpoints.choice import choose, choose_by_sizes, is_empty, leftovers, listing
from ngpt.checkpoints.tracker import TRACKER_FILE
from ngpt.config.errors import ConfigError

SHARD = "__0_0.distcp"
FILES = (SHARD, ".metadata", "metadata.json", "config.yaml", "manifest.json")


def read_through(path):
    """What the workers do: sizes, then every byte."""
    damage = manifest.inspect(path)
    if damage is not None:
        return damage
    found = manifest.read(path)
    return next(iter(manifest.compare(path, found.files, threads=2)), None) if found else None


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "missing": lambda path: path.unlink(),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


def test_the_published_checkpoint_is_taken_without_a_word(folder, save):
    for step in (4, 8):
        save(step)
    choice = choose(listing(folder), True, read_through)
    assert (choice.step, choice.folder.name, choice.note()) == (8, "iter_0000008", None)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_the_older_checkpoint_taken(folder, save, file, damage):
    save(4), save(8)
    DAMAGES[damage](folder / "iter_0000008" / file)
    choice = choose(listing(folder), True, read_through)
    assert choice.step == 4
    assert str(folder / "iter_0000008" / file) in choice.note() and str(folder / "iter_0000004") in choice.note()
    with pytest.raises(ConfigError, match=f"{file}.*Set checkpoint.fallback=true to go on from the newest intact one, step 4"):
        choose(listing(folder), False, read_through)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_only_checkpoint_is_refused_and_never_a_fresh_start(folder, save, file, damage):
    save(4)
    DAMAGES[damage](folder / "iter_0000004" / file)
    with pytest.raises(ConfigError) as refusal:
        choose(listing(folder), True, read_through)
    assert file in str(refusal.value) and "\n" not in str(refusal.value) and "Restore" in refusal.value.way_out


def test_sizes_alone_do_not_see_a_flipped_bit(folder, save):
    """What checkpoint.verify=sizes promises, and the control of the tests above."""
    save(4)
    flip(folder / "iter_0000004" / SHARD)
    assert choose_by_sizes(folder).step == 4


def test_none_looks_at_names_alone(folder, save):
    save(4)
    os.truncate(folder / "iter_0000004" / SHARD, 10)
    assert choose_by_sizes(folder, verify="none").step == 4
    with pytest.raises(ConfigError):
        choose_by_sizes(folder, verify="sizes")


TRACKERS = {
    "empty": b"",
    "blank": b" \n",
    "word": b"abc",
    "release": b"release",
    "negative": b"-8",
    "sign": b"+8",
    "underscore": b"0_8",
    "fraction": b"8.0",
    "hexadecimal": b"0x8",
    "arabic digit": "٣".encode(),
    "superscript": "²".encode(),
    "odd bytes": b"\xff\xfe8",
    "nul": b"8\x00",
    "two lines": b"8\n4",
    "long": b"9" * 5000,
    "huge": b"9" * 100_000,
    "missing folder": b"99",
    "zero": b"0",
}


@pytest.mark.parametrize("content", TRACKERS.values(), ids=TRACKERS)
def test_every_tracker_content_gives_one_line(folder, save, content):
    save(4), save(8)
    (folder / TRACKER_FILE).write_bytes(content)
    if content == b"0":  # nothing is older than step 0
        with pytest.raises(ConfigError, match="iter_0000000: missing"):
            choose_by_sizes(folder)
        return
    note = choose_by_sizes(folder).note()
    assert choose_by_sizes(folder).step == 8 and note.startswith("note: ") and "\n" not in note and len(note) < 500
    with pytest.raises(ConfigError) as refusal:
        choose_by_sizes(folder, fallback=False)
    assert "\n" not in str(refusal.value) and "step 8" in str(refusal.value)


@pytest.mark.parametrize("content", TRACKERS.values(), ids=TRACKERS)
def test_a_tracker_without_checkpoints_is_refused(folder, content):
    folder.mkdir()
    (folder / TRACKER_FILE).write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        choose_by_sizes(folder)
    assert "\n" not in str(refusal.value)


def test_a_tracker_that_is_a_folder_is_passed_over(folder, save):
    save(4)
    (folder / TRACKER_FILE).unlink()
    (folder / TRACKER_FILE).mkdir()
    assert choose_by_sizes(folder).step == 4


@pytest.mark.parametrize("content", ["8", "8\n", " 8 ", "0000008"])
def test_a_step_in_decimal_is_read(folder, save, content):
    save(8)
    (folder / TRACKER_FILE).write_text(content)
    assert choose_by_sizes(folder).note() is None


def test_an_earlier_step_in_the_tracker_is_obeyed(folder, save):
    """Somebody went back by hand: what is newer is not taken, and not a fallback either."""
    for step in (4, 8, 12):
        save(step)
    (folder / TRACKER_FILE).write_text("8")
    assert choose_by_sizes(folder).step == 8
    (folder / "iter_0000008" / SHARD).unlink()
    assert choose_by_sizes(folder).step == 4


@pytest.mark.parametrize("name", ["iter_0000008.bak", "iter_8", "iter_00000008", "iter_", "iter_000000٣", "iter_0000009.deleting", "best"])
def test_folders_of_other_names_are_not_looked_at(folder, save, name):
    save(4)
    shutil.copytree(folder / "iter_0000004", folder / name)
    assert listing(folder).steps == (4,)
    (folder / TRACKER_FILE).unlink()
    assert choose_by_sizes(folder).step == 4


def test_a_renamed_checkpoint_is_not_of_that_step(folder, save):
    save(4)
    (folder / "iter_0000004").rename(folder / "iter_0000008")
    (folder / TRACKER_FILE).write_text("8")
    with pytest.raises(ConfigError, match="of step 4, not of this folder"):
        choose_by_sizes(folder)


def test_a_published_checkpoint_without_a_tracker_is_taken(folder, save):
    """Killed between the last two renames of a first save."""
    save(4)
    (folder / TRACKER_FILE).unlink()
    choice = choose_by_sizes(folder)
    assert choice.step == 4 and TRACKER_FILE in choice.note()


def test_nothing_is_an_empty_folder(folder):
    assert choose_by_sizes(folder) is None and leftovers(listing(folder)) is None
    folder.mkdir()
    assert choose_by_sizes(folder) is None


@pytest.mark.parametrize("place", [".saving/iter_0000004", "iter_0000004"])
def test_an_interrupted_first_save_starts_over_with_a_note(folder, place):
    """In the staging folder, and where earlier versions wrote."""
    (folder / place).mkdir(parents=True)
    (folder / place / SHARD).write_bytes(b"half")
    assert choose_by_sizes(folder) is None and is_empty(listing(folder))
    assert "interrupted first save" in leftovers(listing(folder))


def test_old_checkpoints_load(folder, save_old):
    save_old(4), save_old(8)
    assert choose_by_sizes(folder).step == 8 and choose_by_sizes(folder).note() is None


@pytest.mark.parametrize("file", [SHARD, ".metadata", "metadata.json"])
@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_an_old_checkpoint_without_one_of_its_files_is_passed_over(folder, save_old, file, damage):
    save_old(4), save_old(8)
    DAMAGES[damage](folder / "iter_0000008" / file)
    choice = choose_by_sizes(folder)
    assert choice.step == 4 and file in choice.note()


def test_the_only_old_checkpoint_without_its_shard_is_refused(folder, save_old):
    (save_old(4) / SHARD).unlink()
    with pytest.raises(ConfigError, match=SHARD):
        choose_by_sizes(folder)
