"""Layouts of sharded parameters, and the strategy files that hold them."""
from research.telechat.checkpoint.strategy import Layout, write_strategy


def layout(dev_matrix, tensor_map, optimizer=0, stages=(0,)):
    axes = tuple((axis,) if isinstance(axis, int) and axis >= 0 else tuple(axis) if not isinstance(axis, int) else ()
                 for axis in tensor_map)
    return Layout(tuple(dev_matrix), axes, optimizer, tuple(stages))


def write_strategies(folder, layouts, pp):
    """One strategy file per stage, as a run writes them."""
    folder.mkdir()
    ranks = next(iter(layouts.values())).ranks
    for stage in range(pp):
        write_strategy(folder / f"ckpt_strategy_rank_{stage * ranks}.ckpt", layouts, stage)
    return folder
