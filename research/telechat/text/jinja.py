"""A family's way of writing conversations as a chat template in Jinja, for transformers, vLLM and others.

Generated from the `Template` of text/templates.py. With add_generation_prompt it writes what `Renderer.prompt` does,
without it what `Renderer.render` does for training. A reader of the template has text only, so that a marker which
somebody typed becomes the marker there; nothing else differs.

Where the renderer encodes a text on its own, SentencePiece adds its dummy prefix. Between two markers the text of a
Jinja template is encoded as one, so that the prefix is written out there, as a blank.
"""
from typing import List, Optional

from research.telechat.text.calls import JSON
from research.telechat.text.renderer import Renderer
from research.telechat.text.templates import Template

_SYSTEM, _USER, _BOT, _TOOL = ("['system', 'developer']", "['user', 'human']", "['assistant', 'bot', 'gpt']",
                               "['tool', 'observation', 'function']")
_TEXT = ("{%- macro text(content) -%}", "{%- if content is string -%}{{- content -}}",
         "{%- elif content -%}{%- for part in content -%}{{- part.text -}}{%- endfor -%}", "{%- endif -%}",
         "{%- endmacro -%}")


def chat_template(renderer: Renderer) -> str:
    """The Jinja template of a renderer's family and markers."""
    return "\n".join([*_TEXT, *(_in_words(renderer) if renderer.as_text else _with_markers(renderer))])


