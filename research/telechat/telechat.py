"""TeleChat for training and prediction: `TelechatModel` (decoder) and `TelechatForCausalLM` (with head and loss)."""
from typing import Any, ClassVar, Optional, Tuple

import mindspore.common.dtype as mstype
from mindformers.models.modeling_utils import PreTrainedModel
from mindspore import Tensor, nn
from mindspore.ops import operations as P

from research.telechat.bridge.compat import LayerSetting, MindFormerModuleType, lazy_inline, plugin_class
from research.telechat.generation.generate import TelechatGenerationMixin
from research.telechat.model import kernels, native_decoder, sharding
from research.telechat.model.chunked_loss import ChunkedLoss
from research.telechat.model.kv_cache import GenerationStep
from research.telechat.model.loss import CrossEntropyLoss
from research.telechat.model.mask import AttentionMask, Documents
from research.telechat.model.rotary import RotaryTables, RotaryTablesByLength
from research.telechat.model.rows import RowsToTokens, TokensToRows
from research.telechat.spec.rope import rule_is_constant
from research.telechat.telechat_config import TelechatConfig
from research.telechat.telechat_layer import RMSNorm, TelechatEmbedding, TelechatLinear
from research.telechat.telechat_transformer import TelechatDecodeLayer

__all__ = ["TelechatForCausalLM", "TelechatModel"]


class TelechatPreTrainedModel(PreTrainedModel):
    """What MindFormers needs to know of the family."""

    config_class = TelechatConfig
    base_model_prefix = "telechat"
    _support_list: ClassVar[list] = []


class TelechatModel(TelechatPreTrainedModel):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: TelechatConfig):
        super().__init__(config, auto_prefix=True)
        self.document_boundaries = config.document_boundaries
        self.tok_embeddings = TelechatEmbedding(config)
        self.layers = nn.CellList()
        setting = LayerSetting(config.num_layers, config.offset, config.parallel_config, config.pp_interleave_num)
        for layer_id in range(config.num_layers):
            layer = TelechatDecodeLayer(config, layer_id)
            setting(layer, layer_id)
            self.layers.append(layer)
        self.mask = AttentionMask(config)
        self.documents = Documents(config)
        self.norm_out = RMSNorm(config)
        self.to_rows = TokensToRows(config)
        self.use_past = config.use_past
        self.by_length = not rule_is_constant(config.rope_rule, config.seq_length)
        self.rotary = RotaryTables(config)
        if self.use_past or self.by_length:
            self.rotary_by_length = RotaryTablesByLength(config)
        if self.use_past:
            self.step = GenerationStep(config, self.rotary_by_length)
        sharding.pipeline(self, config.parallel_config)

    def construct(self, tokens: Tensor, attention_mask: Optional[Tensor] = None,
                  actual_seq_len: Optional[Tensor] = None, lengths: Optional[Tensor] = None,
                  block_tables: Optional[Tensor] = None, slot_mapping: Optional[Tensor] = None) -> Tensor:
        """tokens: [B, S] int32 -> hidden states after the final norm, rows [B S, H] (model/rows.py).

        attention_mask: [B, S], 0 where nothing may look; actual_seq_len: [B, K], ends of packed conversations.
        Generation only: lengths [B], tokens of each sequence; block_tables and slot_mapping as in model/kv_cache.py.
        """
        cached = None
        if self.use_past and lengths is not None:
            rope, mask, cached = self.step(tokens, lengths, block_tables, slot_mapping)
            h = self.tok_embeddings(self.to_rows(tokens))
        elif self.by_length and lengths is not None:
            h, _, mask = self.prepare(tokens, attention_mask, actual_seq_len)
            rope = self.rotary_by_length.all_positions(tokens, lengths)
        else:
            h, rope, mask = self.prepare(tokens, attention_mask, actual_seq_len)
        if cached is not None and mask is None:
            mask = self.mask(tokens, None, None)
        for layer in self.layers:
            h = layer(h, tokens.shape, rope, mask, cached)
        return self.norm_out(h)

    def prepare(self, tokens: Tensor, attention_mask: Optional[Tensor], actual_seq_len: Optional[Tensor]
                ) -> Tuple[Tensor, Tuple[Tensor, Tensor], kernels.Mask]:
        """Embeddings, rows [B S, H]; rotary tables and the mask of all layers."""
        batch, seq = tokens.shape
        if self.document_boundaries and actual_seq_len is not None:
            documents, positions = self.documents(seq, actual_seq_len)             # [B, S] each
            rope = self.rotary.at(positions, seq)
            mask = self.mask(tokens, attention_mask, documents, actual_seq_len)
        else:
            rope = self.rotary.all_positions(batch, seq)
            mask = self.mask(tokens, attention_mask, None)
        return self.tok_embeddings(self.to_rows(tokens)), rope, mask


class TelechatHead(nn.Cell):
    """Logits [T, V] float32 = logits_scale * (x W^T), W being the embedding table where the head is tied."""

    def __init__(self, config: TelechatConfig):
        super().__init__()
        self.dtype = kernels.matmul_dtype(config.compute_dtype)
        self.scale = config.logits_scale
        self.matmul = kernels.linear_product(config)
        self.mul = P.Mul()
        self.cast = P.Cast()
        sharding.head(self, sharding.Mesh(config))

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """x: rows [T, H], weight: [V, H] -> [T, V]."""
        return self.product(x, self.cast(weight, self.dtype))

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """As `construct`, with weights in the dtype of the matrix multiplications."""
        logits = self.cast(self.matmul(self.cast(x, self.dtype), weight), mstype.float32)
        return self.mul(logits, self.scale) if self.scale != 1.0 else logits


