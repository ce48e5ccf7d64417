"""Files as people have them: any arrangement of JSON values, any encoding, tables, and folders with other files."""
import csv
import gzip
import io
import json
import sys
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from research.telechat.common.errors import ConfigError
from research.telechat.data import stream
from research.telechat.data.encoding import source_formats
from research.telechat.data.sources import Source, find_sources, read_chunks

TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
RECORD = st.one_of(
    st.fixed_dictionaries({"input": TEXTS, "output": TEXTS}, optional={"id": st.integers(), "tags": st.lists(TEXTS)}),
    st.fixed_dictionaries({"messages": st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": TEXTS}),
                                                min_size=1, max_size=2)}))
RECORDS = st.lists(RECORD, min_size=1, max_size=5)
INDENTS = st.sampled_from([None, 0, 1, 4])
GAPS = st.sampled_from(["\n", "\r\n", " ", "\n\n \t\n", "", ",\n"])
SETTINGS = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def arranged(draw):
    """(a text, the records in it): parts in a row, each a record, an array, or an object with an array."""
    text, records = "", []
    for part in draw(st.lists(RECORDS, min_size=1, max_size=4)):
        options = {"indent": draw(INDENTS), "ensure_ascii": draw(st.booleans())}
        shape = draw(st.sampled_from(["values", "array", "wrapped"]))
        if shape == "values":
            text += "".join(json.dumps(record, **options) + draw(GAPS) for record in part)
        elif shape == "array":
            text += json.dumps(part, **options) + draw(GAPS)
        else:
            wrapped = draw(st.sampled_from([{"data": part}, {"version": "1", "train": part, "info": {"n": [1]}},
                                            {"rows": part, "authors": [{"name": "x"}]}]))
            text += json.dumps(wrapped, **options) + draw(GAPS)
        records += part
    return text, records


def read(path):
    return [json.loads(record) for chunk in read_chunks([Source(path)]) for record in chunk.records]


def notes(path):
    return [note for chunk in read_chunks([Source(path)]) for note in chunk.notes]


@given(arranged(), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]), st.sampled_from([16, 64, 1 << 20]))
@SETTINGS
def test_values_in_any_arrangement_are_all_read(tmp_path, monkeypatch, given_, encoding, block):
    text, records = given_
    monkeypatch.setattr(stream, "_BLOCK", block)                 # values across the borders of blocks
    path = tmp_path / "d.json"
    path.write_bytes(text.encode(encoding))
    assert read(path) == records


@given(st.lists(st.tuples(RECORD, st.sampled_from(["good", "cut", "open", "words"])), min_size=1, max_size=8))
@SETTINGS
def test_a_bad_line_costs_no_other_line(tmp_path, lines):
    bad = {"cut": '{"input": "a', "open": '{"messages": [{"role": "user"},', "words": "no json at all"}
    path = tmp_path / "d.jsonl"
    path.write_text("".join((json.dumps(record) if kind == "good" else bad[kind]) + "\n" for record, kind in lines),
                    encoding="utf-8")
    found = [(number, record) for chunk in read_chunks([Source(path)])
             for number, record in zip(chunk.numbers, chunk.records)]
    good = {number: record for number, (record, kind) in enumerate(lines, 1) if kind == "good"}
    for number, record in found:
        if number in good:
            assert json.loads(record) == good.pop(number)
        else:
            with pytest.raises(ValueError, match=r".*"):
                json.loads(record)
    assert not good


GB2312 = [bytes((first, second)).decode("gb2312") for first in range(0xb0, 0xd7) for second in range(0xa1, 0xff)]


