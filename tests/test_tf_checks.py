"""One promise in every form: eager, `tf.function`, `tf.data`, a SavedModel elsewhere, and torch give the same."""

from __future__ import annotations

import base64
import contextlib
import functools
import gc
import json
import os
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rawpeer import Conversation, Message, Peer, peer, until
from tfpeer import OK, ONE, X, python

import server_ref
from remote_ops import Endpoint, FunctionServable, Retry, TensorSpec, errors, graphpipe
from remote_ops.graphpipe import encode_error, encode_response
from remote_ops.signature import Signature

tf = pytest.importorskip("tensorflow")
torch = pytest.importorskip("torch")

from tensorflow.core.protobuf import saved_model_pb2  # noqa: E402
from tensorflow.python.eager import cancellation  # noqa: E402
from tfforms import IN_PROCESS, Fresh, computed, fresh, loosened, save  # noqa: E402
from torchpeer import mix, pair  # noqa: E402

from remote_ops.tf import remote_op, remote_op_multi  # noqa: E402
from remote_ops.torch import RemoteModule  # noqa: E402

FORMS = [*IN_PROCESS, "saved"]
CAPTURES = Path(__file__).parent / "captures"


def ask(url: Any, x: Any = X, **options: Any) -> Any:
    """One call that fetches no metadata: float32 in, float32 out."""
    shape = options.pop("output_shape", [None, 4])
    return remote_op(url, tf.convert_to_tensor(x), "x", "y", tf.float32, shape, **{"timeout_s": 10.0, **options})


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Fresh]:
    """A process that has loaded the library and nothing else of ours."""
    with fresh() as process:
        yield process


# --------------------------------------------------------------------------- the same answers, bit for bit

FLOATS = ("float64", "float32", "float16", "bfloat16")
WHOLE = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def other(dtype: str) -> FunctionServable:
    """Something else of the same dtype: `3 x + 1`, not x, or each string backwards."""

    def change(x: Any) -> Any:
        if dtype == "string":
            return np.array([text[::-1] for text in x.ravel()], object).reshape(x.shape)
        return ~x if dtype == "bool" else 3 * x + 1

    return FunctionServable(change, [TensorSpec("x", dtype, (-1, 4))], [TensorSpec("y", dtype, (-1, 4))], name=dtype)


def values(dtype: str, rows: int) -> Any:
    """Rows that are not all alike, as an array."""
    numbers = np.random.default_rng(rows).standard_normal((rows, 4)) * 3
    if dtype == "string":
        return np.array([repr(number).encode() + b"\0" for number in numbers.ravel()], object).reshape(rows, 4)
    return (
        numbers.astype(bool if dtype == "bool" else np.int8).astype(np.dtype(dtype)) if dtype not in FLOATS else numbers
    )


def in_tf(dtype: str, array: Any) -> Any:
    return tf.constant(array, tf.string) if dtype == "string" else tf.cast(tf.constant(array), dtype)


def in_torch(dtype: str, array: Any) -> Any:
    return torch.from_numpy(array).to(getattr(torch, dtype))


def bits(tensor: Any) -> tuple[Any, ...]:
    """What two tensors, of tensorflow or of torch, share if they are the same: shape and bytes."""
    if isinstance(tensor, torch.Tensor):
        whole = tensor.detach().contiguous()
        return tuple(whole.shape), whole.view(torch.uint8).numpy().tobytes() if whole.numel() else b""
    array = np.asarray(tensor)
    return array.shape, array.ravel().tolist() if array.dtype == object else array.tobytes()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server of one model a dtype, and a SavedModel with a function for each, of the model's name."""
    served: dict[str, Any] = {dtype: other(dtype) for dtype in ("string", "bool", *WHOLE)}
    served |= {dtype: mix(dtype) for dtype in FLOATS}
    served["pair"] = pair()
    with server_ref.running(served) as base:
        functions = {
            name: (lambda x, url=base + name: remote_op(url, x), tf.TensorSpec((None, 4), name))
            for name in served
            if name != "pair"
        }
        yield base, save(tmp_path_factory.mktemp("models") / "saved", functions)


