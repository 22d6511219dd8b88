"""`ngpt version`; `ngpt --version` is the same."""

import argparse
from importlib.metadata import version

PACKAGES = ("ngpt-megatron", "megatron-core", "torch")


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """It takes no arguments."""


def run(_options: argparse.Namespace) -> int:
    for package in PACKAGES:
        print(package, version(package))
    return 0
