"""Small charts as inline SVG: the same numbers give the same bytes, and text from the data is escaped."""

import itertools
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 460
"""Width of a chart in its own units; on a page it scales with its column."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#3b3b3b")
"""After Okabe and Ito, who chose them so that colour-blind people tell them apart."""
SPLIT_COLOURS = {"train": "#9db8c9", "valid": "#e69f00", "test": "#0072b2", "": "#d3d8de"}
SCALE = ("#fde725", "#90d743", "#35b779", "#21918c", "#31688e", "#443983", "#440154")
"""Light to dark: viridis, turned round, so that what is high stands out on white."""
SHADES = 24
"""Steps of the scale."""
SHAPES = (
    "M0-5A5 5 0 1 0 .01-5Z",
    "M-4.4-4.4H4.4V4.4H-4.4Z",
    "M0-5.6L5.3 4.2H-5.3Z",
    "M0-6L5 0L0 6L-5 0Z",
    "M0 5.6L5.3-4.2H-5.3Z",
    "M-1.9-5.6H1.9V-1.9H5.6V1.9H1.9V5.6H-1.9V1.9H-5.6V-1.9H-1.9Z",
    "M-5.3-3L-3-5.3L0-2.3L3-5.3L5.3-3L2.3 0L5.3 3L3 5.3L0 2.3L-3 5.3L-5.3 3L-2.3 0Z",
    "M0-6L1.6-2L5.7-1.9L2.5.8L3.5 4.9L0 2.6L-3.5 4.9L-2.5.8L-5.7-1.9L-1.6-2Z",
    "M-2.6-5.2H2.6L5.2 0L2.6 5.2H-2.6L-5.2 0Z",
)
"""Around (0, 0), some 11 units across: circle, square, triangle, diamond, triangle down, plus, cross, star, hexagon."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
"""The same of matplotlib."""
OTHER_SHAPE, OTHER_MARKER = "M0-3.2A3.2 3.2 0 1 0 .01-3.2Z", "."
INK, SOFT, RULE = "#1c2430", "#5d6878", "#dfe4ea"
TICK = f'fill="{SOFT}" font-size="11"'
CHARACTER = 6.2
"""Width of a character of a tick's text."""
DASHES = ("", "7 4", "2 3", "10 3 2 3")


@dataclass(frozen=True, kw_only=True)
class Whisker:
    """One row of a dot-and-whisker chart."""

    name: str
    position: int
    """The variant's, for its colour."""
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a line chart, points in the order of x."""

    name: str
    points: Sequence[tuple[float, float]]
    marked: Sequence[int] = ()
    """Points with a ring around them."""


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One point of a map; x and y from 0 to 1, upwards."""

    x: float
    y: float
    shape: int | None
    """Place in `SHAPES`; None: the small dot of those without one."""
    shade: int
    """Step of the scale, from 0 to `SHADES` − 1."""
    name: str


def colour(position: int) -> str:
    """Return the colour of the variant at a position; after the last one they begin anew, dashed."""
    return COLOURS[position % len(COLOURS)]


