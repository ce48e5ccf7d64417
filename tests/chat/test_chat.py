"""Conversations: history, context, streaming, stop strings, tools, the terminal and the command of question files."""
import io
import json
import signal

import numpy as np
import pytest
from golden import SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st
from vocab_fixtures import train_sentencepiece

from research.telechat.chat.session import (
    History,
    Session,
    StopFilter,
    divide_context,
    parse_tool_calls,
    tool_result,
    with_question,
)
from research.telechat.chat.terminal import Terminal
from research.telechat.common.errors import ConfigError
from research.telechat.text.renderer import Renderer, get_template
from research.telechat.text.vocab import Vocab


@pytest.fixture(scope="module")
def vocab_file(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("vocab") / "tokenizer.model")


@pytest.fixture(scope="module")
def renderer(vocab_file):
    return Renderer(get_template("telechat"), Vocab.load(vocab_file))


def session_that_says(renderer, text, prompts=None, context=200, **settings):
    """A session whose model answers every prompt with the tokens of `text`, one by one, and the end token."""
    def next_tokens(ids, limits):
        if prompts is not None:
            prompts.append((ids, limits))
        answer = [*renderer.vocab.encode(text), renderer.end_id]
        yield from answer[:limits["max_new_tokens"]]
    return Session(renderer, next_tokens, context, **settings)


USER = [{"role": "user", "content": "你是谁？"}]


def test_answer_comes_in_whole_characters(renderer):
    text = "我是一个语言模型。龘🙂 and more"                       # characters outside the vocabulary come as bytes
    assert any(len(renderer.vocab.encode(char)) > 1 for char in text)
    session = session_that_says(renderer, text)
    pieces = list(session.answer(USER))
    assert "".join(pieces) == text and len(pieces) > 3
    assert not any("\ufffd" in piece for piece in pieces)
    assert session.report.finish == "end"
    assert session.report.new_tokens == len(renderer.vocab.encode(text)) + 1


def test_answer_that_is_cut_within_a_character(renderer):
    session = session_that_says(renderer, "a🙂", max_new_tokens=len(renderer.vocab.encode("a🙂")) - 1)
    assert "".join(session.answer(USER)) == "a\ufffd"
    assert session.report.finish == "length"


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab<>_en", max_size=30), stops=st.lists(st.text("ab<>_en", min_size=1, max_size=6), max_size=3),
       cuts=st.lists(st.integers(1, 4), min_size=30, max_size=30))
