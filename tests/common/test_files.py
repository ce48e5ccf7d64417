"""Small files are written whole or not at all."""
import os

import pytest

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import check_output_folder, whole, write_text


def test_a_file_is_replaced_and_nothing_stays_beside(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "旧")
    write_text(str(path), "新")
    assert path.read_bytes() == "新".encode()
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("fault", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file(tmp_path, fault):
    path = tmp_path / "a.png"
    write_text(path, "old")
    with pytest.raises(type(fault)), whole(path) as beside:
        beside.write_text("half")
        assert path.read_text() == "old" and beside.parent == tmp_path
        raise fault
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.png"]


def test_what_was_never_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), whole(tmp_path / "a"):
        pass
    assert not os.listdir(tmp_path)


def test_others_may_read_what_is_written(tmp_path):
    """As with files that are opened in the usual way, the user's umask decides."""
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_an_output_folder_is_made_and_tried(tmp_path):
    check_output_folder(tmp_path / "a/b", "--out")
    assert list((tmp_path / "a/b").iterdir()) == []
    (tmp_path / "file").touch()
    for path, said in ((tmp_path / "file", "it is a file"), (tmp_path / "file/below", "Not a directory")):
        with pytest.raises(ConfigError, match=f"^--out {path} cannot be written: {said}; name another folder"):
            check_output_folder(path, "--out")
