"""docs/architecture.md is true: its tables and its diagram, held against the imports in the code."""
import ast
import json
import os
import re
import subprocess
import sys
from typing import Dict, Set, Tuple

import pytest
from house import (
    PACKAGE,
    PAGE,
    PLUGIN,
    ROOT,
    imports,
    marked,
    module_name,
    modules,
    parsed,
    plugin_file,
    plugin_imports,
    read_rooms,
    read_script_doors,
    read_top,
)

FRAMEWORKS = {"mindspore", "mindformers"}
# Where the device may be asked for: for kernels, and for what MindFormers needs.
DEVICE_MODULES = {"model/kernels.py", "bridge/compat.py"}
# Where options are read: the commands, and the options of a recipe that several of them take.
OPTION_MODULES = {"recipe/options.py", "__main__.py"}
# Above all rooms: `python -m research.telechat`.
MAIN = "__main__.py"

ROOMS = read_rooms()
ORDER = [room.name for room in ROOMS]
HOMES, DOORS = read_top()
SCRIPT_DOORS = read_script_doors()


def room_of(file: str) -> str:
    """The room of a file of the plugin, "" for doors, __main__.py and the plugin's own __init__.py."""
    return file.split("/")[0] if "/" in file else HOMES.get(file, "")


def in_rooms() -> Dict[str, str]:
    """{file: room} of all files that stand in one."""
    return {file: room_of(file) for file in modules() if room_of(file)}


# --- the page's tables -----------------------------------------------------------------------------------------------

def test_every_folder_is_a_room():
    folders = {file.split("/")[0] for file in modules() if "/" in file}
    assert sorted(ORDER) == sorted(folders), "docs/architecture.md, table of rooms: one row for each folder"
    assert all(file.count("/") <= 1 for file in modules()), "rooms have no rooms inside"


def test_every_file_at_the_top_is_a_home_or_a_door():
    top = {file for file in modules() if "/" not in file} - {"__init__.py", MAIN}
    assert sorted([*HOMES, *DOORS]) == sorted(top), "docs/architecture.md, files at the top: name each once"
    assert set(HOMES.values()) <= set(ORDER)


def test_a_room_says_what_the_page_says():
    """The first paragraph of its __init__.py is its row; the file holds nothing else, so that importing one module of
    the room imports only that module."""
    for room in ROOMS:
        path = PLUGIN / room.name / "__init__.py"
        assert path.is_file(), f"{room.name} has no __init__.py"
        first = " ".join((ast.get_docstring(parsed(path)) or "").split("\n\n")[0].split())
        assert first == room.purpose, f"docs/architecture.md and {room.name}/__init__.py"
        assert len(parsed(path).body) == 1, f"{room.name}/__init__.py holds more than its docstring"


