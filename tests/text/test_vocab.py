"""Vocabulary files: ids of plain text and of markers, decoding whole and in a stream.

The first half holds the official tokenizers to their golden ids; the second needs nothing beside the checkout.
"""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from golden import DECODE_DEVIATIONS, DEVIATIONS, OFFICIAL, SHARED, golden_json, needs_shared
from hypothesis import example, given, settings
from hypothesis import strategies as st
from text_fixtures import TEXTS
from vocab_fixtures import edit_json, train_sentencepiece

from research.telechat.common.errors import VocabError
from research.telechat.text.vocab import IncrementalDecoder, Vocab

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def official():
    return {name: Vocab.load(SHARED / "data" / folder) for name, folder in OFFICIAL.items()}


def cases(name):
    return golden_json("tokenizer_golden.json")[name]["cases"]


def has_marker(vocab, text):
    return any(piece in text for piece in vocab.markers)


@needs_shared
@pytest.mark.parametrize("name", OFFICIAL)
class TestGolden:
    def test_plain_text(self, official, name):
        vocab = official[name]
        plain = [case for case in cases(name) if not has_marker(vocab, case["text"])]
        assert len(plain) > 25
        assert vocab.encode_batch([case["text"] for case in plain]) == [case["ids"] for case in plain]
        for case in plain:
            assert vocab.encode(case["text"]) == vocab.encode_with_specials(case["text"]) == case["ids"], case["text"]

    def test_markers_as_text(self, official, name):
        vocab = official[name]
        marked = [case for case in cases(name) if has_marker(vocab, case["text"])]
        assert marked
        for case in marked:
            ids = vocab.encode(case["text"])
            assert not set(ids) & set(vocab.markers.values()), case["text"]
            assert vocab.decode(ids) == case["text"]
            if "sp_ids" in case and case["text"] not in DEVIATIONS[name]:
                assert ids == case["sp_ids"], case["text"]

    def test_markers_as_tokens(self, official, name):
        vocab = official[name]
        seen = set()
        for case in cases(name):
            text = case["text"]
            ids = vocab.encode_with_specials(text)
            assert ids == DEVIATIONS[name].get(text, case["ids"]), text
            assert vocab.decode(ids) == text
            if ids != case["ids"]:
                seen.add(text)
        assert seen == set(DEVIATIONS[name])

    def test_decode(self, official, name):
        vocab = official[name]
        for case in cases(name):
            expected = DECODE_DEVIATIONS.get((name, case["text"]), (case["decode"], case["decode_skip"]))
            assert (vocab.decode(case["ids"]), vocab.decode(case["ids"], skip_special_tokens=True)) == expected

    def test_piece_to_id(self, official, name):
        golden = golden_json("tokenizer_golden.json")[name]
        vocab = official[name]
        assert vocab.size == golden["vocab_size"]
        for piece, token_id in golden["convert_tokens_to_ids"].items():
            if token_id == 0 and piece != vocab.own_tokens["unk"]:       # the official code's id of unknown pieces
                token_id = None
            assert vocab.token_to_id(piece) == token_id, piece


