"""Charts as inline SVG. The page's style sheet sets colours and fonts for the classes that are used here.

Values that are not finite, or not positive on a logarithmic axis, become gaps. All text is escaped: a chart is Markup.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from markupsafe import Markup

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 14, 12, 46
_MAX_POINTS = 600
# Values beyond these only show that the run diverged, and would overflow the arithmetic of an axis.
_LARGEST, _SMALLEST = 1e30, 1e-30


class Series(NamedTuple):
    """One line: a name for the legend, and its points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


class Mark(NamedTuple):
    """A place on an axis that gets a line, and its text."""

    value: float
    text: str


def line_chart(
    title: str,
    y_label: str,
    lines: Sequence[Series],
    *,
    log: bool = False,
    y_range: tuple[float, float] | None = None,
    levels: Sequence[Mark] = (),
    events: Sequence[Mark] = (),
) -> Markup:
    """Draw lines over images seen, at most 600 points each (means of neighbours), with the last values in the legend.

    Args:
        title: the title of the chart; also its text for screen readers.
        y_label: the label of the vertical axis.
        lines: the lines; there are styles for only two.
        log: whether the vertical axis is logarithmic.
        y_range: the range that the vertical axis must include.
        levels: horizontal lines.
        events: vertical lines.
    """
    drawn = [Series(line.name, *_thinned(line.x, [_usable(value, log) for value in line.y])) for line in lines]
    values = [value for line in drawn for value in line.y if not math.isnan(value)]
    places = [place for line in drawn for place in line.x]
    if not values:
        return _figure(title, "", '<p class="none">No values yet.</p>')
    y_ticks = _log_ticks(min(values), max(values)) if log else _ticks(*_widened([*values, *(y_range or ())]))
    x_ticks = _ticks(*_widened(places)) if min(places) < max(places) else [places[0]]

    def at_y(value: float) -> float:
        low, high, value = (math.log10(v) if log else v for v in (y_ticks[0], y_ticks[-1], value))
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def at_x(place: float) -> float:
        low, high = min(places), max(places)
        share = (place - low) / (high - low) if low < high else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    parts = []
    for tick in y_ticks:
        y = f"{at_y(tick):.1f}"
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 6}" y="{y}">{_short(tick)}</text>')
    parts += [
        f'<text class="x" x="{at_x(tick):.1f}" y="{_HEIGHT - 28}">{_short(tick)}</text>'
        for tick in x_ticks
        if min(places) <= tick <= max(places)
    ]
    parts += [
        f'<path class="level" d="M{_LEFT} {at_y(level.value):.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text class="level" x="{_WIDTH - _RIGHT - 4}" y="{at_y(level.value) + 15:.1f}">{escape(level.text)}</text>'
        for level in levels
        if y_ticks[0] <= level.value <= y_ticks[-1]
    ]
    parts += [
        f'<path class="event" d="M{at_x(event.value):.1f} {_TOP}V{_HEIGHT - _BOTTOM}">'
        f"<title>{escape(event.text)}</title></path>"
        for event in events
        if min(places) <= event.value <= max(places)
    ]
    parts += [_path(line, index, at_x, at_y) for index, line in enumerate(drawn)]
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<text class="label" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}">images seen</text>')
    parts.append(f'<text class="label" transform="translate(14 {middle}) rotate(-90)">{escape(y_label)}</text>')
    legend = "".join(
        f'<span><i class="s{index % 2}"></i>{escape(line.name)} <b>{_short(_last(line.y), digits=4)}</b></span>'
        for index, line in enumerate(lines)
    )
    return _figure(title, legend, _svg(title, parts))


