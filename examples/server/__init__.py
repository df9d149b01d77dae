"""A small HTTP service around one bundle: `python -m examples.server BUNDLE`."""
