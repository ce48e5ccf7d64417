"""Preprocessing as a command: what it writes, that nothing is lost, that it is reproducible and never half done."""
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from golden import SHARED, golden_json, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st
from vocab_fixtures import ORDINARY_SYMBOLS, train_byte_level_bpe, train_sentencepiece

from research.telechat.telechat_conversation import Renderer, get_template
from research.telechat.telechat_dataset_meta import check_dataset, check_dataset_meta, read_meta
from research.telechat.telechat_dataset_writer import DATASET_NAME, DatasetWriter
from research.telechat.telechat_encoding import Encoder
from research.telechat.telechat_preprocess import main
from research.telechat.telechat_sources import Chunk, Source, read_chunks
from research.telechat.telechat_variants import ConfigError
from research.telechat.telechat_vocab import Vocab
from research.telechat.telechat_workers import WorkerError, _guard, ordered_map

SCRIPT = Path(__file__).resolve().parents[1] / "research" / "telechat" / "telechat_preprocess.py"
SAMPLES = [{"input": f"<_user>question {number}<_bot>the fox<_user>and {'very ' * (number % 9)}?",
            "output": "它是一个 dog. " * (number % 13 + 1)} for number in range(60)]


@pytest.fixture(scope="module")
def vocab_files(tmp_path_factory):
    """A small vocabulary file per family."""
    folder = tmp_path_factory.mktemp("vocabs")
    train_sentencepiece(folder / "52b.model", user_defined_symbols=[
        *ORDINARY_SYMBOLS, "<reserve1>", "<reserve2>", "<reserve3>"], unk_piece="<unk>", bos_piece="<s>",
        eos_piece="</s>", pad_piece="<pad>")
    train_sentencepiece(folder / "12b.model")
    train_sentencepiece(folder / "telechat2.model", control=True)
    train_byte_level_bpe(folder / "7b.json")
    return {path.stem: path for path in folder.iterdir()}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def run(tmp_path, vocab, records=SAMPLES, *options, name="out", length=64):
    """Run the command in this process; returns (exit code, output folder)."""
    data = write_lines(tmp_path / f"{name}.jsonl", records) if isinstance(records, list) else records
    out = tmp_path / name
    arguments = ["--input_dataset_file", data, "--output_path", out, "--vocab_file_path", vocab, "--max_length", length,
                 "--num_workers", 0, *options]
    return main([str(argument) for argument in arguments]), out


def read_records(folder):
    """All records of a data set, as lists of int."""
    from mindspore.mindrecord import FileReader

    records = []
    for path in sorted(folder.glob("*.mindrecord")):
        reader = FileReader(str(path))
        records += [dict(record) for record in reader.get_next()]
        reader.close()
    return records


