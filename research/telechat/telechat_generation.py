"""Generation for TelechatForCausalLM: what MindFormers' generator asks of a model."""
from typing import Any, Optional, Tuple

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor

from research.telechat import telechat_kernels as kernels


class TelechatGenerationMixin:
    """Mixed into TelechatForCausalLM."""

    def generate(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """As MindFormers' `generate`."""
        if self.use_past and not self.config.is_dynamic:
            # MindFormers runs the graph of the first call whatever the batch is; a phase of its own avoids that.
            self._set_network_phase(f"batch{len(input_ids) if np.ndim(input_ids[0]) else 1}")
        return super().generate(input_ids, *args, **kwargs)

    def add_flags_custom(self, is_first_iteration: bool) -> None:
        """Whether the next graph reads prompts (True) or brings one token per sequence. MindFormers calls it."""
        self.add_flags(is_first_iteration=is_first_iteration)
        self.model.step.add_flags(is_first_iteration=is_first_iteration)
        for layer in self.model.layers:
            layer.attention.add_flags(is_first_iteration=is_first_iteration)

    def set_dynamic_inputs(self, **_kwargs: Any) -> None:
        """Compile for prompts and batches of any size. MindFormers calls it where is_dynamic is set."""
        any_2d, any_1d = Tensor(shape=[None, None], dtype=mstype.int32), Tensor(shape=[None], dtype=mstype.int32)
        self.set_inputs(any_2d, None, None, None, None, None, None, any_2d, None, None, any_2d, any_1d)

    def prepare_inputs_for_predict_layout(self, input_ids: np.ndarray, **_kwargs: Any) -> Tuple[Optional[Tensor], ...]:
        """Arguments of `construct` with which MindFormers compiles once to learn how the parameters are cut.

        input_ids: [B, S].
        """
        batch, seq = np.shape(input_ids)
        tokens = Tensor(np.asarray(input_ids), mstype.int32)
        if not self.use_past:
            return (tokens,)
        lengths = Tensor(np.full((1, batch), seq), mstype.int32)
        block_tables = Tensor(np.zeros((batch, -(-seq // self.config.block_size))), mstype.int32)
        slot_mapping = Tensor(np.full(batch * seq, -1), mstype.int32)
        return (tokens, None, None, None, None, None, None, lengths, None, None, block_tables, slot_mapping)

    def prepare_inputs_for_generation(self, input_ids: np.ndarray, **kwargs: Any) -> dict:
        """Arguments of `construct` for one step of MindFormers' generator."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if not self.use_past:            # the length decides the rotary tables, and only the last logits are needed
            inputs["batch_valid_length"] = Tensor(np.asarray(kwargs["valid_length_each_example"])[None], mstype.int32)
        return inputs
