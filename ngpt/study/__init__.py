"""Studies: from a claim and its arms to runs, numbers with confidence intervals, and a page."""
