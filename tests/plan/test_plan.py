"""The planner: what it refuses, what it counts, what it says. Against the compiler: test_sharding_compile.py."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from plan_fixtures import small_recipe

from research.telechat.common.errors import ConfigError
from research.telechat.plan.cost import (
    cost_of,
    flops_per_token,
    gather,
    link_of,
    memory_of,
    parameter_count,
    reduce,
    tokens_per_second,
)
from research.telechat.plan.plan import bubble, find_faults, find_notes, read_plan, stage_layers
from research.telechat.plan.report import as_json, text
from research.telechat.recipe.read import read_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path for path in (ROOT / "research/telechat").glob("*.yaml"))


def plan_of(**keywords):
    return read_plan(small_recipe(**keywords))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_plan_without_faults(path):
    plan = read_plan(read_recipe(path))
    assert find_faults(plan) == []
    assert text(plan, 0, 0.4)
    json.dumps(as_json(plan, plan.ranks - 1, 0.4))


def test_sizes_of_the_models():
    folder = ROOT / "research/telechat"
    found = {name: parameter_count(read_plan(read_recipe(folder / f"finetune_{name}.yaml")))
             for name in ("telechat_7b", "telechat_12b", "telechat_52b", "telechat2_115b")}
    # Embedding, layers, norms, head, counted by hand from the sizes of the official configs.
    layer_7b = 4 * 4096 * 4096 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 4096
    assert found["telechat_7b"] == 160256 * 4096 + 30 * layer_7b + 4096
    layer_115b = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 40960 + 4 * 8192
    assert found["telechat2_115b"] == 2 * 131072 * 8192 + 96 * layer_115b + 8192
    assert found["telechat_52b"] == 2 * 80896 * 8192 + 64 * (4 * 8192 ** 2 + 3 * 8192 * 21824 + 2 * 8192) + 8192
    assert 11e9 < found["telechat_12b"] < 13e9


def test_every_recipe_fits_its_cards():
    for path in RECIPES:
        plan = read_plan(read_recipe(path))
        assert max(memory_of(plan, stage).total for stage in range(plan.pp)) / 1e9 <= plan.limit_gb, path


# ---- faults: (keywords of the recipe, words that the one line must hold)
FAULTS = {
    "ranks": (dict(dp=2, mp=4), "set parallel_config.data_parallel to 4", 16),
    "ranks that no data parallelism can make": (dict(mp=4), "does not divide 6", 6),
    "heads": (dict(mp=16, model={"intermediate_size": 1536}), "model_config.num_heads (8) must be a multiple", None),
    "kv heads": (dict(mp=4, model={"n_kv_heads": 2}), "model_config.n_kv_heads (2) must be a multiple of "
                 "parallel_config.model_parallel (4)", None),
    "feed-forward": (dict(mp=4, model={"intermediate_size": 1538}), "model_config.intermediate_size (1538)", None),
    "layers": (dict(pp=2, model={"num_layers": 3}, parallel_config={"micro_batch_num": 4}),
               "3 layers on 2 stages leave 1 to be added", None),
    "offset": (dict(pp=2, model={"offset": [1, 2, 3]}, parallel_config={"micro_batch_num": 4}),
               "expected 2 whole numbers", None),
    "empty stage": (dict(pp=3, model={"num_layers": 3, "offset": [1, -1, 0]}, parallel_config={"micro_batch_num": 4}),
                    "with no layers", None),
    "micro-batches": (dict(pp=2, parallel_config={"micro_batch_num": 1}), "micro_batch_num (1) must be at least", None),
    "sequence": (dict(cp=4, model={"seq_length": 510}), "model_config.seq_length (510) must be a multiple", None),
    "rows": (dict(mp=8, model={"seq_length": 511}, parallel_config={"use_seq_parallel": True}),
             "must be a multiple of parallel_config.model_parallel (8)", None),
    "context without flash": (dict(cp=2, model={"use_flash_attention": False}), "use_flash_attention True", None),
    "ring with documents": (dict(cp=2, model={"use_ring_attention": True, "document_boundaries": True}),
                            "supports only the causal mask", None),
    "ulysses heads": (dict(mp=4, cp=4, parallel_config={"context_parallel_algo": "ulysses_cp"}),
                      "model_config.num_heads (8) must be a multiple of model_parallel * context", None),
    "ulysses and ring": (dict(cp=2, model={"use_ring_attention": True},
                              parallel_config={"context_parallel_algo": "ulysses_cp"}), "nothing to send", None),
    "algorithm": (dict(cp=2, parallel_config={"context_parallel_algo": "magic"}), "context_parallel_algo", None),
    "data parallel mode": (dict(mp=2, parallel={"parallel_mode": 0}), "parallel.parallel_mode is 0", None),
    "CPU": (dict(mp=2, context={"device_target": "CPU"}), "data parallelism only", None),
    "interleaving": (dict(pp=2, model={"num_layers": 4, "pp_interleave_num": 2},
                          parallel_config={"micro_batch_num": 4}), "pipeline_interleave is not", None),
    "prediction in stages": (dict(pp=2, base="predict"), "prediction runs with model parallelism only", None),
    "no cache": (dict(base="predict", model={"use_past": False}), "use_flash_attention False", None),
    "cache": (dict(base="predict", model={"num_blocks": 4}), "set num_blocks to at least 32", None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_one_line_that_says_what_to_change(name):
    keywords, words, ranks = FAULTS[name]
    faults = find_faults(plan_of(**keywords), ranks)
    assert len([fault for fault in faults if words in fault]) == 1, faults
    assert all("\n" not in fault for fault in faults)


@pytest.mark.parametrize("keys, words", [
    ({"parallel_config": {"model_parallel": "four"}}, "parallel_config.model_parallel: expected a whole number"),
    ({"context": {"max_device_memory": "lots"}}, "context.max_device_memory"),
    ({"runner_config": {"batch_size": 0}}, "runner_config.batch_size"),
    ({"recompute_config": 3}, "recompute_config: expected a section"),
])
def test_unreadable_keys_are_named(keys, words):
    recipe = small_recipe(dp=2)
    for name, section in keys.items():
        recipe[name] = {**recipe[name], **section} if isinstance(section, dict) else section
    with pytest.raises(ConfigError, match=words):
        read_plan(recipe)


def test_stages_follow_offset():
    plan = plan_of(pp=4, model={"num_layers": 10, "offset": [-1, 1, 1, 1]}, parallel_config={"micro_batch_num": 4})
    assert stage_layers(plan) == [[1, 3, 3, 3]]
    interleaved = plan_of(pp=2, model={"num_layers": 5, "pp_interleave_num": 2, "offset": [[0, 1], [0, 0]]},
                          parallel_config={"micro_batch_num": 4},
                          parallel={"pipeline_config": {"pipeline_interleave": True}})
    assert stage_layers(interleaved) == [[1, 2], [1, 1]] and find_faults(interleaved) == []


def test_notes():
    notes = find_notes(plan_of(dp=2, mp=2, pp=2, model={"vocab_size": 4095}, parallel_config={"micro_batch_num": 2},
                               parallel={"enable_parallel_optimizer": False}))
    assert len(notes) == 3 and "4095" in notes[0] and "optimizer" in notes[1] and "is idle" in notes[2]
    ring = find_notes(plan_of(cp=2, model={"use_ring_attention": True}))
    assert "use_ring_attention" in ring[0] and not find_notes(plan_of(cp=2))


def test_bubble():
    assert bubble(plan_of(pp=8, model={"num_layers": 8}, parallel_config={"micro_batch_num": 57})) == 7 / 64
    assert bubble(plan_of(dp=8)) == 0


def test_rings():
    assert gather(800, 8) == 700 and reduce(800, 8) == 1400 and reduce(800, 1) == 0


def test_memory_of_optimizer_parallelism_by_hand():
    """8 data-parallel ranks: each keeps an eighth of every matrix, and the norms and biases whole, in float32."""
    memory = memory_of(plan_of(dp=8), 0)
    matrices, table = 4096 * 512 + 2 * (4 * 512 ** 2 + 3 * 512 * 1536), 4096 * 512
    vectors = 512 + 2 * 4 * 512
    assert memory.parameters == 2 * matrices // 8 + 4 * vectors
    assert memory.optimizer == 8 * (matrices // 8 + vectors)
    assert memory.remainder == 2 * matrices // 8
    assert memory.gathered == 2 * matrices
    assert memory.gradients == 0
    memory = memory_of(plan_of(dp=8, optimizer={"master_weights": "float32"}, model={"param_init_type": "float32"}), 0)
    assert memory.parameters == 4 * (matrices // 8 + vectors) and memory.remainder == 0
    assert memory.optimizer == 8 * (matrices // 8 + vectors)
    assert memory.gathered == 2 * matrices + 2 * table          # layers travel in 16 bits, the whole table as it is


def test_remainders_are_updated_where_they_are():
    """Nothing more is sent than without them, and half of what float32 gradients are."""
    def gradients(kind, dtype):
        plan = plan_of(dp=8, optimizer={"master_weights": kind}, model={"param_init_type": dtype,
                                                                        "norm_init_type": "float32"})
        return cost_of(plan, 0).sent_by("purpose")["gradients"]
    assert gradients("remainder", "float16") == gradients("none", "float16")
    assert gradients("float32", "float32") == pytest.approx(2 * gradients("none", "float16"), rel=0.01)


def test_traffic_of_sequence_parallelism_by_hand():
    """Per layer 4 gathers or scatters forward, 4 backward, 2 again when recomputed (Korthikanti et al., 2022)."""
    plan = plan_of(dp=2, mp=4, parallel_config={"use_seq_parallel": True})
    once = 4 * 512 * 512 * 2 * 3 / 4                   # batch * tokens * hidden * 16 bit, three quarters of it
    ends = 2 * once + 2 * once                         # embedding and head, both ways
    loss = 5 * 2 * 4 * 512 * 4 * 3 / 4
    assert cost_of(plan, 0).sent_by("purpose")["activations"] == 2 * 10 * once + ends + loss


@pytest.mark.parametrize("degrees", [dict(dp=2, mp=4), dict(dp=1, mp=8), dict(dp=4, mp=2), dict(dp=2, mp=2, cp=2)])
@pytest.mark.parametrize("layers", [1, 2, 12])
def test_sequence_parallelism_never_sends_more(degrees, layers):
    def cost(on, **sections):
        return cost_of(plan_of(**degrees, model={"num_layers": layers}, parallel_config={"use_seq_parallel": on},
                               **sections), 0)
    assert cost(True).sent <= cost(False).sent
    kept = {"recompute_config": {"recompute": False}}
    assert cost(True, **kept).memory.activations < cost(False, **kept).memory.activations


def test_targets_of_the_small_model():
    """Megabytes per rank and step that the plugin holds itself to; test_sharding_compile.py proves them."""
    def sent(rank=0, **keywords):
        return cost_of(plan_of(**keywords), rank).sent / 1e6
    deep = dict(mp=8, pp=2, parallel_config={"use_seq_parallel": True, "micro_batch_num": 4})
    assert sent(dp=8) <= 31.4
    assert sent(dp=2, mp=4) <= 80
    assert sent(dp=2, mp=4, parallel_config={"use_seq_parallel": True}) <= 60
    assert sent(**deep) <= 170 and sent(8, **deep) <= 150


def test_speed_by_hand():
    plan = plan_of(dp=8)
    matrices = 4096 * 512 + 2 * (4 * 512 ** 2 + 3 * 512 * 1536)
    flops = 6 * matrices + 12 * 2 * 512 * 512
    assert flops_per_token(plan) == flops
    assert tokens_per_second(plan, 0.5) == pytest.approx(8 * 313e12 * 0.5 / flops)


def test_links_follow_the_order_of_ranks():
    plan = plan_of(dp=2, mp=8, pp=2, parallel_config={"micro_batch_num": 4})
    assert [link_of(plan, axis) for axis in ("mp", "dp", "pp")] == ["machine", "network", "network"]


def test_lora_trains_little():
    lora = {"pet_type": "lora", "lora_rank": 8, "target_modules": ".*wq|.*wo"}
    memory = memory_of(plan_of(model={"pet_config": lora}), 0)
    assert memory.optimizer == 8 * 2 * 2 * (8 * 512 + 8 * 512)
    assert memory.parameters > memory.optimizer


def test_recomputation_and_slices_shrink_activations():
    def kept(recompute, part=False):
        plan = plan_of(mp=4, model={"num_layers": 8},
                       recompute_config={"recompute": recompute, "recompute_slice_activation": part})
        return memory_of(plan, 0).activations
    assert kept(True, part=True) < kept(True) < kept(False)


# ---- the command

def command(*arguments, expect=0):
    done = subprocess.run([sys.executable, str(ROOT / "scripts/plan.py"), *map(str, arguments)], capture_output=True,
                          text=True, check=False, timeout=120, cwd=ROOT)
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def test_command_writes_table_json_and_picture(tmp_path):
    out, _ = command("--config", "research/telechat/finetune_telechat2_115b.yaml", "--ranks", 64, "--rank", 63,
                     "--json", tmp_path / "plan.json", "--picture", tmp_path / "plan.png")
    assert "115" in out.splitlines()[0] and "stage  layers" in out and "tokens/s" in out
    result = json.loads((tmp_path / "plan.json").read_text())
    assert len(result["stages"]) == 8 and result["rank"]["stage"] == 7
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.png"]


def test_command_without_mindspore():
    """A plan is checked in a moment, on any machine."""
    script = ("import runpy, sys; sys.modules.update(mindspore=None, mindformers=None); "
              "sys.argv = ['plan.py', '--config', 'research/telechat/finetune_telechat_52b.yaml', '--ranks', '16']; "
              "runpy.run_path('scripts/plan.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False,
                          timeout=120)
    assert done.returncode == 0 and "52.83 G parameters" in done.stdout, done.stderr


def test_command_checks_for_launchers():
    config = "research/telechat/finetune_telechat_52b.yaml"
    assert command("--check", "--config", config, "--ranks", 16) == ("", "")
    _, err = command("--check", "--config", config, "--ranks", 12, expect=1)
    assert err.count("error:") == 1 and "12 ranks" in err
    _, err = command("--check", "--config", config, "--ranks", 16, "--parallel_config.micro_batch_num", 1, expect=1)
    assert "micro_batch_num" in err


def test_command_checks_what_a_launcher_starts():
    run = ("python run_mindformer.py --config research/telechat/finetune_telechat_52b.yaml --register_path "
           "research/telechat --train_dataset DATA --load_checkpoint X --use_parallel True --auto_trans_ckpt True")
    assert command("--check", "--ranks", 16, "--command", run) == ("", "")
    _, err = command("--check", "--ranks", 8, "--command", run + " --parallel_config.model_parallel 4", expect=0)
    assert err == ""
    _, err = command("--check", "--ranks", 8, "--command", run, expect=1)
    assert err.count("error:") == 1 and "8 ranks" in err
    two = ("python run_mindformer.py --predict_data '<_user>one<_bot>' two --use_parallel True --config "
           "research/telechat/predict_telechat_{}.yaml")
    _, err = command("--check", "--ranks", 2, "--command", two.format("7b"), expect=1)
    assert err.count("error:") == 1
    assert command("--check", "--ranks", 2, "--command", two.format("tiny_cpu")) == ("", "")
    assert command("--check", "--ranks", 3, "--command", "python other.py --config x.yaml") == ("", "")


@pytest.mark.parametrize("arguments, words", [
    ([], "--config is missing"),
    (["--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
    (["--config", "research/telechat/finetune_telechat_7b.yaml", "--rank", "8"], "the ranks 0 to 7"),
    (["--config", "research/telechat/finetune_telechat_7b.yaml", "--seed.x", "1"], "no section"),
    (["--config", "research/telechat/finetune_telechat_7b.yaml", "--json", "/proc/no/plan.json"], "cannot be written"),
])
def test_command_refuses_with_one_line(arguments, words):
    _, err = command(*arguments, expect=1)
    assert err.startswith("error: ") and words in err and err.count("\n") == 1
