"""An endpoint that speaks the Open Inference Protocol, against a server by hand: without a line of our codec."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pickle
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import requests
from rawoip import BINARY, JSON, NUMPY, Answer, Model, doubling, echo, reply, sides, tensors_of
from rawpeer import WAIT_S, Conversation, Message, peer

import server_ref
from remote_ops import Endpoint, RequestsTransport, Retry, load
from remote_ops.errors import (
    BadStatus,
    ConnectError,
    DeadlineExceeded,
    DecodeError,
    EncodeError,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    ModelUnavailable,
    NotDifferentiable,
    Overloaded,
    RemoteOpsError,
    SignatureError,
    SpecError,
)
from remote_ops.policy import Hedge
from remote_ops.url import Url
from remote_ops.wire import speaks_oip

Array = npt.NDArray[Any]

ONES = np.ones((3, 2), np.float32)


def refusing(status: str, body: bytes, then: Answer, *headers: str) -> Answer:
    """A server without binary tensors."""

    def answer(conversation: Conversation, message: Message) -> None:
        if "inference-header-content-length" in message.headers:
            conversation.answer(body, status, *headers)
        else:
            then(conversation, message)

    return answer


def failing(status: str, body: bytes = b"", *headers: str) -> Answer:
    return lambda conversation, _: conversation.answer(body, status, *headers)


@contextlib.contextmanager
def serving(answer: Answer, rows: dict[str, Any] | None = None, **options: Any) -> Iterator[tuple[Endpoint, Model]]:
    model = Model(sides("FP32") if rows is None else rows, answer)
    with peer(model) as there:
        url = there.url.removesuffix("/m") + "/v2/models/m"
        with Endpoint(url, **{"timeout_s": 10, "retry": Retry(base_s=0.001), **options}) as endpoint:
            yield endpoint, model


def words(text: str) -> bytes:
    return json.dumps({"error": text}).encode()


PARSE = "422 X", b'{"detail": [{"msg": "field required"}]}', f"Content-Type: {JSON}"

# --------------------------------------------------------------------------- calling


def sample(datatype: str) -> Array:
    if datatype == "BYTES":
        return np.array([[b"a", "\u00e9".encode()], [b"", b"long" * 50]], object)
    return np.array([[0, 1], [1, 0]]).astype(NUMPY[datatype])


@pytest.mark.parametrize("mode", ["binary", "binary in, json out", "json"])
@pytest.mark.parametrize("datatype", NUMPY)
def test_every_datatype_goes_there_and_back(datatype: str, mode: str) -> None:
    answer = echo(datatype, binary=mode == "binary")
    x = sample(datatype)
    with serving(refusing(*PARSE[:2], answer) if mode == "json" else answer, sides(datatype)) as (endpoint, model):
        for result in (
            endpoint(x),
            endpoint.infer({"x": x}, ["y"])["y"],
            asyncio.run(endpoint.ainfer({"x": x}))["y"],
            endpoint.submit({"x": x}).result(WAIT_S)["y"],
            endpoint(x[:0]),
        ):
            assert (result.dtype, result.tolist()) == (x.dtype, x[: len(result)].tolist())
    assert model.kinds == ([BINARY, *[JSON] * 5] if mode == "json" else [BINARY] * 5)


def test_a_call_is_what_the_protocol_says() -> None:
    with serving(echo(), headers={"X-Mine": "1"}) as (endpoint, model):
        endpoint.infer({"x": ONES}, ["y"], config=b"k")
    asked, called = model.seen
    assert asked.first_line == "GET /v2/models/m HTTP/1.1"
    assert "content-type" not in asked.headers
    assert called.first_line == "POST /v2/models/m/infer HTTP/1.1"
    assert called.headers["content-type"] == BINARY
    assert 9000 < int(called.headers["x-request-timeout-ms"]) <= 10000
    assert called.headers["x-mine"] == "1"
    text, _ = tensors_of(called)
    assert text == {
        "inputs": [{"name": "x", "shape": [3, 2], "datatype": "FP32", "parameters": {"binary_data_size": 24}}],
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
        "parameters": {"config": "k"},
    }


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v2/models/m", "/v2/models/m"),
        ("/v2/models/m/", "/v2/models/m"),
        ("/v2/models/m/versions/3", "/v2/models/m/versions/3"),
        ("/seldon/ns/dep/v2/models/m%2Fn", "/seldon/ns/dep/v2/models/m%2Fn"),
        ("/v2/models/m?token=t", "/v2/models/m?token=t"),
    ],
)
@pytest.mark.parametrize("through", [None, "requests"])
def test_the_url_of_a_model_says_where_its_calls_go(path: str, asked: str, through: str | None) -> None:
    session = requests.Session()
    with session, peer(model := Model(sides("FP32"), echo())) as there:
        transport = RequestsTransport(session) if through else None
        with Endpoint(there.url.removesuffix("/m") + path, 10, transport=transport) as endpoint:
            assert endpoint(ONES).tolist() == ONES.tolist()
    where, mark, query = asked.partition("?")
    assert [line.rstrip("/") for line in model.lines] == [f"GET {asked}", f"POST {where}/infer{mark}{query}"]


def test_the_signature_is_that_of_the_server() -> None:
    with serving(echo()) as (endpoint, _):
        assert str(endpoint.signature) == "(x: float32 [-1, 2]) -> (y: float32 [-1, 2])"
        assert (endpoint.signature.name, endpoint.signature.version, endpoint.signature.server) == ("m", "1", "test")
        with pytest.raises(SignatureError, match="expected float32"):
            endpoint(ONES.astype(int))


def test_outputs_are_told_by_name_and_come_in_the_order_asked_for() -> None:
    rows = {
        "inputs": sides("FP32")["inputs"],
        "outputs": [{"name": n, "datatype": "FP32", "shape": [1]} for n in "abc"],
    }

    def answer(conversation: Conversation, message: Message) -> None:
        reply(conversation, {n: ("FP32", np.float32([ord(n)])) for n in "cab"}, binary=True)

    with serving(answer, rows) as (endpoint, _):
        assert {name: y.tolist() for name, y in endpoint.infer({"x": ONES}, ["b", "a"]).items()} == {
            "b": [98],
            "a": [97],
        }
        assert [y.tolist() for y in endpoint(ONES)] == [[97], [98], [99]]


def test_results_are_views_of_the_reply_and_may_be_written_to() -> None:
    with serving(echo()) as (endpoint, _):
        y = endpoint(ONES)
    assert y.flags.writeable
    assert not y.flags.owndata


def test_replicas_take_turns() -> None:
    with (
        serving(echo()) as (one, first),
        serving(echo()) as (two, second),
        Endpoint([one.url, two.url], 10) as endpoint,
    ):
        for _ in range(4):
            endpoint(ONES)
    assert sorted([len(first.kinds), len(second.kinds)]) == [2, 2]


def test_a_server_of_ours_may_serve_a_model_of_this_protocol() -> None:
    with serving(echo()) as (endpoint, _), server_ref.running({"m": endpoint}) as url, Endpoint(url) as bridged:
        assert bridged(ONES).tolist() == ONES.tolist()


def test_an_endpoint_that_was_pickled_speaks_on() -> None:
    with serving(echo()) as (endpoint, model):
        endpoint(ONES)
        again = pickle.loads(pickle.dumps(endpoint))
        assert again(ONES).tolist() == ONES.tolist()
        assert load(endpoint.url)(ONES).tolist() == ONES.tolist()
    assert len(model.kinds) == 3


# --------------------------------------------------------------------------- servers that take JSON only


@pytest.mark.parametrize(
    "refusal",
    [
        ("400 X", words("cannot parse")),
        ("400 X", b"Bad Request", "Content-Type: text/plain"),
        ("415 X", b""),
        PARSE,
        ("500 X", b"Traceback (most recent call last): ...", "Content-Type: text/plain"),
    ],
)
def test_a_server_that_refuses_binary_tensors_is_spoken_to_in_json(refusal: tuple[Any, ...]) -> None:
    answer = refusing(refusal[0], refusal[1], echo(binary=False), *refusal[2:])
    with serving(answer) as (endpoint, model):
        for _ in range(3):
            assert endpoint(ONES).tolist() == ONES.tolist()
    assert model.kinds == [BINARY, JSON, JSON, JSON]


def test_first_calls_at_once_all_find_out_that_a_server_takes_json_only() -> None:
    with serving(refusing(*PARSE[:2], echo(binary=False))) as (endpoint, model), ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: endpoint(i * ONES), range(32)))
    assert [y[0, 0] for y in results] == list(range(32))
    assert model.kinds.count(JSON) == 32


def test_a_server_that_took_binary_tensors_once_is_never_asked_in_json() -> None:
    def answer(conversation: Conversation, message: Message) -> None:
        if len(model.kinds) == 1:
            echo()(conversation, message)
        else:
            conversation.answer(words("no such row"), "400 X", f"Content-Type: {JSON}")

    with serving(answer) as (endpoint, model):
        endpoint(ONES)
        with pytest.raises(InvalidRequest, match="no such row - from http"):
            endpoint(ONES)
    assert model.kinds == [BINARY, BINARY]


@pytest.mark.parametrize("refusal", [("400 X", words("cannot parse")), ("500 X", b"", "Content-Type: text/plain")])
def test_what_must_not_happen_twice_is_not_sent_in_another_form_either(refusal: tuple[Any, ...]) -> None:
    answer = refusing(refusal[0], refusal[1], echo(binary=False), *refusal[2:])
    with serving(answer, retry=Retry(idempotent=False)) as (endpoint, model):
        with pytest.raises((InvalidRequest, BadStatus)):
            endpoint(ONES)
        with pytest.raises((InvalidRequest, BadStatus)):
            asyncio.run(endpoint.ainfer({"x": ONES}))
    assert model.kinds == [BINARY, BINARY]


def test_a_refusal_of_both_forms_is_told_and_decides_nothing() -> None:
    def answer(conversation: Conversation, message: Message) -> None:
        if tensors_of(message)[1]["x"][0, 0] < 0:
            conversation.answer(words("no negative rows"), "400 X", f"Content-Type: {JSON}")
        else:
            echo()(conversation, message)

    with serving(answer) as (endpoint, model):
        for _ in range(2):
            with pytest.raises(InvalidRequest, match="no negative rows"):
                endpoint(-ONES)
        endpoint(ONES)
    assert model.kinds == [BINARY, JSON, BINARY, JSON, BINARY]


def test_what_json_has_no_form_for_is_said_when_binary_tensors_were_refused() -> None:
    x = ONES * np.nan
    with serving(refusing(*PARSE[:2], echo(binary=False))) as (endpoint, _):
        with pytest.raises(InvalidRequest, match="answered 422") as refused:
            endpoint(x)
        assert isinstance(refused.value.__cause__, EncodeError)
        endpoint(ONES)
        with pytest.raises(EncodeError, match="NaN or infinity"):
            endpoint(x)


@pytest.mark.parametrize("status", ["404 X", "500 X", "503 X"])
def test_other_failures_are_no_reason_to_ask_in_json(status: str) -> None:
    with serving(failing(status, words("it broke")), retry=Retry(attempts=1)) as (endpoint, model):
        with pytest.raises(RemoteOpsError, match="it broke"):
            endpoint(ONES)
    assert model.kinds == [BINARY]


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, InvalidRequest),
        (404, ModelNotFound),
        (422, InvalidRequest),
        (429, Overloaded),
        (500, InternalError),
        (501, InvalidRequest),
        (503, ModelUnavailable),
        (504, DeadlineExceeded),
        (418, BadStatus),
    ],
)
def test_the_status_says_the_class_and_the_body_the_words(status: int, error: type[RemoteOpsError]) -> None:
    with serving(failing(f"{status} X", words("it broke")), retry=Retry(attempts=1)) as (endpoint, _):
        with pytest.raises(error, match=r"it broke") as raised:
            endpoint(ONES)
        assert type(raised.value) is error
        assert endpoint.url in str(raised.value)


def test_passing_failures_are_tried_again() -> None:
    def answer(conversation: Conversation, message: Message) -> None:
        (failing("503 X", words("loading")) if len(model.kinds) < 3 else echo())(conversation, message)

    with serving(answer) as (endpoint, model):
        assert endpoint(ONES).tolist() == ONES.tolist()
    assert len(model.kinds) == 3


def test_a_model_that_does_not_exist_is_not_found() -> None:
    def script(conversation: Conversation) -> None:
        while conversation.read() is not None:
            conversation.answer(words("Request for unknown model: 'm' is not found"), "404 X", f"Content-Type: {JSON}")

    with peer(script) as there, Endpoint(there.url.removesuffix("/m") + "/v2/models/m", 10) as endpoint:
        with pytest.raises(ModelNotFound, match="unknown model"):
            endpoint(ONES)


def test_a_server_that_does_not_say_what_its_model_takes_is_an_error_that_says_what_to_do() -> None:
    with serving(echo(), {"inputs": [], "outputs": []}) as (endpoint, _):
        with pytest.raises(SpecError, match="declare inputs and outputs"):
            endpoint(ONES)


HEAD = b'{"model_name": "m", "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}'


@pytest.mark.parametrize(
    ("body", "headers", "error", "match"),
    [
        (b"", [], BadStatus, "empty body: expected a reply"),
        (
            b"<html>hello</html>",
            ["Content-Type: text/html"],
            BadStatus,
            "hello: expected a reply to an inference request",
        ),
        (b"\x00\x01", [], DecodeError, "is no reply to an inference request"),
        (HEAD, ["Inference-Header-Content-Length: 5000"], DecodeError, "got 5000"),
        (HEAD, ["Inference-Header-Content-Length: x"], DecodeError, "a number of bytes"),
        (HEAD + b"1", [f"Inference-Header-Content-Length: {len(HEAD)}"], DecodeError, "1 bytes follow"),
        (HEAD.replace(b'"y"', b'"z"'), [], InternalError, "expected the outputs y, got z"),
        (HEAD.replace(b"FP32", b"FP64"), [], InternalError, r"expected float32 .*, got float64"),
        (HEAD.replace(b"[1, 2]", b"[2]", 1), [], InternalError, r"expected float32 .*, got float32 \[2\]"),
    ],
)
def test_answers_that_are_none(body: bytes, headers: list[str], error: type[Exception], match: str) -> None:
    with serving(failing("200 OK", body, *headers)) as (endpoint, _), pytest.raises(error, match=match):
        endpoint(ONES)


@pytest.mark.parametrize(
    ("urls", "match"),
    [
        (["http://h/v2/models/m", "http://h/m"], "replicas speak one protocol"),
        ("http://h/v2/models/m/infer", "expected .*/v2/models/NAME"),
        ("http://h/v2/models/", "expected .*/v2/models/NAME"),
        ("http://h/v2/models/m/versions/", "expected .*/v2/models/NAME"),
        ("http://h/v2/models/m/versions/1/infer", "expected .*/v2/models/NAME"),
    ],
)
def test_urls_that_mean_no_model_are_spec_errors(urls: Any, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        Endpoint(urls)


@pytest.mark.parametrize(
    "url", ["http://h/resnet", "http://h/v2/resnet", "http://h/v2/models", "http://h/m?x=/v2/models/m"]
)
def test_other_urls_mean_graphpipe(url: str) -> None:
    assert not speaks_oip(Url.parse(url))


def test_the_header_that_tells_of_tensors_is_ours_to_set() -> None:
    with pytest.raises(SpecError, match="no header of this name"):
        Endpoint("http://h/v2/models/m", headers={"Inference-Header-Content-Length": "3"})


def test_a_unix_socket_has_models_too() -> None:
    url = Url.parse("http+unix://%2Frun%2Fm.sock/v2/models/m")
    assert speaks_oip(url)
    assert url.below("/infer", "POST", JSON).prefix.startswith(
        b"POST /v2/models/m/infer HTTP/1.1\r\nHost: localhost\r\n"
    )


# --------------------------------------------------------------------------- replicas


CALLS: dict[str, Callable[[Endpoint], Any]] = {
    "infer": lambda endpoint: endpoint.infer({"x": ONES}),
    "ainfer": lambda endpoint: asyncio.run(endpoint.ainfer({"x": ONES})),
    "submit": lambda endpoint: endpoint.submit({"x": ONES}).result(WAIT_S),
}


def nobody() -> str:
    """A URL at which a connection is refused."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v2/models/m"


