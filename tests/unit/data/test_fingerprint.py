"""Changes of large files are noticed by some of their blocks; what is written in flight is what a second pass would find."""

import os
import random

import pytest

from ngpt.data.fingerprint import BLOCK_BYTES, BLOCKS, BlockSampler, changed_block, is_record, record_of


def written(path, content: bytes, piece: int) -> str:
    """The record made while `content` is written in pieces."""
    sampler = BlockSampler()
    with path.open("wb") as stream:
        for start in range(0, len(content), piece):
            stream.write(content[start : start + piece])
            sampler.update(content[start : start + piece])
    return sampler.record()


@pytest.mark.parametrize("size", [1, BLOCK_BYTES, BLOCK_BYTES + 1, 200 * BLOCK_BYTES, 200 * BLOCK_BYTES + 7])
def test_the_record_does_not_depend_on_the_pieces_and_holds_first_and_last_block(tmp_path, size):
    content = random.Random(0).randbytes(size)
    records = {written(tmp_path / "a", content, piece) for piece in (size, 1_000_003, BLOCK_BYTES)}
    assert len(records) == 1
    record = records.pop()
    numbers = [int(entry.partition(":")[0]) for entry in record.split()]
    assert is_record(record) and numbers[0] == 0 and numbers[-1] == (size - 1) // BLOCK_BYTES and len(numbers) <= BLOCKS
    assert len(numbers) >= min(BLOCKS - 2, -(-size // BLOCK_BYTES))
    assert changed_block(tmp_path / "a", record) is None


def test_the_blocks_lie_scattered_over_the_whole_file(tmp_path):
    record = written(tmp_path / "a", b"\0" * (1000 * BLOCK_BYTES), 1 << 20)
    numbers = [int(entry.partition(":")[0]) for entry in record.split()]
    assert {number * 4 // 1000 for number in numbers} == {0, 1, 2, 3}


@pytest.mark.parametrize("make", ["in flight", "afterwards"])
def test_a_rewritten_a_shifted_and_a_zeroed_file_are_noticed(tmp_path, make):
    path, content = tmp_path / "a", random.Random(1).randbytes(300 * BLOCK_BYTES + 5)
    record = written(path, content, 1 << 20)
    if make == "afterwards":
        record = record_of(path, "seed")
        assert record == record_of(path, "seed") != record_of(path, "other")
    for changed in (random.Random(2).randbytes(len(content)), b"x" + content[:-1], content[:-1] + b"x", b"\0" * len(content)):
        path.write_bytes(changed)
        assert changed_block(path, record) is not None
    path.write_bytes(b"x" + content[1:])
    assert changed_block(path, record) == 0
    path.write_bytes(content)
    assert changed_block(path, record) is None


@pytest.mark.parametrize("value", [None, 5, "", "x", "1:2", "-1:" + "0" * 16, ["0:" + "0" * 16], " ".join(["0:" + "0" * 16] * 1000)])
def test_other_values_are_no_record(value):
    assert not is_record(value)


def test_a_tebibyte_has_a_record_of_two_kibibytes_that_reaches_its_end(tmp_path):
    path, size = tmp_path / "sparse", 1 << 40
    path.touch()
    os.truncate(path, size)
    record = record_of(path, "seed")
    assert is_record(record) and len(record) < 2048 and changed_block(path, record) is None
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert changed_block(path, record) == size - BLOCK_BYTES
