"""The commands capt-export and capt-eval."""
