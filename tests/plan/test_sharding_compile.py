"""The plans compile for Ascend with a simulated runtime, and send what they should. Nothing is executed.

Setting of the figures: 2 layers, hidden 512, 8 heads, feed-forward 1536, vocabulary 4096, 512 tokens, batch 4, full
recomputation, 16-bit compute. Limits in megabytes per rank and step.
"""
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from compile_fixtures import agree, compiled
from needs import require
from plan_fixtures import small_recipe

from research.telechat.ascend_sim.account import Mesh, Program, load
from research.telechat.ascend_sim.compile import compile_plan
from research.telechat.ascend_sim.elf import Code, SharedObject, write_library
from research.telechat.ascend_sim.runtime import mindspore_folder
from research.telechat.checkpoint.strategy import read_strategy
from research.telechat.plan.cost import cost_of
from research.telechat.plan.plan import find_faults, read_plan

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.usefixtures("ascend_plugin")
class TestCompiled:
    """One compilation each: about twenty seconds on two cores."""

    def test_data_parallel(self):
        plan, graphs = compiled(small_recipe(dp=8))
        assert graphs["step"]["communication"]["bytes"] <= 31.4e6
        agree(plan, 0, graphs["step"])

    def test_remainders_are_kept_and_not_sent(self, tmp_path):
        """Of each matrix the graph computes master - float32(16 bits(master)): the two casts have not cancelled out."""
        recipe = small_recipe(dp=8, model={"compute_dtype": "bfloat16", "param_init_type": "bfloat16"})
        plan, graphs = compiled(recipe, keep=tmp_path)
        agree(plan, 0, graphs["step"])
        assert graphs["step"]["memory"]["remainder"]["float16"] * 2 == cost_of(plan, 0).memory.remainder
        program = Program(load(tmp_path / "step.mindir", mindspore_folder()))
        made_by = {node.output[0]: (graph, node) for graph in program.graphs.values() for node in graph.node}
        rounded = 0
        for _, node in made_by.values():
            if program.operator(node) == "Sub" and node.input[1] in made_by:
                _, outer = made_by[node.input[1]]
                inner = made_by.get(outer.input[0], (None, None))[1] if program.operator(outer) == "Cast" else None
                rounded += inner is not None and program.operator(inner) == "Cast" and inner.input[0] == node.input[0]
        assert rounded == graphs["step"]["memory"]["remainder"]["count"]
        layouts = read_strategy(tmp_path / "output/strategy").layouts    # by which checkpoints are sharded and merged
        kept = [name for name in layouts if name.startswith("adam_r.")]
        assert len(kept) == rounded
        assert all(layouts[name] == layouts[name.replace("adam_r.", "adam_m.")] for name in kept)

    def test_model_parallel(self):
        plan, graphs = compiled(small_recipe(dp=2, mp=4, recompute_config={"recompute_slice_activation": False}))
        assert graphs["step"]["communication"]["bytes"] <= 43e6                # the limit is 80
        agree(plan, 0, graphs["step"])

    def test_sequence_parallel(self, tmp_path):
        recipe = small_recipe(dp=2, mp=4, parallel_config={"use_seq_parallel": True},
                              model={"fused_projections": True, "out_proj_has_bias": False,
                                     "tie_word_embeddings": False})
        plan, graphs = compiled(recipe, keep=tmp_path)
        step = graphs["step"]
        assert step["communication"]["bytes"] <= 45e6                          # the limit is 60
        agree(plan, 0, step)
        # Nothing of the residual stream is reduced to every rank, and it travels in 16 bit: the largest transfer of a
        # single call is three quarters of batch * tokens * hidden * 2 bytes.
        activations = [place for place in step["communication"]["places"] if place["purpose"] == "activations"]
        assert max(place["bytes"] / place["calls"] for place in activations) <= 4 * 512 * 512 * 2 * 3 / 4
        assert {place["operator"] for place in activations if place["bytes"] > 1e5} == {"AllGather", "ReduceScatter"}
        check_strategy(tmp_path / "output/strategy", plan)
        merge_by_strategy(tmp_path / "output/strategy", plan, tmp_path)

    def test_pipeline(self):
        recipe = small_recipe(mp=8, pp=2, model={"n_kv_heads": 8, "num_heads": 16, "num_layers": 3, "offset": [0, 1]},
                              parallel_config={"use_seq_parallel": True, "micro_batch_num": 4})
        plan, graphs = compiled(recipe, rank=8)
        agree(plan, 8, graphs["step"])
        sends = [place for place in graphs["step"]["communication"]["places"] if place["operator"] == "Send"]
        assert {place["axes"] for place in sends} == {"pp"}
        # 4 micro-batches of 4 * 512 * 512 / 8 elements of 16 bit, and the gradient of the tied table
        assert sum(place["bytes"] for place in sends) == 2 * (4 * 4 * 512 * 512 // 8 + 4096 * 512 // 8)
        # Loss, number of tokens, norm and overflow are scalars; all stages have them.
        sums = [place for place in graphs["step"]["communication"]["places"]
                if place["operator"] == "AllReduce" and place["axes"] == "pp"]
        assert 0 < sum(place["bytes"] for place in sums) <= 64

    @pytest.mark.parametrize("rank, limit", [(0, 170e6), (8, 150e6)])
    def test_pipeline_sends_little(self, rank, limit):
        recipe = small_recipe(mp=8, pp=2, parallel_config={"use_seq_parallel": True, "micro_batch_num": 4})
        plan, graphs = compiled(recipe, rank)
        assert graphs["step"]["communication"]["bytes"] <= limit
        agree(plan, rank, graphs["step"])

    def test_layers_of_other_stages_change_nothing(self, tmp_path):
        """An interleaved pipeline, whose layers of the other stage are parsed and inferred, or placeholders."""
        recipe = small_recipe(mp=2, pp=2, model={"num_layers": 4, "pp_interleave_num": 2},
                              parallel={"pipeline_config": {"pipeline_interleave": True, "pipeline_scheduler": "1f1b"}},
                              parallel_config={"use_seq_parallel": True, "micro_batch_num": 4})
        found = []
        for name, all_stages in (("as_on_a_cluster", True), ("shorter", False)):
            _, graphs = compiled(recipe, 2, tmp_path / name, all_stages=all_stages)
            strategy, = (tmp_path / name).glob("output/strategy/*.ckpt")
            found.append(({key: value for key, value in graphs["step"].items() if key != "nodes"},
                          graphs["step"]["nodes"], strategy.read_bytes()))
        (counted, nodes, strategies), (counted_shorter, nodes_shorter, strategies_shorter) = found
        assert counted_shorter == counted and strategies_shorter == strategies
        assert abs(nodes_shorter - nodes) <= 10

    def test_ring_attention_and_heads(self):
        """Both kinds of context parallelism in one plan: over heads by AlltoAll, the rest by sending around."""
        recipe = small_recipe(mp=2, cp=4, parallel={"enable_alltoall": True}, model={"use_ring_attention": True},
                              parallel_config={"context_parallel_algo": "hybrid_cp", "ulysses_degree_in_cp": 2})
        plan, graphs = compiled(recipe)
        agree(plan, 0, graphs["step"])
        found = graphs["step"]["communication"]
        assert found["by_operator"]["Send"] > 0 and found["by_operator"]["AlltoAll"] > 0
        assert {place["axes"] for place in found["places"] if place["operator"] == "Send"} == {"cp"}
        assert graphs["step"]["operators"]["FlashAttentionScore"]["forward"] == 4          # two layers, two rounds

    @pytest.mark.parametrize("kind", ["documents", "padding"])
    def test_masks_with_context_parallelism(self, kind):
        """The mask of each sequence stays out of the gradient and is whole where ulysses cuts heads."""
        form = {"documents": {"document_boundaries": True}, "padding": {"mask_pad_tokens": True}}[kind]
        recipe = small_recipe(cp=4, parallel={"enable_alltoall": True}, model=form,
                              parallel_config={"context_parallel_algo": "hybrid_cp", "ulysses_degree_in_cp": 2})
        if kind == "documents":
            recipe["train_dataset"]["input_columns"] = ["input_ids", "labels", "actual_seq_len"]
        plan, graphs = compiled(recipe)
        agree(plan, 0, graphs["step"])
        ways = graphs["step"]["attention"]
        assert [(way["sparse_mode"], way["mask"]) for way in ways] == [(0, ["uint8", [4, 1, 256, 512]])]

    @pytest.mark.parametrize("cp, sections", [
        (1, {"parallel_config": {"use_seq_parallel": True}}),
        (2, {"parallel_config": {"context_parallel_algo": "ulysses_cp"}, "parallel": {"enable_alltoall": True}})])
    def test_documents_back_to_back(self, cp, sections):
        """Without dropout the kernel gets documents by their ends; the mask of a rank is the triangle."""
        recipe = small_recipe(dp=2, mp=2, cp=cp, model={"document_boundaries": True}, **sections)
        recipe["train_dataset"]["input_columns"] = ["input_ids", "labels", "actual_seq_len"]
        plan, graphs = compiled(recipe)
        agree(plan, 0, graphs["step"])
        ways = graphs["step"]["attention"]
        assert [(way["layout"], way["sparse_mode"], way["mask"], way["query"][1]) for way in ways] == [
            ("TND", 3, ["uint8", [2048, 2048]], [4 * 512, 4 // cp, 64])]

    def test_prediction(self):
        recipe = small_recipe(mp=4, base="predict", model={"n_kv_heads": 4, "tie_word_embeddings": False})
        plan, graphs = compiled(recipe)
        cost = cost_of(plan, 0)
        for name in ("prefill", "decode"):
            memory = graphs[name]["memory"]
            assert cost.memory.parameters == memory["parameters"]["bytes"]
            assert cost.memory.kv_cache == memory["kv_cache"]["bytes"]
        assert graphs["prefill"]["operators"]["FlashAttentionScore"] == {"forward": 2}
        assert graphs["decode"]["operators"]["PagedAttention"] == {"forward": 2}

    def test_fault_of_the_plan_is_named(self):
        """What the planner would have refused, the compiler refuses as well; its words come back."""
        recipe = small_recipe(dp=3, mp=2, parallel={"full_batch": True}, runner_config={"batch_size": 1})
        recipe["parallel_config"]["model_parallel"] = 3
        plan = read_plan(recipe)
        assert find_faults(plan)
        report = compile_plan(recipe, Mesh(1, 3, 1, 3), 0, plan.model.seq_length + 1, timeout=900)
        assert not report["ok"] and "must be a multiple of parallel_config.model_parallel (3)" in report["error"]


def check_strategy(folder, plan):
    """The strategy file that compiling left describes the cut that checkpoint/strategy.py and the arithmetic expect."""
    from research.telechat.checkpoint.strategy import full_shape, read_strategy, region
    strategy = read_strategy(folder)
    assert strategy.ranks == plan.dp * plan.mp
    for weight in plan.layer_weights():
        name = f"model.layers.1.{weight.name}"
        shape = (weight.rows, weight.columns) if weight.columns > 1 else (weight.rows,)
        layout = strategy.layouts[name]
        sizes = [int(np.prod([stop - start for start, stop in region(layout, rank, shape)])) for rank in range(8)]
        pieces = plan.mp if weight.cut else 1
        pieces *= plan.dp * plan.mp // pieces if weight.shardable else 1
        assert set(sizes) == {int(np.prod(shape)) // pieces}, name
        slice_shape = [stop - start for start, stop in region(layout, 0, shape)]
        assert full_shape(layout, slice_shape) == shape


def merge_by_strategy(strategy, plan, folder):
    """Slices cut by hand merge into the whole with the strategy file that compiling left."""
    import mindspore as ms
    rng = np.random.default_rng(3)
    whole = {}
    for weight in plan.layer_weights():
        shape = (weight.rows, weight.columns) if weight.columns > 1 else (weight.rows,)
        whole[f"model.layers.0.{weight.name}"] = rng.standard_normal(shape).astype(np.float16)
    for rank in range(8):
        data, model = divmod(rank, plan.mp)
        content = []
        for weight in plan.layer_weights():
            name = f"model.layers.0.{weight.name}"
            part = whole[name]
            if weight.cut:
                by_input = weight.name.endswith(("wo.weight", "w2.weight"))
                part = np.split(np.split(part, plan.mp, axis=int(by_input))[model], plan.dp)[data]
            content.append({"name": name, "data": ms.Tensor(np.ascontiguousarray(part))})
        (folder / f"slices/rank_{rank}").mkdir(parents=True)
        ms.save_checkpoint(content, str(folder / f"slices/rank_{rank}/a.ckpt"))
    command = [sys.executable, str(ROOT / "scripts/transform_checkpoint.py"), "--source", folder / "slices",
               "--source_strategy", strategy, "--target", folder / "merged"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0 and "every element compared" in done.stdout, done.stdout + done.stderr
    found = ms.load_checkpoint(str(next((folder / "merged/rank_0").iterdir())))
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(found[name].asnumpy(), value)


# ---- without MindSpore's compiler

def test_a_made_library_can_be_read_and_loaded(tmp_path):
    """What the writer makes, the reader and the dynamic linker of this machine understand."""
    import ctypes
    import platform
    machine = {"x86_64": 62, "aarch64": 183}.get(platform.machine())
    require(machine, f"no machine code for {platform.machine()}")
    code = Code(machine)
    symbols = {"aclInit": code.zero(), "aclrtGetDeviceCount": code.answer(8),
               "aclrtGetSocName": code.text("Ascend910B3"), "_ZTIN3acl5ErrorE": None}
    path = tmp_path / "libascendcl.so"
    path.write_bytes(write_library("libascendcl.so", symbols, machine))
    library = ctypes.CDLL(str(path))
    count = ctypes.c_uint(0)
    assert library.aclrtGetDeviceCount(ctypes.byref(count)) == 0 and count.value == 8
    library.aclrtGetSocName.restype = ctypes.c_char_p
    assert library.aclrtGetSocName() == b"Ascend910B3"
    assert library.aclInit(None) == 0
    other = tmp_path / "libhccl.so"
    other.write_bytes(write_library("libhccl.so", {}, machine, ["libascendcl.so"]))
    assert ctypes.CDLL(str(other)).aclInit(None) == 0          # found in the library that this one asks for


def test_libraries_of_this_machine_are_read():
    import _ctypes
    found = SharedObject(Path(_ctypes.__file__))
    assert "PyInit__ctypes" in found.defined and found.needed
    assert "dlopen" not in found.defined and any(name.startswith("Py") for name in found.undefined)
    assert any(b"_ctypes" in text for text in found.constants())


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.so"
    path.write_bytes(b"\x7fELF" + bytes(100))
    with pytest.raises(ValueError, match="not a 64-bit"):
        SharedObject(path)
    with pytest.raises(ValueError, match="processor 40"):
        Code(40)


def test_machine_code_of_both_processors():
    for machine in (62, 183):
        code = Code(machine)
        assert len({code.zero(), code.answer(1), code.answer(2), code.text("a")}) == 4
        assert struct.pack("<I", 8) in code.answer(8) or machine == 183


def test_axes_of_rank_groups():
    mesh = Mesh(pp=2, dp=2, cp=1, mp=4)
    assert mesh.axes([0, 1, 2, 3]) == "mp"
    assert mesh.axes([1, 5]) == "dp"
    assert mesh.axes([3, 11]) == "pp"
    assert mesh.axes(list(range(8))) == "dp+mp"
    assert mesh.axes([5]) == ""
