"""Charts inside pages: SVG that stretches to its place and takes every colour from the page, so it follows light, dark and print.

No words and no numbers are drawn: those stand in the page's own text beside a chart, where they wrap, can be selected and are read aloud. What is
drawn is built as a tree and serialised by the standard library, so nothing that a log holds can become markup. Values are in the caller's unit;
widths and heights are in the thousandths of `WIDE` and the pixels of `height`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree import ElementTree as ET

import numpy as np

WIDE = 1000.0
ROW = 22.0  # height of one bar's track
BEYOND = 0.5  # of a waterfall's own width that an interval may take beside it, on either side


@dataclass(frozen=True)
class Scale:
    """Where values lie between the left edge, `low`, and the right edge, `high`."""

    low: float
    high: float

    def __call__(self, value: float) -> float:
        return WIDE * (value - self.low) / ((self.high - self.low) or 1.0)


def scale_of(values: Iterable[float], *, margin: float = 0.02) -> Scale:
    """A scale that holds zero and all finite values, with a little room at both ends."""
    shown = [0.0, *(float(v) for v in values if math.isfinite(v))]
    room = margin * ((max(shown) - min(shown)) or 1.0)
    return Scale(min(shown) - room, max(shown) + room)


# ---- the drawing -----------------------------------------------------------------------------------------------------------
def _canvas(height: float, label: str | None, kind: str = "") -> ET.Element:
    """A drawing that says `label` to those who hear the page; without one, the text beside it says everything."""
    heard = {"role": "img", "aria-label": label} if label else {"aria-hidden": "true", "focusable": "false"}
    shape = {"viewBox": f"0 0 {WIDE:g} {height:g}", "preserveAspectRatio": "none", "class": f"chart {kind}".strip()}
    return ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **shape, **heard})


def _rect(on: ET.Element, x0: float, x1: float, y: float, height: float, kind: str) -> ET.Element:
    left, width = min(x0, x1), max(abs(x1 - x0), 1.2)  # what is not zero stays visible
    return ET.SubElement(on, "rect", {"x": f"{left:.2f}", "y": f"{y:.2f}", "width": f"{width:.2f}", "height": f"{max(height, 0.8):.2f}", "class": kind})


def _line(on: ET.Element, points: Sequence[tuple[float, float]], kind: str) -> ET.Element:
    d = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points)
    return ET.SubElement(on, "path", {"d": d, "class": f"line {kind}"})


def _dot(on: ET.Element, x: float, y: float, kind: str) -> ET.Element:
    """A round dot whatever the stretch: the cap of a line of no length."""
    return ET.SubElement(on, "path", {"d": f"M{x:.2f} {y:.2f}h0", "class": f"dot {kind}"})


def _text(svg: ET.Element) -> str:
    return ET.tostring(svg, encoding="unicode", short_empty_elements=True)


# ---- numbers that visibly add up ---------------------------------------------------------------------------------------------
def digits_for(room: float) -> int:
    """Decimals with which values on a scale this wide are told apart."""
    return min(max(0, 3 - math.floor(math.log10(room))), 300) if room > 0 else 3  # beyond, a float has no power of ten


def summing(values: Sequence[float], digits: int) -> list[float]:
    """Values rounded so that what is shown adds up to the rounded sum: the largest remainders carry what is left, none moves a whole last digit."""
    unit = 10.0**-digits
    scaled = np.asarray(values, float) / unit
    floors = np.floor(scaled)
    missing = round(float(scaled.sum())) - int(floors.sum())
    up = np.argsort(-(scaled - floors), kind="stable")[: max(missing, 0)]
    floors[up] += 1
    return [float(v) * unit + 0.0 for v in floors]


def signed(value: float, digits: int) -> str:
    """A number with its sign, a true minus, and none before zero."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


@dataclass(frozen=True)
class Row:
    """One line of a table of parts: what it is, its number as shown, its bar; `kind` is gain, loss, none or total; `decisive` sets it apart."""

    objective: str
    horizon: str
    number: str
    chart: str
    kind: str
    decisive: bool = False


