"""The one table of parameter names, shapes and row orders, for every variant: MindSpore, official (PyTorch), Llama.

Pure Python and NumPy; it opens no file (checkpoint/reader.py does) and converts nothing (checkpoint/convert.py does).

Every linear weight of the MindSpore model is [out, in]. The official code agrees, but for 52B, whose Conv1D weights are
[in, out]. Fused weights of 52B hold several projections in one matrix. The official order is projection after
projection, [q | k | v]; here the rows are grouped, group after group [q_g | k_g | v_g], so that any tensor-parallel
degree that divides the number of groups splits between whole groups and finds its own q, k and v together:

* w_qkv: one group for each head, head_dim rows of q, then of k, then of v;
* w_gate_hidden: gcd(num_heads, intermediate_size) groups, each of intermediate_size / groups rows of gate, then of up.

Earlier MindFormers converters grouped by the tensor-parallel degree N named on their command line: the same rule with
N groups, which is how `source_groups` imports them.

The layout of Hugging Face's LlamaForCausalLM has one matrix, [out, in], for each projection. Stacked, they are the
projection-after-projection order: [q | k | v], [gate | up], and [k | v], of which wk_v (official: key_value) holds one
group for each key/value head, head_dim rows of k, then of v. Its biases are all or none for attention and for the
feed-forward layer: those that TeleChat lacks are zero (`llama_zero_biases`).
"""
import math
import re
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from research.telechat.common.errors import ConfigError
from research.telechat.spec.variants import Sizes, Variant

MINDSPORE, OFFICIAL, LLAMA = "mindspore", "official", "llama"            # the layouts of a checkpoint