@pytest.mark.parametrize("rows", [3, 0])
@pytest.mark.parametrize("dtype", ["bool", *WHOLE, *FLOATS])
def test_every_form_gives_the_same_bits_as_torch(
    dtype: str, rows: int, models: tuple[str, Path], elsewhere: Fresh
) -> None:
    base, saved = models
    array = values(dtype, rows)
    x, expected = in_tf(dtype, array), RemoteModule(base + dtype)(in_torch(dtype, array))
    assert expected.shape == (rows, 4)
    assert bits(x) == bits(in_torch(dtype, array))
    for form, run in IN_PROCESS.items():
        found, _ = run(lambda x: remote_op(base + dtype, x), x)
        assert (form, found.dtype.name, bits(found)) == (form, dtype, bits(expected))
    (found,), _ = elsewhere.run(saved, dtype, x)
    assert (found.dtype.name, bits(found)) == (dtype, bits(expected))


@pytest.mark.parametrize("rows", [3, 0])
def test_every_form_gives_the_same_strings_as_an_endpoint(
    rows: int, models: tuple[str, Path], elsewhere: Fresh
) -> None:
    base, saved = models
    array = values("string", rows)
    with Endpoint(base + "string") as endpoint:
        expected = endpoint(array)
    for run in IN_PROCESS.values():
        assert bits(run(lambda x: remote_op(base + "string", x), in_tf("string", array))[0]) == bits(expected)
    (found,), _ = elsewhere.run(saved, "string", in_tf("string", array))
    assert bits(found) == bits(expected)


