"""Results of the analyses that a study asks for, as `ngpt analyze` writes them."""

import json
from pathlib import Path
from typing import Any

from ngpt.config.errors import ConfigError

_RULE = "Must be the JSON that `ngpt analyze` writes"


class DamagedResult(ConfigError):
    """A file that was read, and is no result of an analysis."""


def result_of(path: Path) -> dict[str, Any] | None:
    """The result of an analysis; None: there is none.

    Raises:
        DamagedResult: what is there is no such result.
        ConfigError: it cannot be read.
    """
    way_out = "The study makes it again, called without --report"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(str(path), error.strerror, _RULE, "It is not made again: make it readable") from None
    except (ValueError, RecursionError) as error:
        raise DamagedResult(str(path), error, _RULE, way_out) from None
    if not isinstance(found, dict) or not isinstance(found.get("results"), dict):
        raise DamagedResult(str(path), "no object with `results`", _RULE, way_out)
    return found


def has_result(path: Path) -> bool:
    """Whether a path has the result of an analysis. What cannot be read may be one."""
    try:
        return result_of(path) is not None
    except DamagedResult:
        return False
    except ConfigError:
        return True
