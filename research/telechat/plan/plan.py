"""The parallel plan of a recipe: reading it, the layers of each pipeline stage, and everything that is wrong with it.

Pure Python, so that a plan is checked in a second on any machine. Memory, communication and speed of a plan are in
plan/cost.py; how the model is actually sharded, in model/sharding.py. Command line: scripts/plan.py.
"""
import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.recipe.fields import ModelSettings
from research.telechat.recipe.master_weights import choose as choose_master_weights
from research.telechat.recipe.settings import dtype_name, resolve, to_variant
from research.telechat.spec.flops import DEFAULT_DEVICE, DEVICES, Chip
from research.telechat.spec.parameters import Param, parameters
from research.telechat.spec.variants import Variant, shape_faults

CUT_BY_INPUT = ("wo", "w2")    # linear layers; model parallelism shards the others by their output
# Recomputed layers: all or none, their number, numbers per stage, or those for each virtual stage.
PerStage = Union[bool, int, Sequence[Union[int, Sequence[int]]]]
Selected = Union[bool, Sequence[str], Dict[str, PerStage]]       # operators by pattern, with the layers or in all
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
PLANNED_FOR = "planned_for"    # of a recipe while it is planned, never in a file: one of spec/flops.DEVICES


class Weight(NamedTuple):
    """One parameter (or the same of all layers). rows and columns: [out, in]; a vector has one column."""

    name: str                    # as in the model, without 'model.layers.N.'
    rows: int
    columns: int
    cut: bool                    # over model parallelism
    shardable: bool              # by optimizer parallelism; norms and biases are not


