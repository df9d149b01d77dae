"""Shared by every room: errors, console output, files, the machine."""