@given(st.lists(st.lists(st.sampled_from(GB2312), min_size=2, max_size=20).map("".join), min_size=1, max_size=6))
@SETTINGS
def test_chinese_in_gb18030_is_read_and_said(tmp_path, texts):
    path = tmp_path / "d.jsonl"
    path.write_bytes("".join(json.dumps({"input": text, "output": text}, ensure_ascii=False) + "\n"
                             for text in texts).encode("gbk"))
    for line in [path.read_bytes(), *path.read_bytes().split(b"\n")]:
        if not line.isascii() and line.decode("utf-8", "ignore").encode() == line:
            return                                               # bytes that are UTF-8, too: that goes first
    assert [record["input"] for record in read(path)] == texts
    assert notes(path) == ["file read in the encoding gb18030"]


@pytest.mark.parametrize("data", [
    b'{"input": "\xe9t\xe9", "output": "d\xe9j\xe0 vu"}\n' * 3,               # Latin-1
    '{"input": "你好"}\n'.encode() + b'{"input": "\xc4\xe3"}\n'])              # one bad line
def test_other_bytes_are_no_guess(tmp_path, data):
    path = tmp_path / "d.jsonl"
    path.write_bytes(data)
    assert notes(path) == []
    records = [record for chunk in read_chunks([Source(path)]) for record in chunk.records]
    assert b"\n".join(records) + b"\n" == data


def test_lists_of_a_wrapping_object_are_named(tmp_path):
    path = tmp_path / "d.json"
    rows = [{"input": "a", "output": "b"}]
    path.write_text(json.dumps({"version": 2, "train": rows, "test": rows}), encoding="utf-8")
    assert read(path) == rows * 2
    assert notes(path) == ["key 'version' next to the list of records is not used", "records read from the list under "
                           "'train'", "records read from the list under 'test'"]


def test_a_wrapping_object_is_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "MAX_RECORD_BYTES", 2000)
    monkeypatch.setattr(stream, "_BLOCK", 256)
    rows = [{"input": f"question {number}", "output": "b" * 50} for number in range(200)]
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"version": 2, "data": rows}), encoding="utf-8")
    assert read(path) == rows


def test_blank_lines_without_end_are_no_burden(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n" * 5_000_000 + b'{"input": "a"}'))
    assert [(number, record) for number, record, _ in stream.read_records(path)] == [(5_000_001, b'{"input": "a"}')]


def test_a_long_line_is_read_past_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "MAX_RECORD_BYTES", 1 << 20)
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"input": "' + b"a" * 30_000_000 + b'"}\n{"input": "a"}', 1))
    tracemalloc.start()
    records = [(number, record) for number, record, _ in stream.read_records(path)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert records == [(1, b""), (2, b'{"input": "a"}')] and peak < 20_000_000


# Tables

ROWS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6)


@given(ROWS, st.sampled_from([(".csv", ","), (".csv", ";"), (".tsv", "\t"), (".jsonl", ",")]),
       st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
@SETTINGS
def test_csv(tmp_path, rows, kind, encoding):
    suffix, separator = kind
    rows = [tuple(cell.replace("\0", "") for cell in row) for row in rows]
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator)
    writer.writerows([("input", "output"), *rows])
    path = tmp_path / f"d{suffix}"
    path.write_bytes(text.getvalue().encode(encoding))
    assert [tuple(record.values()) for record in read(path)] == rows
    assert source_formats([Source(path)]) == ["input_output"]


