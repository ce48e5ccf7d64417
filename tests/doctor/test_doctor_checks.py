"""Every check of kernels, collectives and plans passes on a device that computes rightly, and fails, alone, on one that
has its fault. The device is NumPy; the fault is what a kernel or a setting could do."""
import numpy as np
import pytest
from doctor_fixtures import NumpyDevice

from research.telechat.common.errors import ConfigError
from research.telechat.doctor import (
    attention_checks,
    cache_checks,
    collective_checks,
    kernel_checks,
    model_checks,
    plan_checks,
    registry,
)
from research.telechat.doctor.attention_checks import PAD
from research.telechat.doctor.checks import Check, Outcome, Skip, examine, examine_all, shared
from research.telechat.recipe.read import read_recipe, resolve_config

DTYPES = NumpyDevice.dtypes
SIZES = attention_checks.Sizes(seq=40, long=96, dim=32)
ONE = [*kernel_checks.checks(DTYPES), *attention_checks.checks(DTYPES, SIZES), *cache_checks.checks(DTYPES, SIZES.dim)]
SEVERAL = collective_checks.checks(DTYPES)


def only(condition, change):
    """Spoils the answers to the calls for which condition(*arguments) holds."""
    return lambda honest, *args: change(honest, *args) if condition(*args) else honest


def other_attention(unseen, qkv=lambda parts: parts):
    """Attention with another mask, or of other heads."""
    def change(_honest, form, parts, dy, tokens, ends):
        return NumpyDevice().attention(form, qkv(parts), dy, tokens, ends, unseen(form, tokens, ends))
    return change


def leak(form, tokens, ends):
    return attention_checks.hidden(form, tokens, ends) & ~np.eye(form.seq, k=1, dtype=bool)


def without(key):
    return lambda form, tokens, ends: attention_checks.hidden(
        form._replace(keys={**form.keys, key: False}), tokens, ends)


def window(form, tokens, ends):
    return attention_checks.hidden(form, tokens, ends) | np.tril(np.ones((form.seq, form.seq), bool), -64)


def form_of(name, dtype="bfloat16"):
    return lambda form, *_: form.name == name and form.dtype == dtype


def grouped_by_remainder(result, form, parts, dy, *rest):
    """Query head h looks at key/value head h % N_kv."""
    order = [0, 2, 1, 3]
    result, dq, dk, dv = NumpyDevice().attention(form, (parts[0][:, order], *parts[1:]), dy[:, order], *rest)
    return result[:, order], dq[:, order], dk, dv


def other_mask_backward(result, form, parts, dy, *rest):
    """The gradient draws another dropout mask."""
    return (*result[:3], NumpyDevice().attention(form._replace(keys={}), parts, dy, *rest)[3])


def slot_minus_one_is_the_last(_result, dtype, held, key, value, slots):
    every = np.where(slots < 0, held.keys.shape[0] * held.keys.shape[1] - 1, slots)
    return NumpyDevice().store(dtype, held, key, value, every)


def without_length(_result, dtype, query, held, tables, lengths):
    return NumpyDevice().paged_attention(dtype, query, held, tables, np.full_like(lengths, 64))


def dtype_is(dtype):
    return lambda given, *_: given == dtype


