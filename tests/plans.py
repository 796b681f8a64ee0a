"""Plans put together by hand, without YAML: for tests of what runs them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemble.forms import Form
from ensemble.nodes.node import NodeSpec
from ensemble.plan import Plan, PlanInput, PlanNode, Source, Wire
from ensemble.steps import ModelStep, Step
from remote_ops import FunctionServable, Servable, TensorSpec

Array = npt.NDArray[Any]

ROWS = Form("float32", ("N", 4))


class Plain(NodeSpec):
    """What a node says that says no more than every node may."""

    kind: str = "plain"
    quorum: Any = None


def source(reference: str) -> Source:
    """`$inputs.x` or `node.tensor`."""
    node, _, tensor = reference.partition(".")
    return Source("inputs", tensor) if node == "$inputs" else Source("node", node, tensor or "y")


def wire(name: str, reference: str, *operations: Any, needed: bool = True) -> Wire:
    return Wire(name, source(reference), operations, needed)


def function(
    fn: Callable[..., Any], inputs: Sequence[str] = ("x",), outputs: Sequence[str] = ("y",), vjp: Any = None
) -> FunctionServable:
    """A model of float32 [-1, 4] all over."""
    takes = [TensorSpec(name, "float32", (-1, 4), differentiable=vjp is not None) for name in inputs]
    return FunctionServable(fn, takes, [TensorSpec(name, "float32", (-1, 4)) for name in outputs], vjp=vjp)


def node(
    name: str,
    step: Step | Servable | Callable[..., Any],
    reads: Mapping[str, str] | str = "$inputs.x",
    *,
    place: str = "inline",
    outputs: Mapping[str, Form] | None = None,
    children: Sequence[PlanNode] | Mapping[str, Any] = (),
    wires: Sequence[Wire] | None = None,
    **spec: Any,
) -> PlanNode:
    """A node; `step` may be a servable, or a function of its inputs that gives `y`."""
    given = {"x": reads} if isinstance(reads, str) else reads
    if not isinstance(step, ModelStep) and not hasattr(step, "run") and not hasattr(step, "steps"):
        servable: Any = step if hasattr(step, "infer") else function(step, tuple(given))  # type: ignore[arg-type]
        step = ModelStep(servable, {}, place)
    made = children if isinstance(children, Mapping) else {child.name: child for child in children}
    found = tuple(wire(name, reference) for name, reference in given.items()) if wires is None else tuple(wires)
    return PlanNode(name, Plain(**spec), step, found, outputs or {"y": ROWS}, made)  # type: ignore[arg-type]


def plan(
    *nodes: PlanNode,
    inputs: Mapping[str, Form | PlanInput] | None = None,
    outputs: Mapping[str, str] | str | None = None,
    **more: Any,
) -> Plan:
    """A graph of nodes in an order in which they can run; its output is that of the last one."""
    takes = {"x": ROWS} if inputs is None else inputs
    gives = {"y": outputs} if isinstance(outputs, str) else outputs or {"y": f"{nodes[-1].name}.y"}
    forms = {(one.name, tensor): form for one in nodes for tensor, form in one.outputs.items()}
    put = {name: form if isinstance(form, PlanInput) else PlanInput(form) for name, form in takes.items()}
    found = tuple(wire(name, reference) for name, reference in gives.items())
    return Plan(
        name="graph",
        file="graph.yaml",
        digest=hashlib.sha256(repr(gives).encode()).hexdigest(),
        inputs=put,
        outputs=found,
        output_forms={
            one.name: put[one.source.name].form
            if one.source.scope == "inputs"
            else forms[one.source.name, one.source.tensor]
            for one in found
        },
        nodes=nodes,
        **more,
    )


def rows(count: int = 3, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