def test_no_two_files_of_tests_share_a_name():
    """pytest imports them by their bare names."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert [name for name in names if names.count(name) > 1] == []


def test_every_script_is_named_once():
    listed = [file.strip("`") for file, _ in marked("scripts")]
    there = [path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").rglob("*")
             if path.suffix in (".py", ".sh") and path.name != "__init__.py"]
    assert sorted(listed) == sorted([*there, "run_mindformer.py"])


def test_the_page_names_the_arrows_of_the_code():
    """No import leads upwards, and the page names no arrow that is not there."""
    found: Dict[str, Set[str]] = {name: set() for name in ORDER}
    upwards = []
    for file, room in in_rooms().items():
        for other in sorted(plugin_imports(file)):
            there = room_of(other)
            if there and there != room:
                found[room].add(there)
                if ORDER.index(there) > ORDER.index(room):
                    upwards.append(f"{file} ({room}) imports {other} ({there})")
    assert not upwards, "imports run one way, up the page's table of rooms"
    for room in ROOMS:
        assert found[room.name] == set(room.below), f"docs/architecture.md: rooms that {room.name} imports from"


def test_the_picture_shows_the_table():
    """Arrows of the diagram: what a room imports from and does not reach through another arrow anyway."""
    direct = {room.name: set(room.below) for room in ROOMS}

    def reach(name: str) -> Set[str]:
        return set().union(*({other} | reach(other) for other in direct[name])) if direct[name] else set()

    needed = {(name, other) for name in direct for other in direct[name]
              if not any(other in reach(between) for between in direct[name] - {other})}
    drawn = re.findall(r"^ *(\w+) --> (\w+)$", PAGE, re.MULTILINE)
    assert sorted(drawn) == sorted(needed)


# --- the rule --------------------------------------------------------------------------------------------------------

def test_modules_import_without_circles():
    """Counting imports within functions too."""
    graph = {file: plugin_imports(file) for file in modules()}
    done: Set[str] = set()

    def visit(file: str, above: Tuple[str, ...]) -> None:
        assert file not in above, f"a circle of imports: {' -> '.join((*above, file))}"
        if file not in done:
            for other in sorted(graph[file]):
                visit(other, (*above, file))
            done.add(file)

    for file in graph:
        visit(file, ())


def test_imports_are_absolute():
    relative = [f"{file}:{item.line}" for file, path in modules().items() for item in imports(path)
                if item.name.startswith(".")]
    assert not relative, "modules are imported by their absolute name, research.telechat.x"


def first_party():
    """Names by which files of the repository can be imported."""
    files = [*ROOT.glob("*.py"), *(ROOT / "tests/support").glob("*.py")]
    return {path.stem for path in files} | {"research", "scripts", "benchmarks", "tests"}


def test_rooms_stand_alone():
    """No file in a room imports a door, __main__, the repository root, its scripts, benchmarks or tests."""
    outside = first_party() - {"research"}
    above = []
    for file in in_rooms():
        for item in imports(modules()[file]):
            if item.name.split(".")[0] in outside or plugin_file(item.name) in {*DOORS, MAIN}:
                above.append(f"{file}:{item.line} imports {item.name}")
    assert not above


def test_only_commands_know_argparse():
    knowing = [f"{file}:{item.line}" for file, path in modules().items() for item in imports(path)
               if item.name.split(".")[0] == "argparse"
               and room_of(file) != "commands" and file not in OPTION_MODULES]
    assert not knowing, "options are read in the room commands and in recipe/options.py"


def test_only_two_modules_ask_for_the_device():
    asked = []
    for file, path in modules().items():
        for node in ast.walk(parsed(path)):
            name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
            called = isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get_context"
            literal = called and any(getattr(arg, "value", "") == "device_target" for arg in node.args)
            if (name in {"on_cpu", "get_device_name"} or literal) and file not in DEVICE_MODULES:
                asked.append(f"{file}:{node.lineno}")
    assert not asked, f"the device is asked for in {', '.join(sorted(DEVICE_MODULES))} only"


def test_no_branch_on_a_models_name():
    """Comparisons and dictionary keys with the name of a model occur in the table of variants only. (The table of chat
    templates has names of its own, of which one is a model's too: `Variant.chat_template` refers to them.)"""
    from research.telechat.spec.variants import VARIANTS
    branches = []
    for file, path in modules().items():
        if file == "spec/variants.py":
            continue
        for node in ast.walk(parsed(path)):
            asks = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("startswith", "endswith")
            parts = ([node.left, *node.comparators] if isinstance(node, ast.Compare) else node.args if asks else
                     [key for key in node.keys if key] if isinstance(node, ast.Dict) else [])
            texts = {leaf.value for part in parts for leaf in ast.walk(part)
                     if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)}
            branches += [f"{file}:{node.lineno}" for text in texts
                         if text in VARIANTS or re.fullmatch(r"(telechat2?_)?\d+b|telechat2?_", text.lower())]
    assert not branches, "what differs between models is a field of Variant"


# --- doors -----------------------------------------------------------------------------------------------------------

