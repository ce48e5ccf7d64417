"""Small official checkpoints of every family, and what they must become in MindSpore, written out by hand.

Nothing here uses the converter's own table or files: the safetensors library reads, loops place the rows.
"""
import json
from dataclasses import replace
from pathlib import Path
from typing import Dict, NamedTuple, Optional, Tuple

import numpy as np
import safetensors

from research.telechat.spec.hf_config import hf_config
from research.telechat.spec.variants import Variant, get_variant

BITS = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32}
FAMILIES = ("telechat_7b", "telechat_12b", "telechat_52b", "telechat2_7b", "telechat2_115b", "telechat3_36b")


class Raw(NamedTuple):
    """A tensor as bits: dtype is a safetensors code, bits an array of uint16 or uint32."""

    dtype: str
    bits: np.ndarray


Tensors = Dict[str, Raw]


def small_variant(name: str, layers: int = 2, heads: int = 4, head_dim: int = 6, ffn: int = 20, vocab: int = 11,
                  kv_heads: int = 2) -> Variant:
    """A tiny member of the family; ffn 20 and 4 heads give the 52B layout 4 groups of gate and up."""
    variant = get_variant(name)
    return replace(variant, num_layers=layers, num_heads=heads, hidden_size=heads * head_dim, intermediate_size=ffn,
                   vocab_size=vocab, n_kv_heads=kv_heads if variant.n_kv_heads else None)


