"""`Endpoint`: calls, checks, retries, replicas, secrets; against our server, and peers that answer as told."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from rawpeer import WAIT_S, Conversation, Message, echoing, peer, serving, unreachable, until

import server_ref
from remote_ops import Endpoint, FunctionServable, Retry, Signature, TensorSpec, graphpipe
from remote_ops.deadline import Deadline, deadline
from remote_ops.errors import (
    ANSWERS,
    BadStatus,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    DecodeError,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    ModelUnavailable,
    NotDifferentiable,
    Overloaded,
    RemoteError,
    RemoteOpsError,
    SignatureError,
    SpecError,
)
from remote_ops.transport import Call, HttpTransport, Reply
from remote_ops.url import TLS

Array = npt.NDArray[Any]
X = TensorSpec("x", "float32", (-1, 2))
Y = TensorSpec("y", "float32", (-1, 2))
N = TensorSpec("n", "int64", ())
SIGNATURE = Signature((X,), (Y,), name="m")
ONES = np.ones((3, 2), np.float32)
NO_RETRY = Retry(attempts=1)
QUICK = Retry(base_s=0.001)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server with `double` (one output), `two` (two of each), `slow` (waits for `config` milliseconds)."""

    def two(a: Array, b: Array) -> tuple[Array, Array]:
        return a + b, a * b

    def slow(x: Array, config: bytes) -> Array:
        threading.Event().wait(int(config or b"0") / 1000)
        return x

    pair = [TensorSpec("a", "float32", (-1,)), TensorSpec("b", "float32", (-1,))]
    both = [TensorSpec("sum", "float32", (-1,)), TensorSpec("product", "float32", (-1,))]
    models = {
        "double": FunctionServable(lambda x: 2 * x, [X], [Y]),
        "two": FunctionServable(two, pair, both),
        "slow": FunctionServable(slow, [X], [Y]),
    }  # fmt: skip
    with server_ref.running(models) as base:
        yield base


@contextlib.contextmanager
def served(fn: Callable[..., Any], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Iterator[Endpoint]:
    with server_ref.running({"m": FunctionServable(fn, inputs, outputs)}) as base, Endpoint(base, 10) as endpoint:
        yield endpoint


@contextlib.contextmanager
def answering(
    *answers: Callable[[Conversation], None], signature: Signature = SIGNATURE, **options: Any
) -> Iterator[tuple[Endpoint, list[Message]]]:
    """An endpoint of a peer that gives these answers in turn, the last one for ever; and the calls it saw."""
    seen: list[Message] = []

    def answer(conversation: Conversation, request: Message) -> None:
        seen.append(request)
        answers[min(len(seen), len(answers)) - 1](conversation)

    with peer(serving(signature, answer)) as there, Endpoint(there.url, **{"timeout_s": 10, **options}) as endpoint:
        yield endpoint, seen


def status(line: str, body: bytes = b"", *headers: str) -> Callable[[Conversation], None]:
    return lambda conversation: conversation.answer(body, line, *headers)


def results(*arrays: Array) -> Callable[[Conversation], None]:
    return status("200 OK", b"".join(graphpipe.encode_response(arrays)))


GOOD = results(2 * ONES)
TEXT = "Content-Type: text/plain; charset=utf-8"
HTML = "Content-Type: text/html"


WAYS: dict[str, Callable[..., dict[str, Array]]] = {
    "infer": lambda endpoint, **options: endpoint.infer({"x": ONES}, **options),
    "ainfer": lambda endpoint, **options: asyncio.run(endpoint.ainfer({"x": ONES}, **options)),
    "submit": lambda endpoint, **options: endpoint.submit({"x": ONES}, **options).result(WAIT_S),
}


# --------------------------------------------------------------------------- calling


def test_calling_infer_ainfer_and_submit_agree(url: str) -> None:
    with Endpoint(url + "double") as endpoint:
        expected = 2 * ONES
        np.testing.assert_array_equal(endpoint(ONES), expected)
        for answer in (
            endpoint.infer({"x": ONES}),
            endpoint.infer({"x": ONES}, ["y"]),
            asyncio.run(endpoint.ainfer({"x": ONES})),
            endpoint.submit({"x": ONES}).result(10),
        ):
            assert list(answer) == ["y"]
            np.testing.assert_array_equal(answer["y"], expected)


def test_several_outputs_come_as_a_tuple_in_order_and_by_name(url: str) -> None:
    a, b = np.float32([1, 2]), np.float32([3, 4])
    with Endpoint(url + "two") as endpoint:
        total, product = endpoint(a, b)
        np.testing.assert_array_equal(total, [4, 6])
        np.testing.assert_array_equal(product, [3, 8])
        assert list(endpoint.infer({"a": a, "b": b}, ["product", "sum"])) == ["product", "sum"]
        assert list(endpoint.infer({"b": b, "a": a}, ["product"])) == ["product"]


def test_python_lists_and_numbers_take_the_dtype_of_the_signature(url: str) -> None:
    with Endpoint(url + "double") as endpoint:
        answer = endpoint([[1, 2], [3, 4.5]])
    assert answer.dtype == np.float32
    np.testing.assert_array_equal(answer, [[2, 4], [6, 9]])


def test_many_submitted_calls_are_answered_each_with_its_own(url: str) -> None:
    with Endpoint(url + "double") as endpoint:
        futures = [endpoint.submit({"x": ONES * index}) for index in range(200)]
        for index, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(10)["y"], 2 * ONES * index)


