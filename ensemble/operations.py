"""What `apply:` and `cast:` do to an array on an edge: one small operation each, with its form and its derivative.

An operation keeps the dtype it is given unless its line says otherwise (the narrow floats are computed in float32),
keeps symbols, is a view where one will do, warns of nothing, and never writes into its input. It knows no graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ensemble.forms import Dim, Form
from ensemble.plan import Operation
from ensemble.steps import Array
from remote_ops.errors import NotDifferentiable, SignatureError
from remote_ops.signature import BY_NUMPY, DTYPES, describe, did_you_mean

__all__ = ["NAMES", "OPERATIONS", "TAKES", "cast", "form_of", "is_float", "narrow", "operation", "wide"]

_NARROW = frozenset(row.numpy for row in DTYPES.values() if row.name in ("float16", "bfloat16") or "float8" in row.name)
_INTEGERS = frozenset(name for name in DTYPES if name.startswith(("int", "uint")))
_NUMBERS = frozenset(DTYPES) - {"string"}
TAKES: Mapping[str, frozenset[str]] = {
    "floats": frozenset(name for name in DTYPES if "float" in name),
    "integers": _INTEGERS,
    "numbers": _NUMBERS,
    "numbers other than bool": _NUMBERS - {"bool"},
    "any": frozenset(DTYPES),
}


def is_float(array: Array) -> bool:
    """Whether it holds real numbers, bfloat16 and float8 among them."""
    return array.dtype.kind == "f" or array.dtype in _NARROW


def wide(array: Array) -> Array:
    """The array to compute with: float32 for the narrow floats, else as it is."""
    return array.astype(np.float32) if array.dtype in _NARROW else array


def narrow(value: Any, like: np.dtype[Any]) -> Array:
    """What was computed of `wide`, as an array, and in the narrow dtype it came from."""
    result: Array = np.asarray(value)
    return result.astype(like) if like in _NARROW and result.dtype == np.float32 else result


def form_of(array: Array) -> Form:
    """The form of an array; text of a fixed width is a string like any other."""
    row = BY_NUMPY.get(array.dtype)
    return Form("string" if array.dtype.kind in "SUT" else row.name if row else array.dtype.name, array.shape)


# --------------------------------------------------------------------------- axes and dims


def _axis(form: Form, axis: int, *, extra: int = 0) -> int:
    """An axis from 0, of a form whose rank is known; `extra` is how many more axes the result has."""
    assert form.dims is not None
    rank = len(form.dims) + extra
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} is not in {form}")
    return axis % rank


def _axes(form: Form, axis: int | Sequence[int] | None) -> tuple[int, ...]:
    assert form.dims is not None
    if axis is None:
        return tuple(range(len(form.dims)))
    found = tuple([_axis(form, one) for one in ([axis] if isinstance(axis, int) else axis)])
    if len(set(found)) != len(found):
        raise ValueError(f"axes {list(axis)} name one axis twice in {form}")  # type: ignore[arg-type]
    return found


def _without(form: Form, axis: int | Sequence[int] | None, *, keepdims: bool = False) -> tuple[Dim, ...] | None:
    """The dims that are left when axes are reduced away."""
    if form.dims is None:
        return None
    gone = _axes(form, axis)
    if keepdims:
        return tuple([1 if place in gone else dim for place, dim in enumerate(form.dims)])
    return tuple([dim for place, dim in enumerate(form.dims) if place not in gone])


def _product(dims: Sequence[Dim]) -> Dim:
    """The product of dims: known where all are sizes, or all but one are 1."""
    others = [dim for dim in dims if dim != 1]
    if len(others) == 1:
        return others[0]
    sizes = [dim for dim in others if isinstance(dim, int)]
    return math.prod(sizes) if len(sizes) == len(others) or 0 in sizes else None


def _spread(array: Array, values: float | list[float], axis: int) -> Array:
    """One value, or one for each place on an axis, in the dtype of `array`, to be broadcast against it."""
    shape = [1] * array.ndim
    if isinstance(values, list):
        shape[axis] = -1
    return np.asarray(values, array.dtype).reshape(shape)


# --------------------------------------------------------------------------- what every operation has


class _Applied(BaseModel):
    """An operation and its arguments; `takes` says which dtypes it is for."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    word: ClassVar[str] = ""
    takes: ClassVar[str] = "any"
    takes_a_list: ClassVar[bool] = False  # its first argument is a list, so one is not spread over several

    def __str__(self) -> str:
        given = ", ".join(f"{name}={getattr(self, name)}" for name in type(self).model_fields if self._is_given(name))
        return f"{self.word}({given})" if given else self.word

    def _is_given(self, name: str) -> bool:
        return name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default

    def form(self, form: Form) -> Form:
        """The form of the result; raises `ValueError` where the operation does not fit."""
        if form.dtype is not None and form.dtype not in TAKES[self.takes]:
            hint = "; cast first: apply: [{cast: float32}, ...]" if form.dtype in _NUMBERS else ""
            raise ValueError(f"{self}: expected {self.takes}, got {form}{hint}")
        try:
            return Form(self.dtype(form.dtype), self.dims(form))
        except ValueError as error:
            raise ValueError(f"{self}: {error}") from None

    def dtype(self, dtype: str | None) -> str | None:
        """The dtype of the result."""
        return dtype

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        """The dims of the result; raises `ValueError`."""
        return form.dims

    def run(self, array: Array) -> Array:
        """The result for one array.

        Raises:
            SignatureError: it does not fit, which a form with an unknown dtype or unknown dims did not tell.
        """
        try:
            self.form(form_of(array))
            with np.errstate(all="ignore"):
                return self.computed(array)
        except ValueError as error:
            if isinstance(error, SignatureError):
                raise
            raise SignatureError(str(error), expected=self.takes, got=describe(array)) from error

    def vjp(self, array: Array, result: Array, cotangent: Array) -> Array:
        """The gradient with respect to `array`, of its dtype.

        Raises:
            NotDifferentiable: `array` holds no floats, or the operation has no derivative that means something.
        """
        if not is_float(array):
            raise NotDifferentiable(f"{self} of {describe(array)}: only floats have gradients")
        with np.errstate(all="ignore"):
            gradient: Array = self.pulled(array, result, cotangent)
            return gradient.astype(array.dtype, copy=False)

    def computed(self, array: Array) -> Array:
        """`run` of an array that fits."""
        return narrow(self.of(wide(array)), array.dtype)

    def pulled(self, array: Array, result: Array, cotangent: Array) -> Any:
        """`vjp` of floats, in any float dtype."""
        return self.back(wide(array), wide(result), wide(cotangent))

    def of(self, x: Array) -> Any:
        """The result, of an array that is no narrow float."""
        raise NotImplementedError

    def back(self, x: Array, y: Array, g: Array) -> Any:
        """The gradient; none unless an operation has one."""
        raise NotDifferentiable(f"{self} has no derivative that means something")


