"""Pictures of an evaluation: nothing cut off, no text on other text, ticks that can be read, samples at their places."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from brisk import report_pictures

PROMPTS = ["a highly detailed portrait of an old fisherman with a $5 bill and a $10 bill, dramatic lighting, oil on canvas, 8k",
           "a cat", "Supercalifragilisticexpialidocious", "two astronauts playing chess on the moon, digital art"]  # fmt: skip


def row(nfe, quality, distance, seconds, **more):
    return {"all": quality, "frechet": distance, "nfe": nfe, "seconds_alone": seconds,
            "spread": {"all": 0.01, "frechet": distance / 10}, **more}  # fmt: skip


THREE = {model: {str(n): row(n, first + 0.1 * place, distance / (1 + place), seconds * n) for place, n in enumerate((1, 2, 4, 50))}
         for model, first, distance, seconds in (("teacher", 0.3, 40, 0.012), ("student", 0.4, 30, 0.007),
                                                 ("a model with an extraordinarily long name", 0.6, 12, 0.007))}  # fmt: skip
ONE = {"mine": {"4": row(4, 0.91, 3.3, 0.05)}}
FOLDERS = {"folder A": {"images": {"fid": 12.3, "clip": 0.31, "spread": {"clip": 0.0004}}}, "folder B": {"images": {"fid": 14.1}}}
MIXED = {**THREE, "real images": {"images": {"all": 0.985, "frechet": 0.9}}, "before": {"images": {"all": 0.97, "frechet": 1.2}}}
WATCHED = {f"run/checkpoint-{n}": {"4": row(4, 0.05 * n, 40 / n, 0.05 + n * 1e-4)} for n in range(1, 14)}
DENSE = {"a": {str(n): row(n, n / 70, 10 / n, 1e-4 * 10 ** (n / 12)) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 50, 60)}}
CASES = {"three": THREE, "one": ONE, "folders": FOLDERS, "mixed": MIXED, "watched": WATCHED, "dense": DENSE}


def noise(side, count, seed=0, height=None):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, height or side, side, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def samples_of(figures, side, count):
    return {report_pictures.label(model, steps): noise(side, count) for model, by_steps in figures.items() for steps in by_steps}


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """The figure that was saved last, [it]; its file is there too."""
    kept, save = [], report_pictures._save

    def keep(figure, path):
        kept[:] = [figure]
        save(figure, path)

    monkeypatch.setattr(report_pictures, "_save", keep)
    return kept


def texts(figure):
    """[(text, box in pixels)] of everything that is written in a drawn figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    found = list(figure.texts) + [text for legend in figure.legends for text in legend.get_texts()]
    for plot in figure.axes:
        if plot.axison:
            found += [plot.xaxis.label, plot.yaxis.label, *plot.texts]
            for axis in (plot.xaxis, plot.yaxis):
                (low, high), ticks = axis.get_view_interval(), axis.get_major_ticks()
                found += [tick.label1 for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_visible()]
    renderer = canvas.get_renderer()
    return [(text.get_text(), text.get_window_extent(renderer)) for text in found if text.get_text().strip()]


def check(figure, path):
    found = texts(figure)
    with Image.open(path) as image:
        width, height = image.size
    assert 300 < width < 2400 and 150 < height < 2600
    cut = [text for text, box in found if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]
    assert cut == []
    over = [(one, other) for (one, box), (other, place) in itertools.combinations(found, 2)
            if min(box.x1, place.x1) - max(box.x0, place.x0) > 1 and min(box.y1, place.y1) - max(box.y0, place.y0) > 1]  # fmt: skip
    assert over == []
    return [text for text, _ in found]


@pytest.mark.parametrize(("name", "side"), [("three", 512), ("three", 32), ("one", 32), ("folders", 512), ("mixed", 512),
                                            ("watched", 512), ("dense", 32)])  # fmt: skip
