"""The server's front: routes, answers, framing, timeouts and isolation, seen from raw sockets and from real clients."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http.client
import json
import logging
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pytest
from rawfront import front_of
from rawpeer import WAIT_S, Conversation, Message, peer, read_head, read_message, serving, until

import server_ref
from remote_ops import Endpoint, FunctionServable, Retry, Signature, TensorSpec, graphpipe, http1
from remote_ops.deadline import Deadline
from remote_ops.errors import (
    ConnectionLost,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    ModelUnavailable,
    Overloaded,
    RemoteOpsError,
)
from remote_ops.servable import Servable
from server_ref import Timeouts
from server_ref.front import Front

Array = npt.NDArray[Any]
X = TensorSpec("x", "float32", (-1, 2))
Y = TensorSpec("y", "float32", (-1, 2))
ONES = np.ones((3, 2), np.float32)
REQUEST = b"".join(graphpipe.encode_request(("x",), [ONES]))
QUICKLY = Timeouts(head_s=0.3, idle_s=0.3, body_s=0.3, write_s=0.5)
NO_RETRY = Retry(attempts=1)


def doubling(**options: Any) -> FunctionServable:
    return FunctionServable(lambda x: 2 * x, [X], [Y], **options)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server of one model that doubles."""
    with server_ref.running({"double": doubling(name="double", version="7", description="twice as much")}) as base:
        yield base


@pytest.fixture(scope="module")
def several() -> Iterator[str]:
    """A server of three models."""
    models = {
        "double": doubling(version="1"),
        "triple": FunctionServable(lambda x: 3 * x, [X], [Y], version="2"),
        "plain": FunctionServable(lambda x: x, [X], [Y]),
    }
    with server_ref.running(models) as base:
        yield base