def report(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.json"}


def split_documents(records, start_id, pad_id):
    """The conversations in packed records whose every conversation begins with the start marker."""
    documents = []
    for record in records:
        ids = record["input_ids"].tolist()
        starts = [index for index, token in enumerate(ids) if token == start_id]
        for begin, end in zip(starts, [*starts[1:], len(ids)]):
            document = ids[begin:end]
            while document[-1] == pad_id:
                document.pop()
            documents.append(document)
    return documents


# What is written

def test_every_conversation_arrives_whole(tmp_path, vocab_files):
    code, out = run(tmp_path, vocab_files["12b"], SAMPLES, "--start_token", "<_start>", length=256)
    assert code == 0
    renderer = Renderer(get_template("telechat"), Vocab.load(vocab_files["12b"]), start_token="<_start>")
    expected = []
    for sample in SAMPLES:
        first, last = sample["input"][len("<_user>"):].split("<_bot>the fox<_user>")
        turns = zip((first, last), ("the fox", sample["output"]))
        expected.append(renderer.render([message for question, answer in turns for message in (
            {"role": "user", "content": question}, {"role": "bot", "content": answer})]))
    records = read_records(out)
    for record in records:
        assert set(record) == {"input_ids", "labels"}
        assert all(column.shape == (257,) and column.dtype == np.int32 for column in record.values())
        counted = record["labels"] != -100
        assert (record["labels"][counted] == record["input_ids"][counted]).all()
    documents = split_documents(records, renderer.start_id, renderer.pad_id)
    assert sorted(documents) == sorted(ids for ids, _ in expected)       # the last pack is there, too
    assert sum(int((record["labels"] != -100).sum()) for record in records) == sum(sum(mask) for _, mask in expected)
    assert sum(int((record["input_ids"] == 3).sum()) for record in records) == report(out)["tokens"]["padding"]


def test_files_beside_the_data_set(tmp_path, vocab_files):
    code, out = run(tmp_path, vocab_files["12b"])
    assert code == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "lengths.png", "meta.json", DATASET_NAME, f"{DATASET_NAME}.db", "report.json"]
    assert (out / "lengths.png").read_bytes().startswith(b"\x89PNG")
    meta = read_meta(out)
    vocab = Vocab.load(vocab_files["12b"])
    assert (meta["seq_length"], meta["record_length"], meta["pad_token_id"]) == (64, 65, 3)
    assert (meta["template"], meta["vocab_size"]) == ("telechat", vocab.size)
    assert meta["tokenizer_sha256"] == vocab.fingerprint
    assert meta["marker_ids"]["user"] == vocab.markers["<_user>"] and meta["marker_ids"]["start"] is None
    assert meta["records"] == len(read_records(out)) == report(out)["records_written"]
    assert meta["max_token_id"] == max(int(record["input_ids"].max()) for record in read_records(out))
    assert str(tmp_path) not in (out / "meta.json").read_text(encoding="utf-8")


def test_small_data_sets_are_small(tmp_path, vocab_files):
    code, out = run(tmp_path, vocab_files["12b"], SAMPLES[:1])
    assert code == 0 and (out / DATASET_NAME).stat().st_size < 200_000
    code, out = run(tmp_path, vocab_files["12b"], SAMPLES[:1], name="long", length=8192)
    assert code == 0 and (out / DATASET_NAME).stat().st_size < 400_000


@pytest.mark.parametrize("family,options,template", [
    ("12b", [], "telechat"),
    ("7b", ["--pad_token", "<pad>"], "telechat"),
    ("52b", ["--start_token", "<reserve3>", "--user_token", "<reserve1>", "--bot_token", "<reserve2>", "--pad_token",
             "<pad>"], "telechat_52b"),
    ("52b", [], "telechat_52b"),
    ("telechat2", [], "telechat2"),
])
def test_commands_of_every_family(tmp_path, vocab_files, family, options, template):
    code, out = run(tmp_path, vocab_files[family], SAMPLES, *options, length=256)
    assert code == 0
    meta = read_meta(out)
    assert meta["template"] == template and meta["markers_as_text"] == (family == "52b" and not options)
    records = read_records(out)
    vocab = Vocab.load(vocab_files[family])
    text = "".join(vocab.decode(record["input_ids"].tolist()) for record in records)
    assert all(text.count(f"question {number}{mark}") == 1 for number in range(60)
               for mark in (["<_bot>"] if not options or family == "7b" else ["<reserve2>"]))
    if "--start_token" in options:                                # before each conversation
        assert sum((record["input_ids"] == meta["marker_ids"]["start"]).sum() for record in records) == len(SAMPLES)
    sides = {"telechat2": "right"}
    assert meta["padding_side"] == sides.get(family, "left")
    padded = next(record["input_ids"] for record in records if (record["input_ids"] == 3).any())
    assert padded[-1 if sides.get(family) else 0] == 3


