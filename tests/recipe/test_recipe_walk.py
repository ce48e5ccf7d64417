"""Every recipe of research/telechat loads, builds its config, can be planned, and compiles for its number of cards.

The walk goes over the files, so that a new recipe is in it from the day it exists. Recipes for Ascend compile with the
simulated runtime (ascend_sim), as the last rank of their plan (with pipeline parallelism the one that has the head),
and must send and hold what the planner says; those for a CPU compile on the CPU. Nothing is executed.

Made small, so that a compilation takes about ten seconds: width, length and vocabulary, the layers (two; with more
pipeline stages one per stage and virtual stage, the fewest that the planner permits), virtual stages (two where more
would need more than eight layers), and micro-batches (one per stage). The plan, the variant's conventions, precision,
recomputation, adapters, cache and everything else stay as the recipe has them.
"""
import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from compile_fixtures import NO_PLUGIN, agree, compile_on_cpu, compile_plan
from needs import require

from research.telechat.ascend_sim.account import Mesh
from research.telechat.commands import plan as plan_command
from research.telechat.plan.activations import loss_rows, recomputed
from research.telechat.plan.cost import cost_of
from research.telechat.plan.plan import find_faults, find_notes, read_plan
from research.telechat.plan.report import memory_notes, stages
from research.telechat.recipe.read import read_recipe
from research.telechat.spec.attention_form import documents_back_to_back
from research.telechat.spec.variants import GENERATION
from research.telechat.telechat_config import TelechatConfig

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "research/telechat").glob("*.yaml"))
EACH = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
SIZES = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "n_kv_heads", "vocab_size", "seq_length",
         "loss_chunk_rows")


def in_chunks(plan):
    """Whether head and loss are computed in chunks of rows."""
    at_once, rows = loss_rows(plan)
    return plan.training and at_once < rows


def fewest_virtual_stages(plan):
    """Virtual stages of the small model."""
    return plan.virtual_stages if plan.pp * plan.virtual_stages <= 8 else min(2, plan.virtual_stages)


def fewest_layers(plan):
    """Layers of the small model."""
    return max(2, plan.pp * fewest_virtual_stages(plan))


