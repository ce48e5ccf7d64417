"""How the model is split over devices: the strategy of every operator. What the model computes is elsewhere.

The ranks of one pipeline stage form a mesh dp x cp x mp, mp neighbours side by side. Three forms of tensors occur:

- rows [T, H], T = B S tokens: the residual stream, norms, linear layers, head and loss. Rows lie over dp and cp; with
  sequence parallelism, outside attention and feed-forward, over mp as well (Korthikanti et al., 2022). Rows of one
  device are side by side (model/rows.py), so that passing from one form to another never communicates.
- heads [B, N, S, D]: attention. The batch lies over dp, heads over mp, the sequence over cp.
- weights [out, in]: columns of the output (wq, wk_v, w1, w3, head) or of the input (wo, w2) over mp.

A strategy is a tuple per input, with the number of pieces per axis. Every cell calls its function here once, at the end
of its constructor. In modes other than semi_auto_parallel MindSpore ignores all of it.
"""
from typing import Tuple

import mindspore as ms
from mindformers.modules.transformer.transformer import TransformerOpParallelConfig
from mindspore import nn
from mindspore.parallel import Layout

from research.telechat.telechat_config import TelechatConfig


class Mesh:
    """Degrees of parallelism, and how many shards the recurring axes have."""

    def __init__(self, config: TelechatConfig):
        plan = config.parallel_config
        self.dp, self.cp, self.mp = plan.data_parallel, plan.context_parallel, plan.model_parallel
        self.ulysses = plan.get_ulysses_cp_num()          # part of cp that shards heads instead of the sequence
        self.sequence_parallel = plan.use_seq_parallel and self.mp > 1
        self.rows = self.dp * self.cp                     # rows where the features are sharded over mp
        self.stream = self.rows * self.mp if self.sequence_parallel else self.rows   # rows of the residual stream
        self.vocab = 1 if plan.vocab_emb_dp or config.vocab_size % self.mp else self.mp
        # Where the vocabulary is whole on every device, mp shares the rows of the head instead of repeating them.
        self.head_rows = self.rows if self.vocab > 1 or config.use_past else self.rows * self.mp
        # Whether results of communication over mp are kept for the backward pass of a recomputed layer.
        self.keep_results = not getattr(plan.recompute, "mp_comm_recompute", True)
        self.documents = config.document_boundaries       # then masks and rotary tables differ between sequences
        # Whether tensors are sharded as this module says: their shapes are those of all devices then, else of this one.
        self.in_effect = ms.get_auto_parallel_context("parallel_mode") in ("semi_auto_parallel", "auto_parallel")
        self.tables = "dp" if self.documents or config.use_past else "None"

    @property
    def layout(self) -> Layout:
        """Names for the mesh axes, for operators whose axes are not sharded in the order dp, cp, mp."""
        return Layout((self.dp, self.cp, self.mp), ("dp", "cp", "mp"))


def dropout(cell: nn.Cell, strategy: Tuple[int, ...]) -> None:
    """An nn.Dropout whose input is sharded by `strategy`."""
    cell.dropout.shard((strategy,))


def column_linear(linear: nn.Cell, mesh: Mesh) -> None:
    """Outputs over mp; rows arrive whole, gathered where the stream is sharded over mp."""
    linear.shard(((mesh.rows, 1), (mesh.mp, 1)), strategy_bias=((mesh.rows, mesh.mp), (mesh.mp,)))


def row_linear(linear: nn.Cell, mesh: Mesh) -> None:
    """Inputs over mp; the partial sums are reduced, with sequence parallelism only to the rows that a device keeps.

    That scattered sum is small, so it is kept instead of computed and communicated again when a layer is recomputed.
    """
    scatter = ((mesh.stream, 1),) if mesh.sequence_parallel else None
    linear.shard(((mesh.rows, mesh.mp), (1, mesh.mp)), strategy_bias=((mesh.stream, 1), (1,)),
                 out_strategy_matmul=scatter)
    if scatter or mesh.keep_results:
        linear.matmul.add_prim_attr("recompute_comm_op", False)


def tokens_to_rows(cell: nn.Cell, mesh: Mesh) -> None:
    """Token ids and labels."""
    cell.by_device.shard(((mesh.dp, 1, mesh.cp, 1),))


def rows_to_tokens(cell: nn.Cell, mesh: Mesh) -> None:
    """Logits."""
    cell.by_device.shard(((mesh.dp, mesh.cp, 1, 1, mesh.vocab),))


def rows_to_heads(cell: nn.Cell, mesh: Mesh) -> None:
    """Projections, heads over mp."""
    cell.transpose.shard(((mesh.dp, mesh.cp, mesh.mp, 1),))
    cell.by_device.shard(((mesh.dp, mesh.cp, 1, 1, mesh.mp, 1),))


