"""Fit and choose calibrations; estimate label noise and the learning curve."""
