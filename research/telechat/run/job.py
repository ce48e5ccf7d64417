"""From a recipe and its overrides to a running Trainer: what run_mindformer.py does once its arguments are read.

Sets the recipe's keys, adapts it to the device, checks what can be checked before anything is built, and starts
MindFormers' Trainer. It computes nothing itself.
"""
import contextlib
import os
from pathlib import Path
from typing import List, Optional, Tuple

from mindformers.core.context import build_context
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerConfig
from mindformers.tools.utils import get_real_rank
from mindformers.trainer import Trainer

from research.telechat import telechat, telechat_config, telechat_tokenizer, telechat_tokenizer_fast
from research.telechat.bridge.compat import apply_template, prepare_cpu, set_output_path
from research.telechat.common.environment import cores, workers, writes
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.common.lock import output_lock
from research.telechat.recipe import master_weights
from research.telechat.recipe.legacy import translate
from research.telechat.recipe.read import set_key
from research.telechat.run.batches import pad_evaluation, settle_batches
from research.telechat.run.manifests import check_hashes, settle_with_checkpoint
from research.telechat.run.preflight import (
    check_bfloat16,
    check_checkpoint,
    check_dataset,
    check_ring_attention,
    model_config,
)
from research.telechat.run.prompts import (
    check_length,
    first_answers,
    load_tokenizer,
    print_answers,
    read_texts,
    to_prompts,
    visible,
    write_results,
)
from research.telechat.run.resources import check_resources
from research.telechat.run.training_setup import prepare_training, total_steps
from research.telechat.telechat_tokenizer import TelechatTokenizer
from research.telechat.training import log, optimizer, perplexity, saving, step

# Classes that MindFormers must not copy and execute once more: importing their modules has registered them.
_REGISTERED = {cls.__name__ for cls in (telechat.TelechatForCausalLM, telechat_config.TelechatConfig,
                                        telechat_tokenizer.TelechatTokenizer,
                                        telechat_tokenizer_fast.TelechatTokenizerFast,
                                        step.TelechatTrainOneStepCell, log.TelechatTrainingLog,
                                        optimizer.TelechatAdamW, perplexity.PerplexityMetric,
                                        saving.TelechatCheckpointMonitor)}

def complete_recipe(recipe: JsonObject, overrides: JsonObject) -> MindFormerConfig:
    """The recipe with `overrides`, {dotted key: value}, applied. Raises ConfigError."""
    config = MindFormerConfig(**recipe)
    for key, value in overrides.items():
        set_key(config, key, value)
    if config.run_mode not in ("train", "finetune", "eval", "predict"):
        raise ConfigError(f"run_mode: expected train, finetune, eval or predict, found {config.run_mode!r}; "
                          "set it in the recipe or with --run_mode")
    return config


def forget_auto_register(config: MindFormerConfig) -> None:
    """Remove `auto_register` of classes that are registered already, so that nothing is copied and executed twice."""
    if isinstance(config, dict):
        reference = config.get("auto_register")
        if isinstance(reference, str) and reference.rsplit(".", 1)[-1] in _REGISTERED:
            config.pop("auto_register")
        for value in config.values():
            forget_auto_register(value)
    elif isinstance(config, list):
        for value in config:
            forget_auto_register(value)


def translate_old_keys(config: MindFormerConfig) -> None:
    """Today's keys for those of earlier TeleChat recipes; the log says what has changed."""
    for line in translate(config):
        logger.info("%s.", line)


def adapt_to_cpu(config: MindFormerConfig) -> None:
    """Settings that only an Ascend has give way to those of a CPU; a plan that needs several cards is refused."""
    if config.context.device_target != "CPU":
        return
    plan = config.get("parallel_config") or {}
    for key in ("model_parallel", "pipeline_stage", "context_parallel"):
        if plan.get(key, 1) > 1:
            raise ConfigError(f"parallel_config.{key} is {plan[key]}: a CPU runs data parallelism only; set it to 1 "
                              "or run on Ascend")
    if config.use_parallel and workers() == 1:
        logger.info("use_parallel is set, but there is a single process; running without communication.")
        config.use_parallel = False
    plan["data_parallel"] = workers() if config.use_parallel else 1
    parallel = config.setdefault("parallel", MindFormerConfig())
    parallel.update(parallel_mode=0, full_batch=False, gradients_mean=False, enable_parallel_optimizer=False)
    config.context.pop("jit_config", None)
    if config.get("runner_config"):
        config.runner_config.sink_mode = False
    optimizer = config.get("optimizer")
    if optimizer and optimizer.type == "AdamW" and not optimizer.get("use_fused"):
        optimizer.type = "TelechatAdamW"


def limit_readers(config: MindFormerConfig) -> None:
    """No more threads that read data than there are cores: MindSpore refuses more."""
    most = cores()
    for name in ("train_dataset", "eval_dataset"):
        section = config.get(name) or {}
        if int(section.get("num_parallel_workers") or 1) > most:
            logger.info("%s.num_parallel_workers is %s, but there are %d cores: using %d.", name,
                        section["num_parallel_workers"], most, most)
            section["num_parallel_workers"] = most


