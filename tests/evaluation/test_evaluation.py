"""Evaluation: log-likelihoods and answers equal those from the model's own logits, alone and in the harness."""
import json
import math
import os
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import reference
from chat_fixtures import save_tiny, tiny_weights
from evaluation_fixtures import (
    PUBLISHED,
    RECIPE,
    direct_logits,
    expected,
    needs_harness,
    run,
    write_published,
    write_tasks,
)
from model_fixtures import HF_CONFIGS, build_model, random_official
from vocab_fixtures import train_sentencepiece

from research.telechat.common.errors import ConfigError
from research.telechat.evaluation import report, tasks
from research.telechat.evaluation.batches import Scored, rolling_windows
from research.telechat.text.renderer import Renderer, get_template
from research.telechat.text.vocab import Vocab

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "conversations.jsonl"


@pytest.fixture(scope="module")
def vocab_file(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("vocab") / "tokenizer.model")


@pytest.fixture(scope="module")
def vocab(vocab_file):
    return Vocab.load(vocab_file)


@pytest.fixture(scope="module")
def tiny():
    """A random model of 12B's shape that has the small vocabulary; 128 tokens of context, all within the training's."""
    return build_model(*constant_rope())


def constant_rope():
    """Official config and weights; the rotary rule does not depend on the length, so that padding is no matter."""
    hf_config, weights = tiny_weights()
    return {**hf_config, "training_seqlen": 128}, weights


class TestScorer:
    def test_against_the_models_logits(self, tiny):
        """Batches of 1 and of 4, the longest text that fits, greedy texts, and texts that share their input."""
        from research.telechat.evaluation.score import Scorer
        rng = np.random.default_rng(3)
        requests = [Scored(rng.integers(4, 600, length).tolist(), count)
                    for length, count in ((5, 1), (30, 4), (129, 128), (128, 7), (90, 0))]
        start = rng.integers(4, 600, 6).tolist()
        likeliest = [int(direct_logits(tiny, start)[-1].argmax())]
        likeliest += [int(direct_logits(tiny, start + likeliest)[-1].argmax())]
        requests += [Scored(start + likeliest, 2), Scored([*start, likeliest[0]], 1),
                     Scored([*start, likeliest[0] - 1], 1)]
        wanted = [expected(direct_logits(tiny, request.ids[:-1]), request.ids, request.count) for request in requests]
        assert [greedy for _, greedy in wanted] == [False] * 4 + [True, True, True, False]
        for batch_size in (1, 4):
            found = Scorer(tiny, batch_size, progress=False).score(requests)
            assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], rel=1e-5, abs=1e-5)
            assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]

    @pytest.mark.slow
    @pytest.mark.parametrize("use_past", [False, True])
    def test_rotary_rule_that_depends_on_the_length(self, use_past):
        """TeleChat2 past training_seqlen: padding to a common length must not change the rotation."""
        from research.telechat.evaluation.score import Scorer
        hf = HF_CONFIGS["telechat2_gqa"]
        weights = random_official(hf)
        cache = dict(use_past=True, is_dynamic=True, num_blocks=16, block_size=16) if use_past else {}
        model = build_model(hf, weights, **cache)
        assert model.model.by_length
        rng = np.random.default_rng(4)
        requests = [Scored(rng.integers(4, 97, length).tolist(), 3) for length in (10, 20, 33, 64, 65)]
        found = Scorer(model, 4, progress=False).score(requests)
        for request, (value, greedy) in zip(requests, found):
            logits = reference.forward(hf, weights, np.array([request.ids[:-1]]))[0][0]
            wanted = expected(logits, request.ids, request.count)
            assert value == pytest.approx(wanted[0], abs=2e-4) and greedy == wanted[1]

    def test_perplexity_of_texts_longer_than_the_context(self, tiny, vocab):
        from research.telechat.evaluation.score import Scorer, perplexity
        long = "The quick brown fox jumps over the lazy dog. 你是谁？" * 30
        texts = [long, "今天天气很好"]
        ids = [vocab.encode(text) for text in texts]
        assert len(ids[0]) > 2 * tiny.config.seq_length
        found = perplexity(Scorer(tiny, 4, progress=False), vocab, texts, 1).as_dict()
        total = sum(expected(direct_logits(tiny, window.ids[:-1]), window.ids, window.count)[0]
                    for text in ids for window in rolling_windows(text, 1, 128))
        tokens = sum(map(len, ids))
        assert found["tokens"] == tokens and found["log_likelihood"] == pytest.approx(total, rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(-total / tokens), rel=1e-4)
        assert found["bits_per_byte"] == pytest.approx(-total / math.log(2) / sum(len(text.encode()) for text in texts))

    def test_plans_that_cannot_score(self, tiny):
        from types import SimpleNamespace as Space

        from research.telechat.evaluation.score import Scorer
        for changes, size, message in (({"pipeline_stage": 2}, 4, "pipeline_stage 2"),
                                       ({"data_parallel": 4}, 6, "multiple of parallel_config.data_parallel"),
                                       ({}, 0, "--batch_size")):
            plan = {"data_parallel": 1, "context_parallel": 1, "pipeline_stage": 1, **changes}
            model = Space(config=Space(parallel_config=Space(**plan), seq_length=8))
            with pytest.raises(ConfigError, match=message):
                Scorer(model, size)


