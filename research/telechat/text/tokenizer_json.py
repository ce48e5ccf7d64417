"""tokenizer.json of Hugging Face tokenizers for a TeleChat vocabulary, and the proof that it gives the same ids.

Written by hand from the vocabulary file, because the usual ways are wrong: LlamaTokenizerFast leaves out the dummy
prefix behind a marker, and the pre-tokenizer Metaspace leaves it out where a text begins with a blank.

- A SentencePiece BPE model merges the pair with the best score; here a merge has the rank of its piece, and of several
  ways to one piece the one with the longer left side comes first. A unigram model has the same form in both.
- The dummy prefix is a normaliser, `Prepend`, which works on each stretch of text between two markers.
- User-defined symbols that are text (digits, line ends) never merge: a pre-tokenizer isolates them.
- Markers are added tokens, found anywhere, as `Vocab.encode_with_specials` does. Every tokenizer of Hugging
  Face takes a marker that a user types for the marker; this project's own chat and server do not.

`differences` compares ids, text by text (`probe_texts`), before a folder with such a file is complete.
"""
import json
import random
import re
import struct
from typing import Dict, Iterable, List, NamedTuple, Tuple

from research.telechat.common.errors import VocabError
from research.telechat.common.files import JsonObject
from research.telechat.common.protobuf import fields
from research.telechat.text.vocab import Vocab

_NORMAL, _USER_DEFINED, _BYTE = 1, 4, 6                  # values of ModelProto.SentencePiece.Type
_UNIGRAM, _BPE = 1, 2                                    # of TrainerSpec.ModelType
_NEVER = -1e6                                            # score of a piece that no text may become
_SPACE = "\u2581"                                        # SentencePiece writes a space as this character


class Piece(NamedTuple):
    """An entry of a SentencePiece model."""

    text: str
    score: float
    kind: int


def tokenizer_json(vocab: Vocab) -> JsonObject:
    """The content of tokenizer.json for `vocab`. Raises VocabError where the format has no words for the model."""
    data = vocab.path.read_bytes()
    return _byte_level(vocab, data) if data.lstrip()[:1] == b"{" else _sentencepiece(vocab, data)


def differences(content: JsonObject, vocab: Vocab, texts: Iterable[str]) -> List[str]:
    """The texts whose ids by the library tokenizers and `content` are not those of `Vocab.encode_with_specials`."""
    import tokenizers
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    return [text for text in texts
            if tokenizer.encode(text, add_special_tokens=False).ids != vocab.encode_with_specials(text)]


_TEXTS = (
    "", " ", "  ", "\n", "\t", "▁", "\u3000", "a", "好", "你是谁？", " leading blank", "trailing blank ", "\nline",
    "line\n", "生抽与老抽的区别？生抽颜色浅，味道鲜，用来调味；老抽颜色深，用来上色。",
    "The quick brown fox jumps over the lazy dog.",
    "中文 and English 混排，2024年11月25日 12:30:45，价格￥3.14",
    "def add(a, b):\n\treturn a + b  # __init__ _x __y__\n",
    "if (x<10 && y>=3) { printf(\"%5.2f\\n\", x*1e-5); }", "https://www.example.com/a_b?c=1&d=%E4%BD%A0#top",
    "3.1415926535897932384626433832795", "1,234,567.89", "😀😃👨‍👩‍👧‍👦🇨🇳🏳️‍🌈👍🏽", "é è ü ñ ç ß ø",
    "e\u0301 a\u0308", "Привет, мир", "こんにちは世界", "안녕하세요", "مرحبا بالعالم", "שלום", "नमस्ते", "ก็",
    "\u200b‍\ufeff\u00a0", "𠮷𩸽龘靐齉爩", "①②③ⅣⅤ½㎏", "\r\n\r\n", "\u0000\u0001\u007f", "a▁b", "｜▁｜", "<", "<_",
    "<_user", "< _user>", "<_user >", "&lt;", "{\"name\": \"get_weather\", \"arguments\": {\"city\": \"北京\"}}",
    "| a | b |\n|---|---|\n| 1 | 2 |\n", "$\\frac{1}{2}$", "哈哈哈哈哈哈", "AAAAAAAAAAAA", "______", "..........",
    "----------", "==========", "\u3000\u3000首行缩进两格。",
)
_REPEATED = (" ", "\n", "\t", "_", "a", "的", "0", "-", "=", ".", " \n", "\n\n ", "哈", "\u3000", "😀")


