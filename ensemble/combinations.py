"""How arrays of several members become one: votes, means, ranks, and the gradients back to each member.

It computes; what may be combined with what is checked in `nodes.combine`. Arrays come in the order of declaration, and
those of members that did not answer are left out together with their weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

import numpy as np

from ensemble.application import is_float, narrow, wide
from ensemble.forms import Dim, Form
from ensemble.steps import Array
from remote_ops.errors import InvalidRequest, ModelUnavailable, NotDifferentiable

__all__ = ["COMBINATIONS", "Combination", "Concat", "HardVote", "Rank", "Weights", "place_of"]

Weights: TypeAlias = "Sequence[float] | None"  # one for each array; None: all count the same


def _stacked(arrays: Sequence[Array]) -> Array:
    return np.stack([wide(array) for array in arrays])


def _require_weight(weights: Sequence[float]) -> None:
    if not any(weights):
        raise ModelUnavailable("no member with a weight above 0 has answered")


def _average(stacked: Array, weights: Weights) -> Array:
    """As `numpy.average` over axis 0, bit by bit: float64 if there are weights, else of the same dtype."""
    if weights is None:
        return np.asarray(stacked.mean(0))  # the same sum, and of no rows too
    _require_weight(weights)
    return np.asarray(np.average(stacked, axis=0, weights=weights))


def _averaged(dtype: str | None, weighted: bool) -> str | None:
    """The dtype of an average."""
    if dtype is not None and (weighted or "float" not in dtype):
        return "float64"
    return dtype


def _parts(count: int, weights: Weights) -> Array:
    """The part that each array has in an average: they sum to 1."""
    parts = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    return np.asarray(parts / parts.sum())


def _shared(cotangent: Array, arrays: Sequence[Array], weights: Weights) -> list[Array]:
    """The gradient of an average with respect to each array."""
    return [wide(cotangent) * part for part in _parts(len(arrays), weights).tolist()]


@dataclass(frozen=True)
class Combination:
    """A way to combine. Its subclasses say for what, and do it.

    `takes` is a kind of dtypes as operations have it, `weighted` whether members may have weights, `apart` whether what
    comes out depends on how many members answer, `around` the axis unless another is said; None: it has none.
    """

    axis: int = 0
    takes: ClassVar[str] = "numbers"
    weighted: ClassVar[bool] = False
    apart: ClassVar[bool] = False
    around: ClassVar[int | None] = None

    def forms(self, members: Sequence[Form], weighted: bool) -> Mapping[str, Form]:
        """What comes out, of members that agree; raises `ValueError` for an axis that is not there."""
        return {"value": members[0]}

    def only(self, places: Sequence[int]) -> Combination:
        """The same for some of the members."""
        return self

    def run(self, arrays: Sequence[Array], weights: Weights) -> dict[str, Array]:
        """The outputs, of one array or more, that fit: `forms` of theirs raises nothing."""
        return {"value": narrow(self.value(_stacked(arrays), weights), arrays[0].dtype)}

    def value(self, stacked: Array, weights: Weights) -> Array:
        """The only output, of the members along axis 0."""
        raise NotImplementedError

    def vjp(
        self,
        arrays: Sequence[Array],
        weights: Weights,
        outputs: Mapping[str, Array],
        cotangents: Mapping[str, Array],
    ) -> list[Array]:
        """The gradient with respect to each array, in any float dtype.

        Raises:
            NotDifferentiable: there is none that means something.
        """
        return self.back(arrays, weights, outputs["value"], cotangents["value"])

    def back(self, arrays: Sequence[Array], weights: Weights, value: Array, cotangent: Array) -> list[Array]:
        """The same of the only output."""
        raise NotDifferentiable(f"{type(self).__name__} has no derivative that means something")


def dims_without(form: Form, axis: int) -> tuple[Dim, ...] | None:
    """The dims of a form but for one axis; raises `ValueError` if it has no such axis."""
    if form.dims is None:
        return None
    place = place_of(form, axis)
    return (*form.dims[:place], *form.dims[place + 1 :])


def place_of(form: Form, axis: int, *, extra: int = 0) -> int:
    """An axis from 0, of a form whose rank is known, or of a result with `extra` axes more."""
    rank = len(form.dims or ()) + extra
    if not -rank <= axis < rank:
        raise ValueError(f"expected an axis from {-rank} to {rank - 1} for {form}, got {axis}")
    return axis % rank


@dataclass(frozen=True)
class SoftVote(Combination):
    """The mean of probabilities, and the class with the largest one, the first of equal ones.

    Bit by bit that of scikit-learn's `VotingClassifier`, its dtypes included.
    """

    takes: ClassVar[str] = "floats"
    weighted: ClassVar[bool] = True
    around: ClassVar[int | None] = -1

    def forms(self, members: Sequence[Form], weighted: bool) -> Mapping[str, Form]:
        proba = members[0]._replace(dtype=_averaged(members[0].dtype, weighted))
        return {"proba": proba, "label": Form("int64", dims_without(proba, self.axis))}

    def run(self, arrays: Sequence[Array], weights: Weights) -> dict[str, Array]:
        mean = _average(_stacked(arrays), weights)
        return {"proba": narrow(mean, arrays[0].dtype), "label": mean.argmax(self.axis).astype(np.int64, copy=False)}

    def vjp(
        self,
        arrays: Sequence[Array],
        weights: Weights,
        outputs: Mapping[str, Array],
        cotangents: Mapping[str, Array],
    ) -> list[Array]:
        if "proba" not in cotangents:
            raise NotDifferentiable("the label of a soft vote has no derivative that means something, only 'proba' has")
        return _shared(cotangents["proba"], arrays, weights)


@dataclass(frozen=True)
class HardVote(Combination):
    """The label that most members give, by weight, and the lowest of equal ones, as scikit-learn's `VotingClassifier`.

    Args:
        labels: how many classes there are, or their names in order; then `votes` are given too. Members that give names
            need them.
    """

    labels: int | tuple[str, ...] | None = None
    takes: ClassVar[str] = "integers"
    weighted: ClassVar[bool] = True

    @property
    def classes(self) -> int | None:
        """How many there are, if it is known."""
        return len(self.labels) if isinstance(self.labels, tuple) else self.labels

    def forms(self, members: Sequence[Form], weighted: bool) -> Mapping[str, Form]:
        dims, dtype = members[0].dims, members[0].dtype
        label = Form("string" if dtype == "string" else None if dtype is None else "int64", dims)
        votes = Form("float64", None if dims is None else (*dims, self.classes))
        return {"label": label} if self.labels is None else {"label": label, "votes": votes}

    def run(self, arrays: Sequence[Array], weights: Weights) -> dict[str, Array]:
        labels = np.stack([self._numbers(array) for array in arrays])
        counted = [1.0] * len(arrays) if weights is None else weights
        _require_weight(counted)
        winners = _winners(labels, counted)
        given = {"label": self._names(winners) if arrays[0].dtype.kind in "OSUT" else winners}
        return given if self.classes is None else {**given, "votes": _votes(labels, counted, self.classes)}

    def vjp(
        self,
        arrays: Sequence[Array],
        weights: Weights,
        outputs: Mapping[str, Array],
        cotangents: Mapping[str, Array],
    ) -> list[Array]:
        raise NotDifferentiable("a vote of labels has no derivative that means something; use soft_vote")

    def _numbers(self, array: Array) -> Array:
        if array.dtype.kind in "OSUT":
            return self._numbered(array)
        numbers = array.astype(np.int64, copy=False)
        if numbers.size and (numbers.min() < 0 or (self.classes is not None and numbers.max() >= self.classes)):
            wrong = int(numbers.min() if numbers.min() < 0 else numbers.max())
            below = "0 or more" if self.classes is None else f"from 0 to {self.classes - 1}"
            raise InvalidRequest(f"expected labels {below}, got {wrong}")
        return numbers

    def _numbered(self, array: Array) -> Array:
        places = {name: place for place, name in enumerate(self.labels if isinstance(self.labels, tuple) else ())}
        texts = [text.decode() if isinstance(text, bytes) else text for text in array.ravel().tolist()]
        if unknown := [text for text in texts if text not in places]:
            raise InvalidRequest(f"expected labels {', '.join(places) or 'that are integers'}, got {unknown[0]!r}")
        return np.array([places[text] for text in texts], np.int64).reshape(array.shape)

    def _names(self, numbers: Array) -> Array:
        return np.array(self.labels, object)[numbers]


def _winners(labels: Array, weights: Sequence[float]) -> Array:
    """The label with the most votes, the lowest of equal ones, of `labels` `(members, *shape)`.

    A label's votes are summed in the order of members, as `numpy.bincount` does, but labels may be as large as they
    like.
    """
    votes = np.zeros(labels.shape)
    for label, weight in zip(labels, weights, strict=True):
        votes += np.where(labels == label, weight, 0.0)
    return np.asarray(np.where(votes == votes.max(0), labels, np.iinfo(np.int64).max).min(0))


def _votes(labels: Array, weights: Sequence[float], classes: int) -> Array:
    """The votes of each class, on a new last axis."""
    votes = np.zeros((*labels.shape[1:], classes))
    for label, weight in zip(labels, weights, strict=True):
        votes += np.where(label[..., np.newaxis] == np.arange(classes), weight, 0.0)
    return votes


@dataclass(frozen=True)
class Mean(Combination):
    """The mean, as `numpy.average`: float64 of integers, and where there are weights."""

    weighted: ClassVar[bool] = True

    def forms(self, members: Sequence[Form], weighted: bool) -> Mapping[str, Form]:
        return {"value": members[0]._replace(dtype=_averaged(members[0].dtype, weighted))}

    def value(self, stacked: Array, weights: Weights) -> Array:
        return _average(stacked, weights)

    def back(self, arrays: Sequence[Array], weights: Weights, value: Array, cotangent: Array) -> list[Array]:
        return _shared(cotangent, arrays, weights)


@dataclass(frozen=True)
class GMean(Mean):
    """The geometric mean, by the mean of logarithms in float64, so that no product underflows; of less than 0, NaN."""

    takes: ClassVar[str] = "floats"

    def run(self, arrays: Sequence[Array], weights: Weights) -> dict[str, Array]:
        mean = self.value(np.stack([array.astype(np.float64) for array in arrays]), weights)
        return {"value": mean if weights is not None else mean.astype(arrays[0].dtype, copy=False)}

    def value(self, stacked: Array, weights: Weights) -> Array:
        return np.asarray(np.exp(_average(np.log(stacked), weights)))

    def back(self, arrays: Sequence[Array], weights: Weights, value: Array, cotangent: Array) -> list[Array]:
        shares = _shared(wide(cotangent) * wide(value), arrays, weights)
        return [share / wide(array) for share, array in zip(shares, arrays, strict=True)]


@dataclass(frozen=True)
class Median(Combination):
    """The middle one, or the mean of the two in the middle, which share its gradient: float64 of integers."""

    takes: ClassVar[str] = "numbers other than bool"

    def forms(self, members: Sequence[Form], weighted: bool) -> Mapping[str, Form]:
        return {"value": members[0]._replace(dtype=_averaged(members[0].dtype, False))}

    def value(self, stacked: Array, weights: Weights) -> Array:
        return np.asarray(np.median(stacked, 0))

    def back(self, arrays: Sequence[Array], weights: Weights, value: Array, cotangent: Array) -> list[Array]:
        order = np.argsort(_stacked(arrays), axis=0, kind="stable")
        middle = (order[(len(arrays) - 1) // 2], order[len(arrays) // 2])
        half = wide(cotangent) / 2
        return [half * (middle[0] == place) + half * (middle[1] == place) for place in range(len(arrays))]


@dataclass(frozen=True)
class Max(Combination):
    """The largest; equal ones share its gradient, as of torch's `amax`."""

    def value(self, stacked: Array, weights: Weights) -> Array:
        return np.asarray(stacked.max(0))

    def back(self, arrays: Sequence[Array], weights: Weights, value: Array, cotangent: Array) -> list[Array]:
        there = _stacked(arrays) == wide(value)
        share = wide(cotangent) / there.sum(0)
        return [np.where(here, share, 0) for here in there]


