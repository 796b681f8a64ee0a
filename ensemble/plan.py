"""A graph that is ready to run: what `graph` makes of a document without a fault, and `engine` runs. Constant data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from ensemble.faults import Fault
from ensemble.forms import Form
from ensemble.nodes.node import NodeSpec
from ensemble.steps import Array, Step

__all__ = ["Operation", "Plan", "PlanInput", "PlanNode", "Source", "Wire"]


class Source(NamedTuple):
    """What is read: an input of the graph (`scope` is `inputs`), or an output of a node, by the name we give it."""

    scope: Literal["inputs", "node"]
    name: str
    tensor: str = ""


class Operation(Protocol):
    """What is done to an array on an edge, as `apply:` and `cast:` say; `operations` has them."""

    def run(self, array: Array) -> Array:
        """The result; never written into `array`, but it may be a view of it."""

    def vjp(self, array: Array, result: Array, cotangent: Array) -> Array:
        """The gradient with respect to `array`; raises `NotDifferentiable`."""


class Wire(NamedTuple):
    """One input of a node, or one output of a graph: where it comes from, and what is done to it on the way."""

    name: str
    source: Source
    operations: tuple[Operation, ...] = ()
    needed: bool = True


@dataclass(frozen=True, eq=False)
class PlanNode:
    """One node.

    Args:
        name: as in the document; of a node in the body of a map, the map's name and a slash before it.
        spec: as it is written.
        step: what it does.
        wires: its inputs. Those of a controller that begin with `$` are its own; the others go on to what it owns.
            Those of an owned node read what its owner gives it, as inputs: `Source("inputs", name)`.
        outputs: what it gives, by our names.
        children: the nodes it owns by the names that its calls use; the body of a map is a `Plan`.
    """

    name: str
    spec: NodeSpec
    step: Step
    wires: tuple[Wire, ...]
    outputs: Mapping[str, Form]
    children: Mapping[str, PlanNode | Plan] = field(default_factory=dict)


class PlanInput(NamedTuple):
    """An input of a graph: its form, and what stands in for it where it may be left out (None: it may not).

    An `optional` one without a `default` is `Missing` for those who read it.
    """

    form: Form
    optional: bool = False
    default: Any = None


@dataclass(frozen=True, eq=False)
class Plan:
    """A whole graph, or the body of a map.

    Args:
        name, file, digest: what it is called, where it was read, and the SHA-256 of what was read, in hex.
        inputs: in order. Of a body: the items, and behind them what it reads from outside, named by reference
            (`pre.t`, `$inputs.x`).
        outputs: in order; each a wire from a node or an input.
        output_forms: their forms.
        nodes: in an order in which every node comes after what it reads; owned ones are with their owners.
        deadline_s: for a run, from its start; None for none of its own.
        admission: as the document says.
        warnings: faults that keep nothing from running.
    """

    name: str
    file: str
    digest: str
    inputs: Mapping[str, PlanInput]
    outputs: tuple[Wire, ...]
    output_forms: Mapping[str, Form]
    nodes: Sequence[PlanNode]
    deadline_s: float | None = None
    admission: Any = None
    warnings: tuple[Fault, ...] = ()
