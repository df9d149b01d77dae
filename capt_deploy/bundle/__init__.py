"""The bundle format of docs/FORMAT.md: manifest, graphs and files, read and checked."""
