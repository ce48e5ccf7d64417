"""Checkpoints that a thread writes in the background (async_save): complete, in order, awaited, never silently lost."""
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from training_fixtures import ROOT

from research.telechat.checkpoint import resume
from research.telechat.checkpoint.integrity import check_files
from research.telechat.common.errors import ConfigError, TrainingStopped
from research.telechat.common.files import umask
from research.telechat.training import save_thread as thread
from research.telechat.training.saving import TelechatCheckpointMonitor

pytestmark = pytest.mark.matrix


class Saves:
    """A monitor over a network of one weight, and a writer that waits until it is let go (or is told to fail)."""

    def __init__(self, folder, monkeypatch, **settings):
        import mindspore.train.serialization as saving
        self.folder, self.gate, self.begun, self.fault = folder, threading.Event(), threading.Event(), None
        self.gate.set()
        write = saving._exec_save

        def gated(name, *args, **kwargs):
            Path(name).with_suffix(".tmp").write_bytes(b"half")
            self.begun.set()
            self.gate.wait()
            if self.fault:
                raise self.fault
            return write(name, *args, **kwargs)

        monkeypatch.setattr(saving, "_exec_save", gated)
        self.weight = ms.Parameter(ms.Tensor(np.zeros(4, np.float32)), name="w")
        network = ms.nn.Cell()
        network.insert_param_to_cell("w", self.weight)
        network.optimizer = None
        self.monitor = TelechatCheckpointMonitor(prefix="t", directory=str(folder), async_save=True,
                                                 **{"save_checkpoint_steps": 1, **settings})
        self.params = SimpleNamespace(
            cur_step_num=0, cur_epoch_num=1, batch_num=100, train_network=network, network=network, list_callback=[],
            optimizer=SimpleNamespace(global_step=ms.Tensor(0)), net_outputs=(ms.Tensor(1.0), ms.Tensor(False)))
        self.context = SimpleNamespace(original_args=lambda: self.params)

    def step(self):
        """Train one step: the weight becomes its number, in its place. Then save."""
        self.params.cur_step_num += 1
        ms.ops.assign(self.weight, ms.Tensor(np.full(4, self.params.cur_step_num, np.float32)))
        self.monitor.step_end(self.context)

    @property
    def names(self):
        return named(self.folder / "checkpoint/rank_0")

    def meta(self):
        return json.loads((self.folder / "checkpoint/rank_0/meta.json").read_text())["last_ckpt_file"]


def named(folder):
    """Files in a folder, but for manifests and those that are being written."""
    return sorted(path.name for path in folder.iterdir() if ".manifest.json" not in path.name)


def ckpt(step):
    return f"t_rank_0-1_{step}.ckpt"


@pytest.fixture
def saves(tmp_path, monkeypatch):
    made = []

    def make(**settings):
        made.append(Saves(tmp_path, monkeypatch, **settings))
        return made[0]
    yield make
    for one in made:
        one.gate.set()
        thread.take_fault()


def test_a_file_counts_when_it_is_complete(saves, tmp_path):
    """While the second is written: not chosen, not in meta.json, and the first is not deleted for it."""
    one = saves(keep_checkpoint_max=1)
    one.step()
    thread.wait()
    one.gate.clear()
    one.begun.clear()
    one.step()
    assert one.begun.wait(60) and thread.writing()
    assert one.names == ["meta.json", ckpt(1), "t_rank_0-1_2.tmp"] and one.meta() == ckpt(1)
    assert resume.choose(tmp_path / "checkpoint", 1).step == 1
    ms.ops.assign(one.weight, ms.Tensor(np.full(4, 99, np.float32)))     # the training goes on meanwhile
    one.gate.set()
    one.monitor.end(one.context)
    assert not thread.writing()
    assert one.names == ["meta.json", ckpt(2)] and one.meta() == ckpt(2)
    folder = tmp_path / "checkpoint/rank_0"                   # the first one's manifest is gone with it
    assert [path.name for path in folder.glob("*.manifest.json")] == [f"{ckpt(2)}.manifest.json"]
    assert check_files([folder / ckpt(2)], remember=False) == 1
    assert (folder / ckpt(2)).stat().st_mode & 0o777 == 0o666 & ~umask()
    assert resume.choose(tmp_path / "checkpoint", 1).step == 2
    saved = ms.load_checkpoint(str(tmp_path / "checkpoint/rank_0" / ckpt(2)))
    assert saved["w"].asnumpy().tolist() == [2.0] * 4


