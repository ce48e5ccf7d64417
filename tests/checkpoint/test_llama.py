"""The Llama layout: unmodified transformers computes what the reference does, and everything comes back bit for bit."""
import json
import math
import shutil

import numpy as np
import pytest
import reference
from checkpoint_fixtures import (
    FAMILIES,
    assert_same,
    from_floats,
    mindspore_tensors,
    official_tensors,
    read_safetensors,
    small_variant,
    write_official,
    write_safetensors,
)
from conversation_fixtures import bot, user
from convert_fixtures import error_of, read_ckpt, to_ms, to_torch
from llama_fixtures import MEMBERS, make_member, vocab_of
from model_fixtures import random_official
from safetensors.numpy import save_file

from research.telechat.checkpoint.manifest import FOLDER_NAME
from research.telechat.checkpoint.writer import partial_path
from research.telechat.commands.convert import main as convert
from research.telechat.common.errors import ConfigError
from research.telechat.spec.llama_config import constant_length, llama_config
from research.telechat.spec.variants import VARIANTS, get_variant, variant_from_hf
from research.telechat.text.renderer import Renderer, get_template
from research.telechat.text.tokenizer_json import probe_texts

TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def members(tmp_path_factory, vocab_files):
    folder = tmp_path_factory.mktemp("llama")
    return {name: make_member(folder / name, name, vocab_files) for name in MEMBERS}


@pytest.mark.parametrize("name", list(MEMBERS))
def test_transformers_computes_the_same_logits_and_greedy_text(members, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    member = members[name]
    model = transformers.AutoModelForCausalLM.from_pretrained(member.llama)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    ids = np.random.default_rng(3).integers(4, 600, (2, 40))
    with torch.no_grad():
        logits = model(torch.tensor(ids)).logits.numpy()
    expected, _ = reference.forward(member.config, member.weights, ids, half=False)
    assert np.abs(logits - expected).max() < TOLERANCE * max(1, np.abs(expected).max())
    assert np.array_equal(logits.argmax(-1), expected.argmax(-1))
    prompt = ids[:1, :5]
    text = model.generate(torch.tensor(prompt), max_new_tokens=6, do_sample=False, eos_token_id=None,
                          repetition_penalty=1.0).numpy()
    for _ in range(6):
        logits, _ = reference.forward(member.config, member.weights, prompt, half=False)
        prompt = np.concatenate([prompt, logits[:, -1:].argmax(-1)], 1)
    assert np.array_equal(text, prompt)


@pytest.mark.parametrize("name", ["7b", "12b", "52b", "telechat2"])
def test_transformers_loads_the_tokenizer_of_the_folder(members, vocabs, name):
    transformers = pytest.importorskip("transformers")
    folder = members[name].llama
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    vocab = vocabs[vocab_of(name)]
    for text in probe_texts(vocab)[::5]:
        assert tokenizer(text).input_ids == vocab.encode_with_specials(text)
    config = json.loads((folder / "config.json").read_text())
    assert tokenizer.eos_token_id == config["eos_token_id"] and tokenizer.pad_token_id == config["pad_token_id"]
    messages = [user("生抽与老抽的区别？"), bot("颜色。"), user("a b")]
    renderer = Renderer(get_template(variant_from_hf(members[name].config).chat_template), vocab)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == (
        renderer.prompt(messages))
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == config["eos_token_id"]


def test_generation_settings_and_official_files_go_along(tmp_path, vocab_files, capfd):
    """The official layout: code and tokenizer by --copy_from; without it the command says what is missing."""
    variant = small_variant("telechat_12b", vocab=600)
    source = write_official(tmp_path / "hf", variant, official_tensors(variant))
    settings = {"eos_token_id": 2, "repetition_penalty": 1.01, "user_token_id": 20}
    (source / "generation_config.json").write_text(json.dumps(settings))
    (source / "modeling_telechat.py").write_text("# official\n")
    shutil.copyfile(vocab_files["12b"], source / "tokenizer.model")
    assert to_ms(source, tmp_path / "x.safetensors") == 0
    capfd.readouterr()
    assert to_torch(tmp_path / "x.safetensors", tmp_path / "bare") == 0
    out = capfd.readouterr().out
    assert "missing: the tokenizer" in out and "missing: the official modeling_*.py" in out
    for _ in range(2):                               # a second time over the first
        assert to_torch(tmp_path / "x.safetensors", tmp_path / "back", "--copy_from", source) == 0
        assert "missing" not in capfd.readouterr().out
    assert {path.name for path in (tmp_path / "back").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "modeling_telechat.py", "tokenizer.model",
        FOLDER_NAME}
    assert json.loads((tmp_path / "back/generation_config.json").read_text()) == settings
    assert to_torch(tmp_path / "x.safetensors", tmp_path / "llama", "--layout", "llama", "--tokenizer", source) == 0
    out = capfd.readouterr().out
    assert "missing" not in out and "texts compared with tokenizer.model, all equal" in out
    written = json.loads((tmp_path / "llama/generation_config.json").read_text())
    assert written.items() >= settings.items() and written["pad_token_id"] == 3
    assert not (tmp_path / "llama/modeling_telechat.py").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path, vocab_files, capfd):
    variant = small_variant("telechat_12b", vocab=600)
    source = write_official(tmp_path / "hf", variant, official_tensors(variant))
    for family, fault in (("52b", "the user token '<_user>' of the template telechat"), ("missing", "not found")):
        path = vocab_files.get(family, tmp_path / "nothing.model")
        assert fault in error_of(capfd, convert(["--from", str(source), "--to", "llama", str(tmp_path / "out"),
                                                 "--tokenizer", str(path)]))
    small = small_variant("telechat_12b")
    source = write_official(tmp_path / "small", small, official_tensors(small))
    assert "is the tokenizer of another model: it has 600 tokens, the model 11" in error_of(capfd, convert([
        "--from", str(source), "--to", "llama", str(tmp_path / "out"), "--tokenizer", str(vocab_files["12b"])]))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["7b", "52b"])
