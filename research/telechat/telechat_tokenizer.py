"""`TelechatTokenizer`: the vocabulary of a TeleChat model as a MindFormers tokenizer, for YAML and the text generator.

Thin: what a text's ids are, and what ids mean, is decided in text/vocab.py; this file adds what MindFormers expects of
a tokenizer (batches, padding, special token properties, saving). Encoding a text here takes the markers in it as
tokens; where a user's text must not be able to hold any, text/renderer.py renders the conversation, as
`apply_chat_template` does.
"""
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple, Union

from mindformers.models.tokenization_utils import PreTrainedTokenizer

from research.telechat.bridge.compat import MindFormerModuleType, plugin_class
from research.telechat.common.errors import VocabError
from research.telechat.common.files import whole
from research.telechat.text.messages import Tools
from research.telechat.text.renderer import Renderer, choose_template
from research.telechat.text.vocab import Vocab
from research.telechat.text.vocab_files import JSON_FILE, MODEL_FILE

_ROLES = ("unk", "bos", "eos", "pad")


@plugin_class(MindFormerModuleType.TOKENIZER)
class TelechatTokenizer(PreTrainedTokenizer):
    """Tokenizer of TeleChat-12B, TeleChat-52B and TeleChat2, from their SentencePiece model.

    Markers written in a text are always encoded as their single ids, and the text between two markers on
    its own. ``tokenizer(text, split_special_tokens=True)`` takes markers as ordinary characters instead.

    Args:
        vocab_file: ``tokenizer.model`` (or ``tokenizer.json``), or the folder that holds it.
        unk_token, bos_token, eos_token, pad_token: pieces; None takes the ones that the SentencePiece model names. An
            `unk_token` that is not in the vocabulary is replaced by the model's own: earlier recipes of 12B wrote
            ``<unk>`` where the model has ``<_unk>``, and MindFormers would have given it an id beyond the embeddings.
        add_bos_token, add_eos_token: put bos before and eos behind each encoded text.
        additional_special_tokens: more markers that `skip_special_tokens` removes, besides those the file calls so.
        kwargs: those of MindFormers, such as padding_side ("right"), model_max_length, split_special_tokens.

    Raises VocabError for a file that cannot be read, or a token that is not a marker in it.
    """

    template_name: Optional[str] = None      # of text/templates.py; None: detected from the vocabulary
    vocab_files_names: Dict[str, str] = {"vocab_file": MODEL_FILE}     # noqa: RUF012 (MindFormers' own form)
    model_input_names: List[str] = ["input_ids", "attention_mask"]      # noqa: RUF012

    def __init__(self, vocab_file: str, unk_token: object = None, bos_token: object = None, eos_token: object = None,
                 pad_token: object = None, add_bos_token: bool = False, add_eos_token: bool = False,
                 additional_special_tokens: Iterable[object] = (), **kwargs: Any):
        if not vocab_file:
            raise VocabError(f"vocab_file is not set; name the model's {MODEL_FILE}, in the recipe under "
                             "processor.tokenizer or with --processor.tokenizer.vocab_file")
        saved = {int(token_id): _text(token) for token_id, token in
                 (kwargs.pop("added_tokens_decoder", None) or {}).items()}
        vocab = Vocab.load(vocab_file, names=saved or None)
        named = {role: _content(token) or vocab.own_tokens.get(role)
                 for role, token in zip(_ROLES, (unk_token, bos_token, eos_token, pad_token))}
        if named["unk"] is not None and vocab.token_to_id(named["unk"]) is None:
            named["unk"] = vocab.own_tokens.get("unk")
        more = [_text(token) for token in additional_special_tokens or ()]
        more += [piece for piece, token_id in vocab.markers.items() if token_id in vocab.special_ids]
        more = [piece for piece in dict.fromkeys(more) if piece not in named.values()]
        self.vocab = _with_specials(vocab, {**named, **_numbered(more)})
        for token_id, piece in saved.items():
            self._check_saved(token_id, piece)
        self.add_bos_token = bool(add_bos_token)
        self.add_eos_token = bool(add_eos_token)
        kwargs.setdefault("clean_up_tokenization_spaces", False)        # it would move spaces before punctuation
        super().__init__(**{f"{role}_token": piece for role, piece in named.items()}, add_bos_token=self.add_bos_token,
                         add_eos_token=self.add_eos_token, additional_special_tokens=more, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of ids of the vocabulary file. The model may have more rows."""
        return self.vocab.size

    def __len__(self) -> int:
        return self.vocab.size

    def get_vocab(self) -> Dict[str, int]:
        """Piece to id, of the whole vocabulary."""
        return self._pieces

    def tokenize(self, text: str, pair: Optional[str] = None, add_special_tokens: bool = False,
                 **kwargs: object) -> List[str]:
        """Pieces of `text`; markers in it are single pieces unless `split_special_tokens` is set."""
        plain = kwargs.get("split_special_tokens", self.split_special_tokens)
        ids = self.vocab.encode(text) if plain else self.vocab.encode_with_specials(text)
        return [self.vocab.id_to_token(token_id) for token_id in ids]

    def convert_tokens_to_ids(self, tokens: Union[str, List[str], None]) -> Union[int, List[int], None]:
        """Id of a piece, or ids of several; an unknown piece gives the id of the unknown token."""
        if tokens is None or isinstance(tokens, str):
            return None if tokens is None else self._convert_token_to_id(tokens)
        return [self._convert_token_to_id(token) for token in tokens]

    def convert_tokens_to_string(self, tokens: List[str]) -> str:
        """Text of the pieces."""
        return self.vocab.decode([self._convert_token_to_id(token) for token in tokens])

    def decode(self, token_ids: Any, *args: object, **kwargs: object) -> str:
        """Text of ids (list, array or tensor), or of a single id, which MindFormers' own method does not take."""
        return super().decode([token_ids] if isinstance(token_ids, int) else token_ids, *args, **kwargs)

    def build_inputs_with_special_tokens(self, token_ids_0: List[int],
                                         token_ids_1: Optional[List[int]] = None) -> List[int]:
        """The ids of one text, or of two, each with bos and eos as this tokenizer is configured."""
        return [token_id for ids in (token_ids_0, token_ids_1) if ids is not None
                for token_id in (*self._prefix_ids, *ids, *self._suffix_ids)]

    def get_special_tokens_mask(self, token_ids_0: List[int], token_ids_1: Optional[List[int]] = None,
                                already_has_special_tokens: bool = False) -> List[int]:
        """1 for special tokens, 0 for text, over `build_inputs_with_special_tokens` of the ids."""
        if not already_has_special_tokens:
            token_ids_0 = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        return [int(token_id in self.vocab.special_ids) for token_id in token_ids_0]

    def apply_chat_template(self, conversation: Any, chat_template: Optional[str] = None,
                            add_generation_prompt: bool = False, tokenize: bool = True, padding: object = False,
                            truncation: bool = False, max_length: Optional[int] = None, return_tensors: object = None,
                            tools: Tools = None, **kwargs: object) -> Any:
        """Token ids of a conversation (a list of messages with role and content), written as its family writes them.

        MindFormers' `chat` calls it. Members of one vocabulary differ: `template_name` names the template, which
        prediction sets by the model. With `truncation` the oldest turns are dropped until `max_length` ids are left.
        A Jinja template, given here or to the tokenizer, is used instead; it cannot keep typed markers from becoming
        tokens. Raises ConversationError, ConfigError.
        """
        if chat_template is not None or self.chat_template is not None:
            return super().apply_chat_template(conversation, chat_template, add_generation_prompt, tokenize, padding,
                                               truncation, max_length, return_tensors, **kwargs)
        messages = getattr(conversation, "messages", conversation)
        if add_generation_prompt:
            ids = self._renderer.prompt(messages, tools, max_length if truncation else None)
        else:
            ids = self._renderer.render(messages, tools)[0]
        if not tokenize:
            return self.vocab.decode(ids)
        return self.prepare_for_model(ids, add_special_tokens=False, padding="max_length" if padding else False,
                                      max_length=max_length, return_tensors=return_tensors)["input_ids"]

    def save_vocabulary(self, save_directory: str, filename_prefix: Optional[str] = None) -> Tuple[str]:
        """Copy the vocabulary file into `save_directory`; its path, as a tuple. VocabError if that fails."""
        name = JSON_FILE if self.vocab.path.suffix == ".json" else MODEL_FILE
        target = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        try:
            if not (target.exists() and target.samefile(self.vocab.path)):
                with whole(target) as beside:
                    shutil.copyfile(self.vocab.path, beside)
        except OSError as err:
            raise VocabError(f"vocabulary file {self.vocab.path} cannot be copied to {target}: {err}; name another "
                             "folder") from err
        return (str(target),)

    def save_pretrained(self, save_directory: str, save_name: str = "mindspore_model", file_format: str = "yaml",
                        save_json: bool = True, **kwargs: object) -> None:
        """As MindFormers' own, but JSON files by default: its YAML form knows only MindFormers' own tokenizers."""
        super().save_pretrained(save_directory, save_name, file_format, save_json, **kwargs)

    @cached_property
    def _pieces(self) -> Dict[str, int]:
        return self.vocab.pieces()

    @property
    def _renderer(self) -> Renderer:
        return Renderer(choose_template(self.vocab, self.template_name), self.vocab)

    @property
    def _prefix_ids(self) -> List[int]:
        return [self.bos_token_id] if self.add_bos_token else []

    @property
    def _suffix_ids(self) -> List[int]:
        return [self.eos_token_id] if self.add_eos_token else []

    def _convert_token_to_id(self, token: str) -> int:
        token_id = self.vocab.token_to_id(token)
        if token_id is not None:
            return token_id
        own = self.vocab.own_tokens.get("unk")           # official configs name <_end> as unk_token: never by accident
        known = None if own is None else self.vocab.token_to_id(own)
        return int(self.unk_token_id) if known is None else known

    def _convert_id_to_token(self, index: int) -> str:
        return self.vocab.id_to_token(index)

    def _decode(self, token_ids: List[int], skip_special_tokens: bool = False,
                clean_up_tokenization_spaces: Optional[bool] = None, **kwargs: object) -> str:
        text = self.vocab.decode(token_ids, skip_special_tokens)
        if clean_up_tokenization_spaces or (clean_up_tokenization_spaces is None and self.clean_up_tokenization_spaces):
            return self.clean_up_tokenization(text)
        return text

    def _add_tokens(self, new_tokens: Optional[Iterable[object]], special_tokens: bool = False) -> int:
        """MindFormers would give an unknown token the next free id, for which the weights have no trained row."""
        new_tokens = list(new_tokens or ())
        for token in new_tokens:
            if self.vocab.token_to_id(_text(token)) is None:
                raise VocabError(f"token {_text(token)!r} is not in {self.vocab.path} and cannot be added: the "
                                 "weights have no row for it; the model's reserve tokens are there for such uses")
        count = super()._add_tokens(new_tokens, special_tokens)
        missing = [piece for piece in self.all_special_tokens
                   if self.vocab.markers.get(piece) not in self.vocab.special_ids]
        if missing:
            self.vocab = _with_specials(self.vocab, {**self.vocab.special_tokens, **_numbered(missing)})
        return count

    def _check_saved(self, token_id: int, piece: str) -> None:
        if self.vocab.token_to_id(piece) != token_id:
            raise VocabError(f"added_tokens_decoder says that {piece!r} has id {token_id}, but in {self.vocab.path} it "
                             f"has id {self.vocab.token_to_id(piece)}; the two do not belong together")


def _content(token: object) -> Optional[str]:
    """Text of a token given as str, AddedToken, or the dict that a saved AddedToken is."""
    if isinstance(token, dict):
        token = token.get("content")
    return None if token is None else str(token)


def _text(token: object) -> str:
    """`_content` of a token that there is."""
    return _content(token) or ""


def _numbered(pieces: List[str]) -> Dict[str, str]:
    return {f"additional special ({piece})": piece for piece in pieces}


def _with_specials(vocab: Vocab, special_tokens: Dict[str, Optional[str]]) -> Vocab:
    """`vocab` itself where it already calls all of these tokens special, otherwise read again with them."""
    named = [piece for piece in special_tokens.values() if piece is not None]
    if all(vocab.markers.get(piece) in vocab.special_ids for piece in named):
        return vocab
    return Vocab.load(vocab.path, special_tokens, vocab.names)