def test_the_end_waits_for_the_last_one(saves):
    one = saves(keep_checkpoint_max=3)
    one.gate.clear()
    one.step()
    threading.Timer(0.5, one.gate.set).start()
    one.monitor.end(one.context)
    assert one.names == ["meta.json", ckpt(1)] and not thread.writing()


@pytest.mark.parametrize("at_the_end", [False, True])
def test_failed_write_stops_with_the_step_that_is_lost(saves, at_the_end, capsys):
    one = saves(keep_checkpoint_max=3)
    one.step()
    thread.wait()
    one.fault = OSError(28, "No space left on device")
    one.step()
    thread.wait()
    with pytest.raises(TrainingStopped, match=f"step 2: the checkpoint could not be saved .*No space left on device; "
                                              f"the last complete one is {ckpt(1)}.*--resume_training True"):
        one.monitor.end(one.context) if at_the_end else one.step()
    assert one.names == ["meta.json", ckpt(1)] and one.meta() == ckpt(1)
    assert "Traceback" not in capsys.readouterr().err


def test_failed_write_is_logged_and_the_next_is_tried(saves, monkeypatch):
    from research.telechat.training import saving as module
    lines = []
    monkeypatch.setattr(module.logger, "error", lambda text, *args: lines.append(text % args))
    one = saves(keep_checkpoint_max=3, on_save_error="continue")
    one.fault = OSError(28, "No space left on device")
    one.step()
    thread.wait()
    one.fault = None
    one.step()
    one.monitor.end(one.context)
    assert one.names == ["meta.json", ckpt(2)]
    line, = [line for line in lines if "could not be saved" in line]
    assert line.startswith("step 1: ") and "there is none yet. Training continues" in line


class Disk:
    """os.fsync that takes until it is let go, or fails; it remembers the threads that had to wait for it."""

    def __init__(self, monkeypatch):
        self.gate, self.begun, self.fault, self.waited = threading.Event(), threading.Event(), None, []
        real = os.fsync

        def fsync(descriptor):
            self.waited.append(threading.current_thread())
            self.begun.set()
            if threading.current_thread() is not threading.main_thread():
                self.gate.wait(60)
            if self.fault:
                raise self.fault
            return real(descriptor)
        monkeypatch.setattr(os, "fsync", fsync)


def test_training_does_not_wait_for_the_disk(saves, monkeypatch):
    """A file that has its name but may still be in the system's memory is not complete."""
    one = saves(keep_checkpoint_max=1, save_checkpoint_steps=3)
    for _ in range(3):
        one.step()
    thread.wait()
    one.params.cur_step_num = 5
    disk = Disk(monkeypatch)
    one.step()
    try:
        assert disk.begun.wait(60)
        one.step()                                                 # while the file is brought to disk
        assert thread.writing() and disk.waited and threading.main_thread() not in disk.waited
        assert one.names == ["meta.json", ckpt(3), ckpt(6)] and one.meta() == ckpt(3)
    finally:
        disk.gate.set()
    one.params.cur_step_num = 8
    one.step()                                                     # the next save waits for it
    assert ckpt(3) not in one.names and one.meta() == ckpt(6)
    one.monitor.end(one.context)
    assert one.names == ["meta.json", ckpt(9)] and one.meta() == ckpt(9)


