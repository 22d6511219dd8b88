"""The names in the tables of Megatron arguments are Megatron's: a ghost would guard nothing."""

import argparse

from ngpt.config.megatron_keys import OWNED, REFUSED


def test_every_owned_and_refused_name_is_an_argument_of_megatron():
    from megatron.training.arguments import add_megatron_arguments

    known = {action.dest for action in add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))._actions}
    assert set(OWNED) | set(REFUSED) <= known, (set(OWNED) | set(REFUSED)) - known
