"""What the planner says of activations, masks, the loss, HCCL's buffers, and the time of checkpoints."""
import copy
from pathlib import Path

import pytest
from plan_fixtures import small_recipe

from research.telechat.common.errors import ConfigError
from research.telechat.plan import activations, checkpoints, hccl
from research.telechat.plan.cost import cost_of, memory_of
from research.telechat.plan.plan import find_faults, read_plan
from research.telechat.plan.report import as_json, memory_notes, stages, text
from research.telechat.recipe.legacy import translate
from research.telechat.recipe.read import read_recipe

ROOT = Path(__file__).resolve().parents[2]
SHARED = {"layernorm_compute_type": "float32", "res_dtype": "float32"}
# Recipes as MindFormers published them for cards of 64 GB: what of them decides about memory.
PUBLISHED = {
    "TeleChat2-7B, 8 cards": {
        "limit": "58GB", "batch": 1, "recompute": {"recompute": True},
        "degrees": {"data_parallel": 8, "use_seq_parallel": True, "gradient_aggregation_group": 4},
        "model": {"net_name": "telechat2_7b", "seq_length": 8192, "compute_dtype": "bfloat16",
                  "softmax_compute_type": "float32", "param_init_type": "float32"}},
    "TeleChat-12B, 8 cards": {
        "limit": "59GB", "batch": 4, "recompute": {"recompute": True},
        "degrees": {"data_parallel": 8, "use_seq_parallel": True, "gradient_aggregation_group": 4},
        "model": {"net_name": "telechat_12b", "seq_length": 1024, "compute_dtype": "float16",
                  "softmax_compute_type": "float16", "param_init_type": "float16", "embed_dropout_prob": 0.1,
                  "hidden_dropout_prob": 0.1, "attention_dropout_prob": 0.1}},
    "TeleChat2-115B, 512 cards": {
        "limit": "54.5GB", "batch": 1,
        "recompute": {"recompute": False, "select_recompute": True,
                      "select_comm_recompute": [8, 8, 10, 11, 10, 7, 5, 4]},
        "degrees": {"data_parallel": 8, "model_parallel": 8, "pipeline_stage": 8, "use_seq_parallel": True,
                    "micro_batch_num": 8, "gradient_aggregation_group": 4},
        "model": {"net_name": "telechat2_115b", "seq_length": 8192, "compute_dtype": "bfloat16",
                  "softmax_compute_type": "float32", "param_init_type": "float32", "pp_interleave_num": 3,
                  "offset": [[-1, -1, 0, 0, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, -1]]}},
}


def published(name):
    """The plan of a published recipe, through what turns old keys into today's."""
    facts = PUBLISHED[name]
    recipe = copy.deepcopy(read_recipe(ROOT / "configs/telechat/finetune.yaml"))
    recipe["model"]["model_config"].update(facts["model"], loss_chunk_rows=0, **SHARED)
    recipe["optimizer"]["master_weights"] = "none"                       # nobody had them
    recipe["runner_config"]["batch_size"] = facts["batch"]
    recipe["parallel_config"].update(facts["degrees"])
    recipe["parallel"]["pipeline_config"] = {"pipeline_interleave": facts["degrees"].get("pipeline_stage", 1) > 1}
    recipe["recompute_config"].update(facts["recompute"])
    recipe["context"]["max_device_memory"] = facts["limit"]
    translate(recipe)
    return read_plan(recipe)


def plan_of(**keywords):
    return read_plan(small_recipe(**keywords))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_fit_their_cards(name):
    """They ran, so the estimate must not exceed what they allow themselves; nor be far below, where they were made to
    fill it."""
    plan = published(name)
    assert find_faults(plan) == [] and memory_notes(plan, stages(plan)) == []
    used = max(memory.total for memory in stages(plan)) / 1e9 / plan.limit_gb
    assert 0.8 < used <= 1.0, used


def test_peak_is_the_fuller_of_two_moments():
    plan = published("TeleChat2-7B, 8 cards")
    memory = memory_of(plan, 0)
    assert memory.peak == "loss" and memory.gradients_passing == 0
    assert memory.loss == 16 * 8192 * 131072
    stream = 8192 * 4096 * 4
    assert memory.activations == 30 * stream + stream                    # inputs of layers, embeddings
    twelve = memory_of(published("TeleChat-12B, 8 cards"), 0)
    assert twelve.peak == "backward" and twelve.loss == 0 and twelve.gradients_passing > 0
    assert all(memory_of(plan_of(), 0).total >= part for part in (
        activations.loss_bytes(plan_of(), 0), activations.backward_activations(plan_of(), 0)))


def test_loss_of_two_micro_batches_at_once():
    """One waits with exponentials and labels while the other is computed."""
    one, two = plan_of(dp=2, mp=2), plan_of(dp=2, mp=2, micro_batch_interleave_num=2)
    logits = 4 * 512 * 4096 // 2
    assert activations.loss_bytes(one, 0) == 16 * logits
    assert activations.loss_bytes(two, 0) == 24 * logits
    assert activations.loss_bytes(one, 10 ** 9) == 2 * logits + 10 ** 9  # a large head outweighs it


