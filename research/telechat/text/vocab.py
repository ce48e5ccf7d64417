"""Vocabulary files of the TeleChat family: text to token ids and back, for preprocessing, chat and the tokenizers.

Reads SentencePiece models (``tokenizer.model``: 12B, 52B, TeleChat2) and byte-level BPE files of Hugging Face
tokenizers (``tokenizer.json``: 7B). It needs only NumPy, sentencepiece and tokenizers, so that it starts at once
and can be loaded in worker processes. It does not know how a conversation is written (text/renderer.py does), nor
padding and batches for MindFormers (telechat_tokenizer does).

Two ways to read a marker such as ``<_bot>`` in a text, never mixed:

- `Vocab.encode` takes it as ordinary characters. What a user types can therefore never end a turn or open another.
- `Vocab.encode_with_specials` takes it as the single token, anywhere. For prompts written by a program.

Every stretch of text between two markers is encoded on its own, with SentencePiece's dummy prefix (the "▁" in front of
the first word), as the official chat and fine-tuning code does and as the weights were therefore trained.
"""
import codecs
import hashlib
import re
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Callable, Dict, FrozenSet, Iterable, List, Mapping, Optional, Sequence, Tuple, TypeVar, Union

import numpy as np

from research.telechat.common.errors import ConfigError, VocabError
from research.telechat.common.files import JsonObject, read_json_object
from research.telechat.text.vocab_files import (
    JSON_FILE,
    MODEL_FILE,
    SETTINGS_FILE,
    ByteLevelBpeFile,
    SentencePieceFile,
)

_Encoded = TypeVar("_Encoded")
_LFS_POINTER = b"version https://git-lfs"


# Official vocabularies are filled up to a round number of embedding rows, by 1.6 % at most.
_SPARE_ROWS = 0.02


def check_fit(name: str, tokens: int, rows: int) -> Optional[str]:
    """Whether a tokenizer of `tokens` tokens can be that of a model with `rows` rows of embeddings (vocab_size).

    Returns:
        A warning, where the model has many more rows than the tokenizer has tokens, without full stop; else None.

    Raises:
        ConfigError: it is another model's. `name` says which tokenizer that is.
    """
    if tokens > rows:
        raise ConfigError(f"{name} is the tokenizer of another model: it has {tokens} tokens, the model {rows} "
                          "(vocab_size); use the one in the folder of the model's official checkpoint")
    if tokens < rows * (1 - _SPARE_ROWS):
        return f"{name} has {tokens} tokens, the model {rows} (vocab_size): check that it belongs to the model"
    return None


