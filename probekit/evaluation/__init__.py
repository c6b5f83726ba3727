"""Perplexity, action metrics and the intervals on them."""
