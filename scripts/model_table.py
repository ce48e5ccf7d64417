"""Write the tables of models in docs/models.md from the table of variants, so that the two cannot disagree.

    python scripts/model_table.py           # print it
    python scripts/model_table.py --write   # write it into docs/models.md
    python scripts/model_table.py --check   # exit code 1 if the document is not current

Sizes are exact counts of parameters; cards are arithmetic, not measured. Where values come from is in
scripts/model_sources.yaml, an entry for every model.
"""
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import yaml

from research.telechat.recipe.read import read_recipe
from research.telechat.spec.parameters import parameters
from research.telechat.spec.variants import VARIANTS, Variant
from research.telechat.text.templates import Template, get_template
from scripts import generated

DOCUMENT = ROOT / "docs/models.md"
SOURCES = ROOT / "scripts/model_sources.yaml"
GB = 1e9


def count_parameters(variant: Variant) -> int:
    """Number of parameters of a model."""
    return sum(math.prod(param.shape) for param in parameters(variant))


def cards(recipe: str) -> int:
    """Cards of a recipe's parallel plan."""
    plan = read_recipe(ROOT / "research/telechat" / recipe)["parallel_config"]
    return math.prod(plan[key] for key in ("data_parallel", "model_parallel", "pipeline_stage", "context_parallel"))


def table() -> str:
    """The table as Markdown, one row per variant."""
    rows = ["| model_name | layers / hidden / ffn | heads / kv | vocabulary | parameters | float16, bfloat16 | float32 "
            "| cards: predict | cards: fine-tune |", "|---|---|---|---|---|---|---|---|---|"]
    for name, v in VARIANTS.items():
        count = count_parameters(v)
        rows.append(
            f"| {name} | {v.num_layers} / {v.hidden_size} / {v.intermediate_size} | {v.num_heads} / {v.kv_heads} | "
            f"{v.vocab_size} | {count / 1e9:.2f} billion | {2 * count / GB:.1f} GB | {4 * count / GB:.1f} GB | "
            f"{cards(f'predict_{name}.yaml')} | {cards(f'finetune_{name}.yaml')} |")
    return "\n".join(rows) + "\n\n" + conventions()


def conventions() -> str:
    """The second table: what the weights were trained with and no shape shows, and where it is known from."""
    known = yaml.safe_load(SOURCES.read_text(encoding="utf-8"))
    if list(known) != list(VARIANTS):
        raise ValueError(f"{SOURCES.name} must have an entry for each of {', '.join(VARIANTS)}, in this order")
    rows = ["| model_name | epsilon | theta | trained / base length | chat template, markers | temperature / top_k / "
            "top_p / penalty | from: config | from: template | from: generation |",
            "|---|---|---|---|---|---|---|---|---|"]
    for name, v in VARIANTS.items():
        sources = " | ".join(known[name][key] for key in ("config", "template", "generation"))
        rows.append(
            f"| {name} | {v.rms_norm_eps:g} | {v.theta:g} | {v.training_seqlen} / {v.base_seqlen} | {v.chat_template}, "
            f"{markers(get_template(v.chat_template))} | {v.temperature:g} / {v.top_k} / {v.top_p:g} / "
            f"{v.repetition_penalty:g} | {sources} |")
    return "\n".join(rows)


def markers(template: Template) -> str:
    """The markers of a template, in the order of a conversation."""
    pieces = [template.system, template.user, template.bot, template.think_start, template.text_end or template.end[0]]
    return " ".join(f"`{piece.strip()}`" for piece in pieces if piece)


if __name__ == "__main__":
    sys.exit(generated.run("model_table.py", DOCUMENT, table, "the table of models"))