class Raw:
    """A client's socket to a server, with nothing in between."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.sock = socket.create_connection((parts.hostname, parts.port), WAIT_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.sock.makefile("rb")

    def send(self, *parts: bytes) -> Raw:
        self.sock.sendall(b"".join(parts))
        return self

    def post(self, body: bytes = REQUEST, path: str = "/", *headers: str) -> Raw:
        return self.send(post(body, path, *headers))

    def read(self) -> Message:
        message = read_message(self.file)
        assert message is not None, "the server hung up without an answer"
        return message

    def ended(self) -> bool:
        """Whether the server has hung up; waits for it."""
        try:
            return self.file.read(1) == b""
        except ConnectionResetError:
            return True

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self.file.close()
        self.sock.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def post(body: bytes = REQUEST, path: str = "/", *headers: str) -> bytes:
    lines = "".join(f"{header}\r\n" for header in headers)
    return f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n{lines}\r\n".encode() + body


def ask(url: str, method: str = "GET", path: str = "/", *headers: str) -> Message:
    lines = "".join(f"{header}\r\n" for header in headers)
    with Raw(url) as raw:
        raw.send(f"{method} {path} HTTP/1.1\r\nHost: h\r\n{lines}\r\n".encode())
        return raw.read()


def error_of(message: Message) -> graphpipe.ErrorItem:
    """The one error of an answer that has one and no tensors."""
    response = graphpipe.decode_response(message.body)
    assert response.tensors == []
    assert len(response.errors) == 1
    return response.errors[0]


def only_tensor(message: Message) -> Array:
    assert message.status == 200, message
    response = graphpipe.decode_response(message.body)
    assert response.errors == []
    (tensor,) = response.tensors
    return tensor


def request(
    names: Sequence[str] = ("x",), arrays: Sequence[Array] = (ONES,), outputs: Sequence[str] = (), config: bytes = b""
) -> bytes:
    return b"".join(graphpipe.encode_request(tuple(names), arrays, tuple(outputs), config))


def still_serves(url: str) -> None:
    with Raw(url) as raw:
        np.testing.assert_array_equal(only_tensor(raw.post().read()), 2 * ONES)


# --------------------------------------------------------------------------- routes


@pytest.mark.parametrize("path", ["/", "/double", "/double/7", "/anything/at/all", "/?a=b", "/%20x", "//"])
def test_c25_one_model_answers_any_path(url: str, path: str) -> None:
    with Raw(url) as raw:
        np.testing.assert_array_equal(only_tensor(raw.post(REQUEST, path).read()), 2 * ONES)


@pytest.mark.parametrize(
    ("path", "factor"), [("/double", 2), ("/triple", 3), ("/double/1", 2), ("/triple/2", 3), ("/double/?a=b", 2)]
)
def test_c25_several_models_answer_under_their_name_and_version(several: str, path: str, factor: int) -> None:
    with Raw(several) as raw:
        np.testing.assert_array_equal(only_tensor(raw.post(REQUEST, path).read()), factor * ONES)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/", "there are /double, /triple, /plain; append one"),
        ("/dubble", "did you mean '/double'?"),
        ("/double/2", "model 'double' has no version '2'"),
        ("/nothing", "no model '/nothing'"),
    ],
)
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_c25_an_unknown_model_is_not_found_and_the_known_are_named(
    several: str, path: str, words: str, method: str
) -> None:
    with Raw(several) as raw:
        raw.send(post(REQUEST, path).replace(b"POST", method.encode()))
        answer = raw.read()
        if (method, path) == ("GET", "/"):
            assert answer.status == 200
            return
        assert answer.status == 404
        assert words in error_of(answer).message
        assert error_of(answer).code == 5


def test_an_unknown_model_is_model_not_found_for_our_client(several: str) -> None:
    with Endpoint(several + "dubble") as endpoint, pytest.raises(ModelNotFound, match="did you mean '/double'"):
        endpoint(ONES)


def test_get_at_the_root_of_several_models_lists_them(several: str) -> None:
    listed = json.loads(ask(several).body)
    assert listed == {"Models": [{"Name": name, "Path": f"/{name}"} for name in ("double", "triple", "plain")]}


@pytest.mark.parametrize("path", ["/", "/double", "/any"])
def test_c23_get_gives_metadata_as_json_with_the_keys_of_2018(url: str, path: str) -> None:
    answer = ask(url, "GET", path)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    io = {"Description": "", "Shape": [-1, 2], "Type": 10}
    assert json.loads(answer.body) == {
        "Name": "double",
        "Version": "7",
        "Server": "remote-ops server_ref",
        "Description": "twice as much",
        "Inputs": [{"Name": "x", **io}],
        "Outputs": [{"Name": "y", **io}],
    }
    assert answer.body.startswith(b'{\n    "Name"')


def test_c10_a_metadata_request_gives_a_metadata_response(url: str) -> None:
    with Raw(url) as raw:
        signature = graphpipe.decode_metadata(raw.post(graphpipe.METADATA_REQUEST).read().body)
    assert (signature.inputs, signature.outputs, signature.version) == ((X,), (Y,), "7")


@pytest.mark.parametrize("body", [b"", b"\0" * 4, b"\xff" * 100, b"{}", REQUEST[:40], REQUEST[:-1], b"\0" * 1000])
def test_c11_what_is_no_request_is_answered_with_an_error(url: str, body: bytes) -> None:
    with Raw(url) as raw:
        answer = raw.post(body).read()
        assert answer.status == 400
        assert error_of(answer).code == 3
        np.testing.assert_array_equal(only_tensor(raw.post().read()), 2 * ONES)


# --------------------------------------------------------------------------- control


def test_c26_c27_is_ready_and_is_alive_say_ok(url: str) -> None:
    for verb in ("is_ready", "is_alive"):
        answer = ask(url, "GET", f"/control/{verb}")
        assert (answer.status, answer.body) == (200, b"ok\n")


def test_c28_client_count_counts_open_connections(url: str) -> None:
    with Raw(url) as raw:
        raw.post().read()
        before = int(ask(url, "GET", "/control/client_count").body)
        with Raw(url), Raw(url):
            assert until(lambda: int(ask(url, "GET", "/control/client_count").body) == before + 2)
        assert until(lambda: int(ask(url, "GET", "/control/client_count").body) == before)


def test_c29_shutdown_is_refused_where_nobody_can_stop_the_server(url: str) -> None:
    assert ask(url, "POST", "/control/shutdown", "Content-Length: 0").status == 403
    still_serves(url)


@contextlib.contextmanager
def front_on_a_loop(model: Servable | None = None, **options: Any) -> Iterator[tuple[str, Front]]:
    """A front by itself, so that a test may say what a shutdown does."""
    with front_of({"double": model or doubling()}, **options) as found:
        yield found


def test_c29_shutdown_wants_a_local_post_without_an_origin() -> None:
    asked = threading.Event()
    with front_on_a_loop(on_shutdown=asked.set) as (url, _):
        assert ask(url, "GET", "/control/shutdown").status == 405
        assert ask(url, "POST", "/control/shutdown", "Content-Length: 0", "Origin: http://evil").status == 403
        assert not asked.is_set()
        answer = ask(url, "POST", "/control/shutdown", "Content-Length: 0")
        assert (answer.status, answer.body) == (200, b"shutdown\n")
        assert asked.is_set()


def other_address() -> str | None:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.connect(("192.0.2.1", 9))
        address: str = sock.getsockname()[0]
        return None if address.startswith("127.") else address
    return None


def test_c29_shutdown_from_another_address_is_refused() -> None:
    address = other_address()
    if address is None:
        pytest.skip("this machine has no address but loopback")
    models: Mapping[str, Servable] = {"double": doubling()}
    with server_ref.running(models, "0.0.0.0:0") as url:
        elsewhere = url.replace("127.0.0.1", address)
        assert ask(elsewhere, "POST", "/control/shutdown", "Content-Length: 0").status == 403


def test_an_unknown_control_verb_names_those_there_are(url: str) -> None:
    answer = ask(url, "GET", "/control/reboot")
    assert answer.status == 404
    assert b"is_ready, is_alive, client_count, shutdown" in answer.body


# --------------------------------------------------------------------------- methods and framing


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE"])
def test_c40_other_methods_are_405_and_say_what_is_allowed(url: str, method: str) -> None:
    answer = ask(url, method)
    assert answer.status == 405
    assert "POST" in answer.headers["allow"]


def test_c40_options_is_204_and_names_the_methods(url: str) -> None:
    answer = ask(url, "OPTIONS")
    assert (answer.status, answer.body) == (204, b"")
    assert {"GET", "POST"} <= set(answer.headers["allow"].split(", "))


@pytest.mark.parametrize("path", ["/", "/control/is_ready"])
def test_c40_head_has_no_body_and_the_connection_goes_on(url: str, path: str) -> None:
    with Raw(url) as raw:
        raw.send(f"HEAD {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        head = read_head(raw.file)
        assert head is not None
        assert head[0].split()[1] in ("200", "405")
        np.testing.assert_array_equal(only_tensor(raw.post().read()), 2 * ONES)


def test_c40_put_never_runs_the_model() -> None:
    ran: list[int] = []
    servable = FunctionServable(lambda x: ran.append(1) or x, [X], [Y])
    with server_ref.running({"m": servable}) as url:
        for method in ("PUT", "HEAD", "OPTIONS", "GET", "DELETE"):
            with Raw(url) as raw:
                raw.send(post().replace(b"POST", method.encode()))
                assert read_head(raw.file) is not None
    assert ran == []


def test_c41_expect_100_continue_is_answered_before_the_body_is_sent(url: str) -> None:
    with Raw(url) as raw:
        head, body = post(REQUEST, "/", "Expect: 100-continue").split(b"\r\n\r\n", 1)
        raw.send(head, b"\r\n\r\n")
        assert raw.read().first_line == "HTTP/1.1 100 Continue"
        np.testing.assert_array_equal(only_tensor(raw.send(body).read()), 2 * ONES)


def test_c41_expect_100_continue_with_the_body_at_once_is_answered(url: str) -> None:
    with Raw(url) as raw:
        answer = raw.post(REQUEST, "/", "Expect: 100-continue").read()
        while answer.status == 100:
            answer = raw.read()
        np.testing.assert_array_equal(only_tensor(answer), 2 * ONES)


def test_c41_expect_100_continue_of_a_body_over_the_cap_is_refused_unread() -> None:
    with server_ref.running({"m": doubling()}, limits=http1.Limits(max_body_bytes=1000)) as url, Raw(url) as raw:
        raw.send(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5000\r\nExpect: 100-continue\r\n\r\n")
        assert raw.read().status == 413
        assert raw.ended()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_c41_curl_sends_a_large_body_with_expect(url: str, tmp_path: Path) -> None:
    large = np.ones((600_000, 2), np.float32)
    (tmp_path / "body").write_bytes(request(arrays=[large]))
    command = ["curl", "-sS", "-m", "10", "-H", "Expect: 100-continue", "--data-binary", f"@{tmp_path / 'body'}", url]
    done = subprocess.run(command, capture_output=True, check=True, timeout=20)
    np.testing.assert_array_equal(graphpipe.decode_response(done.stdout).tensors[0], 2 * large)


def test_c42_a_connection_carries_many_requests(url: str) -> None:
    with Raw(url) as raw:
        for index in range(100):
            x = ONES * index
            np.testing.assert_array_equal(only_tensor(raw.post(request(arrays=[x])).read()), 2 * x)


def test_c42_pipelined_requests_are_answered_in_order(url: str) -> None:
    kinds = [post(request(arrays=[ONES * index])) if index % 3 else b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
             for index in range(200)]  # fmt: skip
    with Raw(url) as raw:
        sender = threading.Thread(target=raw.send, args=kinds)
        sender.start()
        for index in range(200):
            answer = raw.read()
            if index % 3:
                np.testing.assert_array_equal(only_tensor(answer), 2 * ONES * index)
            else:
                assert answer.headers["content-type"] == "application/json"
        sender.join(WAIT_S)


def test_c42_a_pipelining_client_that_reads_nothing_at_first_gets_every_answer() -> None:
    """More answers than the socket holds, and more requests than the reader holds: both sides must wait."""
    servable = FunctionServable(lambda x: x, [TensorSpec("x", "float32", (-1,))], [TensorSpec("y", "float32", (-1,))])
    with server_ref.running({"m": servable}) as url, Raw(url) as raw:
        bodies = [request(arrays=[np.full(30_000, index, np.float32)]) for index in range(200)]
        sender = threading.Thread(target=raw.send, args=[post(body) for body in bodies])
        sender.start()
        sender.join(0.3)
        for index in range(200):
            assert (only_tensor(raw.read()) == index).all()
        sender.join(WAIT_S)


def test_c42_a_request_after_one_that_says_close_is_not_run() -> None:
    ran: list[int] = []
    servable = FunctionServable(lambda x: ran.append(1) or x, [X], [Y])
    with server_ref.running({"m": servable}) as url, Raw(url) as raw:
        raw.send(post(REQUEST, "/", "Connection: close"), post())
        answer = raw.read()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert raw.ended()
        still = Raw(url)
        only_tensor(still.post().read())
        still.close()
    assert len(ran) == 2


def test_http_1_0_is_answered_and_closed(url: str) -> None:
    with Raw(url) as raw:
        raw.send(post().replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert raw.read().status == 200
        assert raw.ended()


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


CHUNKED = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_c43_a_chunked_request_is_accepted(url: str, size: int) -> None:
    with Raw(url) as raw:
        for _ in range(3):
            np.testing.assert_array_equal(only_tensor(raw.send(CHUNKED, chunked(REQUEST, size)).read()), 2 * ONES)


def test_c43_a_chunked_body_over_the_cap_is_413() -> None:
    with server_ref.running({"m": doubling()}, limits=http1.Limits(max_body_bytes=1000)) as url:
        with Raw(url) as raw:
            assert raw.send(CHUNKED, chunked(b"x" * 1001, 100)).read().status == 413
            assert raw.ended()
        with Raw(url) as raw:
            assert raw.send(CHUNKED, b"fffffff\r\n").read().status == 413
        still_serves(url)


def test_c43_more_chunks_than_the_cap_are_413() -> None:
    with (
        server_ref.running({"m": doubling()}, limits=http1.Limits(max_chunks=100)) as url,
        Raw(url) as raw,
    ):
        assert raw.send(CHUNKED, chunked(REQUEST, 1)[:700]).read().status == 413


def test_s4_a_body_over_the_cap_is_413_before_it_is_read_and_while_the_client_still_sends() -> None:
    with server_ref.running({"m": doubling()}, limits=http1.Limits(max_body_bytes=1 << 20)) as url:
        with Raw(url) as raw:
            raw.send(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2000000000\r\n\r\n")
            answer = raw.read()
            assert answer.status == 413
            assert "1048576" in error_of(answer).message
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        large = np.zeros((3_000_000, 2), np.float32)
        for retry in (0, 1):
            with Endpoint(url, 10, retry=NO_RETRY) as endpoint, pytest.raises(InvalidRequest, match="1048576"):
                endpoint(large) if retry else asyncio.run(endpoint.ainfer({"x": large}))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
        still_serves(url)


SMUGGLING = [
    pytest.param(b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", id="both"),
    pytest.param(b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", id="both-other-order"),
    pytest.param(b"Content-Length: 5\r\nContent-Length: 5\r\n", id="two-equal-lengths"),
    pytest.param(b"Content-Length: 5\r\nContent-Length: 6\r\n", id="two-lengths"),
    pytest.param(b"Content-Length: 5, 5\r\n", id="list-of-lengths"),
    pytest.param(b"Content-Length: +5\r\n", id="plus"),
    pytest.param(b"Content-Length: -5\r\n", id="minus"),
    pytest.param(b"Content-Length: 0x5\r\n", id="hex"),
    pytest.param(b"Content-Length: \r\n", id="empty-length"),
    pytest.param(b"Content-Length : 5\r\n", id="space-before-colon"),
    pytest.param(b"Content-Length: 5\nX: y\r\n", id="bare-lf"),
    pytest.param(b"X: a\r\n b\r\nContent-Length: 5\r\n", id="folded"),
    pytest.param(b"X: a\r\n\tb\r\nContent-Length: 5\r\n", id="folded-tab"),
    pytest.param(b"Transfer-Encoding: chunked, identity\r\n", id="two-encodings"),
    pytest.param(b"Transfer-Encoding: xchunked\r\n", id="unknown-encoding"),
    pytest.param(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", id="encoding-twice"),
    pytest.param(b"Transfer-Encoding:\x0bchunked\r\n", id="vertical-tab"),
    pytest.param(b"Content-Length: 5\r\nX: \0\r\n", id="nul"),
    pytest.param(b"no colon here\r\nContent-Length: 5\r\n", id="no-colon"),
    pytest.param(b"Host: again\r\nContent-Length: 5\r\n", id="two-hosts"),
]


@pytest.mark.parametrize("lines", SMUGGLING)
def test_s6_what_two_parsers_could_read_in_two_ways_is_refused_and_the_connection_closed(
    url: str, lines: bytes
) -> None:
    with Raw(url) as raw:
        raw.send(
            b"POST / HTTP/1.1\r\nHost: h\r\n", lines, b"\r\nhelloGET /control/is_ready HTTP/1.1\r\nHost: h\r\n\r\n"
        )
        answer = raw.read()
        assert answer.status in (400, 501)
        assert answer.headers["connection"] == "close"
        assert error_of(answer).code == 3
        raw.sock.shutdown(socket.SHUT_WR)
        assert raw.file.read() == b""
    still_serves(url)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50 + b"\r\n\r\n",
        b"GET / HTTP/2.0\r\nHost: h\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\nHost: h\n\n",
        b"\0\0\0\0\r\n\r\n",
    ],
    ids=["tls", "http2-version", "http2-preface", "http-0.9", "no-host", "only-lf", "nul"],
)
def test_s6_what_is_not_http_1_is_refused_and_the_connection_closed(url: str, data: bytes) -> None:
    with Raw(url) as raw:
        answer = raw.send(data).read()
        assert answer.status == 400
        raw.sock.shutdown(socket.SHUT_WR)
        assert raw.ended()
    still_serves(url)


def test_s4_a_header_block_over_the_cap_is_431(url: str) -> None:
    with Raw(url) as raw:
        answer = raw.send(b"GET / HTTP/1.1\r\nHost: h\r\nX: ", b"y" * 40_000).read()
        assert answer.status == 431
    still_serves(url)


def test_a_request_that_cannot_be_read_does_not_take_back_the_answer_before_it(url: str) -> None:
    with Raw(url) as raw:
        raw.send(post(), b"\0garbage\r\n\r\n")
        np.testing.assert_array_equal(only_tensor(raw.read()), 2 * ONES)
        assert raw.read().status == 400


# --------------------------------------------------------------------------- errors and requests


def test_c15_c16_c30_an_error_is_a_status_and_a_message_with_a_code_and_no_outputs(url: str) -> None:
    with Raw(url) as raw:
        answer = raw.post(request(["nope"])).read()
    assert answer.status == 400
    assert answer.headers["content-type"] == "application/octet-stream"
    assert error_of(answer).code == 3
    assert "no input 'nope': expected x" in error_of(answer).message


def test_c30_who_accepts_only_text_is_answered_with_text_like_gos(url: str) -> None:
    with Raw(url) as raw:
        answer = raw.post(request(["nope"]), "/", "Accept: text/plain").read()
    assert answer.status == 400
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.body.startswith(b"no input 'nope'")
    assert answer.body.endswith(b"\n")


@pytest.mark.parametrize("content_type", ["", "text/html", "application/x-www-form-urlencoded", "application/json"])
def test_c22_no_content_type_is_demanded(url: str, content_type: str) -> None:
    with Raw(url) as raw:
        headers = [f"Content-Type: {content_type}"] if content_type else []
        np.testing.assert_array_equal(only_tensor(raw.post(REQUEST, "/", *headers).read()), 2 * ONES)


PAIR = [TensorSpec("a", "float32", (-1,)), TensorSpec("b", "float32", (-1,))]
ANSWERS = [TensorSpec("minus", "float32", (-1,)), TensorSpec("plus", "float32", (-1,))]
A, B = np.float32([5, 6]), np.float32([1, 2])


@pytest.fixture(scope="module")
def pair() -> Iterator[str]:
    """A server of one model with two inputs and two outputs."""
    with server_ref.running({"m": FunctionServable(lambda a, b: (a - b, a + b), PAIR, ANSWERS)}) as base:
        yield base


GIVEN = [
    pytest.param(("a", "b"), (A, B), id="named"),
    pytest.param(("b", "a"), (B, A), id="named-other-order"),
    pytest.param((), (A, B), id="by-position"),
    pytest.param(("", ""), (A, B), id="empty-names"),
    pytest.param(("a",), (A, B), id="fewer-names"),
    pytest.param(("", "b"), (A, B), id="one-empty-name"),
    pytest.param(("b", "a", "b", "a"), (B, A), id="go-batcher-doubles"),
]


@pytest.mark.parametrize(("names", "arrays"), GIVEN)
def test_c12_c13_inputs_are_found_by_name_and_else_by_position(
    pair: str, names: tuple[str, ...], arrays: tuple[Array, ...]
) -> None:
    with Raw(pair) as raw:
        answer = raw.post(request(names, arrays)).read()
        assert answer.status == 200, answer
        tensors = graphpipe.decode_response(answer.body).tensors
    assert [tensor.tolist() for tensor in tensors] == [[4, 4], [6, 8]]


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ((), [[4, 4], [6, 8]]),
        (("plus",), [[6, 8]]),
        (("plus", "minus"), [[6, 8], [4, 4]]),
        (("minus", "plus"), [[4, 4], [6, 8]]),
    ],
)
def test_c14_outputs_come_as_asked_for_in_that_order(pair: str, outputs: tuple[str, ...], expected: Any) -> None:
    with Raw(pair) as raw:
        answer = raw.post(request(("a", "b"), (A, B), outputs)).read()
    assert [tensor.tolist() for tensor in graphpipe.decode_response(answer.body).tensors] == expected


WRONG = [
    pytest.param(("a", "a"), (A, B), (), "given twice", id="c32-twice"),
    pytest.param(("a", ""), (A, B), ("plus", "plus"), "asked for twice", id="output-twice"),
    pytest.param(("b", ""), (A, B), (), "given twice", id="name-and-position-clash"),
    pytest.param(("a", "b", "c"), (A, B), (), "a name per tensor", id="c12-more-names"),
    pytest.param((), (A, B, B), (), r"expected 2 inputs \(a, b\), got 3", id="c33-more-tensors"),
    pytest.param((), (), (), "missing input 'a'", id="c33-none"),
    pytest.param(("b",), (B,), (), "missing input 'a'", id="missing"),
    pytest.param(("a", "q"), (A, B), (), "no input 'q'", id="c31-unknown-input"),
    pytest.param((), (A, B), ("times",), "no output 'times'", id="c31-unknown-output"),
    pytest.param((), (A, B), ("",), "no output ''", id="c14-empty-output"),
    pytest.param((), (A.astype("f8"), B), (), r"'a': expected float32 \[-1\], got float64 \[2\]", id="c34-dtype"),
    pytest.param((), (np.array([b"s"], object), B), (), r"expected float32 \[-1\], got string", id="c34-string"),
    pytest.param((), (A, B[None]), (), r"'b': expected float32 \[-1\], got float32 \[1, 2\]", id="c35-rank"),
]


@pytest.mark.parametrize(("names", "arrays", "outputs", "words"), WRONG)
def test_c31_to_c35_a_request_that_does_not_fit_is_400_and_says_why(
    pair: str, names: tuple[str, ...], arrays: tuple[Array, ...], outputs: tuple[str, ...], words: str
) -> None:
    with Raw(pair) as raw:
        answer = raw.post(request(names, arrays, outputs)).read()
        assert answer.status == 400
        assert error_of(answer).code == 3
        assert re.search(words, error_of(answer).message), error_of(answer).message
        assert raw.post(request((), (A, B))).read().status == 200


def test_c35_a_wrong_size_is_refused_before_the_model_runs() -> None:
    ran: list[int] = []
    servable = FunctionServable(lambda x: ran.append(1) or x, [X], [Y])
    with server_ref.running({"m": servable}) as url, Raw(url) as raw:
        assert raw.post(request(arrays=[np.ones((3, 5), np.float32)])).read().status == 400
    assert ran == []


@pytest.mark.parametrize("config", [b"", b"{}", b"\0\xff\0", bytes(range(256)) * 10])
def test_c17_c18_config_bytes_reach_the_model(config: bytes) -> None:
    seen: list[bytes] = []

    def run(x: Array, config: bytes) -> Array:
        seen.append(config)
        return x

    with server_ref.running({"m": FunctionServable(run, [X], [Y])}) as url, Endpoint(url) as endpoint:
        endpoint(ONES, config=config)
    assert seen == [config]


def test_gradients_of_a_model_without_are_501(url: str) -> None:
    with Raw(url) as raw:
        answer = raw.post(request(outputs=["gradient:x"])).read()
    assert (answer.status, error_of(answer).code) == (501, 12)


SQUARE = FunctionServable(
    lambda x: x * x,
    [TensorSpec("x", "float32", (-1, 4), differentiable=True)],
    [TensorSpec("y", "float32", (-1, 4))],
    vjp=lambda inputs, cotangents: {"x": 2 * inputs["x"] * cotangents.get("y", 0)},
)


def test_a_vector_jacobian_product_is_a_request_like_any_other() -> None:
    x, cotangent = np.float32([[1, 2, 3, 4]]), np.float32([[1, 1, 0, 10]])
    with server_ref.running({"square": SQUARE}) as url:
        with Endpoint(url) as endpoint:
            assert endpoint.signature.features == ("vjp",)
            assert endpoint.signature.inputs[0].differentiable
            results = endpoint.infer({"x": x, "cotangent:y": cotangent}, ["y", "gradient:x"])
        np.testing.assert_array_equal(results["y"], x * x)
        np.testing.assert_array_equal(results["gradient:x"], 2 * x * cotangent)
        with Raw(url) as raw:  # an input may go without its name, what is no input may not
            answer = raw.post(request(("", "cotangent:y"), (x, cotangent), ["gradient:x"])).read()
            np.testing.assert_array_equal(only_tensor(answer), 2 * x * cotangent)
            assert raw.post(request(("x", ""), (x, cotangent), ["gradient:x"])).read().status == 400
            assert raw.post(request(("x",), (x, cotangent), ["gradient:x"])).read().status == 400
            assert raw.post(request(("x", "x"), (x, cotangent), ["gradient:x"])).read().status == 400


@pytest.mark.parametrize("value", ["soon", "-1", "1.5", "9" * 13, ""])
def test_r3_a_timeout_that_is_no_number_is_400(url: str, value: str) -> None:
    with Raw(url) as raw:
        assert raw.post(REQUEST, "/", f"X-Request-Timeout-Ms: {value}").read().status == 400


def test_r3_a_request_without_time_left_is_504_and_not_run() -> None:
    ran: list[int] = []
    servable = FunctionServable(lambda x: ran.append(1) or x, [X], [Y])
    with server_ref.running({"m": servable}) as url, Raw(url) as raw:
        answer = raw.post(REQUEST, "/", "X-Request-Timeout-Ms: 0").read()
        assert (answer.status, error_of(answer).code) == (504, 4)
    assert ran == []


# --------------------------------------------------------------------------- models that misbehave


class Returns:
    """A servable that returns what it is told, whatever its signature says."""

    signature = Signature((X,), (Y,), name="m")

    def __init__(self, what: Any) -> None:
        self.what = what

    def infer(self, inputs: Any, outputs: Any = None, *, config: bytes = b"", deadline: Any = None) -> Any:
        if isinstance(self.what, BaseException):
            raise self.what
        return self.what


class Odd(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


MISBEHAVIOUR = [
    pytest.param(ValueError("bad weights\nand more"), "ValueError: bad weights", id="raises"),
    pytest.param(KeyError("k"), "KeyError", id="raises-key-error"),
    pytest.param(MemoryError(), "MemoryError", id="out-of-memory"),
    pytest.param(RecursionError("deep"), "RecursionError", id="recursion"),
    pytest.param(StopIteration(), "StopIteration", id="stop-iteration"),
    pytest.param(SystemExit(3), "SystemExit", id="system-exit"),
    pytest.param(KeyboardInterrupt(), "KeyboardInterrupt", id="keyboard-interrupt"),
    pytest.param(asyncio.CancelledError(), "CancelledError", id="cancelled"),
    pytest.param(Odd(), "Odd", id="an-exception-that-cannot-be-shown"),
    pytest.param(None, "breaks its own signature", id="none"),
    pytest.param({}, "'y': expected float32", id="empty"),
    pytest.param({"z": ONES}, "'y': expected float32", id="other-name"),
    pytest.param({"y": ONES.astype("f8")}, r"float64 \[3, 2\]", id="dtype"),
    pytest.param({"y": ONES[0]}, r"float32 \[2\]", id="shape"),
    pytest.param({"y": None}, "'y': expected float32", id="value-none"),
    pytest.param({"y": "words"}, "'y': expected float32", id="a-word"),
    pytest.param({"y": np.ones((3, 2), complex)}, "complex128", id="complex"),
    pytest.param([ONES], "breaks its own signature", id="a-list"),
    pytest.param(7, "breaks its own signature", id="a-number"),
]


@pytest.mark.parametrize(("what", "words"), MISBEHAVIOUR)
def test_a_model_that_misbehaves_is_500_and_the_server_goes_on(what: Any, words: str) -> None:
    models: dict[str, Any] = {"bad": Returns(what), "double": doubling()}
    with server_ref.running(models) as url:
        with Endpoint(url + "bad", 5, retry=NO_RETRY) as endpoint:
            for _ in range(6):  # more often than there are threads
                with pytest.raises(InternalError, match=words) as caught:
                    endpoint(ONES)
                assert "Traceback" not in str(caught.value)
                assert str(Path(__file__).parents[1]) not in str(caught.value)
                assert "\n" not in str(caught.value)
        with Endpoint(url + "double") as endpoint:
            np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)


class Awaited(Returns):
    """The same, awaited; and it says on which thread it ran."""

    def __init__(self, what: Any) -> None:
        super().__init__(what)
        self.threads: set[str] = set()

    async def ainfer(self, inputs: Any, outputs: Any = None, *, config: bytes = b"", deadline: Any = None) -> Any:
        await asyncio.sleep(0)
        self.threads.add(threading.current_thread().name)
        return super().infer(inputs)


@pytest.mark.parametrize(("what", "words"), MISBEHAVIOUR)
def test_an_awaited_model_that_misbehaves_is_500_and_the_server_goes_on(what: Any, words: str) -> None:
    models: dict[str, Any] = {"bad": Awaited(what), "double": doubling()}
    with server_ref.running(models) as url:
        with Endpoint(url + "bad", 5, retry=NO_RETRY) as endpoint, pytest.raises(InternalError, match=words):
            endpoint(ONES)
        with Endpoint(url + "double") as endpoint:
            np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)


@pytest.mark.parametrize("error", [Overloaded("full"), ModelNotFound("gone"), InvalidRequest("not so")])
def test_an_error_of_ours_that_a_model_raises_keeps_its_class(error: RemoteOpsError) -> None:
    servable: Any = Returns(error)
    with (
        server_ref.running({"m": servable}) as url,
        Endpoint(url, retry=NO_RETRY) as endpoint,
        pytest.raises(type(error)),
    ):
        endpoint(ONES)


# --------------------------------------------------------------------------- how models run


def test_a_model_that_can_be_awaited_is_awaited_on_the_loop() -> None:
    servable: Any = Awaited({"y": ONES})
    with server_ref.running({"m": servable}) as url, Endpoint(url) as endpoint:
        endpoint(ONES)
    assert servable.threads == {"server_ref"}


def test_a_model_that_cannot_be_awaited_runs_outside_the_loops_thread() -> None:
    threads: set[str] = set()

    def run(x: Array) -> Array:
        threads.add(threading.current_thread().name)
        return x

    with server_ref.running({"m": FunctionServable(run, [X], [Y])}) as url, Endpoint(url) as endpoint:
        for _ in range(200):
            endpoint(ONES)
    assert "server_ref" not in threads


def test_a_slow_model_does_not_hold_up_another() -> None:
    release = threading.Event()

    def slow(x: Array) -> Array:
        release.wait(WAIT_S)
        return x

    models = {"slow": FunctionServable(slow, [X], [Y]), "double": doubling()}
    with server_ref.running(models) as url, Endpoint(url + "slow") as slow_one, Endpoint(url + "double") as quick:
        futures = [slow_one.submit({"x": ONES}) for _ in range(50)]
        np.testing.assert_array_equal(quick(ONES), 2 * ONES)
        assert ask(url, "GET", "/control/is_ready").status == 200
        assert not any(future.done() for future in futures)
        release.set()
        for future in futures:
            future.result(WAIT_S)


class Limited(FunctionServable):
    """A servable that says how many calls it bears at a time."""

    concurrency = 3


def test_never_more_calls_run_at_a_time_than_the_model_bears() -> None:
    lock, running, most = threading.Lock(), 0, 0

    def run(x: Array) -> Array:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.002)
        with lock:
            running -= 1
        return x

    with server_ref.running({"m": Limited(run, [X], [Y])}) as url, Endpoint(url) as endpoint:
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(lambda _: endpoint(ONES), range(160)))
    assert most == 3


def test_no_request_is_lost_between_lanes_however_threads_are_switched() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with server_ref.running({"m": Limited(lambda x: x, [X], [Y])}) as url, Endpoint(url, 5, retry=NO_RETRY) as ep:

            def calls(thread: int) -> int:
                return sum(bool((ep(ONES * thread) == thread).all()) for _ in range(250))

            with ThreadPoolExecutor(6) as threads:
                assert list(threads.map(calls, range(6))) == [250] * 6
    finally:
        sys.setswitchinterval(interval)


class OneAtATime(FunctionServable):
    concurrency = 1


@contextlib.contextmanager
def held(**options: Any) -> Iterator[tuple[str, threading.Event, threading.Event, list[float]]]:
    """A server whose model runs one call at a time and waits to be released; what ran is noted."""
    running, release = threading.Event(), threading.Event()
    ran: list[float] = []

    def run(x: Array) -> Array:
        ran.append(float(x[0, 0]))
        running.set()
        release.wait(WAIT_S)
        return x

    with server_ref.running({"m": OneAtATime(run, [X], [Y])}, **options) as url:
        try:
            yield url, running, release, ran
        finally:
            release.set()


def client_count(url: str) -> int:
    return int(ask(url, "GET", "/control/client_count").body)


@pytest.mark.parametrize("way", ["close", "reset", "half-close"])
def test_r4_the_model_is_not_run_for_clients_that_vanished_from_the_queue(way: str) -> None:
    with held() as (url, running, release, ran), Raw(url) as first:
        first.post()
        assert running.wait(WAIT_S)
        gone = [Raw(url).post(request(arrays=[ONES * 2])) for _ in range(20)]
        last = Raw(url).post(request(arrays=[ONES * 3]))
        assert until(lambda: client_count(url) == 23)
        for raw in gone:
            if way == "reset":
                raw.reset()
            elif way == "close":
                raw.close()
            else:
                raw.sock.shutdown(socket.SHUT_WR)
        assert until(lambda: client_count(url) == 3)
        release.set()
        assert only_tensor(first.read())[0, 0] == 1
        assert only_tensor(last.read())[0, 0] == 3
        for raw in [last, *gone]:
            raw.close()
    assert ran == [1.0, 3.0]


def test_r2_a_full_queue_is_overloaded_at_once_with_retry_after() -> None:
    with held() as (url, running, release, ran):
        raws = [Raw(url).post()]
        assert running.wait(WAIT_S)
        raws += [Raw(url).post() for _ in range(1024)]
        assert until(lambda: client_count(url) == 1026)
        with Raw(url) as refused:
            since = time.monotonic()
            answer = refused.post().read()
            assert time.monotonic() - since < 0.5
            assert (answer.status, error_of(answer).code) == (429, 8)
            assert int(answer.headers["retry-after"]) >= 1
        with Endpoint(url, retry=NO_RETRY) as endpoint, pytest.raises(Overloaded, match="1024"):
            endpoint(ONES)
        release.set()
        for raw in raws:
            assert raw.read().status == 200
            raw.close()
    assert len(ran) == 1025


def test_a_client_that_vanishes_mid_body_leaves_the_server_serving(url: str) -> None:
    before = client_count(url)
    for cut in (10, 60, len(post()) - 1):
        Raw(url).send(post()[:cut]).close()
        Raw(url).send(post()[:cut]).reset()
    assert until(lambda: client_count(url) == before)
    still_serves(url)


def test_a_client_that_vanishes_while_its_answer_is_sent_leaves_the_server_serving() -> None:
    spec = [TensorSpec("n", "int64", ())]
    servable = FunctionServable(lambda n: np.zeros(int(n)), spec, [TensorSpec("y", "float64", (-1,))])
    with server_ref.running({"m": servable}) as url:
        for _ in range(5):
            with Raw(url) as raw:
                raw.post(request(["n"], [np.int64(5_000_000)]))
                raw.file.read(10)
                raw.reset()
        with Raw(url) as raw:
            assert only_tensor(raw.post(request(["n"], [np.int64(3)])).read()).tolist() == [0, 0, 0]
        assert until(lambda: client_count(url) == 1)


# --------------------------------------------------------------------------- an endpoint behind the server


def test_an_endpoint_can_be_served_and_errors_pass_through_the_chain(several: str) -> None:
    models: dict[str, Servable] = {"far": Endpoint(several + "double"), "none": doubling()}
    with server_ref.running(models) as url, Endpoint(url + "far") as endpoint:
        assert endpoint.signature.inputs == (X,)
        np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)
        with ThreadPoolExecutor(8) as threads:
            for index, answer in enumerate(threads.map(lambda index: endpoint(ONES * index), range(100))):
                np.testing.assert_array_equal(answer, 2 * ONES * index)


def upstream(answer: Callable[[Conversation, Message], None]) -> Any:
    return peer(serving(Signature((X,), (Y,), name="far"), answer))


def test_what_goes_wrong_behind_a_proxy_is_not_called_the_callers_fault() -> None:
    """Garbage from the model's own server is no invalid request."""

    def junk(conversation: Conversation, _: Message) -> None:
        conversation.answer(b"\xff" * 40)

    with upstream(junk) as there, server_ref.running({"m": Endpoint(there.url, retry=NO_RETRY)}) as url:
        with Endpoint(url, retry=NO_RETRY) as endpoint, pytest.raises(InternalError):
            endpoint(ONES)

    def garbage(conversation: Conversation, _: Message) -> None:
        conversation.send(b"this is not HTTP\r\n\r\n")

    with upstream(garbage) as there, server_ref.running({"m": Endpoint(there.url, retry=NO_RETRY)}) as url:
        with Endpoint(url, retry=NO_RETRY) as endpoint, pytest.raises(InternalError):
            endpoint(ONES)


