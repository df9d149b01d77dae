"""The classifier that applications embed, and what it answers."""
