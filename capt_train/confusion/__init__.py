"""The confusion bank, what is mined from it, and sentences about confused classes."""