class _Float(_Applied):
    takes: ClassVar[str] = "floats"


class _Move(_Applied):
    """An operation that gives the same numbers in other places, most of them as a view."""

    def computed(self, array: Array) -> Array:
        """No number is computed with, so that no dtype is widened."""
        return np.asarray(self.of(array))

    def pulled(self, array: Array, result: Array, cotangent: Array) -> Any:
        """Nor here."""
        return self.back(array, result, cotangent)


# --------------------------------------------------------------------------- number by number


class Abs(_Applied):
    """The distance from 0."""

    word: ClassVar[str] = "abs"
    takes: ClassVar[str] = "numbers other than bool"

    def of(self, x: Array) -> Any:
        return np.abs(x)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g * np.sign(x)


class Exp(_Float):
    """e to the power of each number."""

    word: ClassVar[str] = "exp"

    def of(self, x: Array) -> Any:
        return np.exp(x)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g * y


class Log(_Float):
    """The natural logarithm: of 0, minus infinity, and of less, NaN."""

    word: ClassVar[str] = "log"

    def of(self, x: Array) -> Any:
        return np.log(x)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g / x


class Sigmoid(_Float):
    """`1 / (1 + exp(-x))`; large numbers do not overflow."""

    word: ClassVar[str] = "sigmoid"

    def of(self, x: Array) -> Any:
        small = np.exp(-np.abs(x))
        return np.where(x >= 0, np.ones_like(x), small) / (1 + small)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g * y * (1 - y)


class Scale(_Float):
    """`x * by + add`."""

    word: ClassVar[str] = "scale"
    by: float = 1.0
    add: float = 0.0

    def of(self, x: Array) -> Any:
        return x * x.dtype.type(self.by) + x.dtype.type(self.add)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g * g.dtype.type(self.by)


class Clip(_Applied):
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
        if dtype in _INTEGERS:
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


class Threshold(_Applied):
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


