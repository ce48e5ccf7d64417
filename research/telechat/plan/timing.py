"""How long a step of a plan takes: an estimate from arithmetic, published figures of the hardware and five constants.

A step is made of matrix products, attention, operators that only move memory, communication within a machine and
between machines, and what every collective and every layer costs however small it is. Each is computed at the
published peak of the card; the constants (`Efficiency`) say which share of the peak is reached. They are fitted to
published speeds (plan/calibration.py) and are the same for every model. Nothing here was measured by this project.

What overlaps: gathers of parameters and reductions of gradients with the forward and backward passes of one
micro-batch; what does not fit behind those counts in full. Collectives of model and context parallelism stand between
products that need their results, so that they count in full, but for the half that fine-grained interleaving hides.
A pipeline takes m slots of its slowest stage for m micro-batches, and fills and drains in (p - 1) / v further ones for
p stages of v virtual ones (Narayanan et al., 2021).
"""
import math
from dataclasses import dataclass, fields
from typing import Dict, List, NamedTuple, Sequence, Tuple

from research.telechat.plan.activations import recomputed, repeated_gathers, repeated_operators
from research.telechat.plan.cost import CHIP, held_parameters, link_of, traffic_of
from research.telechat.plan.plan import BYTES, Plan, ends_of, layers_of
from research.telechat.spec.flops import Chip

PEAK = CHIP.teraflops * 1e12           # FLOP/s of 16-bit matrix products, dense, of the card that the fit is for
ATTENTION_BACKWARD = 2.5               # operations of flash attention's backward pass, of those of its forward pass
HIDDEN_SHARE = 0.5                     # of model parallelism's communication, by fine-grained interleaving


@dataclass(frozen=True)
class Efficiency:
    """The constants: shares of published peaks that are reached, and seconds that no size explains."""

    matrix: float = 0.764              # of the peak, in matrix products
    attention: float = 0.588           # of the peak, in flash attention
    memory: float = 0.638              # of the memory's bandwidth
    links: float = 0.618               # of the links' bandwidth
    latency: float = 24.8e-6           # seconds of a collective, and of a layer's pass, besides its size

    def values(self) -> List[float]:
        """In the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]


REACHED = Efficiency()


class Work(NamedTuple):
    """What one rank does, in units of which `seconds` knows the speed."""

    matrix: float = 0.0                # FLOP
    attention: float = 0.0             # FLOP
    memory: float = 0.0                # bytes read and written
    links: float = 0.0                 # seconds at the published speed of the links, not hidden
    calls: float = 0.0                 # collectives and passes of a layer

    def __add__(self, other: tuple) -> "Work":
        return Work(*(mine + theirs for mine, theirs in zip(self, other)))

    def times(self, factor: float) -> "Work":
        """The same, `factor` times."""
        return Work(*(value * factor for value in self))

    def parts(self, reached: Efficiency, chip: Chip = CHIP) -> Dict[str, float]:
        """Seconds of each kind."""
        peak = chip.teraflops * 1e12
        return {"matrix": self.matrix / (peak * reached.matrix),
                "attention": self.attention / (peak * reached.attention),
                "memory": self.memory / (chip.hbm * reached.memory), "links": self.links / reached.links,
                "latency": self.calls * reached.latency}

    def seconds(self, reached: Efficiency, chip: Chip = CHIP) -> float:
        """All of it, one after the other."""
        return sum(self.parts(reached, chip).values())


@dataclass(frozen=True)
class StepTime:
    """Estimated seconds of a step, by part. `stage`: the slowest one, whose parts these are."""

    stage: int
    parts: Dict[str, float]            # matrix, attention, memory, links, latency, pipeline, gradients, optimizer
    tokens: int                        # of a step, on all cards
    ranks: int

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all cards."""
        return self.tokens / self.seconds

    @property
    def limit(self) -> str:
        """The largest part."""
        return max(self.parts, key=lambda name: self.parts[name])


