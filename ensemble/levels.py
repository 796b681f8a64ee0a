"""Who sees whom in a document: its levels (itself, and the body of every map), where references lead, who owns whom.

It knows names and places. What flows, and in which order, is decided in `typing` and `graph`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ensemble.faults import FaultList, Path, meant
from ensemble.nodes.node import BodyAt, Edge, EdgeAt, NodeSpec, Reference

__all__ = ["Level", "Origin", "Read", "connect"]


class Origin(NamedTuple):
    """Where a reference leads: to an input, an item or a node of a level."""

    level: Level
    scope: Literal["inputs", "item", "node"]
    name: str


class Read(NamedTuple):
    """An edge, where in the document it is written, and where it leads: None if that is a fault, which is noted."""

    at: EdgeAt
    path: Path
    origin: Origin | None


@dataclass(eq=False)
class Level:
    """Nodes that see each other: those of the document, or those of the body of a map.

    Args:
        path: where in the document it stands.
        nodes, outputs: as they are written.
        inputs: the names that `$inputs.NAME` may have here; of a body, none: they are its document's.
        items: the names that `$item.NAME` may have here; of a document, none.
        parent, holder: the level that a body stands in, and the node there that owns it.
        bodies: of each node that has some, by name.
        owner: of each node that has one, by name.
        reads: the edges of each node; those of an owned node are its own, whose names begin with `$`.
        results: the edges of `outputs`, in order.
        lacks: whether something was written at a path that is not here because of its faults, which are noted already.
        damaged: whether a reference leads nowhere, so that a node may only look as if nobody used it.
    """

    path: Path
    nodes: Mapping[str, NodeSpec]
    outputs: Mapping[str, Edge]
    inputs: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    parent: Level | None = None
    holder: str = ""
    name: str = ""
    bodies: dict[str, dict[str, Level]] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)
    owned: dict[str, list[str]] = field(default_factory=dict)
    reads: dict[str, list[Read]] = field(default_factory=dict)
    results: list[Read] = field(default_factory=list)
    lacks: Callable[[Path], bool] = lambda path: False
    damaged: bool = False

    @property
    def prefix(self) -> str:
        """What the names of its nodes begin with in a plan: `per_face/`."""
        return "" if self.parent is None else f"{self.parent.prefix}{self.holder}/"

    def node_path(self, name: str) -> Path:
        """Where a node stands in the document."""
        return (*self.path, "nodes", name)

    def around(self) -> Iterator[Level]:
        """This level, and those that it stands in, from the inside out."""
        level: Level | None = self
        while level is not None:
            yield level
            level = level.parent

    def within(self) -> Iterator[Level]:
        """This level, and all that stand in it."""
        waiting = [self]
        while waiting:
            level = waiting.pop()
            yield level
            waiting += [body for bodies in level.bodies.values() for body in bodies.values()]

    def bodies_of(self, name: str) -> list[Level]:
        """The bodies of a node."""
        return [*self.bodies.get(name, {}).values()]

    def skipped(self, name: str) -> str | None:
        """The node that may be skipped, so that this one may have no outputs: itself, or one that it owns and needs."""
        waiting = [name]
        while waiting:
            one = waiting.pop()
            spec = self.nodes[one]
            if spec.on_error == "skip":
                return one
            waiting += [owned for owned in self.owned.get(one, ()) if owned not in spec.spared()]
        return None

    def lost(self, reference: Reference) -> bool:
        """Whether a reference leads to what was left out of the document."""
        key = "nodes" if reference.scope == "node" else reference.scope
        return any(level.lacks((*level.path, key, reference.name)) for level in self.around())

    def damage(self) -> None:
        """Note that a reference here leads nowhere, which shows in the levels around as well."""
        for level in self.around():
            level.damaged = True

    def holder_in(self, outer: Level) -> str:
        """The node of an outer level that this one stands in."""
        (name,) = [level.holder for level in self.around() if level.parent is outer]
        return name

    def find(self, reference: Reference) -> Origin | None:
        """Where a reference leads that is written here: to the innermost level that has the name."""
        for level in self.around():
            if reference.name in level.names(reference.scope):
                return Origin(level, reference.scope, reference.name)
        return None

    def names(self, scope: Literal["inputs", "item", "node"]) -> Mapping[str, NodeSpec] | tuple[str, ...]:
        """What has a name in this level."""
        return self.nodes if scope == "node" else self.inputs if scope == "inputs" else self.items

    def family(self, name: str) -> list[str]:
        """The nodes that a node owns, and those that they own; each after those that it owns."""
        found, waiting = [], [*self.owned.get(name, ())]
        while waiting:
            found.append(one := waiting.pop())
            waiting += self.owned.get(one, ())
        return found[::-1]


def connect(root: Level, faults: FaultList) -> None:
    """Find the levels below that of a document, and follow every reference; faults: E103 and E115."""
    for level in root.within():  # which finds the bodies that are added here
        for name, spec in level.nodes.items():
            for body in spec.bodies():
                level.bodies.setdefault(name, {})[body.name] = _level_of(level, name, body)
        _own(level, faults)
    for level in root.within():
        _follow(level, faults)


def _level_of(parent: Level, holder: str, body: BodyAt) -> Level:
    path = (*parent.node_path(holder), *body.path)
    return Level(path, body.nodes, body.outputs, (), body.items, parent, holder, body.name, lacks=parent.lacks)


# --------------------------------------------------------------------------- who owns whom


def _own(level: Level, faults: FaultList) -> None:
    for name, spec in level.nodes.items():
        for owned in spec.owned():
            path = (*level.node_path(name), *owned.path)
            if owned.name not in level.nodes:
                level.damage()
                if not level.lost(Reference("node", owned.name, None)):
                    faults.add("E103", path, f"node '{name}' uses node '{owned.name}'{_absent(level, owned.name)}")
            elif level.owner.setdefault(owned.name, name) == name:
                mine = level.owned.setdefault(name, [])
                if owned.name not in mine:
                    mine.append(owned.name)
            else:
                faults.add("E115", path, _owned_twice(owned.name, level.owner[owned.name], name))


def _absent(level: Level, name: str) -> str:
    if level.find(Reference("node", name, None)) is not None:
        return f", which stands outside this body: expected a node of it; move '{name}' into the body"
    return f", which is not there{meant(name, level.nodes)}"


def _owned_twice(name: str, first: str, second: str) -> str:
    return (
        f"node '{name}' is used by node '{second}', but node '{first}' owns it already: expected one owner; "
        f"write it twice, under two names (a model is opened only once)"
    )


# --------------------------------------------------------------------------- where references lead


def _follow(level: Level, faults: FaultList) -> None:
    for name, spec in level.nodes.items():
        level.reads[name] = [*_reads(level, name, spec, faults)]
    for name, edge in level.outputs.items():
        at = EdgeAt(name, edge, ("outputs", name))
        path = (*level.path, *at.path)
        level.results.append(Read(at, path, _origin(level, edge.source, f"output '{name}'", path, faults)))


def _reads(level: Level, name: str, spec: NodeSpec, faults: FaultList) -> Iterator[Read]:
    for at in spec.edges():
        path = (*level.node_path(name), *at.path)
        if name in level.owner and not str(at.name).startswith("$"):
            owner = level.owner[name]
            text = (
                f"node '{name}' reads '{at.edge.source}', but node '{owner}' owns it and gives it its own inputs: "
                f"expected no inputs at '{name}'; write them at '{owner}'"
            )
            faults.add("E115", path, text)
            level.damage()
        else:
            yield Read(at, path, _origin(level, at.edge.source, f"node '{name}'", path, faults))


def _origin(level: Level, reference: Reference, reader: str, path: Path, faults: FaultList) -> Origin | None:
    found = level.find(reference)
    if found is None and level.lost(reference):
        pass
    elif found is None:
        faults.add("E103", path, f"{reader} reads '{reference}', but there is no {_lacking(level, reference)}")
    elif found.scope == "node" and found.name in found.level.owner:
        owner = found.level.owner[found.name]
        text = (
            f"{reader} reads '{reference}', but node '{owner}' owns '{found.name}' and alone may use it; read what "
            f"'{owner}' gives, or write the node a second time under another name"
        )
        faults.add("E115", path, text)
        found = None
    if found is None:
        level.damage()
    return found


def _lacking(level: Level, reference: Reference) -> str:
    what = {"inputs": "input", "item": "item", "node": "node"}[reference.scope]
    known = [name for around in level.around() for name in around.names(reference.scope)]
    if reference.scope == "item" and not any(around.items for around in level.around()):
        return f"item '{reference.name}': $item is what a map is over, in its body"
    return f"{what} '{reference.name}'{meant(reference.name, known)}"
