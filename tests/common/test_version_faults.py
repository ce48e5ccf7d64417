"""Which errors of an import are blamed on the versions of mindspore and mindformers, and what is said of the others."""
import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from research.telechat.common import versions
from research.telechat.common.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def execute(module, code):
    """What `code` raises when it is executed as the body of `module`."""
    with pytest.raises(BaseException) as caught:
        exec(compile(code, f"{module}.py", "exec"), {"__name__": module, "ctypes": ctypes, "errno": errno})
    return caught.value


MISSING_MODULE = "import no_such_package_anywhere"
MISSING_NAME = "import json; json.no_such_name"
MISSING_LIBRARY = "ctypes.CDLL('libno_such_library.so')"
READ_ONLY = "raise PermissionError(errno.EACCES, 'Permission denied', '/somewhere/log')"
NO_FOLDER = "open('/no/such/folder/x')"
BUG = "[][1]"


@pytest.mark.parametrize("module", ["mindspore", "mindspore.ops.auto_generate", "mindformers", "mindformers.tools.x"])
@pytest.mark.parametrize(("code", "blamed"), [
    (MISSING_MODULE, True), (MISSING_NAME, True), (MISSING_LIBRARY, True), (READ_ONLY, False), (NO_FOLDER, False),
    (BUG, False)])
def test_a_module_of_theirs_that_fails_while_it_is_loaded(module, code, blamed):
    assert versions.versions_at_fault(execute(module, code)) is blamed


@pytest.mark.parametrize("module", ["research.telechat.run.job", "mindspore_of_somebody", "transformers", "__main__"])
@pytest.mark.parametrize("code", [MISSING_MODULE, MISSING_NAME, MISSING_LIBRARY, READ_ONLY, NO_FOLDER, BUG])
def test_other_modules_are_no_matter_of_versions(module, code):
    assert not versions.versions_at_fault(execute(module, code))


@pytest.mark.parametrize(("err", "blamed"), [
    (ImportError("cannot import name 'Trainer'", name="mindformers.trainer"), True),
    (ModuleNotFoundError("No module named 'mindspore.mint'", name="mindspore.mint"), True),
    (ImportError("libascendcl.so: cannot open shared object file", name="mindspore._c_expression"), True),
    (AttributeError("module 'mindspore' has no attribute 'mint'"), True),
    (AttributeError("partially initialized module 'mindformers.core' has no attribute 'x'"), True),
    (ImportError("cannot import name 'x'", name="research.telechat.x"), False),
    (ModuleNotFoundError("No module named 'tqdm'", name="tqdm"), False),
    (ImportError("without a name"), False),
    (AttributeError("module 'numpy' has no attribute 'int'"), False),
    (AttributeError("'NoneType' object has no attribute 'x'"), False),
    (OSError(errno.EROFS, "Read-only file system", "output/log"), False),
    (ValueError("mindspore"), False), (MemoryError(), False),
])
def test_names_that_our_own_modules_do_not_find(err, blamed):
    assert versions.versions_at_fault(err) is blamed


def test_a_function_of_theirs_is_not_their_loading():
    """A decorator of theirs may call code of ours: what that raises is ours."""
    space = {"__name__": "mindformers.tools.register"}
    exec("def register(function):\n    return function()", space)

    def ours():
        import no_such_package_anywhere  # noqa: F401

    with pytest.raises(ImportError) as caught:
        space["register"](ours)
    assert not versions.versions_at_fault(caught.value)


@pytest.mark.parametrize(("err", "kind", "said"), [
    (PermissionError(errno.EACCES, "Permission denied", "out/log"), ConfigError, "out/log cannot be written: Perm"),
    (OSError(errno.EROFS, "Read-only file system", "out/log"), ConfigError, "out/log cannot be written: Read-only"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/log"), ConfigError, "a/log cannot be written: Not a dir"),
    (ModuleNotFoundError("No module named 'tqdm.auto'", name="tqdm.auto"), ConfigError, "package tqdm is missing in"),
    (ModuleNotFoundError("No module named 'research.telechat.x'", name="research.telechat.x"), ConfigError,
     "this plugin is incomplete"),
    (OSError(errno.ENOSPC, "No space left on device", "out/log"), OSError, "No space left"),
    (AttributeError("'list' object has no attribute 'x'"), AttributeError, "'list'"),
    (ZeroDivisionError("x"), ZeroDivisionError, "x"),
])
def test_what_else_goes_wrong_is_named_as_what_it_is(err, kind, said, monkeypatch):
    monkeypatch.setattr(versions, "check_versions", lambda: None)
    with pytest.raises(kind) as caught, versions.fitting_versions():
        raise err
    assert said in str(caught.value) and "pip install" not in str(caught.value)


@pytest.mark.slow
def test_a_log_folder_that_cannot_be_written_is_named(tmp_path):
    """MindFormers itself fails here, while it is imported: a file where the folder should be stops root, too."""
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_mindformer.py"), "--config",
         "research/telechat/predict_telechat_tiny_cpu.yaml", "--output_dir", str(tmp_path / "out")], cwd=tmp_path,
        env={**os.environ, "LOG_MF_PATH": str(tmp_path / "file/log")}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: {tmp_path}/file/log") and "cannot be written" in line and "pip" not in line
