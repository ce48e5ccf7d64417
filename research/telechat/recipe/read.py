"""Reading a recipe and the options that change it. Pure Python: a slip is answered before MindSpore is imported.

What the keys mean is recipe/settings.py's and MindFormers' matter; what is done with a recipe, run/job.py's.
"""
import difflib
from pathlib import Path
from typing import Any, Iterator, List

import yaml

from research.telechat.common.environment import PLUGIN, ROOT
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject

BASES = "configs/telechat"                 # below ROOT; in a wheel they are in the plugin's folder `base` (setup.py)


def parse_value(text: str) -> Any:
    """A value from the command line, read as YAML: numbers, True, False, lists; anything else is text."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):      # ValueError: a date that does not exist
        return text
    if isinstance(value, str):
        try:
            return float(value)          # YAML 1.1 reads 1e-5 as text
        except ValueError:
            return value
    return value


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


def merge(base: dict, over: dict) -> dict:
    """`base` with the keys of `over`: sections merge key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def read_recipe(path: Path, above: tuple = ()) -> dict:
    """A recipe merged over the recipes it names as `base_config`, later ones over earlier ones.

    ConfigError says which file is at fault, and where.
    """
    if path in above:
        raise ConfigError(f"recipe {path} inherits itself: {' -> '.join(file.name for file in (*above, path))}")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
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
    return merge(merged, recipe)


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
    """Set `a.b.c`. ConfigError: a section that the recipe lacks, or a key without the section in which it is read."""
    *sections, key = dotted.split(".")
    places = [] if sections or key in config else list(_places(config, key))
    if places:
        raise ConfigError(f"--{key}: the recipe has this key in a section; write --{' or --'.join(places)}")
    for depth, section in enumerate(sections):
        if not isinstance(config.get(section), dict):
            near = difflib.get_close_matches(section, list(config), n=1)
            known = ", ".join(key for key, entry in config.items() if isinstance(entry, dict))
            raise ConfigError(f"--{dotted}: the recipe has no section {'.'.join(sections[:depth + 1])!r}; "
                              + (f"did you mean {near[0]!r}?" if near else f"sections there are: {known or 'none'}"))
        config = config[section]
    config[key] = value


def _places(section: JsonObject, key: str) -> Iterator[str]:
    """Dotted names under which a section and those within it have `key`."""
    for name, entry in section.items():
        if name == key:
            yield name
        elif isinstance(entry, dict):
            yield from (f"{name}.{place}" for place in _places(entry, key))
