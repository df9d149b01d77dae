"""The bundle format: manifest, graphs and files, read and checked."""
