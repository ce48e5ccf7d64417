"""Generation with and without a KV cache: the same tokens as an independent forward pass, and as the official code."""
import json

import numpy as np
import pytest
from golden import SHARED, needs_shared
from model_fixtures import HF_CONFIGS, build_model, random_official
from reference import forward

from research.telechat.common.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.matrix]
GREEDY = {"do_sample": False, "eos_token_id": -1}
PROMPTS = [[5, 11, 23, 42, 7], [60, 9, 33, 12, 45, 71, 20, 88, 14], [17, 66]]


def reference_answer(hf_config, weights, prompt, new):
    """Greedy decoding by the reference, everything recomputed for each token."""
    ids = list(prompt)
    for _ in range(new):
        logits, _ = forward(hf_config, weights, np.array([ids]))
        ids.append(int(logits[0, -1].argmax()))
    return ids


@pytest.fixture(scope="module")
def models():
    """Models by family and settings, made once."""
    made = {}

    def get(family, composed=False, **overrides):
        """composed: without the fused operators of a CPU."""
        from research.telechat.generation.engine import DirectEngine
        key = (family, composed, *sorted(overrides.items()))
        if key not in made:
            weights = random_official(HF_CONFIGS[family])
            overrides = {"seq_length": 64, "num_blocks": 16, **overrides}
            model = build_model(HF_CONFIGS[family], weights, **overrides)
            if composed:
                model._step_engine = DirectEngine(model)
            made[key] = model, weights
        return made[key]
    return get


def answers(model, prompts, **settings):
    return [list(ids) for ids in model.generate(prompts, **{**GREEDY, **settings})]


@pytest.mark.parametrize("family, composed", [
    *((family, False) for family in HF_CONFIGS), ("52b", True), ("telechat2_gqa", True)])
def test_cached_tokens_are_those_of_the_reference(models, family, composed):
    """A batch of mixed lengths. telechat2_gqa passes training_seqlen, where the rotary scaling changes all the time."""
    model, weights = models(family, composed, use_past=True)
    assert type(model._engine()).__name__ == ("DirectEngine" if composed else "NativeEngine")
    expected = [reference_answer(HF_CONFIGS[family], weights, prompt, 14) for prompt in PROMPTS]
    assert answers(model, PROMPTS, max_new_tokens=14) == expected
    assert answers(model, [*PROMPTS[1:], PROMPTS[0]], max_new_tokens=14) == [*expected[1:], expected[0]]


def test_uncached_tokens_are_those_of_the_reference(models):
    model, weights = models("telechat2_gqa", use_past=False)
    assert answers(model, PROMPTS[:2], max_new_tokens=10) == [
        reference_answer(HF_CONFIGS["telechat2_gqa"], weights, prompt, 10) for prompt in PROMPTS[:2]]


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_mindformers_own_loop_gives_the_same(models, is_dynamic):
    """`forward` and `generate` of MindFormers, as an Ascend runs them, with the composed cache."""
    from mindformers.generation.text_generator import GenerationMixin

    from research.telechat.generation.engine import FrameworkEngine
    model, weights = models("telechat2_gqa", use_past=True, is_dynamic=is_dynamic)
    expected = [reference_answer(HF_CONFIGS["telechat2_gqa"], weights, prompt, 10) for prompt in PROMPTS[:2]]
    model._step_engine = FrameworkEngine(model)
    assert answers(model, PROMPTS[:2], max_new_tokens=10) == expected
    left = [[3] * (9 - len(prompt)) + prompt for prompt in PROMPTS[:2]]
    assert [ids[9:] for ids in answers(model, left, max_new_tokens=10)] == [
        ids[len(prompt):] for ids, prompt in zip(expected, PROMPTS)]
    padded = [prompt + [3] * (9 - len(prompt)) for prompt in PROMPTS[:2]]
    theirs = GenerationMixin.generate(model, padded, max_new_tokens=10, do_sample=False, eos_token_id=[-1])
    assert [list(ids) for ids in theirs] == expected
    assert len(model.compile_cache) == 2


def test_two_graphs_serve_all_lengths(models):
    """Prompts and answers of many lengths compile one graph for prompts and one for a batch size."""
    for composed in (False, True):
        model, _ = models("12b", composed, use_past=True)
        rng = np.random.RandomState(0)
        for length in (1, 2, 15, 16, 17, 33, 50):
            answers(model, rng.randint(4, 97, (3, length)).tolist(), max_new_tokens=5)
        engine = model._step_engine
        assert list(engine._tokens if composed else engine._steps) == ([3] if composed else [None, 3])
        graphs = [*engine._prompts.values(), *engine._tokens.values()] if composed else engine._steps.values()
        assert [len(graph.compile_cache) for graph in graphs] == [1, 1]


