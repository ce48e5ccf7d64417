"""Plans of all kinds that the recipes use, executed in float64: they compute what one rank computes.

Each compilation of a rank takes some eight seconds of a core; the graphs are kept, so that it happens once after a
change of model, recipe or training step. One layer per stage: what joins two layers is the same within a stage.
"""
import copy
import json
from functools import cache
from pathlib import Path

import numpy as np
import prepared
import pytest

from research.telechat.commands import plan as plan_command
from research.telechat.common.errors import ConfigError, ExecutionError
from research.telechat.interpret import cpu_step, norm, prediction, training, weights
from research.telechat.interpret import graphs as graphs_module
from research.telechat.interpret.features import features
from research.telechat.interpret.graphs import compiled
from research.telechat.interpret.operators import OPERATORS
from research.telechat.interpret.shrink import MAX_GRAD_NORM, fewer_ranks, shrink, uncut
from research.telechat.plan.plan import find_faults, read_plan
from research.telechat.recipe.legacy import translate
from research.telechat.recipe.read import read_recipe, set_key

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "research/telechat").glob("*.yaml") if "_cpu" not in path.stem)
ULYSSES = {"parallel_config.data_parallel": 1, "parallel_config.context_parallel": 2,
           "parallel_config.context_parallel_algo": "ulysses_cp", "parallel.enable_alltoall": True}
KINDS = {                                    # recipe, ranks, keys
    "data parallel, tied": ("finetune_telechat_7b", 2, {}),
    "heads exchanged": ("finetune_telechat_7b", 2, ULYSSES),
    "keys gathered, grouped heads": ("finetune_telechat2_115b_32k", 2, {}),
    "pipeline and model parallel, fused, remainders": ("finetune_telechat_52b", 4, {}),
    "virtual stages": ("finetune_telechat3_36b_64", 2, {
        "parallel_config.data_parallel": 1, "parallel_config.model_parallel": 1,
        "parallel_config.use_seq_parallel": False, "model.model_config.pp_interleave_num": 2}),
    "adapters, model parallel": ("finetune_telechat2_115b_lora", 2, {}),
    "prediction, grouped heads": ("predict_telechat2_115b", 2, {}),
    "prediction, fused": ("predict_telechat_52b", 2, {})}


@cache
def read(name):
    return read_recipe(ROOT / f"research/telechat/{name}.yaml")


def full(name, keys):
    recipe = copy.deepcopy(read(name))
    for key, value in keys.items():
        set_key(recipe, key, value)
    translate(recipe)
    return recipe


def small(kind):
    name, ranks, keys = KINDS[kind]
    layers = 4 if kind == "virtual stages" else 2 if "pipeline" in kind else 1
    return shrink(full(name, keys), ranks, {"num_layers": layers})


def start(words, folder, env, log):
    log.write_bytes(b"")
    return prepared.start(words, folder, env, str(log), ascend=True)


@pytest.fixture(scope="module")
def graphs():
    """(plan, uncut plan) of a kind, compiled once."""
    known = {}

    def of(kind):
        if kind not in known:
            recipe = small(kind)
            known[kind] = compiled(recipe, start=start), compiled(uncut(recipe), start=start)
        return known[kind]
    return of


@pytest.mark.slow
@pytest.mark.usefixtures("ascend_plugin")
class TestExecuted:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_plan_computes_what_one_rank_computes(self, kind, graphs):
        plan, whole = graphs(kind)
        result = (training if plan.plan.training else prediction).compare(plan, whole)
        assert result.fault() == ""
        if plan.plan.training:
            assert min(result.norms) > MAX_GRAD_NORM             # gradients were clipped

    def test_the_uncut_graph_is_the_real_model(self, graphs):
        """A float32 step on the CPU, through the Trainer: other kernels, another optimizer, no recomputation."""
        _, whole = graphs("data parallel, tied")
        given = weights.random_weights(whole.programs[0]["step"])
        batches = [training.make_batch(whole, seed) for seed in (1, 2)]
        expected = training.execute(whole, given, batches)
        losses, found = cpu_step.real_steps(whole.recipe, given, batches, prepared.run)
        assert losses == pytest.approx(expected.losses, rel=1e-6)
        assert max(weights.differences(found, expected.weights, given).values()) < cpu_step.LIMIT
        assert set(found) == set(given)

    def test_command(self, graphs, tmp_path, capsys):
        """The graphs are found by their content; nothing is compiled again."""
        graphs("data parallel, tied")
        options = ["--config", str(ROOT / "research/telechat/finetune_telechat_7b.yaml"), "--ranks", "2", "--execute",
                   "--sizes", "num_layers=1", "--declared_types", "--json", str(tmp_path / "result.json")]
        assert plan_command.main(options) == 0
        printed = capsys.readouterr().out
        assert "compiled in 0 s" in printed and "the plan computes what one rank computes" in printed
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["fault"] == "" and 0 < result["worst"] < training.LIMIT
        rounding = result["rounding"]                        # 16 bits differ from float64, and plans as much or less
        assert 1e-6 < rounding["of_types"] < 0.05 and rounding["between_plans"] < 2 * rounding["of_types"]

    def test_faults_are_found_and_named(self, graphs):
        plan, whole = graphs("data parallel, tied")

        def no_mask(node, *inputs):                    # inputs 6, 14 and 17: mask, next_tokens and sparse mode
            inputs = [*inputs[:6], None, *inputs[7:14], 2**31 - 1, *inputs[15:17], 0]
            return OPERATORS["FlashAttentionScore"](node, *inputs)
        looks_ahead = training.compare(plan, whole, 1, operators={**OPERATORS, "FlashAttentionScore": no_mask})
        assert "sees future tokens" in looks_ahead.fault() and looks_ahead.leak > 1e-6
        attend = "FlashAttentionScore in model/layers/0/attention/attend, by "
        assert f"the first operator that differs is {attend}" in looks_ahead.fault()

        def other_gradient(node, *inputs):
            dx, dweight = norm.rms_norm_grad(node, *inputs)
            return dx, dweight * (1 + 1e-6 * ("layers-CellList/0" in node.place and "ffn_norm" in node.place))
        wrong = training.compare(plan, whole, 1, operators={**OPERATORS, "RmsNormGrad": other_gradient})
        assert wrong.differences["model.layers.0.ffn_norm.weight"] > training.LIMIT
        assert "model.layers.0.ffn_norm.weight is the first parameter that differs" in wrong.fault()
        assert "the forward pass is right" in wrong.fault() and not wrong.first

    def test_ranks_that_should_agree_and_do_not(self, graphs):
        plan, whole = graphs("data parallel, tied")
        given = weights.random_weights(whole.programs[0]["step"])
        held = [weights.cut(given, plan, rank, "step") for rank in range(2)]
        merged = weights.merge(held, given, plan)
        assert all(np.array_equal(merged.weights[name], given[name]) for name in given) and not merged.stale
        held[1]["model.norm_out.weight"] = held[1]["model.norm_out.weight"] + 1e-6
        with pytest.raises(ExecutionError, match=r"model.norm_out.weight: rank 1 differs .*rank .* 1\.0e-06"):
            weights.merge(held, given, plan)
        del held[1]
        with pytest.raises(ExecutionError, match="no rank holds the whole of"):
            weights.merge(held, given, plan)


