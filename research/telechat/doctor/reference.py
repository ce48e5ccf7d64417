"""An independent forward pass of TeleChat in NumPy float64, written from the formulas of the official models.

Shares nothing with the plugin but the table of variants (sizes): it has its own names, layouts, rotary embedding and
mask, so that a bug in the plugin shows as a difference. Slow and simple.
"""
import math
from typing import Dict, List, Optional, Tuple

import numpy as np

from research.telechat.common.files import JsonObject


def rotary_tables(hf: JsonObject, seq: int, half: bool) -> Tuple[np.ndarray, np.ndarray]:
    """cos and sin [S, D] in float64; `half`: rounded to float16 where the official code rounds."""
    if "num_hidden_layers" in hf:
        return _yarn_tables(hf, seq)
    fused = "n_embd" in hf
    dim = (hf["n_embd"] if fused else hf["hidden_size"]) // hf["n_head"]
    if fused:
        alpha = max(2 ** math.ceil(math.log2(seq / 4096) + 1) - 1, 1)
        base, grow, half = hf.get("rotary_theta", 10000) * alpha, 1.0, False
    else:
        length = hf.get("base_seqlen", 4096 if hf.get("tie_word_embeddings", True) else 8192)
        effective = max(seq, hf["training_seqlen"])
        alpha = max(2 ** math.ceil(math.log2(effective / length) + 1) - 1, 1)
        base = 10000.0 * alpha ** (dim / (dim - 2))
        grow = 0.1 * math.log(effective / hf["training_seqlen"]) + 1 if effective > hf["training_seqlen"] else 1.0
    angles = np.outer(np.arange(seq), base ** (-np.arange(0, dim, 2) / dim))
    angles = np.concatenate([angles, angles], -1)
    tables = np.cos(angles), np.sin(angles)
    if not half:
        return tables[0] * grow, tables[1] * grow

    def fp16(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float16).astype(np.float64)

    return fp16(grow * fp16(tables[0])), fp16(grow * fp16(tables[1]))


def _yarn_tables(hf: JsonObject, seq: int) -> Tuple[np.ndarray, np.ndarray]:
    """cos and sin of TeleChat3 (YaRN; Peng et al., 2023), whose official code keeps them in float32."""
    dim, rope, base = hf["hidden_size"] // hf["num_attention_heads"], hf["rope_scaling"], hf["rope_theta"]
    length = rope["original_max_position_embeddings"]

    def index(turns: float) -> float:
        """Index of the frequency that makes `turns` turns within `length` tokens."""
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(index(rope["beta_fast"])), 0)
    high = min(math.ceil(index(rope["beta_slow"])), dim - 1)
    stretched = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    frequencies = base ** (-np.arange(0, dim, 2) / dim)
    angles = np.outer(np.arange(seq), frequencies * (1 - stretched) + frequencies / rope["factor"] * stretched)
    grow = 0.07 * math.log(rope["factor"]) + 1
    return np.tile(np.cos(angles), 2) * grow, np.tile(np.sin(angles), 2) * grow


