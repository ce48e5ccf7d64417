"""Which part of a parameter each rank of a distributed checkpoint holds, read from MindSpore's strategy files.

Own arithmetic, independent of MindSpore's transform functions, so that what they make can be checked with it
(scripts/transform_checkpoint.py). Needs protobuf and MindSpore's message classes, but does not import MindSpore.

A strategy says for each parameter how the ranks of a pipeline stage form a matrix (`dev_matrix`), and along which
axis of it each axis of the parameter is sharded (`tensor_map`, counted from the last axis; -1: not). Optimizer
parallelism shards the first axis of a shard again, over ranks that would replicate it.
"""
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union, cast

from research.telechat.checkpoint.integrity import check_files
from research.telechat.common.errors import CheckpointError

_STRATEGY = "pass a ckpt_strategy_rank_N.ckpt, or the folder with all of them (output/strategy of the run)"
Region = Tuple[Tuple[int, int], ...]             # (first, behind the last) of each axis


class Layout(NamedTuple):
    """How one parameter is sharded. ranks: of one pipeline stage."""

    dev_matrix: Tuple[int, ...]
    tensor_map: Tuple[Tuple[int, ...], ...]      # axes of dev_matrix per axis of the parameter; () where not sharded
    optimizer_ranks: int                         # 0: not sharded by optimizer parallelism; -1: over all equal ranks
    stages: Tuple[int, ...]                      # pipeline stages that hold it

    @property
    def ranks(self) -> int:
        """Ranks of a pipeline stage."""
        return _product(self.dev_matrix)


class Strategy(NamedTuple):
    """A whole strategy: of every parameter, for every pipeline stage."""

    layouts: Dict[str, Layout]
    stage_ranks: int
    stages: int

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.stage_ranks * self.stages

    def holders(self, name: str) -> List[int]:
        """Ranks that hold a shard of a parameter."""
        layout = self.layouts[name]
        return [stage * self.stage_ranks + rank for stage in layout.stages for rank in range(self.stage_ranks)]


def _product(values: Iterable[int]) -> int:
    result = 1
    for value in values:
        result *= value
    return result


def _messages() -> ModuleType:
    """MindSpore's protobuf classes for strategies, without importing MindSpore."""
    os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
    if "mindspore" in sys.modules:
        from mindspore.train import node_strategy_pb2
        return cast(ModuleType, node_strategy_pb2)
    spec = importlib.util.find_spec("mindspore")
    folder = Path(next(iter((spec and spec.submodule_search_locations) or ["mindspore"]))) / "train"
    sys.path.insert(0, str(folder))
    try:
        import node_strategy_pb2  # type: ignore[import-not-found]    # in MindSpore's folder
    finally:
        sys.path.remove(str(folder))
    return cast(ModuleType, node_strategy_pb2)


def strategy_files(path: Path) -> List[Path]:
    """The strategy files of a run: `path` itself, or those in the folder `path`. Raises CheckpointError."""
    if path.is_file():
        return [path]
    files = sorted(path.glob("*.ckpt")) if path.is_dir() else []
    if not files:
        raise CheckpointError(f"{path} does not exist, or is a folder without strategy files; {_STRATEGY}")
    return files


def _read(path: Path) -> Any:
    check_files([path], remember=False)
    message = _messages().ParallelStrategyMap()
    try:
        message.ParseFromString(path.read_bytes())
    except Exception as err:                      # protobuf's own error classes differ between its implementations
        raise CheckpointError(f"{path} is not a strategy file ({err}); {_STRATEGY}") from err
    if not message.parallel_layout_item:
        raise CheckpointError(f"{path} describes no parameters; it is empty, or not a strategy file: {_STRATEGY}")
    return message


