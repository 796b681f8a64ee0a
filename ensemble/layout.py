"""A checked graph laid out to be run: its nodes become steps, its edges wires, its levels plans.

It finds no faults; but a kind may note one while it makes its step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ensemble.forms import UNKNOWN, Form
from ensemble.levels import Level
from ensemble.nodes.node import NodeSpec
from ensemble.plan import Plan, PlanInput, PlanNode, Source, Wire
from ensemble.scope import Checker, Flow, NodeScope, Traced

if TYPE_CHECKING:
    from ensemble.spec import Document

__all__ = ["Layout"]


class Layout:
    """Makes the plan of a document.

    Args:
        document: as it is written.
        checker: what flows in it, and its models.
        orders: of each level, its nodes in order.
    """

    def __init__(self, document: Document, checker: Checker, orders: Mapping[Level, Sequence[str]]) -> None:
        self._document = document
        self._checker = checker
        self._orders = orders

    def plan(self, root: Level) -> Plan:
        """The plan of the document, whose level is `root`."""
        document, faults = self._document, self._checker.faults
        inputs = {
            name: PlanInput(self._resolved(declared.form), declared.optional, declared.default)
            for name, declared in document.inputs.items()
        }
        return Plan(
            document.name, faults.file, self._document.digest, inputs, *self._parts(root),
            deadline_s=document.deadline, admission=document.admission, warnings=tuple(faults.all),
        )  # fmt: skip

    def _body(self, level: Level) -> Plan:
        flow = self._checker.flows[level]
        inputs = {name: PlanInput(self._resolved(form)) for name, form in flow.items.items()}
        for name, outer in flow.outer.items():
            lacks = self._checker.may_lack(outer.origin) is not None
            inputs[name] = PlanInput(self._resolved(outer.form), optional=lacks)
        name = f"{level.prefix}{level.name}"
        return Plan(name, self._checker.faults.file, self._document.digest, inputs, *self._parts(level))

    def _parts(self, level: Level) -> tuple[tuple[Wire, ...], Mapping[str, Form], Sequence[PlanNode]]:
        """The outputs of a level, their forms, and its nodes."""
        results = self._checker.flows[level].results
        outputs = tuple([_wire(level, str(one.name), one) for one in results])
        forms = {str(one.name): self._resolved(one.form) for one in results}
        return outputs, forms, [self._node(level, name) for name in self._orders[level] if name not in level.owner]

    def _node(self, level: Level, name: str) -> PlanNode:
        """A node that nobody owns, with all that it owns."""
        flow = self._checker.flows[level]
        given = {one.name: one.needed for one in flow.traced[name]}
        family: dict[str, PlanNode] = {}
        for owned in level.family(name):
            family[owned] = self._made(level, owned, _given(flow, owned, given), family)
        own = [_wire(level, self._input_name(level, name, one.name), one) for one in flow.traced[name]]
        return self._made(level, name, [*own, *self._outer_wires(level, name)], family)

    def _made(self, level: Level, name: str, wires: Iterable[Wire], family: Mapping[str, PlanNode]) -> PlanNode:
        spec, flow = level.nodes[name], self._checker.flows[level]
        children: dict[str, PlanNode | Plan] = {one: family[one] for one in level.owned.get(name, ())}
        children |= {body.name: self._body(body) for body in level.bodies_of(name)}
        step = spec.step(NodeScope(self._checker, level, name, {}))
        outputs = flow.outputs[name] or dict.fromkeys(sorted(flow.used.get(name, ())), UNKNOWN)
        forms = {output: self._resolved(form) for output, form in outputs.items()}
        return PlanNode(level.prefix + name, spec, step, tuple(wires), forms, children)

    def _outer_wires(self, level: Level, name: str) -> list[Wire]:
        """What the bodies of a node read from outside, once."""
        found: dict[str, Wire] = {}
        for body in level.bodies_of(name):
            for key, outer in self._checker.flows[body].outer.items():
                found[key] = _wire(level, key, outer)
        return [*found.values()]

    def _input_name(self, level: Level, name: str, given: str | int) -> str:
        """What the step calls an input: one that is given by its place in a list has the model's name."""
        spec: NodeSpec = level.nodes[name]
        if isinstance(given, str) or spec.MODEL is None:
            return str(given)
        signature = self._checker.models.of(level.prefix + name, spec).signature
        if signature is None:
            text = f"the names of the inputs of node '{name}' are not known: expected {{NAME: REFERENCE}}, got a list"
            self._checker.faults.add("E116", (*level.node_path(name), "inputs"), text)
            return str(given)
        return signature.inputs[given].name

    def _resolved(self, form: Form) -> Form:
        return self._checker.agreement.symbols.form(form)


def _given(flow: Flow, owned: str, needed: Mapping[str | int, bool]) -> list[Wire]:
    """The wires of an owned node: what its owner gives it stands for inputs of a graph."""
    return [
        Wire(str(mine), Source("inputs", str(theirs)), needed=needed[theirs])
        for mine, theirs in flow.taken[owned].items()
    ]


def _wire(level: Level, name: str, traced: Traced) -> Wire:
    origin = traced.origin
    assert origin is not None  # a reference that leads nowhere is a fault
    if origin.level is not level:
        source = Source("inputs", traced.key)
    elif origin.scope == "node":
        source = Source("node", level.prefix + origin.name, traced.tensor)
    else:
        source = Source("inputs", origin.name)
    return Wire(name, source, traced.operations, traced.needed)