def test_a_proxy_that_is_not_set_up_is_not_called_the_callers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROXY_KEY", "here")
    with upstream(lambda conversation, _: conversation.answer(b"")) as there:
        far = Endpoint(there.url, headers={"X-Key": "${PROXY_KEY}"}, retry=NO_RETRY)
        with server_ref.running({"m": far}) as url, Endpoint(url, retry=NO_RETRY) as endpoint:
            assert endpoint.signature.name == "far"
            monkeypatch.delenv("PROXY_KEY")
            with pytest.raises(InternalError, match="PROXY_KEY"):
                endpoint(ONES)


def test_the_deadline_shrinks_along_a_chain() -> None:
    left: list[int] = []

    def answer(conversation: Conversation, request: Message) -> None:
        left.append(int(request.headers["x-request-timeout-ms"]))
        conversation.answer(b"".join(graphpipe.encode_response([ONES])))

    with upstream(answer) as there, server_ref.running({"m": Endpoint(there.url, 30)}) as url:
        with Endpoint(url) as endpoint:
            endpoint.infer({"x": ONES}, deadline=Deadline.after(2))
    assert 1000 < left[0] <= 2000


def test_a_caller_that_hangs_up_cancels_the_call_behind_the_proxy() -> None:
    arrived, gone = threading.Event(), threading.Event()

    def answer(conversation: Conversation, _: Message) -> None:
        arrived.set()
        assert conversation.read() is None
        gone.set()

    with upstream(answer) as there, server_ref.running({"m": Endpoint(there.url)}) as url:
        raw = Raw(url).post()
        assert arrived.wait(WAIT_S)
        raw.close()
        assert gone.wait(WAIT_S)


