"""Check that a graph answers as the trained model does."""
