"""Recipes of earlier TeleChat plugins still load: each key is honoured, or answered with one line.

The keys are those of the recipes in MindFormers 1.2 to 1.5 (research/telechat and research/telechat2: 7B, 12B, 35B,
52B, 115B; for fine-tuning, for prediction, and for the separate model that predicted in parallel there); the values
are typical ones.
A recipe is written from a table, read as run_mindformer.py reads it, and every row is looked up in what comes out.
"""
import copy
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest
import yaml
from compile_fixtures import compile_on_cpu, compile_plan
from mindformers.tools.logger import get_logger
from recipe_classes import unknown_arguments

from research.telechat.ascend_sim.account import Mesh
from research.telechat.bridge.compat import apply_template
from research.telechat.commands import plan as plan_command
from research.telechat.common.errors import ConfigError
from research.telechat.plan.plan import find_faults, read_plan
from research.telechat.recipe import options
from research.telechat.recipe.fields import COMPUTED, LEGACY, RENAMED
from research.telechat.recipe.read import read_recipe, resolve_config
from research.telechat.recipe.settings import dtype_name
from research.telechat.run import job as run_job
from research.telechat.run.preflight import model_config
from research.telechat.telechat_config import TelechatConfig
from research.telechat.telechat_transformer import TelechatDecodeLayer

MODEL = "model.model_config."


class Row(NamedTuple):
    """A key of an old recipe."""

    key: str
    value: Any
    now: Optional[str] = None       # where its value stands today; None: in the same place; "": nowhere
    as_value: Any = None            # what it is there, if something else
    line: str = ""                  # words of the line that the user sees


def gone(key: str, value: Any, line: str) -> Row:
    """A key that a line answers."""
    return Row(key, value, "", None, line)


GENERAL = [
    Row("seed", 7), Row("output_dir", "./here"), Row("load_checkpoint", ""), Row("src_strategy_path_or_dir", ""),
    Row("auto_trans_ckpt", False), Row("only_save_strategy", False), Row("resume_training", False),
    Row("ignore_data_skip", False), Row("load_ckpt_format", "ckpt"), Row("transform_process_num", 16),
    Row("trainer.type", "CausalLanguageModelingTrainer"), Row("trainer.model_name", "telechat_115b"),
    Row("runner_config.epochs", 3), Row("runner_config.batch_size", 2), Row("runner_config.sink_mode", True),
    Row("runner_config.sink_size", 2), Row("runner_config.gradient_accumulation_steps", 1), Row("do_eval", False),
    Row("micro_batch_interleave_num", 1), Row("auto_tune", False), Row("filepath_prefix", "./autotune"),
    Row("autotune_per_step", 10), Row("profile", False), Row("profile_start_step", 2), Row("profile_stop_step", 4),
    Row("init_start_profile", False), Row("profile_communication", False), Row("profile_memory", True),
    Row("profile_level", 1, "profiler_level", 1, "is read as profiler_level"),
    Row("layer_scale", False), Row("layer_decay", 0.65), Row("lr_scale_factor", 256), Row("remote_save_url", "obs://x"),
    Row("metric.type", "PerplexityMetric"),
]
CONTEXT = [
    Row("context.mode", 0), Row("context.device_target", "Ascend"), Row("context.max_call_depth", 10000),
    Row("context.max_device_memory", "57GB"), Row("context.save_graphs", False), Row("context.device_id", 0),
    Row("context.save_graphs_path", "./graph"), Row("context.mempool_block_size", "57GB"),
    Row("context.memory_optimize_level", "O1"),
    Row("context.ascend_config.parallel_speed_up_json_path", "./parallel_speed_up.json"),
    gone("context.enable_graph_kernel", True, "jit_level O1"),
    gone("context.graph_kernel_flags", "--disable_expand_ops=Softmax", "jit_level O1"),
    gone("context.affinity_cpu_list", "0-7", "context.affinity_config"),
]
DATA = [row for name, shuffle in (("train", True), ("eval", False)) for row in (
    Row(f"{name}_dataset.data_loader.type", "MindDataset"), Row(f"{name}_dataset.data_loader.dataset_dir", "somewhere"),
    Row(f"{name}_dataset.data_loader.shuffle", shuffle), Row(f"{name}_dataset.input_columns", ["input_ids", "labels"]),
    Row(f"{name}_dataset.num_parallel_workers", 8), Row(f"{name}_dataset.python_multiprocessing", False),
    Row(f"{name}_dataset.drop_remainder", shuffle), Row(f"{name}_dataset.repeat", 1),
    Row(f"{name}_dataset.numa_enable", False), Row(f"{name}_dataset.prefetch_size", 1),
    gone(f"{name}_dataset.batch_size", 6, "runner_config.batch_size (2)"),
    Row(f"{name}_dataset_task.type", "CausalLanguageModelDataset"))]
