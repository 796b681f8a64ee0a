"""`kind: combine`: several members become one: votes, means, ranks, or a Python function.

It checks what is combined and how; the arithmetic is in `combinations`, and waiting for a quorum is the engine's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
from pydantic import BeforeValidator, Field, Strict, WithJsonSchema, model_validator

from ensemble.application import TAKES, form_of, is_float
from ensemble.combinations import COMBINATIONS, Combination, Concat, HardVote, Rank, Weights, place_of
from ensemble.faults import Path, meant
from ensemble.forms import UNKNOWN, Form
from ensemble.nodes.function import imported
from ensemble.nodes.node import EdgeAt, Inputs, Model, NodeSpec, Scope, Seconds, TensorText
from ensemble.steps import Array, Missing, Step, Value
from remote_ops.errors import InternalError, InvalidRequest, ModelUnavailable, NotDifferentiable, SignatureError
from remote_ops.signature import Signature, TensorSpec, describe, did_you_mean

__all__ = ["CombineSpec", "CombineStep", "FunctionStep", "Quorum"]

_PYTHON = r"python:[A-Za-z_][\w.]*:[A-Za-z_][\w.]*"
_METHODS = (*COMBINATIONS, "python:MODULE:FUNCTION")


def _method(value: Any) -> Any:
    if value not in COMBINATIONS and not (isinstance(value, str) and re.fullmatch(_PYTHON, value)):
        hint = did_you_mean(str(value), COMBINATIONS)
        raise ValueError(f"no method {value!r}: expected one of {', '.join(_METHODS)}{hint}")
    return value


Method = Annotated[
    str,
    BeforeValidator(_method),
    WithJsonSchema({"anyOf": [{"enum": list(COMBINATIONS)}, {"type": "string", "pattern": f"^{_PYTHON}$"}]}),
]
Number = Annotated[float, Strict()]
Reference = Annotated[str, Strict()] | list[Number]


class Quorum(Model):
    """How many members are enough."""

    min: int = Field(gt=0)
    """How many must have answered, those in `required` among them."""
    grace: Seconds = 0.0
    """How long the others are waited for then, such as `20ms`."""
    required: list[str] = Field(default_factory=list)
    """Members that must have answered in any case."""


class _Member(NamedTuple):
    """One member: its name, what comes, the fault's path, and where it comes from in words."""

    name: str
    form: Form
    path: Path
    source: str


