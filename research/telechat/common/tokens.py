"""Token ids as settings give them."""
from typing import List, Sequence, Union

EndTokens = Union[int, Sequence[int], None]        # one id, several, or none


def end_tokens(setting: EndTokens) -> List[int]:
    """The ids that end an answer, as a list."""
    if setting is None:
        return []
    return [int(token) for token in setting] if isinstance(setting, (list, tuple)) else [int(setting)]