@dataclass(frozen=True)
class Sum:
    """A table of parts and how they add up: `rows`, the gains laid end to end, the losses laid back from there, and what is left, with its interval."""

    rows: list[Row]
    gains: Row
    losses: Row
    total: Row
    low: str
    high: str


def _kind(value: float) -> str:
    return "gain" if value > 0 else "loss" if value < 0 else "none"


def _bar(scale: Scale, start: float, end: float, kind: str, *, carried: float | None = None, whisker: tuple[float, float] | None = None) -> str:
    svg = _canvas(ROW, None, "track")
    _line(svg, [(scale(0), 0), (scale(0), ROW)], "zero")
    if carried is not None:
        _line(svg, [(scale(carried), -ROW), (scale(carried), ROW / 2)], "carry")
    _rect(svg, scale(start), scale(end), 4, ROW - 8, kind)
    if whisker is not None:
        low, high = (min(max(scale(bound), 0.0), WIDE) for bound in whisker)
        _line(svg, [(low, ROW / 2), (high, ROW / 2)], "whisker")
        for x, bound, inwards in ((low, whisker[0], 1), (high, whisker[1], -1)):
            if scale.low <= bound <= scale.high:
                _line(svg, [(x, ROW / 2 - 5), (x, ROW / 2 + 5)], "whisker")
            else:  # it goes on: an arrow at the edge
                _line(svg, [(x + 14 * inwards, ROW / 2 - 5), (x, ROW / 2), (x + 14 * inwards, ROW / 2 + 5)], "whisker on")
    return _text(svg)


def _strip(scale: Scale, start: float, values: Sequence[float], kind: str) -> str:
    """Values laid end to end from `start`, one segment each."""
    svg = _canvas(ROW, None, "track")
    _line(svg, [(scale(0), 0), (scale(0), ROW)], "zero")
    at = start
    for value in values:
        _rect(svg, scale(at), scale(at + value), 4, ROW - 8, f"{kind} piece")
        at += value
    return _text(svg)


def parts_sum(parts: Sequence[Mapping[str, object]], total: float, low: float, high: float) -> Sum:
    """The parts of a value as diverging bars, and beneath them how they add up."""
    values = [float(part["value"]) for part in parts]  # type: ignore[arg-type]  # a part's value is a number
    gains, losses = [v for v in values if v > 0], [v for v in values if v < 0]
    scale = scale_of([*values, sum(gains), total, low, high])
    digits = digits_for(max(map(abs, [*values, total])) or 1.0) - 1
    shown = summing(values, digits)
    rows = [
        Row(str(part["objective"]), str(part["horizon"]), signed(number, digits), _bar(scale, 0, value, _kind(value)), _kind(value))
        for part, value, number in zip(parts, values, shown, strict=True)
    ]
    up, down = sum(n for n in shown if n > 0), sum(n for n in shown if n < 0)
    return Sum(
        rows,
        Row("what it brings", "", signed(up, digits), _strip(scale, 0, gains, "gain"), "gain"),
        Row("what it takes", "", signed(down, digits), _strip(scale, sum(gains), losses, "loss"), "loss"),
        Row("in all", "", signed(sum(shown), digits), _bar(scale, 0, total, "total", whisker=(low, high)), "total"),
        signed(low, digits),
        signed(high, digits),
    )


