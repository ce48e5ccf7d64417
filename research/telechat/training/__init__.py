"""The training step, its optimizer, log and checkpoints."""
