"""The search: what it offers passes every check, fits, and is the fastest of what there is."""
import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest

from research.telechat.commands.plan import main
from research.telechat.common.errors import ConfigError
from research.telechat.plan.cost import memory_of
from research.telechat.plan.plan import find_faults, read_plan, stage_layers
from research.telechat.plan.search import even_offset, search, search_prediction, sequences_of, shapes, with_changes
from research.telechat.plan.timing import step_time
from research.telechat.recipe.read import read_recipe

ROOT = Path(__file__).resolve().parents[2]
LARGE = "research/telechat/finetune_telechat2_115b.yaml"


def recipe_of(name):
    return copy.deepcopy(read_recipe(ROOT / f"research/telechat/{name}.yaml"))


@pytest.fixture(scope="module")
def found():
    return search(recipe_of("finetune_telechat2_115b"), 64, 64)


@pytest.mark.parametrize(("name", "cards", "sequences"), [
    ("finetune_telechat2_115b", 64, 64), ("finetune_telechat_7b", 8, 32), ("finetune_telechat_7b", 1, 4),
    ("finetune_telechat2_7b_lora", 8, 16), ("finetune_telechat2_115b_128k", 256, 64)])
def test_what_is_offered_passes_all_checks_and_fits(name, cards, sequences):
    recipe = recipe_of(name)
    try:
        offered = search(recipe, cards, sequences)
    except ConfigError as err:                                 # one card holds no full training of 7B
        assert cards == 1 and "fits 1 cards of 58 GB" in str(err)
        return
    assert offered == sorted(offered, key=lambda one: one.time.seconds) and 1 <= len(offered) <= 10
    for one in offered:
        plan = read_plan(with_changes(recipe, one.changes))
        assert plan == one.plan and not find_faults(plan, cards)
        assert plan.ranks == cards and plan.step_tokens == sequences * plan.model.seq_length
        assert all(memory_of(plan, stage).total <= 0.95 * plan.limit_gb * 1e9 for stage in range(plan.pp))
        assert one.time == step_time(plan)


@pytest.mark.parametrize("name", [
    "finetune_telechat_7b", "finetune_telechat_12b", "finetune_telechat_52b", "finetune_telechat2_3b",
    "finetune_telechat2_7b", "finetune_telechat2_7b_32k", "finetune_telechat2_35b", "finetune_telechat2_115b",
    "finetune_telechat2_115b_32k", "finetune_telechat3_36b", "finetune_telechat3_36b_64", "finetune_telechat2_35b_lora",
    "finetune_telechat2_115b_lora"])
def test_recipes_are_the_fastest_plans_but_for_a_hundredth(name):
    recipe = recipe_of(name)
    plan = read_plan(recipe)
    best = search(recipe, plan.ranks, sequences_of(recipe), keep=1)[0].time.seconds
    assert step_time(plan).seconds <= 1.011 * best
    assert max(memory_of(plan, stage).total for stage in range(plan.pp)) <= 0.951 * plan.limit_gb * 1e9


def test_no_shape_with_less_recomputation_is_faster(found):
    """Of the fastest plan, a layer less recomputed in any stage does not fit."""
    best = found[0].plan
    assert isinstance(best.recompute, list) and 0 < sum(best.recompute) < best.model.num_layers
    for stage, count in enumerate(best.recompute):
        if count:
            fewer = list(best.recompute)
            fewer[stage] -= 1
            assert memory_of(replace(best, recompute=fewer), stage).total > 0.95 * best.limit_gb * 1e9


def test_pruning_loses_nothing():
    """Branch and bound against the search that keeps everything."""
    recipe = recipe_of("finetune_telechat2_7b")
    few, all_of_them = search(recipe, 16, 16, keep=3), search(recipe, 16, 16, keep=10 ** 6)
    assert [one.time.seconds for one in few] == [one.time.seconds for one in all_of_them[:3]]
    assert len(all_of_them) > 10


def test_a_smaller_margin_is_never_slower(found):
    tight = search(recipe_of("finetune_telechat2_115b"), 64, 64, margin=0.0, keep=1)
    assert tight[0].time.seconds <= found[0].time.seconds