def test_long_prompts_are_read_in_blocks(models):
    """Prompts of more tokens than are read together, padded to a multiple of the blocks or not."""
    model, weights = models("12b", True, use_past=True, seq_length=320, num_blocks=20)
    for length in (301, 304):
        prompt = np.random.RandomState(length).randint(4, 97, length).tolist()
        assert answers(model, [prompt], max_new_tokens=3) == [reference_answer(HF_CONFIGS["12b"], weights, prompt, 3)]
    assert [len(graph.compile_cache) for graph in model._step_engine._prompts.values()] == [1]


def test_plain_call_needs_no_cache(models):
    """A model with a cache, called as for evaluation, gives the logits of all positions."""
    from model_fixtures import logits_of
    model, weights = models("12b", use_past=True)
    ids = np.array([PROMPTS[0], PROMPTS[1][:5]])
    np.testing.assert_allclose(logits_of(model, ids), forward(HF_CONFIGS["12b"], weights, ids)[0], atol=1e-4)


def test_without_graphs(models):
    """PyNative mode, after graphs have been compiled for the same model."""
    import mindspore as ms
    for composed in (False, True):
        model, _ = models("12b", composed, use_past=True)
        expected = answers(model, PROMPTS, max_new_tokens=4)
        ms.set_context(mode=ms.PYNATIVE_MODE)
        try:
            assert answers(model, PROMPTS, max_new_tokens=4) == expected
        finally:
            ms.set_context(mode=ms.GRAPH_MODE)


def test_what_the_fused_operators_cannot_compute(monkeypatch):
    """16-bit types, adapters and a machine without them: MindSpore's own operators; parameters keep their names."""
    from mindspore.common import dtype as mstype

    from research.telechat.model import kernels
    from research.telechat.telechat import TelechatForCausalLM
    from research.telechat.telechat_config import TelechatConfig
    config = {**HF_CONFIGS["telechat2_gqa"], "n_layer": 1}

    def engine(change=lambda model: None, **settings):
        model = TelechatForCausalLM(TelechatConfig.from_hf_config(config, use_past=True, seq_length=64, num_blocks=4,
                                                                  **settings))
        change(model)
        names = [parameter.name for parameter in model.get_parameters()]
        found = type(model._engine()).__name__
        assert [parameter.name for parameter in model.get_parameters()] == names
        return found

    def adapt(model):
        class Adapted(type(model.model.layers[0].attention.wq)):
            pass
        model.model.layers[0].attention.wq.__class__ = Adapted

    def half(model):
        model.model.norm_out.weight.set_dtype(mstype.float16)

    assert engine() == "NativeEngine"
    assert engine(adapt) == engine(half) == engine(compute_dtype="float16") == "DirectEngine"
    assert engine(softmax_compute_type="float16") == engine(res_dtype="float16") == "DirectEngine"
    monkeypatch.setattr(kernels, "available", lambda: False)
    assert engine() == "DirectEngine"


def test_direct_engine_refuses_the_fused_kernels(monkeypatch):
    """They read the lengths from an input that its graphs do not have: on a card that would be wrong without a word."""
    from research.telechat.generation.engine import DirectEngine, FrameworkEngine
    from research.telechat.model import kernels
    from research.telechat.telechat import TelechatForCausalLM
    from research.telechat.telechat_config import TelechatConfig
    config = {**HF_CONFIGS["telechat2_gqa"], "n_layer": 1}

    def build():
        return TelechatForCausalLM(TelechatConfig.from_hf_config(config, use_past=True, seq_length=64, num_blocks=4))
    assert DirectEngine(build())
    monkeypatch.setattr(kernels, "use_paged_attention", lambda: True)
    model = build()
    assert isinstance(model._engine(), FrameworkEngine)
    with pytest.raises(TypeError, match="no input `batch_valid_length`"):
        DirectEngine(model)


def test_end_tokens_and_limits(models):
    model, _ = models("12b", use_past=True)
    full = answers(model, PROMPTS, max_new_tokens=14)
    end = full[0][7]
    cut = answers(model, PROMPTS, max_new_tokens=14, eos_token_id=[end, 96])
    assert cut[0] == full[0][:full[0].index(end, 5) + 1]
    assert answers(model, PROMPTS, max_new_tokens=None, max_length=12) == [ids[:12] for ids in full]
    assert len(answers(model, [PROMPTS[0]] * 3, max_new_tokens=500)[0]) == 64          # seq_length


def test_streams(models):
    model, _ = models("12b", use_past=True)

    class Streamer:
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got.append(value)

        def end(self):
            self.got.append("end")

    streamer = Streamer()
    full = answers(model, PROMPTS, max_new_tokens=6, streamer=streamer)
    assert streamer.got[-1] == "end" and len(streamer.got) == 8
    assert [step[1] for step in streamer.got[1:-1]] == full[1][-6:]
    stream = model.stream(PROMPTS[0], max_new_tokens=6, **GREEDY)
    assert [next(stream), next(stream)] == full[0][5:7]
    stream.close()
    assert list(model.stream(PROMPTS[0], max_new_tokens=6, **GREEDY)) == full[0][5:]