def test_a_folder_that_transformers_saved_comes_back(members, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    member = members[name]
    transformers.AutoModelForCausalLM.from_pretrained(member.llama).save_pretrained(
        tmp_path / "saved", max_shard_size="40KB")
    assert convert(["--from", str(tmp_path / "saved"), "--to", "official", str(tmp_path / "back")]) == 0
    official = read_safetensors(member.official / "model.safetensors")
    found = read_safetensors(*(tmp_path / "back").glob("*.safetensors"))
    assert_same({key: raw for key, raw in found.items() if "masked_bias" not in key}, official)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == member.config


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_there_and_back_is_bit_exact(family, tmp_path):
    """Official and MindSpore to Llama are the same; from there both come back. float16, bfloat16 and float32."""
    variant = small_variant(family)
    for dtype in ("F16", "BF16", "F32"):
        work = tmp_path / dtype
        official = official_tensors(variant, dtype)
        if variant.logits_scale != 1:                # of float16's least numbers the scale would take bits
            official["lm_head.weight"] = from_floats(dtype, np.rint(np.random.default_rng(1).normal(
                0, 9, official["lm_head.weight"].bits.shape)))
        write_official(work / "hf", variant, official, shards=2)
        write_safetensors(work / "ms.safetensors", mindspore_tensors(variant, official), {"format": "ms"})
        assert convert(["--from", str(work / "hf"), "--to", "llama", str(work / "a"), "--verify",
                        "--max_shard_size", "3KB"]) == 0
        assert to_torch(work / "ms.safetensors", work / "b", "--layout", "llama", "--verify", "--config",
                        work / "hf") == 0
        llama = read_safetensors(*(work / "a").glob("*.safetensors"))
        assert_same(read_safetensors(*(work / "b").glob("*.safetensors")), llama)
        assert (work / "a/config.json").read_text() == (work / "b/config.json").read_text()
        assert to_ms(work / "a", work / "back.ckpt", "--verify") == 0
        assert_same(read_ckpt(work / "back.ckpt"), mindspore_tensors(variant, official))
        assert convert(["--from", str(work / "a"), "--to", "official", str(work / "back"), "--verify"]) == 0
        assert_same(read_safetensors(*(work / "back").glob("*.safetensors")), official)


def test_rows_of_key_and_value_and_the_scale_of_the_head(tmp_path):
    """Written out by hand: k of a head, then v of it, head after head; 52B's head times its scale."""
    variant = small_variant("telechat2_115b", layers=1)
    official = official_tensors(variant)
    convert(["--from", str(write_official(tmp_path / "hf", variant, official)), "--to", "llama", str(tmp_path / "a")])
    llama = read_safetensors(tmp_path / "a/model.safetensors")
    rows = official["transformer.h.0.self_attention.key_value.weight"].bits      # 2 heads: 6 rows of k, 6 of v, ...
    assert np.array_equal(llama["model.layers.0.self_attn.k_proj.weight"].bits, np.concatenate([rows[:6], rows[12:18]]))
    assert np.array_equal(llama["model.layers.0.self_attn.v_proj.weight"].bits, np.concatenate([rows[6:12], rows[18:]]))
    assert not llama["model.layers.0.mlp.up_proj.bias"].bits.any()
    variant = small_variant("telechat_52b", layers=1)
    official = official_tensors(variant, "F32")
    convert(["--from", str(write_official(tmp_path / "52b", variant, official)), "--to", "llama", str(tmp_path / "b")])
    llama = read_safetensors(tmp_path / "b/model.safetensors")
    assert np.array_equal(llama["lm_head.weight"].bits.view(np.float32),
                          official["lm_head.weight"].bits.view(np.float32) / 32)
    assert not any(name.endswith(".bias") for name in llama)


def test_numbers_that_the_scale_rounds_are_counted(tmp_path, capfd):
    variant = small_variant("telechat_52b", layers=1)
    official = official_tensors(variant)
    official["lm_head.weight"].bits[0, :3] = [1, 0x0400 + 1, 0x3C01]           # least number, 2^-14 + ..., 1 + 2^-10
    folder = write_official(tmp_path / "hf", variant, official)
    assert convert(["--from", str(folder), "--to", "llama", str(tmp_path / "a")]) == 0
    assert "lm_head.weight: 2 values were rounded" in capfd.readouterr().out


@pytest.mark.parametrize("name, theta, length", [
    ("telechat_7b", 30527.7, 8192), ("telechat_12b", 10000, 8192), ("telechat_52b", 10000, 4096),
    ("telechat2_3b", 10000, 8192), ("telechat2_115b", 10000, 8192)])
def test_base_of_the_rotation(name, theta, length):
    config = llama_config(get_variant(name), "bfloat16")
    assert config["rope_theta"] == pytest.approx(theta, rel=1e-5) and config["max_position_embeddings"] == length


def test_trained_beyond_the_base_length_has_the_base_of_its_own_rule():
    variant = get_variant("telechat2_7b")
    variant = type(variant)(**{**vars(variant), "base_seqlen": 8192, "training_seqlen": 32768})
    assert llama_config(variant, "bfloat16")["rope_theta"] == pytest.approx(72195.9, rel=1e-5)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_length_at_which_the_rotation_changes_is_refused(name):
    variant = get_variant(name)
    limit = constant_length(variant)
    assert llama_config(variant, "float16", limit)["max_position_embeddings"] == limit
    with pytest.raises(ConfigError, match=f"at most {limit} "):
        llama_config(variant, "float16", limit + 1)


TELECHAT3 = {"model_type": "telechat3", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 64,
             "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False, "bos_token_id": 1,
             "eos_token_id": 2, "pad_token_id": 3, "rope_scaling": {
                 "rope_type": "telechat3-yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.5,
                 "original_max_position_embeddings": 16}}


def test_telechat3_gets_a_rotation_that_others_know(tmp_path):
    """Its tensors are Llama's already; its own rope_type becomes yarn with the factor written out. And back."""
    weights = random_official(TELECHAT3)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps(TELECHAT3))
    save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, tmp_path / "hf/model.safetensors")
    assert convert(["--from", str(tmp_path / "hf"), "--to", "llama", str(tmp_path / "llama")]) == 0
    config = json.loads((tmp_path / "llama/config.json").read_text())
    factor = 0.07 * math.log(4) + 1
    assert config["rope_scaling"]["rope_type"] == "yarn" and not config["attention_bias"]
    assert config["rope_scaling"]["attention_factor"] == pytest.approx(factor)
    assert_same(*(read_safetensors(tmp_path / name / "model.safetensors") for name in ("llama", "hf")))
    assert convert(["--from", str(tmp_path / "llama"), "--to", "official", str(tmp_path / "back")]) == 0
    assert json.loads((tmp_path / "back/config.json").read_text()) == TELECHAT3
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.model.rotary_emb.attention_scaling == pytest.approx(factor)


