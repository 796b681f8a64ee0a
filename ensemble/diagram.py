"""What there is to draw of a plan: boxes, boxes in boxes, and arrows with what flows over them.

It chooses what is said; where that goes and how it looks is decided in `mermaid` and `svg`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ensemble.forms import UNKNOWN, Form
from ensemble.latency import Latency
from ensemble.nodes.node import NodeSpec
from ensemble.plan import Plan, PlanInput, PlanNode, Source, Wire

__all__ = ["Arrow", "Box", "Diagram", "diagram_of"]

_LONGEST = 44  # of a line in a box, in letters


class Box(NamedTuple):
    """One thing: an input, an output or a node.

    Args:
        key: what arrows call it; no two boxes of a whole diagram have one.
        kind: `input`, `output`, or the kind of node.
        title: its name.
        lines: what else is said of it.
        role: for an owned node, when its owner uses it: `if < 13`, `stage 1`.
        optional: whether it may be left out, or is run only when its owner says so.
        inside: what it owns.
    """

    key: str
    kind: str
    title: str
    lines: tuple[str, ...] = ()
    role: str = ""
    optional: bool = False
    inside: Diagram | None = None


class Arrow(NamedTuple):
    """Something that flows from a box to another: what it is, what is done to it on the way, and if it may be missing.

    Arrows of one source with one label are one thing that several boxes read.
    """

    source: str
    target: str
    label: str
    operations: str = ""
    optional: bool = False


class Diagram(NamedTuple):
    """A graph, or what a node owns."""

    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...] = ()


def diagram_of(plan: Plan, latencies: Mapping[str, Latency] | None = None) -> Diagram:
    """The whole of a plan.

    Args:
        plan: the graph, checked.
        latencies: how long each node took, by the names that a trace has for them; they are said where they are known.
    """
    return _Drawing(latencies or {}).plan(plan, "")


class _Drawing:
    def __init__(self, latencies: Mapping[str, Latency]) -> None:
        self._latencies = latencies

    def plan(self, plan: Plan, prefix: str) -> Diagram:
        inputs = [_input(f"{prefix}$inputs.{name}", name, given) for name, given in plan.inputs.items()]
        nodes = [self.node(node, prefix) for node in plan.nodes]
        outputs = [Box(f"{prefix}$outputs.{wire.name}", "output", wire.name) for wire in plan.outputs]
        return Diagram((*inputs, *nodes, *outputs), tuple(_arrows(plan, prefix)))

    def node(self, node: PlanNode, prefix: str, role: str = "", *, owned: bool = False) -> Box:
        key = f"{prefix}{_own_name(node)}"
        inside = self.inside(node, f"{key}/") if node.children else None
        lines = (*_lines_of(node.spec), *self._took(key))
        return Box(key, node.spec.kind, _own_name(node), lines, role, owned, inside)

    def inside(self, node: PlanNode, prefix: str) -> Diagram:
        roles = _ROLES.get(node.spec.kind, _no_roles)(node.spec)
        boxes: list[Box] = []
        arrows: list[Arrow] = []
        for name, child in node.children.items():
            if isinstance(child, PlanNode):
                boxes.append(self.node(child, prefix, roles.get(name, ""), owned=True))
            else:
                body = self.plan(child, prefix)
                boxes += body.boxes
                arrows += body.arrows
        return Diagram(tuple(boxes), tuple(arrows))

    def _took(self, key: str) -> tuple[str, ...]:
        return (str(self._latencies[key]),) if key in self._latencies else ()


def _own_name(node: PlanNode) -> str:
    """Its name, without that of the map it is in."""
    return node.name.rpartition("/")[2]


# --------------------------------------------------------------------------- boxes


def _input(key: str, name: str, given: PlanInput) -> Box:
    default = () if given.default is None else (f"default {given.default}",)
    return Box(key, "input", name, default, optional=given.optional)


def _lines_of(spec: NodeSpec) -> tuple[str, ...]:
    what = next((str(found) for key in ("what", "method") if (found := getattr(spec, key, None))), "")
    replicas = len(getattr(spec, "urls", ())) - 1
    text = f"{_short(what)} +{replicas}" if replicas > 0 else _short(what)
    failing = "" if spec.on_error == "fail" else _on_error(spec.on_error)
    return tuple([line for line in (text, _over(spec), failing) if line])


def _on_error(on_error: Any) -> str:
    return f"on error: {on_error if isinstance(on_error, str) else on_error.default}"


def _over(spec: Any) -> str:
    if spec.kind == "map":
        return _short(f"over {', '.join(spec.over)}") if hasattr(spec, "over") else ""
    if spec.kind == "switch" and hasattr(spec, "select"):
        return _short(f"on {spec.select.from_}, per {spec.scope}")
    return ""


def _short(text: str) -> str:
    half = (_LONGEST - 3) // 2
    return text if len(text) <= _LONGEST else f"{text[:half]}...{text[-half:]}"


# --------------------------------------------------------------------------- when an owned node is used


def _no_roles(spec: Any) -> dict[str, str]:
    return {}


def _switch_roles(spec: Any) -> dict[str, str]:
    roles: dict[str, list[str]] = {}
    for case in spec.cases:
        roles.setdefault(case.use, []).append(f"if {case.if_}")
    if spec.default is not None:
        roles.setdefault(spec.default, []).append("default")
    return {name: ", ".join(said) for name, said in roles.items()}


def _cascade_roles(spec: Any) -> dict[str, str]:
    return {
        stage.use: f"stage {number}, cost {stage.cost:g}{_accepted(stage.accept)}"
        for number, stage in enumerate(spec.stages, 1)
    }


def _accepted(accept: Any) -> str:
    signs = {"gte": ">=", "gt": ">", "lte": "<=", "lt": "<"}
    bounds = [f"{sign} {bound:g}" for key, sign in signs.items() if (bound := getattr(accept, key, None)) is not None]
    return f", until {accept.score} {' and '.join(bounds)}" if bounds else ""


def _split_roles(spec: Any) -> dict[str, str]:
    total = sum(spec.weights.values()) or 1
    roles = {name: f"{100 * weight / total:g} %" for name, weight in spec.weights.items()}
    if spec.mirror is not None:
        roles[spec.mirror.to] = f"mirror, {100 * spec.mirror.sample:g} %"
    return roles


def _fallback_roles(spec: Any) -> dict[str, str]:
    return {name: f"try {number}" for number, name in enumerate(spec.try_, 1)}


_ROLES: Mapping[str, Callable[[Any], dict[str, str]]] = {
    "switch": _switch_roles,
    "cascade": _cascade_roles,
    "split": _split_roles,
    "fallback": _fallback_roles,
}

# --------------------------------------------------------------------------- arrows


def _arrows(plan: Plan, prefix: str) -> Iterator[Arrow]:
    forms = {(_last(node.name), name): form for node in plan.nodes for name, form in node.outputs.items()}
    for node in plan.nodes:
        yield from _into(f"{prefix}{_own_name(node)}", node.wires, plan, forms, prefix)
    for wire in plan.outputs:
        yield from _into(f"{prefix}$outputs.{wire.name}", [wire], plan, forms, prefix)


def _into(
    target: str, wires: Sequence[Wire], plan: Plan, forms: Mapping[tuple[str, str], Form], prefix: str
) -> Iterator[Arrow]:
    """The arrows into a box, one for each tensor however often it is read."""
    found: dict[tuple[str, str, str], bool] = {}
    for wire in wires:
        key = (_key_of(wire.source, prefix), _label(wire.source, plan, forms), ", ".join(map(str, wire.operations)))
        found[key] = found.get(key, True) and not wire.needed
    for (source, label, operations), optional in found.items():
        yield Arrow(source, target, label, operations, optional)


def _key_of(source: Source, prefix: str) -> str:
    return f"{prefix}$inputs.{source.name}" if source.scope == "inputs" else f"{prefix}{_last(source.name)}"


def _label(source: Source, plan: Plan, forms: Mapping[tuple[str, str], Form]) -> str:
    if source.scope == "inputs":
        return _form(plan.inputs[source.name].form)
    return f"{source.tensor}: {_form(forms.get((_last(source.name), source.tensor), UNKNOWN))}"


def _form(form: Form) -> str:
    """The form without the symbols that nobody wrote."""
    if form.dims is None:
        return str(form)
    dims = [dim if isinstance(dim, int) or (dim or "").isidentifier() else None for dim in form.dims]
    return str(form._replace(dims=tuple(dims)))


def _last(name: str) -> str:
    return name.rpartition("/")[2]