def test_sampling_is_repeatable(models):
    model, _ = models("12b", use_past=True)
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 0, "top_p": 0.95, "max_new_tokens": 12}
    first = answers(model, PROMPTS, seed=5, **settings)
    assert answers(model, PROMPTS, seed=5, **settings) == first
    assert answers(model, PROMPTS, seed=6, **settings) != first
    assert answers(model, PROMPTS, **{**settings, "top_k": 1}) == answers(model, PROMPTS, max_new_tokens=12)


def test_dictionary_of_results(models):
    model, weights = models("12b", use_past=True)
    result = model.generate(PROMPTS, max_new_tokens=3, return_dict_in_generate=True, output_logits=True,
                            output_scores=True, repetition_penalty=1.3, **GREEDY)
    assert len(result["logits"]) == len(result["scores"]) == 3
    expected, _ = forward(HF_CONFIGS["12b"], weights, np.array([PROMPTS[1]]))
    np.testing.assert_allclose(result["logits"][0][1], expected[0, -1], atol=1e-4)
    assert not np.allclose(result["scores"][0][1], expected[0, -1], atol=1e-4)
    assert int(result["scores"][2][0].argmax()) == result["sequences"][0][-1]


def test_mistakes_are_told(models):
    model, _ = models("12b", use_past=True)
    for prompts, settings, message in (
            (list(range(4, 70)), {}, "66 tokens, but the model's seq_length is 64"),
            ([5, 97], {}, "token 97.*vocabulary has 97"), ([], {}, "empty"),
            ([[5]] * 9, {"max_new_tokens": 30}, "need 18 blocks.*num_blocks is 16"),
            ([5], {"max_new_tokens": 0}, "max_new_tokens"), ([5], {"seed": -1, "do_sample": True}, "seed"),
            ([5], {"do_sample": True, "temperature": 0.0}, "temperature")):
        with pytest.raises(ConfigError, match=message):
            answers(model, prompts, **{"max_new_tokens": 4, **settings})


def test_cache_stays_out_of_checkpoints(models, tmp_path):
    import mindspore as ms
    from model_fixtures import to_mindspore
    model, weights = models("12b", use_past=True)
    ms.save_checkpoint(model, str(tmp_path / "model.ckpt"))
    saved = ms.load_checkpoint(str(tmp_path / "model.ckpt"))
    assert sorted(saved) == sorted(to_mindspore(HF_CONFIGS["12b"], weights))
    assert ms.load_param_into_net(model, saved, strict_load=True)[0] == []
    assert not [param.name for param in model.trainable_params() if "cache" in param.name]


def golden_model(family, config="config.json", **overrides):
    from safetensors.numpy import load_file
    folder = SHARED / "golden" / family
    weights = {name: value.astype(np.float32) for name, value in load_file(folder / "model.safetensors").items()}
    hf_config = json.loads((folder / config).read_text())
    return build_model(hf_config, weights, use_past=True, seq_length=64, num_blocks=16, **overrides)


FAMILIES = ("telechat_7b", "telechat_12b", "telechat_52b", "telechat2_mha", "telechat2_gqa")


@needs_shared
@pytest.mark.parametrize("family", FAMILIES)
def test_golden_greedy_tokens(family):
    golden = np.load(SHARED / "golden" / family / "golden.npz")
    prompt = golden["gen_prompt"].reshape(-1).tolist()
    model = golden_model(family)
    assert answers(model, prompt, max_new_tokens=16) == [golden["gen_ids"].reshape(-1).tolist()]
    assert answers(model, prompt, max_new_tokens=16, repetition_penalty=1.03) == [
        golden["gen_ids_rep_penalty_1p03"].reshape(-1).tolist()]
    if "gen_ids_fullrope" in golden and family == "telechat_7b":
        model = golden_model(family, rotary_dtype="float32")
        assert answers(model, prompt, max_new_tokens=16) == [golden["gen_ids_fullrope"].reshape(-1).tolist()]


@needs_shared
@pytest.mark.parametrize(("family", "variant"), [
    ("telechat_7b", "long_mscale"), ("telechat_7b", "ntk_only"), ("telechat_7b", "alpha1"),
    ("telechat_12b", "long_mscale"), ("telechat2_mha", "long"), ("telechat2_gqa", "long_base_lt_train")])
def test_golden_long_context(family, variant):
    """Cached generation where the rotary scaling changes agrees with the official code without a cache."""
    golden = np.load(SHARED / "golden" / family / f"golden_{variant}.npz")
    expected = golden["gen_ids_uncached"].reshape(-1).tolist()
    model = golden_model(family, f"config_{variant}.json")
    assert answers(model, expected[:-16], max_new_tokens=16) == [expected]