class CombineSpec(NodeSpec):
    """Makes one of several members: by a vote, a mean, ranks, side by side, or a Python function."""

    kind: Literal["combine"]
    method: Method
    """`soft_vote` of probabilities gives `proba` and `label`; `hard_vote` of labels gives `label`, and `votes` where
    `labels` are said; `mean`, `gmean`, `median`, `max`, `min`, `rank`, `concat` and `stack` give `value`. A function,
    `python:module:function`, takes the members by name, None for a missing one, and gives its declared `outputs`.
    """
    inputs: Inputs
    """The members by name, or a list of them, which are named by the nodes they come from."""
    weights: dict[str, Number] | None = None
    """By member, 1 unless said, of votes, means and ranks; they count relative to the sum of those that answered.
    Averages with weights are float64, as numpy's and scikit-learn's; `{from: vote.proba, cast: float32}` where they are
    read makes them that.
    """
    axis: Annotated[int, Strict()] | None = None
    """The classes of `soft_vote` (-1), what `rank` ranks along (0), where `concat` (-1) or `stack` (1) puts them."""
    quorum: Quorum | None = None
    """How many members are enough; the others may be missing."""
    labels: Annotated[int, Field(gt=0, strict=True)] | list[Annotated[str, Strict()]] | None = None
    """Of `hard_vote`: how many classes there are, or their names in order."""
    reference: Reference | dict[str, Reference] | None = None
    """Of `rank`: numbers to rank among, or an `.npy` file of them, for all members or each by name."""

    PURE: ClassVar[bool] = True

    @model_validator(mode="after")
    def _named_once(self) -> CombineSpec:
        names = [name for name, _ in self._named()]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"member '{twice}' is there twice; write inputs by name: {{NAME: {twice}, ...}}")
        return self

    @property
    def members(self) -> tuple[str, ...]:
        """The names of the members, in order."""
        return tuple([name for name, _ in self._named()])

    def edges(self) -> Iterator[EdgeAt]:
        """One for each member; those that a quorum does not require may be missing."""
        edges = self.inputs.values() if isinstance(self.inputs, dict) else self.inputs
        for (name, path), edge in zip(self._named(), edges, strict=True):
            yield EdgeAt(name, edge, path, self.quorum is None or name in self.quorum.required)

    def forms(self, inputs: Mapping[str | int, Form], scope: Scope) -> Mapping[str, Form]:
        """What comes out, once the members agree with each other and with the method."""
        members = self._members(inputs, scope)
        names = [member.name for member in members]
        if not members:
            scope.faults.add("E112", scope.path, f"'{scope.path[-1]}' combines nothing: expected one member or more")
            return {}
        self._check_names("weights", self.weights or {}, names, scope)
        self._check_weights(scope)
        self._check_quorum(names, scope)
        self._check_only_for(scope)
        if self._python:
            return self._declared(scope)
        fitting = [member for member in members if self._fits(member, scope)]
        return self._renamed(self._natural(fitting, names, scope), scope) if fitting else {}

    def step(self, scope: Scope) -> Step:
        """What combines arrays."""
        if self._python:
            specs = tuple([text.form.spec(name) for name, text in self._texts().items()])
            return FunctionStep(_function(self.method, scope.file), self.members, specs)
        renames = {ours: theirs for ours, theirs in (self.outputs or {}).items() if isinstance(theirs, str)}
        return CombineStep(self._combination(self.members, scope.file), self.members, self.weights or None, renames)

    # ----------------------------------------------------------------- members

    def _named(self) -> list[tuple[str, Path]]:
        """Each member's name, and where in the node it is written."""
        if isinstance(self.inputs, dict):
            return [(name, ("inputs", name)) for name in self.inputs]
        sources = [edge.source for edge in self.inputs]
        nodes = [source.name for source in sources]
        names = [source.name if nodes.count(source.name) == 1 else str(source) for source in sources]
        return [(name, ("inputs", place)) for place, name in enumerate(names)]

    def _members(self, inputs: Mapping[str | int, Form], scope: Scope) -> list[_Member]:
        return [
            _Member(name, scope.resolve(inputs.get(name, UNKNOWN)), (*scope.path, *path), scope.source(name))
            for name, path in self._named()
        ]

    # ----------------------------------------------------------------- rule 12

    @property
    def _python(self) -> bool:
        return self.method not in COMBINATIONS

    @property
    def _how(self) -> type[Combination]:
        return COMBINATIONS.get(self.method, Combination)

    def _wrong(self, scope: Scope, text: str, *path: str | int) -> None:
        scope.faults.add("E112", (*scope.path, *path), f"'{scope.path[-1]}': {text}")

    def _check_names(self, key: str, names: Sequence[str] | Mapping[str, Any], known: list[str], scope: Scope) -> None:
        for place, name in enumerate(names):
            if name not in known:
                path = (*key.split("."), name if isinstance(names, Mapping) else place)
                self._wrong(scope, f"{key} has '{name}', which is no member{meant(name, known)}", *path)

    def _check_weights(self, scope: Scope) -> None:
        weights = self.weights or {}
        for name, weight in weights.items():
            if not (weight >= 0 and math.isfinite(weight)):
                self._wrong(scope, f"weight of '{name}': expected 0 or more, got {weight:g}", "weights", name)
        if weights and not any(weights.get(name, 1.0) for name in self.members):
            self._wrong(scope, "weights: expected one above 0, got 0 for every member", "weights")

    def _check_quorum(self, names: list[str], scope: Scope) -> None:
        if self.quorum is None:
            return
        self._check_names("quorum.required", self.quorum.required, names, scope)
        if self.quorum.min > len(names):
            text = f"a quorum of {self.quorum.min}: expected at most the {len(names)} members"
            self._wrong(scope, text, "quorum", "min")
        if self._how.apart:
            text = f"a quorum is not for '{self.method}': the size of what it gives would depend on who answers"
            self._wrong(scope, text, "quorum")

    def _check_only_for(self, scope: Scope) -> None:
        """Keys that mean nothing for the method are wrong rather than ignored."""
        fit = {
            "weights": [name for name, how in COMBINATIONS.items() if how.weighted],
            "axis": [name for name, how in COMBINATIONS.items() if how.around is not None],
            "labels": ["hard_vote"],
            "reference": ["rank"],
        }
        for key, methods in fit.items():
            if getattr(self, key) is not None and self.method not in methods:
                self._wrong(scope, f"'{key}' is for {', '.join(methods)}: it means nothing for '{self.method}'", key)

    def _fits(self, member: _Member, scope: Scope) -> bool:
        """Whether the method is for this member's dtype, which is noted if not."""
        if member.form.dtype is None or member.form.dtype in self._taken():
            return True
        text = f"member '{member.name}' ({member.source}): expected {self._how.takes} for {self.method}"
        scope.faults.add("E112", member.path, f"{text}, got {member.form}{self._remedy(member.form.dtype)}")
        return False

    def _taken(self) -> frozenset[str]:
        names = {"string"} if self.method == "hard_vote" and isinstance(self.labels, list) else set()
        return TAKES[self._how.takes] | names

    def _remedy(self, dtype: str) -> str:
        if self.method == "hard_vote" and dtype == "string":
            return "; say which there are: `labels: [NAME, ...]`"
        if self.method == "hard_vote" and "float" in dtype:
            return "; write `apply: argmax` on this edge, or use soft_vote for probabilities"
        if self.method == "soft_vote" and "int" in dtype:
            return "; use hard_vote for labels"
        return "" if dtype == "string" else "; write `cast: float32` on this edge"

    # ----------------------------------------------------------------- what comes out

    def _natural(self, members: list[_Member], names: list[str], scope: Scope) -> Mapping[str, Form]:
        """The outputs under the names that the method has for them; empty if they are not known."""
        agreed = self._agreed(members, scope)
        try:
            combination = self._combination(names, scope.file)
        except ValueError as error:
            self._wrong(scope, str(error), "reference")
            return {}
        try:
            return combination.forms(agreed, bool(self.weights))
        except ValueError as error:
            self._wrong(scope, str(error), *(("axis",) if self.axis is not None else ()))
            return {}

    def _agreed(self, members: list[_Member], scope: Scope) -> list[Form]:
        """The forms of the members: of one dtype, and of one shape, but for the axis they are put together along."""
        first = members[0]
        known = self._open(first.form)
        typed = first
        for member in members[1:]:
            if member.form.dtype is not None and typed.form.dtype not in (None, member.form.dtype):
                self._add_dtypes(member, typed, scope)
            elif typed.form.dtype is None:
                typed = member
            theirs = self._open(member.form)._replace(dtype=known.dtype)
            by = f"{scope.path[-1]}.{member.name} (as {first.source})"
            before = len(scope.faults.all)
            both = scope.equal(theirs, member.source, known, by, "E107", member.path)
            known = both if len(scope.faults.all) == before else known
        return [self._closed(known._replace(dtype=typed.form.dtype), scope.resolve(one.form)) for one in members]

    def _open(self, form: Form) -> Form:
        """The form with the axis unknown on which members may differ."""
        if self._how is not Concat or form.dims is None or not -len(form.dims) <= self._axis < len(form.dims):
            return form
        place = place_of(form, self._axis)
        return form._replace(dims=(*form.dims[:place], None, *form.dims[place + 1 :]))

    def _closed(self, known: Form, mine: Form) -> Form:
        """What is known of all members, with a member's own size on the axis that `_open` opened."""
        if self._how is not Concat or known.dims is None or mine.dims is None or len(mine.dims) != len(known.dims):
            return known
        place = self._axis % max(len(known.dims), 1)
        return known._replace(dims=(*known.dims[:place], *mine.dims[place : place + 1], *known.dims[place + 1 :]))

    def _add_dtypes(self, member: _Member, other: _Member, scope: Scope) -> None:
        expected = f"expected {other.form.dtype} as '{other.name}' ({other.source})"
        text = f"member '{member.name}' ({member.source}): {expected}"
        hint = f"write `cast: {other.form.dtype}` on this edge"
        scope.faults.add("E106", member.path, f"{text}, got {member.form}; {hint}")

    @property
    def _axis(self) -> int:
        around = self._how.around
        return self.axis if self.axis is not None else 0 if around is None else around

    def _combination(self, names: Sequence[str], file: str) -> Combination:
        """The arithmetic; raises `ValueError` for references that are not there, or do not go together."""
        if self.method == "hard_vote":
            return HardVote(labels=tuple(self.labels) if isinstance(self.labels, list) else self.labels)
        if self.method == "rank" and self.reference is not None:
            return Rank(self._axis, tuple(_references(self.reference, names, FilePath(file).parent)))
        return self._how(self._axis)

    def _renamed(self, natural: Mapping[str, Form], scope: Scope) -> Mapping[str, Form]:
        """The outputs under our names, and no other form than what is declared."""
        if self.outputs is None or not natural:
            return natural
        given = {}
        for ours, text in self.outputs.items():
            theirs, path = (text if isinstance(text, str) else ours), (*scope.path, "outputs", ours)
            if theirs not in natural:
                words = f"'{scope.path[-1]}': {self.method} has no output '{theirs}'{meant(theirs, natural)}"
                scope.faults.add("E103", path, words)
                continue
            given[ours] = natural[theirs]
            if isinstance(text, TensorText):
                by = (f"{scope.path[-1]}.{ours}", f"outputs of '{scope.path[-1]}'")
                given[ours] = scope.equal(natural[theirs], by[0], text.form, by[1], "E107", path)
        return given

    # ----------------------------------------------------------------- a Python function

    def _texts(self) -> dict[str, TensorText]:
        return {name: text for name, text in (self.outputs or {}).items() if isinstance(text, TensorText)}

    def _declared(self, scope: Scope) -> Mapping[str, Form]:
        try:
            _function(self.method, scope.file)
        except ValueError as error:
            scope.faults.add("E116", (*scope.path, "method"), f"'{scope.path[-1]}': {error}")
        texts = self._texts()
        if not texts or len(texts) != len(self.outputs or {}):
            text = "expected outputs with dtype and shape; write `outputs: {NAME: {dtype: DTYPE, shape: [...]}}`"
            self._wrong(scope, f"{self.method}: {text}", *(("outputs",) if self.outputs else ()))
        return {name: text.form for name, text in texts.items()}