# --------------------------------------------------------------------------- slow peers


def test_r12_a_header_that_does_not_arrive_in_time_is_408_or_closed() -> None:
    with server_ref.running({"m": doubling()}, timeouts=QUICKLY) as url, Raw(url) as raw:
        raw.send(b"POST / HTT")
        since = time.monotonic()
        answer = raw.file.read()
        assert answer == b"" or b" 408 " in answer[:20]
        assert time.monotonic() - since < 3.5


def test_r12_a_connection_that_says_nothing_is_closed() -> None:
    with server_ref.running({"m": doubling()}, timeouts=QUICKLY) as url, Raw(url) as raw:
        assert raw.ended()


def test_r12_a_body_that_does_not_arrive_in_time_is_408() -> None:
    with server_ref.running({"m": doubling()}, timeouts=QUICKLY) as url, Raw(url) as raw:
        raw.send(post()[:-1])
        assert raw.read().status == 408


def test_r12_an_idle_connection_is_closed_and_our_client_does_not_notice() -> None:
    with server_ref.running({"m": doubling()}, timeouts=QUICKLY) as url, Endpoint(url, retry=NO_RETRY) as endpoint:
        endpoint(ONES)
        assert until(lambda: client_count(url) == 1)
        np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)


def test_r12_a_client_that_does_not_read_its_answer_is_closed() -> None:
    spec = [TensorSpec("n", "int64", ())]
    servable = FunctionServable(lambda n: np.zeros(int(n)), spec, [TensorSpec("y", "float64", (-1,))])
    with server_ref.running({"m": servable}, timeouts=QUICKLY) as url, Raw(url) as raw:
        raw.post(request(["n"], [np.int64(20_000_000)]))
        assert until(lambda: client_count(url) == 2)
        assert until(lambda: client_count(url) == 1)


