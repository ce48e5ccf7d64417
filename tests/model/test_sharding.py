"""What every operator's tensors are cut into, by their forms (model/sharding.py), at degrees that are all different.

That the cuts compute the same is for tests/interpret; here a cut that moves tensors between devices, or keeps whole
what should be cut, is found at once.
"""
from types import SimpleNamespace

import pytest

from research.telechat.model import sharding

DP, HEADS_OF_CP, SEQ_OF_CP, MP = 2, 3, 5, 7                # hybrid context parallelism: 15 = 3 x 5
CP = HEADS_OF_CP * SEQ_OF_CP
ROWS = DP * CP


class Recorder:
    """A cell or operator of which everything exists; `seen` has the strategies of operators by their names."""

    def __init__(self, seen=None, name="", **given):
        self.__dict__.update(given, _seen={} if seen is None else seen, _name=name)

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        child = Recorder(self._seen, f"{self._name}.{name}".lstrip("."))
        self.__dict__[name] = child
        return child

    def __getitem__(self, number):
        return getattr(self, f"at{number}")

    def __len__(self):
        return 3

    def __call__(self, *_):
        return None

    def shard(self, inputs, outputs=None, **others):
        inputs = inputs if isinstance(inputs[0], (tuple, sharding.Layout)) else (inputs,)
        self._seen[self._name] = [pieces(one) for one in (*inputs, *(outputs or ()))]
        for name, value in others.items():
            self._seen[f"{self._name}:{name}"] = value and [pieces(one) for one in value]

    def add_prim_attr(self, name, value):
        self._seen[f"{self._name}:{name}"] = value


def pieces(one):
    """Pieces along each axis, of a strategy or a layout."""
    if isinstance(one, tuple):
        return tuple(map(pieces, one)) if one and isinstance(one[0], sharding.Layout) else one
    told = one.to_dict()
    matrix, sizes = told["device_matrix"], []
    for axis in told["tensor_map"]:
        size = 1
        for number in axis if isinstance(axis, (tuple, list)) else (axis,):
            size *= 1 if number == -1 else matrix[len(matrix) - 1 - number]
        sizes.append(size)
    return tuple(sizes)


def mesh_of(dp=DP, cp=CP, mp=MP, ulysses=1, stream=False, keep=True, vocab=MP * 10, vocab_emb_dp=False, documents=False,
            use_past=False):
    plan = SimpleNamespace(data_parallel=dp, context_parallel=cp, model_parallel=mp, use_seq_parallel=stream,
                           vocab_emb_dp=vocab_emb_dp, get_ulysses_cp_num=lambda: ulysses,
                           recompute=SimpleNamespace(mp_comm_recompute=not keep))
    return sharding.Mesh(SimpleNamespace(parallel_config=plan, vocab_size=vocab, use_past=use_past,
                                         document_boundaries=documents))


def seen(function, mesh, **cell):
    recorder = Recorder(**cell)
    getattr(sharding, function)(recorder, mesh)
    return recorder._seen


@pytest.mark.parametrize("stream", [False, True])
def test_rows(stream):
    """Rows lie over dp and cp; with sequence parallelism, outside attention and feed-forward, over mp as well."""
    mesh = mesh_of(stream=stream)
    residual = (ROWS * MP if stream else ROWS, 1)
    assert seen("tokens_to_rows", mesh) == {"by_device": [(DP, 1, CP, 1)]}
    assert seen("rows_to_tokens", mesh) == {"by_device": [(DP, CP, 1, 1, MP)]}
    assert seen("norm", mesh)["kernel"] == [residual]
    found = seen("decode_layer", mesh)
    assert found == {"add": [residual, residual], "dropout.dropout": [residual]}
    found = seen("row_linear", mesh)
    assert found[""] == [(ROWS, MP), (1, MP)] and found[":strategy_bias"] == [residual, (1,)]
    assert found[":out_strategy_matmul"] == ([residual] if stream else None)
    assert found["matmul:recompute_comm_op"] is False
    found = seen("column_linear", mesh)
    assert found == {"": [(ROWS, 1), (MP, 1)], ":strategy_bias": [(ROWS, MP), (MP,)]}


