"""Prediction with run_mindformer.py in batches that the number of prompts does not fill: one answer for each prompt."""
import ast
from pathlib import Path

import prepared
import pytest
from chat_fixtures import save_tiny
from vocab_fixtures import train_sentencepiece

from research.telechat.run.prompts import first_answers, print_answers, write_results

pytestmark = pytest.mark.matrix

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("results", "count", "kept"), [
    ([{"text_generation_text": ["a", "b"]}, {"text_generation_text": ["c", "c"]}], 3,
     [{"text_generation_text": ["a", "b"]}, {"text_generation_text": ["c"]}]),
    ([{"text_generation_text": ["a"]}, {"text_generation_text": ["b"]}], 1, [{"text_generation_text": ["a"]}]),
    ([{"text_generation_text": "a"}, {"text_generation_text": "b"}], 1, [{"text_generation_text": "a"}]),
    ([["a", "b"], ["c", "d"]], 3, [["a", "b"], ["c"]]),
    (["a", "b", "b"], 2, ["a", "b"]),
    (None, 2, []),
])
def test_answers_to_fillers_are_cut(tmp_path, capsys, results, count, kept):
    assert first_answers(results, count) == kept
    write_results(str(tmp_path / "result.txt"), kept)
    assert ast.literal_eval((tmp_path / "result.txt").read_text(encoding="utf-8")) == kept
    assert [path.name for path in tmp_path.iterdir()] == ["result.txt"]
    print_answers(["p"] * count, kept)
    assert capsys.readouterr().out.count("answer: ") == (count if results else 0)


def test_prompt_is_cut_from_the_answer_though_its_markers_vanish(capsys):
    """Control symbols are not in the text of a result, which then begins with the prompt as it is shown."""
    print_answers(["<_user>q<_bot>", "<_user>p<_bot>"], ["qa", "<_user>p<_bot>b"], ["q", "p"])
    assert capsys.readouterr().out.splitlines()[1::2] == ["answer: a", "answer: b"]


@pytest.mark.slow
def test_each_prompt_is_answered_once(tmp_path):
    checkpoint = tmp_path / "tiny.ckpt"
    options = save_tiny(checkpoint)
    vocab = train_sentencepiece(tmp_path / "tokenizer.model")
    prompts = ["one", "two", "three"]
    done = prepared.run(
        [ROOT / "run_mindformer.py", "--config", "research/telechat/predict_telechat_tiny_cpu.yaml",
         "--register_path", "research/telechat", "--load_checkpoint", str(checkpoint), "--predict_batch_size", "2",
         "--output_dir", str(tmp_path / "out"), "--processor.tokenizer.vocab_file", str(vocab), *options,
         "--model.model_config.max_decode_length", "40", "--predict_data", *prompts])
    assert done.returncode == 0, done.stderr[-3000:]
    written = ast.literal_eval((tmp_path / "out" / "text_generation_result.txt").read_text(encoding="utf-8"))
    texts = [text for result in written for text in result["text_generation_text"]]
    assert len(texts) == 3 and all(prompt in text for prompt, text in zip(prompts, texts))
    assert done.stdout.count("\nanswer: ") == 3
