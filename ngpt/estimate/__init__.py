"""Estimates before a run: parameters, FLOPs, peak rates. No torch."""
