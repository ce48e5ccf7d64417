"""What a parallel plan costs one rank: bytes of memory, bytes sent per step, operations. Pure Python.

Parameters, optimizer state, accumulated gradients and communication follow from how model/sharding.py shards the model,
and agree with the compiled graph (scripts/plan.py --compile). Activations are an estimate (plan/activations.py): what
the compiler keeps and reuses is unknown. Bytes sent are those of ring algorithms (Patarasuk and Yuan, 2009):
AllReduce of S bytes over n ranks 2 S (n - 1) / n, AllGather and ReduceScatter to or from S bytes S (n - 1) / n.
"""
import math
import re
from dataclasses import dataclass
from typing import Dict, Iterable, List, NamedTuple, Tuple

from research.telechat.plan.activations import (
    backward_activations,
    kept_activations,
    kept_masks,
    layer_bytes,
    loss_bytes,
    loss_rows,
    recomputed,
    repeated_gathers,
)
from research.telechat.plan.plan import BYTES, CUT_BY_INPUT, Plan, Weight, bubble, ends_of, layers_of, stage_of
from research.telechat.recipe.settings import to_variant
from research.telechat.spec.flops import DEFAULT_DEVICE, DEVICES
from research.telechat.spec.flops import flops_per_token as flops_of
from research.telechat.spec.parameters import parameters

EMBEDDING = "tok_embeddings.embedding_weight"
STATE_BYTES = 8                        # AdamW: two moments of four bytes
REMAINDER_BYTES = 2                    # of a 16-bit parameter that has one (training/remainder.py)
CARDS_PER_MACHINE = 8
CHIP = DEVICES[DEFAULT_DEVICE]


@dataclass
class Memory:
    """Bytes on one rank. The first five are exact, the others estimates."""

    parameters: int = 0
    optimizer: int = 0
    remainder: int = 0                 # what 16-bit parameters lack to float32
    gradients: int = 0                 # buffers in which micro-batches are added up
    kv_cache: int = 0
    gathered: int = 0                  # parameters put together for the forward pass by optimizer parallelism
    gradients_passing: int = 0         # gradients of one fusion group on their way, without buffers
    activations: int = 0
    masks: int = 0                     # of attention and dropout
    loss: int = 0                      # logits and what the loss makes of them
    peak: str = "backward"             # the moment that the estimates are for: loss or backward

    @property
    def total(self) -> int:
        """All of them."""
        return sum(value for value in vars(self).values() if isinstance(value, int))


class Traffic(NamedTuple):
    """Bytes that one rank sends in a step for one purpose over one axis of the mesh."""

    purpose: str                       # parameters, gradients, activations, attention, pipeline
    axis: str                          # dp, cp, mp, pp or a combination
    bytes: float
    what: str


@dataclass
class Cost:
    """Everything about one rank."""

    rank: int
    stage: int
    layers: List[int]                  # of each virtual stage
    memory: Memory
    traffic: List[Traffic]

    @property
    def sent(self) -> float:
        """Bytes sent in a step."""
        return sum(item.bytes for item in self.traffic)

    def sent_by(self, field: str) -> Dict[str, float]:
        """Bytes sent, by 'purpose' or by 'axis'."""
        sums: Dict[str, float] = {}
        for item in self.traffic:
            sums[getattr(item, field)] = sums.get(getattr(item, field), 0) + item.bytes
        return sums


def gather(size: float, ranks: int) -> float:
    """Bytes one rank sends in an AllGather to, or a ReduceScatter from, `size` bytes."""
    return size * (ranks - 1) / ranks


def reduce(size: float, ranks: int) -> float:
    """Bytes one rank sends in an AllReduce of `size` bytes."""
    return 2 * gather(size, ranks)


@dataclass(frozen=True)
class _Held:
    """A parameter as one rank holds it."""

    weight: Weight
    count: int                         # layers that have it
    elements: int                      # after sharding over model parallelism
    group: int                         # ranks that hold the same elements
    axis: str                          # their axes
    sharded: bool                      # sharded over them by optimizer parallelism
    trained: bool
    item: int                          # bytes per element
    travels: int                       # bytes per element in which it is gathered


