"""The quick start on other conversations than those of examples: `quickstart_driver.py EXAMPLES OPTIONS...`."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts import quickstart

if __name__ == "__main__":
    quickstart.EXAMPLES = Path(sys.argv.pop(1))
    sys.exit(quickstart.main())
