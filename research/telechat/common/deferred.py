"""Importing MindFormers without what a command hardly ever uses: packages that it imports, and a few functions use.

A placeholder is in the place of such a package while MindFormers is imported, and resolves what was taken from it when
that is first used. Afterwards the package can be imported as ever. Half of the time that MindFormers takes to import
goes into these: tensorboardX imports PyTorch, nltk imports SciPy and scikit-learn.
"""
import contextlib
import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Iterator, List, Sequence, Tuple, cast

UNUSED = ("datasets", "datasets.distributed", "nltk", "nltk.translate", "nltk.translate.bleu_score", "scipy.io",
          "scipy.io.wavfile", "scipy.ndimage", "tensorboardX")


class Deferred:
    """A function or class of a package that is imported when it is called, derived from, or asked for anything."""

    def __init__(self, module: str, name: str):
        self._module, self._name = module, name

    def _real(self) -> Any:
        return getattr(importlib.import_module(self._module), self._name)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):                # looked for by typing, inspect and the like, which need nothing of it
            raise AttributeError(f"{self!r} has no attribute {name!r}")
        return getattr(self._real(), name)

    def __mro_entries__(self, _bases: Tuple[object, ...]) -> Tuple[type, ...]:
        return (self._real(),)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._real())

    def __repr__(self) -> str:
        return f"<{self._module}.{self._name}, not imported yet>"


class _Placeholder(ModuleType):
    """In the place of a package: what is taken from it is `Deferred` while it is there, and the real thing later."""

    def __init__(self, name: str, spec: ModuleSpec):
        super().__init__(name)
        self.__spec__, self.__path__ = spec, cast(Any, [])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if sys.modules.get(self.__name__) is self:
            return Deferred(self.__name__, name)
        return getattr(importlib.import_module(self.__name__), name)


def _spec(name: str) -> Any:
    """What transformers looks at to tell whether a package is there; None where it is not."""
    top = name.partition(".")[0]
    try:
        found = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    return found if name == top or found is None else ModuleSpec(name, None)


@contextlib.contextmanager
def deferred_imports(names: Sequence[str] = UNUSED) -> Iterator[None]:
    """Within it, importing `names` gives placeholders, except of packages that are imported already or missing."""
    placed: List[_Placeholder] = []
    specs = {name: _spec(name) for name in names if name.partition(".")[0] not in sys.modules}
    for name, spec in specs.items():
        if spec is not None:
            placed.append(_Placeholder(name, spec))
            sys.modules[name] = placed[-1]
    try:
        yield
    finally:
        for module in placed:
            if sys.modules.get(module.__name__) is module:
                del sys.modules[module.__name__]
