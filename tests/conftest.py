"""Test-wide settings: the repository root is importable, MindSpore runs graphs on the CPU and keeps quiet."""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for path in (str(ROOT), str(ROOT / "tests")):
    if path not in sys.path:
        sys.path.insert(0, path)

os.environ.setdefault("GLOG_v", "3")                      # MindSpore: errors only
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
