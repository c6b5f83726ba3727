"""A run: its folder, its stages, and the models it holds."""