def waterfall(parts: Sequence[Mapping[str, object]], decisive: Iterable[Sequence[str]], total: float, low: float, high: float) -> Sum:
    """Differences as a waterfall: the decisive reasons first, each bar from where the last one ended, down to what is left, with its interval.

    The bars set the scale, so they can be read however little is certain: an interval that goes far beyond them ends in arrows.
    """
    reasons = {tuple(reason) for reason in decisive}

    def rank(part: Mapping[str, object]) -> tuple[int, float]:
        value = float(part["value"])  # type: ignore[arg-type]  # a part's value is a number
        return (0 if (part["objective"], part["horizon"]) in reasons else 1 if value > 0 else 2 if value < 0 else 3, -abs(value))

    ordered = sorted(parts, key=rank)
    values = [float(part["value"]) for part in ordered]  # type: ignore[arg-type]  # as above
    ends = np.cumsum(values).tolist() if values else []
    scale = scale_of([*ends, total], margin=BEYOND)
    scale = scale_of([*ends, total, *(min(max(end, scale.low), scale.high) for end in (low, high))])
    digits = digits_for(max(map(abs, [*values, total])) or 1.0) - 1
    shown = summing(values, digits)
    rows, at = [], 0.0
    for i, (part, value, number) in enumerate(zip(ordered, values, shown, strict=True)):
        chart = _bar(scale, at, at + value, _kind(value), carried=at if i else None)
        key = (str(part["objective"]), str(part["horizon"]))
        rows.append(Row(*key, signed(number, digits), chart, _kind(value), key in reasons))
        at += value
    up, down = [v for v in values if v > 0], [v for v in values if v < 0]
    return Sum(
        rows,
        Row("what speaks for it", "", signed(sum(n for n in shown if n > 0), digits), _strip(scale, 0, up, "gain"), "gain"),
        Row("what speaks against it", "", signed(sum(n for n in shown if n < 0), digits), _strip(scale, sum(up), down, "loss"), "loss"),
        Row("difference", "", signed(sum(shown), digits), _bar(scale, 0, total, "total", carried=at, whisker=(low, high)), "total"),
        signed(low, digits),
        signed(high, digits),
    )


def amounts(named: Mapping[str, float]) -> list[Row]:
    """Named amounts as diverging bars on one scale, largest first."""
    scale = scale_of(named.values())
    digits = digits_for(max((abs(v) for v in named.values()), default=1.0) or 1.0) - 1
    ordered = sorted(named.items(), key=lambda pair: -abs(pair[1]))
    return [Row(name, "", signed(value, digits), _bar(scale, 0, value, _kind(value)), _kind(value)) for name, value in ordered]


def intervals(rows: Sequence[tuple[float, float, float, str]]) -> list[str]:
    """Estimates (value, low, high, kind) as dots with whiskers on one scale, which need not hold zero."""
    ends = [x for value, low, high, _ in rows for x in (value, low, high)] or [0.0]
    room = 0.06 * ((max(ends) - min(ends)) or 1.0)
    scale, charts = Scale(min(ends) - room, max(ends) + room), []
    for value, low, high, kind in rows:
        svg = _canvas(ROW, None, "track")
        _line(svg, [(scale(low), ROW / 2), (scale(high), ROW / 2)], f"whisker {kind}")
        for x in (low, high):
            _line(svg, [(scale(x), ROW / 2 - 5), (scale(x), ROW / 2 + 5)], f"whisker {kind}")
        _dot(svg, scale(value), ROW / 2, kind)
        charts.append(_text(svg))
    return charts


# ---- time ------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Mark:
    """A decision on the time axis: which period, where it leads, what it says."""

    period: int
    says: str
    link: str | None = None


@dataclass(frozen=True)
class Panel:
    """One of several small charts on the same periods, with the words that stand around it."""

    name: str
    unit: str
    low: str
    high: str
    last: str
    chart: str
    top: str = ""
    bottom: str = ""


def number(value: float) -> str:
    """Three significant digits with a true minus; large numbers in full."""
    if not math.isfinite(value):
        return "–"
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}").replace("-", "−")


