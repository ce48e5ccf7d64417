"""The MindFormers tokenizers: YAML, batches and padding, special tokens, saving. What ids a text has: test_vocab.py."""
import copy
import json
import pickle
import re
import shutil

import numpy as np
import pytest
from golden import DECODE_DEVIATIONS, DEVIATIONS, OFFICIAL, SHARED, golden_json, needs_shared
from hypothesis import given, settings
from text_fixtures import TEXTS

ms = pytest.importorskip("mindspore")
from mindformers.models.build_tokenizer import build_tokenizer
from mindformers.tools.register import MindFormerConfig

from research.telechat.common.errors import VocabError
from research.telechat.telechat_tokenizer import TelechatTokenizer
from research.telechat.telechat_tokenizer_fast import TelechatTokenizerFast
from research.telechat.text.vocab import Vocab

# The special tokens as earlier TeleChat recipes name them; the 12B model has no piece <unk>.
YAML_TOKENS = {"12B": dict(unk_token="<unk>", bos_token="<_start>", eos_token="<_end>", pad_token="<_pad>"),
               "52B": dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"),
               "115B": dict(unk_token="<_end>", bos_token="<_start>", eos_token="<_end>", pad_token="<_pad>",
                            additional_special_tokens=["<_user>", "<_bot>", "<_system>", "<_observation>"])}


# What TeleChat2-7B's own tokenizer makes of a chat's first question, 你好.
TELECHAT2_NI_HAO = [6, 3921, 12966, 16716, 40721, 62816, 123959, 126161, 113621, 126181, 50751, 25372, 126161, 7515,
                    126511, 126217, 16716, 14180, 19326, 29074, 16716, 14180, 14617, 126652, 50751, 8993, 126650, 6145,
                    86750, 29791, 126169, 29, 4, 96343, 5]


