"""A diagram as an SVG picture, drawn by ourselves: nothing else needs to be installed, and text never meets a line.

It knows letters and lines; where boxes go is decided in `layers`. What flows is a box there too, one of text alone, so
that an arrow leads through its text and nothing is written over anything.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from ensemble.diagram import Arrow, Box, Diagram
from ensemble.layers import Placed, Point, Size, place

__all__ = ["svg"]

_TITLE, _TEXT = 13.0, 11.0  # sizes of letters
_ADVANCE = 0.61  # how wide a letter of a monospaced font is, of its size
_PAD = 12.0
_MARGIN = 20.0
_INSIDE = 14.0  # around what is in a box

_STYLE = """\
svg { color-scheme: light dark; --paper: #ffffff; --ink: #1c2330; --soft: #5b6676; --line: #8a94a3;
  --ends: #e6f4ea; --ends-edge: #2b8a3e; --far: #fdeee2; --far-edge: #c2571a; --own: #e7f0fd; --own-edge: #3b7dd8;
  --decides: #f2eafc; --decides-edge: #9457d6; }
@media (prefers-color-scheme: dark) { svg { --paper: #14181f; --ink: #e8ecf2; --soft: #a3adbb; --line: #76808f;
  --ends: #16301e; --ends-edge: #57b26b; --far: #3a2414; --far-edge: #e08a4f; --own: #16283f; --own-edge: #6ba3ee;
  --decides: #2b1f3d; --decides-edge: #b48be6; } }
.paper { fill: var(--paper); }
text { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 11px; fill: var(--soft); }
.title { font-size: 13px; font-weight: 700; fill: var(--ink); }
.role { font-style: italic; }
.box { stroke-width: 1.5; }
.ends { fill: var(--ends); stroke: var(--ends-edge); } .far { fill: var(--far); stroke: var(--far-edge); }
.own { fill: var(--own); stroke: var(--own-edge); } .decides { fill: var(--decides); stroke: var(--decides-edge); }
.around { fill: none; }
.maybe { stroke-dasharray: 6 4; }
.way { fill: none; stroke: var(--line); stroke-width: 1.3; }
.head { fill: var(--line); }"""


def svg(diagram: Diagram, title: str) -> str:
    """The text of a file: self-contained, light or dark as the reader's screen is.

    Args:
        diagram: what there is to draw.
        title: what is read out in its place.
    """
    drawn = _Drawn(diagram)
    width, height = drawn.size.width + 2 * _MARGIN, drawn.size.height + 2 * _MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(width)} {_n(height)}" width="{_n(width)}" '
            f'height="{_n(height)}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{_STYLE}\n</style>",
            f'<rect class="paper" width="{_n(width)}" height="{_n(height)}"/>',
            *drawn.lines((_MARGIN, _MARGIN)),
            "</svg>",
            "",
        ]
    )


class _Line(NamedTuple):
    """A line of text in a box."""

    text: str
    css: str = ""

    @property
    def size(self) -> Size:
        letters = _TITLE if self.css == "title" else _TEXT
        return Size(_cells(self.text) * letters * _ADVANCE, letters * 1.4)


def _cells(text: str) -> int:
    """How many letters wide a text is: those of East Asia count twice."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _text_size(lines: Sequence[_Line]) -> Size:
    return Size(max((line.size.width for line in lines), default=0.0), sum(line.size.height for line in lines))


class _Item:
    """A box, with its text and what it owns."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.inside = None if box.inside is None else _Drawn(box.inside)
        head = [_Line(box.role, "role")] if box.role else []
        kind = "" if box.kind in ("input", "output") else box.kind
        if box.kind == "input" and box.optional:
            kind = "optional"
        self.text = [*head, _Line(box.title, "title"), *[_Line(text) for text in (kind, *box.lines) if text]]
        self.size = self._measured()

    def _measured(self) -> Size:
        text = _text_size(self.text)
        if self.inside is None:
            return Size(text.width + 2 * _PAD, text.height + _PAD)
        inner = self.inside.size
        return Size(max(text.width, inner.width) + 2 * _INSIDE, text.height + inner.height + 2 * _INSIDE + _PAD / 2)

    def lines(self, centre: Point) -> Iterator[str]:
        x, y = centre[0] - self.size.width / 2, centre[1] - self.size.height / 2
        yield self._frame(x, y)
        yield from _text(self.text, centre[0], y + _PAD / 2)
        if self.inside is not None:
            below = y + _PAD / 2 + _text_size(self.text).height + _INSIDE
            yield from self.inside.lines((centre[0] - self.inside.size.width / 2, below))

    def _frame(self, x: float, y: float) -> str:
        kind = self.box.kind
        css = ["box", "around"[: 6 * (self.inside is not None)], _class(kind), "maybe" if self.box.optional else ""]
        radius = self.size.height / 2 if kind in ("input", "output") else 8.0 if self.inside else 5.0
        return (
            f'<rect class="{" ".join(filter(None, css))}" x="{_n(x)}" y="{_n(y)}" width="{_n(self.size.width)}" '
            f'height="{_n(self.size.height)}" rx="{_n(radius)}"/>'
        )


class _Flow:
    """What flows, as text that arrows lead through; several may lead from it."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.text = [_Line(line) for line in lines]
        text = _text_size(self.text)
        self.size = Size(text.width + 8.0, text.height + 4.0)

    def lines(self, centre: Point) -> Iterator[str]:
        yield from _text(self.text, centre[0], centre[1] - self.size.height / 2 + 2.0)


class _Drawn:
    """A diagram that is placed."""

    def __init__(self, diagram: Diagram) -> None:
        self._items: list[_Item | _Flow] = [_Item(box) for box in diagram.boxes]
        self._into: dict[tuple[int, int], bool] = {}  # whether what flows may be missing
        number = {box.key: index for index, box in enumerate(diagram.boxes)}
        flows: dict[tuple[str, str, str], int] = {}
        for arrow in diagram.arrows:
            self._add(arrow, number, flows)
        self._placed: Placed = place([item.size for item in self._items], self._into)
        self.size = self._placed.size

    def _add(self, arrow: Arrow, number: dict[str, int], flows: dict[tuple[str, str, str], int]) -> None:
        key = (arrow.source, arrow.label, arrow.operations)
        if key not in flows:
            flows[key] = len(self._items)
            self._items.append(_Flow([text for text in (arrow.label, arrow.operations) if text]))
            self._into[number[arrow.source], flows[key]] = True
        self._into[number[arrow.source], flows[key]] &= arrow.optional
        self._into[flows[key], number[arrow.target]] = arrow.optional

    def lines(self, corner: Point) -> Iterator[str]:
        left, top = corner
        for ends, optional in self._into.items():
            way = [(left + x, top + y) for x, y in self._placed.ways[ends]]
            yield from _way(way, optional=optional, head=isinstance(self._items[ends[1]], _Item))
        for item, (x, y) in zip(self._items, self._placed.centres, strict=True):
            yield from item.lines((left + x, top + y))


def _way(points: Sequence[Point], *, optional: bool, head: bool) -> Iterator[str]:
    """Straight past the boxes, bent where there are none."""
    end = points[-1]
    stop = (end[0], end[1] - 6.0) if head else end
    path = [f"M{_n(points[0][0])} {_n(points[0][1])}"]
    last = (points[-2][0], min(points[-2][1], stop[1]))
    for (x0, y0), (x1, y1) in zip([*points[:-2], last], [*points[1:-2], last, stop], strict=True):
        middle = (y0 + y1) / 2
        if abs(x0 - x1) < 0.05:
            path.append(f"V{_n(y1)}")
        else:
            path.append(f"C{_n(x0)} {_n(middle)} {_n(x1)} {_n(middle)} {_n(x1)} {_n(y1)}")
    yield f'<path class="way{" maybe" * optional}" d="{"".join(path)}"/>'
    if head:
        x, y = end
        yield f'<path class="head" d="M{_n(x)} {_n(y)}L{_n(x - 4)} {_n(y - 8)}L{_n(x + 4)} {_n(y - 8)}Z"/>'


def _text(lines: Sequence[_Line], x: float, top: float) -> Iterator[str]:
    for line in lines:
        base = top + 0.75 * line.size.height
        css = f' class="{line.css}"' if line.css else ""
        yield f'<text{css} x="{_n(x)}" y="{_n(base)}" text-anchor="middle">{escape(_shown(line.text))}</text>'
        top += line.size.height


def _shown(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)


def _class(kind: str) -> str:
    if kind in ("input", "output"):
        return "ends"
    if kind == "remote":
        return "far"
    return "decides" if kind in ("combine", "switch", "split", "cascade", "fallback", "map") else "own"


def _n(number: float) -> str:
    """A number as short as it can be."""
    return f"{number:.1f}".removesuffix(".0")
