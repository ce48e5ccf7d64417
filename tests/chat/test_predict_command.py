"""commands/predict.py: files of questions, the terminal chat as a real program, and the mistakes of its users."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chat_fixtures import save_tiny, tiny_weights
from vocab_fixtures import train_sentencepiece

from research.telechat.text.renderer import Renderer, get_template
from research.telechat.text.vocab import Vocab

ROOT = Path(__file__).resolve().parents[2]
USER = [{"role": "user", "content": "你是谁？"}]


@pytest.fixture(scope="module")
def vocab_file(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("vocab") / "tokenizer.model")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(checkpoint, options of the recipe)"""
    path = tmp_path_factory.mktemp("model") / "tiny.ckpt"
    return path, save_tiny(path)


def predict(tiny, vocab_file, tmp_path, capfd, *more):
    """Run commands/predict.py; returns its exit code, results and error lines."""
    from research.telechat.commands import predict as predict_command
    code = predict_command.main([
        "--yaml_file", "research/telechat/predict_telechat_tiny_cpu.yaml", "--vocab_file_path", str(vocab_file),
        "--checkpoint_path", str(tiny[0]), "--output_dir", str(tmp_path), *tiny[1], *more])
    results = tmp_path / "telechat_predict.jsonl"
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []
    return code, lines, [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_file_of_questions(tiny, vocab_file, tmp_path, capfd):
    """Broken lines are named, the others answered; the lines are one conversation."""
    questions = tmp_path / "questions.json"
    questions.write_text('{"input": "你是谁？"}\n{broken\n\n{"input": "and?"}\n{"input": ""}\n'
                         '{"input": "new", "history": []}\n', encoding="utf-8")
    code, lines, errors = predict(tiny, vocab_file, tmp_path, capfd, "--input_file", str(questions), "--use_past",
                                  "True", "--max_new_tokens", "6")
    assert code == 1
    assert [line["line"] for line in lines] == [1, 2, 4, 5, 6]
    assert "error" in lines[1] and "error" in lines[3]
    assert [f"line {number}: " in error for number, error in zip((2, 5), errors)] == [True, True]
    renderer = Renderer(get_template("telechat"), Vocab.load(vocab_file))
    turns = [*USER, {"role": "bot", "content": lines[0]["output"]}, {"role": "user", "content": "and?"}]
    assert lines[2]["prompt_tokens"] == len(renderer.prompt(turns))
    assert lines[4]["prompt_tokens"] == len(renderer.prompt([{"role": "user", "content": "new"}]))
    assert all(line["new_tokens"] <= 6 and line["tokens_per_second"] > 0 for line in lines if "output" in line)
    from model_fixtures import build_model

    from research.telechat.chat.api import chat
    reference = build_model(*tiny_weights(), use_past=False, rotary_dtype="float32")
    assert chat(reference, renderer.vocab, "你是谁？", max_new_tokens=6)[0] == lines[0]["output"]


def test_mistakes_of_the_command(tiny, vocab_file, tmp_path, capfd):
    questions = tmp_path / "questions.json"
    questions.write_text('{"input": "你是谁？"}\n', encoding="utf-8")
    empty = tmp_path / "empty.json"
    empty.write_text("\n")
    file = ["--input_file", str(questions)]
    for more, message in ((["--input_file", str(empty)], "empty.json is empty"),
                          (["--input_file", str(tmp_path / "none")], "none cannot be read"),
                          ([], "--input_file is missing"),
                          (["--interactive", "--use_parallel", "True"], "needs a single process"),
                          ([*file, "--yaml_file", ""], "--yaml_file is missing"),
                          ([*file, "--yaml_file", "none.yaml"], "none.yaml does not exist"),
                          ([*file, "--checkpoint_path", "none.ckpt"], "none.ckpt does not exist"),
                          ([*file, "--vocab_file_path", "none.model"], "none.model"),
                          ([*file, "--user_token", "<nobody>"], "'<nobody>'"),
                          ([*file, "--model.model_config.vocab_size", "599"], "not a checkpoint of this recipe's"),
                          ([*file, "--tools_file", str(questions)], "must hold a list")):
        code, lines, errors = predict(tiny, vocab_file, tmp_path, capfd, *more)
        assert code == 1 and not lines and len(errors) == 1 and message in errors[0], (more, errors)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
def test_interactive_chat_survives_ctrl_c(tiny, vocab_file, tmp_path):
    """The real program in a pseudo-terminal: MindSpore itself would end it at SIGINT."""
    import fcntl
    import pty
    import select
    import termios
    master, slave = pty.openpty()
    settings = termios.tcgetattr(slave)
    settings[3] |= termios.NOFLSH                            # Ctrl-C would discard output that nobody has read yet
    termios.tcsetattr(slave, termios.TCSANOW, settings)
    command = [sys.executable, "research/telechat/run_telechat_predict.py", "--interactive", "--yaml_file",
               "research/telechat/predict_telechat_tiny_cpu.yaml", "--vocab_file_path", str(vocab_file),
               "--checkpoint_path", str(tiny[0]), "--output_dir", str(tmp_path), "--use_past", "True",
               "--max_new_tokens", "90", "--do_sample", "True", "--temperature", "9.0", "--top_k", "0", *tiny[1]]
    process = subprocess.Popen(command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                               preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0))
    os.close(slave)
    seen = b""

    def wait_for(*texts):
        """The output up to one of the texts, that one included."""
        nonlocal seen
        while not any(text in seen for text in texts):
            ready, _, _ = select.select([master], [], [], 120)
            try:
                assert ready, f"the program says no more: {seen.decode(errors='replace')}"
                seen += os.read(master, 4096)
            except OSError:
                raise AssertionError(f"the program ended: {seen.decode(errors='replace')}") from None
        end = min(seen.find(text) + len(text) for text in texts if text in seen)
        part, seen = seen[:end], seen[end:]
        return part.decode(errors="replace")
    try:
        begin = wait_for(b"lists the commands.")
        assert "WARNING" not in begin, begin                 # MindFormers' own, at which a user can do nothing
        os.write(master, "你是谁？\n".encode())
        assert "compiling ..." in wait_for(b"per second")
        answer = ""
        while "(stopped)" not in answer:                     # the answer may be over before Ctrl-C comes
            os.write(master, b"again\n")
            wait_for(b"again\r\n")
            seen += os.read(master, 64)
            os.write(master, b"\x03")
            answer = wait_for(b"(stopped)", b"leaves)")
        wait_for(b"per second")
        os.write(master, b"/history\n")
        wait_for(b"user: again")
        os.write(master, b"/exit\n")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(master)


def test_help_needs_no_mindspore():
    code = ("import sys; sys.modules['mindspore'] = None; sys.path.insert(0, '.'); "
            "from research.telechat.commands.predict import build_parser; build_parser().parse_args(['--help'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          check=True)
    assert "--interactive" in done.stdout