@pytest.mark.parametrize("rows", [3, 0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_form_gives_the_same_gradient_as_torch(
    dtype: str, rows: int, models: tuple[str, Path], elsewhere: Fresh
) -> None:
    base, saved = models
    leaf = in_torch(dtype, values(dtype, rows)).requires_grad_()
    weights = np.linspace(1, 2, 4 * rows).reshape(rows, 4)
    RemoteModule(base + dtype)(leaf).backward(in_torch(dtype, weights))
    assert leaf.grad is not None
    x, cotangent = in_tf(dtype, values(dtype, rows)), in_tf(dtype, weights)
    for form, run in IN_PROCESS.items():
        _, found = run(lambda x: remote_op(base + dtype, x), x, cotangent)
        assert (form, found.dtype.name, bits(found)) == (form, dtype, bits(leaf.grad))
    _, (found,) = elsewhere.run(saved, dtype, x, cotangents=[cotangent])
    assert (found.dtype.name, bits(found)) == (dtype, bits(leaf.grad))


def test_several_inputs_and_outputs_have_the_same_gradients_as_in_torch(models: tuple[str, Path]) -> None:
    a, b = np.float32([[1, 2, 3, 4]]), np.float32([[0.5, 1.5, 2.5, 3.5]])
    leaves = [torch.from_numpy(array).requires_grad_() for array in (a, b)]
    product, total = RemoteModule(f"{models[0]}pair")(*leaves)
    (product.sum() + 3 * total.sum()).backward()
    inputs = [tf.constant(a), tf.constant(b)]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        found = remote_op_multi(f"{models[0]}pair", inputs)
        loss = tf.reduce_sum(found[0]) + 3 * tf.reduce_sum(found[1])
    assert [*map(bits, found)] == [bits(product), bits(total)]
    assert [*map(bits, tape.gradient(loss, inputs))] == [bits(leaf.grad) for leaf in leaves]


# --------------------------------------------------------------------------- the same faults, under the same names

SIGNATURE = Signature(
    inputs=(TensorSpec("x", "float32", (-1, 4), differentiable=True),), outputs=(TensorSpec("y", "float32", (-1, 4)),)
)
HTML = b"<html><h1>Bad gateway</h1></html>"
Action = Callable[[Conversation], None]


def answer(*parts: Any) -> Action:
    return lambda conversation: conversation.answer(*parts)


def end(conversation: Conversation) -> None:
    """Half an answer, and the end of the connection."""
    conversation.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(OK), OK[:20])
    conversation.hang_up()


def ignore(conversation: Conversation) -> None:
    """No answer at all."""


# name: what the server does, the class in tensorflow, the class in errors.py.
FAULTS: dict[str, tuple[Action, str, str]] = {
    "400": (answer(encode_error(3, "bad"), "400 Bad Request"), "InvalidArgumentError", "InvalidRequest"),
    "400-text": (
        answer(b"bad", "400 Bad Request", "Content-Type: text/plain"),
        "InvalidArgumentError",
        "InvalidRequest",
    ),
    "401": (answer(b"", "401 Unauthorized"), "UnauthenticatedError", "BadStatus"),
    "403": (answer(b"", "403 Forbidden"), "PermissionDeniedError", "BadStatus"),
    "404": (answer(encode_error(5, "who?"), "404 Not Found"), "NotFoundError", "ModelNotFound"),
    "404-text": (answer(b"", "404 Not Found"), "NotFoundError", "BadStatus"),
    "429": (answer(encode_error(8, "full"), "429 Too Many"), "ResourceExhaustedError", "Overloaded"),
    "429-text": (answer(b"", "429 Too Many"), "ResourceExhaustedError", "Overloaded"),
    "500": (answer(encode_error(13, "oh"), "500 Error"), "InternalError", "InternalError"),
    "501": (answer(encode_error(12, "no gradient"), "501 No"), "UnimplementedError", "NotDifferentiable"),
    "502-html": (answer(HTML, "502 Bad Gateway", "Content-Type: text/html"), "UnavailableError", "ModelUnavailable"),
    "503": (answer(encode_error(14, "loading"), "503 Unavailable"), "UnavailableError", "ModelUnavailable"),
    "503-text": (answer(b"", "503 Unavailable"), "UnavailableError", "ModelUnavailable"),
    "504": (answer(encode_error(4, "late"), "504 Gateway Timeout"), "DeadlineExceededError", "DeadlineExceeded"),
    "504-text": (answer(b"", "504 Gateway Timeout"), "DeadlineExceededError", "DeadlineExceeded"),
    "html": (answer(HTML, "200 OK", "Content-Type: text/html"), "InternalError", "BadStatus"),
    "empty": (answer(), "InternalError", "BadStatus"),
    "moved": (answer(b"", "307 Moved", "Location: http://elsewhere/m"), "InternalError", "BadStatus"),
    "dtype": (answer(b"".join(encode_response([X.astype("f8")]))), "InternalError", "InternalError"),
    "shape": (answer(b"".join(encode_response([X[:, :3]]))), "InternalError", "InternalError"),
    "count": (answer(b"".join(encode_response([X, X]))), "InternalError", "InternalError"),
    "cut": (answer(OK[:-1]), "InternalError", "DecodeError"),
    "ended": (end, "UnavailableError", "ConnectionLost"),
    "reset": (Conversation.reset, "UnavailableError", "ConnectionLost"),
    "silent": (ignore, "DeadlineExceededError", "DeadlineExceeded"),
}
REFUSED = ("refused", "UnavailableError", "ConnectError")
FAULT_NAMES = [*FAULTS, REFUSED[0]]


def options_of(name: str) -> dict[str, Any]:
    return {"timeout_s": 0.4 if name == "silent" else 10.0}


class Faulty:
    """A server with a fault at each path, the calls that came there, and a SavedModel that calls each."""

    def __init__(self, folder: Path, running: Peer, refusing: str) -> None:
        self.calls: Counter[str] = Counter()
        self._urls = {name: f"{running.url}/{name}" for name in FAULTS} | {REFUSED[0]: refusing}
        functions = {name: (self.call(name), tf.TensorSpec((None, 4))) for name in FAULT_NAMES}
        self.saved = save(folder, functions)

    def url(self, name: str) -> str:
        return self._urls[name]

    def call(self, name: str) -> Callable[[Any], Any]:
        return lambda x: ask(self.url(name), x, **options_of(name))


def path_of(request: Message) -> str:
    return request.first_line.split()[1].rpartition("/")[2]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    metadata, made = graphpipe.encode_metadata(SIGNATURE), []

    def script(conversation: Conversation) -> None:
        while (request := conversation.read()) is not None:
            if request.body == graphpipe.METADATA_REQUEST:
                conversation.answer(metadata)
                continue
            made[0].calls[path_of(request)] += 1
            FAULTS[path_of(request)][0](conversation)

    with socket.socket() as taken, peer(script) as running:
        taken.bind(("127.0.0.1", 0))
        refusing = f"http://127.0.0.1:{taken.getsockname()[1]}/m"
        made.append(Faulty(tmp_path_factory.mktemp("faulty") / "saved", running, refusing))
        yield made[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAULT_NAMES)
def test_a_fault_is_the_same_error_in_every_form(name: str, form: str, faulty: Faulty, elsewhere: Fresh) -> None:
    expected = REFUSED[1] if name == REFUSED[0] else FAULTS[name][1]
    call: Callable[[Any], Any] = (
        functools.partial(IN_PROCESS[form], faulty.call(name))
        if form != "saved"
        else (functools.partial(elsewhere.run, faulty.saved, name))
    )
    with pytest.raises(tf.errors.OpError) as caught:
        call(tf.constant(X))
    assert type(caught.value).__name__ == expected, caught.value.message
    assert faulty.url(name) in caught.value.message


@pytest.mark.parametrize("name", FAULT_NAMES)
def test_a_fault_is_the_class_of_the_same_meaning_in_torch(name: str, faulty: Faulty) -> None:
    expected = REFUSED[2] if name == REFUSED[0] else FAULTS[name][2]
    with pytest.raises(errors.RemoteOpsError) as caught:
        RemoteModule(faulty.url(name), **options_of(name))(torch.from_numpy(X))
    assert type(caught.value).__name__ == expected, caught.value
    assert faulty.url(name) in str(caught.value)


def test_a_missing_gradient_is_an_error_of_the_same_kind(elsewhere: Fresh, tmp_path: Path) -> None:
    plain = FunctionServable(lambda x: x, [TensorSpec("x", "float32", (-1, 4))], SIGNATURE.outputs)
    with server_ref.running({"plain": plain}) as url:
        saved = save(tmp_path / "saved", {"f": (lambda x: remote_op(url, x), loosened(X))})
        leaf = torch.from_numpy(X).requires_grad_()
        with pytest.raises(errors.NotDifferentiable):
            RemoteModule(url)(leaf).sum().backward()
        for run in IN_PROCESS.values():
            with pytest.raises(tf.errors.UnimplementedError, match="gives no gradient"):
                run(lambda x: remote_op(url, x), tf.constant(X), tf.constant(X))
        with pytest.raises(tf.errors.UnimplementedError, match="gives no gradient"):
            elsewhere.run(saved, "f", tf.constant(X), cotangents=[tf.constant(X)])


# --------------------------------------------------------------------------- time


def silent(conversation: Conversation) -> None:
    while conversation.read() is not None:
        pass


@pytest.mark.parametrize("form", IN_PROCESS)
def test_a_peer_that_never_answers_costs_the_timeout_and_no_more(form: str) -> None:
    with peer(silent) as server:
        since = time.monotonic()
        with pytest.raises(tf.errors.DeadlineExceededError):
            IN_PROCESS[form](lambda x: ask(server.url, x, timeout_s=0.3), tf.constant(X))
        assert time.monotonic() - since < 5


def test_metadata_that_never_comes_costs_the_timeout_and_no_more() -> None:
    with peer(silent) as server:
        for call in (lambda x: remote_op(server.url, x, timeout_s=0.3), RemoteModule(server.url, timeout_s=0.3)):
            since = time.monotonic()
            with pytest.raises(errors.DeadlineExceeded, match=server.url):
                call(torch.from_numpy(X) if isinstance(call, RemoteModule) else tf.constant(X))
            assert time.monotonic() - since < 5


def test_an_error_while_a_function_is_traced_keeps_its_class() -> None:
    function = tf.function(lambda x: remote_op("ftp://gpu1/m", x))
    with pytest.raises(errors.SpecError):
        function(tf.constant(X))


# --------------------------------------------------------------------------- how often


def failing_twice(fault: Action, seen: list[Message]) -> Callable[[Conversation], None]:
    """The first two requests meet the fault, the others are answered."""

    def script(conversation: Conversation) -> None:
        while (request := conversation.read()) is not None:
            seen.append(request)
            (fault if len(seen) <= 2 else answer(OK))(conversation)

    return script


def reset_midway(conversation: Conversation) -> None:
    """Half an answer, and a TCP reset."""
    conversation.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(OK), OK[:20])
    conversation.reset()