def test_a_submitted_call_that_is_cancelled_hangs_up() -> None:
    arrived, gone = threading.Event(), threading.Event()

    def answer(conversation: Conversation, request: Message) -> None:
        arrived.set()
        assert conversation.read() is None
        gone.set()

    with peer(serving(SIGNATURE, answer)) as there, Endpoint(there.url) as endpoint:
        future = endpoint.submit({"x": ONES})
        assert arrived.wait(WAIT_S)
        assert future.cancel()
        assert gone.wait(WAIT_S)


# --------------------------------------------------------------------------- checked before, checked after

WRONG_CALLS: list[Any] = [
    pytest.param(lambda ep: ep.infer({"X": ONES}), "no input 'X': expected x", id="unknown-input"),
    pytest.param(lambda ep: ep.infer({}), "missing input 'x'", id="missing-input"),
    pytest.param(lambda ep: ep.infer({"x": ONES, "z": ONES}), "no input 'z'", id="surplus-input"),
    pytest.param(lambda ep: ep(), r"expected 1 inputs \(x\), got 0", id="too-few"),
    pytest.param(lambda ep: ep(ONES, ONES), r"expected 1 inputs \(x\), got 2", id="too-many"),
    pytest.param(lambda ep: ep(ONES.astype("f8")), r"float32 \[-1, 2\], got float64 \[3, 2\]", id="dtype"),
    pytest.param(lambda ep: ep(ONES.T), r"float32 \[-1, 2\], got float32 \[2, 3\]", id="shape"),
    pytest.param(lambda ep: ep("words"), "expected float32", id="a-word"),
    pytest.param(lambda ep: ep(object()), "expected float32", id="an-object"),
    pytest.param(lambda ep: ep.infer({"x": ONES}, ["Y"]), "no output 'Y': expected one of y", id="unknown-output"),
    pytest.param(lambda ep: ep.infer({"x": ONES}, ["y", "y"]), "asked for twice", id="output-twice"),
    pytest.param(lambda ep: asyncio.run(ep.ainfer({"q": ONES})), "no input 'q'", id="ainfer"),
    pytest.param(lambda ep: ep.submit({"q": ONES}).result(10), "no input 'q'", id="submit"),
]


@pytest.mark.parametrize(("call", "words"), WRONG_CALLS)
def test_a_call_that_does_not_fit_is_refused_before_any_byte_is_sent(
    call: Callable[[Endpoint], Any], words: str
) -> None:
    with answering(GOOD) as (endpoint, seen):
        assert endpoint.signature == SIGNATURE
        with pytest.raises(SignatureError, match=words) as caught:
            call(endpoint)
        assert endpoint.url in str(caught.value)
        assert seen == []
        np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)


@pytest.mark.parametrize("names", [{"x": ONES, "cotangent:y": ONES}, {"x": ONES}])
def test_a_gradient_of_a_model_without_is_not_differentiable_and_nothing_is_sent(names: dict[str, Array]) -> None:
    with answering(GOOD) as (endpoint, seen):
        with pytest.raises(NotDifferentiable):
            endpoint.infer(names, ["gradient:x"])
        assert seen == []


BREAKS = [
    pytest.param(results(), "expected 1 outputs, got 0", id="too-few"),
    pytest.param(results(ONES, ONES), "expected 1 outputs, got 2", id="too-many"),
    pytest.param(results(ONES.astype("f8")), r"'y': expected float32 \[-1, 2\], got float64 \[3, 2\]", id="dtype"),
    pytest.param(results(ONES[0]), r"'y': expected float32 \[-1, 2\], got float32 \[2\]", id="rank"),
    pytest.param(results(np.ones((3, 5), "f4")), r"'y': expected float32 \[-1, 2\], got float32 \[3, 5\]", id="size"),
    pytest.param(results(np.array([b"x"], object)), r"'y': expected float32 .*got string \[1\]", id="string"),
]


@pytest.mark.parametrize(("answer", "words"), BREAKS)
@pytest.mark.parametrize("way", ["infer", "ainfer"])
def test_an_answer_that_breaks_the_signature_is_an_internal_error_that_names_both(
    answer: Callable[[Conversation], None], words: str, way: str
) -> None:
    with answering(answer) as (endpoint, seen):
        with pytest.raises(InternalError, match=words) as caught:
            asyncio.run(endpoint.ainfer({"x": ONES})) if way == "ainfer" else endpoint(ONES)
        assert caught.value.endpoint == endpoint.url
        assert len(seen) == 1


def test_a_bool_that_is_neither_0_nor_1_is_an_internal_error() -> None:
    signature = Signature((X,), (TensorSpec("y", "bool", (-1,)),))
    with (
        answering(results(np.uint8([0, 1, 2])), signature=signature) as (endpoint, _),
        pytest.raises(InternalError, match="each 0 or 1"),
    ):
        endpoint(ONES)


# --------------------------------------------------------------------------- the signature