def test_csv_with_messages_in_a_cell_and_a_short_row(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('messages,id\n"[{""role"": ""user"", ""content"": ""q""}]",1\nalone\n', encoding="utf-8")
    first, second = (record for chunk in read_chunks([Source(path)]) for record in chunk.records)
    assert json.loads(first)["messages"] == [{"role": "user", "content": "q"}]
    assert second == b"a row of 1 cells, but 2 column names"


@pytest.mark.parametrize("column", ["prompt", "completion", "chosen", "rejected"])
def test_csv_with_json_as_a_text_or_as_messages(tmp_path, column):
    """A prompt or an answer that is JSON itself stays a text; messages are read."""
    said = [{"role": "assistant", "content": "a"}]
    texts = ['{"intent": "greet"}', '[{"a": 1}]', "{'a': 1}", "[]", "[1]", "[x", '{"x": 1}', "x"]
    cells = [*texts, json.dumps(said), json.dumps(said, indent=1), str(said)]
    path = tmp_path / "d.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([(column, "id"), *((cell, "1") for cell in cells)])
    read_cells = [record[column] for record in read(path)]
    assert read_cells == [*texts, said, said, said]


def test_csv_with_half_a_character_in_a_cell(tmp_path):
    path = tmp_path / "d.csv"
    path.write_bytes(b'tools;id\n"[""\\ud83d""]";1\n"[""\xff""]";2\n')
    chunks = list(read_chunks([Source(path)]))
    first, second = (record for chunk in chunks for record in chunk.records)
    assert json.loads(first)["tools"] == ["\ufffd"] and b"\xff" in second
    assert [note for chunk in chunks for note in chunk.notes] == ["lone surrogates replaced by U+FFFD"]


def test_parquet_and_arrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": f"问 {number}"}], "id": number} for number in range(700)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "d.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("d.parquet", "d.arrow"):
        assert read(tmp_path / name) == rows


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"is a Parquet file: install the package pyarrow"):
        list(read_chunks([Source(tmp_path / "d.parquet")]))


@pytest.mark.parametrize("data,words", [
    (b"PAR1xxPAR1", "Parquet"), (b"PK\x03\x04xx", "zip archive"),
    (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
    (b"<!DOCTYPE html>", "web page"), (b"\x7fELF\0\0\0", "binary file of unknown kind"), (b"hello\n", "not JSON")])
def test_other_files_are_named_as_what_they_are(tmp_path, data, words):
    path = tmp_path / "d.jsonl"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=words) as caught:
        source_formats([Source(path)])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and "--format" not in str(caught.value)


def test_compressed_files_are_told_by_their_content(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(gzip.compress(b'{"input": "a", "output": "b"}\n'))
    assert read(path) == [{"input": "a", "output": "b"}]


# Folders

OTHERS = {"README.md": b"# Data", ".gitattributes": b"*.parquet filter=lfs", "LICENSE": b"MIT",
          "lengths.png": b"\x89PNG",
          "dataset_infos.json": b'{"default": {"features": {}}}', "dataset_dict.json": b'{"splits": ["train"]}',
          "state.json": b'{"_fingerprint": "x", "_data_files": [{"filename": "data.arrow"}]}',
          "card.json": b'{"name": "my data", "authors": ["a"]}', "out/meta.json": b'{"records": 1}',
          "out/report.json": b'{"records_read": 1}', "out/new_dataset.mindrecord": b"x",
          "out/new_dataset.mindrecord.db": b"x", "out/training_log.jsonl": b'{"step": 1}\n'}


@given(st.sets(st.sampled_from(sorted(OTHERS))))
@SETTINGS
def test_other_files_of_a_folder_are_left_out_and_named(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("data")
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(OTHERS[name])
    (folder / "a.jsonl").write_text('{"input": "a", "output": "b"}\n')
    (folder / "b.json").write_text('{"data": [{"input": "a", "output": "b"}]}')
    ignored = []
    assert [source.path.name for source in find_sources([str(folder)], ignored)] == ["a.jsonl", "b.json"]
    besides = {name for name in names if not name.startswith(".")}
    unsure = {"out/meta.json", "out/report.json"}                # also known without a data set next to it: no records
    assert {str(path.relative_to(folder)) for path in ignored} | (unsure & besides) == besides


def test_tables_of_a_folder_are_read_where_there_is_no_json(tmp_path):
    (tmp_path / "a.csv").write_text("input,output\na,b\n")
    assert [source.path.name for source in find_sources([str(tmp_path)])] == ["a.csv"]
    (tmp_path / "a.jsonl").write_text('{"input": "a", "output": "b"}\n')
    ignored = []
    assert [source.path.name for source in find_sources([str(tmp_path)], ignored)] == ["a.jsonl"]
    assert ignored == [tmp_path / "a.csv"]
