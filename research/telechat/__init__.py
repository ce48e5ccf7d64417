"""TeleChat for MindSpore: a plugin of MindFormers. Importing it imports nothing else."""

__version__ = "0.1.0"                      # setup.cfg reads it; data sets, checkpoints and training reports name it