def test_a_slow_model_is_no_slow_peer() -> None:
    def slow(x: Array) -> Array:
        threading.Event().wait(1.2)
        return x

    with server_ref.running({"m": FunctionServable(slow, [X], [Y])}, timeouts=QUICKLY) as url, Raw(url) as raw:
        assert raw.post().read().status == 200


def test_a_large_body_at_a_fair_rate_is_no_slow_peer() -> None:
    timeouts = Timeouts(head_s=0.3, idle_s=0.3, body_s=0.3, min_rate=1000)
    with server_ref.running({"m": doubling()}, timeouts=timeouts) as url, Raw(url) as raw:
        data = post(request(arrays=[np.ones((2000, 2), np.float32)]))
        for start in range(0, len(data), 2000):
            raw.send(data[start : start + 2000])
            threading.Event().wait(0.12)
        assert raw.read().status == 200


def test_r12_200_slow_connections_do_not_slow_a_real_client() -> None:
    timeouts = Timeouts(head_s=1.0, idle_s=1.0, body_s=1.0)
    with server_ref.running({"m": doubling()}, timeouts=timeouts) as url, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(Raw(url)) for _ in range(200)]
        data = post()
        with Endpoint(url) as endpoint:
            times = []
            for byte in range(10):
                for index, raw in enumerate(slow):
                    with contextlib.suppress(OSError):
                        raw.send(
                            data[byte : byte + 1] if index % 2 else (data[:80] if not byte else data[80 + byte :][:1])
                        )
                since = time.monotonic()
                np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)
                times.append(time.monotonic() - since)
            assert max(times[1:]) < 0.2
            assert until(lambda: client_count(url) <= 2)
            np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)


