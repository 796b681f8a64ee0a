"""Map: a small graph runs once for each item of a tensor, or for each chunk of items, some at a time."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from ensemble.forms import UNKNOWN, Dim, Form
from ensemble.nodes.controller import ControllerSpec, with_rows
from ensemble.nodes.node import BodyAt, EdgeAt, EdgeText, Model, NodeSpec, Scope
from ensemble.rows import Blank, call_of, rows_in
from ensemble.steps import Array, Assembly, Call, Calls, Outcome, Piece

if TYPE_CHECKING:
    Node: TypeAlias = NodeSpec

__all__ = ["BODY", "Body", "Map", "MapSpec"]

BODY = "body"


class Body(Model):
    """The graph that runs for each item.

    Its nodes may read `$item.NAME`, each other, and what is outside, which is the same for all items.
    """

    nodes: dict[str, Node]  # of any kind: `spec`, which knows the kinds, says what `Node` is
    """Its nodes, as in a document."""
    outputs: dict[str, EdgeText] = Field(min_length=1)
    """What it gives for an item, and the map for all of them: each output's name, and where it comes from."""


class MapSpec(ControllerSpec):
    """Runs its body for every item, and puts the answers together in order; no items are an answer of length 0."""

    kind: Literal["map"]
    over: dict[str, EdgeText] = Field(min_length=1)
    """What items are taken from: the name of an item, `$item.NAME` in the body, and a tensor; all have equally many."""
    axis: int = 0
    """The axis of the items: 0, the only one; `apply: transpose` brings another one there."""
    concurrency: int = Field(default=8, gt=0)
    """How many calls of the body may run at once."""
    chunk: int = Field(default=1, gt=0)
    """How many items one call takes, joined along their own first axis, where the body takes any length of it; with
    `unit: rows`, how many rows."""
    unit: Literal["item", "rows"] = "item"
    """`item`: the axis is dropped, and answers are stacked. `rows`: slices keep it, and answers are concatenated."""
    body: Body
    """The graph that runs."""

    @field_validator("axis")
    @classmethod
    def _is_first(cls, axis: int) -> int:
        if axis != 0:
            raise PydanticCustomError(
                "E111",
                "items are taken along axis 0, got {axis}; bring that axis to the front with 'apply: transpose'",
                {"axis": axis},
            )
        return axis

    def edges(self) -> Iterator[EdgeAt]:
        """What the items are taken from."""
        for name, edge in self.over.items():
            yield EdgeAt(name, edge, ("over", name))

    def bodies(self) -> Iterator[BodyAt]:
        """The body."""
        yield BodyAt(BODY, (BODY,), self.body.nodes, self.body.outputs, tuple(self.over))

    def forms(self, inputs: Mapping[str | int, Form], scope: Scope) -> Mapping[str, Form]:
        """What the body gives, with an axis for the items, or the rows of all slices."""
        count = self._count(inputs, scope)
        given = scope.body(BODY, self._items(inputs, scope))
        for name, form in given.items():
            if form.dtype is None or form.dims is None:
                text = f"'{name}' is {form}: a map over nothing needs its dtype and rank; declare it in 'outputs'"
                scope.faults.add("E111", (*scope.path, BODY, "outputs", name), text)
        self._check_chunk(inputs, given, scope)
        return self._outputs(inputs, given, count, scope)

    def step(self, scope: Scope) -> Map:
        """The controller."""
        given = {name: scope.resolve(form) for name, form in scope.inputs.items()}
        forms = self._outputs(given, scope.body(BODY, self._items(scope.inputs, scope)), None, scope)
        blank = Blank({name: scope.resolve(form) for name, form in forms.items()}, given)
        return Map(tuple(self.over), self.concurrency, self._at_a_time(scope), self.unit == "item", blank)

    def _count(self, inputs: Mapping[str | int, Form], scope: Scope) -> Dim:
        """The axis that all items are taken along; notes `E111` where one has none, or another one."""
        found, by = Form(None, (None,)), ""
        for name in self.over:
            form = inputs.get(name, UNKNOWN)
            at, source = (*scope.path, "over", name), f"{name} ({scope.source(name)})"
            if form.dims == ():
                scope.faults.add("E111", at, f"'{source}' has no axis to take items along: it is {form}")
            elif form.dims:
                mine = Form(None, form.dims[:1])
                found, by = scope.equal(found, by, mine, source, "E111", at) if by else mine, by or source
        return found.dims[0] if found.dims else None

    def _items(self, inputs: Mapping[str | int, Form], scope: Scope) -> dict[str, Form]:
        return {name: self._item(name, inputs.get(name, UNKNOWN), scope) for name in self.over}

    def _item(self, name: str, form: Form, scope: Scope) -> Form:
        """What the body gets: of several items joined, a first axis that is any multiple of the item's."""
        if not form.dims:  # not known, or nothing to take items from, which is noted
            return form if form.dims is None else UNKNOWN
        if self.unit == "rows":
            return form._replace(dims=(self._slice(scope), *form.dims[1:]))
        if self.chunk == 1 or len(form.dims) < 2:
            return form._replace(dims=form.dims[1:])
        return form._replace(dims=(self._joint(name, scope), *form.dims[2:]))

    def _slice(self, scope: Scope) -> str:
        """The symbol of the rows of a slice, which are fewer than all of them; no document can write it."""
        return f"{'.'.join(map(str, scope.path))}.rows*"

    def _joint(self, name: str, scope: Scope) -> str:
        """The symbol of the length of joined items, which no document can write."""
        return f"{'.'.join(map(str, scope.path))}.{name}*"

    def _joint_size(self, name: str, scope: Scope) -> Dim:
        """What has become of that symbol: itself, another one that it must equal, or a size."""
        dims = scope.resolve(Form(None, (self._joint(name, scope),))).dims
        return dims[0] if dims else None

    def _check_chunk(self, inputs: Mapping[str | int, Form], given: Mapping[str, Form], scope: Scope) -> None:
        if self.chunk == 1 or self.unit == "rows":
            return
        at = (*scope.path, "chunk")
        for name in self.over:
            form = inputs.get(name, UNKNOWN)
            if form.dims is not None and len(form.dims) == 1:
                scope.faults.add(
                    "E111", at, f"an item of '{name}' is one value, of {form}, which cannot be joined; take 1"
                )
            size, own = self._joint_size(name, scope), next(iter((form.dims or ())[1:]), None)
            if isinstance(size, int):
                text = f"the body takes a '{name}' of length {size} only, so that items cannot be joined; take 1"
                scope.faults.add("E111", at, text, warning=own == size or not isinstance(own, int))
        for name, form in given.items():
            if form.dims == ():
                scope.faults.add("E111", at, f"'{name}' is one value, {form}, which cannot be divided up again; take 1")

    def _outputs(
        self, inputs: Mapping[str | int, Form], given: Mapping[str, Form], count: Dim, scope: Scope
    ) -> dict[str, Form]:
        if self.unit == "rows":
            sliced = with_rows(scope, given, self._slice(scope), "'over'", (*scope.path, BODY, "outputs"))
            return {name: _stacked(form, count, form.dims and form.dims[1:]) for name, form in sliced.items()}
        if self._at_a_time(scope) == 1:
            return {name: _stacked(form, count, form.dims) for name, form in given.items()}
        dims = {name: inputs.get(name, UNKNOWN).dims or () for name in self.over}
        own = {self._joint_size(name, scope): sizes[1] for name, sizes in dims.items() if len(sizes) > 1}
        resolved = {name: scope.resolve(form) for name, form in given.items()}
        return {
            name: _stacked(form, count, form.dims and (own.get(form.dims[0]), *form.dims[1:]))
            for name, form in resolved.items()
        }

    def _at_a_time(self, scope: Scope) -> int:
        """How many items a call takes: one, where the body takes items of one length only."""
        fixed = self.unit == "item" and any(isinstance(self._joint_size(name, scope), int) for name in self.over)
        return 1 if fixed else self.chunk


