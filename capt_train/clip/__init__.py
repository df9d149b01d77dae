"""The frozen open_clip model and its towers."""
