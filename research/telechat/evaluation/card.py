"""The table of the model card: which tasks it needs, what was published, and what differs in method. No model here.

Published figures are China Telecom's, from the READMEs of github.com/Tele-AI/Telechat and github.com/Tele-AI/TeleChat2
(that of 2025-03-14), which does not say how its figures were obtained.
"""
import math
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

from research.telechat.common.files import JsonObject
from research.telechat.common.picture import drawing, save
from research.telechat.common.table import table
from research.telechat.evaluation.report import leaves


class Benchmark(NamedTuple):
    """A row of the card, and how it is measured here."""

    name: str
    task: str                        # of lm-evaluation-harness, or the name of a judged benchmark
    chat_task: str                   # the same with --apply_chat_template
    metric: str
    shots: Optional[int]             # few-shot examples to set; None: the task has its own, or none
    scale: float                     # from the harness's figure to the card's
    judged: bool
    difference: str                  # from how the published figure was obtained


BENCHMARKS = (
    Benchmark("C-Eval", "ceval-valid", "ceval-valid", "acc", 5, 100, False,
              "validation split and log-likelihood of the letters; published: test split, generated answers"),
    Benchmark("MMLU", "mmlu", "mmlu", "acc", 5, 100, False,
              "log-likelihood of the letters; published: generated answers, searched for a letter"),
    Benchmark("CMMLU", "cmmlu", "cmmlu", "acc", 5, 100, False,
              "log-likelihood of the letters; published: by OpenCompass"),
    Benchmark("BBH", "bbh", "bbh", "exact_match", None, 100, False, "3 worked examples in each task"),
    Benchmark("GSM8K", "gsm8k", "gsm8k", "exact_match", 4, 100, False, "last number of the answer"),
    Benchmark("MATH", "minerva_math", "minerva_math", "math_verify", None, 100, False,
              "the 4 worked examples of Minerva; published: exact match from the official script"),
    Benchmark("HumanEval", "humaneval", "humaneval_instruct", "pass@1", None, 100, False, "one greedy answer"),
    Benchmark("MBPP", "mbpp", "mbpp", "pass_at_1", None, 100, False, "3 examples; one greedy answer"),
    Benchmark("IFEval", "ifeval", "ifeval", "prompt_level_strict_acc", None, 100, False,
              "prompts with all instructions followed, strict; published: one of four figures, not stated which"),
    Benchmark("AlignBench", "alignbench", "alignbench", "", None, 1, True, "another judge than GPT-4"),
    Benchmark("MT-bench", "mt_bench", "mt_bench", "", None, 1, True, "another judge than GPT-4"))

# By a part of the recipe's name, the longest match; in the columns, - where nothing was published.
_FIGURES = """
recipe          C-Eval  MMLU  CMMLU  BBH    GSM8K  MATH  HumanEval  MBPP  AlignBench  MT-bench  IFEval
telechat_7b     64.6    60.5  64.3   19.5   36.7   10.3  20.1       -     -           -         -
telechat_12b    66.6    73.3  74.2   52.2   57.2   16.0  22.0       -     -           -         -
telechat2_3b    75      72.9  73     65.99  64.7   -     38         47    5.74        5.72      61.29
telechat2_7b    82      79.6  84.6   77.3   86.8   -     56         62.6  6.96        7.2       73.1
telechat2_35b   85      82    90.18  88.6   91     -     73         75    7.88        8.2       79.63
telechat2_115b  86.9    80.9  89.94  89.04  92.2   -     75         78    8.03        8.89      82.81
"""


def _published() -> Dict[str, Dict[str, float]]:
    (_, *names), *lines = (line.split() for line in _FIGURES.strip().splitlines())
    return {recipe: {name: float(figure) for name, figure in zip(names, figures) if figure != "-"}
            for recipe, *figures in lines}


PUBLISHED = _published()
_OTHERS = ("_v2", "_32k", "_128k")   # of a name: other weights, which the card has no figures for
_FILTERS = ("flexible-extract", "get-answer", "create_test", "extract_code", "none")


class CardRow(NamedTuple):
    """One benchmark: our figure, the published one, and why there is none."""

    benchmark: str
    task: str
    questions: Optional[int]
    shots: Optional[int]
    metric: str
    ours: Optional[float]
    published: Optional[float]
    difference: str
    missing: str                     # why it was not run, "" where it was


