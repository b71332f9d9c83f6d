import itertools
import math
import xml.etree.ElementTree as ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from vpo_jax.report.plots import interval_bar, legend, line_chart, short, ticks

FINITE = st.floats(-1e6, 1e6)


@settings(deadline=None, max_examples=100)
@given(FINITE, st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_round_even_and_span_the_data(low, width, count):
    found = ticks(low, low + width, count)
    step = found[1] - found[0]
    assert found[0] <= low + 1e-6 * step and found[-1] >= low + width - 1e-6 * step
    assert 2 <= len(found) <= count + 2
    assert all(math.isclose(b - a, step, rel_tol=1e-3) for a, b in itertools.pairwise(found))


def test_step_ticks_are_whole_and_inside():
    assert ticks(1, 24, 5, whole=True) == [10, 20]
    assert ticks(1, 3, 5, whole=True) == [1, 2, 3]
    assert ticks(7, 7, 5, whole=True) == [7]


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(st.text(max_size=8), st.lists(st.tuples(st.integers(0, 99), st.floats()), max_size=9), max_size=8)
)
def test_any_numbers_and_names_make_well_formed_svg_or_nothing(series):
    drawing = line_chart(series)
    if drawing:
        assert "nan" not in ElementTree.fromstring(_printable(drawing)).get("viewBox")
        assert "nan" not in _points(drawing) and "inf" not in _points(drawing)


def _points(drawing: str) -> str:
    root = ElementTree.fromstring(_printable(drawing))
    return " ".join(node.get("points", "") + node.get("cx", "") + node.get("cy", "") for node in root.iter())


def _printable(text: str) -> str:
    # XML forbids most control characters, which HTML shows as nothing.
    return "".join(c for c in text if c >= " " and not 0xD800 <= ord(c) <= 0xDFFF and ord(c) not in (0xFFFE, 0xFFFF))


def test_names_are_escaped():
    assert "<b>" not in line_chart({"<b>": [(0, 1), (1, 2)]})
    assert "<b>" not in legend(["<b>"])


def test_nothing_to_draw_draws_nothing():
    assert line_chart({}) == "" and line_chart({"a": [(0, math.nan)]}) == ""
    assert interval_bar(math.nan, 0.0, 1.0) == ""


def test_an_interval_bar_says_better_worse_or_level():
    assert "better" in interval_bar(0.8, 0.7, 0.9)
    assert "worse" in interval_bar(0.2, 0.1, 0.4)
    assert "level" in interval_bar(0.6, 0.45, 0.7)


def test_tick_labels_are_short():
    assert [short(x) for x in (0, 1200, 0.25, 5e-5, 2e6)] == ["0", "1.2k", "0.25", "5e-05", "2e+06"]
