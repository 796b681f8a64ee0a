"""Turns rows of arrays into bytes that say their own dtype and shape, and such bytes back into one array.

It knows nothing of requests, of models or of where the bytes are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from struct import Struct
from typing import Any, TypeAlias

import numpy as np

from remote_ops.errors import EncodeError
from remote_ops.signature import BY_NUMPY, DTYPES, Array, describe

__all__ = ["dtype_of", "pack_rows", "payload_bytes", "payloads", "stack_rows"]

Buffer: TypeAlias = "bytes | memoryview"
_TEXT = Struct("<cQ")  # what an element was, and its bytes
_SMALL_BYTES = 4096  # quicker copied than viewed
_TEXT_BYTES = 16  # of an element whose length nobody has looked at


def dtype_of(array: Array) -> str:
    """Name the dtype of an array.

    Raises:
        EncodeError: it has none of `DTYPES`.
    """
    row = BY_NUMPY.get(array.dtype)
    if row is None:
        raise EncodeError(
            f"no way to keep {describe(array)}: expected one of {', '.join(DTYPES)}",
            dtype=array.dtype.name, shape=array.shape,
        )  # fmt: skip
    return row.name


def payloads(array: Array) -> Sequence[Buffer]:
    """The bytes of each row of an array `(rows, *item)`: views where numbers lie in order, else copies.

    A string is told from bytes, and begins with its length: `["a", "bc"]` differs from `["ab", "c"]`.

    Raises:
        EncodeError: an element of an array of strings is neither string nor bytes.
    """
    rows = len(array)
    if array.dtype.kind == "O":
        return [b"".join(map(_text, row)) for row in array.reshape(rows, -1)] if array.size else [b""] * rows
    if rows == 1 and array.nbytes <= _SMALL_BYTES:
        return [array.tobytes()]
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    size = len(data) // rows if rows else 0
    return [data[at : at + size] for at in range(0, len(data), size)] if size else [b""] * rows


def payload_bytes(array: Array) -> int:
    """About how many bytes an array holds, its strings included; looks at each element of an array of strings."""
    if array.dtype.kind != "O":
        return array.nbytes
    return sum(len(item) if isinstance(item, str | bytes) else _TEXT_BYTES for item in array.flat)


def pack_rows(array: Array) -> list[bytes]:
    """Pack each row of an array `(rows, *item)` with its dtype and `item`; copies once.

    Raises:
        EncodeError: a dtype, or an element of an array of strings, that has no such form.
    """
    head = _head(dtype_of(array), array.shape[1:])
    return [b"".join((head, payload)) for payload in payloads(array)]


def stack_rows(packed: Sequence[bytes]) -> Array | None:
    """Give what `pack_rows` packed, one or more, as one writable array `(rows, *item)`; copies once.

    Returns:
        None where rows differ in dtype or `item`, or are not what was packed: they are no rows of one array.
    """
    first = packed[0]
    start = first.find(b";") + 1
    head = first[:start]
    if any(not row.startswith(head) for row in packed[1:]):
        return None
    try:
        dtype, item = _parsed(head)
        payload = bytearray().join([memoryview(row)[start:] for row in packed])
        flat = _strings(payload) if dtype.kind == "O" else np.frombuffer(payload, dtype)
        return flat.reshape(len(packed), *item)
    except (KeyError, ValueError):
        return None


@lru_cache(1024)
def _head(dtype: str, item: tuple[int, ...]) -> bytes:
    return f"{dtype}:{','.join(map(str, item))};".encode()


@lru_cache(1024)
def _parsed(head: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    name, _, sizes = head[:-1].decode("ascii").partition(":")
    return DTYPES[name].numpy, tuple(int(size) for size in sizes.split(",")) if sizes else ()


def _text(item: object) -> bytes:
    if isinstance(item, bytes):
        return _TEXT.pack(b"b", len(item)) + item
    if isinstance(item, str):
        data = item.encode("utf-8", "surrogatepass")
        return _TEXT.pack(b"s", len(data)) + data
    raise EncodeError(f"expected strings or bytes in an array of strings, got a {type(item).__name__}", dtype="string")


def _strings(payload: bytearray) -> Array:
    items: list[str | bytes] = []
    at = 0
    while at < len(payload):
        if len(payload) - at < _TEXT.size:
            raise ValueError("cut off")
        kind, size = _TEXT.unpack_from(payload, at)
        data = bytes(payload[at + _TEXT.size : at + _TEXT.size + size])
        if len(data) != size:
            raise ValueError("cut off")
        items.append(data.decode("utf-8", "surrogatepass") if kind == b"s" else data)
        at += _TEXT.size + size
    array = np.empty(len(items), object)
    array[:] = items
    return array
