"""TeleChat3 against transformers' LlamaForCausalLM, with YaRN and grouped queries: logits, loss, greedy tokens."""
import math

import mindspore as ms
import numpy as np
import pytest
from model_fixtures import build_model, logits_of, loss_of, random_official

from research.telechat.spec.rope import RopeRule, rope_table

# Head size 16; within 16 tokens the first frequencies turn more than once, the last ones less: all of YaRN is in play.
FACTOR = 0.07 * math.log(4) + 1
HF = {"model_type": "telechat3", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96,
      "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 64,
      "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
      "pad_token_id": 3, "rope_scaling": {"rope_type": "telechat3-yarn", "factor": 4.0, "beta_fast": 4.0,
                                          "beta_slow": 0.5, "original_max_position_embeddings": 16}}
# Longer than what YaRN stretches from, and than what it stretches to.
IDS = np.random.default_rng(5).integers(4, HF["vocab_size"], (2, 72)).astype(np.int32)


@pytest.fixture(scope="module")
def weights():
    return random_official(HF, seed=6)


@pytest.fixture(scope="module")
def llama(weights):
    """transformers' model of the same weights. It calls YaRN "yarn", with another factor on cos and sin by default."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM
    rope = {**HF["rope_scaling"], "rope_type": "yarn", "attention_factor": FACTOR, "rope_theta": HF["rope_theta"]}
    config = LlamaConfig(**{**HF, "model_type": "llama", "rope_scaling": rope, "attention_bias": False,
                            "mlp_bias": False, "attn_implementation": "eager"})
    model = LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()},
                                                strict=False)
    assert not unexpected and not [name for name in missing if "inv_freq" not in name]
    return model


def test_logits_loss_and_greedy_tokens_equal_llama(weights, llama):
    import torch
    model = build_model(HF, weights, seq_length=128)
    with torch.no_grad():
        ids = torch.from_numpy(IDS.astype(np.int64))
        expected = llama(ids).logits.numpy()
        loss = llama(ids, labels=ids).loss.item()
        answer = llama.generate(ids[:1, :8], attention_mask=torch.ones(1, 8), max_new_tokens=12, do_sample=False,
                                eos_token_id=None, pad_token_id=3).numpy()
    np.testing.assert_allclose(logits_of(model, IDS), expected, atol=1e-4)
    model.set_train(True)
    assert loss_of(model, ms.Tensor(IDS), ms.Tensor(IDS)) == pytest.approx(loss, abs=1e-5)
    cached = build_model(HF, weights, seq_length=128, use_past=True, num_blocks=16)
    result = cached.generate([IDS[0, :8].tolist()], do_sample=False, max_new_tokens=12, eos_token_id=[-1])[0]
    assert np.asarray(result).tolist() == answer[0].tolist()


@pytest.mark.parametrize("head_dim", [8, 128])
@pytest.mark.parametrize("length, factor, theta", [(8192, 4.0, 1e6), (64, 16.0, 1e4)])
def test_tables_equal_transformers_yarn(head_dim, length, factor, theta):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length, "beta_fast": 32.0,
            "beta_slow": 1.0, "attention_factor": FACTOR, "rope_theta": theta}
    config = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, rope_theta=theta,
                         max_position_embeddings=int(factor * length), rope_scaling=dict(rope))
    inv_freq, scale = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    assert scale == FACTOR
    positions = torch.arange(2 * length).double()
    angles = torch.outer(positions, inv_freq.double()).numpy()
    rule = RopeRule(head_dim=head_dim, theta=theta, extend_method="YARN", scaling_factor=factor, base_seqlen=length,
                    attention_factor=FACTOR)
    cos, sin = rope_table(rule, 2 * length)
    # float32 angles of up to 2 * length radians are 2^-24 of them from the true ones
    for table, exact in ((cos, np.cos(angles)), (sin, np.sin(angles))):
        np.testing.assert_allclose(table[:, :head_dim // 2], FACTOR * exact, atol=max(2 * length * 3e-7, 1e-6))
        np.testing.assert_array_equal(table[:, :head_dim // 2], table[:, head_dim // 2:])
