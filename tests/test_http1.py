"""HTTP/1.1 framing: however bytes are split they give the same messages; what could be read two ways is refused."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remote_ops.errors import FramingError, SpecError
from remote_ops.http1 import CONTINUE, Head, Limits, Reader, request_head, response_head

Role: TypeAlias = Literal["request", "response"]

HOST = b"Host: a\r\n"
SPLITS = (1, 3, 7, 1 << 20)


class Got(NamedTuple):
    """A message with the body copied, so that it can be compared."""

    head: Head
    body: bytes


def put(reader: Reader, data: bytes, step: int = 1 << 20) -> list[Got]:
    """Feed `data` as a driver does, at most `step` bytes at a time, and take each message once it is complete."""
    got = []
    while data:
        into = reader.buffer()
        size = min(len(into), len(data), step)
        assert size, "no room, though no complete message waits"
        into[:size] = data[:size]
        data = data[size:]
        reader.received(size)
        while reader.complete:
            message = reader.take()
            got.append(Got(message.head, bytes(message.body)))
            if reader.failure is not None:
                raise reader.failure
    return got


def read(role: Role, data: bytes, step: int = 1 << 20, **options: Any) -> list[Got]:
    """All messages of a connection that ends after `data`."""
    reader = Reader(role, **options)
    got = put(reader, data, step)
    if reader.eof():
        message = reader.take()
        got.append(Got(message.head, bytes(message.body)))
    return got


def only(role: Role, data: bytes, **options: Any) -> Got:
    (got,) = read(role, data, **options)
    return got


def assert_refused(role: Role, data: bytes, match: str | None = None, status: int = 400, **options: Any) -> None:
    """Refused with that status, and by the time the last byte came, however the bytes were split."""
    for step in SPLITS:
        reader = Reader(role, **options)
        with pytest.raises(FramingError, match=match) as caught:
            put(reader, data, step)
        assert caught.value.status == status


def post(*headers: str, body: bytes = b"", version: str = "1.1", host: bool = True) -> bytes:
    lines = "".join(f"{line}\r\n" for line in headers)
    return f"POST /m HTTP/{version}\r\n".encode() + (HOST if host else b"") + lines.encode("latin-1") + b"\r\n" + body


def reply(*headers: str, body: bytes = b"", status: str = "200 OK", version: str = "1.1") -> bytes:
    lines = "".join(f"{line}\r\n" for line in headers)
    return f"HTTP/{version} {status}\r\n{lines}\r\n".encode("latin-1") + body


CHUNKED = b"5\r\nhello\r\n1;name=value\r\n \r\n00B ; x\r\nworld, again\r\n0\r\nX-Trailer: t\r\n\r\n".replace(
    b"world, again", b"world again"
)

REQUESTS: dict[str, tuple[bytes, list[bytes]]] = {
    "without a body": (b"GET /m HTTP/1.1\r\nHost: a\r\n\r\n", [b""]),
    "with an empty body": (post("Content-Length: 0"), [b""]),
    "with a body": (post("Content-Length: 5", body=b"hello"), [b"hello"]),
    "with a body full of line ends": (post("Content-Length: 8", body=b"\r\n\r\n\n\n0\r"), [b"\r\n\r\n\n\n0\r"]),
    "chunked": (post("Transfer-Encoding: chunked", body=CHUNKED), [b"hello world again"]),
    "chunked without a chunk": (post("Transfer-Encoding: Chunked", body=b"0\r\n\r\n"), [b""]),
    "after an empty line": (b"\r\n" + post("Content-Length: 1", body=b"x"), [b"x"]),
    "after two empty lines": (b"\r\n\r\n" + post("Content-Length: 1", body=b"x"), [b"x"]),
    "pipelined": (
        post("Content-Length: 5", body=b"hello")
        + post()
        + post("Transfer-Encoding: chunked", body=CHUNKED)
        + b"\r\n"
        + post("Content-Length: 0")
        + post("Content-Length: 2", body=b"\r\n"),
        [b"hello", b"", b"hello world again", b"", b"\r\n"],
    ),
}
RESPONSES: dict[str, tuple[bytes, list[bytes]]] = {
    "with a body": (reply("Content-Length: 5", body=b"hello"), [b"hello"]),
    "with an empty body": (reply("Content-Length: 0"), [b""]),
    "chunked": (reply("Transfer-Encoding: chunked", body=CHUNKED), [b"hello world again"]),
    "that ends with the connection": (reply(body=b"all the\r\n\r\nrest"), [b"all the\r\n\r\nrest"]),
    "empty, ended by the connection": (reply(), [b""]),
    "without a reason": (reply("Content-Length: 1", body=b"x", status="404"), [b"x"]),
    "after 100 Continue": (CONTINUE + reply("Content-Length: 1", body=b"x"), [b"x"]),
    "after several 1xx": (
        CONTINUE + reply("Link: x", status="103 Early Hints") + CONTINUE + reply("Content-Length: 1", body=b"x"),
        [b"x"],
    ),
    "pipelined": (
        reply("Content-Length: 1", body=b"x") + reply(status="204 No Content") + reply("Content-Length: 2", body=b"yz"),
        [b"x", b"", b"yz"],
    ),
}
ALL = [
    *(pytest.param("request", *case, id=f"request {name}") for name, case in REQUESTS.items()),
    *(pytest.param("response", *case, id=f"response {name}") for name, case in RESPONSES.items()),
]


# --------------------------------------------------------------------------- whole messages


@pytest.mark.parametrize("step", SPLITS)
@pytest.mark.parametrize(("role", "data", "bodies"), ALL)
def test_c42_bytes_give_the_same_messages_however_they_are_split(
    role: Role, data: bytes, bodies: list[bytes], step: int
) -> None:
    got = read(role, data, step)
    assert [message.body for message in got] == bodies
    assert got == read(role, data)


@pytest.mark.parametrize(("role", "data", "bodies"), ALL)
def test_bytes_cut_in_two_at_any_place_give_the_same_messages(role: Role, data: bytes, bodies: list[bytes]) -> None:
    for cut in range(1, len(data)):
        reader = Reader(role)
        got = put(reader, data[:cut]) + put(reader, data[cut:])
        if reader.eof():
            message = reader.take()
            got.append(Got(message.head, bytes(message.body)))
        assert [each.body for each in got] == bodies


def test_the_head_tells_method_target_status_and_headers() -> None:
    head = only(
        "request", b"PUT /a/b?c=d HTTP/1.1\r\nHost:  x:80 \r\nX-Empty:\r\nACCEPT: a\r\naccept:b \t\r\n\r\n"
    ).head
    assert (head.method, head.target, head.status) == ("PUT", "/a/b?c=d", 0)
    assert head.headers == {"host": "x:80", "x-empty": "", "accept": "a, b"}
    assert only("response", reply("Content-Length: 0", status="429 Too Many")).head.status == 429


def test_white_space_around_a_header_value_is_no_part_of_it() -> None:
    got = only("request", post("Content-Length: \t5 \t ", "Expect:100-continue ", "Connection: close ", body=b"hello"))
    assert got.body == b"hello"
    assert got.head.expects_continue
    assert not got.head.keep_alive


def test_messages_with_equal_heads_share_nothing_that_can_be_changed() -> None:
    first, second = read("request", post() + post())
    with pytest.raises(TypeError):
        first.head.headers["x"] = "y"  # type: ignore[index]
    assert second.head.headers == {"host": "a"}


def test_a_body_of_known_length_is_received_into_the_buffer_that_was_allocated() -> None:
    made: list[memoryview] = []

    def allocate(size: int) -> memoryview:
        made.append(memoryview(bytearray(size)))
        return made[-1]

    reader = Reader("request", allocate=allocate)
    put(reader, post("Content-Length: 1000", body=b"x" * 10))
    (body,) = made
    assert len(body) == 1000
    into = reader.buffer()
    assert len(into) == 990
    assert np.shares_memory(np.frombuffer(into, np.uint8), np.frombuffer(body, np.uint8))
    into[:] = b"y" * 990
    reader.received(990)
    message = reader.take()
    assert np.shares_memory(np.frombuffer(message.body, np.uint8), np.frombuffer(body, np.uint8))
    assert bytes(message.body) == b"x" * 10 + b"y" * 990
    assert len(made) == 1


def test_the_buffer_for_a_body_never_reaches_into_the_next_message() -> None:
    reader = Reader("request")
    put(reader, post("Content-Length: 3", body=b"x"))
    assert len(reader.buffer()) == 2


@pytest.mark.parametrize("limits", [Limits(), Limits(max_head_bytes=1 << 17)], ids=["usual", "large heads"])
def test_heads_up_to_the_cap_and_bodies_of_any_length_find_room(limits: Limits) -> None:
    filler = "X: " + "x" * (limits.max_head_bytes - len(post("Content-Length: 200000", "X: ")))
    data = post("Content-Length: 200000", filler, body=b"b" * 200_000)
    got = read("request", data * 2, limits=limits)
    assert [len(message.body) for message in got] == [200_000] * 2


# --------------------------------------------------------------------------- what a reader says of itself


def test_idle_means_that_no_byte_of_a_next_message_has_come() -> None:
    reader = Reader("request")
    assert reader.idle
    put(reader, b"P")
    assert not reader.idle
    assert put(reader, post("Content-Length: 1", body=b"x")[1:])
    assert reader.idle
    put(reader, b"\r\n")
    assert reader.idle
    put(reader, post("Content-Length: 2", body=b"x"))
    assert not reader.idle
    assert reader.body_bytes == 1


def test_full_means_that_a_message_must_be_taken_before_there_is_room() -> None:
    reader = Reader("request")
    first = post("Content-Length: 1", body=b"x")
    reader.buffer()[: len(first)] = first
    reader.received(len(first))
    assert reader.complete
    assert not reader.full
    while not reader.full:
        into = reader.buffer()
        into[:] = (b"P" + bytes(len(into)))[: len(into)]
        reader.received(len(into))
    assert len(reader.buffer()) == 0
    assert bytes(reader.take().body) == b"x"


def test_a_message_is_given_although_bytes_behind_it_are_not_acceptable() -> None:
    reader = Reader("request")
    data = post("Content-Length: 1", body=b"x") + b"garbage\r\n\r\n"
    reader.buffer()[: len(data)] = data
    reader.received(len(data))
    assert bytes(reader.take().body) == b"x"
    assert isinstance(reader.failure, FramingError)
    assert not reader.complete


@pytest.mark.parametrize(("role", "start"), [("request", post), ("response", reply)])
def test_a_reader_that_has_failed_is_not_idle_and_gives_no_further_message(role: Role, start: Any) -> None:
    reader = Reader(role)
    data = start("Content-Length: 1", body=b"x") + start("Content-Length: x")
    reader.buffer()[: len(data)] = data
    reader.received(len(data))
    assert bytes(reader.take().body) == b"x"
    assert not reader.idle
    with pytest.raises(FramingError, match="in Content-Length"):
        put(reader, start("Content-Length: 0"))
    assert not reader.complete


@pytest.mark.parametrize("name", [name for name in RESPONSES if "connection" not in name])
def test_a_response_that_ends_early_is_an_error_and_between_messages_is_none(name: str) -> None:
    data, bodies = RESPONSES[name]
    whole = 0
    for end in range(len(data) + 1):
        reader = Reader("response")
        taken = len(put(reader, data[:end]))
        if reader.idle:
            whole = max(whole, taken)
            assert not reader.eof()
        else:
            with pytest.raises(FramingError, match="ended inside"):
                reader.eof()
    assert whole == len(bodies)


def test_a_request_that_ends_early_is_an_error_at_every_offset() -> None:
    data, _ = REQUESTS["chunked"]
    for end in range(1, len(data)):
        reader = Reader("request")
        put(reader, data[:end])
        with pytest.raises(FramingError, match="ended inside"):
            reader.eof()


# --------------------------------------------------------------------------- bodies


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
@pytest.mark.parametrize("header", [(), ("Content-Length: 5",), ("Transfer-Encoding: chunked",)])
def test_204_and_304_have_no_body_whatever_their_headers_say(status: str, header: tuple[str, ...]) -> None:
    data = reply(*header, status=status) + reply("Content-Length: 1", body=b"x")
    assert [message.body for message in read("response", data)] == [b"", b"x"]


def test_a_switch_of_protocols_that_nobody_asked_for_is_refused() -> None:
    assert_refused("response", reply(status="101 Switching Protocols"))
    assert_refused("response", reply("Upgrade: x", "Connection: upgrade", status="101 Switching Protocols"))


def test_a_body_over_the_cap_is_refused_at_the_head_before_anything_is_allocated() -> None:
    def allocate(size: int) -> memoryview:
        raise AssertionError(f"asked for {size} bytes")

    options: dict[str, Any] = {"limits": Limits(max_body_bytes=10), "allocate": allocate}
    for role, start in (("request", post), ("response", reply)):
        assert_refused(role, start("Content-Length: 11"), "11 bytes", 413, **options)  # type: ignore[arg-type]
        assert_refused(role, start("Content-Length: 999999999999999"), None, 413, **options)  # type: ignore[arg-type]
    assert len(only("request", post("Content-Length: 10", body=b"x" * 10), limits=Limits(max_body_bytes=10)).body) == 10


def test_a_chunked_body_over_the_cap_is_refused_at_the_size_that_exceeds_it() -> None:
    limits = Limits(max_body_bytes=10)
    start = post("Transfer-Encoding: chunked")
    assert only("request", start + b"6\r\n123456\r\n4\r\n7890\r\n0\r\n\r\n", limits=limits).body == b"1234567890"
    assert_refused("request", start + b"6\r\n123456\r\n5\r\n", "11 bytes", 413, limits=limits)
    assert_refused("request", start + b"fffffffffffffff\r\n", None, 413, limits=limits)


def test_a_body_that_ends_with_the_connection_is_refused_over_the_cap() -> None:
    assert_refused("response", reply(body=b"x" * 11), "11 bytes|bytes", 413, limits=Limits(max_body_bytes=10))
    assert len(only("response", reply(body=b"x" * 10), limits=Limits(max_body_bytes=10)).body) == 10


def test_more_chunks_than_the_cap_are_refused() -> None:
    start = post("Transfer-Encoding: chunked")
    assert_refused("request", start + b"1\r\nx\r\n" * 5, "more than 3 chunks", 413, limits=Limits(max_chunks=3))


@pytest.mark.parametrize(
    "line",
    [
        b"", b"x", b"-1", b"+1", b"0x1", b" 1", b"\t1", b"1 1", b"1,2", b"1g", b"1.0", b";ext", b"1 x", b"\x00",
        b"1\x00", b"\xb2", b"0000000000000001", b"1000000000000000000", b"1_0", b"1\x0b", b"1;a\rb", b"1;a\nb", b"1\r",
        b"\r1",
    ],
)  # fmt: skip
def test_a_chunk_size_that_is_no_plain_hexadecimal_number_is_refused(line: bytes) -> None:
    assert_refused("request", post("Transfer-Encoding: chunked") + line + b"\r\nx\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    "body",
    [
        b"1\nx\r\n0\r\n\r\n",  # a bare line feed behind the size
        b"1\r\nxx\r\n0\r\n\r\n",  # a chunk longer than its size
        b"2\r\nx\r\n0\r\n\r\n\r\n",  # a chunk shorter than its size
        b"1\r\nx\n0\r\n\r\n",
        b"1\r\nx0\r\n\r\n",  # no line end behind the chunk
        b"0\r\nX: y\n\r\n",
        b"0\r\nX: y\rZ: z\r\n\r\n",
        b"1;" + b"e" * 300,  # an endless extension
        b"0\r\nX: " + b"t" * 300,  # an endless trailer
    ],
)
def test_a_chunk_that_is_not_ended_where_its_size_says_is_refused(body: bytes) -> None:
    assert_refused("request", post("Transfer-Encoding: chunked") + body)


def test_trailers_over_the_cap_of_a_header_block_are_refused() -> None:
    data = post("Transfer-Encoding: chunked") + b"0\r\n" + b"X-Trailer: 0123456789\r\n" * 100
    assert_refused("request", data, "trailers over", 431, limits=Limits(max_head_bytes=1000))


# --------------------------------------------------------------------------- what two parsers could read in two ways


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked", "Content-Length: 5"),
        ("Content-Length: 5", "Content-Length: 5"),
        ("Content-Length: 5", "content-length: 6"),
        ("Content-Length: 5, 5",),
        ("Content-Length: +5",),
        ("Content-Length: -5",),
        ("Content-Length: 5.0",),
        ("Content-Length: 0x5",),
        ("Content-Length: 5 5",),
        ("Content-Length: \xb2",),
        ("Content-Length: \xa05",),
        ("Content-Length:",),
        ("Content-Length: 99999999999999999999",),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked, chunked",),
        ("Transfer-Encoding: \xa0chunked",),
        ("Transfer-Encoding: chunked\x0b",),
        ("Transfer-Encoding: xchunked",),
        ("Transfer-Encoding:",),
        ("Transfer-Encoding : chunked",),
        ("Content-Length : 5",),
        (" Content-Length: 5",),
        ("X: a", " folded"),
        ("X: a", "\tfolded"),
        ("X: a\0b",),
        ("X: a\rb",),
        ("X: a\nContent-Length: 5",),
        ("X\0: a",),
        ("X y: a",),
        (": a",),
        ("X",),
        ("\x7f: a",),
    ],
    ids=repr,
)
@pytest.mark.parametrize("start", [post, reply], ids=["request", "response"])
def test_a_header_block_that_could_be_read_in_two_ways_is_refused(start: Any, headers: tuple[str, ...]) -> None:
    role: Role = "request" if start is post else "response"
    for step in SPLITS:
        with pytest.raises(FramingError) as caught:
            read(role, start(*headers, body=b"hello"), step)
        assert caught.value.status in (400, 501)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"GET / HTTP/1.1\r\nHost: a\n\r\n",
        b"GET / HTTP/1.1\nHost: a\r\n\r\n",
        b"\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\n",
    ],
)
def test_a_bare_line_feed_in_a_header_block_is_refused(data: bytes) -> None:
    assert_refused("request", data, "bare line feed")


@pytest.mark.parametrize(
    "coding", ["gzip", "gzip, chunked", "chunked, gzip", "identity", "deflate", "chunked;q=1", '"chunked"']
)
def test_a_transfer_coding_other_than_chunked_is_refused(coding: str) -> None:
    with pytest.raises(FramingError) as caught:
        read("request", post(f"Transfer-Encoding: {coding}", body=b"0\r\n\r\n"))
    assert caught.value.status in (400, 501)


def test_transfer_encoding_in_http_1_0_is_refused() -> None:
    assert_refused("request", post("Transfer-Encoding: chunked", version="1.0"), "1.0")


def test_a_missing_or_doubled_host_is_refused_in_http_1_1() -> None:
    assert_refused("request", post(host=False), "no Host")
    assert_refused("request", post("Host: b"), "two host")
    assert only("request", post(host=False, version="1.0")).body == b""


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/2.0\r\n\r\n",
        b"GET / HTTP/0.9\r\n\r\n",
        b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
        b"GET / HTTP/11.1\r\nHost: a\r\n\r\n",
        b"GET / http/1.1\r\nHost: a\r\n\r\n",
        b"GET /\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /  HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT  HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /a\0b HTTP/1.1\r\nHost: a\r\n\r\n",
        b" GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"NONSENSE / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"OPTIONS rtsp://a RTSP/1.0\r\n\r\n",
        b"SOURCE / ICE/1.0\r\n\r\n",
        b"\r\r\n\r\n",
        b"\rGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",  # TLS to a plain port
        b"HTTP/1.1 200 OK\r\nHost: a\r\n\r\n",
    ],
)
def test_what_is_no_http_1_request_is_refused(data: bytes) -> None:
    assert_refused("request", data)


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 000 x\r\n\r\n",
        b"HTTP/1.1 099 x\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"RTSP/1.0 200 OK\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_what_is_no_http_1_response_is_refused(data: bytes) -> None:
    assert_refused("response", data)


def test_a_header_block_over_the_cap_is_refused_whether_it_ends_or_not() -> None:
    limits = Limits(max_head_bytes=200)
    assert_refused("request", post("X: " + "x" * 300), "over 200 bytes", 431, limits=limits)
    assert_refused("request", b"GET /" + b"a" * 300, "over 200 bytes", 431, limits=limits)
    assert_refused("response", reply("X: " + "x" * 300), "over 200 bytes", 431, limits=limits)
    assert only("request", post("X: x"), limits=limits).body == b""


@pytest.mark.parametrize(("role", "start"), [("request", post), ("response", reply)])
def test_bytes_past_the_cap_do_not_decide_how_a_header_block_is_refused(role: Role, start: Any) -> None:
    limits = Limits(max_head_bytes=200)
    assert_refused(role, start("X: " + "x" * 300, "Y: \n"), "over 200 bytes", 431, limits=limits)
    assert_refused(role, start("Y: \n", "X: " + "x" * 300), "bare line feed", 400, limits=limits)
    most = start("X: " + "x" * (200 - len(start("X: "))))
    assert_refused(role, most.replace(b"\r\n\r\n", b"x\r\n\r\n") + b"\n", "over 200 bytes", 431, limits=limits)
    assert len(most) == 200
    reader = Reader(role, limits)
    put(reader, most)
    assert reader.failure is None


# --------------------------------------------------------------------------- connections


@pytest.mark.parametrize(
    ("version", "connection", "keeps"),
    [
        ("1.1", None, True),
        ("1.1", "close", False),
        ("1.1", "Close", False),
        ("1.1", "keep-alive", True),
        ("1.1", "keep-alive, close", False),
        ("1.1", "x-close-up", True),
        ("1.1", "TE,close", False),
        ("1.0", None, False),
        ("1.0", "Keep-Alive", True),
        ("1.0", "close", False),
        ("1.0", "keep-alive, close", False),
        ("1.0", "keep-alive-not", False),
    ],
)
def test_a_connection_is_kept_as_its_version_and_header_say(version: str, connection: str | None, keeps: bool) -> None:
    headers = ("Content-Length: 0", *([f"Connection: {connection}"] if connection else []))
    assert only("request", post(*headers, version=version)).head.keep_alive is keeps
    assert only("response", reply(*headers, version=version)).head.keep_alive is keeps


@pytest.mark.parametrize(
    ("version", "expect", "expects"),
    [
        ("1.1", "100-continue", True),
        ("1.1", "100-Continue", True),
        ("1.1", "200-ok", False),
        ("1.0", "100-continue", False),
    ],
)
def test_c41_the_head_says_whether_the_peer_waits_for_100_continue(version: str, expect: str, expects: bool) -> None:
    reader = Reader("request")
    put(reader, post("Content-Length: 5", f"Expect: {expect}", version=version))
    assert reader.head is not None
    assert reader.head.expects_continue is expects
    assert [message.body for message in put(reader, b"hello")] == [b"hello"]


def test_a_few_empty_lines_before_each_request_are_skipped_and_more_are_refused() -> None:
    few = b"\r\n" * 8 + post("Content-Length: 1", body=b"x")
    assert [got.body for got in read("request", few * 3)] == [b"x"] * 3
    assert_refused("request", b"\r\n" * 9, "more than 8 empty lines before a request")


def test_an_upgrade_that_is_asked_for_is_answered_as_if_it_were_not() -> None:
    data = post("Connection: upgrade", "Upgrade: websocket", "Content-Length: 2", body=b"xy") + post()
    assert [message.body for message in read("request", data)] == [b"xy", b""]


# --------------------------------------------------------------------------- heads that we write


def test_what_we_render_a_reader_reads_back() -> None:
    prefix = b"POST /m/1 HTTP/1.1\r\nHost: a:9000\r\nUser-Agent: us\r\n"
    sent = [("X-Request-Id", "7"), ("X-Latin", "é"), ("traceparent", "00-a-b-01")]
    got = only("request", request_head(prefix, sent, 3) + b"abc")
    assert (got.head.method, got.head.target, got.body) == ("POST", "/m/1", b"abc")
    assert got.head.headers == {
        "host": "a:9000", "user-agent": "us", "content-length": "3",
        "x-request-id": "7", "x-latin": "é", "traceparent": "00-a-b-01",
    }  # fmt: skip


@pytest.mark.parametrize("keep_alive", [True, False])
@pytest.mark.parametrize("status", [200, 400, 404, 413, 429, 431, 499, 500, 501, 503, 504, 599])
def test_the_responses_we_render_a_reader_reads_back(status: int, keep_alive: bool) -> None:
    head = response_head(status, 2, "text/plain", keep_alive=keep_alive, headers=[("Retry-After", "1")])
    got = only("response", head + b"ok")
    assert (got.head.status, got.head.keep_alive, got.body) == (status, keep_alive, b"ok")
    assert got.head.headers["content-type"] == "text/plain"
    assert got.head.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X", "a\r\nContent-Length: 0"),
        ("X", "a\r\n\r\nGET /admin HTTP/1.1"),
        ("X", "a\nb"),
        ("X", "a\rb"),
        ("X", "a\0b"),
        ("X\r\nY", "a"),
        ("X", "日本"),
        ("X: Y\r\nZ", "a"),
    ],
)
def test_a_header_that_would_write_another_line_is_refused(name: str, value: str) -> None:
    with pytest.raises(SpecError, match="cannot carry on one line"):
        request_head(b"POST / HTTP/1.1\r\nHost: a\r\n", [("A", "fine"), (name, value)], 0)
    with pytest.raises(SpecError, match="cannot carry on one line"):
        response_head(200, 0, "text/plain", headers=[("A", "fine"), (name, value)])


# --------------------------------------------------------------------------- any bytes


LINES = (
    "GET / HTTP/1.1", "POST /m HTTP/1.0", "HTTP/1.1 200 OK", "HTTP/1.1 100 C", "HTTP/1.1 204 N", "Host: a",
    "Content-Length: 3", "Content-Length: 0", "Transfer-Encoding: chunked", "Connection: close",
    "Upgrade: h2c\r\nConnection: upgrade", "0\r\n", "3\r\nabc", "ffffffffffff",
)  # fmt: skip
PIECES = st.sampled_from(
    [*(f"{line}\r\n".encode() for line in LINES), b"X:", b"\r\n", b"\n", b"\r", b" ", b"abc", b";x\r\n", b"\0", b"\xff"]
)


def outcome(role: Role, data: bytes, step: int) -> list[Got]:
    """The messages before the first fault; only a FramingError may be the fault."""
    reader = Reader(role, Limits(max_body_bytes=1 << 16))
    got: list[Got] = []
    while data:
        into = reader.buffer()
        size = min(len(into), len(data), step)
        into[:size] = data[:size]
        data = data[size:]
        try:
            reader.received(size)
        except FramingError:
            return got
        while reader.complete:
            message = reader.take()
            got.append(Got(message.head, bytes(message.body)))
        if reader.failure is not None:
            return got
    return got


@pytest.mark.parametrize("role", ["request", "response"])
@settings(max_examples=300, deadline=None)
@given(data=st.lists(st.one_of(PIECES, st.binary(max_size=12)), max_size=14).map(b"".join), step=st.integers(1, 9))
def test_any_bytes_give_the_same_messages_or_a_framing_error_however_they_are_split(
    role: Role, data: bytes, step: int
) -> None:
    assert outcome(role, data, step) == outcome(role, data, 1 << 20)


@settings(max_examples=100, deadline=None)
@given(
    bodies=st.lists(
        st.tuples(st.binary(max_size=300), st.lists(st.integers(1, 60), max_size=8)), min_size=1, max_size=4
    ),
    step=st.integers(1, 50),
)
def test_bodies_round_trip_through_any_chunking(bodies: list[tuple[bytes, list[int]]], step: int) -> None:
    data = b""
    for body, cuts in bodies:
        data += post("Transfer-Encoding: chunked")
        rest = body
        for cut in cuts:
            if rest[:cut]:
                data += b"%x\r\n%b\r\n" % (len(rest[:cut]), rest[:cut])
            rest = rest[cut:]
        data += (b"%X;last\r\n%b\r\n" % (len(rest), rest) if rest else b"") + b"0\r\n\r\n"
    assert [message.body for message in read("request", data, step)] == [body for body, _ in bodies]
