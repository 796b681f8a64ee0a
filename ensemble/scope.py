"""What flows where: the form of every edge, node after node, and what a kind may ask while its node is checked.

It follows an order that it is given and collects faults. A kind says what it makes of its inputs, `levels` where
references lead, `graph` what comes of it all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ensemble.agreement import Agreement
from ensemble.faults import FaultList, GraphFaults, Path, meant
from ensemble.forms import UNKNOWN, Form
from ensemble.levels import Level, Origin, Read
from ensemble.metadata import Models
from ensemble.nodes.node import Edge, NodeSpec, TensorText
from ensemble.operations import NAMES, operation
from ensemble.plan import Operation, Plan
from remote_ops.errors import SpecError
from remote_ops.servable import Servable

__all__ = ["Checker", "FileCycle", "Flow", "NodeScope", "Traced"]


class FileCycle(SpecError):
    """A graph that holds itself; `files` are those on the way, the first and the last the same."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = tuple(files)
        folder = os.path.dirname(files[0])
        super().__init__(f"a cycle of files: {' -> '.join(os.path.relpath(file, folder) for file in files)}")


class Traced(NamedTuple):
    """What came of one edge: its input, where it leads, what is done on the way, what flows, and all that in words."""

    name: str | int
    origin: Origin | None
    tensor: str
    operations: tuple[Operation, ...]
    form: Form
    needed: bool
    words: str

    @property
    def key(self) -> str:
        """What a body calls it, if it is read from outside."""
        assert self.origin is not None
        scope, name = self.origin.scope, self.origin.name
        return f"{name}.{self.tensor}" if scope == "node" else f"${scope}.{name}"


@dataclass
class Flow:
    """What flows in one level.

    Args:
        items: of a body, the forms of its items.
        inputs: what goes into each node, by the names that its edges or, of an owned node, its owner gives.
        traced: the edges of each node that nobody owns, with those that it has for nodes that it owns.
        taken: of an owned node, `{name of its own: name that its owner gives it under}`.
        outputs: what each node gives; empty where that is not known.
        results: what the level gives.
        outer: of a body, what it reads from outside, by name.
        used: the outputs of each node that somebody reads.
        faulty: the nodes whose faults are noted, so that nothing more follows from them.
        broken: whether anything in the level has a fault.
    """

    items: Mapping[str, Form] = field(default_factory=dict)
    inputs: dict[str, Mapping[Any, Form]] = field(default_factory=dict)
    traced: dict[str, list[Traced]] = field(default_factory=dict)
    taken: dict[str, Mapping[Any, str | int]] = field(default_factory=dict)
    outputs: dict[str, Mapping[str, Form]] = field(default_factory=dict)
    results: list[Traced] = field(default_factory=list)
    outer: dict[str, Traced] = field(default_factory=dict)
    used: dict[str, set[str]] = field(default_factory=dict)
    faulty: set[str] = field(default_factory=set)
    broken: bool = False


