"""Planner, mixing, conditioning and the language model they condition."""
