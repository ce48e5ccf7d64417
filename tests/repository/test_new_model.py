"""A new model takes an entry in the table of variants and a recipe, as docs/architecture.md shows: with both added, a
copy of the project converts the model's checkpoint, computes the model, and plans it."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from house import PAGE, ROOT
from model_fixtures import random_official
from reference import cross_entropy, forward
from safetensors.numpy import load_file, save_file

# A model that the table does not have: TeleChat2's conventions with tied embeddings and grouped-query attention.
ENTRY = """\
    "telechat2_mini": Variant(2, 64, 96, 8, 320, n_kv_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-6,
                              training_seqlen=32, base_seqlen=16, hf_layout="telechat2", chat_template="telechat2",
                              eos_token_id=7, user_token_id=4, bot_token_id=5),
"""
RECIPE = """\
base_config: ../../configs/telechat/finetune.yaml
parallel_config:
  data_parallel: 4
  model_parallel: 2
model:
  model_config:
    net_name: telechat2_mini
    seq_length: 32
"""
# Its official config.json, as its makers would have published it.
OFFICIAL = {"n_layer": 2, "hidden_size": 64, "ffn_hidden_size": 96, "n_head": 8, "num_key_value_heads": 2,
            "vocab_size": 320, "layer_norm_epsilon": 1e-6, "training_seqlen": 32, "base_seqlen": 16, "seq_length": 32,
            "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 3}
COMPUTE = """\
import mindspore as ms
import numpy as np
from research.telechat.recipe.read import read_recipe, resolve_config
from research.telechat.telechat import TelechatForCausalLM
from research.telechat.telechat_config import TelechatConfig

recipe = read_recipe(resolve_config("telechat/finetune_telechat2_mini.yaml"))
section = {key: value for key, value in recipe["model"]["model_config"].items() if key not in ("type", "auto_register")}
ms.set_context(device_target="CPU")
model = TelechatForCausalLM(TelechatConfig(**{**section, "amp_level": "O0", "compute_dtype": "float32",
                                              "param_init_type": "float32", "res_dtype": "float32",
                                              "use_past": True, "num_blocks": 16}))
model.set_train(False)
missing, _ = ms.load_param_into_net(model, ms.load_checkpoint("mini.ckpt"))
assert not missing, missing
ids = np.load("ids.npy")
logits = model(ms.Tensor(ids)).asnumpy()
answer = model.generate([ids[0, :8].tolist()], do_sample=False, max_new_tokens=6, eos_token_id=[-1])[0]
model.set_train(True)
total, count = model(ms.Tensor(ids), ms.Tensor(ids))
loss = (total / count).asnumpy().item()
np.savez("computed.npz", logits=logits, answer=answer, loss=loss)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project to which someone has added a model: an entry of the table and a recipe."""
    root = tmp_path_factory.mktemp("checkout")
    for folder in ("research", "configs", "scripts"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run_mindformer.py", root)
    table = root / "research/telechat/spec/variants.py"
    text = table.read_text(encoding="utf-8")
    last = text.index("}\n", text.index("VARIANTS: Dict"))
    table.write_text(text[:last] + ENTRY + text[last:], encoding="utf-8")
    (root / "research/telechat/finetune_telechat2_mini.yaml").write_text(RECIPE, encoding="utf-8")
    (root / "official").mkdir()
    (root / "official/config.json").write_text(json.dumps(OFFICIAL))
    save_file(random_official(OFFICIAL), root / "official/model.safetensors")
    return root


def command(root: Path, *words: str) -> str:
    """Run a command of the copy; what it prints."""
    done = subprocess.run([sys.executable, *words], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_new_model_takes_under_15_lines():
    assert len((ENTRY + RECIPE).splitlines()) < 15
    assert ENTRY in PAGE and RECIPE in PAGE, "docs/architecture.md shows what this test adds"


@pytest.mark.slow
def test_a_new_model_converts_both_ways_and_computes(checkout):
    """Logits, loss and greedy tokens equal those of a NumPy forward pass with the official weights."""
    command(checkout, "research/telechat/convert_weight_torch_to_ms.py", "--torch_path", "official", "--mindspore_path",
            "mini.ckpt", "--model_name", "telechat2_mini")
    command(checkout, "research/telechat/convert_weight_ms_to_torch.py", "--mindspore_path", "mini.ckpt",
            "--torch_path", "back", "--model_name", "telechat2_mini")                # sizes: from the table
    official, back = (load_file(checkout / name / "model.safetensors") for name in ("official", "back"))
    assert official.keys() == back.keys() and not any("lm_head" in name for name in back)
    assert all(np.array_equal(official[name], back[name]) for name in official)
    config = json.loads((checkout / "back/config.json").read_text())
    assert {key: config.get(key) for key in OFFICIAL} == OFFICIAL
    ids = np.random.default_rng(0).integers(0, OFFICIAL["vocab_size"], (2, 20)).astype(np.int32)
    np.save(checkout / "ids.npy", ids)
    command(checkout, "-c", COMPUTE)
    computed = np.load(checkout / "computed.npz")
    np.testing.assert_allclose(computed["logits"], forward(OFFICIAL, official, ids, half=False)[0], atol=2e-4)
    losses = cross_entropy(forward(OFFICIAL, official, ids[:, :-1], half=False)[0], ids)
    np.testing.assert_allclose(computed["loss"], losses.mean(), atol=2e-5)
    answer = ids[:1, :8]
    for _ in range(6):
        token = forward(OFFICIAL, official, answer, half=False)[0][:, -1:].argmax(-1)
        answer = np.concatenate([answer, token], 1)
    assert computed["answer"].tolist() == answer[0].tolist()


def test_a_new_model_is_planned(checkout):
    plan = ["scripts/plan.py", "--config", "research/telechat/finetune_telechat2_mini.yaml"]
    assert command(checkout, *plan, "--ranks", "8", "--check") == ""
    command(checkout, *plan, "--ranks", "8", "--json", "plan.json")
    assert json.loads((checkout / "plan.json").read_text())
    wrong = subprocess.run([sys.executable, *plan, "--ranks", "16", "--parallel_config.model_parallel", "4"],
                           cwd=checkout, capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 1 and "n_kv_heads (2)" in wrong.stderr      # the new entry's, not a default
