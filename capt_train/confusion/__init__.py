"""The confusion bank, the miners, and sentences about confused classes."""
