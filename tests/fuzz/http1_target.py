"""What must hold of the HTTP/1.1 framing for any bytes; the second opinion reads a connection at once, strictly."""

from __future__ import annotations

import contextlib
import random
import re
import zlib
from collections.abc import Iterator
from itertools import repeat
from typing import Literal, NamedTuple, TypeAlias

from fuzz.claims import assert_same, assert_sensible

from remote_ops import http1
from remote_ops.errors import FramingError
from remote_ops.http1 import CONTINUE, Head, Limits, Reader

Role: TypeAlias = Literal["request", "response"]

LIMITS = Limits(max_head_bytes=300, max_body_bytes=100, max_chunks=5)  # low, so that inputs reach them
_SLOW_BYTES = 200

WORDS: tuple[bytes, ...] = (
    b"\r\n", b"\r\n\r\n", b"GET / HTTP/1.1\r\n", b"POST /m HTTP/1.0\r\n", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 200\r\n",
    b"HTTP/1.1 100 Continue\r\n", b"HTTP/1.1 204 \r\n", b"HTTP/1.1 304 \r\n", b"HTTP/1.1 101 \r\n", b"HEAD ",
    b"CONNECT a:1 ", b"PRI * HTTP/2.0\r\n", b"OPTIONS * ", b"Host: a\r\n", b"Content-Length: 5\r\n",
    b"Content-Length: 101\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n",
    b"Connection: upgrade\r\nUpgrade: h2c\r\n", b"Proxy-Connection: keep-alive\r\n", b"Expect: 100-continue\r\n",
    b"5\r\nhello\r\n", b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b";a=b", b"identity", b"gzip, chunked", b"\xa0", b"\x0b",
)  # fmt: skip


