"""Published Ascend figures of TeleChat, and the tokens per second that a share of a card's peak is. Nothing is run.

The figures are those that MindFormers published with its own TeleChat; they were not reproduced here, where there is no
NPU. What is computed from them follows from the official sizes and the usual count of operations.
"""
import math
import sys
from pathlib import Path
from typing import List, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from research.telechat.recipe.read import read_recipe
from research.telechat.spec.flops import CHIPS, flops_per_token
from research.telechat.spec.parameters import parameters
from research.telechat.spec.variants import VARIANTS, Variant

CHIP = "Ascend910B3"
PEAK = CHIPS[CHIP].teraflops * 1e12
SHARES = (0.5, 0.57)
_REPOSITORY = "https://github.com/mindspore-lab/mindformers/blob"
SOURCES = (f"[telechat/telechat.md of MindFormers]({_REPOSITORY}/647d8944fe9067329eaf2337971547618049bd78/"
           "research/telechat/telechat.md) (MindSpore 2.4.0, CANN 8.0.RC3, MindFormers dev; the same table is in the "
           f"later README.md of that folder) and [telechat2/README.md of MindFormers]({_REPOSITORY}/"
           "0ebebf8eb7172830e9de29b63db92aa3b4acae70/research/telechat2/README.md)")


class FineTuning(NamedTuple):
    """Published speed of full fine-tuning."""
    variant: str
    seq_length: int
    tokens_per_second_per_card: float


class Prediction(NamedTuple):
    """Published speed of prediction, all cards together."""
    variant: str
    cards: int
    tokens_per_second: float


FINE_TUNING = (FineTuning("telechat_7b", 2048, 3400), FineTuning("telechat_12b", 1024, 1996),
               FineTuning("telechat_52b", 4096, 364), FineTuning("telechat2_7b", 8192, 2950),
               FineTuning("telechat2_35b", 8192, 516), FineTuning("telechat2_115b", 8192, 158))
PREDICTION = (Prediction("telechat_7b", 1, 67), Prediction("telechat_12b", 1, 40), Prediction("telechat_52b", 4, 32),
              Prediction("telechat2_7b", 1, 54.1), Prediction("telechat2_35b", 2, 27.7),
              Prediction("telechat2_115b", 8, 26.5))


def training_flops(variant: Variant, seq_length: int) -> float:
    """Floating-point operations per token of full fine-tuning, without recomputation (training/report.py)."""
    matrices = sum(math.prod(param.shape) for param in parameters(variant)
                   if len(param.shape) == 2 and "embedding" not in param.ms_name and "lm_head" not in param.ms_name)
    return flops_per_token(matrices + variant.vocab_size * variant.hidden_size, variant.num_layers,
                           variant.hidden_size, seq_length)


def weight_bytes(variant: Variant) -> int:
    """Bytes in 16 bits of the weights that one token reads: all but the embedding's other rows."""
    return 2 * sum(math.prod(param.shape) for param in parameters(variant)
                   if variant.tie_word_embeddings or "embedding" not in param.ms_name)


def recipe_length(name: str) -> int:
    """seq_length of the variant's fine-tuning recipe."""
    recipe = read_recipe(ROOT / "research" / "telechat" / f"finetune_{name}.yaml")
    return recipe["model"]["model_config"]["seq_length"]


def _table(head: List[str], rows: List[List[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def published_section() -> str:
    """The part of docs/benchmarks.md that is not measured, in Markdown."""
    trained = [[each.variant, f"{each.seq_length:,}", f"{each.tokens_per_second_per_card:,.0f}",
                f"{flops / 1e9:.1f}", f"{each.tokens_per_second_per_card * flops / PEAK:.0%}",
                *[f"{share * PEAK / flops:,.0f}" for share in SHARES]]
               for each in FINE_TUNING for flops in [training_flops(VARIANTS[each.variant], each.seq_length)]]
    answered = [[each.variant, str(each.cards), f"{each.tokens_per_second:g}",
                 f"{size / 1e9:.1f}", f"{each.tokens_per_second * size / each.cards / 1e9:,.0f}"]
                for each in PREDICTION for size in [weight_bytes(VARIANTS[each.variant])]]
    goals = [[name, f"{length:,}", f"{flops / 1e9:.1f}", *[f"{share * PEAK / flops:,.0f}" for share in SHARES]]
             for name in VARIANTS for length in [recipe_length(name)]
             for flops in [training_flops(VARIANTS[name], length)]]
    shares = [f"tokens/s per card at {share:.0%}" for share in SHARES]
    return f"""## Published figures and goals on Ascend (nothing here was measured by this project)

Sources: {SOURCES}, tables of model performance on Atlas 800T A2. The figures are of MindFormers' own implementations
of that time, not of this plugin, and were not reproduced. MFU is the share of {PEAK / 1e12:.0f} TFLOP/s, the published
dense 16-bit peak of {CHIP}; it is assumed that the published figures come from this chip. Operations per token are 6
for each weight of the matrices, and 12 x layers x hidden size x length for attention; recomputation does not
count.

### Fine-tuning, published

{_table(["model", "length", "tokens/s per card, published", "GFLOP per token", "MFU of it", *shares], trained)}

### Prediction, published

The last column is what reading all weights in 16 bits for each token would take, if one sequence was answered at a
time, which the source does not say.

{_table(["model", "cards", "tokens/s, published", "GB of weights", "GB/s per card"], answered)}

### What 50 % and 57 % MFU are, at the length of each fine-tuning recipe

{_table(["model", "length", "GFLOP per token", *shares], goals)}
"""


if __name__ == "__main__":
    print(published_section())
