"""Parts of evaluation that need no model: batches, answers, tasks and data, report, mistakes of the command line."""
import json

import numpy as np
import pytest
from evaluation_fixtures import RECIPE, needs_harness, run
from hypothesis import given, settings
from hypothesis import strategies as st
from vocab_fixtures import train_sentencepiece

from research.telechat.common.errors import ConfigError
from research.telechat.evaluation import report, tasks
from research.telechat.evaluation.answers import Answer, read_settings
from research.telechat.evaluation.batches import Scored, bucket_of, fit, rolling_windows, score_batches
from research.telechat.evaluation.data import find_files
from research.telechat.evaluation.texts import parts_of, read_records, spans
from research.telechat.text.renderer import Renderer, get_template
from research.telechat.text.vocab import Vocab

IGNORED = -100


class TestBatches:
    def test_fit_cuts_from_the_left(self):
        assert fit([1, 2, 3], [4, 5], 8) == (Scored([1, 2, 3, 4, 5], 2), 0, 0)
        assert fit([1, 2, 3], [4, 5], 4) == (Scored([1, 2, 3, 4, 5], 2), 0, 0)           # the last is only predicted
        assert fit([1, 2, 3], [4, 5], 3) == (Scored([2, 3, 4, 5], 2), 1, 0)
        assert fit([1, 2], [3, 4, 5, 6], 3) == (Scored([3, 4, 5, 6], 3), 2, 1)

    def test_windows_as_in_the_harness(self):
        """The example in the documentation of lm_eval.api.model.LM.loglikelihood_rolling."""
        windows = rolling_windows(list(range(10)), 99, 4)
        assert windows == [([99, 0, 1, 2, 3], 4), ([3, 4, 5, 6, 7], 4), ([5, 6, 7, 8, 9], 2)]
        assert rolling_windows([], 99, 4) == []

    @settings(max_examples=200, deadline=None)
    @given(st.integers(0, 70), st.integers(1, 20))
    def test_each_token_is_scored_once(self, length, limit):
        ids = list(range(1000, 1000 + length))
        windows = rolling_windows(ids, 7, limit)
        assert [token for window in windows for token in window.ids[len(window.ids) - window.count:]] == ids
        assert all(len(window.ids) - 1 <= limit and window.count < len(window.ids) for window in windows)

    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def test_batches_hold_every_target_once(self, data):
        limit = data.draw(st.sampled_from([64, 100, 300]))
        size = data.draw(st.integers(1, 5))
        lengths = data.draw(st.lists(st.integers(2, limit + 1), max_size=30))
        requests = [Scored([number % 3 + 4] * (length - 1) + [number + 10], data.draw(st.integers(0, length - 1)))
                    for number, length in enumerate(lengths)]
        found, shapes = {}, set()
        for batch in score_batches(requests, size, limit, 3, IGNORED):
            count = len(batch.requests)
            assert batch.tokens.shape[0] == size and batch.rows.shape == batch.targets.shape
            assert (batch.targets.reshape(-1)[count:] == IGNORED).all()
            shapes.add(batch.tokens.shape)
            for row, token, number in zip(batch.rows.reshape(-1), batch.targets.reshape(-1), batch.requests):
                text, position = divmod(int(row), batch.tokens.shape[1])
                request = requests[number]
                assert batch.lengths[text] == len(request.ids) - 1
                assert batch.tokens[text].tolist() == (request.ids[:-1] + [3] * limit)[:batch.tokens.shape[1]]
                found.setdefault(int(number), []).append((position + 1, int(token)))
        assert len(shapes) <= 4
        for number, request in enumerate(requests):
            places = list(range(len(request.ids) - request.count, len(request.ids)))
            assert found.get(number, []) == [(place, request.ids[place]) for place in places]

    def test_choices_of_a_question_are_one_text(self):
        requests = [Scored([5, 6, 7, choice], 1) for choice in (10, 11, 12, 13)]
        batch, = score_batches(requests, 4, 64, 3, IGNORED)
        assert batch.texts == 1 and batch.targets.reshape(-1)[:4].tolist() == [10, 11, 12, 13]

    def test_few_lengths(self):
        assert {bucket_of(length, 1000) for length in range(1, 1001)} == {64, 128, 256, 512, 1000}


