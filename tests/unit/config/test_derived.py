"""A field that a type checker takes for never null may be null in a file, and is none in a resolved config (`Derived`)."""

import dataclasses

import pytest

from ngpt.config import compose
from ngpt.config.identity import flatten
from ngpt.config.schema import Config, Derived
from ngpt.config.translate import leaf_types

DERIVED = [
    f"{section.name}.{entry.name}"
    for section in dataclasses.fields(Config)
    if dataclasses.is_dataclass(section.type)
    for entry in dataclasses.fields(section.type)
    if "derived" in entry.metadata
]


def test_a_derived_type_takes_null_when_a_config_is_merged():
    assert Derived[str] == str | None
    kinds = dict(leaf_types())
    assert {kinds[key] for key in DERIVED} == {str | None, int | None, bool | None}


@pytest.mark.parametrize("key", DERIVED)
def test_null_is_filled_in(key):
    assert flatten(compose(["experiment=ngpt_tiny", f"{key}=null"]))[key] is not None
