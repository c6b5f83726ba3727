"""Training: the loop, and the stages of a run."""
