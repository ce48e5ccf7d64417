"""The order of messages: a conversation as turns of question and answer, checked for one template."""
from typing import List, NamedTuple, Optional, Sequence

from research.telechat.common.errors import ConversationError
from research.telechat.text.messages import BOT, SYSTEM, TOOL, USER, Message, MessageLike, Tools, divided, to_message
from research.telechat.text.templates import Template

_NO_TOOLS = "leave them out, or use a TeleChat2 model"


class Turns(NamedTuple):
    """A conversation. `system`: None where it brings no system prompt, or the template does not support one."""

    system: Optional[str]
    turns: List[List[Message]]           # each: user or tools, then bot; in a prompt one of them may be missing


def read_turns(messages: Sequence[MessageLike], tools: Tools, last: str, template: Template, has_system: bool,
               system_policy: str) -> Turns:
    """Check the order of roles and group the messages into turns.

    In a prompt a question may lack its answer, and an answer its question, as in the official chat, which writes
    every message by its role; training wants them in turn.

    Args:
        messages, tools: see `Renderer.render`.
        last: role of the last message: BOT in training, USER (or the results of tools) in a prompt.
        template: of the family.
        has_system: whether the vocabulary has the template's marker of system prompts.
        system_policy: see `Renderer`.

    Raises:
        ConversationError: roles out of order, or what the template does not support.
    """
    if tools and template.tools_block is None:
        raise ConversationError(f"the template {template.name} does not support tools; {_NO_TOOLS}")
    checked = [to_message(message, number) for number, message in enumerate(messages, 1)]
    if template.think_start is not None:
        checked = [divided(message) for message in checked]
    system = None
    turns: List[List[Message]] = []
    for number, message in enumerate(checked, 1):
        before = checked[number - 2].role if number > 1 else None
        if message.role == SYSTEM:
            if before is not None:
                raise ConversationError(f"message {number}: a system prompt after other messages; it must be the "
                                        "first")
            system = message.content
        elif message.role == BOT and before in (None, SYSTEM, BOT):
            if last == BOT:
                raise ConversationError(f"message {number}: bot after {before or 'nothing'}; expected user")
            turns.append([message])
        elif message.role == BOT or (message.role == TOOL and before == TOOL):
            turns[-1].append(message)
        elif (before in (USER, TOOL) and last == BOT) or (message.role == TOOL and before != BOT):
            expected = "user" if before in (None, SYSTEM) else "bot"
            raise ConversationError(f"message {number}: {message.role} after {before or 'nothing'}; expected "
                                    f"{expected}")
        else:
            turns.append([message])
        if message.role == TOOL and template.tools_block is None:
            raise ConversationError(f"message {number}: the template {template.name} does not support tools; "
                                    f"{_NO_TOOLS}")
    if not turns:
        raise ConversationError("there is no user message in the conversation; it needs one at least")
    ends_with_bot = checked[-1].role == BOT
    if ends_with_bot != (last == BOT):
        raise ConversationError(f"the last message is from {checked[-1].role}; expected "
                                + ("the bot's answer" if last == BOT else "a user's question"))
    if system is not None and not has_system:
        if system_policy == "error":
            raise ConversationError(f"the template {template.name} has no system prompt; "
                                    "leave it out, or choose a system policy other than error")
        if system_policy == "prepend" and system:
            turn = next(turn for turn in turns if turn[0].role != BOT)
            turn[0] = turn[0]._replace(content=f"{system.rstrip()}\n{turn[0].content}")
        system = None
    return Turns(system, turns)


def last_question(turns: List[List[Message]]) -> int:
    """Number of the last turn that begins with a question; those behind it begin with results of tools."""
    return max((number for number, turn in enumerate(turns) if turn[0].role == USER), default=0)
