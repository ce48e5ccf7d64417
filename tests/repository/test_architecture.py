"""docs/architecture.md is true: its tables and import rules, held against the code; a new model takes an entry of
the table and a recipe, nothing else."""
import ast
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Dict, List, NamedTuple, Set, Tuple

import numpy as np
import pytest
from model_fixtures import random_official
from reference import cross_entropy, forward
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "research/telechat"
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
PACKAGE = "research.telechat"
FRAMEWORKS = {"mindspore", "mindformers"}
# Where the device may be asked for: for kernels, and for what MindFormers needs.
DEVICE_MODULES = {"model/kernels.py", "bridge/compat.py"}


def modules() -> Dict[str, Path]:
    """Every module of the plugin, by its file's name."""
    return {path.name: path for path in sorted(PLUGIN.glob("*.py")) if path.name != "__init__.py"}


@cache
def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> List[Tuple[str, bool]]:
    """(absolute name of an imported module, whether it is imported as soon as the file is)."""
    lazy = {id(inner) for node in ast.walk(parsed(path)) if isinstance(node, (ast.FunctionDef, ast.Lambda))
            for inner in ast.walk(node)}
    found = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: modules are imported by their absolute name"
            names = ([f"{node.module}.{alias.name}" for alias in node.names]
                     if node.module == "research.telechat" else [node.module])
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [(name, id(node) not in lazy) for name in names]
    return found


def plugin_imports(path: Path, at_once: bool = False) -> Set[str]:
    """Files of the plugin that `path` imports; `at_once`: without those imported within functions."""
    return {f"{name.split('.')[2]}.py" for name, direct in imports(path)
            if name.startswith("research.telechat.") and name != f"{PACKAGE}.__version__" and (direct or not at_once)}


class Room(NamedTuple):
    """A row of the page's table."""

    name: str
    files: List[str]
    below: List[str]            # rooms it imports from
    pure: Set[str]              # files that start without MindSpore


def read_rooms(page: str) -> List[Room]:
    """The table of rooms, from the bottom up."""
    table = re.search(r"<!-- rooms -->\n(.*?)<!-- end of rooms -->", page, re.DOTALL)[1]
    rooms = []
    for line in table.strip().splitlines()[2:]:
        name, files, below, mindspore, _ = (cell.strip() for cell in line.strip("|").split("|"))
        listed = re.findall(r"`([\w./]+)`", files)
        pure = set(listed) if mindspore == "no" else set(re.findall(r"`([\w./]+)`", mindspore))
        rooms.append(Room(name, listed, [] if below == "-" else below.split(", "), pure))
    return rooms


ROOMS = read_rooms(PAGE)
ROOM_OF = {file: room.name for room in ROOMS for file in room.files}


def test_every_module_stands_in_one_room():
    listed = [file for room in ROOMS for file in room.files]
    assert sorted(listed) == sorted(modules()), "docs/architecture.md, table of rooms: name every module once"


def test_every_script_is_named_once():
    table = re.search(r"<!-- scripts -->\n(.*?)<!-- end of scripts -->", PAGE, re.DOTALL)[1]
    listed = re.findall(r"^\| `([\w./]+)`", table, re.MULTILINE)
    there = [f"scripts/{path.relative_to(ROOT / 'scripts')}" for path in (ROOT / "scripts").rglob("*")
             if path.suffix in (".py", ".sh") and path.name != "__init__.py"]
    assert sorted(listed) == sorted([*there, "run_mindformer.py"])


def test_rooms_import_as_the_page_says():
    """No import leads upwards, and the page names no arrow that is not there."""
    order = [room.name for room in ROOMS]
    found: Dict[str, Set[str]] = {name: set() for name in order}
    for file, path in modules().items():
        found[ROOM_OF[file]] |= {ROOM_OF[other] for other in plugin_imports(path)} - {ROOM_OF[file]}
    for room in ROOMS:
        assert all(order.index(other) < order.index(room.name) for other in room.below), f"{room.name} imports upwards"
        assert found[room.name] == set(room.below), f"docs/architecture.md: rooms that {room.name} imports from"


