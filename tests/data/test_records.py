"""Reading training data: formats, odd texts, compressed files, folders, weights, and what is said about bad records."""
import gzip
import json
import re

import pytest
from golden import SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st

from research.telechat.common.errors import ConfigError, RecordError
from research.telechat.data import stream as data_stream
from research.telechat.data.encoding import source_formats
from research.telechat.data.preferences import LISTS
from research.telechat.data.records import FORMATS, detect_format, parse_record, split_inline
from research.telechat.data.sources import Source, find_sources, peek_records, read_chunks, total_bytes
from research.telechat.text.literals import read_literal
from research.telechat.text.renderer import BOT, SYSTEM, TOOL, USER


def raw(record, **options):
    return json.dumps(record, **options).encode("utf-8", "surrogatepass")


def parsed(record, data_format=None):
    """(role, content) of each message."""
    line = raw(record)
    return [message[:2] for message in parse_record(line, data_format or detect_format(line)).messages]


ONE = [(USER, "q"), (BOT, "a")]
TWO = [*ONE, (USER, "r"), (BOT, "b")]


@pytest.mark.parametrize("data_format,record,expected", [
    ("input_output", {"input": "<_user>q", "output": "a"}, ONE),
    ("input_output", {"input": "q", "output": "<_bot>a"}, ONE),
    ("input_output", {"input": "<_user>q<_bot>a<_user>r", "output": "b"}, TWO),
    ("input_output", {"input": "<_user>q<_bot>a<_end><_user>r", "output": "b"}, TWO),
    ("input_output", {"system": "s", "input": "q", "output": "a"}, [(SYSTEM, "s"), *ONE]),
    ("dialog", {"system": "s", "dialog": [{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}], "id": 1},
     [(SYSTEM, "s"), *ONE]),
    ("dialog", {"dialog": [{"role": "user", "content": "q"}, {"role": "bot", "content": "<tool_call>"},
                           {"role": "tool", "content": "42"}, {"role": "bot", "content": "a"}]},
     [(USER, "q"), (BOT, "<tool_call>"), (TOOL, "42"), (BOT, "a")]),
    ("messages", {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                               {"role": "assistant", "content": "a"}]}, [(SYSTEM, "s"), *ONE]),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                               {"role": "assistant", "content": "a"}]}, ONE),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"},
                                    {"from": "human", "value": "r"}, {"from": "gpt", "value": "b"}]}, TWO),
    ("sharegpt", {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"},
                                    {"from": "function_call", "value": '{"name": "f"}'},
                                    {"from": "observation", "value": "1"}, {"from": "gpt", "value": "a"}]},
     [(SYSTEM, "s"), (USER, "q"), (BOT, ""), (TOOL, "1"), (BOT, "a")]),
    ("sharegpt", {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ONE),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, ONE),
    ("alpaca", {"instruction": "q", "input": "more", "output": "a"}, [(USER, "q\nmore"), (BOT, "a")]),
    ("alpaca", {"instruction": "r", "output": "b", "history": [["q", "a"]], "system": "s"}, [(SYSTEM, "s"), *TWO]),
])
def test_formats(data_format, record, expected):
    assert detect_format(raw(record)) == data_format
    assert parsed(record) == expected


def test_tools_are_handed_on():
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": "{}"}}]}], "tools": [{"type": "function"}]}
    conversation = parse_record(raw(record), "messages")
    assert conversation.tools == [{"type": "function"}]
    assert conversation.messages[1].calls == ('{"name": "f", "arguments": {}}',)
    record = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "tools": "[{}]"}
    assert parse_record(raw(record), "sharegpt").tools == [{}]


@pytest.mark.parametrize("text,turns,whole", [
    ("q", ["q"], True),
    ("<_user>q", ["q"], True),
    ("<_user>q<_bot>a<_user>r", ["q", "a", "r"], True),
    ("what does <_bot> mean?", ["what does <_bot> mean?"], False),
    ("<_user>a<_user>b", ["a<_user>b"], False),
    ("<_user>q<_bot>a<_bot>b<_user>r", ["q", "a<_bot>b", "r"], False),
    ("<_user>q<_bot>a<_user>r<_bot>b", ["q", "a", "r<_bot>b"], False),
    ("<_bot>a", ["<_bot>a"], False),
    ("", [""], True),
])
def test_inline_markers(text, turns, whole):
    messages, all_used = split_inline(text)
    assert [message.content for message in messages] == turns and all_used == whole
    assert [message.role for message in messages] == [USER, BOT, USER, BOT, USER][:len(turns)]