def test_the_signature_is_fetched_lazily_and_once_by_many_threads() -> None:
    asked = 0

    def script(conversation: Conversation) -> None:
        nonlocal asked
        while (request := conversation.read()) is not None:
            assert request.body == graphpipe.METADATA_REQUEST
            asked += 1
            conversation.answer(graphpipe.encode_metadata(SIGNATURE))

    with peer(script) as there, Endpoint(there.url) as endpoint:
        assert there.connections == 0
        gate = threading.Barrier(16)

        def read(_: int) -> Signature:
            gate.wait(WAIT_S)
            return endpoint.signature

        with ThreadPoolExecutor(16) as threads:
            assert all(signature == SIGNATURE for signature in threads.map(read, range(16)))
        assert asked == 1


def test_a_signature_that_could_not_be_fetched_is_asked_for_again() -> None:
    def script(conversation: Conversation) -> None:
        while conversation.read() is not None:
            if conversation.number == 1:
                return
            conversation.answer(graphpipe.encode_metadata(SIGNATURE))

    with peer(script) as there, Endpoint(there.url, retry=NO_RETRY) as endpoint:
        with pytest.raises(ConnectionLost):
            _ = endpoint.signature
        assert endpoint.signature == SIGNATURE


def test_a_thread_that_waits_for_anothers_fetch_keeps_its_own_deadline() -> None:
    asked, over = threading.Event(), threading.Event()

    def script(conversation: Conversation) -> None:
        conversation.read()
        asked.set()
        over.wait(WAIT_S)

    with peer(script) as there, Endpoint(there.url, retry=NO_RETRY) as endpoint:

        def fetch(within_s: float) -> None:
            with contextlib.suppress(RemoteOpsError):
                endpoint.infer({"x": ONES}, deadline=Deadline.after(within_s))

        patient = threading.Thread(target=fetch, args=(5.0,))
        patient.start()
        try:
            assert asked.wait(WAIT_S)
            since = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                endpoint.infer({"x": ONES}, deadline=Deadline.after(0.2))
            assert time.monotonic() - since < 0.5
        finally:
            over.set()
            patient.join(WAIT_S)


def test_the_signature_is_fetched_within_the_deadline_of_the_call() -> None:
    with unreachable() as url:
        since = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="connecting"):
            Endpoint(url).infer({"x": ONES}, deadline=Deadline.after(0.2))
        assert time.monotonic() - since < 0.5


# --------------------------------------------------------------------------- errors that come back


@pytest.mark.parametrize("row", ANSWERS, ids=lambda row: row.error.__name__)
@pytest.mark.parametrize("way", ["infer", "ainfer", "submit"])
def test_c16_every_error_of_the_table_comes_back_as_its_class(row: Any, way: str) -> None:
    answer = status(f"{row.status} X", graphpipe.encode_error(row.code, "because of this"))
    with answering(answer, retry=NO_RETRY) as (endpoint, seen):
        with pytest.raises(row.error) as caught:
            WAYS[way](endpoint)
        assert type(caught.value) is row.error
        assert "because of this" in str(caught.value)
        assert endpoint.url in str(caught.value)
        if isinstance(caught.value, RemoteError):
            assert (caught.value.code, caught.value.endpoint) == (row.code, endpoint.url)
            assert caught.value.message == "because of this"
        assert len(seen) == 1


def test_an_error_inside_a_200_is_still_an_error() -> None:
    answer = status("200 OK", graphpipe.encode_error(3, "old server"))
    with answering(answer) as (endpoint, _), pytest.raises(InvalidRequest, match="old server"):
        endpoint(ONES)


def test_an_unknown_code_is_a_plain_remote_error_with_its_number() -> None:
    with answering(status("418 X", graphpipe.encode_error(77, "odd"))) as (endpoint, _):
        with pytest.raises(RemoteError, match="odd") as caught:
            endpoint(ONES)
        assert type(caught.value) is RemoteError
        assert caught.value.code == 77


OTHERS: list[Any] = [
    pytest.param(
        status("400 Bad Request", b"Could not find input 'x'\n", TEXT), InvalidRequest, "Could not find", id="go-400"
    ),
    pytest.param(status("404 Not Found", b"404 page not found\n", TEXT), ModelNotFound, "page not found", id="go-404"),
    pytest.param(status("500 X", b"Internal Server Error\n", TEXT), InternalError, "Internal Server", id="go-500"),
    pytest.param(status("503 X", b"<h1>busy</h1>", HTML), ModelUnavailable, "busy", id="html-503"),
    pytest.param(status("502 X", b"<h1>bad gateway</h1>", HTML), ModelUnavailable, "bad gateway", id="html-502"),
    pytest.param(status("429 X", b"<h1>slow down</h1>", HTML), Overloaded, "slow down", id="html-429"),
    pytest.param(status("504 X", b"<h1>late</h1>", HTML), DeadlineExceeded, "late", id="html-504"),
    pytest.param(status("404 X", b"<h1>nothing here</h1>", HTML), BadStatus, "404: nothing here", id="html-404"),
    pytest.param(status("302 Moved", b"", "Location: /login"), BadStatus, "moved to '/login'", id="3xx"),
    pytest.param(status("401 Unauthorized", b"{}", "Content-Type: application/json"), BadStatus, "401", id="401"),
    pytest.param(status("413 X", b""), BadStatus, "413", id="413"),
    pytest.param(status("200 OK", b"<html>log in</html>", HTML), BadStatus, "log in.*expected", id="html-200"),
    pytest.param(status("200 OK", b"\xff" * 40), DecodeError, "no GraphPipe message", id="garbage-200"),
    pytest.param(status("200 OK", b""), BadStatus, "empty body.*expected", id="empty-200"),
    pytest.param(status("204 No Content"), BadStatus, "204 with an empty body", id="204"),
    pytest.param(status("500 X", b"\xff\x00\x01binary"), BadStatus, "500", id="binary-500"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "error", "words"), OTHERS)
