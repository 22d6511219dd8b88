"""Which checkpoints go, and that nothing else does."""

import os

import pytest

from ngpt.checkpoints import manifest
from ngpt.checkpoints.choice import choose_by_sizes, listing
from ngpt.checkpoints.retention import give_up_future, remove, set_aside, superseded


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "gone"),
    [
        (None, None, []),
        (None, 8, []),
        (1, None, [4, 8, 12, 16]),
        (2, None, [4, 8, 12]),
        (5, None, []),
        (9, None, []),
        (1, 8, [4, 12]),
        (2, 10, [4, 8, 12]),
    ],
)
def test_superseded(keep_last, keep_every, gone):
    assert superseded([4, 8, 12, 16, 20], 20, keep_last, keep_every) == gone


def test_what_lies_in_a_future_that_was_given_up_stays():
    assert superseded([4, 8, 12, 16], 8, 1, None) == [4]


def test_a_future_that_was_given_up_is_set_aside_and_nothing_of_it_is_lost(folder, save):
    for step in (4, 8, 12, 16):
        save(step, b"first")
    (folder / "latest_checkpointed_iteration.txt").write_text("4")  # somebody went back; the next save is one that a signal asks for
    save(14, b"second")
    give_up_future(folder, 4, 14)
    assert listing(folder).steps == (14, 4)
    assert (folder / "given_up/iter_0000016/__0_0.distcp").read_bytes() == b"first"
    save(16, b"second")
    give_up_future(folder, 4, 14)
    names = [f"iter_{step:07d}" for step in (8, 12, 16)] + ["iter_0000016.1"]
    assert sorted(path.name for path in (folder / "given_up").iterdir()) == names


def test_only_our_own_are_removed(folder, save, save_old):
    for step in (8, 12, 16):
        save(step)
    save_old(4, tracker=False)
    (folder / "iter_0000002").mkdir()
    (folder / "iter_0000006").symlink_to(folder / "iter_0000008")
    (folder / "notes").mkdir()
    remove(set_aside(folder, 16, keep_last=1, keep_every=None))
    assert {name for name in os.listdir(folder) if "latest" not in name} == {
        "iter_0000002", "iter_0000004", "iter_0000006", "iter_0000016", "notes"
    }  # fmt: skip
    assert choose_by_sizes(folder).step == 16


def test_weights_for_transformers_go_with_their_checkpoint_and_are_no_part_of_it(folder, save):
    for step in (4, 8):
        (save(step) / "hf").mkdir()
        (folder / f"iter_{step:07d}" / "hf" / "model.safetensors").write_bytes(b"weights")
    assert manifest.verify(folder / "iter_0000008", threads=1) is None
    remove(set_aside(folder, 8, keep_last=1, keep_every=None))
    assert not (folder / "iter_0000004").exists() and (folder / "iter_0000008" / "hf").exists()
    save(8)  # once more: what was made of the first is not taken for what is made of the second
    assert not (folder / "iter_0000008" / "hf").exists()


def test_nothing_goes_before_the_new_one_is_there(folder, save):
    save(4), save(8)
    assert set_aside(folder, 12, keep_last=1, keep_every=None) == []


def test_a_removal_that_was_cut_short_is_finished_by_the_next(folder, save):
    for step in (4, 8):
        save(step)
    assert [path.name for path in set_aside(folder, 8, 1, None)] == ["iter_0000004.deleting"]
    assert not (folder / "iter_0000004").exists() and choose_by_sizes(folder).step == 8
    save(12)
    remove(set_aside(folder, 12, 1, None))
    assert sorted(os.listdir(folder)) == ["iter_0000012", "latest_checkpointed_iteration.txt"]
