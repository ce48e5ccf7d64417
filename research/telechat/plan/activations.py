"""Bytes that live between the forward and the backward pass: activations, masks, logits. An estimate, derived below.

What is counted is what the gradients of the operators read again, plus what exists at the same time while one layer, or
the loss, is worked on. Tensors that nothing reads again are free at once: results that are cast or transposed to
another tensor, queries and keys before rotation (a rotation's gradient needs cos and sin only), results of a
ReduceScatter that are added to the residual stream. A Cast to the type that a tensor has makes no tensor. The compiler
may fuse operators and keep less; it cannot keep less than what is read again, unless it computes it twice. Pure Python.

Not counted: the gradient of a matrix on its way to the buffer in which micro-batches are added up, and temporaries of a
kernel; both are small compared with a layer.
"""
import re
from typing import List, NamedTuple, Sequence, Tuple

from research.telechat.plan.plan import BYTES, PerStage, Plan, Selected, ends_of, layers_of
from research.telechat.spec.attention_form import documents_back_to_back
from research.telechat.spec.loss_chunks import rows_at_once

SOFTMAX_STATISTICS = 64                # bytes per query and head that flash attention keeps: two rows of eight float32
TRIANGLE = 2048                        # side of the compressed causal mask (model/mask.py)
# Bytes per logit while the loss is computed (model/loss.py), at its fullest moment. Forward: the 16-bit product of the
# head is free once it is cast to float32, the float32 logits once the largest is subtracted; then `logits - max`, its
# exponentials, the one-hot labels and their product with the logits are four float32 tensors. Backward: exponentials
# and one-hot labels, which are all that the gradients read, and the two gradients that are summed are four again.
LOSS_BYTES = 16
# Of these, what one micro-batch keeps while the loss of another is computed: exponentials and one-hot labels.
KEPT_LOSS_BYTES = 8
GATHERS = ("attention_norm", "ffn_norm")                        # cells whose result sequence parallelism gathers
OPERATORS = ("feed_forward.mul", "feed_forward.silu")           # whose result has the size of the feed-forward layer


class LayerBytes(NamedTuple):
    """Bytes of one layer, one micro-batch, on one rank."""

    kept: int                          # from forward to backward, if the layer is recomputed as a whole
    full: int                          # if nothing of it is recomputed
    operator: int                      # of full: the result of one of OPERATORS
    gather: int                        # of full: what repeating the gather behind one of GATHERS saves
    working: int                       # gradients of activations that exist at once in its backward pass
    masks: int                         # of dropout; kept where the layer is not recomputed


def layer_bytes(plan: Plan) -> LayerBytes:
    """What a decoder layer keeps.

    Not recomputed: the residual stream before attention and before feed-forward, which are the inputs of the norms too
    (once more where these compute in another type); the results of the norms as the matrix multiplications read them,
    gathered with sequence parallelism; queries, keys, values and the result of attention as the kernel has them, and
    the result once more as rows; the statistics of the softmax, or the scores as probabilities in both types; and of
    the feed-forward layer gate, silu(gate), up and their product.

    Recomputed: its input; with sequence parallelism the scattered result of attention too, without it perhaps a slice
    only (recompute_slice_activation); with mp_comm_recompute False the results of communication.

    In the backward pass: two gradients of the stream in its own type, and either, when the feed-forward layer begins,
    two of its size and the gathered gradient of its result; or, when it ends and has read what it kept, two of its size
    and the two partial gradients of its input.
    """
    model = plan.model
    tokens, hidden, heads = plan.tokens, model.hidden_size, model.num_heads // plan.mp
    compute, residual = BYTES[model.compute_dtype], BYTES[model.res_dtype]
    stream = tokens // plan.mp if plan.sequence_parallel else tokens
    inner = tokens * model.intermediate_size // plan.mp * compute
    gathered = tokens * hidden * compute
    kept = stream * hidden * residual
    if plan.sequence_parallel:
        kept += stream * hidden * compute
    elif plan.slice_activation and plan.recompute is True:     # MindFormers slices where all layers are recomputed
        kept //= plan.mp
    if plan.mp > 1 and not plan.recompute_comm:                # two gathers, or the sum behind attention
        kept += gathered * (2 if plan.sequence_parallel else 1)
    full = 2 * stream * hidden * residual + 2 * gathered
    if model.layernorm_compute_type != model.res_dtype:
        full += 2 * stream * hidden * BYTES[model.layernorm_compute_type]
    full += tokens * (3 * hidden + 2 * plan.kv_size) // plan.mp * compute
    if not model.use_ring_attention:                           # gathered keys and values, and their gradients
        full += 2 * tokens * 2 * plan.kv_size // plan.mp * compute * (plan.cp // plan.ulysses - 1)
    scores = plan.batch * heads * model.seq_length ** 2 // plan.cp
    if model.use_flash_attention:
        full += tokens * heads * SOFTMAX_STATISTICS
    else:
        full += scores * (compute + BYTES[model.softmax_compute_type])
    full += 4 * inner
    masks = 0
    if plan.training and model.attention_dropout_prob > 0:     # a bit per score in the kernel, a byte in nn.Dropout
        masks += scores // 8 if model.use_flash_attention else scores
    if plan.training and model.hidden_dropout_prob > 0:
        masks += 2 * stream * hidden
    return LayerBytes(kept, full, inner, gathered - stream * hidden * compute if plan.sequence_parallel else 0,
                      2 * stream * hidden * residual + max(2 * inner + gathered, 2 * gathered - 2 * inner), masks)