def shrunk(recipe):
    """The recipe with small sizes. Groups of query heads, whether the vocabulary can be cut, and whether the loss is
    computed in chunks, stay as they are."""
    small, plan = copy.deepcopy(recipe), read_plan(recipe)
    kv_heads = max(2, plan.mp * plan.ulysses)
    kv_heads *= 2 if plan.dp > 1 and plan.mp > 1 else 1     # shards large enough for the optimizer to shard them
    heads = kv_heads * (plan.model.num_heads // plan.model.n_kv_heads)
    values = (fewest_layers(plan), 32 * heads, 96 * heads, heads, kv_heads,
              4096 + (plan.model.vocab_size % plan.mp > 0), 256 * plan.cp, 96 if in_chunks(plan) else None)
    small["model"]["model_config"].update(zip(SIZES, values))
    if plan.virtual_stages > 1:
        small["model"]["model_config"]["pp_interleave_num"] = fewest_virtual_stages(plan)
    if plan.pp > 1:
        small["parallel_config"]["micro_batch_num"] = plan.pp
    return small


@EACH
def test_recipe_passes_the_planner(path, capsys):
    """No fault, no note, and an estimate of memory below the limit, on the cards that the recipe is for."""
    plan = read_plan(read_recipe(path))
    assert find_faults(plan, plan.ranks) == []
    assert find_notes(plan) == []
    assert memory_notes(plan, stages(plan)) == []
    assert plan_command.main(["--config", str(path), "--ranks", str(plan.ranks), "--check"]) == 0
    assert capsys.readouterr() == ("", "")


@EACH
def test_small_recipe_differs_in_sizes_only(path):
    """The walk compiles the recipe's own plan: what is made small changes no degree and no setting."""
    recipe = read_recipe(path)
    before, after = read_plan(recipe), read_plan(shrunk(recipe))
    differ = {key for key, value in vars(before.model).items() if value != getattr(after.model, key)}
    assert differ <= {*SIZES, "pp_interleave_num"} and find_faults(after, after.ranks) == []
    other = {key for key, value in vars(before).items() if key != "model" and value != getattr(after, key)}
    assert other <= {"micro_batches", "virtual_stages"}
    assert (before.virtual_stages > 1) == (after.virtual_stages > 1)
    config = {key: value for key, value in shrunk(recipe)["model"]["model_config"].items()
              if key not in ("type", "auto_register")}
    assert TelechatConfig(parallel_config=recipe["parallel_config"], **config).num_layers == fewest_layers(before)


def compile_small(path, folder):
    """(plan, the worker's report) of the recipe made small; no report where MindSpore has no Ascend plug-in."""
    recipe = shrunk(read_recipe(path))
    plan = read_plan(recipe)
    if plan.device == "CPU":
        return plan, compile_on_cpu(recipe, folder)
    if NO_PLUGIN:
        return plan, None
    mesh = Mesh(plan.pp, plan.dp, plan.cp, plan.mp)
    return plan, compile_plan(recipe, mesh, plan.ranks - 1, plan.model.seq_length + 1, timeout=600)


def graph_of(path):
    """What the small recipe's graph depends on: all settings but names, tokens and tokenizer, the variant's, and what a
    checkpoint and the choice of tokens are asked; how far YaRN stretches, and when the learning rate rises and falls,
    changes numbers in constants only."""
    recipe = shrunk(read_recipe(path))
    unseen = {"net_name", "chat_template", *GENERATION}
    if read_plan(recipe).model.extend_method == "YARN":
        unseen |= {"scaling_factor", "attention_factor", "training_seqlen", "base_seqlen"}
    given, settings = recipe["model"].pop("model_config"), vars(read_plan(shrunk(read_recipe(path))).model)
    models = [{key: value for key, value in model.items() if key not in unseen and not key.endswith("_token_id")}
              for model in (given, settings)]
    rest = {**recipe, "processor": None, "trainer": None, "checkpoint_conflict": None,
            "lr_schedule": recipe.get("lr_schedule", {}).get("type"),
            "runner_config": {**recipe.get("runner_config", {}), "epochs": None}}
    return json.dumps([rest, models], sort_keys=True, default=str)


@pytest.fixture(scope="module")
def compilations(request, tmp_path_factory):
    """Recipe -> future of its compilation, of the recipes whose test was chosen; two at a time, each a process. One
    for recipes that have the same graph when they are small, such as those of 3B and 7B of TeleChat2."""
    chosen = [item.callspec.params["path"] for item in request.session.items
              if getattr(item, "originalname", "") == "test_recipe_compiles"]
    pool, futures = ThreadPoolExecutor(2), {}
    for path in chosen:
        graph = graph_of(path)
        if graph not in futures:
            futures[graph] = pool.submit(compile_small, path, tmp_path_factory.mktemp(path.stem))
    yield {path: futures[graph_of(path)] for path in chosen}
    pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@EACH
def test_recipe_compiles(path, compilations):
    plan, report = compilations[path].result()
    require(report, NO_PLUGIN)
    assert report["ok"], report["error"] + "\n".join(report.get("details") or [])
    assert list(report["graphs"]) == (["step"] if plan.training else ["prefill", "decode"])
    if plan.device == "CPU":
        return
    rank = plan.ranks - 1
    if plan.training:
        agree(plan, rank, report["graphs"]["step"])
        check_training(plan, rank, report["graphs"]["step"])
    else:
        check_prediction(plan, rank, report["graphs"])


def check_attention(plan, rank, graph):
    """The flash attention kernel gets the recipe's settings: heads of one rank, scale, causal triangle, dropout.

    Where keys are gathered, the queries of a rank are a block of the sequence; the kernel counts a band from the lower
    right corner, so that query i of block b of s queries sees the keys up to s b + i.
    """
    model = plan.model
    keep = 1 - model.attention_dropout_prob if plan.training else 1.0
    blocks = plan.cp // plan.ulysses
    queries, block = model.seq_length // blocks, rank // plan.mp % plan.cp // plan.ulysses
    for way in graph["attention"]:
        assert way["head_num"] == model.num_heads // plan.mp // plan.ulysses
        assert way["keep_prob"] == pytest.approx(keep)
        assert way["scale"] == pytest.approx((model.hidden_size // model.num_heads) ** -0.5)
        if model.use_ring_attention:                           # which looks at the blocks of other ranks in other ways
            continue
        last = way["next_tokens"] + (model.seq_length - queries if blocks > 1 else 0)
        assert way["pre_tokens"] >= model.seq_length and last == queries * block
    if plan.training and not model.use_ring_attention:
        form = ("BNSD", 4 if blocks > 1 else 2)
        if documents_back_to_back(model, plan.cp // plan.ulysses):
            form = ("TND", 3)
        assert [(way["layout"], way["sparse_mode"], way["mask"]) for way in graph["attention"]] == [
            (*form, ["uint8", [2048, 2048]])]


def check_training(plan, rank, graph):
    """What the recipe asks for is in the graph."""
    operators, found = graph["operators"], graph["communication"]
    check_attention(plan, rank, graph)
    axes = {axis for names in found["by_axes"] for axis in names.split("+")}
    degrees = {"mp": plan.mp, "cp": plan.cp, "pp": plan.pp, "dp": plan.dp}
    assert axes - {""} == {axis for axis, degree in degrees.items() if degree > 1}
    attention = operators["FlashAttentionScore"]
    assert attention["forward"] >= sum(cost_of(plan, rank).layers)
    assert ("recompute" in attention) == (recomputed(plan, plan.pp - 1) > 0)
    assert ("AlltoAll" in found["by_operator"]) == (plan.ulysses > 1)
    if plan.sequence_parallel:
        assert found["by_operator"]["ReduceScatter"] > 0
    if plan.model.use_ring_attention:
        sends = [place for place in found["places"] if place["operator"] == "Send" and place["purpose"] == "attention"]
        assert {place["axes"] for place in sends} == {"cp"}


def check_prediction(plan, rank, graphs):
    """The cache is there, a prompt is read by flash attention, and a token is made from the paged cache."""
    memory = cost_of(plan, rank).memory
    for graph in graphs.values():
        assert graph["memory"]["parameters"]["bytes"] == memory.parameters
        assert graph["memory"]["kv_cache"]["bytes"] == memory.kv_cache
        check_attention(plan, rank, graph)
    layers = plan.model.num_layers
    assert graphs["prefill"]["operators"]["FlashAttentionScore"] == {"forward": layers}
    assert graphs["decode"]["operators"]["PagedAttention"] == {"forward": layers}
