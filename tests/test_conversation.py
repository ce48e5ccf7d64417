"""The renderer of conversations: against the official chat prompts and training samples, and by its own rules."""
import re

import pytest
from golden import SHARED, golden_json, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st
from vocab_fixtures import ORDINARY_SYMBOLS, train_byte_level_bpe, train_sentencepiece

from research.telechat.telechat_conversation import (
    ConversationError,
    Renderer,
    detect_template,
    get_template,
)
from research.telechat.telechat_variants import VARIANTS, ConfigError
from research.telechat.telechat_vocab import Vocab

MARKERS = ["<_user>", "<_bot>", "<_end>", "<_start>", "<_system>", "<_pad>", "</s>", "<pad>", "<reserve1>"]
PIECES = st.one_of(st.sampled_from(MARKERS), st.text(max_size=8), st.sampled_from(["你好", "\n", " ", "<", "_"]))
TEXT = st.lists(PIECES, max_size=6).map("".join).map(lambda text: text.encode("utf-8", "replace").decode())


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "bot", "content": text}


def system(text):
    return {"role": "system", "content": text}


@pytest.fixture(scope="module")
def vocabs(tmp_path_factory):
    """One small vocabulary per family."""
    folder = tmp_path_factory.mktemp("vocabs")
    reserves = [f"<reserve{n}>" for n in (1, 2, 3)]
    train_sentencepiece(folder / "52b.model", user_defined_symbols=ORDINARY_SYMBOLS + reserves, unk_piece="<unk>",
                        bos_piece="<s>", eos_piece="</s>", pad_piece="<pad>")
    train_sentencepiece(folder / "12b.model")
    train_sentencepiece(folder / "telechat2.model", control=True)
    train_byte_level_bpe(folder / "7b.json")
    return {path.stem: Vocab.load(path) for path in folder.iterdir()}


def renderers(vocabs):
    """A renderer for every way of writing there is."""
    reserve = {"start_token": "<reserve3>", "user_token": "<reserve1>", "bot_token": "<reserve2>", "pad_token": "<pad>"}
    return {
        "7b": Renderer(get_template("telechat"), vocabs["7b"], pad_token="<pad>"),
        "12b": Renderer(get_template("telechat"), vocabs["12b"]),
        "12b with start": Renderer(get_template("telechat"), vocabs["12b"], start_token="<_start>"),
        "52b in words": Renderer(get_template("telechat_52b"), vocabs["52b"]),
        "52b with tokens": Renderer(get_template("telechat_52b"), vocabs["52b"], **reserve),
        "telechat2": Renderer(get_template("telechat2"), vocabs["telechat2"]),
    }


WAYS = ["7b", "12b", "12b with start", "52b in words", "52b with tokens", "telechat2"]


# Against the official code

OFFICIAL = {"12b": ("telechat", "telechat-12b"), "52b": ("telechat_52b", "telechat-52b"),
            "115b": ("telechat2", "telechat2-115b")}
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


# How each family writes

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
    renderer = Renderer(get_template("telechat2"), vocab)
    head = [s, *vocab.encode("be brief"), *line]
    first = [u, *vocab.encode("hi"), b, *vocab.encode("yes"), end]
    second = [u, *vocab.encode("and"), b, *vocab.encode("no"), end]
    messages = [system("be brief"), user("hi"), bot("yes"), user("and"), bot("no")]
    assert renderer.render(messages)[0] == head + first + line + second
    default = renderer.template.default_system
    assert renderer.render(messages[1:])[0] == [s, *vocab.encode(default), *line, *first, *line, *second]
    assert renderer.prompt(messages[1:4]) == [start, *first, u, *vocab.encode("and"), b]
    assert renderer.prompt(messages[:4]) == head + first + line + [u, *vocab.encode("and"), b]


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


# Rules for all

@st.composite
def conversations(draw, last="bot", max_turns=4):
    turns = draw(st.integers(1, max_turns))
    messages = [message for _ in range(turns) for message in (user(draw(TEXT)), bot(draw(TEXT)))]
    return messages if last == "bot" else messages[:-1]


