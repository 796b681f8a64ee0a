"""Operations that give the same numbers in other places, such as `transpose` and `slice`."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from ensemble.application import Move, axes_in, axis_in, form_of, product_of, without
from ensemble.forms import Dim, Form
from ensemble.steps import Array

__all__ = ["Expand", "Flatten", "Reshape", "Slice", "Squeeze", "Take", "Transpose"]


class Transpose(Move):
    """The axes in the order `axes`, or in reverse."""

    word: ClassVar[str] = "transpose"
    takes_a_list: ClassVar[bool] = True
    axes: list[int] | None = None

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        if form.dims is None:
            return None
        if self.axes is not None and len(self.axes) != len(form.dims):
            raise ValueError(f"expected {len(form.dims)} axes for {form}, got {len(self.axes)}")
        order = axes_in(form, self.axes) if self.axes is not None else range(len(form.dims))[::-1]
        return tuple([form.dims[place] for place in order])

    def of(self, x: Array) -> Any:
        return x.transpose(self.axes)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g.transpose(None if self.axes is None else np.argsort([axis % x.ndim for axis in self.axes]).tolist())


class Squeeze(Move):
    """Axes of size 1 taken away."""

    word: ClassVar[str] = "squeeze"
    takes_a_list: ClassVar[bool] = True
    axis: int | list[int]

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        for place in axes_in(form, self.axis) if form.dims is not None else ():
            if isinstance(size := form.dims[place], int) and size != 1:  # type: ignore[index]
                raise ValueError(f"expected size 1 on axis {place}, got {form}")
        return without(form, self.axis)

    def of(self, x: Array) -> Any:
        return x.squeeze(tuple(self.axis) if isinstance(self.axis, list) else self.axis)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g.reshape(x.shape)


class Expand(Move):
    """A new axis of size 1, which is `axis` of the result."""

    word: ClassVar[str] = "expand"
    axis: int

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        if form.dims is None:
            return None
        place = axis_in(form, self.axis, extra=1)
        return (*form.dims[:place], 1, *form.dims[place:])

    def of(self, x: Array) -> Any:
        return np.expand_dims(x, self.axis)

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g.reshape(x.shape)


class Flatten(Move):
    """The axes from `start` (1: rows are kept) on as one; a view of an array without gaps."""

    word: ClassVar[str] = "flatten"
    start: int = 1

    def dims(self, form: Form) -> tuple[Dim, ...] | None:
        if form.dims is None:
            return None
        place = axis_in(form, self.start, extra=1) if self.start >= 0 else axis_in(form, self.start)
        return (*form.dims[:place], product_of(form.dims[place:]))

    def of(self, x: Array) -> Any:
        start = self.start % x.ndim if self.start < 0 else self.start
        return x.reshape(*x.shape[:start], math.prod(x.shape[start:]))

    def back(self, x: Array, y: Array, g: Array) -> Any:
        return g.reshape(x.shape)


class Reshape(Move):
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
        numbers = product_of([dim for place, dim in enumerate(dims) if place not in self._kept()])
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


class _Part(Move):
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
        place = axis_in(form, self.axis)
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
        size = form.dims[axis_in(form, self.axis)] if form.dims is not None else None
        if isinstance(size, int) and not -size <= self.index < size:
            raise ValueError(f"index {self.index} is not on axis {self.axis} of {form}")
        return without(form, self.axis)

    def _where(self, rank: int) -> tuple[Any, ...]:
        return (*((slice(None),) * (self.axis % rank)), self.index, ...)