def test_document_boundaries(tmp_path, vocab_files):
    code, out = run(tmp_path, vocab_files["12b"], SAMPLES, "--document_boundaries", "--max_documents", "6",
                    "--start_token", "<_start>", "--padding_side", "right", length=256)
    assert code == 0
    start = read_meta(out)["marker_ids"]["start"]
    for record in read_records(out):
        starts = np.flatnonzero(record["input_ids"] == start)
        ends = record["actual_seq_len"]
        assert ends.shape == (6,) and ends.dtype == np.int32 and ends[-1] == 256 and 1 <= len(starts) <= 5
        assert ends[:len(starts) - 1].tolist() == starts[1:].tolist()


@pytest.mark.parametrize("long", ["split", "truncate", "drop"])
def test_tokens_kept_and_dropped_add_up(tmp_path, vocab_files, long):
    vocab = Vocab.load(vocab_files["12b"])
    renderer = Renderer(get_template("telechat"), vocab)
    code, out = run(tmp_path, vocab_files["12b"], SAMPLES, "--long", long, length=48)
    assert code == 0
    summary = report(out)
    tokens = summary["tokens"]
    chunks = list(read_chunks([Source(tmp_path / "out.jsonl")]))
    whole = Encoder(renderer, ["input_output"], 10_000)(chunks[0])
    assert tokens["read"] == int(whole.sizes.sum())
    assert tokens["kept"] + tokens["dropped"] == tokens["read"]
    assert tokens["written"] == tokens["kept"] + tokens["repeated_as_context"]
    assert tokens["written"] + tokens["padding"] == summary["records_written"] * 49
    conversations = summary["conversations"]
    assert conversations["read"] == len(SAMPLES) == (
        conversations["kept_whole"] + conversations["split"] + conversations["truncated"]
        + sum(conversations["dropped"].values()))
    assert (tokens["dropped"] == 0) == (long == "split")
    assert tokens["answer"] == sum(int((record["labels"] != -100).sum()) for record in read_records(out))


def test_system_prompts_without_a_place_are_counted(tmp_path, vocab_files, capsys):
    records = [{"system": "be brief", **sample} for sample in SAMPLES[:3]]
    code, out = run(tmp_path, vocab_files["12b"], records)
    assert code == 0 and report(out)["conversations"]["notes"] == {"system prompt, policy 'ignore'": 3}
    assert "3 x system prompt" in capsys.readouterr().out


# Reproducible

def test_same_bytes_with_one_worker_or_many(tmp_path, vocab_files):
    data = write_lines(tmp_path / "data.jsonl", SAMPLES * 40)
    outs = []
    for workers in (0, 1, 2, 3):
        code, out = run(tmp_path, vocab_files["12b"], data, "--num_workers", workers, name=f"w{workers}")
        assert code == 0
        outs.append(contents(out))
    assert outs[1:] == outs[:-1]


def test_seed_decides_the_order(tmp_path, vocab_files):
    outs = [contents(run(tmp_path, vocab_files["12b"], SAMPLES, "--seed", seed, name=f"s{number}")[1])
            for number, seed in enumerate((1, 1, 2))]
    assert outs[0][DATASET_NAME] == outs[1][DATASET_NAME] != outs[2][DATASET_NAME]


def test_a_second_run_replaces_the_first(tmp_path, vocab_files):
    code, out = run(tmp_path, vocab_files["12b"])
    (out / "new_dataset_1.mindrecord").write_bytes(b"of a larger data set")
    (out / "keep.txt").write_text("not ours")
    again, _ = run(tmp_path, vocab_files["12b"], SAMPLES[:5])
    assert code == again == 0
    assert not (out / "new_dataset_1.mindrecord").exists() and (out / "keep.txt").exists()
    assert report(out)["records_read"] == 5
    assert check_dataset(out, vocab_size=600, seq_length=64) is None


