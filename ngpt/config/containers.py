"""OmegaConf's conversions of its containers, with precise types: its own functions return a union of all that a config may be."""

from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf


def plain(config: DictConfig) -> dict[str, Any]:
    """Nested dicts and lists, interpolations unresolved."""
    found: Any = OmegaConf.to_container(config)
    return found


def instance_of[T](section: type[T], merged: DictConfig | ListConfig) -> T:
    """The dataclass instance of what was merged into the dataclass `section`.

    Raises:
        OmegaConfBaseException: a value is missing, or an interpolation names none.
    """
    found = OmegaConf.to_object(merged)
    assert isinstance(found, section)
    return found
