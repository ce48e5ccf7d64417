"""Prompts for run_mindformer.py: questions become prompts of the model's template, results become readable answers."""
import os
from typing import Iterable, List, Optional, Sequence, Union

from mindformers.models.build_tokenizer import build_tokenizer
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerConfig

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject, write_text
from research.telechat.common.printable import printable
from research.telechat.telechat_tokenizer import TelechatTokenizer
from research.telechat.text.renderer import Renderer, choose_template
from research.telechat.text.vocab import check_fit


def load_tokenizer(config: MindFormerConfig, vocab_size: int, template: str = "") -> TelechatTokenizer:
    """The tokenizer of the recipe, which writes conversations as `template` ("": as the vocabulary tells).

    ConfigError: none named, file missing or broken, or it is another model's.
    """
    section = (config.get("processor") or {}).get("tokenizer")
    if not section:
        raise ConfigError("the recipe has no section processor.tokenizer; inherit it (base_config: "
                          "../../configs/telechat/predict.yaml)")
    try:
        tokenizer = build_tokenizer(section)
    except ConfigError:
        raise
    except ValueError as err:                       # MindFormers wraps errors of a class in one of its own making
        raise ConfigError(f"processor.tokenizer: {err}") from err
    warning = check_fit("processor.tokenizer", len(tokenizer), vocab_size)
    if warning:
        logger.warning("%s", warning)
    tokenizer.template_name = template or None
    return tokenizer


def read_texts(data: Union[str, Sequence[str], None]) -> List[str]:
    """The texts of --predict_data: one text, a list, or the non-empty lines of a UTF-8 file. Raises ConfigError."""
    texts = [data] if isinstance(data, str) else list(data or [])
    if not texts:
        raise ConfigError("--predict_data is missing: pass a question, a raw prompt or a text file")
    if len(texts) == 1 and os.path.isfile(texts[0]):
        file = texts[0]
        try:
            with open(file, encoding="utf-8") as lines:
                texts = [line.rstrip("\r\n") for line in lines if line.strip()]
        except UnicodeDecodeError as err:
            raise ConfigError(f"--predict_data: {file} is not UTF-8 text ({err}); save it as UTF-8") from err
        except OSError as err:
            raise ConfigError(f"--predict_data: {file} cannot be read: {err.strerror or err}") from err
        if not texts:
            raise ConfigError(f"--predict_data: the file {file} contains no text; write one question or prompt per "
                              f"line")
    return [text.replace(r"\n", "\n") for text in texts]


def to_prompts(texts: Iterable[str], tokenizer: TelechatTokenizer, raw: bool = False, template: str = ""
               ) -> List[str]:
    """Plain questions written as the model's template demands; a text with markers, and with `raw` any, stays as it is.

    A question without markers is the most common cause of garbage, as the model has only ever seen prompts.
    """
    if raw:
        return list(texts)
    renderer = Renderer(choose_template(tokenizer.vocab, template), tokenizer.vocab)
    unknown = tokenizer.vocab.own_tokens.get("unk")
    markers = {renderer.template.user, renderer.template.bot, *tokenizer.vocab.markers} - {unknown}
    prompts = []
    for text in texts:
        if not any(marker in text for marker in markers):
            text = tokenizer.vocab.decode(renderer.prompt([{"role": "user", "content": text}]))
            logger.info("Plain text is formatted as the prompt %r (--raw passes it unchanged).", text)
        prompts.append(text)
    return prompts


def check_length(prompts: Iterable[str], tokenizer: TelechatTokenizer, seq_length: int) -> None:
    """ConfigError where a prompt leaves no room for an answer."""
    for number, prompt in enumerate(prompts, 1):
        length = len(tokenizer(prompt)["input_ids"])
        if length >= seq_length:
            raise ConfigError(f"--predict_data: prompt {number} has {length} tokens, the recipe's seq_length is "
                              f"{seq_length}; shorten it or raise model.model_config.seq_length")


def first_answers(results: Iterable[object], count: int) -> List[object]:
    """Results of MindFormers' text generation, each with one text or a batch of texts; the first `count` texts.

    MindFormers takes whole batches only: the last one is filled up with dummy prompts.
    """
    kept: List[object] = []
    for result in results or []:
        texts = result.get("text_generation_text") if isinstance(result, dict) else result
        if isinstance(texts, list):
            part = texts[:count]
            kept.append({**result, "text_generation_text": part} if isinstance(result, dict) else part)
        else:
            kept.append(result)
        count -= len(texts) if isinstance(texts, list) else 1
        if count <= 0:
            break
    return kept


def write_results(path: str, results: List[object]) -> None:
    """Replace a result file by `results`, in MindFormers' form: a Python literal."""
    write_text(path, str(results))


def visible(prompts: Iterable[str], tokenizer: TelechatTokenizer) -> List[str]:
    """The prompts as results show them: without the markers that are control symbols (TeleChat2)."""
    return [tokenizer.decode(tokenizer(prompt)["input_ids"], skip_special_tokens=True) for prompt in prompts]


def print_answers(prompts: List[str], results: Iterable[Union[JsonObject, str, Sequence[str]]],
                  shown: Optional[List[str]] = None) -> None:
    """Show prompt and answer of each result of MindFormers' text generation, which begins with the prompt, or, where
    markers vanish, with what is `shown` of it."""
    texts = []
    for result in results or []:
        value = result.get("text_generation_text", "") if isinstance(result, dict) else result
        texts += [value] if isinstance(value, str) else list(value)
    for prompt, start, text in zip(prompts, shown or prompts, texts):
        begin = next((len(one) for one in (prompt, start) if text.startswith(one)), 0)
        print(printable(f"prompt: {prompt}\nanswer: {text[begin:].strip()}"), flush=True)