def _quoted(text: str) -> str:
    """A literal of Jinja."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t") + "'"


def _piece(renderer: Renderer, token_id: Optional[int]) -> str:
    """A marker as the vocabulary writes it; nothing where there is none."""
    return "" if token_id is None else renderer.vocab.id_to_token(token_id)


def _prefix(renderer: Renderer) -> str:
    """The dummy prefix, as text: a blank, or nothing."""
    first, *rest = renderer.vocab.encode("\n")
    return " " if rest and renderer.vocab.id_to_token(first) == "\u2581" else ""


def _with_markers(renderer: Renderer) -> List[str]:
    template = renderer.template
    user, bot, end = (_piece(renderer, token) for token in (renderer.user_id, renderer.bot_id, renderer.end_id))
    think, line = template.think_start, "\n" if template.call_form == JSON else ""
    lines = ["{%- set ns = namespace(system=none, separator=" + _quoted(template.separator) + ", turns=0, last=0) -%}"]
    if template.keeps_reasoning:
        lines.append(f"{{%- for message in messages -%}}{{%- if message.role in {_USER} -%}}"
                     "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}")
    if renderer.start_id is not None:
        lines.append("{{- " + _quoted(_piece(renderer, renderer.start_id)) + " -}}")
    lines += _head(renderer) if template.system else _no_system(template)
    if template.tools_block is not None:
        lines += _answer_with_calls(template)
    bot_text = "answer(message, content)" if template.tools_block is not None else "content"
    turn = "{%- if ns.turns -%}{{- ns.separator -}}{%- endif -%}{%- set ns.turns = ns.turns + 1 -%}"
    lines += ["{%- for message in messages -%}",
              f"{{%- if message.role in {_SYSTEM} -%}}",
              "{%- if not loop.first -%}{{- raise_exception('a system prompt must be the first message') -}}"
              "{%- endif -%}",
              f"{{%- elif message.role in {_USER} -%}}", turn,
              "{{- " + _quoted(user) + " + text(message.content) -}}"]
    if template.tools_block is not None:
        lines += [f"{{%- elif message.role in {_TOOL} -%}}",
                  f"{{%- if loop.previtem is defined and loop.previtem.role in {_TOOL} -%}}{{{{- {_quoted(line)} -}}}}",
                  "{%- else -%}" + turn + "{{- " + _quoted(template.observation or user) + " -}}{%- endif -%}",
                  "{{- " + _quoted(f"<tool_response>{line}") + " + text(message.content) + "
                  + _quoted(f"{line}</tool_response>") + " -}}"]
    lines.append(f"{{%- elif message.role in {_BOT} -%}}")
    lines.append("{{- " + _quoted(bot) + " -}}{%- set content = text(message.content) -%}")
    if think is not None:
        kept = " or (reasoning and loop.index0 > ns.last)" if template.keeps_reasoning else ""
        lines += ["{%- set reasoning = (message.reasoning_content or message.reasoning or '').strip('\\n') -%}",
                  *_divided(),
                  f"{{%- if loop.last{kept} -%}}" + "{{- " + _quoted(think + template.think_first) + " + reasoning + "
                  + _quoted(template.think_end) + " -}}{%- else -%}{{- " + _quoted(template.answer_start)
                  + " -}}{%- endif -%}"]
    lines += ["{{- " + bot_text + " + " + _quoted(end) + " -}}",
              "{%- else -%}{{- raise_exception('role ' + message.role + ' is not supported by this template') -}}",
              "{%- endif -%}", "{%- endfor -%}",
              "{%- if add_generation_prompt -%}{{- " + _quoted(bot + (think or "")) + " -}}{%- endif -%}"]
    return lines


def _divided() -> List[str]:
    """Reasoning that the content brings, set apart as by text/messages.py."""
    return ["{%- if not reasoning and '</think>' in content -%}",
            "{%- set before = content.split('</think>')[0] -%}{%- set thought = before.lstrip() -%}",
            "{%- set thought = thought[7:] if thought.startswith('<think>') else before -%}",
            "{%- if '<think>' not in thought -%}{%- set reasoning = thought.strip('\\n') -%}",
            "{%- set content = content[(before | length) + 8:].lstrip('\\n') -%}{%- endif -%}", "{%- endif -%}"]


def _no_system(template: Template) -> List[str]:
    """A family without system prompt: it is left out, as by the official chat code; tools are refused."""
    if template.tools_block is not None:
        return []
    return ["{%- if tools -%}{{- raise_exception('this model does not support tools') -}}{%- endif -%}"]


def _head(renderer: Renderer) -> List[str]:
    """What precedes the turns: the system prompt with the tools, or a start marker."""
    template = renderer.template
    condition = {"always": "true", "tools": "tools", "training": "tools or not add_generation_prompt"}[
        template.default_for]
    lines = [f"{{%- if messages and messages[0].role in {_SYSTEM} -%}}"
             "{%- set ns.system = text(messages[0].content) -%}"]
    if template.default_system is not None:
        lines.append(f"{{%- elif {condition} -%}}{{%- set ns.system = " + _quoted(template.default_system) + " -%}")
    lines += ["{%- endif -%}", "{%- if ns.system is not none -%}", "{{- " + _quoted(template.system or "") + " -}}"]
    system_end = _quoted(template.system_end)
    if template.tools_block is not None:
        before, after = (part.format() for part in template.tools_block.split("{tools}"))
        whole = template.default_for == "always" or template.bare_system
        stripped = "ns.system" if whole else "ns.system.rstrip('\\n')"
        lines += ["{%- if '<tools>\\n' in ns.system and '\\n</tools>' in ns.system -%}{{- ns.system -}}",
                  "{%- elif tools -%}{{- " + stripped + " + " + _quoted(before) + " -}}",
                  "{%- for tool in tools -%}{{- ('' if loop.first else '\\n') + (tool | tojson) -}}{%- endfor -%}",
                  "{{- " + _quoted(after) + " -}}",
                  "{%- else -%}{{- ns.system + " + system_end + " -}}{%- endif -%}"]
    else:
        lines.append("{{- ns.system + " + system_end + " -}}")
        lines += _no_system(template)
    if template.system_separator and template.separator:
        lines.append("{{- " + _quoted(_prefix(renderer) + template.separator) + " -}}")
    if template.bare_system:
        lines.append("{%- else -%}{{- " + _quoted(template.system or "") + " -}}")
    elif template.prompt_start:
        start = "" if renderer.start_id is not None else "{{- " + _quoted(template.prompt_start) + " -}}"
        lines.append("{%- else -%}" + start + "{%- set ns.separator = '' -%}")
    return [*lines, "{%- endif -%}"]


def _answer_with_calls(template: Template) -> List[str]:
    """The macro that writes an answer: its content, then its tool calls."""
    separator = _quoted(template.call_separator)
    head = ["{%- macro answer(message, content) -%}", "{{- content -}}",
            "{%- for item in message.tool_calls or [] -%}",
            "{%- set call = item.function if item.function is defined else item -%}"]
    if template.call_form != JSON:
        return [*head, "{{- '<tool_call>' + call.name -}}",
                "{%- if call.arguments is string -%}{{- raise_exception('arguments of a tool call must be an object, "
                "not a text') -}}{%- endif -%}",
                "{%- for key, value in (call.arguments or {}).items() -%}{{- '<param_key>' + key + '</param_key>"
                "<param_value>' + (value if value is string else value | tojson) + '</param_value>' -}}{%- endfor -%}",
                "{{- '</tool_call>' -}}", "{%- endfor -%}", "{%- endmacro -%}"]
    return [*head,
            "{%- set arguments = call.arguments if call.arguments is defined and call.arguments else '{}' -%}",
            "{%- if not loop.first -%}{{- '\\n' -}}{%- elif content -%}{{- " + separator + " -}}{%- endif -%}",
            "{{- '<tool_call>\\n{\"name\": ' + (call.name | tojson) + ', \"arguments\": ' + "
            "(arguments.strip() if arguments is string else arguments | tojson) + '}\\n</tool_call>' -}}",
            "{%- endfor -%}", "{%- endmacro -%}"]


def _in_words(renderer: Renderer) -> List[str]:
    """A family whose markers are ordinary text: a prompt is one text; in training question and answer are two."""
    template = renderer.template
    user, bot, end = (_quoted(text) for text in (template.user, template.bot, _piece(renderer, renderer.end_id)))
    blank = _quoted(_prefix(renderer))
    return [*_no_system(template),
            "{%- set ns = namespace(turns=0) -%}", "{%- set blank = '' if add_generation_prompt else " + blank + " -%}",
            "{%- for message in messages -%}",
            f"{{%- if message.role in {_USER} -%}}",
            "{{- (blank if ns.turns else '') + " + user + " + text(message.content) + " + bot + " -}}",
            "{%- set ns.turns = ns.turns + 1 -%}",
            f"{{%- elif message.role in {_BOT} -%}}",
            "{{- (blank if message.content or not loop.last else '') + text(message.content) -}}",
            "{{- " + end + " if loop.last and not add_generation_prompt else " + _quoted(template.text_end or "")
            + " -}}",
            f"{{%- elif message.role not in {_SYSTEM} -%}}",
            "{{- raise_exception('role ' + message.role + ' is not supported by this template') -}}",
            "{%- endif -%}", "{%- endfor -%}"]
