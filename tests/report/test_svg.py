"""Charts are well-formed and show what they were given, in the place it belongs."""

import xml.etree.ElementTree as ET

import pytest

from kdcache.report import page, svg

NS = "{http://www.w3.org/2000/svg}"


def parse(text):
    return ET.fromstring(text)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        pytest.param(0, 10, [0, 2, 4, 6, 8, 10], id="twos"),
        pytest.param(0, 600, [0, 200, 400, 600], id="steps"),
        pytest.param(0.31, 0.52, [0.3, 0.35, 0.4, 0.45, 0.5, 0.55], id="fractions"),
        pytest.param(-3, 1, [-3, -2, -1, 0, 1], id="below zero"),
        pytest.param(5, 5, [5, 6, 7, 8, 9, 10], id="a single value"),
    ],
)
def test_ticks_are_round_and_span_the_values(low, high, expected):
    assert svg.nice_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        pytest.param(0.45, 2.5, [0.2, 0.5, 1, 2, 5], id="losses"),
        pytest.param(1, 10, [1, 2, 5, 10], id="a decade"),
        pytest.param(3, 3, [2, 5], id="a single value"),
        pytest.param(2, 2, [2, 5], id="a single tick"),
    ],
)
def test_logarithmic_ticks_span_the_values(low, high, expected):
    assert svg.log_ticks(low, high) == pytest.approx(expected)


def test_a_logarithmic_axis_keeps_ratios():
    line = svg.Line("halves", [(1, 4.0), (2, 2.0), (3, 1.0)])
    chart = parse(svg.line_chart([line], "curve", "steps", "loss", log_y=True))
    points = next(chart.iter(f"{NS}polyline")).get("points").split()
    ys = [float(point.split(",")[1]) for point in points]
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.2)


def test_bars_are_as_long_as_their_values():
    bars = [svg.Bar("a", 10, "10"), svg.Bar("b", 5, "five"), svg.Bar("c", 0, "0")]
    chart = parse(svg.bar_chart(bars, "lengths"))
    widths = [float(rect.get("width")) for rect in chart.iter(f"{NS}rect")]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.2)
    assert widths[2] == 0
    assert [text.text for text in chart.iter(f"{NS}text")] == ["a", "10", "b", "five", "c", "0"]


def test_a_bar_chart_with_a_top_leaves_room():
    half = parse(svg.bar_chart([svg.Bar("a", 50, "50")], "share", top=100))
    whole = parse(svg.bar_chart([svg.Bar("a", 50, "50")], "share"))
    lengths = [float(next(chart.iter(f"{NS}rect")).get("width")) for chart in (half, whole)]
    assert lengths[1] == pytest.approx(2 * lengths[0], abs=0.2)


def test_lines_go_through_their_points():
    lines = [
        svg.Line("falls", [(100, 4.0), (200, 2.0), (300, 0.0)]),
        svg.Line("flat", [(100, 2.0), (300, 2.0)]),
    ]
    chart = parse(svg.line_chart(lines, "curves", "steps", "loss"))
    falls, flat = (
        [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in chart.iter(f"{NS}polyline")
    )
    xs, ys = zip(*falls, strict=True)
    assert ys[1] == pytest.approx(flat[0][1])  # both are 2.0 there
    assert ys[0] < ys[1] < ys[2]  # y grows downwards on a screen
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    view = [float(value) for value in chart.get("viewBox").split()]
    assert all(0 < x < view[2] and 0 < y < view[3] for x, y in falls + flat)


def test_names_at_line_ends_do_not_overlap():
    lines = [svg.Line(name, [(1, 1.0), (2, 1.0)]) for name in ("one", "two", "three")]
    chart = parse(svg.line_chart(lines, "curves", "steps", "loss"))
    places = {text.text: float(text.get("y")) for text in chart.iter(f"{NS}text")}
    heights = sorted(places[name] for name in ("one", "two", "three"))
    assert heights[1] - heights[0] >= 15
    assert heights[2] - heights[1] >= 15


def test_a_chart_without_points_says_so():
    assert "no points" in svg.line_chart([svg.Line("a", [])], "curves", "steps", "loss")


def test_text_is_escaped():
    chart = svg.bar_chart([svg.Bar("<s> & co", 1, '"1"')], 'a "title" & more')
    assert next(parse(chart).iter(f"{NS}text")).text == "<s> & co"
    whole = page.page("<b>", "a & b", [page.section("<i>", "x < y", "")], "<end>")
    assert "&lt;b&gt;" in whole
    assert "x &lt; y" in whole
    assert "<b>" not in whole


def test_a_page_fetches_nothing():
    labels = page.soft_labels([("▁dog", [page.Entry("▁dog", 0.9, gold=True)])])
    chart = svg.bar_chart([svg.Bar("a", 1, "1")], "bars")
    whole = page.page("title", "lead", [page.section("s", "t", chart + labels)], "end")
    for fetched in ("<script", "<link", "<img", "src=", "@import", "url("):
        assert fetched not in whole
    assert "prefers-color-scheme: dark" in whole


def test_soft_labels_show_the_heaviest_first():
    entries = [page.Entry("low", 0.1, drawn=True), page.Entry("high", 0.8, gold=True)]
    shown = page.soft_labels([("high", entries)])
    assert shown.index("80%") < shown.index("10%")


def test_a_table_marks_one_row():
    shown = page.table(["model", "BLEU"], [["a", "1"], ["b", "2"]], strong=1)
    assert shown.count('class="best"') == 1
    assert shown.index('class="best"') > shown.index("<td>a</td>")
