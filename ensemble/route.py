"""What a run for some outputs of a plan has to do: which nodes, in which order of haste, and who reads what.

Found once for each set of outputs and kept; a run only counts down. Nodes are numbers here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ensemble.plan import Plan, PlanNode, Source, Wire
from ensemble.steps import Missing, ModelStep
from ensemble.values import Values

__all__ = ["Quorum", "Route", "route_of"]

_HASTE = {"inline": 1, "thread": 10, "loop": 100}  # what a node takes, for want of better knowledge


class Quorum(NamedTuple):
    """When a combination may go on without all of its members."""

    members: tuple[Source, ...]
    required: tuple[Source, ...]
    least: int
    grace_s: float

    def is_met(self, values: Values) -> bool:
        """Whether enough have answered, the required ones among them."""
        there = [source for source in self.members if not isinstance(values.get(source, _ABSENT), Missing)]
        return len(there) >= self.least and all(source in there for source in self.required)


_ABSENT = Missing("", "")


class Route(NamedTuple):
    """The part of a plan that some outputs need.

    Args:
        nodes: those that are reached backwards from the outputs, in an order in which they could run.
        wanted: of each node, the outputs that somebody reads.
        waits: of each node, how many other nodes it reads.
        readers: of each node, the numbers of those that read it.
        haste: of each node, minus the longest way from it to the end: the least comes first.
        uses: how often each value is read, outputs of the graph included.
        outputs: the wires of the outputs, in order.
        outputs_of: the numbers of the nodes that outputs come from.
        quorums: of the combinations that have one.
        forgiven: the nodes whose failure counts as a member that does not answer, since nobody else reads them.
    """

    nodes: tuple[PlanNode, ...]
    wanted: tuple[tuple[str, ...], ...]
    waits: tuple[int, ...]
    readers: tuple[tuple[int, ...], ...]
    haste: tuple[int, ...]
    uses: dict[Source, int]
    outputs: tuple[Wire, ...]
    outputs_of: frozenset[int]
    quorums: dict[int, Quorum]
    forgiven: frozenset[int]


def route_of(plan: Plan, wanted: Sequence[str] | None = None) -> Route:
    """The route to the outputs named, all of them for None. Costs a walk over the graph."""
    by_name = {wire.name: wire for wire in plan.outputs}
    outputs = plan.outputs if wanted is None else tuple([by_name[name] for name in wanted])
    needed = _reached(plan, outputs)
    nodes = tuple([node for node in plan.nodes if node.name in needed])
    number = {node.name: index for index, node in enumerate(nodes)}
    uses: dict[Source, int] = {}
    for wire in (*outputs, *[wire for node in nodes for wire in node.wires]):
        uses[wire.source] = uses.get(wire.source, 0) + 1
    sources = [
        dict.fromkeys(number[wire.source.name] for wire in node.wires if wire.source.scope == "node") for node in nodes
    ]
    readers: list[list[int]] = [[] for _ in nodes]
    for index, read in enumerate(sources):
        for source in read:
            readers[source].append(index)
    return Route(
        nodes,
        tuple([tuple([name for name in node.outputs if Source("node", node.name, name) in uses]) for node in nodes]),
        tuple(map(len, sources)),
        tuple(map(tuple, readers)),
        _haste(nodes, readers),
        uses,
        outputs,
        outputs_of := frozenset([number[wire.source.name] for wire in outputs if wire.source.scope == "node"]),
        quorums := {index: quorum for index, node in enumerate(nodes) if (quorum := _quorum(node)) is not None},
        _forgiven(nodes, readers, outputs_of, quorums),
    )


def _reached(plan: Plan, outputs: Sequence[Wire]) -> set[str]:
    """The nodes that the outputs need: found backwards, since a node comes after what it reads."""
    needed = {wire.source.name for wire in outputs if wire.source.scope == "node"}
    for node in reversed(plan.nodes):
        if node.name in needed:
            needed |= {wire.source.name for wire in node.wires if wire.source.scope == "node"}
    return needed


def _quorum(node: PlanNode) -> Quorum | None:
    quorum = getattr(node.spec, "quorum", None)
    if quorum is None:
        return None
    members = {wire.name: wire.source for wire in node.wires}
    required = tuple([members[name] for name in quorum.required])
    return Quorum(tuple(members.values()), required, quorum.min, quorum.grace)


def _forgiven(
    nodes: Sequence[PlanNode],
    readers: Sequence[Sequence[int]],
    outputs_of: frozenset[int],
    quorums: dict[int, Quorum],
) -> frozenset[int]:
    found: set[int] = set()
    for index in reversed(range(len(nodes))):
        if index not in outputs_of and all(
            reader in found or (reader in quorums and not _is_needed(nodes[index], nodes[reader]))
            for reader in readers[index]
        ):
            found.add(index)
    return frozenset(found)


def _is_needed(node: PlanNode, reader: PlanNode) -> bool:
    return any(wire.needed for wire in reader.wires if wire.source.scope == "node" and wire.source.name == node.name)


def _haste(nodes: Sequence[PlanNode], readers: Sequence[Sequence[int]]) -> tuple[int, ...]:
    longest = [0] * len(nodes)
    for index in reversed(range(len(nodes))):
        step = nodes[index].step
        own = _HASTE[step.place] if isinstance(step, ModelStep) else 1 if not nodes[index].children else 100
        longest[index] = own + max((longest[reader] for reader in readers[index]), default=0)
    return tuple([-length for length in longest])
