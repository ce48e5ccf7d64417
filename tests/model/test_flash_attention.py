"""The attention of cards, whose kernel the CPU lacks: mask and kernel as the model makes them for Ascend, computed with
the interpreter's kernel and held against the plain formula in NumPy."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from research.telechat.interpret import attention
from research.telechat.model import kernels, mask
from research.telechat.telechat_config import TelechatConfig

BATCH, HEADS, KV_HEADS, SEQ, DIM, PAD = 2, 4, 2, 8, 4, 3
ENDS = np.array([[3, 5, 8, 8], [1, 6, 6, 9]], np.int32)                # 9: beyond the tokens that are trained on
TOKENS = np.array([[9, 8, 7, 6, 5, 9, PAD, PAD], [PAD, PAD, 9, 8, 7, 6, 5, 4]], np.int32)


@pytest.fixture(autouse=True)
def as_on_a_card(monkeypatch):
    """Whatever asks for the device hears of Ascend; the cells run one operator after the other."""
    monkeypatch.setattr(kernels, "on_cpu", lambda: False)
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def config(**keys):
    return TelechatConfig(num_layers=1, hidden_size=HEADS * DIM, num_heads=HEADS, n_kv_heads=KV_HEADS, pad_token_id=PAD,
                          seq_length=SEQ, **{"use_flash_attention": True, "compute_dtype": "float32", **keys})


def kernel_of(primitive):
    """The interpreter's kernel with the attributes of MindSpore's."""
    def compute(*inputs):
        arrays = [None if one is None else one.asnumpy() for one in inputs]
        arrays[:3] = [one.astype(np.float64) for one in arrays[:3]]
        result = attention.flash_attention(
            None, *arrays, primitive.head_num, primitive.keep_prob, primitive.scale_value, primitive.pre_tokens,
            primitive.next_tokens, primitive.inner_precise, primitive.input_layout, primitive.sparse_mode)
        return [*[None] * 3, Tensor(result[3].astype(np.float32))]
    return compute


class Attention:
    """Mask and attention of a config. compute: as the model calls them."""

    def __init__(self, settings):
        self.mask = mask.AttentionMask(settings)
        self.documents = mask.Documents(settings) if settings.document_boundaries else None
        self.attend = kernels.CausalFlashAttention(settings)
        self.primitive = self.attend.kernel
        self.attend.kernel = kernel_of(self.primitive)

    def compute(self, q, k, v):
        ends, number = None, None
        if self.documents:
            ends = Tensor(ENDS)
            number = self.documents.construct(SEQ, ends)[0]
        made = self.mask.construct(Tensor(TOKENS), None, number, ends)
        return self.attend.construct(*(Tensor(x.astype(np.float32)) for x in (q, k, v)), made).asnumpy()


def plain(q, k, v, hidden):
    """softmax(q k^T / sqrt(D)) v over the keys that are not hidden [B, 1, S, S]; 0 where none is left."""
    k, v = (np.repeat(x, HEADS // KV_HEADS, 1) for x in (k, v))
    weights = np.where(hidden, 0.0, np.exp(q @ np.swapaxes(k, -1, -2) / np.sqrt(DIM)))
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total == 0, 1.0, total) @ v


def hidden_pairs(padding, documents):
    result = np.triu(np.ones((SEQ, SEQ), bool), 1)[None, None].repeat(BATCH, 0)
    if padding:
        result = result | (TOKENS == PAD)[:, None, None]
    if documents:
        number = (ENDS[:, None] <= np.arange(SEQ)[:, None]).sum(-1)
        result = result | (number[:, None, :, None] != number[:, None, None])
    return result


@pytest.mark.parametrize("keys, form", [
    ({"use_attn_mask_compression": True}, ("triangle", 2, "BNSD")),
    ({"use_attn_mask_compression": False}, ("full", 0, "BNSD")),
    ({"mask_pad_tokens": True}, ("sequence", 0, "BNSD")),
    ({"mask_pad_tokens": True, "use_attn_mask_compression": True}, ("sequence", 0, "BNSD")),
    ({"document_boundaries": True}, ("triangle", 3, "TND")),
    ({"document_boundaries": True, "mask_pad_tokens": True}, ("sequence", 0, "BNSD"))],
    ids=["triangle", "full mask", "padding", "padding with a triangle", "documents", "documents and padding"])
def test_attention(keys, form):
    model = Attention(config(**keys))
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(BATCH, heads, SEQ, DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS))
    hidden = hidden_pairs(keys.get("mask_pad_tokens", False), keys.get("document_boundaries", False))
    np.testing.assert_allclose(model.compute(q, k, v), plain(q, k, v, hidden), atol=2e-6)
    kernel = model.primitive
    assert (model.attend.mask_form, kernel.sparse_mode, attention.LAYOUTS[kernel.input_layout]) == form


def test_dropout_keeps_the_rest():
    """The kernel gets the share that is kept, and a bit for each score."""
    settings = config(attention_dropout_prob=0.25, document_boundaries=True)
    attend = kernels.CausalFlashAttention(settings)
    assert (attend.kernel.keep_prob, float(attend.keep.asnumpy()), attend.has_dropout) == (0.75, 0.75, True)
    assert attend.mask_form == "sequence"              # documents are back to back only without dropout


def test_ring_attention_masks_by_itself():
    settings = config(use_ring_attention=True, use_attn_mask_compression=True,
                      parallel_config={"context_parallel": 2})
    attend = kernels.CausalFlashAttention(settings)
    assert attend.kernel.attrs["enable_ring_attention"] and attend.kernel.attrs["enable_ra_send_recv"]
    assert attend.kernel.sparse_mode == 0
    assert mask.AttentionMask(settings).construct(Tensor(TOKENS), None, None) is None
    one = kernels.CausalFlashAttention(config(use_ring_attention=True, use_attn_mask_compression=True))
    assert not one.ring and one.kernel.sparse_mode == 2          # no context parallelism, no ring


@pytest.mark.parametrize("dtype, hidden", [("bfloat16", 1.0), ("float16", -10000.0)])
def test_prompts_back_to_back(dtype, hidden):
    """The kernel of prediction takes its scale, and a triangle whose values depend on the type."""
    attend = kernels.FlatFlashAttention(config(compute_dtype=dtype, use_past=True))
    assert attend.kernel.flash_attention.scale_value == DIM ** -0.5
    np.testing.assert_array_equal(attend.mask.float().asnumpy(), np.triu(np.full((128, 128), hidden, np.float32), 1))


def test_fused_norm_gets_its_epsilon():
    kernel = kernels.RMSNormKernel(1e-3)
    assert kernel.fused and kernel.norm.epsilon == 1e-3
