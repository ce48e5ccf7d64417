"""Numbers and switches as people write them in YAML, lists on the command line, and documents that are too large."""
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from research.telechat.common.errors import ConfigError
from research.telechat.recipe.read import check_overrides, parse_value, read_recipe, set_key
from research.telechat.recipe.values import conform, load

numbers = st.floats(1e-12, 1e12)


@given(numbers, st.sampled_from(["{:e}", "{:.0e}", "{:E}", "{:.2e}", "{:g}"]))
def test_any_spelling_of_a_number_is_that_number(number, spelling):
    text = spelling.format(number)
    for written in (text, text.replace("e+", "e").replace("E+", "E"), f"+{text}", f"-{text}"):
        assert load(f"a: {written}")["a"] == float(written)
        assert parse_value(written) == float(written)
        assert conform(written, 0.5, "lr") == float(written)            # in quotes


@pytest.mark.parametrize(("text", "value"), [
    ("2e-5", 2e-5), ("1E-4", 1e-4), ("1.e-4", 1e-4), (".5e-3", .5e-3), ("5e5", 5e5), ("0.1", 0.1), ("3", 3),
    ("1_000", 1000), ("010", 10), ("-007", -7), ("1:30", "1:30"), ("1:30.5", "1:30.5"),
    ("e5", "e5"), ("1e", "1e"), ("1e-", "1e-"), ("1.2.3e4", "1.2.3e4"), ("0x10", 16), ("None", "None"),
    ("v1e5", "v1e5"), ("1e5.ckpt", "1e5.ckpt"), ("'2e-5'", "2e-5"), ("[1e-5, a]", [1e-5, "a"])])
def test_what_is_a_number(text, value):
    found = load(f"a: {text}")["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(("value", "over", "expected"), [
    ("2e-5", 1e-5, 2e-5), ("4", 1, 4), (4e0, 1, 4), (1e-6, 0, 1e-6), (1e3, 0.5, 1e3), ("1_000", 2, 1000),
    ("False", True, False), ("no", True, False), (1, True, 1), ("4", "", "4"), ("4", None, "4"),
    (None, 3, None), ([1], 3, [1]), (2.5, 1, 2.5)])
def test_a_base_recipe_decides_the_kind(value, over, expected):
    found = conform(value, over, "k")
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(("key", "value", "over", "said"), [
    ("do_eval", "Yess", False, "expected True or False, found the text 'Yess'"),
    ("runner_config.sink_mode", "", True, "expected True or False, found the text ''"),
    ("runner_config.epochs", True, 2, "expected a number, such as 2, found True"),
    ("runner_config.epochs", 2.5, 2, "expected a whole number, such as 2, found 2.5"),
    ("train_dataset.batch_size", "1e-1", 4, "expected a whole number, such as 4, found 0.1"),
    ("optimizer.learning_rate", float("nan"), 1e-5, "expected a number, such as 1e-05, found nan"),
    ("optimizer.learning_rate", "inf", 1e-5, "expected a number, such as 1e-05, found inf")])
def test_what_would_count_as_something_else_is_refused(key, value, over, said):
    with pytest.raises(ConfigError) as err:
        conform(value, over, key)
    assert str(err.value) == f"{key}: {said}"
    assert conform("newest.ckpt", False, "resume_training") == "newest.ckpt"
    assert conform("newest.ckpt", False, "--resume_training") == "newest.ckpt"
    assert conform("yes", False, "resume_training") is True


@settings(max_examples=40)
@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=6), st.integers(0, 3))
def test_a_key_that_is_there_twice_is_refused(keys, depth):
    text = "".join(f"{'  ' * depth}{key}: {number}\n" for number, key in enumerate(keys))
    text = "".join(f"{'  ' * level}level{level}:\n" for level in range(depth)) + text
    if len(set(keys)) == len(keys):
        assert load(text)
    else:
        with pytest.raises(yaml.YAMLError, match=r"duplicate key .* in lines \d+ and \d+"):
            load(text)


def test_a_key_over_a_merged_one_is_no_second_one():
    assert load("a: &x {k: 1, l: 2}\nb: {<<: *x, k: 3}\nc: {<<: *x}") == {
        "a": {"k": 1, "l": 2}, "b": {"k": 3, "l": 2}, "c": {"k": 1, "l": 2}}