def series(
    name: str, unit: str, values: np.ndarray, marks: Sequence[Mark], *, bars: bool, bounds: tuple[float, float] | None = None, height: float = 64.0
) -> Panel:
    """Values [W] over the periods, oldest first, NaN where there are no data; nothing is drawn there. Bars stand on zero; else dots, joined where known."""
    known = np.isfinite(values)
    seen = values[known]
    low, high = bounds or (min(0.0, float(seen.min())) if len(seen) else 0.0, max(0.0, float(seen.max())) if len(seen) else 1.0)
    high = high if high > low else low + 1.0
    span, width = high - low, WIDE / max(len(values), 1)

    def y(value: float) -> float:
        return 4 + (height - 8) * (1 - (value - low) / span)

    what = f"{name}: no data"
    if len(seen):
        what = f"{name}: {len(seen)} of {len(values)} periods known, from {number(float(seen.min()))} to {number(float(seen.max()))}"
    svg = _canvas(height, f"{what}; {len(marks)} decisions marked" if marks else what, "series")
    for mark in marks:
        x = (mark.period + 0.5) * width
        _line(svg, [(x, 0), (x, height)], "mark")
    _line(svg, [(0, y(max(0.0, low))), (WIDE, y(max(0.0, low)))], "base")
    if bars:
        for i in np.flatnonzero(known):
            top, bottom = sorted((y(float(values[i])), y(max(0.0, low))))
            _rect(svg, i * width + 0.14 * width, (i + 1) * width - 0.14 * width, top, bottom - top, "bar" if values[i] >= 0 else "bar below")
    else:
        places = [((i + 0.5) * width, y(float(values[i]))) if known[i] else None for i in range(len(values))]
        for one, other in pairwise(places):
            if one and other:
                _line(svg, [one, other], "path")
        for place in places:
            if place:
                _dot(svg, *place, "point")
    last = number(float(values[np.flatnonzero(known)[-1]])) if known.any() else "no data"
    return Panel(name, unit, number(low), number(high), last, _text(svg))


def decisions_strip(marks: Sequence[Mark], periods: int, height: float = 18.0) -> str:
    """When decisions were made; each is a link where it leads somewhere."""
    svg = _canvas(height, None if any(m.link for m in marks) else f"{len(marks)} decisions", "strip")
    if any(m.link for m in marks):
        del svg.attrib["aria-hidden"]
        svg.set("role", "group")
        svg.set("aria-label", "decisions that can be opened")
    width = WIDE / max(periods, 1)
    _line(svg, [(0, height / 2), (WIDE, height / 2)], "base")
    for mark in marks:
        x, on = (mark.period + 0.5) * width, svg
        if mark.link:
            on = ET.SubElement(svg, "a", {"href": mark.link, "aria-label": mark.says})
            _rect(on, x - width / 2, x + width / 2, 0, height, "target")
        ET.SubElement(on, "title").text = mark.says
        _dot(on, x, height / 2, "served" if mark.link else "logged")
    return _text(svg)


def columns(values: Sequence[float], label: str, height: float = 56.0) -> str:
    """Signed columns on one base line: what each period moved."""
    scale = scale_of(values, margin=0.06)
    svg = _canvas(height, label, "series")
    width = WIDE / max(len(values), 1)

    def y(value: float) -> float:
        return height * (1 - scale(value) / WIDE)

    _line(svg, [(0, y(0)), (WIDE, y(0))], "base")
    for i, value in enumerate(values):
        top, bottom = sorted((y(value), y(0)))
        if value:
            _rect(svg, i * width + 0.14 * width, (i + 1) * width - 0.14 * width, top, bottom - top, _kind(value))
    return _text(svg)


# ---- how the value depends on the action -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Response:
    """The value along one action dimension: [C] points, the value there and the half width of its 90 % interval; nothing outside `reach`."""

    name: str
    unit: str
    low: float
    high: float
    reach: tuple[float, float]
    at: np.ndarray
    value: np.ndarray
    half: np.ndarray
    chosen: float
    other: float | None
    policies: Mapping[str, float]
    logged: Sequence[float]