class TestAnswers:
    @pytest.fixture(scope="class")
    def vocab(self, tmp_path_factory):
        return Vocab.load(train_sentencepiece(tmp_path_factory.mktemp("vocab") / "tokenizer.model"))

    def test_stop_strings_and_end_tokens(self, vocab):
        for text, ends in (("cat\n\nmore", []), ("cat", [2])):
            answer = Answer(vocab, vocab.encode("a"), {2}, ["\n\n"])
            for token in [*vocab.encode(text), *ends]:
                answer.add(token)
            assert answer.stopped is not bool(ends)
            answer.close()
            assert answer.text.strip() == "cat"

    def test_answer_that_goes_on_with_the_text(self, vocab):
        ids = vocab.encode("The quick brown fox jumps")
        for cut in range(1, len(ids)):
            answer = Answer(vocab, ids[:cut], {2}, [])
            for token in ids[cut:]:
                answer.add(token)
            answer.close()
            assert vocab.decode(ids[:cut]) + answer.text == "The quick brown fox jumps"

    def test_limit_reached(self, vocab):
        answer = Answer(vocab, vocab.encode("a"), {2}, ["xyz"])
        for token in vocab.encode("fox x"):
            answer.add(token)
        answer.close()
        assert answer.text.strip() == "fox x"                            # what could have begun a stop string is kept

    def test_settings_of_a_task(self):
        plain = read_settings({"until": "Q", "max_gen_toks": 7, "temperature": 0.0, "do_sample": False, "top_p": 0.5})
        assert plain == {"do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0,
                         "min_new_tokens": 0, "until": ["Q"], "max_new_tokens": 7, "unknown": []}
        assert read_settings({}) ["max_new_tokens"] == 256
        sampled = read_settings({"do_sample": True, "temperature": 0.7, "beams": 3})
        assert sampled["do_sample"] and sampled["temperature"] == 0.7 and sampled["unknown"] == ["beams"]
        for wrong in ({"max_gen_toks": 0}, {"until": [3]}):
            with pytest.raises(ConfigError, match="generation_kwargs"):
                read_settings(wrong)


class TestData:
    @pytest.mark.parametrize("files, name", [
        (["test/law_test.csv", "dev/law_dev.csv", "dev/biology_dev.csv"], "law"),                        # C-Eval
        (["test/law.csv", "dev/law.csv", "test/lawyer.csv"], "law"),                                     # CMMLU
        (["law/test-00000-of-00001.parquet", "law/dev-00000-of-00001.parquet", "law/README.md"], "law"),  # the hub
        (["main/test-0.parquet", "main/dev-0.parquet"], "main"),
        (["test.jsonl", "dev.jsonl"], None)])
    def test_layouts(self, tmp_path, files, name):
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
        assert find_files(tmp_path, name) == {
            "test": [str(tmp_path / files[0])], "dev": [str(tmp_path / files[1])]}
        assert find_files(tmp_path / "none", name) == {}

    def test_near_names(self):
        known = ["ceval-valid", "ceval-valid_law", "gsm8k", "gsm8k_cot", "uleval", "mmlu"]
        assert tasks.near_names("cevl", known)[0] == "ceval-valid"
        assert tasks.near_names("gms8k", known) == ["gsm8k"]
        assert tasks.near_names("zzz", known) == []

    def test_harness_that_is_not_installed(self, monkeypatch):
        def version(name):
            raise tasks.metadata.PackageNotFoundError(name)
        monkeypatch.setattr(tasks.metadata, "version", version)
        with pytest.raises(ConfigError, match=r"pip install -e '\.\[evaluation\]'"):
            tasks.harness_version()


RESULTS = {
    "results": {"sum": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "sum"}, "a": {"acc,none": 0.25},
                "b": {"acc,none": 0.75}, "gen": {"exact_match,strict": 0.125, "exact_match_stderr,strict": "N/A"}},
    "groups": {"sum": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "sum"}}, "group_subtasks": {"sum": ["a", "b"]},
    "n-shot": {"sum": 5, "gen": 0},
    "n-samples": {"a": {"effective": 3}, "b": {"effective": 4}, "gen": {"effective": 8}}}


class TestReport:
    def test_groups_stand_for_their_tasks(self):
        rows = report.result_rows(RESULTS)
        assert rows == [("sum", "acc", "", 5, 7, 0.5, 0.1), ("gen", "exact_match", "strict", 0, 8, 0.125, None)]
        lines = report.result_table(rows).splitlines()
        assert lines[2].split() == ["sum", "acc", "5", "7", "0.5000", "0.1000"]
        assert "exact_match (strict)" in lines[3]

    def test_files(self, tmp_path):
        path = tmp_path / "new" / "result.json"
        report.write_results(path, {"tasks": ["a"]}, {"a": [{"doc": {"q": "问"}}]})
        assert json.loads(path.read_text(encoding="utf-8")) == {"tasks": ["a"]}
        assert json.loads(report.samples_path(path).read_text(encoding="utf-8")) == {"task": "a", "doc": {"q": "问"}}
        assert report.draw_bars(report.result_rows(RESULTS), path.with_suffix(".png"))
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert not report.draw_bars([], path.with_suffix(".png")) and not list(path.parent.glob("*.part"))
        assert report.versions()["numpy"] == np.__version__