class Param(NamedTuple):
    """One parameter of a model. `shape` is that in MindSpore; the official one is `hf_shape`."""

    ms_name: str
    hf_name: str
    shape: Tuple[int, ...]
    transposed: bool = False     # official [in, out], MindSpore [out, in]
    parts: int = 1               # projections fused into it (3: q, k, v; 2: gate, up)
    groups: int = 1              # groups of rows in MindSpore, each with a run of every part
    llama_names: Tuple[str, ...] = ()        # its tensors in a Llama checkpoint, one for each projection
    kv_groups: int = 1           # wk_v: groups of rows in MindSpore and officially, each with a run of k and of v
    llama_scale: float = 1.0     # the Llama tensor is the parameter times this

    @property
    def hf_shape(self) -> Tuple[int, ...]:
        """Shape in the official checkpoint."""
        return self.shape[::-1] if self.transposed else self.shape

    def names(self, layout: str) -> Tuple[str, ...]:
        """Its tensors in a checkpoint of `layout`, in the order in which their rows are stacked."""
        return {MINDSPORE: (self.ms_name,), OFFICIAL: (self.hf_name,), LLAMA: self.llama_names}[layout]

    def tensor_shape(self, layout: str) -> Tuple[int, ...]:
        """Shape of each of these tensors."""
        if layout == LLAMA:
            return (self.shape[0] // len(self.llama_names), *self.shape[1:])
        return self.hf_shape if layout == OFFICIAL else self.shape

    def groups_in(self, layout: str) -> int:
        """Groups of its rows in a checkpoint of `layout`; 1: projection after projection."""
        if layout == LLAMA:
            return 1
        return self.kv_groups if self.parts == 1 else self.groups if layout == MINDSPORE else 1


# (MindSpore name, official name, shape, fused parts). Shapes in the words of _sizes; layers are below their prefixes.
_EMBEDDING, _NORM_OUT, _HEAD = "model.tok_embeddings.embedding_weight", "model.norm_out.weight", "lm_head.weight"
_DENSE_LAYER = (
    ("attention_norm.weight", "input_layernorm.weight", "hidden", 1),
    ("attention.wq.weight", "self_attention.query.weight", "hidden hidden", 1),
    ("attention.wq.bias", "self_attention.query.bias", "hidden", 1),
    ("attention.wk_v.weight", "self_attention.key_value.weight", "kv hidden", 1),
    ("attention.wk_v.bias", "self_attention.key_value.bias", "kv", 1),
    ("attention.wo.weight", "self_attention.dense.weight", "hidden hidden", 1),
    ("attention.wo.bias", "self_attention.dense.bias", "hidden", 1),
    ("ffn_norm.weight", "post_attention_layernorm.weight", "hidden", 1),
    ("feed_forward.w1.weight", "mlp.gate_proj.weight", "ffn hidden", 1),
    ("feed_forward.w3.weight", "mlp.up_proj.weight", "ffn hidden", 1),
    ("feed_forward.w2.weight", "mlp.down_proj.weight", "hidden ffn", 1),
    ("feed_forward.w2.bias", "mlp.down_proj.bias", "hidden", 1),
)
_MUP_LAYER = (
    ("attention_norm.weight", "ln_1.weight", "hidden", 1),
    ("attention.w_qkv.weight", "attn.c_attn.weight", "qkv hidden", 3),
    ("attention.w_qkv.bias", "attn.c_attn.bias", "qkv", 3),
    ("attention.wo.weight", "attn.c_proj.weight", "hidden hidden", 1),
    ("ffn_norm.weight", "ln_2.weight", "hidden", 1),
    ("feed_forward.w_gate_hidden.weight", "mlp.c_fc.weight", "gate_up hidden", 2),
    ("feed_forward.w2.weight", "mlp.c_proj.weight", "hidden ffn", 1),
)
_INPUT_PROJECTIONS = ("wq", "wk_v", "w_qkv")
# MindSpore's module -> Llama's, of every layer. Weights and biases alike.
_LLAMA_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk_v": "self_attn.k_proj self_attn.v_proj",
    "attention.w_qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w_gate_hidden": "mlp.gate_proj mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_LLAMA_EMBEDDING, _LLAMA_NORM_OUT = "model.embed_tokens.weight", "model.norm.weight"


class _Layout(NamedTuple):
    prefix: str                                    # before every official name but the head's
    embedding: str
    layer: Tuple[Tuple[str, str, str, int], ...]
    conv1d: bool = False                           # matrices of the layers are [in, out]
    buffers: Tuple[Tuple[str, float], ...] = ()    # constants that official checkpoints hold for every layer
    is_llama: bool = False                         # the official names and rows are those of Llama


_LAYOUTS: Dict[str, _Layout] = {
    "telechat_tied": _Layout("", "word_embeddings.weight", _DENSE_LAYER),
    "telechat": _Layout("transformer.", "word_embeddings.weight", _DENSE_LAYER),
    "telechat2": _Layout("transformer.", "word_embeddings.weight", _DENSE_LAYER),
    "telechat_mup": _Layout("transformer.", "wte.weight", _MUP_LAYER, True, (("attn.masked_bias", -10000.0),)),
    "llama": _Layout("", _LLAMA_EMBEDDING, _DENSE_LAYER, is_llama=True),
}
# Official entries without weights: causal masks and rotary tables that the code recomputes.
_NO_WEIGHT = re.compile(r"(attn\.(masked_)?bias|rotary_emb\.(inv_freq|cos_cached|sin_cached))$")
# Entries of MindSpore training checkpoints that are not weights: "adam_m.<parameter>" and these scalars and others.
_TRAINING = re.compile(
    r"^(global_step|global_batch_size|epoch_num|step_num|current_iterator_step|last_overflow_iterator_step|loss_scale|"
    r"scale_sense|learning_rate|weight_decay|beta1_power|beta2_power|accu_.*|data_parallel_.*|.*\.learning_rate)$")


def gate_up_groups(variant: Sizes) -> int:
    """Groups of rows in w_gate_hidden: the largest number that divides both the heads and intermediate_size."""
    return math.gcd(variant.num_heads, variant.intermediate_size)


def official_layout(variant: Variant) -> str:
    """The layout of the official checkpoint: OFFICIAL, or LLAMA where the official names are Llama's (TeleChat3)."""
    return LLAMA if _LAYOUTS[variant.hf_layout].is_llama else OFFICIAL


def parameters(variant: Variant) -> List[Param]:
    """Every parameter of a model, in the order of the model."""
    layout = _LAYOUTS[variant.hf_layout]
    hidden, ffn, vocab = variant.hidden_size, variant.intermediate_size, variant.vocab_size
    sizes = {"hidden": hidden, "ffn": ffn, "kv": 2 * variant.kv_heads * variant.head_dim, "qkv": 3 * hidden,
             "gate_up": 2 * ffn}
    has_bias = {True: variant.qkv_has_bias, False: variant.out_proj_has_bias}
    groups = {1: 1, 2: gate_up_groups(variant), 3: variant.num_heads}
    params = [Param(_EMBEDDING, layout.prefix + layout.embedding, (vocab, hidden), llama_names=(_LLAMA_EMBEDDING,),
                    llama_scale=variant.input_mult)]
    for layer in range(variant.num_layers):
        for ms_name, hf_name, shape, parts in layout.layer:
            if ms_name.endswith(".bias") and not has_bias[ms_name.split(".")[-2] in _INPUT_PROJECTIONS]:
                continue
            dims = tuple(sizes[word] for word in shape.split())
            module, _, kind = ms_name.rpartition(".")
            llama = tuple(f"model.layers.{layer}.{name}.{kind}" for name in _LLAMA_LAYER[module].split())
            official = llama[0] if layout.is_llama else f"{layout.prefix}h.{layer}.{hf_name}"
            params.append(Param(f"model.layers.{layer}.{ms_name}", official, dims,
                                layout.conv1d and len(dims) == 2, parts, groups[parts], llama,
                                variant.kv_heads if parts == 1 and len(llama) > 1 else 1))
    norm_out = _LLAMA_NORM_OUT if layout.is_llama else layout.prefix + "ln_f.weight"
    params.append(Param(_NORM_OUT, norm_out, (hidden,), llama_names=(_LLAMA_NORM_OUT,)))
    if not variant.tie_word_embeddings:
        params.append(Param(_HEAD, "lm_head.weight", (vocab, hidden), llama_names=(_HEAD,),
                            llama_scale=variant.logits_scale))
    return params


def llama_biases(variant: Variant) -> Tuple[bool, bool]:
    """(attention_bias, mlp_bias) of the Llama layout: all or none of q, k, v, o, and of gate, up, down."""
    return variant.qkv_has_bias or variant.out_proj_has_bias, variant.out_proj_has_bias


def llama_zero_biases(variant: Variant) -> Dict[str, int]:
    """The biases of the Llama layout that are no parameters here, and are zero there: name -> length."""
    attention, feed_forward = llama_biases(variant)
    hidden, ffn, kv = variant.hidden_size, variant.intermediate_size, variant.kv_heads * variant.head_dim
    lengths = {**({"self_attn.q_proj": hidden, "self_attn.k_proj": kv, "self_attn.v_proj": kv,
                   "self_attn.o_proj": hidden} if attention else {}),
               **({"mlp.gate_proj": ffn, "mlp.up_proj": ffn, "mlp.down_proj": hidden} if feed_forward else {})}
    real = {name for param in parameters(variant) for name in param.llama_names}
    biases = {f"model.layers.{layer}.{module}.bias": length
              for layer in range(variant.num_layers) for module, length in lengths.items()}
    return {name: length for name, length in biases.items() if name not in real}


def hf_buffers(variant: Variant) -> Dict[str, float]:
    """Scalars that the official checkpoint has in addition to the parameters: name -> value."""
    layout = _LAYOUTS[variant.hf_layout]
    return {f"{layout.prefix}h.{layer}.{name}": value
            for layer in range(variant.num_layers) for name, value in layout.buffers}


class Match(NamedTuple):
    """How the entries of a checkpoint fit a model. All lists hold names as the checkpoint writes them."""

    found: Dict[str, str]        # MindSpore name of a parameter -> its entry
    missing: List[str]           # parameters without an entry, by the name they should have
    unknown: List[str]           # entries that belong to no parameter
    duplicate: List[str]         # entries for a parameter that already has one
    ignored: List[str]           # entries that hold no weights
    tied_head: Optional[str]     # a head in addition to tied embeddings: must equal them, and is dropped
    zeros: Tuple[str, ...] = ()  # biases of a Llama checkpoint that must be zero, and are then dropped


def match_official(params: Sequence[Param], names: Iterable[str]) -> Match:
    """Find each parameter in an official checkpoint. Names count with and without the prefix `transformer.`, as
    `save_pretrained` of some versions of the official code adds or drops it."""
    wanted = {_bare(param.hf_name): param.ms_name for param in params}
    result = Match({}, [], [], [], [], None)
    for name in names:
        ms_name = wanted.get(_bare(name))
        if ms_name in result.found:
            result.duplicate.append(name)
        elif ms_name is not None:
            result.found[ms_name] = name
        elif name == _HEAD:
            result = result._replace(tied_head=name)
        else:
            (result.ignored if _NO_WEIGHT.search(name) else result.unknown).append(name)
    result.missing.extend(param.hf_name for param in params if param.ms_name not in result.found)
    return result


def match_mindspore(params: Sequence[Param], names: Iterable[str]) -> Match:
    """Find each parameter in a MindSpore checkpoint; optimizer state and training counters are `ignored`."""
    wanted = {param.ms_name for param in params}
    result = Match({}, [], [], [], [], None)
    for name in names:
        if name in wanted:
            result.found[name] = name
        elif name == _HEAD:
            result = result._replace(tied_head=name)
        elif _TRAINING.match(name) or name.partition(".")[2] in wanted:
            result.ignored.append(name)
        else:
            result.unknown.append(name)
    result.missing.extend(param.ms_name for param in params if param.ms_name not in result.found)
    return result


def match_llama(params: Sequence[Param], zeros: Iterable[str], names: Iterable[str]) -> Match:
    """Find each parameter in a Llama checkpoint; `found` has the first of its tensors. zeros: `llama_zero_biases`."""
    names, wanted, zeros = list(names), {name for param in params for name in param.llama_names}, set(zeros)
    result = Match({}, [], [], [], [], None, tuple(name for name in names if name in zeros))
    for name in names:
        if name == _HEAD and name not in wanted:
            result = result._replace(tied_head=name)
        elif name not in wanted and name not in zeros:
            (result.ignored if _NO_WEIGHT.search(name) else result.unknown).append(name)
    there = set(names)
    for param in params:
        missing = [name for name in param.llama_names if name not in there]
        result.missing.extend(missing)
        if not missing:
            result.found[param.ms_name] = param.llama_names[0]
    return result


def _bare(name: str) -> str:
    return name[len("transformer."):] if name.startswith("transformer.") else name


def summarise(names: Iterable[str]) -> str:
    """All `names`, on one line: names that differ in the layer only become one, `model.layers.{0-3,7}.wq.weight`."""
    families: Dict[Tuple[str, str], List[int]] = {}
    for name in names:
        match = re.match(r"^(.*?\b(?:layers|h)\.)(\d+)(\..*)$", name)
        families.setdefault((match[1], match[3]) if match else (name, ""), []).append(int(match[2]) if match else -1)
    return ", ".join(head if layers == [-1] * len(layers) else f"{head}{_ranges(layers)}{tail}"
                     for (head, tail), layers in families.items())


def _ranges(numbers: Iterable[int]) -> str:
    runs: List[List[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return texts[0] if texts == [str(runs[0][0])] else "{" + ",".join(texts) + "}"


def grouped_order(rows: int, parts: int, groups: int) -> np.ndarray:
    """Row order of a grouped matrix: grouped[i] == official[order[i]]. [rows] int64."""
    return group_rows(np.arange(rows), parts, groups)


def check_groups(rows: int, parts: int, groups: int) -> None:
    """ConfigError unless `rows` rows of `parts` projections divide into `groups` groups."""
    if groups < 1 or rows % (parts * groups):
        raise ConfigError(f"{rows} rows of {parts} fused projections cannot be split into {groups} groups; "
                          "check --source_mp and the sizes in config.json")


def group_rows(matrix: np.ndarray, parts: int, groups: int) -> np.ndarray:
    """Official row order -> grouped. matrix: [parts * n, ...]; the result is a new array of the same shape."""
    check_groups(len(matrix), parts, groups)
    blocks = matrix.reshape(parts, groups, -1, *matrix.shape[1:])        # [parts, groups, run, ...]
    return np.ascontiguousarray(blocks.swapaxes(0, 1)).reshape(matrix.shape)


def ungroup_rows(matrix: np.ndarray, parts: int, groups: int) -> np.ndarray:
    """Grouped row order -> official. The inverse of `group_rows`."""
    check_groups(len(matrix), parts, groups)
    blocks = matrix.reshape(groups, parts, -1, *matrix.shape[1:])        # [groups, parts, run, ...]
    return np.ascontiguousarray(blocks.swapaxes(0, 1)).reshape(matrix.shape)


def row_order(param: Param, groups_in: int, groups_out: int) -> Optional[np.ndarray]:
    """Rows of a parameter with `groups_out` groups in one with `groups_in`: result[i] == source[order[i]]; [rows]
    int64, or None where they are the same."""
    if groups_in == groups_out:
        return None
    rows, parts = param.shape[0], len(param.llama_names)
    inverse = np.argsort(grouped_order(rows, parts, groups_in))
    return np.asarray(inverse[grouped_order(rows, parts, groups_out)])


def source_groups(param: Param, variant: Variant, source_mp: Optional[int]) -> int:
    """Groups of a fused weight in a checkpoint: this project's (`source_mp` None) or those of an earlier converter run
    with `--mp source_mp`. ConfigError where that degree does not divide the heads and intermediate_size."""
    if source_mp is None or param.parts == 1:
        return param.groups_in(MINDSPORE)
    if source_mp < 1 or variant.num_heads % source_mp or variant.intermediate_size % source_mp:
        raise ConfigError(f"--source_mp {source_mp} does not divide both num_heads {variant.num_heads} and "
                          f"intermediate_size {variant.intermediate_size}; no earlier converter can have used it")
    return source_mp


def explained_by_groups(row_norms: np.ndarray, parts: int, groups: int) -> float:
    """Share (0 to 1) of the variance of log row norms that the parts explain if the rows are grouped like this.

    Projections of a trained model differ in the size of their rows, v from q and k above all, so that the share is
    largest for the grouping that the matrix really has: a wrong one mixes the projections. Freshly initialised
    weights give about (parts - 1) / rows for every grouping. row_norms: [rows], not negative; NaN and infinity count
    as very small and very large.
    """
    logs = np.log(np.clip(np.nan_to_num(row_norms.astype(np.float64), nan=0.0), 1e-30, 1e30))
    by_part = ungroup_rows(logs, parts, groups).reshape(parts, -1)       # [parts, rows / parts]
    total = logs.var()
    return float(by_part.mean(axis=1).var() / total) if total > 0 else 0.0
