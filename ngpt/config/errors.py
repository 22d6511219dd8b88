"""The error a user sees for a wrong configuration: what, why and what to do."""

from collections.abc import Sequence
from typing import Any


class ConfigError(ValueError):
    """A value the user gave breaks a rule. Prints as one line: `path: got. rule. way out`.

    Args:
        path: Config key (`parallel.tensor`) or file path at fault.
        got: What was found there: a value, or a short phrase.
        rule: What must hold.
        way_out: What the user can do.
    """

    def __init__(self, path: str, got: Any, rule: str, way_out: str) -> None:
        super().__init__(path, got, rule, way_out)
        self.path = path
        self.got = got
        self.rule = rule
        self.way_out = way_out

    def __str__(self) -> str:
        sentences = (_one_line(part) for part in (self.got, self.rule, self.way_out))
        return f"{self.path}: " + ". ".join(sentence for sentence in sentences if sentence)


class ConfigErrors(ConfigError):
    """Several errors found in one go; prints one line each. Its own path, got, rule and way out are the first error's."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        first = errors[0]
        super().__init__(first.path, first.got, first.rule, first.way_out)
        self.errors = list(errors)

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


def _one_line(part: Any) -> str:
    return " ".join(str(part).split()).rstrip(".")