PASSING: dict[str, Action] = {
    "503": FAULTS["503-text"][0],
    "loading": FAULTS["503"][0],
    "full": FAULTS["429"][0],
    "502": FAULTS["502-html"][0],
    "reset": Conversation.reset,
    "reset mid-body": reset_midway,
    "hung up": Conversation.hang_up,
}
LASTING = ("400", "400-text", "404", "500", "501", "504", "html", "dtype", "shape", "cut")


@pytest.mark.parametrize("form", ["eager", "function"])
@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_until_it_works_and_once_where_one_attempt_is_allowed(fault: str, form: str) -> None:
    run = IN_PROCESS[form]
    for retry, calls in ((Retry(), 3), (Retry(attempts=2), 2), (ONE, 1), (Retry(idempotent=False), 1)):
        seen: list[Message] = []
        with peer(failing_twice(PASSING[fault], seen)) as server:
            call = lambda x, url=server.url, retry=retry: ask(url, x, retry=retry)  # noqa: E731
            if calls == 3:
                assert bits(run(call, tf.constant(X))[0]) == bits(X)
            else:
                with pytest.raises(tf.errors.OpError):
                    run(call, tf.constant(X))
            assert len(seen) == calls


@pytest.mark.parametrize("form", ["eager", "function"])
@pytest.mark.parametrize("fault", LASTING)
def test_what_lasts_is_tried_once(fault: str, form: str, faulty: Faulty) -> None:
    before = faulty.calls[fault]
    with pytest.raises(tf.errors.OpError):
        IN_PROCESS[form](faulty.call(fault), tf.constant(X))
    assert faulty.calls[fault] - before == 1


