"""Subnetworks: which attention heads, and which parts of an adapter, the next action's information needs."""