def heads_to_rows(cell: nn.Cell, mesh: Mesh) -> None:
    """The result of attention, heads over mp."""
    layout = mesh.layout
    cell.transpose.shard((layout("dp", "mp", "cp", "None"),))
    cell.by_device.shard((layout("dp", "None", "mp", "cp", "None", "None"),))


def norm(cell: nn.Cell, mesh: Mesh) -> None:
    """RMSNorm of the residual stream."""
    cell.kernel.shard((mesh.stream, 1))
    if mesh.keep_results and mesh.sequence_parallel:
        cell.kernel.norm.add_prim_attr("recompute_comm_op", False)           # belongs to the gather behind it


def embedding(cell: nn.Cell, mesh: Mesh) -> None:
    """The table is sharded by rows over mp, or replicated with vocab_emb_dp."""
    if mesh.vocab > 1:
        cell.gather.shard(((mesh.vocab, 1), (mesh.rows,)), ((mesh.stream, 1),) if mesh.sequence_parallel else None)
    else:
        cell.gather.shard(((1, 1), (mesh.stream,)))
    cell.scale.shard(((mesh.stream, 1), ()))
    dropout(cell.dropout, (mesh.stream, 1))


def rotary(cell: nn.Cell, mesh: Mesh) -> None:
    """Queries and keys [B, N, S, D]."""
    layout = mesh.layout
    x = layout("dp", "mp", "cp", "None")
    table = layout(mesh.tables, "None", "cp", "None")
    cell.halves.shard((x,))
    cell.neg.shard((x,))
    cell.concat.add_prim_attr("self_define_shard", True)       # the only way for it to take a layout
    cell.concat.shard(((x, x),), (x,))
    cell.mul_cos.shard((x, table))
    cell.mul_sin.shard((x, table))
    cell.add.shard((x, x))


def rotary_tables(cell: nn.Cell, mesh: Mesh) -> None:
    """Positions [B, S] of packed documents."""
    cell.gather.shard(((1, 1), (mesh.dp, mesh.cp)))


def dot_product_attention(cell: nn.Cell, mesh: Mesh) -> None:
    """Heads over mp. No context parallelism: that needs the flash attention kernel."""
    x = (mesh.dp, mesh.mp, 1, 1)
    cell.scale_query.shard((x, ()))
    cell.scores.shard((x, x))
    cell.add_mask.shard((x, (mesh.dp if cell.mask_per_sequence else 1, 1, 1, 1)))
    cell.softmax.shard(x)
    dropout(cell.dropout, x)
    cell.context.shard((x, x))


