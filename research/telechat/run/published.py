"""What a checkpoint says of its model reaches the model that runs: a recipe's keys against the checkpoint's manifest.

Values that a recipe does not name itself come from the checkpoint, also where the table has others for `net_name`.
Where a recipe names another value the run stops, unless `checkpoint_conflict` says which wins. A checkpoint without a
manifest is computed as the recipe says; where the table has changed since such checkpoints were made, the run asks.
"""
from pathlib import Path
from typing import Container, List, Optional

from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerConfig

from research.telechat.checkpoint.agreement import Disagreement, recipe_wins
from research.telechat.checkpoint.manifest import ModelFacts
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.recipe.fields import FIELDS, RENAMED, ModelSettings
from research.telechat.recipe.settings import resolve, rope_rule
from research.telechat.spec.rope import describe
from research.telechat.spec.variants import GENERATION, changed_since, get_variant, settings_before

MEANING, MEANINGS = "checkpoint_meaning", ("as_published", "as_before")
CONFLICT = "checkpoint_conflict"
# Of model_config: what decides the result and no shape of a tensor shows. The rest is checked against the tensors.
_MODEL = ("num_heads", "n_kv_heads", "rms_norm_eps", "input_mult", "logits_scale", "theta", "extend_method",
          "scaling_factor", "yarn_beta_fast", "yarn_beta_slow", "attention_factor", "training_seqlen", "base_seqlen",
          "rope_base_power", "rope_mscale", "chat_template")
_ROTARY = ("theta", "extend_method", "scaling_factor", "yarn_beta_fast", "yarn_beta_slow", "attention_factor",
           "training_seqlen", "base_seqlen")


def settle(config: MindFormerConfig, facts: Optional[ModelFacts]) -> None:
    """Complete `model.model_config` by what the manifest of the checkpoint to load says, `facts`; the log names values.

    Raises ConfigError: recipe and checkpoint contradict each other and nothing says which wins; a checkpoint without a
    manifest whose model has changed its meaning.
    """
    section = (config.get("model") or {}).get("model_config")
    meaning, conflict = config.get(MEANING), str(config.get(CONFLICT) or "stop")
    if meaning not in (None, "", *MEANINGS):
        raise ConfigError(f"{MEANING}: expected {' or '.join(MEANINGS)}, found {meaning!r}")
    path = Path(str(config.get("load_checkpoint") or ""))
    if not section or not config.get("load_checkpoint") or not path.exists():
        return
    if facts is None:
        _settle_meaning(section, path, meaning)
    else:
        _settle_values(section, path, facts, conflict)


def _settle_meaning(section: JsonObject, path: Path, meaning: Optional[str]) -> None:
    """A checkpoint without manifest may be official, or trained as earlier versions of this plugin did."""
    before = {key: value for key, value in settings_before(str(section.get("net_name") or "")).items()
              if section.get(key) in (None, "")}
    if not before:
        return
    if not meaning:
        now = resolve(_own(section))
        values = ", ".join(f"{key} {getattr(now, key)!r} instead of {value!r}" for key, value in before.items())
        raise ConfigError(f"{path} has no manifest, and earlier versions of this plugin computed "
                          f"{section['net_name']} differently from the published model (now {values}): pass "
                          f"--as_published for official weights, --as_before for weights that were fine-tuned with an "
                          f"earlier version, or set {MEANING} in the recipe to as_published or as_before")
    if meaning == "as_before":
        section.update(before)
        logger.info("As before: %s.", ", ".join(f"{key} {value!r}" for key, value in before.items()))


def _own(section: JsonObject) -> JsonObject:
    return {key: value for key, value in section.items() if key not in ("type", "auto_register", "auto_map")}


def _settle_values(section: JsonObject, path: Path, facts: ModelFacts, conflict: str) -> None:
    now = resolve(_own(section))
    values = published_settings(facts, now)
    named = {RENAMED.get(key, key) for key, value in section.items() if value not in (None, "")}
    found = disagreements(now, values, named)
    net_name = changed_since(facts.name, now.net_name)
    if net_name:
        found.insert(0, Disagreement("net_name", now.net_name, facts.name))
    wins = recipe_wins(found, conflict, path, f"--{CONFLICT}")
    kept = named if wins else set()
    if net_name and not wins:
        section["net_name"] = facts.name
    for key, value in values.items():
        here = getattr(now, key)
        if here == value:
            continue
        if key in kept or (wins and net_name and _differs(str(facts.name), now.net_name, key)):
            logger.warning("model_config.%s is %r, as the recipe says; the checkpoint says %r.", key, here, value)
        elif key in named and not any(one.key == key for one in found):
            continue                                     # settings of generation: the recipe's own word holds
        else:
            logger.info("model_config.%s is %r, as the checkpoint says, not %r.", key, value, here)
            section[key] = value
    _say_rule(resolve(_own(section)), values)


def _differs(before: str, now: str, key: str) -> bool:
    """Whether the table has two values of a key for two models."""
    return bool(getattr(get_variant(before), key, None) != getattr(get_variant(now), key, None))


def published_settings(facts: ModelFacts, now: ModelSettings) -> JsonObject:
    """The keys of `model_config` that a checkpoint's manifest decides.

    The template and the settings of generation of a checkpoint that was converted without a name are those of
    `net_name`, as its config.json does not tell members of the same sizes apart; generation_config.json wins.
    """
    variant = facts.to_variant()
    keys: List[str] = [key for key in _MODEL if hasattr(variant, key)]
    if facts.name or not now.net_name:
        keys += GENERATION
    else:
        keys.remove("chat_template")
    values = {key: getattr(variant, key) for key in keys}
    values["n_kv_heads"] = variant.kv_heads
    for key in (*GENERATION, "eos_token_id"):
        value = (facts.generation or {}).get(key)
        if value is not None and key in FIELDS:
            values[key] = value
    return values


def disagreements(now: ModelSettings, values: JsonObject, named: Container[str]) -> List[Disagreement]:
    """What the recipe itself names (`named`) and the checkpoint says otherwise, but for settings of generation."""
    return [Disagreement(key, getattr(now, key), value) for key, value in values.items()
            if key in named and key not in GENERATION and key != "eos_token_id" and getattr(now, key) != value]


def _say_rule(settings: ModelSettings, values: JsonObject) -> None:
    """Which rotary rule is in force, where the context differs from that of the checkpoint."""
    longer = settings.seq_length > int(values.get("training_seqlen") or settings.seq_length)
    if longer or any(key in values and getattr(settings, key) != values[key] for key in _ROTARY):
        logger.info("Context length differs from the checkpoint's (%s tokens): %s.", values.get("training_seqlen"),
                    describe(rope_rule(settings), settings.seq_length))
