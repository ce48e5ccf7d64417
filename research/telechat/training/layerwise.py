"""The training step layer by layer, with one set of graphs for all layers that are alike: for deep models on a CPU.

A graph of the whole step grows with the layers, and so do the wait for its compilation and what it keeps for the
backward pass. Here Python calls a graph for what precedes the layers, one for a layer, one for its gradients (it
recomputes the layer, so that only the layer's input is kept; Chen et al., 2016), one for what follows the layers,
and one for the update of a layer. The graphs of a layer belong to a stand-in, whose parameters take each layer's
storage in turn. The arithmetic is that of the whole graph; rounding differs (in float32 where squares of gradients are
added, in 16 bits more).

Which steps can be done like this says `obstacle`; whether they are, training/step.py. This file and layerwise_graphs.py
are all of it: without them a 64-layer model needs half a minute before its first step on a CPU instead of five seconds,
and the rest of the plugin would not change.
"""
import copy
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import mindspore as ms
from mindformers.tools.logger import logger
from mindspore import Parameter, Tensor, nn

from research.telechat.common.errors import ConfigError
from research.telechat.model.dropout import CountedDropout
from research.telechat.model.graph_sharing import draws_numbers, signature
from research.telechat.training.layerwise_graphs import (
    EmbeddingGradient,
    Gradient,
    LayerForward,
    LossGradient,
    Rates,
    Squares,
    Stem,
    Tail,
    Verdict,
)
from research.telechat.training.optimizer import AdamWPart, TelechatAdamW

DEEP = 8                                               # layers; deeper models go layer by layer
_WRAPPERS = ("DataOrderWrapperCell", "PetModel", "LoraModel")          # MindFormers' cells that pass inputs on
_COLUMNS = ["input_ids", "labels", "input_position"]   # what the model calls its first inputs
_OPTIONS = ("local_norm", "use_grouped_lr", "use_graceful_exit", "if_dump", "dump_device_local_norm",
            "print_separate_loss")                     # of MindFormers' training step


def inner_model(network: nn.Cell) -> nn.Cell:
    """The model inside of MindFormers' wrappers for adapters and for columns by name."""
    while type(network).__name__ in _WRAPPERS:
        network = network.network
    return network


def obstacle(step: nn.Cell, inputs: Sequence[Tensor]) -> Optional[str]:
    """Why `step`, a TelechatTrainOneStepCell, cannot go layer by layer with `inputs`; None where it can."""
    model, optimizer = inner_model(step.network), step.optimizer
    if not step.cpu:
        return "only a CPU trains layer by layer"
    if ms.get_auto_parallel_context("parallel_mode") != "stand_alone":
        return "several processes train together"
    if step.accumulation is not None:
        return "gradients are accumulated"
    if not hasattr(model, "shifted"):
        return f"{type(model).__name__} is around the model"
    if not isinstance(optimizer, TelechatAdamW) or not optimizer.fused or optimizer.dynamic_weight_decay:
        return "the optimizer is not AdamW on float32 parameters with one learning rate and a constant weight decay"
    options = [name for name in _OPTIONS if getattr(step, name, False)]
    if options:
        return f"{', '.join(options)} is set"
    columns = list(getattr(step.network, "construct_args_key", None) or _COLUMNS)[:len(inputs)]
    if columns != _COLUMNS[:len(inputs)] or len(inputs) > len(_COLUMNS):
        return f"the data set has {len(inputs)} columns, {columns}; expected those of {_COLUMNS}, in this order"
    if any(draws_numbers(cell) and not isinstance(cell, CountedDropout) for _, cell in model.cells_and_names()):
        return "a dropout draws from a generator"
    if {id(p) for p in model.trainable_params()} != {id(p) for p in optimizer._parameters}:
        return "the optimizer trains other parameters than the model has"
    return None


