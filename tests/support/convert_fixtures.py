"""The commands of the conversion, run in this process, and what they leave."""
import numpy as np
from checkpoint_fixtures import Raw

from research.telechat.checkpoint.reader import open_ckpt
from research.telechat.commands.convert import mindspore_to_torch, torch_to_mindspore


def to_ms(source, target, *options):
    """Run the forward command in this process; its exit code."""
    return torch_to_mindspore(["--torch_path", str(source), "--mindspore_path", str(target), *map(str, options)])


def to_torch(source, target, *options):
    """Run the backward command in this process; its exit code."""
    return mindspore_to_torch(["--mindspore_path", str(source), "--torch_path", str(target), *map(str, options)])


def read_ckpt(path):
    """A .ckpt file by this project's reader (that MindSpore agrees is tested below)."""
    checkpoint = open_ckpt(path)
    result = {}
    for name, info in checkpoint.tensors.items():
        data = bytearray(info.nbytes)
        checkpoint.read_into(name, 0, memoryview(data))
        result[name] = Raw(info.dtype, np.frombuffer(data, np.uint32 if info.dtype == "F32" else np.uint16)
                           .reshape(info.shape))
    checkpoint.close()
    return result


def error_of(capfd, code):
    """The one error line of a failed command."""
    err = capfd.readouterr().err
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]