def count_marker(renderer, ids, word):
    """How often a marker stands in ids, be it a token or words at the beginning of a text or within one."""
    if not renderer.as_text:
        return ids.count(getattr(renderer, f"{word}_id"))
    marker = getattr(renderer.template, word)
    forms = {tuple(renderer.vocab.encode(marker)), tuple(renderer.vocab.encode("\n" + marker)[
        len(renderer.vocab.encode("\n")):])}
    core = min(forms, key=len)[1:-1]                       # without what may merge with its neighbours
    return sum(tuple(ids[at:at + len(core)]) == core for at in range(len(ids)))


@pytest.mark.parametrize("way", WAYS)
@given(messages=conversations())
@settings(max_examples=60, deadline=None)
def test_typed_markers_are_text(way, vocabs, messages):
    renderer = renderers(vocabs)[way]
    ids, mask = renderer.render(messages)
    turns = len(messages) // 2
    assert len(ids) == len(mask)
    assert count_marker(renderer, ids, "user") == turns
    assert count_marker(renderer, ids, "bot") == turns
    assert ids.count(renderer.end_id) == (1 if renderer.as_text else turns)
    assert ids.count(renderer.pad_id) == 0
    prompt = renderer.prompt([*messages, user("x")])
    assert count_marker(renderer, prompt, "bot") == turns + 1
    assert count_marker(renderer, prompt, "user") == turns + 1


@pytest.mark.parametrize("way", WAYS)
@given(messages=conversations())
@settings(max_examples=60, deadline=None)
def test_loss_is_on_the_answers_and_nothing_else(way, vocabs, messages):
    renderer = renderers(vocabs)[way]
    ids, mask = renderer.render(messages)
    parts, part = [], []
    for token, on in zip([*ids, -1], [*mask, 0]):
        if on:
            part.append(token)
        elif part:
            parts.append(part)
            part = []
    answers = [message["content"] for message in messages if message["role"] == "bot"]
    if renderer.as_text:
        assert parts[-1][-1] == renderer.end_id
        parts[-1].pop()
        answers = [answer for answer in answers[:-1] if answer] + answers[-1:]
    else:
        assert all(part.pop() == renderer.end_id for part in parts)
    assert len(parts) == len(answers)
    plain = str.maketrans("▁", " ")                         # SentencePiece cannot tell the two
    for part, answer in zip(parts, answers):
        text = renderer.vocab.decode(part)
        merged = renderer.as_text and answer[-1:] in "<>_ "  # may merge with the marker in words behind it
        assert text == answer.translate(plain) or merged


