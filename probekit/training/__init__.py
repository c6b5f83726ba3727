"""Training, a file for each stage."""