def flash_attention(cell: nn.Cell, mesh: Mesh) -> None:
    """Heads over mp. Context parallelism: ulysses switches from sharding the sequence to sharding heads, over all of
    cp or a part of it; over the rest ring attention passes keys and values around, or they are gathered."""
    layout = Layout((mesh.dp, mesh.cp // mesh.ulysses, mesh.ulysses, mesh.mp), ("dp", "cp", "ulysses", "mp"))
    heads, seq = ("mp", "ulysses"), "cp"
    query = layout("dp", heads, seq, "None")
    key = query if cell.ring else layout("dp", heads, "None", "None")
    if cell.back_to_back:
        tokens, ends = layout("dp", heads, "None"), layout("dp")
        cell.to_tokens.shard((query,))
        cell.to_heads.shard((layout("dp", seq, heads, "None"),))
        cell.kernel.shard((tokens, tokens, tokens, layout("None", "None"), ends, ends))
        return
    strategy = [query, key, key]
    if cell.has_dropout:
        strategy.append(query)
    if not cell.ring:
        strategy.append({"sequence": layout("dp", "None", seq, "None"), "full": layout(seq, "None"),
                         "triangle": layout("None", "None")}[cell.mask_form])
    cell.kernel.shard(tuple(strategy))


def attention(cell: nn.Cell, mesh: Mesh) -> None:
    """Heads over mp."""
    for linear in (cell.w_qkv,) if cell.fused else (cell.wq, cell.wk_v):
        column_linear(linear, mesh)
    row_linear(cell.wo, mesh)
    cell.split.shard((mesh.layout("dp", "mp", "cp", "None"),))


def feed_forward(cell: nn.Cell, mesh: Mesh) -> None:
    """The inner features over mp; of fused projections whole groups."""
    inner: Tuple[int, ...] = (mesh.rows, mesh.mp)
    if cell.fused:
        column_linear(cell.w_gate_hidden, mesh)
        inner = (mesh.rows, mesh.mp, 1)
        cell.split.shard((inner,))
    else:
        column_linear(cell.w1, mesh)
        column_linear(cell.w3, mesh)
    cell.silu.shard((inner,))
    cell.mul.shard((inner, inner))
    row_linear(cell.w2, mesh)


def decode_layer(cell: nn.Cell, mesh: Mesh) -> None:
    """The sums of the residual stream."""
    x = (mesh.stream, 1)
    cell.add.shard((x, x))
    dropout(cell.dropout, x)


def mask(cell: nn.Cell, mesh: Mesh) -> None:
    """Sequences over dp; queries as attention has them, over the part of cp that ulysses leaves to the sequence."""
    queries = mesh.cp // mesh.ulysses
    row, column, square = (mesh.dp, 1, queries, 1), (mesh.dp, 1, 1, 1), (mesh.dp, 1, queries, 1)
    causal = (1, 1, queries, 1)
    cell.other_document.shard((row, column))
    cell.is_equal.shard((column, ()))
    cell.or_other_document.shard((causal, square))
    cell.or_padding.shard((square if mesh.documents else causal, column))
    cell.mul.shard((square if cell.per_sequence else causal, ()))


def document_ends(cell: nn.Cell, mesh: Mesh) -> None:
    """Sequences over dp."""
    ends = (mesh.dp, 1)
    cell.limit.shard((ends, ()))
    cell.join.shard((ends, ends))
    cell.shift.shard((ends, ends))


def documents(cell: nn.Cell, mesh: Mesh) -> None:
    """Sequences over dp."""
    ends, index = (mesh.dp, 1, 1), (1, 1, 1)
    cell.reached.shard((ends, index))
    cell.count.shard((ends,))
    cell.last.shard((ends,))
    cell.select.shard((ends, ends))
    cell.sub.shard(((1, 1), (mesh.dp, 1)))


def head(cell: nn.Cell, mesh: Mesh) -> None:
    """Columns of the logits over mp, or rows where the vocabulary is whole."""
    cell.matmul.shard(((mesh.head_rows, 1), (mesh.vocab, 1)))
    cell.mul.shard(((mesh.head_rows, mesh.vocab), ()))


def loss(cell: nn.Cell, mesh: Mesh) -> None:
    """As the logits are sharded."""
    logits, column, row = (mesh.head_rows, mesh.vocab), (mesh.head_rows, 1), (mesh.head_rows,)
    cell.max.shard(logits)
    cell.sub.shard((logits, column))
    cell.exp.shard((logits,))
    cell.sum.shard((logits,))
    cell.log.shard((column,))
    cell.one_hot.shard((logits, (), ()))
    cell.one_hot_mul.shard((logits, logits))
    cell.not_equal.shard((row, ()))
    cell.select_label.shard((row, row))
    cell.token_loss.shard((column, column))
    cell.masked.shard((row, row))
    cell.probability.shard((logits, column))
    cell.minus_label.shard((logits, logits))
    cell.total.shard((row,))


def chunked_loss(cell: nn.Cell, mesh: Mesh) -> None:
    """Chunks of the rows of each device, sharded as the logits; the gradient of the rows as that of a row_linear."""
    rows = mesh.head_rows
    cell.rows_of.shard(((rows, 1, 1),))
    cell.labels_of.shard(((rows, 1),))
    for count in range(1, len(cell.joins)):
        cell.joins[count].shard(((rows, 1),) * count)
        cell.gradient_joins[count].shard(((rows, 1, mesh.vocab),) * count)
    scatter = ((mesh.stream, 1),) if mesh.sequence_parallel and mesh.vocab > 1 else None
    cell.back.shard(((rows, mesh.vocab), (mesh.vocab, 1)), scatter)
    kept = (mesh.stream if mesh.vocab > 1 else rows, 1)
    cell.of_counted.shard((kept, kept))
    cell.along.shard((kept, kept))
    cell.sum.shard((kept,))


def pipeline(model: nn.Cell, plan: TransformerOpParallelConfig) -> None:
    """Stages and gradient fusion groups of what is not a decoder layer; layers are set by MindFormers' LayerSetting.

    Between stages the residual stream travels in the 16 bits of the matrix multiplications.
    """
    stages = [layer.pipeline_stage for layer in model.layers]
    for layer, stage, following in zip(model.layers, stages, stages[1:]):
        if stage != following:
            layer.out_dtype = layer.attention.wo.dtype
    last = plan.pipeline_stage - 1
    model.tok_embeddings.pipeline_stage = 0
    model.norm_out.pipeline_stage = last
    group = 2 if last > 0 else plan.gradient_aggregation_group
    model.tok_embeddings.set_comm_fusion(group)
    model.norm_out.set_comm_fusion(group)


def causal_lm(cell: nn.Cell, plan: TransformerOpParallelConfig) -> None:
    """The inputs over dp; head and loss on the last pipeline stage."""
    cell.slice.shard(((plan.data_parallel, 1),))
    last = plan.pipeline_stage - 1
    if last > 0:
        cell.head.pipeline_stage = last
        cell.loss.pipeline_stage = last
        cell.chunked_loss.pipeline_stage = last
        if cell.tied:
            cell.model.tok_embeddings.embedding_weight.add_pipeline_stage(last)
        else:
            cell.lm_head.pipeline_stage = last