FAULTS = {  # check: (method, what becomes of its answer)
    "RMS norm, epsilon 1e-5 (float32)": ("rms_norm", only(
        lambda dtype, eps, *_: dtype == "float32" and eps == 1e-5, lambda y, *_: (y[0], y[1], 1.01 * y[2]))),
    "RMS norm, epsilon 1e-6, small numbers (float32)": ("rms_norm", only(
        lambda dtype, eps, *_: eps == 1e-6,
        lambda y, dtype, eps, *rest: NumpyDevice().rms_norm(dtype, 0.0, *rest))),
    **{f"RMS norm ({dtype})": ("rms_norm", only(dtype_is(dtype), lambda y, *_: (0.95 * y[0], *y[1:])))
       for dtype in DTYPES},
    **{f"rotary embedding ({dtype})": ("rotate", only(
        dtype_is(dtype), lambda y, dtype, x, cos, sin: NumpyDevice().rotate(dtype, x, cos, -sin)))
       for dtype in ("float32", *DTYPES)},
    "matrix product (float32)": ("matmul", only(
        dtype_is("float32"), lambda y, *_: attention_checks.rounded(y, "bfloat16"))),
    **{f"matrix product ({dtype})": ("matmul", only(
        dtype_is(dtype), lambda y, *_: np.minimum(y, 512))) for dtype in DTYPES},      # a sum in 16 bits
    "dropout of 0.1": ("dropout", only(lambda p, x: p == 0.1, lambda y, p, x: NumpyDevice().dropout(0.9, x))),
    "dropout of 0.5": ("dropout", only(lambda p, x: p == 0.5, lambda y, p, x: y * (1 - p))),
    "overflow in gradients": ("finite", lambda found, gradients: not any(np.isnan(one).any() for one in gradients)),
    **{f"attention, causal, triangle ({dtype})": ("attention", only(
        form_of("causal, triangle", dtype), other_attention(leak))) for dtype in DTYPES},
    "attention, causal, full mask (bfloat16)": ("attention", only(
        form_of("causal, full mask"), lambda y, *_: (*y[:2], -y[2], y[3]))),
    "attention, causal, grouped heads (bfloat16)": ("attention", only(
        form_of("causal, grouped heads"), grouped_by_remainder)),
    "attention, causal, longer than the triangle (bfloat16)": ("attention", only(
        form_of("causal, longer than the triangle"), other_attention(window))),
    "attention, padding (bfloat16)": ("attention", only(
        form_of("padding"), other_attention(without("mask_pad_tokens")))),
    "attention, documents back to back (bfloat16)": ("attention", only(
        form_of("documents back to back"), other_attention(without("document_boundaries")))),
    "attention, documents and padding (bfloat16)": ("attention", only(
        form_of("documents and padding"), other_attention(without("mask_pad_tokens")))),
    "attention, dropout (bfloat16)": ("attention", only(form_of("dropout"), other_mask_backward)),
    "attention, prompts back to back (bfloat16)": ("flat_attention", lambda y, dtype, qkv, lengths, kv: NumpyDevice(
        ).flat_attention(dtype, qkv, np.array([lengths.sum()]), kv)),
    "attention, zero-width band": ("band_sees_keys", lambda _: True),
    **{f"cache, writing ({dtype})": ("store", only(dtype_is(dtype), slot_minus_one_is_the_last)) for dtype in DTYPES},
    **{f"cache, paged attention ({dtype})": ("paged_attention", only(dtype_is(dtype), without_length))
       for dtype in DTYPES}}


def wrong(checks, device):
    return {finding.name for finding in examine_all(checks, device) if finding.verdict != "ok"}


def test_a_sound_device_passes():
    assert wrong(ONE, NumpyDevice()) == set()
    assert wrong(SEVERAL, NumpyDevice(1, 2)) == set() and wrong(SEVERAL, NumpyDevice(2, 3)) == set()


def test_every_check_of_a_kernel_has_its_fault():
    assert {check.name for check in ONE} == FAULTS.keys()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_fails_its_check_and_only_it(name):
    method, change = FAULTS[name]
    related = [check for check in ONE if check.name.split(",")[0].split(" (")[0] == name.split(",")[0].split(" (")[0]]
    assert wrong(related, NumpyDevice(spoil={method: change})) == {name}
    finding = examine(next(check for check in ONE if check.name == name), NumpyDevice(spoil={method: change}))
    assert finding.avoid and finding.expected != finding.found


def test_padding_is_at_the_end_and_of_one_sequence_only():
    _, _, tokens, _ = attention_checks._inputs("float32", 2, 4, 4, 40, 32)
    assert (tokens[0] != PAD).all() and (tokens[1, -8:] == PAD).all()


@pytest.mark.parametrize("check", SEVERAL, ids=lambda check: check.name)
def test_a_collective_that_lies_is_found(check):
    kind, dtype = check.name[len("collective, "):].rsplit(" (", 1)
    lies = {"collective": only(lambda name, given, x: name == kind and given == dtype[:-1],
                               lambda found, *_: found[..., ::-1])}
    assert wrong(SEVERAL, NumpyDevice(1, 2, lies)) == {check.name}


# --- plans and training ----------------------------------------------------------------------------------------------

PLANS = plan_checks.checks(True)


def changed(run, **fields):
    return run._replace(**fields)


def other_half(run, recipe, *_):
    """A rank that holds the other half of what it says."""
    held = {name: value[::-1] if recipe.get("use_parallel") and "wq" in name else value
            for name, value in run.held.items()}
    return changed(run, held=held)


def plan_named(name):
    return next(check for check in PLANS if check.name == name)


@pytest.mark.parametrize("kind", plan_checks.KINDS, ids=lambda kind: kind.name)
def test_small_recipes_of_all_kinds_can_run(kind):
    """With each number of cards that the kind is for: `shrink` raises where the planner finds a fault."""
    for cards in kind.cards:
        recipe = plan_checks.small(kind, cards)
        assert recipe["use_parallel"] and recipe["model"]["model_config"]["hidden_size"] % 64 == 0
        assert recipe["model"]["model_config"]["seq_length"] == 128