def dash(position: int) -> str:
    """Return the dash pattern of the variant at a position."""
    return DASHES[position // len(COLOURS) % len(DASHES)]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return round numbers within [low, high], about as many as wanted."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def whiskers(rows: Sequence[Whisker], reference: float | None, label: str) -> Markup:
    """Draw values with their intervals, a row each, and a dashed line at `reference`."""
    if not rows:
        return Markup("")
    ends = [e for r in rows for e in (r.low, r.value, r.high) if e is not None]
    low, high = _padded(min(ends), max(ends))
    left, right, row_height = 14, WIDTH - 14, 40
    bottom = 8 + row_height * len(rows)

    def x(value: float) -> str:
        return _n(left + (value - low) / (high - low) * (right - left))

    parts = []
    for tick in ticks(low, high):
        parts.append(f'<line stroke="{RULE}" stroke-width="1" x1="{x(tick)}" x2="{x(tick)}" y1="4" y2="{bottom}"/>')
        parts.append(f'<text {TICK} x="{x(tick)}" y="{bottom + 15}" text-anchor="middle">{tick:g}</text>')
    for position, row in enumerate(rows):
        y, ink = 8 + row_height * position, colour(row.position)
        parts.append(
            f'<text fill="{INK}" font-size="12.5" font-weight="600" x="{left}" y="{y + 13}">{escape(row.name)}</text>'
        )
        parts.append(
            f'<text fill="{INK}" font-size="12.5" x="{right}" y="{y + 13}" text-anchor="end">{row.value:.4f}</text>'
        )
        if reference is not None:
            at, look = x(reference), f'stroke="{SOFT}" stroke-width="1.2" stroke-dasharray="4 3"'
            parts.append(f'<line {look} x1="{at}" x2="{at}" y1="{y + 17}" y2="{y + 33}"/>')
        if row.low is not None and row.high is not None:
            a, b = x(row.low), x(row.high)
            parts.append(f'<path stroke="{ink}" d="M{a} {y + 25}H{b}M{a} {y + 21}v8M{b} {y + 21}v8"/>')
        parts.append(f'<circle cx="{x(row.value)}" cy="{y + 25}" r="4.5" fill="{ink}"/>')
    return _svg(parts, bottom + 22, label)


def lines(
    rows: Sequence[Line | None],
    x_label: str,
    label: str,
    *,
    names: Sequence[str] = (),
    limits: tuple[float, float] | None = None,
    height: int = 230,
) -> Markup:
    """Draw one line a row; colours go by position, so None keeps the place of a row without points.

    names: of the places 0, 1, … on the x axis, instead of numbers. limits: of y; default: those of the points.
    """
    points = [p for row in rows if row is not None for p in row.points]
    if not points:
        return Markup("")
    left, right, top, bottom = 52, WIDTH - 26, 10, height
    low, high = _padded(*(limits or (min(y for _, y in points), max(y for _, y in points))))
    first, last = min(0.0, min(x for x, _ in points)), max(x for x, _ in points)
    if names:
        first, last = -0.3, len(names) - 0.7
    last = last if last > first else first + 1.0

    def at(x: float, y: float) -> tuple[str, str]:
        across = left + (x - first) / (last - first) * (right - left)
        return _n(across), _n(bottom - (y - low) / (high - low) * (bottom - top))

    parts = []
    for tick in ticks(low, high):
        y = at(first, tick)[1]
        parts.append(f'<line stroke="{RULE}" stroke-width="1" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text {TICK} x="{left - 6}" y="{float(y) + 4:g}" text-anchor="end">{tick:g}</text>')
    if names:
        room = (right - left) / max(2, sum(map(bool, names)))
        for place, name in enumerate(names):
            x = at(place, low)[0]
            text = f"<title>{escape(name)}</title>{escape(cut(name, room))}"
            parts.append(f'<text {TICK} x="{x}" y="{bottom + 16}" text-anchor="middle">{text}</text>')
    else:
        for tick in ticks(first, last, 4):
            x = at(tick, low)[0]
            parts.append(f'<text {TICK} x="{x}" y="{bottom + 16}" text-anchor="middle">{tick:,.6g}</text>')
    middle = (left + right) // 2
    parts.append(
        f'<text {TICK} x="{middle}" y="{bottom + 34}" text-anchor="middle">{escape(cut(x_label, right - left))}</text>'
    )
    for position, row in enumerate(rows):
        if row is None:
            continue
        ink, placed = colour(position), [at(x, y) for x, y in row.points]
        path = "M" + "L".join(f"{x} {y}" for x, y in placed)
        dashes = f' stroke-dasharray="{dash(position)}"' if dash(position) else ""
        parts.append(f'<g class="line" data-line="{position}"><title>{escape(row.name)}</title>')
        parts.append(f'<path stroke="{ink}"{dashes} d="{path}"/>')
        if len(placed) <= 40:
            parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{ink}"/>' for x, y in placed]
        for place in row.marked:
            x, y = placed[place]
            parts.append(f'<circle class="best" cx="{x}" cy="{y}" r="6.5" stroke="{ink}" stroke-width="1.6"/>')
        parts.append("</g>")
    return _svg(parts, bottom + 40, label)


def training_panel(
    train: Sequence[tuple[float, float]],
    valid: Sequence[tuple[float, float]],
    limits: tuple[float, float],
    label: str,
) -> Markup:
    """Draw training loss (grey) and validation loss (coloured, with dots) by step, small."""
    left, right, top, bottom, wide = 34, 222, 8, 104, 232
    low, high = _padded(*limits)
    last = max([x for x, _ in [*train, *valid]], default=1.0) or 1.0

    def at(x: float, y: float) -> str:
        return f"{_n(left + x / last * (right - left))} {_n(bottom - (y - low) / (high - low) * (bottom - top))}"

    parts = []
    for tick in ticks(low, high, 4):
        y = at(0, tick).split()[1]
        parts.append(f'<line stroke="{RULE}" stroke-width="1" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text {TICK} x="{left - 4}" y="{float(y) + 4:g}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text {TICK} x="{left}" y="{bottom + 14}">0</text>')
    parts.append(f'<text {TICK} x="{right}" y="{bottom + 14}" text-anchor="end">{last:,.6g}</text>')
    for points, ink, width in ((train, "#8a949f", 1.5), (valid, COLOURS[1], 2)):
        if points:
            path = "M" + "L".join(at(x, y) for x, y in points)
            parts.append(f'<path stroke="{ink}" stroke-width="{width}" d="{path}"/>')
    for point in valid if len(valid) <= 30 else ():
        across, down = at(*point).split()
        parts.append(f'<circle cx="{across}" cy="{down}" r="3" fill="{COLOURS[1]}"/>')
    return _svg(parts, bottom + 20, label, wide, "panel")


def calibration_panel(points: Sequence[tuple[float, float]], top: float, label: str) -> Markup:
    """Draw observed over predicted click rates, small, with the diagonal on which they agree; axes from 0 to `top`."""
    left, right, up, bottom, wide = 34, 222, 6, 194, 232

    def at(x: float, y: float) -> tuple[str, str]:
        return _n(left + x / top * (right - left)), _n(bottom - y / top * (bottom - up))

    parts = []
    for tick in ticks(0, top, 3):
        x, y = at(tick, tick)
        parts.append(f'<line stroke="{RULE}" stroke-width="1" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<line stroke="{RULE}" stroke-width="1" x1="{x}" x2="{x}" y1="{up}" y2="{bottom}"/>')
        parts.append(f'<text {TICK} x="{left - 4}" y="{float(y) + 4:g}" text-anchor="end">{tick:g}</text>')
        parts.append(f'<text {TICK} x="{x}" y="{bottom + 14}" text-anchor="middle">{tick:g}</text>')
    ends = [*at(0, 0), *at(top, top)]
    parts.append(
        f'<line stroke="{SOFT}" stroke-width="1.2" stroke-dasharray="4 3" '
        f'x1="{ends[0]}" y1="{ends[1]}" x2="{ends[2]}" y2="{ends[3]}"/>'
    )
    placed = [at(x, y) for x, y in points]
    parts.append(f'<path stroke="{COLOURS[0]}" stroke-width="1.2" d="M{"L".join(" ".join(p) for p in placed)}"/>')
    parts += [f'<circle cx="{x}" cy="{y}" r="3.2" fill="{COLOURS[0]}"/>' for x, y in placed]
    return _svg(parts, bottom + 20, label, wide, "panel")


def columns(rows: Sequence[tuple[str, float, str]], label: str) -> Markup:
    """Draw a column for each (name, value, colour); names at the first, the last and where there is room."""
    if not rows:
        return Markup("")
    left, right, top, bottom = 58, WIDTH - 10, 8, 130
    high = max(value for _, value, _ in rows) or 1.0
    wide = (right - left) / len(rows)
    parts = []
    for tick in ticks(0, high, 3):
        y = _n(bottom - tick / high * (bottom - top))
        parts.append(f'<line stroke="{RULE}" stroke-width="1" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text {TICK} x="{left - 6}" y="{float(y) + 4:g}" text-anchor="end">{tick:,g}</text>')
    steps = min(3, len(rows) - 1)
    named = {round(n * (len(rows) - 1) / max(1, steps)) for n in range(steps + 1)}
    for n, (name, value, ink) in enumerate(rows):
        tall = value / high * (bottom - top)
        x = left + n * wide
        parts.append(
            f'<rect x="{_n(x + 0.1 * wide)}" y="{_n(bottom - tall)}" width="{_n(0.8 * wide)}" height="{_n(tall)}" '
            f'fill="{ink}"><title>{escape(name)}: {value:,g}</title></rect>'
        )
        if n in named:
            middle = min(max(x + wide / 2, left + 28), right - 28)
            parts.append(f'<text {TICK} x="{_n(middle)}" y="{bottom + 16}" text-anchor="middle">{escape(name)}</text>')
    return _svg(parts, bottom + 22, label)


def scatter(dots: Sequence[Dot], label: str, name: str) -> Markup:
    """Draw a map: shapes, shaded, each with its name as a title. `name` is the chart's id."""
    side, edge = 640, 14
    low, high = min((d.y for d in dots), default=0.0), max((d.y for d in dots), default=1.0)
    tall = max(240.0, (high - low) * (side - 2 * edge) + 2 * edge)
    parts = []
    for n, dot in enumerate(dots):
        x = edge + dot.x * (side - 2 * edge)
        y = tall / 2 - (dot.y - (low + high) / 2) * (side - 2 * edge)
        shape = OTHER_SHAPE if dot.shape is None else SHAPES[dot.shape]
        parts.append(
            f'<path class="point" data-n="{n}" transform="translate({x:.1f} {y:.1f})" d="{shape}" '
            f'fill="{shade(dot.shade)}"><title>{escape(dot.name)}</title></path>'
        )
    head = (
        f'<svg id="{escape(name)}" class="map" viewBox="0 0 {side} {tall:.0f}" role="img" aria-label="{escape(label)}">'
    )
    return Markup(head + '<g stroke="#fff" stroke-width=".7">' + "".join(parts) + "</g></svg>")


def cut(text: str, room: float) -> str:
    """Return text of ticks' size cut to `room`, in units of a chart; wide characters (CJK, emoji) take two places."""
    places = [2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text]
    most = int(room / CHARACTER)
    if sum(places) <= most:
        return text
    kept = sum(1 for upto in itertools.accumulate(places) if upto < most)
    return text[:kept] + "…"


def shade(step: int) -> str:
    """Return the colour of a step of the scale, from 0 (light) to `SHADES` − 1 (dark)."""
    place = min(max(step, 0), SHADES - 1) / (SHADES - 1) * (len(SCALE) - 1)
    n = min(int(place), len(SCALE) - 2)
    a, b = (tuple(int(c[k : k + 2], 16) for k in (1, 3, 5)) for c in SCALE[n : n + 2])
    mixed = (round(x + (y - x) * (place - n)) for x, y in zip(a, b, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def shape_key(place: int | None) -> Markup:
    """Draw the key of a shape of the map."""
    shape = OTHER_SHAPE if place is None else SHAPES[place]
    return Markup(
        f'<svg class="shape" viewBox="-7 -7 14 14" aria-hidden="true"><path fill="{SOFT}" d="{shape}"/></svg>'
    )


def swatch(position: int) -> Markup:
    """Draw the key of the line at a position."""
    dashes = f' stroke-dasharray="{dash(position)}"' if dash(position) else ""
    return Markup(
        f'<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true">'
        f'<path fill="none" stroke="{colour(position)}" stroke-width="3"{dashes} d="M1 5H25"/></svg>'
    )


def _padded(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.06 or max(abs(high) * 0.05, 1e-3)
    return low - room, high + room


def _n(value: float) -> str:
    return f"{value:.2f}"


def _svg(parts: Sequence[str], height: int, label: str, width: int = WIDTH, kind: str = "chart") -> Markup:
    # Looks are attributes, not classes, so that every viewer and converter of HTML shows them.
    head = f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    group = '<g fill="none" stroke-width="2" font-family="system-ui, sans-serif">'
    return Markup(head + group + "".join(parts) + "</g></svg>")
