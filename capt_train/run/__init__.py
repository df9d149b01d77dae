"""The run folder: set it up, fit what follows tuning, load and evaluate it."""
