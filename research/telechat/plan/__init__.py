"""Whether a parallel plan can run, and what it costs."""
