"""From a document to a plan: who reads whom and in which order, what flows, what is wrong, and what runs.

It decides nothing about a single kind of node: those say for themselves what they read, own, give and do.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np

from ensemble.faults import FaultList, meant
from ensemble.forms import Dim, Form
from ensemble.layout import Layout
from ensemble.levels import Level, Origin, Read, connect
from ensemble.metadata import AROUND, Around, Identity, Models, Opener, signatures_in
from ensemble.nodes.model import identity as identity_of
from ensemble.nodes.model import open_servable
from ensemble.nodes.node import Default, NodeSpec
from ensemble.plan import Plan
from ensemble.scope import Checker, FileCycle, Flow
from remote_ops.errors import SpecError
from remote_ops.signature import Signature

if TYPE_CHECKING:
    from ensemble.spec import Document

__all__ = ["build"]

_BUILDING: ContextVar[tuple[str, ...]] = ContextVar("ensemble_building", default=())


def build(
    document: Document,
    faults: FaultList,
    *,
    open: Opener | None = None,
    identity: Identity = identity_of,
    timeout_s: float = 10.0,
) -> Plan:
    """Check a document as a whole, and make the plan of it.

    Args:
        document: as `spec` read it.
        faults: those found so far; more are added, warnings included.
        open: gets the servable of a model node, given the file; unless given, as for the graph that this is a node of.
        identity: nodes of equal identity share a servable.
        timeout_s: for asking all remote models for their signatures, which are asked at the same time; seconds.

    Raises:
        GraphFaults: the document has faults; all of them at once.

    Opens every model, and asks the remote ones unless `metadata: file:PATH` says what they are; runs none. What
    `metadata` says holds for a graph that is a node, too, unless that says `file:PATH` itself.
    """
    with _once_at_a_time(faults.file):
        return _Builder(document, faults, open, identity, timeout_s).build()


@contextmanager
def _once_at_a_time(file: str) -> Iterator[None]:
    """Raise `FileCycle` where a graph is built while it is built: some graph in it holds it."""
    path, building = os.path.realpath(file), _BUILDING.get()
    if path in building:
        raise FileCycle([*building[building.index(path) :], path])
    token = _BUILDING.set((*building, path) if os.path.exists(path) else building)
    try:
        yield
    finally:
        _BUILDING.reset(token)


class _Builder:
    """What is known of one document while it is built."""

    def __init__(
        self, document: Document, faults: FaultList, open: Opener | None, identity: Identity, timeout_s: float
    ) -> None:
        self.document = document
        self.faults = faults
        self.root = Level((), document.nodes, document.outputs, tuple(document.inputs), lacks=document.lacks)
        self.root.damaged = bool(document.left_out)
        connect(self.root, faults)
        self.graphs = _graphs(self.root)
        self.orders: dict[Level, list[str]] = {}
        around = AROUND.get() or Around(open_servable, False, None, "")
        is_told, tolerant = document.metadata.startswith("file:"), around.tolerant or document.metadata == "warn"
        known, prefix = (self._signatures(), "") if is_told else (around.known, around.prefix)
        models = Models(open or around.open, identity, faults.file, known, timeout_s, prefix, tolerant)
        self.checker = Checker(document.inputs, self.orders.__getitem__, models, faults, tolerant=tolerant)

    def build(self) -> Plan:
        """Check everything, then plan."""
        cyclic = False
        for level, graph in self.graphs.items():
            cyclic |= self._order(level, graph)
        every = [(level.prefix + name, spec) for level in self.graphs for name, spec in level.nodes.items()]
        self.checker.models.ask(every)
        self.checker.check(self.root, {})
        self._check_defaults()
        self._check_times()
        if not cyclic:
            self._check_use()
        self.faults.raise_if_any()
        plan = Layout(self.document, self.checker, self.orders).plan(self.root)
        self.faults.raise_if_any()  # a step may find one more
        return plan

    def _signatures(self) -> Mapping[str, Signature] | SpecError:
        """Those of `metadata: file:PATH`."""
        try:
            return signatures_in(self.document.metadata.removeprefix("file:"), self.faults.file)
        except SpecError as error:
            self.faults.add("E116", ("metadata",), str(error))
            return error

    # ----------------------------------------------------------------------- order

    def _order(self, level: Level, graph: nx.DiGraph) -> bool:
        """Put the nodes of a level in order, without those on a cycle, which are faults; whether there are any."""
        place = {name: index for index, name in enumerate(level.nodes)}
        cyclic: set[str] = set()
        for knot in [*nx.strongly_connected_components(graph)]:
            if len(knot) > 1 or any(graph.has_edge(name, name) for name in knot):
                cyclic |= knot
                self._note_cycle(level, graph, min(knot, key=place.__getitem__), knot)
        rest = graph.subgraph([name for name in level.nodes if name not in cyclic]) if cyclic else graph
        self.orders[level] = [*nx.lexicographical_topological_sort(rest, key=place.__getitem__)]
        return bool(cyclic)

    def _note_cycle(self, level: Level, graph: nx.DiGraph, first: str, knot: set[str]) -> None:
        inside = graph.subgraph(knot)
        ways = [nx.shortest_path(inside, first, last) for last in inside.predecessors(first)]
        way = min(ways, key=len)
        words = " -> ".join([*way, first])
        text = f"a cycle: {words}; node '{first}' cannot run before '{way[-1]}', nor after it: cut one of these edges"
        self.faults.add("E104", inside.edges[way[-1], first]["path"], text)

    # ----------------------------------------------------------------------- use

    def _check_use(self) -> None:
        """Note what nobody uses, unless a reference leads nowhere: it may have been meant."""
        for level, flow in self.checker.flows.items():
            if not level.damaged:
                self._check_nodes(level, flow)
        if not self.root.damaged:
            origins = [read.origin for _, _, read in _every_read(self.root)]
            read_ones = {origin.name for origin in origins if origin is not None and origin.scope == "inputs"}
            for name in self.document.inputs:
                if name not in read_ones:
                    self._warn(
                        ("inputs", name), f"input '{name}' is read by nobody: read '$inputs.{name}', or leave it out"
                    )

    def _check_nodes(self, level: Level, flow: Flow) -> None:
        reached = self._reached(level)
        for name, spec in level.nodes.items():
            if name in level.owner:
                continue
            self._check_given(level, flow, name)
            if name not in reached:
                text = f"node '{name}' leads to no output: read what it gives, or leave it out"
                self._warn(level.node_path(name), text)
            elif name not in flow.faulty:
                for output in sorted(_chosen(spec) - flow.used.get(name, set())):
                    text = (
                        f"output '{output}' of node '{name}' is read by nobody: read '{name}.{output}', or leave it out"
                    )
                    self._warn((*level.node_path(name), "outputs", output), text)

    def _check_given(self, level: Level, flow: Flow, name: str) -> None:
        """Note what a node gives on to those that it runs, and none of them takes."""
        family = level.family(name)
        takers = [one for one in family if not level.owned.get(one)]
        if not takers or flow.faulty & {name, *family}:
            return
        taken = {theirs for one in takers for theirs in flow.taken[one].values()}
        known = list(dict.fromkeys(mine for one in takers for mine in flow.taken[one]))
        for edge in level.nodes[name].edges():
            if not str(edge.name).startswith("$") and edge.name not in taken:
                path = (*level.node_path(name), *edge.path)
                hint = meant(str(edge.name), dict.fromkeys([*self._inputs_known(level, takers), *known]))
                text = f"input '{edge.name}' of node '{name}' is taken by none of the nodes that it runs{hint}"
                if hint.startswith(";"):
                    self.faults.add("E105", path, text)
                else:
                    self._warn(path, text)

    def _inputs_known(self, level: Level, names: Iterable[str]) -> Iterator[str]:
        for name in names:
            spec = level.nodes[name]
            signature = self.checker.models.of(level.prefix + name, spec).signature if spec.MODEL else None
            yield from (one.name for one in signature.inputs) if signature is not None else ()

    def _reached(self, level: Level) -> set[str]:
        """The nodes that lead to an output."""
        origins = [read.origin for read in level.results]
        waiting = [one.name for one in origins if one is not None and one.scope == "node" and one.level is level]
        reached: set[str] = set()
        while waiting:
            name = waiting.pop()
            if name not in reached:
                reached.add(name)
                waiting += self.graphs[level].predecessors(name)
        return reached

    def _warn(self, path: tuple[str | int, ...], text: str) -> None:
        self.faults.add("E109", path, text, warning=not self.document.strict)

    # ----------------------------------------------------------------------- defaults

    def _check_defaults(self) -> None:
        """Hold what stands in for an input that is left out, or a node that failed, against what it stands in for."""
        for name, text in self.document.inputs.items():
            if text.default is not None:
                others = [one.form for other, one in self.document.inputs.items() if other != name]
                at = ("inputs", name, "default")
                self._check_default(at, f"input '{name}'", text.form, text.default, self._symbols(others))
        for level, flow in self.checker.flows.items():
            bound = self._symbols(self._inputs_of(level, flow))
            for name, spec in level.nodes.items():
                if isinstance(spec.on_error, Default):
                    path = (*level.node_path(name), "on_error")
                    for output, form in flow.outputs.get(name, {}).items():
                        found = self.checker.agreement.symbols.form(form)
                        if name in level.owner and found.dims:  # it may be given some rows only, which are known then
                            found = found._replace(dims=("rows", *found.dims[1:]))
                        what = f"output '{output}' of '{name}'"
                        self._check_default(path, what, found, spec.on_error.default, {*bound, "rows"})

    def _inputs_of(self, level: Level, flow: Flow) -> Iterator[Form]:
        """What a run of a level is given, by which it knows the sizes of symbols."""
        if level is self.root:
            yield from (text.form for text in self.document.inputs.values())
        yield from flow.items.values()
        yield from (outer.form for outer in flow.outer.values())

    def _symbols(self, forms: Iterable[Form]) -> set[Dim]:
        symbols = self.checker.agreement.symbols
        return {dim for form in forms for dim in symbols.form(form).dims or () if isinstance(dim, str)}

    def _check_default(
        self, path: tuple[str | int, ...], what: str, form: Form, default: Any, bound: Collection[Dim]
    ) -> None:
        form = self.checker.agreement.symbols.form(form)
        unbound = [dim for dim in form.dims or () if isinstance(dim, str) and dim not in bound]
        if form.dtype is not None and not _is_of(form.dtype, default):
            self.faults.add("E106", path, f"{what} is {form}, which cannot be filled with {default!r}")
        elif form.dims is None or None in form.dims:
            text = f"{what} is {form}, and what is filled with {default!r} needs a size on each axis: declare its shape"
            self.faults.add("E107", path, text)
        elif unbound:
            text = (
                f"{what} is {form}, and what is filled with {default!r} needs a size on each axis, but no input has the"
            )
            self.faults.add(
                "E107", path, f"{text} size '{unbound[0]}': expected a number, or the name of a size of an input"
            )

    # ----------------------------------------------------------------------- time

    def _check_times(self) -> None:
        """Hold the timeouts against the deadline: each, and the longest way through the graph."""
        deadline_s = self.document.deadline
        if deadline_s is None:
            return
        for level in self.graphs:
            for name, spec in level.nodes.items():
                if spec.timeout is not None and spec.timeout > deadline_s:
                    text = f"node '{name}': expected a timeout of at most {deadline_s:g} s, the deadline of a run, got "
                    self.faults.add("E114", (*level.node_path(name), "timeout"), f"{text}{spec.timeout:g} s")
        length_s, way = self._longest_way()
        if length_s > deadline_s and len(way) > 1:
            text = (
                f"the timeouts along {' -> '.join(way)} add up to {length_s:g} s, but the deadline of a run is "
                f"{deadline_s:g} s: the last of them may get less than its timeout"
            )
            self.faults.add("E114", ("deadline",), text, warning=True)

    def _longest_way(self) -> tuple[float, list[str]]:
        """The way through the graph with the longest timeouts, in seconds, and the nodes on it that have one."""
        longest: dict[str, float] = {}
        before: dict[str, str | None] = {}
        for name in self.orders[self.root]:
            earlier = [one for one in self.graphs[self.root].predecessors(name) if one not in self.root.owner]
            best = max(earlier, key=lambda one: longest.get(one, 0.0), default=None)
            before[name] = best
            longest[name] = self._timeout_s(name) + (longest.get(best, 0.0) if best else 0.0)
        last = max((one for one in longest if one not in self.root.owner), key=longest.__getitem__, default=None)
        end, way = last, []
        while end is not None:
            way += [end] if self._timeout_s(end) else []
            end = before.get(end)
        return longest[last] if last is not None else 0.0, way[::-1]

    def _timeout_s(self, name: str) -> float:
        """How long a node may take, with what it owns: the longest of them, if it does not say."""
        if name in self.root.owner:
            return 0.0
        family = [] if self.root.nodes[name].timeout is not None else self.root.family(name)
        return max(self.root.nodes[one].timeout or 0.0 for one in (name, *family))


def _graphs(root: Level) -> dict[Level, nx.DiGraph]:
    """Of every level, which node must be done before which; with each edge, where that is written."""
    graphs = {level: nx.DiGraph() for level in root.within()}
    for level, graph in graphs.items():
        graph.add_nodes_from(level.nodes)
    for level, reader, read in _every_read(root):
        if read.origin is not None and read.origin.scope == "node":
            _note_read(graphs[read.origin.level], read.origin, level, reader, read)
    for level, graph in graphs.items():
        for name, owner in level.owner.items():
            path = next((*level.node_path(owner), *one.path) for one in level.nodes[owner].owned() if one.name == name)
            graph.add_edge(name, owner, path=path)
    return graphs


def _note_read(graph: nx.DiGraph, origin: Origin, level: Level, reader: str | None, read: Read) -> None:
    """A body reads for the node that it is of."""
    if level is not origin.level:
        reader = level.holder_in(origin.level)
    if reader is not None:
        graph.add_edge(origin.name, reader, path=read.path)


def _every_read(root: Level) -> Iterator[tuple[Level, str | None, Read]]:
    """Every edge, with its level and the node that reads; None for what the level gives."""
    for level in root.within():
        for name, reads in level.reads.items():
            yield from ((level, name, read) for read in reads)
        yield from ((level, None, read) for read in level.results)


def _is_of(dtype: str, value: Any) -> bool:
    """Whether a value that was written may be an element of a tensor."""
    if dtype == "string" or isinstance(value, str):
        return dtype == "string" and isinstance(value, str)
    if dtype == "bool" or isinstance(value, bool):
        return dtype == "bool" and isinstance(value, bool)
    if "float" in dtype:
        return True
    bounds = np.iinfo(dtype)
    return float(value).is_integer() and bounds.min <= value <= bounds.max


def _chosen(spec: NodeSpec) -> set[str]:
    """The outputs that a node need not have: those that are named, out of what its model gives, and not declared."""
    return {name for name, text in (spec.outputs or {}).items() if isinstance(text, str)}