@needs_harness
class TestHarness:
    @pytest.fixture(scope="class")
    def lm(self, tiny, vocab_file):
        from research.telechat.evaluation.harness import TelechatLM
        from research.telechat.telechat_tokenizer import TelechatTokenizer
        return TelechatLM(tiny, TelechatTokenizer(str(vocab_file)), batch_size=4, progress=False)

    @pytest.fixture(scope="class")
    def result(self, lm, tmp_path_factory):
        """Samples by task of the three tasks."""
        from lm_eval.evaluator import evaluate as harness
        folder = tmp_path_factory.mktemp("tasks")
        write_tasks(folder)
        loaded = tasks.load_tasks(["tiny_choice", "tiny_text", "tiny_answer"], str(folder))
        assert tasks.set_shots(loaded, None, 1) == []
        return harness(lm=lm, task_dict=loaded, bootstrap_iters=0, log_samples=True)

    def test_choices(self, result, lm, tiny, vocab):
        """Each log-likelihood equals that of the model's logits; a context that is too long loses its beginning."""
        right = []
        for sample in result["samples"]["tiny_choice"]:
            found = [value for (value, _), in sample["resps"]]
            wanted = []
            for context, continuation in sample["arguments"]:
                whole = vocab.encode(context.rstrip() + context[len(context.rstrip()):] + continuation)
                count = len(whole) - len(vocab.encode(context.rstrip()))
                ids = whole[-129:]
                wanted.append(expected(direct_logits(tiny, ids[:-1]), ids, count)[0])
            assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5)
            right.append(int(np.argmax(wanted)) == sample["target"])
        assert result["results"]["tiny_choice"]["acc,none"] == pytest.approx(np.mean(right))
        assert lm.counts["requests had their context truncated"] == 2

    def test_without_context(self, lm, tiny, vocab):
        """The start token takes the place of the context; nothing to score is certain, and counted."""
        from types import SimpleNamespace as Space
        before = lm.counts.copy()
        found = lm.loglikelihood([Space(args=("", "The quick brown fox")), Space(args=("a b", "")),
                                  Space(args=("", "jumps over " * 100))])
        ids = [1, *vocab.encode("The quick brown fox")]
        assert found[0][0] == pytest.approx(expected(direct_logits(tiny, ids[:-1]), ids, len(ids) - 1)[0], rel=1e-5)
        assert found[1] == (0.0, True)
        ids = vocab.encode("jumps over " * 100)[-129:]
        assert found[2][0] == pytest.approx(expected(direct_logits(tiny, ids[:-1]), ids, 128)[0], rel=1e-5)
        assert {key: count - before[key] for key, count in lm.counts.items() if count > before[key]} == {
            "requests have no tokens to score (log-likelihood 0)": 1,
            "requests had their scored text truncated": 1, "requests had their context truncated": 1}

    def test_text_longer_than_the_context(self, result, tiny, vocab):
        for sample in result["samples"]["tiny_text"]:
            ids = vocab.encode(sample["doc"]["text"])
            assert len(ids) > 300 or len(ids) < 6
            wanted = sum(expected(direct_logits(tiny, window.ids[:-1]), window.ids, window.count)[0]
                         for window in rolling_windows(ids, 1, 128))
            assert sample["resps"][0][0] == pytest.approx(wanted, rel=1e-5)

    def test_answers(self, result, tiny, vocab):
        for sample in result["samples"]["tiny_answer"]:
            prompt = vocab.encode_with_specials(sample["arguments"][0][0])[-118:]     # with ten more, 128
            ids = list(prompt)
            for _ in range(10):
                ids.append(int(direct_logits(tiny, ids)[-1].argmax()))
                if ids[-1] in (2, vocab.markers["<_end>"], vocab.markers["<_user>"]):
                    ids.pop()
                    break
            text = vocab.decode(ids, True)[len(vocab.decode(prompt, True)):]
            ends = [text.find(stop) for stop in ("fox", "。") if stop in text]
            assert sample["resps"][0][0] == text[:min(ends, default=len(text))]

    def test_answers_with_a_cache_that_is_too_small_for_the_batch(self, lm, vocab_file):
        """Batches shrink to what the cache holds; the answers stay the same."""
        from types import SimpleNamespace as Space

        from research.telechat.evaluation.harness import TelechatLM
        cached = build_model(*constant_rope(), use_past=True, is_dynamic=True, num_blocks=4, block_size=8)
        other = TelechatLM(cached, lm.tokenizer, batch_size=4, progress=False)
        texts = ["who are you", "the end", "你是谁", "a", "jumps over the lazy dog " * 3]
        requests = [Space(args=(text, {"max_gen_toks": 6, "until": []})) for text in texts]
        assert other.generate_until(requests) == lm.generate_until(requests)
        assert other.counts == {}

    def test_chat_template(self, lm, vocab):
        """The ids are the renderer's own; markers typed in a question stay text; an answer can be begun."""
        renderer = Renderer(get_template("telechat"), vocab, system_policy="prepend")
        for messages in ([{"role": "user", "content": "你是<_bot>谁？"}],
                         [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"},
                          {"role": "assistant", "content": "b"}, {"role": "user", "content": "c <_user> d"}]):
            prompt = renderer.prompt(messages)
            text = lm.apply_chat_template(messages)
            assert lm.tok_encode(text) == prompt != vocab.encode_with_specials(text)
            assert lm._encode_pair(text, "答案") == (prompt, vocab.encode("答案"))
            begun = lm.apply_chat_template([*messages, {"role": "assistant", "content": "答案是"}], False)
            assert lm._encode_pair(begun, " A") == (prompt + vocab.encode("答案是"), vocab.encode("答案是 A")[
                len(vocab.encode("答案是")):])
        assert lm.chat_template(True) == "telechat" and lm.chat_template(False) is None

    def test_published_tasks_with_files_of_the_users(self, lm, tmp_path):
        """The harness's own tasks of the five benchmarks, on made-up questions in files as they are published."""
        from lm_eval.evaluator import evaluate as harness
        write_published(tmp_path)
        loaded = tasks.load_tasks(PUBLISHED, data=str(tmp_path))
        assert tasks.count_documents(loaded) == dict.fromkeys(PUBLISHED, 2)
        assert tasks.set_shots(loaded, None, 1) == []
        result = harness(lm=lm, task_dict=loaded, bootstrap_iters=0)
        assert {row.task: row.shots for row in report.result_rows(result)} == dict(zip(PUBLISHED, (0, 0, 0, 5, 3)))
        prompts = [result["samples"][name][0]["arguments"][0][0] for name in PUBLISHED]
        assert [prompt.rsplit("\n", 1)[-1] for prompt in prompts[:4]] == ["答案：", "答案：", "Answer:", "Answer:"]
        assert prompts[3].count("Question:") == 6 and "step by step" in prompts[4]
        assert lm.counts["answers are limited to 96 tokens instead of 1024"] == 2

    def test_published_task_as_a_chat(self, lm, tmp_path):
        from lm_eval.evaluator import evaluate as harness
        write_published(tmp_path)
        loaded = tasks.load_tasks(PUBLISHED[:1], data=str(tmp_path))
        with pytest.raises(ConfigError, match=f"{PUBLISHED[0]} has only 2 solved examples"):
            tasks.set_shots(loaded, 3, 1)
        tasks.set_shots(loaded, 1, 1)
        result = harness(lm=lm, task_dict=loaded, bootstrap_iters=0, apply_chat_template=True,
                         fewshot_as_multiturn=True)
        prompt = result["samples"][PUBLISHED[0]][1]["arguments"][0][0]
        assert prompt.startswith("<_user>") and prompt.endswith("答案：<_bot>") and prompt.count("<_bot>") == 2

    @pytest.mark.parametrize("name", ["ceval-valid", "cmmlu", "mmlu", "gsm8k", "bbh"])
    def test_tasks_that_the_documents_name(self, name):
        assert name in tasks._manager([name], None).all_tasks


