"""Texts for continued pre-training: no token is lost, all are trained, and the budget holds."""
import gzip
import json
import random
import sys
from collections import Counter
from itertools import accumulate

import numpy as np
import pytest
from golden import SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_fixtures import marked_ids
from preprocess_fixtures import SAMPLES, contents, read_records, report, run, write_lines

from research.telechat.common.errors import ConfigError
from research.telechat.data import texts
from research.telechat.data.budget import BEYOND, TokenBudget
from research.telechat.data.documents import cut_document
from research.telechat.data.encoding import Encoder, source_formats
from research.telechat.data.meta import check_dataset_meta, read_meta
from research.telechat.data.packing import cut
from research.telechat.data.records import parse_any
from research.telechat.data.sources import Chunk, Source, find_sources, read_chunks, read_evenly
from research.telechat.text.renderer import Renderer, get_template
from research.telechat.text.vocab import Vocab

DOCUMENTS = [{"text": "它是一个 dog. " * (number % 7 + 1) + f"the fox {number}\n"} for number in range(40)]


@pytest.fixture(scope="module")
def renderer(vocab_files):
    return Renderer(get_template("telechat"), Vocab.load(vocab_files["12b"]))


def encode(renderer, records, limit=64, name="text", **options):
    raw = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    return Encoder(renderer, [name], limit, **options)(Chunk(0, list(range(1, len(raw) + 1)), raw, 0))


def plain(marked):
    return np.where(marked < 0, ~marked, marked).tolist()


# Cutting

@given(size=st.integers(1, 300), limit=st.integers(2, 40), overlap=st.integers(0, 39))
@settings(max_examples=300, deadline=None)
def test_pieces_without_what_they_repeat_are_the_document(size, limit, overlap):
    overlap %= limit
    document = np.arange(size, dtype=np.int32)
    result = cut_document(document, limit, "split", overlap)
    joined = [token for number, piece in enumerate(result.pieces) for token in plain(piece)[overlap if number else 0:]]
    assert joined == document.tolist()
    assert max(map(len, result.pieces)) <= limit and all(len(piece) == limit for piece in result.pieces[:-1])
    trained = Counter(token for piece in result.pieces for token in piece.tolist() if token >= 0)
    assert trained == Counter(document.tolist())                 # each token once, whatever is repeated
    for before, piece in zip(result.pieces, result.pieces[1:]):
        assert plain(piece)[:overlap] == plain(before)[len(before) - overlap:]
    assert (result.kept, result.dropped) == (size, 0)
    assert result.repeated == sum(map(len, result.pieces)) - size
    assert list(result.fresh) == [len(piece) - (overlap if number else 0) for number, piece in enumerate(result.pieces)]


@pytest.mark.parametrize("long,kept,fate", [("truncate", 10, "truncated"), ("drop", 0, "longer than the length")])
def test_long_texts_can_be_shortened(long, kept, fate):
    result = cut_document(np.arange(25, dtype=np.int32), 10, long)
    assert (result.kept, result.dropped, result.fate, list(result.fresh)) == (kept, 25 - kept, fate, [10] * bool(kept))


def test_fresh_tokens_of_a_conversation_add_up(renderer):
    messages = [message for number in range(9) for message in (
        {"role": "user", "content": f"the {number}"}, {"role": "bot", "content": "fox " * (5 * number + 1)})]
    plan = renderer.plan(messages)
    rendered = renderer.assemble(plan, [renderer.vocab.encode(text) for text in plan.texts])
    for limit in (30, 50, 80, 1000):
        result = cut(rendered, marked_ids([rendered])[0], limit)
        assert sum(result.fresh) == result.kept and len(result.fresh) == len(result.pieces)


# Records

@pytest.mark.parametrize("record,text", [
    ({"text": "a", "content": "b"}, "a"), ({"content": "b", "url": "u"}, "b"), ({"data": "c"}, "c"),
    ({"text": None, "content": "b"}, "b"), ({"text": "  a\r\n "}, "  a\r\n ")])
def test_the_text_of_a_record(renderer, record, text):
    encoded = encode(renderer, [record])
    assert plain(encoded.tokens) == [*renderer.vocab.encode(text), renderer.end_id]
    assert (encoded.tokens >= 0).all() and encoded.counts["documents"] == encoded.counts["whole"] == 1
    assert set(encoded.unused) == set(record) & {"url"} | ({"content"} if record.get("text") == "a" else set())