def test_stop_strings_in_pieces(text, stops, cuts):
    """However the text is divided, what is shown is the text up to the first complete stop string."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[:min(ends)[1]] if ends else text
    stop_filter, shown, rest = StopFilter(stops), "", text
    for size in cuts:
        shown += stop_filter.feed(rest[:size])
        rest = rest[size:]
        assert expected.startswith(shown)
    shown += stop_filter.feed(rest) + stop_filter.flush()
    assert shown == expected and stop_filter.stopped == bool(ends)


def test_stop_string_ends_the_answer(renderer):
    session = session_that_says(renderer, "one two<STOP>three", stop="<STOP>")
    assert "".join(session.answer(USER)) == "one two"
    assert session.report.finish == "stop"


def test_markers_in_words_end_an_answer(tmp_path):
    """52B writes its markers as text."""
    path = train_sentencepiece(tmp_path / "tokenizer.model", eos_piece="</s>", bos_piece="<s>", pad_piece="<pad>",
                               user_defined_symbols=["0", "1"])
    renderer = Renderer(get_template("telechat_52b"), Vocab.load(path))
    session = session_that_says(renderer, "好的。<_end><_user>谁？")
    assert "".join(session.answer(USER)) == "好的。"


def test_oldest_turns_go_first_and_the_system_prompt_stays(tmp_path):
    path = train_sentencepiece(tmp_path / "tokenizer.model", control=True)
    renderer = Renderer(get_template("telechat2"), Vocab.load(path))
    turns = [message for number in range(12) for message in (
        {"role": "user", "content": f"question {number} about the sea"}, {"role": "bot", "content": f"poem {number}"})]
    prompts = []
    session = session_that_says(renderer, "yes", prompts, context=160, max_new_tokens=40)
    messages = [{"role": "system", "content": "Be short."}, *turns, *USER]
    "".join(session.answer(messages))
    ids, limits = prompts[0]
    text = renderer.vocab.decode(ids)
    assert len(ids) <= 160 - 40 and limits["max_new_tokens"] == 40
    assert "Be short." in text and "question 11" in text and "question 0" not in text and text.endswith("<_bot>")
    dropped = session.report.dropped_turns
    assert dropped > 0 and f"question {dropped} " in text and f"question {dropped - 1} " not in text


@settings(max_examples=200, deadline=None)
@given(context=st.integers(4, 5000), new=st.one_of(st.none(), st.integers(1, 9000)),
       total=st.one_of(st.none(), st.integers(4, 9000)))
def test_prompt_and_answer_always_fit(context, new, total):
    budget = divide_context(context, new, total)
    assert budget.prompt >= 1 and budget.total <= context
    assert budget.prompt + (budget.answer or 1) <= context
    if new is not None:
        assert budget.answer == min(new, context - context // 4)


@pytest.mark.parametrize(("new", "total"), [(0, None), (-3, None), (None, 0), (2.5, None)])
def test_senseless_lengths(new, total):
    with pytest.raises(ConfigError, match=r"max_\w+: expected a positive whole number"):
        divide_context(100, new, total)


def test_history_is_a_list_that_is_not_changed():
    given_history = [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]
    history, rendered = with_question(given_history, "c", "s")
    assert [message["content"] for message in history] == ["a", "b", "c"] and len(given_history) == 2
    assert [message["role"] for message in rendered] == ["system", "user", "bot", "user"]
    history = History(None, given_history)
    history.append_left({"role": "system", "content": "s"})
    history.update({"role": "bot", "content": "B"})
    assert history.pop_left()["content"] == "s" and history[-1]["content"] == "B"
    assert given_history[-1]["content"] == "b"
    assert json.loads(json.dumps(history)) == list(history)
    for question in ("", None):
        with pytest.raises(ConfigError, match="question is empty"):
            with_question(given_history, question)


def test_history_keeps_calls_and_reasoning_in_the_prompt():
    """In the forms of other libraries: calls with a content of null, roles of any name."""
    given = [{"role": "developer", "content": "a"}, {"role": "human", "content": "b"},
             {"role": "assistant", "content": None, "reasoning_content": "r",
              "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
             {"role": "function", "content": "c"}]
    assert with_question(given, None)[1] == given
    assert with_question(given, None, "s")[1] == [{"role": "system", "content": "s"}, *given[1:]]


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather of a city.",
                                           "parameters": {"type": "object", "properties": {"city": {}}}}}]


def test_tool_calls_and_their_results(tmp_path):
    """The round of TeleChat2's examples: tools in the system prompt, a call, its result, the answer."""
    path = train_sentencepiece(tmp_path / "tokenizer.model", control=True)
    renderer = Renderer(get_template("telechat2"), Vocab.load(path))
    said = 'I look.\n<tool_call>\n{"name": " weather", "arguments": {"city": "北京"}}\n</tool_call>'
    prompts = []
    session = session_that_says(renderer, said, prompts, context=4000, max_new_tokens=1000)
    history, rendered = with_question([], "weather?", "You help.")
    answer = "".join(session.answer(rendered, TOOLS))
    text = renderer.vocab.decode(prompts[0][0])
    assert "You help." in text and json.dumps(TOOLS[0]) in text and "<tools>" in text
    parsed = parse_tool_calls(answer)
    assert parsed.calls == [{"name": "weather", "arguments": {"city": "北京"}}]
    assert parsed.text == "I look." and not parsed.faults
    history += [{"role": "bot", "content": answer}, tool_result({"sky": "晴"})]
    history, rendered = with_question(history, None, "You help.")
    "".join(session.answer(rendered, TOOLS))
    text = renderer.vocab.decode(prompts[1][0])
    assert said in text
    assert text.endswith('<_user><tool_response>\n{"sky": "晴"}\n</tool_response><_bot>')


@pytest.mark.parametrize(("answer", "fault"), [
    ("<tool_call>{broken}</tool_call>", "call 1 is not a JSON"), ("<tool_call>[1]</tool_call>", "not a JSON object"),
    ('<tool_call>{"arguments": {}}</tool_call>', "call 1 has no name"), ('<tool_call>{"name": "a"', "was truncated"),
    ('<tool_call>{"name": "a", "arguments": "{"}</tool_call>', "arguments"),
    ("<tool_call>__import__('os')</tool_call>", "not a JSON object")])
def test_broken_tool_calls_are_told(answer, fault):
    parsed = parse_tool_calls(answer)
    assert not parsed.calls and fault in parsed.faults[0]


def test_several_tool_calls():
    answer = '<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call><tool_call>{"name": "b"}</tool_call>'
    assert parse_tool_calls(answer).calls == [{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {}}]
    answer = "<tool_call>\n{'name': 'a', 'arguments': {'x': True}}\n</tool_call>"
    assert parse_tool_calls(answer).calls == [{"name": "a", "arguments": {"x": True}}]


