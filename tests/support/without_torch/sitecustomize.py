"""On PYTHONPATH: torch and scikit-learn are as good as not installed. MindFormers imports them where they are, which
takes seconds, and this project's training and prediction need neither."""
import sys
from importlib.machinery import PathFinder


class WithoutThem(PathFinder):
    """Finds every other module. (None in sys.modules would do for imports, but SciPy looks there for torch.)"""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.partition(".")[0] in ("torch", "sklearn"):
            return None
        return super().find_spec(fullname, path, target)


sys.meta_path[:] = [WithoutThem if finder is PathFinder else finder for finder in sys.meta_path]