def hanging_up(seen: list[Message]) -> Callable[[Conversation], None]:
    """The first request is answered; every later one is read, and then the connection ends."""
    metadata = graphpipe.encode_metadata(SIGNATURE)

    def script(conversation: Conversation) -> None:
        while (request := conversation.read()) is not None:
            if request.body == graphpipe.METADATA_REQUEST:
                conversation.answer(metadata)
                continue
            seen.append(request)
            if len(seen) > 1:
                return
            conversation.answer(OK)

    return script


@pytest.mark.parametrize("form", ["eager", "function"])
def test_what_may_be_sent_once_is_not_sent_again_where_a_kept_connection_ends(form: str) -> None:
    seen: list[Message] = []
    with peer(hanging_up(seen)) as server:
        call = lambda x: ask(server.url, x, retry=ONE)  # noqa: E731
        call = tf.function(call) if form == "function" else call
        assert bits(call(tf.constant(X))) == bits(X)
        with pytest.raises(tf.errors.OpError) as caught:
            call(tf.constant(X))
        assert len(seen) == 2
        assert type(caught.value) is tf.errors.UnavailableError, caught.value.message


def test_a_kept_connection_that_ends_is_tried_as_often_as_by_an_endpoint() -> None:
    counts = []
    for retry in (Retry(attempts=2), Retry(attempts=3)):
        ours: list[Message] = []
        with peer(hanging_up(ours)) as server:
            ask(server.url, retry=retry)
            with pytest.raises(tf.errors.UnavailableError):
                ask(server.url, retry=retry)
        theirs: list[Message] = []
        with peer(hanging_up(theirs)) as server, Endpoint(server.url, retry=retry) as endpoint:
            endpoint(X)
            with pytest.raises(errors.ConnectionLost):
                endpoint(X)
        counts.append((len(ours), len(theirs)))
    assert [ours for ours, _ in counts] == [theirs for _, theirs in counts]


def test_a_server_that_starts_meanwhile_is_found() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # refuses until it listens
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/m"
        with pytest.raises(tf.errors.UnavailableError, match=url):
            ask(url, retry=ONE)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(ask, url, retry=Retry(attempts=50), timeout_s=60.0)
            listener.listen()
            sock, _ = listener.accept()
            conversation = Conversation(sock, 1)
            conversation.read()
            conversation.answer(OK)
            assert bits(waiting.result(30)) == bits(X)
            conversation.hang_up()


def test_a_gradient_is_tried_as_often_as_a_call() -> None:
    seen: list[Message] = []
    with peer(failing_twice(PASSING["503"], seen)) as server:
        with tf.GradientTape() as tape:
            x = tf.constant(X)
            tape.watch(x)
            y = ask(server.url, x)
        assert len(seen) == 3
        seen.clear()
        assert bits(tape.gradient(y, x)) == bits(X)
        assert len(seen) == 3