def _stacked(form: Form, count: Dim, item: tuple[Dim, ...] | None) -> Form:
    return form if item is None else form._replace(dims=(count, *item))


@dataclass(frozen=True)
class Map:
    """A map that runs.

    Args:
        over: the inputs that items are taken from; all others are given to every call as they are.
        concurrency: calls at a time.
        chunk: items, or rows, of a call.
        items: whether the axis is dropped.
        blank: what comes out of no items; a size that is not known is 0 there.
    """

    over: tuple[str, ...]
    concurrency: int
    chunk: int
    items: bool
    blank: Blank

    def steps(self, inputs: Mapping[str, Array], wanted: Sequence[str]) -> Generator[Calls, list[Outcome], Assembly]:
        """Run the body for all chunks."""
        total = rows_in(inputs, self.over)
        if not total:
            return Assembly((), 0, empty=self.blank.of(inputs, wanted))
        spans = [slice(start, min(start + self.chunk, total)) for start in range(0, total, self.chunk)]
        yield Calls((self._call(span, inputs, wanted) for span in spans), self.concurrency)
        return Assembly([Piece(number, put=span, items=self.items) for number, span in enumerate(spans)], total)

    def _call(self, span: slice, inputs: Mapping[str, Array], wanted: Sequence[str]) -> Call:
        return call_of(BODY, inputs, self.over, span, wanted, items=self.items)
