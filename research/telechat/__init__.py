"""TeleChat for MindSpore: a plugin of MindFormers. Importing it imports nothing else."""

__version__ = "1.0.0"                      # setup.cfg reads it; data sets, checkpoints and training reports name it
