"""One graph for all decoder layers that are alike, so that the compiler parses, infers and differentiates one of them.

MindSpore shares the graph of cells whose `cell_init_args` are equal: their parameters become its arguments. With
`no_inline = False` the shared graph is put in place of each call before the backend sees it, so that what is executed
stays the same. MindFormers uses this for whole models in a pipeline (its lazy_inline), and does nothing on one device.
"""
from typing import Optional

import mindspore as ms
from mindspore import nn


def shared_graph_key(cell: nn.Cell) -> Optional[str]:
    """What `cell` has in common with the cells that may share its graph; None where it must have its own.

    It has its own on several devices, where stages and sharding of layers differ, and with recomputation or dropout:
    the first is configured for single layers, the second draws the same numbers in a shared graph.
    """
    if ms.get_auto_parallel_context("parallel_mode") != "stand_alone":
        return None
    if any(draws_numbers(child) or _is_recomputed(child) for _, child in cell.cells_and_names()):
        return None
    return "lazy_inline_" + signature(cell)                   # MindSpore looks for this prefix


def signature(cell: nn.Cell) -> str:
    """What the graph of `cell` depends on: cells, their flags, shapes and types of parameters, which are trained."""
    parts = [type(cell).__qualname__]
    for name, child in cell.cells_and_names():
        parts.append(f"{name}:{type(child).__qualname__}:{child.training}:{sorted(child.get_flags().items())}")
        for key, parameter in child.parameters_and_names(expand=False):
            parts.append(f"{key.rsplit('.', 1)[-1]}:{parameter.dtype}{tuple(parameter.shape)}{parameter.requires_grad}")
    return "|".join(parts)


def draws_numbers(cell: nn.Cell) -> bool:
    """Whether `cell` itself is a dropout that drops something."""
    return isinstance(cell, nn.Dropout) and cell.training and cell.p > 0


def _is_recomputed(cell: nn.Cell) -> bool:
    """Whether `cell` or one of its own operators is recomputed in the backward pass."""
    return (cell.get_scope() or "").startswith("recompute_") or any(
        primitive is not None and primitive.attrs.get("recompute") for primitive in cell._primitives.values())


class SharedGraph:
    """Mix-in for a cell that shares its graph with the cells that are like it, unless `shares_graph` is False."""

    no_inline = False
    shares_graph = True

    @property
    def cell_init_args(self) -> str:
        """The key, looked up by MindSpore's parser whenever it meets the cell."""
        key = shared_graph_key(self) if self.shares_graph else None
        if key is None:
            raise AttributeError("cell_init_args: this cell has its own graph")
        return key