def test_an_hour_of_keep_alive_is_not_needed_to_see_that_a_kept_client_is_kept(url: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=WAIT_S)
    for _ in range(20):
        connection.request("POST", "/", REQUEST)
        np.testing.assert_array_equal(graphpipe.decode_response(connection.getresponse().read()).tensors[0], 2 * ONES)
    connection.close()


def test_the_first_request_of_a_client_without_answer_is_a_named_error() -> None:
    with held() as (url, running, release, _), Endpoint(url, retry=NO_RETRY) as endpoint:
        future = endpoint.submit({"x": ONES})
        assert running.wait(WAIT_S)
        with pytest.raises((DeadlineExceeded, ConnectionLost)):
            endpoint.infer({"x": ONES}, deadline=Deadline.after(0.1))
        release.set()
        future.result(WAIT_S)


# --------------------------------------------------------------------------- quick models, on the loop itself


class Quick(FunctionServable):
    """A model that says that it never waits; a server may run it on its loop."""

    never_waits = True


def test_a_quick_model_that_never_waits_runs_on_the_loop_once_it_is_known_as_quick() -> None:
    threads: list[str] = []

    def run(x: Array) -> Array:
        threads.append(threading.current_thread().name)
        return x

    with server_ref.running({"m": Quick(run, [X], [Y])}) as url, Endpoint(url) as endpoint:
        for _ in range(200):
            endpoint(ONES)
    assert threads[0] != "server_ref"
    assert "server_ref" in threads