def read_strategy(path: Path) -> Strategy:
    """The strategy in a file, or merged from those in a folder: one per pipeline stage is enough.

    Raises CheckpointError: no strategy file, a damaged one (by its manifest), ranks that contradict each other, stages
    that are missing.
    """
    found: Dict[str, Layout] = {}
    stages, sizes = set(), set()
    for file in strategy_files(path):
        message = _read(file)
        items = message.parallel_strategy_item
        stage_of_file = items[0].parallel_strategys.stage if items else 0
        for item in message.parallel_layout_item:
            stage, dash, name = item.param_name.partition("-")
            merged = bool(dash) and stage.isdigit()
            number = int(stage) if merged else stage_of_file
            name = name if merged else item.param_name
            layout = _layout(item.parallel_layouts, file, name, number)
            sizes.add(layout.ranks)
            stages.add(number)
            known = found.get(name)
            if known and known[:3] != layout[:3]:
                raise CheckpointError(f"{file}: {name} is sharded as {layout.dev_matrix} {layout.tensor_map}, others "
                                      f"as {known.dev_matrix} {known.tensor_map}; they belong to different runs: "
                                      "keep only those of one run in the folder")
            places = tuple(sorted({*(known.stages if known else ()), number}))
            found[name] = layout._replace(stages=places)
    if len(sizes) > 1:
        raise CheckpointError(f"{path}: pipeline stages have {sorted(sizes)} ranks; the files are of different runs: "
                              "keep only those of one run in the folder")
    if stages != set(range(len(stages))):
        missing = sorted(set(range(max(stages) + 1)) - stages)
        raise CheckpointError(f"{path}: no strategy of pipeline stage {', '.join(map(str, missing))}; put the files of "
                              "all ranks, or of one rank per stage, into one folder")
    return Strategy(found, sizes.pop(), len(stages))


def _layout(message: Any, file: Path, name: str, stage: int) -> Layout:
    matrix = tuple(message.dev_matrix[0].dim) if message.dev_matrix else ()
    if not matrix:
        raise CheckpointError(f"{file}: {name} has no device matrix (pipeline parallelism only); MindSpore "
                              "cannot transform such checkpoints")
    axes: List[Tuple[int, ...]]
    if len(message.tensor_map) > 1:               # written from layouts: one list per axis
        axes = [tuple(axis for axis in entry.dim if axis >= 0) for entry in message.tensor_map if entry.dim]
    else:
        axes = [(axis,) if axis >= 0 else () for axis in (message.tensor_map[0].dim if message.tensor_map else ())]
    return Layout(matrix, tuple(axes), message.opt_weight_shard_size if message.opt_weight_shard_step else 0, (stage,))


def write_strategy(path: Path, layouts: Dict[str, Layout], stage: int = 0) -> None:
    """The strategy file of a pipeline stage, as a run writes it."""
    message = _messages().ParallelStrategyMap()
    message.current_stage = 2
    item = message.parallel_strategy_item.add()
    item.node_name = "MatMul"
    item.parallel_strategys.stage = stage
    for name, layout in layouts.items():
        if stage not in layout.stages:
            continue
        entry = message.parallel_layout_item.add()
        entry.param_name = name
        entry.parallel_layouts.dev_matrix.add().dim.extend(layout.dev_matrix)
        entry.parallel_layouts.tensor_map.add().dim.extend(axes[0] if axes else -1 for axes in layout.tensor_map)
        entry.parallel_layouts.param_split_shape.add()
        entry.parallel_layouts.field = 0
        entry.parallel_layouts.opt_weight_shard_step = layout.dev_matrix[-1] if layout.optimizer_ranks else 0
        entry.parallel_layouts.opt_weight_shard_size = layout.optimizer_ranks
    path.write_bytes(message.SerializeToString())


def _place(rank: int, layout: Layout) -> List[int]:
    """Coordinates of a rank of the stage in dev_matrix."""
    place = []
    for size in reversed(layout.dev_matrix):
        place.append(rank % size)
        rank //= size
    return place[::-1]


def _optimizer_cut(layout: Layout, place: Sequence[int]) -> Tuple[int, int]:
    """(pieces, which of them) of the sharding by optimizer parallelism."""
    if not layout.optimizer_ranks:
        return 1, 0
    used = {len(layout.dev_matrix) - 1 - axis for axes in layout.tensor_map for axis in axes}
    equal = [axis for axis, size in enumerate(layout.dev_matrix) if axis not in used and size > 1]
    left = layout.optimizer_ranks if layout.optimizer_ranks > 0 else _product(layout.dev_matrix[axis] for axis in equal)
    pieces, number = 1, 0
    for axis in reversed(equal):                  # the innermost ranks first
        if left == 1:
            break
        size = min(layout.dev_matrix[axis], left)
        number += (place[axis] % size) * pieces
        pieces *= size
        left //= size
    return pieces, number