@pytest.mark.parametrize("way", WAYS)
@given(batch=st.lists(conversations(), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_batches_give_the_same_as_one_by_one(way, vocabs, batch):
    renderer = renderers(vocabs)[way]
    plans = [renderer.plan(messages) for messages in batch]
    encoded = iter(renderer.vocab.encode_batch([text for plan in plans for text in plan.texts], num_threads=1))
    for plan, messages in zip(plans, batch):
        rendered = renderer.assemble(plan, encoded)
        assert (rendered.ids, rendered.mask()) == renderer.render(messages)
        assert len(rendered.turns) == len(messages) // 2
        opening = rendered.ids[rendered.turns[0]:rendered.turns[0] + rendered.opening]
        assert renderer.as_text or opening == [renderer.user_id]
    assert next(encoded, None) is None


@pytest.mark.parametrize("way", WAYS)
@given(messages=conversations(last="user", max_turns=6), limit=st.integers(24, 120))
@settings(max_examples=60, deadline=None)
def test_prompts_fit_the_limit(way, vocabs, messages, limit):
    renderer = renderers(vocabs)[way]
    whole = renderer.prompt(messages)
    prompt = renderer.fit_prompt(messages, limit=limit)
    assert len(prompt.ids) <= limit
    if len(whole) <= limit:
        assert prompt == (whole, 0, 0)
        return
    kept = messages[2 * prompt.dropped_turns:]
    if not prompt.cut_tokens:
        assert prompt.ids == renderer.prompt(kept)
        assert prompt.dropped_turns > 0
        assert len(renderer.prompt(messages[2 * prompt.dropped_turns - 2:])) > limit       # no more than need be
    else:
        assert len(kept) == 1 and len(prompt.ids) == limit


def test_history_gives_way_before_the_system_prompt(vocabs):
    renderer = Renderer(get_template("telechat2"), vocabs["telechat2"])
    messages = [system("be brief"), user("one " * 20), bot("yes"), user("two")]
    needed = len(renderer.prompt([messages[0], messages[-1]]))
    prompt = renderer.fit_prompt(messages, limit=needed)
    assert prompt.dropped_turns == 1
    assert prompt.ids == renderer.prompt([messages[0], messages[-1]])
    cut = renderer.fit_prompt(messages, limit=needed - 1)
    assert cut.cut_tokens == 1 and len(cut.ids) == needed - 1 and cut.ids[0] == renderer.system_id
    with pytest.raises(ConversationError, match="only 3 fit"):
        renderer.prompt(messages, limit=3)


# Mistakes

@pytest.mark.parametrize("messages,words", [
    ([], "no user message"),
    ([system("x")], "no user message"),
    ([bot("x")], "message 1: bot after nothing; expected user"),
    ([user("a"), user("b"), bot("c")], "message 2: user after user; expected bot"),
    ([user("a"), bot("b"), bot("c")], "message 3: bot after bot; expected user"),
    ([user("a"), bot("b"), system("c")], "message 3: a system prompt after other messages"),
    ([user("a"), bot("b"), user("c")], "last message is from user; expected the bot's answer"),
    ([{"role": "wizard", "content": "x"}], "role 'wizard' is unknown"),
    ([{"role": ["user"], "content": "x"}], "is unknown"),
    ([{"role": "user"}], "message 1: its content is NoneType; expected text"),
    ([{"role": "user", "content": 5}, bot("x")], "message 1: its content is int"),
    (["hello"], "message 1 is str"),
    ([{"role": "tool", "content": "x"}, bot("y")], "message 1: tool after nothing"),
    ([user("a"), {"role": "bot", "content": "", "tool_calls": [{}]}], "a tool call has no name"),
    ([user("a"), {"role": "bot", "content": "", "tool_calls": "f()"}], "must be a list"),
])
def test_wrong_conversations_are_named(vocabs, messages, words):
    with pytest.raises(ConversationError, match=re.escape(words)):
        Renderer(get_template("telechat2"), vocabs["telechat2"]).render(messages)


def test_what_a_template_has_no_place_for(vocabs):
    template = get_template("telechat")
    renderer = Renderer(template, vocabs["12b"])
    with pytest.raises(ConversationError, match="no place for tools"):
        renderer.render([user("a"), bot("b")], tools=[{"name": "f"}])
    with pytest.raises(ConversationError, match="no place for tools"):
        renderer.render([user("a"), bot("b"), {"role": "tool", "content": "c"}, bot("d")])
    messages = [system("be brief"), user("a"), bot("b")]
    assert renderer.render(messages) == renderer.render(messages[1:])
    prepending = Renderer(template, vocabs["12b"], system_policy="prepend")
    assert prepending.render(messages) == renderer.render([user("be brief\na"), bot("b")])
    with pytest.raises(ConversationError, match="no place for a system prompt"):
        Renderer(template, vocabs["12b"], system_policy="error").render(messages)


@pytest.mark.parametrize("options,words", [
    ({"user_token": "<_usr>"}, "the user token '<_usr>' of the template telechat is not in the vocabulary"),
    ({"bot_token": "a"}, "the bot token 'a' of the template telechat is an ordinary piece of text in"),
    ({"system_policy": "shout"}, "system policy 'shout' is unknown"),
])
def test_wrong_markers_are_named(vocabs, options, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        Renderer(get_template("telechat"), vocabs["12b"], **options)


def test_wrong_template_is_named(vocabs):
    with pytest.raises(ConfigError, match="chat template 'llama' is unknown; known are telechat2, telechat"):
        get_template("llama")
    with pytest.raises(ConfigError, match="'<_user>' of the template telechat is not in"):
        Renderer(get_template("telechat"), vocabs["52b"])