def goes_by_layer(step: nn.Cell, inputs: Sequence[Tensor]) -> bool:
    """Whether `step` is to go layer by layer: as `train_layer_by_layer` says, else where the model is deep.

    Raises:
        ConfigError: it is asked for and cannot be.
    """
    model = next((cell for _, cell in step.network.cells_and_names() if hasattr(cell, "shifted")), None)
    if model is None:
        return False
    wanted, layers = model.config.train_layer_by_layer, model.config.num_layers
    if wanted is False or (wanted is None and layers <= DEEP):
        return False
    found = obstacle(step, inputs)
    if found and wanted:
        raise ConfigError(f"model_config.train_layer_by_layer is True, but {found}; leave the key out")
    if found:
        logger.info("The %d layers are compiled as a whole: %s.", layers, found)
        return False
    logger.info("Training goes layer by layer: short compilation, little memory, and each layer is computed once more "
                "in the backward pass. For a long training, model_config.train_layer_by_layer: False has faster steps.")
    return True


class State(NamedTuple):
    """What the optimizer has for one parameter."""

    mean: Parameter
    square: Parameter
    decay: float


class Part:
    """Parameters that are trained together: those of a layer, or all that are in no layer."""

    def __init__(self, trained: Sequence[Parameter], states: Dict[int, State]):
        self.trained = list(trained)
        self.states = [states[id(parameter)] for parameter in trained]
        self.gradients: Tuple[Tensor, ...] = ()

    def update_graph(self, trained: Sequence[Parameter], moments: Sequence[Parameter]) -> Optional[AdamWPart]:
        """The graph that updates `trained` with `moments`, as many as here; None where nothing is trained."""
        if not trained:
            return None
        count = len(trained)
        return AdamWPart(trained, moments[:count], moments[count:], [state.decay for state in self.states])

    @property
    def moments(self) -> List[Parameter]:
        """The optimizer's means, then its squares."""
        return [state.mean for state in self.states] + [state.square for state in self.states]


class Layer(Part):
    """A layer, and everything that the graphs of its stand-in read or write."""

    def __init__(self, cell: nn.Cell, states: Dict[int, State]):
        super().__init__(cell.trainable_params(), states)
        self.cell = cell
        self.stand_in: StandIn     # shared by the caller among identical layers
        keys = [dropout.key_tensor() for dropout in dropouts(cell)]
        self.storage = [*cell.get_parameters(), *keys, *self.moments]

    def kind(self) -> str:
        """Layers of one kind have one stand-in."""
        return f"{signature(self.cell)}|{[state.decay for state in self.states]}|{[d.p for d in dropouts(self.cell)]}"


def dropouts(cell: nn.Cell) -> List[CountedDropout]:
    """The dropouts below `cell` that drop something, in their order."""
    return [child for _, child in cell.cells_and_names() if isinstance(child, CountedDropout) and draws_numbers(child)]


class StandIn:
    """A copy of a layer with the graphs for all that are like it."""

    def __init__(self, layer: Layer, count: Parameter):
        memo = {id(count): count}                       # dropout reads the optimizer's own counter
        for _, child in layer.cell.cells_and_names():   # what recomputes in PyNative mode cannot be copied, nor need be
            wrapper = getattr(child, "_recompute_cell", None)
            if wrapper is not None:
                memo[id(wrapper)] = None
        cell = copy.deepcopy(layer.cell, memo)
        keys = [dropout.key_as_parameter() for dropout in dropouts(cell)]
        moments = copy.deepcopy(layer.moments)
        trained = cell.trainable_params()
        self.storage = [*cell.get_parameters(), *keys, *moments]
        self.forward = LayerForward(cell).set_train()
        self.gradient = Gradient(self.forward, trained).set_train()
        self.update = layer.update_graph(trained, moments)

    def become(self, layer: Layer) -> None:
        """Compute with the parameters of `layer` from now on."""
        for mine, its in zip(self.storage, layer.storage):
            mine.assign_value(its)