def full_shape(layout: Layout, slice_shape: Sequence[int]) -> Tuple[int, ...]:
    """Shape of a parameter from that of one shard of it."""
    shape = []
    for axis, size in enumerate(slice_shape):
        cut = layout.tensor_map[axis] if axis < len(layout.tensor_map) else ()
        pieces = _product(layout.dev_matrix[len(layout.dev_matrix) - 1 - one] for one in cut)
        shape.append(size * pieces)
    if shape:
        shape[0] *= _optimizer_cut(layout, [0] * len(layout.dev_matrix))[0]
    return tuple(shape)


def region(layout: Layout, rank: int, shape: Sequence[int]) -> Region:
    """What a rank (counted within its pipeline stage) holds of a parameter of `shape`.

    Raises ValueError where the shape is not divisible as the layout says.
    """
    place = _place(rank, layout)
    result = []
    for axis, size in enumerate(shape):
        cut = layout.tensor_map[axis] if axis < len(layout.tensor_map) else ()
        pieces, number = 1, 0
        for one in cut:
            device_axis = len(layout.dev_matrix) - 1 - one
            pieces *= layout.dev_matrix[device_axis]
            number = number * layout.dev_matrix[device_axis] + place[device_axis]
        if axis == 0:
            more, inner = _optimizer_cut(layout, place)
            pieces, number = pieces * more, number * more + inner
        if size % pieces:
            raise ValueError(f"{size} elements cannot be split into {pieces} pieces")
        result.append((size // pieces * number, size // pieces * (number + 1)))
    return tuple(result)


def uncut(dimensions: int) -> Layout:
    """The layout of a parameter in a complete checkpoint."""
    return Layout((1,), ((),) * dimensions, 0, (0,))


def newest_files(folder: Path, suffix: Optional[str] = None) -> Dict[int, Path]:
    """The newest checkpoint of each rank: {rank: file}; or {0: file} for a complete checkpoint.

    Newest by the epoch and step in the name (`..-EPOCH_STEP.ckpt`), which MindSpore compares as text, then by name. All
    ranks must have the same. Raises CheckpointError.
    """
    if folder.is_file():
        return {0: folder}
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist; pass a checkpoint, or the folder that holds rank_0, rank_1, "
                              "...")
    suffixes = (suffix,) if suffix else (".ckpt", ".safetensors")

    def order(path: Path) -> Tuple[int, int, str]:
        match = re.search(r"-(\d+)_(\d+)$", path.stem)
        return (int(match.group(1)), int(match.group(2)), path.name) if match else (0, 0, path.name)

    def candidates(place: Path) -> List[Path]:
        return sorted((path for path in place.iterdir() if path.suffix in suffixes), key=order)

    folders: Dict[int, Path] = {}
    for entry in folder.iterdir():
        match = re.fullmatch(r"rank_(\d+)", entry.name)
        if match and entry.is_dir():
            folders[int(match.group(1))] = entry
    if not folders:
        here = candidates(folder)
        if len(here) != 1:
            raise CheckpointError(f"{folder} has no folders rank_N and {len(here)} checkpoints; pass the file")
        return {0: here[0]}
    files, steps = {}, {}
    for rank, place in sorted(folders.items()):
        here = candidates(place)
        if not here:
            raise CheckpointError(f"{place} contains no checkpoint; copy that rank's file there")
        files[rank] = here[-1]
        steps[rank] = order(here[-1])[:2]
    if len(set(steps.values())) > 1:
        told = ", ".join(f"rank {rank} {files[rank].name}" for rank in list(files)[:4])
        raise CheckpointError(f"{folder}: the newest checkpoints of the ranks are from different steps ({told}, ...); "
                              "remove those that not all ranks have")
    if len({path.suffix for path in files.values()}) > 1:
        raise CheckpointError(f"{folder}: some ranks have .ckpt and some .safetensors files; keep one kind")
    return files


Source = Union[Strategy, None]


def layout_of(strategy: Source, name: str, dimensions: int) -> Layout:
    """Layout of a parameter; unsharded where there is no strategy (a complete checkpoint) or it does not name it."""
    if strategy is None or name not in strategy.layouts:
        return uncut(dimensions)
    return strategy.layouts[name]
