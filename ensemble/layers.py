"""Where boxes go that arrows lead between: in layers from top to bottom, with few crossings and straight lines.

It knows sizes and who is before whom, and nothing of what is in the boxes.  Source: Sugiyama, Tagawa and Toda, 1981.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

__all__ = ["Placed", "Point", "Size", "place"]

Point: TypeAlias = "tuple[float, float]"

_SWEEPS = 12
_GAP_X, _GAP_Y = 28.0, 30.0
_LANE = 12.0  # between an arrow that passes and what it passes


class Size(NamedTuple):
    """Of a box."""

    width: float
    height: float


class Placed(NamedTuple):
    """Where everything is.

    Args:
        size: of the whole.
        centres: of each box.
        ways: of each arrow, points from the bottom of one box to the top of the other: at each pair of points the way
            is straight up and down, between the pairs it crosses a gap in which there is no box.
    """

    size: Size
    centres: Sequence[Point]
    ways: Mapping[tuple[int, int], Sequence[Point]]


def place(sizes: Sequence[Size], arrows: Iterable[tuple[int, int]]) -> Placed:
    """Place boxes, which are numbered from 0; `arrows` lead from one to another, and have no cycle.

    Boxes never overlap, and no arrow passes through one. Costs a few sweeps over all arrows.
    """
    arrows = [*dict.fromkeys(arrows)]
    if not sizes:
        return Placed(Size(0.0, 0.0), [], {})
    net = _Net(sizes, arrows)
    net.order()
    net.spread()
    return net.placed()


class _Net:
    """Boxes, and dots where an arrow passes a layer; every link leads to the next layer."""

    def __init__(self, sizes: Sequence[Size], arrows: Sequence[tuple[int, int]]) -> None:
        self.sizes = [*sizes]
        self.boxes = len(sizes)
        ranks = _ranks(len(sizes), arrows)
        self.layers: list[list[int]] = [[] for _ in range(max(ranks) + 1)]
        for box in _by_reach(len(sizes), arrows):
            self.layers[ranks[box]].append(box)
        self.above: list[list[int]] = [[] for _ in sizes]
        self.below: list[list[int]] = [[] for _ in sizes]
        self.chains = {(source, target): self._link(source, target, ranks) for source, target in arrows}
        self.x: list[float] = []

    def _link(self, source: int, target: int, ranks: Sequence[int]) -> list[int]:
        chain = [source]
        chain += [self._dot(layer) for layer in range(ranks[source] + 1, ranks[target])]
        chain.append(target)
        for upper, lower in pairwise(chain):
            self.below[upper].append(lower)
            self.above[lower].append(upper)
        return chain

    def _dot(self, layer: int) -> int:
        self.sizes.append(Size(0.0, 0.0))
        self.above.append([])
        self.below.append([])
        self.layers[layer].append(len(self.sizes) - 1)
        return len(self.sizes) - 1

    # ----------------------------------------------------------------------- order

    def order(self) -> None:
        """Sort each layer by where the neighbours are, down and up in turn, and keep the order with least crossings."""
        best, least = [*map(list, self.layers)], self._crossings()
        for sweep in range(_SWEEPS if least else 0):
            self._sort(self.above if sweep % 2 == 0 else self.below, down=sweep % 2 == 0)
            found = self._crossings()
            if found < least:
                best, least = [*map(list, self.layers)], found
        self.layers = best

    def _sort(self, neighbours: Sequence[Sequence[int]], *, down: bool) -> None:
        place = self._places()
        for layer in self.layers if down else self.layers[::-1]:
            at = {
                one: sum(place[other] for other in neighbours[one]) / len(neighbours[one])
                if neighbours[one]
                else place[one]
                for one in layer
            }
            layer.sort(key=lambda one: at[one])
            place.update({one: _share(index, layer) for index, one in enumerate(layer)})

    def _places(self) -> dict[int, float]:
        return {one: _share(index, layer) for layer in self.layers for index, one in enumerate(layer)}

    def _crossings(self) -> int:
        found = 0
        for upper, lower in pairwise(self.layers):
            place = {one: index for index, one in enumerate(lower)}
            ends = [target for one in upper for target in sorted(place[other] for other in self.below[one])]
            found += _inversions(ends)
        return found

    # ----------------------------------------------------------------------- left and right

    def spread(self) -> None:
        """Move everything to the mean of its neighbours, as far as the order and the gaps of its layer allow."""
        self.x = [0.0] * len(self.sizes)
        for layer in self.layers:
            self._settle(layer, [0.0] * len(layer))
        for sweep in range(2 * _SWEEPS):
            down = sweep % 2 == 0
            neighbours = self.above if down else self.below
            for layer in self.layers if down else self.layers[::-1]:
                self._settle(layer, [self._wish(one, neighbours[one]) for one in layer])
        for layer in self.layers:
            self._settle(layer, [self._wish(one, [*self.above[one], *self.below[one]]) for one in layer])

    def _wish(self, one: int, neighbours: Sequence[int]) -> float:
        pulls = [8.0 if one >= self.boxes and other >= self.boxes else 1.0 for other in neighbours]
        at = sum(pull * self.x[other] for pull, other in zip(pulls, neighbours, strict=True))
        return at / sum(pulls) if neighbours else self.x[one]

    def _settle(self, layer: Sequence[int], wishes: Sequence[float]) -> None:
        """The places nearest to the wishes, in squares, that keep the gaps: wishes that collide share their mean."""
        offsets = [0.0]
        for left, right in pairwise(layer):
            offsets.append(offsets[-1] + self._gap(left, right))
        groups: list[tuple[float, float, int]] = []  # the mean, its weight, how many
        for one, wish, offset in zip(layer, wishes, offsets, strict=True):
            mean, weight, count = wish - offset, self._weight(one), 1
            while groups and groups[-1][0] > mean:
                other, its, many = groups.pop()
                mean, weight, count = (mean * weight + other * its) / (weight + its), weight + its, count + many
            groups.append((mean, weight, count))
        found = [mean for mean, _, count in groups for _ in range(count)]
        for one, mean, offset in zip(layer, found, offsets, strict=True):
            self.x[one] = mean + offset

    def _gap(self, left: int, right: int) -> float:
        between = _GAP_X if left < self.boxes and right < self.boxes else _LANE
        return (self.sizes[left].width + self.sizes[right].width) / 2 + between

    def _weight(self, one: int) -> float:
        return 1.0 if one < self.boxes else 4.0  # an arrow that passes is best straight

    # ----------------------------------------------------------------------- the result

    def placed(self) -> Placed:
        """Stack the layers, move all to the right of zero, and draw the ways."""
        left = min(self.x[one] - self.sizes[one].width / 2 for layer in self.layers for one in layer)
        self.x = [x - left for x in self.x]
        heights = [max(self.sizes[one].height for one in layer) for layer in self.layers]
        tops = [sum(heights[:layer]) + layer * _GAP_Y for layer in range(len(heights))]
        rank = {one: number for number, layer in enumerate(self.layers) for one in layer}
        centres = [(self.x[box], tops[rank[box]] + heights[rank[box]] / 2) for box in range(self.boxes)]
        ports = self._ports()
        ways: dict[tuple[int, int], list[Point]] = {}
        for ends, chain in self.chains.items():
            way: list[Point] = []
            for one in chain:
                top, bottom = tops[rank[one]], tops[rank[one]] + heights[rank[one]]
                half = self.sizes[one].height / 2
                middle = top + heights[rank[one]] / 2
                if one == ends[1]:
                    way += [(ports[ends][1], top), (ports[ends][1], middle - half)]
                elif one == ends[0]:
                    way += [(ports[ends][0], middle + half), (ports[ends][0], bottom)]
                else:
                    way += [(self.x[one], top), (self.x[one], bottom)]
            ways[ends] = way
        width = max(self.x[one] + self.sizes[one].width / 2 for layer in self.layers for one in layer)
        return Placed(Size(width, tops[-1] + heights[-1]), centres, ways)

    def _ports(self) -> dict[tuple[int, int], tuple[float, float]]:
        """Where each arrow leaves its box, and where it comes in: side by side, in the order of where they lead."""
        leaving: dict[int, list[tuple[float, tuple[int, int]]]] = {}
        coming: dict[int, list[tuple[float, tuple[int, int]]]] = {}
        for ends, chain in self.chains.items():
            leaving.setdefault(ends[0], []).append((self.x[chain[1]], ends))
            coming.setdefault(ends[1], []).append((self.x[chain[-2]], ends))
        outs, ins = self._side_by_side(leaving), self._side_by_side(coming)
        return {ends: (outs[ends], ins[ends]) for ends in self.chains}

    def _side_by_side(self, sides: Mapping[int, list[tuple[float, tuple[int, int]]]]) -> dict[tuple[int, int], float]:
        found = {}
        for box, arrows in sides.items():
            step = min(24.0, 0.7 * self.sizes[box].width / len(arrows))
            for index, (_, ends) in enumerate(sorted(arrows)):
                found[ends] = self.x[box] + step * (index - (len(arrows) - 1) / 2)
        return found


def _share(index: int, layer: Sequence[int]) -> float:
    """Where in its layer something is, from 0 to 1: layers differ in length."""
    return (index + 0.5) / len(layer)


def _inversions(numbers: Sequence[int]) -> int:
    """How many pairs stand the wrong way round; by a tree of counts, so that wide graphs cost little."""
    tree = [0] * (max(numbers, default=0) + 2)
    found = 0
    for seen, number in enumerate(numbers):
        found += seen
        at = number + 1
        while at:
            found -= tree[at]
            at &= at - 1
        at = number + 1
        while at < len(tree):
            tree[at] += 1
            at += at & -at
    return found


# --------------------------------------------------------------------------- layers


def _ranks(boxes: int, arrows: Sequence[tuple[int, int]]) -> list[int]:
    """The layer of each box: below all that lead to it, but near to what it leads to, where it leads to more."""
    above: list[list[int]] = [[] for _ in range(boxes)]
    below: list[list[int]] = [[] for _ in range(boxes)]
    for source, target in arrows:
        below[source].append(target)
        above[target].append(source)
    ranks = [0] * boxes
    order = _sorted(above, below)
    for box in order:
        ranks[box] = max((ranks[other] + 1 for other in above[box]), default=0)
    for box in reversed(order):
        if len(below[box]) > len(above[box]):
            ranks[box] = min(ranks[other] for other in below[box]) - 1
    return ranks


def _sorted(above: Sequence[Sequence[int]], below: Sequence[Sequence[int]]) -> list[int]:
    """Boxes in an order in which each comes after those that lead to it."""
    waits = [len(sources) for sources in above]
    order = [box for box, count in enumerate(waits) if not count]
    for box in order:
        for target in below[box]:
            waits[target] -= 1
            if not waits[target]:
                order.append(target)
    return order


def _by_reach(boxes: int, arrows: Sequence[tuple[int, int]]) -> list[int]:
    """Boxes as one walks along the arrows, deep first: what hangs together stands together."""
    below: list[list[int]] = [[] for _ in range(boxes)]
    reached = set()
    for source, target in arrows:
        below[source].append(target)
        reached.add(target)
    found: dict[int, None] = {}
    waiting = [box for box in range(boxes - 1, -1, -1) if box not in reached]
    while waiting:
        box = waiting.pop()
        if box not in found:
            found[box] = None
            waiting += reversed(below[box])
    return [*found]
