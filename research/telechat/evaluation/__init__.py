"""Scores, answers and perplexity of a checkpoint."""
