"""What the simulated compilation leaves out because the graph of the rank does not depend on it.

MindSpore parses and infers the layers of all pipeline stages on every rank, and drops those of other stages when it
splits the graph. Here they are placeholders with the stage, the dtypes and the sharding of the layers that they replace
at their ends. MindSpore also fills a rank's parameters with random numbers once its graph is compiled; nothing reads
them here.
"""
import mindspore as ms
from mindspore import Tensor, nn
from mindspore.common import initializer
from mindspore.communication import get_group_size, get_rank

from research.telechat.telechat import TelechatModel
from research.telechat.telechat_config import TelechatConfig

_CONSTANTS = (initializer.Constant, initializer.One, initializer.Zero)


class OtherStageLayer(nn.Cell):
    """A decoder layer of another pipeline stage, reduced to its second norm and sum.

    Without any parameter, a virtual stage of an interleaved pipeline does not compile.
    """

    def __init__(self, layer: nn.Cell):
        super().__init__()
        self.ffn_norm, self.add, self.cast = layer.ffn_norm, layer.add, layer.cast
        self.res_dtype, self.out_dtype = layer.res_dtype, layer.out_dtype
        self.pipeline_stage = layer.pipeline_stage
        if hasattr(layer, "_pipeline_segment"):
            self.pipeline_segment = layer.pipeline_segment

    def construct(self, x: Tensor, *_others: object) -> Tensor:
        """x: rows [B S, H] -> as x; the other arguments are those of a decoder layer."""
        x = self.cast(x, self.res_dtype)
        return self.cast(self.add(x, self.cast(self.ffn_norm(x), self.res_dtype)), self.out_dtype)


def leave_out_other_stages() -> None:
    """Models that this process builds from now on have the decoder layers of this rank's stage only."""
    build = TelechatModel.__init__

    def build_own_stage(model: TelechatModel, config: TelechatConfig) -> None:
        build(model, config)
        stages = ms.get_auto_parallel_context("pipeline_stages")
        if stages > 1:
            own = get_rank() * stages // get_group_size()            # ranks count stages first
            for number, layer in enumerate(model.layers):
                if layer.pipeline_stage != own:
                    model.layers[number] = OtherStageLayer(layer)

    TelechatModel.__init__ = build_own_stage  # type: ignore[method-assign, assignment]  # replaced on purpose


def leave_out_random_numbers() -> None:
    """Parameters keep the memory that they are given: no random number is drawn, and no page is touched."""
    fill = initializer.Initializer.__call__

    def fill_constants(chosen: initializer.Initializer, values: object) -> object:
        return fill(chosen, values) if isinstance(chosen, _CONSTANTS) else values

    initializer.Initializer.__call__ = fill_constants
