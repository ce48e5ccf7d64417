"""How many rows head and loss are computed for at once (model/chunked_loss.py). The model and the planner ask here."""
from typing import Optional

LARGEST = 2 ** 26                      # logits of a chunk on one device, unless the recipe says how many rows it has
MOST = 64                              # chunks
_UNIT = 128                            # rows; what is computed in one piece by a matrix unit


def rows_at_once(rows: int, vocab: int, chunk_rows: Optional[int]) -> int:
    """Rows of each chunk but the last, of `rows` rows of `vocab` logits, those of one device; there are at most MOST.

    chunk_rows: what the recipe says; 0: all rows; None: chunks of about LARGEST logits, alike, in whole units.
    """
    if chunk_rows == 0:
        return rows
    least = -(-rows // MOST)
    if chunk_rows:
        return min(rows, max(chunk_rows, least))
    alike = max(least, -(-rows // max(1, -(-rows * vocab // LARGEST))))
    return min(rows, -(-alike // _UNIT) * _UNIT)
