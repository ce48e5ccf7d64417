"""The graph that scores texts compiles for Ascend, sharded over cards, in a simulated runtime. Not executed."""
import json
from pathlib import Path

import prepared
import pytest
from plan_fixtures import small_recipe

from research.telechat.ascend_sim import runtime

ROOT = Path(__file__).resolve().parents[2]

COMPILE = """
import json, os, sys
import mindspore as ms
import numpy as np
from mindformers.core.context import build_context
from mindformers.core.parallel_config import build_parallel_config
from mindformers.tools.register import MindFormerConfig
from research.telechat.telechat import TelechatForCausalLM
from research.telechat.telechat_config import TelechatConfig
from research.telechat.evaluation.score import _ScoreGraph
with open("recipe.json") as file:
    config = MindFormerConfig(**json.load(file))
build_context(config)
build_parallel_config(config)
section = {key: value for key, value in config.model.model_config.items() if key not in ("type", "auto_register")}
model = TelechatForCausalLM(TelechatConfig(**section, parallel_config=config.parallel_config))
model.set_train(False)
model.set_dynamic_inputs()                      # as after a generation
graph = _ScoreGraph(model)
sizes = ((8, 128), (8,), (2, 128), (2, 128))
graph.compile(*(ms.Tensor(np.ones(size, np.int32)) for size in sizes))
print("compiled for", ms.get_context("device_target"), ms.get_auto_parallel_context("parallel_mode"), flush=True)
os._exit(0)                                     # there is no device to tear down
"""


@pytest.mark.slow
@pytest.mark.usefixtures("ascend_plugin")
@pytest.mark.parametrize("dp, model", [
    (1, {"seq_length": 256, "training_seqlen": 64, "base_seqlen": 64, "tie_word_embeddings": False}),
    (2, {"seq_length": 256})], ids=["mp2", "dp2-mp2"])
def test_score_graph_compiles(tmp_path, dp, model):
    """mp2: a rotary rule that depends on the length, an untied head; dp2 mp2: the batch is split too."""
    recipe = small_recipe(dp=dp, mp=2, base="predict", model=model)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    environment = {**runtime.environment(2 * dp, 0), "GLOG_v": "3", "LOG_MF_PATH": str(tmp_path / "log")}
    (tmp_path / "compile.py").write_text(COMPILE)
    done = prepared.run([tmp_path / "compile.py"], tmp_path, environment, ascend=True)
    assert "compiled for Ascend semi_auto_parallel" in done.stdout, done.stderr[-3000:]