def test_report_is_whole_and_readable(tmp_path, figure, name, side):
    figures, path = CASES[name], tmp_path / "report.png"
    captions = PROMPTS * 2 if side == 512 else []
    report_pictures.draw_report(path, "brisk: a title", figures, samples_of(figures, side, 8), captions)
    found = check(figure[0], path)
    assert found[0] == "brisk: a title"
    for model in figures:
        assert report_pictures._short(model) in found  # in the legend, or at its line


@pytest.mark.parametrize("name", ["mixed", "folders", "watched"])
def test_frontier_is_whole_and_readable(tmp_path, figure, name):
    path = tmp_path / "frontier.png"
    assert report_pictures.draw_frontier(path, CASES[name])
    check(figure[0], path)


def test_frontier_has_a_curve_per_model_over_every_cost(tmp_path, figure):
    report_pictures.draw_frontier(tmp_path / "f.png", THREE)
    plots = figure[0].axes
    assert [plot.get_xlabel() for plot in plots] == list(report_pictures.COST.values()) * 2
    assert [plot.get_ylabel() for plot in plots] == ["agreement with what was asked\nhigher is better", "",
                                                     "Fréchet distance\nlower is better", ""]  # fmt: skip
    assert [plot.get_yscale() for plot in plots] == ["linear"] * 2 + ["log"] * 2
    assert [label.get_text() for label in plots[0].get_xticklabels()] == ["1", "2", "4", "50"]
    colours = [[curve.lines[0].get_color() for curve in plot.containers] for plot in plots]
    assert colours == [["C0", "C1", "C2"]] * 4
    curve = plots[1].containers[0]
    assert curve.lines[0].get_xdata().tolist() == [0.012, 0.024, 0.048, 0.6]
    assert curve.has_yerr and plots[2].get_ylim() == plots[3].get_ylim()
    assert [text.get_text() for text in figure[0].legends[0].get_texts()] == [report_pictures._short(name) for name in THREE]


def test_images_without_cost_are_dashed_lines_with_names(tmp_path, figure):
    report_pictures.draw_frontier(tmp_path / "f.png", MIXED)
    for plot in figure[0].axes:
        dashed = [line for line in plot.lines if line.get_linestyle() == "--"]
        assert len(dashed) == 2 and {text.get_text() for text in plot.texts} == {"real images", "before"}
    assert len(figure[0].legends[0].get_texts()) == 3


def test_measures_are_in_a_fixed_order_and_digit_gives_way_to_all():
    values = dict.fromkeys(("recall", "clip", "fid", "digit", "foreground", "seconds_alone"), 0.5)
    figures = {"a": {"4": {**values, "own": 1.0, "nan": 1, "spread": {"own": 0.1, "reward": 0.1}}}}
    assert report_pictures.quality_keys(figures) == ["digit", "fid", "clip", "recall", "own"]
    figures["a"]["4"]["all"] = 0.5
    assert report_pictures.quality_keys(figures)[:2] == ["all", "fid"]
    assert report_pictures.quality_keys({"a": {"4": {"fid": float("nan"), "nfe": 4}}}) == []
    assert not report_pictures.LOWER & report_pictures.HIGHER


def test_nothing_to_draw_makes_no_file(tmp_path):
    figures = {"a": {"4": {"nfe": 4}}}
    assert report_pictures.draw_frontier(tmp_path / "f.png", figures) is False
    assert report_pictures.draw_report(tmp_path / "r.png", "title", figures, {}, []) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("size", "side", "expected"), [
    ((32, 32), 128, (128, 128)), ((32, 32), 80, (64, 64)), ((100, 100), 128, (100, 100)), ((512, 256), 128, (128, 64)),
    ((1024, 3), 128, (128, 1)), ((128, 128), 128, (128, 128)), ((20, 60), 128, (40, 120)),
])  # fmt: skip
def test_thumbnails_fit(size, side, expected):
    assert report_pictures.thumbnail(Image.new("L", size), side).size == expected


