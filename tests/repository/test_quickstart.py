"""The quick start: its steps' bookkeeping, its parts, and (slow) the whole of it."""
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import prepared
import pytest
from golden import SHARED, needs_shared

from scripts import quickstart
from scripts.quickstart import STEPS, StepError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def steps(monkeypatch):
    """The names of the steps that ran, in order; each writes its name into its folder instead of doing its work."""
    ran = []

    def make_step(name, folder, output):
        ran.append(name)
        (folder / "file").write_text(name)

    monkeypatch.setattr(quickstart, "make_step", make_step)
    return ran


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_what_exists_is_kept_and_what_follows_a_repeated_step_is_made_again(tmp_path, steps, capsys):
    quickstart.run_steps(tmp_path)
    assert steps == list(STEPS) and names(tmp_path) == sorted(STEPS)
    quickstart.run_steps(tmp_path)
    assert steps == list(STEPS) and capsys.readouterr().out.count("done before, kept") == len(STEPS)
    (tmp_path / "dataset" / "file").unlink()
    (tmp_path / "dataset").rmdir()
    quickstart.run_steps(tmp_path)                        # the later folders came from the one that is gone
    assert steps[len(STEPS):] == list(STEPS)[1:] and names(tmp_path) == sorted(STEPS)


def test_failed_step_leaves_nothing_and_is_where_the_next_run_begins(tmp_path, steps, monkeypatch):
    working = quickstart.make_step

    def fail(name, folder, output):
        working(name, folder, output)
        if name == "finetune":
            raise StepError("no")

    monkeypatch.setattr(quickstart, "make_step", fail)
    with pytest.raises(StepError):
        quickstart.run_steps(tmp_path)
    assert names(tmp_path) == sorted(list(STEPS)[:4])
    (tmp_path / ".partial-finetune").mkdir()              # left by a run that was killed
    (tmp_path / ".partial-finetune" / "checkpoint").write_text("half")
    monkeypatch.setattr(quickstart, "make_step", working)
    steps.clear()
    quickstart.run_steps(tmp_path)
    assert steps == ["finetune", "predict"] and [path.name for path in (tmp_path / "finetune").iterdir()] == ["file"]


