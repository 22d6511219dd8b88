"""Commands that a person may copy into a shell."""

import shlex

_READ_IN_DOUBLE_QUOTES = set('"$`\\!')  # ! by an interactive bash


def in_shell(*words: str) -> str:
    """Words as a shell reads them: bare, in single quotes, or, where one of those is inside, in double quotes if no escapes are needed."""
    return " ".join(f'"{word}"' if "'" in word and not _READ_IN_DOUBLE_QUOTES & set(word) else shlex.quote(word) for word in words)
