"""Makes many models in one process cheap: what Megatron works out anew for each, and which is the same every time, is kept."""

import gc


def keep_what_repeats() -> None:
    """To be called once, before the first model."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    read, known = ArgumentGroupFactory._get_field_docstrings, {}

    def docstrings(self, config_class: type) -> dict[str, str]:
        """Of the help texts of a command line, which Megatron finds by parsing its sources for each of its parsers."""
        if config_class not in known:
            known[config_class] = read(self, config_class)
        return known[config_class]

    ArgumentGroupFactory._get_field_docstrings = docstrings
    gc.collect()
    gc.freeze()  # nobody looks for garbage among the imported modules again
