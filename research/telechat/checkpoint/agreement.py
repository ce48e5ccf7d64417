"""Where a recipe, or options, and the manifest of a checkpoint say different things of one model, and which wins.

Compared is what changes the computation and no shape shows: epsilon, rotary base and lengths, factors, heads. Silence
would run the model in another way than its weights were trained, with plausible and wrong answers.
"""
from dataclasses import fields
from pathlib import Path
from typing import List, NamedTuple, Sequence

from research.telechat.common.errors import ConfigError
from research.telechat.spec.variants import Variant

CONFLICT = ("stop", "recipe", "checkpoint")                # which one wins; stop: neither, the run ends
# Found in the shapes of tensors or in the vocabulary, names only, or a matter of each answer.
_NOT_COMPARED = {"num_layers", "hidden_size", "intermediate_size", "vocab_size", "hf_layout", "hf_module",
                 "bos_token_id", "eos_token_id", "pad_token_id", "user_token_id", "bot_token_id",
                 "do_sample", "temperature", "top_k", "top_p", "repetition_penalty"}


class Disagreement(NamedTuple):
    """A key of `model_config` with the value of the recipe and that of the checkpoint."""

    key: str
    recipe: object
    checkpoint: object


def disagreements_of(recipe: Variant, checkpoint: Variant, only: Sequence[str] = ()) -> List[Disagreement]:
    """What the two say differently. only: the keys to compare, where not all are known; (): all."""
    found = []
    for entry in fields(Variant):
        key = entry.name
        if key in _NOT_COMPARED or (only and key not in only):
            continue
        ours, theirs = getattr(recipe, key), getattr(checkpoint, key)
        if key == "n_kv_heads":
            ours, theirs = recipe.kv_heads, checkpoint.kv_heads
        if ours != theirs and not (key == "chat_template" and "" in (ours, theirs)):     # '': detected
            found.append(Disagreement(key, ours, theirs))
    return found


def recipe_wins(found: Sequence[Disagreement], wish: str, checkpoint: Path, option: str) -> bool:
    """Whether they differ and the recipe decides.

    Raises ConfigError: they differ and neither wins.
    """
    if wish not in CONFLICT:
        raise ConfigError(f"{option}: expected {', '.join(CONFLICT)}, found {wish!r}")
    if found and wish == "stop":
        told = "; ".join(f"{one.key} is {one.recipe!r} here and {one.checkpoint!r} in the checkpoint" for one in found)
        raise ConfigError(f"{checkpoint}: {told}; correct the recipe or the option, or let one of them win: "
                          f"{option} checkpoint (as the weights were trained) or {option} recipe")
    return bool(found) and wish == "recipe"
