"""Requests refuse what makes no sense, and name it."""
import pytest

from research.telechat.common.errors import ConfigError, UserError
from research.telechat.generation.requests import Draining, QueueFull, Request, RequestTooLong
from research.telechat.generation.sampling import Sampling


@pytest.mark.parametrize(("changes", "message"), [
    ({"prompt": ()}, "prompt: expected at least one token"), ({"max_new_tokens": 0}, "max_new_tokens.*at least 1"),
    ({"max_new_tokens": -1, "prompt_logprobs": True}, "at least 0"), ({"seed": -1}, "seed"),
    ({"seed": 2 ** 32}, "seed"),
    ({"seed": True}, "seed"), ({"top_logprobs": -2}, "top_logprobs")])
def test_senseless_requests(changes, message):
    good = {"prompt": (1, 2), "sampling": Sampling(), "max_new_tokens": 3}
    assert Request(**good) and Request(**{**good, "max_new_tokens": 0, "prompt_logprobs": True})
    with pytest.raises(ConfigError, match=message):
        Request(**{**good, **changes})


def test_refusals_are_errors_of_the_user():
    assert all(issubclass(kind, UserError) for kind in (RequestTooLong, QueueFull, Draining))
