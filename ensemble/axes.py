"""Operations along an axis, such as `softmax`, `argmax` and `mean`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from ensemble.application import INTEGERS, NUMBERS, Applied, OfFloats, axes_in, axis_in, form_of, without
from ensemble.forms import Dim, Form
from ensemble.steps import Array
from remote_ops.signature import DTYPES, did_you_mean

__all__ = ["Argmax", "L2Normalise", "LogSoftmax", "Max", "Mean", "Min", "OneHot", "Softmax", "Sum"]


class Softmax(OfFloats):
    """The exponentials over their sum, along `axis`; large numbers do not overflow."""

    word: ClassVar[str] = "softmax"
    axis: int = -1

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        return form.dims if form.dims is None else (axis_in(form, self.axis), form.dims)[1]

    def of(self, x: Array) -> Any:
        powers = np.exp(x - x.max(self.axis, keepdims=True, initial=-np.inf))
        return powers / powers.sum(self.axis, keepdims=True)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return y * (g - (y * g).sum(self.axis, keepdims=True))


class LogSoftmax(Softmax):
    """The logarithm of `softmax`, exact where that is 0."""

    word: ClassVar[str] = "log_softmax"

    def of(self, x: Array) -> Any:
        below = x - x.max(self.axis, keepdims=True, initial=-np.inf)
        return below - np.log(np.exp(below).sum(self.axis, keepdims=True))

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g - np.exp(y) * g.sum(self.axis, keepdims=True)


class L2Normalise(Softmax):
    """Vectors along `axis` over their length, or over `eps` where they are shorter; no square overflows."""

    word: ClassVar[str] = "l2_normalise"
    eps: Annotated[float, Field(gt=0)] = 1e-12

    def _length(self, x: Array) -> Any:
        largest = np.abs(x).max(self.axis, keepdims=True, initial=0)
        unit = np.where(largest > 0, largest, 1).astype(x.dtype)
        return np.maximum(unit * np.sqrt(np.square(x / unit).sum(self.axis, keepdims=True)), x.dtype.type(self.eps))

    def of(self, x: Array) -> Any:
        return x / self._length(x)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        length = self._length(x)
        along = y * (y * g).sum(self.axis, keepdims=True)
        return (g - np.where(length > self.eps, along, 0)) / length


class Argmax(Applied):
    """Where the largest number is along `axis`, the first of equal ones: int64."""

    word: ClassVar[str] = "argmax"
    takes: ClassVar[str] = "numbers"
    axis: int = -1
    keepdims: bool = False

    def dtype(self, dtype: str | None) -> str | None:
        return "int64"

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        return without(_not_empty(form, self.axis), self.axis, keepdims=self.keepdims)

    def of(self, x: Array) -> Any:
        return x.argmax(self.axis, keepdims=self.keepdims).astype(np.int64, copy=False)


def _not_empty(form: Form, axis: int | Sequence[int] | None) -> Form:
    """The form, unless one of the axes has no place on it."""
    if form.dims is not None and any(form.dims[place] == 0 for place in axes_in(form, axis)):
        raise ValueError(f"expected one value or more along axis {axis}, got {form}")
    return form


class _Reduced(Applied):
    """One number of those along `axis` (one, some, or by default all)."""

    takes_a_list: ClassVar[bool] = True
    takes: ClassVar[str] = "numbers"
    axis: int | list[int] | None = None
    keepdims: bool = False

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        return without(form, self.axis, keepdims=self.keepdims)

    def _how(self) -> dict[str, Any]:
        return {"axis": tuple(self.axis) if isinstance(self.axis, list) else self.axis, "keepdims": self.keepdims}

    def _apart(self, x: Array, reduced: Array) -> Array:
        """What was reduced, with its axes again, to be broadcast against `x`."""
        return reduced.reshape([size or 0 for size in without(form_of(x), self.axis, keepdims=True) or ()])


class Max(_Reduced):
    """The largest number; equal ones share its gradient."""

    word: ClassVar[str] = "max"

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        return super().dims(_not_empty(form, self.axis))

    def of(self, x: Array) -> Any:
        return x.max(**self._how())

    def back(self, x: Array, y: Array, g: Array) -> Any:
        there = (x == self._apart(x, y)).astype(g.dtype)
        return there * self._apart(x, g) / there.sum(axis=self._how()["axis"], keepdims=True)


class Min(Max):
    """The smallest number; equal ones share its gradient."""

    word: ClassVar[str] = "min"

    def of(self, x: Array) -> Any:
        return x.min(**self._how())


class Sum(_Reduced):
    """The sum; of integers and bool, it is int64 or uint64."""

    word: ClassVar[str] = "sum"

    def dtype(self, dtype: str | None) -> str | None:
        if dtype in INTEGERS or dtype == "bool":
            return "uint64" if dtype.startswith("u") else "int64"
        return dtype

    def of(self, x: Array) -> Any:
        kinds: Mapping[str, Any] = {"u": np.uint64, "i": np.int64, "b": np.int64}
        return x.sum(dtype=kinds.get(x.dtype.kind), **self._how())

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return np.broadcast_to(self._apart(x, g), x.shape)


class Mean(Sum):
    """The mean; of integers and bool, it is float64."""

    word: ClassVar[str] = "mean"

    def dtype(self, dtype: str | None) -> str | None:
        return "float64" if dtype in INTEGERS or dtype == "bool" else dtype

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        return super().dims(_not_empty(form, self.axis))

    def of(self, x: Array) -> Any:
        return x.mean(**self._how())

    def back(self, x: Array, y: Array, g: Array) -> Any:
        shared = x.size // y.size if y.size else 1
        return super().back(x, y, g) / g.dtype.type(shared)


class OneHot(Applied):
    """A new last axis of `n` numbers, 1 where the label is and 0 elsewhere, of `dtype`."""

    word: ClassVar[str] = "one_hot"
    takes: ClassVar[str] = "integers"
    n: Annotated[int, Field(gt=0)]
    dtype_: str = Field(default="float32", alias="dtype")

    @model_validator(mode="after")
    def _known(self) -> OneHot:
        if self.dtype_ not in NUMBERS:
            raise ValueError(f"no dtype '{self.dtype_}' of numbers{did_you_mean(self.dtype_, NUMBERS)}")
        return self

    def dtype(self, dtype: str | None) -> str | None:
        return self.dtype_

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        return None if form.dims is None else (*form.dims, self.n)

    def of(self, x: Array) -> Any:
        if x.size and (x.min() < 0 or x.max() >= self.n):
            wrong = int(x.min()) if x.min() < 0 else int(x.max())
            raise ValueError(f"{self}: expected labels from 0 to {self.n - 1}, got {wrong}")
        return (x[..., np.newaxis].astype(np.int64) == np.arange(self.n)).astype(DTYPES[self.dtype_].numpy)
