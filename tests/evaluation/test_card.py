"""The table of the model card: rows from results, published figures, what is missing; and the whole command."""
import json
import os
from types import SimpleNamespace

import pytest
from card_fixtures import write_card_sets
from chat_fixtures import save_tiny
from evaluation_fixtures import RECIPE, needs_harness, run, write_published
from isolation import require_isolation
from judged_fixtures import FakeJudge, write_judged_sets
from vocab_fixtures import train_sentencepiece

from research.telechat.commands import evaluate_card
from research.telechat.common.errors import ConfigError
from research.telechat.common.lock import output_lock
from research.telechat.evaluation import judge
from research.telechat.evaluation.card import BENCHMARKS, PUBLISHED, card_rows, card_table, draw_card, published_for
from research.telechat.evaluation.judged import read_bench

RESULT = {"results": {
    "ceval-valid": {"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.9, "alias": "ceval-valid"},
    "gsm8k": {"exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.75, "exact_match_stderr,x": "N/A"},
    "mbpp": {"pass_at_1,none": 0.5}, "humaneval": {"pass@1,create_test": 1.0}},
    "group_subtasks": {"ceval-valid": ["a", "b"]}, "n-shot": {"gsm8k": 4, "ceval-valid": 5},
    "n-samples": {"a": {"effective": 3}, "b": {"effective": 4}, "gsm8k": {"effective": 8}}}


def test_rows(tmp_path):
    rows = {row.benchmark: row for row in card_rows(
        RESULT, {"mt_bench": {"score": 7.5, "questions": 80}}, False, PUBLISHED["telechat2_7b"], {"BBH": "no folder"})}
    assert list(rows) == [bench.name for bench in BENCHMARKS]
    found = {name: (row.questions, row.shots, row.ours, row.published) for name, row in rows.items() if row.ours}
    assert found == {"C-Eval": (7, 5, 50.0, 82), "GSM8K": (8, 4, 75.0, 86.8), "HumanEval": (None, None, 100.0, 56),
                     "MBPP": (None, None, 50.0, 62.6), "MT-bench": (80, None, 7.5, 7.2)}
    assert rows["BBH"].missing == "no folder" and rows["MMLU"].missing == "not run" and not rows["GSM8K"].missing
    lines = card_table(list(rows.values())).splitlines()
    assert lines[2].split() == ["C-Eval", "7", "5", "acc", "50.00", "82.00"]
    assert "BBH: not run: no folder" in lines and any(line.startswith("C-Eval: validation split") for line in lines)
    assert draw_card(list(rows.values()), tmp_path / "card.png") and not draw_card([], tmp_path / "none.png")
    assert (tmp_path / "card.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("recipe", "figure"), [
    ("research/telechat/predict_telechat2_7b.yaml", 82), ("my_telechat_7b_lora.yaml", 64.6),
    ("predict_telechat2_35b.yaml", 85), ("predict_telechat2_5_35b.yaml", None), ("telechat2_35b_32k.yaml", None),
    ("telechat2_7b_128k.yaml", None),
    ("predict_telechat_12b_v2.yaml", None), ("predict_telechat_t1_35b.yaml", None), ("tiny.yaml", None)])
def test_figures_are_those_of_the_recipes_model(recipe, figure):
    assert published_for(recipe).get("C-Eval") == figure


def test_published_figures_are_of_benchmarks_on_the_card():
    names = {bench.name for bench in BENCHMARKS}
    assert all(names >= figures.keys() for figures in PUBLISHED.values())


def test_judge_that_is_away_costs_no_report(tmp_path, monkeypatch):
    """With --card what cannot be judged is missing, with the reason; without it the command ends with the error."""
    write_judged_sets(tmp_path)
    benches = evaluate_card.limited([read_bench("alignbench", str(tmp_path)), read_bench("mt_bench", str(tmp_path))],
                                    0.5)
    assert [len(bench.questions) for bench in benches] == [2, 1]
    assert [len(bench.questions) for bench in evaluate_card.limited(benches, 1)] == [1, 1]
    monkeypatch.setattr(judge, "ATTEMPTS", 1)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found = evaluate_card.AtHand({}, benches)
    given = [{question.number: ["a", "b"] for question in bench.questions} for bench in benches]
    args = SimpleNamespace(card=True, judge_url="http://127.0.0.1:9/v1", judge_model="x", judge_parallel=1)
    store = judge.Store(tmp_path / "j.jsonl", "judgments")
    assert evaluate_card.judge_benches(found, given, store, args) == {}
    assert all("does not answer" in found.missing[name] for name in ("AlignBench", "MT-bench"))
    args.card = False
    with pytest.raises(ConfigError, match="does not answer"):
        evaluate_card.judge_benches(found, given, store, args)


def test_weights_are_told_apart(tmp_path):
    """Other weights at the path of earlier ones have another identity; a process elsewhere is refused."""
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"1" * 40)
    first = evaluate_card.weights_of(path)
    os.utime(path, ns=(1, 1))
    assert evaluate_card.weights_of(path) != first == [("model.ckpt", 40, first[0][2])]
    assert [name for name, *_ in evaluate_card.weights_of(tmp_path)] == [f"{tmp_path.name}/model.ckpt"]
    with output_lock(tmp_path / "card.json"):
        evaluate_card.check_shared(tmp_path / "card.json")
    with pytest.raises(ConfigError, match="process 0 does not see the folder"):
        evaluate_card.check_shared(tmp_path / "card.json")


@needs_harness
@pytest.mark.slow
def test_command(tmp_path, capfd):
    """Everything available is run, the rest is named with the reason; the limit holds for judged questions, too."""
    require_isolation()
    write_card_sets(tmp_path)
    write_published(tmp_path)
    write_judged_sets(tmp_path)
    checkpoint = tmp_path / "tiny.ckpt"
    fake = FakeJudge(lambda body: "[[6]] {'综合得分': 8}")
    options = ["--config", RECIPE, "--load_checkpoint", checkpoint, "--tokenizer",
               train_sentencepiece(tmp_path / "tokenizer.model"), *save_tiny(checkpoint), "--card", "--data", tmp_path,
               "--limit", 1, "--judge_url", fake.url, "--output_dir", tmp_path / "logs",
               "--output", tmp_path / "card.json"]
    try:
        assert run(capfd, *options, "--allow_code_execution") == (0, [])
    finally:
        fake.close()
    report = json.loads((tmp_path / "card.json").read_text(encoding="utf-8"))
    rows = {row["benchmark"]: row for row in report["card"]}
    assert {name for name, row in rows.items() if not row["missing"]} >= {
        "GSM8K", "HumanEval", "MBPP", "AlignBench", "MT-bench"}
    assert rows["GSM8K"]["shots"] == 4 and (rows["AlignBench"]["ours"], rows["MT-bench"]["ours"]) == (8, 6)
    assert "ceval-exam" in rows["C-Eval"]["missing"] and "cmmlu" in rows["CMMLU"]["missing"]
    assert len(fake.requests) == 1 + 2 and (tmp_path / "card.png").is_file()
    assert len((tmp_path / "card.answers.jsonl").read_text(encoding="utf-8").splitlines()) == 1 + 2
