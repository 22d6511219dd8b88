"""What a check of the machine found out, one line each."""

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
    """The finding of `check(*arguments)`, which returns whether it passed, and its figure. An exception fails it."""
    try:
        passed, figure = check(*arguments)
    except Exception as error:  # whatever a broken installation raises is the finding
        passed, figure = False, f"{type(error).__name__}: {first_line(str(error))}"
    return Finding(subject, what, OK if passed else FAILED, figure)


def first_line(text: str) -> str:
    """The first line of a message that says something."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")
