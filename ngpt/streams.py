"""Text files that a run writes beside its result. If one can no longer be written, the run goes on without it."""

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO, TextIO


class GivenUp(io.TextIOBase):
    """A stream that is given up, with one note on stderr, when a write fails: the disk is full, or its reader has gone.

    Args:
        stream: what is written to.
        name: of it, in the note.
    """

    def __init__(self, stream: TextIO, name: str):
        self.stream, self.name, self.failed = stream, name, False

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        if self.failed or self.stream.closed:  # libraries may still write at process exit, after the run has ended
            return
        try:
            action()
        except (OSError, ValueError) as error:
            self.failed = True
            with suppress(OSError, ValueError):
                print(f"note: {self.name} takes no more output ({error}); the run goes on", file=sys.stderr, flush=True)


def abandon(stream: TextIO | BinaryIO) -> None:
    """Discards what a stream still holds and all that follows: after a failed flush at exit, Python ends with status 120."""
    with suppress(OSError, ValueError):  # it has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