class Checker:
    """Finds the forms of a graph.

    Args:
        inputs: of the document.
        order: of each level, its nodes, each after what it reads; those on a cycle are left out.
        models: what its models take and give.
        tolerant: whether a remote model that cannot be asked is worth a warning only.
    """

    def __init__(
        self,
        inputs: Mapping[str, TensorText],
        order: Callable[[Level], Sequence[str]],
        models: Models,
        faults: FaultList,
        *,
        tolerant: bool,
    ) -> None:
        self._inputs = inputs
        self._order = order
        self.models = models
        self.faults = faults
        self.tolerant = tolerant
        self.agreement = Agreement(faults)
        self.flows: dict[Level, Flow] = {}

    def check(self, level: Level, items: Mapping[str, Form]) -> Flow:
        """Find what flows in a level, given its items."""
        flow, before = Flow(items), len(self.faults.errors)
        self.flows[level] = flow
        for name in self._order(level):
            if name not in level.owner:
                self._check_family(level, flow, name)
        flow.results = [self._traced(level, read, f"output '{read.at.name}'") for read in level.results]
        flow.broken = len(self.faults.errors) > before
        return flow

    # ----------------------------------------------------------------------- nodes

    def _check_family(self, level: Level, flow: Flow, name: str) -> None:
        """Look at a node and, before, at those that it owns: they are given what it is given."""
        own, family = self._edges_of(level, name), level.family(name)
        hoisted = {(owned, str(one.name)): one for owned in family for one in self._edges_of(level, owned)}
        extra = [one._replace(name=".".join(key)) for key, one in hoisted.items()]
        flow.traced[name] = [*own, *extra]
        given = {one.name: one for one in flow.traced[name]}
        shared = [one.name for one in own if not str(one.name).startswith("$")]
        for owned in family:
            flow.taken[owned] = taken = {**self._shared(level, owned, shared), **_hoisted(level, owned, hoisted)}
            self._check_node(level, flow, owned, {mine: given[theirs] for mine, theirs in taken.items()})
        self._check_node(level, flow, name, given)

    def _edges_of(self, level: Level, name: str) -> list[Traced]:
        return [self._traced(level, read, f"node '{name}'") for read in level.reads[name]]

    def _shared(self, level: Level, name: str, given: Sequence[str | int]) -> Mapping[str, str | int]:
        """Under which names an owned node has what its owner gives on: a model takes those that it knows."""
        spec = level.nodes[name]
        signature = self.models.of(level.prefix + name, spec).signature if spec.MODEL else None
        if signature is not None:
            names = [tensor.name for tensor in signature.inputs]
            if len(names) == len(given) == 1:
                return {names[0]: given[0]}
            found: dict[str, str | int] = {one: one for one in names if one in given}
            found |= {names[one]: one for one in given if isinstance(one, int) and one < len(names)}
            if found:
                return found
        return {str(one): one for one in given}

    def _check_node(self, level: Level, flow: Flow, name: str, given: Mapping[Any, Traced]) -> None:
        flow.inputs[name] = {one: traced.form for one, traced in given.items()}
        scope = NodeScope(self, level, name, {one: traced.words for one, traced in given.items()})
        spec, before = level.nodes[name], len(self.faults.errors)
        outputs = spec.forms(flow.inputs[name], scope)
        if len(self.faults.errors) > before or self.models.is_blind(spec):
            flow.faulty.add(name)
            outputs = {}
        flow.outputs[name] = outputs

    # ----------------------------------------------------------------------- edges

    def _traced(self, level: Level, read: Read, reader: str) -> Traced:
        form, tensor = self._source(read, reader)
        self._check_needed(read, reader)
        if read.origin is not None and read.origin.level is not level:
            self._note_outer(level, Traced("", read.origin, tensor, (), form, read.at.needed, ""))
        operations, form = self._applied(read.at.edge, form, read.path)
        words = str(read.at.edge.source)
        return Traced(read.at.name, read.origin, tensor, operations, form, read.at.needed, words)

    def _source(self, read: Read, reader: str) -> tuple[Form, str]:
        """The form that is read, and the name of the output of a node that is."""
        if read.origin is None:
            return UNKNOWN, ""
        level, scope, name = read.origin
        if scope == "inputs":
            return self._inputs[name].form, ""
        flow = self.flows[level]
        if scope == "item":
            return flow.items.get(name, UNKNOWN), ""
        outputs = flow.outputs.get(name, {})
        tensor = self._output_meant(read, flow, outputs, reader)
        flow.used.setdefault(name, set()).add(tensor)
        return outputs.get(tensor, UNKNOWN), tensor

    def _output_meant(self, read: Read, flow: Flow, outputs: Mapping[str, Form], reader: str) -> str:
        node, tensor, wrong = read.at.edge.source.name, read.at.edge.source.tensor, ""
        if tensor is None and len(outputs) == 1:
            return next(iter(outputs))
        if tensor is None and outputs:
            several = ", ".join(f"'{node}.{one}'" for one in outputs)
            wrong = f"node '{node}' has {len(outputs)} outputs: expected one of {several}"
        elif tensor is None and node in flow.outputs and node not in flow.faulty:
            wrong = f"its outputs are not known: expected '{node}.NAME'"
        elif tensor is not None and outputs and tensor not in outputs:
            wrong = f"node '{node}' has no output '{tensor}'{meant(tensor, outputs)}"
        if wrong:
            self.faults.add("E103", read.path, f"{reader} reads '{read.at.edge.source}', but {wrong}")
        return tensor or ""

    def _check_needed(self, read: Read, reader: str) -> None:
        why = self.may_lack(read.origin) if read.at.needed else None
        if why is not None:
            what = reader if reader.startswith("output") else f"{reader}, input '{read.at.name}',"
            self.faults.add("E113", read.path, f"{what} needs a value of '{read.at.edge.source}', but {why}")

    def may_lack(self, origin: Origin | None) -> str | None:
        """Why there may be no value, and what to do about it; None if there always is one."""
        if origin is None or origin.scope == "item":
            return None
        if origin.scope == "inputs":
            declared = self._inputs[origin.name]
            if not declared.optional or declared.default is not None:
                return None
            return f"input '{origin.name}' is optional: give it a `default:`, or make it needed"
        skipped = origin.level.skipped(origin.name)
        if skipped is None:
            return None
        return f"node '{skipped}' may be skipped: write `on_error: {{default: VALUE}}` there, or leave it out"

    def _note_outer(self, level: Level, read: Traced) -> None:
        """Note what a body reads from outside, in it and in each body around it that the value passes."""
        assert read.origin is not None
        for around in level.around():
            if around is read.origin.level:
                return
            outer = self.flows[around].outer
            needed = read.needed or (read.key in outer and outer[read.key].needed)
            outer[read.key] = read._replace(name=read.key, needed=needed)

    def _applied(self, edge: Edge, form: Form, path: Path) -> tuple[tuple[Operation, ...], Form]:
        """What `apply:` and `cast:` do, and what flows after them."""
        found: list[Operation] = []
        for text in _operations_of(edge):
            try:
                one, after = operation(text, form)
            except ValueError as error:
                self.faults.add(_code_of(text, form), path, f"edge from '{edge.source}': {error}")
                return tuple(found), UNKNOWN
            found.append(one)
            form = after
        return tuple(found), form