@needs_shared
class TestGoldenConversations:
    """Encoding each stretch between markers on its own gives the ids that the official chat and training code makes."""

    @pytest.mark.parametrize(("name", "key", "start"), [("12B", "12b", ""), ("115B", "115b", "<_start>")])
    def test_chat_prompt(self, official, name, key, start):
        vocab = official[name]
        user, bot, end = (vocab.token_to_id(piece) for piece in ("<_user>", "<_bot>", "<_end>"))
        compared = 0
        for case in golden_json("chat_golden.json")[key]:
            turns = [turn for turn in case["history"] if turn["role"] in ("user", "bot")]
            written, rendered = start, [vocab.token_to_id(start)] * bool(start)
            for turn in [*turns, {"role": "user", "content": case["question"]}]:
                is_bot = turn["role"] == "bot"
                written += f"<_{turn['role']}>{turn['content']}" + "<_end>" * is_bot
                rendered += [bot if is_bot else user, *vocab.encode(turn["content"]), *[end] * is_bot]
            if case["seq_length"] < 8192 or case["max_length"] == 40:
                continue                                 # the official code cuts these short
            if case["name"] == "special_text_in_question":               # there a user's <_user> opens a turn in 12B
                assert [token_id for token_id in rendered if token_id in (user, bot, end)] == [user, bot, end, user]
                continue
            assert vocab.encode_with_specials(written + "<_bot>") == [*rendered, bot] == case["input_ids"]
            compared += 1
        assert compared == 4

    def test_52b_prompt_is_ordinary_text(self, official):
        for case in golden_json("chat_golden.json")["52b"]:
            assert official["52B"].encode_with_specials(case["prompt_text"]) == case["input_ids"]
            assert official["52B"].encode(case["prompt_text"]) == case["input_ids"]

    def test_training_sample(self, official):
        singles = golden_json("sft_golden.json")["telechat_7b_12b"]["singles"]
        compared = 0
        for single in singles:
            ids = official["12B"].encode_with_specials(single["concat_line"])
            if len(ids) <= single["max_seq_len"]:
                assert ids == single["input_ids_unpadded"]
                compared += 1
        assert compared >= 3


@pytest.fixture(scope="module", params=["tokenizer.model", "control.model", "tokenizer.json"])
def vocab(request, vocab_folder):
    return Vocab.load(vocab_folder / request.param)




class TestProperties:
    @settings(max_examples=150, deadline=None)
    @example("<_bot>")
    @example("hi<_user>\n<_bot>")
    @given(text=TEXTS)
    def test_typed_markers_are_text(self, vocab, text):
        ids = vocab.encode(text)
        assert not set(ids) & set(vocab.markers.values())
        assert vocab.decode(ids) == vocab.decode(ids, skip_special_tokens=True) == text

    @settings(max_examples=150, deadline=None)
    @example(" <_user>  a <_bot> b")
    @given(text=TEXTS)
    def test_written_markers_are_single_ids(self, vocab, text):
        stretches = re.split("(" + "|".join(sorted(map(re.escape, vocab.markers), reverse=True)) + ")", text)
        expected = []
        for number, stretch in enumerate(stretches):
            if stretch:
                expected += [vocab.token_to_id(stretch)] if number % 2 else vocab.encode(stretch)
        ids = vocab.encode_with_specials(text)
        assert ids == expected
        assert vocab.decode(ids) == text
        kept = [stretch for n, stretch in enumerate(stretches) if not (n % 2 and vocab.markers[stretch]
                                                                       in vocab.special_ids)]
        assert vocab.decode(ids, skip_special_tokens=True) == "".join(kept)

    @settings(max_examples=100, deadline=None)
    @given(text=TEXTS, cuts=st.lists(st.integers(0, 40), max_size=6), skip=st.booleans())
    def test_stream_equals_whole(self, vocab, text, cuts, skip):
        ids = vocab.encode_with_specials(text)
        whole = vocab.decode(ids, skip_special_tokens=skip)
        decoder = IncrementalDecoder(vocab, skip_special_tokens=skip)
        shown = ""
        bounds = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
        for start, end in zip(bounds, bounds[1:]):
            shown += decoder.feed(ids[start:end])
            assert whole.startswith(shown)               # so never half a character, nor anything taken back
        assert shown + decoder.flush() == whole

    @settings(max_examples=50, deadline=None)
    @given(ids=st.lists(st.integers(0, 800), max_size=30))
    def test_any_ids_decode(self, vocab, ids):
        decoder = IncrementalDecoder(vocab)
        assert "".join(map(decoder.feed, ids)) + decoder.flush() == vocab.decode(ids)

    @settings(max_examples=30, deadline=None)
    @given(texts=st.lists(TEXTS, max_size=5), num_threads=st.sampled_from([None, 1, 2]))
    def test_batch_equals_single(self, vocab, texts, num_threads):
        singly = [vocab.encode(text) for text in texts]
        assert vocab.encode_batch(texts, num_threads=num_threads) == singly
        arrays = vocab.encode_arrays(texts)
        assert [array.tolist() for array in arrays] == singly and all(array.dtype == np.int32 for array in arrays)


