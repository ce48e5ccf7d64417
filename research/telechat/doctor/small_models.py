"""Small models of every architecture of the family: official configs, random weights, and their MindSpore layout."""
from typing import Dict

import numpy as np

from research.telechat.common.files import JsonObject
from research.telechat.spec.parameters import (
    LLAMA,
    MINDSPORE,
    match_llama,
    match_official,
    official_layout,
    parameters,
    row_order,
)
from research.telechat.spec.variants import variant_from_hf

Weights = Dict[str, np.ndarray]


def official_configs(hidden: int, inner: int, vocabulary: int) -> Dict[str, JsonObject]:
    """Keys of config.json for two layers with four heads, by what is special about the architecture.

    base_seqlen < training_seqlen makes alpha > 1 for TeleChat2; within 16 tokens the first frequencies of TeleChat3
    turn more than once and the last ones less, so that all of YaRN is exercised.
    """
    common = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "vocab_size": vocabulary}
    dense = {**common, "hidden_size": hidden, "n_layer": 2, "n_head": 4, "ffn_hidden_size": inner, "seq_length": 64,
             "layer_norm_epsilon": 1e-5, "training_seqlen": 64, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    telechat2 = {**dense, "tie_word_embeddings": False, "base_seqlen": 16, "layer_norm_epsilon": 1e-8}
    return {
        "tied table": {**dense},
        "own head": {**dense, "tie_word_embeddings": False},
        "fused projections": {
            **common, "n_embd": hidden, "n_layer": 2, "n_head": 4, "n_inner": inner, "n_positions": 64,
            "use_mup": True, "layer_norm_epsilon": 1e-5, "mup_scale_factor": 8.0, "output_mult": 1.0,
            "input_mult": 1.0},
        "TeleChat2": {**telechat2},
        "grouped heads": {**telechat2, "num_key_value_heads": 2, "training_seqlen": 16},
        "YaRN, no bias": {
            **common, "model_type": "telechat3", "num_hidden_layers": 2, "hidden_size": hidden,
            "intermediate_size": inner, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
            "rope_scaling": {"rope_type": "telechat3-yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.5,
                             "original_max_position_embeddings": 16}}}


def random_official(hf_config: JsonObject, seed: int = 0, std: float = 0.3) -> Weights:
    """Random float32 weights with the official names and shapes; std: of all but the norms."""
    rng = np.random.default_rng(seed)
    weights = {}
    variant = variant_from_hf(hf_config)
    layout = official_layout(variant)
    for param in parameters(variant):
        spread = 1.0 if "norm" in param.ms_name else std
        for name in param.names(layout):
            value = rng.normal(0, spread, param.tensor_shape(layout))
            weights[name] = (1 + 0.2 * value if "norm" in param.ms_name else value).astype(np.float32)
    return weights


def to_mindspore(hf_config: JsonObject, weights: Weights) -> Weights:
    """Official weights under MindSpore names, in MindSpore's layout, float32."""
    variant = variant_from_hf(hf_config)
    params, layout = parameters(variant), official_layout(variant)
    match = match_llama(params, {}, weights) if layout == LLAMA else match_official(params, weights)
    assert not match.missing and not match.unknown and not match.duplicate
    result = {}
    for param in params:
        names = param.llama_names if layout == LLAMA else [match.found[param.ms_name]]
        value = np.concatenate([weights[name] for name in names]).astype(np.float32)
        value = value.T if param.transposed else value
        order = row_order(param, param.groups_in(layout), param.groups_in(MINDSPORE))
        result[param.ms_name] = value.copy() if order is None else value[order]
        assert result[param.ms_name].shape == param.shape
    return result