def _layers_meant(setting: PerStage, stage: int, layers: int) -> int:
    """Layers of a stage that a setting of recomputation means: True for all, or a number per stage, for each virtual
    stage or for all of them together."""
    if not setting or isinstance(setting, bool):
        return layers if setting else 0
    if isinstance(setting, (int, float, str)):
        return min(int(setting), layers)
    rows: Sequence[object] = setting
    if not isinstance(setting[0], (list, tuple)):
        rows = [setting]
    counts = [row[stage] if isinstance(row, (list, tuple)) and stage < len(row) else 0 for row in rows]
    return min(sum(int(count) if not isinstance(count, bool) else (layers if count else 0) for count in counts), layers)


def recomputed(plan: Plan, stage: int) -> int:
    """Layers of a stage that are recomputed as a whole."""
    return _layers_meant(plan.recompute, stage, sum(layers_of(plan, stage)))


def _meets(pattern: str, name: str) -> bool:
    r"""Whether a pattern of MindFormers, whose parts are joined by `\.`, meets an operator."""
    parts, names = pattern.split(r"\."), name.split(".")
    return len(parts) == len(names) and all(re.fullmatch(part, word) for part, word in zip(parts, names))


def _selected(setting: Selected, names: Tuple[str, ...], plan: Plan, stage: int) -> List[int]:
    """Layers of a stage, of those not recomputed as a whole, in which each of `names` is repeated.

    setting: patterns, or patterns with the layers they are for.
    """
    layers, whole = sum(layers_of(plan, stage)), recomputed(plan, stage)
    if isinstance(setting, (list, tuple)):
        setting = {pattern: True for pattern in setting if isinstance(pattern, str)}
    patterns = setting if isinstance(setting, dict) else {}
    return [max(0, max((_layers_meant(value, stage, layers) for pattern, value in patterns.items()
                        if _meets(str(pattern), name)), default=0) - whole) for name in names]


def repeated_operators(plan: Plan, stage: int) -> int:
    """Results of OPERATORS that are computed again instead of kept, over all layers of a stage."""
    return sum(_selected(plan.select_recompute, OPERATORS, plan, stage))


def repeated_gathers(plan: Plan, stage: int) -> int:
    """Gathers behind norms that are repeated instead of kept, over all layers of a stage that are not recomputed."""
    if not plan.sequence_parallel:
        return 0
    return sum(_selected(plan.select_comm_recompute, tuple(f"{cell}.kernel.norm" for cell in GATHERS), plan, stage))


def in_flight(plan: Plan, stage: int) -> float:
    """Micro-batches whose activations a stage keeps at most, with one forward, one backward."""
    if not plan.training:
        return 0
    if plan.pp == 1:
        return plan.interleaved_batches
    waiting: float = plan.pp - stage
    if plan.virtual_stages > 1:                                # warm-up of the interleaved schedule, in virtual stages
        waiting = (2 * (plan.pp - stage - 1) + (plan.virtual_stages - 1) * plan.pp + 1) / plan.virtual_stages
    return min(plan.micro_batches, waiting * plan.interleaved_batches)


