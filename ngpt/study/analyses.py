"""Results of the analyses that a study asks for, as `ngpt analyze` writes them."""

import json
from pathlib import Path
from typing import Any

from ngpt.config.errors import ConfigError


def result_of(path: Path) -> dict[str, Any] | None:
    """The result of an analysis; None: there is none.

    Raises:
        ConfigError: what is there is no such result.
    """
    rule, way_out = "Must be the JSON that `ngpt analyze` writes", "The study makes it again, called without --report"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(str(path), error.strerror, rule, way_out) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(str(path), error, rule, way_out) from None
    if not isinstance(found, dict):
        raise ConfigError(str(path), f"a {type(found).__name__}", rule, way_out)
    return found


def has_result(path: Path) -> bool:
    """Whether a path has the result of an analysis, undamaged."""
    try:
        return result_of(path) is not None
    except ConfigError:
        return False
