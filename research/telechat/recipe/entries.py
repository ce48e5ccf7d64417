"""Keys of the entries of lists in a recipe, the callbacks: a misspelt one is reported before MindSpore is imported.

MindFormers passes them on to the class that `type` names, which may accept any key silently.
"""
import difflib
from typing import Dict, Tuple

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject

LISTS = ("callbacks", "eval_callbacks")
OURS = "TelechatTrainingLog"                     # every other key of it is a mistake
KEYS: Dict[str, Tuple[str, ...]] = {
    "MFLossMonitor": (
        "learning_rate", "per_print_times", "micro_batch_num", "micro_batch_interleave_num", "origin_epochs",
        "dataset_size", "initial_epoch", "initial_step", "global_batch_size", "gradient_accumulation_steps",
        "check_for_nan_in_loss_and_grad", "calculate_per_token_loss", "print_separate_loss"),
    "CheckpointMonitor": (
        "prefix", "directory", "config", "save_checkpoint_steps", "save_checkpoint_seconds", "keep_checkpoint_max",
        "keep_checkpoint_per_n_minutes", "integrated_save", "save_network_params", "save_trainable_params",
        "async_save", "saved_network", "append_info", "enc_key", "enc_mode", "exception_save", "global_batch_size",
        "checkpoint_format", "remove_redundancy", "embedding_size", "embedding_local_norm_threshold",
        "use_checkpoint_health_monitor", "health_ckpts_record_dir", "use_legacy_format", "save_optimizer",
        "keep_every_n_steps", "on_save_error"),
    OURS: ("file_name", "picture", "report", "stop_at_nan", "peak_tflops", "lang", "tracker", "tracker_args"),
}


def check_entries(recipe: JsonObject) -> None:
    """Check the keys of known callbacks.

    Raises ConfigError: a key that looks like a misspelling of one that the class has, or that a class of this plugin
    lacks. Other keys of MindFormers' classes may belong to a newer version, and pass.
    """
    for name in LISTS:
        entries = recipe.get(name)
        for number, entry in enumerate(entries if isinstance(entries, list) else []):
            kind = entry.get("type") if isinstance(entry, dict) else None
            known = KEYS.get(kind) if isinstance(kind, str) else None
            for key in entry if known else ():
                if key == "type" or key in (known or ()):
                    continue
                near = difflib.get_close_matches(str(key), known or (), n=1, cutoff=0.75)
                if near or kind == OURS:
                    raise ConfigError(f"{name}[{number}], {kind}: it has no key {key!r}; " + (
                        f"did you mean {near[0]!r}?" if near else f"its keys are {', '.join(known or ())}"))
