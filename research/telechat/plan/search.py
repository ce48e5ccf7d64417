"""The search for the fastest plan of a model on a number of cards: every degree, every split of the batch, and as much
recomputation as the memory asks for. Pure arithmetic; times are estimates (plan/timing.py).

A plan is offered if it passes every check of plan/plan.py and its fullest card stays below max_device_memory by a
margin. For each choice of degrees, each pipeline stage recomputes the fewest layers with which it fits.
"""
import copy
from dataclasses import dataclass, replace
from typing import Callable, Iterator, List, NamedTuple, Optional, Tuple, Union

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.plan.cost import CARDS_PER_MACHINE, Memory, memory_of
from research.telechat.plan.plan import BYTES, Plan, find_faults, layers_of, read_plan
from research.telechat.plan.timing import StepTime, stage_work, time_of, token_time

MARGIN = 0.05                          # of max_device_memory that stays free, as activations are estimates
KEPT = 10                              # plans that are offered
BATCHES = (1, 2, 4, 8)                 # sequences per micro-batch and data-parallel rank
VIRTUAL = (1, 2, 3, 4)                 # virtual stages per pipeline stage
LONG = 16384                           # tokens per sequence from which on context parallelism is tried
OPERATORS = ("feed_forward\\.mul", "feed_forward\\.silu")     # whose results are cheap to compute again


class Shape(NamedTuple):
    """Degrees and split of the batch."""

    dp: int
    mp: int
    pp: int
    cp: int
    batch: int
    micro_batches: int
    virtual: int


@dataclass(frozen=True)
class Found:
    """A plan that fits."""

    plan: Plan
    time: StepTime
    memories: Tuple[Memory, ...]       # of each pipeline stage
    changes: JsonObject            # {dotted key: value}: what a recipe over the searched one has to say

    @property
    def memory_gb(self) -> float:
        """Of the fullest card."""
        return max(memory.total for memory in self.memories) / 1e9

    @property
    def recomputed(self) -> str:
        """What is computed again, in words."""
        whole = self.plan.recompute
        layers = self.plan.model.num_layers
        count = sum(whole) if isinstance(whole, list) else layers if whole else 0
        if count == layers:
            return "all layers"
        parts = [f"{count} of {layers} layers"] if count else []
        return ", ".join(parts + ["silu, mul"] * bool(self.plan.select_recompute)) or "nothing"


