"""The tensors of a run: how its inputs are bound, an edge is read, and what stands in for a node that failed.

It decides nothing about when; `serial` and `engine` run plans with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from ensemble.forms import Dim, Form
from ensemble.nodes.node import Default
from ensemble.plan import Plan, PlanInput, PlanNode, Source, Wire
from ensemble.steps import Array, Call, Missing, ModelStep, Value
from remote_ops.errors import NodeError, RemoteOpsError, SignatureError
from remote_ops.signature import DTYPES, describe

__all__ = ["Sizes", "Values", "bind", "given", "guarded", "node_error", "read", "read_only", "rows_of", "stand_in"]

Values: TypeAlias = "dict[Source, Value]"
Sizes: TypeAlias = "dict[str, int]"  # what the symbols of a graph are in one run


def bind(plan: Plan, inputs: Mapping[str, Array]) -> tuple[Values, Sizes]:
    """The inputs of a run as values, and what they make of the symbols; those left out have their default.

    Raises:
        SignatureError: one is missing or unknown, or its dtype or shape does not fit, or a symbol gets two sizes.
    """
    for name in inputs:
        if name not in plan.inputs:
            raise SignatureError(f"no input '{name}': expected {', '.join(plan.inputs)}", name=name)
    sizes: Sizes = {}
    bound_by: dict[str, str] = {}
    for name, array in inputs.items():
        _check(name, array, plan.inputs[name].form, sizes, bound_by, plan.name)
    values: Values = {}
    for name, spec in plan.inputs.items():
        values[Source("inputs", name)] = inputs[name] if name in inputs else _left_out(name, spec, sizes)
    return values, sizes


def _check(name: str, array: Array, form: Form, sizes: Sizes, bound_by: dict[str, str], graph: str) -> None:
    dtype = form.dtype and DTYPES[form.dtype].numpy
    if (dtype and array.dtype != dtype) or (form.dims is not None and array.ndim != len(form.dims)):
        raise _unfit(name, form, array, graph)
    for axis, dim in enumerate(form.dims or ()):
        size = array.shape[axis]
        if isinstance(dim, int) and size != dim:
            raise _unfit(name, form, array, graph)
        if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
            raise SignatureError(
                f"input '{name}': {dim} is {sizes[dim]} by '{bound_by[dim]}', {size} by this {describe(array)}"
                f" - at {graph}",
                name=name,
                expected=str(form),
                got=describe(array),
            )
        if isinstance(dim, str):
            bound_by.setdefault(dim, name)


def _unfit(name: str, form: Form, array: Array, graph: str) -> SignatureError:
    got = describe(array)
    return SignatureError(
        f"input '{name}': expected {form}, got {got} - at {graph}", name=name, expected=str(form), got=got
    )


def _left_out(name: str, spec: PlanInput, sizes: Sizes) -> Value:
    if not spec.optional:
        raise SignatureError(f"input '{name}' is missing: expected {spec.form}", name=name)
    if spec.default is None:
        return Missing(f"$inputs.{name}", "it was left out")
    return _full(spec.form, spec.default, sizes)


def _full(form: Form, value: Any, sizes: Sizes, rows: int | None = None) -> Array:
    shape = [rows if rows is not None and not axis else _size(dim, sizes) for axis, dim in enumerate(form.dims or ())]
    if form.dtype == "string":
        value = value.encode() if isinstance(value, str) else value
    return np.full(shape, value, DTYPES[form.dtype or "float32"].numpy)


def _size(dim: Dim, sizes: Sizes) -> int:
    size = sizes.get(dim) if isinstance(dim, str) else dim
    if size is None:
        raise SignatureError(f"a default has no shape: '{dim or '?'}' has no size in this run")
    return size


def read(wire: Wire, values: Values) -> Value:
    """What an edge brings: the value it comes from, after what is done to it on the way."""
    value = values[wire.source]
    if isinstance(value, Missing):
        return value
    for operation in wire.operations:
        value = operation.run(value)
    return value


def given(node: PlanNode, inputs: Mapping[str, Value]) -> dict[str, Value]:
    """What an owned node reads of what its owner gives it."""
    values: Values = {Source("inputs", name): value for name, value in inputs.items()}
    return {wire.name: read(wire, values) for wire in node.wires}


def read_only(array: Array) -> Array:
    """A view that cannot be written to."""
    view: Array = array.view()
    view.flags.writeable = False
    return view


def guarded(node: PlanNode, inputs: dict[str, Value]) -> dict[str, Value]:
    """What an owned node is given, if its code may write into that: copies, since its owner has given out views."""
    step = node.step
    if not isinstance(step, ModelStep) or step.mutates is None:
        return inputs
    return {
        name: value if isinstance(value, Missing) else value.copy() if step.mutates else read_only(value)
        for name, value in inputs.items()
    }


def stand_in(node: PlanNode, error: NodeError, sizes: Sizes, rows: int | None = None) -> Mapping[str, Value]:
    """What `on_error` gives for a node that failed, of `rows` rows if it was given some; raises the error if it says
    `fail`, or if its default does not fit.
    """
    if node.spec.on_error == "fail":
        raise error
    if isinstance(node.spec.on_error, Default):
        default = node.spec.on_error.default
        try:
            return {name: _full(form, default, sizes, rows) for name, form in node.outputs.items()}
        except (SignatureError, ValueError, TypeError, OverflowError) as misfit:
            text = f"{error}; nor can its default {default!r} stand in: {misfit}"
            raise NodeError(text, node=error.node, graph=error.graph) from error.__cause__
    return {name: Missing(node.name, _words(error.__cause__ or error)) for name in node.outputs}


def rows_of(call: Call) -> int | None:
    """How many rows an owned node was given; None if it was given all, or none have been cut."""
    return len(call.inputs[call.cut[0]]) if call.cut else None


def node_error(node: PlanNode, graph: str, error: BaseException) -> NodeError:
    """The error of a node, whose `__cause__` is what happened there; that of a node in a graph or body names both."""
    if isinstance(error, NodeError) and error.graph == graph and node.spec.kind != "graph":
        return error
    what = _words(error) if isinstance(error, RemoteOpsError) else f"{type(error).__name__}: {_words(error)}"
    made = NodeError(f"node '{node.name}' of '{graph}' ({node.spec.kind}) failed: {what}", node=node.name, graph=graph)
    made.__cause__ = error
    return made


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # anybody's exceptions may come here
        return "it does not say what"