def test_sums_that_are_communicated_again():
    """Without sequence parallelism and with mp_comm_recompute nothing of a recomputed layer's communication is kept."""
    assert "matmul:recompute_comm_op" not in seen("row_linear", mesh_of(keep=False))
    assert seen("row_linear", mesh_of(keep=False, stream=True))["matmul:recompute_comm_op"] is False
    assert "kernel.norm:recompute_comm_op" not in seen("norm", mesh_of(stream=False))
    assert seen("norm", mesh_of(stream=True))["kernel.norm:recompute_comm_op"] is False


def test_heads():
    """The batch over dp, heads over mp, the sequence over cp; where rows are made of them each device keeps its own."""
    mesh, heads = mesh_of(), (DP, MP, CP, 1)
    assert seen("rows_to_heads", mesh) == {"transpose": [(DP, CP, MP, 1)], "by_device": [(DP, CP, 1, 1, MP, 1)]}
    assert seen("heads_to_rows", mesh) == {"transpose": [heads], "by_device": [(DP, 1, MP, CP, 1, 1)]}
    assert seen("attention", mesh, fused=False)["split"] == [heads]
    for documents in (False, True):
        found = seen("rotary", mesh_of(documents=documents))
        table = (DP if documents else 1, 1, CP, 1)
        assert found["mul_cos"] == found["mul_sin"] == [heads, table]
        assert found["add"] == [heads, heads] and found["concat"] == [(heads, heads), heads] and found["neg"] == [heads]
    found = seen("dot_product_attention", mesh_of(cp=1), mask_per_sequence=True)
    assert found["add_mask"] == [(DP, MP, 1, 1), (DP, 1, 1, 1)] and found["scores"] == [(DP, MP, 1, 1)] * 2
    assert found["softmax"] == found["scale_query"][:1] == found["context"][:1] == [(DP, MP, 1, 1)]


@pytest.mark.parametrize("form, mask", [("full", (SEQ_OF_CP, 1)), ("triangle", (1, 1)),
                                        ("sequence", (DP, 1, SEQ_OF_CP, 1))])
def test_context_parallelism(form, mask):
    """Ulysses cuts heads; over the rest of cp queries are cut and keys whole, but with ring attention, which has no
    mask."""
    mesh = mesh_of(ulysses=HEADS_OF_CP)
    query, key = (DP, MP * HEADS_OF_CP, SEQ_OF_CP, 1), (DP, MP * HEADS_OF_CP, 1, 1)
    cell = dict(back_to_back=False, mask_form=form, has_dropout=False)
    assert seen("flash_attention", mesh, ring=False, **cell)["kernel"] == [query, key, key, mask]
    assert seen("flash_attention", mesh, ring=True, **cell)["kernel"] == [query] * 3
    cell["has_dropout"] = True
    assert seen("flash_attention", mesh, ring=False, **cell)["kernel"] == [query, key, key, query, mask]
    cell["back_to_back"] = True
    found = seen("flash_attention", mesh_of(ulysses=CP), ring=False, **cell)
    assert found["kernel"] == [(DP, MP * CP, 1)] * 3 + [(1, 1), (DP,), (DP,)]
    assert found["to_tokens"] == [(DP, MP * CP, 1, 1)] and found["to_heads"] == [(DP, 1, MP * CP, 1)]


