"""Shrinks a recipe so that its plan executes in seconds; what is sharded, and how, stays the same.

Widths, lengths and layers shrink to the minimum that the plan can divide; kinds of parallelism, masks, projections,
grouped heads, tied tables, types and optimizer are the recipe's. Dropout is off, as the masks of several ranks cannot
be compared with those of one. Gradients are clipped in every step, and weight decay is on.
"""
import copy
from typing import Dict, Optional, Tuple

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.plan.plan import Plan, find_faults, read_plan

HEAD_DIM = 8
VOCABULARY = 96
MAX_GRAD_NORM = 0.01                         # small enough to clip all gradients
VIRTUAL_STAGES = 2                           # per stage, if there are any
SEQUENCES = 4                                # per step, if the plan allows so few
BLOCK_SIZE, BLOCKS = 16, 8                   # of the KV cache
_DEGREES = {"dp": "data_parallel", "pp": "pipeline_stage", "mp": "model_parallel", "cp": "context_parallel"}
_NO_DROPOUT = ("hidden_dropout_prob", "embed_dropout_prob", "attention_dropout_prob")
Sizes = Dict[str, int]                       # model_config keys that the user overrides


def fewer_ranks(degrees: Dict[str, int], ranks: int) -> Dict[str, int]:
    """Degrees of parallelism, {"dp", "pp", "mp", "cp"}, halved until their product is `ranks`.

    The largest is halved first, and each kind stays at 2 or more as long as possible. Raises ConfigError.
    """
    result = dict(degrees)

    def product() -> int:
        return result["dp"] * result["pp"] * result["mp"] * result["cp"]

    while product() > ranks:
        over = [kind for kind in _DEGREES if result[kind] > 2] or [kind for kind in _DEGREES if result[kind] > 1]
        largest = max(over, key=lambda kind: result[kind])                 # ties: the first of _DEGREES
        if result[largest] % 2:
            break
        result[largest] //= 2
    if product() != ranks:
        raise ConfigError(f"--ranks {ranks}: data {degrees['dp']} x model {degrees['mp']} x pipeline {degrees['pp']} x "
                          f"context parallelism {degrees['cp']} cannot be halved to {ranks} ranks; use a number that "
                          "works, or set the degrees (--parallel_config.model_parallel ...)")
    return result


def _sizes(plan: Plan) -> Tuple[Sizes, int]:
    """(model_config keys, sequences per micro-batch) for a plan with fixed degrees."""
    model = plan.model
    kv_heads = max(4, plan.mp * plan.ulysses)
    heads = kv_heads * (2 if model.n_kv_heads and model.n_kv_heads < model.num_heads else 1)
    vocabulary = VOCABULARY if model.vocab_size % plan.mp == 0 else VOCABULARY + 1
    sizes = {"num_heads": heads, "hidden_size": heads * HEAD_DIM,
             "intermediate_size": 12 * max(8, plan.mp), "vocab_size": vocabulary,
             "seq_length": max(32, 4 * plan.cp * plan.mp), "num_layers": max(2, plan.pp * plan.virtual_stages)}
    if heads != kv_heads:
        sizes["n_kv_heads"] = kv_heads
    return sizes, max(1, SEQUENCES // (plan.dp * plan.micro_batches))


def shrink(recipe: JsonObject, ranks: int, sizes: Sizes) -> JsonObject:
    """The recipe shrunk to `ranks` ranks. sizes: model_config keys that are set last. Raises ConfigError."""
    small = copy.deepcopy(recipe)
    plan = read_plan(small)
    degrees = fewer_ranks({kind: getattr(plan, kind) for kind in _DEGREES}, ranks)
    parallel = small.setdefault("parallel_config", {})
    parallel.update({key: degrees[kind] for kind, key in _DEGREES.items()})
    small["use_parallel"] = ranks > 1
    if parallel.get("context_parallel_algo") == "hybrid_cp":
        parallel["ulysses_degree_in_cp"] = min(plan.ulysses, max(1, degrees["cp"] // 2))
    parallel["micro_batch_num"] = max(2, degrees["pp"]) if plan.training and degrees["pp"] > 1 else 1
    if degrees["pp"] == 1:
        small["model"]["model_config"].pop("pp_interleave_num", None)
        small.get("parallel", {}).pop("pipeline_config", None)
    elif plan.virtual_stages > 1:
        small["model"]["model_config"]["pp_interleave_num"] = VIRTUAL_STAGES
    runner = small.setdefault("runner_config", {})
    runner["gradient_accumulation_steps"] = min(2, runner.get("gradient_accumulation_steps") or 1)
    recompute = small.setdefault("recompute_config", {})
    if isinstance(recompute.get("recompute"), (list, tuple)):
        recompute["recompute"] = True                         # its layer counts per stage do not fit another model
    model = small["model"]["model_config"]
    model.update(dict.fromkeys(_NO_DROPOUT, 0.0), offset=0)
    chosen, batch = _sizes(read_plan(small))
    model.update({**chosen, **sizes})
    runner["batch_size"] = batch
    if plan.training:
        _shrink_training(small)
    else:
        model.update(batch_size=2, block_size=BLOCK_SIZE, num_blocks=BLOCKS, max_decode_length=model["seq_length"])
    faults = find_faults(read_plan(small), ranks)
    if faults:
        raise ConfigError(f"the scaled-down recipe cannot run: {faults[0]}")
    return small


def _shrink_training(small: JsonObject) -> None:
    """Large update steps, all parameters sharded by the optimizer, and no dropout in adapters."""
    for section in ("optimizer", "lr_schedule"):
        small.setdefault(section, {})["learning_rate"] = 1e-2
    small["lr_schedule"].update(total_steps=100, warmup_ratio=0.0)
    small["optimizer"]["weight_decay"] = 0.1
    small.setdefault("runner_wrapper", {}).update(use_clip_grad=True, max_grad_norm=MAX_GRAD_NORM)
    small.setdefault("parallel", {}).setdefault("parallel_optimizer_config", {})["parallel_optimizer_threshold"] = 0
    pet: Optional[JsonObject] = small["model"]["model_config"].get("pet_config")
    if pet:
        pet["lora_dropout"] = 0.0
    small["do_eval"] = False
    small["check_free_disk"] = False


def uncut(small: JsonObject) -> JsonObject:
    """The same model and batch on one rank."""
    plan = read_plan(small)
    whole = copy.deepcopy(small)
    whole["use_parallel"] = False
    whole["parallel_config"].update(
        dict.fromkeys((*_DEGREES.values(), "micro_batch_num", "ulysses_degree_in_cp"), 1),
        use_seq_parallel=False, context_parallel_algo="colossalai_cp")
    whole["micro_batch_interleave_num"] = 1
    parallel = whole.setdefault("parallel", {})
    parallel.update(enable_parallel_optimizer=False, enable_alltoall=False)
    parallel.pop("pipeline_config", None)
    whole["runner_config"].update(batch_size=plan.batch * plan.dp * plan.micro_batches, gradient_accumulation_steps=1)
    model = whole["model"]["model_config"]
    model["use_ring_attention"] = False
    model.pop("pp_interleave_num", None)
    return whole
