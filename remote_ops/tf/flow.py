"""Which inputs of a TensorFlow graph an output hangs on, and on which it does so in a way that has a derivative.

TensorFlow gives zeros where no gradient comes through a function call, and does not tell whether there is none to
give or whether it lost it, such as in a cast to integers. This tells, from the graph alone; it runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensorflow.python.framework import ops

from remote_ops.tf.vetted import CALLS

__all__ = ["Reach", "reaches"]

# They see only the shape of what goes in.
_SHAPE_ONLY = {"Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike", "TensorListElementShape"}
# Their gradient is declared, and is nothing.
_FLAT = {"Floor", "Ceil", "Round", "Rint", "FloorDiv", "StopGradient", "PreventGradient"}


@dataclass(frozen=True)
class Reach:
    """Sets of inputs, as bits by position: what a tensor hangs on, with a derivative, and with one that is unknown."""

    hangs_on: int = 0
    flows: int = 0
    unknown: int = 0

    def __or__(self, other: Reach) -> Reach:
        return Reach(self.hangs_on | other.hangs_on, self.flows | other.flows, self.unknown | other.unknown)


_NOTHING = Reach()


def reaches(inputs: Sequence[Any], outputs: Sequence[Any], graph: Any, callees: Mapping[str, Any]) -> tuple[Reach, ...]:
    """What each of a graph's outputs hangs on; `callees` are the graphs of functions that it calls, by name.

    Costs a pass over the operations of the graph, and one for each function.
    """
    return _Reaching(callees).of(graph, inputs, outputs)


class _Reaching:
    def __init__(self, callees: Mapping[str, Any]) -> None:
        self._callees = callees
        self._known: dict[str, tuple[Reach, ...]] = {}

    def of(self, graph: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> tuple[Reach, ...]:
        found = {tensor.name: Reach(1 << index, (1 << index) * _carries(tensor)) for index, tensor in enumerate(inputs)}
        sources = set(found)
        operations = graph.get_operations()
        changed = True
        while changed:  # once, and once more for loops of TensorFlow 1
            changed = False
            for operation in operations:
                given = [found.get(tensor.name, _NOTHING) for tensor in operation.inputs]
                if not any(reach.hangs_on for reach in given):
                    continue
                for tensor, reach in zip(operation.outputs, self._through(operation, given), strict=True):
                    if tensor.name not in sources and found.get(tensor.name, _NOTHING) != reach:
                        found[tensor.name] = found.get(tensor.name, _NOTHING) | reach
                        changed = True
        return tuple(found.get(tensor.name, _NOTHING) for tensor in outputs)

    def _through(self, operation: Any, given: Sequence[Reach]) -> list[Reach]:
        """What the outputs of one operation hang on, by what its inputs do."""
        name = str(operation.get_attr("f").name) if operation.type in CALLS else ""
        if name in self._callees:
            return [_composed(reach, given) for reach in self._of_callee(name)]
        together = _NOTHING
        for reach in given:
            together |= reach
        if operation.type in _SHAPE_ONLY:
            together = _NOTHING
        elif not name:
            together = _differentiated(operation, together)
        without = Reach(together.hangs_on)
        return [together if _carries(tensor) else without for tensor in operation.outputs]

    def _of_callee(self, name: str) -> tuple[Reach, ...]:
        if name not in self._known:
            graph = self._callees[name]
            self._known[name] = self.of(graph, graph.inputs, graph.outputs)
        return self._known[name]


def _differentiated(operation: Any, reach: Reach) -> Reach:
    if operation.type in _FLAT:
        return Reach(reach.hangs_on)
    try:
        has_gradient = ops.get_gradient_function(operation) is not None
    except LookupError:
        return Reach(reach.hangs_on, reach.flows, reach.unknown | reach.flows)
    return reach if has_gradient else Reach(reach.hangs_on)


def _composed(reach: Reach, given: Sequence[Reach]) -> Reach:
    """What hangs on arguments that hang on something themselves."""
    hangs_on = flows = unknown = 0
    for index, argument in enumerate(given):
        bit = 1 << index
        if reach.hangs_on & bit:
            hangs_on |= argument.hangs_on
        if reach.flows & bit:
            flows |= argument.flows
            unknown |= argument.unknown
        if reach.unknown & bit:
            unknown |= argument.flows
    return Reach(hangs_on, flows, unknown)


def _carries(tensor: Any) -> bool:
    """Whether a gradient can come through a tensor: floats, and the handles of lists and arrays of them."""
    dtype = tensor.dtype.base_dtype
    return bool(dtype.is_floating or dtype.is_complex) or dtype.name in ("resource", "variant")