def _adapters(plan: Plan, weights: Iterable[Weight]) -> List[Weight]:
    """LoRA's A [r, in] and B [out, r] of the matrices that its pattern meets."""
    found = []
    for weight in weights:
        layer = weight.name.split(".")[-2]
        if weight.columns > 1 and re.match(plan.lora_targets, layer):
            rows_cut = layer not in CUT_BY_INPUT
            found += [Weight(f"{weight.name}.lora_a", plan.lora_rank, weight.columns, not rows_cut, True),
                      Weight(f"{weight.name}.lora_b", weight.rows, plan.lora_rank, rows_cut, True)]
    return found


def held_parameters(plan: Plan, stage: int) -> List[_Held]:
    """The parameters of a rank of `stage`."""
    first, last = ends_of(plan, stage)
    model, layers = plan.model, sum(layers_of(plan, stage))
    ends = plan.end_weights()
    trained_base = not plan.lora_rank
    listed: List[Tuple[Weight, int, int, bool]] = []
    kinds = plan.layer_weights()
    item, vector = BYTES[model.param_init_type], BYTES[model.norm_init_type]
    listed += [(weight, layers, item if weight.columns > 1 else vector, trained_base) for weight in kinds]
    if first or (last and model.tie_word_embeddings):
        listed.append((ends[EMBEDDING], 1, BYTES[model.embedding_init_type], trained_base))
    if last:
        listed += [(weight, 1, item if weight.columns > 1 else vector, trained_base) for name, weight in ends.items()
                   if name != EMBEDDING]
    if plan.lora_rank:
        listed += [(weight, layers, plan.lora_bytes, True) for weight in _adapters(plan, kinds)]
    held = []
    for weight, count, size, trained in listed:
        elements = weight.rows * weight.columns // (plan.mp if weight.cut else 1)
        group = plan.dp * plan.cp * (1 if weight.cut else plan.mp)
        axis = "+".join(name for name, degree in (("dp", plan.dp), ("cp", plan.cp), ("mp", plan.mp))
                        if degree > 1 and not (name == "mp" and weight.cut))
        big = elements * size >= plan.threshold
        sharded = plan.optimizer_sharded and weight.shardable and group > 1 and big
        # A matrix is gathered in the type that it is multiplied in; its gradient comes back as it is stored.
        whole_table = weight.name.endswith("embedding_weight") and plan.vocab_pieces == 1
        travels = size if whole_table else min(size, BYTES[model.compute_dtype])
        held.append(_Held(weight, count, elements, group, axis, sharded, trained, size, travels))
    return held


def _state(plan: Plan, stage: int) -> Memory:
    """Parameters, optimizer state, gradients and KV cache."""
    memory = Memory()
    passing = 0
    for part in held_parameters(plan, stage):
        own = part.elements // part.group if part.sharded else part.elements
        memory.parameters += part.count * own * part.item
        if part.sharded:
            memory.gathered += part.count * part.elements * part.travels
        if plan.training and part.trained:
            memory.optimizer += part.count * own * STATE_BYTES
            if plan.remainder and part.item == 2:
                memory.remainder += part.count * own * REMAINDER_BYTES
            if plan.accumulated:
                memory.gradients += part.count * part.elements * part.item
            else:
                memory.gradients_passing += part.count * own * part.item
                passing += part.count * part.elements * part.item
    memory.gradients_passing += passing // plan.aggregation_groups
    if plan.model.use_past and not plan.training:
        slots = plan.model.num_blocks * plan.model.block_size
        size = BYTES[plan.model.compute_dtype]
        memory.kv_cache = 2 * sum(layers_of(plan, stage)) * slots * plan.kv_size // plan.mp * size
    return memory


def _head_gradient(plan: Plan, stage: int) -> int:
    """Bytes of the whole gradient of the head's weights, as it is computed and as it is stored."""
    name = EMBEDDING if plan.model.tie_word_embeddings else "lm_head.weight"
    sizes = [part.elements * (part.item + BYTES[plan.model.compute_dtype]) for part in held_parameters(plan, stage)
             if part.weight.name == name and part.trained]
    return sum(sizes)