def _hoisted(level: Level, name: str, hoisted: Mapping[tuple[str, str], Traced]) -> Mapping[str, str]:
    """Of the inputs that are for owned nodes alone, those of a node and of those below it: its own first."""
    below = {*level.family(name)}
    own = {one: f"{owned}.{one}" for owned, one in hoisted if owned == name}
    return {**own, **{f"{owned}.{one}": f"{owned}.{one}" for owned, one in hoisted if owned in below}}


def _operations_of(edge: Edge) -> Iterator[str | Mapping[str, Any]]:
    if edge.apply is not None:
        yield from edge.apply if isinstance(edge.apply, list) else [edge.apply]
    if edge.cast is not None:
        yield {"cast": edge.cast}


def _code_of(text: str | Mapping[str, Any], form: Form) -> str:
    """The code of an operation that does not work: for its name, its arguments, the dtype or the shape."""
    name = text if isinstance(text, str) else next(iter(text), "")
    if name not in NAMES:
        return "E103"
    for code, known in (("E101", UNKNOWN), ("E106", Form(form.dtype, None))):
        try:
            operation(text, known)
        except ValueError:
            return code
    return "E107"


class NodeScope:
    """Answers what the kind of one node asks; see `nodes.node.Scope`."""

    def __init__(self, checker: Checker, level: Level, name: str, words: Mapping[Any, str]) -> None:
        self._checker = checker
        self._level = level
        self._name = name
        self._words = words
        self.faults = checker.faults
        self.equal = checker.agreement.equal
        self.resolve = checker.agreement.symbols.form

    @property
    def path(self) -> Path:
        """Where the node stands in the document."""
        return self._level.node_path(self._name)

    @property
    def file(self) -> str:
        """The file of the graph."""
        return self.faults.file

    @property
    def inputs(self) -> Mapping[Any, Form]:
        """What goes in."""
        found = self._checker.flows[self._level].inputs[self._name]
        return {name: self.resolve(form) for name, form in found.items()}

    def source(self, name: str | int) -> str:
        """In words, where an input comes from."""
        return self._words.get(name, f"input '{name}'")

    def child(self, name: str) -> Mapping[str, Form]:
        """What an owned node gives."""
        return self._checker.flows[self._level].outputs.get(name, {})

    def body(self, name: str, items: Mapping[str, Form]) -> Mapping[str, Form]:
        """What a body gives for one item; it is looked at once."""
        level = self._level.bodies[self._name][name]
        flow = self._checker.flows.get(level) or self._checker.check(level, items)
        if level.damaged or flow.broken:
            return {}
        return {str(one.name): self.resolve(one.form) for one in flow.results}

    def servable(self, spec: NodeSpec) -> Servable | None:
        """The servable of a model node."""
        opened = self._checker.models.of(self._level.prefix + self._name, spec)
        if opened.error is not None:
            self._note(opened.error, spec)
        elif spec.kind == "graph" and isinstance(plan := getattr(opened.servable, "plan", None), Plan):
            self.faults.all += [fault for fault in plan.warnings if fault not in self.faults.all]
        return opened.servable if opened.signature is not None else None

    def _note(self, error: Exception, spec: NodeSpec) -> None:
        cycle = _file_cycle(error)
        if isinstance(error, GraphFaults):
            self.faults.all += [fault for fault in error.faults if fault not in self.faults.all]
        elif cycle is not None:
            if cycle.files[0] != os.path.realpath(self.file):
                raise cycle
            self.faults.add("E104", self.path, f"node '{self._name}' closes {cycle}")
        elif spec.MODEL == "remote":
            text = f"node '{self._name}' does not say what it takes and gives: {error}; {self._checker.models.hint}"
            self.faults.add("E116", self.path, text, warning=self._checker.tolerant)
        else:
            self.faults.add("E116", self.path, f"node '{self._name}' cannot be opened: {error}")


def _file_cycle(error: BaseException | None) -> FileCycle | None:
    while error is not None:
        if isinstance(error, FileCycle):
            return error
        error = error.__cause__
    return None
