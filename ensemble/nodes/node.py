"""What every kind of node has in common: how it is written, what it reads and owns, what it is asked while checked.

It knows no kind. A kind is a `NodeSpec` with four answers: which edges it has, which nodes it owns, what comes out of
it given what goes in, and the step it becomes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ensemble.faults import Path, meant
from ensemble.forms import Form
from ensemble.steps import Step
from remote_ops.servable import Servable
from remote_ops.signature import DTYPES

if TYPE_CHECKING:
    from ensemble.faults import FaultList

__all__ = [
    "Batching",
    "BodyAt",
    "Bytes",
    "Default",
    "Edge",
    "EdgeAt",
    "Inputs",
    "Model",
    "NodeSpec",
    "Owned",
    "Reference",
    "Scope",
    "Seconds",
    "Share",
    "TensorText",
    "reference_of",
]

# --------------------------------------------------------------------------- values as they are written


class Model(BaseModel):
    """A part of the document: frozen, and a key that it does not know is a fault.

    The docstring below a field is its description in the JSON Schema. A validator that raises a
    `PydanticCustomError` whose type is a code of `faults.CODES` notes a fault of that code, any other one `E101`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )


_LENGTHS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_SIZES = {
    "B": 1,
    **{f"{u}B": 1000**i for i, u in enumerate("kMGT", 1)},
    **{f"{u}iB": 1024**i for i, u in enumerate("KMGT", 1)},
}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z%]*)\s*")


def _measured(value: Any, units: Mapping[str, float], what: str, bare: float | None) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and bare is not None and value >= 0:
        return float(value) * bare
    found = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if found is None or found[2] not in units:
        raise ValueError(f"expected {what}, got {value!r}")
    return float(found[1]) * units[found[2]]


def _seconds(value: Any) -> float:
    return _measured(value, _LENGTHS, "a length such as 150ms, 2s or 1min", None)


def _bytes(value: Any) -> int:
    return int(_measured(value, _SIZES, "a size such as 512MiB or 2GiB", 1.0))


def _share(value: Any) -> float:
    return _measured(value, {"%": 0.01}, "a share such as 5% or 0.05", 1.0)


Seconds = Annotated[float, BeforeValidator(_seconds, json_schema_input_type=str)]
Bytes = Annotated[int, BeforeValidator(_bytes, json_schema_input_type=int | str)]
Share = Annotated[float, BeforeValidator(_share, json_schema_input_type=float | str)]


class Reference(NamedTuple):
    """What a reference means: `$inputs.NAME` (scope `inputs`), `$item.NAME` (scope `item`, in the body of a map),
    `node.tensor`, or `node` alone, whose only output is meant (`tensor` is None).
    """

    scope: Literal["inputs", "item", "node"]
    name: str
    tensor: str | None

    def __str__(self) -> str:
        if self.scope != "node":
            return f"${self.scope}.{self.name}"
        return self.name if self.tensor is None else f"{self.name}.{self.tensor}"


_NAME = r"[A-Za-z_][A-Za-z0-9_-]*"
_SYMBOL = r"[A-Za-z_][A-Za-z0-9_]*"
_TENSOR = r"[^\s$][^\s]*"  # models name their tensors as they please
_REFERENCE = re.compile(rf"\$(?P<scope>inputs|item)\.(?P<input>{_NAME})|(?P<node>{_NAME})(\.(?P<tensor>{_TENSOR}))?")


def reference_of(text: str) -> Reference | None:
    """Read a reference; None if it is none."""
    found = _REFERENCE.fullmatch(text)
    if found is None:
        return None
    if found["scope"]:
        return Reference(found["scope"], found["input"], None)  # type: ignore[arg-type]
    return Reference("node", found["node"], found["tensor"])


def _reference(value: Any) -> Any:
    if not isinstance(value, str) or reference_of(value) is None:
        hint = meant(str(value).partition(".")[0], ("$inputs", "$item"))
        raise ValueError(
            "expected a reference: node.tensor, node, $inputs.NAME or $item.NAME, "
            f"got {value!r}{hint if hint.startswith(';') else ''}"
        )
    return value