def test_what_other_peers_answer_becomes_an_error_with_its_words_and_the_url(
    answer: Callable[[Conversation], None], error: type[RemoteOpsError], words: str
) -> None:
    with answering(answer, retry=NO_RETRY) as (endpoint, _):
        with pytest.raises(error, match=words) as caught:
            endpoint(ONES)
        assert type(caught.value) is error
        assert endpoint.url in str(caught.value)
        if isinstance(caught.value, BadStatus):
            assert str(caught.value.status) in str(caught.value)


def test_an_error_of_ours_is_seen_through_the_whole_stack() -> None:
    def fails(x: Array) -> Array:
        raise ValueError("the weights are gone")

    with served(fails, [X], [Y]) as endpoint, pytest.raises(InternalError, match="the weights are gone") as caught:
        endpoint(ONES)
    assert (caught.value.code, caught.value.endpoint) == (13, endpoint.url)


# --------------------------------------------------------------------------- retries

RETRIES: list[Any] = [
    pytest.param([status("503 X"), status("503 X"), GOOD], None, 3, id="503-503-200"),
    pytest.param([status("429 X"), GOOD], None, 2, id="429-200"),
    pytest.param([status("502 X"), GOOD], None, 2, id="502-200"),
    pytest.param([status("503 X")], ModelUnavailable, 3, id="503-for-ever"),
    pytest.param([status("400 X", b"no", TEXT)], InvalidRequest, 1, id="400"),
    pytest.param([status("404 X", b"no", TEXT)], ModelNotFound, 1, id="404"),
    pytest.param([status("500 X", b"no", TEXT)], InternalError, 1, id="500"),
    pytest.param([status("504 X")], DeadlineExceeded, 1, id="504"),
    pytest.param([status("200 OK", b"junk")], DecodeError, 1, id="junk"),
    pytest.param([lambda conversation: conversation.hang_up(), GOOD], None, 2, id="hangs-up-200"),
    pytest.param([status("418 X")], BadStatus, 1, id="418"),
]


@pytest.mark.parametrize(("answers", "error", "attempts"), RETRIES)
@pytest.mark.parametrize("way", ["infer", "ainfer"])
def test_r15_only_passing_failures_are_tried_again_and_so_often(
    answers: list[Any], error: type[RemoteOpsError] | None, attempts: int, way: str
) -> None:
    with answering(*answers, retry=QUICK) as (endpoint, seen):
        _ = endpoint.signature
        endpoint.close()  # a kept connection that ends is replaced without counting

        def call() -> Any:
            return asyncio.run(endpoint.ainfer({"x": ONES}))["y"] if way == "ainfer" else endpoint(ONES)

        if error is None:
            np.testing.assert_array_equal(call(), 2 * ONES)
        else:
            with pytest.raises(error):
                call()
        assert len(seen) == attempts


def test_r15_a_refused_connection_is_tried_as_often_as_asked() -> None:
    class Counting(HttpTransport):
        calls = 0

        def exchange(self, call: Call, deadline: Deadline) -> Reply:
            Counting.calls += 1
            return super().exchange(call, deadline)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    with pytest.raises(ConnectError, match=url):
        Endpoint(url, retry=Retry(4, 0.001), transport=Counting())(ONES)
    assert Counting.calls == 4


def test_retries_end_with_the_deadline_and_say_the_attempt() -> None:
    with answering(status("503 X"), retry=Retry(1000, base_s=0.02, max_s=0.02)) as (endpoint, seen):
        _ = endpoint.signature
        since = time.monotonic()
        with pytest.raises((ModelUnavailable, DeadlineExceeded)):
            endpoint.infer({"x": ONES}, deadline=Deadline.after(0.3))
        assert time.monotonic() - since < 0.5
        assert 3 < len(seen) < 1000


def test_a_call_out_of_time_says_url_time_attempts_and_phase() -> None:
    over = threading.Event()
    with answering(lambda _: over.wait(WAIT_S) and None) as (endpoint, seen):
        _ = endpoint.signature
        try:
            with pytest.raises(
                DeadlineExceeded,
                match=rf"no answer from {endpoint.url} in 0\.2\d\d s \(attempt 1 of 3, 0\.2\d\d s waiting for",
            ):
                endpoint.infer({"x": ONES}, deadline=Deadline.after(0.2))
        finally:
            over.set()
        assert len(seen) == 1