def response(of: Response, height: float = 120.0) -> Panel:
    """Drawn only where there are data: the curve with its band within the reach of the evidence, hatched ground outside, logged decisions on the floor."""
    inside = (of.at >= of.reach[0] - 1e-9) & (of.at <= of.reach[1] + 1e-9)
    at, value, half = of.at[inside], of.value[inside], of.half[inside]
    floor = 12.0
    low, high = (float((value - half).min()), float((value + half).max())) if len(at) else (0.0, 1.0)
    room = (high - low) or 1.0
    x = Scale(of.low, of.high)

    def y(v: float) -> float:
        return 6 + (height - floor - 12) * (1 - (v - low) / room)

    says = f"expected value as {of.name} goes from {number(of.reach[0])} to {number(of.reach[1])}, where the evidence reaches; nothing is known outside"
    svg = _canvas(height, says, "response")
    for start, end in ((of.low, of.reach[0]), (of.reach[1], of.high)):
        if end - start > 1e-9 * (of.high - of.low):
            _rect(svg, x(start), x(end), 0, height - floor, "unknown")
    if len(at) > 1:
        upper = [(x(a), y(v + h)) for a, v, h in zip(at, value, half, strict=True)]
        lower = [(x(a), y(v - h)) for a, v, h in zip(at, value, half, strict=True)]
        band = "M" + "L".join(f"{px:.2f} {py:.2f}" for px, py in [*upper, *reversed(lower)]) + "Z"
        ET.SubElement(svg, "path", {"d": band, "class": "band"})
        _line(svg, [(x(a), y(v)) for a, v in zip(at, value, strict=True)], "curve")
    for name, place in of.policies.items():
        tick = _line(svg, [(x(place), height - floor - 9), (x(place), height - floor)], "policy")
        ET.SubElement(tick, "title").text = f"{name}: {number(place)} {of.unit}".rstrip()
    for place in of.logged:
        _line(svg, [(x(place), height - floor + 3), (x(place), height - 1)], "logged")
    for shown, kind in ((of.other, "other"), (of.chosen, "chosen")):
        if shown is not None:
            _line(svg, [(x(shown), 0), (x(shown), height - floor)], kind)
            if len(at):
                _dot(svg, x(shown), y(float(np.interp(shown, at, value))), kind)
    digits = max(digits_for(room) - 1, 0)
    edges = (signed(high, digits), signed(low, digits)) if len(at) else ("", "")
    return Panel(of.name, of.unit, number(of.low), number(of.high), number(of.chosen), _text(svg), *edges)


def gauge(low: float, high: float, reach: tuple[float, float] | None, chosen: float, other: float | None) -> str:
    """A value on its allowed range, with the part of it that the evidence reaches, and what it is compared with."""
    x, height = Scale(low, high), 14.0
    svg = _canvas(height, None, "gauge")
    _rect(svg, 0, WIDE, 5, 4, "range")
    if reach is not None:
        _rect(svg, x(reach[0]), x(reach[1]), 5, 4, "reach")
    for place, kind in ((other, "other"), (chosen, "chosen")):
        if place is not None:
            _dot(svg, x(place), 7, kind)
    return _text(svg)


def meter(step: int, of: int) -> str:
    """`step` of `of` equal pieces filled, from the left; the word for it stands in the page."""
    svg, height, width = _canvas(10.0, None, "meter"), 10.0, WIDE / of
    for i in range(of):
        _rect(svg, i * width + 12, (i + 1) * width - 12, 0, height, "on" if i < step else "off")
    return _text(svg)


def heat(share: float) -> str:
    """One cell of a matrix: a ground whose strength is a share between 0 and 1."""
    svg = _canvas(ROW, None, "heat")
    cell = _rect(svg, 0, WIDE, 0, ROW, "cell")
    cell.set("fill-opacity", f"{min(max(share, 0.0), 1.0):.3f}")
    return _text(svg)


def histogram(counts: Sequence[float], label: str, height: float = 56.0) -> str:
    """Columns of equal width for counts in buckets, whose bounds stand in the page."""
    most, width = max(counts, default=0) or 1, WIDE / max(len(counts), 1)
    svg = _canvas(height, label, "series")
    for i, count in enumerate(counts):
        if count:
            top = (height - 2) * (1 - count / most)
            _rect(svg, i * width + 0.08 * width, (i + 1) * width - 0.08 * width, top, height - top, "bar")
    return _text(svg)
