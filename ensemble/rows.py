"""Rows, the axis 0 of a batch: which arrays have them, and how calls are cut out of a batch and each row sent its way.

It makes calls and says how their answers are put together; `assembly` does that.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ensemble.forms import Dim, Form
from ensemble.steps import Array, Assembly, Call, Calls, Outcome, Piece, Rows
from remote_ops.errors import SignatureError
from remote_ops.signature import DTYPES, describe

__all__ = ["Blank", "apart", "by_row", "call_of", "carriers", "count", "joined", "passed", "rows_in", "span_of"]

# --------------------------------------------------------------------------- who has rows


def passed(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs that a controller gives on: all but its own, whose names begin with `$`."""
    return {name: array for name, array in inputs.items() if not name.startswith("$")}


def carriers(inputs: Mapping[str | int, Form], rows: Dim) -> tuple[str, ...]:
    """The inputs given on that have `rows` on axis 0, as far as is known: a dim that is not known may be them."""
    return tuple([str(name) for name, form in inputs.items() if not str(name).startswith("$") and _may(form, rows)])


def _may(form: Form, rows: Dim) -> bool:
    if not form.dims:
        return form.dims is None
    return rows is None or form.dims[0] is None or form.dims[0] == rows


def rows_in(inputs: Mapping[str, Array], names: Iterable[str], by: str = "", rows: int | None = None) -> int:
    """How many rows all these inputs have; those that are missing are passed over.

    Args:
        by: who has said that there are `rows` of them, if that is known.

    Raises:
        SignatureError: they have not equally many.
    """
    for name in names:
        array = inputs.get(name)
        if not isinstance(array, np.ndarray):
            continue
        if not array.ndim or rows not in (None, len(array)):
            raise _not_rows(name, array, rows, by)
        rows, by = len(array), by or f"'{name}'"
    return rows or 0


def _not_rows(name: str, array: Array, rows: int | None, by: str) -> SignatureError:
    expected = f"{rows} rows, as {by} has" if by else "rows"
    return SignatureError(
        f"input '{name}': expected {expected}, got {describe(array)}; an input that has no rows says so by another"
        f" symbol, or a size, on axis 0",
        name=name,
        expected=expected,
        got=describe(array),
    )


# --------------------------------------------------------------------------- cutting


def count(rows: Rows, of: int) -> int:
    """How many rows are meant, of so many."""
    if rows is None:
        return of
    return len(range(of)[rows]) if isinstance(rows, slice) else len(rows)


def span_of(rows: Array) -> Rows:
    """The same rows as a slice, which cuts without a copy, where ascending `rows` have no gap."""
    if rows.size and int(rows[-1]) - int(rows[0]) + 1 == rows.size:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def joined(part: Array) -> Array:
    """Items as a body takes them: one `(1, *item)` as `(*item)`, several `(c, n, *rest)` as `(c * n, *rest)`.

    Raises:
        SignatureError: several items without an axis to be joined along.
    """
    if len(part) == 1:
        return np.asarray(part[0, ...])
    if part.ndim < 2:
        raise SignatureError(f"items of {describe(part)} have no axis to be joined along: take 'chunk: 1'")
    return np.reshape(part, (len(part) * part.shape[1], *part.shape[2:]))