@given(st.lists(st.sampled_from(["<_user>", "<_bot>", "<_end>", "x"]), max_size=12).map("".join))
def test_inline_markers_alternate_and_lose_nothing(text):
    messages, _ = split_inline(text)
    assert [message.role for message in messages] == ([USER, BOT] * len(messages))[:len(messages)]
    assert len(messages) % 2 == 1
    joined = "".join(f"<_{message.role}>{message.content}" for message in messages)
    for marker in ("<_user>", "<_bot>", "x"):
        leading = marker == "<_user>" and not text.startswith(marker)
        assert joined.count(marker) == text.count(marker) + leading


@pytest.mark.parametrize("line,kind,words", [
    (b'{"input": "a", "output": "b"', "not JSON", "at character 29"),
    (b"\xff\xfe{", "not UTF-8", "byte 0xff at position 1"),
    (b'{"input": "caf\xe9", "output": "b"}', "not UTF-8", "position 15"),        # codespell:ignore caf
    (b'{"input": "a", "input": "c", "output": "b"}', "key twice", "'input'"),
    (b'{"input": null, "output": "b"}', "wrong shape", "key 'input' holds null; expected text"),
    (b'{"input": 3, "output": "b"}', "wrong shape", "key 'input' holds int; expected text"),
    (b'{"output": "b"}', "wrong shape", "key 'input' holds nothing"),
    (b'["a"]', "wrong shape", "the record is list"),
    (b'{"input": "a", "output": " \\n "}', "empty answer", "message 2"),
    (b"[" * 100000, "not JSON", "not JSON: "),
    (b"1" * 5000, "wrong shape|not JSON", ": "),
    (b"", "too long", "exceeds the length limit"),
])
def test_unusable_records_are_named(line, kind, words):
    with pytest.raises(RecordError, match=re.escape(words)) as caught:
        parse_record(line, "input_output")
    assert re.fullmatch(kind, caught.value.kind)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("record,data_format,kind", [
    ({"messages": []}, "messages", "no answer"),
    ({"messages": [{"role": "user", "content": "q"}]}, "messages", "no answer"),
    ({"messages": [{"role": "elf", "content": "q"}]}, "messages", "unusable message"),
    ({"messages": "q"}, "messages", "wrong shape"),
    ({"conversations": [{"from": "human"}]}, "sharegpt", "unusable message"),
    ({"instruction": "q", "output": "a", "history": ["x"]}, "alpaca", "wrong shape"),
    ({"dialog": [{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}], "tools": "f("}, "dialog",
     "wrong shape"),
])
def test_unusable_shapes_are_named(record, data_format, kind):
    with pytest.raises(RecordError) as caught:
        parse_record(raw(record), data_format)
    assert caught.value.kind == kind


def test_question_without_answer_at_the_end_is_left_out_and_said():
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
                           {"role": "user", "content": "thanks"}]}
    conversation = parse_record(raw(record), "messages")
    assert [message[:2] for message in conversation.messages] == ONE
    assert conversation.notes == ("unanswered question at the end dropped",)


def test_lone_surrogates_are_replaced_and_said():
    conversation = parse_record(b'{"input": "a\\ud800b", "output": "\\ud83d\\ude00"}', "input_output")
    assert [message.content for message in conversation.messages] == ["a\ufffdb", "\U0001f600"]
    assert conversation.notes == ("lone surrogates replaced by U+FFFD",)