@dataclass(frozen=True)
class Min(Max):
    """The smallest; equal ones share its gradient, as of torch's `amin`."""

    def value(self, stacked: Array, weights: Weights) -> Array:
        return np.asarray(stacked.min(0))


@dataclass(frozen=True)
class Rank(Combination):
    """The mean of ranks, from 1, along `axis`; equal numbers have the mean of theirs, as `scipy.stats.rankdata`.

    Args:
        references: for each array, sorted numbers `(R,)`; a number's rank is then the one it has among these and
            itself, whatever else is in the batch. None: among the numbers of the batch, which must be two or more.
    """

    references: tuple[Array, ...] | None = None
    takes: ClassVar[str] = "numbers other than bool"
    weighted: ClassVar[bool] = True
    around: ClassVar[int | None] = 0

    def forms(self, members: Sequence[Form], weighted: bool) -> Mapping[str, Form]:
        dims = members[0].dims
        if dims is not None and dims[place_of(members[0], self.axis)] == 1 and self.references is None:
            raise ValueError(_ALONE)
        return {"value": Form("float64", dims)}

    def only(self, places: Sequence[int]) -> Combination:
        if self.references is None:
            return self
        return replace(self, references=tuple([self.references[place] for place in places]))

    def run(self, arrays: Sequence[Array], weights: Weights) -> dict[str, Array]:
        if self.references is not None:
            ranks = [_ranks_in(one, array) for one, array in zip(self.references, arrays, strict=True)]
        else:
            ranks = [_ranks(wide(array), self.axis) for array in arrays]
        return {"value": _average(np.stack(ranks), weights)}


