"""A recipe, by the name of its file in conf/precision or a user's folder. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path

from ngpt.config import compose
from ngpt.config.errors import ConfigError
from ngpt.config.recipes import recipe_of
from ngpt.recipes import Recipe


def recipe_named(name: str, config_dirs: Sequence[Path] = ()) -> Recipe:
    """The recipe of precision=NAME, without the file's choice of layers to keep in high precision.

    Raises:
        ConfigError: there is no recipe of that name, or it does not quantise to NVFP4.
    """
    try:
        recipe = recipe_of(compose(["experiment=ngpt_tiny", f"precision={name}"], config_dirs).precision)
    except ConfigError as error:
        raise ConfigError("--recipe", error.got, error.rule, error.way_out) from error
    if recipe.format != "nvfp4":
        raise ConfigError("--recipe", name, f"Its format is {recipe.format}, and analyses quantise to nvfp4", "Name a recipe of NVFP4")
    return recipe
