"""Line charts as inline SVG. The page's style sheet gives the colours, in light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 360, 224
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 10, 24, 34
_NAMES = 72
"""Width in pixels reserved for the names at the ends of lines."""

COLOURS = 6
"""Number of line colours in the page's style sheet."""

SMOOTHED = 40
"""A series with more points than this is drawn faintly, below its moving average."""


def line_chart(
    series: Sequence[tuple[str, Points]],
    *,
    title: str,
    x_label: str = "step",
    y_label: str = "loss",
    colours: Sequence[int] | None = None,
    guides: Sequence[float] = (),
    bounds: Sequence[float] = (),
    linear: bool = False,
) -> Markup:
    """A chart of named series of (x, y) points.

    Args:
        colours: the number of each series' colour (CSS classes ``s0``, ``s1``, ...); 0, 1, ...
            unless given.
        guides: y values of dashed lines. The y axis includes them.
        bounds: further y values that the axis includes.
        linear: never use a logarithmic y axis, which is otherwise used, and said so, where the
            values span a factor of 8 or more.
    """
    points = [point for _, line in series for point in line]
    xs = [x for x, _ in points]
    x_low, x_high = min(0.0, min(xs)), max(max(xs), 1.0)
    ys = [*(y for _, y in points), *guides, *bounds]
    low, high = min(ys), max(ys)
    logarithmic = not linear and low > 0 and high >= 8 * low
    y_ticks = log_ticks(low, high) if logarithmic else ticks(min(0.0, low), high)
    scale = math.log if logarithmic else float
    x_ticks = [t for t in ticks(x_low, x_high, 4) if x_low <= t <= x_high]
    y_low, y_high = scale(y_ticks[0]), scale(y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        right = _LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)
        down = _TOP + (y_high - scale(y)) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM)
        return round(right, 1), round(down, 1)

    parts: list[str] = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(_across("grid", y))
        parts.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>'
        )
    parts += [_across("guide", place(x_low, guide)[1]) for guide in guides]
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        label = f'<text class="tick" x="{x}" y="{HEIGHT - _BOTTOM + 15}" text-anchor="middle">'
        parts.append(f"{label}{tick:g}</text>")
    axis = f'<text class="tick" x="{WIDTH - _RIGHT}" y="{HEIGHT - 4}" text-anchor="end">'
    parts.append(f"{axis}{escape(x_label)}</text>")
    what = f"{y_label}, logarithmic" if logarithmic else y_label
    parts.append(f'<text class="tick" x="{_LEFT}" y="12">{escape(what)}</text>')
    for index, (_, line) in zip(colours or range(len(series)), series, strict=True):
        many = len(line) > SMOOTHED
        parts.append(_path([place(*p) for p in line], f"s{index}{' faint' if many else ''}"))
        if many:
            parts.append(_path([place(*p) for p in smooth(line)], f"s{index}"))
    parts.insert(0, f"<title>{escape(title)}</title>")
    return _svg(title, parts)


def layer_chart(
    lines: Sequence[tuple[str, str, Sequence[float]]],
    layers: Sequence[int],
    *,
    top: float,
    title: str,
) -> Markup:
    """Shares by layer. Each line carries its name at its end, so the chart needs no legend.

    Args:
        lines: for each line, the kind of token (which gives the colour), its name, and a share for
            each layer.
        top: the largest share on this chart and on those beside it, which share a scale.
    """
    y_ticks = ticks(0.0, 100 * top, 4)
    low, high = layers[0], max(layers[-1], layers[0] + 1)
    right, bottom = WIDTH - _NAMES, HEIGHT - _BOTTOM

    def place(layer: float, percent: float) -> tuple[float, float]:
        x = _LEFT + (layer - low) / (high - low) * (right - _LEFT)
        return round(x, 1), round(bottom - percent / y_ticks[-1] * (bottom - _TOP), 1)

    parts = [f'<text class="tick" x="{_LEFT}" y="12">percent</text>']
    for tick in y_ticks:
        y = place(low, tick)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        label = f'<text class="tick" x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">'
        parts.append(f"{label}{tick:g}</text>")
    for tick in ticks(low, high, 4):
        if tick in layers:
            x = place(tick, 0)[0]
            label = f'<text class="tick" x="{x}" y="{bottom + 15}" text-anchor="middle">'
            parts.append(f"{label}{tick:g}</text>")
    middle = (_LEFT + right) / 2
    parts.append(
        f'<text class="tick" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">layer</text>'
    )
    drawn = [
        [place(x, 100 * y) for x, y in zip(layers, shares, strict=True)] for _, _, shares in lines
    ]
    ends = _apart([line[-1][1] for line in drawn], _TOP, bottom)
    for (kind, name, shares), line, y in zip(lines, drawn, ends, strict=True):
        label = f'<text class="end" x="{line[-1][0] + 7}" y="{y + 4}">'
        words = f"{label}{escape(name)} {100 * shares[-1]:.0f}</text>"
        parts.append(f'<g class="of-{kind}">{_path(line, "kind")}{words}</g>')
    texts = "; ".join(
        f"{name} {', '.join(f'{100 * share:.0f}%' for share in shares)}"
        for _, name, shares in lines
    )
    return _svg(f"{title}, from layer {layers[0]} to {layers[-1]}: {texts}", parts)


def _apart(places: Sequence[float], low: float, high: float, gap: float = 13.0) -> list[float]:
    """Moves ``places`` so that they lie ``gap`` apart, within ``low`` and ``high`` if there is
    room."""
    order = sorted(range(len(places)), key=lambda at: places[at])
    found = [0.0] * len(places)
    # Pushed down from the top first, then back up from the bottom where they ran over it.
    last = low - gap
    for at in order:
        found[at] = last = max(places[at], last + gap)
    last = high + gap
    for at in reversed(order):
        found[at] = last = min(found[at], last - gap)
    return [round(place, 1) for place in found]


def smooth(line: Points, share: float = 0.05) -> list[tuple[float, float]]:
    """Centred moving average over ``share`` of the points."""
    half = max(1, round(len(line) * share / 2))
    averaged: list[tuple[float, float]] = []
    for index, (x, _) in enumerate(line):
        window = [y for _, y in line[max(0, index - half) : index + half + 1]]
        averaged.append((x, sum(window) / len(window)))
    return averaged


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """About ``about`` round numbers that cover the range from ``low`` to ``high``."""
    if high <= low:
        high = low + 1
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    # Rounding must not skip a step that is exactly as large as needed.
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    # Rounding must not add a tick beyond an end that is a tick itself.
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that cover the range from ``low`` to ``high`` (both above 0),
    or the powers of ten alone where the range is wide."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    every = [m * 10.0**power for power in range(first, last + 1) for m in factors]
    start = max(index for index, tick in enumerate(every) if tick <= low * (1 + 1e-9))
    stop = min(index for index, tick in enumerate(every) if tick >= high * (1 - 1e-9))
    return [float(f"{tick:.6g}") for tick in every[start : stop + 1]]


def _svg(label: str, parts: Sequence[str]) -> Markup:
    """A chart of these elements, described by ``label`` to a screen reader."""
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _across(css: str, y: float) -> str:
    """A horizontal line over the whole width of a line chart."""
    return f'<line class="{css}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'


def _path(places: Sequence[tuple[float, float]], css: str) -> str:
    if len(places) == 1:
        x, y = places[0]
        return f'<circle class="{css}" cx="{x}" cy="{y}" r="2.5"/>'
    text = " ".join(f"{'M' if i == 0 else 'L'}{x} {y}" for i, (x, y) in enumerate(places))
    return f'<path class="{css}" d="{text}"/>'
