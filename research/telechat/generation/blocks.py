"""The blocks of the KV cache: their users, and the reusable contents of unused ones. NumPy only.

A full block can be published under its contents: its tokens and all tokens before them. A later sequence that begins
with the same tokens shares the block instead of recomputing it. When its last user leaves, such a block is not freed at
once but evicted when space is needed, least recently used first. Contents are compared token by token, not by a hash.
(Prefix caching, as in vLLM: Kwon et al., 2023.)
"""
import itertools
from collections import OrderedDict
from typing import Dict, Hashable, List, Optional, Sequence, Tuple

import numpy as np

_Content = Tuple[Hashable, bytes]          # (name of the preceding content, or the root; the tokens)


class BlockPool:
    """Blocks 0 to num_blocks - 1, of `block_size` slots each."""

    def __init__(self, num_blocks: int, block_size: int):
        self.total, self.block_size = num_blocks, block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * num_blocks
        self._kept: OrderedDict[int, None] = OrderedDict()       # published, without users; the oldest first
        self._found: Dict[_Content, int] = {}
        self._content: Dict[int, _Content] = {}
        self._names: Dict[int, int] = {}                           # of published contents, with all before it
        self._next_name = itertools.count()

    @property
    def available(self) -> int:
        """Number of blocks that can be taken."""
        return len(self._free) + len(self._kept)

    @property
    def kept(self) -> int:
        """Number of blocks without users but with reusable contents."""
        return len(self._kept)

    def blocks_for(self, tokens: int) -> int:
        """Number of blocks needed for `tokens` tokens."""
        return -(-tokens // self.block_size)

    def take(self, count: int) -> Optional[List[int]]:
        """`count` blocks for one user, with undefined contents; None, without any effect, if there are not enough."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if not self._free:
                self._free.append(self._kept.popitem(last=False)[0])
                self._withdraw(self._free[-1])
            block = self._free.pop()
            self._users[block] = 1
            taken.append(block)
        return taken

    def give(self, blocks: Sequence[int]) -> None:
        """Release a user's blocks. The end of a sequence is evicted before its beginning."""
        for block in reversed(blocks):
            assert self._users[block] > 0, f"block {block} is freed, but not in use"
            self._users[block] -= 1
            if not self._users[block]:
                if block in self._content:
                    self._kept[block] = None
                else:
                    self._free.append(block)

    def match(self, root: Hashable, tokens: np.ndarray, most: int) -> List[int]:
        """The published blocks with the beginning of `tokens`, at most `most` tokens; the caller is now a user of them.

        root: whatever the keys depend on besides the tokens.
        """
        blocks: List[int] = []
        name = root
        for number in range(most // self.block_size):
            block = self._found.get((name, self._part(tokens, number)))
            if block is None:
                break
            if not self._users[block]:
                del self._kept[block]
            self._users[block] += 1
            blocks.append(block)
            name = self._names[block]
        return blocks

    def publish(self, root: Hashable, tokens: np.ndarray, blocks: Sequence[int]) -> None:
        """Publish `blocks`, which contain `tokens`: the full ones can be shared from now on."""
        name = root
        for number in range(len(tokens) // self.block_size):
            content = (name, self._part(tokens, number))
            block = self._found.setdefault(content, blocks[number])
            if block == blocks[number] and block not in self._content:
                self._content[block] = content
                self._names[block] = next(self._next_name)
            name = self._names[block]

    def forget(self) -> None:
        """Invalidate all cached contents: the weights have changed, or a step has failed."""
        for block in list(self._content):
            self._withdraw(block)
        self._free.extend(self._kept)
        self._kept.clear()

    def _part(self, tokens: np.ndarray, number: int) -> bytes:
        return tokens[number * self.block_size:(number + 1) * self.block_size].tobytes()

    def _withdraw(self, block: int) -> None:
        del self._found[self._content.pop(block)]
        del self._names[block]