# --------------------------------------------------------------------------- many calls


def test_a_thousand_calls_of_a_function_in_a_row_share_a_connection() -> None:
    with peer(lambda conversation: _answering(conversation, OK)) as server:
        function = tf.function(lambda x: ask(server.url, x))
        x = tf.constant(X)
        for _ in range(1000):
            function(x)
        assert server.connections <= 2


def _answering(conversation: Conversation, body: bytes) -> None:
    while conversation.read() is not None:
        conversation.answer(body)


@pytest.mark.parametrize("form", ["eager", "function"])
def test_sixteen_threads_get_the_answers_to_their_own_questions(form: str, models: tuple[str, Path]) -> None:
    url = f"{models[0]}int32"
    call = tf.function(lambda x: remote_op(url, x)) if form == "function" else lambda x: remote_op(url, x)

    def hundred(thread: int) -> int:
        return sum(
            call(tf.fill([thread + 1, 4], tf.constant(1000 * thread + n))).numpy().tolist()
            == [[3 * (1000 * thread + n) + 1] * 4] * (thread + 1)
            for n in range(100)
        )

    with ThreadPoolExecutor(16) as pool:
        assert [*pool.map(hundred, range(16))] == [100] * 16


# --------------------------------------------------------------------------- secrets


def test_a_redirect_does_not_take_the_token_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOTE_OPS_TEST_TOKEN", "t0ken-value")
    headers, seen = {"Authorization": "Bearer ${REMOTE_OPS_TEST_TOKEN}"}, []

    def script(conversation: Conversation) -> None:
        while (request := conversation.read()) is not None:
            seen.append(request.headers["authorization"])
            conversation.answer(b"", "307 Temporary Redirect", f"Location: {second.url}")

    with peer(lambda conversation: _answering(conversation, OK)) as second, peer(script) as first:
        for run in IN_PROCESS.values():
            with pytest.raises(tf.errors.InternalError, match=f"moved to '{second.url}'"):
                run(lambda x: ask(first.url, x, headers=headers), tf.constant(X))
        assert set(seen) == {"Bearer t0ken-value"}
        assert second.connections == 0


def test_a_saved_model_holds_the_name_of_a_token_and_not_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMOTE_OPS_TEST_TOKEN", "t0ken-value")
    headers, seen = {"Authorization": "Bearer ${REMOTE_OPS_TEST_TOKEN}"}, []
    metadata = graphpipe.encode_metadata(SIGNATURE)

    def script(conversation: Conversation) -> None:
        while (request := conversation.read()) is not None:
            seen.append(request.headers["authorization"])
            conversation.answer(metadata if request.body == graphpipe.METADATA_REQUEST else OK)

    with peer(script) as server:
        call = lambda x: remote_op(server.url, x, headers=headers)  # noqa: E731
        call(tf.constant(X))
        saved = save(tmp_path / "saved", {"f": (call, loosened(X))})
        written = b"".join(path.read_bytes() for path in saved.rglob("*") if path.is_file())
        assert b"t0ken" not in written
        assert b"${REMOTE_OPS_TEST_TOKEN}" in written
        monkeypatch.setenv("REMOTE_OPS_TEST_TOKEN", "0ther-value")
        tf.saved_model.load(str(saved)).f(tf.constant(X))
        assert seen[-1] == "Bearer 0ther-value"


# --------------------------------------------------------------------------- what stands in a graph


def node_ops(graph: Any) -> set[str]:
    """The operations of a GraphDef and of all its functions."""
    functions = graph.library.function
    return {node.op for node in graph.node} | {node.op for function in functions for node in function.node_def}


def test_no_graph_calls_python(models: tuple[str, Path]) -> None:
    base, saved = models
    graphs = [
        meta.graph_def
        for meta in saved_model_pb2.SavedModel.FromString((saved / "saved_model.pb").read_bytes()).meta_graphs
    ]
    function = tf.function(lambda x: computed(lambda x: remote_op(base + "float32", x), x, x))
    graphs.append(function.get_concrete_function(tf.TensorSpec((None, 4))).graph.as_graph_def())
    data = tf.data.Dataset.from_tensors(X).map(lambda x: remote_op(base + "float32", x), num_parallel_calls=8)
    graphs.append(tf.compat.v1.GraphDef.FromString(data._as_serialized_graph().numpy()))
    for graph in graphs:
        ops = node_ops(graph)
        assert "RemoteOpsInfer" in ops
        assert not [op for op in ops if "PyFunc" in op or "py_func" in op.lower()]


