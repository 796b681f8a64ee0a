"""Moving bytes: over http, https and unix sockets, blocking and on both kinds of loop, in good times and in bad."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import os
import pickle
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import psutil
import pytest
import requests
import trustme
import uvloop
from cryptography.hazmat.primitives import serialization
from rawpeer import WAIT_S, Conversation, Message, Script, echoing, peer, read_head, unreachable, until

from remote_ops.deadline import Deadline
from remote_ops.errors import (
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    FramingError,
    SpecError,
    TransportError,
)
from remote_ops.transport import Call, HttpTransport, Reply, RequestsTransport
from remote_ops.url import TLS, Url

MANY_BYTES = 50 << 20
MANY = memoryview(bytes(MANY_BYTES))
SLACK_S = 0.2


class Wire:
    """A transport with one way to drive it: on this thread, or on a loop that lives as long as the test."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.transport = HttpTransport()
        self.loop: asyncio.AbstractEventLoop | None = None
        if kind != "blocking":
            self.loop = uvloop.new_event_loop() if kind == "uvloop" else asyncio.new_event_loop()
            self.loop.set_debug(False)

    def send(self, url: str, body: bytes | memoryview = b"ping", within_s: float = WAIT_S) -> Reply:
        call = Call(Url.parse(url), (), [body])
        deadline = Deadline.after(within_s)
        if self.loop is None:
            return self.transport.exchange(call, deadline)
        return self.loop.run_until_complete(self.transport.aexchange(call, deadline))

    def trust(self, tls: TLS) -> None:
        self.transport = HttpTransport(tls)

    def turn_loop(self) -> None:
        """Let the loop see what has happened to its sockets meanwhile."""
        for _ in range(5 if self.loop else 0):
            assert self.loop is not None
            self.loop.run_until_complete(asyncio.sleep(0))

    def close(self) -> None:
        self.transport.close()
        self.turn_loop()
        if self.loop is not None:
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()


@pytest.fixture(params=["blocking", "asyncio", "uvloop"])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    made = Wire(request.param)
    yield made
    made.close()


def once(misbehave: Script) -> Script:
    """A script whose first connection misbehaves and whose others echo."""
    return lambda conversation: misbehave(conversation) if conversation.number == 1 else echoing(conversation)


# --------------------------------------------------------------------------- http, unix, https


def test_a_body_of_many_buffers_arrives_whole_and_in_order(wire: Wire) -> None:
    sizes = [0, 1, 7_000, 0, 7] * 140 + [3 << 20, 0, 5 << 20]
    parts = [bytes([index % 251]) * size for index, size in enumerate(sizes)]
    call_bytes = b"".join(parts)
    with peer(echoing) as there:
        url = Url.parse(there.url)
        if wire.loop is None:
            reply = wire.transport.exchange(Call(url, (), parts), Deadline.after(30))
        else:
            reply = wire.loop.run_until_complete(wire.transport.aexchange(Call(url, (), parts), Deadline.after(30)))
    assert reply.status == 200
    assert reply.body == call_bytes


def test_calls_one_after_the_other_share_one_connection(wire: Wire) -> None:
    with peer(echoing) as there:
        for index in range(50):
            assert wire.send(there.url, b"%d" % index).body == b"%d" % index
        assert there.connections == 1


def test_the_request_says_what_http_demands(wire: Wire) -> None:
    seen: list[Message] = []

    def script(conversation: Conversation) -> None:
        request = conversation.read()
        assert request is not None
        seen.append(request)
        conversation.answer()

    with peer(script) as there:
        wire.send(f"{there.url}/v/1?key=1", b"abc")
    assert seen[0].first_line == "POST /m/v/1?key=1 HTTP/1.1"
    assert seen[0].headers["host"] == f"127.0.0.1:{there.port}"
    assert seen[0].headers["content-length"] == "3"
    assert seen[0].headers["content-type"] == "application/octet-stream"