def test_requests_that_are_not_run_do_not_make_a_slow_model_look_quick() -> None:
    threads: list[str] = []

    def run(x: Array) -> Array:
        threads.append(threading.current_thread().name)
        return x

    with server_ref.running({"m": Quick(run, [X], [Y])}) as url:
        raw = Raw(url)
        for _ in range(100):
            assert raw.post(REQUEST, "/", "X-Request-Timeout-Ms: 0").read().status == 504
        assert threads == []
        assert raw.post().read().status == 200
        raw.close()
    assert threads != ["server_ref"]


def test_c42_a_quick_model_is_not_run_for_requests_after_one_that_says_close() -> None:
    runs = 0

    def run(x: Array) -> Array:
        nonlocal runs
        runs += 1
        return x

    with server_ref.running({"m": Quick(run, [X], [Y])}) as url:
        warm = Raw(url)
        for _ in range(100):
            warm.post().read()
        warm.close()
        before = runs
        raw = Raw(url).send(post(REQUEST, "/", "Connection: close"), *[post(REQUEST, "/")] * 3)
        assert raw.read().status == 200
        assert raw.ended()
        raw.close()
    assert runs == before + 1


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_model_that_wants_to_exit_costs_neither_its_lane_nor_its_caller(error: type[BaseException]) -> None:
    def run(x: Array) -> Array:
        if x[0, 0] > 1:
            raise error
        return x

    with server_ref.running({"m": FunctionServable(run, [X], [Y])}) as url, Endpoint(url, 5) as endpoint:
        for _ in range(20):
            with pytest.raises(InternalError, match=error.__name__):
                endpoint(2 * ONES)
        assert endpoint(ONES).tolist() == ONES.tolist()


