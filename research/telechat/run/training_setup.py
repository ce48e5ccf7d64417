"""What happens between the recipe and the Trainer when training: adapters, resumption, and what callbacks must know.

Called by run/job.py before anything is built; every error is a ConfigError.
"""
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Optional, Tuple

from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerConfig

from research.telechat.checkpoint.lora import check_pet_config, target_params
from research.telechat.checkpoint.manifest import ModelFacts, find_manifest
from research.telechat.checkpoint.masters import precision_note
from research.telechat.checkpoint.resume import Choice, Name, choose, fault_of, parse, sequences_of, step_of
from research.telechat.common.environment import rank
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.recipe.settings import dtype_name
from research.telechat.run.batches import sequences_per_step, steps_per_epoch, worker_count
from research.telechat.run.manifests import facts_of_run, settle_with_checkpoint
from research.telechat.run.preflight import model_config, training_files, training_records
from research.telechat.spec.flops import flops_per_token

_TRUE = (True, "True", "true")
_COUNTED = {"sequences_per_step": "sequences per step", "records": "records", "steps_per_epoch": "steps per epoch"}


def prepare_training(config: MindFormerConfig, base: Optional[ModelFacts] = None) -> bool:
    """Check `pet_config`, choose the checkpoint to resume from, and complete the callbacks of `config` in place.

    base: what the manifest of the checkpoint that the recipe names says of its model.
    False: the chosen checkpoint is the end of the training, so that there is nothing to do.
    """
    pet_config = (config.get("model") or {}).get("model_config", {}).get("pet_config")
    if pet_config:
        for warning in check_pet_config(pet_config, model_config(config).to_variant()):
            logger.warning("%s", warning)
    recipe = json.loads(json.dumps(config.to_dict(), default=str))
    chosen, step = prepare_resume(config)
    if chosen is not None:
        base = settle_with_checkpoint(config) or base
        if not pet_config:
            _note_precision(config, chosen)
        step = continued_step(config, _chosen_file(config, chosen), step)
    if chosen is not None and step >= total_steps(config) > 0:
        logger.info("resume_training: training is already complete: the checkpoint has step %d of %d. Raise "
                    "runner_config.epochs to continue.", step, total_steps(config))
        return False
    for callback in config.get("callbacks") or []:
        if callback.get("type") == "CheckpointMonitor":
            complete_monitor(callback, config, pet_config, chosen, facts_of_run(config, base))
        elif callback.get("type") == "TelechatTrainingLog":
            callback["run_info"] = MindFormerConfig(**run_info(config, recipe, step))
    return True


def _chosen_file(config: MindFormerConfig, chosen: Name) -> Path:
    """The file of rank 0 that is resumed from."""
    given = Path(str(config.load_checkpoint))
    return given if given.is_file() else given / "rank_0" / chosen.file(0)


def counts_of_run(config: MindFormerConfig) -> JsonObject:
    """What the steps of this training are counted by, as manifests keep it."""
    records = training_records(config)
    most = config.train_dataset.data_loader.get("num_samples") if records else None
    return {"sequences_per_step": sequences_per_step(config), "records": records,
            "steps_per_epoch": steps_per_epoch(config, records, most) if records else None}