class Normalise(_Float):
    """`(x - mean) / std`, each one number, or one for each place on `axis` (the last)."""

    word: ClassVar[str] = "normalise"
    mean: float | list[float]
    std: _Std | list[_Std]
    axis: int = -1

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        size = form.dims[_axis(form, self.axis)] if form.dims is not None and self._lengths() else None
        for length in self._lengths():
            if isinstance(size, int) and length not in (size, 1):
                raise ValueError(f"expected {size} values for axis {self.axis} of {form}, got {length}")
        return form.dims

    def _lengths(self) -> list[int]:
        return [len(values) for values in (self.mean, self.std) if isinstance(values, list)]

    def of(self, x: Array) -> Any:
        return (x - _spread(x, self.mean, self.axis)) / _spread(x, self.std, self.axis)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g / _spread(g, self.std, self.axis)


class Cast(_Applied):
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


# --------------------------------------------------------------------------- along an axis


class Softmax(_Float):
    """The exponentials over their sum, along `axis`; large numbers do not overflow."""

    word: ClassVar[str] = "softmax"
    axis: int = -1

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        return form.dims if form.dims is None else (_axis(form, self.axis), form.dims)[1]

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


class Argmax(_Applied):
    """Where the largest number is along `axis`, the first of equal ones: int64."""

    word: ClassVar[str] = "argmax"
    takes: ClassVar[str] = "numbers"
    axis: int = -1
    keepdims: bool = False

    def dtype(self, dtype: str | None) -> str | None:
        return "int64"

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        return _without(_not_empty(form, self.axis), self.axis, keepdims=self.keepdims)

    def of(self, x: Array) -> Any:
        return x.argmax(self.axis, keepdims=self.keepdims).astype(np.int64, copy=False)


def _not_empty(form: Form, axis: int | Sequence[int] | None) -> Form:
    """The form, unless one of the axes has no place on it."""
    if form.dims is not None and any(form.dims[place] == 0 for place in _axes(form, axis)):
        raise ValueError(f"expected one value or more along axis {axis}, got {form}")
    return form


class _Reduced(_Applied):
    """One number of those along `axis` (one, some, or by default all)."""

    takes_a_list: ClassVar[bool] = True
    takes: ClassVar[str] = "numbers"
    axis: int | list[int] | None = None
    keepdims: bool = False

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        return _without(form, self.axis, keepdims=self.keepdims)

    def _how(self) -> dict[str, Any]:
        return {"axis": tuple(self.axis) if isinstance(self.axis, list) else self.axis, "keepdims": self.keepdims}

    def _apart(self, x: Array, reduced: Array) -> Array:
        """What was reduced, with its axes again, to be broadcast against `x`."""
        return reduced.reshape([size or 0 for size in _without(form_of(x), self.axis, keepdims=True) or ()])


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
        if dtype in _INTEGERS or dtype == "bool":
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
        return "float64" if dtype in _INTEGERS or dtype == "bool" else dtype

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        return super().dims(_not_empty(form, self.axis))

    def of(self, x: Array) -> Any:
        return x.mean(**self._how())

    def back(self, x: Array, y: Array, g: Array) -> Any:
        shared = x.size // y.size if y.size else 1
        return super().back(x, y, g) / g.dtype.type(shared)


class OneHot(_Applied):
    """A new last axis of `n` numbers, 1 where the label is and 0 elsewhere, of `dtype`."""

    word: ClassVar[str] = "one_hot"
    takes: ClassVar[str] = "integers"
    n: Annotated[int, Field(gt=0)]
    dtype_: str = Field(default="float32", alias="dtype")

    @model_validator(mode="after")
    def _known(self) -> OneHot:
        if self.dtype_ not in _NUMBERS:
            raise ValueError(f"no dtype '{self.dtype_}' of numbers{did_you_mean(self.dtype_, _NUMBERS)}")
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


# --------------------------------------------------------------------------- the same numbers in other places


class Transpose(_Move):
    """The axes in the order `axes`, or in reverse."""

    word: ClassVar[str] = "transpose"
    takes_a_list: ClassVar[bool] = True
    axes: list[int] | None = None

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        if form.dims is None:
            return None
        if self.axes is not None and len(self.axes) != len(form.dims):
            raise ValueError(f"expected {len(form.dims)} axes for {form}, got {len(self.axes)}")
        order = _axes(form, self.axes) if self.axes is not None else range(len(form.dims))[::-1]
        return tuple([form.dims[place] for place in order])

    def of(self, x: Array) -> Any:
        return x.transpose(self.axes)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g.transpose(None if self.axes is None else np.argsort([axis % x.ndim for axis in self.axes]).tolist())


