"""benchmarks/run_all.py and its page: every benchmark has its line, a fault loses nothing, published figures hold."""
import json
import os
import sys
from pathlib import Path

import prepared
import pytest

from benchmarks import benchmark_page, beside_llama, published, run_all
from research.telechat.plan.cost import flops_per_token
from research.telechat.plan.plan import read_plan
from research.telechat.recipe.read import read_recipe
from research.telechat.spec.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"


def result(rows=None, **changes):
    """A result as run_step gives it."""
    return {"title": "A title", "quick": False, "busy": 0.1, "date": "2026-01-01", "versions": "Python 3",
            "command": "python x.py", "seconds": 3, "rows": rows or [["a", "b", "c", "d"]], **changes}


def results(**changes):
    return {**{name: result() for name in benchmark_page.HEADS}, **changes}


def quietly(monkeypatch, work, script):
    """run_all with one benchmark, `script`, in place of all."""
    (work / "script.py").write_text(script)
    step = run_all.Step("conversion", "Title", [str(work / "script.py")], [str(work / "script.py")],
                        lambda figures: [[str(figures), "b", "c", "d"]])
    monkeypatch.setattr(run_all, "STEPS", (step,))
    monkeypatch.setattr(run_all, "busy_processors", lambda seconds: 0.1)
    return step


@pytest.mark.parametrize("name", VARIANTS)
def test_operations_per_token_equal_the_planners(name):
    """The planner counts from the recipe's plan, the page from the table of parameters."""
    recipe = read_recipe(ROOT / "research" / "telechat" / f"finetune_{name}.yaml")
    assert published.training_flops(VARIANTS[name], published.recipe_length(name)) == pytest.approx(
        flops_per_token(read_plan(recipe)), rel=1e-12)


def test_published_figures():
    """As in MindFormers' README, and the shares worked out by hand for 7B (6.86e9 weights multiplied with)."""
    assert {each.variant: each.tokens_per_second_per_card for each in published.FINE_TUNING} == {
        "telechat_7b": 3400, "telechat_12b": 1996, "telechat_52b": 364, "telechat2_7b": 2950, "telechat2_35b": 516,
        "telechat2_115b": 158}
    layer = 4 * 4096 * 4096 + 3 * 4096 * 12288
    flops = 6 * (30 * layer + 160256 * 4096) + 12 * 30 * 4096 * 2048
    assert published.training_flops(VARIANTS["telechat_7b"], 2048) == flops
    text = published.published_section()
    assert f"| telechat_7b | 2,048 | 3,400 | {flops / 1e9:.1f} | {3400 * flops / 313e12:.0%} |" in text
    assert f"| {0.5 * 313e12 / flops:,.0f} | {0.57 * 313e12 / flops:,.0f} |" in text
    assert "nothing here was measured" in text


def test_weights_read_per_token():
    """All of a tied model; without the embedding where the head is a matrix of its own. Two bytes each."""
    assert published.weight_bytes(VARIANTS["telechat_7b"]) == 14400036864
    assert published.weight_bytes(VARIANTS["telechat_12b"]) == 24772864000 - 2 * 120000 * 5120


def test_page_holds_every_benchmark_and_says_what_failed():
    text = benchmark_page.page(results(generation={**result(), "rows": None, "error": "no | space"}), {"cores": "2"})
    for name, head in benchmark_page.HEADS.items():
        assert f"| {' | '.join(head)} |" in text, name
    assert text.count("| a | b | c | d |") == len(benchmark_page.HEADS) - 1
    assert "| FAILED: no / space | - | - | - |" in text and "mean nothing" not in text
    assert text.endswith(published.published_section())
    assert "Other programs" not in text
    assert "used 1.5 processors just before or after" in benchmark_page.page(results(training=result(busy=1.5)), {})
    missing = benchmark_page.page({}, {"cores": "2"})
    assert missing.count("| not measured yet | - | - | - |") == len(benchmark_page.HEADS) and "FAILED" not in missing
    assert "mean nothing" in benchmark_page.page(results(training=result(quick=True)), {})


def test_a_benchmark_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    quietly(monkeypatch, tmp_path, "print('working'); raise SystemExit('error: the disk is full')")
    store, written = tmp_path / "results.json", tmp_path / "page.md"
    store.write_text(json.dumps({"conversion": result([["old", "b", "c", "d"]])}))
    assert run_all.main(["--json", str(store), "--write", str(written), "--only", "conversion"]) == 1
    assert "FAILED: exit code 1: error: the disk is full" in written.read_text(encoding="utf-8")
    assert "without figures: conversion" in capsys.readouterr().err