def probe_texts(vocab: Vocab, mixtures: int = 400) -> List[str]:
    """About 900 texts: real ones, runs of one to forty of the same, markers in and next to words, and `mixtures` of
    the vocabulary's own pieces. Always the same ones for a vocabulary."""
    texts = list(_TEXTS)
    texts += [unit * length for unit in _REPEATED for length in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 31, 40)]
    texts += [f"x{blanks}y{blanks}" for blanks in (" " * length for length in range(1, 20))]
    markers = list(vocab.markers)
    for marker in markers[:40]:
        texts += [marker, f"{marker}word", f"word{marker}", f"{marker} word {marker}\n{marker}", f"字{marker}字"]
    generator = random.Random(0)
    pieces = [piece for piece, token_id in vocab.pieces().items()
              if token_id not in vocab.markers.values() and not re.fullmatch(r"<0x[0-9A-F]{2}>", piece)]
    chosen = map(vocab.token_to_id, generator.choices(pieces, k=4 * mixtures))
    literal = [vocab.decode([token_id]) for token_id in chosen if token_id is not None]
    between = [" ", "  ", "\n", "0", "_", *markers[:3]]
    for _ in range(mixtures):
        texts.append("".join(generator.choice(literal if generator.random() < 0.93 else between)
                             for _ in range(generator.randint(2, 24))))
    return texts


def _added_tokens(vocab: Vocab) -> List[JsonObject]:
    return [{"id": token_id, "content": piece, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": token_id in vocab.special_ids}
            for piece, token_id in sorted(vocab.markers.items(), key=lambda item: item[1])]


def _byte_level(vocab: Vocab, data: bytes) -> JsonObject:
    """The file itself, its markers found anywhere, and nothing added in front of a text."""
    content: JsonObject = json.loads(data)
    markers = {token["content"]: token for token in _added_tokens(vocab)}
    content["added_tokens"] = [markers.get(token["content"], token) for token in content["added_tokens"]]
    return {**content, "truncation": None, "padding": None, "post_processor": None}


def _sentencepiece(vocab: Vocab, data: bytes) -> JsonObject:
    pieces, settings = _read_model(vocab, data)
    names = {token_id: piece.text for token_id, piece in enumerate(pieces)}
    names.update({token_id: marker for marker, token_id in vocab.markers.items()})
    markers = set(vocab.markers.values())
    symbols = sorted({piece.text for token_id, piece in enumerate(pieces)
                      if piece.kind == _USER_DEFINED and token_id not in markers}, key=lambda text: (-len(text), text))
    pre = {"type": "Split", "pattern": {"Regex": "|".join(map(_escaped, symbols))}, "behavior": "Isolated",
           "invert": False}
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if settings["dummy_prefix"] else []
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": _added_tokens(vocab),
        "normalizer": {"type": "Sequence", "normalizers": [
            *prefix, {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]},
        "pre_tokenizer": pre if symbols and not settings["unigram"] else None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else [])]},
        "model": _unigram(vocab, pieces, names) if settings["unigram"] else _bpe(vocab, pieces, names),
    }


def _bpe(vocab: Vocab, pieces: List[Piece], names: Dict[int, str]) -> JsonObject:
    return {"type": "BPE", "dropout": None, "unk_token": vocab.own_tokens.get("unk"),
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": any(piece.kind == _BYTE for piece in pieces),
            "vocab": {name: token_id for token_id, name in sorted(names.items())},
            "merges": [f"{left} {right}" for left, right in _merges(pieces, vocab.markers.values())]}