def test_loss_in_chunks():
    """The gradient of all logits in 16 bits, and what the loss makes of one chunk; or that gradient twice, as it is put
    together; or beside the gradient of the head. Two micro-batches at once keep two gradients."""
    def loss(rows, head=0, **keywords):
        return activations.loss_bytes(plan_of(dp=2, mp=2, model={"loss_chunk_rows": rows}, **keywords), head)
    logits, chunk = 4 * 512 * 4096 // 2, 128 * 4096 // 2
    assert loss(128) == 2 * 2 * logits and loss(512) == 2 * logits + 16 * 4 * chunk
    assert loss(128, 10 ** 9) == 2 * logits + 10 ** 9
    assert loss(512, micro_batch_interleave_num=2) == 2 * loss(512) - 16 * 4 * chunk
    assert activations.loss_rows(plan_of(mp=2, model={"vocab_size": 4097, "loss_chunk_rows": 64})) == (64, 1024)


def test_layer_by_hand():
    """4 x 512 tokens, hidden 512, feed-forward 1536, 8 heads, float16 with a float32 stream; two pieces."""
    layer = activations.layer_bytes(plan_of(mp=2, parallel_config={"use_seq_parallel": True}))
    tokens, stream = 2048, 1024
    assert layer.kept == stream * 512 * (4 + 2)
    gathered, inner = tokens * 512 * 2, tokens * 768 * 2
    attention = tokens * 5 * 256 * 2 + tokens * 4 * 64                   # q, k, v, result twice; statistics
    assert layer.full == 2 * stream * 512 * 4 + 2 * gathered + attention + 4 * inner
    assert layer.operator == inner and layer.gather == gathered // 2
    other = activations.layer_bytes(plan_of(mp=2, model={"layernorm_compute_type": "float16"}))
    same = activations.layer_bytes(plan_of(mp=2))
    assert other.full - same.full == 2 * tokens * 512 * 2                # norms have inputs of their own then
    kept = activations.layer_bytes(plan_of(mp=2, recompute_config={"mp_comm_recompute": False}))
    assert kept.kept == same.kept + tokens * 512 * 2


OPERATORS = [r"feed_forward\.mul", r"feed_forward\.silu"]
NORMS = [r".*_norm\.kernel\.norm"]


@pytest.mark.parametrize("setting, comm, operators, gathers", [
    (False, False, 0, 0), (OPERATORS, False, 8, 0), (OPERATORS[:1], NORMS, 4, 8),
    (dict.fromkeys(OPERATORS, True), {}, 8, 0),
    ({OPERATORS[0]: [1, 2]}, {NORMS[0]: [0, 1]}, 1, 0), ([r"attention\.wq"], [r"ffn_norm\.kernel\.norm"], 0, 4),
    ([r"feed_forward\.w1\.activation\.silu"], [r".*\.norm"], 0, 0)])
def test_operators_that_are_recomputed(setting, comm, operators, gathers):
    plan = plan_of(mp=2, pp=2, model={"num_layers": 8}, recompute_config={
        "recompute": False, "select_recompute": setting, "select_comm_recompute": comm},
        parallel_config={"use_seq_parallel": True, "micro_batch_num": 4})
    found = activations.repeated_operators(plan, 0), activations.repeated_gathers(plan, 0)
    assert found == (operators, gathers)
    layer = activations.layer_bytes(plan)
    embeddings = plan.tokens * 512 * 4
    assert activations.kept_activations(plan, 0) == embeddings + 2 * (
        4 * layer.full - operators * layer.operator - gathers * layer.gather)


def test_repeated_gathers_are_sent():
    """As the compiled graph sends them: 6291456 bytes more."""
    def sent(comm):
        return cost_of(plan_of(dp=2, mp=4, recompute_config={"recompute": False, "select_comm_recompute": comm},
                               parallel_config={"use_seq_parallel": True}), 0).sent_by("purpose")["activations"]
    assert sent(NORMS) - sent(False) == 6291456


def test_gathered_keys_by_hand():
    """Of the layer that is recomputed: keys and values of the other rank's 1024 tokens, and their gradients."""
    gathered, ring = (activations.layer_bytes(plan_of(cp=2, model={"use_ring_attention": ring}))
                      for ring in (False, True))
    assert gathered.full - ring.full == 2 * 1024 * 2 * 512 * 2