def test_the_plugin_knows_no_command_but_one():
    """run_mindformer.py, whose options the room `run` takes over."""
    above = {(ROOM_OF[file], name.split(".")[0]) for file, path in modules().items() for name, _ in imports(path)
             if name.split(".")[0] in ("scripts", "benchmarks", "tests", "run_mindformer")}
    assert above == {("run", "run_mindformer")}


def test_the_picture_shows_the_table():
    """Arrows of the diagram: what a room imports from and does not reach through another arrow anyway."""
    direct = {room.name: set(room.below) for room in ROOMS}

    def reach(name: str) -> Set[str]:
        return set().union(*({other} | reach(other) for other in direct[name])) if direct[name] else set()

    needed = {(name, other) for name in direct for other in direct[name]
              if not any(other in reach(between) for between in direct[name] - {other})}
    drawn = re.findall(r"^ *(\w+) --> (\w+)$", PAGE, re.MULTILINE)
    assert sorted(drawn) == sorted(needed)


def test_modules_import_without_cycles():
    graph = {file: plugin_imports(path) for file, path in modules().items()}
    done: Set[str] = set()

    def visit(file: str, above: Tuple[str, ...]) -> None:
        assert file not in above, f"a cycle of imports: {' -> '.join((*above, file))}"
        if file not in done:
            for other in sorted(graph[file]):
                visit(other, (*above, file))
            done.add(file)

    for file in graph:
        visit(file, ())


def test_pure_modules_start_without_mindspore():
    """Neither they nor what they import at once import MindSpore or MindFormers."""
    paths = modules()

    def check(file: str, above: Tuple[str, ...]) -> None:
        heavy = {name.split(".")[0] for name, direct in imports(paths[file]) if direct} & FRAMEWORKS
        assert not heavy, f"{' -> '.join((*above, file))} imports {', '.join(heavy)} at once"
        for other in plugin_imports(paths[file], at_once=True):
            check(other, (*above, file))

    for room in ROOMS:
        for file in room.pure:
            check(file, ())


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


