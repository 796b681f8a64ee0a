"""Operations number by number, such as `sigmoid`, `clip` and `cast`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from ensemble.application import INTEGERS, Applied, OfFloats, axis_in, is_float, spread
from ensemble.forms import Dim, Form
from ensemble.steps import Array
from remote_ops.errors import NotDifferentiable
from remote_ops.signature import DTYPES, did_you_mean

__all__ = ["Abs", "Cast", "Clip", "Exp", "Log", "Normalise", "Scale", "Sigmoid", "Threshold"]


class Abs(Applied):
    """The distance from 0."""

    word: ClassVar[str] = "abs"
    takes: ClassVar[str] = "numbers other than bool"

    def of(self, x: Array) -> Any:
        return np.abs(x)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g * np.sign(x)


class Exp(OfFloats):
    """e to the power of each number."""

    word: ClassVar[str] = "exp"

    def of(self, x: Array) -> Any:
        return np.exp(x)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g * y


class Log(OfFloats):
    """The natural logarithm: of 0, minus infinity, and of less, NaN."""

    word: ClassVar[str] = "log"

    def of(self, x: Array) -> Any:
        return np.log(x)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g / x


class Sigmoid(OfFloats):
    """`1 / (1 + exp(-x))`; large numbers do not overflow."""

    word: ClassVar[str] = "sigmoid"

    def of(self, x: Array) -> Any:
        small = np.exp(-np.abs(x))
        return np.where(x >= 0, np.ones_like(x), small) / (1 + small)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g * y * (1 - y)


class Scale(OfFloats):
    """`x * by + add`."""

    word: ClassVar[str] = "scale"
    by: float = 1.0
    add: float = 0.0

    def of(self, x: Array) -> Any:
        return x * x.dtype.type(self.by) + x.dtype.type(self.add)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g * g.dtype.type(self.by)


class Clip(Applied):
    """Numbers below `low` become `low`, those above `high` become `high`; a bound itself has the gradient 1."""

    word: ClassVar[str] = "clip"
    takes: ClassVar[str] = "numbers other than bool"
    low: int | float | None = None
    high: int | float | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Clip:
        if self.low is None and self.high is None:
            raise ValueError("expected low, high or both, got neither")
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise ValueError(f"expected low <= high, got low {self.low} and high {self.high}")
        return self

    def dtype(self, dtype: str | None) -> str | None:
        if dtype in INTEGERS:
            held = np.iinfo(DTYPES[dtype].numpy)
            for bound in (self.low, self.high):
                if bound is not None and not (isinstance(bound, int) and held.min <= bound <= held.max):
                    raise ValueError(f"expected bounds that are {dtype}, got {bound}")
        return dtype

    def of(self, x: Array) -> Any:
        low, high = (None if bound is None else x.dtype.type(bound) for bound in (self.low, self.high))
        return np.clip(x, low, high)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return np.where(y == x, g, np.zeros_like(g))


class Threshold(Applied):
    """Whether each number is `gt`, `gte`, `lt` or `lte` a bound: bool."""

    word: ClassVar[str] = "threshold"
    takes: ClassVar[str] = "numbers"
    gt: int | float | None = None
    gte: int | float | None = None
    lt: int | float | None = None
    lte: int | float | None = None

    _HOW: ClassVar[Mapping[str, Callable[[Any, Any], Any]]] = {
        "gt": operator.gt,
        "gte": operator.ge,
        "lt": operator.lt,
        "lte": operator.le,
    }

    @model_validator(mode="after")
    def _bounded(self) -> Threshold:
        given = [name for name in self._HOW if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of gt, gte, lt, lte, got {', '.join(given) or 'none'}")
        return self

    def dtype(self, dtype: str | None) -> str | None:
        return "bool"

    def of(self, x: Array) -> Any:
        ((compare, bound),) = [(how, v) for name, how in self._HOW.items() if (v := getattr(self, name)) is not None]
        return compare(x, x.dtype.type(bound) if x.dtype.kind == "f" else bound)


_Std = Annotated[float, Field(gt=0)]


class Normalise(OfFloats):
    """`(x - mean) / std`, each one number, or one for each place on `axis` (the last)."""

    word: ClassVar[str] = "normalise"
    mean: float | list[float]
    std: _Std | list[_Std]
    axis: int = -1

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        size = form.dims[axis_in(form, self.axis)] if form.dims is not None and self._lengths() else None
        for length in self._lengths():
            if isinstance(size, int) and length not in (size, 1):
                raise ValueError(f"expected {size} values for axis {self.axis} of {form}, got {length}")
        return form.dims

    def _lengths(self) -> list[int]:
        return [len(values) for values in (self.mean, self.std) if isinstance(values, list)]

    def of(self, x: Array) -> Any:
        return (x - spread(x, self.mean, self.axis)) / spread(x, self.std, self.axis)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g / spread(g, self.std, self.axis)


class Cast(Applied):
    """Another dtype, a float to an integer by losing its fraction; numbers and strings do not become each other."""

    word: ClassVar[str] = "cast"
    dtype_: str = Field(alias="dtype")

    @model_validator(mode="after")
    def _known(self) -> Cast:
        if self.dtype_ not in DTYPES:
            known = did_you_mean(self.dtype_, DTYPES)
            raise ValueError(f"no dtype '{self.dtype_}': expected one of {', '.join(DTYPES)}{known}")
        return self

    def __str__(self) -> str:
        return f"cast({self.dtype_})"

    def dtype(self, dtype: str | None) -> str | None:
        if dtype is not None and (dtype == "string") != (self.dtype_ == "string"):
            raise ValueError(f"expected {'a string' if self.dtype_ == 'string' else 'numbers'}, got {dtype}")
        return self.dtype_

    def computed(self, array: Array) -> Array:
        return array.astype(DTYPES[self.dtype_].numpy, copy=False)

    def pulled(self, array: Array, result: Array, cotangent: Array) -> Any:
        if not is_float(result):
            raise NotDifferentiable(f"{self}: only floats have gradients")
        return cotangent
