"""The choice of tokens against a plain re-statement of the official rules, and the bookkeeping of batches."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.telechat.common.errors import ConfigError
from research.telechat.generation.batch import Row, check_room, padding_before, read_prompts
from research.telechat.generation.requests import Request
from research.telechat.generation.sampling import Sampling, adjust, candidates, choose


def official_probabilities(logits, temperature, top_k, top_p):
    """transformers' TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper and softmax, restated on all tokens."""
    scores = logits.astype(np.float64) / temperature
    if top_k:
        scores = np.where(scores < np.sort(scores)[-min(top_k, len(scores))], -np.inf, scores)
    if top_p is not None and top_p < 1:
        order = np.argsort(scores, kind="stable")                   # ascending, as transformers sorts
        probs = np.exp(scores[order] - scores.max())
        removed = np.cumsum(probs / probs.sum()) <= 1 - top_p
        removed[-1] = False
        scores[order[removed]] = -np.inf
    probs = np.exp(scores - scores.max())
    return probs / probs.sum()


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10 ** 6), size=st.sampled_from([2, 7, 300, 3000]), temperature=st.floats(0.05, 5),
       top_k=st.sampled_from([None, 0, 1, 5, 50, 5000]), top_p=st.sampled_from([None, 1.0, 0.01, 0.3, 0.85, 0.999]))
def test_candidates_are_the_official_ones(seed, size, temperature, top_k, top_p):
    logits = np.random.RandomState(seed).normal(0, 3, size).astype(np.float32)
    ids, weights = candidates(logits, Sampling(True, temperature, top_k, top_p))
    want = official_probabilities(logits, temperature, top_k, top_p)
    got = np.zeros(size)
    got[ids] = weights
    np.testing.assert_allclose(got, want, atol=1e-12)
    assert list(ids) == sorted(ids)


def test_penalties_of_the_answer_and_bias():
    """Presence and frequency penalty count the answer's tokens only, and the bias comes on top."""
    logits, seen = np.zeros(6, np.float32), np.array([1, 1, 2, 3, 3, 4])           # the prompt is 1 1 2
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((0, 2.0), (3, -1.0)))
    assert not sampling.greedy
    np.testing.assert_allclose(adjust(logits, seen, 3, [], sampling), [2, 0, 0, -2, -0.75, 0])
    np.testing.assert_allclose(adjust(logits, seen, 0, [], sampling), [2, 0, 0, -1, 0, 0])
    with pytest.raises(ConfigError, match="token 6 is outside the model's vocabulary of 6"):
        adjust(logits, seen, 0, [], Sampling(logit_bias=((6, 1.0),)))
    with pytest.raises(ConfigError, match="presence_penalty"):
        Sampling(presence_penalty=float("nan"))


def test_draws_follow_the_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    rng = np.random.RandomState(0)
    drawn = np.bincount([choose(logits, Sampling(True), rng) for _ in range(20000)], minlength=4) / 20000
    np.testing.assert_allclose(drawn, [0.5, 0.3, 0.15, 0.05], atol=0.01)
    assert choose(logits, Sampling(), rng) == 0


def test_repetition_penalty_counts_each_token_once():
    logits = np.array([2.0, -2.0, 1.0, 0.5], np.float32)
    result = adjust(logits, np.array([0, 1, 0, 1, 0]), 0, [], Sampling(repetition_penalty=2.0))
    np.testing.assert_allclose(result, [1.0, -4.0, 1.0, 0.5])
    np.testing.assert_allclose(logits, [2.0, -2.0, 1.0, 0.5])


def test_minimal_length_forbids_the_end():
    sampling = Sampling(min_new_tokens=2)
    assert np.argmax(adjust(np.array([1.0, 5.0], np.float32), np.array([0]), 1, [1], sampling)) == 0
    assert np.argmax(adjust(np.array([1.0, 5.0], np.float32), np.array([0]), 2, [1], sampling)) == 1


@pytest.mark.parametrize(("field", "value"), [("temperature", 0), ("temperature", -1.0), ("temperature", float("nan")),
                                              ("top_k", -1), ("top_k", 2.5), ("top_p", 0.0), ("top_p", 1.5),
                                              ("repetition_penalty", 0), ("repetition_penalty", "1")])
def test_senseless_settings_are_named(field, value):
    with pytest.raises(ConfigError, match=f"^{field}: expected "):
        Sampling(**{"do_sample": True, field: value})


def test_prompts_lose_their_padding():
    ids = [[5, 6, 3, 3], [3, 3, 8, 9], [3, 7, 3, 3], [4, 5, 6, 7]]
    assert [list(prompt) for prompt in read_prompts(ids, 3, 10)] == [[5, 6], [8, 9], [7], [4, 5, 6, 7]]
    assert padding_before(ids, 3) == padding_before(np.array(ids), 3) == [0, 2, 1, 0]
    assert padding_before(ids, None) == padding_before(ids, 3, 3) == [0, 0, 0, 0]
    assert [list(prompt) for prompt in read_prompts(ids[:2], 3, 10, 3)] == [[5, 6], [3, 3, 8, 9]]  # bos
    assert [list(prompt) for prompt in read_prompts([[5], [6, 7]], 3, 10)] == [[5], [6, 7]]
    assert [list(prompt) for prompt in read_prompts(np.array([4, 5]), None, 10)] == [[4, 5]]


@pytest.mark.parametrize(("ids", "message"), [([], "empty"), ([[3, 3]], "prompt 0 is empty"), ([[1], []], "prompt 1"),
                                              ([5, 10], "token 10.*10 tokens.*another model"), ([-1], "token -1"),
                                              (["a"], "expected a list of token ids"), ([1.5], "token ids")])
def test_prompts_that_cannot_be(ids, message):
    with pytest.raises(ConfigError, match=message):
        read_prompts(ids, 3, 10)


def test_sequence_ends_at_end_tokens_and_limits():
    first = Row(1, Request((5, 6), Sampling(), 3, frozenset({2})))
    second = Row(2, Request((7,), Sampling(), 2, frozenset({2})))
    for row, tokens in ((first, [8, 2]), (second, [9, 9])):
        for token in tokens:
            assert not row.finished
            row.append(token)
        assert row.finished
    assert [list(row.sequence) for row in (first, second)] == [[5, 6, 8, 2], [7, 9, 9]]


def test_prompt_without_room_is_refused():
    prompt = np.arange(8, dtype=np.int32)
    with pytest.raises(ConfigError, match="has 8 tokens, but the model's seq_length is 8"):
        check_room([prompt], [9], 8)
    with pytest.raises(ConfigError, match="has 8 tokens, but max_length is 8"):
        check_room([prompt], [8], 16)
