"""Offline demo: a rendered pictogram data set and a small CLIP pretrained on its attributes."""
