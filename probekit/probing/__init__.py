"""Linear probes: activations, solvers, baselines."""