@pytest.fixture(scope="module")
def tokenizer(vocab_folder):
    return TelechatTokenizer(str(vocab_folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def fast(vocab_folder):
    return TelechatTokenizerFast(str(vocab_folder / "tokenizer.json"))


@pytest.fixture(params=["tokenizer", "fast"])
def either(request):
    return request.getfixturevalue(request.param)


@needs_shared
@pytest.mark.parametrize("name", OFFICIAL)
class TestGolden:
    @pytest.fixture
    def official(self, name):
        return TelechatTokenizer(str(SHARED / "data" / OFFICIAL[name] / "tokenizer.model"), **YAML_TOKENS[name])

    def test_every_case(self, official, name):
        golden = golden_json("tokenizer_golden.json")[name]
        for case in golden["cases"]:
            text, ids = case["text"], case["ids"]
            assert official(text)["input_ids"] == DEVIATIONS[name].get(text, ids), text
            assert official.decode(official.encode(text)) == text
            expected = DECODE_DEVIATIONS.get((name, text), (case["decode"], case["decode_skip"]))
            assert (official.decode(ids), official.decode(ids, skip_special_tokens=True)) == expected
        assert len(official) == official.vocab_size == golden["len"]
        for piece, token_id in golden["convert_tokens_to_ids"].items():
            assert official.convert_tokens_to_ids(piece) == token_id, piece
        for role in ("bos", "eos", "pad"):
            assert [getattr(official, f"{role}_token"), getattr(official, f"{role}_token_id")] == golden[role]

    def test_left_padding(self, official, name):
        golden = golden_json("tokenizer_golden.json")[name]["left_pad_batch"]
        official.padding_side = "left"
        batch = official(golden["texts"], padding=True)
        texts = [DEVIATIONS[name].get(text) for text in golden["texts"]]
        longest = len(golden["input_ids"][0])
        expected = [[3] * (longest - len(own)) + own if own else row
                    for own, row in zip(texts, golden["input_ids"])]
        assert batch["input_ids"] == expected
        assert batch["attention_mask"] == [[int(token_id != 3) for token_id in row] for row in expected]

    def test_official_folder(self, official, name):
        """The official tokenizer_config.json, with <_end> as unk_token and single_word markers, does no harm."""
        loaded = TelechatTokenizer.from_pretrained(str(SHARED / "data" / OFFICIAL[name]))
        for text in ("a<_end>b", "<_user>你好<_bot>", "</s>text</s>"):
            assert loaded.encode(text) == official.encode(text)
        assert loaded.convert_tokens_to_ids("<_no_such_piece>") == 0


class TestEncoding:
    @settings(max_examples=60, deadline=None)
    @given(text=TEXTS)
    def test_round_trip(self, tokenizer, fast, text):
        for one in (tokenizer, fast):
            assert one.encode(text) == one.vocab.encode_with_specials(text)
            assert one.decode(one.encode(text)) == text
            assert one.convert_tokens_to_string(one.tokenize(text)) == text
            assert one.convert_tokens_to_ids(one.tokenize(text)) == one.encode(text)
            plain = one(text, split_special_tokens=True)["input_ids"]
            assert plain == one.vocab.encode(text)
            assert one.decode(plain, skip_special_tokens=True) == text

    def test_markers_are_single_ids(self, either):
        user, bot, end = either.convert_tokens_to_ids(["<_user>", "<_bot>", "<_end>"])
        assert len({user, bot, end, either.unk_token_id}) == 4
        ids = either("<_user>a<_bot>b<_end>")["input_ids"]
        assert ids == [user, *either.encode("a"), bot, *either.encode("b"), end]
        assert either.convert_ids_to_tokens(ids)[0] == "<_user>"
        assert either.decode(ids, skip_special_tokens=True) == "<_user>a<_bot>b"
        assert either.decode(np.array(ids)) == either.decode(ms.Tensor(ids)) == "<_user>a<_bot>b<_end>"
        assert either.decode(end) == "<_end>"

    def test_decoding_changes_no_spaces(self, either):
        text = "it was , a dog . do n't  <_end> !"
        assert either.decode(either.encode(text)) == text
        assert either.batch_decode([either.encode(text)] * 2) == [text] * 2

    def test_ids_beyond_the_vocabulary(self, either):
        assert either.decode([len(either) + 5]) == "\ufffd"
        with pytest.raises(IndexError):
            either.convert_ids_to_tokens([len(either) + 5])

    def test_bos_and_eos(self, vocab_folder):
        one = TelechatTokenizer(str(vocab_folder / "tokenizer.model"), add_bos_token=True, add_eos_token=True)
        plain = one.vocab.encode("dog")
        assert one("dog")["input_ids"] == [1, *plain, 2]
        assert one("dog", add_special_tokens=False)["input_ids"] == plain
        assert one.get_special_tokens_mask(plain) == [1, *[0] * len(plain), 1]
        assert one.num_special_tokens_to_add() == 2
        assert one("the lazy dog", max_length=3, truncation=True)["input_ids"] == [1, one.encode("the lazy dog")[1], 2]


BATCH = ["the lazy dog jumps", "生抽", "<_user>"]


class TestBatches:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize(("kind", "array"), [("np", np.ndarray), ("ms", ms.Tensor)])
    def test_padding(self, either, side, kind, array):
        one = copy.copy(either)
        one.padding_side = side
        batch = one(BATCH, padding="max_length", max_length=32, return_tensors=kind)
        assert set(batch) == {"input_ids", "attention_mask"}
        assert isinstance(batch["input_ids"], array)
        ids, mask = (np.asarray(batch[key]) for key in ("input_ids", "attention_mask"))
        assert ids.shape == mask.shape == (3, 32)
        for row, kept, text in zip(ids, mask, BATCH):
            own = one.encode(text)
            assert row[kept == 1].tolist() == own
            assert (row[kept == 0] == one.pad_token_id).all()
            assert kept[0 if side == "right" else -1] == 1
            assert kept.sum() == len(own)

    def test_truncation(self, either):
        ids = either.encode(BATCH[0])
        assert either(BATCH[0], truncation=True, max_length=2)["input_ids"] == ids[:2]

    def test_copies(self, either):
        for one in (pickle.loads(pickle.dumps(either)), copy.deepcopy(either)):
            assert one(BATCH, padding=True) == either(BATCH, padding=True)


class TestYaml:
    def test_sentencepiece(self, vocab_folder):
        config = MindFormerConfig(type="TelechatTokenizer", vocab_file=str(vocab_folder / "tokenizer.model"),
                                  padding_side="left", **YAML_TOKENS["12B"])
        one = build_tokenizer(config)
        assert type(one) is TelechatTokenizer
        assert one.padding_side == "left"
        # <unk> is no piece of this model: no id beyond the embeddings is made up for it
        assert (one.unk_token, one.unk_token_id) == ("<_unk>", 0)
        assert (one.bos_token_id, one.eos_token_id, one.pad_token_id) == (1, 2, 3)
        assert len(one) == Vocab.load(vocab_folder / "tokenizer.model").size
        assert max(one.get_vocab().values()) == len(one) - 1 == len(one.get_vocab()) - 1

    def test_unknown_pieces_do_not_end_the_text(self, vocab_folder):
        """The official configs name <_end> as the unknown token."""
        one = TelechatTokenizer(str(vocab_folder / "tokenizer.model"), unk_token="<_end>")
        assert one.unk_token_id == 2
        assert one.convert_tokens_to_ids(["<_no_such_piece>", "<_end>"]) == [0, 2]

    @pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file"])
    def test_fast(self, vocab_folder, key):
        file = str(vocab_folder / "tokenizer.json")
        one = build_tokenizer(MindFormerConfig(type="TelechatTokenizerFast", **{key: file}))
        assert type(one) is TelechatTokenizerFast
        assert (one.unk_token, one.bos_token, one.eos_token, one.pad_token) == ("<unk>", "<_start>", "<_end>", "<pad>")
        assert one.pad_token_id == 3

    def test_control_symbols_are_special(self, vocab_folder):
        one = TelechatTokenizer(str(vocab_folder / "control.model"))
        assert one.decode(one.encode("<_user>a<_observation>b<reserve1>"), skip_special_tokens=True) == "ab<reserve1>"
        assert one.additional_special_tokens == ["<_user>", "<_bot>", "<_system>", "<_observation>"]

    def test_named_markers_are_special(self, vocab_folder):
        one = TelechatTokenizer(str(vocab_folder / "tokenizer.model"), additional_special_tokens=["<_user>", "<_bot>"])
        assert one.decode(one.encode("<_user>a<_bot>b<_system>"), skip_special_tokens=True) == "ab<_system>"
        assert one.add_special_tokens({"additional_special_tokens": ["<_system>"]}) == 0
        assert one.decode(one.encode("a<_system>"), skip_special_tokens=True) == "a"

    @pytest.mark.parametrize(("options", "message"), [
        (dict(vocab_file="nowhere.model"), "not found: nowhere.model"), (dict(vocab_file=""), "vocab_file is not set"),
        (dict(eos_token="</s>"), r"the eos token '</s>' is not in it"),
        (dict(pad_token="_"), "the pad token '_' is an ordinary piece"),
        (dict(additional_special_tokens=["<_usr>"]), "'<_usr>' is not in it")])
    def test_errors(self, vocab_folder, options, message):
        config = MindFormerConfig(**{"type": "TelechatTokenizer", "vocab_file": str(vocab_folder / "tokenizer.model"),
                                     **options})
        with pytest.raises(VocabError, match=message) as caught:
            build_tokenizer(config)
        assert "\n" not in str(caught.value)

    def test_no_file_for_fast(self):
        with pytest.raises(VocabError, match="tokenizer_file is not set"):
            TelechatTokenizerFast()

    def test_no_ids_are_made_up(self, either):
        with pytest.raises(VocabError, match=re.escape("'<new>' is not in")):
            either.add_tokens(["<new>"])
        assert either.convert_tokens_to_ids("<new>") == either.unk_token_id
        assert either.get_added_vocab().keys() <= set(either.vocab.markers)


class TestChatTemplate:
    def test_prompt_of_the_generator(self, tokenizer):
        user, bot, end = tokenizer.convert_tokens_to_ids(["<_user>", "<_bot>", "<_end>"])
        history = [{"role": "user", "content": "a<_end>"}, {"role": "assistant", "content": "b"},
                   {"role": "user", "content": "dog"}]
        first, answer, question = (tokenizer.vocab.encode(turn["content"]) for turn in history)
        expected = [user, *first, bot, *answer, end, user, *question, bot]
        assert tokenizer.apply_chat_template(history, add_generation_prompt=True) == expected
        assert tokenizer.apply_chat_template(history[:2]) == [user, *first, bot, *answer, end]
        assert tokenizer.apply_chat_template(history[2:], tokenize=False, add_generation_prompt=True) == (
            "<_user>dog<_bot>")
        array = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_tensors="np")
        assert array.tolist() == expected                 # MindFormers gives one text no batch axis
        short = tokenizer.apply_chat_template(history, add_generation_prompt=True, truncation=True,
                                              max_length=len(question) + 2)
        assert short == [user, *question, bot]

    def test_jinja_template(self, tokenizer):
        jinja = "{% for m in messages %}<_user>{{ m['content'] }}{% endfor %}<_bot>"
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "dog"}], chat_template=jinja)
        assert ids == tokenizer.encode("<_user>dog<_bot>")