# --------------------------------------------------------------------------- without uvloop


def zeros(count: int) -> bytes:
    return post(request(["n"], [np.int64(count)]))


@pytest.fixture
def plain() -> Iterator[str]:
    """A server on a loop of the standard library, whose model gives as many zeros as it is asked for."""
    spec = [TensorSpec("n", "int64", ())]
    model = FunctionServable(lambda n: np.zeros(int(n)), spec, [TensorSpec("y", "float64", (-1,))])
    with front_on_a_loop(model, timeouts=Timeouts(write_s=0.5)) as (url, _):
        yield url


def test_a_plain_loop_answers_pipelined_requests_in_order_whatever_their_size(plain: str) -> None:
    counts = [3, 2_000_000, 0, 1_000_000, 5, 300_000] * 3
    with Raw(plain) as raw:
        raw.send(*(zeros(count) for count in counts))
        assert [only_tensor(raw.read()).shape for _ in counts] == [(count,) for count in counts]


def test_a_plain_loop_serves_many_clients_at_once(plain: str) -> None:
    with Endpoint(plain) as endpoint, ThreadPoolExecutor(8) as threads:
        counts = [10 ** (index % 7) for index in range(80)]
        assert [y.size for y in threads.map(lambda count: endpoint(np.int64(count)), counts)] == counts


def test_a_plain_loop_survives_clients_that_vanish_or_do_not_read(plain: str, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(5):
        with Raw(plain) as raw:
            raw.send(zeros(2_000_000))
            raw.file.read(10)
            raw.reset()
    with Raw(plain) as raw:
        raw.send(zeros(20_000_000))
        assert until(lambda: client_count(plain) == 2)
        assert until(lambda: client_count(plain) == 1)
    with Raw(plain) as raw:
        assert only_tensor(raw.send(zeros(3)).read()).tolist() == [0, 0, 0]
    assert not [record for record in caplog.records if record.name == "asyncio"]


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_request_held_is_let_go_with_its_answer_and_waits_for_no_garbage_collector(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("server_ref"), "disabled", True)  # pytest keeps its records
    seen: list[weakref.ref[Array]] = []

    def run(x: Array) -> Array:
        seen.append(weakref.ref(x))
        if fails:
            raise ValueError("no")
        return 2 * x

    gc.disable()
    try:
        with server_ref.running({"m": FunctionServable(run, [X], [Y])}) as url, Raw(url) as raw:
            for _ in range(3):
                assert raw.post().read().status == (500 if fails else 200)
            assert until(lambda: all(ref() is None for ref in seen))
            assert len(seen) == 3
    finally:
        gc.enable()


def test_clients_that_vanish_give_their_places_in_the_queue_to_others() -> None:
    with held() as (url, running, release, _):
        first = Raw(url).post()
        assert running.wait(WAIT_S)
        gone = [Raw(url).post() for _ in range(1024)]
        assert until(lambda: client_count(url) == 1026)
        for raw in gone:
            raw.close()
        assert until(lambda: client_count(url) == 2)
        living = Raw(url).post()
        release.set()
        assert living.read().status == 200
        for raw in (first, living):
            raw.close()


def test_an_upstream_that_is_down_is_a_model_that_is_unavailable() -> None:
    upstream = Endpoint("http://127.0.0.1:1/", retry=NO_RETRY)
    upstream._signature = Signature((X,), (Y,))
    with server_ref.running({"m": upstream}) as url, Endpoint(url, retry=NO_RETRY) as endpoint:
        with pytest.raises(ModelUnavailable, match="out of reach"):
            endpoint(ONES)
