import math
import xml.etree.ElementTree as ElementTree

import pytest

from dino_jax.report.charts import MOST, Chart, Curve, svg


def drawn(chart):
    return ElementTree.fromstring(svg(chart))


def test_a_chart_is_valid_and_told_to_those_who_cannot_see_it():
    chart = Chart(
        "a < b & c", [Curve("one", [1, 2, 3], [0.1, 0.5, 0.2]), Curve("two", [1, 3], [1.0, 2.0])], [("end", 0.0)]
    )
    picture = drawn(chart)
    assert picture.get("role") == "img"
    assert picture.get("aria-label") == "a < b & c: one 0.2, two 2"
    assert len(picture.findall("polyline")) == 2
    assert "end" in [text.text for text in picture.findall("text")]


def test_a_chart_without_values_is_left_out():
    assert svg(Chart("nothing", [Curve("", [], [])])) == ""
    assert svg(Chart("nothing", [Curve("", [1, 2], [math.nan, math.inf])])) == ""
    assert svg(Chart("not positive", [Curve("", [1, 2], [0.0, -1.0])], log=True)) == ""


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 0.0], [1e-12, 1e12], [-5.0, 5.0]])
def test_curves_stay_inside(values):
    picture = drawn(Chart("x", [Curve("", range(len(values)), values)], healthy=(-1.0, 1.0)))
    width, height = map(float, picture.get("viewBox").split()[2:])
    for line in picture.findall("polyline"):
        for x, y in (map(float, point.split(",")) for point in line.get("points").split()):
            assert 0 <= x <= width
            assert 0 <= y <= height


def test_long_curves_are_thinned():
    [line] = drawn(Chart("x", [Curve("", range(100_000), [float(i) for i in range(100_000)])])).findall("polyline")
    assert len(line.get("points").split()) <= MOST
