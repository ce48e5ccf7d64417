"""The time model against published speeds, and that each of its terms moves an estimate the right way."""
import copy
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest

from research.telechat.plan.calibration import POINTS, Prepared, fit, leave_one_out, one_share
from research.telechat.plan.plan import read_plan
from research.telechat.plan.timing import REACHED, Efficiency, bandwidth, step_time, token_time
from research.telechat.recipe.read import read_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def points():
    return [Prepared(point) for point in POINTS]


@pytest.fixture(scope="module")
def plan():
    return read_plan(read_recipe(ROOT / "research/telechat/finetune_telechat2_115b.yaml"))


def test_five_constants_and_none_per_model(points):
    assert len(fields(Efficiency)) == 5
    found = fit(points)
    assert found.values() == pytest.approx(REACHED.values(), rel=0.01)         # those that are shipped
    assert all(0 < share < 1 for share in found.values()[:4])


def test_a_speed_is_foretold_from_the_others(points):
    """Within 20 % each, and clearly better than one MFU for all."""
    without = leave_one_out(points)
    assert len(without) == len(POINTS) and max(map(abs, without.values())) <= 0.20
    constant = one_share(points)
    mean = math.sqrt(sum(without[name] ** 2 for name in constant) / len(constant))
    assert mean < 0.6 * math.sqrt(sum(error ** 2 for error in constant.values()) / len(constant))


def seconds(plan, reached=REACHED):
    return step_time(plan, reached).seconds


@pytest.mark.parametrize("name", [field.name for field in fields(Efficiency)])
def test_each_constant_counts(plan, name):
    value = getattr(REACHED, name)
    slower = replace(REACHED, **{name: value * (2 if name == "latency" else 0.5)})
    assert seconds(plan, slower) > 1.002 * seconds(plan)


@pytest.mark.parametrize(("slower", "part"), [
    ({"recompute": True}, "matrix"), ({"sequence_parallel": False}, "memory"), ({"micro_batches": 8}, "pipeline"),
    ({"virtual_stages": 1}, "pipeline"), ({"optimizer_sharded": False}, "optimizer"), ({"interleaved_batches": 1},
                                                                                       "links")])
def test_each_term_moves_the_estimate(plan, slower, part):
    best = replace(plan, recompute=False, interleaved_batches=2, micro_batches=64, dp=8, virtual_stages=2,
                   model=replace(plan.model, offset=0))
    worse = replace(best, **slower)
    fast, slow = step_time(best), step_time(worse)
    share = {name: time.parts[part] / time.seconds for name, time in (("fast", fast), ("slow", slow))}
    assert slow.parts[part] > fast.parts[part] or share["slow"] > share["fast"]
    assert slow.tokens_per_second < fast.tokens_per_second


def test_longer_sequences_make_attention_the_larger_part(plan):
    longer = replace(plan, model=replace(plan.model, seq_length=32768))
    share = step_time(plan).parts["attention"] / seconds(plan)
    assert step_time(longer).parts["attention"] / seconds(longer) > 2 * share


def test_links_by_their_reach(plan):
    """8 cards of a machine are reached over seven links, 4 over three; another machine over the network."""
    assert bandwidth(plan, "mp") == 7 * 28e9
    assert bandwidth(replace(plan, mp=4), "mp") == 3 * 28e9
    assert bandwidth(replace(plan, dp=2, pp=4), "dp") == 25e9


def test_tokens_are_slower_with_a_longer_cache():
    recipe = copy.deepcopy(read_recipe(ROOT / "research/telechat/predict_telechat2_7b.yaml"))
    plan = read_plan(recipe)
    assert token_time(plan, 8192).seconds > 1.05 * token_time(plan, 0).seconds
    one, four = token_time(plan), token_time(replace(plan, batch=4))
    assert one.seconds < four.seconds < 1.2 * one.seconds and four.tokens_per_second > 3 * one.tokens_per_second