def _function(method: str, file: str) -> Callable[..., Any]:
    """The function that `python:module:function` names; raises `ValueError`."""
    function = imported(method.removeprefix("python:"), str(FilePath(file).parent))
    if not callable(function):
        raise ValueError(f"{method!r}: expected a function, got a {type(function).__name__}")
    return cast(Callable[..., Any], function)


def _references(
    given: str | list[float] | Mapping[str, str | list[float]], names: Sequence[str], folder: FilePath
) -> Iterator[Array]:
    """The sorted reference of each member, all of one length, so that ranks among them compare."""
    if isinstance(given, Mapping):
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"no reference for member '{missing[0]}': expected one for each of {', '.join(names)}")
        if unknown := [name for name in given if name not in names]:
            raise ValueError(f"reference has '{unknown[0]}', which is no member{meant(unknown[0], names)}")
    found = [_reference(given[name] if isinstance(given, Mapping) else given, folder) for name in names]
    for name, one in zip(names, found, strict=True):
        if len(one) != len(found[0]):
            expected = f"expected {len(found[0])} as of '{names[0]}'"
            raise ValueError(f"references are of one length: {expected}, got {len(one)} of '{name}'")
    return iter(found)


def _reference(given: str | list[float], folder: FilePath) -> Array:
    try:
        numbers = np.load(folder / given, allow_pickle=False) if isinstance(given, str) else np.array(given, np.float64)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the reference '{given}': {error}") from error
    if numbers.ndim != 1 or not numbers.size or numbers.dtype.kind not in "fiu" or not np.isfinite(numbers).all():
        raise ValueError(f"reference: expected finite numbers [R], got {describe(numbers)}")
    return np.sort(numbers)