@pytest.mark.parametrize("record,kind", [
    (b"broken", "not JSON"), (["x"], "wrong shape"), ({"title": "x"}, "wrong shape"), ({"text": ["x"]}, "wrong shape"),
    ({"text": " \n"}, "empty text"), ({"text": "x", "images": ["a.png"]}, "not text alone"),
    (b'{"text": "\xff"}', "not UTF-8")])
def test_records_that_are_no_text(renderer, record, kind):
    encoded = encode(renderer, [record, {"text": "x"}])
    assert encoded.counts[f"unusable: {kind}"] == 1 == encoded.counts["conversations"] and len(encoded.errors) == 1


def test_a_record_marked_so_is_not_trained(renderer):
    encoded = encode(renderer, [{"text": "x", "weight": 0}])
    assert encoded.counts["dropped: nothing to train"] == 1 and len(encoded.tokens) == 0


def test_a_typed_marker_is_text(vocab_files):
    for family in ("12b", "telechat2", "52b"):
        vocab = Vocab.load(vocab_files[family])
        renderer = Renderer(get_template({"12b": "telechat", "52b": "telechat_52b"}.get(family, family)), vocab)
        ids = plain(encode(renderer, [{"text": "a <_user>b<_bot>c<_end>"}]).tokens)
        assert ids[-1] == renderer.end_id and not set(ids[:-1]) & {*vocab.markers.values()}, family
        if renderer.as_text:
            assert ids[:-1] != vocab.encode("a <_user>b<_bot>c<_end>")           # no marker in words either
            assert vocab.decode(ids[:-1]) == "a <_user>b<_bot>c<_end>"


def test_formats_of_files(tmp_path):
    files = {"a.jsonl": {"text": "x"}, "b.jsonl": {"content": "x"}, "c.jsonl": {"data": "x"},
             "d.jsonl": {"text": "x", "messages": []}, "e.txt": "no JSON"}
    sources = [Source(write_lines(tmp_path / name, [record])) for name, record in files.items()]
    assert source_formats(sources) == ["text", "text", "text", "messages", "text"]
    with pytest.raises(ConfigError, match="cannot tell the format"):
        source_formats([Source(write_lines(tmp_path / "f.jsonl", [{"role": "user", "content": "x"}]))])
    mixed = json.dumps({"text": "x"}).encode()
    assert parse_any(mixed, "messages", named=False).notes == ("record in the format 'text' in a file of 'messages'",)


# Files

def read(path, lines=False):
    return [(number, json.loads(record)) for chunk in read_chunks([Source(path, lines=lines)])
            for number, record in zip(chunk.numbers, chunk.records)]


def test_text_files(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff{一}\r\n\r\ntwo\n".encode())
    assert read(path) == [(1, {"text": "{一}\n\ntwo\n"})]
    assert read(path, lines=True) == [(1, {"text": "{一}"}), (3, {"text": "two"})]
    packed = tmp_path / "b.txt.gz"
    packed.write_bytes(gzip.compress("它是一个 dog".encode("utf-16")))
    assert read(packed) == [(1, {"text": "它是一个 dog"})]
    assert read(write_lines(tmp_path / "empty.txt", [])) == []
    (tmp_path / "c.txt").write_bytes(b"\x00\x01" * 600)
    with pytest.raises(ConfigError, match="binary file"):
        read(tmp_path / "c.txt")
    monkeypatch.setattr(texts, "_PART", 10)
    for lines in (False, True):                                  # in parts, which together are the document
        for content in ("abc\n" * 7, "abcdefghij" * 3, "a\n" + "b" * 25 + "\nc\n", " " * 30, "x" * 10 + "\n"):
            path.write_text(content)
            parts = [record for _, record in read(path, lines)]
            texts_of = [""]
            for part in parts:
                texts_of[-1] += part["text"]
                if not part.get("document_continues"):
                    texts_of.append("")
            found = [text.strip("\n") for text in texts_of if text]
            assert found == [text for text in (content.split("\n") if lines else [content.strip("\n")])
                             if text.strip() or len(text) > 10], (lines, content)
            assert all(len(part["text"]) <= 10 for part in parts)
            assert not (parts and parts[-1].get("document_continues"))


def test_parts_of_a_document_have_one_end(renderer):
    encoded = encode(renderer, [{"text": "the ", "document_continues": True},
                                {"text": "fox", "document_continues": False}])
    assert plain(encoded.tokens) == [*renderer.vocab.encode("the "), *renderer.vocab.encode("fox"), renderer.end_id]


def test_folders_saved_by_datasets(tmp_path, monkeypatch):
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    assert pyarrow
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list([{"text": f"the {number}"} for number in range(9)])
    data.select(range(6)).save_to_disk(tmp_path / "saved", num_shards=2)
    (tmp_path / "saved/cache-1.arrow").write_bytes((tmp_path / "saved/data-00000-of-00002.arrow").read_bytes())
    ignored = []
    sources = find_sources([str(tmp_path / "saved")], ignored)
    assert [source.path.name for source in sources] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert "cache-1.arrow" in [path.name for path in ignored] and source_formats(sources) == ["text", "text"]
    assert [json.loads(record)["text"] for chunk in read_chunks(sources) for record in chunk.records] == [
        f"the {number}" for number in range(6)]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ConfigError, match="is a Arrow file: install the package pyarrow"):
            source_formats(sources)
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ConfigError, match=r"splits contains the splits train, test; name those .*splits/train"):
        find_sources([str(tmp_path / "splits")])
    assert len(find_sources([str(tmp_path / "splits/train")])) == 1
    (tmp_path / "saved/data-00001-of-00002.arrow").unlink()
    with pytest.raises(ConfigError, match=r"data-00001-of-00002.arrow, which its state.json names, is missing"):
        find_sources([str(tmp_path / "saved")])


