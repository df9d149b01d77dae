"""Accuracy and calibration metrics on arrays of probabilities."""
