"""Commands that write through MindSpore, killed between two files: nothing half-written counts, the old result is whole
or refused, and the same command then does the rest. For the other commands see tests/checkpoint/test_kills.py."""
import signal
from pathlib import Path

import numpy as np
import prepared
from preprocess_fixtures import SAMPLES, write_lines
from strategy_fixtures import layout, write_strategies

from research.telechat.checkpoint.integrity import check_files
from research.telechat.checkpoint.manifest import Manifest
from research.telechat.checkpoint.writer import OutTensor, new_file
from research.telechat.common.errors import ConfigError
from research.telechat.data.meta import check_dataset_meta, check_hashes

ROOT = Path(__file__).resolve().parents[2]


def killed(what, number, words):
    """Whether the command is killed at the `number`th `what`; otherwise it must end well."""
    done = prepared.run([ROOT / "tests/support/kill_driver.py", what, str(number), *map(str, words)],
                        env={"GLOG_v": "4"})
    assert done.returncode in (0, -signal.SIGKILL), done.stdout + done.stderr
    return done.returncode != 0


def accepted(folder):
    """Whether training takes the data set, which then must be whole."""
    try:
        check_dataset_meta(folder, vocab_size=1 << 20, seq_length=64)
    except ConfigError:
        return False
    assert check_hashes(folder, remember=False) == 2
    return True


def test_preprocess(tmp_path, vocab_files):
    """Killed before any of the renamings with which a second data set takes the place of the first."""
    folder = tmp_path / "data set"
    words = [ROOT / "research/telechat/telechat_preprocess.py", "--output_path", folder, "--vocab_file_path",
             vocab_files["12b"], "--max_length", 64, "--num_workers", 0, "--input_dataset_file"]
    first, second = (write_lines(tmp_path / name, records) for name, records in (
        ("first.jsonl", SAMPLES[:20]), ("second.jsonl", SAMPLES[20:])))
    assert not killed("replace", 99, [*words, first]) and accepted(folder)
    old = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for number in (1, 4, 6):
        assert killed("replace", number, [*words, second])
        assert not accepted(folder)                      # what the killed run has left there says why
        assert number > 1 or all((folder / name).read_bytes() == data for name, data in old.items())
    assert not killed("replace", 99, [*words, second]) and accepted(folder)
    assert (folder / "meta.json").read_bytes() != old["meta.json"] and not list(folder.glob(".unfinished*"))


def test_transform(tmp_path):
    """Killed while a rank's file is made, and before the result gets its name."""
    source, target = tmp_path / "whole.ckpt", tmp_path / "ranks"
    with new_file(source, [OutTensor("w", "F32", (4, 8))], {}, Manifest("mindspore")) as file:
        file.write("w", 0, memoryview(np.arange(32, dtype=np.float32)).cast("B"))
    words = [ROOT / "scripts/transform_checkpoint.py", "--source", source, "--target", target, "--target_strategy",
             write_strategies(tmp_path / "strategy", {"w": layout((1, 2), (0, -1))}, 1)]
    for what, number in (("rank", 2), ("replace", 1), ("replace", 2)):
        assert killed(what, number, words) and not target.exists()
    assert not killed("rank", 99, words)
    assert check_files(list(target.glob("rank_*/*.ckpt")), remember=False) == 2
    assert not list(tmp_path.glob(".*")), "folders of killed runs are removed"
