"""The reverse pass over a plan that has run: from cotangents of its outputs to gradients of its inputs.

It works on a record of the forward run; models are asked for their own gradients, all that can at the same time. What
chose a way (a predicate, an accept rule, a weight, a label) is a constant: the gradient is that of the way taken.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ensemble.assembly import gather, scatter
from ensemble.plan import Plan, PlanNode, Source, Wire
from ensemble.slots import Slot
from ensemble.steps import Array, Assembly, Call, Missing, ModelStep, Outcome, Value, is_pure
from ensemble.values import given, node_error
from remote_ops.deadline import Deadline
from remote_ops.errors import DeadlineExceeded, NotDifferentiable, RemoteOpsError
from remote_ops.signature import Signature

__all__ = ["Record", "Steered", "pull", "undifferentiable"]

_LONGEST_S = 1e6  # what a timer of asyncio can still count


class Steered(NamedTuple):
    """What a controller did: its calls, what came of them, what was put together of that; and what each call did."""

    calls: list[Call]
    outcomes: list[Outcome]
    assembly: Assembly
    inner: list[Record | None]


class Record:
    """What the reverse pass needs to know of a run: what each node was given and gave, and what controllers did."""

    def __init__(self) -> None:
        self.inputs: dict[str, Mapping[str, Value]] = {}
        self.outputs: dict[str, Mapping[str, Value]] = {}
        self.steered: dict[str, Steered] = {}
        self.values: dict[Source, Value] = {}
        self.is_constant = False  # whether something stands in for what failed, which has no derivative


# --------------------------------------------------------------------------- what has a derivative


def undifferentiable(plan: Plan) -> dict[str, str]:
    """The inputs of a plan without a gradient, each with the reason; the others have one."""
    stops = _stops(plan)
    found = {}
    for name, spec in plan.inputs.items():
        if not _is_float(spec.form.dtype):
            found[name] = f"it is {spec.form.dtype or 'any'}"
        elif reason := stops.get(Source("inputs", name)):
            found[name] = reason
    return found


def _stops(plan: Plan) -> dict[Source, str]:
    """The tensors from which some way to an output has no derivative, with the reason."""
    stops: dict[Source, str] = {}
    live = {wire.source for wire in plan.outputs if _is_float(plan.output_forms[wire.name].dtype)}
    for node in reversed(plan.nodes):
        mine = [name for name, form in node.outputs.items() if _is_float(form.dtype)]
        outgoing = [source for name in mine if (source := Source("node", node.name, name)) in live]
        if not outgoing:
            continue
        reason = next((stops[source] for source in outgoing if source in stops), None)
        for wire in node.wires:
            if _is_own(wire):
                continue
            own = _stop_of(node, wire.name)
            if own != "":
                live.add(wire.source)
                if own or reason:
                    stops.setdefault(wire.source, own or reason or "")
    return stops


def _stop_of(node: PlanNode, name: str) -> str | None:
    """Why there is no gradient by an input of a node: None if there is one, "" if it is no float."""
    step = node.step
    if isinstance(step, ModelStep):
        try:
            signature = step.servable.signature
        except RemoteOpsError:  # a graph may be loaded while a server is down
            return f"node '{node.name}' does not say what it can do"
        spec = next(spec for spec in signature.inputs if spec.name == name)
        if not spec.is_float:
            return ""
        return None if spec.differentiable else f"node '{node.name}' gives no gradient of '{name}'"
    reasons = [_stop_in(child, name) for child in node.children.values()]
    return _first(reasons) if reasons else None


def _first(reasons: Sequence[str | None]) -> str | None:
    """The first that is told; None if there is none but some way has a gradient."""
    told = [reason for reason in reasons if reason]
    return told[0] if told else "" if all(reason == "" for reason in reasons) else None


def _stop_in(child: PlanNode | Plan, name: str) -> str | None:
    if isinstance(child, PlanNode):  # an owned node need not take all that its owner is given, nor by that name
        taken = [wire.name for wire in child.wires if wire.source.name == name and not _is_own(wire)]
        return _first([_stop_of(child, one) for one in taken])
    if name not in child.inputs or not _is_float(child.inputs[name].form.dtype):
        return ""
    return undifferentiable(child).get(name)


def _is_own(wire: Wire) -> bool:
    """Whether a controller decides by it, and does not give it on; what a body reads from outside is `$inputs.x`."""
    return wire.name.startswith("$") and not wire.name.startswith("$inputs.")


def _is_float(dtype: str | None) -> bool:
    return dtype is None or "float" in dtype


# --------------------------------------------------------------------------- the pass


async def pull(
    plan: Plan,
    record: Record,
    cotangents: Mapping[str, Array],
    wanted: Collection[str],
    bound: Deadline,
    engine: Any,
    run: Any,
) -> dict[str, Array]:
    """The gradients of the inputs wanted; zeros where nothing of an input reached an output that has a cotangent.

    `run` is what the places at nodes with `max_inflight` are taken for: the same as in the forward pass.
    """
    found = await _Pull(plan, record, bound, engine, run).run(cotangents, wanted)
    gradients = {}
    for name in wanted:
        given = record.values[Source("inputs", name)]
        gradient = found.get(Source("inputs", name))
        if not isinstance(given, Missing):
            gradients[name] = np.zeros_like(given) if gradient is None else np.asarray(gradient, given.dtype)
    return gradients


class _Pull:
    """One reverse pass over one plan."""

    def __init__(self, plan: Plan, record: Record, bound: Deadline, engine: Any, run: Any) -> None:
        self._plan = plan
        self._record = record
        self._bound = bound
        self._engine = engine
        self._run = run
        self._found: dict[Source, Array] = {}

    async def run(self, cotangents: Mapping[str, Array], wanted: Collection[str]) -> dict[Source, Array]:
        for wire in self._plan.outputs:
            if wire.name in cotangents:
                self._back(wire, cotangents[wire.name])
        live = self._live(wanted)
        tasks: dict[str, asyncio.Future[None]] = {}
        try:
            for node in reversed(self._plan.nodes):
                if node.name in live and node.name in self._record.inputs:
                    readers = [task for name, task in tasks.items() if self._reads(name, node.name)]
                    tasks[node.name] = asyncio.ensure_future(self._node(node, live, readers))
            await self._all(tasks)
        finally:
            for task in tasks.values():
                task.cancel()
                task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._found

    async def _all(self, tasks: Mapping[str, asyncio.Future[None]]) -> None:
        if not tasks:
            return
        left_s = min(max(0.0, self._bound.remaining()), _LONGEST_S)
        done, late = await asyncio.wait(tasks.values(), timeout=left_s, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks.values():
            if task in done:
                task.result()
        if late:
            names = ", ".join(f"'{name}'" for name, task in tasks.items() if task in late)
            raise DeadlineExceeded(f"no gradients from '{self._plan.name}' in time: waiting for {names}")

    def _live(self, wanted: Collection[str]) -> set[str]:
        """The nodes on a way from an input wanted."""
        live: set[str] = set()
        for node in self._plan.nodes:
            for wire in node.wires:
                source = wire.source
                if (source.name in live) if source.scope == "node" else (source.name in wanted):
                    live.add(node.name)
        return live

    def _reads(self, reader: str, name: str) -> bool:
        node = next(node for node in self._plan.nodes if node.name == reader)
        return any(wire.source.scope == "node" and wire.source.name == name for wire in node.wires)

    async def _node(self, node: PlanNode, live: set[str], readers: Sequence[asyncio.Future[None]]) -> None:
        if readers:
            await asyncio.gather(*readers)
        outputs = self._record.outputs[node.name]
        cotangents = {
            name: self._found.pop(source)
            for name in outputs
            if (source := Source("node", node.name, name)) in self._found
        }
        if not cotangents or any(isinstance(outputs[name], Missing) for name in cotangents):
            return
        inputs = self._record.inputs[node.name]
        wires = [
            wire
            for wire in node.wires
            if not _is_own(wire)
            and not isinstance(inputs[wire.name], Missing)
            and (wire.source.scope == "inputs" or wire.source.name in live)
        ]
        steered = self._record.steered.get(node.name)
        names = [wire.name for wire in wires]
        try:
            gradients = await self.vjp(node, inputs, outputs, cotangents, names, steered)
        except (NotDifferentiable, DeadlineExceeded):
            raise
        except Exception as error:
            raise node_error(node, self._plan.name, error) from error
        for wire in wires:
            if wire.name in gradients:
                self._back(wire, gradients[wire.name])

    def _back(self, wire: Wire, cotangent: Array) -> None:
        """Take a cotangent back over an edge, and add it to those of its source."""
        first = self._record.values[wire.source]
        if isinstance(first, Missing):
            return
        values = [first]
        for operation in wire.operations:
            values.append(operation.run(values[-1]))
        for operation, array, result in zip(wire.operations[::-1], values[-2::-1], values[:0:-1], strict=True):
            cotangent = operation.vjp(array, result, cotangent)
        before = self._found.get(wire.source)
        self._found[wire.source] = cotangent if before is None else before + cotangent

    async def vjp(
        self,
        node: PlanNode,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        cotangents: Mapping[str, Array],
        wanted: Sequence[str],
        steered: Steered | None,
    ) -> dict[str, Array]:
        """The gradients of a node by its inputs."""
        step: Any = node.step
        if is_pure(step):
            return step.vjp(inputs, outputs, cotangents)
        slots = self._engine.slots(node)
        async with contextlib.nullcontext() if slots is None else slots.taken(self._run, self._bound) as slot:
            if steered is not None:
                return await self._of_controller(node, inputs, cotangents, wanted, steered)
            return await self._of_model(node, step, inputs, cotangents, wanted, slot)

    async def _of_model(
        self,
        node: PlanNode,
        step: ModelStep,
        inputs: Mapping[str, Any],
        cotangents: Mapping[str, Array],
        wanted: Any,
        slot: Slot | None,
    ) -> dict[str, Array]:
        signature: Signature = step.servable.signature
        floats = [spec.name for spec in signature.inputs if spec.name in wanted and spec.is_float]
        lacking = [spec.name for spec in signature.inputs if spec.name in floats and not spec.differentiable]
        if lacking:
            raise NotDifferentiable(f"node '{node.name}' gives no gradient of '{lacking[0]}'")
        if not floats:
            return {}
        given = {f"cotangent:{step.renames.get(name, name)}": array for name, array in cotangents.items()}
        names, request = [f"gradient:{name}" for name in floats], {**inputs, **given}
        if node.spec.batching is not None:
            found = await self._engine.batches(node).infer(request, names, self._bound)
        else:
            found = await self._engine.model(node, request, names, self._bound, slot)
        return {name: found[f"gradient:{name}"] for name in floats}

    async def _of_controller(
        self, node: PlanNode, inputs: Mapping[str, Any], cotangents: Mapping[str, Array], wanted: Any, done: Steered
    ) -> dict[str, Array]:
        calls = scatter(done.assembly, done.calls, cotangents)
        jobs = [
            self._of_call(node.children[call.node], call, outcome, come, wanted, inner) if come else _nothing()
            for call, outcome, come, inner in zip(done.calls, done.outcomes, calls, done.inner, strict=True)
        ]
        return gather(done.calls, await asyncio.gather(*jobs), inputs)

    async def _of_call(
        self,
        child: PlanNode | Plan,
        call: Call,
        outcome: Outcome,
        cotangents: Mapping[str, Array],
        wanted: Collection[str],
        inner: Record | None,
    ) -> dict[str, Array]:
        assert not isinstance(outcome, Exception)
        if inner is not None and inner.is_constant:
            return {}
        names = [name for name in call.inputs if name in wanted]
        if isinstance(child, Plan):
            assert inner is not None
            return await pull(child, inner, cotangents, names, self._bound, self._engine, self._run)
        steered = inner.steered.get(child.name) if inner is not None else None
        sources = {wire.name: wire.source.name for wire in child.wires if wire.source.name in names}
        inputs = given(child, call.inputs)
        found = await self.vjp(child, inputs, outcome, cotangents, list(sources), steered)
        return {sources[name]: gradient for name, gradient in found.items() if name in sources}


async def _nothing() -> dict[str, Array]:
    return {}
