"""Command: compare this machine's kernels, models and cards with NumPy. See docs/doctor.md."""
import sys
from pathlib import Path

if __package__ in (None, ""):            # run by its path: not from this folder, whose rooms have one name only
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from research.telechat.commands.doctor import main

if __name__ == "__main__":
    sys.exit(main())