@dataclass(frozen=True)
class Plan:
    """What a recipe says about sizes and devices. Lengths in tokens."""

    training: bool
    model: ModelSettings         # every key of model_config
    dp: int
    mp: int
    pp: int
    cp: int
    sequence_parallel: bool
    algorithm: str               # colossalai_cp, ulysses_cp or hybrid_cp
    ulysses: int                 # part of cp that shards heads
    vocab_emb_dp: bool
    batch: int                   # sequences per micro-batch and data-parallel rank
    micro_batches: int           # per step: of the pipeline, of gradient accumulation and interleaved
    interleaved_batches: int     # of those, how many run at the same time (micro_batch_interleave_num)
    virtual_stages: int          # pp_interleave_num where pipeline interleaving is on
    offset: object
    optimizer_sharded: bool
    remainder: bool              # of 16-bit parameters, in the optimizer
    threshold: int               # bytes; optimizer parallelism does not shard smaller parameters
    recompute: PerStage
    select_recompute: Selected
    select_comm_recompute: Selected          # of the communication behind operators
    recompute_comm: bool         # mp_comm_recompute
    slice_activation: bool
    aggregation_groups: int
    lora_rank: int               # 0: all parameters are trained
    lora_targets: str
    lora_bytes: int              # per element of an adapter
    limit_gb: float              # context.max_device_memory
    device: str
    parallel_mode: object
    alltoall: bool               # parallel.enable_alltoall
    chip: Chip                   # what the plan is for

    @property
    def ranks(self) -> int:
        """Devices that the plan is for."""
        return self.dp * self.mp * self.pp * self.cp

    @property
    def accumulated(self) -> bool:
        """Whether gradients are added up over micro-batches in buffers of their own."""
        return self.training and (self.pp > 1 or self.micro_batches > self.interleaved_batches)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank, where the features are sharded over model parallelism."""
        return self.batch * self.model.seq_length // self.cp

    @property
    def step_tokens(self) -> int:
        """Tokens of a step on all devices."""
        return self.batch * self.dp * self.micro_batches * self.model.seq_length

    @property
    def vocab_pieces(self) -> int:
        """Shards of the vocabulary; 1: replicated on every device."""
        return 1 if self.vocab_emb_dp or self.model.vocab_size % self.mp else self.mp

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return self.model.hidden_size // self.model.num_heads

    @property
    def kv_size(self) -> int:
        """Elements of the keys of one token."""
        return self.model.n_kv_heads * self.head_dim

    def layer_weights(self) -> List[Weight]:
        """The parameters of one decoder layer."""
        prefix = "model.layers.0."
        return [self._weight(param, param.ms_name[len(prefix):]) for param in _one_layer(to_variant(self.model))
                if param.ms_name.startswith(prefix)]

    def end_weights(self) -> Dict[str, Weight]:
        """Those outside the layers, by name: tok_embeddings.embedding_weight, norm_out.weight, lm_head.weight (if it is
        not tied)."""
        weights = [self._weight(param, param.ms_name.replace("model.", "", 1))
                   for param in _one_layer(to_variant(self.model)) if ".layers." not in param.ms_name]
        return {weight.name: weight for weight in weights}

    def _weight(self, param: Param, name: str) -> Weight:
        rows, columns = (*param.shape, 1)[:2]
        if not name.startswith(("attention.", "feed_forward.")):
            return Weight(name, rows, columns, columns > 1 and self.vocab_pieces > 1, columns > 1)
        # Matrices are sharded, and biases of what is sharded by its output.
        return Weight(name, rows, columns, columns > 1 or name.split(".")[-2] not in CUT_BY_INPUT, columns > 1)


@lru_cache(maxsize=8)
def _one_layer(variant: Variant) -> List[Param]:
    """The parameters of a model with one layer."""
    return parameters(replace(variant, num_layers=1))


def _integer(section: JsonObject, key: str, where: str, default: int = 1) -> int:
    value = section.get(key, default)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where}.{key}: expected a whole number of at least 1, found {value!r}")
    return value


def _section(recipe: JsonObject, key: str) -> JsonObject:
    value = recipe.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: expected a section of keys, found {value!r}")
    return value


def _gigabytes(text: object) -> float:
    match = re.fullmatch(r"\s*([\d.]+)\s*GB\s*", str(text or "64GB"), re.IGNORECASE)
    if not match:
        raise ConfigError(f"context.max_device_memory: expected a size such as '58GB', found {text!r}")
    return float(match.group(1))


def read_plan(recipe: JsonObject) -> Plan:
    """The plan of a complete recipe (recipe.read.read_recipe). Raises ConfigError on keys that cannot be read."""
    parallel, runner = _section(recipe, "parallel_config"), _section(recipe, "runner_config")
    settings, recompute = _section(recipe, "parallel"), _section(recipe, "recompute_config")
    section = _section(_section(recipe, "model"), "model_config")
    if not section:
        raise ConfigError("the recipe has no section model.model_config; begin from a recipe in research/telechat")
    training = recipe.get("run_mode") in ("train", "finetune")
    pet = section.get("pet_config") or {}
    used = bool(recipe.get("use_parallel"))
    dp, mp, pp, cp = (_integer(parallel, key, "parallel_config") if used else 1
                      for key in ("data_parallel", "model_parallel", "pipeline_stage", "context_parallel"))
    algorithm = parallel.get("context_parallel_algo") or "colossalai_cp"
    ulysses = {"ulysses_cp": cp, "hybrid_cp": _integer(parallel, "ulysses_degree_in_cp", "parallel_config")}
    interleaved = _integer(recipe, "micro_batch_interleave_num", "recipe") if training else 1
    steps = _integer(runner, "gradient_accumulation_steps", "runner_config") if training else 1
    micro = _integer(parallel, "micro_batch_num", "parallel_config") if training and pp > 1 else 1
    master = choose_master_weights(recipe)
    section = {**section, **(master.keys if master else {})}
    model = resolve({key: value for key, value in section.items() if key != "pet_config"})
    schedule = _section(settings, "pipeline_config")
    return Plan(
        training=training, model=model, dp=dp, mp=mp, pp=pp, cp=cp,
        sequence_parallel=bool(parallel.get("use_seq_parallel")) and mp > 1, algorithm=algorithm,
        ulysses=ulysses.get(algorithm, 1) if cp > 1 else 1, vocab_emb_dp=bool(parallel.get("vocab_emb_dp", True)),
        batch=_integer(runner, "batch_size", "runner_config") if training else model.batch_size,
        micro_batches=micro * steps * interleaved, interleaved_batches=interleaved,
        virtual_stages=model.pp_interleave_num if schedule.get("pipeline_interleave") and pp > 1 else 1,
        offset=model.offset, optimizer_sharded=bool(settings.get("enable_parallel_optimizer")) and training and used,
        remainder=master is not None and master.kind == "remainder",
        threshold=1024 * (_section(settings, "parallel_optimizer_config").get("parallel_optimizer_threshold") or 0),
        recompute=recompute.get("recompute", False),
        select_recompute=recompute.get("select_recompute", False),
        select_comm_recompute=recompute.get("select_comm_recompute", False),
        recompute_comm=bool(recompute.get("mp_comm_recompute", True)),
        slice_activation=bool(recompute.get("recompute_slice_activation")),
        aggregation_groups=_integer(parallel, "gradient_aggregation_group", "parallel_config", 4),
        lora_rank=_integer(pet, "lora_rank", "pet_config", 8) if pet else 0,
        lora_targets=str(pet.get("target_modules") or "") if pet else "",
        lora_bytes=BYTES[dtype_name(pet.get("param_init_type") or model.param_init_type)],
        limit_gb=_gigabytes(_section(recipe, "context").get("max_device_memory")),
        device=str(_section(recipe, "context").get("device_target", "Ascend")),
        parallel_mode=settings.get("parallel_mode", 0) if used else 0,
        alltoall=bool(settings.get("enable_alltoall")), chip=DEVICES[recipe.get(PLANNED_FOR) or DEFAULT_DEVICE])


def stage_layers(plan: Plan) -> List[List[int]]:
    """Layers of each virtual stage, [pp_interleave_num][pp]: the even share plus `offset`. Raises ConfigError."""
    share, rest = divmod(plan.model.num_layers, plan.pp * plan.virtual_stages)
    offset = plan.offset
    if plan.pp == 1:
        return [[plan.model.num_layers]]
    nested = isinstance(offset, (list, tuple)) and offset and isinstance(offset[0], (list, tuple))
    given: Sequence[object] = offset if isinstance(offset, (list, tuple)) and nested else [offset]
    rows = [list(row) if isinstance(row, (list, tuple)) else [row] * plan.pp for row in given]
    rows = rows * plan.virtual_stages if len(rows) == 1 else rows
    integers = all(isinstance(value, int) and not isinstance(value, bool) for row in rows for value in row)
    if not integers or len(rows) != plan.virtual_stages or any(len(row) != plan.pp for row in rows):
        raise ConfigError(f"model_config.offset {offset!r}: expected {plan.pp} whole numbers, one per pipeline stage"
                          + (f", in {plan.virtual_stages} lists" if plan.virtual_stages > 1 else ""))
    total = sum(map(sum, rows))
    if total != rest:
        raise ConfigError(
            f"model_config.offset {offset!r} adds {total} to the even share of {share} layers per stage, but "
            f"{plan.model.num_layers} layers on {plan.pp * plan.virtual_stages} stages leave {rest} to be added")
    layers = [[share + value for value in row] for row in rows]
    if min(map(min, layers)) < 0 or any(count < 1 for row in layers for count in row[1:-1]):
        raise ConfigError(f"model_config.offset {offset!r} leaves a pipeline stage with no layers: {layers}")
    return layers


def _multiple(faults: List[str], name: str, value: int, by: str, degree: int, advice: str) -> None:
    if degree > 1 and value % degree:
        faults.append(f"{name} ({value}) must be a multiple of {by} ({degree}): {advice}")


def _device_faults(plan: Plan, ranks: Optional[int]) -> List[str]:
    faults = []
    if ranks is not None and plan.ranks != ranks and plan.device != "CPU":     # there the workers decide
        others = plan.ranks // plan.dp
        advice = (f"set parallel_config.data_parallel to {ranks // others}" if ranks % others == 0 else
                  f"model_parallel * pipeline_stage * context_parallel = {others} does not divide {ranks}; choose "
                  "other degrees or another number of ranks")
        faults.append(f"data_parallel {plan.dp} * model_parallel {plan.mp} * pipeline_stage {plan.pp} * "
                      f"context_parallel {plan.cp} = {plan.ranks}, but there are {ranks} ranks: {advice}")
    if plan.device == "Ascend":
        faults += chip_faults(plan)
    if plan.device == "CPU" and max(plan.mp, plan.pp, plan.cp) > 1:
        faults.append("a CPU runs data parallelism only: set model_parallel, pipeline_stage and context_parallel to 1, "
                      "or context.device_target to Ascend")
    elif max(plan.mp, plan.pp, plan.cp) > 1 and plan.parallel_mode not in (1, "semi_auto_parallel"):
        faults.append(f"parallel.parallel_mode is {plan.parallel_mode!r}: model, pipeline and context parallelism need "
                      "1 (semi-automatic)")
    return faults


def chip_faults(plan: Plan) -> List[str]:
    """What the hardware of the plan lacks, one line each with what to change."""
    chip, faults = plan.chip, []
    if plan.limit_gb > chip.memory_gb:
        faults.append(f"context.max_device_memory is {plan.limit_gb:g}GB, but {chip.name} has {chip.memory_gb:g} GB: "
                      f"set it to {usable_gb(chip)}GB")
    keys = [key for key in ("compute_dtype", "param_init_type", "embedding_init_type", "norm_init_type", "res_dtype",
                            "rotary_dtype", "layernorm_compute_type", "softmax_compute_type")
            if dtype_name(getattr(plan.model, key)) == "bfloat16"]
    if keys and not chip.bfloat16:
        faults.append(f"{chip.name} has no bfloat16: set model_config.{', '.join(keys)} to float16, and in training "
                      "runner_wrapper.scale_sense to a DynamicLossScaleUpdateCell")
    return faults


def usable_gb(chip: Chip) -> int:
    """GB for context.max_device_memory; the rest is left to HCCL and the runtime, in the recipes' proportion."""
    return int(chip.memory_gb * 58 / 64)


