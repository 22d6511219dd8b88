"""What is printed for copying reaches a program as it was meant, and can be read."""

import itertools
import subprocess

import pytest

from ngpt.shell import in_shell


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("train.steps=4", "train.steps=4"),
        ("", "''"),
        ("data.train=[{path: data/x/train}]", "'data.train=[{path: data/x/train}]'"),
        ("data.train=[{path: 'my texts/train'}]", "\"data.train=[{path: 'my texts/train'}]\""),
        ("cost=$5", "'cost=$5'"),
    ],
)
def test_a_word_is_quoted_as_readably_as_it_can_be(word, shown):
    assert in_shell(word) == shown


READ_BY_BASH = ["", '"', "$HOME", "`id`", "\\", "\\n", "!", "!!", "\n", "*", "~", "é"]
WORDS = ["".join(parts) for parts in itertools.product(["", "a b"], ["", "'", "''"], READ_BY_BASH)]


@pytest.mark.parametrize("history", [False, True], ids=["script", "interactive"])
def test_bash_reads_every_word_as_it_was(history):
    script = f"{'set -o history -o histexpand' if history else ''}\nprintf '%s\\0' {in_shell(*WORDS)}\n"
    read = subprocess.run(["bash", "--norc"], input=script, capture_output=True, text=True, check=True)
    assert read.stdout.split("\0")[:-1] == WORDS