PARALLEL = [
    Row("parallel.gradients_mean", False), Row("parallel.enable_alltoall", False),
    Row("parallel.search_mode", "sharding_propagation"), Row("parallel.strategy_ckpt_save_file", "./strategy.ckpt"),
    Row("parallel.enable_parallel_optimizer", True),
    Row("parallel.parallel_optimizer_config.gradient_accumulation_shard", False),
    Row("parallel.parallel_optimizer_config.parallel_optimizer_threshold", 64),
    Row("parallel.parallel_optimizer_config.optimizer_weight_shard_size", 2),
    Row("parallel_config.model_parallel", 8), Row("parallel_config.expert_parallel", 1),
    Row("parallel_config.vocab_emb_dp", False), Row("parallel_config.gradient_aggregation_group", 4),
    Row("recompute_config.recompute", False), Row("recompute_config.parallel_optimizer_comm_recompute", False),
    Row("recompute_config.mp_comm_recompute", True), Row("recompute_config.recompute_slice_activation", True),
]
TRAINING = [
    Row("run_mode", "finetune"), Row("use_parallel", True),
    Row("optimizer.type", "FP32StateAdamWeightDecay", "optimizer.type", "AdamW", "moments are float32"),
    Row("optimizer.beta1", 0.9, "optimizer.betas", [0.9, 0.95], "optimizer.betas: [0.9, 0.95]"),
    Row("optimizer.beta2", 0.95, "optimizer.betas", [0.9, 0.95], "optimizer.betas: [0.9, 0.95]"),
    Row("optimizer.eps", 1e-8), Row("optimizer.learning_rate", 2e-5), Row("optimizer.weight_decay", 0.1),
    Row("lr_schedule.type", "CosineWithWarmUpLR"), Row("lr_schedule.learning_rate", 2e-5),
    Row("lr_schedule.lr_end", 1e-6), Row("lr_schedule.warmup_ratio", 0.03), Row("lr_schedule.warmup_steps", 20),
    Row("lr_schedule.total_steps", -1),
    Row("parallel.parallel_mode", 1), Row("parallel.full_batch", True),
    Row("parallel.pipeline_config.pipeline_interleave", True),
    Row("parallel.pipeline_config.pipeline_scheduler", "1f1b"), Row("parallel_config.data_parallel", 8),
    Row("parallel_config.pipeline_stage", 8), Row("parallel_config.use_seq_parallel", True),
    Row("parallel_config.micro_batch_num", 8),
    Row("recompute_config.select_recompute", True, "recompute_config.select_recompute",
        {r"feed_forward\.mul": True, r"feed_forward\.silu": True}, "feed_forward"),
    Row("recompute_config.select_comm_recompute", [8, 8, 10, 11, 10, 7, 5, 4], "recompute_config.select_comm_recompute",
        {r".*_norm\.kernel\.norm": [8, 8, 10, 11, 10, 7, 5, 4]}, "gathered again"),
    Row("callbacks.MFLossMonitor", {}),
    Row("callbacks.CheckpointMointor", {"prefix": "x", "save_checkpoint_steps": 50, "keep_checkpoint_max": 3,
                                        "integrated_save": False, "async_save": False, "checkpoint_format": "ckpt"},
        "callbacks.CheckpointMonitor", None, "CheckpointMonitor"),
    gone("callbacks.ObsMonitor", {}, "output_dir"), gone("eval_callbacks.ObsMonitor", {}, "output_dir"),
    Row("context.jit_config", {"jit_level": "O1"}),
    Row("runner_wrapper.type", "MFTrainOneStepCell"), Row("runner_wrapper.use_clip_grad", True),
    Row("runner_wrapper.scale_sense", {"type": "DynamicLossScaleUpdateCell", "loss_scale_value": 4294967296,
                                       "scale_factor": 2, "scale_window": 1000}),
    Row("model.arch.type", "TelechatForCausalLM"),
    Row(f"{MODEL}pp_interleave_num", 3),
    Row(f"{MODEL}offset", [[-1, -1, 0, 0, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, -1]]),
    gone(f"{MODEL}fine_grain_interleave", 2, "micro_batch_interleave_num"),
    gone(f"{MODEL}parallel_optimizer", True, "enable_parallel_optimizer"),
    Row(f"{MODEL}use_past", False), Row(f"{MODEL}sigma", 0.0048, "initializer_range"),
    Row(f"{MODEL}is_dynamic", False), Row(f"{MODEL}embed_dropout_prob", 0.1),
    Row(f"{MODEL}use_attn_mask_compression", False),
]
PREDICTION = [
    Row("run_mode", "predict"), Row("use_parallel", True), Row("infer_precision_sync", True),
    Row("parallel.parallel_mode", "STAND_ALONE", "parallel.parallel_mode", 1, "STAND_ALONE"),
    Row("parallel.full_batch", False, "parallel.full_batch", True, "full_batch True"),
    Row("parallel_config.data_parallel", 1), Row("parallel_config.pipeline_stage", 1),
    Row("context.jit_config.jit_level", "O1", "context.jit_config.jit_level", "O0", "O0 or O2"),
    Row("model.arch.type", "ParallelTelechatForCausalLM", "model.arch.type", "TelechatForCausalLM", "parallel_config"),
    Row("processor.return_tensors", "ms"), Row("processor.type", "TelechatProcessor"),
    Row("processor.tokenizer.type", "TelechatTokenizer"), Row("processor.tokenizer.vocab_file", ""),
    Row("processor.tokenizer.tokenizer_file", ""), Row("processor.tokenizer.unk_token", "<unk>"),
    Row("processor.tokenizer.bos_token", "<_start>"), Row("processor.tokenizer.eos_token", "<_end>"),
    Row("processor.tokenizer.pad_token", "<_pad>"),
    Row(f"{MODEL}use_past", True), Row(f"{MODEL}is_dynamic", True), Row(f"{MODEL}block_size", 16),
    Row(f"{MODEL}num_blocks", 640), gone(f"{MODEL}qkv_concat", True, "wq and wk_v"),
    gone(f"{MODEL}use_rope_slice", True, "fit the sequence"), gone(f"{MODEL}run_mode", "predict", "run_mode decides"),
    Row(f"{MODEL}offset", 0), Row(f"{MODEL}embed_dropout_prob", 0.0),
    Row(f"{MODEL}use_attn_mask_compression", False, as_value=True),      # a full mask would have the prompt's length
]
SHARED = [
    Row(f"{MODEL}type", "TelechatConfig"), Row(f"{MODEL}batch_size", 1), Row(f"{MODEL}seq_length", 8192),
    Row(f"{MODEL}hidden_size", 8192), Row(f"{MODEL}num_layers", 96), Row(f"{MODEL}num_heads", 64),
    Row(f"{MODEL}n_kv_heads", 8), Row(f"{MODEL}vocab_size", 131072), Row(f"{MODEL}rms_norm_eps", 1e-5),
    Row(f"{MODEL}ffn_dim_multiplier", 40960, "intermediate_size"), Row(f"{MODEL}multiple_of", 256, ""),
    Row(f"{MODEL}bos_token_id", 1), Row(f"{MODEL}eos_token_id", 2), Row(f"{MODEL}pad_token_id", 3),
    Row(f"{MODEL}ignore_token_id", -100), Row(f"{MODEL}hidden_dropout_prob", 0.0),
    Row(f"{MODEL}attention_dropout_prob", 0.0), Row(f"{MODEL}wo_has_bias", True, "out_proj_has_bias"),
    Row(f"{MODEL}qkv_has_bias", False), Row(f"{MODEL}theta", 10000.0), Row(f"{MODEL}res_dtype", "float32"),
    Row(f"{MODEL}compute_dtype", "bfloat16"), Row(f"{MODEL}layernorm_compute_type", "float32"),
    Row(f"{MODEL}softmax_compute_type", "float16"), Row(f"{MODEL}rotary_dtype", "bfloat16"),
    Row(f"{MODEL}param_init_type", "float32"), Row(f"{MODEL}embedding_init_type", "bfloat16"),
    Row(f"{MODEL}extend_method", "None"), Row(f"{MODEL}scaling_factor", 1.0),
    Row(f"{MODEL}use_flash_attention", True),
    Row(f"{MODEL}repetition_penalty", 1, as_value=1.0), Row(f"{MODEL}max_decode_length", 512),
    Row(f"{MODEL}top_k", 3), Row(f"{MODEL}top_p", 1, as_value=1.0), Row(f"{MODEL}do_sample", False),
    gone(f"{MODEL}pretrain_seqlen", 4096, "training_seqlen"), gone(f"{MODEL}use_past_shard", True, "sharded"),
    gone(f"{MODEL}max_position_embedding", 8192, "any length"), gone(f"{MODEL}mean", 0.1, "around 0"),
    gone(f"{MODEL}quant", "w8", "not supported"), gone(f"{MODEL}use_kvcache_op", True, "device"),
    gone(f"{MODEL}is_flexible_shape", True, "is_dynamic"), gone(f"{MODEL}compute_in_2d", True, "layout"),
    gone(f"{MODEL}use_moe", True, "experts"), gone(f"{MODEL}use_fused_ops", True, "device"),
    gone(f"{MODEL}checkpoint_name_or_path", "telechat_115b", "load_checkpoint"),
    Row(f"{MODEL}auto_map", {"AutoModel": "telechat.TelechatForCausalLM"}),
]
MUP = [   # of 52B; a recipe with its variant's name has everything else from the table of variants
    Row(f"{MODEL}net_name", "telechat_52b"), Row(f"{MODEL}use_mup", True, "logits_scale", 1 / 32),
    Row(f"{MODEL}output_mult", 1.0, "logits_scale", 1 / 32),
    Row(f"{MODEL}mup_scale_factor", 32.0, "logits_scale", 1 / 32),
]
NAMED = [Row(f"{MODEL}model_name", "telechat_12b", "net_name")]
COMMON = GENERAL + CONTEXT + DATA + PARALLEL + SHARED
RECIPES = {"finetune": COMMON + TRAINING, "predict": COMMON + PREDICTION, "mup": TRAINING + PARALLEL + MUP,
           "named": [*TRAINING, *PARALLEL, *NAMED]}