# The budget

@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=30), most=st.integers(1, 900), limit=st.integers(4, 20))
@settings(max_examples=60, deadline=None)
def test_the_budget_holds_and_counts_add_up(sizes, most, limit, renderer):
    records = [{"text": "fox " * size} for size in sizes]
    chunks = [encode(renderer, records[start:start + 4], limit) for start in range(0, len(records), 4)]
    budget, total, pieces = TokenBudget(most), Counter(), []
    for chunk in chunks:
        taken = budget.take(chunk)
        total.update(taken.counts)
        pieces += taken.pieces()
        if budget.spent:
            break
    whole = [piece for chunk in chunks for piece in chunk.pieces()]
    ends = list(accumulate(map(len, whole)))
    expected = sum(end <= most for end in ends)
    assert [piece.tolist() for piece in pieces] == [piece.tolist() for piece in whole[:expected]]
    assert budget.taken == sum(map(len, pieces)) <= most and budget.spent == (ends[-1] > most)
    assert total["tokens kept"] + total["tokens dropped"] == total["tokens"]
    assert total["tokens kept"] + total["tokens repeated"] == budget.taken
    assert total["answer tokens"] == sum(int((piece >= 0).sum()) for piece in pieces) == total["tokens kept"]
    assert total["pieces"] == len(pieces)
    assert total["conversations"] == total["whole"] + total["split"] + total[BEYOND]


