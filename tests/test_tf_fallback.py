"""The call without a compiled op: the same answers, the same errors, and one warning of what it cannot do."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rawoip import Model, doubling, sides
from rawpeer import Conversation, Message, peer, unreachable
from tfpeer import FAULTS, MATRIX, OK, ONE, ROOT, X, answering, models

import server_ref
from remote_ops import FunctionServable, TensorSpec
from remote_ops.graphpipe import decode_request

tf = pytest.importorskip("tensorflow")

from tfforms import VALUES  # noqa: E402

from remote_ops.tf import callsite, fallback  # noqa: E402
from remote_ops.tf.callsite import Ask  # noqa: E402
from remote_ops.tf.fallback import FallbackWarning  # noqa: E402
from remote_ops.tf.ops import Client, remote_op, remote_op_multi  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::remote_ops.tf.fallback.FallbackWarning")


def ask(client: Client, x: Any = X, dtype: Any = tf.float32, shape: Any = None, **options: Any) -> Any:
    """One call of an input x for an output y."""
    values = [tf.convert_to_tensor(x)]
    options = {"timeout_s": client.timeout_s, **options}
    found = fallback.call(client, Ask(values, ["x"], ["y"], [dtype], [tf.TensorShape(shape)], **options))
    return found if "on_error" in options else found[0][0]


@pytest.fixture(scope="module")
def served() -> Iterator[Callable[[str], str]]:
    with server_ref.running(models()) as base:
        yield lambda name: f"{base}{name}"


@pytest.fixture
def in_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `remote_op` call the fallback."""
    monkeypatch.setattr(callsite, "has_kernel", lambda: False)


# --------------------------------------------------------------------------- answers


def test_a_call_gives_what_the_model_gives_in_eager_mode_and_in_a_function(served: Callable[[str], str]) -> None:
    client = Client((served("mix"),))
    for pure in (True, False):
        call = functools.partial(ask, client, shape=[None, 4], pure=pure)
        function = tf.function(call)
        for run in (call, function):
            np.testing.assert_allclose(run(tf.constant(X)), np.sin(X) @ MATRIX, rtol=1e-6)
        concrete = function.get_concrete_function(tf.TensorSpec((None, 4)))
        assert concrete.output_shapes.as_list() == [None, 4]
        assert concrete(tf.constant(X[:2])).shape == (2, 4)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value.dtype.name)
def test_every_kind_of_tensor_comes_back_as_it_went(served: Callable[[str], str], value: Any) -> None:
    call = functools.partial(ask, Client((served(value.dtype.name),)), dtype=value.dtype, shape=[None])
    for run in (call, tf.function(call)):
        got = run(value)
        assert got.dtype == value.dtype
        assert repr(got.numpy().tolist()) == repr(value.numpy().tolist())


def test_scalars_and_strings_with_nuls_go_as_they_are() -> None:
    seen: list[Message] = []
    with peer(answering(OK, seen=seen)) as server:

        def run(number: Any, text: Any) -> Any:
            values = [number, text]
            asked = Ask(values, ["n", "s"], ["y"], [tf.float32], [tf.TensorShape(None)], b"cfg\0")
            return fallback.call(Client((server.url,)), asked)[0]

        for call in (run, tf.function(run)):
            call(tf.constant(3, tf.int64), tf.constant(b"a\0b\0\0"))
            request = decode_request(seen.pop().body)
            assert [tensor.tolist() for tensor in request.tensors] == [3, b"a\0b\0\0"]  # type: ignore[union-attr]
            assert request.config == b"cfg\0"  # type: ignore[union-attr]


def test_gradients_come_over_the_wire_in_eager_mode_and_in_a_function(
    served: Callable[[str], str], in_ops: None
) -> None:
    def loss(x: Any) -> Any:
        return tf.reduce_sum(remote_op(served("mix"), x) ** 2)

    expected = (2 * (np.sin(X) @ MATRIX)) @ MATRIX.T * np.cos(X)
    for call in (loss, tf.function(loss)):
        x = tf.constant(X)
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = call(x)
        np.testing.assert_allclose(tape.gradient(value, x), expected, rtol=1e-5)
    x, n, w = tf.constant([1.0, 2.0]), tf.constant(3, tf.int64), tf.constant([5.0, 7.0])
    with tf.GradientTape() as tape:
        tape.watch([x, w])
        product, _ = remote_op_multi(served("scaled"), [x, n, w])
    gradients = tape.gradient(product, [x, n, w])
    assert (gradients[0].numpy().tolist(), gradients[1], gradients[2].numpy().tolist()) == ([3, 3], None, [0, 0])


