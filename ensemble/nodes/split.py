"""Split: each request, or each row, goes to one of several nodes by weight; a mirror gets copies, unminded."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from ensemble.forms import UNKNOWN, Dim, Form
from ensemble.nodes.controller import AlternativesSpec, agreed, with_rows
from ensemble.nodes.node import EdgeAt, EdgeText, Model, Owned, Scope, Share
from ensemble.rows import Blank, by_row, carriers, passed, rows_in
from ensemble.steps import Array, Assembly, Call, Calls, Outcome, Piece
from remote_ops.errors import SignatureError
from remote_ops.signature import describe

__all__ = ["Mirror", "Split", "SplitSpec", "Wheel"]


def _weights(weights: dict[str, float]) -> dict[str, float]:
    if not all(0 <= weight < float("inf") for weight in weights.values()) or not any(weights.values()):
        raise PydanticCustomError(
            "E112", "expected weights of 0 or more, not all of them 0, got {weights}", {"weights": str(weights)}
        )
    return weights


def _part(share: float) -> float:
    if share > 1:
        raise ValueError(f"expected a share of 100% at most, got {share:.0%}")
    return share


class Mirror(Model):
    """A node that gets copies of requests, and whose answers are dropped."""

    to: str
    """The node."""
    sample: Annotated[Share, AfterValidator(_part)] = 1.0
    """The share of requests that are copied to it, such as `20%`."""


class SplitSpec(AlternativesSpec):
    """Runs one of several nodes, each as often as its weight says."""

    kind: Literal["split"]
    weights: Annotated[dict[str, float], AfterValidator(_weights), Field(min_length=1)]
    """How often each node runs, relative to the others."""
    sticky: EdgeText | None = None
    """A key, text or whole number, that always goes the same way: one for a request, or one for each row."""
    seed: int = 0
    """Which keys go which way; without a key, the order of ways that requests take."""
    mirror: Mirror | None = None
    """A node that gets copies of requests; it never delays or fails an answer."""
    record: str | None = None
    """The name of one more output, of strings, that says which node answered: one, or one for each row."""

    def edges(self) -> Iterator[EdgeAt]:
        """What it is sticky by, and what it gives on."""
        if self.sticky is not None:
            yield EdgeAt("$sticky", self.sticky, ("sticky",), needed=False)
        yield from super().edges()

    def owned(self) -> Iterator[Owned]:
        """The nodes with a weight, and the mirror."""
        yield from self._arms
        if self.mirror is not None:
            yield Owned(self.mirror.to, ("mirror", "to"))

    def spared(self) -> Collection[str]:
        """The mirror."""
        return () if self.mirror is None or self.mirror.to in self.weights else (self.mirror.to,)

    def forms(self, inputs: Mapping[str | int, Form], scope: Scope) -> Mapping[str, Form]:
        """What all of its nodes give, and which it was if `record` says so."""
        key = scope.resolve(inputs.get("$sticky", UNKNOWN))
        self._check_key(key, scope)
        if self.mirror is not None:
            scope.child(self.mirror.to)
        forms = agreed(scope, self._arms)
        if self.record in forms:
            text = f"the alternatives have an output '{self.record}' too: take another name"
            scope.faults.add("E102", (*scope.path, "record"), text)
        if per_row := self._carrying(inputs, scope):
            forms = with_rows(scope, forms, key.dims[0] if key.dims else None, "'sticky'", scope.path)
        if self.record is None or not forms:
            return forms
        return {**forms, self.record: Form("string", (key.dims and key.dims[:1]) if per_row else ())}

    def step(self, scope: Scope) -> Split:
        """The controller."""
        given = {name: scope.resolve(form) for name, form in scope.inputs.items()}
        blank = Blank({name: scope.resolve(form) for name, form in agreed(scope, self._arms).items()}, given)
        return Split(
            Wheel(self.weights, self.seed), self._carrying(scope.inputs, scope), blank, self.mirror, self.record or ""
        )

    @property
    def _arms(self) -> list[Owned]:
        return [Owned(name, ("weights", name)) for name in self.weights]

    def _carrying(self, inputs: Mapping[str | int, Form], scope: Scope) -> tuple[str, ...]:
        """The inputs whose rows go each their own way: none where the key has none."""
        key = scope.resolve(inputs.get("$sticky", UNKNOWN))
        if self.sticky is None or key.dims == ():
            return ()
        rows: Dim = key.dims[0] if key.dims else None
        return carriers({name: scope.resolve(form) for name, form in inputs.items()}, rows)

    def _check_key(self, key: Form, scope: Scope) -> None:
        if self.sticky is None:
            return
        at, name = (*scope.path, "sticky"), f"'{self.sticky.source}'"
        if key.dtype is not None and "float" in key.dtype:
            scope.faults.add(
                "E106", at, f"{name}: expected a key of text or whole numbers, got {key}; cast it to int64"
            )
        if any(isinstance(dim, int) and dim != 1 for dim in (key.dims or ())[1:]):
            scope.faults.add("E107", at, f"{name}: expected one key, or one for each row, got {key}")


class Wheel:
    """Chooses among nodes by weight: for a key always the same, in any process; without one, at random.

    Constant: weights and seed. Changing: the random numbers, which are drawn one at a time and need no lock.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        self.nodes = tuple(weights)
        self._ends = list(accumulate(weights.values()))
        self._last = max(place for place, weight in enumerate(weights.values()) if weight)
        self._seed = str(seed).encode()
        self._random = random.Random(seed)
        self._samples = random.Random(f"{seed} mirror")

    def at(self, point: float) -> int:
        """The place of the node that a point from 0 to 1 falls on."""
        return min(bisect_right(self._ends, point * self._ends[-1]), self._last)

    def of_key(self, key: Any) -> int:
        """The place of the node of a key."""
        text = key if isinstance(key, bytes) else str(key).encode("utf-8", "surrogatepass")
        digest = blake2b(self._seed + b"\0" + text, digest_size=8).digest()
        return self.at(int.from_bytes(digest, "big") / 2**64)

    def at_random(self) -> int:
        """The place of a node for one request."""
        return self.at(self._random.random())

    def sampled(self, share: float) -> bool:
        """Whether one request is among a share of them."""
        return self._samples.random() < share


