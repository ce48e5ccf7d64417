"""What commands that write one file replace: their own, and nothing else."""
import json

import pytest

from research.telechat.commands import evaluate, merge_lora, plan
from research.telechat.commands.predict import is_answers
from research.telechat.common.errors import ConfigError, OverwriteError
from research.telechat.common.files import refuse_foreign


@pytest.mark.parametrize("text,own", [
    ('{"line": 1, "input": "q", "output": "a"}\n{"line": 2, "error": "e"}\n', True),
    ('{"line": 1, "error": "e"}', True), ('{"input": "q"}\n', False), ('{"line": 1, "input": "q"}', False),
    ("[1]", False), ("", False), ("\x00\xff", False)])
def test_answers_replace_answers_only(tmp_path, text, own):
    path = tmp_path / "x.jsonl"
    path.write_text(text, encoding="latin-1")
    assert is_answers(path) is own
    for overwrite in (True, False):
        if own or overwrite:
            refuse_foreign([path], is_answers, overwrite)
        else:
            with pytest.raises(OverwriteError, match=r"x\.jsonl would be replaced.*--overwrite"):
                refuse_foreign([path], is_answers, overwrite)


def test_a_report_replaces_reports_only(tmp_path):
    output = tmp_path / "report.json"
    words = ["--perplexity", "texts.txt", "--config", "recipe.yaml", "--load_checkpoint", str(tmp_path), "--output",
             str(output)]
    args = evaluate.build_parser().parse_args(words)
    evaluate.check(args)
    output.write_text(json.dumps({"recipe": "r", "checkpoint": "c", "tokenizer_sha256": "t"}))
    evaluate.check(args)
    output.write_text("{}")
    with pytest.raises(ConfigError, match=r"report\.json would be replaced"):
        evaluate.check(args)
    evaluate.check(evaluate.build_parser().parse_args([*words, "--overwrite"]))
    output.unlink()
    (tmp_path / "report.png").write_bytes(b"somebody's")
    with pytest.raises(ConfigError, match=r"report\.png would be replaced"):
        evaluate.check(args)


def test_merging_leaves_what_is_there(tmp_path, capfd):
    (tmp_path / "x.ckpt").write_bytes(b"somebody's")
    words = ["--base", str(tmp_path / "none.ckpt"), "--adapter", str(tmp_path / "none.ckpt"), "--output",
             str(tmp_path / "x.ckpt")]
    assert merge_lora.main(words) == 1
    assert (tmp_path / "x.ckpt").read_bytes() == b"somebody's" and not list(tmp_path.glob(".*"))


def test_a_plan_replaces_plans_and_its_pictures_only(tmp_path, capfd):
    words = ["--config", "research/telechat/finetune_telechat_tiny_cpu.yaml", "--json", str(tmp_path / "p.json"),
             "--picture", str(tmp_path / "p.png")]
    assert plan.main(words) == 0 and plan.main(words) == 0
    capfd.readouterr()
    for name, content in (("p.json", b'{"ranks": 1}'), ("p.png", b"\x89PNG, somebody's")):
        mine = tmp_path / name
        mine.write_bytes(content)
        assert plan.main(words) == 1
        assert f"{name} would be replaced" in capfd.readouterr().err and mine.read_bytes() == content
        assert plan.main([*words, "--overwrite"]) == 0 and mine.read_bytes() != content
    assert plan.main([*words[:-1], str(tmp_path / "p.pdf")]) == 1
    assert "expected the name of a .png file" in capfd.readouterr().err and not (tmp_path / "p.pdf").exists()
