"""Every text of a record is trained on, shown, or named: in messages, calls, reasoning, tools, a note, or a key that is
counted as not used. Otherwise the record is unusable. Over records of keys of all formats, put together at random."""
import itertools
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from research.telechat.common.errors import RecordError
from research.telechat.data.documents import Document
from research.telechat.data.preferences import CHOSEN, LISTS, PAIR, REJECTED
from research.telechat.data.records import DATA_FORMATS, parse_any

ROLES = ["system", "user", "human", "assistant", "gpt", "bot", "tool", "function_call", "tool_call", "odd"]
TEXT = st.just("TEXT")                   # each becomes a text that occurs nowhere else


def objects(**keys):
    """Objects with any of the keys; values by name, None: left out."""
    return st.fixed_dictionaries({}, optional=keys)


CALL = objects(name=st.just("f"), arguments=st.one_of(st.fixed_dictionaries({"a": TEXT}), TEXT), function=TEXT,
               args=st.fixed_dictionaries({"b": TEXT}), note=TEXT)
PART = objects(type=st.sampled_from(["text", "thinking", "tool_use", "tool_result", "image"]), text=TEXT, thinking=TEXT,
               content=TEXT, input=st.fixed_dictionaries({"a": TEXT}), name=st.just("f"))
MESSAGE = objects(**{"role": st.sampled_from(ROLES), "from": st.sampled_from(ROLES), "content": st.one_of(
    TEXT, st.lists(PART, max_size=2), st.none()), "value": TEXT, "reasoning_content": TEXT, "thinking": TEXT,
    "tool_calls": st.lists(CALL, max_size=2), "function_call": CALL, "refusal": TEXT, "name": TEXT, "tools": TEXT})
SOUND = st.tuples(st.fixed_dictionaries({"role": st.just("user"), "content": TEXT}, optional={"thinking": TEXT}),
                  st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXT}, optional={
                      "reasoning": TEXT, "tool_calls": st.lists(CALL, max_size=2)})).map(list)
MESSAGES = st.one_of(SOUND, SOUND, st.lists(MESSAGE, max_size=3), st.tuples(SOUND, st.lists(MESSAGE, max_size=2)).map(
    lambda pair: pair[0] + pair[1]))
ANSWER = st.one_of(TEXT, SOUND.map(lambda messages: messages[1:]), SOUND.map(lambda messages: messages[1]))
TOLD = [{"messages": MESSAGES}, {"conversations": MESSAGES}, {"dialog": MESSAGES},
        {"instruction": TEXT, "output": TEXT}, {"input": TEXT, "output": TEXT}, {"prompt": TEXT, "completion": TEXT},
        {"query": MESSAGES, "response": ANSWER}, {"prompt": TEXT, "chosen": ANSWER, "rejected": ANSWER},
        {"messages": MESSAGES, "rejected_response": TEXT},
        {"text": TEXT}, {}]
OTHERS = {**dict.fromkeys(("instruction", "input", "output", "prompt", "query", "response", "question", "answer",
                           "text", "system", "system_prompt", "reasoning", "note", "context"), TEXT),
          **dict.fromkeys(LISTS, MESSAGES), **dict.fromkeys((*CHOSEN, *REJECTED), ANSWER),
          "history": st.lists(st.tuples(TEXT, TEXT).map(list), max_size=2),
          "tools": st.lists(st.fixed_dictionaries({"name": TEXT}), max_size=2)}


@st.composite
def records(draw):
    """The keys that tell a format, and up to two others."""
    keys = {**draw(st.sampled_from(TOLD)), **{key: OTHERS[key] for key in draw(st.lists(st.sampled_from(sorted(OTHERS)),
                                                                                          max_size=2))}}
    return {key: draw(value) for key, value in keys.items()}


def numbered(value, counter):
    """The record with texts that differ."""
    if value == "TEXT":
        return f"t{next(counter)}t"
    if isinstance(value, dict):
        return {key: numbered(item, counter) for key, item in value.items()}
    return [numbered(item, counter) for item in value] if isinstance(value, list) else value


def texts(value, place=()):
    """(text, names of the keys above it) of all texts."""
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in texts(item, (*place, key))]
    if isinstance(value, list):
        return [found for item in value for found in texts(item, place)]
    return [(value, place)] if isinstance(value, str) and value[:1] == value[-1:] == "t" and value != "t" else []


@given(records(), st.sampled_from(DATA_FORMATS))
@settings(max_examples=300, deadline=None)
def test_no_text_is_lost_in_silence(record, data_format):
    nothing_is_lost(numbered(record, itertools.count()), data_format)


LEAD = st.lists(st.fixed_dictionaries({"role": st.just("system"), "content": TEXT}, optional={
    "tools": st.lists(st.fixed_dictionaries({"name": TEXT}), min_size=1, max_size=1)}), max_size=1)


@given(LEAD, LEAD, SOUND, st.sampled_from(["question", "same", "answer"]), st.sets(st.sampled_from(
    ["thinking", "reasoning", "tool_calls", "tools"])))
@settings(max_examples=60, deadline=None)
def test_no_text_of_a_pair_is_lost_where_its_parts_say_the_same(lead, own, turn, form, left_out):
    """The chosen conversation repeats the question, or the conversation the chosen answer, without some of the keys."""
    counter = itertools.count()
    lead, own, (question, answer) = (numbered(value, counter) for value in (lead, own, turn))
    repeated = [{key: value for key, value in message.items() if key not in left_out}
                for message in (*lead, question, answer)]
    if form == "answer":
        record = {"messages": [*lead, question, repeated[-1]], "chosen": answer}
    else:
        record = {"prompt": [*lead, question], "chosen": [*(own if form == "question" else repeated[:-2]),
                                                          repeated[-2], answer]}
    nothing_is_lost({**record, "rejected": "t-t"}, "messages")


def nothing_is_lost(record, data_format):
    try:
        read = parse_any(json.dumps(record).encode(), data_format, named=False)
    except RecordError as err:
        assert "\n" not in str(err)
        return
    shown = read.text if isinstance(read, Document) else json.dumps(
        [[message.content, message.calls, message.reasoning] for message in read.messages]) + json.dumps(read.tools)
    notes = " ".join(read.notes)
    for text, place in texts(record):
        named = {name.rpartition("[].")[2] for name in read.unused} & set(place)
        rejected = PAIR in notes and place[0] in REJECTED
        unanswered = "unanswered question at the end" in notes
        of_call = "key of a tool call" in notes and place[-1] in ("note", "function")
        assert text in shown or named or rejected or unanswered or of_call, (text, place, read)