class TestMistakes:
    def test_of_the_command_line(self, tmp_path, capfd):
        text = tmp_path / "text.jsonl"
        text.write_text('{"text": "a"}\n{"body": "b"}\n')
        broken = tmp_path / "broken.jsonl"
        broken.write_text("{\n")
        (tmp_path / "empty.txt").write_text(" \n")
        (tmp_path / "records.jsonl").write_text('{"text": 3}\n')
        (tmp_path / "x.ckpt").touch()
        model = ["--config", RECIPE, "--load_checkpoint", tmp_path / "x.ckpt"]
        for options, message in (
                (model, "pass either --tasks"),
                ([*model, "--tasks", "a", "--perplexity", text], "pass either --tasks"),
                (["--tasks", "gsm8k"], "--config is missing"),
                (["--tasks", "gsm8k", "--config", RECIPE], "--load_checkpoint is missing"),
                (["--tasks", "gsm8k", "--config", "none.yaml"], "none.yaml does not exist"),
                (["--tasks", "gsm8k", "--config", RECIPE, "--load_checkpoint", "no.ckpt"], "no.ckpt does not exist"),
                ([*model, "--tasks", "gsm8k", "--batch_size", 0], "--batch_size: expected"),
                ([*model, "--tasks", "gsm8k", "--limit", 0], "--limit: expected"),
                ([*model, "--tasks", "gsm8k", "--num_fewshot", -1], "--num_fewshot: expected"),
                ([*model, "--tasks", "gsm8k", "--seed", -1], "--seed: expected"),
                ([*model, "--tasks", "gsm8k", "--system", "x"], "--apply_chat_template"),
                ([*model, "--tasks", "gsm8k", "--output", tmp_path], "--output: expected"),
                ([*model, "--perplexity", tmp_path / "none.txt"], "--perplexity: input file not found: "),
                ([*model, "--perplexity", tmp_path / "records.jsonl"], "the format of"),
                ([*model, "--perplexity", tmp_path / "empty.txt"], "empty.txt contains no text"),
                ([*model, "--perplexity", text], "text.jsonl, record 2: wrong shape"),
                ([*model, "--perplexity", broken], "broken.jsonl contains no readable record")):
            code, errors = run(capfd, *options)
            assert code == 1 and len(errors) == 1 and message in errors[0], (options, errors)

    @needs_harness
    def test_of_tasks_and_data(self, tmp_path, capfd, monkeypatch):
        import datasets
        monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
        (tmp_path / "gsm8k").mkdir()
        own = tmp_path / "own"
        own.mkdir()
        (own / "t.yaml").write_text("task: broken\ndataset_path: json\noutput_type: nonsense\ntest_split: test\n")
        before = datasets.load_dataset
        for options, message in (
                (["--tasks", "gsm8k"], "the data set openai/gsm8k (main) was not found"),
                (["--tasks", "gsm8k", "--data", tmp_path], "has no files for the data set openai/gsm8k"),
                (["--tasks", "gsm8k", "--data", tmp_path / "none"], "none is not a folder"),
                (["--tasks", "broken", "--include_path", own], "broken"),
                (["--tasks", "brokn", "--include_path", own], "similar names: broken")):
            code, errors = run(capfd, "--data_only", *options)
            assert code == 1 and len(errors) == 1 and message in errors[0], (options, errors)
        assert datasets.load_dataset is before


class TestTexts:
    def test_answers_are_scored_as_in_training(self, tmp_path):
        """Of a conversation each answer with its end marker, given all before it; of a text every token."""
        vocab = Vocab.load(train_sentencepiece(tmp_path / "tokenizer.model"))
        renderer = Renderer(get_template("telechat"), vocab)
        talk = [{"role": "user", "content": "who are you"}, {"role": "bot", "content": "fox"},
                {"role": "user", "content": "the end"}, {"role": "bot", "content": "the lazy dog"}]
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "a.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
        (tmp_path / "data" / "b.jsonl").write_text('{"text": "jumps over"}\n')
        records = read_records(str(tmp_path / "data"))
        parts = parts_of(records, renderer, 1, 64)
        ids, mask = renderer.render(talk)
        first, second, text = parts.windows
        assert [*first.ids] == ids[:len(first.ids)] and [*second.ids] == ids
        assert ids[len(first.ids) - first.count:len(first.ids)] == [*vocab.encode("fox"), renderer.end_id]
        assert first.count + second.count == sum(mask)
        assert [*text.ids] == [1, *vocab.encode("jumps over")] and text.count == len(text.ids) - 1
        assert (parts.texts, parts.answers, parts.unscored) == (2, 2, 0)
        assert parts.bytes == len("foxthe lazy dogjumps over")
        assert parts_of(records, renderer, 1, 3).unscored > 0

    def test_runs_of_ones(self):
        assert spans([0, 1, 1, 0, 1]) == [(1, 3), (4, 5)] and spans([]) == [] and spans([1]) == [(0, 1)]
