"""What every operation on an edge has: the dtypes it is for, its form, what it computes in, and its derivative.

An operation keeps the dtype it is given unless its line says otherwise (the narrow floats are computed in float32),
keeps symbols, is a view where one will do, warns of nothing, and never writes into its input. It knows no graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from ensemble.forms import Dim, Form
from ensemble.steps import Array
from remote_ops.errors import NotDifferentiable, SignatureError
from remote_ops.signature import BY_NUMPY, DTYPES, describe

__all__ = [
    "INTEGERS",
    "NUMBERS",
    "TAKES",
    "Applied",
    "Move",
    "OfFloats",
    "axes_in",
    "axis_in",
    "form_of",
    "is_float",
    "narrow",
    "product_of",
    "spread",
    "wide",
    "without",
]

_NARROW = frozenset(row.numpy for row in DTYPES.values() if row.name in ("float16", "bfloat16") or "float8" in row.name)
INTEGERS = frozenset(name for name in DTYPES if name.startswith(("int", "uint")))
NUMBERS = frozenset(DTYPES) - {"string"}
TAKES: Mapping[str, frozenset[str]] = {
    "floats": frozenset(name for name in DTYPES if "float" in name),
    "integers": INTEGERS,
    "numbers": NUMBERS,
    "numbers other than bool": NUMBERS - {"bool"},
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


def axis_in(form: Form, axis: int, *, extra: int = 0) -> int:
    """An axis from 0, of a form whose rank is known; `extra` is how many more axes the result has.

    Raises:
        ValueError: the form has no such axis.
    """
    assert form.dims is not None
    rank = len(form.dims) + extra
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} is not in {form}")
    return axis % rank


def axes_in(form: Form, axis: int | Sequence[int] | None) -> tuple[int, ...]:
    """Some axes from 0, all of them for None; raises `ValueError` where one is not there, or is named twice."""
    assert form.dims is not None
    if axis is None:
        return tuple(range(len(form.dims)))
    found = tuple([axis_in(form, one) for one in ([axis] if isinstance(axis, int) else axis)])
    if len(set(found)) != len(found):
        raise ValueError(f"axes {list(axis)} name one axis twice in {form}")  # type: ignore[arg-type]
    return found


def without(form: Form, axis: int | Sequence[int] | None, *, keepdims: bool = False) -> tuple[Dim, ...] | None:
    """The dims that are left when axes are reduced away."""
    if form.dims is None:
        return None
    gone = axes_in(form, axis)
    if keepdims:
        return tuple([1 if place in gone else dim for place, dim in enumerate(form.dims)])
    return tuple([dim for place, dim in enumerate(form.dims) if place not in gone])


def product_of(dims: Sequence[Dim]) -> Dim:
    """The product of dims: known where all are sizes, or all but one are 1."""
    others = [dim for dim in dims if dim != 1]
    if len(others) == 1:
        return others[0]
    sizes = [dim for dim in others if isinstance(dim, int)]
    return math.prod(sizes) if len(sizes) == len(others) or 0 in sizes else None


def spread(array: Array, values: float | list[float], axis: int) -> Array:
    """One value, or one for each place on an axis, in the dtype of `array`, to be broadcast against it."""
    shape = [1] * array.ndim
    if isinstance(values, list):
        shape[axis] = -1
    return np.asarray(values, array.dtype).reshape(shape)


# --------------------------------------------------------------------------- what every operation has


class Applied(BaseModel):
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
            hint = "; cast first: apply: [{cast: float32}, ...]" if form.dtype in NUMBERS else ""
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


class OfFloats(Applied):
    """An operation for floats only."""

    takes: ClassVar[str] = "floats"


class Move(Applied):
    """An operation that gives the same numbers in other places, most of them as a view."""

    def computed(self, array: Array) -> Array:
        """No number is computed with, so that no dtype is widened."""
        return np.asarray(self.of(array))

    def pulled(self, array: Array, result: Array, cotangent: Array) -> Any:
        """Nor here."""
        return self.back(array, result, cotangent)