_ALONE = "the rank of one number says nothing: expected 2 rows or more, got 1; give a 'reference' to rank it among"


def _ranks(array: Array, axis: int) -> Array:
    """The ranks along an axis: equal numbers, which are neighbours once sorted, share the mean of theirs."""
    rows = np.moveaxis(array, axis, -1)
    order = rows.argsort(-1, kind="stable")
    ordered = np.take_along_axis(rows, order, -1)
    changes = np.ones((*rows.shape[:-1], rows.shape[-1] + 1), bool)  # before the first, between, behind the last
    changes[..., 1:-1] = ordered[..., 1:] != ordered[..., :-1]
    places = np.arange(rows.shape[-1])
    first = np.maximum.accumulate(np.where(changes[..., :-1], places, 0), -1)
    last = np.minimum.accumulate(np.where(changes[..., 1:], places, rows.shape[-1])[..., ::-1], -1)[..., ::-1]
    ranks = np.empty(rows.shape)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, -1)
    if is_float(rows):
        ranks[np.isnan(rows).any(-1)] = np.nan
    return np.moveaxis(ranks, -1, axis)


def _ranks_in(reference: Array, array: Array) -> Array:
    """The ranks that numbers have among a sorted reference and themselves."""
    numbers = wide(array)
    ranks = np.asarray((np.searchsorted(reference, numbers) + np.searchsorted(reference, numbers, "right")) / 2 + 1)
    return np.where(np.isnan(numbers), np.nan, ranks) if is_float(numbers) else ranks


