"""Chat with a TeleChat model: `chat` as in the official README, generation_config.json, checks of the tokenizer.

    answer, history = chat(model, tokenizer, "生抽与老抽的区别？", history=[], generation_config="path/to/model_dir")
    for piece, history in chat(model, tokenizer, "为什么？", history, generation_config, stream=True):
        print(piece, end="", flush=True)

The parts that need no model are in chat/session.py, the choice of tokens in generation/generate.py.
"""
import difflib
from pathlib import Path
from typing import Any, Iterator, List, Optional, Protocol, Sequence, Tuple, Union

from mindformers.generation.generation_config import GenerationConfig
from mindformers.tools.logger import logger

from research.telechat.chat.interrupt import Tokens
from research.telechat.chat.session import History, Session, bot_message, parse_tool_calls, tool_result, with_question
from research.telechat.chat.stream import Piece
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject, read_json_object
from research.telechat.common.tokens import end_tokens
from research.telechat.text.messages import Tools
from research.telechat.text.renderer import Renderer, choose_template
from research.telechat.text.vocab import Vocab, check_fit

GENERATION_FILE = "generation_config.json"
GenerationSource = Union[str, Path, JsonObject, GenerationConfig, None]
_READ = ("max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty",
         "min_new_tokens", "pad_token_id", "bos_token_id", "eos_token_id", "user_token_id", "bot_token_id")
# Of transformers' settings, those that do not change answers here, and values that leave answers as they are.
_WITHOUT_EFFECT = {"transformers_version", "use_cache", "cache_implementation", "return_dict_in_generate",
                   "output_scores", "output_logits", "start_token_id", "seed", "max_time"}
_NEUTRAL: JsonObject = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "diversity_penalty": 0, "length_penalty": 1,
    "early_stopping": False, "typical_p": 1, "min_p": 0, "top_h": 0, "epsilon_cutoff": 0, "eta_cutoff": 0,
    "penalty_alpha": 0, "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1, "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None, "bad_words_ids": None, "force_words_ids": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "sequence_bias": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "guidance_scale": 1, "min_length": 0, "stop_strings": None, "renormalize_logits": False,
    "remove_invalid_values": False, "constraints": None, "presence_penalty": 0, "frequency_penalty": 0}


class GenerativeModel(Protocol):
    """What a chat asks of a model (generation/generate.py)."""

    @property
    def config(self) -> Any: ...

    def stream(self, input_ids: List[int], **settings: Any) -> Tokens: ...


def read_generation_config(source: GenerationSource) -> GenerationConfig:
    """Settings of generation with the official defaults.

    Args:
        source: generation_config.json, the folder that holds it, its content, or a GenerationConfig, taken as it is.

    Raises:
        ConfigError: the file is missing or no JSON object.
    """
    if isinstance(source, GenerationConfig):
        return source
    values = dict(source) if isinstance(source, dict) else {}
    if isinstance(source, (str, Path)):
        path = Path(source)
        values = read_json_object(path / GENERATION_FILE if path.is_dir() else path, "generation config")
    _check_unread(values, strict=isinstance(source, dict))
    known = {key: values[key] for key in _READ if values.get(key) is not None}
    return GenerationConfig(**known)


def _check_unread(values: JsonObject, strict: bool) -> None:
    """Settings that are not read: ConfigError for those that would change answers and, if `strict`, for unknown names;
    otherwise a line in the log names the unknown ones."""
    unknown = []
    for key, value in values.items():
        if key in _READ or key in _WITHOUT_EFFECT or key.startswith("_") or value is None:
            continue
        if key not in _NEUTRAL:
            unknown.append(key)
        elif value not in (_NEUTRAL[key], []):
            raise ConfigError(f"generation config: {key} is {value!r}, which is not supported; expected "
                              f"{_NEUTRAL[key]!r}, or leave it out")
    if unknown and strict:
        near = difflib.get_close_matches(unknown[0], _READ, n=1)
        raise ConfigError(f"generation config: {unknown[0]} is not a generation setting"
                          + (f"; did you mean {near[0]}?" if near else f"; valid settings: {', '.join(_READ)}"))
    if unknown:
        logger.warning("generation config: not read: %s", ", ".join(unknown))