def _width_faults(plan: Plan) -> List[str]:
    model, faults = plan.model, shape_faults(plan.model, plan.mp)
    if plan.ulysses > 1:
        for key, value in (("num_heads", model.num_heads), ("n_kv_heads", model.n_kv_heads)):
            _multiple(faults, f"model_config.{key}", value, "model_parallel * context parallelism over heads",
                      plan.mp * plan.ulysses, "lower one of them, or gather keys and values (context_parallel_algo "
                      "colossalai_cp)")
    return faults


def _sequence_faults(plan: Plan) -> List[str]:
    model = plan.model
    faults: List[str] = []
    if plan.sequence_parallel or (plan.vocab_pieces == 1 and plan.mp > 1 and plan.training):
        _multiple(faults, "tokens of a micro-batch per rank, batch_size * seq_length / context_parallel", plan.tokens,
                  "parallel_config.model_parallel", plan.mp, "change model_config.seq_length or the degree")
    if plan.cp == 1:
        return faults
    _multiple(faults, "model_config.seq_length", model.seq_length, "parallel_config.context_parallel", plan.cp,
              "change one of them")
    if plan.algorithm not in ("colossalai_cp", "ulysses_cp", "hybrid_cp"):
        faults.append(f"parallel_config.context_parallel_algo: expected colossalai_cp, ulysses_cp or hybrid_cp, found "
                      f"{plan.algorithm!r}")
    if plan.algorithm == "hybrid_cp" and plan.cp % plan.ulysses:
        faults.append(f"parallel_config.context_parallel ({plan.cp}) must be a multiple of ulysses_degree_in_cp "
                      f"({plan.ulysses})")
    if not model.use_flash_attention:
        faults.append("context parallelism needs model_config.use_flash_attention True")
    if model.attention_dropout_prob > 0:
        faults.append("context parallelism needs model_config.attention_dropout_prob 0")
    if model.use_ring_attention:
        if plan.ulysses == plan.cp:
            faults.append("model_config.use_ring_attention has nothing to send when all of context_parallel "
                          "shards heads: set context_parallel_algo to colossalai_cp or hybrid_cp, or "
                          "use_ring_attention to False")
        if model.mask_pad_tokens or model.document_boundaries:
            faults.append("model_config.use_ring_attention supports only the causal mask: set mask_pad_tokens and "
                          "document_boundaries to False, or use_ring_attention to False")
    return faults


