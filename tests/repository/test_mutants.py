"""The list of mutants is up to date: each text occurs once in its file, each test exists. The mutants themselves are
tried by scripts/mutants.py, which takes minutes."""
import pytest

from research.telechat.common.errors import ConfigError
from scripts import mutants


@pytest.fixture(scope="module")
def listed():
    return mutants.read_mutants()


def test_list_is_up_to_date(listed):
    assert [fault for mutant in listed for fault in mutants.faults(mutant)] == []
    assert len([mutant for mutant in listed if mutant.test]) >= 40
    assert {"sharding.py", "rows.py", "kernels.py", "mask.py", "loss.py", "telechat_transformer.py"} <= {
        mutant.file.rpartition("/")[2] for mutant in listed}


@pytest.mark.parametrize("changes, words", [
    ({"old": "no such text"}, "`old` occurs 0 times in model/rows.py"), ({"old": "self"}, "expected once"),
    ({"new": "(0, 2, 4, 1, 3, 5)"}, "something else"), ({"test": ""}, "expected a test or the reason"),
    ({"equivalent": "it is"}, "expected a test or the reason"),
    ({"test": "tests/model/test_rows.py::test_nothing"}, "there is no test"),
    ({"test": "tests/model/test_none.py::test_rows"}, "there is no test")])
def test_faults_of_the_list(listed, changes, words):
    right = next(mutant for mutant in listed if mutant.old == "(0, 2, 4, 1, 3, 5)")
    assert mutants.faults(right) == []
    assert words in " ".join(mutants.faults(right._replace(**changes)))


def test_lists_that_cannot_be_read(tmp_path):
    file = tmp_path / "list.yaml"
    entry = "- {name: a, file: b, old: c, new: d, test: e}\n"
    file.write_text(entry + entry)
    with pytest.raises(ConfigError, match="duplicate name a"):
        mutants.read_mutants(file)
    file.write_text("- {name: a, wrong: b}\n")
    with pytest.raises(ConfigError, match=r"list\.yaml: .*wrong"):
        mutants.read_mutants(file)
