"""Charts add up as they are read, show nothing where nothing is known, and let nobody's text become markup."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastq import charts

NUMBERS = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20)
SVG = "{http://www.w3.org/2000/svg}"


def part(objective: str, horizon: str, value: float) -> dict[str, object]:
    return {"objective": objective, "horizon": horizon, "value": value}


def drawn(chart: str, kind: str) -> list[ET.Element]:
    return [e for e in ET.fromstring(chart).iter() if kind in e.get("class", "").split()]


def as_number(shown: str) -> float:
    return float(shown.replace("−", "-"))


@given(NUMBERS, st.integers(0, 4))
def test_rounded_parts_add_up_to_the_rounded_sum_and_none_is_off_by_a_last_digit(values: list[float], digits: int) -> None:
    shown, unit = charts.summing(values, digits), 10.0**-digits
    assert sum(shown) == pytest.approx(round(sum(values) / unit) * unit, abs=unit * 1e-3)
    assert all(abs(a - b) <= unit * (1 + 1e-6) for a, b in zip(values, shown, strict=True))


@example(values=[0.0, 5e-324])
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12))
def test_the_numbers_of_a_table_of_parts_add_up_as_printed(values: list[float]) -> None:
    total = sum(values)
    table = charts.parts_sum([part(f"o{i}", "immediate", v) for i, v in enumerate(values)], total, total - 1, total + 1)
    digits = len(table.total.number.partition(".")[2])
    assert sum(as_number(row.number) for row in table.rows) == pytest.approx(as_number(table.total.number), abs=0.1 * 10**-digits)
    assert as_number(table.gains.number) + as_number(table.losses.number) == pytest.approx(as_number(table.total.number), abs=0.1 * 10**-digits)


def test_a_waterfall_puts_the_decisive_reasons_first_and_each_bar_where_the_last_one_ended() -> None:
    parts = [part("cost", "immediate", 0.3), part("joy", "immediate", -0.2), part("joy", "long_term", 0.5)]
    table = charts.waterfall(parts, [("joy", "long_term")], 0.6, 0.2, 1.0)
    assert [(row.objective, row.horizon, row.decisive) for row in table.rows] == [
        ("joy", "long_term", True),
        ("cost", "immediate", False),
        ("joy", "immediate", False),
    ]
    bars = [drawn(row.chart, row.kind)[0] for row in table.rows]
    spans = [(float(b.get("x")), float(b.get("x")) + float(b.get("width"))) for b in bars]
    assert spans[0][1] == pytest.approx(spans[1][0], abs=0.02)  # a gain begins where the gain before it ended
    assert spans[1][1] == pytest.approx(spans[2][1], abs=0.02)  # a loss hangs from there
    total = drawn(table.total.chart, "total")[0]
    assert float(total.get("x")) + float(total.get("width")) == pytest.approx(spans[2][0], abs=0.02)


def test_a_waterfall_can_be_read_however_wide_its_interval_which_then_ends_in_arrows() -> None:
    parts = [part("joy", "immediate", 0.5), part("cost", "immediate", -0.2)]
    sure, unsure = (charts.waterfall(parts, [], 0.3, *ends) for ends in ((0.2, 0.4), (-50.0, 0.4)))
    assert min(float(drawn(row.chart, row.kind)[0].get("width")) for row in unsure.rows) > charts.WIDE / 20
    assert len(drawn(sure.total.chart, "on")) == 0
    (arrow,) = drawn(unsure.total.chart, "on")  # at the side where it goes on
    points = [float(point.split()[0]) for point in arrow.get("d")[1:].split("L")]
    assert points[1] < points[0] == points[2] < charts.WIDE / 4
    assert unsure.low == "−50.000"


def test_nothing_is_drawn_where_nothing_is_known() -> None:
    panel = charts.series("games", "", np.array([1.0, np.nan, 3.0]), [], bars=True)
    assert len(drawn(panel.chart, "bar")) == 2
    assert charts.series("games", "", np.full(3, np.nan), [], bars=False).last == "no data"
    joined = charts.series("rate", "", np.array([0.1, np.nan, 0.3, 0.4]), [], bars=False)
    assert (len(drawn(joined.chart, "point")), len(drawn(joined.chart, "path"))) == (3, 1)  # no line across the gap


def test_a_response_is_drawn_within_the_reach_of_the_evidence_alone() -> None:
    at = np.linspace(0, 10, 11)
    panel = charts.response(charts.Response("bonus", "INR", 0, 10, (2, 5), at, at, np.ones(11), 3, None, {"retain": 4}, [2.5]))
    xs = [float(point.split()[0]) for point in drawn(panel.chart, "curve")[0].get("d")[1:].split("L")]
    assert (min(xs), max(xs)) == (200, 500)
    assert sum(float(e.get("width")) for e in drawn(panel.chart, "unknown")) == pytest.approx(700)


def test_hostile_text_stays_text() -> None:
    hostile = '"><script>alert(1)</script>'
    chart = charts.decisions_strip([charts.Mark(0, hostile, f"/console/decision?id={hostile}"), charts.Mark(1, hostile)], 3)
    tree = ET.fromstring(chart)
    assert not list(tree.iter(f"{SVG}script"))
    assert [e.text for e in tree.iter(f"{SVG}title")] == [hostile, hostile]
    assert "<script" not in charts.series(hostile, "", np.array([1.0]), [], bars=True).chart
