"""Causal tests: whether the LM uses what probes read."""
