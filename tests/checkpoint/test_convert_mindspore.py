"""What the converter writes, read by MindSpore itself, and what MindSpore writes, read by the converter."""
import json

import numpy as np
import pytest
from checkpoint_fixtures import (
    FAMILIES,
    assert_same,
    mindspore_tensors,
    official_tensors,
    read_safetensors,
    small_variant,
    write_official,
)
from convert_fixtures import read_ckpt, to_ms, to_torch

from research.telechat.checkpoint import writer as checkpoint_writer
from research.telechat.checkpoint.reader import open_ckpt
from research.telechat.spec.hf_config import hf_config

pytestmark = pytest.mark.matrix

ms = pytest.importorskip("mindspore")
DTYPES = {"F16": "Float16", "BF16": "BFloat16", "F32": "Float32"}


def assert_loaded(loaded, expected):
    """Parameters of MindSpore hold exactly the expected bits."""
    assert set(loaded) == set(expected)
    for name, raw in expected.items():
        assert str(loaded[name].dtype) == DTYPES[raw.dtype] and loaded[name].shape == raw.bits.shape, name
        assert loaded[name].asnumpy().tobytes() == np.ascontiguousarray(raw.bits).tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_mindspore_loads_every_result(name, dtype, tmp_path):
    variant = small_variant(name)
    official = official_tensors(variant, dtype, any_bits=True)
    expected = mindspore_tensors(variant, official)
    source = write_official(tmp_path / "hf", variant, official)
    assert to_ms(source, tmp_path / "x.ckpt", "--model_name", name) == 0
    assert to_ms(source, tmp_path / "x.safetensors", "--model_name", name) == 0
    assert_loaded(ms.load_checkpoint(str(tmp_path / "x.ckpt")), expected)
    assert_loaded(ms.load_checkpoint(str(tmp_path / "x.safetensors"), format="safetensors"), expected)


def test_ckpt_is_the_very_file_that_mindspore_would_write(tmp_path):
    variant = small_variant("telechat_12b")
    source = write_official(tmp_path / "hf", variant, official_tensors(variant, "BF16"))
    assert to_ms(source, tmp_path / "ours.ckpt") == 0
    loaded = ms.load_checkpoint(str(tmp_path / "ours.ckpt"))
    ms.save_checkpoint([{"name": name, "data": value} for name, value in loaded.items()], str(tmp_path / "theirs.ckpt"))
    assert (tmp_path / "ours.ckpt").read_bytes() == (tmp_path / "theirs.ckpt").read_bytes()


def test_tensors_in_slices_are_put_together(tmp_path, monkeypatch):
    variant = small_variant("telechat_52b")
    official = official_tensors(variant, "F32")
    monkeypatch.setattr(checkpoint_writer, "SLICE", 1000)           # 512 MB in earnest
    source = write_official(tmp_path / "hf", variant, official)
    assert to_ms(source, tmp_path / "x.ckpt") == 0
    assert_loaded(ms.load_checkpoint(str(tmp_path / "x.ckpt")), mindspore_tensors(variant, official))
    assert_same(read_ckpt(tmp_path / "x.ckpt"), mindspore_tensors(variant, official))


@pytest.mark.parametrize("crc", [False, True])
def test_files_that_mindspore_saved_are_read(crc, tmp_path):
    variant = small_variant("telechat_12b")
    official = official_tensors(variant, "F16")
    params = [{"name": name, "data": ms.Tensor(raw.bits.view(np.float16))}
              for name, raw in mindspore_tensors(variant, official).items()]
    counters = {"epoch_num": 3, "step_num": 12, "global_step": ms.Tensor([12], ms.int32), "loss_scale": 65536.0}
    (tmp_path / "config.json").write_text(json.dumps(hf_config(variant)))
    for number, (suffix, extra) in enumerate({"ckpt": {"crc_check": crc, "append_dict": counters},
                                              "safetensors": {"format": "safetensors"}}.items()):
        file = tmp_path / f"x.{suffix}"
        ms.save_checkpoint(params, str(file), **extra)
        assert to_torch(file, tmp_path / f"back{number}") == 0
        assert_same(read_safetensors(tmp_path / f"back{number}" / "model.safetensors"), official)


def test_scalars_and_text_of_a_ckpt_are_read_without_harm(tmp_path):
    ms.save_checkpoint([{"name": "a", "data": ms.Tensor(1.5, ms.float32)}], str(tmp_path / "x.ckpt"),
                       append_dict={"note": "text", "flag": True})
    tensors = open_ckpt(tmp_path / "x.ckpt").tensors
    assert tensors["a"][:3] == ("F32", (), 4) and tensors["note"].dtype == "str"


class Parameters(ms.nn.Cell):
    """A cell with the given parameters, all zero."""

    def __init__(self, shapes):
        super().__init__()
        self.held = ms.ParameterTuple([ms.Parameter(ms.ops.zeros(shape, ms.float16), name=name)
                                       for name, shape in shapes.items()])


def test_the_distributed_loader_reads_a_folder_of_shards(tmp_path):
    """mindspore.load_distributed_checkpoint is what MindFormers calls for use_parallel with auto_trans_ckpt; it finds
    the shards by param_name_map.json."""
    variant = small_variant("telechat_52b")
    official = official_tensors(variant, "F16")
    expected = mindspore_tensors(variant, official)
    source = write_official(tmp_path / "hf", variant, official)
    assert to_ms(source, tmp_path / "ms", "--format", "safetensors", "--max_shard_size", "4KB") == 0
    assert len(list((tmp_path / "ms").glob("*.safetensors"))) > 2
    network = Parameters({name: raw.bits.shape for name, raw in expected.items()})
    missing, unexpected = ms.load_distributed_checkpoint(network, unified_safetensors_dir=str(tmp_path / "ms"),
                                                         format="safetensors")
    assert not missing and not unexpected
    assert_loaded({param.name: param for param in network.get_parameters()}, expected)