def test_a_model_without_gradients_says_so(in_ops: None) -> None:
    plain = FunctionServable(lambda x: x, [TensorSpec("x", "float32", (-1,))], [TensorSpec("y", "float32", (-1,))])
    with server_ref.running({"plain": plain}) as url, tf.GradientTape() as tape:
        x = tf.constant([1.0])
        tape.watch(x)
        y = remote_op(url, x)
        with pytest.raises(tf.errors.UnimplementedError, match="gives no gradient"):
            tape.gradient(y, x)


def test_a_second_derivative_is_a_named_error(served: Callable[[str], str], in_ops: None) -> None:
    def twice(x: Any) -> Any:
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = remote_op(served("mix"), x)
            gradient = inner.gradient(y, x)
        return outer.gradient(gradient, x)

    for call in (twice, tf.function(twice)):
        with pytest.raises(Exception, match="no second derivative"):
            call(tf.constant(X))


# --------------------------------------------------------------------------- how often, and at once


def test_calls_are_made_as_often_as_the_compiled_op_makes_them() -> None:
    seen: list[Message] = []
    with peer(answering(OK, seen=seen)) as server:
        client = Client((server.url,))
        constant = tf.function(lambda: ask(client, tf.constant(X)))
        for _ in range(3):
            constant()
        assert len(seen) == 3
        for pure, calls in ((True, 2), (False, 3)):
            seen.clear()

            @tf.function
            def function(x: Any, pure: bool = pure) -> Any:
                ask(client, x, pure=pure)
                return ask(client, x, pure=pure) + ask(client, x, pure=pure)

            function(tf.constant(X))
            assert len(seen) == calls


