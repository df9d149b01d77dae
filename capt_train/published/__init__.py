"""Methods that others have published, one file each, to compare with and to use."""
