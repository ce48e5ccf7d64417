"""MATH, IFEval, HumanEval and MBPP: the harness's own tasks on made-up questions, with answers whose score is known."""
import importlib.util
import re

import pytest
from card_fixtures import MATH_SUBJECTS, canned, write_card_sets, write_lines
from evaluation_fixtures import RECIPE, needs_harness, run
from isolation import require_isolation

from research.telechat.common.errors import ConfigError
from research.telechat.evaluation import needs, tasks

CODE = ["humaneval", "humaneval_instruct", "mbpp", "mbpp_instruct"]
MATH = [f"hendrycks_math_{name}" for name in MATH_SUBJECTS]


def lacks(part):
    """Skips a test where packages of a task are missing."""
    missing = [name for name in needs.PACKAGES[part] if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_card_sets(folder)
    return folder


def scores(names, data, answer, **options):
    """{task: {metric: value}} of the harness, with canned answers."""
    from lm_eval.evaluator import evaluate as harness
    loaded = tasks.load_tasks(names, data=str(data))
    programs = needs.check_programs(loaded, True)
    tasks.set_shots(loaded, None, 1)
    result = harness(lm=canned(answer), task_dict=loaded, bootstrap_iters=0, confirm_run_unsafe_code=programs,
                     **options)
    return {name: {key.split(",")[0]: value for key, value in values.items() if not key.startswith(("alias", "name"))}
            for name, values in result["results"].items()}


@needs_harness
class TestPrograms:
    def test_right_and_wrong_programs(self, data):
        """Of the two questions of each set one is answered by a program that passes: the first of HumanEval (its tests
        differ), and of MBPP the one whose function is asked for."""
        require_isolation()

        def answer(prompt):
            if "double" in prompt:
                names = re.findall(r"double_(\d+)\(1\)", prompt)
                body = f"def double_{names[-1]}(a):\n    return a * {2 if names[-1] == '11' else 3}\n"
                return f"\n{body}```" if "```python" in prompt else body         # the task's filter eats a first word
            return "    return a + b\n```\nThis adds." if "Here is the completed" in prompt else "    return a + b\n"
        found = scores(CODE, data, answer)
        assert [found[name]["pass@1" if "human" in name else "pass_at_1"] for name in CODE] == [0.5] * 4

    def test_permission(self, data, capfd, tmp_path):
        """Without the option nothing is run, and the model is not loaded; with --data_only none is needed."""
        (tmp_path / "x.ckpt").touch()
        options = ["--config", RECIPE, "--load_checkpoint", tmp_path / "x.ckpt", "--data", data, "--tasks", "humaneval"]
        code, errors = run(capfd, *options)
        assert code == 1 and errors[0].startswith("error: --tasks: humaneval runs programs written by the model")
        assert run(capfd, *options, "--data_only") == (0, [])

    def test_isolation_that_cannot_be_had(self, data, monkeypatch, tmp_path):
        from research.telechat.evaluation import sandbox
        loaded = tasks.load_tasks(["humaneval"], data=str(data))
        guard = tmp_path / "guard.py"
        guard.write_text("print('{\"refused\": \"unshare: Operation not permitted\"}')")
        monkeypatch.setattr(sandbox, "GUARD", guard)
        with pytest.raises(ConfigError, match=r"isolation cannot be set up .unshare: Operation not permitted"):
            needs.check_programs(loaded, True)

    def test_task_that_goes_around_the_isolation(self, tmp_path):
        (tmp_path / "utils.py").write_text("def passes(references, predictions):\n    return 1.0\n")
        write_lines(tmp_path / "q.jsonl", [{"q": "a", "a": "b"}])
        (tmp_path / "own.yaml").write_text(
            "task: own_way\ndataset_path: json\noutput_type: generate_until\ntest_split: test\nunsafe_code: true\n"
            f"dataset_kwargs: {{data_files: {{test: {tmp_path}/q.jsonl}}}}\ndoc_to_text: '{{{{q}}}}'\n"
            "doc_to_target: '{{a}}'\nmetric_list: [{metric: !function utils.passes, aggregation: mean, "
            "higher_is_better: true}]\n")
        with pytest.raises(ConfigError, match="own_way runs generated programs its own way"):
            needs.check_programs(tasks.load_tasks(["own_way"], str(tmp_path)), True)


@needs_harness
class TestMath:
    def test_hendrycks(self, data):
        found = scores(["hendrycks_math"], data, lambda prompt: "Thus $2$.")
        assert {name: found[name]["exact_match"] for name in ["hendrycks_math", *MATH]} == dict.fromkeys(
            ["hendrycks_math", *MATH], 0.5)

    @lacks("minerva_math")
    def test_minerva(self, data):
        found = scores(["minerva_math_algebra"], data,
                       lambda prompt: "Final Answer: The final answer is $\\frac{4}{2}$. I hope it is correct.")
        assert found["minerva_math_algebra"]["exact_match"] == 0.5

    def test_packages_that_are_missing(self, data, monkeypatch):
        monkeypatch.setitem(needs.PACKAGES, "minerva_math", {"no_such_module": "such-package"})
        monkeypatch.setitem(needs.PACKAGES, "ifeval", {"no_other_module": "other-package"})
        with pytest.raises(ConfigError, match=r"minerva_math needs such-package; install .*; ifeval needs other"):
            tasks.load_tasks(["ifeval", "minerva_math"], data=str(data))


@needs_harness
@lacks("ifeval")
class TestIFEval:
    def test_instructions(self, data):
        found = scores(["ifeval"], data, lambda prompt: "One sentence is here. And another one.")["ifeval"]
        assert (found["prompt_level_strict_acc"], found["inst_level_strict_acc"]) == (0.5, 2 / 3)

    def test_words_of_nltk_that_are_missing(self, tmp_path, monkeypatch):
        import nltk
        monkeypatch.setattr(nltk.data, "path", [])
        (tmp_path / "IFEval").mkdir()
        with pytest.raises(ConfigError, match="nltk_data/tokenizers/punkt_tab"):
            tasks.load_tasks(["ifeval"], data=str(tmp_path))
