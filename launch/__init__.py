"""Starts runs: the command line, the run folder, the processes and their environment."""
