"""Cascade: a cheap node answers first, and only rows that it is not sure of go on to the next one."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from ensemble.faults import Path, meant
from ensemble.forms import Dim, Form
from ensemble.nodes.controller import AlternativesSpec, agreed, once, with_rows
from ensemble.nodes.node import Model, Owned, Scope
from ensemble.rows import Blank, call_of, carriers, passed, rows_in, span_of
from ensemble.steps import Array, Assembly, Calls, Missing, Outcome, Piece
from remote_ops.errors import DeadlineExceeded, NodeError, RemoteOpsError, SignatureError
from remote_ops.signature import describe

__all__ = ["Accept", "Cascade", "CascadeSpec", "Stage", "score_of"]

STAGE_USED, COST = "stage_used", "cost"
_SIGNS = {"gte": np.greater_equal, "gt": np.greater, "lte": np.less_equal, "lt": np.less}


class Accept(Model):
    """Which rows a stage is sure of: those whose score is on the right side of a bound."""

    score: Literal["max_prob", "margin", "entropy", "value"]
    """What is compared: the greatest probability, the greatest less the second, the entropy in nats, or the value."""
    tensor: str | None = None
    """The output that it is taken from: `[rows, classes]`, for `value` `[rows]`; the only one unless said."""
    gte: float | None = None
    """Sure where the score is this or more."""
    gt: float | None = None
    """Sure where the score is more than this."""
    lte: float | None = None
    """Sure where the score is this or less."""
    lt: float | None = None
    """Sure where the score is less than this."""

    @model_validator(mode="after")
    def _has_one_bound(self) -> Accept:
        bounds = [name for name in _SIGNS if getattr(self, name) is not None]
        if len(bounds) != 1:
            raise ValueError(f"expected one bound of gte, gt, lte and lt, got {' and '.join(bounds) or 'none'}")
        return self

    def sure(self, array: Array) -> Array:
        """For each row whether its score is on the right side: bool `(rows,)`; never where it is NaN."""
        name = next(name for name in _SIGNS if getattr(self, name) is not None)
        return np.asarray(_SIGNS[name](score_of(self.score, array), getattr(self, name)), bool)


class Stage(Model):
    """One node of a cascade."""

    use: str
    """The node."""
    accept: Accept | None = None
    """Which rows it is sure of; the last stage has none, and takes what is left."""
    cost: float = Field(default=1.0, ge=0)
    """What one row costs here, in any unit; a row pays for every stage that answered it."""


class CascadeSpec(AlternativesSpec):
    """Runs nodes one after the other, each with the rows that those before were not sure of."""

    kind: Literal["cascade"]
    rows: str
    """The symbol of the rows: every input that has it on axis 0 is cut, the others are given on whole."""
    stages: list[Stage] = Field(min_length=1)
    """The nodes, in order. All but the last say which rows they are sure of."""
    on_deadline: Literal["best_so_far", "fail"] = "fail"
    """When the time runs out: whether rows keep the answer of the last stage that gave one, or all fail."""

    def owned(self) -> Iterator[Owned]:
        """The nodes of the stages."""
        return once(Owned(stage.use, ("stages", place, "use")) for place, stage in enumerate(self.stages))

    def forms(self, inputs: Mapping[str | int, Form], scope: Scope) -> Mapping[str, Form]:
        """What all of its nodes give; and of each row the number of the stage that answered it, and its cost."""
        rows = self._rows(scope)
        if not self._carrying(inputs, scope):
            given = ", ".join(f"{name}: {form}" for name, form in inputs.items())
            scope.faults.add("E107", (*scope.path, "rows"), f"no input has '{self.rows}' on axis 0: there is {given}")
        self._check_stages(scope)
        forms = with_rows(scope, agreed(scope, self.owned()), rows, "the cascade", scope.path)
        for name in (STAGE_USED, COST):
            if name in forms:
                text = f"output '{name}' is what a cascade tells of its rows: rename that of '{self.stages[0].use}'"
                scope.faults.add("E102", scope.path, f"{text} by its 'outputs'")
        return {**forms, STAGE_USED: Form("int64", (rows,)), COST: Form("float64", (rows,))} if forms else {}

    def step(self, scope: Scope) -> Cascade:
        """The controller."""
        given = {name: scope.resolve(form) for name, form in scope.inputs.items()}
        forms = {name: scope.resolve(form) for name, form in agreed(scope, self.owned()).items()}
        return Cascade(
            tuple(self.stages), self._carrying(scope.inputs, scope), Blank(forms, given), self.on_deadline != "fail"
        )

    def _rows(self, scope: Scope) -> Dim:
        dims = scope.resolve(Form(None, (self.rows,))).dims
        return dims[0] if dims else None

    def _carrying(self, inputs: Mapping[str | int, Form], scope: Scope) -> tuple[str, ...]:
        return carriers({name: scope.resolve(form) for name, form in inputs.items()}, self._rows(scope))

    def _check_stages(self, scope: Scope) -> None:
        for place, stage in enumerate(self.stages):
            path = (*scope.path, "stages", place)
            last = place == len(self.stages) - 1
            if last and stage.accept is not None:
                text = f"the last stage, '{stage.use}', takes every row that is left: leave out its 'accept'"
                scope.faults.add("E110", (*path, "accept"), text)
            elif not last and stage.accept is None:
                text = f"stage '{stage.use}' needs an 'accept' that says which rows do not go on to the next stage"
                scope.faults.add("E110", path, text)
            elif stage.accept is not None:
                _check_accept(stage, stage.accept, scope, (*path, "accept"))


def _check_accept(stage: Stage, accept: Accept, scope: Scope, path: Path) -> None:
    forms = scope.child(stage.use)
    if not forms:
        return
    if accept.tensor is None and len(forms) > 1:
        text = f"'{stage.use}' gives {', '.join(forms)}: say which 'tensor' the score is taken from"
        scope.faults.add("E103", path, text)
    elif accept.tensor is not None and accept.tensor not in forms:
        text = f"'{stage.use}' has no output '{accept.tensor}'{meant(accept.tensor, forms)}"
        scope.faults.add("E103", (*path, "tensor"), text)
    else:
        name = accept.tensor or next(iter(forms))
        _check_score(accept, f"{stage.use}.{name}", scope.resolve(forms[name]), scope, path)


def _check_score(accept: Accept, name: str, form: Form, scope: Scope, path: Path) -> None:
    numbers = form.dtype is None or form.dtype not in ("string", "bool")
    if not numbers or (accept.score != "value" and form.dtype is not None and "float" not in form.dtype):
        expected = "numbers" if accept.score == "value" else "probabilities, which are floats"
        scope.faults.add("E106", path, f"score '{accept.score}' expects {expected}, got '{name}' {form}")
    dims = form.dims
    if dims is not None and not _is_scored(accept.score, dims):
        expected = "[rows] or [rows, 1]" if accept.score == "value" else "[rows, classes]"
        scope.faults.add("E107", path, f"score '{accept.score}' expects {expected}, got '{name}' {form}")


def _is_scored(score: str, dims: Sequence[Any]) -> bool:
    if score == "value":
        return len(dims) >= 1 and all(not isinstance(dim, int) or dim == 1 for dim in dims[1:])
    return len(dims) == 2 and not (score == "margin" and dims[1] in (0, 1))


def score_of(score: str, array: Array) -> Array:
    """How sure each row is, `(rows,)`, of the array's dtype (float32 of what is narrower than float16).

    Args:
        score: `max_prob`, `margin` (the greatest less the second) or `entropy` (in nats) of `(rows, classes)`
            probabilities; `value` of `(rows,)`, or `(rows, 1)`, numbers.

    Raises:
        SignatureError: the array has another shape.
    """
    if not _is_scored(score, array.shape) or (score != "value" and not array.shape[1]):
        raise SignatureError(f"score '{score}' has no meaning for {describe(array)}", name=score, got=describe(array))
    array = array.astype(np.float32) if array.dtype.kind == "V" else array
    if score == "value":
        return array.reshape(len(array))
    if score == "max_prob":
        return np.asarray(array.max(axis=1))
    if score == "margin":
        top = np.partition(array, -2, axis=1)
        return np.asarray(top[:, -1] - top[:, -2])
    return np.asarray(-np.sum(array * np.log(np.where(array > 0, array, 1)), axis=1))


@dataclass(frozen=True)
class Cascade:
    """A cascade that runs.

    Args:
        stages: in order.
        carrying: the inputs that are cut.
        blank: what comes out of no rows.
        best_so_far: whether rows keep their last answer when the time runs out.
    """

    stages: tuple[Stage, ...]
    carrying: tuple[str, ...]
    blank: Blank
    best_so_far: bool

    def steps(self, inputs: Mapping[str, Array], wanted: Sequence[str]) -> Generator[Calls, list[Outcome], Assembly]:
        """Run stage after stage, each with the rows that are left; if one is skipped, there is no answer."""
        given = passed(inputs)
        total = rows_in(given, self.carrying)
        tally: dict[str, Array] = {STAGE_USED: np.zeros(total, np.int64), COST: np.zeros(total, np.float64)}
        theirs = [name for name in wanted if name not in tally]
        if not total and self.blank.is_known(inputs, theirs):
            return Assembly((), 0, tally, self.blank.of(inputs, theirs))
        pieces: list[Piece] = []
        left, unsure = np.arange(total), np.arange(0)  # rows of the batch; the same, as rows of the last call
        for place, stage in enumerate(self.stages):
            rows = None if len(left) == total else span_of(left)
            call = call_of(stage.use, given, self.carrying, rows, self._wanted(stage, theirs))
            outcome = (yield Calls([call], tolerate=self.best_so_far and place > 0))[0]
            if isinstance(outcome, RemoteOpsError):
                if not _is_late(outcome):
                    raise outcome
                pieces.append(Piece(place - 1, unsure, left))
                break
            gone = next((value for value in outcome.values() if isinstance(value, Missing)), None)
            if gone is not None:
                return Assembly((Piece(place),), extra=dict.fromkeys(tally, gone))
            tally[STAGE_USED][left] = place
            tally[COST][left] += stage.cost
            sure = self._sure(stage, outcome, len(left))
            if sure.all():
                pieces.append(Piece(place, None, None if len(left) == total else left))
                break
            if sure.any():
                pieces.append(Piece(place, np.flatnonzero(sure), left[sure]))
            unsure = np.flatnonzero(~sure)
            left = left[unsure]
        return Assembly(pieces, total, tally)

    def _wanted(self, stage: Stage, theirs: Sequence[str]) -> Sequence[str] | None:
        """What is wanted of a stage: what it is judged by too, and always something."""
        judged = [name for name in [_judged(stage, self.blank.outputs)] if name and name not in theirs]
        return [*theirs, *judged] or list(self.blank.outputs)[:1] or None

    def _sure(self, stage: Stage, outcome: Mapping[str, Array], rows: int) -> Array:
        for name, array in outcome.items():
            if array.shape[:1] != (rows,):
                got = describe(array)
                raise SignatureError(
                    f"output '{name}' of '{stage.use}': expected {rows} rows, as many as were sent, got {got}",
                    name=name,
                    expected=f"{rows} rows",
                    got=got,
                )
        if stage.accept is None:
            return np.ones(rows, bool)
        return stage.accept.sure(outcome[_judged(stage, self.blank.outputs) or next(iter(outcome))])


def _judged(stage: Stage, outputs: Mapping[str, Form]) -> str | None:
    """The output that says how sure a stage is; None for the last one."""
    return None if stage.accept is None else stage.accept.tensor or next(iter(outputs), None)


def _is_late(error: BaseException | None) -> bool:
    while isinstance(error, NodeError):
        error = error.__cause__
    return isinstance(error, DeadlineExceeded)