@pytest.mark.parametrize("at_the_end", [False, True])
def test_disk_that_fails_late_stops_like_a_failed_write(saves, monkeypatch, at_the_end):
    one = saves(keep_checkpoint_max=1)
    one.step()
    thread.wait()
    disk = Disk(monkeypatch)
    disk.gate.set()
    disk.fault = OSError(5, "Input/output error")
    one.step()
    assert one.meta() == ckpt(1)
    with pytest.raises(TrainingStopped, match=r"step 2: the checkpoint could not be saved .*Input/output error"):
        one.monitor.end(one.context) if at_the_end else one.step()
    assert ckpt(1) in one.names and one.meta() == ckpt(1)


def adapters(folder):
    """{name: first weight} of the adapters that are written."""
    files = sorted((folder / "checkpoint_trainable/rank_0").glob("*.ckpt"))
    return {path.name: float(ms.load_checkpoint(str(path))["w"].asnumpy()[0]) for path in files}


def adapter(step):
    return f"t_rank_0-trainable_params-1_{step}.ckpt"


def test_training_goes_on_before_the_adapter_is_written(saves, tmp_path):
    """It is written behind its checkpoint, with the weights of its step."""
    one = saves(keep_checkpoint_max=2, save_checkpoint_steps=3, save_trainable_params=True, adapter_config={"r": 4})
    one.gate.clear()
    late = threading.Timer(20, one.gate.set)                       # so that a step that waits ends after all
    late.start()
    for _ in range(5):
        one.step()
    assert not one.gate.is_set() and thread.writing()
    late.cancel()
    folder = tmp_path / "checkpoint_trainable/rank_0"
    assert list(folder.glob("*")) == []
    one.gate.set()
    thread.wait()
    assert list(folder.glob("*")) == []
    one.params.cur_step_num -= 1
    one.step()
    assert adapters(tmp_path) == {adapter(3): 3.0} and json.loads((folder / "adapter_config.json").read_text()) == {
        "r": 4}
    one.step()
    one.monitor.end(one.context)
    assert adapters(tmp_path) == {adapter(3): 3.0, adapter(6): 6.0}
    assert one.names == ["meta.json", ckpt(3), ckpt(6)]


def test_adapters_are_named_and_kept_as_without_async_save(saves, tmp_path):
    one = saves(keep_checkpoint_max=1, save_trainable_params=True, adapter_config={"r": 4})
    for _ in range(3):
        one.step()
    one.monitor.end(one.context)
    assert one.names == ["meta.json", ckpt(3)]
    folder = tmp_path / "checkpoint_trainable/rank_0"
    assert named(folder) == ["adapter_config.json", adapter(3)]


@pytest.mark.parametrize("at_the_end", [False, True])
def test_no_adapter_without_its_checkpoint(saves, tmp_path, at_the_end):
    one = saves(keep_checkpoint_max=3, save_checkpoint_steps=2, save_trainable_params=True, adapter_config={"r": 4})
    for _ in range(3):
        one.step()
        thread.wait()
    one.fault = OSError(28, "No space left on device")
    one.step()
    if not at_the_end:
        thread.wait()                                  # a step tells of a write that has ended
    with pytest.raises(TrainingStopped, match="step 4: "):
        one.monitor.end(one.context) if at_the_end else one.step()
    assert adapters(tmp_path) == {adapter(2): 2.0} and one.names == ["meta.json", ckpt(2)]


def test_adapter_that_cannot_be_written_stops_behind_its_checkpoint(saves, tmp_path):
    one = saves(keep_checkpoint_max=3, save_trainable_params=True, adapter_config={"r": 4})
    one.step()
    thread.wait()
    one.fault = OSError(28, "No space left on device")             # from here on
    with pytest.raises(TrainingStopped, match=f"step 1: .*No space left on device; the last complete one is {ckpt(1)}"):
        one.monitor.end(one.context)
    assert one.meta() == ckpt(1) and list((tmp_path / "checkpoint_trainable/rank_0").iterdir()) == []


