"""How many sequences a step has and in which parts it is computed, whatever the device and the kind of parallelism.

The loss is that of model/loss.py however a batch is split; here the recipe's keys become those that make it so.
"""
from pathlib import Path
from typing import Optional

import numpy as np
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerConfig

from research.telechat.common.environment import workers
from research.telechat.common.errors import ConfigError
from research.telechat.data.meta import data_files

_STEPS = ("MFTrainOneStepCell", "TelechatTrainOneStepCell", "MFPipelineWithLossScaleCell")
_SEMI_AUTO = (1, "1", "semi_auto_parallel", 2, "2", "auto_parallel")


def by_plan(config: MindFormerConfig) -> bool:
    """Whether MindSpore shards the step over the cards by parallel_config (semi-automatic parallelism)."""
    return bool(config.get("use_parallel")) and (config.get("parallel") or {}).get("parallel_mode", 1) in _SEMI_AUTO


def data_ranks(config: MindFormerConfig) -> int:
    """Ranks that read different sequences."""
    if by_plan(config):
        return (config.get("parallel_config") or {}).get("data_parallel", 1)
    return worker_count(config)


def worker_count(config: MindFormerConfig) -> int:
    """Processes of the job."""
    return workers() if config.get("use_parallel") else 1


def settle_batches(config: MindFormerConfig) -> None:
    """Turn the recipe's keys of a training into those with which every token of a step weighs the same, in place.

    - Sum and number of tokens are what all cells pass on (calculate_per_token_loss).
    - Accumulation with a pipeline, which MindFormers leaves out: more micro-batches.
    - Accumulation on a CPU, which MindFormers leaves out: training/accumulation.py.

    Raises:
        ConfigError: a number of parts that is not positive or not possible, or an unknown training step.
    """
    if config.get("run_mode") not in ("train", "finetune"):
        return
    runner, plan = config.get("runner_config") or {}, config.get("parallel_config") or {}
    wrapper = config.get("runner_wrapper")
    if (config.get("parallel") or {}).get("gradients_mean"):
        logger.warning("parallel.gradients_mean is set to False: gradients are summed, then divided by the number of "
                       "tokens of all ranks.")
        config.parallel["gradients_mean"] = False
    if config.get("calculate_per_token_loss") is False:
        logger.warning("calculate_per_token_loss is set to True: all tokens of a step are weighted equally.")
    config.calculate_per_token_loss = True
    kind = wrapper.get("type") if wrapper else None
    if kind not in _STEPS:
        raise ConfigError(f"runner_wrapper.type: expected {', '.join(_STEPS[:2])}, found {kind}; others would average "
                          "per-part means instead of tokens")
    wrapper["calculate_per_token_loss"] = True
    if kind == "MFTrainOneStepCell":
        wrapper["type"] = "TelechatTrainOneStepCell"
    steps = _whole(runner.get("gradient_accumulation_steps"), "runner_config.gradient_accumulation_steps")
    interleave = _whole(config.get("micro_batch_interleave_num"), "micro_batch_interleave_num")
    if interleave > 1 and not by_plan(config) and runner.get("batch_size", 1) % interleave:
        raise ConfigError(f"micro_batch_interleave_num is {interleave}, which does not divide runner_config.batch_size "
                          f"({runner.get('batch_size', 1)}); choose a divisor, or 1")
    if by_plan(config) and plan.get("seq_split_num", 1) > 1:
        raise ConfigError(f"parallel_config.seq_split_num is {plan['seq_split_num']}: MindFormers cannot weight tokens "
                          "equally in a pipeline over sequence parts; set it to 1")
    if steps == 1:
        return
    if by_plan(config):
        if plan.get("pipeline_stage", 1) > 1:
            plan["micro_batch_num"] = plan.get("micro_batch_num", 1) * steps
            runner["gradient_accumulation_steps"] = 1
            logger.warning("runner_config.gradient_accumulation_steps is %d: a pipeline accumulates over its "
                           "micro-batches, parallel_config.micro_batch_num is now %d.", steps, plan["micro_batch_num"])
        return
    if (config.get("context") or {}).get("device_target") != "CPU":
        raise ConfigError(f"runner_config.gradient_accumulation_steps is {steps}: on Ascend, accumulation needs "
                          "use_parallel: True and parallel.parallel_mode: 1; set both, or raise "
                          "runner_config.batch_size instead")
    runner["batch_size"] = runner.get("batch_size", 1) * steps
    runner["gradient_accumulation_steps"] = 1
    wrapper["accumulation_steps"] = steps
    logger.info("runner_config.gradient_accumulation_steps: a step takes %d sequences per process, in %d parts.",
                runner["batch_size"], steps)


def _whole(value: object, key: str) -> int:
    """A positive whole number; None is 1."""
    if value is None:
        return 1
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key}: expected a positive whole number, found {value!r}")
    return value


def sequences_per_step(config: MindFormerConfig) -> int:
    """Sequences of one step over all cards."""
    runner, plan = config.get("runner_config") or {}, config.get("parallel_config") or {}
    each = runner.get("batch_size", 1) * data_ranks(config)
    if not by_plan(config):
        return each
    parts = (plan.get("micro_batch_num", 1) if plan.get("pipeline_stage", 1) > 1
             else runner.get("gradient_accumulation_steps") or 1)
    return each * parts * (config.get("micro_batch_interleave_num") or 1)


def shared_out(config: MindFormerConfig) -> bool:
    """Whether ranks read a share of the data each, instead of all of it."""
    return not by_plan(config) or not (config.get("parallel") or {}).get("full_batch", True)


def steps_per_epoch(config: MindFormerConfig, records: int, most: Optional[int] = None) -> int:
    """Steps that `records` records last for, of which `most` are to be read.

    Where ranks have a share each, all read as many records as the one with most, and at most their share of `most`.
    """
    ranks, sequences = data_ranks(config), sequences_per_step(config)
    if not shared_out(config):
        return min(records, most or records) // sequences
    share = -(-records // ranks)
    return min(share, most // ranks if most else share) // (sequences // ranks)


def pad_evaluation(config: MindFormerConfig) -> None:
    """Let ranks that share the evaluation set read each record once, in place.

    MindSpore gives all ranks the same number of records and repeats some of them; here it is given records in which no
    label counts instead.
    """
    section = config.get("eval_dataset") or {}
    loader, ranks = section.get("data_loader") or {}, data_ranks(config)
    paths = loader.get("dataset_dir") or loader.get("dataset_files")
    if ranks == 1 or loader.get("type") != "MindDataset" or not paths or not shared_out(config):
        return
    from mindspore.dataset import MindDataset
    files = [str(file) for path in (paths if isinstance(paths, (list, tuple)) else [paths])
             for file in data_files(Path(path))]
    columns = list(section.get("input_columns") or ["input_ids", "labels"])
    data = MindDataset(files, columns_list=columns, shuffle=False)
    missing = -data.get_dataset_size() % ranks
    if missing:
        record = next(data.create_dict_iterator(num_epochs=1, output_numpy=True))
        ignored = config.model.model_config.get("ignore_token_id", -100)
        record["labels"] = np.full_like(record["labels"], ignored)
        loader["padded_sample"], loader["num_padded"] = record, missing
