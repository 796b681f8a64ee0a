"""Conditions on one value, as they are written in a switch: `< 13`, `== "cat"`, `in [1, 2]`, `>= 13 and < 65`.

It parses a condition, says whether it may be asked of a dtype, and answers it for every element of an array at once.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ensemble.steps import Array

__all__ = ["GRAMMAR", "Comparison", "Literal", "Predicate"]

GRAMMAR = (
    "a comparison such as `< 13`, `== \"cat\"`, `!= true`, `in [1, 2]` or `not in ['a', 'b']`, several of them with"
    " `and` or `or` between them; or a number, or true or false, to be equal to"
)

Literal: TypeAlias = "int | float | str | bool"
Mask: TypeAlias = "npt.NDArray[np.bool_]"

_TOKEN = re.compile(
    r"""\s*(?:(?P<sign><=|>=|==|!=|<|>|\[|\]|,)
    |(?P<number>[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?))(?![\w.])
    |"(?P<double>[^"]*)"|'(?P<single>[^']*)'
    |(?P<word>[A-Za-z_]+))""",
    re.VERBOSE,
)
_ORDERS = ("<", "<=", ">", ">=")
_SIGNS: Mapping[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_TRUTH = {"true": True, "false": False}


class Comparison(NamedTuple):
    """One comparison: a sign, `in` or `not in`, and what with."""

    sign: str
    values: tuple[Literal, ...]

    def holds(self, array: Array) -> Mask:
        """For each element."""
        if self.sign in _SIGNS:
            return np.asarray(_SIGNS[self.sign](array, self.values[0]), bool)
        found = np.zeros(array.shape, bool)
        for value in self.values:
            found |= np.asarray(array == value, bool)
        return found if self.sign == "in" else ~found


class Predicate(NamedTuple):
    """A condition: comparisons, all of which hold in one of the groups."""

    text: str
    groups: tuple[tuple[Comparison, ...], ...]

    @classmethod
    def parse(cls, written: Any) -> Predicate:
        """Read a condition; `and` binds closer than `or`.

        Raises:
            ValueError: it is none.
        """
        if not isinstance(written, str | int | float):
            raise ValueError(f"expected {GRAMMAR}; got {written!r}")
        if not isinstance(written, str):
            return cls(f"== {str(written).lower()}", ((Comparison("==", (written,)),),))
        return cls(written, _Parser(written).condition())

    def __str__(self) -> str:
        return self.text

    def misfit(self, dtype: str | None) -> str:
        """Why this cannot be asked of a tensor of `dtype`, in words; empty if it can, or the dtype is not known."""
        wanted = _kind(dtype)
        for comparison in (one for group in self.groups for one in group):
            for value in comparison.values:
                if wanted is not None and wanted is not _kind_of(value):
                    return f"{comparison.sign} {value!r} compares with {_kind_of(value)}, and it is {wanted}, {dtype}"
        return ""

    def holds(self, array: Array) -> Mask:
        """For each element of an array, of its shape; NaN is only unequal."""
        comparable = _comparable(array)
        with np.errstate(over="ignore"):  # a literal beyond the range of a float16 is infinite there
            found = [[comparison.holds(comparable) for comparison in group] for group in self.groups]
        return np.logical_or.reduce([np.logical_and.reduce(group) for group in found])  # type: ignore[no-any-return]


def _kind(dtype: str | None) -> str | None:
    if dtype is None:
        return None
    return {"string": "text", "bool": "true or false"}.get(dtype, "a number")


def _kind_of(value: Literal) -> str:
    if isinstance(value, str):
        return "text"
    return "true or false" if isinstance(value, bool) else "a number"


def _comparable(array: Array) -> Array:
    """With bytes as text, and what only ml_dtypes knows as float32."""
    if array.dtype.kind in "OSU":
        texts = [item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in array.ravel()]
        return np.array([*texts, None], object)[:-1].reshape(array.shape)
    return array.astype(np.float32) if array.dtype.kind == "V" else array


class _Parser:
    """Reads one condition from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[tuple[str, str]] = []
        position, text = 0, text.rstrip()
        while position < len(text):
            found = _TOKEN.match(text, position)
            if found is None or found.lastgroup is None:
                raise self._fault()
            self._tokens.append((found.lastgroup, found[found.lastgroup]))
            position = found.end()
        self._tokens.reverse()

    def condition(self) -> tuple[tuple[Comparison, ...], ...]:
        groups = [[self._comparison()]]
        while self._tokens:
            if self._take("word", "or"):
                groups.append([self._comparison()])
            elif self._take("word", "and"):
                groups[-1].append(self._comparison())
            else:
                raise self._fault()
        return tuple(map(tuple, groups))

    def _comparison(self) -> Comparison:
        for sign in _SIGNS:
            if self._take("sign", sign):
                return self._checked(Comparison(sign, (self._literal(),)))
        negated = self._take("word", "not")
        if not self._take("word", "in") or not self._take("sign", "["):
            raise self._fault()
        values = [self._literal()]
        while self._take("sign", ","):
            values.append(self._literal())
        if not self._take("sign", "]"):
            raise self._fault()
        return Comparison("not in" if negated else "in", tuple(values))

    def _checked(self, comparison: Comparison) -> Comparison:
        if comparison.sign in _ORDERS and _kind_of(comparison.values[0]) != "a number":
            raise ValueError(f"only numbers have an order: expected == or !=, got {self._text!r}")
        return comparison

    def _literal(self) -> Literal:
        kind, text = self._tokens.pop() if self._tokens else ("", "")
        if kind == "number":
            return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)
        if kind in ("double", "single"):
            return text
        if kind == "word" and text in _TRUTH:
            return _TRUTH[text]
        raise self._fault()

    def _take(self, kind: str, text: str) -> bool:
        if self._tokens and self._tokens[-1] == (kind, text):
            self._tokens.pop()
            return True
        return False

    def _fault(self) -> ValueError:
        quoted = f" (for a text write '== \"{self._text}\"')" if re.fullmatch(r"\w+", self._text.strip()) else ""
        return ValueError(f"expected {GRAMMAR}; got {self._text!r}{quoted}")