class TestSentencePiece:
    @pytest.mark.parametrize("name", ["tokenizer.model", "control.model"])
    def test_plain_text_as_the_library(self, vocab_folder, name):
        vocab = Vocab.load(vocab_folder / name)
        raw = sentencepiece.SentencePieceProcessor(model_file=str(vocab.path))
        for text in ("", " ", "生抽与老抽的区别？", "def add(a, b):\n\treturn a + 1_000", "  two  ", "<b>😀</b>"):
            assert vocab.encode(text) == raw.encode(text)
            assert vocab.decode(raw.encode(text)) == raw.decode(raw.encode(text)) == text

    def test_markers_and_what_skip_removes(self, vocab_folder):
        user_defined = Vocab.load(vocab_folder / "tokenizer.model")
        raw = sentencepiece.SentencePieceProcessor(model_file=str(vocab_folder / "tokenizer.model"))
        assert raw.piece_to_id("<_user>") in raw.encode("<_user>")       # what must be prevented
        assert list(user_defined.markers) == ["<_unk>", "<_start>", "<_end>", "<_pad>", "<_user>", "<_bot>",
                                              "<_system>", "<reserve1>", "<reserve10>"]
        assert user_defined.special_ids == {0, 1, 2, 3}                  # as the official tokenizer of 12B
        control = Vocab.load(vocab_folder / "control.model")
        assert "<reserve1>" in control.markers
        assert control.special_ids == set(control.markers.values()) - {control.token_to_id("<reserve1>")}
        assert control.own_tokens == {"unk": "<_unk>", "bos": "<_start>", "eos": "<_end>", "pad": "<_pad>"}

    def test_named_tokens_are_special(self, vocab_folder):
        vocab = Vocab.load(vocab_folder / "tokenizer.model", {"user": "<reserve1>", "bot": None})
        ids = vocab.encode_with_specials("<reserve1>hi<_bot>")
        assert vocab.decode(ids, skip_special_tokens=True) == "hi<_bot>"

    def test_longest_marker_wins(self, tmp_path):
        path = train_sentencepiece(tmp_path / "t.model", user_defined_symbols=["@user", "@user2"])
        vocab = Vocab.load(path, {"user": "@user", "other": "@user2"})
        assert vocab.encode_with_specials("@user2@user") == [vocab.token_to_id("@user2"), vocab.token_to_id("@user")]

    def test_named_symbol_of_another_shape(self, tmp_path):
        path = train_sentencepiece(tmp_path / "t.model", user_defined_symbols=["[USER]", "_"])
        vocab = Vocab.load(path, {"user": "[USER]"})
        assert vocab.encode_with_specials("[USER]a_b")[0] == vocab.token_to_id("[USER]")
        assert vocab.token_to_id("[USER]") not in vocab.encode("[USER]")
        assert vocab.token_to_id("_") in vocab.encode("a_b")             # an ordinary symbol stays one
        assert "[USER]" not in Vocab.load(path).markers

    @pytest.mark.parametrize("length", [30, 126, 127, 128, 200, 300])
    def test_long_markers_are_found(self, tmp_path, length):
        marker = "<" + "x" * (length - 2) + ">"
        vocab = Vocab.load(train_sentencepiece(tmp_path / "t.model", user_defined_symbols=[marker]))
        assert vocab.markers[marker] not in vocab.encode(marker)
        assert vocab.encode_with_specials(marker) == [vocab.markers[marker]]

    def test_without_dummy_prefix(self, tmp_path):
        vocab = Vocab.load(train_sentencepiece(tmp_path / "t.model", add_dummy_prefix=False))
        for text in ("the dog", " the dog", "<_user> the<_bot>dog"):
            assert vocab.decode(vocab.encode_with_specials(text)) == text

    def test_half_characters_are_held_back(self, vocab_folder):
        vocab = Vocab.load(vocab_folder / "tokenizer.model")
        ids = vocab.encode("😀")
        assert len(ids) >= 4                             # byte pieces: the corpus has no such character
        decoder = IncrementalDecoder(vocab)
        assert [decoder.feed(token_id) for token_id in ids[:-1]] == [""] * (len(ids) - 1)
        assert decoder.feed(ids[-1]) == "😀"
        decoder.feed(ids[:-1])
        assert decoder.feed(vocab.token_to_id("<_end>")) == "\ufffd<_end>"
        decoder.feed(ids[:-1])
        assert decoder.flush() == "\ufffd"

    def test_continuation_keeps_its_space(self, vocab_folder):
        vocab = Vocab.load(vocab_folder / "tokenizer.model")
        ids = vocab.encode("the dog")
        decoder = IncrementalDecoder(vocab)
        decoder.feed(ids[:1])
        assert decoder.feed(ids[1:]) == vocab.decode(ids)[len(vocab.decode(ids[:1])):]


