"""The synthetic corpus whose plan is known: generator, exact posteriors, ceilings."""
