"""Write the table of recipe keys in docs/recipes.md: what each means, what applies without it, which recipes set it.

    python scripts/recipe_table.py           # print it
    python scripts/recipe_table.py --write   # write it into docs/recipes.md
    python scripts/recipe_table.py --check   # exit code 1 if the document is not current

The values come from the recipes and their bases, the meanings from scripts/recipe_keys.yaml and, for model_config, from
research/telechat/recipe/fields.py. A key without explanation is an error; so is an explanation without key.
"""
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import yaml

from research.telechat.recipe.fields import COMPUTED, FIELDS, GROUPS, LEGACY, RENAMED
from research.telechat.spec.variants import get_variant, variant_fields
from scripts import generated

DOCUMENT = ROOT / "docs/recipes.md"
EXPLANATIONS = ROOT / "scripts/recipe_keys.yaml"
MODEL = "model.model_config"
MOST_NAMES = 3                             # recipes named in a row; more are counted
_BY_NET_NAME = set(variant_fields(get_variant("telechat_12b")))


class Entry(NamedTuple):
    """The explanation of a key. default: as text, '' for none."""

    meaning: str
    default: str
    optional: bool


def shown(value: Any) -> str:
    """A value as a recipe has it."""
    if isinstance(value, float) and value and abs(value) < 1e-3:
        return f"`{value:.1e}`"
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=1000)
    text = text.replace("\n...\n", "").strip()
    text = {"true": "True", "false": "False", "null": "None", "": "''"}.get(text, text)
    return "`" + text.replace("|", "\\|") + "`"


def flat(section: Dict[str, Any], prefix: str = "") -> Iterator[Tuple[str, Any]]:
    """(dotted key, value) of a recipe; callbacks by their type, each also as a key of its own with the value ''."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(entry, dict) and "type" in entry for entry in value):
            for entry in value:
                yield f"{prefix}{key}.{entry['type']}", ""
                yield from flat({name: each for name, each in entry.items() if name != "type"},
                                f"{prefix}{key}.{entry['type']}.")
        else:
            yield prefix + key, value


def used() -> Dict[str, Dict[str, Any]]:
    """{dotted key: {recipe: value}} over all recipes and bases, bases first."""
    keys: Dict[str, Dict[str, Any]] = {}
    for folder in ("configs/telechat", "research/telechat"):
        for path in sorted((ROOT / folder).glob("*.yaml")):
            name = ("bases/" if folder.startswith("configs") else "") + path.stem
            for key, value in flat(yaml.safe_load(path.read_text(encoding="utf-8")) or {}):
                keys.setdefault(key, {})[name] = value
    return keys


def explanations() -> Dict[str, Entry]:
    """{dotted key: explanation}. Raises ValueError naming an entry that is none."""
    found: Dict[str, Entry] = {}

    def walk(section: Dict[str, Any], prefix: str) -> None:
        for key, value in section.items():
            name = prefix[:-1] if key == "self" else prefix + key
            if not isinstance(value, dict):
                raise ValueError(f"{EXPLANATIONS.name}: {name} is {value!r}; expected meaning and default")
            if isinstance(value.get("meaning"), str):
                default = shown(value["default"]) if "default" in value else ""
                found[name] = Entry(value["meaning"], default, bool(value.get("optional")))
            else:
                walk(value, f"{name}.")
    walk(yaml.safe_load(EXPLANATIONS.read_text(encoding="utf-8")), "")
    for group in GROUPS.values():
        for key, field in group.items():
            default = "by `net_name`" if key in _BY_NET_NAME else shown(field.default)
            doc = f"dtype: {field.doc}" if field.kind == "dtype" else field.doc
            found[f"{MODEL}.{key}"] = Entry(doc, default, True)
    return found


def faults(keys: Dict[str, Dict[str, Any]], entries: Dict[str, Entry]) -> List[str]:
    """Keys without explanation and explanations without key, one line each."""
    lines = [f"{key}, set by {', '.join(keys[key])}, is not explained: add it to scripts/{EXPLANATIONS.name}"
             + (", or to FIELDS in recipe/fields.py" if key.startswith(MODEL) else "")
             for key in keys if key not in entries]
    return lines + [f"{key} is explained in scripts/{EXPLANATIONS.name}, but no recipe sets it: remove it there, or "
                    "mark it as optional" for key, entry in entries.items() if key not in keys and not entry.optional]


def setters(values: Dict[str, Any]) -> str:
    """Who sets a key, and to what: bases with their values, recipes by value."""
    by_value: Dict[str, List[str]] = {}
    for name, value in values.items():
        if "/" not in name:
            by_value.setdefault(shown(value) if value != "" else "", []).append(name)
    count = sum(map(len, by_value.values()))
    texts = [f"{name.partition('/')[2]} {shown(value) if value != '' else ''}"
             for name, value in values.items() if "/" in name]
    if count <= MOST_NAMES:
        texts += [f"{', '.join(names)} {value}" for value, names in by_value.items()]
    else:
        texts.append(f"{count} recipes " + (", ".join(sorted(by_value)) if len(by_value) <= MOST_NAMES else ""))
    return "; ".join(text.strip() for text in texts)


def sections(entries: Dict[str, Entry]) -> Dict[str, List[str]]:
    """{title: its keys}, in the order of the explanations; model_config by the groups of its fields."""
    found: Dict[str, List[str]] = {}
    for key in entries:
        if key.partition(f"{MODEL}.")[2] in FIELDS:
            continue
        title = next((name for name in (f"{MODEL}.pet_config", MODEL) if key.startswith(f"{name}.")),
                     key.split(".")[0] if "." in key else "top level")
        found.setdefault(title, []).append(key)
        if title == MODEL:
            found.update({f"{MODEL}: {name}": [f"{MODEL}.{field}" for field in group]
                          for name, group in GROUPS.items()})
    return found


def table() -> str:
    """The generated part of the document. Raises ValueError naming keys without explanation and the reverse."""
    keys, entries = used(), explanations()
    lines = faults(keys, entries)
    if lines:
        raise ValueError("; ".join(lines))
    parts = ["| key | meaning | default | set by |", "|---|---|---|---|"]
    for title, names in sections(entries).items():
        parts.append(f"| **{title}** | | | |")
        prefix = "" if title == "top level" else f"{title.split(':')[0]}."
        for key in names:
            entry = entries[key]
            cells = (f"`{key[len(prefix):]}`", entry.meaning, entry.default, setters(keys.get(key, {})))
            parts.append(f"| {' | '.join(cells)} |".replace("  ", " "))
    return "\n".join([*parts, "", "## Keys of earlier recipes in `model_config`", "", *_earlier()])


def _earlier() -> List[str]:
    rows = [f"| `{old}` | earlier name of `{new}` |" for old, new in RENAMED.items()]
    rows += [f"| `{old}` | `{new}` is computed from it |" for old, new in COMPUTED.items()]
    rows += [f"| `{old}` | no effect: {why} |" for old, why in LEGACY.items()]
    return ["| key | today |", "|---|---|", *rows]


if __name__ == "__main__":
    sys.exit(generated.run("recipe_table.py", DOCUMENT, table, "the table of recipe keys"))
