"""Sweeps: many runs, each stage of which is trained once, and one table of all."""
