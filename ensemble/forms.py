"""What flows over an edge: a dtype and dims, some of them symbols that mean one size all over a graph.

It unifies and words; it reads no spec and holds no array.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

from remote_ops.signature import TensorSpec

__all__ = ["UNKNOWN", "Clash", "Dim", "Form", "Symbols"]

Dim: TypeAlias = "int | str | None"  # a size; a symbol; not known before a run


class Form(NamedTuple):
    """The dtype (None: not known) and the dims (None: not even their number) of what flows over an edge."""

    dtype: str | None
    dims: tuple[Dim, ...] | None

    def __str__(self) -> str:
        dims = (
            "of any shape" if self.dims is None else f"[{', '.join('?' if d is None else str(d) for d in self.dims)}]"
        )
        return f"{self.dtype or 'any'} {dims}"

    @classmethod
    def of(cls, spec: TensorSpec) -> Form:
        """The form of an input or output of a servable: its -1 are dims that are not known."""
        dims = None if spec.shape is None else tuple([None if size < 0 else size for size in spec.shape])
        return cls(None if spec.dtype == "any" else spec.dtype, dims)

    def spec(self, name: str, *, differentiable: bool = False) -> TensorSpec:
        """The same as a servable tells it: a symbol is -1 there."""
        dims = None if self.dims is None else tuple([dim if isinstance(dim, int) else -1 for dim in self.dims])
        return TensorSpec(name, self.dtype or "any", dims, differentiable=differentiable)


UNKNOWN = Form(None, None)


class Clash(NamedTuple):
    """Two sizes for one dim: `left` was bound by `left_by`, `right` by `right_by`; of `symbol`, if it is one's."""

    axis: int
    symbol: str | None
    left: Dim
    left_by: str
    right: Dim
    right_by: str


class Symbols:
    """What the symbols of one graph are bound to: other symbols, or a size, and by whom."""

    def __init__(self) -> None:
        self._same: dict[str, str] = {}
        self._sizes: dict[str, tuple[int, str]] = {}

    def resolved(self, dim: Dim) -> Dim:
        """The size of a symbol if it is known, else the symbol that stands for it."""
        if not isinstance(dim, str):
            return dim
        root = self._root(dim)
        return self._sizes[root][0] if root in self._sizes else root

    def form(self, form: Form) -> Form:
        """The form with every symbol resolved."""
        return form if form.dims is None else form._replace(dims=tuple(map(self.resolved, form.dims)))

    def unify(self, left: Iterable[Dim], left_by: str, right: Iterable[Dim], right_by: str) -> list[Clash]:
        """Take two shapes of equal rank to be one; what contradicts that. An unknown dim agrees with anything."""
        found = []
        for axis, (one, other) in enumerate(zip(left, right, strict=True)):
            if one is not None and other is not None and (clash := self._join(axis, one, left_by, other, right_by)):
                found.append(clash)
        return found

    def _root(self, symbol: str) -> str:
        while self._same.get(symbol, symbol) != symbol:
            symbol = self._same[symbol]
        return symbol

    def _bound(self, dim: int | str, by: str) -> tuple[str | None, int | None, str]:
        if isinstance(dim, int):
            return None, dim, by
        root = self._root(dim)
        size, bound_by = self._sizes.get(root, (None, by))
        return root, size, bound_by

    def _join(self, axis: int, one: int | str, one_by: str, other: int | str, other_by: str) -> Clash | None:
        left, left_size, left_by = self._bound(one, one_by)
        right, right_size, right_by = self._bound(other, other_by)
        if left_size is not None and right_size is not None:
            if left_size == right_size:
                return None
            return Clash(axis, left or right, left_size, left_by, right_size, right_by)
        if left is not None and right is not None:
            if left != right:
                if left.endswith("*"):  # a kind made it up: people know the other one
                    left, right = right, left
                self._same[right] = left
                if right in self._sizes:
                    self._sizes[left] = self._sizes.pop(right)
        elif left is not None and right_size is not None:
            self._sizes[left] = (right_size, right_by)
        elif right is not None and left_size is not None:
            self._sizes[right] = (left_size, left_by)
        return None

    @property
    def sizes(self) -> Mapping[str, int]:
        """The symbols that are bound to a size."""
        return {symbol: size for symbol, (size, _) in self._sizes.items()}
