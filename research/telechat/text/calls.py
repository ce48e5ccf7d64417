"""How tool calls and results of tools are written: as JSON (TeleChat2, TeleChat3), or parameter by parameter (Coder).

Parts are texts and whether each is a marker, as text/renderer.py encodes them. Formats of Coder, whose results follow a
marker of their own and one another without line ends:

    <tool_call>NAME<param_key>KEY</param_key><param_value>VALUE</param_value>...</tool_call>
    <_observation><tool_response>RESULT</tool_response>...
"""
import json
import re
from typing import Dict, Iterator, List, Optional, Sequence

from research.telechat.common.files import JsonObject
from research.telechat.text.messages import Message, Parts, Tools, content_parts, json_text

JSON, PARAMETERS = "json", "parameters"
_NAME = re.compile(r"[\w.:/-]+")
_PAIR = re.compile(r"<param_key>(.*?)</param_key>\s*<param_value>(.*?)</param_value>", re.DOTALL)


def call_parts(calls: Sequence[str], form: str) -> Parts:
    """Calls, given as JSON texts with name and arguments, without anything in front of the first."""
    parts: Parts = []
    for number, call in enumerate(calls):
        parts += [("\n" if number and form == JSON else "", False), ("<tool_call>", True),
                  (f"\n{call}\n" if form == JSON else _parameters(call), False), ("</tool_call>", True)]
    return parts


def answer_parts(message: Message, separator: str = "\n", blocks: bool = False, form: str = JSON) -> Parts:
    """A bot's message: its content, then its tool calls.

    separator: between content and the first call. blocks: see `content_parts`.
    """
    if not message.calls and not blocks:
        return [(message.content, False)]
    between: Parts = [(separator, False)] if message.content and message.calls else []
    return [*content_parts(message, blocks), *between, *call_parts(message.calls, form)]


def answer_text(message: Message, separator: str = "\n") -> str:
    """A bot's message as the text that it is trained on: its content, then its tool calls."""
    return "".join(text for text, _ in answer_parts(message, separator))


def _parameters(call: str) -> str:
    """Text as it is, anything else as JSON."""
    read = json.loads(call)
    pairs = [(key, value if isinstance(value, str) else json_text(value)) for key, value in read["arguments"].items()]
    return "".join([str(read["name"]), *(f"<param_key>{key}</param_key><param_value>{value}</param_value>"
                                         for key, value in pairs)])


def result_parts(results: Sequence[Message], form: str) -> Parts:
    """The results of one round of calls."""
    line, parts = "\n" if form == JSON else "", []
    for number, message in enumerate(results):
        parts += [(line if number else "", False), ("<tool_response>", True), (f"{line}{message.content}{line}", False),
                  ("</tool_response>", True)]
    return parts


def read_parameters(body: str, tools: Tools = None) -> Optional[JsonObject]:
    """Name and arguments of a call in Coder's form, from the text between its markers; None if it is not a call.

    A call without parameters is one only where `tools` have its name. A value is a text where `tools` say that its
    parameter is of type string, else JSON where it can be read so.
    """
    name, found, rest = body.partition("<param_key>")
    name = name.strip()
    known = bool(found) or any(tool.get("name") == name for tool in _functions(tools))
    if not _NAME.fullmatch(name) or not known or _PAIR.sub("", found + rest).strip():
        return None
    texts = _string_parameters(name, tools)
    arguments: Dict[str, object] = {}
    for key, value in _PAIR.findall(body):
        key = key.strip()
        try:
            arguments[key] = value if key in texts else json.loads(value)
        except (ValueError, RecursionError):
            arguments[key] = value
    return {"name": name, "arguments": arguments}


def _string_parameters(name: str, tools: Tools) -> List[str]:
    """Parameters of the tool `name` that are of type string."""
    return [key for tool in _functions(tools) if tool.get("name") == name
            for key, schema in _section(_section(tool, "parameters"), "properties").items()
            if isinstance(schema, dict) and schema.get("type") == "string"]


def _functions(tools: Tools) -> Iterator[JsonObject]:
    for tool in [] if tools is None or isinstance(tools, str) else tools:
        yield tool["function"] if isinstance(tool.get("function"), dict) else tool


def _section(value: JsonObject, key: str) -> JsonObject:
    found = value.get(key)
    return found if isinstance(found, dict) else {}
