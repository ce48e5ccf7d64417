"""The renderer of conversations by its own rules: no forged markers, loss on answers, limits, mistakes."""
import re

import pytest
from conversation_fixtures import bot, renderers, system, user
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_fixtures import marked_ids

from research.telechat.common.errors import ConfigError, ConversationError
from research.telechat.data.assembly import assemble
from research.telechat.text.renderer import Renderer, get_template

MARKERS = ["<_user>", "<_bot>", "<_end>", "<_start>", "<_system>", "<_pad>", "</s>", "<pad>", "<reserve1>"]
PIECES = st.one_of(st.sampled_from(MARKERS), st.text(max_size=8), st.sampled_from(["你好", "\n", " ", "<", "_"]))
TEXT = st.lists(PIECES, max_size=6).map("".join).map(lambda text: text.encode("utf-8", "replace").decode())
WAYS = ["7b", "12b", "12b with start", "52b in words", "52b with tokens", "telechat2"]


@st.composite
def conversations(draw, last="bot", max_turns=4):
    turns = draw(st.integers(1, max_turns))
    messages = [message for _ in range(turns) for message in (user(draw(TEXT)), bot(draw(TEXT)))]
    return messages if last == "bot" else messages[:-1]


def count_marker(renderer, ids, word):
    """How often a marker occurs in ids, be it a token or words at the beginning of a text or within one."""
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
        assert text.translate(plain) == answer.translate(plain) or merged


@pytest.mark.parametrize("way", WAYS)
@given(batch=st.lists(conversations(), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_batches_give_the_same_as_one_by_one(way, vocabs, batch):
    renderer = renderers(vocabs)[way]
    plans = [renderer.plan(messages) for messages in batch]
    encoded = iter(renderer.vocab.encode_arrays([text for plan in plans for text in plan.texts]))
    together = assemble(plans, encoded, renderer.opening)
    for number, (plan, messages) in enumerate(zip(plans, batch)):
        rendered = renderer.assemble(plan, map(renderer.vocab.encode, plan.texts))
        start, end = together.bounds[number:number + 2]
        assert together.marked[start:end].tolist() == marked_ids([rendered])[0].tolist()
        assert together.layout(number) == (rendered.turns, rendered.separator, rendered.opening)
        assert together.trained[number] == any(rendered.mask()[1:])
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
    limit += len(renderer.prompt([user("")]))
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


@pytest.mark.parametrize("name", ["12b", "telechat2"])
def test_histories_that_do_not_alternate_are_written_by_role(vocabs, name):
    """As the official chat does: a question without answer, an answer without question, several of either in a row."""
    vocab = vocabs[name]
    renderer = Renderer(get_template("telechat" if name == "12b" else "telechat2"), vocab)
    head = renderer.prompt([user("x")])
    head = head[:head.index(renderer.user_id)]
    separator = list(vocab.encode(renderer.template.separator)) if renderer.template.separator else []
    for number, roles in enumerate(["u", "uu", "buu", "ubbu", "uubu", "bbuuu", "ububu", "ubuubbu"]):
        messages = [user(f"q{place}") if role == "u" else bot(f"a{place}") for place, role in enumerate(roles)]
        expected = list(head)
        for place, role in enumerate(roles):
            text = vocab.encode(f"{'q' if role == 'u' else 'a'}{place}")
            expected += [renderer.user_id, *text] if role == "u" else [
                renderer.bot_id, *text, renderer.end_id, *separator]
        assert renderer.prompt(messages) == [*expected, renderer.bot_id], roles
        if "uu" in roles or roles.startswith("b"):
            with pytest.raises(ConversationError, match=r"expected (user|bot)"):
                renderer.render([*messages, bot("end")])
        short = renderer.fit_prompt(messages, limit=len(expected))
        assert len(short.ids) <= len(expected) and short.dropped_turns + short.cut_tokens > 0, number


def test_a_system_prompt_before_an_answer_goes_to_the_first_question(vocabs):
    renderer = Renderer(get_template("telechat"), vocabs["12b"], system_policy="prepend")
    assert renderer.prompt([system("s"), bot("a"), user("q")]) == renderer.prompt([bot("a"), user("s\nq")])


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
    with pytest.raises(ConversationError, match="does not support tools"):
        renderer.render([user("a"), bot("b")], tools=[{"name": "f"}])
    with pytest.raises(ConversationError, match="does not support tools"):
        renderer.render([user("a"), bot("b"), {"role": "tool", "content": "c"}, bot("d")])
    messages = [system("be brief"), user("a"), bot("b")]
    assert renderer.render(messages) == renderer.render(messages[1:])
    prepending = Renderer(template, vocabs["12b"], system_policy="prepend")
    assert prepending.render(messages) == renderer.render([user("be brief\na"), bot("b")])
    with pytest.raises(ConversationError, match="has no system prompt"):
        Renderer(template, vocabs["12b"], system_policy="error").render(messages)


@pytest.mark.parametrize("options,words", [
    ({"user_token": "<_usr>"}, "the user token '<_usr>' of the template telechat is not in the vocabulary"),
    ({"bot_token": "a"}, "the bot token 'a' of the template telechat is an ordinary piece of text in"),
    ({"system_policy": "shout"}, "unknown system policy 'shout'"),
])
def test_wrong_markers_are_named(vocabs, options, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        Renderer(get_template("telechat"), vocabs["12b"], **options)


def test_wrong_template_is_named(vocabs):
    with pytest.raises(ConfigError, match="chat template 'llama' is unknown; expected one of telechat2_start"):
        get_template("llama")
    with pytest.raises(ConfigError, match="'<_user>' of the template telechat is not in"):
        Renderer(get_template("telechat"), vocabs["52b"])