def test_plans_equal_to_one_card_pass_and_others_do_not():
    check = plan_named("plan, model parallel")
    assert examine(check, NumpyDevice(1, 2)).verdict == "ok"

    def cut(recipe):
        return recipe.get("use_parallel")
    spoiled = [lambda run, recipe, *_: changed(run, losses=[*run.losses[:-1], 4.2]) if cut(recipe) else run,
               lambda run, recipe, *_: changed(run, norms=[2.0] * 3) if cut(recipe) else run,
               lambda run, recipe, *_: changed(run, losses=[float("nan")] * 3) if cut(recipe) else run, other_half]
    for change in spoiled:
        finding = examine(plan_checks.checks(True)[PLANS.index(check)], NumpyDevice(1, 2, {"train": change}))
        assert finding.verdict == "wrong" and finding.avoid == "parallel_config.model_parallel over 1"


def test_plans_that_are_not_made_say_why():
    alone = examine(plan_named("plan, model parallel"), NumpyDevice())
    assert (alone.verdict, alone.found) == ("skipped", "needs 2 cards, found 1")
    eight = examine(plan_named("plan, data, model and pipeline parallel"), NumpyDevice(0, 2))
    assert (eight.verdict, eight.found) == ("skipped", "needs 8 cards, found 2")


def test_overflow_must_be_seen_and_must_not_spoil_weights():
    check = plan_named("training, a step that overflows")
    assert examine(check, NumpyDevice()).verdict == "ok"
    unseen = {"train": lambda run, *_: changed(run, overflows=[False])}
    stepped = {"train": lambda run, *_: changed(run, held={name: value * 0.5 for name, value in run.held.items()})}
    assert examine(check, NumpyDevice(spoil=unseen)).found == "no overflow, no weight changed"
    assert examine(check, NumpyDevice(spoil=stepped)).found == "an overflow, 1 weight changed"


def test_a_resumed_training_must_equal_the_unbroken_one():
    check = plan_named("training, resumed")
    assert examine(check, NumpyDevice()).verdict == "ok"
    forgotten = {"resume": lambda both, *_: (both[0], {name: value for name, value in both[1].items()
                                                       if "adam" not in name})}
    fresh = {"resume": lambda both, *_: (both[0], {name: value * (0 if "adam" in name else 1)
                                                   for name, value in both[1].items()})}
    assert examine(check, NumpyDevice(spoil=forgotten)).found == "lack adam_m.model.norm_out.weight"
    assert "adam_m" in examine(check, NumpyDevice(spoil=fresh)).found
    assert examine(check, NumpyDevice(0, 2)).verdict == "skipped"


# --- the loop and the choice -----------------------------------------------------------------------------------------

def raises(error):
    def run(_device):
        raise error
    return Check("check", run, "key: True")


def test_errors_are_findings_and_skips_are_not_wrong():
    finding = examine(raises(RuntimeError("kernel\nof no type")), NumpyDevice())
    assert finding[1:5] == ("no error", "RuntimeError: kernel of no type", "wrong", "key: True")
    finding = examine(raises(Skip("no such card")), NumpyDevice())
    assert finding[1:5] == ("-", "no such card", "skipped", "key: True")
    fused = Check("check", lambda _: Outcome("1", "1", True), "", fused=True)
    cpu = NumpyDevice()
    cpu.fused = False
    assert examine(fused, NumpyDevice()).verdict == "ok" and examine(fused, cpu).verdict == "skipped"


def test_a_card_shows_what_is_wrong_on_others():
    findings = examine_all([*ONE[:2], raises(RuntimeError("no"))], NumpyDevice(0, 2))
    others = {"collective": lambda *_: np.array([[0, 0, 1], [0, 1, 0]])}
    told = shared(findings, NumpyDevice(0, 2, others))
    assert [one.verdict for one in told] == ["ok", "wrong", "wrong"] and told[1].found.endswith("; wrong on rank 1")
    broken = {"collective": lambda *_: np.full((2, 3), 7)}                  # says something else of this card, too
    assert shared(findings, NumpyDevice(0, 2, broken)) == findings


def test_words_choose_checks():
    assert {check.name.split(" ")[0] for check in registry.chosen(ONE, ["dropout"])} == {"dropout", "attention,"}
    assert registry.chosen(ONE, []) == ONE
    with pytest.raises(ConfigError, match="no check has it in its name"):
        registry.chosen(ONE, ["dropout", "dropuot"])


@pytest.mark.parametrize("fused", [True, False])
def test_names_are_unique_and_all_say_what_to_avoid(fused):
    checks = registry.all_checks(fused, DTYPES if fused else ("float32",), None)
    names = [check.name for check in checks]
    assert len(set(names)) == len(names) and all(check.avoid for check in checks)


def test_settings_of_the_recipes_are_among_the_forms():
    """Types and kinds of attention in the base recipes: what they use is checked."""
    for name in ("finetune_telechat_12b", "predict_telechat2_115b"):
        recipe = read_recipe(resolve_config(f"research/telechat/{name}.yaml"))
        model = recipe["model"]["model_config"]
        assert model["compute_dtype"] == DTYPES[0] == model_checks.FLASH.keys["compute_dtype"]
        assert model["layernorm_compute_type"] == "float32" and model["use_flash_attention"]