def test_masks_by_hand():
    """4 sequences of 512 tokens."""
    square, triangle = 512 ** 2, 2048 ** 2
    keys, padded = {"document_boundaries": True}, {"mask_pad_tokens": True}
    assert memory_of(plan_of(), 0).masks == 2 * triangle
    assert memory_of(plan_of(model={"use_attn_mask_compression": False}), 0).masks == 2 * square
    assert memory_of(plan_of(model=padded), 0).masks == square + 3 * 4 * square
    assert memory_of(plan_of(model={**keys, **padded}), 0).masks == square + 3 * 4 * square
    assert memory_of(plan_of(model=keys), 0).masks == 2 * triangle       # documents are back to back
    assert memory_of(plan_of(cp=2, model=keys), 0).masks == square + 3 * 4 * square // 2
    for model, masks in ((padded, square + 3 * 4 * square), (keys, 2 * triangle)):    # heads are sharded, not queries
        ulysses = plan_of(cp=2, model=model, parallel_config={"context_parallel_algo": "ulysses_cp"})
        assert memory_of(ulysses, 0).masks == masks
    assert memory_of(plan_of(cp=2, model={"use_ring_attention": True}), 0).masks == 0
    composed = plan_of(model={"use_flash_attention": False, "softmax_compute_type": "float32"})
    assert memory_of(composed, 0).masks == square + 4 * square
    waiting = plan_of(pp=2, model=padded, parallel_config={"micro_batch_num": 4})
    assert memory_of(waiting, 0).masks == square + 2 * 4 * square + 2 * 4 * square    # two wait


def test_dropout_masks_by_hand():
    def masks(stage=0, recompute=False, **model):
        plan = plan_of(model=model, recompute_config={"recompute": recompute})
        return activations.kept_masks(plan, stage) - 2 * 2048 ** 2               # without the triangle
    tokens = 4 * 512
    assert masks(attention_dropout_prob=0.1) == 2 * 4 * 8 * 512 ** 2 // 8
    assert masks(hidden_dropout_prob=0.1) == 2 * 2 * tokens * 512
    assert masks(embed_dropout_prob=0.1) == tokens * 512
    assert masks(recompute=True, attention_dropout_prob=0.1, hidden_dropout_prob=0.1) == 0
    keys = dict(model={"hidden_dropout_prob": 0.1, "vocab_size": 8, "tie_word_embeddings": False})
    one = memory_of(plan_of(recompute_config={"recompute": True}, **keys), 0)
    assert one.peak == "backward" and one.masks == 2 * 2048 ** 2 + 2 * tokens * 512       # of the layer in work


def test_communicators_follow_the_degrees():
    def names(rank=0, **keywords):
        return hccl.communicators(plan_of(**keywords), rank)
    assert names() == [] and names(dp=8) == ["world"] and names(mp=8) == ["world"]
    assert names(dp=2, mp=4) == ["world", "dp", "mp"]
    assert names(dp=2, mp=2, pp=2, parallel_config={"micro_batch_num": 4}) == ["world", "dp", "dp+mp", "mp", "pp"]
    assert "cp" in names(dp=2, cp=2) and "dp+cp" not in names(dp=2, cp=2)         # all ranks: the world


def test_buffers_of_hccl(monkeypatch):
    monkeypatch.delenv("HCCL_BUFFSIZE", raising=False)
    plan = plan_of(dp=2, mp=2, pp=2, parallel_config={"micro_batch_num": 4})
    assert hccl.buffer_bytes(plan, 0, 200) == 5 * 2 * 200 * 2 ** 20
    assert hccl.recommended_mb(plan) == 2                                # 4 x 512 x 512 x 2 bytes
    assert "5 communicators (world, dp, dp+mp, mp, pp) x 2 x 200 MB = 2.1 GB, of the 6.0 GB" in text(plan, 0, 0.4)
    assert "HCCL_BUFFSIZE=2 is recommended" in text(plan, 0, 0.4) and as_json(plan, 0, 0.4)["notes"] == []
    assert "recommended" not in text(plan_of(dp=8), 0, 0.4)              # one communicator: little
    monkeypatch.setenv("HCCL_BUFFSIZE", "600")
    assert as_json(plan, 0, 0.4)["hccl"]["bytes"] == 5 * 2 * 600 * 2 ** 20
    note, = as_json(plan, 0, 0.4)["notes"]
    assert "HCCL's buffers take 6.3 GB" in note and "at most 57GB" in note and "HCCL_BUFFSIZE to 2" in note
    monkeypatch.setenv("HCCL_BUFFSIZE", "much")
    with pytest.raises(ConfigError, match="HCCL_BUFFSIZE is 'much' in the environment"):
        text(plan, 0, 0.4)


def test_time_of_checkpoints():
    plan = read_plan(read_recipe(ROOT / "research/telechat/finetune_telechat2_115b.yaml"))
    machine = 8 * max(checkpoints.saved_bytes(plan, rank) for rank in range(64))
    assert checkpoints.disk_seconds(plan) == pytest.approx(machine / 2e9)
    assert checkpoints.disk_seconds(plan, weights_only=True) == pytest.approx(machine / 2e9 / 3, rel=1e-6)
    assert "saved or resumed in 90 s; weights 7.5 GB per rank, loaded in 30 s; at 2 GB/s per machine (assumed)" in text(
        plan, 0, 0.4)
    assert "saved" not in text(read_plan(read_recipe(ROOT / "research/telechat/predict_telechat2_7b.yaml")), 0, 0.4)
