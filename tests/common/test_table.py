"""Tables as text."""
from research.telechat.common.table import markdown, table


def test_numbers_go_to_the_right_and_texts_to_the_left():
    rows = [["name", "count", "share"], ["a", 7, 0.5], ["longer", None, None], ["", 1000, 12.25]]
    assert table(rows).splitlines() == [
        "name    count  share",
        "------  -----  -----",
        "a           7   0.50",
        "longer",
        "         1000  12.25"]
    assert table([["x"], [1 / 3]], 4).splitlines()[-1] == "0.3333"
    assert table([["only", "a head"]]).splitlines() == ["only  a head", "----  ------"]


def test_markdown():
    assert markdown([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
