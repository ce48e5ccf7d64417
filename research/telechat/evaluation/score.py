"""Log-likelihoods of tokens under a model: `Scorer`, and the perplexity of texts.

The loss of a token is the one of training (model/loss.py), so that held-out perplexity and evaluation agree. Only the
requested rows go through the head, and only two numbers per row leave the device: the logits of eight texts of 1024
tokens would be 5 GB. Independent of lm-evaluation-harness (evaluation/harness.py is its adapter).
"""
import math
from typing import Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from mindspore import Tensor, nn, ops
from tqdm import tqdm

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.evaluation.batches import Scored, count_texts, rolling_windows, score_batches
from research.telechat.evaluation.texts import Parts
from research.telechat.model import kernels
from research.telechat.telechat import TelechatForCausalLM
from research.telechat.text.vocab import Vocab


class _ScoreGraph(nn.Cell):
    """The model without its KV cache, its head applied to some rows, and the loss of their labels."""

    def __init__(self, model: nn.Cell):
        super().__init__(auto_prefix=False)
        self.model = model
        # If the rotary scaling depends on the length of a text, padding must not count. And a model with a cache whose
        # batch is sharded expects tables for each text.
        config = model.config
        own = model.model.by_length or (config.use_past and config.parallel_config.data_parallel > 1)
        self.tables = model.model.rotary_by_length if own else None
        self.set_train(False)

    def construct(self, tokens: Tensor, lengths: Tensor, rows: Tensor, targets: Tensor) -> Tuple[Tensor, Tensor]:
        """tokens: [B, S], lengths: [B], rows and targets: [C, K] -> log-likelihoods [C K] float32, argmax ids."""
        hidden = self.hidden(tokens, lengths)                                      # [B S, H]
        losses: Tuple[Tensor, ...] = ()
        likeliest: Tuple[Tensor, ...] = ()
        for chunk in range(rows.shape[0]):                                         # all of [C K, V] is too large
            logits = self.model.logits(self.model.gather_rows(hidden, rows[chunk], 0))
            loss, _ = self.model.loss.token_losses(logits, targets[chunk])         # [K]
            losses += (loss,)
            likeliest += (kernels.argmax(logits, -1),)
        return -ops.concat(losses, 0), ops.concat(likeliest, 0)

    def hidden(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Hidden states after the final norm, rows [B S, H]."""
        decoder = self.model.model
        if self.tables is None:
            return decoder(tokens, None, None)
        hidden, _, mask = decoder.prepare(tokens, None, None)
        rope = self.tables.all_positions(tokens, lengths)
        for layer in decoder.layers:
            hidden = layer(hidden, tokens.shape, rope, mask, None)
        return decoder.norm_out(hidden)


class Scorer:
    """Scores requests with a model. `limit`: tokens of the longest input, the model's seq_length.

    Args:
        model: TelechatForCausalLM with its weights, with or without a KV cache.
        batch_size: texts computed together; with data parallelism, a multiple of its degree.
        progress: show a progress bar.

    Raises:
        ConfigError: a parallel plan that cannot score, or a batch size that does not fit the plan.
    """

    def __init__(self, model: TelechatForCausalLM, batch_size: int = 8, progress: bool = True):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"--batch_size: expected a positive whole number, found {batch_size!r}")
        plan = model.config.parallel_config
        if plan.context_parallel > 1 or plan.pipeline_stage > 1:
            raise ConfigError(f"evaluation runs with data and model parallelism only; the recipe has context_parallel "
                              f"{plan.context_parallel} and pipeline_stage {plan.pipeline_stage}: set both to 1")
        if batch_size % plan.data_parallel:
            raise ConfigError(f"--batch_size: expected a multiple of parallel_config.data_parallel "
                              f"({plan.data_parallel}), found {batch_size}")
        self.model, self.batch_size, self.progress = model, batch_size, progress
        self.limit = model.config.seq_length
        self._graph: Optional[_ScoreGraph] = None

    def score(self, requests: Sequence[Scored], what: str = "scoring") -> List[Tuple[float, bool]]:
        """(log-likelihood, whether every scored token is the most likely one) of each request; (0, True) if empty.

        float32 log-likelihoods of the tokens are summed in float64.
        """
        config = self.model.config
        totals, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
        batches = score_batches(requests, self.batch_size, self.limit, config.pad_token_id or 0,
                                config.ignore_token_id)
        self.model.set_train(False)
        if self._graph is None:
            self._graph = _ScoreGraph(self.model)
        with tqdm(total=count_texts(requests), desc=what, unit="text", disable=not self.progress) as bar:
            for batch in batches:
                arrays = (batch.tokens, batch.lengths, batch.rows, batch.targets)
                values, likeliest = self._graph(*(Tensor(array) for array in arrays))
                count = len(batch.requests)
                np.add.at(totals, batch.requests, values.asnumpy()[:count].astype(np.float64))
                right = likeliest.asnumpy()[:count] == batch.targets.reshape(-1)[:count]
                np.logical_and.at(greedy, batch.requests, right)
                bar.update(batch.texts)
        return list(zip(totals.tolist(), greedy.tolist()))

    def rolling(self, texts: Sequence[Sequence[int]], prefix: int, what: str = "scoring") -> List[float]:
        """Log-likelihood of all tokens of each text (ids), the first given the token `prefix`."""
        windows: List[Scored] = []
        owners: List[int] = []
        for number, ids in enumerate(texts):
            mine = rolling_windows(ids, prefix, self.limit)
            windows += mine
            owners += [number] * len(mine)
        totals = [0.0] * len(texts)
        for owner, (value, _) in zip(owners, self.score(windows, what)):
            totals[owner] += value
        return totals


class Perplexity(NamedTuple):
    """How well a model predicts texts."""

    texts: int
    tokens: int
    characters: int
    bytes: int                     # in UTF-8
    log_likelihood: float          # natural logarithm, sum over all tokens

    def as_dict(self) -> JsonObject:
        """The counts, perplexity per token, and bits per byte (comparable between tokenizers)."""
        loss = -self.log_likelihood / max(self.tokens, 1)
        return {**self._asdict(), "loss_per_token": loss, "perplexity": math.exp(min(loss, 700.0)),
                "bits_per_byte": -self.log_likelihood / math.log(2) / max(self.bytes, 1)}


def perplexity_of(scorer: Scorer, parts: Parts) -> JsonObject:
    """As `Perplexity.as_dict`, with the number of `answers`, of texts and conversations (evaluation/texts.py)."""
    total = sum(value for value, _ in scorer.score(parts.windows, "perplexity"))
    tokens = sum(window.count for window in parts.windows)
    found = Perplexity(parts.texts, tokens, parts.characters, parts.bytes, total)
    return {**found.as_dict(), "answers": parts.answers}


def perplexity(scorer: Scorer, vocab: Vocab, texts: Iterable[str], prefix: int) -> Perplexity:
    """Perplexity of independent texts, in which markers count as ordinary characters."""
    texts = list(texts)
    encoded = vocab.encode_batch(texts)
    total = sum(scorer.rolling(encoded, prefix, "perplexity"))
    return Perplexity(len(texts), sum(map(len, encoded)), sum(map(len, texts)),
                      sum(len(text.encode()) for text in texts), total)
