"""Studies: from a claim and its arms to runs, numbers with intervals, and a page."""
