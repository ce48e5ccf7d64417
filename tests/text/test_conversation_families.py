"""How each family writes a conversation: against the official chat prompts and training samples, and by hand."""
import re

import pytest
from conversation_fixtures import bot, renderers, system, user
from golden import SHARED, golden_json, needs_shared

from research.telechat.spec.variants import VARIANTS
from research.telechat.text.renderer import (
    Renderer,
    detect_template,
    get_template,
)
from research.telechat.text.vocab import Vocab

OFFICIAL = {"12b": ("telechat", "telechat-12b"), "52b": ("telechat_52b", "telechat-52b"),
            "115b": ("telechat2_start", "telechat2-115b")}
TOO_LONG = "the official code counts only the newest message against the limit, and cuts turns in half"
# Cases in which the official code is plainly wrong; docs/data.md lists them.
FAULTS = {
    ("12b", "special_text_in_question"): "a marker typed by the user becomes the marker",
    ("52b", "special_text_in_question"): "a marker typed by the user reads as the marker",
    ("115b", "special_text_in_question"): "the tokenizer adds a space behind <_end> in a text",
    ("115b", "with_unknown_role"): "the system prompt is left out",
    **{(family, case): TOO_LONG for family in ("7b", "12b", "115b")
       for case in ("history_too_long_breaks", "history_not_accumulated_bug", "max_length_only")},
    **{(family, "long_question_truncated_left"): "one or two tokens more than the limit"
       for family in ("7b", "12b", "115b")},
}


class CharacterVocab:
    """The stand-in for 7B's vocabulary in the official samples: one id per character."""

    def __init__(self):
        self.path = "characters"
        self.markers = {"<_user>": 160130, "<_bot>": 160131, "<_start>": 160132, "<_end>": 160133, "<pad>": 3}

    def encode(self, text):
        return [300 + ord(char) % 997 for char in text]


def official_renderer(family):
    if family == "7b":
        return Renderer(get_template("telechat"), CharacterVocab())
    template, folder = OFFICIAL[family]
    return Renderer(get_template(template), Vocab.load(SHARED / "data" / folder))


@needs_shared
@pytest.mark.parametrize("family", ["7b", "12b", "52b", "115b"])
def test_chat_prompts_equal_the_official_ones(family):
    renderer = official_renderer(family)
    equal = 0
    for case in golden_json("chat_golden.json")[family]:
        if family == "52b":
            pairs = zip(case["history_input_list"], case["history_output_list"])
            history = [message for question, answer in pairs for message in (user(question), bot(answer))]
        else:
            history = case["history"]
        limit = case.get("build_max_length")
        prompt = renderer.fit_prompt([*history, user(case["question"])], limit=limit)
        if (family, case["name"]) not in FAULTS:
            assert prompt.ids == case["input_ids"], case["name"]
            equal += 1
            continue
        assert prompt.ids != case["input_ids"], f"{case['name']} is no fault any more"
        if limit and len(case["input_ids"]) > limit - 2:
            assert len(prompt.ids) <= limit
    assert equal >= 3


@needs_shared
def test_system_prompt_in_chat_is_written_as_in_training():
    renderer = official_renderer("115b")
    messages = [system("你是助手"), user("hi"), bot("hello"), user("继续")]
    prompt = renderer.prompt(messages)
    ids, _ = renderer.render([*messages, bot("好的")])
    assert ids[:len(prompt)] == prompt


def runs(rle):
    return [value for value, count in rle for _ in range(count)]


def inline(sample):
    parts = re.split("<_user>|<_bot>", sample["input"])[1:]
    return [bot(part) if index % 2 else user(part) for index, part in enumerate([*parts, sample["output"]])]