@pytest.mark.parametrize("text", ["1,000", "2k", "auto", "None", "1e-5 # rate", ""])
def test_text_in_place_of_a_number_is_named(text, tmp_path):
    (tmp_path / "base.yaml").write_text("optimizer: {learning_rate: 1.0e-5}\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base_config: base.yaml\noptimizer: {{learning_rate: {text!r}}}\n")
    with pytest.raises(ConfigError) as err:
        read_recipe(recipe)
    assert "recipe.yaml" in str(err.value) and "optimizer.learning_rate" in str(err.value) and repr(text) in str(
        err.value)
    with pytest.raises(ConfigError, match=r"--optimizer\.learning_rate: expected a number"):
        set_key({"optimizer": {"learning_rate": 1e-5}}, "optimizer.learning_rate", text)


def recipe_with_lists():
    return {"callbacks": [{"type": "MFLossMonitor"}, {"type": "CheckpointMonitor", "save_checkpoint_steps": 100},
                          {"type": "X"}, {"type": "X"}], "eod": [1, 2], "seed": 0}


@pytest.mark.parametrize(("dotted", "found"), [
    ("callbacks.1.save_checkpoint_steps", lambda r: r["callbacks"][1]["save_checkpoint_steps"]),
    ("callbacks.CheckpointMonitor.save_checkpoint_steps", lambda r: r["callbacks"][1]["save_checkpoint_steps"]),
    ("callbacks.MFLossMonitor.per_print_times", lambda r: r["callbacks"][0]["per_print_times"]),
    ("eod.1", lambda r: r["eod"][1])])
def test_entries_of_a_list_are_set(dotted, found):
    recipe = recipe_with_lists()
    set_key(recipe, dotted, 2)
    assert found(recipe) == 2


@pytest.mark.parametrize(("dotted", "words"), [
    ("callbacks.save_checkpoint_steps", ["callbacks is a list", "1 CheckpointMonitor", "'save_checkpoint_steps'"]),
    ("callbacks.7.x", ["callbacks is a list", "0 MFLossMonitor"]), ("callbacks.X.y", ["2 X", "3 X"]),
    ("callbacks", ["a list of sections", "--callbacks.0.type"]), ("callbacks.1", ["one of its keys", "a whole entry"]),
    ("seed.0", ["no section 'seed'"]), ("eod.2", ["eod is a list"])])
def test_what_a_list_does_not_have_is_named(dotted, words):
    recipe = recipe_with_lists()
    with pytest.raises(ConfigError) as err:
        check_overrides(recipe, {dotted: 1})
    assert all(word in str(err.value) for word in words), err.value
    assert "did you mean" not in str(err.value) and recipe == recipe_with_lists()


@pytest.mark.parametrize(("dotted", "words"), [
    ("callbacks.CheckpointMonitor.save_chekpoint_steps", "did you mean 'save_checkpoint_steps'"),
    ("callbacks.1.keep_checkpoint_mx", r"callbacks\[1\], CheckpointMonitor: it has no key 'keep_checkpoint_mx'"),
    ("callbacks.MFLossMonitor.per_print_time", "did you mean 'per_print_times'")])
def test_misspelt_keys_of_entries_are_named(dotted, words):
    with pytest.raises(ConfigError, match=words):
        check_overrides(recipe_with_lists(), {dotted: 1})


def test_keys_of_entries_that_may_be_right_pass():
    recipe = recipe_with_lists()
    check_overrides(recipe, {"callbacks.MFLossMonitor.zzz_of_another_version": 1})
    check_overrides({**recipe, "callbacks": [{"type": "Mine", "save_chekpoint_steps": 1}, "x", {"keys": 1}]}, {})
    with pytest.raises(ConfigError, match=r"TelechatTrainingLog: it has no key 'zzz'; its keys are file_name, "):
        check_overrides({"eval_callbacks": [{"type": "TelechatTrainingLog", "zzz": 1}]}, {})


def test_bombs_are_refused(tmp_path):
    laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{below}: &{below} [{', '.join(['*' + above] * 9)}]\n" for above, below in zip("abcdefgh", "bcdefghi"))
    path = tmp_path / "bomb.yaml"
    for text, words in ((laughs, "aliases expand to more than"), ("a: " + "[" * 100_000, "nested 100000 deep"),
                        ("a: " + "x" * (1 << 20), "at most 1,048,576 are read"),
                        ("a: &a [*a]", "contains it")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words) as err:
            read_recipe(path)
        assert "\n" not in str(err.value) and len(str(err.value)) < 400
    assert parse_value("[" * 5000) == "[" * 5000
    assert load("a: &a [1, 2]\nb: *a\nc: *a") == {"a": [1, 2], "b": [1, 2], "c": [1, 2]}


def test_nothing_but_plain_values():
    with pytest.raises(yaml.YAMLError):
        load("!!python/object/apply:os.system ['true']")