@pytest.mark.parametrize("record", [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
     "tools": r'[{"name": "f", "description": "\ud83d"}]'},
    {"conversations": [{"from": "human", "value": "q"},
                       {"from": "function_call", "value": r'{"name": "f", "arguments": {"a": "\ud83d"}}'}]},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": r'{"a": "\ud83d"}'}}]}]}])
def test_lone_surrogates_in_a_json_text_are_replaced_and_said(record):
    conversation = parse_record(raw(record), "messages", named=False)
    shown = json.dumps([conversation.tools, [message.calls for message in conversation.messages]], ensure_ascii=False)
    assert "\ufffd" in shown and "ud83d" not in shown and shown.encode()
    assert conversation.notes[0] == "lone surrogates replaced by U+FFFD"


def test_python_literals_print_nothing(recwarn):
    assert read_literal(r"{'a': '\d'}") == {"a": r"\d"} and not recwarn.list
    with pytest.raises(ValueError, match="too long"):
        read_literal("{'a': 0x" + "f" * 4000 + "}")


TEXTS = {"instruction": "q", "output": "a", "prompt": "q", "completion": "a", "messages": [
    {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "conversations": [
    {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "input": "q"}


@given(st.sampled_from([("instruction", "output"), ("prompt", "completion"), ("messages",), ("conversations",),
                        ("input", "output")]),
       st.sets(st.sampled_from(["dialog", "messages", "conversations", "instruction", "output", "input", "prompt"])),
       st.sampled_from([None, []]))
@settings(max_examples=50, deadline=None)
def test_columns_without_a_value_do_not_choose_the_format(keys, others, empty):
    record = {key: TEXTS[key] if key in keys else empty if key in LISTS else None
              for key in (*sorted(others), *keys)}
    assert [message[:2] for message in parse_record(raw(record), "dialog", named=False).messages] == ONE


def test_an_empty_list_of_messages_is_still_named():
    for record in ({"messages": []}, {"messages": None}):
        assert detect_format(raw(record)) == "messages"


def test_odd_texts_come_through_unchanged():
    text = "a\r\nb\x00c\u2028\t<_end></s> \ufeff"
    assert parsed({"input": text, "output": text}, "input_output") == [(USER, text), (BOT, text)]


@given(st.binary(max_size=60), st.sampled_from(list(FORMATS)))
@settings(max_examples=200)
def test_any_bytes_give_a_record_error_or_a_conversation(line, data_format):
    try:
        assert parse_record(line, data_format).messages
    except RecordError as err:
        assert err.kind


JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=4)), lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(
        ["input", "output", "dialog", "messages", "conversations", "instruction", "history", "system", "tools", "role",
         "content", "from", "value", "tool_calls", "function", "name"]), inner, max_size=4)), max_leaves=12)


@given(JSON, st.sampled_from(list(FORMATS)))
@settings(max_examples=300)
def test_any_json_gives_a_record_error_or_a_conversation(record, data_format):
    try:
        messages = parse_record(raw(record), data_format).messages
    except RecordError:
        return
    assert messages[-1].role == BOT


# Files

RECORDS = [{"input": f"question {number}", "output": "答" * (number % 7 + 1)} for number in range(40)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pytest.importorskip("zstandard").compress(data)
    path.write_bytes(data)
    return path


def read(path, **options):
    """(number, record) of each record of one file."""
    return [(number, json.loads(record)) for chunk in read_chunks([Source(path)], **options)
            for number, record in zip(chunk.numbers, chunk.records)]


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.jsonl.zst", "d.json", "d.json.gz"])
@pytest.mark.parametrize("array", [False, True])
def test_files(tmp_path, monkeypatch, name, array):
    monkeypatch.setattr(data_stream, "_BLOCK", 64)          # several blocks, and records across their borders
    data = json.dumps(RECORDS, ensure_ascii=False, indent=1).encode() if array else LINES
    path = write(tmp_path / name, data)
    assert read(path, chunk_bytes=100) == list(enumerate(RECORDS, 1))
    chunks = list(read_chunks([Source(path)], chunk_bytes=100))
    assert len(chunks) > 5
    assert sum(chunk.progress for chunk in chunks) <= total_bytes([Source(path)])


def test_line_ends_blank_lines_and_byte_order_mark(tmp_path):
    path = write(tmp_path / "d.jsonl", b"\xef\xbb\xbf" + b'{"input": "a", "output": "b"}\r\n\r\n  \n{"input": "c"}')
    assert read(path) == [(1, {"input": "a", "output": "b"}), (4, {"input": "c"})]


def test_huge_line_is_skipped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(data_stream, "MAX_RECORD_BYTES", 1000)
    path = write(tmp_path / "d.jsonl", b'{"a": 1}\n' + b"x" * 5000 + b'\n{"a": 2}\n')
    chunk, = read_chunks([Source(path)])
    assert (chunk.numbers, chunk.records) == ([1, 2, 3], [b'{"a": 1}', b"", b'{"a": 2}'])


def test_array_with_invalid_utf8_names_the_record(tmp_path):
    path = write(tmp_path / "d.json", b'[{"input": "a", "output": "b"}, {"input": "\xff", "output": "b"}]')
    records = list(peek_records(Source(path)))
    assert parse_record(records[0], "input_output")
    with pytest.raises(RecordError, match="byte 0xff"):
        parse_record(records[1], "input_output")


@pytest.mark.parametrize("name,data,words", [
    ("d.json", b'[{"input": "a"}, {"input": ', "after record 1"),
    ("d.json", b"[1, 2", "after record 2"),
    ("d.jsonl.gz", b"no gzip", "cannot be read completely"),
])
def test_broken_files_are_named(tmp_path, name, data, words):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=words) as caught:
        list(read_chunks([Source(path)]))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_cut_off_gzip_is_named(tmp_path):
    path = write(tmp_path / "d.jsonl.gz", LINES * 50)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"truncated|completely"):
        list(read_chunks([Source(path)]))