def _pipeline_faults(plan: Plan) -> List[str]:
    faults = []
    if plan.pp > 1:
        try:
            stage_layers(plan)
        except ConfigError as err:
            faults.append(str(err))
        if plan.training and plan.micro_batches < plan.pp:
            faults.append(f"parallel_config.micro_batch_num ({plan.micro_batches}) must be at least pipeline_stage "
                          f"({plan.pp}), ideally four times that: with fewer, the stages never run concurrently")
        if plan.model.pp_interleave_num > 1 and plan.virtual_stages == 1:
            faults.append("model_config.pp_interleave_num is set, but parallel.pipeline_config.pipeline_interleave is "
                          "not: set it to True (and pipeline_scheduler to 1f1b)")
    if not plan.training:
        for key, degree in (("pipeline_stage", plan.pp), ("context_parallel", plan.cp)):
            if degree > 1:
                faults.append(f"parallel_config.{key} is {degree}: prediction runs with model parallelism only; set it "
                              "to 1")
        if plan.device == "Ascend" and plan.model.use_flash_attention and not plan.model.use_past:
            faults.append("model_config.use_past False: MindFormers predicts without a cache only with "
                          "use_flash_attention False")
        if plan.dp > 1 and plan.model.is_dynamic:
            faults.append("parallel_config.data_parallel must be 1 for prediction with is_dynamic: start several "
                          "services instead")
        tokens = plan.model.num_blocks * plan.model.block_size
        if plan.model.use_past and plan.model.seq_length > tokens:
            faults.append(f"model_config.num_blocks ({plan.model.num_blocks}) * block_size "
                          f"({plan.model.block_size}) = {tokens} tokens cannot hold one sequence of seq_length "
                          f"({plan.model.seq_length}): set num_blocks to at least "
                          f"{math.ceil(plan.model.seq_length / plan.model.block_size)}")
    return faults


