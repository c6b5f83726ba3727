"""Causal tests of what probes find: erase it, steer along it, patch it."""