@pytest.fixture
def small(tmp_path):
    """A small 12B in the Llama layout."""
    variant = small_variant("telechat_12b")
    folder = write_official(tmp_path / "hf", variant, official_tensors(variant))
    assert convert(["--from", str(folder), "--to", "llama", str(tmp_path / "llama")]) == 0
    return tmp_path / "llama"


def change(folder, drop=(), tensors=None, **config):
    """Make a Llama folder one from elsewhere: other tensors, other keys of config.json, no manifest."""
    (folder / FOLDER_NAME).unlink()
    path = folder / "config.json"
    found = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))
    weights = read_safetensors(folder / "model.safetensors")
    weights.update(tensors or {})
    write_safetensors(folder / "model.safetensors", {key: raw for key, raw in weights.items() if key not in drop})


def test_a_llama_without_our_key_needs_the_name(small, tmp_path, capfd):
    change(small, telechat_config=...)
    assert "is a Llama without the key 'telechat_config'" in error_of(capfd, to_ms(small, tmp_path / "x.ckpt"))
    error = error_of(capfd, to_ms(small, tmp_path / "x.ckpt", "--model_name", "telechat_12b"))
    assert "key 'vocab_size' is 11, the TeleChat model has 120000" in error
    assert to_ms(small, tmp_path / "x.ckpt", "--config", tmp_path / "hf") == 0


