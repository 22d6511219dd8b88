"""A module a command: `add_arguments(parser)` says what it takes, `run(options)` does it. What it needs is imported in `run` alone."""
