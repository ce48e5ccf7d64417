"""The formulas of TeleChat in PyTorch, for benchmarks/generate.py to compare with. Random weights; greedy only.

Written as one would write it for a CPU: plain operators, keys and values joined to the earlier ones at every step.
"""
import math
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch.nn import functional

Past = List[Tuple[torch.Tensor, torch.Tensor]]


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


class TorchTelechat:
    """A model with `generate` as the benchmark calls it."""

    def __init__(self, hidden: int, layers: int, heads: int, ffn: int, vocab: int, context: int):
        torch.manual_seed(0)
        self.hidden, self.heads, self.dim = hidden, heads, hidden // heads

        def matrix(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns) * 0.02

        self.layers: List[Dict[str, torch.Tensor]] = [
            {"norm": torch.ones(hidden), "query": matrix(hidden, hidden), "key_value": matrix(2 * hidden, hidden),
             "out": matrix(hidden, hidden), "out_bias": torch.zeros(hidden), "ffn_norm": torch.ones(hidden),
             "gate": matrix(ffn, hidden), "up": matrix(ffn, hidden), "down": matrix(hidden, ffn),
             "down_bias": torch.zeros(hidden)} for _ in range(layers)]
        self.table, self.head, self.norm = matrix(vocab, hidden), matrix(vocab, hidden), torch.ones(hidden)
        angles = torch.outer(torch.arange(context).float(), 10000.0 ** (-torch.arange(0, self.dim, 2) / self.dim))
        angles = torch.cat([angles, angles], -1)
        self.cos, self.sin = angles.cos(), angles.sin()

    def _rotate(self, x: torch.Tensor, start: int) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        rows = slice(start, start + x.shape[2])
        return x * self.cos[rows] + torch.cat([-second, first], -1) * self.sin[rows]

    def forward(self, ids: torch.Tensor, past: Optional[Past]) -> Tuple[torch.Tensor, Past]:
        """ids: [B, S] -> logits behind the last token [B, V], keys and values of all layers."""
        batch, seq = ids.shape
        start = past[0][0].shape[2] if past else 0
        x, cached = self.table[ids], []
        for index, layer in enumerate(self.layers):
            y = _norm(x, layer["norm"])
            query = functional.linear(y, layer["query"]).view(batch, seq, self.heads, self.dim).transpose(1, 2)
            both = functional.linear(y, layer["key_value"]).view(batch, seq, self.heads, 2 * self.dim).transpose(1, 2)
            key, value = both.split(self.dim, -1)
            query, key = self._rotate(query, start), self._rotate(key, start)
            if past:
                key, value = torch.cat([past[index][0], key], 2), torch.cat([past[index][1], value], 2)
            cached.append((key, value))
            scores = query @ key.transpose(-1, -2) / math.sqrt(self.dim)
            if seq > 1:
                scores = scores + torch.full((seq, seq), -1e9).triu(1)
            context = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, seq, self.hidden)
            x = x + functional.linear(context, layer["out"], layer["out_bias"])
            y = _norm(x, layer["ffn_norm"])
            y = functional.silu(functional.linear(y, layer["gate"])) * functional.linear(y, layer["up"])
            x = x + functional.linear(y, layer["down"], layer["down_bias"])
        return functional.linear(_norm(x[:, -1], self.norm), self.head), cached

    @torch.no_grad()
    def generate(self, prompts: list, new: int, clock: Any) -> None:
        """Greedy answers of `new` tokens; `clock.put` is called with the prompts and at every step."""
        clock.put(prompts)
        logits, past = self.forward(torch.tensor(prompts), None)
        for step in range(new):
            tokens = logits.argmax(-1, keepdim=True)
            clock.put(tokens.tolist())
            if step + 1 < new:
                logits, past = self.forward(tokens, past)