@needs_shared
def test_training_samples_of_7b_and_12b():
    """Equal but for the official mask, which also trains the markers <_user> and <_bot>."""
    renderer = official_renderer("12b")
    samples = golden_json("sft_golden.json")["telechat_7b_12b"]["singles"]
    for sample in samples:
        ids, mask = renderer.render(inline(sample["sample"]))
        official = runs(sample["loss_mask_rle"])[sample["n_left_pad"]:]
        assert ids == sample["input_ids_unpadded"]
        assert mask == [int(on and token not in (20, 21)) for on, token in zip(official, ids)]
    assert any(ids.count(20) > 1 for ids in [renderer.render(inline(sample["sample"]))[0] for sample in samples])


@needs_shared
def test_training_samples_of_52b():
    """Ids are equal; the official mask has the length of the question instead of the answer's, and trains one turn."""
    renderer = official_renderer("52b")
    for sample in golden_json("sft_golden.json")["telechat_52b"]["singles"]:
        messages = inline(sample["sample"])
        ids, mask = renderer.render(messages)
        assert ids == sample["input_ids_unpadded"]
        answers = [renderer.vocab.encode(message["content"]) for message in messages if message["role"] == "bot"]
        expected = [token for answer in answers for token in answer] + [2]
        assert [token for token, on in zip(ids, mask) if on] == expected


@needs_shared
def test_training_samples_of_telechat2():
    """Equal but for the official mask, which also trains the markers <_user> and <_bot>."""
    renderer = official_renderer("115b")
    for sample in golden_json("sft_golden.json")["telechat2"]["B_special"]["singles"]:
        ids, mask = renderer.render([system(sample["system"]), *sample["dialog"]])
        assert ids == sample["input_ids"]
        assert mask == [int(on and token not in (4, 5)) for on, token in zip(runs(sample["loss_mask_rle"]), ids)]


@needs_shared
def test_templates_are_told_by_the_official_vocabularies():
    for template, folder in OFFICIAL.values():
        assert detect_template(Vocab.load(SHARED / "data" / folder)).name == template


@needs_shared
def test_tools_block_is_that_of_the_official_data():
    import json

    with open(SHARED / "data" / "sft" / "telechat2_demo_tool.jsonl", encoding="utf-8") as file:
        written = json.loads(next(file))["system"]
    tools = written[written.index("<tools>\n") + 8:written.index("\n</tools>")]
    renderer = official_renderer("115b")
    as_text, _ = renderer.render([system(written), user("a"), bot("b")])
    as_list, _ = renderer.render([user("a"), bot("b")], tools=[json.loads(line) for line in tools.split("\n")])
    assert as_list == as_text


# By hand

def test_telechat_by_hand(vocabs):
    vocab = vocabs["12b"]
    u, b, end = (vocab.markers[piece] for piece in ("<_user>", "<_bot>", "<_end>"))
    q1, a1, q2, a2 = (vocab.encode(text) for text in ("你是谁？", "我是模型。", "Write", "a poem"))
    messages = [user("你是谁？"), bot("我是模型。"), user("Write"), bot("a poem")]
    ids, mask = Renderer(get_template("telechat"), vocab).render(messages)
    assert ids == [u, *q1, b, *a1, end, u, *q2, b, *a2, end]
    zeros, ones = [0], [1]
    assert mask == (zeros * (len(q1) + 2) + ones * (len(a1) + 1) + zeros * (len(q2) + 2) + ones * (len(a2) + 1))
    with_start = Renderer(get_template("telechat"), vocab, start_token="<_start>")
    assert with_start.render(messages)[0] == [vocab.markers["<_start>"], *ids]
    assert with_start.prompt(messages[:3]) == [vocab.markers["<_start>"], u, *q1, b, *a1, end, u, *q2, b]


