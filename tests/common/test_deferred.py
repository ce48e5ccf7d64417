"""common/deferred.py: what was taken from a package while it was left out is the real thing when it is used."""
import importlib.util
import subprocess
import sys

import pytest

from research.telechat.common.deferred import Deferred, deferred_imports

PACKAGE = """
LOADED = True
class Thing:
    kind = "real"
    def __init__(self, number=0):
        self.number = number
def double(number, plus=0):
    return 2 * number + plus
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `slow_one` with a module `inner`; its names."""
    folder = tmp_path / "slow_one"
    folder.mkdir()
    (folder / "__init__.py").write_text(PACKAGE)
    (folder / "inner.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield ("slow_one", "slow_one.inner")
    for name in ("slow_one", "slow_one.inner"):
        sys.modules.pop(name, None)


def test_nothing_is_imported_before_it_is_used(package):
    with deferred_imports(package):
        import slow_one
        from slow_one.inner import Thing, double
        assert importlib.util.find_spec("slow_one") is not None
        assert isinstance(slow_one.Thing, Deferred) and isinstance(double, Deferred)
        assert not hasattr(slow_one, "__wrapped__") and "not imported yet" in repr(double)
    assert not set(package) & set(sys.modules)
    assert double(3, plus=1) == 7 and "slow_one.inner" in sys.modules
    assert Thing(4).number == 4 and Thing.kind == "real" and isinstance(Thing(), Thing)
    assert slow_one.LOADED is True and slow_one.Thing is sys.modules["slow_one"].Thing

    class Derived(Thing):
        pass
    assert Derived(5).number == 5 and Derived.__mro__[1] is sys.modules["slow_one.inner"].Thing


def test_packages_that_are_there_or_missing_are_left_alone(package):
    import slow_one
    with deferred_imports((*package, "no_such_package")):
        from slow_one.inner import double
        assert sys.modules["slow_one"] is slow_one and not isinstance(double, Deferred)
        with pytest.raises(ModuleNotFoundError):
            import no_such_package  # noqa: F401


def test_placeholders_go_when_the_import_fails(package):
    with pytest.raises(KeyError), deferred_imports(package):
        raise KeyError
    import slow_one
    assert slow_one.double(1) == 2


def test_mindformers_is_imported_without_pytorch():
    """And what MindFormers took from them works."""
    code = ("import sys\n"
            "from research.telechat.common.versions import fitting_versions\n"
            "with fitting_versions():\n"
            "    import mindformers\n"
            "    from mindformers.core.metric import metric\n"
            "print('FOUND', [name for name in ('torch', 'nltk', 'datasets', 'tensorboardX') if name in sys.modules])\n"
            "smooth = metric.SmoothingFunction().method3\n"
            "print('BLEU', metric.sentence_bleu([list('abcd')], list('abcd'), smoothing_function=smooth))\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert "FOUND []" in done.stdout, done.stdout + done.stderr[-2000:]
    assert "BLEU 1.0" in done.stdout, done.stdout + done.stderr[-2000:]
