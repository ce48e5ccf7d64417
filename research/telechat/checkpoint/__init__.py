"""Reading, writing, converting, cutting and choosing checkpoints."""