def continued_step(config: MindFormerConfig, file: Path, step: int) -> int:
    """The position of this run if it resumes from `file`, saved at `step`: as many sequences further, in steps of its
    own size, as MindFormers counts too. A line says so where the settings that decide it have changed.

    Raises ConfigError: this run has no step left, though not all of its epochs have been seen.
    """
    old, now = sequences_of(file), counts_of_run(config)
    here = step if not old else int(step * (old / now["sequences_per_step"]))
    manifest = find_manifest(file)
    before = (manifest.training or {}) if manifest else {}
    changed = [f"{name} {before[key]} then, {now[key]} now" for key, name in _COUNTED.items()
               if before.get(key) and now[key] and before[key] != now[key]]
    if old and old != now["sequences_per_step"] and "sequences_per_step" not in before:
        changed.append(f"sequences per step {old} then, {now['sequences_per_step']} now")
    if not changed:
        return here
    exact = not old or step * old % now["sequences_per_step"] == 0
    told = (f"{file} was saved by a run that counted steps differently ({', '.join(changed)}): its step "
            f"{step} is step {here} of this run's {total_steps(config)}"
            + ("" if exact else ", rounded down, so some records are seen twice"))
    per_epoch = before.get("steps_per_epoch")
    epochs = int((config.get("runner_config") or {}).get("epochs", 1))
    if here >= total_steps(config) > 0 and per_epoch and step < per_epoch * epochs:
        raise ConfigError(f"resume_training: {told}, and only {step / per_epoch:.3g} of {epochs} epochs have been seen"
                          "; continue with the settings it was saved with, or start a new training from its weights "
                          "(omit --resume_training and pass it with --load_checkpoint)")
    logger.warning("resume_training: %s.", told)
    return here


def _note_precision(config: MindFormerConfig, chosen: Name) -> None:
    """Log if the checkpoint to resume from has another precision than this run."""
    note = precision_note(_chosen_file(config, chosen),
                          dtype_name(model_config(config).param_init_type),
                          (config.get("optimizer") or {}).get("master_weights") == "remainder")
    if note:
        logger.warning("resume_training: %s.", note)


def total_steps(config: MindFormerConfig) -> int:
    """Steps of the whole training; 0 where the number of records is not known."""
    records = training_records(config)
    if not records:
        return 0
    steps = steps_per_epoch(config, records, config.train_dataset.data_loader.get("num_samples"))
    return steps * int((config.get("runner_config") or {}).get("epochs", 1))


def prepare_resume(config: MindFormerConfig) -> Tuple[Optional[Name], int]:
    """Turn `resume_training` into the file that MindFormers loads; (its name, its step), or (None, 0).

    True: the newest complete checkpoint in load_checkpoint, where that has folders rank_N, else in
    output_dir/checkpoint; without one, training starts from the beginning. A file name, or a training checkpoint as
    load_checkpoint: that one.
    """
    wish = config.get("resume_training")
    if not wish:
        return None, 0
    given = Path(str(config.get("load_checkpoint") or ""))
    if config.get("load_checkpoint") and given.is_file() and wish in _TRUE and fault_of(given) is None:
        if parse(given.name) is None or not re.fullmatch(r"rank_\d+", given.parent.name):
            raise ConfigError("resume_training: MindFormers resumes from a folder that contains rank_0, found the file "
                              f"{given}; put it in FOLDER/rank_0 under its original name, such as "
                              "telechat_rank_0-2_100.ckpt, and pass --load_checkpoint FOLDER")
        given, wish = given.parent.parent, given.name     # a training checkpoint: resume from this very file
    has_ranks = bool(config.get("load_checkpoint")) and (given / "rank_0").is_dir()
    root = given if has_ranks else Path(str(config.output_dir)) / "checkpoint"
    ranks = worker_count(config)
    choice = choose(root, ranks) if wish in _TRUE else _named(root, str(wish), ranks)
    for note in choice.notes:
        logger.warning("resume_training: %s", note)
    if choice.name is None:
        if has_ranks:
            raise ConfigError(f"resume_training: {root} contains no complete checkpoint"
                              + (f" ({choice.notes[0]})" if choice.notes else "")
                              + "; pass another --load_checkpoint, or omit --resume_training")
        logger.info("resume_training: there is no complete checkpoint in %s; training starts from the beginning.", root)
        config.resume_training = False
        return None, 0
    logger.info("resume_training: continuing from %s, %s complete checkpoint (step %d).",
                root / "rank_0" / choice.name.file(0), "the newest" if wish in _TRUE else "the named", choice.step)
    config.load_checkpoint = str(root.resolve())
    config.resume_training = choice.name.file(0)
    config.load_ckpt_format = choice.name.suffix
    return choice.name, choice.step