def test_c24_a_unix_socket_carries_calls(wire: Wire, tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            sock, _ = listener.accept()
            conversation = Conversation(sock, 1)
            echoing(conversation)
            conversation.hang_up()

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http+unix://{quote(str(path), safe='')}/model"
        assert wire.send(url, b"one").body == b"one"
        assert wire.send(url, b"two").body == b"two"
        wire.transport.close()
        wire.turn_loop()
        thread.join(WAIT_S)


def test_c24_a_unix_socket_that_is_not_there_is_a_connect_error_with_its_path(wire: Wire, tmp_path: Path) -> None:
    path = tmp_path / "nobody.sock"
    with pytest.raises(ConnectError, match=r"nobody\.sock"):
        wire.send(f"http+unix://{quote(str(path), safe='')}/model")


class Certificates(NamedTuple):
    """A CA of ours, a server's certificate for 127.0.0.1, and a client's, as files and contexts."""

    ca: str
    client: str
    server: Callable[[bool], ssl.SSLContext]
    other_ca: str


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("tls")
    ca, other = trustme.CA(), trustme.CA()
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    other.cert_pem.write_to_path(str(folder / "other.pem"))
    ca.issue_cert("caller@example.com").private_key_and_cert_chain_pem.write_to_path(str(folder / "client.pem"))
    server_certificate = ca.issue_cert("127.0.0.1")

    def context(wants_client: bool) -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server_certificate.configure_cert(made)
        if wants_client:
            ca.configure_trust(made)
            made.verify_mode = ssl.CERT_REQUIRED
        return made

    return Certificates(str(folder / "ca.pem"), str(folder / "client.pem"), context, str(folder / "other.pem"))


def test_https_with_an_own_ca_carries_large_calls(wire: Wire, certificates: Certificates) -> None:
    wire.trust(TLS(ca=certificates.ca))
    body = os.urandom(5 << 20)
    with peer(echoing, tls=certificates.server(False)) as there:
        assert wire.send(there.url, body).body == body
        assert wire.send(there.url, b"again").body == b"again"
        assert there.connections == 1
        wire.transport.close()
        wire.turn_loop()


def test_https_shows_the_client_certificate(wire: Wire, certificates: Certificates) -> None:
    wire.trust(TLS(ca=certificates.ca, cert=certificates.client))
    with peer(echoing, tls=certificates.server(True)) as there:
        assert wire.send(there.url, b"known").body == b"known"
        wire.transport.close()
        wire.turn_loop()


def test_https_without_the_client_certificate_is_a_transport_error_with_the_url(
    wire: Wire, certificates: Certificates
) -> None:
    wire.trust(TLS(ca=certificates.ca))
    with (
        peer(echoing, tls=certificates.server(True)) as there,
        pytest.raises(TransportError, match=there.url),
    ):
        wire.send(there.url, bytes(MANY[: 4 << 20]))


def test_https_of_a_stranger_is_a_connect_error_with_the_url(wire: Wire, certificates: Certificates) -> None:
    wire.trust(TLS(ca=certificates.other_ca))
    with (
        peer(echoing, tls=certificates.server(False)) as there,
        pytest.raises(ConnectError, match=f"(?i)certificate verify failed.*{there.url}"),
    ):
        wire.send(there.url)


def test_https_of_another_host_is_a_connect_error_with_the_url(wire: Wire, certificates: Certificates) -> None:
    wire.trust(TLS(ca=certificates.ca))
    with peer(echoing, tls=certificates.server(False)) as there:
        url = f"https://localhost:{there.port}/m"
        with pytest.raises(ConnectError, match=f"(?i)hostname mismatch.*{url}"):
            wire.send(url)


def test_https_to_a_peer_that_speaks_plain_http_is_a_connect_error(wire: Wire) -> None:
    def script(conversation: Conversation) -> None:
        conversation.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    with peer(script) as there, pytest.raises(ConnectError, match=f"127.0.0.1:{there.port}"):
        wire.send(there.url.replace("http:", "https:"))


def test_certificates_that_do_not_load_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no\.pem"):
        HttpTransport(TLS(ca=str(tmp_path / "no.pem"))).exchange(
            Call(Url.parse("https://127.0.0.1:1/"), (), []), Deadline.after(1)
        )


# --------------------------------------------------------------------------- deadlines, phase by phase


def reads_nothing(conversation: Conversation) -> None:
    conversation.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    conversation.file.read(1)
    STOP.wait(WAIT_S)


def answers_nothing(conversation: Conversation) -> None:
    conversation.read()
    STOP.wait(WAIT_S)


def stops_mid_body(conversation: Conversation) -> None:
    conversation.read()
    conversation.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", bytes(10))
    STOP.wait(WAIT_S)


def drips(conversation: Conversation) -> None:
    """A byte every now and then: each wait is short, their sum is not."""
    conversation.read()
    conversation.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while not STOP.wait(0.02):
        conversation.send(b".")


STOP = threading.Event()


@pytest.fixture(autouse=True)
def stop() -> Iterator[None]:
    """Lets the scripts that wait for the end of the test go on."""
    STOP.clear()
    yield
    STOP.set()


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    try:
        yield
    finally:
        STOP.set()


PHASES = [
    pytest.param(reads_nothing, "sending the request", MANY, id="sending"),
    pytest.param(answers_nothing, "waiting for the first byte", b"ping", id="waiting"),
    pytest.param(stops_mid_body, "receiving the answer", b"ping", id="receiving"),
    pytest.param(drips, "receiving the answer", b"ping", id="dripping"),
]


def fails_in_time(wire: Wire, url: str, body: bytes | memoryview, phase: str) -> None:
    since = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=phase):
        wire.send(url, body, within_s=0.3)
    assert 0.29 <= time.monotonic() - since < 0.3 + SLACK_S