# ---- without compiling

def plans_of(training_plans):
    recipes = {name: read_plan(full(name, {})) for name in RECIPES}
    return {name: plan for name, plan in recipes.items() if plan.ranks > 1 and plan.training == training_plans}


@pytest.mark.parametrize("training_plans", [True, False])
def test_every_recipe_is_of_an_executed_kind(training_plans):
    """Whatever a recipe for several cards has, one of the plans above has: a new kind needs a plan there."""
    executed = {kind: features(read_plan(small(kind))) for kind in KINDS
                if read_plan(small(kind)).training == training_plans}
    everything = frozenset().union(*executed.values())
    recipes = plans_of(training_plans)
    assert recipes
    for name, plan in recipes.items():
        closest = max(executed, key=lambda kind: len(executed[kind] & features(plan)))
        assert not features(plan) - everything, (
            f"{name}: {sorted(features(plan) - everything)} is executed nowhere (closest: {closest}); add to KINDS")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_shrink_and_keep_their_kind(name):
    recipe = full(name, {})
    plan = read_plan(recipe)
    ranks = min(plan.ranks, 8)
    tiny = read_plan(shrink(recipe, ranks, {}))
    assert find_faults(tiny, ranks) == [] and tiny.model.hidden_size <= 256 and tiny.model.num_layers <= 4
    assert not features(plan) - features(tiny)
    one = read_plan(uncut(shrink(recipe, ranks, {})))
    assert one.ranks == 1 and one.model.hidden_size == tiny.model.hidden_size
    if plan.training:
        assert one.step_tokens == tiny.step_tokens


@pytest.mark.parametrize("options, words", [
    (["--sizes", "num_layers"], "--sizes num_layers: expected KEY=NUMBER"), (["--steps", "0"], "--steps and --jobs"),
    (["--ranks", "3"], "cannot be halved to 3 ranks"), (["--context.device_target", "CPU"], "device_target is CPU"),
    (["--sizes", "num_heads=3"], "num_heads")])
def test_command_refuses(options, words, capsys):
    recipe = str(ROOT / "research/telechat/finetune_telechat_7b.yaml")
    assert plan_command.main(["--config", recipe, "--ranks", "2", "--execute", *options]) == 1
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_degrees_are_halved():
    assert fewer_ranks({"dp": 1, "pp": 8, "mp": 8, "cp": 4}, 16) == {"dp": 1, "pp": 2, "mp": 2, "cp": 4}
    assert fewer_ranks({"dp": 8, "pp": 1, "mp": 1, "cp": 1}, 2) == {"dp": 2, "pp": 1, "mp": 1, "cp": 1}
    with pytest.raises(ConfigError, match="cannot be halved to 3 ranks"):
        fewer_ranks({"dp": 8, "pp": 1, "mp": 1, "cp": 1}, 3)
    with pytest.raises(ConfigError, match="num_heads"):
        shrink(full("finetune_telechat2_7b", {}), 2, {"num_heads": 3})


def test_kept_graphs_that_cannot_be_read(tmp_path, monkeypatch):
    """A file that is not a graph is named and removed, not believed."""
    monkeypatch.setattr(graphs_module.runtime, "cache_folder", lambda: tmp_path)
    recipe = uncut(small("data parallel, tied"))
    file = tmp_path / "graphs" / graphs_module._key(recipe) / "rank_0.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"no graph")
    with pytest.raises(ConfigError, match=r"rank_0\.gz, a graph kept from an earlier run, cannot be read"):
        compiled(recipe)
    assert not file.exists()


def test_recipes_that_differ_in_names_share_their_graphs():
    recipe = uncut(small("data parallel, tied"))
    key, model = graphs_module._key(recipe), recipe["model"]["model_config"]
    recipe["trainer"]["model_name"] = "another"
    model.update(temperature=0.9, chat_template="telechat3")
    assert graphs_module._key(recipe) == key
    model["theta"] = 2 * model.get("theta", 10000.0)
    assert graphs_module._key(recipe) != key
    del model["theta"]
    recipe["seed"] = 1
    assert graphs_module._key(recipe) != key
