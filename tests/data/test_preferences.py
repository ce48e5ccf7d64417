"""Preference sets in every exporter's form: the chosen answer is trained, nothing else, or the record is unusable."""
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.telechat.common.errors import RecordError
from research.telechat.data.preferences import PAIR
from research.telechat.data.records import parse_record
from research.telechat.text.renderer import BOT, USER

WORDS = st.text("abc äß中\n", min_size=1, max_size=6).map(lambda text: f"x{text}y")
TURNS = st.lists(st.tuples(WORDS, WORDS), max_size=2)          # earlier questions and answers


def message(role, text, sharegpt=False):
    names = {"user": "human", "assistant": "gpt"}
    return {"from": names[role], "value": text} if sharegpt else {"role": role, "content": text}


def list_of(turns, question, sharegpt=False):
    return [message(role, text, sharegpt) for pair in turns for role, text in zip(("user", "assistant"), pair)] + [
        message("user", question, sharegpt)]


def trl(turns, question, chosen, rejected):
    return {"prompt": list_of(turns, question), "chosen": [message("assistant", chosen)],
            "rejected": [message("assistant", rejected)]}


def trl_implicit(turns, question, chosen, rejected):
    prompt = list_of(turns, question)
    return {"chosen": [*prompt, message("assistant", chosen)], "rejected": [*prompt, message("assistant", rejected)],
            "score_chosen": 8.5}


def ultrafeedback(turns, question, chosen, rejected):
    return {**trl_implicit(turns, question, chosen, rejected), "prompt": turns[0][0] if turns else question}


def trl_texts(turns, question, chosen, rejected):
    return {"prompt": question, "chosen": chosen, "rejected": rejected, "history": list(map(list, turns))}


def alpaca(turns, question, chosen, rejected):
    return {"instruction": question, "input": "", "chosen": chosen, "rejected": rejected,
            "history": list(map(list, turns))}


def sharegpt(turns, question, chosen, rejected):
    return {"conversations": list_of(turns, question, True), "chosen": message("assistant", chosen, True),
            "rejected": message("assistant", rejected, True)}


def swift(turns, question, chosen, rejected):
    return {"messages": [*list_of(turns, question), message("assistant", chosen)], "rejected_response": rejected}


def swift_messages(turns, question, chosen, rejected):
    prompt = list_of(turns, question)
    return {"messages": [*prompt, message("assistant", chosen)],
            "rejected_messages": [*prompt, message("assistant", rejected)]}


def swift_query(turns, question, chosen, rejected):
    return {"query": question, "response": chosen, "rejected_response": rejected, "history": list(map(list, turns))}


def openai(turns, question, chosen, rejected):
    return {"input": {"messages": list_of(turns, question), "parallel_tool_calls": True},
            "preferred_output": [message("assistant", chosen)],
            "non_preferred_output": [message("assistant", rejected)]}


FORMS = [trl, trl_implicit, ultrafeedback, trl_texts, alpaca, sharegpt, swift, swift_messages, swift_query, openai]


@given(st.sampled_from(FORMS), TURNS, WORDS, WORDS, WORDS, st.sampled_from(["messages", "alpaca", "input_output"]))
@settings(max_examples=150, deadline=None)
def test_only_the_chosen_answer_is_trained(form, turns, question, chosen, rejected, of_file):
    record = form(turns, question, chosen, rejected + "!")
    conversation = parse_record(json.dumps(record).encode(), of_file, named=False)
    texts = [text for pair in turns for text in pair] + [question, chosen]
    assert [message.content for message in conversation.messages] == texts
    assert [message.role for message in conversation.messages] == [USER, BOT] * (len(turns) + 1)
    assert [message.train for message in conversation.messages if message.role == BOT] == [False] * len(turns) + [True]
    assert conversation.notes.count(PAIR) == 1
    assert not [key for key in conversation.unused if key not in ("score_chosen", "parallel_tool_calls")]


@pytest.mark.parametrize("record,words", [
    ({"prompt": "q", "rejected": "b"}, "no answer"), ({"chosen": "a", "rejected": "b"}, "has no question"),
    ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "whole dialogue"),
    ({"messages": [message("user", "q"), message("assistant", "b")], "rejected_response": "b"}, "the rejected one"),
    ({"messages": [message("user", "q"), message("assistant", "c")], "chosen": "a", "rejected": "b"}, "another answer"),
    ({"prompt": "other", "chosen": [message("user", "q"), message("assistant", "a")], "rejected": "b"}, "start with"),
    ({"instruction": "q", "input": "", "output": ["a", "b"]}, "'output' holds list"),
    ({"instruction": "q", "output": "c", "chosen": "a", "rejected": "b"}, "another answer|lack"),
    ({"prompt": "q", "chosen": 3, "rejected": "b"}, "an answer is '3'"),
    ({"messages": [message("user", "q"), message("assistant", "a")], "rejected": True}, "holds 'True'"),
    ({"input": "<_user>q<_bot>a<_user>r", "chosen": "a", "rejected": "b"}, "turn markers"),
    ({"prompt": "q", "chosen": ["a"], "rejected": ["b"]}, "expected text"),
    ({"prompt": "q", "query": "r", "chosen": "a", "rejected": "b"}, "differ")])