WITHOUT_LIBRARY = "import sys, tensorflow as tf; tf.saved_model.load(sys.argv[1])"


@pytest.mark.slow
def test_without_the_library_loading_names_the_op(models: tuple[str, Path]) -> None:
    done = python(WITHOUT_LIBRARY, str(models[1]))
    assert done.returncode == 1
    assert "Op type not registered 'RemoteOps" in done.stderr


# --------------------------------------------------------------------------- at once


@pytest.fixture
def together() -> Iterator[str]:
    """A model that answers once eight calls are in it, and gives gradients once eight others are; and only then."""
    forward, backward = threading.Barrier(8), threading.Barrier(8)

    def double(x: Any) -> Any:
        forward.wait(20)
        return 2 * x

    def vjp(inputs: Any, cotangents: Any) -> Any:
        backward.wait(20)
        return {"x": 2 * cotangents["y"]}

    model = FunctionServable(double, SIGNATURE.inputs, SIGNATURE.outputs, vjp=vjp)
    model.concurrency = 16  # type: ignore[attr-defined]  # a graph may ask for both at a time
    with server_ref.running({"together": model}) as url:
        yield url


def eight(url: str) -> Callable[[Any], Any]:
    """Eight calls with inputs of their own, and the sum of what they give: 2 (1 + ... + 8) x."""
    return lambda x: tf.add_n([remote_op(url, n * x, retry=ONE, timeout_s=60.0) for n in range(1, 9)])


def with_gradient(url: str) -> Callable[[Any], Any]:
    """The sum of the eight, and its gradient, in one."""
    return lambda x: tf.stack(computed(eight(url), x, tf.ones_like(x)))


def mapped(url: str) -> Callable[[Any], Any]:
    """Eight elements of a dataset, each with one call and its gradient."""

    def one(n: Any) -> Any:
        x = tf.cast(n, tf.float32) * tf.ones((1, 4))
        return tf.stack(computed(lambda x: remote_op(url, x, retry=ONE, timeout_s=60.0), x, tf.ones_like(x)))

    def run(x: Any) -> Any:
        data = tf.data.Dataset.range(1, 9).map(one, num_parallel_calls=8)
        return data.reduce(tf.zeros((2, 1, 4)), lambda total, found: total + found) * tf.reduce_max(x)

    return run


def test_eight_branches_go_forward_at_once_and_backward_at_once(together: str) -> None:
    x = tf.constant(X)
    y, gradient = computed(tf.function(eight(together)), x, tf.ones_like(x))
    np.testing.assert_allclose(y, 72 * X, rtol=1e-6)
    np.testing.assert_array_equal(gradient, np.full_like(X, 72))
    both = tf.function(with_gradient(together))(x)
    np.testing.assert_allclose(both, [72 * X, np.full_like(X, 72)], rtol=1e-6)


def test_a_dataset_maps_eight_gradients_at_once(together: str) -> None:
    total = mapped(together)(tf.constant(1.0))
    assert total.numpy().tolist() == [[[72.0] * 4], [[16.0] * 4]]


@pytest.mark.slow
def test_two_threads_are_enough_for_eight_calls_at_once(together: str, tmp_path: Path) -> None:
    spec = tf.TensorSpec((None, 4))
    functions = {"eight": eight(together), "both": with_gradient(together), "mapped": mapped(together)}
    saved = save(tmp_path / "saved", {name: (call, spec) for name, call in functions.items()})
    ones = tf.ones((1, 4))
    with fresh(threads=2) as process:
        (y,), (gradient,) = process.run(saved, "eight", ones, cotangents=[ones])
        assert y.numpy().tolist() == gradient.numpy().tolist() == [[72.0] * 4]
        (both,), _ = process.run(saved, "both", ones)
        assert both.numpy().tolist() == [[[72.0] * 4]] * 2
        (total,), _ = process.run(saved, "mapped", ones)
        assert total.numpy().tolist() == [[[72.0] * 4], [[16.0] * 4]]


# --------------------------------------------------------------------------- as often as it says


