"""The scheduler on a real model: other requests, chunked prefill and the cache change no answer."""
import numpy as np
import pytest
from model_fixtures import HF_CONFIGS, build_model, random_official
from reference import forward

from research.telechat.generation.passes import Settings
from research.telechat.generation.requests import Finished, Request, Started, Token
from research.telechat.generation.sampling import Sampling
from research.telechat.generation.scheduler import Scheduler

pytestmark = [pytest.mark.slow, pytest.mark.matrix]
# Up to 32 tokens the rotary scaling is one and the same, beyond it changes with every token.
CONFIG = {**HF_CONFIGS["telechat2_gqa"], "n_layer": 1, "training_seqlen": 32}
SAMPLED = Sampling(do_sample=True, temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def weights():
    return random_official(CONFIG)


@pytest.fixture(scope="module")
def model(weights):
    return build_model(CONFIG, weights, use_past=True, seq_length=64, num_blocks=64, block_size=4)


def requests(count=10):
    """Of many lengths; every second one is sampled; the prompts of two lead across the border of the scaling."""
    rng = np.random.RandomState(1)
    lengths = [3, 9, 17, 28, 2, 12, 30, 5, 21, 7][:count]
    return [Request(tuple(rng.randint(4, 97, length).tolist()), SAMPLED if number % 2 else Sampling(),
                    8 if number % 3 else 4, frozenset({11}), seed=number, top_logprobs=1)
            for number, length in enumerate(lengths)]


def serve(scheduler, asked, apart=1):
    """Events of each request without `Started`; `apart` steps lie between the arrivals."""
    events = [[] for _ in asked]
    for request, mine in zip(asked, events):
        scheduler.submit(request, mine.append)
        for _ in range(apart):
            scheduler.step()
    while scheduler.step():
        pass
    return [[event for event in mine if not isinstance(event, Started)] for mine in events]


def ids(events):
    return [event.id for event in events if isinstance(event, Token)]


@pytest.fixture(scope="module")
def alone(model):
    """What `stream` answers."""
    return [list(model.stream(
        request.prompt, seed=request.seed, max_new_tokens=request.max_new_tokens, eos_token_id=[11],
        do_sample=request.sampling.do_sample, temperature=0.9, top_k=20, top_p=0.9,
        repetition_penalty=request.sampling.repetition_penalty)) for request in requests()]


@pytest.mark.parametrize("settings", [
    Settings(slots=6, buckets=(1, 4)), Settings(slots=3, buckets=(1, 4), prefill_tokens=5, reuse=False)])
def test_answers_beside_others(model, alone, settings):
    scheduler = model.scheduler(settings)
    assert list(map(ids, serve(scheduler, requests()))) == alone
    stats = scheduler.stats()
    assert stats.finished == 10 and stats.blocks_used == 0


def test_deterministic_answers_are_equal_bit_by_bit(model):
    """Log-probabilities included."""
    settings = Settings(deterministic=True, prefill_tokens=16)
    together = serve(model.scheduler(settings), requests(6))
    assert together == [serve(model.scheduler(settings), [request])[0] for request in requests(6)]


def test_cached_beginnings(model, weights):
    """The second turn reads only what is new, and gives what it would without a cache."""
    scheduler = model.scheduler(Settings(buckets=(1,)))
    prompt = tuple(range(20, 35))
    first, = serve(scheduler, [Request(prompt, Sampling(), 5)])
    again = Request((*prompt, *ids(first), 40, 41), Sampling(), 8)
    scheduler.engine.pool.take(0)
    second, = serve(scheduler, [again])
    assert scheduler.stats().cached_tokens == 16
    fresh, = serve(Scheduler(scheduler.engine, Settings(buckets=(1,), reuse=False)), [again])
    assert ids(second) == ids(fresh)
    # A sequence that crosses the border has nothing to share.
    serve(scheduler, [Request((*prompt, *ids(first)), Sampling(), 20)])
    assert scheduler.stats().cached_tokens == 16
    expected = forward(CONFIG, weights, np.array([again.prompt]))[0][0, -1].argmax()
    assert ids(second)[0] == expected


def test_log_probabilities_of_prompt_and_answer(model, weights):
    prompt = tuple(np.random.RandomState(3).randint(4, 97, 23).tolist())
    request = Request(prompt, Sampling(), 1, top_logprobs=2, prompt_logprobs=True)
    (scores, token, end), = serve(model.scheduler(Settings(buckets=(1,), prefill_tokens=10)), [request])
    assert end == Finished("length")
    logits = forward(CONFIG, weights, np.array([prompt]))[0][0].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    given = [*scores.logprobs[1:], token.logprob]
    np.testing.assert_allclose(given, expected[range(23), [*prompt[1:], token.id]], atol=1e-4)
    assert [top[0][0] for top in (*scores.top[1:], token.top)] == expected.argmax(-1).tolist()


def test_streams_in_turns(model, alone):
    """Two streams that are read alternately, and answers that need the cache which they have: none disturbs another."""
    asked = requests()
    streams = [model.stream(asked[number].prompt, max_new_tokens=asked[number].max_new_tokens, eos_token_id=[11],
                            do_sample=False) for number in (4, 6)]
    got = [[next(stream)] for stream in streams]
    whole = model.generate([list(asked[2].prompt)] * 4, max_new_tokens=40, eos_token_id=-1, do_sample=False)
    assert all(len(answer) == 57 for answer in whole)                     # 60 of 64 blocks
    for stream, tokens in zip(streams, got):
        tokens += stream
    assert got == [alone[4], alone[6]]
    assert model._engine().pool.available == 64


def test_session_of_a_chat(model):
    """Turns of one session share the cache; another session, or none, shares nothing."""
    pool = model._engine().pool
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    prompt = list(range(30, 42))
    want = list(model.stream(prompt, **settings))
    first, second = object(), object()
    assert list(model.stream(prompt, session=first, **settings)) == want and pool.kept == 3
    assert list(model.stream([*prompt, *want, 5], session=first, **settings)) == list(
        model.stream([*prompt, *want, 5], **settings))
    assert pool.kept == 5
    next(model.stream([9] * 4, session=second, **settings))
    assert pool.kept == 1


def test_engine_of_mindformers_generator(weights, model):
    """`FrameworkEngine`, as on a card with dynamic shapes, lets sequences enter and leave too."""
    from research.telechat.generation.engine import FrameworkEngine
    dynamic = build_model(CONFIG, weights, use_past=True, seq_length=64, num_blocks=64, block_size=4, is_dynamic=True)
    dynamic._step_engine = FrameworkEngine(dynamic)
    asked = requests(6)
    expected = serve(model.scheduler(Settings(slots=1, buckets=(1,))), asked)
    got = serve(dynamic.scheduler(Settings(slots=3, buckets=(1, 4))), asked)
    assert list(map(ids, got)) == list(map(ids, expected))
    assert len(dynamic.compile_cache) == 2