def check_tokenizer(tokenizer: object, config: Any) -> Vocab:
    """The vocabulary of `tokenizer` (a TelechatTokenizer, or a Vocab), compared with a model's config.

    Raises:
        ConfigError: there is no tokenizer, or it belongs to another model.
    """
    if tokenizer is None:
        raise ConfigError("no tokenizer is set; pass tokenizer.model or tokenizer.json of the official checkpoint")
    vocab = tokenizer if isinstance(tokenizer, Vocab) else getattr(tokenizer, "vocab", None)
    if not isinstance(vocab, Vocab):
        raise ConfigError(f"the tokenizer is {type(tokenizer).__name__}; expected TelechatTokenizer, "
                          "TelechatTokenizerFast or a Vocab")
    warning = check_fit(str(vocab.path), vocab.size, config.vocab_size)
    if warning:
        logger.warning("%s", warning)
    return vocab


def make_session(model: GenerativeModel, tokenizer: object, generation_config: GenerationSource = None,
                 stop: Sequence[str] = (), renderer: Optional[Renderer] = None, **changes: object) -> Session:
    """A `Session` with `model`. `changes`: fields of the generation config that win over it; see `chat`."""
    vocab = check_tokenizer(tokenizer, model.config)
    if generation_config is None:
        config = GenerationConfig.from_model_config(model.config)
    else:
        config = read_generation_config(generation_config)
    for key in changes:
        if key not in _READ:
            near = difflib.get_close_matches(key, _READ, n=1)
            raise ConfigError(f"{key} is not a generation setting" + (f"; did you mean {near[0]}?" if near else
                                                                      f"; valid settings: {', '.join(_READ)}"))
    settings = {key: getattr(config, key, None) for key in _READ}
    settings.update(changes)
    renderer = renderer or Renderer(choose_template(vocab, model.config.chat_template), vocab)
    sampling = {key: settings[key] for key in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty",
                                               "min_new_tokens")}
    ends = end_tokens(settings["eos_token_id"])

    mark = object()                  # of this session: its prompts share what the cache holds of their beginnings

    def next_tokens(ids: List[int], limits: JsonObject) -> Tokens:
        return model.stream(ids, session=mark,
                            **{**sampling, **limits, "eos_token_id": [*limits["eos_token_id"], *ends]})

    session = Session(renderer, next_tokens, model.config.seq_length, settings["max_new_tokens"],
                      settings["max_length"], stop)
    session.ends.update(ends)
    return session


def chat(model: GenerativeModel, tokenizer: object, question: Optional[str] = "",
         history: Optional[Sequence[JsonObject]] = None, generation_config: GenerationSource = None,
         stream: bool = False, *, system: Optional[str] = None, tools: Tools = None, stop: Sequence[str] = (),
         seed: Optional[int] = None,
         renderer: Optional[Renderer] = None, **changes: object
         ) -> Union[Tuple[str, History], Iterator[Tuple[str, History]]]:
    """Answer a question.

    Args:
        model: TelechatForCausalLM.
        tokenizer: its tokenizer.
        question: text; empty where `history` ends with the results of tools.
        history: earlier messages, {"role": "user" | "bot" | "tool" | "system", "content": text}. It is not changed.
        generation_config: GenerationConfig, a dict, generation_config.json or the folder that holds it; None: the
            settings of the model's config.
        stream: return an iterator of (piece of the answer, history so far); stop iterating to stop the answer.
        system: system prompt, kept when the history is truncated; None: that of the history, if any.
        tools: descriptions of tools that the model may call (TeleChat2).
        stop: texts that end the answer.
        seed: of sampling; the same seed gives the same answer.
        renderer: writes the conversation; None: as the model's template, or the vocabulary's family, does.
        **changes: fields of the generation config that win over it.

    Returns:
        (answer, history with question and answer), or the iterator. A model that thinks leaves its reasoning in the
        last message, under `reasoning_content`. Turns that do not fit the context are left out of
        the prompt, the oldest first; the history keeps them.

    Raises:
        ConfigError: no or another model's tokenizer, no question, a senseless setting.
        ConversationError: roles out of order, a system prompt that leaves no room, or one the family cannot take.
    """
    session = make_session(model, tokenizer, generation_config, stop, renderer, **changes)
    messages, rendered = with_question(history, question, system)
    pieces = _growing(session.pieces(rendered, tools, seed), messages)
    if stream:
        return pieces
    for _ in pieces:
        pass
    return messages[-1]["content"], messages


def _growing(pieces: Iterator[Piece], history: History) -> Iterator[Tuple[str, History]]:
    """Pieces of the answer with the history, whose last message is the answer so far, with its reasoning."""
    answer = reasoning = ""
    history.append(bot_message(""))
    for piece in pieces:
        answer += "" if piece.reasoning else piece.text
        reasoning += piece.text if piece.reasoning else ""
        history.update(bot_message(answer, reasoning))
        if not piece.reasoning:
            yield piece.text, history


__all__ = ["History", "chat", "check_tokenizer", "make_session", "parse_tool_calls", "read_generation_config",
           "tool_result"]
