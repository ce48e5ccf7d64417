"""One message of a conversation: its roles, and the forms in which libraries and data files write it.

Accepts the dicts of OpenAI, roles as in ShareGPT and TeleChat's own, and checks them. The order of messages is checked
where they are rendered (text/renderer.py); whole records of data are read by data/records.py.
"""
import json
import re
from typing import List, NamedTuple, Sequence, Tuple, Union

from research.telechat.common.errors import ConversationError
from research.telechat.common.files import JsonObject
from research.telechat.text.call_forms import CALL_ROLES, Notes, calls_of, is_void

Tools = Union[str, Sequence[JsonObject], None]       # descriptions of tools: as objects, or written already
SYSTEM, USER, BOT, TOOL = "system", "user", "bot", "tool"
ROLE_ALIASES = {
    "human": USER, "question": USER, "prompter": USER,
    "assistant": BOT, "gpt": BOT, "chatgpt": BOT, "model": BOT, "answer": BOT,
    "observation": TOOL, "function": TOOL, "tool_response": TOOL, "ipython": TOOL,
    "developer": SYSTEM,
}


REASONING = ("reasoning_content", "reasoning", "thinking", "thought")
MEDIA = ("image", "images", "image_url", "video", "videos", "video_url", "audio", "audios", "input_audio")


class Message(NamedTuple):
    """One message, its role one of system, user, bot, tool.

    `calls` are the tools that a bot calls, as JSON texts; `train` is False for an answer that is context only;
    `reasoning` is what the bot thought before it answered.
    """

    role: str
    content: str
    calls: Tuple[str, ...] = ()
    train: bool = True
    reasoning: str = ""


MessageLike = Union[Message, JsonObject]


def to_message(message: object, number: int, notes: Notes = None) -> Message:
    """A message of any of the usual forms as `Message`.

    Args:
        message: a `Message`, or an object with role and content.
        number: names it in a ConversationError.
        notes: of training data: what was repaired in its tool calls is appended. None: nothing is repaired.
    """
    if isinstance(message, Message):
        return message
    if not isinstance(message, dict):
        raise ConversationError(f"message {number} is {type(message).__name__}; expected role and content")
    for key in MEDIA:
        if message.get(key):
            raise ConversationError(f"message {number}: it has {key!r}; a text model cannot use that")
    role = message.get("role")
    if role in CALL_ROLES:
        return Message(BOT, "", calls_of(message.get("content"), number, notes), reasoning=_reasoning(message, number))
    role = ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in (SYSTEM, USER, BOT, TOOL):
        raise ConversationError(f"message {number}: role {str(role)[:40]!r} is unknown; expected system, user, bot "
                                "or tool")
    calls = _message_calls(message, role, number, notes)
    content = _content(message, number)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise ConversationError(f"message {number}: its content is {type(content).__name__}; expected text")
    return Message(role, content, calls, reasoning=_reasoning(message, number) if role == BOT else "")


def _message_calls(message: JsonObject, role: str, number: int, notes: Notes) -> Tuple[str, ...]:
    """The calls of a message: `tool_calls`, or OpenAI's older form, one `function_call`."""
    calls, legacy = message.get("tool_calls"), message.get("function_call")
    if is_void(calls) and is_void(legacy):
        return ()
    if not is_void(calls) and not is_void(legacy):
        raise ConversationError(f"message {number}: it has both tool_calls and function_call; expected one of them")
    if is_void(calls):
        calls = [legacy]
    if role != BOT or not (isinstance(calls, list) or notes is not None):
        raise ConversationError(f"message {number}: tool_calls must be a list in a bot's message")
    return calls_of(calls, number, notes)


def _reasoning(message: JsonObject, number: int) -> str:
    """What the bot thought, under any of the usual keys, without the line ends around it."""
    found = {message[key].strip("\n"): key for key in REASONING
             if isinstance(message.get(key), str) and message[key].strip()}
    if len(found) > 1:
        raise ConversationError(f"message {number}: it has two reasonings, under {' and '.join(found.values())}; leave "
                                "one of them")
    return next(iter(found), "")


def divided(message: Message) -> Message:
    """The message with its reasoning apart where its content brings it, as models write it: <think>...</think> in front
    of the answer, or without <think>, which the prompt had opened."""
    before, close, answer = message.content.partition("</think>")
    thought = before.lstrip()
    thought = thought[len("<think>"):] if thought.startswith("<think>") else before
    if message.role != BOT or message.reasoning or not close or "<think>" in thought:
        return message
    return message._replace(content=answer.lstrip("\n"), reasoning=thought.strip("\n"))


def _content(message: JsonObject, number: int) -> object:
    """The content, text parts joined; OpenAI's `refusal` is the content of an answer without another."""
    content, refusal = message.get("content"), message.get("refusal")
    if isinstance(refusal, str) and refusal.strip():
        if not is_void(content) and content != refusal:
            raise ConversationError(f"message {number}: it has both a content and a refusal; leave one of them")
        return refusal
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        kind = part.get("type") if isinstance(part, dict) else None
        kind = kind or next((key for key in MEDIA if isinstance(part, dict) and part.get(key)), "text")
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise ConversationError(f"message {number}: its content has a part of type {str(kind)[:40]!r}; expected "
                                    "parts of type 'text' only")
        texts.append(text)
    return "".join(texts)


def join_calls(messages: Sequence[Message], roles: Sequence[object]) -> List[Message]:
    """Messages in which calls that are separate messages (`roles`) are joined to the bot's message before them."""
    joined: List[Message] = []
    for message, role in zip(messages, roles):
        before = joined[-1] if joined else None
        if role in CALL_ROLES and before and before.role == BOT and before.train == message.train and not (
                before.reasoning and message.reasoning):
            joined[-1] = before._replace(calls=before.calls + message.calls,
                                         reasoning=before.reasoning or message.reasoning)
        else:
            joined.append(message)
    return joined


Parts = List[Tuple[str, bool]]
_BLOCK = re.compile(r"(<tool_call>)(\s*\{.*?\}\s*)(</tool_call>)", re.DOTALL)
_RESPONSE = re.compile(r"(<tool_response>)(\n.*?\n)(</tool_response>)(\n?)", re.DOTALL)


def content_parts(message: Message, blocks: bool = False) -> Parts:
    """A bot's content in parts (text, whether it is a marker).

    blocks: calls that the content writes out itself, as the answer of a model and official data do, have markers.
    """
    pieces = _BLOCK.split(message.content) if blocks else [message.content]
    return [(piece, index % 4 in (1, 3)) for index, piece in enumerate(pieces)]


def response_parts(text: str) -> Parts:
    """A user's text in parts, as `answer_parts`: where it is nothing but results of tools, these have markers."""
    found = list(_RESPONSE.finditer(text))
    whole = "".join(match.group() for match in found) == text and all(match[4] for match in found[:-1])
    if not found or not whole or found[-1][4]:
        return [(text, False)]
    return [(match[number], number in (1, 3)) for match in found for number in (1, 2, 3, 4)]


def json_text(value: object) -> str:
    """JSON as TeleChat2 writes it: Chinese stays Chinese."""
    return json.dumps(value, ensure_ascii=False)