def bandwidth(plan: Plan, axis: str) -> float:
    """Bytes/s at which a rank sends over `axis`; within a machine, over all its links to the cards of the group."""
    if link_of(plan, axis) == "network":
        return plan.chip.network
    degrees = {"dp": plan.dp, "cp": plan.cp, "mp": plan.mp, "pp": plan.pp}
    group = math.prod(degrees[name] for name in axis.split("+"))
    return min(plan.chip.link * (group - 1), plan.chip.links)


def layer_work(plan: Plan, forward_only: bool = False) -> Tuple[Work, Work]:
    """(forward pass, backward pass) of one layer for one micro-batch on one rank, without communication.

    The backward pass has twice the matrix products of the forward pass, once with frozen weights (LoRA). Memory: norms,
    residual additions, rotation, layout of heads, gate and product of the feed-forward layer, dropout.
    """
    model, tokens = plan.model, plan.tokens
    compute, residual = BYTES[model.compute_dtype], BYTES[model.res_dtype]
    weights = sum(weight.rows * weight.columns for weight in plan.layer_weights() if weight.columns > 1)
    matrix = 2.0 * tokens * weights / plan.mp
    attention = 2.0 * tokens * model.seq_length * model.hidden_size / plan.mp      # 4 S^2 h, half of it causal
    stream = (tokens // plan.mp if plan.sequence_parallel else tokens) * model.hidden_size
    inner = tokens * model.intermediate_size // plan.mp
    heads = tokens * (2 * model.hidden_size + 2 * plan.kv_size) // plan.mp
    memory = 2 * stream * (residual + compute) + 2 * stream * (2 * residual + compute)  # norms, additions
    memory += (2 * heads + 4 * heads) * compute                                          # layout, rotation
    memory += 5 * inner * compute                                                        # silu(gate) * up
    if model.hidden_dropout_prob > 0:
        memory += 2 * stream * (2 * compute + 1)
    if not model.use_flash_attention:
        memory += 6 * plan.batch * model.num_heads // plan.mp * model.seq_length ** 2 * 4
    forward = Work(matrix, attention, memory, 0.0, 1.0)
    if forward_only:
        return forward, Work()
    factor = 1.0 if plan.lora_rank else 2.0
    return forward, Work(factor * matrix, ATTENTION_BACKWARD * attention, 2.0 * memory, 0.0, 1.0)


def _collectives(plan: Plan) -> float:
    """Calls of a collective in one layer's forward pass, over model and context parallelism."""
    calls = 0.0
    if plan.mp > 1:
        calls += 4.0 if plan.sequence_parallel else 2.0
    if plan.cp > 1:
        calls += 4.0 if plan.ulysses > 1 else 2.0
    return calls


def slot(plan: Plan, stage: int, hidden: float) -> Work:
    """Forward and backward pass of one micro-batch on a rank of `stage`, with recomputation.

    hidden: share of the collectives of model and context parallelism that something else runs behind.
    """
    layers, again = sum(layers_of(plan, stage)), recomputed(plan, stage)
    forward, backward = layer_work(plan)
    work = (forward + backward).times(layers) + forward.times(again)
    inner = plan.tokens * plan.model.intermediate_size // plan.mp * BYTES[plan.model.compute_dtype]
    work += Work(memory=3.0 * inner * repeated_operators(plan, stage))
    calls = _collectives(plan)
    work += Work(calls=calls * (2 * layers + again * plan.recompute_comm) + repeated_gathers(plan, stage))
    for item in traffic_of(plan, stage):
        if item.purpose in ("activations", "attention"):
            exposed = item.bytes / plan.micro_batches * (1 - hidden)
            work += Work(links=exposed / bandwidth(plan, item.axis))
        if item.purpose == "pipeline":
            work += Work(links=item.bytes / plan.micro_batches / plan.chip.network, calls=2.0)
    if ends_of(plan, stage)[1]:
        work += _head(plan)
    return work


def _head(plan: Plan) -> Work:
    """Head and loss of one micro-batch: products of both passes, and the float32 logits that are read and written."""
    model = plan.model
    logits = plan.tokens * model.vocab_size / max(plan.vocab_pieces, plan.mp if plan.vocab_pieces == 1 else 1)
    return Work(matrix=(4.0 if plan.lora_rank else 6.0) * logits * model.hidden_size, memory=40.0 * logits)


def _update(plan: Plan, stage: int) -> Work:
    """The optimizer's step: parameter, gradient and two moments read, three of them written."""
    own = sum(part.count * (part.elements // part.group if part.sharded else part.elements)
              for part in held_parameters(plan, stage) if part.trained)
    return Work(memory=32.0 * own)


class StageWork(NamedTuple):
    """What a rank of a stage does."""

    slot: Work                         # for one micro-batch
    once: Work                         # for a step: the optimizer
    gradients: float                   # seconds of data parallelism at the published speed of the links, for a step


def stage_work(plan: Plan, stage: int, interleaved: bool = False) -> StageWork:
    """The work of a stage. interleaved: see `step_time`."""
    hidden = HIDDEN_SHARE if interleaved or plan.interleaved_batches > 1 else 0.0
    traffic = [item for item in traffic_of(plan, stage) if item.purpose in ("parameters", "gradients")]
    work = slot(plan, stage, hidden)
    if plan.accumulated:               # read the buffer and the gradient, write the buffer
        work += Work(memory=3.0 * sum(part.count * part.elements * part.item for part in held_parameters(plan, stage)
                                      if part.trained))
    return StageWork(work, _update(plan, stage), sum(item.bytes / bandwidth(plan, item.axis) for item in traffic))


def time_of(plan: Plan, works: Sequence[StageWork], reached: Efficiency = REACHED) -> StepTime:
    """The step of `plan` from the work of its stages."""
    slots = [work.slot.seconds(reached, plan.chip) for work in works]
    slowest = max(range(len(works)), key=slots.__getitem__)
    work, of_slot = works[slowest], slots[slowest]
    parts = {name: seconds * plan.micro_batches for name, seconds in work.slot.parts(reached, plan.chip).items()}
    parts["pipeline"] = (plan.pp - 1) / plan.virtual_stages * of_slot
    parts["gradients"] = max(0.0, work.gradients / reached.links - of_slot * HIDDEN_SHARE)
    parts["optimizer"] = work.once.seconds(reached, plan.chip)
    return StepTime(slowest, parts, plan.step_tokens, plan.ranks)


def step_time(plan: Plan, reached: Efficiency = REACHED, interleaved: bool = False) -> StepTime:
    """Estimated time of a training step.

    interleaved: half of the communication in the layers runs behind products of the other half of a micro-batch, also
    without micro_batch_interleave_num, as MindFormers' fine_grain_interleave has it.
    """
    return time_of(plan, [stage_work(plan, stage, interleaved) for stage in range(plan.pp)], reached)


def token_work(plan: Plan, length: int) -> Work:
    """One decoding step of prediction: every weight is read once, and the KV cache of `length` tokens per sequence."""
    model = plan.model
    held = held_parameters(plan, 0)
    embedding = 0 if model.tie_word_embeddings else next(
        part.elements * part.item for part in held if part.weight.name.endswith("embedding_weight"))
    weights = sum(part.count * part.elements * part.item for part in held) - embedding
    size = BYTES[model.compute_dtype]
    cache = 2.0 * plan.batch * length * plan.kv_size * model.num_layers * size / plan.mp
    layers = model.num_layers
    calls = layers * (1.0 + (2.0 if plan.mp > 1 else 0.0))
    rows = plan.batch * model.hidden_size * size
    links = 2.0 * layers * 2 * rows * (plan.mp - 1) / plan.mp / bandwidth(plan, "mp") if plan.mp > 1 else 0.0
    return Work(2.0 * plan.batch * weights / size, 2.0 * cache / size, weights + cache, links, calls)


def token_time(plan: Plan, length: int = 0, reached: Efficiency = REACHED) -> StepTime:
    """Estimated time of one decoding step, one token for each of the `batch` sequences of `length` tokens."""
    return StepTime(0, token_work(plan, length).parts(reached, plan.chip), plan.batch, plan.ranks)