@pytest.mark.parametrize("hedge", [None, Hedge(after_s=5)])
@pytest.mark.parametrize("way", CALLS)
def test_of_two_replicas_one_may_be_dead(way: str, hedge: Hedge | None) -> None:
    model = Model(sides("FP32"), refusing(*PARSE[:2], echo(binary=False), PARSE[2]))
    with peer(model) as there:
        first, second = nobody(), there.url.removesuffix("/m") + "/v2/models/m"
        with Endpoint([first, second], timeout_s=10, retry=Retry(base_s=0.001), hedge=hedge) as endpoint:
            for _ in range(8):
                np.testing.assert_array_equal(CALLS[way](endpoint)["y"], ONES)
            assert [replica.url for replica in endpoint.stats()] == [first, second]
            assert [replica.in_flight for replica in endpoint.stats()] == [0, 0]
    assert model.lines == ["GET /v2/models/m", *["POST /v2/models/m/infer"] * 9]
    assert model.kinds == [BINARY, *[JSON] * 8]


@pytest.mark.parametrize("way", CALLS)
def test_a_call_that_no_replica_answers_names_them_all(way: str) -> None:
    first, second = nobody(), nobody()
    with serving(doubling) as (other, _):
        signature = other.signature
    with Endpoint([first, second], retry=Retry(base_s=0.001)) as endpoint:
        for known in (None, signature):
            endpoint._signature = known
            with pytest.raises(ConnectError, match="1 more failed") as caught:
                CALLS[way](endpoint)
            assert first in str(caught.value)
            assert second in str(caught.value)


