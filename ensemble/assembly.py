"""Outputs put together from the answers to a controller's calls, and gradients taken apart and together the same way.

It moves rows between arrays. Which rows go where a controller has said: `steps.Assembly`, `steps.Call`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ensemble.rows import apart, count, joined
from ensemble.steps import Array, Assembly, Call, Missing, Piece, Rows, Value
from remote_ops.errors import SignatureError
from remote_ops.signature import describe

__all__ = ["assemble", "gather", "scatter"]

# --------------------------------------------------------------------------- outputs


def assemble(assembly: Assembly, outcomes: Sequence[Any], wanted: Sequence[str]) -> dict[str, Value]:
    """Put the outputs of a controller together.

    Args:
        outcomes: what came of each call, in the order they were made, mirrors included: outputs by name.
        wanted: the outputs to put together.

    Returns:
        `(rows, *item)` each. What is one piece and whole is handed on without a copy; of what is in several pieces
        each row is copied once. An output of which a piece is missing is `Missing`.

    Raises:
        SignatureError: pieces of different dtypes or items, or with other rows than they were sent.
    """
    return {name: _output(name, assembly, outcomes) for name in wanted}


def _output(name: str, assembly: Assembly, outcomes: Sequence[Any]) -> Value:
    if name in assembly.extra:
        return assembly.extra[name]
    if not assembly.pieces:
        return assembly.empty[name]
    values: list[Value] = [outcomes[piece.call][_theirs(piece, name)] for piece in assembly.pieces]
    missing = next((value for value in values if isinstance(value, Missing)), None)
    if missing is not None:
        return missing
    if assembly.rows is None:
        return values[0]
    return _put_together(name, assembly.pieces, values, assembly.rows)  # type: ignore[arg-type]


def _theirs(piece: Piece, name: str) -> str:
    return name if piece.names is None else piece.names.get(name, name)


def _put_together(name: str, pieces: Sequence[Piece], values: Sequence[Array], rows: int) -> Array:
    parts = [_part(name, piece, value, rows) for piece, value in zip(pieces, values, strict=True)]
    if len(parts) == 1 and len(parts[0]) == rows and not isinstance(pieces[0].put, np.ndarray):
        return parts[0]
    if sum(map(len, parts)) != rows:
        raise SignatureError(f"output '{name}': expected {rows} rows, got {sum(map(len, parts))}", name=name)
    whole = np.empty((rows, *parts[0].shape[1:]), parts[0].dtype)
    for piece, part in zip(pieces, parts, strict=True):
        if part.dtype != whole.dtype or part.shape[1:] != whole.shape[1:]:
            raise _differ(name, parts[0], part)
        whole[piece.put] = part
    return whole


def _part(name: str, piece: Piece, value: Array, rows: int) -> Array:
    """The rows that a call gave, as they go into the whole."""
    expected = count(piece.put, rows)
    if piece.items:
        value = apart(value, expected)
    if value.dtype.kind in "US":
        value = value.astype(object)
    if value.ndim and _has(value, piece.take):
        part = value if piece.take is None else value[piece.take]
        if len(part) == expected:
            return part
    raise SignatureError(
        f"output '{name}': expected {expected} rows, as many as were sent, got {describe(value)}",
        name=name,
        expected=f"{expected} rows",
        got=describe(value),
    )


def _has(value: Array, take: Rows) -> bool:
    return not isinstance(take, np.ndarray) or not take.size or int(take.max()) < len(value)


def _differ(name: str, one: Array, other: Array) -> SignatureError:
    return SignatureError(
        f"output '{name}': its parts differ in dtype or item: {describe(one)} and {describe(other)}",
        name=name,
        expected=describe(one),
        got=describe(other),
    )


# --------------------------------------------------------------------------- gradients


def scatter(assembly: Assembly, calls: Sequence[Call], cotangents: Mapping[str, Array]) -> list[dict[str, Array]]:
    """Take the cotangents of a controller's outputs apart: the transpose of `assemble`.

    Args:
        calls: all that were made, in their order.
        cotangents: `(rows, *item)` of each output that has one; those of `extra` outputs are dropped.

    Returns:
        The cotangents of each call's outputs, under its own names; a row that was not taken has zeros. A call whose
        answer was not used has none.
    """
    found: list[dict[str, Array]] = [{} for _ in calls]
    for piece in assembly.pieces:
        for name, cotangent in cotangents.items():
            if name not in assembly.extra:
                part = cotangent if piece.put is None else cotangent[piece.put]
                part = joined(part) if piece.items else part
                rows = count(calls[piece.call].rows, len(cotangent)) if piece.take is not None else 0
                _add(found[piece.call], _theirs(piece, name), piece.take, part, rows)
    return found


def _add(found: dict[str, Array], name: str, take: Rows, part: Array, rows: int) -> None:
    if take is None:
        found[name] = part if name not in found else found[name] + part
        return
    if name not in found:
        found[name] = np.zeros((rows, *part.shape[1:]), part.dtype)
    found[name][take] += part


def gather(
    calls: Sequence[Call], gradients: Sequence[Mapping[str, Array]], inputs: Mapping[str, Array]
) -> dict[str, Array]:
    """Put the gradients with respect to a controller's inputs together: the transpose of cutting them into calls.

    Args:
        gradients: of each call, with respect to those of its inputs that have one.
        inputs: of the controller, for their shapes.

    Returns:
        The gradient of each input, of its shape: the sum over all calls at the rows that each was sent. An input for
        which no call has one is left out: its gradient is zero. What one whole call gives is handed on, not copied.
    """
    found: dict[str, Array] = {}
    ours: set[str] = set()  # which of `found` we made, and may write into
    for call, given in zip(calls, gradients, strict=True):
        for name, gradient in given.items():
            if name not in call.cut:
                _add_whole(found, ours, name, gradient)
                continue
            if name not in ours:
                shape = inputs[name].shape
                found[name] = found[name].copy() if name in found else np.zeros(shape, gradient.dtype)
                ours.add(name)
            rows = count(call.rows, len(inputs[name]))
            found[name][call.rows] += gradient.reshape(rows, *inputs[name].shape[1:])
    return found


def _add_whole(found: dict[str, Array], ours: set[str], name: str, gradient: Array) -> None:
    if name not in found:
        found[name] = gradient
    elif name in ours:
        found[name] += gradient
    else:
        found[name] = np.asarray(found[name] + gradient)
        ours.add(name)