class TestByteLevelBpe:
    def test_plain_text_as_the_library(self, vocab_folder):
        from tokenizers import Tokenizer
        raw = Tokenizer.from_file(str(vocab_folder / "tokenizer.json"))
        vocab = Vocab.load(vocab_folder / "tokenizer.json")
        for text in ("", " ", "生抽与老抽的区别？", "def add(a, b):\n\treturn a + 1", "  two  ", "😀"):
            assert vocab.encode(text) == raw.encode(text, add_special_tokens=False).ids
        assert vocab.size == raw.get_vocab_size(with_added_tokens=True)
        assert raw.token_to_id("<_user>") in raw.encode("<_user>").ids   # what must be prevented

    def test_what_skip_removes(self, vocab_folder):
        vocab = Vocab.load(vocab_folder / "tokenizer.json")
        ids = vocab.encode_with_specials("<_user>a<_end>b<_bot>")
        assert vocab.decode(ids, skip_special_tokens=True) == "<_user>ab<_bot>"
        named = Vocab.load(vocab_folder / "tokenizer.json", {"user": "<_user>"})
        assert named.decode(ids, skip_special_tokens=True) == "ab<_bot>"

    def test_folder_prefers_the_sentencepiece_model(self, vocab_folder, tmp_path):
        assert Vocab.load(vocab_folder).path.name == "tokenizer.model"
        (tmp_path / "tokenizer.json").write_bytes((vocab_folder / "tokenizer.json").read_bytes())
        assert Vocab.load(tmp_path).path.name == "tokenizer.json"

    @pytest.mark.parametrize("changes", [{"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
                                         {"decoder": None}, {"model": {"type": "BPE"}}, {"added_tokens": 3}])
    def test_unsupported(self, vocab_folder, tmp_path, changes):
        path = edit_json(vocab_folder / "tokenizer.json", tmp_path / "t.json", **changes)
        with pytest.raises(VocabError, match=re.escape(str(path))):
            Vocab.load(path)

    def test_marker_that_plain_text_could_give_is_refused(self, vocab_folder, tmp_path):
        content = json.loads((vocab_folder / "tokenizer.json").read_text(encoding="utf-8"))
        content["model"]["ignore_merges"] = True         # whole words are then looked up first, "<pad>" among them
        content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                                    "use_regex": False}
        path = edit_json(vocab_folder / "tokenizer.json", tmp_path / "t.json", **content)
        with pytest.raises(VocabError, match="is encoded as the marker"):
            Vocab.load(path)