class Squeeze(_Move):
    """Axes of size 1 taken away."""

    word: ClassVar[str] = "squeeze"
    takes_a_list: ClassVar[bool] = True
    axis: int | list[int]

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        for place in _axes(form, self.axis) if form.dims is not None else ():
            if isinstance(size := form.dims[place], int) and size != 1:  # type: ignore[index]
                raise ValueError(f"expected size 1 on axis {place}, got {form}")
        return _without(form, self.axis)

    def of(self, x: Array) -> Any:
        return x.squeeze(tuple(self.axis) if isinstance(self.axis, list) else self.axis)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g.reshape(x.shape)


class Expand(_Move):
    """A new axis of size 1, which is `axis` of the result."""

    word: ClassVar[str] = "expand"
    axis: int

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        if form.dims is None:
            return None
        place = _axis(form, self.axis, extra=1)
        return (*form.dims[:place], 1, *form.dims[place:])

    def of(self, x: Array) -> Any:
        return np.expand_dims(x, self.axis)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g.reshape(x.shape)


class Flatten(_Move):
    """The axes from `start` (1: rows are kept) on as one; a view of an array without gaps."""

    word: ClassVar[str] = "flatten"
    start: int = 1

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        if form.dims is None:
            return None
        place = _axis(form, self.start, extra=1) if self.start >= 0 else _axis(form, self.start)
        return (*form.dims[:place], _product(form.dims[place:]))

    def of(self, x: Array) -> Any:
        start = self.start % x.ndim if self.start < 0 else self.start
        return x.reshape(*x.shape[:start], math.prod(x.shape[start:]))

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g.reshape(x.shape)


class Reshape(_Move):
    """Another shape for as many numbers: 0 keeps the size of that axis, and one -1 takes what is left."""

    word: ClassVar[str] = "reshape"
    takes_a_list: ClassVar[bool] = True
    shape: list[Annotated[int, Field(ge=-1)]]

    @model_validator(mode="after")
    def _one_is_left(self) -> Reshape:
        if self.shape.count(-1) > 1:
            raise ValueError(f"expected -1 at most once in shape, got {self.shape}")
        return self

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        if form.dims is None:
            return tuple([size if size > 0 else None for size in self.shape])
        if any(place >= len(form.dims) for place in self._kept()):
            raise ValueError(f"a 0 in shape {self.shape} keeps an axis that is not in {form}")
        left = self._left(form)
        return tuple([left if size < 0 else size or form.dims[place] for place, size in enumerate(self.shape)])

    def _kept(self) -> list[int]:
        return [place for place, size in enumerate(self.shape) if size == 0]

    def _left(self, form: Form) -> Dim:
        """What -1 stands for, once the axes that are kept are set aside on both sides."""
        dims = form.dims or ()
        numbers = _product([dim for place, dim in enumerate(dims) if place not in self._kept()])
        taken = math.prod(size for size in self.shape if size > 0)
        if not isinstance(numbers, int):
            return numbers if taken == 1 else None
        if numbers % taken or (-1 not in self.shape and numbers != taken):
            raise ValueError(f"{form} has not the right size for shape {self.shape}")
        return numbers // taken

    def of(self, x: Array) -> Any:
        return x.reshape(self.dims(form_of(x)))

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g.reshape(x.shape)


class _Part(_Move):
    """Some of what is on an axis: a view."""

    def _where(self, rank: int) -> tuple[Any, ...]:
        raise NotImplementedError

    def of(self, x: Array) -> Any:
        return x[self._where(x.ndim)]

    def back(self, x: Array, y: Array, g: Array) -> Any:
        whole = np.zeros(x.shape, g.dtype)
        whole[self._where(x.ndim)] = g
        return whole


class Slice(_Part):
    """Places `start` to `stop` (not included) on `axis` (0); negative ones count from its end."""

    word: ClassVar[str] = "slice"
    start: int | None = None
    stop: int | None = None
    axis: int = 0

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        if form.dims is None:
            return None
        place = _axis(form, self.axis)
        return (*form.dims[:place], self._size(form.dims[place]), *form.dims[place + 1 :])

    def _size(self, dim: Dim) -> Dim:
        if isinstance(dim, int):
            return len(range(*slice(self.start, self.stop).indices(dim)))
        return dim if not self.start and self.stop is None else None

    def _where(self, rank: int) -> tuple[Any, ...]:
        return (slice(None),) * (self.axis % rank) + (slice(self.start, self.stop),)


