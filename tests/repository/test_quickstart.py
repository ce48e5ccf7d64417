"""The quick start: its steps' bookkeeping, its parts, and (slow) the whole of it."""
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from golden import SHARED, needs_shared

from scripts import quickstart, step_runner
from scripts.step_runner import StepError, Workspace

ROOT = Path(__file__).resolve().parents[2]


def write(text):
    """A step that writes `text`."""
    return lambda folder: (folder / "file").write_text(text)


def release(space):
    """What the end of the process does."""
    space._lock.close()


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in (".lock", ".steps.json"))


def test_step_is_reused_while_its_inputs_stay(tmp_path, capsys):
    source = tmp_path / "source"
    source.write_text("one")
    made = []

    def run_once():
        space = Workspace(tmp_path / "out", steps=1)
        key = space.step("a", "Title", ["option", source], lambda folder: made.append(write("x")(folder)))
        release(space)
        return key

    assert run_once() == run_once() and len(made) == 1
    assert "reused" in capsys.readouterr().out
    source.write_text("two")                               # input changed
    run_once()
    assert len(made) == 2
    (tmp_path / "out" / "a" / "file").write_text("longer than before")      # result changed
    run_once()
    assert len(made) == 3
    (tmp_path / "out" / ".steps.json").write_text("{broken")
    run_once()
    assert len(made) == 4 and names(tmp_path / "out") == ["a"]


def test_failed_step_leaves_nothing_and_keeps_what_was_there(tmp_path):
    space = Workspace(tmp_path, steps=1)
    space.step("a", "Title", ["1"], write("first"))

    def fail(folder):
        write("half")(folder)
        raise StepError("no")

    with pytest.raises(StepError):
        space.step("a", "Title", ["2"], fail)
    assert names(tmp_path) == ["a"] and (tmp_path / "a" / "file").read_text() == "first"
    assert space.is_done("a", step_runner.hash_inputs(["a", "1"]))


def test_fresh_removes_only_what_steps_made(tmp_path):
    space = Workspace(tmp_path, steps=1)
    space.step("a", "Title", [], write("x"))
    release(space)
    (tmp_path / "thesis").mkdir()
    (tmp_path / ".partial-b").mkdir()
    release(Workspace(tmp_path, steps=1, fresh=True))
    assert names(tmp_path) == ["thesis"]


def test_two_runs_at_once(tmp_path):
    space = Workspace(tmp_path, steps=1)
    with pytest.raises(StepError, match="another run"):
        Workspace(tmp_path, steps=1)
    release(space)
    release(Workspace(tmp_path, steps=1))


