"""Layouts of cut parameters, and the strategy files that hold them."""
import os

from research.telechat.checkpoint.strategy import Layout


def layout(dev_matrix, tensor_map, optimizer=0, stages=(0,)):
    axes = tuple((axis,) if isinstance(axis, int) and axis >= 0 else tuple(axis) if not isinstance(axis, int) else ()
                 for axis in tensor_map)
    return Layout(tuple(dev_matrix), axes, optimizer, tuple(stages))


def write_strategies(folder, layouts, pp, step=None):
    """One strategy file per stage, as a run writes them."""
    os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
    from research.telechat.checkpoint.strategy import _messages
    messages = _messages()
    folder.mkdir()
    for stage in range(pp):
        message = messages.ParallelStrategyMap()
        message.current_stage = 2
        item = message.parallel_strategy_item.add()
        item.node_name = "MatMul"
        item.parallel_strategys.stage = stage
        for name, one in layouts.items():
            if stage not in one.stages:
                continue
            entry = message.parallel_layout_item.add()
            entry.param_name = name
            entry.parallel_layouts.dev_matrix.add().dim.extend(one.dev_matrix)
            entry.parallel_layouts.tensor_map.add().dim.extend(axes[0] if axes else -1 for axes in one.tensor_map)
            entry.parallel_layouts.param_split_shape.add()
            entry.parallel_layouts.field = 0
            mp = one.dev_matrix[-1]
            entry.parallel_layouts.opt_weight_shard_step = mp if one.optimizer_ranks else 0
            entry.parallel_layouts.opt_weight_shard_size = one.optimizer_ranks
        ranks = next(iter(layouts.values())).ranks
        (folder / f"ckpt_strategy_rank_{stage * ranks}.ckpt").write_bytes(message.SerializeToString())
    return folder
