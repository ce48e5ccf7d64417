"""The remainder of a 16-bit parameter to its float32 value, kept in 16 bits: master weights at half the memory.

Of the float32 master w, the parameter is p = w rounded to bfloat16 (or float16), the remainder s = (w - p) times 2^12,
rounded to float16 and limited to its largest number. The next step starts from p + s / 2^12. w - p is exact in float32,
and at most half a step of bfloat16, 2^(e - 8) for 2^e <= |w| < 2^(e + 1), of which float16 keeps eleven bits. Hence

    |p + s / 2^12 - w| <= 2^-20 |w| + 2^-37        for |w| < 2^12

where bfloat16 alone has 2^-9 |w|, and float32 2^-24 |w|. The factor keeps the remainder of weights down to 2^-18 among
float16's normal numbers (the second term is half a step of the others, below 2^-26); without it that would end at 2^-6,
above most weights. Beyond 2^12, where (w - p) 2^12 may exceed 65504, the limit costs accuracy and nothing else. For
float16 parameters, with steps an eighth as long, the bound is 2^-23 |w| + 2^-37.

Rounding p + s / 2^12 to the type of p gives p again, except where w lies so close to half way between two of its
numbers that s is rounded to the middle.
"""
import mindspore.common.dtype as mstype
from mindspore import Parameter, Tensor
from mindspore.common.initializer import initializer
from mindspore.ops import functional as F

from research.telechat.spec.precision import REMAINDER_PREFIX, REMAINDER_SCALE

_LARGEST = 65504.0                         # of float16


def remainder_like(parameter: Parameter, swap: bool = False) -> Parameter:
    """The remainder of `parameter`, zeros in float16, sharded over ranks as its moments are. swap: in the host's
    memory."""
    def zeros() -> Tensor:
        return initializer("zeros", parameter.shape, mstype.float16)
    remainder = Parameter(zeros(), **({"device": "CPU"} if swap else {}))
    remainder.param_info = parameter.param_info.clone()
    if not hasattr(parameter.param_info, "cloned_obj"):
        parameter.param_info.cloned_obj = []
    parameter.param_info.cloned_obj.append(remainder)          # what MindSpore gives the layout of the parameter
    remainder.is_init = False
    remainder.set_data(zeros())
    remainder.name = REMAINDER_PREFIX + parameter.name
    return remainder


def joined(parameter: Tensor, remainder: Tensor) -> Tensor:
    """The float32 value of a parameter; `remainder` counts if it is in float16."""
    if F.dtype(remainder) != mstype.float16:
        return F.cast(parameter, mstype.float32)
    return F.cast(parameter, mstype.float32) + F.cast(remainder, mstype.float32) * (1.0 / REMAINDER_SCALE)


def low_part(master: Tensor, stored: Tensor) -> Tensor:
    """The remainder of `stored`, which is `master` rounded to 16 bits, as float16."""
    scaled = (master - F.cast(stored, mstype.float32)) * REMAINDER_SCALE
    return F.cast(F.maximum(F.minimum(scaled, _LARGEST), -_LARGEST), mstype.float16)
