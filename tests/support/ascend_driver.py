"""Ascend's device without one: what `telechat doctor` compiles is compiled by the simulated runtime and executed by the
interpreter. A process of its own: `prepared.run([this file, RESULT], ascend=True)` writes the findings to RESULT.
"""
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from mindspore import Tensor, nn
from mindspore import dtype as mstype

from research.telechat.ascend_sim.runtime import mindspore_folder
from research.telechat.doctor import attention_checks, cache_checks, hardware, kernel_checks
from research.telechat.doctor.checks import examine
from research.telechat.interpret import attention
from research.telechat.interpret.collectives import run
from research.telechat.interpret.ir import read_program
from research.telechat.interpret.operators import OPERATORS
from research.telechat.interpret.rank import Rank

SIZES = attention_checks.Sizes(seq=40, long=96, dim=32)
RNG = np.random.default_rng(0)


def to_array(x):
    """A Tensor's value; of bfloat16 as float32. No operator runs for it: there is no device."""
    if isinstance(x, Tensor) and x.dtype == mstype.bfloat16:
        return (np.frombuffer(x.get_bytes(), np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(x.shape)
    x = x.asnumpy() if isinstance(x, Tensor) else x
    return x.astype(np.float32) if getattr(x, "dtype", None) == np.float16 else x


def to_input(x):
    """A graph's input, numbers in float64."""
    x = to_array(x)
    return x.astype(np.float64) if getattr(x, "dtype", None) == np.float32 else x


def to_tensors(value):
    """Results as a graph returns them; numbers in float32, so that nobody asks the device to convert them."""
    if isinstance(value, tuple):
        return tuple(map(to_tensors, value))
    value = np.asarray(value)
    return Tensor(value.astype(np.float32) if value.dtype.kind == "f" else value)


class Executor:
    """MindSpore's own in everything, but that compiled graphs are interpreted.

    flag: what the kernels' overflow flags say; operators: with those that draw, and those that ask for the flags;
    cells: whose parameters graphs may use.
    """

    def __init__(self, real):
        self._real, self.flag, self.executed, self.cells = real, False, set(), []
        self.operators = {
            **OPERATORS, **attention.operators(empty_band=True), "DropoutGenMask": self._bits, "Dropout": self._dropout,
            "NPUAllocFloatStatus": lambda node: np.zeros(8), "NPUClearFloatStatus": self._clear,
            "NPUGetFloatStatus": self._ask, "NPUClearFloatStatusV2": self._clear, "NPUGetFloatStatusV2": self._ask}

    def __getattr__(self, name):
        return getattr(self._real, name)

    def _bits(self, node, shape, keep):
        bits = RNG.random(int(np.prod(shape))) < float(keep)
        return np.packbits(bits, bitorder="little")

    def _dropout(self, node, x, keep, *_seeds):
        kept = RNG.random(x.shape) < keep
        return x * kept / keep, kept

    def _clear(self, node, status):
        self.flag = False
        return np.zeros_like(status)

    def _ask(self, node, status):
        return np.full_like(status, float(self.flag))

    def _watch(self, node, result):
        if node.op in ("Mul", "Muls", "Add", "MatMul", "Square", "Sub") and not np.isfinite(result).all():
            self.flag = True

    def __call__(self, args, phase, compiler=None):
        """A graph's result. compiler: what has compiled it."""
        with tempfile.TemporaryDirectory(prefix="telechat-doctor-") as folder:
            path = Path(folder, "graph.mindir")
            path.write_bytes((compiler or self._real).get_func_graph_proto(phase, "mind_ir", False))
            program = read_program(path, mindspore_folder())
        parameters = {one.name: one for cell in self.cells for one in cell.get_parameters()}
        box = {}
        rank = Rank(0, 1, program, {one.name: to_array(parameters[one.name]) for one in program.parameters.values()},
                    box, operators=self.operators, watch=self._watch)
        result = run({0: rank.run([to_input(x) for x in args][:len(program.inputs)])}, box)[0]
        for name, value in rank.named().items():
            parameters[name].set_data(Tensor(value.astype(np.float32), parameters[name].dtype))
        self.executed |= rank.executed.keys()
        return to_tensors(result)


def simulate():
    """Put the interpreter in the device's place; returns it."""
    from mindspore.graph import api
    executor = Executor(api._cell_graph_executor._graph_executor)
    api._cell_graph_executor._graph_executor = executor

    def call(self, *args, **keys):
        args = args if self.obj is None else args[1:]
        phase = self.compile(self.fn.__name__, *args, **keys)
        return executor(self._generate_run_args(args, keys, self.sequence_modified), phase, self._graph_executor)
    api._JitExecutor.__call__ = call
    fill = hardware._fill

    def filled(cell, keys, values):
        executor.cells = [cell]
        fill(cell, keys, values)
    hardware._fill, hardware.to_array = filled, to_array
    dense = nn.Dense.__init__

    def made_dense(self, *args, **keys):
        dense(self, *args, **keys)
        executor.cells = [self]
    nn.Dense.__init__ = made_dense
    return executor


def main():
    """Every check of a kernel, of attention and of the cache."""
    executor = simulate()
    device = hardware.Hardware()
    assert device.fused
    checks = [*kernel_checks.checks(device.dtypes), *attention_checks.checks(device.dtypes, SIZES),
              *cache_checks.checks(device.dtypes, SIZES.dim)]
    wanted = sys.argv[2:]
    findings = [examine(check, device)._asdict() for check in checks
                if not wanted or any(word in check.name for word in wanted)]
    executor.operators.update(attention.operators())                    # a band as documented
    band = examine(next(check for check in checks if check.name.endswith("zero-width band")), device)
    result = {"findings": findings, "executed": sorted(executor.executed), "band": band._asdict()}
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