@pytest.mark.parametrize("code, message", [
    ("print('error: the file x is missing'); raise SystemExit(1)", "the file x is missing"),
    ("raise SystemExit(7)", "exit code 7"),
])
def test_failed_command_is_one_line(tmp_path, code, message):
    with pytest.raises(StepError) as caught:
        step_runner.run_command([sys.executable, "-c", code], tmp_path / "log", tmp_path)
    assert message in str(caught.value) and str(tmp_path / "log") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_interrupt_ends_the_command_and_leaves_no_partial_folder(tmp_path):
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from scripts.step_runner import Workspace
space = Workspace(Path({str(tmp_path)!r}), steps=1)
code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)', 'MARK{tmp_path}'])"
space.step("a", "Title", [], lambda folder: space.run("job", [sys.executable, "-c", code], folder))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, stdout=subprocess.PIPE)

    def children():
        found = [path for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        return [path for path in found if f"\0MARK{tmp_path}\0".encode() in safe_read(path)]

    deadline = time.time() + 30
    while not children() and time.time() < deadline:
        time.sleep(0.1)
    assert children(), process.communicate(timeout=5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0
    time.sleep(0.5)
    assert not children() and names(tmp_path) == ["logs"]


def safe_read(path):
    """The content of a file that may vanish."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_tokenizer_has_the_official_marker_ids(tmp_path):
    import sentencepiece
    quickstart.train_tokenizer(tmp_path, 2000)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    pieces = ["<_unk>", "<_start>", "<_end>", "<_pad>"]
    assert [tokenizer.id_to_piece(i) for i in range(4)] == pieces and tokenizer.pad_id() == 3
    assert [tokenizer.piece_to_id(piece) for piece in ("<_user>", "<_bot>", "<_system>")] == [20, 21, 22]
    assert tokenizer.vocab_size() <= 2000
    for record in quickstart.conversations():
        assert tokenizer.unk_id() not in tokenizer.encode(record["output"])
        assert tokenizer.decode(tokenizer.encode(record["output"])) == record["output"]


@needs_shared
def test_marker_ids_are_those_of_the_official_tokenizer():
    import sentencepiece
    official = sentencepiece.SentencePieceProcessor(model_file=str(SHARED / "data/telechat-12b/tokenizer.model"))
    count = 4 + len(quickstart.FIRST_PIECES)
    expected = ["<_unk>", "<_start>", "<_end>", "<_pad>", *quickstart.FIRST_PIECES]
    assert [official.id_to_piece(i) for i in range(count)] == expected


def write_checkpoint(folder):
    folder.mkdir(exist_ok=True)
    config = dict(num_layers=2, hidden_size=16, intermediate_size=24, num_heads=2, vocab_size=50)
    quickstart.write_official_checkpoint(folder, config)
    from safetensors.numpy import load_file
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def test_official_checkpoint(tmp_path):
    tensors, config = write_checkpoint(tmp_path / "a")
    again, _ = write_checkpoint(tmp_path / "b")
    assert {name: value.tobytes() for name, value in tensors.items()} == {n: v.tobytes() for n, v in again.items()}
    assert config["n_layer"] == 2 and config["ffn_hidden_size"] == 24 and config["tie_word_embeddings"] is False
    assert tensors["transformer.h.1.mlp.down_proj.weight"].shape == (16, 24)
    assert tensors["lm_head.weight"].shape == (50, 16)
    assert np.all(tensors["transformer.ln_f.weight"] == 1) and not tensors["transformer.h.0.mlp.down_proj.bias"].any()


@needs_shared
def test_official_checkpoint_has_the_official_names(tmp_path):
    tensors, config = write_checkpoint(tmp_path)
    index = json.loads((SHARED / "data/telechat-12b/pytorch_model.bin.index.json").read_text())["weight_map"]
    official_config = json.loads((SHARED / "data/telechat-12b/config.json").read_text())
    layers = re.compile(r"\.h\.(\d+)\.")
    small = {name for name in index if not layers.search(name) or int(layers.search(name).group(1)) < 2}
    assert set(tensors) == small
    assert set(config) - {"skip_bias_add_qkv", "slow_but_exact"} <= set(official_config)


def test_answers_are_read_from_the_result_file(tmp_path):
    result = tmp_path / "result.txt"
    result.write_text(str([{"text_generation_text": ["<_user>一？<_bot>二。<_end>"]},
                           {"text_generation_text": ["Why?It's so.\n<_pad>"]}]), encoding="utf-8")
    assert quickstart.read_answers(result, ["<_user>一？<_bot>", "<_user>Why?<_bot>"]) == ["二。", "It's so."]
    with pytest.raises(StepError, match="2 answers to 1"):
        quickstart.read_answers(result, ["<_user>一？<_bot>"])


def test_wrong_answer_fails(tmp_path, capsys):
    for answer in ("right", "wrong"):
        (tmp_path / "answers.json").write_text(json.dumps({quickstart.QUESTIONS[0]: answer}))
        if answer == "right":
            quickstart.check_answer(tmp_path, "right")
            assert "is right" in capsys.readouterr().out
        else:
            with pytest.raises(StepError, match="is wrong"):
                quickstart.check_answer(tmp_path, "right")


def test_loss_must_fall():
    quickstart.check_learnt([7.0, *[0.1] * 20])
    for losses in ([7.0, *[3.0] * 20], [7.0, *[float("nan")] * 20]):
        with pytest.raises(StepError, match="did not fall"):
            quickstart.check_learnt(losses)


def test_progress_follows_the_log(tmp_path, capsys, monkeypatch):
    log = tmp_path / "log.jsonl"
    progress = quickstart.TrainingProgress(log, total=9)
    progress()
    log.write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "lo')     # the second line is being written
    progress()
    assert progress.steps == 1 and progress.loss == 5.0
    with log.open("a") as lines:
        lines.write('ss": 4.0}\n')
    progress.shown -= 100
    progress()
    assert progress.steps == 2 and "step 2/9, loss 4.000" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1800)      # a minute or two of work, but on a busy machine...
def test_whole_quickstart(tmp_path):
    command = [sys.executable, "scripts/quickstart.py", "--output", str(tmp_path / "out")]
    before = set(ROOT.iterdir())
    first = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=1500)
    assert first.returncode == 0, first.stdout + first.stderr
    expected = next(each["output"] for each in quickstart.conversations() if quickstart.QUESTIONS[0] in each["input"])
    assert f"{quickstart.QUESTIONS[0]}\n  {expected}" in first.stdout
    picture = (tmp_path / "out" / "finetune" / "training_curve.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert names(tmp_path / "out") == sorted(["dataset", "finetune", "logs", "mindspore_checkpoint",
                                              "official_checkpoint", "predict", "tokenizer"])
    assert {path.name for path in set(ROOT.iterdir()) - before} <= {"__pycache__", ".pytest_cache", ".hypothesis"}
    second = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=250)
    assert second.returncode == 0 and second.stdout.count("reused") == 6 and expected in second.stdout
