"""Token ids as settings give them."""
from typing import List, Sequence, Union

import numpy as np

EndTokens = Union[int, Sequence[int], None]        # one id, several, or none


def end_tokens(setting: EndTokens) -> List[int]:
    """The ids that end an answer, as a list."""
    if setting is None:
        return []
    return [int(setting)] if isinstance(setting, (int, np.integer)) else [int(token) for token in setting]