def test_a_deadline_while_connecting_names_the_phase_and_is_kept(wire: Wire) -> None:
    with unreachable() as url:
        fails_in_time(wire, url, b"ping", "connecting")


def test_a_deadline_while_shaking_hands_names_the_phase_and_is_kept(wire: Wire) -> None:
    def script(conversation: Conversation) -> None:
        conversation.sock.recv(1)
        STOP.wait(WAIT_S)

    with peer(script) as there, stopping():
        fails_in_time(wire, there.url.replace("http:", "https:"), b"ping", "connecting")


@pytest.mark.parametrize(("script", "phase", "body"), PHASES)
def test_a_deadline_names_its_phase_and_is_kept_and_the_next_call_works(
    wire: Wire, script: Script, phase: str, body: bytes | memoryview
) -> None:
    with peer(once(script)) as there, stopping():
        fails_in_time(wire, there.url, body, phase)
        assert wire.send(there.url, b"next").body == b"next"


def test_a_deadline_holds_on_a_kept_connection(wire: Wire) -> None:
    def script(conversation: Conversation) -> None:
        if conversation.number == 1:
            conversation.read()
            conversation.answer(b"first")
            answers_nothing(conversation)
        else:
            echoing(conversation)

    with peer(script) as there, stopping():
        assert wire.send(there.url).body == b"first"
        fails_in_time(wire, there.url, b"ping", "waiting for the first byte")
        assert wire.send(there.url, b"next").body == b"next"


@pytest.mark.parametrize("script", [reads_nothing, answers_nothing])
def test_a_deadline_holds_over_tls(wire: Wire, certificates: Certificates, script: Script) -> None:
    wire.trust(TLS(ca=certificates.ca))
    with peer(script, tls=certificates.server(False)) as there, stopping():
        fails_in_time(wire, there.url, MANY[: 16 << 20] if script is reads_nothing else b"ping", "sending|waiting")


def test_an_expired_deadline_touches_no_network(wire: Wire) -> None:
    with peer(echoing) as there:
        with pytest.raises(DeadlineExceeded, match="connecting"):
            wire.send(there.url, within_s=0)
        assert there.connections == 0


# --------------------------------------------------------------------------- peers that misbehave


def says(data: bytes, *, reset: bool = False, stay: bool = False) -> Script:
    """A script that answers its first request with these bytes and hangs up."""

    def script(conversation: Conversation) -> None:
        conversation.read()
        conversation.send(data)
        if reset:
            conversation.reset()
        if stay:
            STOP.wait(WAIT_S)

    return script


