"""probekit."""
