"""The operators of the library as primitives of MindSpore.

Each wraps one C++ function (MindSpore's `Custom` of type aot): `Name` computes, `NameInferShape` beside it gives the
shapes of the outputs, also of sizes that are not known when a graph is compiled.
"""
from typing import Callable, Optional, Sequence

import mindspore.common.dtype as mstype
from mindformers.tools.logger import logger
from mindspore import ops
from mindspore.ops import signature as sig

from research.telechat.common.printable import printable
from research.telechat.native.build import SWITCH, library

_told = False


def available() -> bool:
    """Whether there are operators; the first call compiles them and logs the outcome once."""
    global _told
    found = library()
    if not _told:
        _told = True
        if found.path is None:
            logger.info("No fused CPU operators: %s. MindSpore's own are used, which are slower.",
                        printable(found.reason or ""))
        elif found.seconds:
            logger.info("Compiled the fused CPU operators in %.0f s, once for this machine; %s=0 does without them.",
                        found.seconds, SWITCH)
    return found.path is not None


class _Operator(ops.Custom):
    """A Custom that can be copied; MindSpore's cannot."""

    def __deepcopy__(self, memo: object) -> "_Operator":
        return self


def operator(name: str, inputs: Sequence[str], outputs: Sequence[mstype.Type],
             bprop: Optional[Callable] = None, writes: Sequence[str] = ()) -> ops.Custom:
    """The primitive of a C++ function.

    name: the function; inputs: their names, all tensors; outputs: their types, one tensor, or a tuple of several;
    bprop: as of any Custom, (inputs..., output, its gradient) -> gradients of the inputs; writes: the inputs that it
    changes, which must be parameters. RuntimeError without a library.
    """
    path = library().path
    if path is None:
        raise RuntimeError(f"operator {name}: {library().reason}")
    described = ops.CustomRegOp(f"telechat_{name}")
    for number, each in enumerate(inputs):
        described = described.input(number, each)
    for number in range(len(outputs)):
        described = described.output(number, f"out{number}")
    anything = [ops.DataType.None_None] * (len(inputs) + len(outputs))
    described = described.dtype_format(*anything).target("CPU").get_op_info()
    types = outputs[0] if len(outputs) == 1 else tuple(outputs)
    reading = sig.sig_rw.RW_READ
    signature = tuple(sig.make_sig(each, sig.sig_rw.RW_WRITE if each in writes else reading) for each in inputs)
    kind = type("NativeOperator", (_Operator,), {"__mindspore_signature__": signature} if writes else {})
    made = kind(f"{path}:{name}", None, lambda *_: types, "aot", bprop=bprop, reg_info=described)
    if writes:
        made.add_prim_attr("side_effect_mem", True)
    return made
