"""Rows of samples, points of curves, and the files of a report."""

import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from brisk import demo_reports

pytestmark = pytest.mark.quick


def test_samples_stand_in_rows_side_by_side_with_their_names():
    rows = {name: torch.full((4, 3, 8, 8), value) for name, value in (("dark", -1.0), ("grey", 0.0))}
    rows["dark"][2] = 0.5
    axes = demo_reports.draw_samples(Figure(), rows, {"left": 0.2}, ("a", "b", "c", "d"), parted=3)
    assert [place.get_ylabel() for place in axes] == ["dark", "grey"]
    strip = np.asarray(axes[0].images[0].get_array())
    assert strip.shape == (8, 4 * 8 + 3, 3)
    assert (strip[:, :8] == 0).all() and (strip[:, 8] == 1).all() and (strip[:, 18:26] == 0.75).all() and (strip[:, 27:] == 0).all()
    assert (np.asarray(axes[1].images[0].get_array())[:, 27:] == 0.5).all()
    assert [text.get_text() for text in axes[0].get_xticklabels()] == ["a", "b", "c", "d"]
    middles = axes[0].get_xticks()  # a pixel's centre is a whole number
    assert middles.tolist() == [3.5, 12.5, 21.5, 30.5] and not len(axes[1].get_xticks())
    assert axes[0].lines[0].get_xdata()[0] == 26  # the gap behind the third column


def test_points_of_a_curve_are_sorted_by_place_with_their_spread():
    rows = [{"calls": 8, "all": 0.9, "spread": {"all": 0.1}}, {"calls": 2, "all": 0.5}]
    assert demo_reports.points(rows, "calls", "all") == ((2, 8), (0.5, 0.9), (0, 0.1))


def test_logarithmic_ticks_are_plain_numbers():
    figure = Figure()
    plot = figure.subplots()
    plot.set(yscale="log", ylim=(15, 1500))
    demo_reports.plain_numbers(plot.yaxis, (2, 5))
    figure.canvas.draw()
    shown = {text.get_text() for minor in (False, True) for text in plot.get_yticklabels(minor=minor)}
    assert {"20", "50", "100", "200", "500", "1,000"} <= shown


@pytest.mark.parametrize("conclusions", [[], ["one is better.", "two is worse."]])
def test_a_report_is_written_and_said(tmp_path, capsys, conclusions):
    Image.new("RGB", (4, 4)).save(tmp_path / "report.png")
    figures = {"DDIM": {"4": {"frechet": 12.0}}}
    record = {"sampling": figures} | ({"conclusions": conclusions} if conclusions else {})
    demo_reports.write(tmp_path, "a < b", record, {"at 4 calls": figures}, {"seeds": 2}, ["what it is."], conclusions,
                       ("report.png", "table.png"))  # fmt: skip
    assert json.loads((tmp_path / "report.json").read_text()) == {**record, "seeds": 2}
    page, said = (tmp_path / "report.html").read_text(), capsys.readouterr().out
    assert "a &lt; b" in page and "what it is." in page and all(sentence in page for sentence in conclusions)
    assert "at 4 calls\n" in said and "DDIM" in said and f"\n\n{tmp_path}/report.html  report.json  report.png  table.png\n" in said
    assert "\n\n\n" not in said and all(f"\n{sentence}\n" in said for sentence in conclusions)