def test_telechat2_by_hand(vocabs):
    vocab = vocabs["telechat2"]
    s, u, b, end, start = (vocab.markers[f"<_{role}>"] for role in ("system", "user", "bot", "end", "start"))
    line = vocab.encode("\n")
    first = [u, *vocab.encode("hi"), b, *vocab.encode("yes"), end]
    second = [u, *vocab.encode("and"), b, *vocab.encode("no"), end]
    messages = [system("be brief"), user("hi"), bot("yes"), user("and"), bot("no")]
    renderer = Renderer(get_template("telechat2"), vocab)
    default = renderer.template.default_system
    for text, given in (("be brief", messages), (default, messages[1:])):
        head = [s, *vocab.encode(text + "\n")]
        assert renderer.render(given)[0] == head + first + line + second
        assert renderer.prompt(given[:-1]) == head + first + line + [u, *vocab.encode("and"), b]

    head = [s, *vocab.encode("be brief"), *line]
    for name in ("telechat2_start", "telechat2_before"):
        renderer = Renderer(get_template(name), vocab)
        assert renderer.render(messages)[0] == head + first + line + second
        assert renderer.prompt(messages[:4]) == head + first + line + [u, *vocab.encode("and"), b]
        assert renderer.prompt(messages[1:4]) == [start, *first, u, *vocab.encode("and"), b]
    earlier = renderer.render(messages[1:])[0]
    assert earlier == [s, *vocab.encode(default + "\n"), *line, *first, *line, *second]
    renderer = Renderer(get_template("telechat2_start"), vocab)
    assert renderer.render(messages[1:])[0] == [start, *first, *second]      # trained as it is asked


def test_tools_of_telechat2(vocabs):
    vocab = vocabs["telechat2"]
    renderer = Renderer(get_template("telechat2"), vocab)
    call = {"role": "assistant", "content": None,
            "tool_calls": [{"function": {"name": "add", "arguments": "{\"a\": 1}"}}, {"name": "now", "arguments": {}}]}
    messages = [user("1+1?"), call, {"role": "tool", "content": "2"}, {"role": "tool", "content": "noon"}, bot("2")]
    ids, mask = renderer.render(messages, tools=[{"name": "add"}])
    text = vocab.decode(ids)
    assert ('<_bot><tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n'
            '{"name": "now", "arguments": {}}\n</tool_call><_end>') in text
    assert "<_user><tool_response>\n2\n</tool_response>\n<tool_response>\nnoon\n</tool_response><_bot>" in text
    assert '<tools>\n{"name": "add"}\n</tools>' in text
    assert ids.count(vocab.markers["<_user>"]) == 2 and "tool_response" not in vocab.decode(
        [token for token, on in zip(ids, mask) if on])


def test_52b_in_words_and_with_tokens(vocabs):
    vocab = vocabs["52b"]
    words, tokens = renderers(vocabs)["52b in words"], renderers(vocabs)["52b with tokens"]
    messages = [user("hi"), bot("yes"), user("and"), bot("no")]
    eos = vocab.markers["</s>"]
    ids, mask = words.render(messages)
    assert ids == (vocab.encode("<_user>hi<_bot>") + vocab.encode("yes<_end>") + vocab.encode("<_user>and<_bot>")
                   + vocab.encode("no") + [eos])
    assert [token for token, on in zip(ids, mask) if on] == [*vocab.encode("yes"), *vocab.encode("no"), eos]
    assert words.prompt(messages[:3]) == vocab.encode("<_user>hi<_bot>yes<_end><_user>and<_bot>")
    start, u, b = (vocab.markers[f"<reserve{number}>"] for number in (3, 1, 2))
    assert tokens.render(messages)[0] == [start, u, *vocab.encode("hi"), b, *vocab.encode("yes"), eos,
                                          u, *vocab.encode("and"), b, *vocab.encode("no"), eos]


def test_every_variant_names_a_template():
    for variant in VARIANTS.values():
        assert get_template(variant.chat_template)


def test_templates_are_told_by_the_markers(vocabs):
    found = {name: detect_template(vocab).name for name, vocab in vocabs.items()}
    assert found == {"7b": "telechat", "12b": "telechat", "52b": "telechat_52b", "telechat2": "telechat2"}
