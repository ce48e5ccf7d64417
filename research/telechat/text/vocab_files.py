"""The two kinds of vocabulary files, with their markers switched off in plain text. Not a public interface.

`SentencePieceFile` (``tokenizer.model``) and `ByteLevelBpeFile` (``tokenizer.json``) have the same attributes and
methods, of which `research.telechat.text.vocab.Vocab` is made: `size`, `markers` (piece to id), `special_ids`,
`own_tokens` (role to piece), `dummy_prefix` (whether a leading space of each stretch of text is the encoder's own),
`encode`, `encode_batch`, `encode_arrays`, `token_to_id`, `id_to_token`, `pieces` (piece to id), and `token_bytes` (the
UTF-8 bytes that each id stands for).
"""
import json
import re
from pathlib import Path
from typing import Dict, Iterable, List, Mapping, Optional, Tuple

import numpy as np

from research.telechat.common.errors import VocabError
from research.telechat.common.protobuf import fields

MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
_MARKER_SHAPE = re.compile(r"<[^<>\s]+>")        # how TeleChat writes markers: <_user>, <reserve1>, </s>, <pad>
_SPACE = "\u2581"                                # SentencePiece writes a space as this character


class SentencePieceFile:
    """A SentencePiece model whose markers are switched off in plain text.

    SentencePiece finds user-defined symbols inside any text (in the 12B model ``<_user>`` and ``<_bot>`` are such), but
    never control symbols. So the markers among the former are loaded as the latter: the same ids, and text is encoded
    by the library alone, at its full speed.
    """

    def __init__(self, path: Path, data: bytes, named: Iterable[str], names: Optional[Mapping[int, str]] = None):
        import sentencepiece

        symbols, self.dummy_prefix = _read_symbols(path, data)
        named = set(named)
        self.markers: Dict[str, int] = {}
        self.special_ids = set()
        patched = bytearray(data)
        for piece, token_id, kind, kind_at in symbols:
            if kind == _USER_DEFINED:
                if not (_MARKER_SHAPE.fullmatch(piece) or (piece in named and len(piece) > 1)):
                    continue                             # such as digits and line ends: ordinary text
                patched[kind_at] = _CONTROL
            self.markers[piece] = token_id
            if kind != _USER_DEFINED or piece in named:
                self.special_ids.add(token_id)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=bytes(patched))
        except (RuntimeError, ValueError, TypeError) as err:
            raise VocabError(f"vocabulary file {path} is not a usable SentencePiece model: {err}; copy it again from "
                             "the official model's folder") from err
        self.size = self._model.get_piece_size()
        self._unknown_id = self._model.unk_id()
        self._names: Dict[int, str] = {}
        self._ids: Dict[str, int] = {}
        self._rename(path, names or {})
        roles = {"unk": self._unknown_id, "bos": self._model.bos_id(), "eos": self._model.eos_id(),
                 "pad": self._model.pad_id()}
        self.own_tokens = {role: self._model.id_to_piece(i) for role, i in roles.items() if i >= 0}

    def _rename(self, path: Path, names: Mapping[int, str]) -> None:
        """Give markers the names of `names`, such as <tool_call> for the piece <_control1>. Raises VocabError."""
        for token_id, name in names.items():
            piece = self._model.id_to_piece(token_id) if 0 <= token_id < self.size else None
            if piece == name:
                continue
            fault = (f"the ids there end at {self.size - 1}" if piece is None else
                     f"{token_id} is {piece!r}, an ordinary piece of text" if piece not in self.markers else
                     f"{name!r} has id {self.token_to_id(name)}" if self.token_to_id(name) is not None else "")
            if fault:
                raise VocabError(f"added_tokens_decoder (of {SETTINGS_FILE}) says that {name!r} has id {token_id}, but "
                                 f"in {path} {fault}; the two do not belong together")
            self.markers[name] = self.markers.pop(piece or "")
            self._names[token_id], self._ids[name] = name, token_id
            self.special_ids.add(token_id)

    def encode(self, text: str) -> List[int]:
        if not isinstance(text, str):
            raise TypeError("not a str")
        return list(self._model.encode(text))

    def encode_batch(self, texts: List[str], num_threads: Optional[int]) -> List[List[int]]:
        ids: List[List[int]] = self._model.encode(texts, num_threads=-1 if num_threads is None else num_threads)
        return ids

    def encode_arrays(self, texts: List[str]) -> List[np.ndarray]:
        if not hasattr(self._model, "EncodeAsNumpy"):        # a release before 0.2.3
            return [np.array(ids, np.int32) for ids in self.encode_batch(texts, 1)]
        arrays: List[np.ndarray] = self._model.EncodeAsNumpy(texts, num_threads=1)
        return arrays

    def token_to_id(self, piece: str) -> Optional[int]:
        if piece in self._ids:
            return self._ids[piece]
        token_id = self._model.piece_to_id(piece)
        if token_id == self._unknown_id and piece != self._model.id_to_piece(token_id):
            return None
        return token_id

    def id_to_token(self, token_id: int) -> Optional[str]:
        return self._names.get(int(token_id)) or self._model.id_to_piece(int(token_id))

    def pieces(self) -> Dict[str, int]:
        pieces = self._model.id_to_piece(list(range(self.size)))
        return {self._names.get(i, piece): i for i, piece in enumerate(pieces)}

    def token_bytes(self) -> List[bytes]:
        pieces = self._model.id_to_piece(list(range(self.size)))
        return [bytes([int(piece[3:5], 16)]) if self._model.is_byte(i) else piece.replace(_SPACE, " ").encode()
                for i, piece in enumerate(pieces)]


