"""Reading a recipe and the options that change it. Pure Python: typos are reported before MindSpore is imported.

recipe/settings.py and MindFormers define the keys; run/job.py acts on them.
"""
import copy
import difflib
from pathlib import Path
from typing import Any, Iterator, List

import yaml

from research.telechat.common.environment import PLUGIN, ROOT
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.recipe.entries import check_entries
from research.telechat.recipe.values import conform, load

BASES = "configs/telechat"                 # below ROOT; in a wheel they are in the plugin's folder `base` (setup.py)


def parse_value(text: str) -> object:
    """A value from the command line, read as YAML: numbers, True, False, lists; anything else is text."""
    try:
        return load(text)
    except (yaml.YAMLError, ValueError, RecursionError):      # ValueError: a date that does not exist
        return text


def resolve_config(name: str) -> Path:
    """The recipe `name`: a path from here, the repository, its folder research or the plugin's.

    So a file name is enough for the plugin's own recipes. Raises ConfigError.
    """
    folders = list(dict.fromkeys((Path.cwd(), ROOT, PLUGIN.parent, PLUGIN)))
    for folder in folders:
        path = folder / name
        if path.is_file():
            return path.resolve()
    recipes = [path.name for path in sorted(PLUGIN.glob("*.yaml"))]
    near = difflib.get_close_matches(Path(name).name, recipes, n=1)
    raise ConfigError(f"--config: {name} does not exist (looked in {', '.join(map(str, folders))}); "
                      + (f"did you mean research/telechat/{near[0]}?" if near else "recipes are in research/telechat"))


def find_base(recipe: Path, base: str) -> Path:
    """The file that `recipe` names as `base_config`, a path from the recipe's folder.

    Where there is no `.../configs/telechat/NAME` (a wheel, a recipe copied elsewhere), the plugin's own NAME is taken.
    Raises ConfigError.
    """
    path = (recipe.parent / base).resolve()
    places = [path]
    if path.parent.as_posix().endswith("/" + BASES):
        places += [ROOT / BASES / path.name, PLUGIN / "base" / path.name]
    for place in places:
        if place.is_file():
            return place
    raise ConfigError(f"recipe {recipe}: base_config {base} does not exist (looked for "
                      f"{' and '.join(dict.fromkeys(map(str, places)))})")


def merge(base: dict, over: dict, at: str = "") -> dict:
    """`base` with the keys of `over`: sections merge key by key, everything else is replaced.

    at: dotted name of the section, with its dot. Raises ConfigError: text where `base` has a number.
    """
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        name = f"{at}{key}"
        merged[key] = merge(merged[key], value, name + ".") if both else conform(value, merged.get(key), name)
    return merged


def read_recipe(path: Path, above: tuple = ()) -> dict:
    """A recipe merged over the recipes it names as `base_config`, later ones over earlier ones.

    ConfigError names the file and the place.
    """
    if path in above:
        raise ConfigError(f"recipe {path} inherits itself: {' -> '.join(file.name for file in (*above, path))}")
    try:
        recipe = load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"recipe {path} cannot be read: {err}") from err
    except (yaml.YAMLError, ValueError, RecursionError) as err:
        raise ConfigError(f"recipe {path} is not valid YAML: {' '.join(str(err).split())}") from err
    if not isinstance(recipe, dict):
        raise ConfigError(f"recipe {path} must hold keys and values, found {type(recipe).__name__}")
    bases = recipe.pop("base_config", None) or []
    merged: dict = {}
    for base in bases if isinstance(bases, list) else [bases]:
        merged = merge(merged, read_recipe(find_base(path, str(base)), (*above, path)))
    try:
        return merge(merged, recipe)
    except ConfigError as err:
        raise ConfigError(f"recipe {path}: {err}") from err


def recipe_files(path: Path) -> List[Path]:
    """A recipe and all that it inherits, resolved. Raises ConfigError as `read_recipe` does."""
    read_recipe(path)
    bases = load(path.read_text(encoding="utf-8")).get("base_config") or []
    found = [path.resolve()]
    for base in bases if isinstance(bases, list) else [bases]:
        found += recipe_files(find_base(path, str(base)))
    return found