def _named(root: Path, wish: str, ranks: int) -> Choice:
    """The checkpoint that the user names, with or without its suffix, by any rank's file."""
    names = [wish] if re.search(r"\.(ckpt|safetensors)$", wish) else [f"{wish}.ckpt", f"{wish}.safetensors"]
    for file_name in names:
        parsed = parse(file_name)
        if parsed and (root / "rank_0" / parsed[0].file(0)).is_file():
            for one in range(ranks):
                fault = fault_of(root / f"rank_{one}" / parsed[0].file(one))
                if fault:
                    raise ConfigError(f"resume_training: {fault}")
            return Choice(parsed[0], step_of(root / "rank_0" / parsed[0].file(0)), [])
    raise ConfigError(f"resume_training: there is no checkpoint {wish} in {root / 'rank_0'}; pass True for the newest, "
                      "or the name of a file there, such as telechat_rank_0-2_100.ckpt")


def complete_monitor(callback: JsonObject, config: MindFormerConfig, pet_config: MindFormerConfig,
                     chosen: Optional[Name], facts: Optional[ModelFacts] = None) -> None:
    """What training/saving.py needs in addition to MindFormers' own arguments."""
    if callback.get("on_save_error", "stop") not in ("stop", "continue"):
        raise ConfigError(f"callbacks: CheckpointMonitor.on_save_error must be stop or continue, found "
                          f"{callback['on_save_error']!r}")
    for key, least in (("keep_checkpoint_max", 1), ("keep_every_n_steps", 0)):
        value = callback.get(key, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"callbacks: CheckpointMonitor.{key} must be a whole number of at least {least}, found "
                              f"{value!r}")
    wish = callback.get("async_save", False)
    if wish not in (True, False, "thread", "process"):
        raise ConfigError(f"callbacks: CheckpointMonitor.async_save must be True or False, found {wish!r}")
    if wish == "process":
        logger.warning("callbacks: CheckpointMonitor.async_save: a thread writes the checkpoints instead of a process, "
                       "because forking next to MindSpore's threads can deadlock.")
    callback["async_save"] = bool(wish)
    callback["ranks"] = worker_count(config)
    callback["manifest"] = {"model": asdict(facts) if facts else None, "training": counts_of_run(config)}
    if pet_config:
        callback["adapter_config"] = MindFormerConfig(
            peft_type="LORA", r=pet_config.get("lora_rank", 8), lora_alpha=pet_config.get("lora_alpha", 16),
            target_modules=pet_config.target_modules, net_name=config.model.model_config.get("net_name"))
    if chosen is not None:
        callback["continue_run"] = chosen.stem(rank() if callback["ranks"] > 1 else 0)


def run_info(config: MindFormerConfig, recipe: JsonObject, first_step: int) -> JsonObject:
    """What the training log needs: sizes of a step, floating-point operations, data, recipe."""
    model, cards = model_config(config), worker_count(config)
    weights = sum(param.shape[0] * param.shape[1] for param in target_params(model.to_variant()))
    weights += model.vocab_size * model.hidden_size                                # the head, tied or not
    frozen = bool(config.model.model_config.get("pet_config"))
    monitor = config.get("monitor_config") or {}
    limit = monitor.get("global_norm_spike_threshold", 3.0) if config.get("use_skip_data_by_global_norm") else None
    return {"tokens_per_step_per_card": sequences_per_step(config) * model.seq_length / cards, "cards": cards,
            "flops_per_token": flops_per_token(weights, model.num_layers, model.hidden_size, model.seq_length, frozen),
            "seed": config.get("seed"), "first_step": first_step, "norm_limit": limit,
            "data_files": training_files(config), "recipe": recipe}