def _heads(first: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join((first, *headers, b"", b""))


_CHUNKED = b"5\r\nhello\r\n1;name=value\r\n \r\n00B ; x\r\nworld again\r\n0\r\nX-Trailer: t\r\n\r\n"
_LONG_LINES = b"1\r\nx\r\n" * 5 + b"0;" + b"e" * 240 + b"\r\n" + b"T: t\r\n" * 70 + b"\r\n"
_TOO_LONG = b"41\r\n" + b"x" * 65 + b"\r\n24\r\n" + b"x" * 36 + b"\r\n0\r\n\r\n"
_LENGTH, _CHUNKS, _HOST = b"Content-Length: 5", b"Transfer-Encoding: chunked", b"Host: a"
_POST = b"POST /m/1?v=2 HTTP/1.1"
REQUESTS = (
    _heads(b"GET / HTTP/1.1", _HOST),
    _heads(_POST, _HOST, _LENGTH, b"Expect: 100-continue") + b"hello",
    _heads(_POST, _HOST, b"Accept: a", b"ACCEPT:b \t", b"X-Empty:", _CHUNKS) + _CHUNKED,
    _heads(b"POST /m HTTP/1.0", b"Connection: keep-alive", _LENGTH) + b"\r\n\0\xff0",
    b"\r\n" + _heads(_POST, _HOST, _LENGTH) + b"hello" + _heads(_POST, _HOST, _LENGTH) + b"again",
    _heads(_POST, _HOST, b"X: " + b"x" * 240, _LENGTH) + b"hello",
    _heads(_POST, _HOST, _CHUNKS) + _LONG_LINES,
    _heads(_POST, _HOST, b"Content-Length: 101") + b"x" * 101,
    _heads(_POST, _HOST, _CHUNKS) + _TOO_LONG,
    _heads(b"OPTIONS * HTTP/1.1", _HOST, b"Connection: upgrade", b"Upgrade: h2c")
    + _heads(b"CONNECT a:1 HTTP/1.1", _HOST),
)
RESPONSES = (
    CONTINUE + _heads(b"HTTP/1.1 200 OK", _LENGTH, b"Content-Type: text/plain") + b"hello",
    _heads(b"HTTP/1.1 200 OK", _CHUNKS) + _CHUNKED + _heads(b"HTTP/1.1 404", _LENGTH) + b"helloX",
    _heads(b"HTTP/1.1 200 OK", b"X: " + b"x" * 240, _LENGTH) + b"hello",
    _heads(b"HTTP/1.1 200 OK", b"Content-Length: 101") + b"x" * 101,
    _heads(b"HTTP/1.1 200 OK") + b"x" * 101,
    _heads(b"HTTP/1.1 200 OK", _CHUNKS) + _LONG_LINES,
    _heads(b"HTTP/1.1 200 OK", _CHUNKS) + _TOO_LONG,
    _heads(b"HTTP/1.1 204 No Content") + _heads(b"HTTP/1.1 304 Not Modified", _LENGTH),
    _heads(b"HTTP/1.0 500 It broke", b"Retry-After: 1") + b"all the\r\n\r\nrest",
    _heads(b"HTTP/1.1 503 \xe9", b"Connection: close, TE", b"Content-Length: 0") * 2,
)


def request_seeds() -> Iterator[tuple[str, bytes]]:
    """Connections as clients write them."""
    return ((f"{number}", data) for number, data in enumerate(REQUESTS))


def response_seeds() -> Iterator[tuple[str, bytes]]:
    """Connections as servers write them."""
    return ((f"{number}", data) for number, data in enumerate(RESPONSES))


def check_requests(data: bytes) -> None:
    """Read the bytes as a server does; see `check`."""
    check("request", data)


def check_responses(data: bytes) -> None:
    """Read the bytes as a client does; see `check`."""
    check("response", data)


def check(role: Role, data: bytes) -> None:
    """Read all bytes of a connection, cut in several ways.

    Raises:
        AssertionError: something that must hold does not; as does any exception that is no `FramingError`.
    """
    whole = _receive(role, data, repeat(len(data)))
    choose = random.Random(zlib.crc32(data))
    cuts = [choose.choice((1, 2, 3, 7, 40, 200)) for _ in range(8)]
    assert_same(_receive(role, data, _cycle(cuts)), whole, f"cut into {cuts}")
    assert_same(_receive(role, data, _cycle(cuts), cramped=True), whole, f"in little room, cut into {cuts}")
    assert_same(_receive(role, data, repeat(len(data)), eager=False, cramped=True), whole, "taken late")
    if len(data) <= _SLOW_BYTES:
        assert_same(_receive(role, data, repeat(1)), whole, "byte by byte")
    _check_strictly(role, data, whole)
    for got in whole.messages:
        _check_again(role, got)


# --------------------------------------------------------------------------- as a driver does


class Got(NamedTuple):
    """A message with the body copied."""

    head: Head
    body: bytes


class Outcome(NamedTuple):
    """All of a connection: its messages, the status with which the first fault is refused, and how its end is taken."""

    messages: list[Got]
    refused: int | None
    end: str


def _cycle(cuts: list[int]) -> Iterator[int]:
    while True:
        yield from cuts


def _allocate(size: int) -> memoryview:
    assert 0 < size <= LIMITS.max_body_bytes, f"asked for {size} bytes"
    return memoryview(bytearray(size))


def _reader(role: Role, cramped: bool) -> Reader:
    """A reader; a cramped one has just the room that a header block needs, so that bytes must often be moved."""
    usual = http1._SCRATCH_BYTES
    http1._SCRATCH_BYTES = 0 if cramped else usual
    try:
        return Reader(role, LIMITS, _allocate)
    finally:
        http1._SCRATCH_BYTES = usual


def _receive(role: Role, data: bytes, sizes: Iterator[int], *, eager: bool = True, cramped: bool = False) -> Outcome:
    """Feed the bytes in pieces of these sizes at most; an eager driver takes a message as soon as it is complete."""
    reader, got, at = _reader(role, cramped), [], 0
    try:
        while at < len(data):
            into = reader.buffer()
            size = min(len(into), len(data) - at, next(sizes))
            assert size or reader.full, "no room, though no complete message waits"
            into[:size] = data[at : at + size]
            at += size
            if size:
                reader.received(size)
            assert reader.body_bytes <= LIMITS.max_body_bytes, "more of a body than is accepted"
            if reader.complete and (eager or not size):
                _take_all(reader, got, 1 << 20 if eager else 1)
        _take_all(reader, got)
        end = "between messages" if reader.idle else "completes a message"
        if reader.eof():
            got.append(_take(reader))
        assert reader.failure is None
    except FramingError as error:
        assert_sensible(error, 0)
        if reader.failure is None:
            return Outcome(got, None, str(error))
        _assert_useless(role, reader)
        return Outcome(got, reader.failure.status, "")
    return Outcome(got, None, end)


def _take_all(reader: Reader, got: list[Got], most: int = 1 << 20) -> None:
    """Take what is complete; a fault behind a message does not concern that message."""
    while reader.complete and most:
        got.append(_take(reader))
        most -= 1
    if reader.failure is not None:
        raise reader.failure


def _take(reader: Reader) -> Got:
    message = reader.take()
    return Got(message.head, bytes(message.body))


def _assert_useless(role: Role, reader: Reader) -> None:
    """A reader that has failed is not taken for one between messages, and gives no message any more."""
    assert not reader.idle, "idle after a fault"
    more = (REQUESTS if role == "request" else RESPONSES)[0]
    into = reader.buffer()
    size = min(len(into), len(more))
    into[:size] = more[:size]
    with contextlib.suppress(FramingError):
        reader.received(size)
    assert not reader.complete, "a message after a fault"


# --------------------------------------------------------------------------- read at once, and strictly

_NAME = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_TEXT = rb"[\t\x20-\x7e\x80-\xff]*"
_FIRST_LINE = {
    "request": re.compile(rb"([A-Z-]+) ([\x21-\x7e]+) HTTP/1\.[01]"),
    "response": re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: [^\r\n]*)?"),  # nobody reads the reason
}
_HEADER = re.compile(rb"(" + _NAME + rb"):[ \t]*(|[\x21-\xff]|[\x21-\xff]" + _TEXT + rb"[\x21-\xff])[ \t]*")
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]+)[ \t]*(?:;.*)?")