@pytest.mark.parametrize("way", ["infer", "ainfer"])
def test_a_dead_replica_is_skipped(url: str, way: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    with Endpoint([dead, url + "double"], 10, retry=QUICK) as endpoint:
        for _ in range(10):
            answer = asyncio.run(endpoint.ainfer({"x": ONES}))["y"] if way == "ainfer" else endpoint(ONES)
            np.testing.assert_array_equal(answer, 2 * ONES)


def test_replicas_share_the_calls() -> None:
    counts = [0, 0, 0]

    def counting(index: int) -> Callable[[Conversation, Message], None]:
        def answer(conversation: Conversation, request: Message) -> None:
            counts[index] += 1
            GOOD(conversation)

        return answer

    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(peer(serving(SIGNATURE, counting(index)))) for index in range(3)]
        endpoint = stack.enter_context(Endpoint([there.url for there in peers]))
        for _ in range(30):
            endpoint(ONES)
    assert sum(counts) == 30
    assert min(counts) >= 5, counts


# --------------------------------------------------------------------------- deadlines


def test_the_ambient_deadline_bounds_a_call(url: str) -> None:
    with Endpoint(url + "slow") as endpoint:
        _ = endpoint.signature
        since = time.monotonic()
        with deadline(0.2), pytest.raises(DeadlineExceeded):
            endpoint.infer({"x": ONES}, config=b"2000")
        assert time.monotonic() - since < 0.5


@pytest.mark.parametrize("way", ["ainfer", "submit"])
def test_the_ambient_deadline_bounds_an_awaited_and_a_submitted_call(url: str, way: str) -> None:
    with Endpoint(url + "slow") as endpoint:
        _ = endpoint.signature
        since = time.monotonic()
        with deadline(0.2), pytest.raises(DeadlineExceeded):
            WAYS[way](endpoint, config=b"2000")
        assert time.monotonic() - since < 0.5


def test_a_deadline_never_makes_the_timeout_longer(url: str) -> None:
    with Endpoint(url + "slow", timeout_s=0.2) as endpoint:
        _ = endpoint.signature
        with deadline(60), pytest.raises(DeadlineExceeded):
            endpoint.infer({"x": ONES}, config=b"2000", deadline=Deadline.after(60))


@pytest.mark.parametrize("way", ["infer", "ainfer"])
def test_r3_every_sending_says_how_many_milliseconds_are_left(way: str) -> None:
    with answering(status("503 X"), GOOD, retry=Retry(base_s=0.02)) as (endpoint, seen):
        if way == "infer":
            endpoint.infer({"x": ONES}, deadline=Deadline.after(5))
        else:
            asyncio.run(endpoint.ainfer({"x": ONES}, deadline=Deadline.after(5)))
        left = [int(request.headers["x-request-timeout-ms"]) for request in seen]
    assert len(left) == 2
    assert 4000 < left[1] <= left[0] <= 5000


def test_r3_a_request_that_expires_in_the_servers_queue_is_not_run() -> None:
    running, release, ran = threading.Event(), threading.Event(), []

    class OneAtATime(FunctionServable):
        concurrency = 1

    def run(x: Array) -> Array:
        ran.append(float(x[0, 0]))
        running.set()
        release.wait(WAIT_S)
        return x

    with server_ref.running({"m": OneAtATime(run, [X], [Y])}) as base, Endpoint(base, 10) as endpoint:
        first = endpoint.submit({"x": ONES})
        assert running.wait(WAIT_S)
        with pytest.raises(DeadlineExceeded):
            endpoint.infer({"x": 2 * ONES}, deadline=Deadline.after(0.1))
        release.set()
        first.result(WAIT_S)
        endpoint.infer({"x": 3 * ONES})
    assert ran == [1.0, 3.0]


# --------------------------------------------------------------------------- headers and secrets


def test_headers_are_sent_and_templates_read_the_environment_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    headers = {"Authorization": "Bearer ${TOKEN}", "X-Team": "${TEAM}-${TEAM}", "X-Plain": "plain"}
    with answering(GOOD, headers=headers) as (endpoint, seen):
        for token in ("one", "two"):
            monkeypatch.setenv("TOKEN", token)
            monkeypatch.setenv("TEAM", "ml")
            endpoint(ONES)
        assert [request.headers["authorization"] for request in seen] == ["Bearer one", "Bearer two"]
        assert (seen[0].headers["x-team"], seen[0].headers["x-plain"]) == ("ml-ml", "plain")


def test_a_header_whose_variable_is_not_set_is_an_error_that_names_it_and_nothing_is_sent() -> None:
    with peer(echoing) as there:
        with pytest.raises(SpecError, match="'X-Key' needs the environment variable NO_SUCH_VARIABLE"):
            Endpoint(there.url, headers={"X-Key": "${NO_SUCH_VARIABLE}"})(ONES)
        assert there.connections == 0


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Key": "hush\r\nX-Evil: 1"}, {"X-Key": "hush\n"}, {"X-Key": "hush\0"}, {"X-Key": "h\u00fcsh"},
        {"X Key": "hush"}, {"": "hush"}, {"X:": "hush"}, {"X\n": "hush"}, {"Content-Length": "hush"},
        {"transfer-encoding": "hush"}, {"HOST": "hush"}, {"Connection": "hush"}, {"Expect": "hush"},
    ],
)  # fmt: skip
def test_a_header_that_could_end_its_line_or_change_the_framing_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(SpecError) as caught:
        Endpoint("http://h/", headers=headers)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("value", [None, 7, b"bytes"])
