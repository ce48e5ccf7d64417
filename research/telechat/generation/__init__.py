"""Autoregressive generation: the scheduler, sampling, the engine."""