@pytest.mark.parametrize("way", CALLS)
def test_a_late_call_is_sent_to_another_replica_too(way: str) -> None:
    late = Model(sides("FP32"), lambda conversation, _: conversation.read())
    quick = Model(sides("FP32"), doubling)
    with peer(late) as there, peer(quick) as here:
        urls = [one.url.removesuffix("/m") + "/v2/models/m" for one in (there, here)]
        with Endpoint(urls, timeout_s=10, hedge=Hedge(after_s=0.01)) as endpoint:
            for _ in range(4):
                np.testing.assert_array_equal(CALLS[way](endpoint)["y"], 2 * ONES)
    assert "POST /v2/models/m/infer" in late.lines


@pytest.mark.parametrize("way", CALLS)
def test_a_name_with_several_addresses_stands_for_several_replicas(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen, host = socket.getaddrinfo, [], f"oip-{way}"

    def getaddrinfo(name: str, port: int, *args: Any, flags: int = 0, **options: Any) -> list[Any]:
        if name != host or flags & socket.AI_NUMERICHOST:
            return real(name, port, *args, flags=flags, **options)
        return [found for at in ("127.0.0.1", "127.0.0.2") for found in real(at, port, *args, **options)]

    def answer(conversation: Conversation, message: Message) -> None:
        seen.append((conversation.sock.getsockname()[0], message.headers["host"]))
        doubling(conversation, message)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with peer(Model(sides("FP32"), answer), host="0.0.0.0") as there:
        url = f"http://{host}:{there.port}/v2/models/m"
        with Endpoint(url, timeout_s=10) as endpoint:
            for _ in range(40):
                np.testing.assert_array_equal(CALLS[way](endpoint)["y"], 2 * ONES)
            assert [replica.url for replica in endpoint.stats()] == [f"{url} [127.0.0.1]", f"{url} [127.0.0.2]"]
    assert set(seen) == {(at, f"{host}:{there.port}") for at in ("127.0.0.1", "127.0.0.2")}


# --------------------------------------------------------------------------- gradients


def test_a_torch_module_trains_through_a_model_of_this_protocol() -> None:
    import torch

    from remote_ops.torch import RemoteModule

    with serving(doubling, sides("FP32", differentiable=True)) as (endpoint, model):
        module = RemoteModule(endpoint.url)
        x = torch.ones(3, 2, requires_grad=True)
        (module(x) * 3).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [[6, 6]] * 3
        assert torch.nn.Sequential(module, torch.nn.Linear(2, 1))(x).shape == (3, 1)
    assert [sorted(tensors_of(message)[1]) for message in model.seen[1:3]] == [["x"], ["cotangent:y", "x"]]


def test_a_model_that_says_nothing_of_gradients_gives_none() -> None:
    with serving(doubling) as (endpoint, _), pytest.raises(NotDifferentiable):
        endpoint.infer({"x": ONES}, ["gradient:x"])


def test_a_server_that_cannot_do_a_gradient_after_all_says_so() -> None:
    with serving(failing("501 X", words("no vjp")), sides("FP32", differentiable=True)) as (endpoint, _):
        with pytest.raises(NotDifferentiable, match="no vjp"):
            endpoint.infer({"x": ONES, "cotangent:y": ONES}, ["gradient:x"])
