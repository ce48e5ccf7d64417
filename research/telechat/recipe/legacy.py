"""What recipes of earlier TeleChat plugins (MindFormers 1.2 to 1.5) say in another way, outside `model_config`.

Each such key is translated, dropped with a line that says what takes its place, or, where the recipe asks for something
that is not here, refused. The keys of `model_config` are in recipe/fields.py. Pure Python.
"""
import copy
import os
from typing import Iterator, List

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.recipe.fields import LEGACY
from research.telechat.recipe.read import section

_ARCHITECTURE = "TelechatForCausalLM"
_RENAMED_ARCHITECTURES = ("ParallelTelechatForCausalLM",)
_CHECKPOINT_MONITOR, _MISSPELT_MONITOR = "CheckpointMonitor", "CheckpointMointor"
# Operators of a layer that `select_recompute: True` means: cheap to repeat, large to keep.
_RECOMPUTED = (r"feed_forward\.mul", r"feed_forward\.silu")
# What `select_comm_recompute: True` means: the gathers of sequence parallelism, behind the norms.
_GATHERED = r".*_norm\.kernel\.norm"


def _optimizer(recipe: JsonObject) -> Iterator[str]:
    optimizer = section(recipe, "optimizer")
    if optimizer.get("type") == "FP32StateAdamWeightDecay":
        optimizer["type"] = "AdamW"
        yield ("optimizer.type FP32StateAdamWeightDecay is gone from MindFormers: AdamW, whose moments are float32 "
               "too, takes its place; it corrects the bias of the moments, which the old one did not, so that steps "
               "differ until about 1 / (1 - beta2) of them are taken (the first by sqrt(1 - beta2) / (1 - beta1))")
    if "beta1" in optimizer or "beta2" in optimizer:
        optimizer["betas"] = [optimizer.pop("beta1", 0.9), optimizer.pop("beta2", 0.999)]
        yield f"optimizer.beta1 and beta2 are now optimizer.betas: {optimizer['betas']}"


def _callbacks(recipe: JsonObject) -> Iterator[str]:
    for name in ("callbacks", "eval_callbacks"):
        entries = recipe.get(name)
        if not isinstance(entries, list):
            continue
        kept = [entry for entry in entries if not (isinstance(entry, dict) and entry.get("type") == "ObsMonitor")]
        if len(kept) < len(entries):
            recipe[name] = kept
            yield (f"{name}: ObsMonitor is gone from MindFormers and is left out; checkpoints and logs stay in "
                   "output_dir, copy them from there")
        for entry in kept:
            if isinstance(entry, dict) and entry.get("type") == _MISSPELT_MONITOR:
                entry["type"] = _CHECKPOINT_MONITOR
                yield f"{name}: {_MISSPELT_MONITOR} is now spelt {_CHECKPOINT_MONITOR}"


def _profile(recipe: JsonObject) -> Iterator[str]:
    """MindFormers has a default for `profile_level` but reads `profiler_level`."""
    if "profile_level" in recipe:
        level = recipe.pop("profile_level")
        recipe.setdefault("profiler_level", level)
        yield f"profile_level is read as profiler_level: {recipe['profiler_level']}"


def _model(recipe: JsonObject) -> Iterator[str]:
    arch = section(recipe, "model", "arch")
    if arch.get("type") in _RENAMED_ARCHITECTURES:
        yield (f"model.arch.type {arch['type']} is now {_ARCHITECTURE}, which parallel_config shards over cards for "
               f"prediction as for training")
        arch["type"] = _ARCHITECTURE
    if str(arch.get("auto_register", "")).rpartition(".")[2] in _RENAMED_ARCHITECTURES:
        arch["auto_register"] = f"telechat.{_ARCHITECTURE}"
    config = section(recipe, "model", "model_config")
    if config.pop("fine_grain_interleave", 1) not in (None, 1):       # MindFormers would act on it
        yield f"model_config.fine_grain_interleave has no effect: {LEGACY['fine_grain_interleave']}"
    name = config.get("checkpoint_name_or_path")
    if name:
        config["checkpoint_name_or_path"] = ""
        if recipe.get("load_checkpoint") or not os.path.exists(str(name)):
            yield (f"model_config.checkpoint_name_or_path {name!r} is not loaded: load_checkpoint (--load_checkpoint) "
                   "names the checkpoint")
        else:
            recipe["load_checkpoint"] = name
            yield f"model_config.checkpoint_name_or_path is now load_checkpoint: {name}"
    experts = section(recipe, "moe_config").get("expert_num", 1)
    if isinstance(experts, int) and experts > 1:
        raise ConfigError(f"moe_config.expert_num is {experts}: models with experts (TeleChat2-39B-A12B) are not "
                          "supported; remove moe_config for a dense model")


