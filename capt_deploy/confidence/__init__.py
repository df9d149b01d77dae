"""Calibrate probabilities; prediction sets, rejection, familiarity and monitoring."""