def written(rows) -> dict:
    """The recipe of some rows."""
    recipe: dict = {}
    for row in rows:
        *sections, last = row.key.split(".")
        if sections and sections[0].endswith("callbacks"):
            recipe.setdefault(sections[0], []).append({"type": last, **row.value})
            continue
        section = recipe
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = copy.deepcopy(row.value)
    if "train_dataset" in recipe:                      # YAML anchors made it a part of the task
        recipe["train_dataset_task"]["dataset_config"] = recipe["train_dataset"]
    return recipe


def found(config: Any, key: str) -> Any:
    """Value of a dotted key; callbacks by their type."""
    for name in key.split("."):
        if isinstance(config, list):
            config = next(entry for entry in config if entry["type"] == name)
            config = {word: value for word, value in config.items() if word != "type"}
        else:
            config = config[name]
    return config


@pytest.fixture(params=RECIPES)
def loaded(request, tmp_path, caplog):
    """(rows, config after everything that run_mindformer.py does before it builds, model config, lines)."""
    rows = RECIPES[request.param]
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(written(rows)))
    args, rest = options.build_parser().parse_known_args(["--config", str(path)])
    recipe = read_recipe(resolve_config(args.config))
    logger = get_logger()                         # its name differs between versions of MindFormers
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger=logger.name)
    try:
        config = run_job.complete_recipe(recipe, options.all_overrides(args, rest))
        run_job.translate_old_keys(config)
        run_job.forget_auto_register(config)
        model = model_config(config)
        config = apply_template(config)
    finally:
        logger.removeHandler(caplog.handler)
    return rows, config, model, [record.getMessage() for record in caplog.records]