# A model that the table does not have: TeleChat2's conventions with tied embeddings and grouped-query attention.
ENTRY = """\
    "telechat2_mini": Variant(2, 64, 96, 8, 320, n_kv_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-6,
                              training_seqlen=32, base_seqlen=16, hf_layout="telechat2", chat_template="telechat2",
                              eos_token_id=7, user_token_id=4, bot_token_id=5),
"""
RECIPE = """\
base_config: ../../configs/telechat/finetune.yaml
parallel_config:
  data_parallel: 4
  model_parallel: 2
model:
  model_config:
    net_name: telechat2_mini
    seq_length: 32
"""
# Its official config.json, as its makers would have published it.
OFFICIAL = {"n_layer": 2, "hidden_size": 64, "ffn_hidden_size": 96, "n_head": 8, "num_key_value_heads": 2,
            "vocab_size": 320, "layer_norm_epsilon": 1e-6, "training_seqlen": 32, "base_seqlen": 16, "seq_length": 32,
            "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 3}
COMPUTE = """\
import mindspore as ms
import numpy as np
from research.telechat.recipe.read import read_recipe, resolve_config
from research.telechat.telechat import TelechatForCausalLM
from research.telechat.telechat_config import TelechatConfig

recipe = read_recipe(resolve_config("telechat/finetune_telechat2_mini.yaml"))
section = {key: value for key, value in recipe["model"]["model_config"].items() if key not in ("type", "auto_register")}
ms.set_context(device_target="CPU")
model = TelechatForCausalLM(TelechatConfig(**{**section, "amp_level": "O0", "compute_dtype": "float32",
                                              "param_init_type": "float32", "res_dtype": "float32",
                                              "use_past": True, "num_blocks": 16}))
model.set_train(False)
missing, _ = ms.load_param_into_net(model, ms.load_checkpoint("mini.ckpt"))
assert not missing, missing
ids = np.load("ids.npy")
logits = model(ms.Tensor(ids)).asnumpy()
answer = model.generate([ids[0, :8].tolist()], do_sample=False, max_new_tokens=6, eos_token_id=[-1])[0]
model.set_train(True)
loss = model(ms.Tensor(ids), ms.Tensor(ids)).asnumpy()
np.savez("computed.npz", logits=logits, answer=answer, loss=loss)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project to which someone has added a model: an entry of the table and a recipe."""
    root = tmp_path_factory.mktemp("checkout")
    for folder in ("research", "configs", "scripts"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run_mindformer.py", root)
    table = root / "research/telechat/spec/variants.py"
    text = table.read_text(encoding="utf-8")
    last = text.index("}\n", text.index("VARIANTS: Dict"))
    table.write_text(text[:last] + ENTRY + text[last:], encoding="utf-8")
    (root / "research/telechat/finetune_telechat2_mini.yaml").write_text(RECIPE, encoding="utf-8")
    (root / "official").mkdir()
    (root / "official/config.json").write_text(json.dumps(OFFICIAL))
    save_file(random_official(OFFICIAL), root / "official/model.safetensors")
    return root


def command(root: Path, *words: str) -> str:
    """Run a command of the copy; what it prints."""
    done = subprocess.run([sys.executable, *words], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_new_model_takes_under_15_lines():
    assert len((ENTRY + RECIPE).splitlines()) < 15
    assert ENTRY in PAGE and RECIPE in PAGE, "docs/architecture.md shows what this test adds"


@pytest.mark.slow
def test_a_new_model_converts_both_ways_and_computes(checkout):
    """Logits, loss and greedy tokens equal those of a NumPy forward pass with the official weights."""
    command(checkout, "research/telechat/convert_weight_torch_to_ms.py", "--torch_path", "official", "--mindspore_path",
            "mini.ckpt", "--model_name", "telechat2_mini")
    command(checkout, "research/telechat/convert_weight_ms_to_torch.py", "--mindspore_path", "mini.ckpt",
            "--torch_path", "back", "--model_name", "telechat2_mini")                # sizes: from the table
    official, back = (load_file(checkout / name / "model.safetensors") for name in ("official", "back"))
    assert official.keys() == back.keys() and not any("lm_head" in name for name in back)
    assert all(np.array_equal(official[name], back[name]) for name in official)
    config = json.loads((checkout / "back/config.json").read_text())
    assert {key: config.get(key) for key in OFFICIAL} == OFFICIAL
    ids = np.random.default_rng(0).integers(0, OFFICIAL["vocab_size"], (2, 20)).astype(np.int32)
    np.save(checkout / "ids.npy", ids)
    command(checkout, "-c", COMPUTE)
    computed = np.load(checkout / "computed.npz")
    np.testing.assert_allclose(computed["logits"], forward(OFFICIAL, official, ids, half=False)[0], atol=2e-4)
    losses = cross_entropy(forward(OFFICIAL, official, ids[:, :-1], half=False)[0], ids)
    np.testing.assert_allclose(computed["loss"], losses.mean(), atol=2e-5)
    answer = ids[:1, :8]
    for _ in range(6):
        token = forward(OFFICIAL, official, answer, half=False)[0][:, -1:].argmax(-1)
        answer = np.concatenate([answer, token], 1)
    assert computed["answer"].tolist() == answer[0].tolist()


def test_a_new_model_is_planned(checkout):
    plan = ["scripts/plan.py", "--config", "research/telechat/finetune_telechat2_mini.yaml"]
    assert command(checkout, *plan, "--ranks", "8", "--check") == ""
    command(checkout, *plan, "--ranks", "8", "--json", "plan.json")
    assert json.loads((checkout / "plan.json").read_text())
    wrong = subprocess.run([sys.executable, *plan, "--ranks", "16", "--parallel_config.model_parallel", "4"],
                           cwd=checkout, capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 1 and "n_kv_heads (2)" in wrong.stderr      # the new entry's, not a default