def detect_checkpoint_format(config: MindFormerConfig) -> None:
    """Set `load_ckpt_format` from what --load_checkpoint names, as MindFormers does not look itself."""
    if not config.load_checkpoint:
        return
    path = Path(str(config.load_checkpoint))
    if path.suffix in (".ckpt", ".safetensors"):
        config.load_ckpt_format = path.suffix[1:]
    elif path.is_dir():
        for suffix in ("ckpt", "safetensors"):
            if next(path.rglob(f"*.{suffix}"), None) is not None:
                config.load_ckpt_format = suffix
                break


def prepare_recipe(recipe: JsonObject, overrides: JsonObject) -> MindFormerConfig:
    """The recipe with `overrides` applied, today's keys, and the settings of the device. Raises ConfigError."""
    config = complete_recipe(recipe, overrides)
    translate_old_keys(config)
    for line in master_weights.apply(config):
        logger.info("%s.", line)
    forget_auto_register(config)
    adapt_to_cpu(config)
    settle_batches(config)
    detect_checkpoint_format(config)
    return config


def read_prompts(config: MindFormerConfig, predict_data: Optional[List[str]], raw: bool
                 ) -> Tuple[TelechatTokenizer, List[str]]:
    """(tokenizer, prompts) of a prediction, checked against the model. Raises ConfigError."""
    model = model_config(config)
    tokenizer = load_tokenizer(config, model.vocab_size, model.chat_template)
    prompts = to_prompts(read_texts(predict_data or config.get("input_data")), tokenizer, raw, model.chat_template)
    check_length(prompts, tokenizer, model.seq_length)
    return tokenizer, prompts


def predict(config: MindFormerConfig, tokenizer: TelechatTokenizer, prompts: List[str]) -> None:
    """Answer the prompts; the answers are printed and lie in text_generation_result.txt in the output folder."""
    config.save_file = os.path.join(config.output_dir, "text_generation_result.txt")
    batch = config.get("predict_batch_size") or 1
    filled = prompts + prompts[-1:] * (-len(prompts) % batch)      # MindFormers takes whole batches only
    results = Trainer(config, tokenizer=tokenizer).predict(
        predict_checkpoint=config.load_checkpoint, input_data=filled, batch_size=config.get("predict_batch_size"),
        adapter_id=config.get("adapter_id"))
    if len(filled) > len(prompts):
        results = first_answers(results, len(prompts))
        write_results(config.save_file, results)
    if get_real_rank() == 0:
        print_answers(prompts, results, visible(prompts, tokenizer))


def run(recipe: JsonObject, overrides: JsonObject, register_path: Optional[str] = None,
        predict_data: Optional[List[str]] = None, raw: bool = False) -> None:
    """Carry out `recipe`.

    Args:
        recipe: what read_recipe gives.
        overrides: {dotted key: value}, set in it first.
        register_path: folder of the plugin, for MindFormers.
        predict_data: prompts, or files with one per line; default: `input_data` of the recipe.
        raw: leave prompts as they are instead of writing them as the model's template demands.

    Raises:
        ConfigError: anything about recipe, checkpoint or data that can be detected before the model is built; another
            training writes into the same output folder.
    """
    config = prepare_recipe(recipe, overrides)
    with contextlib.ExitStack() as stack:
        if config.run_mode in ("train", "finetune") and writes():
            stack.enter_context(output_lock(Path(str(config.output_dir)), folder=True))
        _carry_out(config, register_path, predict_data, raw)


def _carry_out(config: MindFormerConfig, register_path: Optional[str], predict_data: Optional[List[str]], raw: bool
               ) -> None:
    """`run`, once the recipe is complete and the output folder is ours."""
    limit_readers(config)
    training = config.run_mode in ("train", "finetune")
    base = settle_with_checkpoint(config)
    if training:
        check_dataset(config, "train_dataset")
        if config.get("do_eval"):
            check_dataset(config, "eval_dataset")
        if not prepare_training(config, base):
            return
        check_resources(config, total_steps(config))
    if config.load_checkpoint and not config.get("resume_training"):
        check_checkpoint(config)
    if config.run_mode == "eval":
        check_dataset(config, "eval_dataset")
    if config.run_mode == "predict":
        tokenizer, prompts = read_prompts(config, predict_data, raw)
    check_hashes(config)
    os.environ["RUN_MODE"] = config.run_mode         # MindFormers reads it; one left over from elsewhere would win
    if register_path:
        os.environ["REGISTER_PATH"] = os.path.abspath(register_path)
    master_weights.hand_over(config)
    config = apply_template(config)
    if config.run_mode == "eval" or (training and config.get("do_eval")):
        pad_evaluation(config)
    set_output_path(config.output_dir)
    build_context(config)
    prepare_cpu()
    check_bfloat16(config)
    if training:
        check_ring_attention(config)
        Trainer(config).train()
    elif config.run_mode == "eval":
        Trainer(config).evaluate(eval_checkpoint=config.load_checkpoint)
    else:
        predict(config, tokenizer, prompts)