def test_files_are_read_in_proportion(tmp_path):
    rows = {"a": 4000, "b": 1000, "c": 50}
    for name, count in rows.items():
        write_lines(tmp_path / f"{name}.jsonl", [{"text": f"{name} " + "x" * 50}] * count)
    sources = [Source(tmp_path / "a.jsonl"), Source(tmp_path / "b.jsonl", 2.5), Source(tmp_path / "c.jsonl")]
    chunks = list(read_evenly(sources, 1, 2000))
    everything = [record for chunk in chunks for record in chunk.records]
    assert sorted(everything) == sorted(record for chunk in read_chunks(sources, 1, 2000) for record in chunk.records)
    assert len(everything) == 4000 + 2500 + 50
    half = Counter(sources[chunk.source].path.stem for chunk in chunks[:len(chunks) // 2] for _ in chunk.records)
    assert abs(half["a"] / half["b"] - 4000 / 2500) < 0.15 and 20 <= half["c"] <= 35


def test_columnar_files_are_read_in_proportion(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rng = random.Random(1)
    rows = [{"text": "".join(rng.choices("abcdefgh", k=200))} for _ in range(3000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", compression="none")
    write_lines(tmp_path / "b.jsonl", rows)
    sources = [Source(tmp_path / "a.parquet"), Source(tmp_path / "b.jsonl")]
    chunks = list(read_evenly(sources, 1, 5000))
    half = Counter(sources[chunk.source].path.stem for chunk in chunks[:len(chunks) // 2] for _ in chunk.records)
    assert 0.8 < half["a"] / half["b"] < 1.25


def test_many_files_are_not_open_together(tmp_path, monkeypatch):
    names = [write_lines(tmp_path / f"{number}.txt", [number]) for number in range(200)]
    chunks = list(read_evenly([Source(name) for name in names], 1))
    assert sorted(chunk.source for chunk in chunks) == list(range(200))


# The command

def test_text_as_a_data_set(tmp_path, vocab_files):
    """Every document arrives whole; all of its tokens are trained; the same bytes each time."""
    vocab = Vocab.load(vocab_files["12b"])
    outs = [run(tmp_path, vocab_files["12b"], DOCUMENTS, "--format", "text", "--document_boundaries",
                "--num_workers", workers, name=f"out{workers}", length=128) for workers in (0, 2)]
    assert [code for code, _ in outs] == [0, 0] and contents(outs[0][1]) == contents(outs[1][1])
    out = outs[0][1]
    found = []
    for record in read_records(out):
        ids, labels = record["input_ids"], record["labels"]
        held = ids != 3
        assert (labels[held] == ids[held]).all() and (labels[~held] == -100).all()
        ends = [int(end) for end in record["actual_seq_len"]]
        for start, end in zip([0, *ends], ends):
            document = ids[start:end + 1 if end == 128 else end]
            if start < end and (document != 3).any():
                found.append(document.tolist())
    assert sorted(found) == sorted([*vocab.encode(record["text"]), vocab.markers["<_end>"]] for record in DOCUMENTS)
    summary, meta = report(out), read_meta(out)
    assert summary["documents_read"] == summary["conversations"]["read"] == 40
    assert meta["template"] == "" and meta["documents"] == 40
    assert check_dataset_meta(out, vocab_size=vocab.size, seq_length=128, template="telechat_system") is None


def test_text_and_conversations_in_one_set(tmp_path, vocab_files, capsys):
    write_lines(tmp_path / "chat.jsonl", SAMPLES[:20])
    write_lines(tmp_path / "web.jsonl", DOCUMENTS)
    (tmp_path / "book.txt").write_text("the fox. " * 200)
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps({"./chat.jsonl": 1.5, "./web.jsonl": 0.5, "./book.txt": 1}))
    code, out = run(tmp_path, vocab_files["12b"], weights)
    summary, printed = report(out), capsys.readouterr().out
    assert code == 0 and summary["documents_read"] == 21 and summary["conversations"]["read"] == 51
    assert read_meta(out)["template"] == "telechat" and "51 conversations and documents" in printed
    tokens = summary["tokens"]
    assert tokens["dropped"] == 0 and tokens["written"] + tokens["padding"] == summary["records_written"] * 65
    code, small = run(tmp_path, vocab_files["12b"], weights, "--max_tokens", "700", name="small")
    tokens = report(small)["tokens"]
    assert code == 0 and 500 < tokens["written"] <= 700 and read_meta(small)["max_tokens"] == 700
    assert "budget     700 tokens, reached" in capsys.readouterr().out


@pytest.mark.parametrize("options,message", [
    (["--overlap", "40"], "--overlap is 40; expected a number from 0 to half of --max_length, 32"),
    (["--max_tokens", "0"], "--max_tokens is 0; the least is 1"),
    (["--max_tokens", "3"], "beyond the token budget")])
def test_options_that_cannot_be(tmp_path, vocab_files, capsys, options, message):
    code, out = run(tmp_path, vocab_files["12b"], DOCUMENTS, *options)
    assert code == 1 and message in capsys.readouterr().err and not list(out.glob("*.mindrecord"))


@needs_shared
def test_the_official_example(tmp_path):
    """With the publisher's list of weights; ids as the publisher's code makes them: each text, and <_end> behind it."""
    folder = tmp_path / "dummy_data/pretrain"
    folder.mkdir(parents=True)
    (folder / "pretrain_example.jsonl").write_bytes((SHARED / "data/text/pretrain_example.jsonl").read_bytes())
    weights = tmp_path / "pretrain_data_config.json"
    weights.write_bytes((SHARED / "data/text/pretrain_data_config.json").read_bytes())
    vocab = Vocab.load(SHARED / "data/telechat2-115b/tokenizer.model")
    renderer = Renderer(get_template("telechat2"), vocab)
    sources = find_sources([str(weights)])
    formats = source_formats(sources)
    chunk, = read_chunks(sources)
    encoded = Encoder(renderer, formats, 513, overlap=0)(chunk)
    expected = [token for record in chunk.records for token in (
        *vocab.encode(json.loads(record)["text"]), vocab.markers["<_end>"])]
    assert formats == ["text"] and encoded.tokens.tolist() == expected and len(encoded.fates) == 20