def memory_of(plan: Plan, stage: int) -> Memory:
    """Memory of a rank of `stage` at its fullest moment.

    That is either in the loss, when gradients do not exist yet and no layer is recomputed, or in the backward pass of
    the layers, when logits exist no longer. Gathered parameters are held from the first forward pass to the last
    backward pass. What belongs to the other moment is 0.
    """
    memory = _state(plan, stage)
    memory.masks = kept_masks(plan, stage)
    layer = layer_bytes(plan)
    if not plan.training:                                      # the longest prompt, one layer at a time
        memory.activations = layer.full
        return memory
    memory.activations = kept_activations(plan, stage)
    loss = loss_bytes(plan, _head_gradient(plan, stage)) if ends_of(plan, stage)[1] else 0
    backward = backward_activations(plan, stage)
    again = layer.masks * plan.interleaved_batches if recomputed(plan, stage) else 0
    if loss > backward + again + memory.gradients_passing:
        memory.loss, memory.gradients_passing, memory.peak = loss, 0, "loss"
    else:
        memory.activations += backward
        memory.masks += again
    return memory


def _parameter_traffic(plan: Plan, stage: int) -> List[Traffic]:
    items = []
    for part in held_parameters(plan, stage):
        if part.group == 1 or not plan.training:
            continue
        size, count, name = part.elements, part.count, part.weight.name
        if part.sharded:
            items.append(Traffic("parameters", part.axis, count * gather(size * part.travels, part.group), name))
        if part.trained:
            send = gather if part.sharded else reduce
            items.append(Traffic("gradients", part.axis, count * send(size * part.item, part.group), name))
    return items


def _layer_traffic(plan: Plan, stage: int) -> List[Traffic]:
    """Model parallelism in the layers, per step."""
    if plan.mp == 1:
        return []
    model, layers = plan.model, sum(layers_of(plan, stage))
    rows = plan.tokens * model.hidden_size * BYTES[model.compute_dtype]
    again = recomputed(plan, stage) / layers if layers else 0
    whole, part = reduce(rows, plan.mp), gather(rows, plan.mp)
    if not plan.training:
        forward, other = 2 * whole, 0.0
    elif plan.sequence_parallel:
        gathers = repeated_gathers(plan, stage) / layers if layers else 0
        forward, other = 4 * part, 4 * part + again * plan.recompute_comm * 2 * part + gathers * part
    else:
        dropped = 2 if model.hidden_dropout_prob > 0 else 1
        sliced = part if plan.slice_activation and plan.recompute is True else 0   # is put together again
        forward, other = 2 * whole, 2 * whole + again * (dropped * plan.recompute_comm * whole + sliced)
    return [Traffic("activations", "mp", plan.micro_batches * layers * (forward + other), "layers")]


def _end_traffic(plan: Plan, stage: int) -> List[Traffic]:
    """Model parallelism in embedding, head and loss, per step."""
    if plan.mp == 1:
        return []
    first, last = ends_of(plan, stage)
    model, vocab_cut = plan.model, plan.vocab_pieces > 1
    rows = plan.tokens * model.hidden_size * BYTES[model.compute_dtype]
    whole, part = reduce(rows, plan.mp), gather(rows, plan.mp)
    back = 1 if plan.training else 0
    items = []
    if first and vocab_cut:
        once = part if plan.sequence_parallel else whole
        items.append(Traffic("activations", "mp", plan.micro_batches * once * (1 + back), "embedding"))
    if last and vocab_cut and plan.training:
        # Without sequence parallelism gradients stay partial sums on the way down, to the sum behind the embedding.
        head = 2 * part if plan.sequence_parallel else 0
        loss = 5 * reduce(4 * plan.tokens, plan.mp)        # largest logit, sum, logit of the label; two backwards
        at_once, rows_in_all = loss_rows(plan)
        if at_once < rows_in_all:                          # the gradient of the rows is a row_linear's result
            head += part if plan.sequence_parallel else 2 * whole
            loss = 3 * reduce(4 * plan.tokens, plan.mp)
        items.append(Traffic("activations", "mp", plan.micro_batches * (head + loss), "head and loss"))
    return items


