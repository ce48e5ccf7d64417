"""Checks of a checkpoint before it is converted: names, shapes, types, a tied head, the grouping of fused weights.

They read headers, and of the contents only what they need.
"""
import re
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

from research.telechat.checkpoint.dtypes import ITEM_SIZE, NAMES, RAW, cast
from research.telechat.checkpoint.reader import Checkpoint
from research.telechat.common.errors import CheckpointError
from research.telechat.spec.parameters import (
    LLAMA,
    OFFICIAL,
    Match,
    Param,
    explained_by_groups,
    llama_zero_biases,
    match_llama,
    match_mindspore,
    match_official,
    parameters,
    summarise,
)
from research.telechat.spec.variants import Variant

_SAMPLED_LAYERS = 4              # fused weights read to tell how they are grouped
_EXPLAINED = 0.02                # share of variance that a grouping must explain at least to count as recognised
_CHUNK = 32 << 20
# Tensors that GPTQ, AWQ, bitsandbytes, compressed-tensors and FP8 write next to or instead of a weight
_QUANTISED = re.compile(r"\.(qweight|qzeros|scales|g_idx|weight_scale(_inv)?|input_scale|weight_packed|weight_shape|"
                        r"weight_zero_point|SCB|weight\.(absmax|quant_map|nested_\w+|quant_state\..+))$")
_ADAPTED = re.compile(r"lora|\.base_layer\.")


def _match(checkpoint: Checkpoint, variant: Variant, layout: str) -> Match:
    params = parameters(variant)
    if layout == LLAMA:
        return match_llama(params, llama_zero_biases(variant), checkpoint.tensors)
    return (match_official if layout == OFFICIAL else match_mindspore)(params, checkpoint.tensors)


def _expected(params: Sequence[Param], match: Match, variant: Variant, layout: str) -> Dict[str, Tuple[int, ...]]:
    """The tensors found, and their shapes."""
    expected: Dict[str, Tuple[int, ...]] = {}
    for param in params:
        if param.ms_name in match.found:
            names = param.names(LLAMA) if layout == LLAMA else (match.found[param.ms_name],)
            expected.update(dict.fromkeys(names, param.tensor_shape(layout)))
    zeros = llama_zero_biases(variant) if match.zeros else {}
    return {**expected, **{name: (zeros[name],) for name in match.zeros}}


def check_model(checkpoint: Checkpoint, variant: Variant, layout: str) -> Match:
    """Match the checkpoint with the parameters; CheckpointError lists everything that does not fit."""
    where = checkpoint.files[0] if len(checkpoint.files) == 1 else checkpoint.files[0].parent
    params, match = parameters(variant), _match(checkpoint, variant, layout)
    faults: List[str] = []
    quantised = [name for name in match.unknown if _QUANTISED.search(name)]
    if quantised:
        raise CheckpointError(f"{where}: its weights are quantised ({len(quantised)} tensors such as {quantised[0]}); "
                              "convert the checkpoint before quantisation instead")
    if match.missing:
        faults.append(f"{len(match.missing)} parameters are missing: {summarise(match.missing)}")
    if match.unknown:
        hint = " (merge LoRA adapters first)" if any(map(_ADAPTED.search, match.unknown)) else ""
        faults.append(f"{len(match.unknown)} are unknown: {summarise(match.unknown)}{hint}")
    if match.duplicate:
        faults.append(f"{len(match.duplicate)} appear twice, under two names: {summarise(match.duplicate)}")
    misfits: Dict[str, List[str]] = {}                     # what is wrong -> the tensors
    for name, shape in _expected(params, match, variant, layout).items():
        info = checkpoint.tensors[name]
        if info.shape != shape:
            misfits.setdefault(f"shape {list(info.shape)}, expected {list(shape)}", []).append(name)
        elif info.dtype not in ITEM_SIZE:
            misfits.setdefault(f"type {info.dtype}, expected {', '.join(NAMES.values())}", []).append(name)
    if layout == LLAMA:
        for param in params:
            types = {checkpoint.tensors[name].dtype for name in param.llama_names if param.ms_name in match.found}
            if len(types) > 1:
                misfits.setdefault(f"types {' and '.join(sorted(types))}, expected one", []).extend(param.llama_names)
    faults += [f"{summarise(names)}: {what}" for what, names in misfits.items()]
    if match.tied_head and checkpoint.tensors[match.tied_head][:2] != checkpoint.tensors[
            match.found.get(params[0].ms_name, match.tied_head)][:2]:
        faults.append(f"{match.tied_head} does not have the shape and type of the embeddings it is tied to")
    if faults:
        raise CheckpointError(f"{where} does not fit the model: {'; '.join(faults)}. Is it complete, and are "
                              "--model_name and config.json those of this checkpoint?")
    if match.ignored:
        state: Dict[str, int] = {}                         # of the optimizer: "adam_m.<parameter>" and the like
        names = {param.ms_name for param in params}
        rest = []
        for name in match.ignored:
            prefix, _, parameter = name.partition(".")
            if parameter in names:
                state[prefix] = state.get(prefix, 0) + 1
            else:
                rest.append(name)
        parts = [f"{count} optimizer state entries {prefix}" for prefix, count in state.items()]
        checkpoint.notes.append(f"dropped, because they are not weights: {len(match.ignored)} entries, "
                                + ", ".join(parts + ([summarise(rest)] if rest else [])))
    return match