def bar_chart(
    title: str, y_label: str, bars: Sequence[tuple[str, float]], levels: Sequence[float] = (), of_levels: str = ""
) -> Markup:
    """Draw a bar from 0 for each name. A name is written if there is room for it, and always shown on hovering.

    Args:
        title: the title of the chart; also its text for screen readers.
        y_label: the label of the vertical axis.
        bars: the names and the values.
        levels: a value for each bar to compare it with, which is drawn as a line across it.
        of_levels: what the levels are, for the legend.
    """
    bars = [(name, value if math.isfinite(value) and 0 <= value < _LARGEST else 0.0) for name, value in bars]
    if not bars:
        return _figure(title, "", '<p class="none">No values yet.</p>')
    ticks = _ticks(*_widened([0.0, *(value for _, value in bars), *levels]))
    ticks = [tick for tick in ticks if tick >= 0]
    room = (_WIDTH - _LEFT - _RIGHT) / len(bars)
    floor = _HEIGHT - _BOTTOM
    parts = []
    for tick in ticks:
        y = f"{floor - tick / ticks[-1] * (floor - _TOP):.1f}"
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 6}" y="{y}">{_short(tick)}</text>')
    for index, (name, value) in enumerate(bars):
        height = value / ticks[-1] * (floor - _TOP)
        x = _LEFT + index * room
        parts.append(
            f'<rect class="bar" x="{x + room * 0.1:.2f}" y="{floor - height:.1f}" width="{room * 0.8:.2f}" '
            f'height="{height:.1f}"><title>{escape(name)}: {_short(value, digits=4)}</title></rect>'
        )
        if levels:
            level = floor - levels[index] / ticks[-1] * (floor - _TOP)
            parts.append(
                f'<path class="line s1" d="M{x + room * 0.05:.2f} {level:.1f}h{room * 0.9:.2f}">'
                f"<title>{escape(name)}, {escape(of_levels)}: {_short(levels[index], digits=4)}</title></path>"
            )
        if len(bars) <= 20:
            short = name if len(name) * 7.5 <= room else name[: max(int(room / 7.5) - 1, 1)] + "…"
            parts.append(f'<text class="x" x="{x + room / 2:.1f}" y="{_HEIGHT - 28}">{escape(short)}</text>')
    middle = (_TOP + floor) / 2
    parts.append(f'<text class="label" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}">class</text>')
    parts.append(f'<text class="label" transform="translate(14 {middle}) rotate(-90)">{escape(y_label)}</text>')
    legend = f'<span><i class="s1"></i>{escape(of_levels)}</span>' if levels else ""
    return _figure(title, legend, _svg(title, parts))


def _figure(title: str, legend: str, body: str) -> Markup:
    caption = f'<figcaption>{escape(title)}<span class="legend">{legend}</span></figcaption>'
    return Markup(f'<figure class="chart">{caption}{body}</figure>')


def _svg(title: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
    return f"{head}{''.join(parts)}</svg>"


def _path(line: Series, index: int, at_x: Callable[[float], float], at_y: Callable[[float], float]) -> str:
    """Draw the stretches between gaps as lines, and a single value between gaps as a dot."""
    stretches: list[list[str]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if math.isnan(y):
            stretches.append([])
        else:
            stretches[-1].append(f"{at_x(x):.1f} {at_y(y):.1f}")
    # A line of zero length with round ends is a dot.
    d = "".join(f"M{'L'.join(stretch if len(stretch) > 1 else stretch * 2)}" for stretch in stretches if stretch)
    dots = " dots" if len(line.x) <= 30 else ""
    return f'<path class="line s{index % 2}{dots}" d="{d}"/>'


def _usable(value: float, log: bool) -> float:
    lowest = _SMALLEST if log else -_LARGEST
    return value if lowest <= value <= _LARGEST else math.nan


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Replace neighbours by their means, without gaps, so that at most 600 points remain."""
    size = max(-(-len(x) // _MAX_POINTS), 1)
    groups = [slice(start, start + size) for start in range(0, len(x), size)]
    return [_mean(x[group]) for group in groups], [
        _mean([v for v in y[group] if not math.isnan(v)]) for group in groups
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _last(values: Sequence[float]) -> float:
    return values[-1] if values else math.nan


def _widened(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and the highest value; widen the range if they are nearly equal."""
    low, high = min(values), max(values)
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return low, high
    margin = abs(low) / 2 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Return 4 to 8 round numbers, of which the first is at most `low` and the last at least `high`."""
    exponent = math.floor(math.log10((high - low) / 4))
    step = max(s for s in (1, 2, 2.5, 5, 10) if s * 10.0**exponent <= (high - low) / 4 * 1.0001) * 10.0**exponent
    return [n * step for n in range(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return at most 9 powers of ten that enclose both values."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    step = -(-(last - first) // 8)
    return [10.0**n for n in range(first, last + step, step)]


def _short(value: float, digits: int = 3) -> str:
    """Format a number in few characters: 0.25, 60k, 1.2M, 3e-05."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1000 * size:
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:.{digits}g}"