def _check_strictly(role: Role, data: bytes, whole: Outcome) -> None:
    """Every message that was read is one for a reader without mercy too, with the same head and the same body."""
    at = 0
    for number, got in enumerate(whole.messages):
        first, headers, at = _head_at(role, data, at)
        while role == "response" and first[0].startswith(b"1"):
            first, headers, at = _head_at(role, data, at)
        told = (got.head.method, got.head.target) if role == "request" else (str(got.head.status),)
        assert_same(tuple(part.encode("latin-1") for part in told), first, f"the first line of message {number}")
        assert_same(dict(got.head.headers), headers, f"the headers of message {number}")
        body, at = _body_at(role, first, headers, data, at)
        assert_same(got.body, body, f"the body of message {number}")
    if whole.end == "between messages":
        assert not data[at:].replace(b"\r\n", b"") or role == "response", "bytes that belong to no message"


def _head_at(role: Role, data: bytes, at: int) -> tuple[tuple[bytes, ...], dict[str, str], int]:
    while role == "request" and data.startswith(b"\r\n", at):
        at += 2
    end = data.index(b"\r\n\r\n", at)
    assert end + 4 - at <= LIMITS.max_head_bytes, "a longer header block than is accepted"
    first, *lines = data[at:end].split(b"\r\n")
    match = _FIRST_LINE[role].fullmatch(first)
    assert match, f"accepted as the first line of a {role}: {first!r}"
    headers: dict[str, str] = {}
    for line in lines:
        header = _HEADER.fullmatch(line)
        assert header, f"accepted as a header: {line!r}"
        name, value = header[1].decode().lower(), header[2].decode("latin-1")
        assert name not in headers or name not in ("content-length", "transfer-encoding", "host"), f"{name} twice"
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return match.groups(), headers, end + 4


def _body_at(role: Role, first: tuple[bytes, ...], headers: dict[str, str], data: bytes, at: int) -> tuple[bytes, int]:
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    assert length is None or coding is None, "accepted with two framings"
    if first[0] in (b"204", b"304"):
        return b"", at
    if coding is not None:
        assert coding.lower() == "chunked", f"accepted as a transfer coding: {coding!r}"
        return _chunks_at(data, at)
    if length is None:
        return (b"", at) if role == "request" else (data[at:], len(data))
    assert re.fullmatch("[0-9]+", length), f"accepted as a length: {length!r}"
    end = at + int(length)
    assert end <= len(data), "a body longer than what came"
    return data[at:end], end


def _chunks_at(data: bytes, at: int) -> tuple[bytes, int]:
    pieces: list[bytes] = []
    while True:
        size, at = _chunk_size_at(data, at)
        if not size:
            break
        assert data[at + size : at + size + 2] == b"\r\n", "a chunk that does not end where its size says"
        pieces.append(data[at : at + size])
        at += size + 2
    assert len(pieces) <= LIMITS.max_chunks
    while not data.startswith(b"\r\n", at):
        at = data.index(b"\r\n", at) + 2
    return b"".join(pieces), at + 2


def _chunk_size_at(data: bytes, at: int) -> tuple[int, int]:
    end = data.index(b"\r\n", at)
    match = _SIZE_LINE.fullmatch(data[at:end])
    assert match, f"accepted as the size of a chunk: {data[at:end]!r}"
    return int(match[1], 16), end + 2


# --------------------------------------------------------------------------- written and read again

_OURS = ("content-length", "transfer-encoding", "content-type")


def _check_again(role: Role, got: Got) -> None:
    """A message that was read can be written, and is read as the same."""
    headers = [(name, value) for name, value in got.head.headers.items() if name not in _OURS]
    if role == "request":
        prefix = f"{got.head.method} {got.head.target} HTTP/1.{int('host' in got.head.headers)}\r\n".encode()
        kind = [(name, value) for name, value in got.head.headers.items() if name == "content-type"]
        head = http1.request_head(prefix, [*headers, *kind], len(got.body))
    else:
        kind_of = got.head.headers.get("content-type", "")
        head = http1.response_head(got.head.status, len(got.body), kind_of, headers=headers)
    reader = Reader(role)
    for piece in (head, got.body):
        for start in range(0, len(piece), 500):
            reader.buffer()[: len(piece[start : start + 500])] = piece[start : start + 500]
            reader.received(len(piece[start : start + 500]))
    assert reader.complete, "not read to its end when written again"
    again = _take(reader)
    assert_same(again.body, got.body, "the body, written and read again")
    assert_same(
        (again.head.method, again.head.target, again.head.status), got.head[:3], "the first line, written again"
    )
    told = {name: value for name, value in again.head.headers.items() if name not in _OURS}
    sent = {name: value.strip(" \t") for name, value in headers}  # two empty values are joined to ", "
    assert_same(told, sent, "the headers, written and read again")
