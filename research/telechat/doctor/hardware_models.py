"""A small model on the device: logits, loss and gradients as in training, and a greedy answer through the cache."""
from typing import Dict, Tuple

import mindspore as ms
import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn

from research.telechat.doctor.device import ModelJob, ModelRun
from research.telechat.doctor.small_models import to_mindspore
from research.telechat.telechat import TelechatForCausalLM
from research.telechat.telechat_config import TelechatConfig

_CONTEXT = 64                                # tokens


def build(job: ModelJob, **keys: object) -> TelechatForCausalLM:
    """The model with the job's weights."""
    config = TelechatConfig.from_hf_config(job.config, **{"seq_length": _CONTEXT, **job.keys, **keys})
    model = TelechatForCausalLM(config)
    values = to_mindspore(job.config, job.weights)
    for parameter in model.get_parameters():
        if parameter.name in values:
            parameter.set_data(Tensor(values.pop(parameter.name), parameter.dtype))
    if values:
        raise ValueError(f"the model does not have the parameters {', '.join(sorted(values)[:3])}")
    return model


class _Training(nn.Cell):
    """(loss, logits) of a model in training."""

    def __init__(self, model: TelechatForCausalLM):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, ids: Tensor, labels: Tensor) -> Tuple[Tensor, Tensor]:
        tokens, targets, _ = self.model.shifted(ids, labels, None)
        hidden = self.model.model(tokens)
        total, count = self.model.loss_of(hidden, targets)
        logits = self.model.to_tokens(self.model.logits(hidden), tokens.shape[0], tokens.shape[1])
        return (total / count).reshape(()), logits


def run_model(job: ModelJob) -> ModelRun:
    """Run the job."""
    model = build(job)
    model.set_train()
    trained = model.trainable_params()
    step = ms.value_and_grad(_Training(model), None, trained, has_aux=True)
    (loss, logits), gradients = step(Tensor(job.ids), Tensor(job.labels))
    found: Dict[str, np.ndarray] = {parameter.name: gradient.astype(mstype.float32).asnumpy()
                                    for parameter, gradient in zip(trained, gradients)}
    if not job.new:
        return ModelRun(logits.asnumpy(), float(loss.asnumpy()), found, [])
    answering = build(job, use_past=True, is_dynamic=True, batch_size=1, block_size=16, num_blocks=8)
    answering.set_train(False)
    answering.init_parameters_data()
    answer = answering.generate([job.prompt], do_sample=False, max_new_tokens=job.new, eos_token_id=[-1])[0]
    tokens = np.asarray(answer).tolist()[len(job.prompt):]
    return ModelRun(logits.asnumpy(), float(loss.asnumpy()), found, [int(token) for token in tokens])
