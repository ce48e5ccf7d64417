"""Where the golden vectors of the official code lie. They are a development set beside the checkout, not part of it."""
import json
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "golden").is_dir(),
                                  reason="needs the development set `shared/` beside the checkout (not distributed)")


def golden_json(name: str) -> Any:
    """Content of shared/golden/`name`."""
    return json.loads((SHARED / "golden" / name).read_text(encoding="utf-8"))
