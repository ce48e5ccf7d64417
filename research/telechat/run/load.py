"""A model and its tokenizer from a predict recipe, ready to generate: for the commands chat and evaluate.

run_mindformer.py leaves this to MindFormers' Trainer; here the model itself is wanted. Nothing is generated.
"""
import logging
from typing import Tuple

import mindspore as ms
import numpy as np
from mindformers.core.context import build_context
from mindformers.tools.logger import get_logger
from mindformers.tools.register import MindFormerConfig
from mindformers.trainer.utils import transform_and_load_checkpoint
from mindspore.nn.utils import no_init_parameters

from research.telechat.bridge.compat import apply_template, prepare_cpu, set_output_path
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.recipe.read import read_recipe, resolve_config
from research.telechat.run.job import prepare_recipe
from research.telechat.run.manifests import check_hashes, settle_with_checkpoint
from research.telechat.run.preflight import check_checkpoint, model_config
from research.telechat.run.prompts import load_tokenizer
from research.telechat.telechat import TelechatForCausalLM
from research.telechat.telechat_config import TelechatConfig
from research.telechat.telechat_tokenizer import TelechatTokenizer


def prepare_prediction(recipe_name: str, overrides: JsonObject, vocab_file: str = ""
                       ) -> Tuple[MindFormerConfig, TelechatTokenizer]:
    """(recipe, tokenizer) of a predict recipe; everything is checked before a model is built.

    Args:
        recipe_name: a path, as --config takes it.
        overrides: {dotted key: value} to set in the recipe.
        vocab_file: vocabulary; '' for that of the recipe.

    Raises:
        ConfigError: recipe, tokenizer or checkpoint missing, broken or not of one model.
    """
    recipe = read_recipe(resolve_config(recipe_name))
    recipe["run_mode"] = "predict"
    config = prepare_recipe(recipe, overrides)
    if not config.load_checkpoint:
        raise ConfigError("no checkpoint given; pass one with --checkpoint_path, or load_checkpoint in the recipe")
    settle_with_checkpoint(config)
    check_checkpoint(config)
    check_hashes(config)
    section = config.processor.tokenizer
    if vocab_file:
        section["tokenizer_file" if "tokenizer_file" in section else "vocab_file"] = vocab_file
    model = model_config(config)
    return config, load_tokenizer(config, model.vocab_size, model.chat_template)


def load_model(config: MindFormerConfig) -> TelechatForCausalLM:
    """The model of a recipe that `prepare_prediction` gave, with its weights, whole or this rank's part."""
    config = apply_template(config)
    set_output_path(config.output_dir)
    build_context(config)
    prepare_cpu()
    section = {key: value for key, value in config.model.model_config.items() if key not in ("type", "auto_register")}
    with no_init_parameters():                               # no random numbers for weights that are loaded anyway
        model = TelechatForCausalLM(TelechatConfig(**section, parallel_config=config.parallel_config))
    model.set_train(False)
    config.checkpoint = MindFormerConfig(load_path=config.load_checkpoint)  # where MindFormers 1.9 looks for it
    cut = ms.get_auto_parallel_context("parallel_mode") in ("semi_auto_parallel", "auto_parallel")
    inputs = None
    if cut:
        size = (model.config.batch_size, model.config.seq_length)
        inputs = model.prepare_inputs_for_predict_layout(np.ones(size, np.int32))
    transform_and_load_checkpoint(config, ms.Model(model), model, inputs, do_predict=True)
    model.init_parameters_data()                             # the cache, which no checkpoint holds
    return model


def quieten(level: int = logging.WARNING) -> None:
    """MindFormers shows warnings only, or from another level; its log files keep everything."""
    for handler in get_logger().handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(level)