@needs_shared
def test_tool_calls_of_the_official_examples():
    messages = [message for line in (SHARED / "data/sft/telechat2_demo_tool.jsonl").read_text("utf-8").splitlines()
                for message in json.loads(line)["dialog"]]
    answers = [parse_tool_calls(message["content"]) for message in messages if message["role"] == "bot"]
    assert sum(len(answer.calls) for answer in answers) > 900
    assert not [fault for answer in answers for fault in answer.faults]
    results = [message["content"] for message in messages if message["content"].startswith("<tool_response>")]
    assert results and all(result.startswith("<tool_response>\n") for result in results)


def terminal(session, lines, **settings):
    """Run a terminal over `lines`; returns it and what it wrote."""
    output = io.StringIO()
    chat = Terminal(lambda messages, seed: session.answer(messages, None, seed), lambda: session.report, output,
                    **settings)
    lines = iter(lines)

    def read(_prompt):
        line = next(lines, None)
        if line is None:
            raise EOFError
        if isinstance(line, BaseException):
            raise line
        return line
    chat.run(read)
    return chat, output.getvalue()


def test_terminal_commands(renderer, tmp_path):
    prompts = []
    session = session_that_says(renderer, "我是一个语言模型。", prompts)
    file = tmp_path / "chat.jsonl"
    chat, text = terminal(session, ["你是谁？", "and?", "/retry", f"/save {file}", "/nonsense", "/save", "/clear",
                                    "/retry", KeyboardInterrupt(), "again"], system="Be short.", first="wait ...")
    assert text.count("我是一个语言模型。") == 4 and text.count("wait ...\n") == 1
    assert prompts[1][0] == prompts[2][0] != prompts[0][0]
    assert prompts[3][0] == renderer.prompt([{"role": "user", "content": "again"}])
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["system"] == "Be short."
    assert [message["role"] for message in record["dialog"]] == ["user", "bot", "user", "bot"]
    assert not list(tmp_path.glob("*.part"))
    mine = tmp_path / "mine.jsonl"
    mine.write_text("mine")
    _, text_of_saves = terminal(session, [f"/save {mine}", f"/save {file}"])
    assert "mine.jsonl would be replaced" in text_of_saves and mine.read_text() == "mine"
    assert json.loads(file.read_text(encoding="utf-8")) == {"dialog": []}
    terminal(session, [f"/save --overwrite {mine}"])
    assert json.loads(mine.read_text(encoding="utf-8")) == {"dialog": []}
    for fault in ("unknown command /nonsense", "/save needs a file name", "there is no question to retry"):
        assert f"error: {fault}" in text
    assert [message["content"] for message in chat.history] == ["again", "我是一个语言模型。"]


def test_ctrl_c_stops_the_answer_only(renderer):
    def next_tokens(ids, limits):
        yield from renderer.vocab.encode("我是一")
        signal.raise_signal(signal.SIGINT)
        yield from renderer.vocab.encode("never")
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        chat, text = terminal(Session(renderer, next_tokens, 200), ["你是谁？", "/history"])
    finally:
        signal.signal(signal.SIGINT, previous)
    assert "我是一 (stopped)" in text and "never" not in text
    assert chat.history[-1] == {"role": "bot", "content": "我是一"} and "bot: 我是一" in text


def test_ctrl_c_before_the_first_token(renderer):
    def answer(_messages, _seed):
        raise KeyboardInterrupt
    output, lines = io.StringIO(), iter(["你是谁？", "/history", "/exit"])
    chat = Terminal(answer, lambda: None, output)
    chat.run(lambda _prompt: next(lines))
    assert " (stopped)" in output.getvalue() and not chat.history and next(lines, None) is None


@pytest.fixture(scope="module")
def model():
    from chat_fixtures import tiny_weights
    from model_fixtures import build_model
    return build_model(*tiny_weights(), use_past=True, num_blocks=16)


@pytest.mark.slow
def test_chat_with_a_model(model, vocab_file):
    from research.telechat.chat.api import chat, read_generation_config
    from research.telechat.telechat_tokenizer import TelechatTokenizer
    tokenizer = TelechatTokenizer(str(vocab_file))
    config = read_generation_config({"max_new_tokens": 12, "do_sample": True, "temperature": 0.8, "top_k": 5,
                                     "top_p": 0.9, "repetition_penalty": 1.05, "eos_token_id": 2})
    answer, history = chat(model, tokenizer, "你是谁？", history=[], generation_config=config, seed=3)
    prompt = Renderer(get_template("telechat"), tokenizer.vocab).prompt(USER)
    ids = model.generate(prompt, config, seed=3)[0][len(prompt):].tolist()
    assert answer == tokenizer.vocab.decode(ids, skip_special_tokens=True) and answer
    assert history == [*USER, {"role": "bot", "content": answer}]
    stream = list(chat(model, tokenizer, "你是谁？", history=[], generation_config=config, stream=True, seed=3))
    assert "".join(piece for piece, _ in stream) == answer and stream[-1][1] == history
    again, longer = chat(model, tokenizer, "and?", history=history, generation_config=config, seed=3)
    assert longer[:2] == history and len(longer) == 4 and len(history) == 2
    assert model.chat(tokenizer=tokenizer, question="and?", history=history, generation_config=config, stream=False,
                      seed=3) == (again, longer)


