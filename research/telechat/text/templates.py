"""The table of chat templates: how each family of TeleChat writes a conversation. Data only, no rendering.

`Variant.chat_template` (spec/variants.py) names the template of a model; where no model is named, the markers in its
vocabulary tell the family.
"""
from dataclasses import dataclass
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
    """How one family writes conversations. A tuple of pieces means: the first of them that the vocabulary has."""

    name: str
    user: str = "<_user>"
    bot: str = "<_bot>"
    end: Tuple[str, ...] = ("<_end>", "</s>")
    pad: Tuple[str, ...] = ("<_pad>", "<pad>")
    system: Optional[str] = None             # None: the weights know no system prompt
    text_end: Optional[str] = None           # markers are ordinary text; this one stands between turns, `end` is last
    separator: str = ""                      # text after the system prompt and between turns
    default_system: Optional[str] = None     # in training, where a conversation brings no system prompt
    tools_block: Optional[str] = None        # appended to the system prompt; None: the weights know no tools
    prompt_start: Optional[str] = None       # in front of a prompt without system prompt, which has no separators then
    padding_side: str = "left"               # as the family's official training code pads
    needs: Tuple[str, ...] = ()              # pieces by which a vocabulary is recognised as this family's


# The wording belongs to the format: the weights have been trained with exactly these texts.
_TELECHAT2_SYSTEM = (
    "你是中国电信星辰语义大模型，英文名是TeleChat，你是由中电信人工智能科技有限公司和"
    "中国电信人工智能研究院（TeleAI）研发的人工智能助手。\n")
_TELECHAT2_TOOLS = (
    "\n\n# 可用工具\n"
    "你可以调用<tools></tools>标签中包含的一个或多个工具来辅助你回答问题,以下是可用工具详情：\n"
    "<tools>\n{tools}\n</tools>\n\n"
    "# 调用方法\n"
    "你需要遵循工具的要求，使用json格式返回工具名称及参数，并用<tool_call></tool_call>包含。下方是一个调用模板：\n"
    '<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>\n\n')

# The order matters for `detect_template`: the first one whose needs a vocabulary meets.
TEMPLATES: Dict[str, Template] = {template.name: template for template in (
    Template("telechat2", system="<_system>", separator="\n", default_system=_TELECHAT2_SYSTEM,
             tools_block=_TELECHAT2_TOOLS, prompt_start="<_start>", padding_side="right",
             needs=("<_user>", "<_bot>", "<_system>", "<_observation>")),
    Template("telechat", needs=("<_user>", "<_bot>")),
    Template("telechat_52b", end=("</s>",), text_end="<_end>", needs=("</s>",)),
)}


def get_template(name: str) -> Template:
    """The template called `name` (`Variant.chat_template` names it); ConfigError lists the known ones."""
    if name not in TEMPLATES:
        raise ConfigError(f"chat template {name!r} is unknown; known are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def detect_template(vocab: HasMarkers) -> Template:
    """The template that fits a vocabulary, by the markers it has. Raises ConfigError where none does."""
    for template in TEMPLATES.values():
        if all(piece in vocab.markers for piece in template.needs):
            return template
    raise ConfigError(f"vocabulary {vocab.path} has the markers of no TeleChat family; name the template "
                      f"({', '.join(TEMPLATES)})")