def test_several_files(tmp_path):
    out = tmp_path / "out"
    rows = [np.full(100, number, np.int32) for number in range(2000)]
    with DatasetWriter(out, {"input_ids": 100, "labels": 100}, file_bytes=300 * 800) as writer:
        for row in rows:
            writer.add({"input_ids": row, "labels": row})
        files = writer.finish({"record_length": 100, "pad_token_id": 3})
    assert [file.name for file in files] == [DATASET_NAME, *[f"new_dataset_{n}.mindrecord" for n in (1, 2, 3)]]
    seen = [int(record["input_ids"][0]) for file in files for record in read_one(file)]
    assert seen == list(range(2000))
    assert check_dataset_meta(out, vocab_size=2000, seq_length=99) is None
    assert "one of 4 files" in check_dataset_meta(files[0], vocab_size=2000, seq_length=99)


def read_one(path):
    from mindspore.mindrecord import FileReader

    reader = FileReader(str(path))
    records = [dict(record) for record in reader.get_next()]
    reader.close()
    return records


def test_full_disk_is_one_error(tmp_path, vocab_files, capsys, monkeypatch):
    from mindspore.mindrecord import FileWriter

    def full(*_):
        raise RuntimeError("Exception thrown.\n\n[ERROR] Failed to write file: No space left\n\nC++ stack")

    monkeypatch.setattr(FileWriter, "write_raw_data", full)
    code, out = run(tmp_path, vocab_files["12b"])
    assert_one_error(capsys, code, "is the disk full?): [ERROR] Failed to write file: No space left", out)


def test_many_short_records_fit_the_header(tmp_path):
    out = tmp_path / "out"
    row = np.arange(9, dtype=np.int32)
    with DatasetWriter(out, {"input_ids": 9, "labels": 9}) as writer:
        for _ in range(30_000):
            writer.add({"input_ids": row, "labels": row})
        file, = writer.finish({})
    assert file.stat().st_size < 30_000 * 72 * 1.5
    assert len(read_one(file)) == 30_000


# Bad input and interruption

def assert_one_error(capsys, code, words, out=None):
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("telechat_preprocess: ")]
    assert code != 0 and len(errors) == 1 and words in errors[0], lines
    assert not any("Traceback" in line for line in lines)
    assert out is None or not out.exists() or not list(out.iterdir())


def test_unusable_records_are_named_and_counted(tmp_path, vocab_files, capsys):
    data = tmp_path / "data.jsonl"
    write_lines(data, SAMPLES[:4])
    with open(data, "ab") as file:
        file.write(b'{"input": 1, "output": "x"}\n{broken\n{"input": "\xff", "output": "x"}\n')
    code, out = run(tmp_path, vocab_files["12b"], data)
    err = capsys.readouterr().err
    assert code == 0
    assert f"{data}:5: wrong shape: key 'input' holds int" in err
    assert f"{data}:6: not JSON" in err and f"{data}:7: not UTF-8" in err
    assert report(out)["conversations"]["unusable_records"] == {"not JSON": 1, "not UTF-8": 1, "wrong shape": 1}
    assert report(out)["records_read"] == 7 and report(out)["conversations"]["read"] == 4


def test_too_many_unusable_records_stop_the_run(tmp_path, vocab_files, capsys):
    data = tmp_path / "data.jsonl"
    data.write_bytes(write_lines(data, SAMPLES).read_bytes() + b"{}\n" * 150)
    code, out = run(tmp_path, vocab_files["12b"], data, name="default")
    assert_one_error(capsys, code, "stopped at 100 records", out)
    code, out = run(tmp_path, vocab_files["12b"], data, "--max_errors", 0, name="none")
    assert_one_error(capsys, code, "stopped at 1 records", out)
    code, out = run(tmp_path, vocab_files["12b"], data, "--max_errors", -1, name="all")
    assert code == 0 and report(out)["conversations"]["unusable_records"] == {"wrong shape": 150}
    assert "and 50 more records" in capsys.readouterr().err


