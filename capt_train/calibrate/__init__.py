"""Fit and choose calibrations, and estimate label noise."""