def shapes(plan: Plan, cards: int, sequences: int) -> Iterator[Shape]:
    """Everything that `cards` cards and `sequences` sequences a step can be divided into. Checks come later."""
    model = plan.model
    for mp in _divisors(cards, min(CARDS_PER_MACHINE, model.num_heads)):
        for cp in _divisors(cards // mp, 16 if model.seq_length >= LONG else 1):
            for pp in _divisors(cards // mp // cp, model.num_layers):
                dp = cards // mp // cp // pp
                for batch in BATCHES:
                    if sequences % (dp * batch):
                        continue
                    micro = sequences // (dp * batch)
                    if pp > 1 and micro < pp:
                        continue
                    for virtual in VIRTUAL if pp > 1 else (1,):
                        if virtual == 1 or (micro % pp == 0 and model.num_layers >= pp * virtual):
                            yield Shape(dp, mp, pp, cp, batch, micro, virtual)


def _divisors(number: int, most: int) -> List[int]:
    return [value for value in range(1, min(number, most) + 1) if number % value == 0]


def even_offset(layers: int, pp: int, virtual: int) -> Union[int, List[int], List[List[int]]]:
    """`offset` that gives the layers beyond an even share to the stages in the middle.

    The first also has the embedding, the last the head. A list, in lists for virtual stages; 0 where nothing is left.
    """
    rest = layers % (pp * virtual)
    if not rest or pp == 1:
        return 0
    order = sorted(range(pp), key=lambda stage: abs(2 * stage + 1 - pp))
    places = [(row, stage) for row in range(virtual) for stage in order]
    rows = [[0] * pp for _ in range(virtual)]
    for row, stage in places[:rest]:
        rows[row][stage] = 1
    return rows if virtual > 1 else rows[0]


def changes_of(shape: Shape, plan: Plan) -> JsonObject:
    """What a recipe says for a shape, but for recomputation."""
    heads = plan.model.num_heads % (shape.mp * shape.cp) == 0 and plan.model.n_kv_heads % (shape.mp * shape.cp) == 0
    changes: JsonObject = {
        "use_parallel": True,
        "runner_config.batch_size": shape.batch,
        "runner_config.gradient_accumulation_steps": shape.micro_batches if shape.pp == 1 else 1,
        "micro_batch_interleave_num": 1,
        "parallel_config.data_parallel": shape.dp, "parallel_config.model_parallel": shape.mp,
        "parallel_config.pipeline_stage": shape.pp, "parallel_config.context_parallel": shape.cp,
        "parallel_config.use_seq_parallel": shape.mp > 1 and not plan.lora_rank,
        "parallel_config.micro_batch_num": shape.micro_batches if shape.pp > 1 else 1,
        "parallel.enable_parallel_optimizer": True,
        "model.model_config.offset": even_offset(plan.model.num_layers, shape.pp, shape.virtual),
        "model.model_config.pp_interleave_num": shape.virtual,
        "parallel.pipeline_config": {"pipeline_interleave": shape.virtual > 1, "pipeline_scheduler": "1f1b"},
    }
    if shape.cp > 1:
        changes["parallel_config.context_parallel_algo"] = "ulysses_cp" if heads else "colossalai_cp"
        changes["parallel.enable_alltoall"] = heads
        changes["model.model_config.use_ring_attention"] = False
    return changes


def with_changes(recipe: JsonObject, changes: JsonObject) -> JsonObject:
    """A copy of a complete recipe with {dotted key: value}; sections that it lacks are made."""
    recipe = copy.deepcopy(recipe)
    for dotted, value in changes.items():
        *names, key = dotted.split(".")
        place = recipe
        for name in names:
            if not isinstance(place.get(name), dict):
                place[name] = {}
            place = place[name]
        place[key] = value
    return recipe


def _fewest(plan: Plan, stage: int, limit: float) -> Optional[int]:
    """The fewest recomputed layers with which a stage fits; None where it never does."""
    layers = sum(layers_of(plan, stage))

    def fits(count: int) -> bool:
        counts = [0] * plan.pp
        counts[stage] = count
        return memory_of(replace(plan, recompute=counts), stage).total <= limit
    if not fits(layers):
        return None
    low, high = 0, layers
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _recomputations(plan: Plan, limit: float) -> Iterator[Plan]:
    """The plan with the least recomputation of each kind that fits."""
    bare = replace(plan, recompute=False, select_recompute=False, select_comm_recompute=False)
    whole = replace(bare, recompute=True)
    if plan.slice_activation and plan.mp > 1 and not plan.sequence_parallel and all(
            memory_of(whole, stage).total <= limit for stage in range(plan.pp)):
        yield whole                                      # alone keeps slices of activations, so that it may need less
    for select in (False, list(OPERATORS)):
        partly = replace(bare, select_recompute=select)
        by_stage = [0] * plan.pp
        for stage in sorted(range(plan.pp), key=lambda stage: stage not in (0, plan.pp - 1)):     # the fullest first
            fewest = _fewest(partly, stage, limit)
            if fewest is None:
                return                                   # less is kept with every layer recomputed, whatever `select`
            by_stage[stage] = fewest
        yield replace(partly, recompute=by_stage if any(by_stage) else False)
        if not any(by_stage):
            return


def _recompute_changes(plan: Plan) -> JsonObject:
    whole = plan.recompute
    if isinstance(whole, list) and len(whole) == 1:
        whole = True if whole[0] == plan.model.num_layers else whole
    return {"recompute_config.recompute": whole, "recompute_config.select_recompute": plan.select_recompute,
            "recompute_config.select_comm_recompute": False}


def search(recipe: JsonObject, cards: int, sequences: int, margin: float = MARGIN, keep: int = KEPT,
           progress: Callable[[int, int], None] = lambda done, total: None) -> List[Found]:
    """The `keep` fastest plans, the fastest first.

    Args:
        recipe: complete (recipe.read.read_recipe), of fine-tuning.
        cards: cards of the job.
        sequences: sequences of a step, on all cards together.
        margin: share of max_device_memory that stays free.
        progress: called with (shapes done, all shapes).

    Raises:
        ConfigError: the recipe cannot be read, or no plan passes the checks and fits.
    """
    start = read_plan(recipe)
    if not start.training:
        raise ConfigError("--search with this option searches training plans; run_mode is not finetune")
    tried = sorted(shapes(start, cards, sequences), key=lambda shape: (shape.pp, shape.mp, shape.virtual))
    found: List[Found] = []
    for number, shape in enumerate(tried):
        progress(number, len(tried))
        found += _plans(recipe, start, shape, margin, found[-1].time.seconds if len(found) >= keep else None)
        found = sorted(found, key=lambda one: one.time.seconds)[:keep]
    progress(len(tried), len(tried))
    if not found:
        raise ConfigError(f"no plan of {start.model.net_name or 'this model'} with {start.model.seq_length} tokens per "
                          f"sequence and {sequences} sequences per step fits {cards} cards of {start.limit_gb:g} GB: "
                          "use more cards, another --global_batch, or a shorter --seq_length")
    return found


def _plans(recipe: JsonObject, start: Plan, shape: Shape, margin: float, slowest: Optional[float]) -> List[Found]:
    """The plans of a shape; none where even without recomputation it takes longer than `slowest` seconds."""
    changes = changes_of(shape, start)
    try:
        plan = read_plan(with_changes(recipe, changes))
        if find_faults(plan, shape.dp * shape.mp * shape.pp * shape.cp):
            return []
    except ConfigError:
        return []
    limit = plan.limit_gb * 1e9 * (1 - margin)
    bare = replace(plan, recompute=False, select_recompute=False, select_comm_recompute=False)
    ends = sorted({0, plan.pp - 1})
    if slowest is not None:
        least = time_of(bare, [stage_work(bare, stage) for stage in ends]).seconds
        if least > slowest:
            return []
    offered = []
    for fitting in _recomputations(plan, limit):
        works = [stage_work(fitting, stage) for stage in range(plan.pp)]
        memories = tuple(memory_of(fitting, stage) for stage in range(plan.pp))
        offered.append(Found(fitting, time_of(fitting, works), memories, {**changes, **_recompute_changes(fitting)}))
    return offered


class Served(NamedTuple):
    """A plan of prediction."""

    cards: int
    batch: int
    weights_gb: float                  # of a card
    cache_gb: float                    # of a card, that is left for keys and values
    context: int                       # tokens of prompt and answer, of each sequence, that fit
    tokens_per_second: float           # of all sequences, at half of seq_length
    seconds_per_token: float


def search_prediction(recipe: JsonObject, cards: int, margin: float = MARGIN, length: int = 0) -> List[Served]:
    """What model parallelism up to `cards` cards and batches up to 64 give, as far as sequences of `length` tokens fit.

    length: tokens; 0: seq_length of the recipe. Raises ConfigError: nothing fits, or the recipe cannot be read.
    """
    start = read_plan(recipe)
    length = length or start.model.seq_length
    found = []
    for mp in _divisors(cards, min(CARDS_PER_MACHINE, cards)):
        if cards % mp or find_faults(replace(start, mp=mp, dp=1), None):
            continue
        for batch in (1, 2, 4, 8, 16, 32, 64):
            model = replace(start.model, seq_length=length, use_past=True)
            plan = replace(start, mp=mp, dp=1, batch=batch, model=model)
            memory = memory_of(replace(plan, batch=1), 0)      # prompts are read one after the other
            left = plan.limit_gb * 1e9 * (1 - margin) - (memory.total - memory.kv_cache)
            each = 2 * plan.model.num_layers * plan.kv_size // mp * BYTES[plan.model.compute_dtype]
            context = int(left / each / batch) // plan.model.block_size * plan.model.block_size
            if context < length:
                break
            time = token_time(plan, length // 2)
            found.append(Served(mp, batch, memory.parameters / 1e9, left / 1e9, context, time.tokens_per_second,
                                time.seconds))
    if not found:
        raise ConfigError(f"{start.model.net_name or 'this model'} with one sequence of {length} tokens does not fit "
                          f"{cards} card(s) of {start.limit_gb:g} GB: use more cards, or a shorter --seq_length")
    return found


def sequences_of(recipe: JsonObject) -> int:
    """Sequences of a step of the recipe as it is, which a search keeps by default."""
    plan = read_plan(recipe)
    return plan.step_tokens // plan.model.seq_length


__all__ = ["Found", "Served", "even_offset", "search", "search_prediction", "sequences_of", "shapes", "with_changes"]