@pytest.mark.parametrize("options,words", [
    (["--vocab_file_path", "gone.model"], "vocabulary file not found: gone.model"),
    (["--input_dataset_file", "gone.jsonl"], "input file not found: gone.jsonl"),
    (["--max_length", "2"], "--max_length is 2; the least is 8"),
    (["--max_errors", "-2"], "--max_errors is -2"),
    (["--user_token", "<_usr>"], "the user token '<_usr>'"),
    (["--template", "telechat_52b"], "end token '</s>'"),
    (["--model_name", "telechat_12b", "--template", "telechat2"], "name only one of them"),
    (["--format", "alpaca"], "no usable conversation"),
    (["--output_path", "/dev/null/x"], "output folder /dev/null/x cannot be written"),
])
def test_mistakes_are_named(tmp_path, vocab_files, capsys, options, words):
    code, out = run(tmp_path, vocab_files["12b"], SAMPLES, *options)
    assert_one_error(capsys, code, words, out)


def test_empty_input_makes_no_data_set(tmp_path, vocab_files, capsys):
    code, out = run(tmp_path, vocab_files["12b"], [])
    assert_one_error(capsys, code, "the files hold no records", out)


def start_slow_run(tmp_path, vocab, *options):
    """The command as a process of its own, on input that takes a while; returns when it is at work."""
    data = write_lines(tmp_path / "data.jsonl", SAMPLES * 3000)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--input_dataset_file", str(data), "--output_path", str(out), "--vocab_file_path",
         str(vocab), "--max_length", "64", "--num_workers", "2", *options],
        stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(out.glob(".unfinished-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    assert process.poll() is None, process.stderr.read()
    return process, out


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_nothing(tmp_path, vocab_files, kind):
    process, out = start_slow_run(tmp_path, vocab_files["12b"])
    if kind == signal.SIGINT:
        os.killpg(process.pid, kind)                              # as Ctrl-C does: to the workers, too
    else:
        process.send_signal(kind)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "interrupted; nothing was written" in err and "Traceback" not in err
    assert list(out.iterdir()) == []


def test_rerun_after_a_kill_is_clean(tmp_path, vocab_files):
    process, out = start_slow_run(tmp_path, vocab_files["12b"])
    workers = children(process.pid)
    process.kill()
    process.communicate(timeout=60)
    assert workers and not [path for path in out.iterdir() if not path.name.startswith(".")]
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)      # they notice that nobody needs them
    code, _ = run(tmp_path, vocab_files["12b"], SAMPLES, name="out")
    assert code == 0
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_killed_worker_is_an_error(tmp_path, vocab_files):
    process, out = start_slow_run(tmp_path, vocab_files["12b"])
    os.kill(children(process.pid)[0], signal.SIGKILL)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "a worker process has died (exit code -9" in err and "Traceback" not in err
    assert list(out.iterdir()) == []


def test_worker_killed_in_the_middle_of_a_message():
    receiving, sending = multiprocessing.Pipe(duplex=False)
    os.write(sending.fileno(), (100).to_bytes(4, "big") + b"half")       # a message of 100 bytes that never ends
    sending.close()
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    with pytest.raises(WorkerError, match="a worker process has died"):
        _guard(receiving.recv, process)


def children(pid):
    tasks = Path(f"/proc/{pid}/task")
    if not tasks.exists():
        pytest.skip("needs /proc to see the worker processes")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def _fail(item):
    if item == 5:
        raise ConfigError("item 5")
    return item * item


def _break(item):
    return 1 // (item - 5)


@pytest.mark.parametrize("workers", [0, 3])
def test_ordered_map(workers):
    assert list(ordered_map(partial(partial, pow, 2), iter(range(50)), workers)) == [2 ** n for n in range(50)]
    results = ordered_map(partial(partial, _fail), iter(range(50)), workers)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    with pytest.raises(ConfigError, match="item 5"):
        next(results)


def test_fault_in_a_worker_comes_with_its_traceback():
    with pytest.raises(WorkerError, match="ZeroDivisionError"):
        list(ordered_map(partial(partial, _break), iter(range(50)), 2))


# Odd texts, through everything but the files

PIECES = st.one_of(st.text(max_size=10), st.sampled_from(["<_user>", "<_bot>", "<_end>", "<_start>", "<_pad>", "\r\n",
                                                          "\x00", "\ud800", "你好"]))
TEXTS = st.lists(PIECES, max_size=5).map("".join)


@given(turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5), limit=st.integers(12, 80))
@settings(max_examples=150, deadline=None)
def test_typed_markers_never_open_a_turn(turns, limit, vocab_files):
    renderer = Renderer(get_template("telechat"), Vocab.load(vocab_files["12b"]))
    messages = [message for question, answer in turns for message in ({"role": "user", "content": question},
                                                                      {"role": "bot", "content": answer})]
    chunk = Chunk(0, [1], [json.dumps({"messages": messages}).encode()], 0)
    encoded = Encoder(renderer, ["messages"], limit)(chunk)
    assert encoded.counts["records"] == 1 == encoded.counts.get("conversations", 0) + len(encoded.errors)
    if encoded.errors:
        assert any(not answer.strip() for _, answer in turns)
        return
    assert encoded.counts["tokens"] == encoded.counts["tokens kept"] + encoded.counts["tokens dropped"]
    whole, = Encoder(renderer, ["messages"], 10**9)(chunk).pieces()
    ids = np.where(whole < 0, ~whole, whole)
    assert all((ids == marker).sum() == len(turns) for marker in (renderer.user_id, renderer.bot_id, renderer.end_id))
    assert (ids == renderer.pad_id).sum() == 0
    kept = sum(int((piece >= 0).sum()) for piece in encoded.pieces())
    assert kept == int((whole >= 0).sum())                        # every answer token is trained, however it is cut


