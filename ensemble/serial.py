"""Runs a plan one node after the other: the oracle that the engine is held against, and the shortest way to read it.

No concurrency, no deadline, and nothing is left out: every node runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ensemble.assembly import assemble
from ensemble.plan import Plan, PlanNode, Source
from ensemble.steps import Array, Call, Missing, ModelStep, Value, is_pure
from ensemble.values import Sizes, bind, given, guarded, node_error, read, rows_of, stand_in
from remote_ops.errors import NodeError

__all__ = ["run_serial"]


def run_serial(plan: Plan, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Value]:
    """The outputs named (None: all) of a graph, by the plainest means."""
    values, sizes = bind(plan, inputs)
    for node in plan.nodes:
        arrays = {wire.name: read(wire, values) for wire in node.wires}
        values |= {Source("node", node.name, name): value for name, value in _run(plan, node, arrays, sizes).items()}
    return {wire.name: read(wire, values) for wire in plan.outputs if outputs is None or wire.name in outputs}


def _run(plan: Plan, node: PlanNode, inputs: dict[str, Value], sizes: Sizes) -> Mapping[str, Value]:
    gone = [value for wire in node.wires if wire.needed and isinstance(value := inputs[wire.name], Missing)]
    if gone:
        return dict.fromkeys(node.outputs, gone[0])
    try:
        return _step(plan, node, guarded(node, inputs), tuple(node.outputs), sizes)
    except Exception as error:
        return stand_in(node, node_error(node, plan.name, error), sizes)


def _step(plan: Plan, node: PlanNode, inputs: Any, wanted: Sequence[str], sizes: Sizes) -> Mapping[str, Value]:
    step: Any = node.step
    if isinstance(step, ModelStep):
        theirs = {name: step.renames.get(name, name) for name in wanted}
        results = step.servable.infer(inputs, tuple(theirs.values()), config=step.config)
        return {name: results[there] for name, there in theirs.items()}
    if is_pure(step):
        return step.run(inputs, wanted)
    outcomes: list[Any] = []
    generator, heard = step.steps(inputs, wanted), None
    while True:
        try:
            asked = generator.send(heard)
        except StopIteration as stop:
            return assemble(stop.value, outcomes, wanted)
        heard = []
        for call in asked.calls:
            outcome = _call(plan, node, call, sizes, tolerate=asked.tolerate or not call.waits)
            outcomes.append(outcome)
            heard += [outcome] if call.waits else []


def _call(plan: Plan, node: PlanNode, call: Call, sizes: Sizes, *, tolerate: bool) -> Any:
    child = node.children[call.node]
    try:
        if isinstance(child, Plan):
            return run_serial(child, call.inputs, call.wanted)
        return _step(plan, child, guarded(child, given(child, call.inputs)), call.wanted or tuple(child.outputs), sizes)
    except Exception as error:
        owner = node if isinstance(child, Plan) else child
        failed = node_error(owner, plan.name, error)
        try:
            if isinstance(child, Plan):
                raise failed
            return stand_in(child, failed, sizes, rows_of(call))
        except NodeError as final:
            if tolerate:
                return final
            raise