def test_a_missed_target_is_no_failure(tmp_path, monkeypatch):
    quietly(monkeypatch, tmp_path, "import sys\nopen(sys.argv[-1], 'w').write('[7]')\nsys.exit(1)")
    assert run_all.main(["--json", str(tmp_path / "results.json")]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["conversion"]["rows"] == [["[7]", "b", "c", "d"]]


def test_figures_of_an_unknown_form_and_a_hanging_benchmark_are_named(tmp_path, monkeypatch):
    step = quietly(monkeypatch, tmp_path, "import sys\nopen(sys.argv[-1], 'w').write('{}')")
    found = run_all.run_step(step._replace(rows=benchmark_page.generation_rows), False, {}, tmp_path)
    assert found["error"] == "KeyError: 'results'"
    (tmp_path / "conversion.json").unlink()
    monkeypatch.setattr(run_all, "TIMEOUT", 0.2)
    (tmp_path / "script.py").write_text("import time; time.sleep(60)")
    assert run_all.run_step(step, False, {}, tmp_path)["error"] == "stopped after 0.2 s"


def test_results_of_the_last_run_are_kept_or_their_loss_is_said(tmp_path, capsys):
    store = tmp_path / "results.json"
    assert run_all.read_results(store) == {} and capsys.readouterr().err == ""
    store.write_text(json.dumps({"machine": {}, "training": result(), "unknown": 1}))
    assert list(run_all.read_results(store)) == ["training"]
    store.write_text("{")
    assert run_all.read_results(store) == {} and "is started over" in capsys.readouterr().err


def test_rows_of_each_benchmark():
    """Lines made of the figures of a real run, reduced to what is shown."""
    assert benchmark_page.training_rows([
        {"framework": "mindspore", "seconds": 0.4, "peak_gflops": 160.4, "share_of_peak": 0.456},
        {"framework": "torch", "seconds": 0.2, "peak_gflops": 250, "share_of_peak": 0.6}]) == [
            ["this project, MindSpore", "400 ms", "160 GFLOP/s", "46%"],
            ["the same formulas in PyTorch", "200 ms", "250 GFLOP/s", "60%"],
            ["MindSpore over PyTorch", "2.00 times", "-", "-"]]
    assert benchmark_page.compile_rows([{"layers": 8, "seconds": 4.0}, {"layers": 64, "seconds": 10.0}])[1] == [
        "64", "10.0 s", "4.0 s (8)", "2.50"]
    assert benchmark_page.by_layer_rows([
        {"way": "as a whole", "layers": 9, "seconds": 2.0, "first": 30.04, "gigabytes": 3.456},
        {"way": "layer by layer", "layers": 9, "seconds": 2.5, "first": 10, "gigabytes": 1}])[1] == [
            "9 layers, layer by layer", "2.50 s, 10.0 s", "1.00 GB", "1.25 times"]
    assert benchmark_page.loss_rows([
        {"way": "loss at once", "tokens": 2048, "seconds": 2.0, "gigabytes": 4.0},
        {"way": "loss in chunks", "tokens": 2048, "seconds": 2.5, "gigabytes": 1.0}])[1] == [
            "2,048 tokens, loss in chunks", "2.50 s", "1.00 GB", "25%"]
    assert benchmark_page.master_weights_rows({
        "distances": {"float32": [1.0, 0.00001], "float16 and remainder": [0.99999, 0.00005]},
        "curves": {"float32": {"share": 1.0}}}) == [
            ["float32", "1.00000 (0.00001)", "1 (0)", "100.00%"],
            ["float16 and remainder", "0.99999 (0.00005)", "1 (0)", "-"]]
    (row,) = benchmark_page.generation_rows({"results": [
        {"name": "telechat", "batch": 4, "decode_tokens_per_second": 600, "first_token_seconds": 0.02,
         "all_decode_tokens_per_second": [400, 500, 600], "share_of_limit": 0.3}]})
    assert row == ["4 (telechat)", "500 tokens/s, 20 ms", "2,000 tokens/s", "25%"]


def test_rows_of_the_benchmarks_beside_others_and_of_serving():
    """Likewise."""
    ratios = {"ratio": 1.25, "lowest_ratio": 1.1, "highest_ratio": 1.4}
    assert benchmark_page.beside_llama_rows({"rows": [
        {"task": "decode", "batch": 16, "prompt": 32, "new": 256, "ours": 1500.0, "theirs": 1200.0, **ratios,
         "growth": 1.1, "growth_of_theirs": 1.3},
        {"task": "prefill", "batch": 1, "prompt": 2048, "ours": 0.5, "theirs": 0.625, **ratios}]}) == [
            ["decoding, 16 at once, 256 tokens", "1,500 tokens/s, last quarter 1.10 times as slow as the first",
             "1,200 tokens/s, last quarter 1.30 times as slow as the first", "1.25 (1.10, 1.40)"],
            ["first token of a prompt, 1 x 2,048 tokens", "500 ms", "625 ms", "1.25 (1.10, 1.40)"]]
    times = {"first_token_median": 0.012, "between_median": 0.004, "between_p99": 0.02}
    assert benchmark_page.serving_rows({"results": [
        {"name": "one by one", "tokens_per_second": 200.0, **times},
        {"name": "8 clients", "tokens_per_second": 500.0, **times}]})[1] == [
            "8 clients", "500, 12 ms", "4.0 ms, 20.0 ms", "2.50"]
    rounds = [{"read": 100, "left": 100, "lost": 0, "blocks": 0.0, "seconds": 2.0, "megabytes": size}
              for size in (900, 1000, 1001)]
    assert benchmark_page.streams_rows({"streams": 200, "rows": rounds}) == [
        ["200 streams, 3 rounds", "300, 300", "0, 0", "1,000 MB, 1,001 MB"]]
    assert benchmark_page.streams_rows({"streams": 2, "rows": [{"read": 1, "left": 1, "lost": 1, "blocks": 3.0}]}) == [
        ["2 streams, 1 rounds", "1, 1", "1, 3", "-"]]


def test_a_ratio_over_one_says_that_ours_is_faster():
    """Turns of both sides: tokens per second where more is better, seconds where less is."""
    class Side:
        def __init__(self, name, values):
            self.name, self.values = name, values

        def ask(self, **job):
            return {"seconds": self.values[0], "tokens_per_second": self.values.pop(0)}
    for figure, less, ratio in (("tokens_per_second", False, 2.0), ("seconds", True, 0.5)):
        sides = [Side("telechat", [4.0, 8.0, 6.0]), Side("transformers", [2.0, 4.0, 3.0])]
        row = beside_llama.compare(sides, 3, {"task": "train", "steps": 1}, figure, less)
        assert row == {"task": "train", "ours": 6.0, "theirs": 3.0, "ratio": ratio, "lowest_ratio": ratio,
                       "highest_ratio": ratio}


def test_conversations_of_the_benchmark(tmp_path):
    """The same at every run, and of the form that preprocessing reads."""
    run_all.make_conversations(tmp_path / "a.jsonl", 5)
    run_all.make_conversations(tmp_path / "b.jsonl", 5)
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines == (tmp_path / "b.jsonl").read_text(encoding="utf-8").splitlines() and len(set(lines)) == 5
    for line in lines:
        record = json.loads(line)
        assert record["input"].count("<_user>") == 3 and record["input"].count("<_bot>") == 2
        assert 300 < len(record["input"] + record["output"]) < 4000


def test_processors_in_use_are_counted():
    busy = run_all.busy_processors(0.1)
    assert busy is None or 0 <= busy <= os.cpu_count()


def test_machine_is_described_without_its_name():
    import platform
    described = benchmark_page.machine()
    assert set(described) == {"processor", "cores", "memory", "system"} and int(described["cores"]) >= 1
    assert platform.node() not in " ".join(described.values()).split()
    assert "Python 3." in benchmark_page.versions() and "numpy" in benchmark_page.versions()


def test_the_page_has_the_form_that_run_all_writes():
    """Titles, commands, heads and the published part are current; every benchmark has figures."""
    text = PAGE.read_text(encoding="utf-8")
    assert text.endswith(published.published_section()), "run: python benchmarks/run_all.py --render --write PAGE"
    assert "FAILED" not in text and "mean nothing" not in text
    position = 0
    for step in run_all.STEPS:
        section = f"## {step.title}\n\n`python {' '.join(step.command)}`\n\n"
        found = text.find(section, position)
        assert found >= 0, step.name
        table = text.index(f"| {' | '.join(benchmark_page.HEADS[step.name])} |\n| --- | --- | --- | --- |\n| ", found)
        assert "##" not in text[found + 3:table], step.name
        position = table
    for name in ("processor", "cores", "memory"):
        assert f"| {name} | " in text


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_quick_run_measures_everything(tmp_path, tmp_path_factory, monkeypatch):
    """The benchmarks and the processes that they start begin with MindSpore imported (prepared.py)."""
    program = tmp_path_factory.mktemp("programs") / "python"
    prepared.put_python(program)
    monkeypatch.setattr(sys, "executable", str(program))
    store, written = tmp_path / "results.json", tmp_path / "page.md"
    code = run_all.main(["--quick", "--json", str(store), "--write", str(written), "--work_dir", str(tmp_path)])
    found = json.loads(store.read_text(encoding="utf-8"))
    names = set(benchmark_page.HEADS) - {"beside_vllm"}          # which needs an environment of its own
    assert set(found) - {"machine"} == names
    errors = {name: found[name].get("error") for name in names}
    assert code == 0 and not any(errors.values()), errors
    assert all(len(row) == 4 for name in names for row in found[name]["rows"])
    planned = {row[0]: row for row in found["planner"]["rows"]}
    assert planned["parameters per card"][1] == planned["parameters per card"][2]
    text = written.read_text(encoding="utf-8")
    assert "FAILED" not in text and "mean nothing" in text and str(tmp_path) not in text
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