class Vocab:
    """One vocabulary. Made by `Vocab.load`; can be pickled (the other process reads the same file again).

    Attributes: `path`; `fingerprint`, the SHA-256 of the file in hex; `size`, one more than the greatest id; `markers`,
    piece to id of every token that is a marker and never comes from plain text; `special_ids`, the ids of those markers
    that `skip_special_tokens` removes: the ones the file itself calls special, and the ones named in `special_tokens`;
    `own_tokens`, role ("unk", "bos", "eos", "pad") to piece as a SentencePiece model names them, empty for others;
    `settings`, the file's tokenizer_config.json, empty without one; `names`, id to piece of the tokens that it
    lists. These may give a marker of a SentencePiece model another name: TeleChat2's <tool_call> is its <_control1>.
    """

    def __init__(self, path: Path, data: bytes, special_tokens: Mapping[str, str], settings: JsonObject,
                 names: Optional[Mapping[int, str]] = None):
        self.path, self.settings = path, settings
        self.names = dict(names) if names is not None else _added_tokens(settings.get("added_tokens_decoder"), path)
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self.special_tokens = dict(special_tokens)
        backend = ByteLevelBpeFile if data.lstrip()[:1] == b"{" else SentencePieceFile
        self._backend = backend(path, data, self.special_tokens.values(), self.names)
        self.size = self._backend.size
        self.markers: Mapping[str, int] = MappingProxyType(self._backend.markers)
        self.special_ids: FrozenSet[int] = frozenset(self._backend.special_ids)
        self.own_tokens: Mapping[str, str] = MappingProxyType(self._backend.own_tokens)
        self._check_named()
        self._check_plain()

    @classmethod
    def load(cls, path: Union[str, Path], special_tokens: Optional[Mapping[str, Optional[str]]] = None,
             names: Optional[Mapping[int, str]] = None) -> "Vocab":
        """Read a vocabulary.

        Args:
            path: ``tokenizer.model``, ``tokenizer.json``, or a folder that holds one of them (the first, if both).
            special_tokens: role to piece, such as {"user": "<reserve1>"}: markers that `skip_special_tokens` removes
                in addition. A value None is ignored. Ordinary pieces of text cannot be markers.
            names: id to name of markers; None: as the file's tokenizer_config.json lists them.

        Raises:
            VocabError: no such file, not a vocabulary, truncated, or a named token that is not a marker in it; a
                tokenizer_config.json that is broken or another vocabulary's.
        """
        path = _find_file(Path(path))
        try:
            data = path.read_bytes()
        except OSError as err:
            raise VocabError(f"vocabulary file {path} cannot be read: {err.strerror or err}") from err
        if not data:
            raise VocabError(f"vocabulary file {path} is empty; copy it again from the official model's folder")
        if data.startswith(_LFS_POINTER):
            raise VocabError(f"vocabulary file {path} is a Git LFS pointer, not the file itself; fetch it with "
                             "`git lfs pull`")
        named = {role: piece for role, piece in (special_tokens or {}).items() if piece is not None}
        return cls(path, data, named, _settings(path), names)

    def encode(self, text: str) -> List[int]:
        """Ids of `text` as plain text: markers typed in it are ordinary characters. Raises VocabError, see below."""
        try:
            return self._backend.encode(text)
        except (TypeError, ValueError, RuntimeError):
            _check_texts([text])
            raise

    def encode_batch(self, texts: Sequence[str], num_threads: Optional[int] = None) -> List[List[int]]:
        """`encode` of each text, in the library's own threads (None: one per core; 1: none besides this one).

        A byte-level BPE vocabulary takes the number of its threads from RAYON_NUM_THREADS unless it is 1. Raises
        VocabError when a text is not a str or holds a lone surrogate, which has no UTF-8 form.
        """
        return _checked(partial(self._backend.encode_batch, num_threads=num_threads), list(texts))

    def encode_arrays(self, texts: Sequence[str]) -> List[np.ndarray]:
        """`encode` of each text as an int32 array, without more threads; faster than `encode_batch`. Raises VocabError.
        """
        return _checked(self._backend.encode_arrays, list(texts))

    def encode_with_specials(self, text: str) -> List[int]:
        """Ids of `text`, where each marker written in it becomes its single id; the text between them as `encode`."""
        ids: List[int] = []
        start = 0
        for match in self._marker_pattern.finditer(text):
            if match.start() > start:
                ids += self.encode(text[start:match.start()])
            ids.append(self.markers[match.group()])
            start = match.end()
        if start < len(text):
            ids += self.encode(text[start:])
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`. Bytes that are no UTF-8 and ids at or beyond `size` become U+FFFD.

        The inverse of `encode` and of `encode_with_specials` for every text without "▁" (U+2581), which SentencePiece
        cannot tell from a space. Models are often wider than their vocabulary, so that an id beyond it can be
        generated; a negative id raises VocabError.
        """
        decoder = IncrementalDecoder(self, skip_special_tokens)
        return decoder.feed(ids) + decoder.flush()

    def token_to_id(self, piece: str) -> Optional[int]:
        """Id of a piece as `id_to_token` writes it, or None if there is no such piece (never the unknown id)."""
        return self._backend.token_to_id(piece)

    def id_to_token(self, token_id: int) -> str:
        """The piece with this id, in the file's own spelling ("▁the", "<0xE4>"). VocabError if there is none."""
        piece = self._backend.id_to_token(token_id) if 0 <= token_id < self.size else None
        if piece is None:
            raise VocabError(f"token id {token_id} does not exist in {self.path}, whose ids end at {self.size - 1}")
        return piece

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that an id adds to a text, of one character or of a part of it; a marker's are its name."""
        if token_id in self._marker_texts:
            return self._marker_texts[token_id].encode()
        return self._token_bytes[token_id] if 0 <= token_id < len(self._token_bytes) else "\ufffd".encode()

    def pieces(self) -> Dict[str, int]:
        """Piece to id of the whole vocabulary, as a new dict."""
        return self._backend.pieces()

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"Vocab({str(self.path)!r}, size={self.size})"

    def __reduce__(self) -> Tuple[object, ...]:
        return _reload, (str(self.path), self.special_tokens, self.fingerprint, self.names)

    @cached_property
    def _marker_pattern(self) -> "re.Pattern[str]":
        longest_first = sorted(self.markers, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _token_bytes(self) -> List[bytes]:
        return self._backend.token_bytes()

    @cached_property
    def _marker_texts(self) -> Dict[int, str]:
        return {token_id: piece for piece, token_id in self.markers.items()}

    def _check_named(self) -> None:
        for role, piece in self.special_tokens.items():
            if piece not in self.markers:
                known = ", ".join(list(self.markers)[:12])
                fault = ("is an ordinary piece of text there, so it cannot be a marker"
                         if isinstance(piece, str) and self.token_to_id(piece) is not None else "is not in it")
                raise VocabError(f"vocabulary {self.path}: the {role} token {piece!r} {fault}; its markers are {known}"
                                 + (", ..." if len(self.markers) > 12 else ""))

    def _check_plain(self) -> None:
        """No marker may come out of plain text; a file for which that fails would let users forge turns.

        The unknown token does: characters that a small vocabulary lacks become it.
        """
        unknown = self.token_to_id(self.own_tokens["unk"]) if self.own_tokens.get("unk") else None
        for piece, token_id in self.markers.items():
            if token_id != unknown and token_id in self._backend.encode(piece):
                raise VocabError(f"vocabulary {self.path}: plain text {piece!r} is encoded as the marker with id "
                                 f"{token_id}; this kind of vocabulary is not supported")


class IncrementalDecoder:
    """Decodes a stream of ids. What `feed` returned, joined, plus `flush`, equals `Vocab.decode` of all ids.

    It never returns half a character: bytes of an unfinished one are held back until the next ids complete it. For the
    continuation of a text rather than a new turn, feed the ids of that text first and drop what comes out.

    kept: ids of markers that `skip_special_tokens` does not remove.
    """

    def __init__(self, vocab: Vocab, skip_special_tokens: bool = False, kept: FrozenSet[int] = frozenset()):
        self._table = vocab._token_bytes
        self._marker_texts = vocab._marker_texts
        self._skipped = vocab.special_ids - kept if skip_special_tokens else frozenset()
        self._strips_prefix = vocab._backend.dummy_prefix
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = True

    def feed(self, ids: Union[int, Iterable[int]]) -> str:
        """Text that is complete after `ids` (one id or several)."""
        out: List[str] = []
        for token_id in ([ids] if isinstance(ids, int) else ids):
            if token_id < 0:
                raise VocabError(f"token id {token_id} is negative; masked labels cannot be decoded")
            if token_id in self._marker_texts:
                out.append(self._utf8.decode(b"", True))
                if token_id not in self._skipped:
                    out.append(self._marker_texts[token_id])
                self._at_start = True                    # the next stretch of text has a dummy prefix of its own
                continue
            data = self._table[token_id] if token_id < len(self._table) else "\ufffd".encode()
            if self._at_start and self._strips_prefix and data[:1] == b" ":
                data = data[1:]
            self._at_start = False
            out.append(self._utf8.decode(data))
        return "".join(out)

    def flush(self) -> str:
        """End of the stream: U+FFFD if it ended within a character, otherwise nothing."""
        self._at_start = True
        return self._utf8.decode(b"", True)


def _find_file(path: Path) -> Path:
    if path.is_dir():
        for name in (MODEL_FILE, JSON_FILE):
            if (path / name).is_file():
                return path / name
        raise VocabError(f"folder {path} holds neither {MODEL_FILE} nor {JSON_FILE}; copy it there from the official "
                         "model's folder")
    if not path.exists():
        raise VocabError(f"vocabulary file not found: {path}; expected {MODEL_FILE} or {JSON_FILE} of the model, or "
                         "the folder that holds it")
    return path


def _checked(encode: Callable[[List[str]], _Encoded], texts: List[str]) -> _Encoded:
    """encode(texts); VocabError for the first that no library can encode."""
    if not all(isinstance(text, str) for text in texts):
        _check_texts(texts)
    try:
        return encode(texts)
    except (TypeError, ValueError, RuntimeError):
        _check_texts(texts)
        raise


def _check_texts(texts: Sequence[object]) -> None:
    """Raise VocabError for the first of the texts that no library can encode."""
    for number, text in enumerate(texts):
        where = f"text {number + 1} of {len(texts)}" if len(texts) > 1 else "text"
        if not isinstance(text, str):
            raise VocabError(f"{where} to be encoded is {type(text).__name__}, expected str")
        try:
            text.encode()
        except UnicodeEncodeError as bad:
            raise VocabError(f"{where} to be encoded holds a lone surrogate ({text[bad.start]!r} at character "
                             f"{bad.start + 1}), which has no UTF-8 form; repair the text's source") from None


def _settings(path: Path) -> JsonObject:
    """The tokenizer_config.json of a vocabulary file; empty without one. Raises VocabError."""
    beside = path.with_name(SETTINGS_FILE)
    if not beside.is_file():
        return {}
    try:
        return read_json_object(beside, "tokenizer config")
    except ConfigError as err:
        raise VocabError(str(err)) from err


def _added_tokens(listed: object, path: Path) -> Dict[int, str]:
    """{id: piece} of an added_tokens_decoder. Raises VocabError."""
    if listed is None:
        return {}
    names = {}
    for token_id, token in listed.items() if isinstance(listed, dict) else [("", listed)]:
        piece = token.get("content") if isinstance(token, dict) else token if isinstance(token, str) else None
        if not (isinstance(piece, str) and piece and str(token_id).strip().isdigit()):
            raise VocabError(f"{path.with_name(SETTINGS_FILE)}: added_tokens_decoder has {str(token_id)!r}: "
                             f"{str(token)[:60]!r}; expected ids with the content of a token")
        names[int(token_id)] = piece
    return names


def _reload(path: str, special_tokens: Mapping[str, str], fingerprint: str, names: Mapping[int, str]) -> Vocab:
    vocab = Vocab.load(path, special_tokens, names)
    if vocab.fingerprint != fingerprint:
        raise VocabError(f"vocabulary file {path} has changed while it was in use; start again")
    return vocab
