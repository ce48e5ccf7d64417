"""Preprocessing as a command: what it writes, that nothing is lost, and that it is reproducible."""
import json
import subprocess
import sys

import numpy as np
import pytest
from golden import SHARED, golden_json, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st
from preprocess_fixtures import SAMPLES, SCRIPT, contents, read_records, report, run, write_lines

from research.telechat.data import mindrecord
from research.telechat.data.encoding import Encoder
from research.telechat.data.meta import check_dataset_meta, read_meta
from research.telechat.data.scan import check_dataset
from research.telechat.data.sources import Chunk, Source, read_chunks
from research.telechat.data.writer import DATASET_NAME, DatasetWriter
from research.telechat.text.renderer import Renderer, get_template
from research.telechat.text.vocab import Vocab


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
    (out / "keep.txt").write_text("not ours")
    (out / "new_dataset_1.mindrecord").write_bytes(b"of another data set")
    refused, _ = run(tmp_path, vocab_files["12b"], SAMPLES[:5])
    assert refused == 1 and (out / "new_dataset_1.mindrecord").exists() and report(out)["records_read"] == 60
    again, _ = run(tmp_path, vocab_files["12b"], SAMPLES[:5], "--overwrite")
    assert code == again == 0 and not (out / "new_dataset_1.mindrecord").exists() and (out / "keep.txt").exists()
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


@pytest.mark.parametrize("several", [True, False])
def test_writing_without_mindspore_makes_the_same_files(tmp_path, monkeypatch, several):
    """Byte for byte those of FileWriter, with which all other releases of MindSpore write."""
    rng = np.random.default_rng(0)
    columns = {"input_ids": 70, "labels": 70, "actual_seq_len": 5} if several else {"input_ids": 139}
    edges = np.array([side + step for bits in (7, 8, 15, 16, 31) for side in (-(1 << bits), 1 << bits)
                      for step in (-1, 0, 1) if -(1 << 31) <= side + step < 1 << 31])       # of the bytes of a number
    records = [{name: np.where(rng.random(size) < 0.3, rng.choice(edges, size), rng.integers(-100, 1 << 17, size)
                               ).astype(np.int32) for name, size in columns.items()} for _ in range(3000)]
    # Numbers so great that packing only adds to them:
    records += [{name: np.full(size, 1 << 20, np.int32) for name, size in columns.items()}] * 1500
    if not mindrecord._compared():
        pytest.skip("this release of MindSpore is always written with FileWriter")
    assert mindrecord.direct_extension() is not None
    made = []
    for compared in (mindrecord._COMPARED, ()):
        monkeypatch.setattr(mindrecord, "_COMPARED", compared)
        out = tmp_path / f"out{len(made)}"
        with DatasetWriter(out, columns, file_bytes=1500 * 580) as writer:
            for record in records:
                writer.add(record)
            assert len(writer.finish({})) > 1
        made.append(contents(out))
    assert made[0] == made[1]


def test_many_short_records_fit_the_header(tmp_path):
    out = tmp_path / "out"
    row = np.arange(9, dtype=np.int32)
    with DatasetWriter(out, {"input_ids": 9, "labels": 9}) as writer:
        for _ in range(30_000):
            writer.add({"input_ids": row, "labels": row})
        file, = writer.finish({})
    assert file.stat().st_size < 30_000 * 72 * 1.5
    assert len(read_one(file)) == 30_000


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
    assert kept == int((whole >= 0).sum())                        # every answer token is trained, however it is split


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
