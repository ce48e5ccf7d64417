"""One token after the other: the scheduler, sampling, the engine."""
