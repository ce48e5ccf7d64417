"""The plugin as the architecture tests see it: its files, their rooms, and what each imports."""
import ast
import re
from functools import cache
from pathlib import Path
from typing import Dict, List, NamedTuple, Set, Tuple

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "research/telechat"
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
PACKAGE = "research.telechat"


class Import(NamedTuple):
    """One imported name."""

    name: str                   # absolute: "research.telechat.spec.rope.inv_freq", "numpy"
    at_once: bool               # imported together with the file, not when a function is called
    line: int


class Room(NamedTuple):
    """A row of the page's table of rooms."""

    name: str
    purpose: str
    below: List[str]            # rooms it imports from
    starts_without: Set[str]    # files that start without MindSpore, relative to the plugin; {"*"}: all


@cache
def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def deferred(tree: ast.AST) -> Set[int]:
    """Ids of the nodes that do not run when the file is imported: bodies of functions, of `if TYPE_CHECKING`."""
    found: Set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            found.update(map(id, ast.walk(node)))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            found.update(id(inner) for statement in node.body for inner in ast.walk(statement))
    return found


@cache
def imports(path: Path) -> List[Import]:
    """Everything that a file imports. A relative import is named with its dots."""
    tree = parsed(path)
    later = deferred(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [Import(name, id(node) not in later, node.lineno) for name in names]
    return found


@cache
def modules() -> Dict[str, Path]:
    """Every Python file of the plugin by its path in the plugin: "spec/rope.py", "telechat.py"."""
    return {path.relative_to(PLUGIN).as_posix(): path for path in sorted(PLUGIN.rglob("*.py"))}


def module_name(file: str) -> str:
    """"spec/rope.py" -> "research.telechat.spec.rope"."""
    return ".".join((PACKAGE, *file[:-3].split("/"))).removesuffix(".__init__")


@cache
def files_by_module() -> Dict[str, str]:
    return {module_name(file): file for file in modules()}


def plugin_file(name: str) -> str:
    """The plugin's file that an imported name lies in, "" if it lies elsewhere."""
    while name.startswith(PACKAGE):
        if name in files_by_module():
            return files_by_module()[name]
        name = name.rpartition(".")[0]
    return ""


@cache
def plugin_imports(file: str, at_once: bool = False) -> Set[str]:
    """Files of the plugin that one of them imports, without itself and the plugin's own `__init__.py`, which holds only
    the version."""
    found = {plugin_file(item.name) for item in imports(modules()[file]) if item.at_once or not at_once}
    return found - {"", "__init__.py", file}


def marked(name: str) -> List[List[str]]:
    """Cells of the page's table between <!-- name --> and <!-- end of name -->, without its head."""
    table = re.search(rf"<!-- {name} -->\n(.*?)<!-- end of {name} -->", PAGE, re.DOTALL)[1]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.strip().splitlines()[2:]]


def read_rooms() -> List[Room]:
    """The page's table of rooms, from the bottom up."""
    rooms = []
    for name, purpose, below, mindspore in marked("rooms"):
        starts = {"*"} if mindspore == "all" else {f"{name}/{file}" for file in re.findall(r"`(\w+\.py)`", mindspore)}
        assert starts or mindspore == "none", f"{name}: expected 'all', 'none' or files, found {mindspore!r}"
        rooms.append(Room(name, purpose, [] if below == "-" else below.split(", "), starts))
    return rooms


def read_top() -> Tuple[Dict[str, str], Dict[str, str]]:
    """Files at the top of the plugin: {home: its room}, {front: the module behind it}."""
    homes, fronts = {}, {}
    for file, _, belongs in marked("top"):
        home, front = re.fullmatch(r"room (\w+)", belongs), re.fullmatch(r"door to `([\w/]+\.py)`", belongs)
        assert home or front, f"{file}: expected 'room NAME' or 'door to `FILE`', found {belongs!r}"
        if home:
            homes[file.strip("`")] = home[1]
        else:
            fronts[file.strip("`")] = front[1]
    return homes, fronts


def read_script_doors() -> Dict[str, str]:
    """Doors among the scripts: {"scripts/plan.py": "commands/plan.py"}."""
    doors = {}
    for file, what in marked("scripts"):
        front = re.fullmatch(r"door to `([\w/]+\.py)`(:.*)?", what)
        if front:
            doors[file.strip("`")] = front[1]
    return doors
