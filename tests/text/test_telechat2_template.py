"""TeleChat2's chat template: the published Jinja template, tokens of tools, reasoning, tokenizer_config.json."""
import json
import random
import shutil

import pytest
from conversation_fixtures import bot, system, user
from golden import SHARED, needs_shared

from research.telechat.common.errors import VocabError
from research.telechat.text.messages import Message, to_message
from research.telechat.text.renderer import Renderer, choose_template, get_template
from research.telechat.text.vocab import Vocab

NI_HAO = [6, 3921, 12966, 16716, 40721, 62816, 123959, 126161, 113621, 126181, 50751, 25372, 126161, 7515, 126511,
          126217, 16716, 14180, 19326, 29074, 16716, 14180, 14617, 126652, 50751, 8993, 126650, 6145, 86750, 29791,
          126169, 29, 4, 96343, 5]
TOOLS = [{"type": "function", "function": {"name": "天气", "parameters": {"type": "object"}}}, {"name": "add"}]
CALL, END_CALL, RESPONSE, END_RESPONSE = 9, 10, 11, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tokenizer.model and tokenizer_config.json of TeleChat2-7B, the latter without its Jinja template."""
    path = tmp_path_factory.mktemp("telechat2_7b")
    shutil.copy(SHARED / "data/telechat2-115b/tokenizer.model", path)
    shutil.copy(SHARED / "data/telechat2-7b/tokenizer_config.partial.json", path / "tokenizer_config.json")
    return path


@pytest.fixture(scope="module")
def vocab(folder):
    return Vocab.load(folder)


@pytest.fixture(scope="module")
def renderer(vocab):
    return Renderer(choose_template(vocab), vocab)


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def random_conversation(rng):
    """Messages and tools as the Jinja template takes them, the last a question or results of tools."""
    def text():
        return "".join(rng.choice(["你好", "天气如何？", " hi", "\n", "x<y", "{}", "a b", "№", "\n\n"])
                       for _ in range(rng.randint(1, 4)))
    messages = [system(text())] if rng.random() < 0.5 else []
    tools = rng.sample(TOOLS, rng.randint(1, 2)) if rng.random() < 0.5 else None
    for _ in range(rng.randint(0, 4)):
        messages.append(user(text()))
        if tools and rng.random() < 0.6:
            calls = [call(rng.choice(["add", "天气"]), {"q": text(), "n": rng.randint(0, 9)})
                     for _ in range(rng.randint(1, 3))]
            messages.append({"role": "assistant", "content": rng.choice([text(), "", None]), "tool_calls": calls})
            messages += [{"role": "tool", "content": text()} for _ in calls]
        messages.append({"role": "assistant", "content": text()})
    if tools and messages and messages[-1]["role"] == "assistant" and rng.random() < 0.5:
        messages += [user(text()), {"role": "assistant", "content": "", "tool_calls": [call("add", {})]},
                     {"role": "tool", "content": text()}]
    else:
        messages.append(user(text()))
    return messages, tools


@needs_shared
def test_published_ids(renderer, vocab):
    assert renderer.template.name == "telechat2"
    assert renderer.prompt([user("你好")]) == NI_HAO
    for name in ("telechat2_start", "telechat2_before", "telechat2_think"):
        assert Renderer(get_template(name), vocab).prompt([user("你好")]) != NI_HAO


@needs_shared
def test_equals_the_published_jinja_template(renderer, vocab):
    jinja2 = pytest.importorskip("jinja2")
    environment = jinja2.Environment()
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string(
        (SHARED / "data/telechat2-chat-template/chat_template.jinja").read_text(encoding="utf-8"))
    rng = random.Random(16)
    kinds = set()
    for _ in range(250):
        messages, tools = random_conversation(rng)
        expected = template.render(messages=messages, tools=tools, add_generation_prompt=True)
        assert renderer.prompt(messages, tools) == vocab.encode_with_specials(expected)
        whole = [*messages, {"role": "assistant", "content": "完"}]
        expected = template.render(messages=whole, tools=tools, add_generation_prompt=False)
        ids, _ = renderer.render(whole, tools)
        assert ids == vocab.encode_with_specials(expected.rstrip("\n"))
        kinds.add((messages[0]["role"] == "system", tools is not None, messages[-1]["role"]))
    assert len(kinds) == 6


@needs_shared
def test_calls_are_tokens_and_trained(renderer, vocab):
    messages = [user("1+1?"), {"role": "bot", "content": "算", "tool_calls": [call("add", {"a": 1})]},
                {"role": "tool", "content": "<tool_call>2</tool_response>"}, bot("2")]
    ids, mask = renderer.render(messages, TOOLS)
    trained = [token for token, on in zip(ids, mask) if on]
    assert trained.count(CALL) == trained.count(END_CALL) == 1 and RESPONSE not in trained
    assert ids.count(RESPONSE) == ids.count(END_RESPONSE) == 1                # what somebody typed is text
    assert ids.count(CALL) == 3                                               # two in the description of the form
    written = bot('算<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>')
    results = user("<tool_response>\n<tool_call>2</tool_response>\n</tool_response>")
    assert renderer.render([messages[0], written, *messages[2:]], TOOLS)[0] == ids
    official = [user("a"), bot("b"), user("<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>")]
    assert renderer.render([*official, bot("c")])[0].count(RESPONSE) == 2     # as official training data writes it
    assert RESPONSE not in renderer.prompt(official)                          # but nobody can type it into a chat
    assert RESPONSE not in renderer.prompt([user("a"), bot("b"), results])


@needs_shared
def test_block_written_into_the_system_prompt(renderer, vocab):
    with open(SHARED / "data/sft/telechat2_demo_tool.jsonl", encoding="utf-8") as file:
        written = json.loads(next(file))["system"]
    tools = written[written.index("<tools>\n") + 8:written.index("\n</tools>")]
    messages = [user("a"), bot("b")]
    assert renderer.render([system(written), *messages])[0] == renderer.render(
        messages, [json.loads(line) for line in tools.split("\n")])[0]


@needs_shared
def test_names_of_markers(folder, vocab, tmp_path):
    assert {vocab.markers[piece] for piece in ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
            } == {CALL, END_CALL, RESPONSE, END_RESPONSE}
    assert vocab.token_to_id("<tool_call>") == CALL and vocab.id_to_token(CALL) == "<tool_call>"
    assert vocab.pieces()["<tool_call>"] == CALL and "<_control1>" not in vocab.markers
    assert vocab.decode([CALL, END_CALL]) == "<tool_call></tool_call>"
    assert CALL not in vocab.encode("<tool_call>")
    shutil.copy(folder / "tokenizer.model", tmp_path)
    bare = Vocab.load(tmp_path)
    assert "<tool_call>" not in bare.markers and choose_template(bare).name == "telechat2"
    assert choose_template(Vocab.load(SHARED / "data/telechat2-115b")).name == "telechat2_start"


@pytest.mark.parametrize(("listed", "words"), [
    ({"9": {"content": "<_user>"}}, "added_tokens_decoder .* says that '<_user>' has id 9, but"),
    ({"500": "x"}, "an ordinary piece of text"), ({"999999": {"content": "x"}}, "the ids there end at 599"),
    ({"x": 1}, "expected ids"), ([1], "expected ids")])
def test_tokenizer_config_of_another_vocabulary(vocab_files, tmp_path, listed, words):
    shutil.copy(vocab_files["telechat2"], tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    with pytest.raises(VocabError, match=words):
        Vocab.load(tmp_path)


# Reasoning

def thought(text, reasoning):
    return {"role": "assistant", "content": text, "reasoning_content": reasoning}


@needs_shared
def test_reasoning_of_the_last_answer_only(vocab):
    renderer = Renderer(get_template("telechat2_think"), vocab)
    plain = Renderer(get_template("telechat2"), vocab)
    opening = vocab.encode("<think>\n")
    assert renderer.prompt([user("你好")]) == [*NI_HAO, *opening]
    messages = [user("1+1?"), thought("2", "one and one"), user("1+2?"), thought("3", "\none and two\n")]
    prompt = renderer.prompt(messages[:-1])
    assert prompt == [*plain.prompt(messages[:-1]), *opening]
    ids, mask = renderer.render(messages)
    assert ids[:len(prompt)] == prompt and mask[:len(prompt)] == [0] * len(prompt)
    assert mask[len(prompt):] == [1] * (len(ids) - len(prompt))
    assert ids[len(prompt) - len(opening):] == [*vocab.encode("<think>\none and two\n</think>\n\n3"), 2]
    first, second = renderer.conversations([to_message(message, 1) for message in messages])
    assert second == [*first[:1], Message("bot", "2", train=False, reasoning="one and one"), *second[2:]]
    assert [message.role for message in first] == ["user", "bot"] and first[1].train


@needs_shared
def test_answer_without_reasoning_is_asked_as_it_is_trained(vocab):
    renderer = Renderer(get_template("telechat2_think"), vocab)
    prompt = renderer.prompt([user("1+1?")])
    ids, mask = renderer.render([user("1+1?"), bot("2")])
    assert ids[:len(prompt)] == prompt
    assert vocab.decode([token for token, on in zip(ids, mask) if on]) == "2<_end>"
    assert vocab.decode(ids).endswith("<_bot><think>\n\n</think>\n\n2<_end>")
