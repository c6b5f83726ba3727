"""How well models predict: perplexity, planner metrics, multiple choice, baselines."""