def official_tensors(variant: Variant, dtype: str = "F16", seed: int = 0, any_bits: bool = False) -> Tensors:
    """Random weights under official names. any_bits: every bit pattern, NaN and infinity included."""
    rng = np.random.default_rng(seed)
    hidden, ffn, kv = variant.hidden_size, variant.intermediate_size, 2 * variant.kv_heads * variant.head_dim

    def raw(*shape: int) -> Raw:
        if any_bits:
            return Raw(dtype, rng.integers(0, np.iinfo(BITS[dtype]).max, shape, BITS[dtype], endpoint=True))
        return from_floats(dtype, rng.standard_normal(shape))

    if variant.fused_projections:
        tensors = {"transformer.wte.weight": raw(variant.vocab_size, hidden)}
        for n in range(variant.num_layers):
            prefix = f"transformer.h.{n}."
            tensors.update({prefix + "ln_1.weight": raw(hidden), prefix + "attn.c_attn.weight": raw(hidden, 3 * hidden),
                            prefix + "attn.masked_bias": from_floats(dtype, np.array(-1e4)),
                            prefix + "attn.c_proj.weight": raw(hidden, hidden), prefix + "ln_2.weight": raw(hidden),
                            prefix + "mlp.c_fc.weight": raw(hidden, 2 * ffn),
                            prefix + "mlp.c_proj.weight": raw(ffn, hidden)})
        return {**tensors, "transformer.ln_f.weight": raw(hidden), "lm_head.weight": raw(variant.vocab_size, hidden)}
    if variant.hf_layout == "llama":
        tensors = {"model.embed_tokens.weight": raw(variant.vocab_size, hidden)}
        for n in range(variant.num_layers):
            shapes = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
                      "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv // 2, hidden),
                      "self_attn.v_proj": (kv // 2, hidden), "self_attn.o_proj": (hidden, hidden),
                      "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
            tensors.update({f"model.layers.{n}.{name}.weight": raw(*shape) for name, shape in shapes.items()})
        return {**tensors, "model.norm.weight": raw(hidden), "lm_head.weight": raw(variant.vocab_size, hidden)}
    start = "" if variant.tie_word_embeddings else "transformer."
    tensors = {start + "word_embeddings.weight": raw(variant.vocab_size, hidden)}
    for n in range(variant.num_layers):
        prefix = f"{start}h.{n}."
        tensors.update({prefix + "input_layernorm.weight": raw(hidden),
                        prefix + "post_attention_layernorm.weight": raw(hidden),
                        prefix + "self_attention.query.weight": raw(hidden, hidden),
                        prefix + "self_attention.key_value.weight": raw(kv, hidden),
                        prefix + "self_attention.dense.weight": raw(hidden, hidden),
                        prefix + "self_attention.dense.bias": raw(hidden),
                        prefix + "mlp.gate_proj.weight": raw(ffn, hidden),
                        prefix + "mlp.up_proj.weight": raw(ffn, hidden),
                        prefix + "mlp.down_proj.weight": raw(hidden, ffn), prefix + "mlp.down_proj.bias": raw(hidden)})
    tensors[start + "ln_f.weight"] = raw(hidden)
    if not variant.tie_word_embeddings:
        tensors["lm_head.weight"] = raw(variant.vocab_size, hidden)
    return tensors


def from_floats(dtype: str, values: np.ndarray) -> Raw:
    """Floats as bits; bfloat16 by truncation, which is good enough for a test input."""
    if dtype == "F16":
        return Raw(dtype, np.asarray(values, np.float16).view(np.uint16))
    bits = np.asarray(values, np.float32).view(np.uint32)
    return Raw(dtype, bits if dtype == "F32" else (bits >> 16).astype(np.uint16))


def mindspore_tensors(variant: Variant, official: Tensors, mp: int = 0) -> Tensors:
    """The same weights under MindSpore names. mp: for 52B, rows as an earlier converter ordered them for that degree;
    0: this project's order."""
    if variant.hf_layout == "llama":
        return _from_llama(variant, official)
    plain = {name[len("transformer."):] if name.startswith("transformer.") else name: raw
             for name, raw in official.items()}
    result = {"model.norm_out.weight": plain["ln_f.weight"],
              "model.tok_embeddings.embedding_weight": plain.get("wte.weight", plain.get("word_embeddings.weight"))}
    if "lm_head.weight" in plain:
        result["lm_head.weight"] = plain["lm_head.weight"]
    dense = {"attention_norm.weight": "input_layernorm.weight", "attention.wq.weight": "self_attention.query.weight",
             "attention.wk_v.weight": "self_attention.key_value.weight",
             "attention.wo.weight": "self_attention.dense.weight", "attention.wo.bias": "self_attention.dense.bias",
             "ffn_norm.weight": "post_attention_layernorm.weight",
             "feed_forward.w1.weight": "mlp.gate_proj.weight", "feed_forward.w3.weight": "mlp.up_proj.weight",
             "feed_forward.w2.weight": "mlp.down_proj.weight", "feed_forward.w2.bias": "mlp.down_proj.bias"}
    for n in range(variant.num_layers):
        mine, theirs = f"model.layers.{n}.", f"h.{n}."
        if not variant.fused_projections:
            result.update({mine + new: plain[theirs + old] for new, old in dense.items()})
            continue
        result.update({mine + "attention_norm.weight": plain[theirs + "ln_1.weight"],
                       mine + "ffn_norm.weight": plain[theirs + "ln_2.weight"]})
        for new, old in (("attention.wo", "attn.c_proj"), ("feed_forward.w2", "mlp.c_proj")):
            raw = plain[f"{theirs}{old}.weight"]
            result[f"{mine}{new}.weight"] = Raw(raw.dtype, raw.bits.T)
        for new, old, parts, groups in (("attention.w_qkv", "attn.c_attn", 3, mp or variant.num_heads),
                                        ("feed_forward.w_gate_hidden", "mlp.c_fc", 2,
                                         mp or int(np.gcd(variant.num_heads, variant.intermediate_size)))):
            raw = plain[f"{theirs}{old}.weight"]
            columns, width = raw.bits.shape[1] // parts, raw.bits.shape[1] // parts // groups
            rows = [raw.bits[:, part * columns + group * width + i]
                    for group in range(groups) for part in range(parts) for i in range(width)]
            result[f"{mine}{new}.weight"] = Raw(raw.dtype, np.stack(rows))
    return result


def _from_llama(variant: Variant, official: Tensors) -> Tensors:
    """`mindspore_tensors` of Llama's names: k and v of each key/value head one behind the other."""
    result = {"model.norm_out.weight": official["model.norm.weight"], "lm_head.weight": official["lm_head.weight"],
              "model.tok_embeddings.embedding_weight": official["model.embed_tokens.weight"]}
    names = {"attention_norm": "input_layernorm", "attention.wq": "self_attn.q_proj", "ffn_norm":
             "post_attention_layernorm", "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj",
             "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj"}
    for n in range(variant.num_layers):
        layer = f"model.layers.{n}."
        result.update({f"{layer}{new}.weight": official[f"{layer}{old}.weight"] for new, old in names.items()})
        key, value = (official[f"{layer}self_attn.{name}_proj.weight"] for name in "kv")
        rows = [matrix.bits[head * variant.head_dim + i] for head in range(variant.kv_heads) for matrix in (key, value)
                for i in range(variant.head_dim)]
        result[f"{layer}attention.wk_v.weight"] = Raw(key.dtype, np.stack(rows))
    return result


def write_safetensors(path: Path, tensors: Tensors, metadata: Optional[Dict[str, str]] = None) -> None:
    """Write a file by the format's description: the library's own writer needs NumPy, which has no bfloat16."""
    header, contents = {"__metadata__": metadata or {"format": "pt"}}, b""
    for name, raw in tensors.items():
        data = np.ascontiguousarray(raw.bits).tobytes()
        header[name] = {"dtype": raw.dtype, "shape": list(raw.bits.shape),
                        "data_offsets": [len(contents), len(contents) + len(data)]}
        contents += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + contents)


def read_safetensors(*paths: Path) -> Tensors:
    """Read files with the safetensors library."""
    return {name: Raw(entry["dtype"], np.frombuffer(bytes(entry["data"]), BITS[entry["dtype"]]).reshape(entry["shape"]))
            for path in paths for name, entry in safetensors.deserialize(path.read_bytes())}


def write_official(folder: Path, variant: Variant, tensors: Tensors, shards: int = 1) -> Path:
    """An official folder: config.json, and one file or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(variant)))
    names = list(tensors)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    weight_map = {}
    for number in range(shards):
        part = names[number::shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def assert_same(found: Tensors, expected: Tensors) -> None:
    """Names, types, shapes and every bit."""
    assert set(found) == set(expected), set(found) ^ set(expected)
    for name, raw in expected.items():
        assert found[name].dtype == raw.dtype and found[name].bits.shape == raw.bits.shape, name
        assert np.array_equal(found[name].bits, raw.bits), name


def sharded_12b(folder: Path) -> Tuple[Variant, Tensors, Path]:
    """(variant, tensors, official folder of three shards) of a small 12B below `folder`."""
    variant = small_variant("telechat_12b")
    tensors = official_tensors(variant)
    return variant, tensors, write_official(folder / "hf", variant, tensors, shards=3)
