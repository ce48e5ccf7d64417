"""Write the table of models in docs/models.md from the table of variants, so that the two cannot disagree.

    python scripts/model_table.py            # rewrite the table in docs/models.md
    python scripts/model_table.py --print    # only show it

A test compares the document with the output. Sizes are exact counts of parameters; cards are arithmetic, not measured.
"""
import argparse
import math
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import yaml

from research.telechat.telechat_variants import VARIANTS, Variant
from research.telechat.telechat_weights import parameters

DOCUMENT = ROOT / "docs/models.md"
BEGIN, END = "<!-- table: scripts/model_table.py -->", "<!-- end of table -->"
GB = 1e9


def count_parameters(variant: Variant) -> int:
    """Number of parameters of a model."""
    return sum(math.prod(param.shape) for param in parameters(variant))


def cards(recipe: str) -> int:
    """Cards of a recipe's parallel plan."""
    plan = (yaml.safe_load((ROOT / "research/telechat" / recipe).read_text(encoding="utf-8")) or {}).get(
        "parallel_config", {})
    return math.prod(plan.get(key, 1) for key in ("data_parallel", "model_parallel", "pipeline_stage",
                                                  "context_parallel"))


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
    return "\n".join(rows)


def with_table(text: str) -> str:
    """`text` with the part between the marks replaced by the current table."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    """Rewrite or print the table."""
    parser = argparse.ArgumentParser(description="Write the table of models in docs/models.md.")
    parser.add_argument("--print", action="store_true", help="show the table, write nothing")
    if parser.parse_args().print:
        print(table())
        return 0
    beside = DOCUMENT.with_suffix(".part")
    beside.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    os.replace(beside, DOCUMENT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