class Edge(Model):
    """Where an input comes from, and what is done to it on the way: `cast` after `apply`."""

    from_: Annotated[str, BeforeValidator(_reference)] = Field(alias="from")
    """What is read: `node.tensor`, `node` (its only output), `$inputs.NAME` or, in the body of a map, `$item.NAME`."""
    apply: str | dict[str, Any] | list[str | dict[str, Any]] | None = None
    """What is done to it on the way: an operation such as `softmax` or `{softmax: {axis: 1}}`, or a list of them."""
    cast: str | None = None
    """The dtype that it is turned into, after `apply`."""

    @property
    def source(self) -> Reference:
        """What it refers to."""
        found = reference_of(self.from_)
        assert found is not None
        return found


def _edge(value: Any) -> Any:
    if isinstance(value, str):
        return {"from": value}
    if not isinstance(value, dict | Edge):
        raise ValueError(f"expected a reference such as node.tensor, or {{from: node.tensor, ...}}, got {value!r}")
    return value


EdgeText = Annotated[Edge, BeforeValidator(_edge, json_schema_input_type=str | Edge)]
Inputs = dict[str, EdgeText] | list[EdgeText]  # by name, or in the order of the model's


def _dtype(value: str) -> str:
    if value in DTYPES:
        return value
    known = ", ".join(DTYPES)
    try:
        np.dtype(value)
    except (TypeError, ValueError, SyntaxError):  # numpy reads "f4,,f4" as Python
        pass
    else:
        if not meant(value, DTYPES).startswith(";"):
            raise PydanticCustomError("E108", f"dtype '{value}' has no form here: expected one of {known}")
    raise ValueError(f"expected a dtype, got {value!r}{meant(value, DTYPES)}")


def _dim(value: int | str) -> int | str:
    fits = value >= -1 if isinstance(value, int) else value == "?" or re.fullmatch(_SYMBOL, value)
    if not fits:
        raise ValueError(f"expected a size, a name for one, or ? or -1 for any size, got {value!r}")
    return value


class TensorText(Model):
    """A tensor as it is declared: dtype and shape, whose dims are sizes, symbols, or `?` and -1 for any size."""

    dtype: Annotated[str, AfterValidator(_dtype)]
    """What its elements are, such as `float32`, `int64`, `bool` or `string`."""
    shape: list[Annotated[int | str, AfterValidator(_dim)]]
    """Sizes in order: a number, a name that means one size all over the graph, or `?` or -1 for any size."""
    optional: bool = False
    """Of an input: whether callers may leave it out."""
    default: bool | int | float | str | None = None
    """Of an optional input: what stands for it where it is left out."""
    description: str = ""
    """What it is, for people."""

    @property
    def form(self) -> Form:
        """Its form."""
        return Form(self.dtype, tuple([None if dim in (-1, "?") else dim for dim in self.shape]))


class Default(Model):
    """`on_error: {default: 0.5}`: what its outputs are filled with where a node fails."""

    default: bool | int | float | str
    """The value."""


class Batching(Model):
    """Runs that are at this node at the same time are served by one call of its model."""

    max_size: int = Field(gt=0)
    """Rows of one call at most."""
    max_delay: Seconds = 0.002
    """How long a run waits for others at most, such as `2ms`."""


# --------------------------------------------------------------------------- what a kind answers


class EdgeAt(NamedTuple):
    """One edge of a node: which of its inputs it feeds, and where in the node it is written.

    `name` is the input; for a list of inputs it is the place in it, an int. Inputs of the node itself, such as what a
    switch selects by, have a name that begins with `$`. `needed` is False where a value may be missing.
    """

    name: str | int
    edge: Edge
    path: Path
    needed: bool = True


class Owned(NamedTuple):
    """A node that another one owns: its name, and where that is written in the owner."""

    name: str
    path: Path


class BodyAt(NamedTuple):
    """The body of a map: its name among the children, where in the node it is written (its nodes stand below
    `(*path, "nodes")`, its outputs below `(*path, "outputs")`), and the names that `$item.NAME` may have.
    """

    name: str
    path: Path
    nodes: Mapping[str, NodeSpec]
    outputs: Mapping[str, Edge]
    items: tuple[str, ...]


