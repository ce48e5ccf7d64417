"""Recipes for tests of plans: the small model that the communication figures are given for, with any plan."""
import copy
from pathlib import Path

from research.telechat.recipe.read import read_recipe

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"num_layers": 2, "hidden_size": 512, "num_heads": 8, "intermediate_size": 1536, "vocab_size": 4096,
         "seq_length": 512, "tie_word_embeddings": True, "compute_dtype": "float16", "param_init_type": "float16"}


def small_recipe(dp=1, mp=1, pp=1, cp=1, model=None, base="finetune", **sections):
    """A complete recipe: 2 layers, hidden 512, 8 heads, feed-forward 1536, vocabulary 4096, 512 tokens, batch 4.

    model: more keys of model_config; sections: more keys of the sections of the recipe.
    """
    recipe = copy.deepcopy(read_recipe(ROOT / f"configs/telechat/{base}.yaml"))
    recipe["use_parallel"] = dp * mp * pp * cp > 1
    recipe["trainer"]["model_name"] = "telechat_small"
    recipe["model"]["model_config"].update(SMALL, **(model or {}))
    recipe["parallel_config"].update(data_parallel=dp, model_parallel=mp, pipeline_stage=pp, context_parallel=cp)
    if base == "finetune":
        recipe["optimizer"]["master_weights"] = "remainder"
    for name, keys in sections.items():
        recipe[name] = {**recipe.get(name, {}), **keys} if isinstance(keys, dict) else keys
    return recipe
