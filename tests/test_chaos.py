"""The chaos proxy does what it says; and whatever it does, every caller gets the right error, in time, and goes on."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from chaos import WAIT_S, End, Fault, Flip, How, Proxy, chaos
from rawpeer import Message, Peer, echoing, peer, read_message, until

import server_ref
from remote_ops import Endpoint, FunctionServable, Retry, TensorSpec, graphpipe, http1
from remote_ops.errors import (
    BadStatus,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    DecodeError,
    FramingError,
    RemoteOpsError,
)

Array = npt.NDArray[Any]
Call = Callable[[Array], Array]

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


# --------------------------------------------------------------------------- every way to call a model

X = np.arange(12, dtype=np.float32).reshape(3, 4)
LARGE = np.ones((1 << 20, 4), np.float32)  # 16 MiB: more than buffers hold
TWO = Retry(attempts=2, base_s=0.001)
ONCE = Retry(attempts=1)
SHORT_S = 0.3
SLACK_S = 2.0  # a busy machine's; what was measured is printed


@contextlib.contextmanager
def infer(url: str, **options: Any) -> Iterator[Call]:
    with Endpoint(url, **options) as endpoint:
        yield lambda x: endpoint.infer({"x": x})["y"]


@contextlib.contextmanager
def ainfer(url: str, **options: Any) -> Iterator[Call]:
    """On a loop of the standard library that does not run between the calls, and so sees late what happens there."""
    endpoint = Endpoint(url, **options)
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        try:
            yield lambda x: loop.run_until_complete(endpoint.ainfer({"x": x}))["y"]
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())


@contextlib.contextmanager
def submit(url: str, **options: Any) -> Iterator[Call]:
    with Endpoint(url, **options) as endpoint:
        yield lambda x: endpoint.submit({"x": x}).result(WAIT_S * 3)["y"]


@contextlib.contextmanager
def module(url: str, **options: Any) -> Iterator[Call]:
    torch = pytest.importorskip("torch")
    made = pytest.importorskip("remote_ops.torch").RemoteModule(url, **options)
    with made.servable:
        yield lambda x: made(torch.from_numpy(x)).numpy()


@contextlib.contextmanager
def started(url: str, **options: Any) -> Iterator[Call]:
    torch = pytest.importorskip("torch")
    made = pytest.importorskip("remote_ops.torch").RemoteModule(url, **options)
    with made.servable:
        yield lambda x: made.start(torch.from_numpy(x)).wait().numpy()


@contextlib.contextmanager
def eager(url: str, **options: Any) -> Iterator[Call]:
    tf = pytest.importorskip("tensorflow")
    op = pytest.importorskip("remote_ops.tf").remote_op
    yield lambda x: op(url, tf.constant(x), "x", "y", tf.float32, [None, 4], **options).numpy()


@contextlib.contextmanager
def function(url: str, **options: Any) -> Iterator[Call]:
    tf = pytest.importorskip("tensorflow")
    op = pytest.importorskip("remote_ops.tf").remote_op
    made = tf.function(
        lambda x: op(url, x, "x", "y", tf.float32, [None, 4], **options),
        input_signature=[tf.TensorSpec((None, 4), tf.float32)],
    )
    yield lambda x: made(tf.constant(x)).numpy()


CALLERS: dict[str, Callable[..., contextlib.AbstractContextManager[Call]]] = {
    "numpy-infer": infer,
    "numpy-ainfer": ainfer,
    "numpy-submit": submit,
    "torch-module": module,
    "torch-start": started,
    "tf-eager": eager,
    "tf-function": function,
}
MOST_KEPT = {"torch-start": 2}  # the signature came over a blocking connection, the calls go over one of a loop


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """A real server of a model that doubles its input."""
    spec = [TensorSpec("x", "float32", (-1, 4))]
    double = FunctionServable(lambda x: 2 * x, spec, [TensorSpec("y", "float32", (-1, 4))])
    with server_ref.running({"m": double}) as url:
        yield url


@pytest.fixture
def proxy(served: str) -> Iterator[Proxy]:
    with chaos(served) as made:
        yield made


# --------------------------------------------------------------------------- every fault


class Cell(NamedTuple):
    """What a fault comes to, where at most two attempts are allowed and a connection is kept already.

    `error` is the class in errors.py, `tf` the one in TensorFlow; None where the call succeeds. `words` must be in the
    message, as must the URL. `sent` is how many requests the proxy may see: a kept connection that ends before the
    answer begins costs one more, since that request is sent again silently.
    """

    fault: Fault
    error: type[RemoteOpsError] | None = None
    tf: str = ""
    words: tuple[str, ...] = ()
    sent: tuple[int, ...] = (1,)
    timeout_s: float = 20.0
    x: Array = X

    @property
    def attempts(self) -> tuple[str, ...]:
        """What the message says of attempts, where two are allowed; nothing of an error that is never tried again."""
        if self.error is DeadlineExceeded:
            return ("attempt 1 of 2",)
        return ("attempt 2 of 2",) if self.error in (ConnectionLost, ConnectError) else ()

    def error_for(self, caller: str) -> type[Exception]:
        if caller.startswith("tf"):
            errors: Any = pytest.importorskip("tensorflow").errors
            return getattr(errors, self.tf)  # type: ignore[no-any-return]
        assert self.error is not None
        return self.error


def fine(**fault: Any) -> Cell:
    return Cell(Fault(**fault))


def late(phase: str, x: Array = X, **fault: Any) -> Cell:
    words = (phase, "no answer from")
    return Cell(Fault(**fault), DeadlineExceeded, "DeadlineExceededError", words, timeout_s=SHORT_S, x=x)


def lost(phase: str, sent: int | tuple[int, ...], *end: Any, x: Array = X) -> Cell:
    words = ("the connection ended while", phase)
    counts = sent if isinstance(sent, tuple) else (sent,)
    return Cell(Fault(end=End(*end)), ConnectionLost, "UnavailableError", words, counts, x=x)


def wrong(error: type[RemoteOpsError], words: str, *flip: Any) -> Cell:
    return Cell(Fault(flip=Flip(*flip)), error, "InternalError", (words,))


WAITING, READING, WRITING = "waiting for the first byte", "receiving the answer", "sending the request"
LENGTH_AT = len(b"HTTP/1.1 200 OK\r\nContent-Length: ")
CELLS: dict[str, Cell] = {
    "latency": fine(latency_s=0.03, jitter_s=0.02),
    "narrow": fine(bytes_per_s=20_000),
    "single bytes": fine(slice_bytes=1),
    "all three": fine(latency_s=0.02, bytes_per_s=10_000, slice_bytes=7),
    "too late": late(WAITING, latency_s=60),
    "too narrow": late("", bytes_per_s=200),
    "too narrow to send": late(WRITING, LARGE, bytes_per_s=1 << 20),
    "black hole": late(WAITING, end=End("silence", "request")),
    "black hole in the request": late(WRITING, LARGE, end=End("stall", "request", 1 << 16)),
    "black hole in the head": late(READING, end=End("silence", "head", 20)),
    "black hole in the body": late(READING, end=End("silence", "body", -1)),
    "reset before": lost(WAITING, 3, "reset", "request", 0),
    "reset in the request": lost(WAITING, 3, "reset", "request", 40),
    "reset in a large request": lost(WRITING, (2, 3), "reset", "request", 1 << 17, x=LARGE),
    "reset before the answer": lost(WAITING, 3, "reset", "head", 0),
    "reset in the head": lost(READING, 2, "reset", "head", 20),
    "reset in the body": lost(READING, 2, "reset", "body", 20),
    "reset after": fine(end=End("reset", "body")),
    "cut before": lost(WAITING, 3, "close", "request", 0),
    "cut in the request": lost(WAITING, 3, "close", "request", 40),
    "cut in a large request": lost(WRITING, 3, "close", "request", 1 << 17, x=LARGE),
    "cut before the answer": lost(WAITING, 3, "close", "head", 0),
    "cut in the head": lost(READING, 2, "close", "head", 20),
    "cut in the body": lost(READING, 2, "close", "body", 20),
    "cut before the last byte": lost(READING, 2, "close", "body", -1),
    "cut after": fine(end=End("close", "body")),
    "refused": Cell(Fault(refuse=True), ConnectError, "UnavailableError", ("cannot connect",), sent=(0,)),
    "corrupt status line": wrong(FramingError, "not HTTP/1.1 as we accept it", "head", 0),
    "corrupt status": wrong(BadStatus, "answered 300", "head", 9, 0x01),
    "corrupt length, too short": wrong(DecodeError, "no GraphPipe message", "head", LENGTH_AT, 0x01),
    "corrupt length, too long": late(READING, flip=Flip("head", LENGTH_AT, 0x04)),
    "corrupt body": wrong(DecodeError, "no GraphPipe message", "body", 0),
}
BAD = [name for name, cell in CELLS.items() if cell.error]
LOST = [name for name in BAD if CELLS[name].error is ConnectionLost]
TF = [name for name in CALLERS if name.startswith("tf")]


def cells(names: Iterable[str], left_out: Collection[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    return [(name, caller) for name in names for caller in CALLERS if (name, caller) not in left_out]


class Timed(NamedTuple):
    """How long a call that ran out of time took beyond that."""

    caller: str
    beyond_s: float


@pytest.fixture(scope="module")
def times() -> Iterator[list[Timed]]:
    """Collects what was measured, which decides nothing; `pytest -s` shows it."""
    found: list[Timed] = []
    yield found
    for caller in CALLERS:
        beyond_ms = [1e3 * timed.beyond_s for timed in found if timed.caller == caller]
        if beyond_ms:
            median, most, count = np.median(beyond_ms), max(beyond_ms), len(beyond_ms)
            print(f"\n{caller}: {median:.1f} ms beyond the deadline, at most {most:.1f} ms, of {count} calls", end="")


def works(caller: str, call: Call, proxy: Proxy) -> None:
    """A call without a fault is right at its first sending, and leaves no more connections behind than are kept."""
    before = proxy.requests
    np.testing.assert_array_equal(call(X), 2 * X)
    assert proxy.requests == before + 1
    assert until(lambda: 1 <= proxy.open <= MOST_KEPT.get(caller, 1))


@pytest.mark.parametrize(("name", "caller"), cells(CELLS))
def test_a_fault_is_the_right_error_in_time_and_the_next_call_works(
    name: str, caller: str, proxy: Proxy, times: list[Timed], caplog: pytest.LogCaptureFixture
) -> None:
    cell = CELLS[name]
    with CALLERS[caller](proxy.url, timeout_s=cell.timeout_s, retry=TWO) as call:
        call(X)
        before, proxy.fault = proxy.requests, cell.fault
        since = time.monotonic()
        if cell.error is None:
            np.testing.assert_array_equal(call(cell.x), 2 * cell.x)
        else:
            with pytest.raises(cell.error_for(caller)) as caught:
                call(cell.x)
            for words in (proxy.url, *cell.words, *cell.attempts):
                assert words in str(caught.value)
        beyond_s = time.monotonic() - since - cell.timeout_s
        if cell.error is DeadlineExceeded:
            times.append(Timed(caller, beyond_s))
        assert beyond_s < SLACK_S
        assert proxy.requests - before in cell.sent
        proxy.fault = Fault()
        assert until(lambda: proxy.open <= MOST_KEPT.get(caller, 1))
        works(caller, call, proxy)
    if caller not in TF:  # which keeps its connections for as long as the process lives
        assert until(lambda: proxy.open == 0)
    assert [record.getMessage() for record in caplog.records if record.name in ("asyncio", "server_ref")] == []


@pytest.mark.parametrize(("name", "caller"), cells(LOST))
def test_a_connection_that_is_lost_once_too_little_is_not_seen(name: str, caller: str, proxy: Proxy) -> None:
    cell = CELLS[name]
    with CALLERS[caller](proxy.url, timeout_s=20.0, retry=TWO) as call:
        call(X)
        times = min(cell.sent) - 1
        before, proxy.fault = proxy.requests, dataclasses.replace(cell.fault, times=times)
        np.testing.assert_array_equal(call(cell.x), 2 * cell.x)
        assert proxy.requests == before + times + 1
        works(caller, call, proxy)


@pytest.mark.parametrize(("name", "caller"), cells(LOST))
def test_what_may_be_sent_once_is_sent_once(name: str, caller: str, proxy: Proxy) -> None:
    cell = CELLS[name]
    with CALLERS[caller](proxy.url, timeout_s=20.0, retry=ONCE) as call:
        call(X)
        before, proxy.fault = proxy.requests, cell.fault
        with pytest.raises(cell.error_for(caller)) as caught:
            call(cell.x)
        for words in (proxy.url, *cell.words):
            assert words in str(caught.value)
        assert proxy.requests == before + 1
        proxy.fault = Fault()
        works(caller, call, proxy)


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("retry", [TWO, ONCE])
@pytest.mark.parametrize("how", ["reset", "close"])
def test_a_kept_connection_that_ended_meanwhile_is_not_seen(how: Any, caller: str, retry: Retry, proxy: Proxy) -> None:
    with CALLERS[caller](proxy.url, timeout_s=20.0, retry=retry) as call:
        call(X)
        for _ in range(3):
            assert proxy.drop_idle(how) >= 1
            works(caller, call, proxy)


@pytest.mark.parametrize("caller", CALLERS)
def test_faults_in_a_row_leave_no_descriptor_behind(caller: str, proxy: Proxy) -> None:
    def held() -> int:
        return len(os.listdir("/proc/self/fd"))

    with CALLERS[caller](proxy.url, timeout_s=20.0, retry=TWO) as call:
        call(X)
        before = held()
        for name in ("reset in the body", "cut in the body", "reset before", "corrupt status", "corrupt body") * 4:
            proxy.fault = CELLS[name].fault
            with pytest.raises(CELLS[name].error_for(caller)):
                call(X)
        proxy.fault = Fault()
        works(caller, call, proxy)
        assert until(lambda: held() <= before), (held(), before)


# --------------------------------------------------------------------------- the first call, for the signature


@contextlib.contextmanager
def asking(url: str, **options: Any) -> Iterator[Call]:
    tf = pytest.importorskip("tensorflow")
    op = pytest.importorskip("remote_ops.tf").remote_op
    yield lambda x: op(url, tf.constant(x), **options).numpy()


AT_FIRST = [
    pytest.param(name, marks=[pytest.mark.slow] if CELLS[name].error is DeadlineExceeded else [])
    for name in BAD
    if CELLS[name].x is X and "length" not in name  # whose digits are others in the answer with the signature
]
FIRST = {name: caller for name, caller in CALLERS.items() if not name.startswith("tf")} | {"tf-eager": asking}


@pytest.mark.parametrize("caller", FIRST)
@pytest.mark.parametrize("name", AT_FIRST)
def test_a_fault_in_the_first_call_is_the_same_error_and_the_next_call_works(
    name: str, caller: str, proxy: Proxy
) -> None:
    cell = CELLS[name]
    assert cell.error is not None
    proxy.fault = cell.fault
    with FIRST[caller](proxy.url, timeout_s=cell.timeout_s, retry=TWO) as call:
        since = time.monotonic()
        with pytest.raises(cell.error) as caught:
            call(X)
        assert time.monotonic() - since < cell.timeout_s + SLACK_S
        for words in (proxy.url, *cell.words, *cell.attempts):
            assert words in str(caught.value)
        proxy.fault = Fault()
        np.testing.assert_array_equal(call(X), 2 * X)
        assert until(lambda: proxy.open <= 2)


# --------------------------------------------------------------------------- every byte


def answer_sizes() -> tuple[int, int]:
    """How long the head and the body of the answer to `call(X)` are."""
    body = sum(map(len, graphpipe.encode_response([2 * X])))
    return len(http1.response_head(200, body, "application/octet-stream")), body


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize(("part", "caller"), cells(["head", "body"]))
def test_an_answer_that_is_cut_at_any_byte_is_a_lost_connection(
    part: Literal["head", "body"], caller: str, how: How, proxy: Proxy
) -> None:
    ends = [End(how, part, at) for at in range(answer_sizes()[part == "body"])]
    with CALLERS[caller](proxy.url, timeout_s=20.0, retry=ONCE) as call:
        call(X)
        for end in ends:
            proxy.fault = Fault(end=end)
            with pytest.raises(CELLS["cut in the body"].error_for(caller), match=proxy.url):
                call(X)
        proxy.fault = Fault()
        works(caller, call, proxy)


@pytest.mark.slow
@pytest.mark.parametrize("caller", CALLERS)
def test_an_answer_with_any_byte_corrupted_is_an_answer_or_an_error_of_ours(caller: str, proxy: Proxy) -> None:
    head_bytes, body_bytes = answer_sizes()
    flips = [Flip("head", at) for at in range(head_bytes)] + [Flip("body", at) for at in range(body_bytes)]
    errors: Any = RemoteOpsError if not caller.startswith("tf") else pytest.importorskip("tensorflow").errors.OpError
    messages = []
    with CALLERS[caller](proxy.url, timeout_s=0.1, retry=ONCE) as call:
        call(X)
        for flip in flips:
            proxy.fault = Fault(flip=flip)
            try:
                found = call(X)
            except errors as error:
                messages.append(str(error))
            else:
                assert found.dtype == np.float32
        proxy.fault = Fault()
        assert until(lambda: proxy.open <= MOST_KEPT.get(caller, 1))
    assert [message for message in messages if proxy.url not in message] == []
    with CALLERS[caller](proxy.url, timeout_s=20.0, retry=ONCE) as call:
        np.testing.assert_array_equal(call(X), 2 * X)
