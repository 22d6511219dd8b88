"""What a check of the machine found, one line each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OK, FAILED, UNAVAILABLE, ABSENT = "ok", "FAILED", "unavailable", "absent"


@dataclass(frozen=True)
class Finding:
    """One line of `ngpt doctor`.

    Attributes:
        subject: what is checked: a package, or a format and who computes it.
        what: the property of it.
        status: "ok"; "FAILED": it should work on this machine and does not; "unavailable": it cannot work here; "absent": not installed.
        figure: what was measured, or the reason.
    """

    subject: str
    what: str
    status: str
    figure: str


def attempt(subject: str, what: str, check: Callable[..., tuple[bool, str]], *arguments: Any) -> Finding:
    """The finding of `check(*arguments)`, which returns (passed, figure). An exception counts as a failure."""
    try:
        passed, figure = check(*arguments)
    except Exception as error:  # whatever a broken installation raises is the finding
        passed, figure = False, f"{type(error).__name__}: {first_line(str(error))}"
    return Finding(subject, what, OK if passed else FAILED, figure)


def first_line(text: str) -> str:
    """The first non-empty line of a message."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")