def test_pairs_without_a_clear_answer_are_unusable(record, words):
    with pytest.raises(RecordError, match=words) as caught:
        parse_record(json.dumps(record).encode(), "messages", named=False)
    assert "\n" not in str(caught.value)


def trained(record):
    """(text, whether it is trained) of each answer."""
    messages = parse_record(json.dumps(record).encode(), "messages", named=False).messages
    return [("".join(message.calls) or message.content, message.train) for message in messages if message.role == BOT]


@given(st.sampled_from(["prompt", "common", "other", "text"]), st.booleans())
@settings(max_examples=16, deadline=None)
def test_the_last_message_of_a_user_is_the_border(form, with_call):
    """Earlier answers are context even where the rejected conversation has others, calls after it are trained."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    round_of = [call, {"role": "tool", "content": "r"}] if with_call else []
    before = [message("user", "q"), message("assistant", "a1"), message("user", "q2")]
    ours, theirs = [*before, *round_of, message("assistant", "a2")], [*before, *round_of, message("assistant", "b2")]
    if form == "other":
        theirs[1] = message("assistant", "b1")
    record = ({"messages": ours, "rejected_response": "b2"} if form == "text" else
              {"prompt": ours[:-1], "chosen": ours[-1:], "rejected": theirs[-1:]} if form == "prompt" else
              {"chosen": ours, "rejected": theirs})
    assert [train for _, train in trained(record)] == [False, *([form != "prompt"] if with_call else []), True]


def test_a_prompt_may_name_markers():
    for record in ({"prompt": "what is <_user>?", "completion": "a"}, {"prompt": "<_bot>?", "chosen": "a",
                                                                      "rejected": "b"}):
        assert trained(record) == [("a", True)]


@given(st.sampled_from(["False", "no", "Yes", "true", "1", "0"]), st.sampled_from(["False", "no", "Yes", "true", "0"]))
@settings(max_examples=20, deadline=None)
def test_labels_are_no_answers(ours, theirs):
    messages = [message("user", "q"), message("assistant", "a")]
    for record in ({"messages": messages, "rejected": theirs}, {"prompt": "q", "response": "a", "rejected": theirs},
                   {"prompt": "q", "response": "a", "chosen": ours, "rejected": theirs + " "}):
        with pytest.raises(RecordError, match="preference pair"):
            trained(record)
    assert trained({"prompt": "q", "chosen": ours, "rejected": theirs}) == [(ours, True)]
    assert trained({"messages": messages, "rejected_response": theirs}) == [("a", True)]


def test_a_pair_keeps_its_system_prompt_and_reasoning():
    system, question, answer = {"role": "system", "content": "s"}, message("user", "q"), message("assistant", "a")
    record = {"prompt": [system, question], "chosen": [question, answer], "rejected": [question]}
    messages = parse_record(json.dumps(record).encode(), "messages").messages
    assert [message.content for message in messages] == ["s", "q", "a"]
    record["chosen"] = [{**system, "content": "other"}, question, answer]
    with pytest.raises(RecordError, match="two system prompts"):
        trained(record)
    with pytest.raises(RecordError, match="another answer"):
        trained({"messages": [question, answer], "chosen": {**answer, "reasoning_content": "t"}, "rejected": "b"})


@given(st.sampled_from(["prompt", "query", "question"]), st.sampled_from(["completion", "response", "answer"]),
       st.booleans(), TURNS, WORDS, WORDS)
@settings(max_examples=60, deadline=None)
def test_prompts_and_answers(asked, answered, as_list, turns, question, answer):
    record = ({asked: list_of(turns, question), answered: [message("assistant", answer)]} if as_list else
              {asked: question, answered: answer, "history": list(map(list, turns)), "system": "s"})
    messages = parse_record(json.dumps(record).encode(), "input_output", named=False).messages
    assert [message.content for message in messages] == ([] if as_list else ["s"]) + [
        text for pair in turns for text in pair] + [question, answer]
    assert [message.train for message in messages if message.role == BOT] == [not as_list] * len(turns) + [True]