def _as_telechat2(hf: JsonObject, w: Dict[str, np.ndarray]) -> Tuple[JsonObject, Dict[str, np.ndarray]]:
    """Config and weights of TeleChat3, which uses Llama's names and has no bias, under TeleChat2's names."""
    hidden, kv_heads = hf["hidden_size"], hf["num_key_value_heads"]
    dim = hidden // hf["num_attention_heads"]
    named = {"n_layer": hf["num_hidden_layers"], "n_head": hf["num_attention_heads"], "num_key_value_heads": kv_heads,
             "layer_norm_epsilon": hf["rms_norm_eps"]}
    result = {"word_embeddings.weight": w["model.embed_tokens.weight"], "ln_f.weight": w["model.norm.weight"],
              "lm_head.weight": w["lm_head.weight"]}
    for i in range(named["n_layer"]):
        old, new = f"model.layers.{i}.", f"h.{i}."
        key, value = (w[f"{old}self_attn.{name}_proj.weight"].reshape(kv_heads, dim, hidden) for name in "kv")
        result.update({
            f"{new}self_attention.query.weight": w[f"{old}self_attn.q_proj.weight"],
            f"{new}self_attention.key_value.weight": np.concatenate([key, value], 1).reshape(-1, hidden),
            f"{new}self_attention.dense.weight": w[f"{old}self_attn.o_proj.weight"],
            f"{new}self_attention.dense.bias": np.zeros(hidden), f"{new}mlp.down_proj.bias": np.zeros(hidden),
            **{new + name: w[old + name] for name in (
                "input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate_proj.weight",
                "mlp.up_proj.weight", "mlp.down_proj.weight")}})
    return {**hf, **named}, result


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    return x * cos + np.concatenate([-x[..., half:], x[..., :half]], -1) * sin


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def forward(hf: JsonObject, weights: Dict[str, np.ndarray], ids: np.ndarray, half: bool = True,
            attention_mask: Optional[np.ndarray] = None, documents: Optional[List[int]] = None
            ) -> Tuple[np.ndarray, List[np.ndarray]]:
    """Logits [B, S, V] and hidden states (embedding, output of every layer but the last, final norm), float64.

    weights: official names; attention_mask: [B, S], 0 for padding; documents: lengths of packed conversations, each
    computed separately, but with the rotary scaling of the whole sequence.
    """
    w = {name.replace("transformer.", ""): value.astype(np.float64) for name, value in weights.items()}
    fused = "n_embd" in hf
    if "num_hidden_layers" in hf:
        hf, w = _as_telechat2(hf, w)
    heads = hf["n_head"]
    kv_heads = hf.get("num_key_value_heads") or heads
    batch, seq = ids.shape
    table = w["wte.weight" if fused else "word_embeddings.weight"]
    dim = table.shape[1] // heads
    eps = hf["layer_norm_epsilon"]
    cos, sin = rotary_tables(hf, seq, half)
    allowed = np.tril(np.ones((seq, seq), bool))[None].repeat(batch, 0)           # [B, S, S]
    if documents is not None:
        number = np.repeat(np.arange(len(documents)), documents)
        position = np.concatenate([np.arange(n) for n in documents])
        allowed &= number[:, None] == number[None]
        cos, sin = cos[position], sin[position]
    if attention_mask is not None:
        allowed &= attention_mask[:, None, :].astype(bool)
    x = table[ids] * hf.get("input_mult", 1.0)
    states = [x]
    for i in range(hf["n_layer"]):
        p = f"h.{i}."
        y = _norm(x, w[p + ("ln_1.weight" if fused else "input_layernorm.weight")], eps)
        if fused:
            q, k, v = np.split(y @ w[p + "attn.c_attn.weight"], 3, -1)
            k, v = (t.reshape(batch, seq, heads, dim) for t in (k, v))
        else:
            q = y @ w[p + "self_attention.query.weight"].T
            kv = (y @ w[p + "self_attention.key_value.weight"].T).reshape(batch, seq, kv_heads, 2 * dim)
            k, v = kv[..., :dim], kv[..., dim:]
        q, k, v = (t.reshape(batch, seq, -1, dim).transpose(0, 2, 1, 3) for t in (q, k, v))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        k, v = (t.repeat(heads // kv_heads, 1) for t in (k, v))
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(dim)
        scores = np.where(allowed[:, None], scores, -1e30)
        context = (_softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(batch, seq, -1)
        if fused:
            x = x + context @ w[p + "attn.c_proj.weight"]
            gate, up = np.split(_norm(x, w[p + "ln_2.weight"], eps) @ w[p + "mlp.c_fc.weight"], 2, -1)
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "mlp.c_proj.weight"]
        else:
            x = x + context @ w[p + "self_attention.dense.weight"].T + w[p + "self_attention.dense.bias"]
            y = _norm(x, w[p + "post_attention_layernorm.weight"], eps)
            gate, up = y @ w[p + "mlp.gate_proj.weight"].T, y @ w[p + "mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "mlp.down_proj.weight"].T + w[p + "mlp.down_proj.bias"]
        states.append(x)
    states[-1] = _norm(x, w["ln_f.weight"], eps)
    head = w.get("lm_head.weight", table)
    scale = hf["output_mult"] / hf["mup_scale_factor"] if fused and hf.get("use_mup") else 1.0
    return states[-1] @ head.T * scale, states


def cross_entropy(logits: np.ndarray, labels: np.ndarray, ignore: int = -100) -> np.ndarray:
    """Loss of each position [B, N]: logits [B, N, V] predict labels[:, 1:] of [B, N + 1]; NaN for `ignore`."""
    targets = labels[:, 1:]
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    picked = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    return np.where(targets == ignore, np.nan, log_sum - picked)
