"""The two legacy APIs of TeleChat: that of the official service (/telechat/gptDialog/v2 and /v4, port 8070) and that of
MindFormers' chat_web (/generate, port 11111). Bodies, bounds, error codes and formats are theirs; the history comes
only from the request.
"""
import time
from typing import AsyncIterator, List, NamedTuple, Optional, Tuple

from research.telechat.chat.session import divide_context
from research.telechat.common.errors import ConfigError, ConversationError
from research.telechat.common.files import JsonObject
from research.telechat.serve.answering import Answers, Choice, Engine
from research.telechat.serve.errors import ApiError
from research.telechat.serve.fields import Fields
from research.telechat.serve.service import Service
from research.telechat.serve.text import AnswerText

# The service's own settings, not those of generation_config.json.
DIALOG_DEFAULTS: JsonObject = {"do_sample": True, "max_length": 4096, "top_k": 20, "top_p": 0.2,
                                   "temperature": 0.1, "repetition_penalty": 1.03}
CHAT_WEB_DEFAULTS: JsonObject = {"do_sample": False, "max_length": 512, "top_k": 1, "top_p": 1.0,
                                     "temperature": 1.0, "repetition_penalty": 1.0}
MISSING, ROLES, BOUNDS, FAILED = "10301", "10904", "10305", "10903"
_WORDS = {MISSING: "服务必填参数缺失", ROLES: "服务请求参数dialog错误", BOUNDS: "请求参数范围错误",
          FAILED: "服务执行失败"}


class Wanted(NamedTuple):
    """A conversation and the settings of its answer."""

    messages: List[JsonObject]
    settings: JsonObject


class DialogError(Exception):
    """An error of the official service, by its code; `detail` has more."""

    def __init__(self, code: str, detail: str = ""):
        super().__init__(code)
        self.code, self.detail = code, detail

    def body(self) -> JsonObject:
        """The response body of the service, sent with HTTP status 200."""
        message = _WORDS[self.code] + (f": {self.detail}" if self.detail else "")
        return {"seqid": "", "code": self.code, "message": message, "flag": "0", "data": "执行失败"}


def read_dialog(body: JsonObject) -> Wanted:
    """A body of gptDialog. Raises DialogError."""
    dialog = body.get("dialog")
    if dialog is None:
        raise DialogError(MISSING)
    if not isinstance(dialog, list) or not all(
            isinstance(message, dict) and isinstance(message.get("content"), str)
            and message.get("role") == ("user", "bot")[number % 2] for number, message in enumerate(dialog)):
        raise DialogError(ROLES)
    if not dialog:
        raise DialogError(FAILED, "dialog 为空")
    if len(dialog) % 2 == 0:
        raise DialogError(ROLES, "最后一条应为 user")
    settings = dict(DIALOG_DEFAULTS)
    for key, good in (("do_sample", lambda value: isinstance(value, bool)),
                      ("max_length", lambda value: _whole(value) and 1 <= value <= 4096),
                      ("top_k", lambda value: _whole(value) and 1 <= value <= 99),
                      ("top_p", lambda value: isinstance(value, float) and 0 < value < 1),
                      ("temperature", lambda value: isinstance(value, float) and 0 < value < 1),
                      ("repetition_penalty", lambda value: isinstance(value, float) and 1 < value < 100)):
        value = body.get(key)
        if value is None:
            continue
        if not good(value):
            raise DialogError(BOUNDS, key)
        settings[key] = value
    return Wanted([{"role": message["role"], "content": message["content"]} for message in dialog], settings)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_chat_web(body: JsonObject) -> Tuple[Wanted, bool]:
    """A body of /generate, and whether it asks for a stream. Raises ApiError."""
    fields = Fields(body)
    messages = fields.items("messages")
    if not messages or messages[-1].get("role") != "user":
        raise ApiError(400, "messages: expected a list whose last message is the user's", "messages")
    settings = dict(CHAT_WEB_DEFAULTS)
    for key, value in (("do_sample", fields.get("do_sample") if fields.get("do_sample") is None
                        else fields.flag("do_sample")),
                       ("max_length", fields.integer("max_length", 1, 10_000_000)),
                       ("top_k", fields.integer("top_k", 0, 10_000_000)),
                       ("top_p", fields.number("top_p", 0, 1, open_low=True)),
                       ("temperature", fields.number("temperature", 0, 100, open_low=True)),
                       ("repetition_penalty", fields.number("repetition_penalty", 0, 100, open_low=True))):
        if value is not None:
            settings[key] = value
    return Wanted(messages, settings), fields.flag("stream")


def choice(service: Service, wanted: Wanted) -> Choice:
    """The answer to a conversation, without its oldest turns if it is too long. `max_length` covers prompt and answer.
    Raises ApiError."""
    engine = service.ready()
    settings = dict(wanted.settings)
    ids, longest = _fit(engine, wanted.messages, settings.pop("max_length"))
    stops = engine.renderer.text_markers if engine.renderer.as_text else ()
    return service.choice(engine, ids, longest, settings, AnswerText(engine.renderer, stops, thinking=True))


def _fit(engine: Engine, messages: List[JsonObject], max_length: int) -> Tuple[List[int], int]:
    budget = divide_context(engine.context, None, max_length)
    try:
        prompt = engine.renderer.fit_prompt(messages, None, budget.prompt)
    except (ConversationError, ConfigError) as err:
        raise ApiError(400, str(err), "messages") from err
    return prompt.ids, budget.total - len(prompt.ids)


async def text(answers: Answers) -> AsyncIterator[str]:
    """The answer piece by piece, whole characters only. Raises ApiError."""
    async with answers:
        async for update in answers.updates():
            if update.part.content:
                yield update.part.content


def chat_web_answer(content: object, finish: str, key: str = "message") -> JsonObject:
    """One object of /generate: an answer (`message`) or a chunk (`delta`)."""
    return {"object": "chat.completion" if key == "message" else "chat.completion.chunk",
            "choices": [{"index": 0, key: content, "finish_reason": finish or None}], "created": int(time.time())}


async def chat_web_chunks(answers: Answers) -> AsyncIterator[JsonObject]:
    """The chunks of a stream of /generate."""
    yield chat_web_answer({"role": "assistant"}, "", "delta")
    try:
        async for piece in text(answers):
            yield chat_web_answer({"content": piece}, "", "delta")
    except ApiError as err:
        yield chat_web_answer({"content": err.message}, "error", "delta")
        return
    yield chat_web_answer({}, "stop", "delta")


def failed(err: ApiError) -> Optional[JsonObject]:
    """The response of /generate to a failed request; None if the client should see the HTTP status."""
    if err.status >= 500 or err.status == 429:
        return None
    return chat_web_answer(err.message, "error")