def test_adapter_that_cannot_be_copied_leaves_the_write_alone(saves, tmp_path, monkeypatch):
    one = saves(keep_checkpoint_max=3, save_trainable_params=True)

    def fail():
        raise MemoryError("no room")
    one.gate.clear()
    threading.Timer(0.5, one.gate.set).start()
    monkeypatch.setattr(one.params.network, "trainable_params", fail)
    with pytest.raises(TrainingStopped, match=f"step 1: .*no room; the last complete one is {ckpt(1)}"):
        one.step()
    assert one.names == ["meta.json", ckpt(1)] and adapters(tmp_path) == {}


def test_weights_alone_wait_for_their_checkpoint(saves, tmp_path):
    one = saves(keep_checkpoint_max=1, save_network_params=True)
    for _ in range(2):
        one.step()
    one.monitor.end(one.context)
    assert one.names == ["meta.json", ckpt(2)]
    assert named(tmp_path / "checkpoint_network/rank_0") == ["t_rank_0-network-1_2.ckpt"]


def test_not_finite_stops_with_a_write_under_way(saves):
    """Whoever stops the training finds the file whole."""
    one = saves(keep_checkpoint_max=3)
    one.step()

    def stop(_context):
        raise TrainingStopped("nan")
    one.params.list_callback = [SimpleNamespace(before_saving=stop)]
    with pytest.raises(TrainingStopped, match="nan"):
        one.step()
    assert one.names == ["meta.json", ckpt(1)] and one.meta() == ckpt(1)


def test_other_threads_report_as_before(monkeypatch):
    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_value))
    thread.watch()
    thread.watch()

    def fail():
        raise ValueError(threading.current_thread().name)
    for name in ("asyn_save_ckpt", "another"):
        one = threading.Thread(target=fail, name=name)
        one.start()
        one.join()
    assert str(thread.take_fault()) == "asyn_save_ckpt" and thread.take_fault() is None
    assert [str(fault) for fault in seen] == ["another"]


DYING = """
import threading
from research.telechat.training import save_thread as thread

def fail():
    if {write}:
        raise OSError(28, "No space left on device")
thread.watch()
one = threading.Thread(target=fail, name="asyn_save_ckpt")
one.start()
thread.sync_behind("folder/t.ckpt")
{then}
"""


@pytest.mark.parametrize("then", ["raise RuntimeError('another')", "raise KeyboardInterrupt", "pass"])
@pytest.mark.parametrize("write", [True, False])
def test_failed_write_is_reported_if_the_training_fails_otherwise(write, then):
    done = subprocess.run([sys.executable, "-c", DYING.format(write=write, then=then)], cwd=ROOT, text=True,
                          capture_output=True, check=False)
    line, = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "folder/t.ckpt could not be saved: " in line
    assert ("No space left on device" if write else "No such file or directory: 'folder/t.ckpt'") in line
    assert (done.returncode == 0) == (then == "pass")


def test_failed_write_is_told_once():
    done = subprocess.run([sys.executable, "-c", DYING.format(write=True, then="print(thread.take_fault())")], cwd=ROOT,
                          text=True, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == ("[Errno 28] No space left on device\n", "")


def test_ranks_keep_one_more(tmp_path):
    """A rank may have written step N when another still writes N - 1, of which N - 2 is the newest complete one."""
    def keeps(**settings):
        return TelechatCheckpointMonitor(prefix="t", directory=str(tmp_path), keep_checkpoint_max=1, **settings).keep
    assert [keeps(), keeps(async_save=True), keeps(ranks=2), keeps(ranks=2, async_save=True)] == [1, 1, 2, 3]


def test_settings():
    from mindformers.tools.register import MindFormerConfig

    from research.telechat.run import training_setup as setup
    for wish, expected in ((True, True), (False, False), ("thread", True), ("process", True)):
        callback = {"type": "CheckpointMonitor", "async_save": wish}
        setup.complete_monitor(callback, MindFormerConfig(), None, None)
        assert callback["async_save"] is expected
    with pytest.raises(ConfigError, match="async_save must be True or False, found 'yes'"):
        setup.complete_monitor({"async_save": "yes"}, MindFormerConfig(), None, None)


# ---- through the Trainer
