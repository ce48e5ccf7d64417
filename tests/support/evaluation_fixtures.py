"""What the tests of evaluation share: small tasks, data as it is published, log-likelihoods from logits."""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from model_fixtures import logits_of

from research.telechat.commands import evaluate

RECIPE = Path(__file__).resolve().parents[2] / "research/telechat/predict_telechat_tiny_cpu.yaml"
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None,
                                   reason="lm-evaluation-harness is not installed (pip install -e '.[evaluation]')")


def expected(logits, ids, count):
    """(log-likelihood, greedy) of the last `count` of `ids`; logits [S, V] of all of them but the last."""
    logits = logits.astype(np.float64)
    chosen = range(len(ids) - count - 1, len(ids) - 1)
    value = sum(logits[at, ids[at + 1]] - logits[at].max() - np.log(np.exp(logits[at] - logits[at].max()).sum())
                for at in chosen)
    return value, all(logits[at].argmax() == ids[at + 1] for at in chosen)


def direct_logits(model, ids):
    """Logits [S, V] of `ids` from the model itself; padded, so that one graph is compiled. Its rotary rule does not
    depend on the length."""
    padded = np.full((1, model.config.seq_length), 3)
    padded[0, :len(ids)] = ids
    return logits_of(model, padded)[0, :len(ids)]


PUBLISHED = ["ceval-valid_computer_network", "cmmlu_agronomy", "mmlu_anatomy", "gsm8k",
             "bbh_cot_fewshot_boolean_expressions"]


def write_published(folder, solved=2):
    """Made-up questions for PUBLISHED, in files as these data sets are published; `solved` ones for each."""
    lines = ["0,你是谁,人,狗,猫,鸟,A\n", "1,今天天气,好,坏,冷,热,B\n"]
    rows, examples = "".join(lines), "".join((lines * solved)[:solved])
    choices = [{"question": "Which?", "subject": "anatomy", "choices": ["fox", "dog", "sea", "end"], "answer": 2}] * 2
    files = {
        "ceval-exam/dev/computer_network_dev.csv": "id,question,A,B,C,D,answer\n" + examples,
        "ceval-exam/val/computer_network_val.csv": "id,question,A,B,C,D,answer\n" + rows,
        "cmmlu/dev/agronomy.csv": ",Question,A,B,C,D,Answer\n" + examples,
        "cmmlu/test/agronomy.csv": ",Question,A,B,C,D,Answer\n" + rows,
        "mmlu/anatomy/dev.jsonl": choices[:1] * solved, "mmlu/anatomy/test.jsonl": choices,
        "gsm8k/main/train.jsonl": [{"question": f"{n} and {n}?", "answer": f"#### {2 * n}"} for n in range(6)],
        "gsm8k/main/test.jsonl": [{"question": "1 and 2?", "answer": "1 + 2\n#### 3"}] * 2,
        "bbh/boolean_expressions/test.jsonl": [{"input": "not True is", "target": "False"}] * 2}
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else
                        "".join(json.dumps(record) + "\n" for record in content), encoding="utf-8")


def write_tasks(folder):
    """Three tasks: a choice, a text to score, answers to generate."""
    rows = {"choice": [{"q": "你是谁？", "a": ["一个语言模型", "brown fox"], "right": 0},
                       {"q": "The quick brown", "a": ["fox", "dog", "lazy dog"], "right": 2},
                       {"q": "jumps over " * 100, "a": ["the lazy dog", "公园"], "right": 1}],
            "text": [{"text": "今天天气很好，我们去公园散步吧。" * 60}, {"text": "a b"}],
            "answer": [{"q": "who are you", "a": "x"}, {"q": "the end", "a": "y"}, {"q": "<_bot>", "a": "z"},
                       {"q": "the lazy " * 100 + "dog", "a": ""}]}
    for name, records in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, lines in (
            ("choice", ["output_type: multiple_choice", 'doc_to_text: "{{q}}"', "doc_to_choice: '{{a}}'",
                        "doc_to_target: right", "metric_list: [{metric: acc}]"]),
            ("text", ["output_type: loglikelihood_rolling", 'doc_to_text: ""', 'doc_to_target: "{{text}}"',
                      "metric_list: [{metric: bits_per_byte}]"]),
            ("answer", ["output_type: generate_until", 'doc_to_text: "{{q}}"', 'doc_to_target: "{{a}}"',
                        "generation_kwargs: {until: ['fox', '。'], max_gen_toks: 10}",
                        "metric_list: [{metric: exact_match}]"])):
        (folder / f"{name}.yaml").write_text("\n".join(
            [f"task: tiny_{name}", "dataset_path: json", "test_split: test",
             f"dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}", *lines]) + "\n")


def run(capfd, *options):
    """(exit code, lines on stderr that report an error) of scripts/evaluate.py."""
    code = evaluate.main([str(option) for option in options])
    return code, [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
