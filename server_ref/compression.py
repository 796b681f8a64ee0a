"""Compressed bodies: gzip and deflate, read within a bound on what comes out, and written where a client asks for it.

It knows no connections: which thread it runs on is its caller's choice. Nothing here is kept.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import TypeAlias

from remote_ops.errors import DecodeError, FramingError
from server_ref.answer import Answer

__all__ = ["coding_of", "compressed", "inflate", "inflate_little", "wished_coding"]

Buffer: TypeAlias = "bytes | bytearray | memoryview"

LITTLE_BYTES = 1 << 18
_CODINGS = {"gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate"}
_WINDOWS = {"gzip": 31, "deflate": 15}
_IN_BYTES, _OUT_BYTES = 1 << 14, 1 << 18
_WORTH_BYTES = 1 << 10


def coding_of(header: str) -> str:
    """How a body is compressed, by its `Content-Encoding`: `gzip`, `deflate`, or empty for not at all.

    Raises:
        FramingError: any other, or more than one; the status is 415.
    """
    coding = header.strip().lower()
    if coding in ("", "identity"):
        return ""
    if coding not in _CODINGS:
        raise FramingError(f"Content-Encoding {header[:64]!r}: expected gzip, deflate or none", status=415)
    return _CODINGS[coding]


def wished_coding(header: str) -> str:
    """How a client wants its answer compressed, by its `Accept-Encoding`; empty for not at all."""
    best, chosen = 0.0, ""
    for part in header.lower().split(","):
        name, _, parameters = part.partition(";")
        coding, quality = _CODINGS.get(name.strip(), ""), _quality(parameters)
        if coding and quality > best:
            best, chosen = quality, coding
    return chosen


def _quality(parameters: str) -> float:
    key, _, value = parameters.partition("=")
    try:
        return float(value) if key.strip() == "q" else 1.0
    except ValueError:
        return 0.0


def inflate_little(body: Buffer, coding: str, limit: int) -> bytes | None:
    """The bytes of a body that is small in both forms, at most 256 KiB; None if it is not.

    Raises:
        DecodeError: it is not what its coding says.
        FramingError: more than `limit` bytes come out.

    Costs a millisecond at most.
    """
    if len(body) > LITTLE_BYTES:
        return None
    found = bytearray()
    for piece in _pieces(body, coding):
        found += piece
        if len(found) > limit:
            raise _too_large(limit)
        if len(found) > LITTLE_BYTES:
            return None
    return bytes(found)


def inflate(
    body: Buffer, coding: str, limit: int, allocate: Callable[[int], memoryview], wanted: Callable[[], bool]
) -> memoryview:
    """The bytes of a body, in a buffer of exactly their size.

    Args:
        body: compressed, by `coding`.
        limit: most bytes that may come out.
        allocate: makes the buffer.
        wanted: whether somebody still waits; asked now and then.

    Raises:
        DecodeError: it is not what its coding says.
        FramingError: more than `limit` bytes come out (413), or nobody waits any more.

    Reads the body twice, first to count: one that is refused takes no memory, whatever it would come to.
    """
    size = 0
    for piece in _pieces(body, coding):
        size += len(piece)
        if size > limit:
            raise _too_large(limit)
        if not wanted():
            raise FramingError("the client has gone", status=499)
    found, at = allocate(size), 0
    for piece in _pieces(body, coding):
        found[at : at + len(piece)] = piece
        at += len(piece)
    return found


def _pieces(body: Buffer, coding: str) -> Iterator[bytes]:
    """What comes out, piece by piece; the first member of a gzip file must be the only one."""
    view = memoryview(body)
    inflater = zlib.decompressobj(_window(view, coding))
    at = 0
    try:
        while at < len(view) and not inflater.eof:
            yield from _drained(inflater, view[at : at + _IN_BYTES])
            at += _IN_BYTES
    except zlib.error as error:
        raise DecodeError(f"a body that is not {coding}, as its Content-Encoding says ({error})") from None
    if not inflater.eof:
        raise DecodeError(f"a body that ends inside its {coding} data", offset=len(view))
    if inflater.unused_data or at < len(view):
        raise DecodeError(f"bytes follow the end of the {coding} data: expected one member")


def _drained(inflater: zlib._Decompress, piece: Buffer) -> Iterator[bytes]:
    while not inflater.eof:
        found = inflater.decompress(piece, _OUT_BYTES)
        yield found
        piece = inflater.unconsumed_tail
        if not piece and len(found) < _OUT_BYTES:
            return


def _window(view: memoryview, coding: str) -> int:
    """What zlib must be told; some who say deflate leave out the two bytes that it should begin with."""
    if coding == "gzip":
        return _WINDOWS[coding]
    wrapped = len(view) > 1 and view[0] & 15 == 8 and (view[0] << 8 | view[1]) % 31 == 0
    return _WINDOWS[coding] if wrapped else -15


def _too_large(limit: int) -> FramingError:
    return FramingError(f"a body of more than {limit} bytes once it is decompressed", status=413)


def compressed(answer: Answer, coding: str) -> Answer:
    """An answer in a coding, where that makes it smaller; costs some 10 ms per megabyte."""
    size = sum(map(len, answer.body))
    if not coding or size < _WORTH_BYTES:
        return answer
    packer = zlib.compressobj(1, zlib.DEFLATED, _WINDOWS[coding])
    body = b"".join([*[packer.compress(buffer) for buffer in answer.body], packer.flush()])
    if len(body) >= size:
        return answer
    headers = [*answer.headers, ("Content-Encoding", coding), ("Vary", "Accept-Encoding")]
    return answer._replace(body=(body,), headers=headers)