def test_thumbnails_keep_pixels_when_enlarged_and_average_when_shrunk():
    image = noise(32, 1)[0]
    grown = np.asarray(report_pictures.thumbnail(image, 128))
    assert (grown[::4, ::4] == np.asarray(image)).all() and (grown[3::4, 3::4] == np.asarray(image)).all()
    image = noise(256, 1)[0]
    means = np.asarray(image, float).reshape(128, 2, 128, 2, 3).mean((1, 3))
    assert abs(np.asarray(report_pictures.thumbnail(image, 128)) - means).max() <= 1  # rounded per direction


def test_samples_are_where_their_row_and_column_say(tmp_path):
    colours = ["red", "lime", "blue", "black"]
    rows = {"first\n4 NFE": [Image.new("RGB", (64, 64), colour) for colour in colours],
            "second": [Image.new("RGB", (16, 16), "yellow"), None]}  # fmt: skip
    report_pictures.draw_samples(tmp_path / "s.png", rows, ["one", "two", "three", "four"])
    pixels = np.asarray(Image.open(tmp_path / "s.png").convert("RGB")).astype(int)

    def box(colour):
        found = np.argwhere((pixels == colour).all(2))
        return *found.min(0), *(found.max(0) + 1)

    boxes = [box(colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))]
    assert [(bottom - top, right - left) for top, left, bottom, right in boxes] == [(128, 128)] * 4
    assert boxes[0][0] == boxes[1][0] == boxes[2][0] and boxes[1][1] - boxes[0][1] == 132 == boxes[2][1] - boxes[1][1]
    assert boxes[3][1] == boxes[0][1] and boxes[3][0] - boxes[0][0] == 132


def test_a_grid_has_ten_columns_at_most(tmp_path, figure):
    report_pictures.draw_samples(tmp_path / "s.png", {"a": noise(16, 40)}, ["caption"] * 40)
    assert sum(text.get_text() == "caption" for text in figure[0].texts) == 10
    check(figure[0], tmp_path / "s.png")


def test_long_labels_keep_their_number_of_calls_and_captions_end_in_an_ellipsis(tmp_path, figure):
    rows = {report_pictures.label("a model " * 30, "4"): noise(32, 1)}
    report_pictures.draw_samples(tmp_path / "s.png", rows, PROMPTS[:1])
    label, caption = (text.get_text() for text in figure[0].texts[-2:])
    assert not any(text.get_parse_math() for text in figure[0].texts)  # $5 and $10 are no formula
    assert label.endswith("…\n4 NFE") and caption.endswith("…") and caption.startswith("a highly") and "$5" in caption


@pytest.mark.parametrize(("low", "high", "least"), [(1, 1.3, 3), (0.9, 6, 4), (0.01, 0.5, 4), (1e-4, 1e4, 4), (3e-5, 4e-5, 2)])
def test_ticks_are_inside_and_as_many_as_have_room(low, high, least):
    def room(a, b):
        return np.log(b / a) / np.log(high / low) > 0.1

    places = report_pictures.ticks(low, high, room)
    assert least <= len(places) <= 10 and all(low <= place <= high for place in places)
    assert all(room(a, b) for a, b in itertools.pairwise(places))


def test_crowded_budgets_keep_their_powers_of_two(tmp_path, figure):
    report_pictures.draw_frontier(tmp_path / "f.png", DENSE)
    found = [label.get_text() for label in figure[0].axes[0].get_xticklabels()]
    assert {"1", "2", "4", "8", "50"} <= set(found) and len(found) < 12 and found == sorted(found, key=int)


@pytest.mark.parametrize(("rows", "columns", "wide"), [(1, 8, True), (1, 3, False), (8, 8, True)])
def test_picture_has_a_sane_shape(tmp_path, rows, columns, wide):
    figures = {f"model {number}": {"4": row(4, 0.5, 3, 0.1)} for number in range(rows)}
    report_pictures.draw_report(tmp_path / "r.png", "title", figures, samples_of(figures, 32, columns), [])
    with Image.open(tmp_path / "r.png") as image:
        assert 1.2 < image.width / image.height < 3.5 and (image.width > 1300) == wide
