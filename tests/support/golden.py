"""Location of the golden vectors of the official code: a development set next to the checkout, not part of it."""
import json
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "golden").is_dir(),
                                  reason="needs the development set `shared/` next to the checkout (not distributed)")


def golden_json(name: str) -> Any:
    """Content of shared/golden/`name`."""
    return json.loads((SHARED / "golden" / name).read_text(encoding="utf-8"))


OFFICIAL = {"12B": "telechat-12b", "52B": "telechat-52b", "115B": "telechat2-115b"}
# Official ids that are not repeated, and the ones given instead (docs/tokenizers.md tells why). Where the official
# tokenizer overlooks a marker (single_word) or puts a dummy prefix before it, ours takes the marker alone.
DEVIATIONS = {
    "12B": {
        "<_user>": [20], "<_bot>": [21], "<_system>": [22],
        "<_user>你是谁？<_bot>我是TeleChat。<_end>": [20, 5134, 14395, 112203, 21, 38767, 48945, 21735, 111959, 2],
        "head<_end>tail": [1516, 2, 10242],
        "<reserve1><reserve2>abc<reserve3>": [23, 24, 93226, 25],
    },
    "52B": {"<reserve1><reserve2>abc<reserve3>": [25, 26, 608, 46516, 27]},
    "115B": {
        "<_user>": [4], "<_bot>": [5], "<_system>": [6],
        "<_user>你是谁？<_bot>我是TeleChat。<_end>": [4, 3921, 12070, 126271, 5, 29751, 50751, 25372, 126169, 2],
        "head<_end>tail": [1640, 2, 9975],
        "<reserve1><reserve2>abc<reserve3>": [34, 35, 62843, 36],
    },
}
# Official decoding inserts and loses spaces around special tokens (37 of 39 texts survive it); ours gives them back.
DECODE_DEVIATIONS = {("12B", "head <_end> tail"): ("head <_end> tail", "head  tail"),
                     ("115B", "head <_end> tail"): ("head <_end> tail", "head  tail")}