def check_tied_head(checkpoint: Checkpoint, match: Match) -> None:
    """A head in addition to tied embeddings may only be dropped if it is the same matrix."""
    if match.tied_head is None:
        return
    embedding = next(iter(match.found.values()))
    size = checkpoint.tensors[embedding].nbytes
    for start in range(0, size, _CHUNK):
        parts = [bytearray(min(_CHUNK, size - start)) for _ in range(2)]
        for name, part in zip((embedding, match.tied_head), parts):
            checkpoint.read_into(name, start, memoryview(part))
        if parts[0] != parts[1]:
            raise CheckpointError(f"{match.tied_head} differs from {embedding}, but this model ties the two; is "
                                  "--model_name right? (telechat_12b has a separate head)")
    checkpoint.notes.append(f"left out: {match.tied_head}, equal to {embedding} and tied to it")


def check_zeros(checkpoint: Checkpoint, match: Match) -> None:
    """Biases of a Llama checkpoint that TeleChat lacks may only be dropped if they are zero."""
    for name in match.zeros:
        info = checkpoint.tensors[name]
        data = bytearray(info.nbytes)
        checkpoint.read_into(name, 0, memoryview(data))
        if cast(np.frombuffer(data, RAW[info.dtype]), info.dtype, "F32").view(np.float32).any():
            raise CheckpointError(f"{checkpoint.tensors[name].file}: {name} has nonzero values, and TeleChat "
                                  "has no such bias; train without the biases of q, k, v, gate and up, or use this "
                                  "checkpoint as Llama only")


def check_source_mp(checkpoint: Checkpoint, variant: Variant, match: Match, source_mp: Optional[int]) -> None:
    """Tell from the weights themselves whether fused ones are grouped as said; CheckpointError if surely not.

    Works where the projections differ in the size of their rows, as those of trained models do; where no grouping
    stands out nothing is said.
    """
    fused = [param for param in parameters(variant) if param.parts == 3]
    if not fused:
        if source_mp is not None:
            raise CheckpointError("--source_mp is for models with fused projections (52B); this one has none, omit "
                                  "it")
        return
    if source_mp is not None and checkpoint.metadata.get("telechat_groups") == "per_head":
        raise CheckpointError("this checkpoint was written by this converter, in an order that is independent of the "
                              "tensor-parallel degree; omit --source_mp")
    step = max(1, len(fused) // _SAMPLED_LAYERS)
    sample = [_row_norms(checkpoint, match.found[param.ms_name]) for param in fused[::step][:_SAMPLED_LAYERS]]
    own = fused[0].groups
    degrees = [n for n in range(1, own + 1) if not own % n and (n == own or not variant.intermediate_size % n)]
    scores = {n: float(np.mean([explained_by_groups(norms, 3, n) for norms in sample])) for n in degrees}
    given = own if source_mp is None else source_mp
    best = max(degrees, key=lambda n: (scores[n], n == given))
    recognised = max(_EXPLAINED, 20 / len(sample[0]))      # ten times what chance explains of this many rows
    if scores[best] > recognised and scores[best] > 2 * scores[given]:
        looks = ("this project's order, without --source_mp" if best == own else f"--source_mp {best}")
        said = ("--source_mp is not set" if source_mp is None else f"--source_mp is {source_mp}")
        raise CheckpointError(f"{said}, but the rows of {match.found[fused[0].ms_name]} and others are ordered as for "
                              f"{looks}: that order explains {scores[best]:.0%} of the variance of the row sizes, the "
                              f"given one {scores[given]:.0%}; convert {'without' if best == own else 'with'} "
                              f"--source_mp{'' if best == own else f' {best}'}")
    if source_mp is not None and scores[best] <= recognised:
        checkpoint.notes.append(f"--source_mp {source_mp} could not be confirmed: the rows of q, k and v do not differ "
                                "in size (as in an untrained model)")


def _row_norms(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Euclidean norm of every row of a matrix: [rows] float32."""
    info = checkpoint.tensors[name]
    rows, columns = info.shape
    item, norms = ITEM_SIZE[info.dtype], np.empty(rows, np.float32)
    band = max(1, _CHUNK // (columns * item))
    for first in range(0, rows, band):
        count = min(band, rows - first)
        buffer = np.empty(count * columns * item, np.uint8)
        checkpoint.read_into(name, first * columns * item, memoryview(buffer))
        values = cast(buffer.view(RAW[info.dtype]), info.dtype, "F32").view(np.float32).reshape(count, columns)
        norms[first:first + count] = np.sqrt(np.einsum("ij,ij->i", values, values))
    return norms