@pytest.mark.parametrize(("options", "again"), [
    ([], []), (["--fresh"], list(STEPS)), (["--from", "finetune"], ["finetune", "predict"]),
])
def test_options(tmp_path, steps, monkeypatch, options, again):
    monkeypatch.setattr(quickstart, "check_answer", lambda folder: None)
    monkeypatch.setattr(quickstart, "print_outlook", lambda output, seconds: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--output", str(tmp_path)])
    assert quickstart.main() == 0
    (tmp_path / "thesis").mkdir()                         # the user's own
    steps.clear()
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--output", str(tmp_path), *options])
    assert quickstart.main() == 0 and steps == again and "thesis" in names(tmp_path)


def test_two_runs_at_once(tmp_path, steps, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--output", str(tmp_path), "--fresh"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with quickstart.lock(tmp_path):
        assert quickstart.main() == 1 and steps == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: another run is using ")
    quickstart.lock(tmp_path).close()


@pytest.mark.parametrize("code, message", [
    ("print('error: the file x is missing'); raise SystemExit(1)", "the file x is missing"),
    ("raise SystemExit(7)", "exit code 7"),
])
def test_failed_command_is_one_line(tmp_path, code, message):
    with pytest.raises(StepError) as caught:
        quickstart.run_command([sys.executable, "-c", code], tmp_path / "log")
    assert message in str(caught.value) and str(tmp_path / "log") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_commands_are_shown_as_they_can_be_pasted(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert quickstart.show([str(ROOT / "a/.partial-b/c d"), "/elsewhere/x"]) == "'a/b/c d' /elsewhere/x"
    monkeypatch.chdir("/")
    assert quickstart.show([str(ROOT / "a")]) in (str(ROOT / "a"), str(ROOT / "a")[1:])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_the_command_and_leaves_no_partial_folder(tmp_path, number):
    mark = f"MARK{tmp_path}"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)', {mark!r}])"
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from scripts import quickstart
quickstart.make_step = lambda name, folder, output: quickstart.run_command([sys.executable, "-c", {code!r}],
                                                                           output / "logs" / "x.log")
sys.argv = ["quickstart.py", "--output", {str(tmp_path)!r}]
sys.exit(quickstart.main())
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True)

    def children():
        found = [path for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        return [path for path in found if f"\0{mark}\0".encode() in safe_read(path)]

    deadline = time.time() + 30
    while not children() and time.time() < deadline:
        time.sleep(0.1)
    assert children(), process.communicate(timeout=5)
    process.send_signal(number)
    assert "Finished steps are kept" in process.communicate(timeout=30)[1]
    assert process.returncode == 130
    while children() and time.time() < deadline + 10:
        time.sleep(0.1)
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
    expected = next(each["output"] for each in quickstart.conversations() if quickstart.QUESTIONS[0] in each["input"])
    for answer in (expected, "wrong"):
        (tmp_path / "answers.json").write_text(json.dumps({quickstart.QUESTIONS[0]: answer}))
        if answer == expected:
            quickstart.check_answer(tmp_path)
            assert "is right" in capsys.readouterr().out
        else:
            with pytest.raises(StepError, match="is wrong"):
                quickstart.check_answer(tmp_path)


def test_loss_must_fall(tmp_path):
    log = tmp_path / "log.jsonl"

    def check(*losses):
        log.write_text("".join(f'{{"loss": {json.dumps(loss)}}}\n' for loss in losses))
        quickstart.check_learnt(log)

    check(7.0, *[0.1] * 20)
    for end in (3.0, float("nan")):
        with pytest.raises(StepError, match="did not fall"):
            check(7.0, *[end] * 20)


def test_progress_follows_the_log(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    progress = quickstart.TrainingProgress(log, total=9)
    progress()
    assert capsys.readouterr().out == ""
    for text, shown in (("", "compiling"), ('{"step": 1, "loss": 5.0}\n{"step": 2, "lo', "step 1/9, loss 5.000"),
                        ('ss": 4.0}\n', "step 2/9, loss 4.000")):       # the second line is written in two pieces
        with log.open("a") as lines:
            lines.write(text)
        progress.shown -= 100
        progress()
        assert shown in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)      # a minute or two of work, but on a busy machine...
def test_whole_quickstart(tmp_path):
    """On half of the conversations, so in half of the steps. Its commands are forked from a process that has MindSpore
    imported; that they start Python as users do, too, is in test_readme_commands.py."""
    output, python, half = tmp_path / "out", tmp_path / "python", tmp_path / "half.jsonl"
    prepared.put_python(python)
    lines = quickstart.EXAMPLES.read_text(encoding="utf-8").splitlines(keepends=True)
    asked = [line for line in lines if any(question in line for question in quickstart.QUESTIONS)]
    others = [line for line in lines if line not in asked]
    half.write_text("".join([*asked, *others][:len(lines) // 2]), encoding="utf-8")
    command = [str(python), "tests/support/quickstart_driver.py", str(half), "--output", str(output)]
    before = set(ROOT.iterdir())
    first = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=1500)
    assert first.returncode == 0, first.stdout + first.stderr
    expected = next(each["output"] for each in quickstart.conversations() if quickstart.QUESTIONS[0] in each["input"])
    assert f"{quickstart.QUESTIONS[0]}\n  {expected}" in first.stdout
    picture = (output / "finetune" / "training_curve.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert names(output) == sorted([*STEPS, "logs"])
    # Nothing else in the repository; `output` is what tests that run at the same time may make there.
    added = {path.name for path in set(ROOT.iterdir()) - before}
    assert added <= {"__pycache__", ".pytest_cache", ".hypothesis", "output"}
    second = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=250)
    assert second.returncode == 0 and second.stdout.count("kept") == len(STEPS) and expected in second.stdout
    # The last lines are commands that can be pasted: the trained model answers in the terminal, and in a browser
    # (tests/serve has that one).
    last = [line for line in second.stdout.splitlines() if line.strip()]
    assert "scripts/serve.py --demo" in last[-1]
    asks = next(line for line in reversed(last) if "run_telechat_predict.py" in line)
    chat = subprocess.run(["bash", "-c", asks], cwd=ROOT, text=True, capture_output=True,
                          input=f"{quickstart.QUESTIONS[0]}\n", timeout=250)
    assert chat.returncode == 0 and expected in chat.stdout, chat.stdout + chat.stderr
