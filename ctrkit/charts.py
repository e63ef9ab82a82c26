"""Small charts as inline SVG: the same numbers give the same bytes, and text from the data is escaped."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 460
"""Width of a chart in its own units; on a page it scales with its column."""
COLOURS = (
    "#0b6e99",
    "#d1495b",
    "#3c7a3f",
    "#8a5fbf",
    "#c77d0a",
    "#4a4e57",
    "#00927c",
    "#a23e8c",
    "#7a6a2f",
    "#2d4fa8",
)
INK, SOFT, RULE = "#1c2430", "#5d6878", "#dfe4ea"
TICK = f'fill="{SOFT}" font-size="11"'
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


def lines(rows: Sequence[Line | None], x_label: str, label: str) -> Markup:
    """Draw one line a row; colours go by position, so None keeps the place of a row without points."""
    points = [p for row in rows if row is not None for p in row.points]
    if not points:
        return Markup("")
    left, right, top, bottom = 52, WIDTH - 26, 10, 230
    low, high = _padded(min(y for _, y in points), max(y for _, y in points))
    first, last = min(0.0, min(x for x, _ in points)), max(x for x, _ in points)
    last = last if last > first else first + 1.0

    def at(x: float, y: float) -> tuple[str, str]:
        across = left + (x - first) / (last - first) * (right - left)
        return _n(across), _n(bottom - (y - low) / (high - low) * (bottom - top))

    parts = []
    for tick in ticks(low, high):
        y = at(first, tick)[1]
        parts.append(f'<line stroke="{RULE}" stroke-width="1" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text {TICK} x="{left - 6}" y="{float(y) + 4:g}" text-anchor="end">{tick:g}</text>')
    for tick in ticks(first, last, 4):
        x = at(tick, low)[0]
        parts.append(f'<text {TICK} x="{x}" y="{bottom + 16}" text-anchor="middle">{tick:,.6g}</text>')
    middle = (left + right) // 2
    parts.append(f'<text {TICK} x="{middle}" y="{bottom + 34}" text-anchor="middle">{escape(x_label)}</text>')
    for position, row in enumerate(rows):
        if row is None:
            continue
        ink, placed = colour(position), [at(x, y) for x, y in row.points]
        path = "M" + "L".join(f"{x} {y}" for x, y in placed)
        dashes = f' stroke-dasharray="{dash(position)}"' if dash(position) else ""
        parts.append(f'<path stroke="{ink}"{dashes} d="{path}"><title>{escape(row.name)}</title></path>')
        if len(placed) <= 40:
            parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{ink}"/>' for x, y in placed]
    return _svg(parts, bottom + 40, label)


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


def _svg(parts: Sequence[str], height: int, label: str) -> Markup:
    # Looks are attributes, not classes, so that every viewer and converter of HTML shows them.
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    group = '<g fill="none" stroke-width="2" font-family="system-ui, sans-serif">'
    return Markup(head + group + "".join(parts) + "</g></svg>")