def apart(array: Array, items: int) -> Array:
    """What a body gave for joined items, one by one: `(c * m, *rest)` as `(c, m, *rest)`, of one item `(1, *array)`.

    Raises:
        SignatureError: it cannot be divided evenly.
    """
    if items == 1:
        return array[None, ...]
    if not array.ndim or len(array) % items:
        raise SignatureError(
            f"{items} items were sent as one chunk, and {describe(array)} came back, which cannot be divided evenly:"
            f" take 'chunk: 1'"
        )
    return array.reshape(items, len(array) // items, *array.shape[1:])


def call_of(
    node: str,
    inputs: Mapping[str, Array],
    carrying: Iterable[str],
    rows: Rows,
    wanted: Sequence[str] | None,
    *,
    items: bool = False,
) -> Call:
    """A call with `rows` of the inputs that carry them, and all of the others."""
    if rows is None:
        return Call(node, inputs, wanted)
    cut = tuple([name for name in carrying if isinstance(inputs.get(name), np.ndarray)])
    parts = {name: inputs[name][rows] for name in cut}
    given = {**inputs, **({name: joined(part) for name, part in parts.items()} if items else parts)}
    return Call(node, given, wanted, rows, cut=cut, items=items)


# --------------------------------------------------------------------------- a batch without rows


class Blank(NamedTuple):
    """Outputs of a batch of no rows, `(0, *item)` each, from what is known before a run.

    Args:
        outputs: their forms.
        inputs: the forms of the inputs, which tell the sizes of symbols.
    """

    outputs: Mapping[str, Form]
    inputs: Mapping[str | int, Form]

    def of(self, inputs: Mapping[str, Array], wanted: Iterable[str]) -> dict[str, Array]:
        """The outputs; a size that is not known is 0."""
        sizes = self._sizes(inputs)
        return {name: self._array(self.outputs[name], sizes) for name in wanted if name in self.outputs}

    def is_known(self, inputs: Mapping[str, Array], wanted: Iterable[str]) -> bool:
        """Whether dtype and item of every output wanted are known."""
        sizes = self._sizes(inputs)
        return all(self._knows(self.outputs.get(name), sizes) for name in wanted)

    def _sizes(self, inputs: Mapping[str, Array]) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, form in self.inputs.items():
            array: Any = inputs.get(str(name))
            if isinstance(array, np.ndarray) and form.dims is not None:
                found.update({dim: size for dim, size in zip(form.dims, array.shape) if isinstance(dim, str)})  # noqa: B905
        return found

    @staticmethod
    def _knows(form: Form | None, sizes: Mapping[str, int]) -> bool:
        if form is None or form.dtype is None or not form.dims:
            return False
        return all(isinstance(dim, int) or dim in sizes for dim in form.dims[1:])

    @staticmethod
    def _array(form: Form, sizes: Mapping[str, int]) -> Array:
        item = [dim if isinstance(dim, int) else sizes.get(dim or "", 0) for dim in (form.dims or (0,))[1:]]
        return np.empty((0, *item), DTYPES[form.dtype or "float32"].numpy)


# --------------------------------------------------------------------------- each row its way


def by_row(
    nodes: Sequence[str],
    choice: Array,
    inputs: Mapping[str, Array],
    carrying: Sequence[str],
    wanted: Sequence[str] | None,
    blank: Blank,
    aside: Sequence[Call] = (),
) -> Generator[Calls, list[Outcome], Assembly]:
    """Send each row to `nodes[choice[row]]`: one call for each node that has rows, in their order.

    A batch of no rows calls nobody where the outputs are known without it, else the last node.

    Args:
        choice: int `(rows,)`.
        aside: calls to be made at the same time that nobody waits for.
    """
    parts = [(node, np.flatnonzero(choice == place)) for place, node in enumerate(nodes)]
    parts = [(node, rows) for node, rows in parts if rows.size]
    names = list(blank.outputs) if wanted is None else wanted
    if not len(choice) and blank.is_known(inputs, names):
        return Assembly((), 0, empty=blank.of(inputs, names))
    if len(parts) < 2:
        yield Calls([Call(parts[0][0] if parts else nodes[-1], inputs, wanted), *aside])
        return Assembly((Piece(0),), len(choice))
    spans = [(node, span_of(rows)) for node, rows in parts]
    yield Calls([*[call_of(node, inputs, carrying, rows, wanted) for node, rows in spans], *aside])
    return Assembly([Piece(number, put=rows) for number, (_, rows) in enumerate(spans)], len(choice))
