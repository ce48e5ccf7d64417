"""Test-wide settings: the repository root is importable, MindSpore runs graphs on the CPU and keeps quiet."""
import gc
import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECONDS = Path(__file__).with_name("seconds.json")
os.environ.setdefault("GLOG_v", "3")                      # MindSpore: errors only
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell starts background jobs with Ctrl-C ignored, which processes started by tests would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def file_of(test):
    """The file of a test or a report, as seconds.json names it."""
    return test.nodeid.partition("::")[0]


def pytest_collection_modifyitems(items):
    """Slow files first: with several processes none of them starts when the others are nearly done. What a
    file took is in seconds.json; for one that is not there, its marks decide."""
    seconds = json.loads(SECONDS.read_text(encoding="utf-8"))
    weight = Counter()
    for item in items:
        weight[file_of(item)] += 60 * (item.get_closest_marker("long") is not None) + (
            10 * (item.get_closest_marker("slow") is not None))
    items.sort(key=lambda item: -seconds.get(file_of(item), weight[file_of(item)]))


_taken = Counter()                    # seconds by file of the tests that ran, in the process that gathers the reports


def pytest_runtest_logreport(report):
    """Add up what each file takes."""
    _taken[file_of(report)] += report.duration


def pytest_sessionfinish(session):
    """With TELECHAT_TEST_SECONDS=1, after a run of all tests, write the seconds of files of five and more."""
    if os.environ.get("TELECHAT_TEST_SECONDS") == "1" and not hasattr(session.config, "workerinput"):
        found = {path: round(taken) for path, taken in sorted(_taken.items()) if taken >= 5}
        SECONDS.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")


@pytest.fixture(autouse=True, scope="module")
def _old_objects():
    """MindSpore looks for garbage whenever it compiles a graph, which takes four times as long as a small graph itself
    where it looks at all objects of all packages. Those that are there when a file begins it leaves alone."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _environment():
    """MindFormers leaves variables in the environment, such as RUN_MODE, which processes of later tests would obey."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _environment_of_one_test(_environment):
    """The same within a module."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def vocab_files(tmp_path_factory):
    """A small vocabulary file per family of conversations: {"7b": path, "12b": ..., "52b": ..., "telechat2": ...}."""
    from vocab_fixtures import train_families
    return train_families(tmp_path_factory.mktemp("vocabs"))


@pytest.fixture(scope="session")
def vocabs(vocab_files):
    """The same, loaded."""
    from research.telechat.text.vocab import Vocab
    return {name: Vocab.load(path) for name, path in vocab_files.items()}


@pytest.fixture(scope="session")
def vocab_folder(tmp_path_factory):
    """Small vocabularies whose markers are user-defined symbols (tokenizer.model), control symbols (control.model), or
    tokens added to a byte-level BPE (tokenizer.json)."""
    from vocab_fixtures import train_byte_level_bpe, train_sentencepiece
    folder = tmp_path_factory.mktemp("vocab")
    train_sentencepiece(folder / "tokenizer.model")
    train_sentencepiece(folder / "control.model", control=True)
    train_byte_level_bpe(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Folder for compiled graphs (training_fixtures.kept_graph). What others are compared with compiles its own."""
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="session")
def ascend_plugin():
    """MindSpore's Ascend plug-in, which compiles with the simulated runtime."""
    from compile_fixtures import NO_PLUGIN
    from needs import require
    require(not NO_PLUGIN, NO_PLUGIN)


@pytest.fixture
def parsed(monkeypatch):
    """The feed-forward cells that MindSpore's parser has looked at."""
    from research.telechat.telechat_transformer import TelechatFeedForward
    seen = []

    def look(cell):
        seen.append(cell)
        raise AttributeError("cell_init_args")
    monkeypatch.setattr(TelechatFeedForward, "cell_init_args", property(look), raising=False)
    return seen
