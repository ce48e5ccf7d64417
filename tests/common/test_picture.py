"""Pictures of a run and of a data set: what they show, in both languages, and without color."""
import json
import math

import numpy as np
import pytest

from research.telechat.common import picture
from research.telechat.data.report import _CHINESE as DATA_WORDS
from research.telechat.data.report import Report
from research.telechat.training import report
from research.telechat.training.report import draw_curve, smoothed

pytest.importorskip("matplotlib")


def rows(fall):
    found = [{"step": step, "loss": 1 + fall * math.exp(-step / 20) + 0.1 * math.sin(9 * step), "lr": 1e-5,
              "global_norm": 1.0, "tokens_per_second_per_card": 100.0 + step % 7} for step in range(1, 101)]
    found[30]["skipped"] = "norm"
    found[40]["loss"] = float("nan")
    for step in (50, 100):
        found[step - 1].update(checkpoint=True, perplexity=20.0 - step / 10)
    return found


def drawn(monkeypatch, found, tmp_path, language="en"):
    """The figure of a curve."""
    figures = []
    real = picture.png

    def kept(figure):
        figures.append(figure)
        return real(figure)
    monkeypatch.setattr(picture, "png", kept)
    draw_curve(found, str(tmp_path / "curve.png"), language)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    return figures[0]


@pytest.mark.parametrize(("fall", "scale"), [(30.0, "log"), (3.0, "linear")])
def test_the_loss_is_logarithmic_where_it_falls_by_more_than_a_decade(fall, scale, tmp_path, monkeypatch):
    figure = drawn(monkeypatch, rows(fall), tmp_path)
    axis = figure.axes[0]
    assert axis.get_yscale() == scale
    labels = axis.get_legend_handles_labels()[1]
    assert labels == ["each step", "smoothed over 5 steps", "skipped step", "checkpoint", "held-out perplexity"]
    lines = dict(zip(labels, axis.get_legend_handles_labels()[0]))
    assert list(lines["checkpoint"].get_xdata()) == [50, 100] and list(lines["skipped step"].get_xdata()) == [31]
    assert 41 not in list(lines["each step"].get_xdata())
    looks = [(line.get_linestyle(), line.get_marker(), round(line.get_linewidth(), 1)) for line in lines.values()]
    assert len(set(looks)) == len(looks)                       # they differ without their color
    assert figure.axes[1].get_title() == "learning rate"


def test_smoothing_takes_the_mean_around_each_value():
    assert smoothed([3.0] * 9, 5) == pytest.approx([3.0] * 9)
    assert smoothed([0.0, 3.0, 6.0, 0.0], 3) == pytest.approx([1.5, 3.0, 3.0, 3.0])


def test_chinese_titles_where_a_font_exists(tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "chinese_font", lambda: "DejaVu Sans")          # any installed one
    with pytest.warns(UserWarning, match="Glyph"):                               # it lacks the characters
        figure = drawn(monkeypatch, rows(3.0), tmp_path, "zh")
    assert [axis.get_title() for axis in figure.axes[:2]] == ["训练损失", "学习率"]
    monkeypatch.setattr(picture, "chinese_font", lambda: None)
    figure = drawn(monkeypatch, rows(3.0), tmp_path, "zh")
    assert figure.axes[0].get_title() == "training loss"
    assert "no Chinese font" in figure.texts[0].get_text()


@pytest.mark.parametrize("words", [report._CHINESE, DATA_WORDS])
def test_translations_fill_in_the_same_values(words):
    from string import Formatter
    for english, chinese in words.items():
        names = [sorted(name for _, name, _, _ in Formatter().parse(text) if name) for text in (english, chinese)]
        assert names[0] == names[1]
        assert json.dumps(chinese) != json.dumps(english)


def test_lengths_have_a_title_and_the_limit(monkeypatch):
    found = Report(101)
    found.add({"conversations": 3}, np.array([10, 20, 30]))
    figures = []
    monkeypatch.setattr("research.telechat.data.report.png", lambda figure: figures.append(figure) or b"png")
    assert found.histogram_png() == b"png"
    axis = figures[0].axes[0]
    assert axis.get_title() == "Lengths of 3 conversations"
    assert axis.get_legend_handles_labels()[1] == ["max_length 100: a record holds 101 tokens"]
    assert Report(101).histogram_png() is None
