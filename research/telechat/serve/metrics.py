"""Counters and timings in Prometheus format."""
from typing import Callable, Iterator, Optional, Sequence, Union

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from research.telechat.generation.requests import Stats

_SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LONG = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The metrics of one server. `stats` returns those of the scheduler; None while there is none."""

    def __init__(self, stats: Callable[[], Optional[Stats]]):
        self.registry = CollectorRegistry()
        self._stats = stats

        def histogram(name: str, what: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"telechat_{name}", what, buckets=buckets, registry=self.registry)
        self.requests = Counter("telechat_requests", "HTTP requests by route and status.", ["route", "status"],
                                registry=self.registry)
        self.queue_seconds = histogram("queue_seconds", "From arrival to the start of the prompt.", _LONG)
        self.first_token_seconds = histogram("first_token_seconds", "From arrival to the first token.", _LONG)
        self.between_tokens_seconds = histogram("between_tokens_seconds", "Time between two tokens of an answer.",
                                                _SHORT)
        self.request_seconds = histogram("request_seconds", "From arrival to the end of the answer.", _LONG)
        self.registry.register(self)

    def collect(self) -> Iterator[Union[CounterMetricFamily, GaugeMetricFamily]]:
        """The scheduler's current metrics."""
        stats = self._stats()
        if stats is None:
            return
        for name, what, value in (
                ("waiting", "Requests in the queue.", stats.waiting),
                ("running", "Requests being answered.", stats.running),
                ("kv_blocks_total", "Blocks of the KV cache.", stats.blocks_total),
                ("kv_blocks_used", "Blocks of the KV cache held by running requests.", stats.blocks_used),
                ("kv_blocks_cached", "Blocks kept for reuse by later prompts.", stats.blocks_cached)):
            yield GaugeMetricFamily(f"telechat_{name}", what, value=value)
        yield CounterMetricFamily("telechat_steps", "Steps of the engine.", value=stats.steps)
        tokens = CounterMetricFamily("telechat_tokens", "Prompt tokens, prompt tokens found in the cache, and "
                                                        "generated tokens.", labels=["kind"])
        for kind, value in (("prompt", stats.prompt_tokens), ("cached", stats.cached_tokens),
                            ("generated", stats.generated_tokens)):
            tokens.add_metric([kind], value)
        yield tokens
        answers = CounterMetricFamily("telechat_answers", "Answers by how they ended.", labels=["outcome"])
        for outcome, value in (("finished", stats.finished), ("cancelled", stats.cancelled), ("failed", stats.failed)):
            answers.add_metric([outcome], value)
        yield answers

    def page(self) -> bytes:
        """All metrics as text."""
        page: bytes = generate_latest(self.registry)
        return page