def is_plain(node: ast.stmt) -> bool:
    """Whether a door may have this statement: docstring, import, __all__, the opening of sys.path, the call of main."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]) in ("__all__", "sys.path[0]")
    if isinstance(node, ast.If) and not node.orelse and len(node.body) == 1:
        test, body = ast.unparse(node.test), ast.unparse(node.body[0])
        return ((test.startswith("__package__ in ") and body.startswith("sys.path[0] = "))
                or (test == "__name__ == '__main__'" and re.fullmatch(r"sys\.exit\(\w+\(.*\)\)", body) is not None))
    return False


def door_paths():
    return {**{f"research/telechat/{file}": behind for file, behind in DOORS.items()}, **SCRIPT_DOORS}


@pytest.mark.parametrize("door", sorted(door_paths()))
def test_a_door_holds_no_logic(door):
    """At most twelve lines that import from the module it leads to, and from no other of the plugin."""
    path = ROOT / door
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 12
    odd = [node.lineno for node in parsed(path).body if not is_plain(node)]
    assert not odd, f"{door}, lines {odd}: logic belongs behind the door"
    assert {plugin_file(item.name) for item in imports(path)} - {""} == {door_paths()[door]}


def python_files():
    return [path for folder in ("research", "scripts", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]


def test_old_names_are_homes_and_doors_only_for_their_tests():
    """What an import, or a program that a test starts, names `telechat_...` in the plugin is one of the homes. What is
    behind a door is imported from there: a value patched on the door would change nothing."""
    names = "|".join(sorted(re.escape(file[:-3]) for file in {*DOORS, MAIN}))
    doors = re.compile(rf"research\.telechat(?:\.| import )({names})\b")
    old = re.compile(r"research\.telechat(?:\.| import )(telechat\w*)")
    wrong = []
    for path in [*python_files(), *ROOT.glob("*.py")]:
        if "doors" in path.stem:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = [match[1] for match in old.finditer(line) if f"{match[1]}.py" not in HOMES]
            found += [match[1] for match in doors.finditer(line)]
            wrong += [f"{path.relative_to(ROOT)}:{number} names {name}" for name in sorted(set(found))]
    assert not wrong, "import what is behind the door"


def test_scripts_doors_are_not_imported():
    names = {door[:-3].replace("/", ".") for door in SCRIPT_DOORS}
    wrong = [f"{path.relative_to(ROOT)}:{item.line} imports {item.name}" for path in python_files()
             if "doors" not in path.stem for item in imports(path)
             if item.name in names or item.name.rpartition(".")[0] in names]
    assert not wrong, "import what is behind the door"


# --- starting alone --------------------------------------------------------------------------------------------------

def starts_without():
    """Files that the page says start without MindSpore, with the doors and __main__.py that lead to such a file."""
    files = set()
    for room in ROOMS:
        own = {file for file, name in in_rooms().items() if name == room.name}
        assert room.starts_without <= own | {"*"}, f"docs/architecture.md, {room.name}: a file that does not exist"
        files |= own if room.starts_without == {"*"} else room.starts_without | {f"{room.name}/__init__.py"}
    return files | {door for door, behind in DOORS.items() if behind in files} | ({MAIN} & set(modules()))


def test_pure_files_import_no_mindspore():
    """Neither they nor what they import at once. Names the way there; the next test tries it."""
    done: Set[str] = set()

    def check(file: str, above: Tuple[str, ...]) -> None:
        if file in done:
            return
        heavy = {item.name.split(".")[0] for item in imports(modules()[file]) if item.at_once} & FRAMEWORKS
        assert not heavy, f"{' -> '.join((*above, file))} imports {', '.join(heavy)} at once"
        done.add(file)
        for other in plugin_imports(file, at_once=True):
            check(other, (*above, file))

    for file in starts_without():
        check(file, ())


def test_rooms_that_need_mindspore_do():
    """A room whose files all start without it says so."""
    for room in ROOMS:
        own = {file for file, name in in_rooms().items() if name == room.name and not file.endswith("__init__.py")}
        assert room.starts_without == {"*"} or own - room.starts_without, f"{room.name} needs no MindSpore"


# Imports each module in a process of its own, forked from one that has imported what they need from elsewhere.
ALONE = """\
import contextlib, importlib, json, os, sys, traceback
sys.path.insert(0, os.getcwd())
names, outside, blocked, optional = json.loads(sys.stdin.read())
for name in blocked:
    sys.modules[name] = None
for name in outside:
    with contextlib.suppress(ImportError):           # a name in a module, or an extra that is not installed
        importlib.import_module(name)
assert not [name for name in sys.modules if name.startswith("research.telechat")]
failed = []
for name in names:
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
            assert all(sys.modules[name] is None for name in blocked)
        except BaseException as error:
            if isinstance(error, ModuleNotFoundError) and error.name.split(".")[0] in optional:
                os._exit(0)                          # of an extra that is not installed
            print(name, traceback.format_exc(), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
sys.exit(f"do not import alone: {', '.join(failed)}" if failed else 0)
"""


def import_alone(files, blocked):
    """Each of these files of the plugin, imported first in its process, with some packages that cannot be imported."""
    own = {"__future__", *blocked, *first_party()}
    outside = {item.name for file in files for item in imports(modules()[file])
               if item.at_once and item.name.split(".")[0] not in own}
    optional = ["starlette", "uvicorn", "h11", "prometheus_client"]
    if os.environ.get("CI", "").lower() == "true":
        optional = []
    request = json.dumps([[module_name(file) for file in files], sorted(outside), sorted(blocked), optional])
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, input=request, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def test_pure_files_start_alone_without_mindspore():
    files = sorted(starts_without())
    assert len(files) > 40
    import_alone(files, FRAMEWORKS)


@pytest.mark.slow
def test_all_other_files_import_alone():
    """A circle that some order of imports hides would show here."""
    import_alone(sorted(set(modules()) - starts_without()), set())


def test_the_package_itself_imports_nothing():
    assert not imports(PLUGIN / "__init__.py")
    assert module_name("__init__.py") == PACKAGE