def test_a_header_that_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(SpecError):
        Endpoint("http://h/", headers={"X-Key": value})


def test_a_variable_that_holds_a_line_end_is_refused_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "hush\r\nX-Evil: 1")
    with peer(echoing) as there:
        with pytest.raises(SpecError, match="'X-Key'") as caught:
            Endpoint(there.url, headers={"X-Key": "${TOKEN}"})(ONES)
        assert "hush" not in str(caught.value)
        assert there.connections == 0


SECRET = "s3cr3t-value"


def test_a_secret_is_in_no_repr_no_error_and_no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    answers = [status("400 X", b"no", TEXT), status("503 X"), status("200 OK", b"junk"), status("302 X"), results()]
    headers = {"Authorization": f"Bearer {SECRET}", "X-Other": "${TOKEN}"}
    with answering(*answers, headers=headers, retry=NO_RETRY) as (endpoint, seen):
        said = [repr(endpoint), str(endpoint), repr(endpoint.__dict__), repr(pickle.dumps(endpoint))]
        for _ in answers:
            with pytest.raises(RemoteOpsError) as caught:
                endpoint(ONES)
            error: BaseException | None = caught.value
            while error is not None:
                said += [str(error), repr(error)]
                error = error.__cause__ or error.__context__
        assert all(request.headers["authorization"] == f"Bearer {SECRET}" for request in seen)
    assert not [text for text in said if SECRET in text]
    assert "Authorization" in said[0]


def test_a_pickled_endpoint_with_a_literal_secret_says_at_its_call_what_to_do() -> None:
    with answering(GOOD, headers={"Authorization": SECRET}) as (endpoint, seen):
        endpoint(ONES)
        again = pickle.loads(pickle.dumps(endpoint))
        with pytest.raises(SpecError, match=r"'Authorization' had a literal value.*\$\{NAME\}"):
            again(ONES)
        assert len(seen) == 1


def test_a_pickled_endpoint_keeps_url_timeout_retry_signature_and_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "here")
    with answering(GOOD, headers={"X-Key": "${TOKEN}"}, timeout_s=7.0) as (endpoint, seen):
        unused = pickle.loads(pickle.dumps(endpoint))
        _ = endpoint.signature
        for again in (unused, pickle.loads(pickle.dumps(endpoint))):
            np.testing.assert_array_equal(again(ONES), 2 * ONES)
            assert (again.url, again.timeout_s) == (endpoint.url, 7.0)
            again.submit({"x": ONES}).result(WAIT_S)
            again.close()
        assert {request.headers["x-key"] for request in seen} == {"here"}


def test_a_deepcopied_endpoint_works(url: str) -> None:
    with Endpoint(url + "double", headers={"X-Key": "literal"}) as endpoint:
        again = copy.deepcopy({"layer": endpoint})["layer"]
        np.testing.assert_array_equal(again(ONES), 2 * ONES)
        np.testing.assert_array_equal(copy.copy(endpoint)(ONES), 2 * ONES)


def test_a_url_with_a_password_is_refused_and_not_repeated() -> None:
    with pytest.raises(SpecError, match="headers=") as caught:
        Endpoint("http://ann:hush@h/m")
    assert "hush" not in str(caught.value)


def test_the_query_of_a_url_is_sent_and_not_shown() -> None:
    seen: list[str] = []

    def script(conversation: Conversation) -> None:
        while (request := conversation.read()) is not None:
            seen.append(request.first_line)
            conversation.answer(b"no", "400 X", TEXT)

    with peer(script) as there, Endpoint(f"{there.url}?key=hush") as endpoint:
        with pytest.raises(InvalidRequest) as caught:
            endpoint(ONES)
        assert seen == ["POST /m?key=hush HTTP/1.1"]
        assert "hush" not in str(caught.value) + repr(caught.value) + repr(endpoint) + endpoint.url


