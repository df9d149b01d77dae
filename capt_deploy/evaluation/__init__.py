"""Evaluate predictions on labelled images, and print the report as text."""
