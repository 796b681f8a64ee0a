"""Many requests as one call of a model: rows stacked along axis 0, answers cut apart, and a bad one left alone.

It knows no queues, threads or messages. A request is a `Call`: arrays by name, the outputs wanted, a config.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from remote_ops.errors import BadStatus, DeadlineExceeded, ModelUnavailable, Overloaded, SignatureError, TransportError
from remote_ops.signature import Signature, TensorSpec

__all__ = ["Call", "group_of", "infer_apart", "infer_together", "rows_of"]

Array = npt.NDArray[Any]
Outcome: TypeAlias = "Mapping[str, Array] | BaseException"
# What the whole batch fails of, whoever is in it: trying its parts would only make it worse.
_COMMON = (DeadlineExceeded, ModelUnavailable, Overloaded, TransportError)


class _NotByRow(SignatureError):
    """The outputs of a batch cannot be cut apart."""


class Call(NamedTuple):
    """What one request asks of a model."""

    arrays: Mapping[str, Array]
    names: Sequence[str]
    config: bytes = b""


def rows_of(arrays: Mapping[str, Array]) -> int | None:
    """The size of axis 0, if all inputs share it; None if they do not, or there is none."""
    sizes = {array.shape[0] if array.ndim else None for array in arrays.values()}
    return sizes.pop() if len(sizes) == 1 else None


def group_of(signature: Signature, call: Call, wanted: Sequence[TensorSpec]) -> Hashable | None:
    """What two calls must have in common to be served as one; None if this one must be served by itself.

    It must have rows, and each input and output that it names must leave the size of axis 0 open.
    """
    told = [spec for spec in signature.outputs if f"cotangent:{spec.name}" in call.arrays]
    if not rows_of(call.arrays) or not all(map(_has_rows, (*signature.inputs, *wanted, *told))):
        return None
    forms = tuple([(name, array.dtype, array.shape[1:]) for name, array in call.arrays.items()])
    return call.config, tuple(call.names), forms


def _has_rows(spec: TensorSpec) -> bool:
    return spec.shape is None or (len(spec.shape) > 0 and spec.shape[0] == -1)


Infer: TypeAlias = Callable[[Call], Mapping[str, Array]]


def infer_apart(call: Call, infer: Infer) -> Outcome:
    """Serve one call as it is, for a model whose rows may depend on each other; gives what it failed with, if so."""
    try:
        return infer(call)
    except BaseException as error:
        return error


def infer_together(calls: Sequence[Call], infer: Infer, *, padded_rows: Callable[[int], int] = int) -> list[Outcome]:
    """Serve calls of one group with as few runs as it takes; each gets what it would get by itself.

    Args:
        calls: one or more, equal in `group_of`.
        infer: runs the model.
        padded_rows: how many rows the model is given for so many.

    Returns:
        For each call its outputs, each `(rows_i, *item)`, or what it failed with. A batch that fails is halved until
        the calls that are at fault are alone. A call that is alone and runs out of memory is halved once by its rows.
        What is known to fail whoever is in the batch, such as a server out of reach, is not tried in parts.

    Copies each input once, and outputs not at all: they are views into those of the batch.
    """
    if len(calls) == 1:
        return [_infer_alone(calls[0], infer, padded_rows)]
    try:
        return [*_cut(calls, infer(_stacked(calls, padded_rows)), padded_rows)]
    except _NotByRow:
        return [infer_apart(call, infer) for call in calls]
    except BaseException as error:
        if _is_common(error):
            return [error] * len(calls)
        middle = len(calls) // 2
        halves = (calls[:middle], calls[middle:])
        return [outcome for half in halves for outcome in infer_together(half, infer, padded_rows=padded_rows)]


def _is_common(error: BaseException) -> bool:
    if isinstance(error, BadStatus):  # a server of others that has no better word for a bad request
        return error.status in (429, 502, 503, 504)
    return isinstance(error, _COMMON)


def _infer_alone(call: Call, infer: Infer, padded_rows: Callable[[int], int]) -> Outcome:
    try:
        rows = rows_of(call.arrays)
        if not rows or padded_rows(rows) == rows:
            return infer(call)
        return _cut([call], infer(_stacked([call], padded_rows)), padded_rows)[0]
    except _NotByRow:
        return infer_apart(call, infer)
    except BaseException as error:
        return _in_halves(call, infer, padded_rows, error) if is_out_of_memory(error) else error


def _in_halves(call: Call, infer: Infer, padded_rows: Callable[[int], int], error: BaseException) -> Outcome:
    """Try a call that was too large for the device once more, in two runs."""
    rows = rows_of(call.arrays) or 0
    if rows < 2:
        return error
    halves = [_part(call, slice(0, rows // 2)), _part(call, slice(rows // 2, rows))]
    try:
        answers = [_cut([half], infer(_stacked([half], padded_rows)), padded_rows)[0] for half in halves]
    except _NotByRow:
        return error
    except BaseException as again:
        return again
    return {name: np.concatenate([answer[name] for answer in answers]) for name in call.names}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of a framework, or its cause, says that memory ran out: they have no class in common."""
    told = type(error).__name__.lower()
    with contextlib.suppress(Exception):  # it cannot even say what it is
        told += str(error).lower()
    if isinstance(error, MemoryError) or any(words in told for words in _OUT_OF_MEMORY):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


_OUT_OF_MEMORY = ("outofmemory", "out of memory", "resourceexhausted", "failed to allocate memory", "bad_alloc")


def _part(call: Call, rows: slice) -> Call:
    return call._replace(arrays={name: array[rows] for name, array in call.arrays.items()})


def _stacked(calls: Sequence[Call], padded_rows: Callable[[int], int]) -> Call:
    """One call of all rows; rows added as padding repeat the last one, which the model is known to bear."""
    rows = sum(rows_of(call.arrays) or 0 for call in calls)
    return calls[0]._replace(
        arrays={name: _stack([call.arrays[name] for call in calls], padded_rows(rows)) for name in calls[0].arrays}
    )


def _stack(parts: Sequence[Array], rows: int) -> Array:
    if len(parts) == 1 and len(parts[0]) == rows:
        return parts[0]
    stacked = np.empty((rows, *parts[0].shape[1:]), parts[0].dtype)
    at = 0
    for part in parts:
        stacked[at : at + len(part)] = part
        at += len(part)
    stacked[at:] = parts[-1][-1:]
    return stacked


def _cut(
    calls: Sequence[Call], results: Mapping[str, Array], padded_rows: Callable[[int], int]
) -> list[dict[str, Array]]:
    """Each call's rows of the outputs.

    Raises:
        _NotByRow: an output does not have a row for each row of the inputs, so that nobody knows whose is whose.
    """
    sizes = [rows_of(call.arrays) or 0 for call in calls]
    rows = padded_rows(sum(sizes))
    given = {name: np.asarray(results[name]) for name in calls[0].names}
    for name, array in given.items():
        if not array.ndim or len(array) != rows:
            raise _NotByRow(
                f"output '{name}': expected a row for each of {rows}, got {array.dtype} {list(array.shape)}; "
                "a model whose outputs are not by row cannot be batched",
                name=name,
            )
    ends = np.cumsum(sizes).tolist()
    spans = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return [{name: array[span] for name, array in given.items()} for span in spans]