@pytest.mark.slow
class TestCommand:
    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory, vocab_file):
        path = tmp_path_factory.mktemp("model") / "tiny.ckpt"
        return ["--config", RECIPE, "--load_checkpoint", path, "--tokenizer", vocab_file, *save_tiny(path)]

    @needs_harness
    def test_tasks(self, model, tmp_path, capfd):
        """The whole command: report, chart and samples; a second run gives the same."""
        write_tasks(tmp_path)
        write_published(tmp_path)
        outputs = [tmp_path / "one.json", tmp_path / "two.json"]
        for output in outputs:
            code, errors = run(capfd, *model, "--tasks", "tiny_choice,tiny_answer,ceval-valid_computer_network",
                               "--include_path", tmp_path, "--data", tmp_path, "--limit", "2", "--output", output,
                               "--samples", "--apply_chat_template", "--output_dir", tmp_path / "logs")
            assert (code, errors) == (0, [])
        one, two = (json.loads(output.read_text(encoding="utf-8")) for output in outputs)
        assert one["results"] == two["results"] and len(one["results"]) == 3
        assert one["n-samples"]["tiny_choice"]["effective"] == 2
        assert one["chat_template"] == "telechat" and one["seed"] == 1234 and one["packages"]["lm_eval"]
        assert len(report.samples_path(outputs[0]).read_text(encoding="utf-8").splitlines()) == 6
        assert outputs[0].with_suffix(".png").is_file()
        assert not list(tmp_path.glob("*.part"))

    def test_perplexity(self, model, tmp_path, capfd):
        text = tmp_path / "text.jsonl"
        text.write_text('{"text": "今天天气很好"}\n{"content": "a b c"}\n', encoding="utf-8")
        output = tmp_path / "result.json"
        for given, texts, answers in ((text, 2, 0), (EXAMPLES, EXAMPLES.read_bytes().count(b"\n"), 80)):
            assert run(capfd, *model, "--perplexity", given, "--output", output, "--output_dir", tmp_path) == (0, [])
            result = json.loads(output.read_text(encoding="utf-8"))
            assert result["texts"] == texts and math.isfinite(result["perplexity"]) and "groups" not in result
            assert result["answers"] >= answers

    def test_two_processes(self, model, tmp_path, capfd):
        """Under msrun, each with the whole model: the first one writes, and the result is that of one process."""
        text = tmp_path / "text.txt"
        text.write_text("The quick brown fox jumps over the lazy dog. " * 30)
        options = [*model, "--perplexity", text, "--output_dir", tmp_path / "logs"]
        assert run(capfd, *options, "--output", tmp_path / "one.json") == (0, [])
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        command = " ".join(map(str, ["scripts/evaluate.py", *options, "--use_parallel", "True", "--output",
                                     tmp_path / "two.json"]))
        env = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests/support/without_torch'}:{os.environ.get('PYTHONPATH', '')}"}
        launch = ["bash", "scripts/msrun_launcher.sh", command, "2", str(port), str(tmp_path / "msrun"), "True", "300"]
        done = subprocess.run(launch, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        one, two = (json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("one.json", "two.json"))
        assert two["perplexity"] == one["perplexity"] and two["tokens"] == one["tokens"]
        outputs = [path.read_text(errors="replace") for path in sorted((tmp_path / "msrun").glob("worker_*.log"))]
        assert ["perplexity: " in output for output in outputs] == [True, False]

    def test_wrong_model(self, model, tmp_path, capfd):
        text = tmp_path / "text.txt"
        text.write_text("a")
        code, errors = run(capfd, *model, "--perplexity", text, "--model.model_config.vocab_size", "599", "--output",
                           tmp_path / "r.json", "--output_dir", tmp_path)
        assert code == 1 and "not a checkpoint of this recipe's" in errors[0]
        assert not (tmp_path / "r.json").exists()
