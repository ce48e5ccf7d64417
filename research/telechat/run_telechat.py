"""Command: train or fine-tune, with the options of the earlier TeleChat script."""
import sys
from pathlib import Path

if __package__ in (None, ""):            # run by its path: not from this folder, whose rooms have one name only
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from research.telechat.commands.train_legacy import main

if __name__ == "__main__":
    sys.exit(main())
