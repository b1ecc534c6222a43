"""Small charts as SVG, made here so that pages need neither a library nor a script.

A chart is an image with a title and a sentence for who cannot see it; what it shows stands in a table beside it.
Colours come from the page's style sheet by class.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 640, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 10, 26  # margins, with room for the labels of the axes

_BAR = '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'


def bars(name: str, title: str, values: Sequence[tuple[str, int]]) -> Markup:
    """Return a bar for each value; the first, the last and the largest are labelled.

    Args:
        name: of the chart on its page, a plain word.
        title: what it shows.
        values: label and number of each bar, from left to right.
    """
    if not values:
        return Markup("")
    most = max(1, *(value for _, value in values))
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    step = width / len(values)
    shapes = [_grid(most, f"{most}"), _label(_LEFT, values[0][0], "start")]
    if len(values) > 1:
        shapes.append(_label(_WIDTH - _RIGHT, values[-1][0], "end"))
    for place, (label, value) in enumerate(values):
        tall = height * value / most
        x, y = _LEFT + place * step + 0.1 * step, _TOP + height - tall
        shapes.append(Markup(_BAR).format(x, y, 0.8 * step, tall, f"{label}: {value}"))
    busiest = max(values, key=lambda one: one[1])
    said = f"{len(values)} bars, {sum(value for _, value in values)} in all; most on {busiest[0]}: {busiest[1]}."
    return _svg(name, title, said, shapes)


def line(name: str, title: str, points: Sequence[tuple[float, float]], *, until: float) -> Markup:
    """Return a line through points from 0 on; nothing for fewer than two.

    Args:
        name: of the chart on its page, a plain word.
        title: what it shows.
        points: x and y, by x; y not negative.
        until: where the x axis ends.
    """
    if len(points) < 2:
        return Markup("")
    across = max(until, points[-1][0], 1)
    most = max(*(y for _, y in points), 1e-9)
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    places = [(_LEFT + width * x / across, _TOP + height * (1 - y / most)) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    x, y = places[-1]
    shapes = [
        _grid(most, f"{most:.3g}"),
        _label(_LEFT, "0", "start"),
        _label(_WIDTH - _RIGHT, f"{across:g}", "end"),
        Markup('<polyline class="line" points="{}"/>').format(path),
        Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="4"/>').format(x, y),
    ]
    said = f"From {points[0][1]:.3g} at {points[0][0]:g} to {points[-1][1]:.3g} at {points[-1][0]:g}."
    return _svg(name, title, said, shapes)


def _grid(most: float, label: str) -> Markup:
    base = _HEIGHT - _BOTTOM
    return Markup(
        '<line class="axis" x1="{left}" y1="{base}" x2="{right}" y2="{base}"/>'
        '<line class="grid" x1="{left}" y1="{top}" x2="{right}" y2="{top}"/>'
        '<text class="tick" x="{at}" y="{below}" text-anchor="end">{label}</text>'
        '<text class="tick" x="{at}" y="{base}" text-anchor="end">0</text>'
    ).format(left=_LEFT, right=_WIDTH - _RIGHT, base=base, top=_TOP, at=_LEFT - 6, below=_TOP + 10, label=label)


def _label(x: float, text: str, anchor: str) -> Markup:
    shape = '<text class="tick" x="{:.0f}" y="{}" text-anchor="{}">{}</text>'
    return Markup(shape).format(x, _HEIGHT - 6, anchor, text)


def _svg(name: str, title: str, said: str, shapes: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-title {name}-said">'
        '<title id="{name}-title">{title}</title><desc id="{name}-said">{said}</desc>{shapes}</svg>'
    ).format(width=_WIDTH, height=_HEIGHT, name=escape(name), title=title, said=said, shapes=Markup("").join(shapes))