@pytest.mark.parametrize("changes, fault", [
    ({"vocab_size": 12}, "key 'vocab_size' is 12"),
    ({"num_key_value_heads": 2}, "key 'num_key_value_heads' is 2"),
    ({"tie_word_embeddings": True}, "key 'tie_word_embeddings' is True"),
    ({"rope_theta": 500000.0}, "key 'rope_theta' is 500000.0"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "of the type 'llama3'"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantised (awq)"),
])
def test_foreign_and_quantised_configs_are_one_line(small, tmp_path, capfd, changes, fault):
    change(small, **changes)
    assert fault in error_of(capfd, to_ms(small, tmp_path / "out" / "x.ckpt"))
    assert not (tmp_path / "out").exists()


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("drop, add, fault", [
    ([Q + ".weight"], {}, f"1 parameters are missing: {Q}.weight"),
    ([Q + ".weight"], {Q + ".qweight": "weight", Q + ".scales": "bias"}, "are quantised"),
    ([], {Q + ".base_layer.weight": "weight"}, "merge LoRA adapters first"),
    ([], {Q + ".bias": "ones"}, "has nonzero values"),
    ([Q + ".bias"], {}, None),
])
def test_foreign_weights_are_one_line(small, tmp_path, capfd, drop, add, fault):
    weights = read_safetensors(small / "model.safetensors")
    ones = weights["model.layers.0.input_layernorm.weight"]
    change(small, drop, {name: ones if key == "ones" else weights[f"{Q}.{key}"] for name, key in add.items()})
    code = to_ms(small, tmp_path / "out" / "x.ckpt")
    if fault is None:
        assert code == 0
        return
    assert fault in error_of(capfd, code)
    assert not (tmp_path / "out").exists()


def test_half_an_export_is_no_folder_to_load(small, tmp_path, capfd):
    (small / "model.safetensors").rename(partial_path(small / "model.safetensors"))
    assert "contains no *.safetensors" in error_of(capfd, to_ms(small, tmp_path / "x.ckpt"))


def test_a_folder_of_another_model_and_a_single_file_are_refused(small, tmp_path, capfd):
    other = small_variant("telechat_12b", ffn=24)
    folder = write_official(tmp_path / "other", other, official_tensors(other))
    error = error_of(capfd, convert(["--from", str(folder), "--to", "llama", str(small)]))
    assert "describes another model" in error
    error = error_of(capfd, convert(["--from", str(folder), "--to", "llama", str(tmp_path / "x.safetensors")]))
    assert "the Llama layout is a folder" in error