class Scope(Protocol):
    """What a kind may ask while its node is checked and built; `graph` answers.

    Paths given to it, and to its faults, are those of the document: `(*scope.path, *edge.path)`.
    """

    faults: FaultList

    @property
    def path(self) -> Path:
        """Where the node stands in the document."""

    @property
    def file(self) -> str:
        """The file, which relative paths are relative to."""

    @property
    def inputs(self) -> Mapping[str | int, Form]:
        """What goes in, as `forms` was given it; for `step`."""

    def servable(self, spec: NodeSpec) -> Servable | None:
        """Open the servable of a model node, once; its signature costs nothing then.

        None if that is a fault, which is then noted, or if it cannot be asked (`metadata: warn`): then what the node
        declares holds, and its step opens it without asking.
        """

    def source(self, name: str | int) -> str:
        """In words, where an input comes from: `pre.t`, `$inputs.x`; of an owned node, where its owner has it from."""

    def child(self, name: str) -> Mapping[str, Form]:
        """What an owned node gives, by name: checked with the inputs of its owner. Empty if it has faults."""

    def body(self, name: str, items: Mapping[str, Form]) -> Mapping[str, Form]:
        """What a body gives for one item, by name, where its items have these forms. Empty if it has faults."""

    def equal(self, left: Form, left_by: str, right: Form, right_by: str, code: str, path: Path) -> Form:
        """Take two forms to be one, and note a fault where they differ; the form that is known of both.

        Of an edge, `left` is what comes and `right` what is taken, and a code of E106 or E107 means E106 for a
        dtype and E107 for a shape.
        """

    def resolve(self, form: Form) -> Form:
        """A form with the symbols resolved that are known so far."""


class NodeSpec(Model):
    """What every node may say. A kind adds its own keys, and answers the four questions."""

    kind: str
    """What it is."""
    outputs: dict[str, str | TensorText] | None = None
    """What it gives: our names, each with the model's own name or with a dtype and shape; all of them unless said."""
    on_error: Literal["fail", "skip"] | Default = "fail"
    """What follows when it fails: the run fails, its outputs are missing, or they are filled with a default."""
    timeout: Seconds | None = None
    """How long it may take, such as `150ms`; never longer than the run has left."""
    max_inflight: int | None = Field(default=None, gt=0)
    """How many calls of this node may be in flight at once, over all runs; one more waits."""
    max_queued: int | None = Field(default=None, ge=0)
    """With `max_inflight`: how many runs may wait there; one more is refused at once. Any number, unless said. Calls of
    a run that is there already wait in any case.
    """
    batching: Batching | None = None
    """Serve runs that are at this node at the same time by one call of its model."""
    description: str = ""
    """What it is for, for people."""

    PURE: ClassVar[bool] = False
    MODEL: ClassVar[Literal["local", "remote"] | None] = None  # a servable to open; a remote one is asked over the net

    @model_validator(mode="after")
    def _queues_for_something(self) -> NodeSpec:
        if self.max_queued is not None and self.max_inflight is None:
            raise ValueError("'max_queued' without 'max_inflight' is for nothing: say how many may be there at once")
        return self

    def edges(self) -> Iterator[EdgeAt]:
        """Every edge into this node."""
        raise NotImplementedError

    def owned(self) -> Iterator[Owned]:
        """Every node that this one owns.

        An owned node is given what its owner gives on: every input of the owner whose name does not begin with `$`.
        Its own inputs that begin with `$`, such as what an owned split is sticky by, reach it the same way: the owner
        has them as one more input, `NODE.$NAME`, in `forms` and in the inputs of its step, to be given on too.
        """
        return iter(())

    def spared(self) -> Collection[str]:
        """Of the nodes that this one owns, those that it does without: its outputs are there if one is skipped."""
        return ()

    def bodies(self) -> Iterator[BodyAt]:
        """Every body that this node runs once for each item.

        What a body reads from outside reaches the step as more inputs, named by reference (`pre.t`, `$inputs.x`), to
        be given to every call of the body as they are.
        """
        return iter(())

    def forms(self, inputs: Mapping[str | int, Form], scope: Scope) -> Mapping[str, Form]:
        """What comes out, by our names, given what goes in, by the names of `edges`; faults go to `scope.faults`.

        An owned model is given those inputs that it has by name; a sole one under the name that the model has for it.
        Empty where it is not known what comes out.
        """
        raise NotImplementedError

    def step(self, scope: Scope) -> Step:
        """What it becomes; asked once there is no fault."""
        raise NotImplementedError