def test_masks():
    mesh = mesh_of(ulysses=HEADS_OF_CP, documents=True)
    found = seen("mask", mesh, per_sequence=True)
    square, causal, column = (DP, 1, SEQ_OF_CP, 1), (1, 1, SEQ_OF_CP, 1), (DP, 1, 1, 1)
    assert found["other_document"] == [square, column] and found["or_other_document"] == [causal, square]
    assert found["or_padding"] == [square, column] and found["mul"] == [square, ()]
    assert seen("mask", mesh_of(ulysses=HEADS_OF_CP), per_sequence=False)["or_padding"] == [causal, column]
    assert seen("rotary_tables", mesh)["gather"] == [(1, 1), (DP, CP)]
    found = seen("documents", mesh)
    assert found["reached"] == [(DP, 1, 1), (1, 1, 1)] and found["sub"] == [(1, 1), (DP, 1)]
    assert seen("document_ends", mesh)["join"] == [(DP, 1)] * 2


@pytest.mark.parametrize("fused", [False, True])
def test_feed_forward(fused):
    found = seen("feed_forward", mesh_of(), fused=fused)
    inner = (ROWS, MP, 1) if fused else (ROWS, MP)
    assert found["silu"] == [inner] and found["mul"] == [inner, inner]
    assert found["w2"] == [(ROWS, MP), (1, MP)] and found["w_gate_hidden" if fused else "w3"] == [(ROWS, 1), (MP, 1)]


@pytest.mark.parametrize("keys, table, rows", [
    ({}, MP, ROWS), ({"vocab_emb_dp": True}, 1, ROWS * MP), ({"vocab": MP * 10 + 1}, 1, ROWS * MP),
    ({"vocab_emb_dp": True, "use_past": True}, 1, ROWS)])
def test_vocabulary(keys, table, rows):
    """Cut over mp, or whole on every device; then mp shares the rows of head and loss, but not in prediction."""
    mesh, whole = mesh_of(**keys), table == 1
    assert seen("head", mesh) == {"matmul": [(rows, 1), (table, 1)], "mul": [(rows, table), ()]}
    found = seen("loss", mesh)
    assert found["sub"] == [(rows, table), (rows, 1)] and found["one_hot"] == [(rows, table), (), ()]
    assert found["max"] == [(rows, table)] and found["masked"] == [(rows,)] * 2
    for stream in (False, True):
        mesh = mesh_of(stream=stream, **keys)
        residual = (ROWS * MP if stream else ROWS, 1)
        found = seen("embedding", mesh)
        assert found["gather"] == ([(1, 1), residual[:1]] if whole else
                                   [(MP, 1), (ROWS,), *([residual] if stream else [])])
        assert found["scale"] == [residual, ()]
        found = seen("chunked_loss", mesh)
        assert found["back"] == [(rows, table), (table, 1), *([residual] if stream and not whole else [])]
        assert found["along"] == [(rows, 1) if whole else residual] * 2
        assert found["rows_of"] == [(rows, 1, 1)] and found["gradient_joins.at2"] == [(rows, 1, table)] * 2


def test_stages():
    """Head and loss, and a tied table with them, on the last stage; the stream leaves a stage in 16 bits."""
    layers = [SimpleNamespace(pipeline_stage=stage, attention=SimpleNamespace(wo=SimpleNamespace(dtype="16 bits")),
                              out_dtype="float32") for stage in (0, 0, 1)]
    model = Recorder(layers=layers)
    plan = SimpleNamespace(pipeline_stage=2, data_parallel=DP)
    sharding.pipeline(model, plan)
    assert [layer.out_dtype for layer in layers] == ["float32", "16 bits", "float32"]
    assert (model.tok_embeddings.pipeline_stage, model.norm_out.pipeline_stage) == (0, 1)
    for tied in (True, False):
        stages = []
        cell = Recorder(tied=tied)
        cell.model.tok_embeddings.embedding_weight.add_pipeline_stage = stages.append
        sharding.causal_lm(cell, plan)
        assert cell.head.pipeline_stage == cell.loss.pipeline_stage == cell.chunked_loss.pipeline_stage == 1
        assert stages == ([1] if tied else []) and ("pipeline_stage" in vars(cell.lm_head)) == (not tied)
        assert cell._seen["slice"] == [(DP, 1)]