@dataclass(frozen=True)
class Split:
    """A split that runs.

    Args:
        wheel: chooses.
        carrying: the inputs that have rows where the key has them; none where a request goes one way.
        blank: what comes out of no rows.
        mirror: who gets copies.
        record: the output that says which node it was; empty for none.
    """

    wheel: Wheel
    carrying: tuple[str, ...]
    blank: Blank
    mirror: Mirror | None = None
    record: str = ""

    def steps(self, inputs: Mapping[str, Array], wanted: Sequence[str]) -> Generator[Calls, list[Outcome], Assembly]:
        """Run one node, or each node with its rows; and the mirror."""
        given, key = passed(inputs), inputs.get("$sticky")
        aside = self._aside(given)
        theirs = [name for name in wanted if name != self.record] or list(self.blank.outputs)[:1] or None
        if not self.carrying or not isinstance(key, np.ndarray) or not key.ndim:
            place = self.wheel.at_random() if not isinstance(key, np.ndarray) else self.wheel.of_key(_one(key))
            yield Calls([Call(self.wheel.nodes[place], given, theirs), *aside])
            rows = rows_in(given, self.carrying) if self.carrying else None
            return Assembly((Piece(0),), extra=self._recorded(np.asarray(place), rows))
        choice = np.array([self.wheel.of_key(one) for one in _for_rows(key, given, self.carrying)], np.intp)
        assembly = yield from by_row(
            self.wheel.nodes, choice, given, self.carrying, theirs, self.blank, aside if len(choice) else ()
        )
        return assembly._replace(extra=self._recorded(choice))

    def _aside(self, given: Mapping[str, Array]) -> list[Call]:
        if self.mirror is None or not self.wheel.sampled(self.mirror.sample):
            return []
        return [Call(self.mirror.to, given, waits=False)]

    def _recorded(self, choice: Array, rows: int | None = None) -> dict[str, Array]:
        names = np.array([*self.wheel.nodes, None], object)[choice]
        return {self.record: np.full(() if rows is None else rows, names, object) if not choice.ndim else names}


def _one(key: Array) -> Any:
    if key.size != 1:
        raise SignatureError(
            f"a split expects one key for a request whose inputs have no rows, got {describe(key)}",
            name="sticky",
            expected="one key",
            got=describe(key),
        )
    return key.item()


def _for_rows(key: Array, inputs: Mapping[str, Array], carrying: Sequence[str]) -> list[Any]:
    """The key of each row."""
    if key.size != len(key):
        raise SignatureError(
            f"a split expects one key for each row, got {describe(key)}",
            name="sticky",
            expected="one key for each row",
            got=describe(key),
        )
    rows_in(inputs, carrying, "'sticky'", len(key))
    return key.ravel().tolist()  # type: ignore[no-any-return]
