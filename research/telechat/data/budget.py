"""A token limit for a data set: pieces beyond it are dropped and counted."""
from collections import Counter
from typing import Optional

import numpy as np

from research.telechat.data.encoding import Encoded

BEYOND = "dropped: beyond the token budget"


class TokenBudget:
    """Takes chunks until their pieces would exceed `most` tokens; None: no limit.

    Attributes: `taken`, tokens so far; `spent`, whether a piece was dropped. From then on everything is dropped.
    """

    def __init__(self, most: Optional[int] = None):
        self.most, self.taken, self.spent = most, 0, False

    def take(self, encoded: Encoded) -> Encoded:
        """The chunk truncated at the first piece beyond the limit, with adjusted counts: tokens of the removed pieces
        count as dropped, and so does a conversation or document without any piece left."""
        ends = self.taken + np.cumsum(encoded.sizes, dtype=np.int64)
        count = len(ends) if self.most is None else int(np.searchsorted(ends, self.most, side="right"))
        self.taken = int(ends[count - 1]) if count else self.taken
        if count == len(ends):
            return encoded
        self.spent = True
        place = int(encoded.sizes[:count].sum())
        rest = encoded.tokens[place:]
        fresh = int(encoded.fresh[count:].sum())
        counts = Counter(encoded.counts)
        counts.update({"tokens kept": -fresh, "tokens dropped": fresh, "tokens repeated": fresh - len(rest),
                       "answer tokens": -int((rest >= 0).sum()), "pieces": count - len(ends)})
        owned = set(encoded.owners[:count].tolist())
        for owner in sorted(set(encoded.owners[count:].tolist()) - owned):
            counts[encoded.fates[owner]] -= 1
            counts[BEYOND] += 1
        return encoded._replace(tokens=encoded.tokens[:place], sizes=encoded.sizes[:count],
                                fresh=encoded.fresh[:count], owners=encoded.owners[:count], counts=dict(counts))