def parse_overrides(options: List[str], rest: List[str]) -> JsonObject:
    """{dotted key: value} from `--options a.b=c` and from `--a.b c` or `--a.b=c`; the last of equal keys counts."""
    overrides: JsonObject = {}

    def put(key: str, text: str) -> None:
        overrides.pop(key, None)                          # the order is that of the last mention
        overrides[key] = parse_value(text)

    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(f"--options: expected KEY=VALUE, found {option!r}")
        put(key, value)
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"unexpected word {word!r} on the command line; keys of the recipe start with --")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise ConfigError(f"option --{key} needs a value")
            value = words.pop(0)
        put(key, value)
    return overrides


def section(recipe: JsonObject, *names: str) -> JsonObject:
    """The section `a.b` of a recipe; an empty one, not connected to the recipe, where there is none."""
    for name in names:
        below = recipe.get(name)
        if not isinstance(below, dict):
            return {}
        recipe = below
    return recipe


def set_key(config: JsonObject, dotted: str, value: object) -> None:
    """Set `a.b.c`; an entry of a list is named by its number, from 0 on, or by its `type`.

    Raises:
        ConfigError: a section or an entry that the recipe lacks, a key without the section in which it is read, or text
            where the recipe has a number.
    """
    *sections, key = dotted.split(".")
    places = [] if sections or key in config else list(_places(config, key))
    if places:
        raise ConfigError(f"--{key}: the recipe has this key in a section; write --{' or --'.join(places)}")
    place: Any = config
    for depth, name in enumerate(sections):
        below = place[_entry(place, name, sections[:depth], dotted)] if isinstance(place, list) else place.get(name)
        if not isinstance(below, (dict, list)):
            near = difflib.get_close_matches(name, [key for key in place if key != name], n=1)
            known = ", ".join(key for key, entry in place.items() if isinstance(entry, (dict, list)))
            raise ConfigError(f"--{dotted}: the recipe has no section {'.'.join(sections[:depth + 1])!r}; "
                              + (f"did you mean {near[0]!r}?" if near else f"sections there are: {known or 'none'}"))
        place = below
    if isinstance(place, list):
        number = _entry(place, key, sections, dotted)
        if isinstance(place[number], dict) and not isinstance(value, dict):
            raise ConfigError(f"--{dotted}: expected one of its keys, such as --{dotted}."
                              f"{next(iter(place[number]), 'type')}, or a whole entry, found {value!r}")
        place[number] = value
    elif _sections(place.get(key)) and value is not None and not (value == [] or _sections(value)):
        raise ConfigError(f"--{dotted}: it is a list of sections, found {value!r}; set a key of one entry, such as "
                          f"--{dotted}.0.{next(iter(place[key][0]), 'type')}")
    else:
        place[key] = conform(value, place.get(key), f"--{dotted}")


def _sections(value: object) -> bool:
    """Whether it is a list of sections, such as callbacks."""
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)


def check_overrides(recipe: JsonObject, overrides: JsonObject) -> None:
    """What `set_key` says of {dotted key: value}, and `check_entries` of the recipe with them, before anything slow is
    imported. The recipe is not changed."""
    recipe = copy.deepcopy(recipe)
    for dotted, value in overrides.items():
        set_key(recipe, dotted, value)
    check_entries(recipe)


def _entry(entries: List[object], name: str, sections: List[str], dotted: str) -> int:
    """The index of the entry that `name` names in the list below `sections`. Raises ConfigError."""
    kinds = [entry.get("type") if isinstance(entry, dict) else None for entry in entries]
    if name.isdecimal() and int(name) < len(entries):
        return int(name)
    if kinds.count(name) == 1:
        return kinds.index(name)
    listed = ", ".join(f"{number} {kind}" if kind else str(number) for number, kind in enumerate(kinds))
    raise ConfigError(f"--{dotted}: {'.'.join(sections)} is a list; name one of its entries by its number or type "
                      f"({listed or 'it is empty'}), not {name!r}")


def _places(section: JsonObject, key: str) -> Iterator[str]:
    """Dotted names under which a section and those within it have `key`."""
    for name, entry in section.items():
        if name == key:
            yield name
        elif isinstance(entry, dict):
            yield from (f"{name}.{place}" for place in _places(entry, key))
