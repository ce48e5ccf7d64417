"""One message of a conversation: its roles, and the forms in which libraries and data files write it.

Accepts the dicts of OpenAI, roles as in ShareGPT and TeleChat's own, and checks them. The order of messages is checked
where they are rendered (text/renderer.py); whole records of data are read by data/records.py.
"""
import json
from typing import NamedTuple, Sequence, Tuple, Union

from research.telechat.common.errors import ConversationError
from research.telechat.common.files import JsonObject

Tools = Union[str, Sequence[JsonObject], None]       # descriptions of tools: as objects, or written already
SYSTEM, USER, BOT, TOOL = "system", "user", "bot", "tool"
ROLE_ALIASES = {
    "human": USER, "question": USER, "prompter": USER,
    "assistant": BOT, "gpt": BOT, "chatgpt": BOT, "model": BOT, "answer": BOT,
    "observation": TOOL, "function": TOOL, "tool_response": TOOL, "ipython": TOOL,
    "developer": SYSTEM,
}


class Message(NamedTuple):
    """One message, its role one of system, user, bot, tool; `calls` are the tools that a bot calls, as JSON texts."""

    role: str
    content: str
    calls: Tuple[str, ...] = ()


MessageLike = Union[Message, JsonObject]


def to_message(message: object, number: int) -> Message:
    """A message of any of the usual forms as `Message`. `number` names it in a ConversationError."""
    if isinstance(message, Message):
        return message
    if not isinstance(message, dict):
        raise ConversationError(f"message {number} is {type(message).__name__}; expected role and content")
    role = message.get("role")
    role = ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in (SYSTEM, USER, BOT, TOOL):
        raise ConversationError(f"message {number}: role {role!r} is unknown; expected system, user, bot or tool")
    content, calls = message.get("content"), message.get("tool_calls") or ()
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str)
                                         for part in content):
        content = "".join(part["text"] for part in content)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise ConversationError(f"message {number}: its content is {type(content).__name__}; expected text")
    if not calls:
        return Message(role, content)
    if role != BOT or not isinstance(calls, list):
        raise ConversationError(f"message {number}: tool_calls must be a list in a bot's message")
    return Message(role, content, tuple(_call(call, number) for call in calls))


def _call(call: object, number: int) -> str:
    """A tool call as the JSON text that TeleChat2 writes. Accepts the bare form and OpenAI's, nested in `function`."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ConversationError(f"message {number}: a tool call has no name; expected name and arguments")
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):           # OpenAI's form has them as JSON text already
        arguments = json_text(arguments)
    return f'{{"name": {json_text(function["name"])}, "arguments": {arguments}}}'


def answer_text(message: Message) -> str:
    """A bot's message as the text that it is trained on: its content, then its tool calls."""
    calls = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in message.calls)
    return f"{message.content}\n{calls}" if calls and message.content else message.content or calls


def json_text(value: object) -> str:
    """JSON as TeleChat2 writes it: Chinese stays Chinese."""
    return json.dumps(value, ensure_ascii=False)