class TestSaving:
    def test_save_and_load(self, either, tmp_path):
        either.save_pretrained(str(tmp_path))
        vocabulary = next(path for path in tmp_path.iterdir() if path.name.startswith("tokenizer."))
        assert vocabulary.read_bytes() == either.vocab.path.read_bytes()
        assert not list(tmp_path.glob("*.part"))
        assert str(either.vocab.path.parent) not in (tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")
        again = type(either).from_pretrained(str(tmp_path))
        assert again.vocab.path == vocabulary
        assert again.special_tokens_map == either.special_tokens_map
        text = "<_user>it was , a dog .<_bot>生抽<_end>"
        assert again.encode(text) == either.encode(text)
        assert again.decode(again.encode(text), skip_special_tokens=True) == "<_user>it was , a dog .<_bot>生抽"

    def test_load_from_the_vocabulary_alone(self, either, tmp_path):
        shutil.copy(either.vocab.path, tmp_path)
        again = type(either).from_pretrained(str(tmp_path))
        assert again.special_tokens_map == either.special_tokens_map

    def test_save_over_itself(self, vocab_folder, tmp_path):
        path = tmp_path / "tokenizer.model"
        shutil.copy(vocab_folder / "tokenizer.model", path)
        assert TelechatTokenizer(str(path)).save_vocabulary(str(tmp_path)) == (str(path),)
        assert path.read_bytes() == (vocab_folder / "tokenizer.model").read_bytes()

    def test_folder_that_cannot_be_written(self, tokenizer, tmp_path):
        with pytest.raises(VocabError, match="cannot be copied"):
            tokenizer.save_vocabulary(str(tmp_path / "nowhere"))

    def test_saved_ids_must_fit(self, vocab_folder):
        saved = {9: {"content": "<_end>"}}
        with pytest.raises(VocabError, match="do not belong together"):
            TelechatTokenizer(str(vocab_folder / "tokenizer.model"), added_tokens_decoder=saved)


@needs_shared
def test_official_tokenizer_config_of_telechat2(tmp_path):
    """tokenizer_config.json of 3B and 7B gives pieces of the vocabulary other names: the markers of tools."""
    shutil.copy(SHARED / "data/telechat2-115b/tokenizer.model", tmp_path)
    settings_of_7b = json.loads((SHARED / "data/telechat2-7b/tokenizer_config.partial.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_of_7b))
    settings_of_7b.pop("tokenizer_class")
    for tokenizer in (TelechatTokenizer(str(tmp_path)), TelechatTokenizer(str(tmp_path), **settings_of_7b)):
        assert tokenizer("<tool_call>")["input_ids"] == [9]
        assert tokenizer.convert_tokens_to_ids("</tool_response>") == 12
        assert tokenizer.decode([11, 12]) == "<tool_response></tool_response>"
        assert tokenizer.decode([9, 710], skip_special_tokens=True) == "<"
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], add_generation_prompt=True)
        assert list(ids) == TELECHAT2_NI_HAO
        tokenizer.template_name = "telechat2_think"           # a member of the same vocabulary
        text = tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], add_generation_prompt=True,
                                             tokenize=False)
        assert text.endswith("<_bot><think>\n")
    again = pickle.loads(pickle.dumps(tokenizer.vocab))
    assert again.markers["<tool_call>"] == 9