# --------------------------------------------------------------------------- what runs


@dataclass(frozen=True, eq=False)
class CombineStep:
    """Combines the members that are there, in the order of declaration.

    Args:
        combination: the arithmetic, for all members.
        members: their names.
        weights: by member, 1 unless given; None: all count the same.
        renames: our names of outputs, and the combination's.
    """

    combination: Combination
    members: tuple[str, ...]
    weights: Mapping[str, float] | None
    renames: Mapping[str, str]

    def run(self, inputs: Mapping[str, Value], wanted: Sequence[str]) -> dict[str, Array]:
        """The outputs wanted.

        Raises:
            SignatureError: members differ in dtype or shape.
            InvalidRequest: what came cannot be combined: labels that are none, one row to be ranked.
            ModelUnavailable: no member is there, or none with a weight.
        """
        names, arrays = self._there(inputs)
        self._require_alike(names, arrays)
        combination, weights = self._among(names), self._weights(names)
        try:
            combination.forms([form_of(array) for array in arrays], weights is not None)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        with np.errstate(all="ignore"):
            given = combination.run(arrays, weights)
        return {name: given[self.renames.get(name, name)] for name in wanted}

    def vjp(
        self, inputs: Mapping[str, Value], outputs: Mapping[str, Array], cotangents: Mapping[str, Array]
    ) -> dict[str, Array]:
        """The gradient with respect to each member that is there and a float, of its dtype."""
        names, arrays = self._there(inputs)
        given = {self.renames.get(name, name): cotangent for name, cotangent in cotangents.items()}
        if not given:
            return {name: np.zeros_like(array) for name, array in zip(names, arrays, strict=True) if is_float(array)}
        values = {self.renames.get(name, name): output for name, output in outputs.items()}
        with np.errstate(all="ignore"):
            found = self._among(names).vjp(arrays, self._weights(names), values, given)
        return {
            name: gradient.astype(array.dtype, copy=False)
            for name, array, gradient in zip(names, arrays, found, strict=True)
            if is_float(array)
        }

    def _there(self, inputs: Mapping[str, Value]) -> tuple[list[str], list[Array]]:
        values = {name: inputs[name] for name in self.members}
        there = {name: value for name, value in values.items() if not isinstance(value, Missing)}
        if not there:
            raise ModelUnavailable(f"no member has answered: {', '.join(values)}")
        return list(there), list(there.values())

    def _require_alike(self, names: list[str], arrays: list[Array]) -> None:
        shapes = [self._compared(array) for array in arrays]
        for name, array, shape in zip(names, arrays, shapes, strict=True):
            if shape != shapes[0]:
                expected, got = describe(arrays[0]), describe(array)
                raise SignatureError(
                    f"member '{name}': expected {expected} as '{names[0]}', got {got}",
                    name=name, expected=expected, got=got,
                )  # fmt: skip

    def _compared(self, array: Array) -> tuple[Any, ...]:
        """What must be the same for all members."""
        form = form_of(array)
        if isinstance(self.combination, Concat) and -array.ndim <= self.combination.axis < array.ndim:
            place = self.combination.axis % array.ndim
            return (form.dtype, *array.shape[:place], None, *array.shape[place + 1 :])
        return (form.dtype, *array.shape)

    def _among(self, names: list[str]) -> Combination:
        if len(names) == len(self.members):
            return self.combination
        return self.combination.only([self.members.index(name) for name in names])

    def _weights(self, names: list[str]) -> Weights:
        return None if self.weights is None else [self.weights.get(name, 1.0) for name in names]


