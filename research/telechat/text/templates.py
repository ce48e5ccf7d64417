"""The table of chat templates: how each family of TeleChat writes a conversation. Data only, no rendering.

`Variant.chat_template` (spec/variants.py) names the template of a model, and so does a recipe's `chat_template`; where
neither is known, the family is detected from the vocabulary.

TeleChat2 has two forms. `telechat2` is the Jinja template that its tokenizers since November 2024 carry: a system
prompt always, followed by one line end. `telechat2_start` is how the code of the first 115B writes prompts:
`<_start><_user>question<_bot>`, without a system prompt and without line ends. `telechat2_before` is what this
plugin's first versions did, for weights fine-tuned with them: the second form in prompts, and in training always a
system prompt, with two line ends.
"""
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, Mapping, Optional, Protocol, Tuple, Union

from research.telechat.common.errors import ConfigError


class HasMarkers(Protocol):
    """What the choice of a template asks of a vocabulary (text/vocab.py)."""

    @property
    def path(self) -> Union[str, Path]: ...

    @property
    def markers(self) -> Mapping[str, int]: ...


@dataclass(frozen=True)
class Template:
    """How one family writes conversations. A tuple of pieces means: the first of them that the vocabulary has.

    Texts of a template may hold <tool_call> and its like: they are single tokens where the vocabulary has such markers.
    """

    name: str
    user: str = "<_user>"
    bot: str = "<_bot>"
    end: Tuple[str, ...] = ("<_end>", "</s>")
    pad: Tuple[str, ...] = ("<_pad>", "<pad>")
    system: Optional[str] = None             # None: the weights know no system prompt
    text_end: Optional[str] = None           # markers are ordinary text; this one separates turns, `end` is last
    separator: str = ""                      # text between turns
    system_end: str = ""                     # text that ends a system prompt without tools, encoded with it
    system_separator: bool = True            # the separator also follows the system prompt, encoded separately
    default_system: Optional[str] = None     # where a conversation brings no system prompt ...
    default_for: str = "tools"               # ... "always", in "training" and with tools, or with "tools" only
    tools_block: Optional[str] = None        # appended to the system prompt; None: the weights know no tools
    call_separator: str = "\n"               # between the text of an answer and its first tool call
    prompt_start: Optional[str] = None       # in front without system prompt; no separators then
    think_start: Optional[str] = None        # opens every answer, behind the bot marker; None: the weights do not think
    think_end: str = "\n</think>\n\n"        # between the reasoning and the answer
    think_first: str = ""                    # what the model itself writes in front of its reasoning
    keeps_reasoning: bool = False            # a prompt has the reasoning since the last question, between tool calls
    answer_start: str = ""                   # in front of an answer whose reasoning is left out
    bare_system: bool = False                # without a system prompt, its marker is written alone
    observation: Optional[str] = None        # marker in front of results of tools; None: that of the user
    call_form: str = "json"                  # or "parameters", see text/calls.py
    padding_side: str = "left"               # as the family's official training code pads
    needs: Tuple[str, ...] = ()              # pieces by which a vocabulary is recognised as this family's
    needs_settings: bool = False             # and its tokenizer_config.json, which has no tool markers


# The wording belongs to the format: the weights have been trained with exactly these texts.
_TELECHAT2_SYSTEM = (
    "你是中国电信星辰语义大模型，英文名是TeleChat，你是由中电信人工智能科技有限公司和"
    "中国电信人工智能研究院（TeleAI）研发的人工智能助手。")
_TELECHAT2_TOOLS = (
    "\n\n# 可用工具\n"
    "你可以调用<tools></tools>标签中包含的一个或多个工具来辅助你回答问题,以下是可用工具详情：\n"
    "<tools>\n{tools}\n</tools>\n\n"
    "# 调用方法\n"
    "你需要遵循工具的要求，使用json格式返回工具名称及参数，并用<tool_call></tool_call>包含。下方是一个调用模板：\n"
    '<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>\n\n')
_TELECHAT2_MARKERS = ("<_user>", "<_bot>", "<_system>", "<_observation>")
TOOL_MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
THINK_MARKERS = ("<think>", "</think>")

_TELECHAT2 = Template("telechat2", system="<_system>", separator="\n", system_end="\n", system_separator=False,
                      default_system=_TELECHAT2_SYSTEM, default_for="always", tools_block=_TELECHAT2_TOOLS,
                      call_separator="", padding_side="right", needs=_TELECHAT2_MARKERS)
_START = replace(_TELECHAT2, name="telechat2_start", system_end="", system_separator=True, default_for="tools",
                 call_separator="\n", prompt_start="<_start>", needs_settings=True)

_CODER_TOOLS = (
    "\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{tools}\n</tools>\n\n"
    "For each function call, output the function name and arguments within the following XML format:\n"
    "<tool_call>{{function-name}}<param_key>{{param-key-1}}</param_key><param_value>{{param-value-1}}</param_value>"
    "<param_key>{{param-key-2}}</param_key><param_value>{{param-value-2}}</param_value>...</tool_call>")
_TELECHAT3 = replace(_TELECHAT2, name="telechat3", default_system="", default_for="tools", bare_system=True,
                     think_start="<think>\n", needs=())

# The order matters for `detect_template`: the first one whose needs a vocabulary meets.
TEMPLATES: Dict[str, Template] = {template.name: template for template in (
    _START,
    _TELECHAT2,
    Template("telechat", needs=("<_user>", "<_bot>")),
    Template("telechat_52b", end=("</s>",), text_end="<_end>", needs=("</s>",)),
    # The rest can only be distinguished by the model's name.
    Template("telechat_system", system="<_system>"),
    replace(_TELECHAT2, name="telechat2_think", think_start="<think>\n", needs=()),
    _TELECHAT3,
    replace(_TELECHAT3, name="telechat3_coder", separator="", system_end="", tools_block=_CODER_TOOLS,
            think_start="<think>", think_first="\n", think_end="\n</think>", answer_start="</think>",
            keeps_reasoning=True, observation="<_observation>", call_form="parameters"),
    replace(_START, name="telechat2_before", default_system=_TELECHAT2_SYSTEM + "\n", default_for="training", needs=(),
            needs_settings=False),
)}


def get_template(name: str) -> Template:
    """The template called `name` (`Variant.chat_template` names it); ConfigError lists the known ones."""
    if name not in TEMPLATES:
        raise ConfigError(f"chat template {name!r} is unknown; expected one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def detect_template(vocab: HasMarkers) -> Template:
    """The template that fits a vocabulary, by the markers it has. Raises ConfigError where none does, or several do."""
    if all(piece in vocab.markers for piece in THINK_MARKERS):
        raise ConfigError(f"vocabulary {vocab.path} is TeleChat3's, whose models do not all write conversations alike; "
                          "name the model (--model_name, net_name) or the template (telechat3, telechat3_coder)")
    plain = bool(getattr(vocab, "settings", None)) and TOOL_MARKERS[0] not in vocab.markers
    for template in TEMPLATES.values():
        if template.needs and all(piece in vocab.markers for piece in template.needs) and (
                plain or not template.needs_settings):
            return template
    raise ConfigError(f"vocabulary {vocab.path} has the markers of no TeleChat family; name the template "
                      f"({', '.join(TEMPLATES)})")


def choose_template(vocab: HasMarkers, name: Optional[str] = None) -> Template:
    """The template called `name`; without a name the one detected from `vocab`. Raises ConfigError."""
    return get_template(name) if name else detect_template(vocab)
