"""What is exported: one or several runs, their classes, rows and calibration scores."""