def test_threads_and_datasets_call_at_once() -> None:
    together = threading.Barrier(4)

    def script(conversation: Conversation) -> None:
        while conversation.read() is not None:
            together.wait(10)
            conversation.answer(OK)

    with peer(script) as server:
        client = Client((server.url,), retry=ONE)
        threads = [threading.Thread(target=ask, args=(client,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    with peer(answering(OK)) as server:
        client = Client((server.url,), retry=ONE)
        data = tf.data.Dataset.range(8).map(lambda n: ask(client), num_parallel_calls=4)
        assert [y.shape for y in data] == [(3, 4)] * 8
        for _ in range(100):
            ask(client)
        assert server.connections <= 4


# --------------------------------------------------------------------------- faults


@pytest.mark.parametrize(("answer", "error", "words", "calls"), [row[1:] for row in FAULTS],
                         ids=[row[0] for row in FAULTS])  # fmt: skip
def test_every_fault_is_the_error_that_the_compiled_op_raises(
    answer: tuple[Any, ...], error: str, words: str, calls: int
) -> None:
    seen: list[Message] = []
    with peer(answering(*answer, seen=seen)) as server:
        client = Client((f"{server.url}?key=secret",))
        for pure in (True, False):
            call = functools.partial(ask, client, pure=pure)
            for run in (call, tf.function(call)):
                seen.clear()
                with pytest.raises(tf.errors.OpError, match=words) as caught:
                    run()
                assert type(caught.value).__name__ == error
                assert server.url in caught.value.message
                assert "secret" not in caught.value.message
                assert len(seen) == calls


def test_nobody_there_is_unavailable_in_a_dataset_too() -> None:
    client = Client(("http://127.0.0.1:1/m",), retry=ONE)
    with pytest.raises(tf.errors.UnavailableError, match=r"127\.0\.0\.1:1/m"):
        ask(client)
    with pytest.raises(tf.errors.UnavailableError, match=r"127\.0\.0\.1:1/m"):
        list(tf.data.Dataset.range(2).map(lambda n: ask(client)))


def test_a_deadline_holds() -> None:
    with unreachable() as url:
        for run in (ask, tf.function(ask)):
            since = time.monotonic()
            with pytest.raises(tf.errors.DeadlineExceededError, match=url):
                run(Client((url,), timeout_s=0.25))
            assert time.monotonic() - since < 2


def test_a_wrong_output_and_complex_numbers_are_refused() -> None:
    with peer(answering(OK)) as server:
        words = r"output 'y': expected float32 \[-1, 5\], got float32 \[3, 4\]"
        with pytest.raises(tf.errors.InternalError, match=words):
            ask(Client((server.url,)), shape=[None, 5])
        with pytest.raises(
            tf.errors.InvalidArgumentError, match="input 'x' is complex64, which has no form on the wire"
        ):
            ask(Client((server.url,)), tf.complex(X, X))


def test_a_fault_can_be_told_by_its_code_and_fills_the_outputs_as_the_compiled_op_does(in_ops: None) -> None:
    nobody = "http://127.0.0.1:1/m"
    for dtype, shape, filled in (
        (tf.float32, [None, 2], [[np.nan] * 2] * 3),
        (tf.bfloat16, [2], [np.nan] * 2),
        (tf.string, [2], [b"", b""]),
        (tf.int64, [1, None], [[]]),
        (tf.bool, None, False),
    ):
        call = functools.partial(remote_op, nobody, input_name="x", output_name="y", output_type=dtype,
                                 output_shape=shape, on_error="status", retry=ONE)  # fmt: skip
        for run in (call, tf.function(call)):
            output, status = run(tf.constant(X))
            np.testing.assert_array_equal(output.numpy().astype(output.dtype.as_numpy_dtype).tolist(), filled)
            assert (int(status.code), status.code.dtype) == (14, tf.int32)
            assert b"127.0.0.1:1/m" in status.message.numpy()
    with peer(answering(OK)) as server:
        output, status = tf.function(lambda x: remote_op(server.url, x, "x", "y", tf.float32, on_error="status"))(X)
        assert (output.numpy().tolist(), int(status.code), status.message.numpy()) == (X.tolist(), 0, b"")


def test_a_timeout_may_be_a_tensor(in_ops: None) -> None:
    with unreachable() as url:

        @tf.function
        def function(x: Any, timeout_s: Any) -> Any:
            return remote_op(url, x, "x", "y", tf.float32, timeout_s=timeout_s)

        since = time.monotonic()
        with pytest.raises(tf.errors.DeadlineExceededError, match=url):
            function(tf.constant(X), tf.constant(0.25))
        assert time.monotonic() - since < 5


def test_a_header_is_read_from_the_environment_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Message] = []
    with peer(answering(OK, seen=seen)) as server:
        client = Client((server.url,), (("Authorization", "Bearer ${REMOTE_OPS_TEST_TOKEN}"),))
        function = tf.function(lambda: ask(client))
        for token in ("first", "second"):
            monkeypatch.setenv("REMOTE_OPS_TEST_TOKEN", token)
            function()
            assert seen[-1].headers["authorization"] == f"Bearer {token}"
        monkeypatch.delenv("REMOTE_OPS_TEST_TOKEN")
        with pytest.raises(tf.errors.InvalidArgumentError, match="REMOTE_OPS_TEST_TOKEN, which is not set"):
            function()


# --------------------------------------------------------------------------- the warning


def test_it_says_once_what_it_cannot_do() -> None:
    fallback._warn.cache_clear()
    with peer(answering(OK)) as server, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            ask(Client((server.url,)))
    (warning,) = [one for one in caught if one.category is FallbackWarning]
    for words in ("no C++ compiler", "SavedModel", "one or two at a time", "install g++", "remote_ops.tf.build"):
        assert words in str(warning.message)


@pytest.mark.slow
def test_a_process_without_a_compiler_calls_all_the_same(served: Callable[[str], str], tmp_path: Path) -> None:
    code = (
        "import sys, tensorflow as tf; from remote_ops.tf import remote_op\n"
        "y = tf.function(lambda x: remote_op(sys.argv[1], x))(tf.ones([2, 4])); print(y.shape)"
    )
    environment = {**os.environ, "REMOTE_OPS_CACHE": str(tmp_path), "CXX": "no-such-compiler"}
    done = subprocess.run(
        [sys.executable, "-c", code, served("mix")],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "(2, 4)", done.stderr[-2000:]
    assert done.stderr.count("FallbackWarning") == 1


# --------------------------------------------------------------------------- the Open Inference Protocol


def test_a_model_of_the_open_inference_protocol_is_called_by_python_code(monkeypatch: pytest.MonkeyPatch) -> None:
    fallback._warn.cache_clear()
    with (
        peer(Model(sides("FP32", differentiable=True), doubling)) as server,
        warnings.catch_warnings(record=True) as told,
    ):
        warnings.simplefilter("always")
        url = server.url.removesuffix("/m") + "/v2/models/m"
        monkeypatch.setenv("REMOTE_OPS_TEST_URL", url)
        x = tf.ones([3, 2])
        for where in ({"uri": url}, {"uri": None, "endpoint": "REMOTE_OPS_TEST_URL"}):
            for call in (remote_op, tf.function(remote_op)):
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    y = call(inp=x, **where)
                assert y.numpy().tolist() == [[2, 2]] * 3
                assert tape.gradient(y, x).numpy().tolist() == [[2, 2]] * 3
    (warning,) = [one for one in told if one.category is FallbackWarning]
    for words in ("the compiled op speaks GraphPipe", "SavedModel", "server_ref.serve"):
        assert words in str(warning.message)