class Take(_Part):
    """What is at `index` on `axis` (the last), which goes away."""

    word: ClassVar[str] = "take"
    index: int
    axis: int = -1

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        size = form.dims[_axis(form, self.axis)] if form.dims is not None else None
        if isinstance(size, int) and not -size <= self.index < size:
            raise ValueError(f"index {self.index} is not on axis {self.axis} of {form}")
        return _without(form, self.axis)

    def _where(self, rank: int) -> tuple[Any, ...]:
        return (*((slice(None),) * (self.axis % rank)), self.index, ...)


# --------------------------------------------------------------------------- by name

OPERATIONS: Mapping[str, type[_Applied]] = {
    kind.word: kind
    for kind in (
        *(Softmax, LogSoftmax, L2Normalise, Argmax, Max, Min, Sum, Mean, OneHot),
        *(Abs, Exp, Log, Sigmoid, Scale, Clip, Threshold, Normalise, Cast),
        *(Transpose, Squeeze, Expand, Flatten, Reshape, Slice, Take),
    )
}
NAMES: tuple[str, ...] = tuple(sorted(OPERATIONS))


def operation(text: str | Mapping[str, Any], form: Form) -> tuple[Operation, Form]:
    """The operation that `apply:` says, and the form of its result, given the form of what comes in.

    Args:
        text: `softmax`, or with arguments `{softmax: {axis: 1}}`; those of an operation may be given in order too:
            `{softmax: 1}`, `{clip: [0, 1]}`, `{transpose: [0, 3, 1, 2]}`.
        form: of what comes in; what it does not know is checked when an array comes.

    Raises:
        ValueError: no such operation, wrong arguments, or a form that it does not fit; says what would do.
    """
    name, arguments = _parts(text)
    if name not in OPERATIONS:
        call = name.partition("(")[0].strip()
        if call != name and call in OPERATIONS:
            raise ValueError(f"no operation {name!r}: arguments are written {{{call}: {{NAME: VALUE}}}}")
        raise ValueError(f"no operation {name!r}: expected one of {', '.join(NAMES)}{did_you_mean(call, NAMES)}")
    made = _made(OPERATIONS[name], arguments)
    return made, made.form(form)


def cast(dtype: str, form: Form) -> tuple[Operation, Form]:
    """The operation that `cast:` says, and the form of its result; raises `ValueError` as `operation` does."""
    return operation({"cast": dtype}, form)


def _parts(text: str | Mapping[str, Any]) -> tuple[str, Any]:
    if isinstance(text, str):
        return text, None
    if not isinstance(text, Mapping) or len(text) != 1:
        raise ValueError(f"expected an operation's name, or {{NAME: ARGUMENTS}}, got {text!r}")
    ((name, arguments),) = text.items()
    return str(name), arguments


def _made(kind: type[_Applied], arguments: Any) -> _Applied:
    named = arguments if isinstance(arguments, Mapping) else _named(kind, arguments)
    try:
        return kind.model_validate(dict(named))
    except ValidationError as error:
        raise ValueError("; ".join(_wrong(kind, dict(one)) for one in error.errors())) from None


def _parameters(kind: type[_Applied]) -> list[str]:
    return [field.alias or name for name, field in kind.model_fields.items()]


def _named(kind: type[_Applied], values: Any) -> Mapping[str, Any]:
    """Arguments given in order, or the one that is a list itself."""
    names = _parameters(kind)
    if values is None:
        return {}
    if not isinstance(values, list) or kind.takes_a_list:
        values = [values]
    if len(values) > len(names):
        raise ValueError(
            f"{kind.word}: expected at most {len(names)} arguments ({', '.join(names)}), got {len(values)}"
        )
    return dict(zip(names, values, strict=False))


def _wrong(kind: type[_Applied], error: Mapping[str, Any]) -> str:
    """One thing that is wrong with arguments, in our words."""
    names, name = _parameters(kind), str((error["loc"] or ("",))[0])
    takes = f"expected {', '.join(names) or 'none'}"
    if error["type"] == "extra_forbidden":
        return f"{kind.word} has no argument '{name}': {takes}{did_you_mean(name, names)}"
    if error["type"] == "missing":
        return f"{kind.word} needs '{name}': {takes}, got no '{name}'"
    if error["type"] == "value_error":
        return f"{kind.word}: {error['ctx']['error']}"
    return f"{kind.word}: '{name}': {str(error['msg']).removeprefix('Input ')}, got {error['input']!r}"
