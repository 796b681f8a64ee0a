"""The chaos proxy does what it says; and whatever it does, every caller gets the right error, in time, and goes on."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from chaos import WAIT_S, End, Fault, Flip, Proxy, chaos
from rawpeer import Message, Peer, echoing, peer, read_message, until

# --------------------------------------------------------------------------- the proxy itself


class Raw:
    """A client of a few lines: one connection."""

    def __init__(self, proxy: Proxy) -> None:
        self.sock = socket.create_connection(("127.0.0.1", proxy.port), WAIT_S)
        self.file = self.sock.makefile("rb")

    def send(self, body: bytes) -> None:
        self.sock.sendall(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    def ask(self, body: bytes = b"ping") -> Message | None:
        self.send(body)
        return read_message(self.file)

    def rest(self) -> bytes:
        """What comes until the end of the connection; raises if that is a reset."""
        return self.file.read()

    def close(self) -> None:
        self.file.close()
        self.sock.close()


@pytest.fixture
def through() -> Iterator[tuple[Proxy, Peer]]:
    """A proxy before a peer that echoes."""
    with peer(echoing) as there, chaos(there.url) as proxy:
        yield proxy, there


@pytest.fixture
def raw(through: tuple[Proxy, Peer]) -> Iterator[Raw]:
    made = Raw(through[0])
    yield made
    made.close()


ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nping"
HEAD_BYTES = len(ANSWER) - 4


def asked(raw: Raw, body: bytes = b"ping") -> Message:
    answer = raw.ask(body)
    assert answer is not None
    return answer


def test_without_a_fault_everything_passes(through: tuple[Proxy, Peer], raw: Raw) -> None:
    proxy, there = through
    for body in (b"", b"ping", bytes(range(256)) * 8192):
        assert asked(raw, body).body == body
    assert (proxy.requests, proxy.connections, proxy.open, there.connections) == (3, 1, 1, 1)
    raw.close()
    assert until(lambda: proxy.open == 0)


def test_latency_holds_both_directions_back(through: tuple[Proxy, Peer], raw: Raw) -> None:
    through[0].fault = Fault(latency_s=0.05)
    since = time.monotonic()
    asked(raw)
    assert time.monotonic() - since >= 0.1


def test_jitter_is_the_same_in_every_run() -> None:
    fault = Fault(latency_s=0.5, jitter_s=0.2)
    rolls = []
    for _ in range(2):
        with chaos("http://127.0.0.1:9/m") as proxy:
            rolls.append([proxy._latency_s(fault) for _ in range(5)])
    assert rolls[0] == rolls[1]
    assert len(set(rolls[0])) == 5
    assert all(0.3 <= roll <= 0.7 for roll in rolls[0])


def test_bandwidth_makes_bytes_take_their_time(through: tuple[Proxy, Peer], raw: Raw) -> None:
    through[0].fault = Fault(bytes_per_s=50_000)
    since = time.monotonic()
    assert asked(raw, bytes(5_000)).body == bytes(5_000)
    assert time.monotonic() - since >= 0.2  # 5,000 bytes there and 5,000 back


def test_a_slicer_sends_single_bytes_on(through: tuple[Proxy, Peer], raw: Raw) -> None:
    through[0].fault = Fault(slice_bytes=1, latency_s=0.01)
    raw.send(b"ping")
    first = raw.sock.recv(1 << 16)
    assert len(first) < len(ANSWER)
    assert first + raw.file.read(len(ANSWER) - len(first)) == ANSWER


@pytest.mark.parametrize(
    ("end", "arrives"),
    [
        (End("reset", "request", 0), b""),
        (End("reset", "request", 10), b""),
        (End("reset", "request"), b""),
        (End("reset", "head", 0), b""),
        (End("reset", "head", 10), ANSWER[:10]),
        (End("reset", "body", 1), ANSWER[:-3]),
        (End("reset", "body", -1), ANSWER[:-1]),
        (End("reset", "body"), ANSWER),
    ],
)
def test_a_reset_comes_at_the_byte_it_is_told_to(
    through: tuple[Proxy, Peer], raw: Raw, end: End, arrives: bytes
) -> None:
    through[0].fault = Fault(end=end)
    raw.send(b"ping")
    assert raw.file.read(len(arrives)) == arrives
    with pytest.raises(ConnectionResetError):
        raw.sock.recv(1)
    assert until(lambda: through[0].open == 0)


@pytest.mark.parametrize(
    ("end", "arrives"),
    [
        (End("close", "request", 0), b""),
        (End("close", "request"), b""),
        (End("close", "head", -1), ANSWER[: HEAD_BYTES - 1]),
        (End("close", "body", 0), ANSWER[:HEAD_BYTES]),
        (End("close", "body", 2), ANSWER[:-2]),
        (End("close", "body"), ANSWER),
    ],
)
def test_a_cut_is_an_end_of_the_stream_at_the_byte_it_is_told_to(
    through: tuple[Proxy, Peer], raw: Raw, end: End, arrives: bytes
) -> None:
    through[0].fault = Fault(end=end)
    raw.send(b"ping")
    assert raw.rest() == arrives


@pytest.mark.parametrize(
    ("end", "arrives"), [(End("silence", "request"), b""), (End("silence", "body", 1), ANSWER[:-3])]
)
def test_a_black_hole_reads_and_says_no_more(through: tuple[Proxy, Peer], raw: Raw, end: End, arrives: bytes) -> None:
    proxy, _ = through
    proxy.fault = Fault(end=end)
    raw.send(b"ping")
    raw.sock.sendall(bytes(4 << 20))  # more than buffers hold
    assert raw.file.read(len(arrives)) == arrives
    raw.sock.settimeout(0.05)
    with pytest.raises(TimeoutError):
        raw.sock.recv(1)
    assert proxy.open == 1
    raw.close()
    assert until(lambda: proxy.open == 0)


def test_the_server_sees_as_much_of_a_request_as_passed() -> None:
    seen: list[bytes] = []
    with peer(lambda conversation: seen.append(conversation.file.read())) as there, chaos(there.url) as proxy:
        proxy.fault = Fault(end=End("reset", "request", 12))
        raw = Raw(proxy)
        raw.send(b"ping")
        assert until(lambda: bool(seen))
        raw.close()
    assert seen == [b"POST / HTTP/1.1\r\n"[:12]]


def test_a_flip_changes_one_byte_of_the_head_or_of_the_body(through: tuple[Proxy, Peer], raw: Raw) -> None:
    through[0].fault = Fault(flip=Flip("body", -1, 0x01))
    assert asked(raw).body == b"pinf"
    through[0].fault = Fault(flip=Flip("head", 9, 0x01))
    assert asked(raw).status == 300


def test_who_refuses_closes_what_is_open_and_listens_again_at_the_same_place(
    through: tuple[Proxy, Peer], raw: Raw
) -> None:
    proxy, _ = through
    asked(raw)
    proxy.fault = Fault(refuse=True)
    assert raw.rest() == b""
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            Raw(proxy)
    proxy.fault = Fault()
    again = Raw(proxy)
    assert asked(again).body == b"ping"
    again.close()


@pytest.mark.parametrize("how", ["reset", "close"])
def test_idle_connections_are_dropped_on_demand(how: Any, through: tuple[Proxy, Peer], raw: Raw) -> None:
    proxy, _ = through
    asked(raw)
    assert proxy.drop_idle(how) == 1
    if how == "reset":
        with pytest.raises(ConnectionResetError):
            raw.rest()
    else:
        assert raw.rest() == b""
    raw.close()
    assert until(lambda: proxy.open == 0)


def test_a_fault_holds_as_often_as_it_says_and_until_another_is_set(through: tuple[Proxy, Peer], raw: Raw) -> None:
    proxy, _ = through
    proxy.fault = Fault(flip=Flip("body", 0, 0x01), times=2)
    assert [asked(raw).body for _ in range(3)] == [b"qing", b"qing", b"ping"]
    proxy.fault = Fault(flip=Flip("body", 0, 0x01))
    assert [asked(raw).body for _ in range(3)] == [b"qing"] * 3
    proxy.fault = Fault()
    assert asked(raw).body == b"ping"


def test_a_fault_that_is_lifted_holds_nobody_back_any_longer(through: tuple[Proxy, Peer], raw: Raw) -> None:
    proxy, _ = through
    proxy.fault = Fault(latency_s=600)
    raw.send(b"ping")
    assert until(lambda: proxy.requests == 1)
    proxy.fault = Fault()
    answer = read_message(raw.file)
    assert answer is not None
    assert answer.body == b"ping"