def test_a_saved_call_with_constant_inputs_is_made_every_time(elsewhere: Fresh, tmp_path: Path) -> None:
    seen: list[Message] = []

    def script(conversation: Conversation) -> None:
        while (request := conversation.read()) is not None:
            seen.append(request)
            conversation.answer(OK)

    with peer(script) as server:
        twice = lambda: ask(server.url, tf.constant(X)) + ask(server.url, tf.constant(X))  # noqa: E731
        saved = save(tmp_path / "saved", {"twice": (twice, None)})
        seen.clear()
        for _ in range(3):
            assert bits(elsewhere.run(saved, "twice")[0][0]) == bits(X + X)
        assert len(seen) == 6


# --------------------------------------------------------------------------- nothing stays behind


def held() -> tuple[int, int]:
    """How many files and threads this process has."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


@pytest.mark.slow
def test_a_thousand_calls_given_up_leave_no_file_no_thread_and_no_memory_behind() -> None:
    large = tf.ones((64, 1024))  # 256 KiB: a thousand of them would be seen

    def slow(conversation: Conversation) -> None:
        with contextlib.suppress(OSError):
            while conversation.read() is not None:
                time.sleep(0.001)
                conversation.answer(OK)

    with peer(slow) as server:
        function = tf.function(lambda x: ask(server.url, x)).get_concrete_function(large)

        def give_up(calls: int) -> int:
            cancelled = 0
            for n in range(calls):
                manager = cancellation.CancellationManager()
                run = manager.get_cancelable_function(function)
                timer = threading.Timer((n % 40) / 1e4, manager.start_cancel)
                timer.start()
                try:
                    run(large)
                except tf.errors.CancelledError:
                    cancelled += 1
                timer.join()
            return cancelled

        give_up(200)
        assert until(lambda: server.open <= 4)
        gc.collect()
        files, threads = held()
        memory = resident()
        assert give_up(1000) > 100
        assert until(lambda: server.open <= 4)
        gc.collect()
        assert until(lambda: held()[0] <= files + 16), (held(), files)
        assert until(lambda: held()[1] <= threads + 4), (held(), threads)
        assert resident() - memory < 64 * 2**20


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# --------------------------------------------------------------------------- the servers of 2018

REPLIES = [
    entry for entry in json.loads((CAPTURES / "manifest.json").read_text()) if entry.get("message") == "InferResponse"
]


@pytest.mark.parametrize("entry", REPLIES, ids=lambda entry: entry["file"])
def test_an_answer_of_a_server_of_2018_is_what_it_said(entry: dict[str, Any]) -> None:
    recorded = (CAPTURES / entry["file"]).read_bytes()
    (said,) = entry["output_tensors"]
    dtype = tf.string if said["type"] == "String" else tf.as_dtype(said["type"])
    with peer(lambda conversation: _answering(conversation, recorded)) as server:
        call = lambda x: remote_op(server.url, x, "x", "y", dtype, said["shape"])  # noqa: E731
        for run in IN_PROCESS.values():
            found, _ = run(call, tf.constant(X))
            assert found.shape.as_list() == said["shape"]
            if dtype == tf.string:
                expected = [base64.b64decode(value) for value in said["values_base64"]]
                assert [value.rstrip(b"\0") for value in found.numpy().tolist()] == expected
            else:
                assert found.numpy().tobytes() == base64.b64decode(said["data_base64"])


def test_the_metadata_of_a_server_of_2018_are_enough_for_a_call() -> None:
    metadata = (CAPTURES / "replymeta-go.bin").read_bytes()
    asked: list[Any] = []

    def script(conversation: Conversation) -> None:
        while (request := conversation.read()) is not None:
            message = graphpipe.decode_request(request.body)
            if isinstance(message, graphpipe.MetadataRequest):
                conversation.answer(metadata)
            else:
                asked.append(message)
                conversation.answer(b"".join(encode_response(message.tensors)))

    a, b = tf.constant([[1.0, 2, 3]]), tf.constant([4], tf.int64)
    with peer(script) as server:
        found = remote_op_multi(server.url, [a, b])
    assert [*map(bits, found)] == [bits(a), bits(b)]
    assert (asked[-1].input_names, asked[-1].output_names) == (("a", "b"), ("a", "b"))