class ByteLevelBpeFile:
    """A tokenizer.json with its markers taken out of the list of added tokens, which are found inside any text."""

    dummy_prefix = False
    own_tokens: Dict[str, str] = {}                      # noqa: RUF012 (the file names none)

    def __init__(self, path: Path, data: bytes, named: Iterable[str], names: Optional[Mapping[int, str]] = None):
        import tokenizers

        try:
            content = json.loads(data)
            added = {token["content"]: token for token in content["added_tokens"]}
            decoder = (content.get("decoder") or {}).get("type")
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as err:
            raise VocabError(f"vocabulary file {path} is not valid JSON (truncated?): {err}; copy it again from the "
                             "official model's folder") from err
        except (KeyError, TypeError, AttributeError) as err:
            raise VocabError(f"vocabulary file {path} is JSON, but not a tokenizer.json of Hugging Face tokenizers "
                             f"(no list added_tokens); name {JSON_FILE} itself, not another file next to it") from err
        if decoder != "ByteLevel":
            raise VocabError(f"vocabulary file {path}: its decoder is {decoder}, expected ByteLevel (byte-level BPE, "
                             f"as TeleChat-7B has); use the model's {MODEL_FILE} if there is one")
        named = set(named)
        self.markers = {piece: token["id"] for piece, token in added.items()
                        if token.get("special") or piece in named or _MARKER_SHAPE.fullmatch(piece)}
        self.special_ids = {token_id for piece, token_id in self.markers.items()
                            if added[piece].get("special") or piece in named}
        content["added_tokens"] = [token for token in added.values() if token["content"] not in self.markers]
        content["truncation"] = content["padding"] = None
        self._literal = {token["id"]: piece for piece, token in added.items()}
        try:
            self._model = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as err:                         # the library raises plain Exception
            raise VocabError(f"vocabulary file {path} is refused by the library tokenizers: {err}; copy it again from "
                             "the official model's folder, or install newer tokenizers") from err
        self._ids = {**self._model.get_vocab(with_added_tokens=True), **self.markers}
        self._pieces = {token_id: piece for piece, token_id in self._ids.items()}
        self.size = max(self._pieces, default=-1) + 1

    def encode(self, text: str) -> List[int]:
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: List[str], num_threads: Optional[int]) -> List[List[int]]:
        if num_threads == 1:
            return [self.encode(text) for text in texts]
        return [one.ids for one in self._model.encode_batch(texts, add_special_tokens=False)]

    def encode_arrays(self, texts: List[str]) -> List[np.ndarray]:
        return [np.array(self.encode(text), np.int32) for text in texts]

    def token_to_id(self, piece: str) -> Optional[int]:
        return self._ids.get(piece)

    def id_to_token(self, token_id: int) -> Optional[str]:
        return self._pieces.get(int(token_id))

    def pieces(self) -> Dict[str, int]:
        return dict(self._ids)

    def token_bytes(self) -> List[bytes]:
        values = _byte_level_alphabet()
        table = ["\ufffd".encode()] * self.size          # ids that the file leaves out
        for token_id, piece in self._pieces.items():
            literal = token_id in self._literal or any(char not in values for char in piece)
            table[token_id] = piece.encode() if literal else bytes(values[char] for char in piece)
        return table


def _byte_level_alphabet() -> Dict[str, int]:
    """Character to byte of byte-level BPE: printable Latin-1 represents itself, the other bytes for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + n): byte for n, byte in enumerate(others)}}


# sentencepiece's ModelProto is read here by hand because the generated protobuf module can exist
# only once in a process, and MindFormers and transformers bring copies of their own.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4              # values of ModelProto.SentencePiece.Type


def _read_symbols(path: Path, data: bytes) -> Tuple[List[Tuple[str, int, int, int]], bool]:
    """Symbols that are not learnt pieces: (piece, id, type, where the byte of the type lies); and add_dummy_prefix."""
    symbols = []
    token_id = position = 0
    size = len(data)
    seen = set()
    dummy_prefix = True                                  # the format's default
    try:
        while position < size:
            # A learnt piece is its text and a score of five bytes, nothing else. To see just that, rather than look at
            # every field, keeps the reading of 100 000 pieces short.
            if data[position] == 0x0A == data[position + 2] and data[position + 1] == data[position + 3] + 7 < 0x80:
                token_id += 1
                position += 2 + data[position + 1]
                continue
            field, _, start, end = next(fields(data, position, size))
            position = end
            seen.add(field)
            if field == 1:                               # repeated SentencePiece pieces
                parts = {number: (a, b) for number, _, a, b in fields(data, start, end)}
                kind_at = parts[3][0] if 3 in parts else 0
                kind = data[kind_at] if kind_at else 0
                if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
                    a, b = parts[1]
                    symbols.append((data[a:b].decode(), token_id, kind, kind_at))
                token_id += 1
            elif field == 3:                             # NormalizerSpec
                for number, _, a, _ in fields(data, start, end):
                    if number == 3:                      # add_dummy_prefix
                        dummy_prefix = bool(data[a])
        if not token_id or position > size:
            raise ValueError("no pieces, or half a piece at the end")
    except (IndexError, ValueError, KeyError) as err:
        raise VocabError(f"vocabulary file {path} is neither a SentencePiece model nor a {JSON_FILE}, or it is "
                         "truncated; copy it again from the official model's folder and compare its size") from err
    if not {2, 3} <= seen:
        raise VocabError(f"vocabulary file {path} ends after {token_id} pieces, without the model's settings: it is "
                         "truncated; copy it again from the official model's folder and compare its size")
    return symbols, dummy_prefix
