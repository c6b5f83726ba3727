"""Probes: targets, positions, activations, solvers, baselines, controls, the grid."""
