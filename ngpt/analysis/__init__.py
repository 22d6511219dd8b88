"""What a run leaves behind and what a person reads of it: metrics files, comparison of runs, plots, the HTML report."""