@dataclass(frozen=True)
class Concat(Combination):
    """One behind the other, along `axis`."""

    takes: ClassVar[str] = "any"
    apart: ClassVar[bool] = True
    around: ClassVar[int | None] = -1

    def forms(self, members: Sequence[Form], weighted: bool) -> Mapping[str, Form]:
        dims = members[0].dims
        if dims is None:
            return {"value": members[0]}
        place = place_of(members[0], self.axis)
        sizes = [None if member.dims is None else member.dims[place] for member in members]
        whole = sizes[0] if len(sizes) == 1 else _sum(sizes)
        return {"value": members[0]._replace(dims=(*dims[:place], whole, *dims[place + 1 :]))}

    def run(self, arrays: Sequence[Array], weights: Weights) -> dict[str, Array]:
        return {"value": np.concatenate(arrays, self.axis)}

    def back(self, arrays: Sequence[Array], weights: Weights, value: Array, cotangent: Array) -> list[Array]:
        ends = np.cumsum([array.shape[self.axis] for array in arrays])[:-1]
        return list(np.split(cotangent, ends, self.axis))


def _sum(sizes: Sequence[Dim]) -> Dim:
    known = [size for size in sizes if isinstance(size, int)]
    return sum(known) if len(known) == len(sizes) else None


@dataclass(frozen=True)
class Stack(Combination):
    """Side by side, on a new axis; rows stay on axis 0 unless `axis` says otherwise."""

    takes: ClassVar[str] = "any"
    apart: ClassVar[bool] = True
    around: ClassVar[int | None] = 1

    def forms(self, members: Sequence[Form], weighted: bool) -> Mapping[str, Form]:
        dims = members[0].dims
        if dims is None:
            return {"value": members[0]}
        place = place_of(members[0], self.axis, extra=1)
        return {"value": members[0]._replace(dims=(*dims[:place], len(members), *dims[place:]))}

    def run(self, arrays: Sequence[Array], weights: Weights) -> dict[str, Array]:
        return {"value": np.stack(arrays, self.axis)}

    def back(self, arrays: Sequence[Array], weights: Weights, value: Array, cotangent: Array) -> list[Array]:
        return [cotangent.take(place, self.axis) for place in range(len(arrays))]


COMBINATIONS: Mapping[str, type[Combination]] = {
    "soft_vote": SoftVote,
    "hard_vote": HardVote,
    "mean": Mean,
    "gmean": GMean,
    "median": Median,
    "max": Max,
    "min": Min,
    "rank": Rank,
    "concat": Concat,
    "stack": Stack,
}
