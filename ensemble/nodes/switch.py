"""Switch: a tensor says which of several nodes runs, for a whole request or for each row of it."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, PlainValidator

from ensemble.forms import UNKNOWN, Dim, Form
from ensemble.nodes.controller import AlternativesSpec, agreed, once, with_rows
from ensemble.nodes.node import EdgeAt, EdgeText, Model, Owned, Scope
from ensemble.predicate import Predicate
from ensemble.rows import Blank, by_row, carriers, passed, rows_in
from ensemble.steps import Array, Assembly, Call, Calls, Outcome, Piece
from remote_ops.errors import SignatureError
from remote_ops.signature import describe

__all__ = ["Case", "Switch", "SwitchSpec"]

Condition = Annotated[Predicate, PlainValidator(Predicate.parse, json_schema_input_type=str | int | float | bool)]


class Case(Model):
    """One way: a condition, and the node that runs where it holds."""

    if_: Condition = Field(alias="if")
    """A condition on what `select` reads: `< 13`, `== "cat"`, `in [1, 2]`, `>= 13 and < 65`; or what it must equal."""
    use: str
    """The node that runs where it holds."""


class SwitchSpec(AlternativesSpec):
    """Runs the node of the first case that holds, else the default."""

    kind: Literal["switch"]
    scope: Literal["request", "row"] = "request"
    """Whether a request goes one way as a whole, or each of its rows goes its own."""
    select: EdgeText
    """What the conditions are asked of: one value, or with `scope: row` one for each row."""
    cases: list[Case] = Field(min_length=1)
    """The ways, in order: the first one that holds is taken."""
    default: str | None = None
    """The node that runs where no case holds. Required."""

    def edges(self) -> Iterator[EdgeAt]:
        """What it selects by, and what it gives on."""
        yield EdgeAt("$select", self.select, ("select",))
        yield from super().edges()

    def owned(self) -> Iterator[Owned]:
        """The nodes of the cases and the default, each once."""
        cases = [Owned(case.use, ("cases", place, "use")) for place, case in enumerate(self.cases)]
        yield from once(cases if self.default is None else [*cases, Owned(self.default, ("default",))])

    def forms(self, inputs: Mapping[str | int, Form], scope: Scope) -> Mapping[str, Form]:
        """What all of its nodes give."""
        select = scope.resolve(inputs.get("$select", UNKNOWN))
        self._check_cases(select, scope)
        self._check_select(select, inputs, scope)
        forms = agreed(scope, self.owned())
        return with_rows(scope, forms, _rows_of(select), "'select'", scope.path) if self.scope == "row" else forms

    def step(self, scope: Scope) -> Switch:
        """The controller."""
        select = scope.resolve(scope.inputs.get("$select", UNKNOWN))
        given = {name: scope.resolve(form) for name, form in scope.inputs.items()}
        cases = tuple([(case.if_, case.use) for case in self.cases])
        blank = Blank({name: scope.resolve(form) for name, form in agreed(scope, self.owned()).items()}, given)
        carrying = carriers(given, _rows_of(select)) if self.scope == "row" else ()
        return Switch(cases, self.default or "", self.scope == "row", carrying, blank)

    def _check_cases(self, select: Form, scope: Scope) -> None:
        for place, case in enumerate(self.cases):
            if misfit := case.if_.misfit(select.dtype):
                text = f"'{case.if_}' does not fit '{self.select.source}': {misfit}"
                scope.faults.add("E106", (*scope.path, "cases", place, "if"), text)
        if self.default is None:
            text = "a switch needs a 'default': the node that runs where no case holds"
            scope.faults.add("E110", scope.path, text)

    def _check_select(self, select: Form, inputs: Mapping[str | int, Form], scope: Scope) -> None:
        sizes = [dim for dim in (select.dims or ())[self.scope == "row" :] if isinstance(dim, int) and dim != 1]
        if sizes or (self.scope == "row" and select.dims == ()):
            expected = "one value for each row" if self.scope == "row" else "one value"
            fix = "apply argmax or max to it" if self.scope == "row" else "for one for each row write 'scope: row'"
            text = f"'{self.select.source}': expected {expected} to select by, got {select}; {fix}"
            scope.faults.add("E107", (*scope.path, "select"), text)
        elif self.scope == "row":
            self._tie(select, {name: scope.resolve(form) for name, form in inputs.items()}, scope)

    def _tie(self, select: Form, inputs: Mapping[str | int, Form], scope: Scope) -> None:
        """See to it that some input has the rows of the selector: the only length there is, if none is known to."""
        rows, path = _rows_of(select), (*scope.path, "select")
        if carriers(inputs, rows):
            return
        lengths = {form.dims[0]: name for name, form in inputs.items() if name != "$select" and form.dims}
        if len(lengths) == 1:
            (length, name), *_ = lengths.items()
            by = f"axis 0 of '{self.select.source}'"
            scope.equal(Form(None, (rows,)), by, Form(None, (length,)), f"axis 0 of input '{name}'", "E107", path)
        else:
            text = f"no input has the rows of '{self.select.source}', {select}, on axis 0"
            scope.faults.add("E107", path, text)


def _rows_of(select: Form) -> Dim:
    return select.dims[0] if select.dims else None


@dataclass(frozen=True)
class Switch:
    """A switch that runs.

    Args:
        cases: conditions with the nodes they lead to, in order.
        default: the node where none holds.
        per_row: whether each row goes its own way.
        carrying: the inputs that have rows.
        blank: what comes out of no rows.
    """

    cases: tuple[tuple[Predicate, str], ...]
    default: str
    per_row: bool
    carrying: tuple[str, ...]
    blank: Blank

    def steps(self, inputs: Mapping[str, Array], wanted: Sequence[str]) -> Generator[Calls, list[Outcome], Assembly]:
        """Run one node, or each node with its rows."""
        select, given = inputs["$select"], passed(inputs)
        if self.per_row:
            nodes = list(dict.fromkeys([*[node for _, node in self.cases], self.default]))
            choice = self._choice(_for_rows(select, given, self.carrying), nodes)
            return (yield from by_row(nodes, choice, given, self.carrying, wanted, self.blank))
        yield Calls([Call(self._node(select), given, wanted)])
        return Assembly((Piece(0),))

    def _node(self, select: Array) -> str:
        if select.size != 1:
            raise SignatureError(
                f"a switch per request expects one value to select by, got {describe(select)};"
                f" for one for each row write 'scope: row'",
                name="select",
                expected="one value",
                got=describe(select),
            )
        return next((node for predicate, node in self.cases if predicate.holds(select).all()), self.default)

    def _choice(self, select: Array, nodes: Sequence[str]) -> Array:
        """Which of `nodes` each row goes to."""
        choice = np.full(select.shape, nodes.index(self.default))
        for predicate, node in reversed(self.cases):
            choice[predicate.holds(select)] = nodes.index(node)
        return choice


def _for_rows(select: Array, inputs: Mapping[str, Array], carrying: Sequence[str]) -> Array:
    """One value for each row, `(rows,)`."""
    if not select.ndim or select.size != len(select):
        raise SignatureError(
            f"a switch per row expects one value for each row to select by, got {describe(select)}",
            name="select",
            expected="one value for each row",
            got=describe(select),
        )
    rows_in(inputs, carrying, "'select'", len(select))
    return select.reshape(len(select))