@dataclass(frozen=True, eq=False)
class FunctionStep:
    """Combines members by a Python function.

    Args:
        function: takes the members by name, None for one that is missing.
        members: their names.
        outputs: what it returns: an array if there is one, or a dict by name.
    """

    function: Callable[..., Any]
    members: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, inputs: Mapping[str, Value], wanted: Sequence[str]) -> dict[str, Array]:
        """The outputs wanted; what the function raises reaches the caller.

        Raises:
            InternalError: it returned something other than its outputs.
        """
        values = {name: inputs[name] for name in self.members}
        result = self.function(**{name: None if isinstance(one, Missing) else one for name, one in values.items()})
        signature = Signature((), self.outputs, name=getattr(self.function, "__name__", ""))
        given = result if isinstance(result, Mapping) else {self.outputs[0].name: result}
        try:
            return signature.fit_outputs(given, signature.select_outputs(list(wanted)))
        except SignatureError as error:
            raise InternalError(f"function '{signature.name}' broke its declared outputs: {error}") from error

    def vjp(
        self, inputs: Mapping[str, Value], outputs: Mapping[str, Array], cotangents: Mapping[str, Array]
    ) -> dict[str, Array]:
        """None: nobody knows what a function does."""
        raise NotDifferentiable("a Python function that combines gives no gradient; use a python node with a vjp")
