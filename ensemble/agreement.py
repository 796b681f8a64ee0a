"""Whether two forms are one: dtypes, ranks, sizes, and symbols that mean one size all over a graph; faults in words.

It remembers what symbols are bound to and by whom. Which forms must be one is decided by whoever asks.
"""

from __future__ import annotations

from ensemble.faults import FaultList, Path
from ensemble.forms import UNKNOWN, Clash, Dim, Form, Symbols

__all__ = ["Agreement"]


class Agreement:
    """What the forms of one graph agree on. Changing state: the symbols; used by one thread."""

    def __init__(self, faults: FaultList) -> None:
        self.symbols = Symbols()
        self._faults = faults

    def equal(self, left: Form, left_by: str, right: Form, right_by: str, code: str, path: Path) -> Form:
        """As `Scope.equal` says."""
        is_edge = code in ("E106", "E107")
        words = _words(self.symbols.form(left), left_by, self.symbols.form(right), right_by, is_edge)
        if left.dtype and right.dtype and left.dtype != right.dtype:
            hint = f"; write `cast: {right.dtype}` on this edge" if is_edge else ""
            if code == "E110":
                hint = (
                    f"; put one into a graph (`kind: graph`) whose output says `cast: {left.dtype}`, or {right.dtype}"
                )
            self._faults.add("E106" if is_edge else code, path, words + hint)
            return UNKNOWN
        found = Form(left.dtype or right.dtype, left.dims if right.dims is None else right.dims)
        if left.dims is None or right.dims is None:
            return self.symbols.form(found)
        code = "E107" if is_edge else code
        if len(left.dims) != len(right.dims):
            self._faults.add(code, path, f"{words}: {_axes(left.dims)}, not {len(right.dims)}")
            return found._replace(dims=None)
        for clash in self.symbols.unify(left.dims, left_by, right.dims, right_by):
            self._faults.add(code, path, f"{words}: {_clash(clash)}")
        left, right = self.symbols.form(left), self.symbols.form(right)
        return found._replace(dims=tuple(map(_known, left.dims or (), right.dims or ())))


def _words(left: Form, left_by: str, right: Form, right_by: str, is_edge: bool) -> str:
    if is_edge:
        return f"edge {left_by} -> {right_by}: expected {right}, got {left}"
    return f"{left_by} is {left}, but {right_by} is {right}"


def _axes(dims: tuple[Dim, ...]) -> str:
    return f"{len(dims)} {'axis' if len(dims) == 1 else 'axes'}"


def _clash(clash: Clash) -> str:
    what = f"{clash.symbol} bound to" if clash.symbol else f"axis {clash.axis} is"
    return f"{what} {clash.left} by {clash.left_by}, {clash.right} by {clash.right_by}"


def _known(left: Dim, right: Dim) -> Dim:
    """Of two dims that are one, the one that says more."""
    ranked = sorted((left, right), key=lambda dim: 0 if isinstance(dim, int) else 1 if dim is not None else 2)
    return ranked[0]
