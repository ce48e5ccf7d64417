"""Tools that a test needs and that are missing: skipped, and with CI=true a failure."""
import pytest
from needs import program, require


def test_what_is_there_is_used():
    require([1], "a list")
    assert program("sh").endswith("/sh")


@pytest.mark.parametrize(("ci", "end"), [("", pytest.skip.Exception), ("false", pytest.skip.Exception),
                                         ("true", pytest.fail.Exception)])
def test_what_is_missing_skips_and_fails_in_ci(ci, end, monkeypatch):
    monkeypatch.setenv("CI", ci)
    with pytest.raises(end, match="needs a browser"):
        require(None, "needs a browser")
    with pytest.raises(end, match="needs the program no-such-program"):
        program("no-such-program")