@pytest.mark.parametrize(("layers", "pp", "virtual"), [(96, 8, 1), (30, 4, 1), (70, 8, 3), (64, 16, 3), (30, 1, 1)])
def test_layers_beyond_an_even_share(layers, pp, virtual):
    plan = read_plan(with_changes(recipe_of("finetune_telechat2_115b"), {
        "model.model_config.num_layers": layers, "parallel_config.pipeline_stage": pp,
        "model.model_config.pp_interleave_num": virtual, "model.model_config.offset": even_offset(layers, pp, virtual),
        "parallel.pipeline_config": {"pipeline_interleave": virtual > 1}}))
    counts = [count for row in stage_layers(plan) for count in row]
    assert sum(counts) == layers and max(counts) - min(counts) <= 1


def test_shapes_use_all_cards_and_sequences():
    plan = read_plan(recipe_of("finetune_telechat2_115b_128k"))
    tried = list(shapes(plan, 128, 16))
    assert any(shape.cp > 1 for shape in tried) and len(set(tried)) == len(tried)
    for shape in tried:
        assert shape.dp * shape.mp * shape.pp * shape.cp == 128
        assert shape.dp * shape.batch * shape.micro_batches == 16


def test_command_prints_writes_and_draws(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main(["--search", "--model", "telechat2_35b", "--cards", "16", "--picture", "plans.png", "--json", "p.json",
                 "--runner_wrapper.scale_sense", "{type: DynamicLossScaleUpdateCell}"]) == 0
    out = capsys.readouterr().out
    recipe = tmp_path / "finetune_telechat2_35b_16_cards.yaml"
    assert "estimate for the first" in out and "the recipe as given" in out and str(recipe.name) in out
    assert (tmp_path / "plans.png").read_bytes().startswith(b"\x89PNG")
    written = read_plan(read_recipe(recipe))
    assert not find_faults(written, 16)
    assert main(["--config", str(recipe), "--ranks", "16", "--check"]) == 0
    assert read_recipe(recipe)["runner_wrapper"]["scale_sense"] == {"type": "DynamicLossScaleUpdateCell"}
    plans = json.loads((tmp_path / "p.json").read_text())["plans"]
    assert len(plans) == 10 and plans[0]["degrees"] in out and plans[0]["seconds"] <= plans[9]["seconds"]
    before = recipe.read_text()
    for config in (recipe, tmp_path / "over.yaml"):                    # it is the file, or inherits it
        (tmp_path / "over.yaml").write_text(f"base_config: {recipe.name}\n")
        assert main(["--search", "--config", str(config), "--cards", "16", "--write_recipe", str(recipe)]) == 1
        assert "is or inherits this file" in capsys.readouterr().err and recipe.read_text() == before
    assert main(["--search", "--model", "telechat2_35b", "--cards", "16"]) == 0          # its own file is replaced
    recipe.write_text("seed: 1\n")
    assert main(["--search", "--model", "telechat2_35b", "--cards", "16"]) == 1
    assert "was not written by a search" in capsys.readouterr().err and recipe.read_text() == "seed: 1\n"


@pytest.mark.parametrize(("words", "message"), [
    (["--search", "--model", "telechat2_115b"], "pass --cards N"),
    (["--search", "--model", "telechat3_99b", "--cards", "8"], "telechat3_99b"),
    (["--search", "--model", "telechat2_115b", "--cards", "8"], "fits 8 cards of 58 GB"),
    (["--search", "--model", "telechat_7b", "--cards", "8", "--margin", "1"], "--margin"),
    (["--search", "--config", "research/telechat/predict_telechat2_35b.yaml", "--cards", "4", "--picture", "x.png"],
     "--picture: belongs to the search for plans of training"),
    (["--search", "--model", "telechat_7b", "--cards", "8", "--global_batch", "-3"], "--global_batch")])
def test_what_cannot_be_searched_is_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_prediction_by_cards_and_batch():
    found = search_prediction(recipe_of("predict_telechat2_35b"), 4)
    assert {one.cards for one in found} == {2, 4}              # one card does not hold 69 GB
    for one in found:
        assert one.context >= 8192 and one.weights_gb + one.cache_gb <= 0.95 * 58
    by = {(one.cards, one.batch): one for one in found}
    assert by[4, 1].seconds_per_token < by[2, 1].seconds_per_token and by[4, 1].context > by[4, 2].context
    with pytest.raises(ConfigError, match="does not fit 1 card"):
        search_prediction(recipe_of("predict_telechat2_35b"), 1)


def test_a_search_keeps_the_sequences_of_the_recipe():
    assert sequences_of(read_recipe(ROOT / LARGE)) == 64
