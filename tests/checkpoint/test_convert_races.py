"""Two conversions of different checkpoints into one place at the same time: one at a time, and never a mixture."""
import os
import sys
import time

import numpy as np
import pytest
from checkpoint_fixtures import assert_same, mindspore_tensors, official_tensors, small_variant, write_official
from convert_fixtures import read_ckpt, to_ms

from research.telechat.checkpoint import writer
from research.telechat.checkpoint.integrity import check_files
from research.telechat.checkpoint.manifest import find_manifest

RACES = 5


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two official folders of one model with different weights, and what they must become."""
    place, variant = tmp_path_factory.mktemp("races"), small_variant("telechat_12b", layers=3)
    made = []
    for seed in range(2):
        tensors = official_tensors(variant, seed=seed)
        made.append((write_official(place / str(seed), variant, tensors), mindspore_tensors(variant, tensors)))
    return made


def start(source, target, log, delay):
    """The command in a process of its own, which waits between two writes; its number."""
    child = os.fork()
    if child:
        return child
    sys.stdout = sys.stderr = log.open("w")
    real = writer.OutputFile._pwrite

    def slow(self, offset, view):
        real(self, offset, view)
        np.random.default_rng(os.getpid()).random(int(2e4 * (1 + delay)))

    writer.OutputFile._pwrite = slow
    code = 99
    try:
        code = to_ms(source, target)
    finally:
        sys.stdout.flush()
        os._exit(code)


@pytest.mark.parametrize("race", range(RACES))
def test_the_result_is_that_of_the_last_one_that_said_done(sources, tmp_path, race):
    target = tmp_path / "out" / "x.ckpt"
    children = {start(source, target, tmp_path / f"{number}.log", race * number): number
                for number, (source, _) in enumerate(sources)}
    codes, ended = {}, []
    while len(ended) < len(children):
        for child in [child for child in children if children[child] not in codes]:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[children[child]] = os.waitstatus_to_exitcode(status)
                ended.append(children[child])
        time.sleep(0.002)
    logs = [(tmp_path / f"{number}.log").read_text() for number in range(2)]
    assert sorted(codes.values()) in ([0, 0], [0, 1]), logs
    for number, code in codes.items():
        assert ("done: " in logs[number]) == (code == 0)
        assert code == 0 or "is being written by process" in logs[number]
    last = [number for number in ended if codes[number] == 0][-1]
    found = read_ckpt(target)
    winners = [number for number, (_, expected) in enumerate(sources)
               if found.keys() == expected.keys() and all(np.array_equal(found[name].bits, raw.bits)
                                                         for name, raw in expected.items())]
    assert winners == [last] if sorted(codes.values()) == [0, 1] else winners in ([0], [1])
    assert_same(found, sources[winners[0]][1])
    assert check_files([target], remember=False) == 1 and find_manifest(target) is not None
    assert sorted(path.name for path in target.parent.iterdir()) == ["x.ckpt", "x.ckpt.manifest.json"]
