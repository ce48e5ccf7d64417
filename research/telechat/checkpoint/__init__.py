"""Checkpoints on disk: reading, writing, converting, splitting, merging, and choosing the one to resume from."""
