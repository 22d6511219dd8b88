"""A stream that fails is given up once, with a note, and what is written goes on."""

import io

from ngpt.streams import GivenUp


class FullDisk(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        raise OSError(28, "No space left on device")


def test_a_full_disk_gives_one_note_and_no_error(capsys):
    stream = GivenUp(io.TextIOWrapper(FullDisk(), write_through=True), "the log")
    for line in ("one", "two", "three"):
        print(line, file=stream, flush=True)
    assert capsys.readouterr().err.count("note: the log takes no more output") == 1


def test_what_comes_after_the_end_is_left_out_without_a_note(tmp_path, capsys):
    with (tmp_path / "log").open("w") as file:
        stream = GivenUp(file, "the log")
    print("line", file=stream, flush=True)
    assert capsys.readouterr().err == ""


def test_what_can_be_written_is(tmp_path):
    with (tmp_path / "log").open("w") as file:
        print("line", file=GivenUp(file, "the log"), flush=True)
    assert (tmp_path / "log").read_text() == "line\n"
