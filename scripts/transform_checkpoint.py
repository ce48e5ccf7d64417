"""Command: split or merge a checkpoint for a parallel plan. See docs/parallel.md."""
import sys
from pathlib import Path

if __package__ in (None, ""):            # run by its path: not from this folder, whose rooms have one name only
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from research.telechat.commands.transform import main

if __name__ == "__main__":
    sys.exit(main())