class LMHead(TelechatLinear):
    """Holder of the parameter `lm_head.weight` [V, H] of an untied head; TelechatHead computes with it."""

    def __init__(self, config: TelechatConfig):
        super().__init__(config, config.hidden_size, config.vocab_size)


@plugin_class(MindFormerModuleType.MODELS)
class TelechatForCausalLM(TelechatGenerationMixin, TelechatPreTrainedModel):
    """TeleChat with language-model head and loss.

    Training: `(input_ids [B, N + 1], labels [B, N + 1])` -> `(sum [], number [1])`, float32, whose quotient is the loss
    (model/loss.py): position i predicts label i + 1; labels equal to `ignore_token_id` do not count. With
    `document_boundaries` the third input is actual_seq_len.
    Evaluation: `(input_ids [B, S])` -> logits [B, S, V] float32; with labels `(logits, labels, mask)`.
    """

    @lazy_inline
    def __init__(self, config: TelechatConfig):
        super().__init__(config, auto_prefix=True)
        self.config = config
        self.use_past = config.use_past
        self.is_first_iteration = True
        self.argmax = kernels.argmax                 # MindFormers' generator picks greedy tokens with it
        self.ignore_token_id = config.ignore_token_id
        self.document_boundaries = config.document_boundaries
        self.tied = config.tie_word_embeddings
        self.model = TelechatModel(config)
        if not self.tied:
            self.lm_head = LMHead(config)
        self.head = TelechatHead(config)
        self.loss = CrossEntropyLoss(config)
        self.chunked_loss = ChunkedLoss(config, self.head, self.loss)
        self.to_rows = TokensToRows(config)
        self.to_tokens = RowsToTokens(config)
        self.slice = P.StridedSlice()
        self.reshape = P.Reshape()
        self.gather_rows = P.Gather()
        self.cumsum = P.CumSum()
        self.ones_like = P.OnesLike()
        sharding.causal_lm(self, config.parallel_config)
        self.load_checkpoint(config)

    def construct(self, input_ids: Tensor, labels: Optional[Tensor] = None, input_position: Optional[Tensor] = None,
                  position_ids: object = None, attention_mask: Optional[Tensor] = None, input_embeds: object = None,
                  init_reset: object = None, batch_valid_length: Optional[Tensor] = None, batch_index: object = None,
                  zactivate_len: object = None, block_tables: Optional[Tensor] = None,
                  slot_mapping: Optional[Tensor] = None, prefix_keys_values: object = None) -> Any:
        """The arguments are those that MindFormers' trainer and generator pass, by position."""
        actual_seq_len = input_position if self.document_boundaries else None
        if batch_valid_length is not None:
            return self.next_token(input_ids, attention_mask, batch_valid_length, block_tables, slot_mapping)
        if not self.training:
            logits = self.logits(self.model(input_ids, attention_mask, actual_seq_len))
            logits = self.to_tokens(logits, *input_ids.shape)
            if labels is None:
                return logits
            return logits, labels, (labels != self.ignore_token_id).astype(mstype.float32)
        tokens, targets, attention_mask = self.shifted(input_ids, labels, attention_mask)
        return self.loss_of(self.model(tokens, attention_mask, actual_seq_len), targets)

    def loss_of(self, hidden: Tensor, targets: Tensor) -> Tuple[Tensor, Tensor]:
        """Rows [T, H] and their labels [T] -> sum and number (model/loss.py)."""
        at_once, rows = self.chunked_loss.rows_of_chunk(hidden.shape[0])
        if at_once < rows:
            return self.chunked_loss(hidden, self.head_weight(), targets)
        return self.loss(self.logits(hidden), targets)

    def shifted(self, input_ids: Tensor, labels: Optional[Tensor], attention_mask: Optional[Tensor]
                ) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
        """Tokens [B, N], the label behind each of them as rows [B N], and the tokens' attention mask."""
        batch, length = input_ids.shape
        tokens = self.slice(input_ids, (0, 0), (batch, length - 1), (1, 1))
        targets = self.slice(input_ids if labels is None else labels, (0, 1), (batch, length), (1, 1))
        if attention_mask is not None:
            attention_mask = self.slice(attention_mask, (0, 0), (batch, length - 1), (1, 1))
        return tokens, self.to_rows(targets), attention_mask

    def next_token(self, tokens: Tensor, attention_mask: Optional[Tensor], lengths: Tensor,
                   block_tables: Optional[Tensor], slot_mapping: Optional[Tensor]) -> Tensor:
        """One step of generation: logits behind the last token of each sequence, [B, V] float32.

        lengths: [1, B] or [B]; the other arguments as in model/kv_cache.py.
        """
        lengths = self.reshape(lengths, (-1,))
        rows = self.model(tokens, attention_mask, None, lengths, block_tables, slot_mapping)
        if not self.use_past or self.is_first_iteration:
            rows = self.gather_rows(rows, self.last_rows(tokens, lengths), 0)
        return self.logits(rows)

    def last_rows(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Index of the last token of each sequence among all tokens: prompts padded, or back to back."""
        if self.use_past and self.model.step.flat_prefill:
            return self.cumsum(lengths, 0) - 1
        return (self.cumsum(self.ones_like(lengths), 0) - 1) * tokens.shape[1] + lengths - 1

    def native_decoder(self) -> Optional[nn.Cell]:
        """The model in the fused operators of a CPU (model/native_decoder.py), None where these do not serve."""
        if not self.use_past or self.model.step.paged or not native_decoder.serves(self):
            return None
        return native_decoder.NativeDecoder(self)

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows [T, H] -> [T, V] float32."""
        return self.head(hidden, self.head_weight())

    def head_weight(self) -> Tensor:
        """[V, H]."""
        return self.model.tok_embeddings.embedding_weight if self.tied else self.lm_head.weight
