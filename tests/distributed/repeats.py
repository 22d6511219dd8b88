"""Makes many models in one process cheap: keeps what Megatron would otherwise work out again for each, with the same result."""

import gc


def keep_what_repeats() -> None:
    """To be called once, before the first model."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    read, known = ArgumentGroupFactory._get_field_docstrings, {}

    def docstrings(self, config_class: type) -> dict[str, str]:
        """Help texts of a command line. Megatron finds them by parsing its sources, for each of its parsers."""
        if config_class not in known:
            known[config_class] = read(self, config_class)
        return known[config_class]

    ArgumentGroupFactory._get_field_docstrings = docstrings
    gc.collect()
    gc.freeze()  # the collector need not search the imported modules again