class LayerByLayer:
    """One training step after the other; `step` is a TelechatTrainOneStepCell without an `obstacle`."""

    def __init__(self, step: nn.Cell):
        model, optimizer = inner_model(step.network), step.optimizer
        decays = optimizer.weight_decay if optimizer.is_group else [optimizer.weight_decay] * len(optimizer._parameters)
        states = {id(parameter): State(mean, square, float(decay)) for parameter, mean, square, decay in
                  zip(optimizer._parameters, optimizer.exp_avg, optimizer.exp_avg_sq, decays)}
        self.layers = [Layer(cell, states) for cell in model.model.layers]
        kinds: Dict[str, StandIn] = {}
        for layer in self.layers:
            kind = layer.kind()
            if kind not in kinds:
                kinds[kind] = StandIn(layer, optimizer.global_step)
            layer.stand_in = kinds[kind]
        self.kinds = len(kinds)
        embedding = model.model.tok_embeddings
        self.embedded = embedding.trainable_params()
        inside = {id(parameter) for layer in self.layers for parameter in layer.trained}
        self.rest = Part([p for p in optimizer._parameters if id(p) not in inside], states)
        self.tail_trained = [*(self.embedded if model.tied else model.lm_head.trainable_params()),
                             *model.model.norm_out.trainable_params()]
        self.stem = Stem(model).set_train()
        self.tail = LossGradient(Tail(model), self.tail_trained).set_train()
        self.embedding = EmbeddingGradient(embedding, self.embedded) if self.embedded else None
        self.squares = {scaled: Squares(scaled) for scaled in (False, True)}
        self.verdict, self.rates = Verdict(step), Rates(optimizer)
        self.update_rest = self.rest.update_graph(self.rest.trained, self.rest.moments)
        self.torn = False                              # whether a step has been taken in part
        self.scale_sense, self.clips = step.scale_sense, step.use_clip_grad
        self.norm_limit = step.global_norm_spike_threshold if step.use_skip_data_by_global_norm else None

    def __call__(self, *inputs: Tensor) -> Tuple[Tensor, ...]:
        """As MindFormers' training step: loss, overflow, the next loss scale, learning rate, norm."""
        if self.torn:
            raise RuntimeError("the last step was interrupted while it changed the weights: some layers have taken it, "
                               "others not; load the last checkpoint (--resume_training True) into a new process")
        factor_of_loss = self.scale_sense.asnumpy().item()
        scale = Tensor(factor_of_loss, ms.float32)
        loss = self.differentiate(scale, *inputs)
        parts = [part for part in (*self.layers, self.rest) if part.trained]
        squares = self.squares[factor_of_loss != 1]
        overflow, norm, factor, rate = self.verdict(scale, *(squares(scale, *part.gradients) for part in parts))
        spike = self.norm_limit is not None and not float(norm.asnumpy()[0]) < self.norm_limit
        if not bool(overflow.asnumpy()) and not spike:
            self.update(factor)
        for part in parts:
            part.gradients = ()
        next_scale = Tensor(self.scale_sense.asnumpy())
        return loss, overflow, next_scale, rate, norm if self.clips else None

    def differentiate(self, scale: Tensor, *inputs: Tensor) -> Tensor:
        """The loss; each part gets its gradients times `scale`."""
        batch, length = inputs[0].shape
        tokens, targets, x, *others = self.stem(*inputs)
        others.append((batch, length - 1))
        entering = []                                  # what each layer was given, [B N, H]
        for layer in self.layers:
            entering.append(x)
            layer.stand_in.become(layer)
            x = layer.stand_in.forward(x, *others)
        loss, of_x, of_tail = self.tail(scale, x, targets)
        for layer in reversed(self.layers):
            layer.stand_in.become(layer)
            of_x, layer.gradients = layer.stand_in.gradient(of_x, entering.pop(), *others)
        gradients = {id(parameter): gradient for parameter, gradient in zip(self.tail_trained, of_tail)}
        if self.embedding is not None:
            for parameter, gradient in zip(self.embedded, self.embedding(tokens, of_x)):
                tied = gradients.get(id(parameter))
                gradients[id(parameter)] = gradient if tied is None else gradient + tied
        self.rest.gradients = tuple(gradients[id(parameter)] for parameter in self.rest.trained)
        return loss

    def update(self, factor: Tensor) -> None:
        """Take the step with all gradients times `factor`."""
        self.torn = True                               # until all of it is done
        rates = self.rates()
        for layer in self.layers:
            if layer.stand_in.update is not None:
                layer.stand_in.become(layer)
                layer.stand_in.update(factor, *rates, *layer.gradients)
        if self.update_rest is not None:
            self.update_rest(factor, *rates, *self.rest.gradients)
        self.torn = False