def kept_activations(plan: Plan, stage: int) -> int:
    """Bytes that wait for the backward pass, of all micro-batches in flight."""
    layer, layers, whole = layer_bytes(plan), sum(layers_of(plan, stage)), recomputed(plan, stage)
    each = whole * layer.kept + (layers - whole) * layer.full
    each -= repeated_operators(plan, stage) * layer.operator + repeated_gathers(plan, stage) * layer.gather
    kept = int(in_flight(plan, stage) * each)
    if ends_of(plan, stage)[0]:                                # the embeddings
        kept += plan.tokens * plan.model.hidden_size * BYTES[plan.model.res_dtype]
    return kept


def backward_activations(plan: Plan, stage: int) -> int:
    """Bytes in addition while one layer is in its backward pass: gradients, and what is computed again.

    That is the whole layer; or single operators and one gather, of the half of the layer whose turn it is.
    """
    layer = layer_bytes(plan)
    again = layer.full if recomputed(plan, stage) else 0
    if not again:
        again = (2 * layer.operator if repeated_operators(plan, stage) else 0) + (
            layer.gather if repeated_gathers(plan, stage) else 0)
    return (layer.working + again) * plan.interleaved_batches


def attention_masks(plan: Plan) -> Tuple[int, int]:
    """(bytes of masks that stay on a rank, bytes that every micro-batch in flight keeps).

    Sequences with masks of their own (document_boundaries, mask_pad_tokens): [B, 1, S, S] in one byte per score,
    queries sharded over the part of context parallelism without heads. While one is made, two more of it in bool;
    the causal triangle [S, S] it begins with is a constant. A full causal mask is a constant in bool and in the
    kernel's type; so is the 2048 x 2048 triangle, which also serves documents packed back to back. Ring
    attention has none.
    """
    model = plan.model
    side, queries = model.seq_length, model.seq_length * plan.ulysses // plan.cp
    flash = model.use_flash_attention
    item = 1 if flash else BYTES[model.softmax_compute_type]
    if (flash and model.use_ring_attention and plan.cp > 1) or (not plan.training and model.is_dynamic):
        return 0, 0
    back_to_back = plan.training and documents_back_to_back(model, plan.cp // plan.ulysses)
    if not back_to_back and (model.document_boundaries or model.mask_pad_tokens):
        own = plan.batch * queries * side
        return side * side + 2 * own, own * item
    if flash and (back_to_back or model.use_attn_mask_compression):
        return 2 * TRIANGLE ** 2, 0
    return side * side + queries * side * item, 0


def kept_masks(plan: Plan, stage: int) -> int:
    """Bytes of masks of attention and dropout: constants, and what micro-batches in flight keep."""
    stay, each = attention_masks(plan)
    if not plan.training:
        return stay + each
    layer = layer_bytes(plan)
    each += (sum(layers_of(plan, stage)) - recomputed(plan, stage)) * layer.masks
    if ends_of(plan, stage)[0] and plan.model.embed_dropout_prob > 0:
        each += plan.tokens * plan.model.hidden_size // (plan.mp if plan.sequence_parallel else 1)
    return stay + int(max(1, in_flight(plan, stage)) * each)


def loss_rows(plan: Plan) -> Tuple[int, int]:
    """(rows whose loss is computed at once, rows) of logits on a rank of the last stage (model/chunked_loss.py)."""
    rows = plan.tokens // plan.mp if plan.vocab_pieces == 1 and plan.mp > 1 else plan.tokens
    return rows_at_once(rows, plan.model.vocab_size // plan.vocab_pieces, plan.model.loss_chunk_rows), rows


def loss_bytes(plan: Plan, head_gradient: int) -> int:
    """Bytes of logits and what the loss makes of them, on a rank of the last stage.

    The fullest moment is in the loss (LOSS_BYTES), or in the backward pass of the head, where the logits' gradient in
    the type of the matrix multiplications and the gradient of the head's weights (head_gradient, bytes) exist at once.
    In chunks, the logits' gradient is made with the loss and kept: the fullest moment of the loss is the last chunk, or
    when the gradients of all chunks are put together.
    """
    at_once, rows = loss_rows(plan)
    vocab, item = plan.model.vocab_size // plan.vocab_pieces, BYTES[plan.model.compute_dtype]
    whole, chunk = rows * vocab, at_once * vocab
    kept, fullest = KEPT_LOSS_BYTES * whole, LOSS_BYTES * whole
    if at_once < rows:
        kept, fullest = item * whole, max(item * whole + LOSS_BYTES * chunk, 2 * item * whole)
    return (plan.interleaved_batches - 1) * kept + max(fullest, item * whole + head_gradient)
