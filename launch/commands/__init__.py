"""One module per command: `add_arguments(parser)` declares its arguments, `run(options)` runs it. Only `run` imports what it needs."""