def published_for(recipe: str) -> Dict[str, float]:
    """Figures of the model of a recipe by its file's name; empty: none were published."""
    stem = Path(recipe).stem
    if any(part in stem for part in _OTHERS):
        return {}
    fitting = sorted((name for name in PUBLISHED if f"_{name}_" in f"_{stem}_"), key=len)
    return PUBLISHED[fitting[-1]] if fitting else {}


def card_rows(result: JsonObject, judged: Dict[str, JsonObject], chat: bool, published: Dict[str, float],
              missing: Dict[str, str]) -> List[CardRow]:
    """All benchmarks in the order of the card.

    Args:
        result: of the harness; {} where no task was run.
        judged: {name: as `Outcome`} of the benchmarks with a judge.
        chat: tasks were asked as a chat.
        published: of `published_for`.
        missing: {name of the benchmark: why it was not run}.
    """
    rows = []
    for bench in BENCHMARKS:
        task = bench.chat_task if chat else bench.task
        ours, questions, shots = None, None, None
        if task in judged:
            ours, questions = judged[task]["score"], judged[task]["questions"]
        elif task in result.get("results", {}):
            ours = _value(result["results"][task], bench)
            shots = result.get("n-shot", {}).get(task)
            sizes = result.get("n-samples", {})
            questions = sum(sizes[leaf]["effective"] for leaf in leaves(task, result) if leaf in sizes) or None
        rows.append(CardRow(bench.name, task, questions, shots, bench.metric or "rating",
                            ours, published.get(bench.name), bench.difference,
                            "" if ours is not None else missing.get(bench.name, "not run")))
    return rows


def _value(values: JsonObject, bench: Benchmark) -> Optional[float]:
    found = {key.partition(",")[2]: value for key, value in values.items()
             if key.partition(",")[0] == bench.metric and not isinstance(value, str)}
    best = next((found[name] for name in _FILTERS if name in found), next(iter(found.values()), None))
    return None if best is None else float(best) * bench.scale


def card_table(rows: Sequence[CardRow]) -> str:
    """Rows as a text table, followed by what was not run and what differs."""
    cells: List[List[object]] = [["benchmark", "questions", "shots", "metric", "ours", "published"]]
    cells += [[row.benchmark, row.questions, row.shots, row.metric, row.ours,
               None if row.published is None else float(row.published)] for row in rows]
    lines = [table(cells, 2), ""]
    lines += [f"{row.benchmark}: {f'not run: {row.missing}' if row.missing else row.difference}" for row in rows]
    return "\n".join(lines)


def draw_card(rows: Sequence[CardRow], path: Path) -> bool:
    """Our figures and the published ones as a PNG bar chart, ratings times ten; whether there was anything to draw.

    Raises ImportError without matplotlib.
    """
    shown = [row for row in rows if row.ours is not None or row.published is not None][::-1]
    if not shown:
        return False
    with drawing((8, 1.4 + 0.5 * len(shown)), {}) as (figure, _):
        axis = figure.subplots()
        scales = [10 if row.metric == "rating" else 1 for row in shown]
        for shift, label, color, hatch, values in (
                (0.19, "measured here", "#1f5aa6", "", [row.ours for row in shown]),
                (-0.19, "published", "#c9c9c9", "//", [row.published for row in shown])):
            sizes = [math.nan if value is None else value * scale for value, scale in zip(values, scales)]
            bars = axis.barh([place + shift for place in range(len(shown))], sizes, 0.36, label=label, color=color,
                             hatch=hatch, edgecolor="#555555", linewidth=0.5)
            axis.bar_label(bars, labels=["" if value is None else f"{value:.4g}" for value in values], padding=3,
                           fontsize=8)
        axis.set_yticks(range(len(shown)), [row.benchmark + (f" ({row.questions})" if row.questions else "")
                                            for row in shown], fontsize=8)
        axis.set_xlim(0, 108)
        axis.set_xlabel("correct, %; judge ratings times ten")
        axis.legend(fontsize=8, loc="lower right")
        axis.grid(visible=False, axis="y")
        save(figure, path)
    return True