@pytest.mark.slow
def test_long_conversations_go_on(model, vocab_file):
    from research.telechat.chat.api import chat
    vocab = Vocab.load(vocab_file)
    history = []
    for number in range(8):
        answer, history = chat(model, vocab, f"{number}: write a short poem about the sea", history, max_new_tokens=30)
    assert len(history) == 16 and answer


@pytest.mark.slow
def test_tokenizer_of_another_model(model, vocab_file):
    from types import SimpleNamespace

    from research.telechat.chat.api import chat
    with pytest.raises(ConfigError, match="did you mean max_new_tokens"):
        chat(model, Vocab.load(vocab_file), "a", max_new_token=3)
    with pytest.raises(ConfigError, match="no tokenizer is set"):
        chat(model, None, "a")
    with pytest.raises(ConfigError, match=r"another model.*600 tokens, the model 500"):
        chat(SimpleNamespace(config=SimpleNamespace(vocab_size=500)), Vocab.load(vocab_file), "a")


def test_generation_config_file(tmp_path):
    from research.telechat.chat.api import read_generation_config
    (tmp_path / "generation_config.json").write_text(json.dumps(
        {"max_length": 4096, "do_sample": False, "use_cache": True, "temperature": 0.3, "top_k": 5, "top_p": 0.85,
         "repetition_penalty": 1.03, "eos_token_id": 160133, "user_token_id": 160130}))
    config = read_generation_config(tmp_path)
    assert (config.max_length, config.top_p, config.repetition_penalty) == (4096, 0.85, 1.03)
    assert config.user_token_id == 160130
    for broken, message in (("{", "not valid JSON"), ("[]", "JSON object")):
        (tmp_path / "other.json").write_text(broken)
        with pytest.raises(ConfigError, match=message):
            read_generation_config(tmp_path / "other.json")
    with pytest.raises(ConfigError, match=r"not found.*none\.json"):
        read_generation_config(tmp_path / "none.json")


@pytest.mark.parametrize(("settings", "said"), [
    ({"max_new_token": 5}, "max_new_token is not a generation setting; did you mean max_new_tokens?"),
    ({"num_beams": 4}, "num_beams is 4, which is not supported; expected 1"),
    ({"no_repeat_ngram_size": 3, "min_p": None}, "no_repeat_ngram_size is 3"),
    ({"suppress_tokens": [7]}, r"suppress_tokens is \[7\]"), ({"typical_p": 0.9}, "typical_p is 0.9")])
def test_settings_that_would_be_dropped_are_refused(tmp_path, settings, said):
    from research.telechat.chat.api import read_generation_config
    with pytest.raises(ConfigError, match=said):
        read_generation_config(settings)
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    if "max_new_token" not in settings:                  # of a file, unknown names are only logged
        with pytest.raises(ConfigError, match=said):
            read_generation_config(tmp_path)
    neutral = {"num_beams": 1, "typical_p": 1.0, "suppress_tokens": [], "use_cache": True, "_from_model_config": True}
    assert read_generation_config({**neutral, "top_k": 3}).top_k == 3


def test_ctrl_c_waits_for_a_token(renderer):
    from research.telechat.chat import interrupt as interrupt

    def next_tokens(ids, limits):
        for token in renderer.vocab.encode("我是一"):
            signal.raise_signal(signal.SIGINT)
            yield token
    with interrupt.held():
        tokens = interrupt.checked(next_tokens)([], {})
        next(tokens)
        with pytest.raises(KeyboardInterrupt):
            next(tokens)
        interrupt.check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), interrupt.released():
            pass
        signal.raise_signal(signal.SIGINT)                   # held again
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt), interrupt.released():
                signal.raise_signal(signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, previous)


def test_numbers_of_a_report(renderer):
    session = session_that_says(renderer, "a b c")
    list(session.answer(USER))
    report = session.report.as_dict()
    assert report["prompt_tokens"] == len(renderer.prompt(USER)) and report["finish"] == "end"
    assert np.isclose(report["tokens_per_second"], session.report.new_tokens / session.report.seconds, rtol=0.01)
