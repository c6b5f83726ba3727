"""`python -m probekit`, the same as the command `probekit`."""

from runpy import run_module

run_module("probekit.cli", run_name="__main__")
