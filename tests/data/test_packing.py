"""Cutting and packing: every token is kept or counted, every answer trained once, every record of the exact length."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_fixtures import marked_ids

from research.telechat.data.packing import (
    IGNORED,
    FirstFitPacker,
    ShuffleBuffer,
    cut,
    pack_all,
    to_records,
)
from research.telechat.text.renderer import Rendered


def conversation(head, turns, separator=0):
    """A conversation whose ids are its positions, so that a piece tells where it is from. turns: (question, answer)."""
    ids, loss, starts = list(range(head)), [(head, False)], []
    for number, (question, answer) in enumerate(turns):
        if number and separator:
            loss.append((separator, False))
            ids += range(len(ids), len(ids) + separator)
        starts.append(len(ids))
        ids += range(len(ids), len(ids) + question + answer)
        loss += [(question, False), (answer, True)]
    return Rendered(ids, loss, starts, separator)


def ids_of(piece):
    return np.where(piece < 0, ~piece, piece).tolist()


def trained(piece):
    return piece[piece >= 0].tolist()


TURNS = st.lists(st.tuples(st.integers(2, 60), st.integers(1, 60)), min_size=1, max_size=8)


@given(head=st.integers(0, 40), turns=TURNS, separator=st.integers(0, 2), limit=st.integers(9, 120),
       long=st.sampled_from(["split", "truncate", "drop"]))
@settings(max_examples=300, deadline=None)
def test_cut_loses_nothing_unseen(head, turns, separator, limit, long):
    rendered = conversation(head, turns, separator)
    marked = marked_ids([rendered])[0]
    result = cut(rendered, marked, limit, long)
    assert result.kept + result.dropped == len(rendered.ids)
    assert sum(map(len, result.pieces)) == result.kept + result.repeated
    seen = {token for piece in result.pieces for token in ids_of(piece)}
    assert len(seen) == result.kept
    for piece in result.pieces:
        assert len(piece) <= limit
        assert ids_of(piece)[:head] == list(range(head))
        assert trained(piece[1:])
    answers = [token for piece in result.pieces for token in trained(piece)]
    assert len(set(answers)) == len(answers)                     # no answer token is trained twice
    if len(rendered.ids) <= limit:
        assert [piece.tolist() for piece in result.pieces] == [marked.tolist()] and result.fate == "whole"
    elif long == "drop":
        assert not result.pieces and result.fate == "longer than the length"
    elif long == "split" and result.pieces:
        assert sorted(answers) == trained(marked)                # and none is left out
        lost = set(range(len(rendered.ids))) - seen
        separators = {start - number for start in rendered.turns[1:] for number in range(1, separator + 1)}
        if all(question + 16 <= limit - head for question, _ in turns):
            assert lost <= separators
    elif long == "truncate" and result.pieces:
        assert len(result.pieces) == 1 and answers


def test_split_keeps_turns_whole_and_brings_context():
    rendered = conversation(4, [(5, 10)] * 6, separator=1)       # turns of 15 at 4, 20, 36, 52, 68, 84
    result = cut(rendered, marked_ids([rendered])[0], 4 + 2 * 16 + 15)       # room for three turns
    head = list(range(4))
    assert [ids_of(piece) for piece in result.pieces] == [
        head + list(range(4, 51)), head + list(range(36, 83)), head + list(range(52, 99))]
    assert trained(result.pieces[1]) == [*range(57, 67), *range(73, 83)]     # the turn at 36 is context, without loss
    assert trained(result.pieces[2]) == list(range(89, 99))
    assert (result.fate, result.dropped) == ("split", 0)


def test_long_answer_continues_with_context():
    rendered = conversation(2, [(6, 100)])
    result = cut(rendered, marked_ids([rendered])[0], 42)
    assert ids_of(result.pieces[0]) == list(range(42))
    assert ids_of(result.pieces[1]) == [0, 1, *range(22, 62)]
    assert trained(result.pieces[1]) == list(range(42, 62))
    assert result.dropped == 0


def test_long_question_loses_its_beginning_behind_the_marker():
    rendered = conversation(0, [(100, 10)])
    result = cut(rendered, marked_ids([rendered])[0], 40)
    assert ids_of(result.pieces[0]) == [0, *range(71, 110)]       # as much as the answer leaves free
    assert result.dropped == 70 and trained(result.pieces[0]) == list(range(100, 110))


@given(question=st.integers(20, 200), answer=st.integers(1, 60), limit=st.integers(40, 200))
@settings(max_examples=200, deadline=None)
def test_long_question_loses_only_what_does_not_fit(question, answer, limit):
    rendered = conversation(0, [(question, answer)])
    result = cut(rendered, marked_ids([rendered])[0], limit)
    too_many = question + answer - limit
    if too_many <= 0:
        assert result.dropped == 0
    elif answer <= limit // 2:                       # the answer leaves more than half of the length to the question
        assert result.dropped <= too_many
    assert sorted(token for piece in result.pieces for token in trained(piece)) == list(
        range(question, question + answer))


@given(turns=st.lists(st.tuples(st.integers(2, 40), st.integers(1, 40), st.booleans()), min_size=1, max_size=6),
       limit=st.integers(9, 120))
@settings(max_examples=200, deadline=None)
def test_answers_without_loss_are_context_only(turns, limit):
    rendered = conversation(0, [turn[:2] for turn in turns])
    loss = [run for question, answer, train in turns for run in ((question, False), (answer, train))]
    rendered = rendered._replace(loss=loss)
    marked = marked_ids([rendered])[0]
    result = cut(rendered, marked, limit)
    assert sorted(token for piece in result.pieces for token in trained(piece)) == trained(marked)
    assert all(trained(piece) for piece in result.pieces)            # no piece that trains nothing
    assert result.kept + result.dropped == len(rendered.ids)


def test_truncate_keeps_the_first_turns():
    rendered = conversation(3, [(5, 10)] * 4)
    result = cut(rendered, marked_ids([rendered])[0], 40, "truncate")
    assert ids_of(result.pieces[0]) == list(range(33))
    assert (result.fate, result.kept, result.dropped) == ("truncated", 33, 30)


def test_system_prompt_that_fills_the_length():
    rendered = conversation(95, [(5, 10)])
    result = cut(rendered, marked_ids([rendered])[0], 100)
    assert (result.pieces, result.dropped, result.fate) == ([], 110, "system prompt fills the length")


LENGTHS = st.lists(st.integers(1, 50), max_size=200)


def pieces_of(lengths):
    return [np.full(length, number, np.int32) for number, length in enumerate(lengths)]


@given(lengths=LENGTHS, window=st.integers(1, 20), most=st.integers(1, 6), buffer=st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_every_piece_is_packed_once(lengths, window, most, buffer):
    packs = list(pack_all(pieces_of(lengths), ShuffleBuffer(buffer, 1), FirstFitPacker(50, window, most, seed=1)))
    assert sorted(int(piece[0]) for pack in packs for piece in pack) == list(range(len(lengths)))
    assert all(len(pack) <= most and sum(map(len, pack)) <= 50 for pack in packs)


def test_order_depends_on_the_seed_alone():
    def order(seed, buffer=16):
        packs = pack_all(pieces_of([7] * 100), ShuffleBuffer(buffer, seed), FirstFitPacker(50, 4, seed=seed))
        return [int(piece[0]) for pack in packs for piece in pack]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert list(ShuffleBuffer(0, 1).add("x")) == ["x"]


def test_memory_is_bounded_by_tokens():
    shuffle, packer = ShuffleBuffer(1000, 1, max_tokens=300), FirstFitPacker(100, 1000, max_tokens=500)
    held = 0
    for piece in pieces_of([60] * 200):
        held += 60
        for shuffled in shuffle.add(piece):
            for pack in packer.add(shuffled):
                held -= sum(map(len, pack))
        assert held <= 300 + 500 + 5 * 100


def test_padding_is_small_and_first_fit_reuses_room():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 200, 4000).tolist()
    packs = list(pack_all(pieces_of(lengths), ShuffleBuffer(0, 0), FirstFitPacker(1000, 64)))
    assert sum(lengths) / (1000 * len(packs)) > 0.99
    assert [sorted(len(piece) for piece in pack) for pack in pack_all(
        pieces_of([6, 7, 4, 3]), ShuffleBuffer(0, 0), FirstFitPacker(10, 8))] in ([[3, 7], [4, 6]], [[4, 6], [3, 7]])


@pytest.mark.parametrize("side", ["left", "right"])
def test_record(side):
    pack = [np.array([5, 6, ~7], np.int32), np.array([~8, 9], np.int32)]
    record, = to_records([pack], 8, pad_id=3, padding_side=side, slots=5)
    ids, labels = [5, 6, 7, 8, 9], [5, 6, IGNORED, IGNORED, 9]
    if side == "right":
        ids, labels, ends = ids + [3] * 3, labels + [IGNORED] * 3, [3, 5, 7, 7, 7]
    else:
        ids, labels, ends = [3] * 3 + ids, [IGNORED] * 3 + labels, [3, 6, 7, 7, 7]       # the last id is only a label
    assert record["input_ids"].tolist() == ids
    assert record["labels"].tolist() == labels
    assert record["actual_seq_len"].tolist() == ends
    assert all(column.dtype == np.int32 for column in record.values())
    assert "actual_seq_len" not in next(to_records([pack], 8, 3, side))


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), side=st.sampled_from(["left", "right"]))
@settings(max_examples=100, deadline=None)
def test_boundaries_lie_between_the_pieces(lengths, side):
    pack = pieces_of(lengths)
    length = sum(lengths) + 5
    record, = to_records([pack], length, pad_id=99, padding_side=side, slots=len(lengths) + 1)
    ends = record["actual_seq_len"]
    assert (np.diff(ends) >= 0).all() and ends[-1] == length - 1
    documents = np.searchsorted(ends, np.arange(length - 1), side="right")
    trained_on = record["input_ids"][:-1]
    for left, right, same_ids in zip(documents, documents[1:], trained_on[:-1] == trained_on[1:]):
        assert (left == right) == same_ids