OK = b"HTTP/1.1 200 OK\r\n"
FAILURES = [
    pytest.param(says(b""), ConnectionLost, "waiting for the first byte", id="closes"),
    pytest.param(says(b"", reset=True), ConnectionLost, "waiting for the first byte", id="resets"),
    pytest.param(says(OK + b"Content-Length: 100\r\n\r\nten bytes."), ConnectionLost, "receiving", id="dies-mid-body"),
    pytest.param(says(OK + b"Content-"), ConnectionLost, "receiving", id="dies-mid-head"),
    pytest.param(
        says(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel"), ConnectionLost, "receiving", id="dies-mid-chunk"
    ),
    pytest.param(
        says(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"),
        ConnectionLost, "receiving", id="dies-unfinished",
    ),
    pytest.param(says(b"\x16\x03\x01\x00\xff garbage\r\n\r\n", stay=True), FramingError, "HTTP/1.1", id="garbage"),
    pytest.param(says(b"SSH-2.0-OpenSSH_9.6\r\n\r\n", stay=True), FramingError, "HTTP/1.1", id="another-protocol"),
    pytest.param(says(OK + b"X: " + b"y" * 70_000, stay=True), FramingError, "header block over", id="endless-header"),
    pytest.param(
        says(OK + b"A: b\r\n" * 8000 + b"\r\n", stay=True), FramingError, "header block over", id="long-header-block"
    ),
    pytest.param(
        says(OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", stay=True), FramingError, "chunk size", id="bad-chunk"
    ),
    pytest.param(
        says(OK + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc", stay=True),
        FramingError, "Content-Length", id="two-framings",
    ),
    pytest.param(
        says(OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc", stay=True),
        FramingError, "Content-Length", id="two-lengths",
    ),
    pytest.param(
        says(OK + b"Content-Length: 99999999999999\r\n\r\n", stay=True), FramingError, "a body of", id="absurd-length"
    ),
    pytest.param(
        says(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", stay=True), FramingError, "HTTP/1.1", id="101"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("script", "error", "words"), FAILURES)
def test_a_peer_that_misbehaves_is_a_named_error_with_the_url_and_the_next_call_works(
    wire: Wire, script: Script, error: type[TransportError], words: str
) -> None:
    with peer(once(script)) as there, stopping():
        with pytest.raises(error, match=words) as caught:
            wire.send(there.url)
        assert type(caught.value) is error
        assert there.url in str(caught.value)
        assert wire.send(there.url, b"next").body == b"next"
        assert there.connections == 2


def test_nobody_listening_is_a_connect_error_with_address_reason_and_url(wire: Wire) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}/m"
    with pytest.raises(ConnectError, match=f"127.0.0.1:{port} .*refused.* at {url}"):
        wire.send(url)


def test_a_host_that_does_not_resolve_is_a_connect_error(wire: Wire) -> None:
    with pytest.raises(ConnectError, match=r"no-such-host\.invalid:80"):
        wire.send("http://no-such-host.invalid/m")


ODD_ANSWERS = [
    pytest.param(OK + b"Content-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>", 200, b"<html>", id="html-200"),
    pytest.param(b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nno!", 404, b"no!", id="html-404"),
    pytest.param(b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n", 302, b"", id="302"),
    pytest.param(b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", id="204"),
    pytest.param(
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nA: b\r\n\r\n",
        200, b"hello world", id="chunked",
    ),
    pytest.param(OK + b"\r\nuntil the end", 200, b"until the end", id="until-eof"),
    pytest.param(b"HTTP/1.0 200 OK\r\n\r\nold", 200, b"old", id="http-1.0"),
    pytest.param(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n" + OK + b"Content-Length: 2\r\n\r\nok",
        200, b"ok", id="1xx-first",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("data", "status", "body"), ODD_ANSWERS)
def test_an_odd_but_legal_answer_is_read_and_the_next_call_works(
    wire: Wire, data: bytes, status: int, body: bytes
) -> None:
    with peer(once(says(data))) as there:
        reply = wire.send(there.url)
        assert (reply.status, bytes(reply.body)) == (status, body)
        assert wire.send(there.url, b"next").body == b"next"


@pytest.mark.parametrize("stays", [True, False], ids=["keeps-alive", "says-close"])
def test_an_answer_before_the_whole_request_is_sent_is_the_answer(wire: Wire, stays: bool) -> None:
    """A server over its size limit says 413 at once; what is left of the body must not precede the next request."""

    def script(conversation: Conversation) -> None:
        if conversation.number > 1:
            return echoing(conversation)
        read_head(conversation.file)
        conversation.answer(b"too big", "413 Content Too Large", *([] if stays else ["Connection: close"]))
        STOP.wait(WAIT_S)
        return None

    with peer(script) as there, stopping():
        since = time.monotonic()
        reply = wire.send(there.url, MANY, within_s=5)
        assert (reply.status, bytes(reply.body)) == (413, b"too big")
        assert time.monotonic() - since < 2
        assert wire.send(there.url, b"next").body == b"next"
        assert there.connections == 2


def test_an_interim_answer_while_the_body_is_sent_does_not_stop_the_sending(wire: Wire) -> None:
    def script(conversation: Conversation) -> None:
        head = read_head(conversation.file)
        assert head is not None
        conversation.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        left = int(head[1]["content-length"])
        while left and (data := conversation.file.read(min(left, 1 << 20))):
            left -= len(data)
        conversation.answer(b"%d left" % left)

    with peer(script) as there:
        assert wire.send(there.url, MANY, within_s=5).body == b"0 left"


def test_a_peer_that_dies_while_the_body_is_sent_is_a_lost_connection(wire: Wire) -> None:
    def script(conversation: Conversation) -> None:
        read_head(conversation.file)
        conversation.reset()

    with peer(once(script)) as there:
        with pytest.raises(ConnectionLost, match=there.url):
            wire.send(there.url, MANY)
        assert wire.send(there.url, b"next").body == b"next"


def test_bytes_that_nobody_asked_for_end_the_connection_not_the_next_call(wire: Wire) -> None:
    said = threading.Event()

    def script(conversation: Conversation) -> None:
        if conversation.number > 1:
            return echoing(conversation)
        conversation.read()
        conversation.answer(b"first")
        conversation.send(OK + b"Content-Length: 9\r\n\r\nunsolicit")
        said.set()
        STOP.wait(WAIT_S)
        return None

    with peer(script) as there, stopping():
        assert wire.send(there.url).body == b"first"
        assert said.wait(WAIT_S)
        wire.turn_loop()
        assert wire.send(there.url, b"next").body == b"next"


# --------------------------------------------------------------------------- the pool


def test_a_kept_connection_that_the_peer_closed_is_replaced_silently(wire: Wire) -> None:
    requests_seen: list[bytes] = []

    def script(conversation: Conversation) -> None:
        request = conversation.read()
        if request is not None:
            requests_seen.append(request.body)
            conversation.answer(request.body)

    with peer(script) as there:
        for index in range(10):
            assert wire.send(there.url, b"%d" % index).body == b"%d" % index
            assert until(lambda: there.open == 0)
    assert requests_seen == [b"%d" % index for index in range(10)]


def test_a_kept_connection_that_the_peer_resets_is_replaced_silently(wire: Wire) -> None:
    def script(conversation: Conversation) -> None:
        request = conversation.read()
        if request is not None:
            conversation.answer(request.body)
            conversation.reset()

    with peer(script) as there:
        for index in range(5):
            with contextlib.suppress(ConnectionLost):  # the reset may overtake the answer
                wire.send(there.url, b"%d" % index)
            assert until(lambda: there.open == 0)


def test_a_connection_closed_on_reading_the_request_is_replaced_silently(wire: Wire) -> None:
    """The peer's idle timeout may strike while the request is on its way."""

    def script(conversation: Conversation) -> None:
        request = conversation.read()
        if request is None:
            return
        conversation.answer(request.body)
        if conversation.number % 2:
            conversation.read()  # and hang up without an answer
        else:
            echoing(conversation)

    with peer(script) as there:
        assert wire.send(there.url, b"one").body == b"one"
        assert wire.send(there.url, b"two").body == b"two"
        assert there.connections == 2


def test_an_answer_that_says_close_ends_its_connection(wire: Wire) -> None:
    def script(conversation: Conversation) -> None:
        while (request := conversation.read()) is not None:
            conversation.answer(request.body, "200 OK", "Connection: close")

    with peer(script) as there:
        for _ in range(3):
            wire.send(there.url)
        assert there.connections == 3
        wire.turn_loop()
        assert until(lambda: there.open == 0)


def test_the_pool_serves_many_threads_and_keeps_few_connections() -> None:
    transport = HttpTransport(max_idle=4)

    def calls(thread: int) -> int:
        return sum(
            transport.exchange(Call(url, (), [b"%d-%d" % (thread, index)]), Deadline.after(30)).body
            == b"%d-%d" % (thread, index)
            for index in range(200)
        )

    with peer(echoing) as there:
        url = Url.parse(there.url)
        with ThreadPoolExecutor(16) as threads:
            assert list(threads.map(calls, range(16))) == [200] * 16
        assert until(lambda: there.open <= 4)
        transport.close()
        assert until(lambda: there.open == 0)
        assert transport.exchange(Call(url, (), [b"still"]), Deadline.after(5)).body == b"still"
        transport.close()


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_the_pool_of_a_loop_serves_many_tasks_and_keeps_few_connections(kind: str) -> None:
    wire = Wire(kind)
    wire.transport = HttpTransport(max_idle=4)

    async def many() -> list[bytes]:
        url = Url.parse(there.url)
        calls = (wire.transport.aexchange(Call(url, (), [b"%d" % index]), Deadline.after(30)) for index in range(100))
        return [bytes(reply.body) for reply in await asyncio.gather(*calls)]

    with peer(echoing) as there:
        assert wire.loop is not None
        for _ in range(3):
            assert wire.loop.run_until_complete(many()) == [b"%d" % index for index in range(100)]
        wire.turn_loop()
        assert until(lambda: there.open <= 4)
        wire.close()
        assert until(lambda: there.open == 0)


def test_an_idle_connection_that_is_too_old_is_not_used_again() -> None:
    transport = HttpTransport(idle_s=0.0)
    with peer(echoing) as there:
        for _ in range(3):
            transport.exchange(Call(Url.parse(there.url), (), [b"x"]), Deadline.after(5))
        assert there.connections == 3
        transport.close()


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_an_idle_connection_of_a_loop_that_is_too_old_is_not_used_again(kind: str) -> None:
    wire = Wire(kind)
    wire.transport = HttpTransport(idle_s=0.0)
    with peer(echoing) as there:
        for _ in range(3):
            wire.send(there.url)
        assert there.connections == 3
        wire.close()


def test_close_leaves_the_transport_usable(wire: Wire) -> None:
    with peer(echoing) as there:
        for number in (1, 2, 3):
            assert wire.send(there.url, b"x").body == b"x"
            assert there.connections == number
            wire.transport.close()
            wire.turn_loop()
            assert until(lambda: there.open == 0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_and_its_parent_use_the_transport_at_once() -> None:
    transport = HttpTransport()

    def calls(tag: bytes) -> bool:
        return all(
            transport.exchange(Call(url, (), [tag + b"%d" % index]), Deadline.after(10)).body == tag + b"%d" % index
            for index in range(100)
        )

    with peer(echoing) as there:
        url = Url.parse(there.url)
        assert calls(b"before")
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os._exit(0 if calls(b"child") else 1)
            os._exit(2)
        assert calls(b"parent")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert there.connections == 2
        transport.close()


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_cancelling_a_call_closes_its_connection_and_leaves_the_pool_whole(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    wire = Wire(kind)
    assert wire.loop is not None
    waiting = threading.Event()
    closed = threading.Event()

    def script(conversation: Conversation) -> None:
        while (request := conversation.read()) is not None:
            if request.body == b"hang":
                waiting.set()
                assert conversation.read() is None
                closed.set()
                return
            conversation.answer(request.body)

    async def cancel_while(body: bytes | memoryview, started: Callable[[], bool]) -> None:
        call = Call(Url.parse(there.url), (), [body])
        task = asyncio.ensure_future(wire.transport.aexchange(call, Deadline.after(30)))
        while not started():
            await asyncio.sleep(0.002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with peer(script) as there:
        assert wire.send(there.url, b"one").body == b"one"
        wire.loop.run_until_complete(cancel_while(b"hang", waiting.is_set))
        wire.turn_loop()
        assert closed.wait(WAIT_S)
        assert wire.send(there.url, b"two").body == b"two"
        assert wire.send(there.url, b"three").body == b"three"
        assert there.connections == 2
        wire.close()
    gc.collect()
    assert not caplog.records


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_cancelling_a_call_that_still_sends_closes_its_connection(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    wire = Wire(kind)
    assert wire.loop is not None
    started = threading.Event()

    def script(conversation: Conversation) -> None:
        read_head(conversation.file)
        started.set()
        STOP.wait(WAIT_S)

    async def cancelled() -> None:
        call = Call(Url.parse(there.url), (), [MANY])
        task = asyncio.ensure_future(wire.transport.aexchange(call, Deadline.after(30)))
        while not started.is_set():
            await asyncio.sleep(0.002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with peer(once(script)) as there, stopping():
        wire.loop.run_until_complete(cancelled())
        assert wire.send(there.url, b"next").body == b"next"
        wire.close()
    gc.collect()
    assert not caplog.records


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_loops_one_after_the_other_each_use_the_transport_and_leave_no_descriptor(kind: str) -> None:
    transport = HttpTransport()
    new_loop = uvloop.new_event_loop if kind == "uvloop" else asyncio.new_event_loop

    async def call() -> bytes:
        reply = await transport.aexchange(Call(Url.parse(there.url), (), [b"x"]), Deadline.after(5))
        return bytes(reply.body)

    def run_one_loop() -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            assert runner.run(call()) == b"x"
            assert runner.run(call()) == b"x"

    with peer(echoing) as there:
        run_one_loop()
        for _ in range(8):
            run_one_loop()
        assert there.connections == 9
        gc.collect()
        assert until(lambda: there.open <= 1)
        transport.close()


def test_a_blocking_call_opens_no_descriptor_that_it_does_not_close() -> None:
    process = psutil.Process()
    with peer(says(OK + b"Content-Length: 100\r\n\r\ncut")) as there:
        before = process.num_fds()
        for _ in range(20):
            with pytest.raises(ConnectionLost):
                HttpTransport().exchange(Call(Url.parse(there.url), (), [b"x"]), Deadline.after(5))
        assert until(lambda: process.num_fds() <= before)


# --------------------------------------------------------------------------- through requests


class ForwardProxy:
    """A plain forward proxy: reads `POST http://host/path`, asks for it, and passes the answer back."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                seen.append(self.path)
                body = self.rfile.read(int(self.headers["Content-Length"]))
                parts = urlsplit(self.path)
                with socket.create_connection((parts.hostname, parts.port)) as sock, sock.makefile("rb") as file:
                    sock.sendall(
                        f"POST {parts.path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
                    )
                    head = read_head(file)
                    assert head is not None
                    answer = file.read(int(head[1]["content-length"]))
                self.send_response(int(head[0].split()[1]))
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def session() -> Iterator[requests.Session]:
    with requests.Session() as made:
        made.trust_env = False
        yield made


def post(transport: RequestsTransport, url: str, body: bytes = b"ping", within_s: float = 5.0) -> Reply:
    return transport.exchange(
        Call(Url.parse(url), [("X-Request-Id", "7")], [body[:2], body[2:]]), Deadline.after(within_s)
    )


def test_requests_transport_brings_the_sessions_authentication(session: requests.Session) -> None:
    seen: list[Message] = []

    def script(conversation: Conversation) -> None:
        while (request := conversation.read()) is not None:
            seen.append(request)
            conversation.answer(request.body)

    session.auth = ("ann", "pass")
    session.headers["X-Team"] = "ml"
    with peer(script) as there:
        reply = post(RequestsTransport(session), there.url)
        session.close()
    assert (reply.status, bytes(reply.body)) == (200, b"ping")
    assert seen[0].headers["authorization"] == "Basic " + base64.b64encode(b"ann:pass").decode()
    assert (seen[0].headers["x-team"], seen[0].headers["x-request-id"]) == ("ml", "7")


def test_requests_transport_goes_through_the_sessions_proxy(session: requests.Session) -> None:
    proxy = ForwardProxy()
    thread = threading.Thread(target=proxy.server.serve_forever)
    thread.start()
    session.proxies = {"http": proxy.url}
    try:
        with peer(echoing) as there:
            assert post(RequestsTransport(session), there.url).body == b"ping"
            assert proxy.seen == [there.url]
    finally:
        proxy.server.shutdown()
        thread.join()
        proxy.server.server_close()


def test_requests_transport_answers_with_a_buffer_that_may_be_written_to(session: requests.Session) -> None:
    with peer(echoing) as there:
        reply = post(RequestsTransport(session), there.url)
        reply.body[0] = 0
        session.close()


def test_requests_transport_can_be_awaited(session: requests.Session) -> None:
    transport = RequestsTransport(session)

    async def call() -> bytes:
        reply = await transport.aexchange(Call(Url.parse(there.url), (), [b"x"]), Deadline.after(5))
        return bytes(reply.body)

    with peer(echoing) as there:
        assert asyncio.run(call()) == b"x"
        session.close()


@pytest.mark.parametrize(
    ("script", "error"),
    [
        pytest.param(says(b""), ConnectionLost, id="closes"),
        pytest.param(says(OK + b"Content-Length: 100\r\n\r\ncut"), TransportError, id="dies-mid-body"),
        pytest.param(says(b"garbage\r\n\r\n"), TransportError, id="garbage"),
        pytest.param(answers_nothing, DeadlineExceeded, id="hangs"),
    ],
)
def test_requests_transport_speaks_our_errors_and_hides_the_query(
    session: requests.Session, script: Script, error: type[TransportError]
) -> None:
    with peer(once(script)) as there, stopping():
        with pytest.raises(error) as caught:
            post(RequestsTransport(session), f"{there.url}?key=hush", within_s=0.5)
        assert not isinstance(caught.value, ConnectError)
        assert "hush" not in str(caught.value)
        assert post(RequestsTransport(session), there.url, b"next").body == b"next"
        session.close()


def test_requests_transport_says_where_nobody_listens_and_hides_the_query(session: requests.Session) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/m"
    with pytest.raises(ConnectError, match=url) as caught:
        post(RequestsTransport(session), f"{url}?key=hush")
    assert "hush" not in str(caught.value)


def test_requests_transport_follows_no_redirect(session: requests.Session) -> None:
    """Following it would turn the POST into a GET, and hand the body to whoever is named there."""
    with peer(says(b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n")) as there:
        assert post(RequestsTransport(session), there.url).status == 302
        assert there.connections == 1
        session.close()


def test_requests_transport_refuses_to_be_pickled(session: requests.Session) -> None:
    import pickle

    with pytest.raises(TypeError, match="does not pickle"):
        pickle.dumps(RequestsTransport(session))


# --------------------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    "text",
    [
        "", "nothing", "ftp://h/m", "http://", "http:///m", "http://h:0x50/m", "http://h:99999/m", "http://h/a b",
        "http://h/\r\nX: y", "http://[::1/m", "http://h\u00e9/m", "http://h/\u00e9", "http+unix://relative/m",
        "http+unix:///m", "http://h\u2100/m",
    ],
)  # fmt: skip
def test_a_url_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        Url.parse(text)


@pytest.mark.parametrize("text", ["http://ann:hush@h/m", "ftp://ann:hush@h/m", "http://ann:hush@h:x/m"])
def test_a_url_with_a_password_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        Url.parse(text)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "host", "port", "target"),
    [
        ("http://h", "h", 80, "/"),
        ("https://h/m", "h", 443, "/m"),
        ("http://[::1]:9000/m?a=b", "::1", 9000, "/m?a=b"),
        ("http://H:9000/m#part", "h", 9000, "/m"),
    ],
)
def test_a_url_is_read_into_its_parts(text: str, host: str, port: int, target: str) -> None:
    url = Url.parse(text)
    assert (url.host, url.port, url.target) == (host, port, target)


def test_the_modules_of_requests_are_not_loaded_for_our_own_transport() -> None:
    import subprocess

    code = "import sys, remote_ops; sys.exit('requests' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0


def test_the_password_of_a_key_is_read_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = trustme.CA().issue_cert("me@example.org")
    plain = serialization.load_pem_private_key(mine.private_key_pem.bytes(), None)
    locked = serialization.BestAvailableEncryption(b"s3cret")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    mine.cert_chain_pems[0].write_to_path(str(cert))
    key.write_bytes(
        plain.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, locked)
    )
    tls = TLS(cert=str(cert), key=str(key), password="${REMOTE_OPS_TEST_PASSWORD}")
    monkeypatch.setenv("REMOTE_OPS_TEST_PASSWORD", "s3cret")
    assert tls.context()
    assert pickle.loads(pickle.dumps(tls)) == tls
    assert pickle.loads(pickle.dumps(TLS(password="s3cret"))).password is None
    monkeypatch.setenv("REMOTE_OPS_TEST_PASSWORD", "wrong")
    with pytest.raises(SpecError, match="these certificates do not load"):
        tls.context()
    monkeypatch.delenv("REMOTE_OPS_TEST_PASSWORD")
    with pytest.raises(SpecError, match="REMOTE_OPS_TEST_PASSWORD, which is not set"):
        tls.context()
