"""Small vocabularies for tests, trained in a moment: with the marker conventions of 12B, of TeleChat2, and of 7B."""
import io
import json
from pathlib import Path
from typing import Any, Dict

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "生抽与老抽的区别？生抽颜色浅，味道鲜，用来调味；老抽颜色深，用来上色。", "你是谁？我是一个语言模型。",
    "The quick brown fox jumps over the lazy dog. It was the best of times, it was the worst of times.",
    "def add(a, b):\n    return a + b\n", "user bot end start <tag> a_b __init__ 0123456789",
    "今天天气很好，我们去公园散步吧。",
    "Write a short poem about the sea, and about the users of a robot who end the day at the start.",
] * 20
ORDINARY_SYMBOLS = [*"0123456789", "_", "\n", "\t", "__"]               # user-defined in the official models, but text
USER_MARKERS = ["<_user>", "<_bot>", "<_system>", "<reserve1>", "<reserve10>"]
CONTROL_MARKERS = ["<_user>", "<_bot>", "<_system>", "<_observation>"]


def train_sentencepiece(path: Path, control: bool = False, **options: Any) -> Path:
    """A SentencePiece model at `path`, with TeleChat's settings. Markers are user-defined symbols, as in 12B, or, with
    `control`, control symbols, as in TeleChat2."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(**{**dict(
        sentence_iterator=iter(CORPUS), model_writer=stream, model_type="bpe", vocab_size=600, byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        control_symbols=CONTROL_MARKERS if control else [],
        user_defined_symbols=ORDINARY_SYMBOLS + (["<reserve1>"] if control else USER_MARKERS),
        unk_id=0, bos_id=1, eos_id=2, pad_id=3, unk_piece="<_unk>", bos_piece="<_start>", eos_piece="<_end>",
        pad_piece="<_pad>", minloglevel=2, num_threads=1), **options})
    path.write_bytes(stream.getvalue())
    return path


def train_byte_level_bpe(path: Path) -> Path:
    """A tokenizer.json at `path` in the form of 7B: ``<_user>`` and ``<_bot>`` are added tokens behind the BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens([AddedToken(piece, single_word=True) for piece in ("<_start>", "<_end>")])
    tokenizer.add_tokens(["<_user>", "<_bot>"])
    tokenizer.save(str(path))
    return path


def train_families(folder: Path) -> Dict[str, Path]:
    """A small vocabulary file for each way of writing conversations: 7b, 12b, 52b, telechat2."""
    reserves = [f"<reserve{number}>" for number in (1, 2, 3)]
    train_sentencepiece(folder / "52b.model", user_defined_symbols=ORDINARY_SYMBOLS + reserves, unk_piece="<unk>",
                        bos_piece="<s>", eos_piece="</s>", pad_piece="<pad>")
    train_sentencepiece(folder / "12b.model")
    train_sentencepiece(folder / "telechat2.model", control=True)
    train_byte_level_bpe(folder / "7b.json")
    return {path.stem: path for path in folder.iterdir()}


def edit_json(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a JSON file with some of its top-level keys replaced."""
    target.write_text(json.dumps({**json.loads(source.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    return target
