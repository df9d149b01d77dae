"""The commands capt-train and capt-confusions."""
