"""What a run leaves behind and how a person reads it: metrics files, comparison of runs, plots, the HTML report."""