@pytest.mark.parametrize("arguments", [
    {"url": []}, {"url": "h:9000"}, {"url": "http://h", "timeout_s": -1}, {"url": "http://h", "timeout_s": "x"},
    {"url": "http://h", "timeout_s": float("nan")},
])  # fmt: skip
def test_an_argument_that_is_wrong_is_said_before_any_call(arguments: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        Endpoint(**arguments)


# --------------------------------------------------------------------------- arrays, through the whole stack

EVERY_DTYPE = [
    np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64, np.float16, np.float32,
    np.float64, np.bool_, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=lambda dtype: np.dtype(dtype).name)
def test_every_dtype_makes_the_round_trip_bit_for_bit(dtype: Any) -> None:
    spec = [TensorSpec("x", np.dtype(dtype), None)]
    seen: list[Array] = []

    def identity(x: Array) -> Array:
        seen.append(x)
        return x

    with served(identity, spec, [TensorSpec("y", np.dtype(dtype), None)]) as endpoint:
        assert endpoint.signature.inputs[0].dtype == np.dtype(dtype).name
        for shape in [(), (1,), (3, 4), (0,), (2, 0, 3), (1, 1, 1, 1, 5)]:
            x = np.random.default_rng(1).integers(0, 2, shape).astype(dtype)
            y = endpoint(x)
            assert (y.dtype, y.shape) == (np.dtype(dtype), shape)
            assert y.tobytes() == x.tobytes()
            assert seen[-1].dtype == np.dtype(dtype)


def test_strings_make_the_round_trip_as_bytes() -> None:
    spec = TensorSpec("x", "string", None)
    with served(lambda x: x, [spec], [TensorSpec("y", "string", None)]) as endpoint:
        for x, expected in [
            (np.array(["a", "\u00e4", ""], object), [b"a", "\u00e4".encode(), b""]),
            (np.array([b"\0\xff\0", b"x" * 70_000], object), [b"\0\xff\0", b"x" * 70_000]),
            (np.array(["ab", "c"]), [b"ab", b"c"]),
            (np.array([b"ab", b"c"]), [b"ab", b"c"]),
            (np.array([], object), []),
            (["list", "of"], [b"list", b"of"]),
        ]:
            assert endpoint(x).tolist() == expected
        assert endpoint("scalar").tolist() == b"scalar"
        assert endpoint(np.array([["a", "b"]], object)).shape == (1, 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_float32_is_cast_where_the_model_wants_fewer_bits(dtype: str) -> None:
    with served(lambda x: x, [TensorSpec("x", dtype, (-1,))], [TensorSpec("y", dtype, (-1,))]) as endpoint:
        y = endpoint(np.float32([0.5, 1.0, -2.0]))
        assert y.dtype == np.dtype(getattr(ml_dtypes, dtype))
        np.testing.assert_array_equal(y.astype(np.float32), [0.5, 1.0, -2.0])


BIG = np.arange(24, dtype=np.float32).reshape(4, 6)
LAYOUTS = [
    pytest.param(BIG[::2, ::3], id="strided"),
    pytest.param(BIG.T, id="transposed"),
    pytest.param(np.asfortranarray(BIG), id="fortran"),
    pytest.param(BIG[::-1], id="reversed"),
    pytest.param(BIG.astype(">f4"), id="big-endian"),
    pytest.param(np.broadcast_to(np.float32(3), (5, 2)), id="broadcast"),
    pytest.param(np.frombuffer(b"\0" + BIG.tobytes(), np.float32, offset=1), id="unaligned"),
    pytest.param(np.frombuffer(BIG.tobytes(), np.float32), id="read-only"),
]


@pytest.mark.parametrize("x", LAYOUTS)
def test_an_array_of_any_layout_arrives_as_it_is_and_is_left_alone(x: Array) -> None:
    before = x.copy()
    with served(lambda x: x, [TensorSpec("x", "float32", None)], [TensorSpec("y", "float32", None)]) as endpoint:
        y = endpoint(x)
    np.testing.assert_array_equal(y, before)
    np.testing.assert_array_equal(x, before)
    assert y.dtype == np.float32


@pytest.mark.parametrize("size", [1, 1000, 100_000, 3_000_000])
def test_arrays_returned_may_be_written_to_and_stay_valid_after_later_calls(size: int) -> None:
    with served(lambda x: x, [TensorSpec("x", "float32", (-1,))], [TensorSpec("y", "float32", (-1,))]) as endpoint:
        kept = [endpoint(np.full(size, index, np.float32)) for index in range(8)]
        kept[0][:] = -1
        kept.append(endpoint(np.full(size, 8, np.float32)))
        for index, array in enumerate(kept):
            assert array.flags.writeable
            assert (array == (index or -1)).all()


def test_a_buffer_is_never_reused_while_an_array_views_it() -> None:
    """Threads keep slices of large answers while others come and go: none ever changes."""
    spec = [TensorSpec("x", "int64", (-1,))]

    def hammer(thread: int) -> int:
        rng = np.random.default_rng(thread)
        living: list[tuple[Array, int]] = []
        wrong = 0
        for index in range(60):
            mark = thread * 1000 + index
            size = int(rng.integers(20_000, 200_000))
            y = endpoint(np.full(size, mark, np.int64))
            living.append((y[size // 2 :: 3], mark))
            if len(living) > 4:
                view, expected = living.pop(int(rng.integers(len(living))))
                wrong += not (view == expected).all()
        return wrong + sum(not (view == expected).all() for view, expected in living)

    with served(lambda x: x, spec, [TensorSpec("y", "int64", (-1,))]) as endpoint, ThreadPoolExecutor(8) as threads:
        assert list(threads.map(hammer, range(8))) == [0] * 8


def test_a_model_that_keeps_its_inputs_keeps_them_unchanged() -> None:
    kept: list[tuple[Array, int]] = []

    def keep(x: Array) -> Array:
        kept.append((x, int(x[0])))
        return x[:1]

    with served(keep, [TensorSpec("x", "int64", (-1,))], [TensorSpec("y", "int64", (-1,))]) as endpoint:
        for index in range(30):
            endpoint(np.full(50_000, index, np.int64))
    assert all((x == mark).all() for x, mark in kept)


def test_a_reply_without_a_known_length_gives_arrays_that_may_be_written_to() -> None:
    def chunked(conversation: Conversation) -> None:
        body = b"".join(graphpipe.encode_response([2 * ONES]))
        pieces = b"".join(b"1\r\n" + body[index : index + 1] + b"\r\n" for index in range(len(body)))
        conversation.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n")

    with answering(chunked) as (endpoint, _):
        y = endpoint(ONES)
        y += 1
        np.testing.assert_array_equal(y, 2 * ONES + 1)


# --------------------------------------------------------------------------- processes


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_uses_the_endpoint_while_its_parent_does(url: str) -> None:
    with Endpoint(url + "double", 10) as endpoint:
        endpoint(ONES)
        endpoint.submit({"x": ONES}).result(WAIT_S)

        def calls(factor: float) -> bool:
            blocking = all((endpoint(ONES * factor) == 2 * factor).all() for _ in range(50))
            futures = [endpoint.submit({"x": ONES * factor}) for _ in range(20)]
            return blocking and all((future.result(WAIT_S)["y"] == 2 * factor).all() for future in futures)

        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os._exit(0 if calls(3.0) else 1)
            os._exit(2)
        assert calls(5.0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_another_thread_fetches_the_signature_leaves_the_child_usable() -> None:
    asked, over = threading.Event(), threading.Event()

    def script(conversation: Conversation) -> None:
        while conversation.read() is not None:
            if conversation.number == 1:
                asked.set()
                over.wait(WAIT_S)
            conversation.answer(graphpipe.encode_metadata(SIGNATURE))

    with peer(script) as there, Endpoint(there.url, 10) as endpoint:
        thread = threading.Thread(target=lambda: endpoint.signature)
        thread.start()
        assert asked.wait(WAIT_S)
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os._exit(0 if endpoint.signature == SIGNATURE else 1)
            os._exit(2)
        exit_code: list[int] = []

        def reaped() -> bool:
            pid, state = os.waitpid(child, os.WNOHANG)
            exit_code.extend([os.waitstatus_to_exitcode(state)] if pid else [])
            return bool(pid)

        assert until(reaped)
        over.set()
        thread.join(WAIT_S)
        assert exit_code == [0]


def test_the_repr_names_the_replicas_and_the_headers_not_their_values() -> None:
    endpoint = Endpoint(["http://a/m", "http://b/m?k=hush"], headers={"X-Key": "hush"})
    shown = "['http://a/m', 'http://b/m?...'], timeout_s=30.0, headers=['X-Key']"
    assert repr(endpoint) == f"Endpoint({shown})"


# --------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda: Endpoint(None), "url"),  # type: ignore[arg-type]
        (lambda: Endpoint(["http://a/", 3]), "url"),  # type: ignore[list-item]
        (lambda: Endpoint(b"http://a/"), "url"),  # type: ignore[arg-type]
        (lambda: Endpoint([]), "url"),
        (lambda: Endpoint("http://h:0/"), "url"),
        (lambda: Endpoint("http://h/", headers="x"), "headers"),  # type: ignore[arg-type]
        (lambda: Endpoint("http://h/", headers={"User-Agent": "me"}), "headers"),
        (lambda: Endpoint("http://h/", retry=3), "retry"),  # type: ignore[arg-type]
        (lambda: Endpoint("https://h/", tls="ca.pem"), "tls"),  # type: ignore[arg-type]
        (lambda: Endpoint("http://h/", tls=TLS()), "tls"),
        (lambda: Endpoint("https://h/", tls=TLS(), transport=HttpTransport()), "tls"),
    ],
)
def test_a_wrong_argument_is_a_spec_error_that_names_it(make: Callable[[], Endpoint], place: str) -> None:
    with pytest.raises(SpecError) as caught:
        make()
    assert caught.value.path == place


@pytest.mark.parametrize("timeout_s", [3e6, 1e10, float("inf")])
def test_a_timeout_of_weeks_is_a_timeout(url: str, timeout_s: float) -> None:
    with Endpoint(f"{url}double", timeout_s) as endpoint:
        assert endpoint.submit({"x": ONES}).result(WAIT_S)["y"].tolist() == endpoint(ONES).tolist()


def test_a_host_name_that_cannot_be_one_is_a_connect_error() -> None:
    with pytest.raises(ConnectError):
        Endpoint("http://a..b/", retry=Retry(1))(ONES)


def test_a_call_that_is_to_be_sent_once_is_sent_once() -> None:
    def answer_one(conversation: Conversation) -> None:
        conversation.read()
        conversation.answer(b"".join(graphpipe.encode_response([ONES])))
        conversation.read()  # and hang up on the second, which it has read

    with peer(answer_one) as there:
        endpoint = Endpoint(there.url, retry=Retry(attempts=1))
        endpoint._signature = SIGNATURE
        endpoint(ONES)
        with pytest.raises(ConnectionLost):
            endpoint(ONES)
        assert there.connections == 1


def test_the_query_of_a_redirect_is_not_shown() -> None:
    moved = status("302 Found", b"", "Location: http://h/m?api_key=SECRET")
    with answering(moved) as (endpoint, _), pytest.raises(BadStatus, match="moved to 'http://h/m'") as caught:
        endpoint(ONES)
    assert "SECRET" not in str(caught.value)


def test_a_url_shows_no_query() -> None:
    endpoint = Endpoint("http://h/m?api_key=SECRET")
    assert "SECRET" not in f"{endpoint!r} {endpoint.url} {endpoint._urls!r}"