# With the official tokenizers and data

@needs_shared
def test_padded_sample_of_12b_is_the_official_one(tmp_path):
    for number, sample in enumerate(golden_json("sft_golden.json")["telechat_7b_12b"]["singles"]):
        code, out = run(tmp_path, SHARED / "data/telechat-12b/tokenizer.model", [sample["sample"]], name=f"s{number}",
                        length=sample["total_len"] - 1)
        record, = read_records(out)
        assert code == 0
        assert record["input_ids"].tolist() == [3] * sample["n_left_pad"] + sample["input_ids_unpadded"]


@needs_shared
@pytest.mark.parametrize("name,folder,length", [
    ("multi_turn_example", "telechat-12b", 1024), ("single_turn_example", "telechat-52b", 1024),
    ("telechat2_demo_tool", "telechat2-115b", 8192), ("telechat2_demo_role", "telechat2-115b", 2048)])
def test_official_data_is_kept_whole(tmp_path, name, folder, length):
    code, out = run(tmp_path, SHARED / "data" / folder / "tokenizer.model", SHARED / "data/sft" / f"{name}.jsonl",
                    length=length)
    summary = report(out)
    assert code == 0 and summary["conversations"]["unusable_records"] == {}
    assert summary["conversations"]["dropped"] == summary["conversations"]["notes"] == {}
    assert summary["tokens"]["dropped"] <= summary["tokens"]["read"] * 0.001      # line ends between parts
    assert summary["padding_share"] < 0.1


@needs_shared
@pytest.mark.slow
def test_the_command_as_users_type_it(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT.name, "--input_dataset_file", str(SHARED / "data/sft/multi_turn_example.jsonl"),
         "--output_path", str(tmp_path), "--vocab_file_path", str(SHARED / "data/telechat-12b/tokenizer.model"),
         "--max_length", "1024"], cwd=SCRIPT.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "read       1,000 records" in done.stdout and "dropped    0 conversations; 0 tokens" in done.stdout
    assert (tmp_path / DATASET_NAME).exists()