def test_every_key_is_honoured_or_answered(loaded):
    rows, config, model, lines = loaded
    for row in rows:
        name = row.key.rpartition(".")[2]
        if row.line:
            section = "model_config" if row.key.startswith(MODEL) else row.key.split(".")[0]
            answers = [line for line in lines if line.startswith(section) and name in line and row.line in line]
            assert len(answers) == 1, (row.key, answers, lines)
            assert "\n" not in answers[0]
        elif row.now == "":
            assert name in ("multiple_of",)            # without effect if there is a width, as before
        if row.now == "":
            continue
        expected = row.value if row.as_value is None else row.as_value
        if row.key.startswith(MODEL) and name not in ("type", "auto_map"):
            value = getattr(model, row.now or name)
            assert (dtype_name(value) if isinstance(expected, str) and "float" in expected else value) == expected, row
        else:
            assert found(config, row.now or row.key) == expected, row.key


def test_what_comes_out_is_known_to_its_classes(loaded):
    _, config, _, _ = loaded
    assert unknown_arguments(config) == []


def test_the_table_has_every_old_key_of_the_model_config():
    keys = {row.key[len(MODEL):] for rows in RECIPES.values() for row in rows if row.key.startswith(MODEL)}
    assert {*RENAMED, *COMPUTED, *LEGACY} <= keys


def test_what_has_changed_is_documented():
    text = (Path(__file__).resolve().parents[2] / "docs/recipes.md").read_text(encoding="utf-8")
    changed = {row.key.rpartition(".")[2] for rows in RECIPES.values() for row in rows if row.line or row.now}
    assert sorted(name for name in changed if f"{name}" not in text) == []


