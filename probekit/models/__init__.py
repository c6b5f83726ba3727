"""Language models, planner, mixing, conditioning, depth ensemble."""
