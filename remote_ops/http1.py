"""HTTP/1.1 framing over buffers that the caller owns, without I/O; client and server share it.

A `Reader` says where the next bytes should go, is told how many came, and gives whole messages: a body of known length
is received straight into the buffer that `allocate` made for it. It knows nothing of sockets, time or GraphPipe.

Strict on purpose: whatever two parsers could read in two ways (both Content-Length and Transfer-Encoding, two lengths,
bare line feeds, folded headers) is refused. The bytes of the header block itself are parsed by httptools.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import httptools

from remote_ops.errors import FramingError, SpecError

__all__ = ["CONTINUE", "Head", "Limits", "Message", "Reader", "request_head", "response_head"]

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_SCRATCH_BYTES = 1 << 16
_CHUNK_LINE_BYTES = 256
_EMPTY_LINES = 8
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?")
_REQUEST_LINE = re.compile(rb"[^ \r]+ [^ \r]+ HTTP/(1\.[01])")
_STATUS_LINE = re.compile(rb"HTTP/(1\.[01]) [^\r]*")
# One header as written: what it may not hold is what would end its line.
_HEADER_LINE = re.compile(r"[^\r\n\0:]+: [^\r\n\0\u0100-\U0010ffff]*\r\n")
_NO_BODY = frozenset({204, 304})


class Limits(NamedTuple):
    """What a reader accepts: bytes of a header block, bytes of a body, chunks of a chunked body."""

    max_head_bytes: int = 1 << 15
    max_body_bytes: int = 1 << 30
    max_chunks: int = 1 << 16


class Head(NamedTuple):
    """A request line or status line with its headers; names in lower case, repeated ones joined by `, `. Read-only."""

    method: str
    target: str
    status: int
    headers: Mapping[str, str]
    keep_alive: bool
    expects_continue: bool


class Message(NamedTuple):
    """A head and the whole body."""

    head: Head
    body: memoryview


class _State(Enum):
    HEAD = "the header block"
    BODY = "the body"
    CHUNK_SIZE = "a chunk size"
    CHUNK_DATA = "a chunk"
    CHUNK_END = "the end of a chunk"
    TRAILERS = "the trailers"
    UNTIL_EOF = "a body that ends with the connection"
    DONE = "nothing"


def _plain_buffer(size: int) -> memoryview:
    return memoryview(bytearray(size))


class Reader:
    """Reads messages of one connection, one after the other.

    Args:
        role: which messages come: `request` at a server, `response` at a client.
        limits: what is refused with 413 or 431.
        allocate: makes the buffer that a body of known length is received into.

    `state` changes with every call, and `failure` once, after which nothing more is read. Nothing is shared, so there
    is no lock: a reader belongs to one connection.
    """

    def __init__(
        self,
        role: Literal["request", "response"],
        limits: Limits = Limits(),  # noqa: B008 (immutable)
        allocate: Callable[[int], memoryview] = _plain_buffer,
    ) -> None:
        self._is_request = role == "request"
        self._limits = limits
        self._allocate = allocate
        self._scratch = memoryview(bytearray(max(_SCRATCH_BYTES, limits.max_head_bytes + 1)))
        self._start = self._end = 0
        self.failure: FramingError | None = None
        self._last_block = b""
        self._last_parsed: tuple[Head, int | Literal["chunked"] | None] | None = None
        self._reset()

    def _reset(self) -> None:
        self.state = _State.HEAD
        self.head: Head | None = None
        self._empty_lines = 0
        self._body = memoryview(b"")
        self._filled = 0
        self._parts = bytearray()
        self._chunks = 0
        self._left = 0
        self._trailer_bytes = 0

    # what the driver asks

    @property
    def body_bytes(self) -> int:
        """How many bytes of the body at hand have come."""
        return self._filled + len(self._parts)

    @property
    def idle(self) -> bool:
        """Whether no byte of a next message has come; never again after a failure."""
        return self.state is _State.HEAD and self._start == self._end and self.failure is None

    @property
    def complete(self) -> bool:
        """Whether `take` will give a message."""
        return self.state is _State.DONE

    @property
    def full(self) -> bool:
        """Whether the message at hand must be taken before there is room for more bytes."""
        return self.state is _State.DONE and self._end - self._start == len(self._scratch)

    def buffer(self) -> memoryview:
        """Where to put the next bytes: empty only if `full`."""
        if self.state is _State.BODY:
            return self._body[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == len(self._scratch):
            pending = bytes(self._scratch[self._start : self._end])
            self._scratch[: len(pending)] = pending
            self._start, self._end = 0, len(pending)
        return self._scratch[self._end :]

    def received(self, size: int) -> None:
        """Take note of `size` bytes put into `buffer()`.

        Raises:
            FramingError: they are not what this reader accepts; the connection is of no further use.
        """
        if self.state is _State.BODY:
            self._filled += size
            if self._filled == len(self._body):
                self.state = _State.DONE
            return
        self._end += size
        self._advance()

    def eof(self) -> bool:
        """Take note that the peer sends no more; True if that completed a message.

        Raises:
            FramingError: it stopped inside a message.
        """
        if self.state is _State.UNTIL_EOF:
            self._finish(self._parts)
            return True
        if self.idle or self.complete:
            return False
        raise FramingError(f"the connection ended inside {self.state.value}")

    def take(self) -> Message:
        """Give the complete message and go on to the next, some bytes of which may have come already.

        If those are not acceptable, that is said by `failure`, not raised: it does not concern this message.
        """
        assert self.complete
        assert self.head is not None
        message = Message(self.head, self._body)
        self._reset()
        with contextlib.suppress(FramingError):
            self._advance()
        return message

    # how it is done

    def _advance(self) -> None:
        if self.failure is not None:
            raise self.failure
        try:
            while self._start < self._end and self._step():
                pass
        except FramingError as error:
            self.failure = error
            raise

    def _step(self) -> bool:
        """Consume what can be consumed in this state; False if more bytes are needed first."""
        state = self.state
        if state is _State.HEAD:
            return self._read_head()
        if state is _State.CHUNK_SIZE:
            return self._read_chunk_size()
        if state is _State.CHUNK_DATA:
            return self._read_chunk_data()
        if state is _State.CHUNK_END:
            return self._read_chunk_end()
        if state is _State.TRAILERS:
            return self._read_trailer()
        if state is _State.UNTIL_EOF:
            return self._read_rest()
        return False

    def _read_head(self) -> bool:
        length = len(self._last_block)
        if length and bytes(self._scratch[self._start : min(self._start + length, self._end)]) == self._last_block:
            assert self._last_parsed is not None
            self._start += length
            self.head = self._last_parsed[0]
            self._start_body(self._last_parsed[1])
            return True
        return self._read_new_head()

    def _read_new_head(self) -> bool:
        # Bytes past the cap, which are there or not as the peer's writes fall, must not decide how it is refused.
        pending = bytes(self._scratch[self._start : min(self._end, self._start + self._limits.max_head_bytes + 1)])
        if self._is_request and pending[:2] == b"\r\n":  # an empty line before a request is tolerated (RFC 9112, 2.2)
            self._empty_lines += 1
            if self._empty_lines > _EMPTY_LINES:  # each is a sign of life that costs its sender next to nothing
                raise FramingError(f"more than {_EMPTY_LINES} empty lines before a request")
            self._start += 2
            return True
        length = pending.find(b"\r\n\r\n") + 4
        block = pending if length == 3 else pending[:length]
        if block.count(b"\n") != block.count(b"\r\n"):
            raise FramingError("a bare line feed in the header block: expected CR LF")
        if len(block) > self._limits.max_head_bytes:
            raise FramingError(f"a header block over {self._limits.max_head_bytes} bytes", status=431)
        if length == 3:
            return False
        self._start += length
        head, framing = _parse_head(block, self._is_request)
        if not self._is_request and 100 <= head.status < 200:
            if head.status == 101:
                raise FramingError("the peer switched protocols unasked")
            return True
        # The heads on a connection hardly ever differ, and the same bytes need not be read twice.
        self._last_block, self._last_parsed = block, (head, framing)
        self.head = head
        self._start_body(framing)
        return True

    def _start_body(self, framing: int | Literal["chunked"] | None) -> None:
        assert self.head is not None
        if framing == 0 or self.head.status in _NO_BODY or (framing is None and self._is_request):
            self.state = _State.DONE
        elif framing == "chunked":
            self.state = _State.CHUNK_SIZE
        elif isinstance(framing, int):
            self._check_size(framing)
            self._body = self._allocate(framing)
            self._filled = min(self._end - self._start, framing)
            self._body[: self._filled] = self._scratch[self._start : self._start + self._filled]
            self._start += self._filled
            self.state = _State.BODY if self._filled < framing else _State.DONE
        else:
            self.state = _State.UNTIL_EOF

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_body_bytes:
            raise FramingError(
                f"a body of {size} bytes: expected at most {self._limits.max_body_bytes}", status=413
            )  # fmt: skip

    def _line(self) -> bytes | None:
        pending = bytes(self._scratch[self._start : min(self._end, self._start + _CHUNK_LINE_BYTES)])
        length = pending.find(b"\r\n")
        if length < 0:
            if len(pending) == _CHUNK_LINE_BYTES or b"\n" in pending:
                raise FramingError(f"no line end within {len(pending)} bytes of {self.state.value}")
            return None
        if b"\n" in pending[:length] or b"\r" in pending[:length]:
            raise FramingError(f"a bare line feed or carriage return in {self.state.value}")
        self._start += length + 2
        return pending[:length]

    def _read_chunk_size(self) -> bool:
        line = self._line()
        if line is None:
            return False
        match = _CHUNK_SIZE.fullmatch(line)
        if match is None:
            raise FramingError(f"a chunk size that is no hexadecimal number: {line[:32]!r}")
        self._left = int(match[1], 16)
        self._chunks += 1
        self._check_size(len(self._parts) + self._left)
        if self._chunks > self._limits.max_chunks:
            raise FramingError(f"more than {self._limits.max_chunks} chunks", status=413)
        self.state = _State.CHUNK_DATA if self._left else _State.TRAILERS
        return True

    def _read_chunk_data(self) -> bool:
        size = min(self._left, self._end - self._start)
        self._parts += self._scratch[self._start : self._start + size]
        self._start += size
        self._left -= size
        if not self._left:
            self.state = _State.CHUNK_END
        return True

    def _read_chunk_end(self) -> bool:
        if self._end - self._start < 2:
            return False
        if bytes(self._scratch[self._start : self._start + 2]) != b"\r\n":
            raise FramingError("a chunk longer than its size")
        self._start += 2
        self.state = _State.CHUNK_SIZE
        return True

    def _read_trailer(self) -> bool:
        line = self._line()
        if line is None:
            return False
        self._trailer_bytes += len(line)
        if self._trailer_bytes > self._limits.max_head_bytes:
            raise FramingError(f"trailers over {self._limits.max_head_bytes} bytes", status=431)
        if not line:
            self._finish(self._parts)
        return True

    def _read_rest(self) -> bool:
        self._check_size(len(self._parts) + self._end - self._start)
        self._parts += self._scratch[self._start : self._end]
        self._start = self._end
        return False

    def _finish(self, body: bytearray) -> None:
        self._body = memoryview(body)
        self.state = _State.DONE


class _Parsed:
    """Collects what httptools calls back with."""

    __slots__ = ("headers", "target")

    def __init__(self) -> None:
        self.target = b""
        self.headers: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))


def _parse_head(block: bytes, is_request: bool) -> tuple[Head, int | Literal["chunked"] | None]:
    if b"\r\n " in block or b"\r\n\t" in block:
        raise FramingError("a folded header: expected each header on one line")
    # llhttp also reads HTTP/0.9, HTTP/2.0, RTSP and ICE, skips blank lines before a message and spaces before a target,
    # and is content with those; to it, `CONNECT HTTP/1.1` names a target and no version.
    first = block[: block.index(b"\r\n")]
    match = (_REQUEST_LINE if is_request else _STATUS_LINE).fullmatch(first)
    if match is None:
        raise FramingError(f"no HTTP/1.1 or HTTP/1.0 message: it begins {first[:32]!r}")
    version = match[1].decode()
    parsed = _Parsed()
    parser: Any = httptools.HttpRequestParser(parsed) if is_request else httptools.HttpResponseParser(parsed)
    try:
        parser.feed_data(block)
    except httptools.HttpParserUpgrade:
        pass  # nobody upgrades here; the request is answered as if it had not asked
    except httptools.HttpParserError as error:
        raise FramingError(f"no HTTP/1.1 header block ({error})") from error
    headers: dict[str, str] = {}
    for raw_name, raw_value in parsed.headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1").strip(" \t")
        if name in headers and name in ("content-length", "transfer-encoding", "host"):
            raise FramingError(f"two {name} headers: expected one")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    status = 0 if is_request else parser.get_status_code()
    if not is_request and status < 100:
        raise FramingError(f"a status of {status}: expected 100 or more")
    head = Head(
        method=parser.get_method().decode("latin-1") if is_request else "",
        target=parsed.target.decode("latin-1"),
        status=status,
        headers=MappingProxyType(headers),  # messages with equal heads share it
        keep_alive=_keeps_alive(version, headers),
        expects_continue=version == "1.1" and headers.get("expect", "").lower() == "100-continue",
    )
    if version == "1.1" and is_request and "host" not in headers:
        raise FramingError("no Host header in an HTTP/1.1 request")
    return head, _framing(headers, version)


def _keeps_alive(version: str, headers: dict[str, str]) -> bool:
    connection = headers.get("connection")
    if connection is None:
        return version == "1.1"
    tokens = {token.strip() for token in connection.lower().split(",")}
    return "close" not in tokens and (version == "1.1" or "keep-alive" in tokens)


def _framing(headers: dict[str, str], version: str) -> int | Literal["chunked"] | None:
    length, encoding = headers.get("content-length"), headers.get("transfer-encoding")
    if encoding is not None:
        if length is not None:
            raise FramingError("both Content-Length and Transfer-Encoding: expected one")
        if version != "1.1":
            raise FramingError("Transfer-Encoding in an HTTP/1.0 message")
        if encoding.lower() != "chunked":
            raise FramingError(f"Transfer-Encoding {encoding[:32]!r}: expected chunked", status=501)
        return "chunked"
    if length is None:
        return None
    if not (length.isascii() and length.isdigit() and len(length) <= 15):
        raise FramingError(f"Content-Length {length[:32]!r}: expected a number of bytes")
    return int(length)


_REASONS = {
    200: "OK", 204: "No Content", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 408: "Request Timeout", 413: "Content Too Large", 415: "Unsupported Media Type",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large", 499: "Client Closed Request", 500: "Internal Server Error",
    501: "Not Implemented", 503: "Service Unavailable", 504: "Gateway Timeout",
}  # fmt: skip


def _lines(headers: Iterable[tuple[str, str]]) -> bytes:
    lines = [f"{name}: {value}\r\n" for name, value in headers]
    text = "".join(lines)
    if not (text.isascii() and text.count("\r") == text.count("\n") == len(lines)) or "\0" in text:
        _refuse_headers(lines)
    return text.encode("latin-1")


def _refuse_headers(lines: Iterable[str]) -> None:
    """Name the header that would end its own line, which lets its value write headers or a second request."""
    for line in lines:
        if not _HEADER_LINE.fullmatch(line):
            name = line.partition(":")[0]
            raise SpecError(f"header {name[:64]!r} has a value that HTTP cannot carry on one line", path="headers")


def request_head(prefix: bytes, headers: Iterable[tuple[str, str]], body_bytes: int) -> bytes:
    """Render a request's head: `prefix` is the request line with the headers that never change, each line ended.

    Raises:
        SpecError: a header with a line end or a NUL in it, or with a character that Latin-1 lacks.
    """
    return b"%bContent-Length: %d\r\n%b\r\n" % (prefix, body_bytes, _lines(headers))


def response_head(
    status: int, body_bytes: int, content_type: str, *, keep_alive: bool = True, headers: Iterable[tuple[str, str]] = ()
) -> bytes:
    """Render a response's head; raises as `request_head` does."""
    close = "" if keep_alive else "Connection: close\r\n"
    if status == 204:  # which has neither a body nor a word on it
        return b"HTTP/1.1 204 No Content\r\n%b%b\r\n" % (close.encode(), _lines(headers))
    first = (
        f"HTTP/1.1 {status} {_REASONS.get(status, 'Status')}\r\nContent-Length: {body_bytes}\r\n"
        f"Content-Type: {content_type}\r\n{close}"
    )
    return b"%b%b\r\n" % (first.encode("latin-1"), _lines(headers))
