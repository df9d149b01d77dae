"""Everything that is trained, its loss terms, and the mixture."""