def _unigram(vocab: Vocab, pieces: List[Piece], names: Dict[int, str]) -> JsonObject:
    """User-defined symbols have the score that the search of SentencePiece gives them, better than any other."""
    best = max(piece.score for piece in pieces if piece.kind == _NORMAL)
    markers = set(vocab.markers.values())
    scores = [_NEVER if token_id in markers or piece.kind not in (_NORMAL, _USER_DEFINED) else
              piece.score if piece.kind == _NORMAL else len(piece.text.encode()) * best - 0.1
              for token_id, piece in enumerate(pieces)]
    unknown = vocab.own_tokens.get("unk")
    return {"type": "Unigram", "unk_id": None if unknown is None else vocab.token_to_id(unknown),
            "byte_fallback": any(piece.kind == _BYTE for piece in pieces),
            "vocab": [[names[token_id], score] for token_id, score in enumerate(scores)]}


def _escaped(text: str) -> str:
    """A literal text in the regular expressions of the library tokenizers."""
    return "".join({"\n": r"\n", "\t": r"\t", "\r": r"\r"}.get(char, re.escape(char)) for char in text)


def _merges(pieces: List[Piece], markers: Iterable[int]) -> List[Tuple[str, str]]:
    """The pairs that become a piece, the best first."""
    left_out = set(markers)
    scores = {piece.text: (piece.kind == _USER_DEFINED, piece.score) for token_id, piece in enumerate(pieces)
              if piece.kind in (_NORMAL, _USER_DEFINED) and token_id not in left_out}
    symbols = {text for text, (symbol, _) in scores.items() if symbol}
    ranked = []
    for text, rank in scores.items():
        for cut in range(len(text) - 1, 0, -1):
            left, right = text[:cut], text[cut:]
            # user-defined symbols merge with nothing, unless within a longer one
            if left in scores and right in scores and (text in symbols or not {left, right} & symbols):
                ranked.append((rank, len(left), left, right))
    ranked.sort(key=lambda merge: (-merge[0][0], -merge[0][1], -merge[1]))
    return [(left, right) for _, _, left, right in ranked]


def _read_model(vocab: Vocab, data: bytes) -> Tuple[List[Piece], Dict[str, bool]]:
    """The pieces of a SentencePiece model, and what its normaliser does; VocabError where that cannot be written."""
    pieces: List[Piece] = []
    faults: List[str] = []
    settings = {"dummy_prefix": True, "unigram": False}
    blanks = True                                        # remove_extra_whitespaces: the format's default
    for field, _, begin, end in fields(data, 0, len(data)):
        if field == 1 and data[begin] == 0x0A and begin + data[begin + 1] + 7 == end:      # text and score, no more
            pieces.append(Piece(data[begin + 2:end - 5].decode(), struct.unpack("<f", data[end - 4:end])[0], _NORMAL))
            continue
        parts = {number: (a, b) for number, _, a, b in fields(data, begin, end)} if field <= 3 else {}
        if field == 1:
            score = struct.unpack("<f", data[parts[2][0]:parts[2][0] + 4])[0] if 2 in parts else 0.0
            pieces.append(Piece(data[slice(*parts[1])].decode(), score, data[parts[3][0]] if 3 in parts else _NORMAL))
        elif field == 2:
            kind = data[parts[3][0]] if 3 in parts else _UNIGRAM
            settings["unigram"] = kind == _UNIGRAM
            if kind not in (_UNIGRAM, _BPE):
                faults.append("it is neither a BPE nor a unigram model")
        elif field == 3:
            settings["dummy_prefix"] = bool(data[parts[3][0]]) if 3 in parts else True
            blanks = bool(data[parts[4][0]]) if 4 in parts else True
            if 2 in parts and parts[2][0] != parts[2][1]:
                faults.append("it normalises characters")
    if blanks:
        faults.append("it removes blanks")
    if faults:
        raise VocabError(f"vocabulary {vocab.path} cannot be written as tokenizer.json: {' and '.join(faults)}; pass "
                         "the model's official folder with --copy_from")
    return pieces, settings
