"""One token after the other: batches, sampling, the engine."""