def test_folder_is_read_in_order_without_hidden_and_other_files(tmp_path):
    for name in ("b.jsonl", "a/c.json", "a/d.jsonl.gz", ".hidden.jsonl", ".cache/e.jsonl", "notes.txt"):
        write(tmp_path / name, LINES)
    found = [str(source.path.relative_to(tmp_path)) for source in find_sources([str(tmp_path)])]
    assert found == ["a/c.json", "a/d.jsonl.gz", "b.jsonl"]


def test_lists_of_files(tmp_path):
    write(tmp_path / "x.jsonl", LINES)
    write(tmp_path / "more/y.jsonl", LINES)
    weights = write(tmp_path / "data.json", json.dumps({"./x.jsonl": 2.5, "more": 1, "./more/y.jsonl": 0}).encode())
    assert find_sources([str(weights)]) == [Source(tmp_path / "x.jsonl", 2.5), Source(tmp_path / "more/y.jsonl", 1.0)]
    names = write(tmp_path / "names.json", b'["x.jsonl", "more/y.jsonl"]')
    assert [source.path.name for source in find_sources([str(names)])] == ["x.jsonl", "y.jsonl"]
    for content, words in (({"gone.jsonl": 1}, "lists gone.jsonl"), ({"x.jsonl": -1}, "weight of x.jsonl is -1")):
        with pytest.raises(ConfigError, match=words):
            find_sources([str(write(tmp_path / "bad.json", json.dumps(content).encode()))])


def test_list_relative_to_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "folder/x.jsonl", LINES)
    listed = write(tmp_path / "conf/data.json", b'{"folder/x.jsonl": 1.0}')
    monkeypatch.chdir(tmp_path)
    assert [source.path.name for source in find_sources([str(listed)])] == ["x.jsonl"]


def test_json_that_is_no_list_of_files_is_data(tmp_path):
    for data in (LINES, json.dumps(RECORDS).encode(), json.dumps(RECORDS[0]).encode()):
        path = write(tmp_path / "d.json", data)
        assert find_sources([str(path)]) == [Source(path)]


def test_missing_and_empty_input_is_named(tmp_path):
    with pytest.raises(ConfigError, match="input file not found"):
        find_sources([str(tmp_path / "gone.jsonl")])
    with pytest.raises(ConfigError, match="contains no data file"):
        find_sources([str(tmp_path)])


@pytest.mark.parametrize("weight,copies", [
    (1.0, [40]), (2.0, [40, 40]), (0.25, [10]), (2.5, [40, 40, 20]), (0.01, [0])])
def test_weights(tmp_path, weight, copies):
    source = Source(write(tmp_path / "d.jsonl", LINES), weight)

    def numbers(seed):
        return [number for chunk in read_chunks([source], seed, chunk_bytes=300) for number in chunk.numbers]

    first = numbers(1)
    assert len(first) == sum(copies) and numbers(1) == first
    rounds = [first[start:start + 40] for start in range(0, len(first), 40)]
    assert all(sorted(set(part)) == part for part in rounds)      # each round in order, no record twice
    if copies == [10]:
        assert numbers(2) != first


def test_fractions_are_spread_over_the_file(tmp_path):
    source = Source(write(tmp_path / "d.jsonl", b'{"a": 1}\n' * 6400), 0.5)
    numbers = [number for chunk in read_chunks([source]) for number in chunk.numbers]
    assert len(numbers) == 3200
    assert all(31 <= sum(start < number <= start + 64 for number in numbers) <= 33 for start in range(0, 6400, 64))


def test_formats_are_told_per_file(tmp_path):
    inline = Source(write(tmp_path / "a.jsonl", b"broken\n" + LINES))
    alpaca = Source(write(tmp_path / "b.jsonl", raw({"instruction": "q", "output": "a"})))
    empty = Source(write(tmp_path / "c.jsonl", b""))
    assert source_formats([inline, alpaca, empty]) == ["input_output", "alpaca", "input_output"]
    assert source_formats([inline, alpaca], "dialog") == ["dialog", "dialog"]
    with pytest.raises(ConfigError, match=r"cannot tell the format of .*d.jsonl .*'\{\"caption\": \"x\"\}'.*--format"):
        source_formats([Source(write(tmp_path / "d.jsonl", raw({"caption": "x"})))])


@needs_shared
def test_official_data_files():
    counts = {}
    for path in sorted((SHARED / "data" / "sft").glob("*.jsonl")):
        source = Source(path)
        data_format, = source_formats([source])
        for _, record in read(path):
            assert parse_record(raw(record), data_format).notes == (), (path, record)
            counts[data_format] = counts.get(data_format, 0) + 1
    assert counts == {"input_output": 2000, "dialog": 800}