def _parallel(recipe: JsonObject) -> Iterator[str]:
    parallel, plan = section(recipe, "parallel"), section(recipe, "parallel_config")
    alone = str(parallel.get("parallel_mode", "")).upper() == "STAND_ALONE"
    degrees = [plan.get(key, 1) for key in ("model_parallel", "pipeline_stage", "context_parallel")]
    if alone and recipe.get("use_parallel") and any(degree != 1 for degree in degrees):
        parallel.update(parallel_mode=1, full_batch=True)
        yield ("parallel.parallel_mode STAND_ALONE is now 1 (semi-automatic) with full_batch True: MindSpore shards "
               "the model as parallel_config says")
    segments = plan.get("seq_split_num", 1)
    if segments not in (None, 1):
        raise ConfigError(f"parallel_config.seq_split_num is {segments}: a pipeline over parts of sequences is not "
                          "supported; set it to 1, and context_parallel for long sequences")
    recompute = section(recipe, "recompute_config")
    selected = recompute.get("select_recompute")
    by_layers = isinstance(selected, (list, tuple)) and not any(isinstance(entry, str) for entry in selected)
    if selected is True or (by_layers and selected):
        recompute["select_recompute"] = {pattern: copy.deepcopy(selected) for pattern in _RECOMPUTED}
        yield f"recompute_config.select_recompute names no operators: {' and '.join(_RECOMPUTED)} are repeated"
    selected = recompute.get("select_comm_recompute")
    if selected and not isinstance(selected, dict) and not any(
            isinstance(entry, str) for entry in (selected if isinstance(selected, (list, tuple)) else [])):
        recompute["select_comm_recompute"] = {_GATHERED: copy.deepcopy(selected)}
        yield (f"recompute_config.select_comm_recompute names no operators: what use_seq_parallel gathers behind "
               f"{_GATHERED} is gathered again")


def _context(recipe: JsonObject) -> Iterator[str]:
    context = section(recipe, "context")
    for key in ("enable_graph_kernel", "graph_kernel_flags"):
        if key in context and context.pop(key):
            yield f"context.{key} is gone from MindSpore: context.jit_config.jit_level O1 fuses operators"
    if "affinity_cpu_list" in context and not isinstance(context["affinity_cpu_list"], dict):
        found = context.pop("affinity_cpu_list")
        if found not in (None, "None"):
            yield f"context.affinity_cpu_list {found!r} is left out: context.affinity_config binds processors now"
    jit = context.get("jit_config")
    if recipe.get("run_mode") in ("predict", "eval") and isinstance(jit, dict) and jit.get("jit_level") == "O1":
        jit["jit_level"] = "O0"
        yield f"context.jit_config.jit_level O1 is now O0 for {recipe['run_mode']}: MindFormers takes O0 or O2 there"


def _data(recipe: JsonObject) -> Iterator[str]:
    batch = section(recipe, "runner_config").get("batch_size", 1)
    for name in ("train_dataset", "eval_dataset"):
        own = section(recipe, name).pop("batch_size", batch)
        if own != batch:
            yield f"{name}.batch_size {own} has no effect: runner_config.batch_size ({batch}) decides"
        section(recipe, f"{name}_task").pop("dataset_config", None)     # a copy of the section; MindFormers makes one


def translate(recipe: JsonObject) -> List[str]:
    """Change a complete recipe in place to today's keys.

    Returns:
        A line for each change that a user should know of, without full stop.

    Raises:
        ConfigError: the recipe asks for what is not supported: experts, pipelines over parts of sequences.
    """
    steps = (_optimizer, _callbacks, _profile, _model, _parallel, _context, _data)
    return [line for step in steps for line in step(recipe)]
