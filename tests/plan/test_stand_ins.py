"""The folder of the simulated runtime: two processes that make it at the same time leave one that stays."""
from research.telechat.ascend_sim.runtime import _publish


def made(folder, text):
    (folder / "latest").mkdir(parents=True)
    (folder / "made.json").write_text(text)
    return folder


def test_a_folder_in_use_is_never_replaced(tmp_path):
    target = tmp_path / "mindspore"
    _publish(made(tmp_path / "making-1", "first"), target)
    inode = (target / "latest").stat().st_ino
    _publish(made(tmp_path / "making-2", "second"), target)
    assert (target / "made.json").read_text() == "first" and (target / "latest").stat().st_ino == inode


def test_a_folder_that_is_not_complete_is_replaced(tmp_path):
    target = tmp_path / "mindspore"
    (target / "latest").mkdir(parents=True)
    _publish(made(tmp_path / "making", "whole"), target)
    assert (target / "made.json").read_text() == "whole"
