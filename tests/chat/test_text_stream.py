"""What a model writes as text: reasoning apart, tool calls as tokens, the same however it is divided."""
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocab_fixtures import train_sentencepiece

from research.telechat.chat.session import Session, parse_tool_calls
from research.telechat.chat.stream import Piece, ThinkFilter
from research.telechat.evaluation.answers import Answer
from research.telechat.text.renderer import Renderer, get_template
from research.telechat.text.vocab import Vocab

USER = [{"role": "user", "content": "1+1?"}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    """A small vocabulary of TeleChat2 whose tool markers are tokens."""
    path = train_sentencepiece(tmp_path_factory.mktemp("vocab") / "tokenizer.model", control=True)
    bare = Vocab.load(path)
    spare = [token_id for piece, token_id in bare.markers.items() if "reserve" in piece or "observation" in piece]
    return Vocab.load(path, names=dict(zip(spare, ("<tool_call>", "</tool_call>"))))


def says(renderer, text, **limits):
    vocab = renderer.vocab
    line = vocab.encode("\n") if renderer.thinks else []            # what it says continues the line that opens

    def next_tokens(ids, given):
        yield from [*vocab.encode_with_specials("\n" * bool(line) + text)[len(line):], renderer.end_id]
    return Session(renderer, next_tokens, 400, **limits)


def joined(pieces, reasoning):
    return "".join(piece.text for piece in pieces if piece.reasoning == reasoning)


@settings(max_examples=100, deadline=None)
@given(reasoning=st.text("ab<\n/", max_size=12), answer=st.text("ab<>\n", max_size=12), size=st.integers(1, 6))
def test_reasoning_is_told_apart_however_the_text_is_cut(reasoning, answer, size):
    text = f"{reasoning}\n</think>\n\n{answer}"
    thoughts = ThinkFilter(True)
    pieces = [piece for at in range(0, len(text), size) for piece in thoughts.feed(text[at:at + size])]
    assert joined(pieces, True) == reasoning.strip("\n") and joined(pieces, False) == answer.lstrip("\n")
    assert thoughts.flush() == [] and all(piece.text for piece in pieces)
    unfinished = ThinkFilter(True)
    pieces = unfinished.feed(reasoning + "</thin") + unfinished.flush()
    assert joined(pieces, True) == (reasoning + "</thin").strip("\n") and not joined(pieces, False)
    plain = ThinkFilter(False)
    assert joined(plain.feed(text) + plain.flush(), False) == text


def test_session_that_thinks(vocab):
    renderer = Renderer(get_template("telechat2_think"), vocab)
    session = says(renderer, "one and one\n</think>\n\nThe answer: 2", stop=["one", "!"])
    pieces = list(session.pieces(USER))
    assert joined(pieces, True) == "one and one" and joined(pieces, False) == "The answer: 2"
    assert session.report.reasoning == "one and one" and "reasoning" not in session.report.as_dict()
    assert "".join(says(renderer, "a\n</think>\n\nb! c", stop=["!"]).answer(USER)) == "b"
    assert list(says(renderer, "endless").pieces(USER))[-1].reasoning
    plain = says(Renderer(get_template("telechat2"), vocab), "a</think>b")
    assert next(iter(plain.pieces(USER))) == Piece("a") and "".join(plain.answer(USER)) == "a</think>b"


def test_calls_are_read_from_tokens_and_text(vocab):
    renderer = Renderer(get_template("telechat2"), vocab)
    tokens, words = vocab.encode_with_specials(f"ok{CALL}"), vocab.encode(f"ok{CALL}")
    assert tokens != words and vocab.markers["<tool_call>"] in tokens
    for ids in (tokens, [*tokens, renderer.end_id], words):
        parsed = parse_tool_calls(ids, vocab)
        assert parsed.calls == [{"name": "add", "arguments": {"a": 1}}] and parsed.text == "ok" and not parsed.faults
    answer = "".join(says(renderer, f"ok{CALL}").answer(USER))
    assert answer == f"ok{CALL}"                              # the tokens are part of the answer's text
    again = renderer.prompt([*USER, {"role": "bot", "content": answer}, *USER])
    assert [token for token in tokens if token in again] and vocab.markers["<tool_call>"] in again


def test_answers_of_an_evaluation_are_without_reasoning(vocab):
    renderer = Renderer(get_template("telechat2_think"), vocab)
    prompt = renderer.prompt(USER)
    answer = Answer(vocab, prompt, {renderer.end_id}, ["\n\n"], renderer.kept_ids, thinking=True)
    for token in [*vocab.encode("so\n\nso\n</think>\n\n42"), renderer.end_id]:
        assert not answer.stopped
        answer.add(token)
    answer.close()
    assert answer.text == "42"