def _attention_traffic(plan: Plan, stage: int) -> List[Traffic]:
    """Context parallelism, per step."""
    if plan.cp == 1:
        return []
    model = plan.model
    compute = BYTES[model.compute_dtype]
    keys = plan.tokens * 2 * plan.kv_size // plan.mp * compute                    # keys and values of this rank
    queries = plan.tokens * model.hidden_size // plan.mp * compute
    layers = sum(layers_of(plan, stage))
    again = recomputed(plan, stage) / layers if layers else 0
    gathering = plan.cp // plan.ulysses
    forward = keys * (gathering - 1)
    backward = forward * (2 if model.use_ring_attention else 1)                 # a ring carries them and gradients
    swapped = gather(2 * queries + keys, plan.ulysses)                             # queries, keys, values, result
    if not plan.alltoall:
        swapped *= plan.ulysses                                # gathered, then sliced
    per_layer = forward * (1 + again) + backward + swapped * (2 + again)
    return [Traffic("attention", "cp", plan.micro_batches * layers * per_layer, "attention")]


def _pipeline_traffic(plan: Plan, stage: int) -> List[Traffic]:
    if plan.pp == 1 or not plan.training:
        return []
    model = plan.model
    first, last = ends_of(plan, stage)
    stream = plan.tokens // (plan.mp if plan.sequence_parallel else 1)
    size = stream * model.hidden_size * BYTES[model.compute_dtype]
    steps = plan.virtual_stages * 2 - int(first) - int(last)   # forward from all but the last, backward from all but
    items = [Traffic("pipeline", "pp", plan.micro_batches * steps * size, "between stages")]      # the first
    if model.tie_word_embeddings and (first or last):       # the table goes to the head, its gradient comes back
        table = next(part for part in held_parameters(plan, 0) if part.weight.name.endswith("embedding_weight"))
        own = table.elements // (table.group if table.sharded else 1)
        items.append(Traffic("pipeline", "pp", own * table.item, "tied embedding"))
    return items


def traffic_of(plan: Plan, stage: int) -> List[Traffic]:
    """Communication of a rank of `stage`, per step."""
    parts = (_parameter_traffic, _layer_traffic, _end_traffic, _attention_traffic, _pipeline_traffic)
    return [item for part in parts for item in part(plan, stage)]


def cost_of(plan: Plan, rank: int) -> Cost:
    """Memory and communication of a rank."""
    stage = stage_of(plan, rank)
    return Cost(rank, stage, list(layers_of(plan, stage)), memory_of(plan, stage), traffic_of(plan, stage))


def link_of(plan: Plan, axis: str) -> str:
    """'machine' where the ranks of an axis share one, 'network' where not."""
    stride, reach = 1, 1
    for name, degree in (("mp", plan.mp), ("cp", plan.cp), ("dp", plan.dp), ("pp", plan.pp)):
        if name in axis.split("+") and degree > 1:
            reach = stride * degree
        stride *= degree
    return "machine" if reach <= plan.chip.joined else "network"


def parameter_count(plan: Plan) -> int:
    """Parameters of the whole model, without adapters."""
    return sum(math.prod(param.shape) for param in parameters(to_variant(plan.model)))


def flops_per_token(plan: Plan) -> float:
    """Operations of one token, as spec/flops.py counts them; prediction has no backward pass, which is two thirds."""
    model = plan.model
    matrices = model.num_layers * sum(weight.rows * weight.columns for weight in plan.layer_weights()
                                         if weight.columns > 1) + model.vocab_size * model.hidden_size
    flops = flops_of(matrices, model.num_layers, model.hidden_size, model.seq_length)
    return flops if plan.training else flops / 3


def tokens_per_second(plan: Plan, mfu: float) -> float:
    """Tokens per second of all devices at a model FLOPs utilisation of `mfu`, pipeline bubble included in it."""
    return plan.ranks * plan.chip.teraflops * 1e12 * mfu / flops_per_token(plan)


__all__ = ["CHIP", "Cost", "Memory", "Traffic", "bubble", "cost_of", "flops_per_token", "gather",
           "held_parameters", "link_of", "memory_of", "parameter_count", "reduce", "tokens_per_second", "traffic_of"]
