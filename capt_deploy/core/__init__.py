"""What every room shares: errors, console output, files, the machine."""