@pytest.mark.parametrize("name", RECIPES)
def test_old_recipes_can_be_planned(name, tmp_path, capsys):
    path = tmp_path / "old.yaml"
    recipe = written(RECIPES[name])
    if name in ("mup", "named"):
        recipe["model"]["model_config"].update(pp_interleave_num=1, offset=0)
        recipe["parallel_config"]["pipeline_stage"] = {"mup": 8, "named": 2}[name]
    path.write_text(yaml.safe_dump(recipe))
    assert plan_command.main(["--config", str(path), "--check"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("section", "keys", "words"), [
    ("moe_config", {"expert_num": 16}, ["moe_config.expert_num", "16", "39B"]),
    ("parallel_config", {"seq_split_num": 2}, ["seq_split_num", "2", "context_parallel"]),
])
def test_what_is_not_supported_is_refused(section, keys, words):
    recipe = written(RECIPES["finetune"])
    recipe.setdefault(section, {}).update(keys)
    with pytest.raises(ConfigError) as err:
        run_job.translate_old_keys(run_job.MindFormerConfig(**recipe))
    assert all(word in str(err.value) for word in words) and "\n" not in str(err.value)


def test_a_checkpoint_that_only_the_model_config_names_is_loaded(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"")
    recipe = written(RECIPES["finetune"])
    recipe["model"]["model_config"]["checkpoint_name_or_path"] = str(tmp_path / "x.ckpt")
    config = run_job.MindFormerConfig(**recipe)
    run_job.translate_old_keys(config)
    assert config.load_checkpoint == str(tmp_path / "x.ckpt")


def test_operators_that_are_recomputed_exist():
    """What `select_recompute: True` becomes meets operators of a layer; what MindFormers would take meets one only."""
    config = TelechatConfig(hidden_size=32, num_heads=2, num_layers=1, intermediate_size=64, vocab_size=8, seq_length=8)
    layer = TelechatDecodeLayer(config, 0)
    recipe = {"recompute_config": {"select_recompute": True}}
    run_job.translate(recipe)
    for pattern in recipe["recompute_config"]["select_recompute"]:
        operator = layer
        for name in pattern.split(r"\."):
            operator = getattr(operator, name)
        assert hasattr(operator, "recompute"), pattern
    assert not any(name.endswith(".norm") for name, _ in layer.cells_and_names())


SMALL = {"hidden_size": 512, "num_heads": 16, "n_kv_heads": 16, "intermediate_size": 1536, "vocab_size": 4096,
         "num_layers": 2, "seq_length": 256, "offset": 0, "pp_interleave_num": 1, "attention_dropout_prob": 0.1}


def shrunk(name: str) -> dict:
    """An old recipe with small sizes and eight cards."""
    recipe = written(RECIPES[name])
    recipe["model"]["model_config"].update(SMALL)
    recipe["parallel_config"]["pipeline_stage"] = 1
    if "recompute_config" in recipe:                   # numbers of layers, of one stage then
        recipe["recompute_config"]["select_comm_recompute"] = [1]
    recipe["context"].pop("ascend_config")             # names a file that is not there
    return recipe


@pytest.mark.slow
@pytest.mark.usefixtures("ascend_plugin")
@pytest.mark.parametrize("name", ["finetune", "predict"])
def test_old_recipes_compile_for_ascend(name):
    recipe = shrunk(name)
    recipe["parallel_config"].update({"data_parallel": 8, "model_parallel": 1} if name == "finetune" else {})
    recipe["parallel"]["parallel_optimizer_config"]["optimizer_weight_shard_size"] = -1
    planned = copy.deepcopy(recipe)
    run_job.translate(planned)
    plan = read_plan(planned)
    assert plan.ranks == 8 and find_faults(plan) == []
    if name == "predict":                              # its compilation builds the model only
        recipe = planned
    report = compile_plan(recipe, Mesh(plan.pp, plan.dp, plan.cp, plan.mp), 7, plan.model.seq_length + 1,
                          timeout=600)
    assert report["ok"], report["error"] + "\n".join(report["details"])


@pytest.mark.slow
def test_old_recipe_compiles_on_a_cpu(tmp_path):
    recipe = shrunk("finetune")
    recipe["parallel_config"].update(data_parallel=8, model_parallel=1)
    recipe["context"]["device_target"] = "CPU"
    recipe["model"]["model_config"].update(use_flash_attention=False, compute_dtype="float32",
                                           embedding_init_type="float32")
    report = compile_on_cpu(json.loads(json.dumps(recipe)), Path(tmp_path))
    assert report["ok"], report["error"]
