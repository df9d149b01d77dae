"""Backends run the graph of a bundle. Each has its own file, which alone imports its library."""
