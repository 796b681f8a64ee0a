"""Controllers without an engine: a driver that makes their calls one after the other, and a scope that knows forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ensemble.assembly import assemble
from ensemble.faults import FaultList
from ensemble.forms import UNKNOWN, Form, Symbols
from ensemble.nodes.node import NodeSpec
from ensemble.steps import Array, Assembly, Call, Controller
from remote_ops.errors import RemoteOpsError

Node = Callable[[Mapping[str, Array]], Mapping[str, Array]]


class Run(NamedTuple):
    """What came of a controller: its outputs, the calls it made, what came of each, and how that was put together."""

    outputs: Mapping[str, Any]
    calls: list[Call]
    outcomes: list[Any]
    assembly: Assembly

    def of(self, node: str) -> list[Call]:
        """The calls of one node."""
        return [call for call in self.calls if call.node == node]


def drive(controller: Controller, nodes: Mapping[str, Node], inputs: Mapping[str, Any], wanted: Sequence[str]) -> Run:
    """Make the calls of a controller, each when it is its turn."""
    calls: list[Call] = []
    outcomes: list[Any] = []
    steps, heard = controller.steps(inputs, wanted), None
    while True:
        try:
            asked = steps.send(heard)  # type: ignore[arg-type]
        except StopIteration as stop:
            return Run(assemble(stop.value, outcomes, wanted), calls, outcomes, stop.value)
        heard = []
        for call in asked.calls:
            calls.append(call)
            try:
                outcomes.append(dict(nodes[call.node](call.inputs)))
            except RemoteOpsError as error:
                if call.waits and not asked.tolerate:
                    raise
                outcomes.append(error)
            if call.waits:
                heard.append(outcomes[-1])


class Known:
    """A scope for one node whose inputs and owned nodes have these forms; `body` is a function of the items' forms."""

    def __init__(
        self,
        inputs: Mapping[Any, Form],
        children: Mapping[str, Mapping[str, Form]] | None = None,
        body: Callable[[Mapping[str, Form]], Mapping[str, Form]] | None = None,
    ) -> None:
        self.inputs = inputs
        self.path = ("nodes", "it")
        self.file = "graph.yaml"
        self.faults = FaultList(self.file, {})
        self.symbols = Symbols()
        self.resolve = self.symbols.form
        self._children = children or {}
        self._body = body

    def child(self, name: str) -> Mapping[str, Form]:
        return self._children[name]

    def body(self, name: str, items: Mapping[str, Form]) -> Mapping[str, Form]:
        assert self._body is not None
        return self._body(items)

    def source(self, name: str | int) -> str:
        return f"source.{name}"

    def equal(self, left: Form, left_by: str, right: Form, right_by: str, code: str, path: Any) -> Form:
        if left.dtype and right.dtype and left.dtype != right.dtype:
            self.faults.add(code, path, f"{left_by} is {left}, {right_by} is {right}")
        if left.dims is None or right.dims is None:
            return Form(left.dtype or right.dtype, left.dims or right.dims)
        if len(left.dims) != len(right.dims) or self.symbols.unify(left.dims, left_by, right.dims, right_by):
            self.faults.add(code, path, f"{left_by} is {left}, {right_by} is {right}")
            return left
        dims = zip(left.dims, right.dims, strict=True)
        return Form(left.dtype or right.dtype, tuple([one if one is not None else other for one, other in dims]))


def built(spec: NodeSpec, scope: Known) -> Any:
    """The controller of a spec without a fault."""
    spec.forms(scope.inputs, scope)
    assert not scope.faults.errors, scope.faults.errors
    return spec.step(scope)


def faults_of(spec: NodeSpec, scope: Known) -> list[str]:
    """The codes of a spec's faults, each with its path below the node and its text."""
    spec.forms(scope.inputs, scope)
    return [f"{one.code} {'.'.join(map(str, one.path[2:]))}: {one.text}" for one in scope.faults.all]


def form(text: str) -> Form:
    """A form as it is printed: `float32 [N, 4]`, `float32 [?, 4]`, `string []`, `any`."""
    if text == "any":
        return UNKNOWN
    dtype, _, dims = text.partition(" ")
    sizes = [dim.strip() for dim in dims.strip("[]").split(",") if dim.strip()]
    known = tuple([int(dim) if dim.isdigit() else None if dim == "?" else dim for dim in sizes])
    return Form(None if dtype == "any" else dtype, known)


def forms(**texts: str) -> dict[str, Form]:
    """Forms by name."""
    return {name: form(text) for name, text in texts.items()}


def texts(*values: str | bytes) -> Array:
    """A string tensor `(n,)`."""
    return np.array([*values, None], object)[:-1]


def per_row(function: Callable[..., Any]) -> Node:
    """A node that computes `y`, row by row, and counts in `rows` what it was given."""

    def run(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return {"y": np.asarray(function(**inputs))}

    return run


def chunks(calls: Sequence[Call], name: str) -> Iterator[int]:
    """How many rows of an input each call was given."""
    return (len(call.inputs[name]) for call in calls)