def find_faults(plan: Plan, ranks: Optional[int] = None) -> List[str]:
    """Everything that keeps the plan from running, one line each with what to change. ranks: available devices."""
    return _device_faults(plan, ranks) + _width_faults(plan) + _sequence_faults(plan) + _pipeline_faults(plan)


def find_notes(plan: Plan) -> List[str]:
    """Plans that run, but probably not as intended; one line each."""
    notes, vocab = [], plan.model.vocab_size
    if plan.mp > 1 and not plan.vocab_emb_dp and vocab % plan.mp:
        notes.append(f"vocab_size {vocab} is not a multiple of model_parallel {plan.mp}: embedding table and head are "
                     "replicated on every card")
    if plan.training and plan.dp * plan.cp > 1 and not plan.optimizer_sharded:
        notes.append("parallel.enable_parallel_optimizer is off: every data-parallel rank keeps the full optimizer "
                     "state")
    if plan.training and plan.pp > 1 and bubble(plan) > 0.2:
        notes.append(f"the pipeline is idle {bubble(plan):.0%} of the time: raise parallel_config.micro_batch_num")
    if plan.lora_rank and plan.sequence_parallel:
        notes.append("LoRA with use_seq_parallel sends more than without: MindFormers' adapter gathers what sequence "
                     "parallelism has scattered (not counted in these figures); set use_seq_parallel to False")
    if plan.ulysses > 1 and not plan.alltoall:
        notes.append("parallel.enable_alltoall is off: context parallelism over heads gathers whole tensors instead of "
                     "exchanging parts; set it to True")
    if plan.cp > 1 and plan.model.use_ring_attention:
        notes.append("model_config.use_ring_attention: for keys after its own, a card asks the attention kernel for a "
                     "zero-width band, which may expose later tokens (docs/parallel.md); disable it: gathered "
                     "keys or ulysses_cp compute the same")
    if plan.mp > 8:
        notes.append(f"model_parallel {plan.mp} spans machines of eight cards and uses the slow links between them")
    return notes


def bubble(plan: Plan) -> float:
    """Share of a step in which a pipeline stage waits: (p - 1) / (v m + p - 1) for p stages of v virtual ones and
    m micro-batches (one forward, one backward; Narayanan et al., 2021)."""
    waiting = plan.pp - 1
    return waiting / (plan.virtual_stages * plan.micro_batches + waiting)


def stage_of(plan: Plan, rank: int) -> int:
    """Pipeline stage of a rank: ranks count stages first, then dp, cp and mp."""
    return rank // (plan.ranks // plan.pp)


def layers_of(plan: Plan, stage: int) -> Sequence[int]:
    """Layers of the virtual stages of a stage."""
    return [row[stage] for row in stage_layers(plan)]


def ends_of(plan: Plan, stage: int) -> Tuple[bool, bool]:
    """Whether a stage has the embedding, and whether it has the head."""
    return stage == 0, stage == plan.pp - 1
