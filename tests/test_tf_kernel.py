"""The TensorFlow kernel: right answers, the right error for every fault, in time, side by side, and never twice."""

from __future__ import annotations

import contextlib
import email.utils
import functools
import gc
import json
import math
import os
import random
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
from rawpeer import Conversation, Message, peer, serving, unreachable, until
from test_hostile import Layout
from tfpeer import FAULTS, MATRIX, OK, ONE, ROOT, Script, X, answering, mix, models, python

import server_ref
from remote_ops import FunctionServable, Retry, SignatureError, SpecError, TensorSpec
from remote_ops.deadline import deadline
from remote_ops.errors import DeadlineExceeded, NotDifferentiable
from remote_ops.graphpipe import METADATA_REQUEST, decode_request, encode_error, encode_metadata, encode_response
from remote_ops.policy import Budget
from remote_ops.url import TLS

tf = pytest.importorskip("tensorflow")

from tensorflow.python.eager import cancellation  # noqa: E402
from tensorflow.python.framework import op_def_registry  # noqa: E402
from tfforms import VALUES  # noqa: E402

from remote_ops.tf import client, op_library, ops, rawop, remote_op, remote_op_multi  # noqa: E402
from remote_ops.tf.callsite import Ask  # noqa: E402
from remote_ops.tf.library import CompilerMissing  # noqa: E402

UNAVAILABLE, EXHAUSTED = tf.errors.UNAVAILABLE, tf.errors.RESOURCE_EXHAUSTED


def ask(url: Any, x: Any = X, **options: Any) -> Any:
    """One call that fetches no metadata: float32 in, float32 out."""
    return remote_op(url, tf.convert_to_tensor(x), "x", "y", tf.float32, None, **{"timeout_s": 10.0, **options})


def failure(url: Any, *, graph: bool = False, **options: Any) -> tuple[int, str]:
    """The code and the words of a call, as they are: what is raised has words of TensorFlow around them."""
    _, status = (tf.function(ask) if graph else ask)(url, on_error="status", **options)
    return int(status.code), status.message.numpy().decode()


# --------------------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def served() -> Iterator[Callable[[str], str]]:
    with server_ref.running(models()) as base:
        yield lambda name: f"{base}{name}"


def test_a_call_gives_what_the_model_gives_in_eager_mode_and_in_a_function(served: Callable[[str], str]) -> None:
    @tf.function
    def function(x: Any) -> Any:
        return remote_op(served("mix"), x)

    for call in (lambda x: remote_op(served("mix"), x), function):
        np.testing.assert_allclose(call(tf.constant(X)), np.sin(X) @ MATRIX, rtol=1e-6)
    shape = function.get_concrete_function(tf.TensorSpec((None, 4))).output_shapes
    assert shape.as_list() == [None, 4]


def test_several_inputs_and_outputs_go_by_their_names(served: Callable[[str], str]) -> None:
    x, w = np.float32([1, 2]), np.float32([5, 7])
    total, product = remote_op_multi(served("scaled"), [w, x, 3], ["w", "x", "n"], ["total", "product"])
    assert total.numpy().tolist() == [6, 9]
    assert product.numpy().tolist() == [3, 6]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value.dtype.name)
def test_every_kind_of_tensor_comes_back_as_it_went(served: Callable[[str], str], value: Any) -> None:
    got = remote_op(served(value.dtype.name), value)
    assert got.dtype == value.dtype
    assert got.numpy().tobytes() == value.numpy().tobytes() if value.dtype != tf.string else True
    assert got.numpy().tolist() == value.numpy().tolist() or value.dtype == tf.float16


LARGE = np.arange(64 << 20, dtype=np.uint8)  # 64 MiB

PEAK = """
import resource, sys, numpy as np, tensorflow as tf
from remote_ops.tf.ops import remote_op
def call(): return remote_op(sys.argv[1], np.zeros(1, np.float32), "x", "y", tf.uint8, [None])
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
first = call()  # of a byte: all that is loaded later is loaded
fill = np.ones(256 << 20, np.uint8); del fill
before, large = peak(), None
fill = np.ones(256 << 20, np.uint8)  # as much as before: what comes on top is the answer's
large = call()
print((peak() - before) / large.shape[0], large.shape[0], int(large[-1]))
"""


@pytest.mark.slow
def test_an_answer_is_in_memory_once() -> None:
    def script(conversation: Conversation) -> None:
        while conversation.read() is not None:
            conversation.answer(answers.pop(0))

    answers = [b"".join(encode_response([array])) for array in (LARGE[:1], LARGE)]
    with peer(script) as server:
        done = python(PEAK, server.url)
    times, size, last = map(float, done.stdout.split())
    assert (size, last) == (LARGE.size, 255), done.stderr[-2000:]
    assert times < 1.4, f"{times:.2f} times the answer"


def test_outputs_that_share_bytes_are_not_each_others_memory() -> None:
    layout = Layout()
    slots = layout.offsets(layout.table(0, 8, 4) + 4, 2)
    tensor = layout.table(slots[0], 20, 16, 4, 8, 0)
    layout.point(slots[1], tensor)
    layout.bytes[tensor + 16] = 10
    layout.shape(tensor + 4, 16384)
    layout.bytes += bytes(-(len(layout.bytes) + 4) % 64)  # where it could be a tensor as it is
    layout.data(tensor + 8, np.full(16384, 7, np.float32).tobytes())

    @tf.function
    def function(x: Any) -> Any:
        a, b = remote_op_multi(server.url, [x], ["x"], ["a", "b"], [tf.float32] * 2, [[16384]] * 2)
        changed = tf.sqrt(a)  # TensorFlow may write this over `a`
        with tf.control_dependencies([changed]):
            return changed, tf.identity(b)

    with peer(answering(bytes(layout.bytes))) as server:
        changed, b = function(tf.constant(X))
    np.testing.assert_allclose(changed, np.full(16384, np.sqrt(7)), rtol=1e-6)
    np.testing.assert_array_equal(b, np.full(16384, 7))


def test_float32_stands_in_for_bfloat16_where_an_old_peer_has_none() -> None:
    with peer(answering(b"".join(encode_response([np.float32([1.5, 2.5])])))) as old:
        got = remote_op(old.url, X, "x", "y", tf.bfloat16, [2])
    assert got.dtype == tf.bfloat16
    assert tf.cast(got, tf.float32).numpy().tolist() == [1.5, 2.5]


def test_the_request_is_the_one_that_graphpipe_reads() -> None:
    seen: list[Message] = []

    def script(conversation: Conversation) -> None:
        while (request := conversation.read()) is not None:
            seen.append(request)
            conversation.answer(OK)

    with peer(script) as server:
        remote_op_multi(
            f"{server.url}/a%20b?key=1", [X, np.int64(3), tf.constant(["a\0"])], ["x", "n", "s"], ["y"],
            [tf.float32], [[3, 4]], b"cfg\0",
        )  # fmt: skip
    request = decode_request(seen[0].body)
    assert request.config == b"cfg\0"  # type: ignore[union-attr]
    assert request.input_names == ("x", "n", "s")  # type: ignore[union-attr]
    assert [tensor.tolist() for tensor in request.tensors] == [X.tolist(), 3, [b"a\0"]]  # type: ignore[union-attr]
    assert seen[0].first_line == "POST /m/a%20b?key=1 HTTP/1.1"
    assert seen[0].headers["content-type"] == "application/octet-stream"
    assert 9_000 < int(seen[0].headers["x-request-timeout-ms"]) <= 30_000
    assert "expect" not in seen[0].headers


@pytest.mark.parametrize("retry", [Retry(), ONE])
def test_a_thousand_calls_in_a_row_share_a_connection(retry: Retry) -> None:
    with peer(answering(OK)) as server:
        for _ in range(1000):
            ask(server.url, retry=retry)
        assert server.connections <= 2


def test_complex_numbers_are_refused_by_name() -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match="input 'x' is complex64, which has no form on the wire"):
        ask("http://127.0.0.1:1/m", tf.complex(X, X))


@pytest.mark.parametrize("count", [0, 2])
def test_a_client_is_one(count: int) -> None:
    raw = rawop.load_ops()
    for infer, kind in ((raw.remote_ops_infer, tf.variant), (raw.remote_ops_infer_ordered, tf.resource)):
        clients = tf.stack([raw.remote_ops_client(urls=["http://127.0.0.1:1/m"], kind=kind)] * 2)[:count]
        words = f"client: expected one, got {count}|Empty resource handle"
        with pytest.raises(tf.errors.InvalidArgumentError, match=words):
            infer(client=clients, timeout_s=1, inputs=[X], output_types=[tf.float32], output_shapes=[None])


OUT_OF_MEMORY = """
import resource, tensorflow as tf
from remote_ops.tf.ops import remote_op
def call(x): return remote_op("http://127.0.0.1:1/m", x, "x", "y", tf.float32, on_error="status", timeout_s=1.0)[1]
call(tf.constant(["x"]))
strings = tf.fill([200], b"x" * (1 << 20))
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, ((pages << 12) + (150 << 20),) * 2)
print(int(call(strings).code), call(strings).message.numpy().decode())
"""


@pytest.mark.slow
def test_a_request_that_memory_does_not_hold_is_an_error() -> None:
    done = python(OUT_OF_MEMORY)
    assert done.stdout.strip() == "8 no memory for the request to http://127.0.0.1:1/m", done.stderr[-2000:]


def test_a_misfit_is_refused_before_anything_is_sent(served: Callable[[str], str]) -> None:
    with pytest.raises(SignatureError, match=r"input 'x': expected float32 \[-1, 4\], got float64 \(3, 4\)"):
        remote_op(served("mix"), tf.constant(X, tf.float64))
    with pytest.raises(SignatureError, match="no input 'z'"):
        remote_op(served("mix"), X, "z")
    with pytest.raises(SignatureError, match="no output 'z'"):
        remote_op(served("mix"), X, output_name="z")
    with pytest.raises(SignatureError, match=r"missing 'n' \(int64 \[\]\), 'w'"):
        remote_op_multi(served("scaled"), [X[0]])
    for value in (tf.ragged.constant([[1.0], [2.0, 3.0]]), tf.sparse.eye(2), object()):
        for names in ([], ["x", "y", tf.float32]):
            with pytest.raises(SignatureError, match="input 'x': expected"):
                remote_op(served("mix"), value, *names)


def test_a_name_that_is_nearly_right_is_suggested(served: Callable[[str], str]) -> None:
    x = tf.constant([1.0])
    with pytest.raises(SignatureError, match="no input 'ww': expected x, n, w; did you mean 'w'"):
        remote_op_multi(served("scaled"), [x, 3, x], ["x", "n", "ww"])
    with pytest.raises(SignatureError, match=r"no output 'totl'.*did you mean 'total'"):
        remote_op_multi(served("scaled"), [x, 3, x], output_names=["totl"])


def test_one_output_of_several_is_not_chosen_for_you(served: Callable[[str], str]) -> None:
    words = "outputs 'product', 'total': name one with output_name, or call remote_op_multi"
    with pytest.raises(SignatureError, match=words):
        remote_op(served("scaled"), tf.constant([1.0]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"on_error": "ignore"}, "expected 'raise' or 'status', got 'ignore' - at on_error"),
        ({"timeout_s": 0}, "above 0, got 0 - at timeout_s"),
        ({"timeout_s": tf.constant([1.0, 2.0])}, r"expected a scalar tensor, got float32 \(2,\) - at timeout_s"),
        ({"endpoint": "RANKER_URL"}, "got both - at uri"),
        ({"uri": None}, "got neither - at uri"),
        ({"uri": None, "endpoint": "no name"}, "name of an environment variable, got 'no name'"),
        ({"retry": 3}, r"expected a Retry\(...\), got a int"),
        ({"tls": "ca.pem"}, r"expected a TLS\(...\), got a str"),
        ({"headers": {"Content-Length": "${LENGTH}"}}, "no header of this name can be set: 'Content-Length'"),
        ({"headers": "Authorization"}, "expected a dict of names and values, got a str"),
    ],
)
def test_a_wrong_argument_is_refused_at_once(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        ask(**{"url": arguments.pop("uri", "http://127.0.0.1:1/m"), **arguments})


# --------------------------------------------------------------------------- gradients


def test_gradients_come_over_the_wire_in_eager_mode_and_in_a_function(served: Callable[[str], str]) -> None:
    def loss(x: Any) -> Any:
        return tf.reduce_sum(remote_op(served("mix"), x) ** 2)

    expected = (2 * (np.sin(X) @ MATRIX)) @ MATRIX.T * np.cos(X)
    for call in (loss, tf.function(loss)):
        x = tf.constant(X)
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = call(x)
        np.testing.assert_allclose(tape.gradient(value, x), expected, rtol=1e-5)


def test_a_whole_number_has_no_gradient_and_an_unused_output_counts_as_zero(served: Callable[[str], str]) -> None:
    x, n, w = tf.constant([1.0, 2.0]), tf.constant(3, tf.int64), tf.constant([5.0, 7.0])
    with tf.GradientTape() as tape:
        tape.watch([x, w])
        product, _ = remote_op_multi(served("scaled"), [x, n, w])
    gradients = tape.gradient(product, [x, n, w])
    assert gradients[0].numpy().tolist() == [3, 3]
    assert gradients[1] is None
    assert gradients[2].numpy().tolist() == [0, 0]


def test_a_model_without_gradients_says_so() -> None:
    plain = FunctionServable(lambda x: x, [TensorSpec("x", "float32", (-1,))], [TensorSpec("y", "float32", (-1,))])
    with server_ref.running({"plain": plain}) as url, tf.GradientTape() as tape:
        x = tf.constant([1.0])
        tape.watch(x)
        y = remote_op(url, x)
        with pytest.raises(tf.errors.UnimplementedError, match="gives no gradient"):
            tape.gradient(y, x)


@pytest.mark.parametrize("pure", [True, False])
def test_vectorized_maps_and_jacobians_go_through_a_function(served: Callable[[str], str], pure: bool) -> None:
    @tf.function
    def function(x: Any) -> Any:
        return remote_op(served("mix"), x, pure=pure)

    x = tf.constant(X)
    mapped = tf.vectorized_map(lambda row: function(row[None])[0] + remote_op(served("mix"), x, pure=pure)[0], x)
    np.testing.assert_allclose(mapped, np.sin(X) @ MATRIX + (np.sin(X) @ MATRIX)[0], rtol=1e-5)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = function(x)
    jacobian = np.einsum("ij,jk->ikj", np.cos(X), MATRIX)
    np.testing.assert_allclose(tape.batch_jacobian(y, x), jacobian, rtol=1e-5, atol=1e-6)


def test_a_second_derivative_is_a_named_error(served: Callable[[str], str]) -> None:
    x = tf.constant(X)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = remote_op(served("mix"), x)
        gradient = inner.gradient(y, x)
    with pytest.raises((NotDifferentiable, LookupError), match="no second derivative"):
        outer.gradient(gradient, x)


def test_forward_mode_is_a_named_error(served: Callable[[str], str]) -> None:
    x = tf.constant(X)
    with pytest.raises(NotDifferentiable, match="none in forward mode"):
        with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)):
            remote_op(served("mix"), x)


@pytest.mark.parametrize("options", [{}, {"pure": False}, {"on_error": "status"}], ids=str)
def test_a_branch_has_the_gradient_of_its_call(served: Callable[[str], str], options: dict[str, Any]) -> None:
    def call(x: Any, timeout_s: Any) -> Any:
        got = remote_op(served("mix"), x, timeout_s=timeout_s, **options)
        return got[0] if options.get("on_error") else got

    def cond(x: Any, timeout_s: Any) -> Any:
        return tf.cond(tf.reduce_sum(x) > 0, lambda: call(x, timeout_s), lambda: x)

    def switch(x: Any, timeout_s: Any) -> Any:
        return tf.switch_case(tf.constant(1), [lambda: x, lambda: call(x, timeout_s)])

    def loop(x: Any, timeout_s: Any) -> Any:
        return tf.while_loop(lambda i, _: i < 1, lambda i, y: (i + 1, y + call(x, timeout_s)), [0, tf.zeros_like(x)])[1]

    x = tf.constant(X)
    for function in map(tf.function, (cond, switch, loop)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x, tf.constant(10.0))
        np.testing.assert_allclose(tape.gradient(y, x), np.ones_like(X) @ MATRIX.T * np.cos(X), rtol=1e-5)


@pytest.mark.parametrize("pure", [True, False])
@pytest.mark.parametrize("on_error", ["raise", "status"])
def test_eight_gradients_of_one_function_are_under_way_at_once(pure: bool, on_error: str) -> None:
    together = threading.Barrier(8)

    def answer(conversation: Conversation, request: Message) -> None:
        together.wait(10)
        conversation.answer(OK)

    with peer(serving(mix().signature, answer)) as server:

        @tf.function
        def gradient(x: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                found = [remote_op(server.url, x, pure=pure, on_error=on_error, retry=ONE) for _ in range(8)]
                y = tf.add_n([one if on_error == "raise" else one[0] for one in found])
            return tape.gradient(y, x)

        np.testing.assert_allclose(gradient(tf.constant(X)), 8 * X, rtol=1e-6)


SAVED = """
import sys, numpy as np, tensorflow as tf
tf.load_op_library(sys.argv[1])
f = tf.saved_model.load(sys.argv[2]).f
assert not any(name.startswith("remote_ops") for name in sys.modules)
x = tf.constant(np.load(sys.argv[3]))
with tf.GradientTape() as tape:
    tape.watch(x)
    y = f(x)
np.savez(sys.argv[4], y=y, dx=tape.gradient(y, x))
"""


def save(url: str, folder: Path, **options: Any) -> None:
    class Module(tf.Module):  # type: ignore[misc]
        @tf.function(input_signature=[tf.TensorSpec((None,), tf.float32)])
        def f(self, x: Any) -> Any:
            return remote_op_multi(url, [x, tf.constant(3, tf.int64), x], ["x", "n", "w"], ["product"], **options)[0]

    tf.saved_model.save(Module(), str(folder))


FAILED = """
import sys, numpy as np, tensorflow as tf
tf.load_op_library(sys.argv[1])
f = tf.saved_model.load(sys.argv[2]).f
x = tf.constant([1.0, 2.0])
with tf.GradientTape() as tape:
    tape.watch(x)
    y, code, message = f(x)
print(code.numpy(), y.numpy().tolist(), tape.gradient(y, x).numpy().tolist(), message.numpy().decode())
"""


@pytest.mark.slow
def test_a_saved_model_holds_neither_url_nor_token_and_sees_its_faults(
    served: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKER_URL", served("scaled"))
    monkeypatch.setenv("RANKER_TOKEN", "a-token-that-is-secret")

    class Module(tf.Module):  # type: ignore[misc]
        @tf.function(input_signature=[tf.TensorSpec((None,), tf.float32)])
        def f(self, x: Any) -> Any:
            (product, _), status = remote_op_multi(
                None, [x, tf.constant(3, tf.int64), x], endpoint="RANKER_URL", on_error="status",
                headers={"Authorization": "Bearer ${RANKER_TOKEN}"},
            )  # fmt: skip
            return product, status.code, status.message

    tf.saved_model.save(Module(), str(tmp_path / "saved"))
    saved = b"".join(path.read_bytes() for path in (tmp_path / "saved").rglob("*") if path.is_file())
    assert b"RANKER_URL" in saved
    assert b"${RANKER_TOKEN}" in saved
    for secret in (served("scaled"), served("").removeprefix("http://").rstrip("/"), "a-token-that-is-secret"):
        assert secret.encode() not in saved
    done = python(FAILED, str(op_library()), str(tmp_path / "saved"))
    assert done.stdout.strip() == "0 [3.0, 6.0] [3.0, 3.0]", done.stderr[-2000:]
    monkeypatch.setenv("RANKER_URL", "http://127.0.0.1:1/scaled")
    done = python(FAILED, str(op_library()), str(tmp_path / "saved"))
    assert done.stdout.startswith("14 [nan, nan] [0.0, 0.0] cannot connect"), done.stderr[-2000:]


@pytest.mark.slow
def test_a_saved_model_infers_and_differentiates_where_only_the_library_is_loaded(
    served: Callable[[str], str], tmp_path: Path
) -> None:
    save(served("scaled"), tmp_path / "saved")
    np.save(tmp_path / "x.npy", np.float32([1, 2]))
    done = python(SAVED, str(op_library()), str(tmp_path / "saved"), str(tmp_path / "x.npy"), str(tmp_path / "out.npz"))
    assert done.returncode == 0, done.stderr[-2000:]
    got = np.load(tmp_path / "out.npz")
    assert got["y"].tolist() == [3, 6]
    assert got["dx"].tolist() == [3, 3]


# --------------------------------------------------------------------------- how often, and at once


def test_a_saved_model_that_was_loaded_is_saved_again(served: Callable[[str], str], tmp_path: Path) -> None:
    @tf.function(input_signature=[tf.TensorSpec((None, 4)), tf.TensorSpec(())])
    def call(x: Any, timeout_s: Any) -> Any:
        return tf.cond(tf.size(x) > 0, lambda: remote_op(served("mix"), x, timeout_s=timeout_s), lambda: x)

    model = tf.Module()
    model.call = call
    for n in range(3):
        tf.saved_model.save(model, str(tmp_path / str(n)))
        model = tf.saved_model.load(str(tmp_path / str(n)))
    np.testing.assert_allclose(model.call(tf.constant(X), tf.constant(10.0)), np.sin(X) @ MATRIX, rtol=1e-5)


def test_a_call_with_constant_inputs_is_made_every_time() -> None:
    seen: list[Message] = []
    with peer(answering(OK, seen=seen)) as server:
        function = tf.function(lambda: ask(server.url, tf.constant(X)))
        for _ in range(3):
            function()
        assert len(seen) == 3


@pytest.mark.parametrize(("pure", "calls"), [(True, 2), (False, 3)])
def test_a_pure_call_that_nobody_uses_is_left_out_and_two_alike_stay_two(pure: bool, calls: int) -> None:
    seen: list[Message] = []
    with peer(answering(OK, seen=seen)) as server:

        @tf.function
        def function(x: Any) -> Any:
            ask(server.url, x, pure=pure)
            return ask(server.url, x, pure=pure) + ask(server.url, x, pure=pure)

        function(tf.constant(X))
        assert len(seen) == calls


@pytest.mark.parametrize("pure", [True, False])
def test_eight_calls_of_one_function_are_under_way_at_once(pure: bool) -> None:
    together = threading.Barrier(8)

    def script(conversation: Conversation) -> None:
        while conversation.read() is not None:
            together.wait(10)
            conversation.answer(OK)

    with peer(script) as server:

        @tf.function
        def function(x: Any) -> Any:
            return tf.add_n([ask(server.url, x, pure=pure, retry=ONE) for _ in range(8)])

        np.testing.assert_allclose(function(tf.constant(X)), 8 * X, rtol=1e-6)


def test_a_dataset_maps_eight_calls_at_once() -> None:
    together = threading.Barrier(8)

    def script(conversation: Conversation) -> None:
        while conversation.read() is not None:
            together.wait(10)
            conversation.answer(OK)

    with peer(script) as server:
        data = tf.data.Dataset.range(8).map(lambda n: ask(server.url, retry=ONE), num_parallel_calls=8)
        assert len(list(data)) == 8


# --------------------------------------------------------------------------- faults


@pytest.mark.parametrize(("answer", "error", "words", "calls"), [row[1:] for row in FAULTS],
                         ids=[row[0] for row in FAULTS])  # fmt: skip
def test_every_fault_is_an_error_of_its_own_and_only_passing_ones_are_tried_again(
    answer: tuple[Any, ...], error: str, words: str, calls: int
) -> None:
    seen: list[Message] = []
    with peer(answering(*answer, seen=seen)) as server:
        for call in (lambda: ask(f"{server.url}?key=secret"), tf.function(lambda: ask(f"{server.url}?key=secret"))):
            seen.clear()
            with pytest.raises(tf.errors.OpError, match=words) as caught:
                call()
            assert type(caught.value).__name__ == error
            assert server.url in caught.value.message
            assert "secret" not in caught.value.message
            assert len(seen) == calls


@pytest.mark.parametrize("graph", [False, True])
def test_what_a_peer_says_is_text_whatever_bytes_it_is(graph: bool) -> None:
    broken = encode_error(3, "no #### here").replace(b"####", b"\xff\xc3\0\xc3")
    moved = "302 Found", "Location: http://elsewhere/\udcff"
    call: Any = tf.function(ask) if graph else ask
    with peer(answering(broken, "400 Bad Request")) as server:
        words = "no " + 4 * "\ufffd" + f" here - from {server.url}"
        with pytest.raises(tf.errors.InvalidArgumentError, match=words):
            call(server.url)
        assert ask(server.url, on_error="status")[1].message.numpy().decode().startswith("no \ufffd")

    def moving(conversation: Conversation) -> None:
        conversation.read()
        conversation.send(f"HTTP/1.1 {moved[0]}\r\n{moved[1]}\r\n\r\n".encode(errors="surrogateescape"))

    with peer(moving) as server, pytest.raises(tf.errors.InternalError, match="it moved to 'http://elsewhere/\ufffd'"):
        call(server.url)


def test_an_output_of_another_shape_is_refused() -> None:
    with peer(answering(OK)) as server:
        with pytest.raises(
            tf.errors.InternalError, match=r"output 'y': expected float32 \[-1, 5\], got float32 \[3, 4\]"
        ):
            remote_op(server.url, X, "x", "y", tf.float32, [None, 5])


def test_a_bool_that_is_neither_is_refused() -> None:
    with peer(answering(b"".join(encode_response([np.uint8([0, 1, 2])])))) as server:
        with pytest.raises(tf.errors.InternalError, match="each 0 or 1, got a byte 2"):
            remote_op(server.url, X, "x", "y", tf.bool, [3])


def test_a_peer_that_hangs_up_is_tried_again_and_then_unavailable() -> None:
    def script(conversation: Conversation) -> None:
        conversation.read()
        if conversation.number < 3:
            conversation.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", OK[:10])
            conversation.reset()
        else:
            conversation.answer(OK)

    with peer(script) as server:
        assert ask(server.url).shape == (3, 4)
        assert server.connections == 3
    with peer(lambda conversation: (conversation.read(), conversation.hang_up())[0]) as server:  # type: ignore[func-returns-value]
        with pytest.raises(tf.errors.UnavailableError, match=r"the connection ended while waiting for the first byte"):
            ask(server.url, retry=Retry(attempts=2))
        assert server.connections == 2


def test_nobody_there_is_unavailable_and_another_replica_answers() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}/m"
        with pytest.raises(tf.errors.UnavailableError, match=f"cannot connect .* - at {dead}"):
            ask(dead)
        with peer(answering(OK)) as server:
            for _ in range(4):
                assert ask([dead, server.url]).shape == (3, 4)


def test_a_chunked_answer_and_one_that_ends_with_the_connection_are_read() -> None:
    def chunked(conversation: Conversation) -> None:
        while conversation.read() is not None:
            conversation.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for at in range(0, len(OK), 7):
                conversation.send(f"{len(OK[at : at + 7]):x}\r\n".encode(), OK[at : at + 7], b"\r\n")
            conversation.send(b"0\r\n\r\n")

    def ended(conversation: Conversation) -> None:
        conversation.read()
        conversation.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", OK)

    for script in (chunked, ended):
        with peer(script) as server:
            assert ask(server.url).numpy().tolist() == X.tolist()


# --------------------------------------------------------------------------- what is kept between calls


def wide(width: int) -> FunctionServable:
    """A model that takes rows of one width alone."""
    spec = TensorSpec("x", "float32", (-1, width))
    return FunctionServable(lambda x: x, [spec], [TensorSpec("y", "float32", (-1, width))])


def test_a_server_that_was_restarted_with_another_model_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    for kept in (client._SIGNATURES, ops._SITES):
        monkeypatch.setattr(kept, "clock", lambda: clock[0])
    with server_ref.running({"m": wide(4)}) as url:
        address = url.removeprefix("http://").rstrip("/")
        assert remote_op(f"{url}m", X).shape == (3, 4)
        with pytest.raises(SignatureError):
            remote_op(f"{url}m", tf.zeros((1, 5)))
    with server_ref.running({"m": wide(5)}, address):
        clock[0] += 2  # a misfit has it asked at once, though not for each of many
        assert remote_op(f"{url}m", tf.zeros((1, 5))).shape == (1, 5)
    clock[0] += 100
    assert tf.function(lambda x: remote_op(f"{url}m", x)).get_concrete_function(
        tf.TensorSpec((None, 5))
    ).output_shapes.as_list() == [None, 5]  # nobody there: what was known holds
    with server_ref.running({"m": wide(6)}, address):
        function = tf.function(lambda x: remote_op(f"{url}m", x)).get_concrete_function(tf.TensorSpec((None, 6)))
        assert function.output_shapes.as_list() == [None, 6]


def test_metadata_is_asked_once_for_many_calls_and_within_their_timeout() -> None:
    seen: list[bytes] = []

    def script(conversation: Conversation) -> None:
        while (request := conversation.read()) is not None:
            seen.append(request.body)
            conversation.answer(
                encode_metadata(mix().signature) if request.body == METADATA_REQUEST else OK,
            )

    with peer(script) as server:
        for timeout_s in range(1, 50):
            remote_op(server.url, X, timeout_s=timeout_s)
            remote_op(server.url, X, "x", ["y"][0], retry=Retry(attempts=2))
        assert seen.count(METADATA_REQUEST) == 1


@pytest.mark.parametrize("graph", [False, True])
def test_sixteen_threads_get_each_their_own_answers(served: Callable[[str], str], graph: bool) -> None:
    def call(x: Any) -> Any:
        return remote_op(served("float64"), x)

    def work(number: int) -> None:
        for turn in range(60):
            size = 1 + 4000 * (turn % 2)  # small answers and large ones are taken out in different ways
            sent = np.full(size, number + turn / 100)
            wrong.extend([] if np.array_equal(function(tf.constant(sent)), sent) else [(number, turn)])
            done[number] += 1

    function = tf.function(call, input_signature=[tf.TensorSpec([None], tf.float64)]) if graph else call
    wrong: list[tuple[int, int]] = []
    done = [0] * 16
    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (done, wrong) == ([60] * 16, [])


FORKED = """
import os, sys, threading, tensorflow as tf
from remote_ops.tf.ops import remote_op
def ask(): return remote_op(sys.argv[1], tf.zeros([1]), "x", "y", tf.float32, timeout_s=10.0).shape.as_list()
assert ask() == [3, 4]
child = os.fork()
if child == 0:
    found = []
    threads = [threading.Thread(target=lambda: found.append(ask())) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    os._exit(0 if found == [[3, 4]] * 8 else 7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), ask())
"""


@pytest.mark.slow
def test_a_forked_process_makes_eager_calls_over_connections_of_its_own() -> None:
    with peer(answering(OK)) as server:
        done = python(FORKED, server.url)
        assert done.stdout.strip() == "0 [3, 4]", done.stderr[-2000:]
        assert 2 <= server.connections <= 9  # one of the parent, and some of the child


AT_EXIT = """
#include "http.h"
#include <cstdio>
#include <thread>
std::string url;
void Ask() {
  static auto* ended = new std::atomic<int>(0);
  const int before = *ended;
  auto call = std::make_shared<remote_ops::Call>();
  auto target = std::make_shared<remote_ops::Target>(std::vector<std::string>{url}, "");
  call->target = target;
  call->urls = target->places.Now();
  call->done = [] { ++*ended; };
  remote_ops::Begin(call.get(), false);
  remote_ops::Start(call);
  while (*ended == before) std::this_thread::yield();
  std::printf("%d", call->failure.code);
  std::fflush(stdout);
}
int main(int, char** argv) {
  url = argv[1];
  std::atexit(Ask);  // before the first call: it runs after what that call has destroyed at exit
  Ask();
}
"""


@pytest.mark.slow
def test_a_call_may_begin_while_the_process_ends(tmp_path: Path) -> None:
    kernel, lib = ROOT / "remote_ops" / "tf" / "kernel", tf.sysconfig.get_lib()
    (tmp_path / "at_exit.cc").write_text(AT_EXIT)
    command = [
        *("g++", "-std=c++17", "-g", "-O1", "-fsanitize=address", f"-I{kernel}"),
        *("-isystem", f"{tf.sysconfig.get_include()}/external/curl/include"),
        *(tmp_path / "at_exit.cc", kernel / "http.cc", kernel / "url.cc"),
        *(*tf.sysconfig.get_link_flags(), f"-Wl,-rpath,{lib}", "-o", tmp_path / "at_exit"),
    ]
    subprocess.run(command, check=True)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    with peer(answering(OK)) as server:
        run = [tmp_path / "at_exit", server.url]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "00", done.stderr[-2000:]


@pytest.mark.parametrize("pure", [True, False])
def test_eager_calls_leave_nothing_behind(pure: bool) -> None:
    with peer(answering(OK)) as server:
        for n in range(400):
            ask(f"{server.url}/{n}", pure=pure)
        assert len(ops._SITES._values) <= 256
        gc.collect()
        before = len(gc.get_objects())
        for n in range(1000):
            ask(f"{server.url}/{n % 10}", pure=pure)
        gc.collect()
        assert len(gc.get_objects()) - before < 500


def test_an_eager_call_outside_of_a_function_does_not_end_up_in_one(tmp_path: Path) -> None:
    with peer(answering(OK)) as server:
        ask(server.url)  # its handle is kept, but is a value of this process
        function = tf.function(lambda x: ask(server.url, x))
        concrete = function.get_concrete_function(tf.TensorSpec((3, 4)))
        assert concrete.captured_inputs == []
        assert "RemoteOpsClient" in [op.type for op in concrete.graph.get_operations()]


# --------------------------------------------------------------------------- without a compiler


def test_without_a_compiler_the_fallback_answers_and_gradients_go_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def answer(who: client.Client, ask: Ask) -> Any:
        assert ask.timeout_s <= 3.0
        asked.append((who.urls, ask.input_names, ask.output_names, ask.config, ask.pure, ask.on_error))
        return [tf.cast(2 * ask.inputs[0], dtype) for dtype in ask.output_types], tf.constant(0), tf.constant("")

    monkeypatch.setattr(rawop, "_load", lambda: CompilerMissing("no g++"))
    monkeypatch.setitem(sys.modules, "remote_ops.tf.fallback", types.SimpleNamespace(call=answer))

    def gradient(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = ask("http://127.0.0.1:1/m", x, config=b"cfg", timeout_s=3.0)
        return tape.gradient(y, x)

    for function in (gradient, tf.function(gradient)):
        asked.clear()
        np.testing.assert_array_equal(function(tf.constant(X)), 2 * X)
        assert asked == [
            (("http://127.0.0.1:1/m",), ["x"], ["y"], b"cfg", True, "raise"),
            (("http://127.0.0.1:1/m",), ["x", "cotangent:y"], ["gradient:x"], b"cfg", True, "raise"),
        ]


# --------------------------------------------------------------------------- replicas


def numbered(number: float) -> FunctionServable:
    """A model that answers with its number."""
    return FunctionServable(
        lambda x: np.float32([number]), [TensorSpec("x", "float32", (-1, 4))], [TensorSpec("y", "float32", (1,))]
    )


def test_a_replica_that_dies_costs_no_call_and_is_used_again_when_it_is_back() -> None:
    answered: list[int] = []

    def one_call() -> None:
        answered.append(int(ask(urls)[0]))

    with server_ref.running({"m": numbered(1)}) as alive, contextlib.ExitStack() as running:
        dying = running.enter_context(server_ref.running({"m": numbered(2)}))
        urls = [f"{alive}m", f"{dying}m"]
        for _ in range(300):
            one_call()
        assert set(answered) == {1, 2}
        running.close()
        for _ in range(700):
            one_call()
        assert set(answered[300:]) == {1}
        with server_ref.running({"m": numbered(2)}, dying.removeprefix("http://").rstrip("/")):
            assert until(lambda: (one_call(), answered[-1] == 2)[1])
    assert len(answered) >= 1000


def test_where_every_replica_is_dead_the_error_names_them_all() -> None:
    with socket.socket() as one, socket.socket() as two:
        urls = []
        for taken in (one, two):
            taken.bind(("127.0.0.1", 0))
            urls.append(f"http://127.0.0.1:{taken.getsockname()[1]}/m")
        for _ in range(2):  # both are banned by the second time, and tried all the same
            with pytest.raises(tf.errors.UnavailableError, match=r"cannot connect .*; tried ") as caught:
                ask([f"{url}?key=secret" for url in urls])
            assert all(url in caught.value.message.partition("; tried ")[2] for url in urls)
            assert "secret" not in caught.value.message


@pytest.mark.parametrize("status", ["503 Unavailable", "429 Too Many Requests"])
def test_a_replica_that_says_503_or_429_is_left_alone_for_a_while(status: str) -> None:
    seen: list[Message] = []
    with peer(answering(OK)) as free, peer(answering(b"", status, seen=seen)) as full:
        since = time.monotonic()
        for _ in range(50):
            ask([full.url, free.url])
        bans = 1 + (time.monotonic() - since)  # each lasts a second or more
        assert 1 <= len(seen) <= bans


def test_another_replica_is_asked_at_once() -> None:
    with peer(answering(OK)) as free, peer(answering(b"", "503 Unavailable")) as full:
        for _ in range(2):  # one goes to each
            assert ask([full.url, free.url], retry=Retry(base_s=1e6, max_s=1e6)).shape == (3, 4)


def test_a_replica_that_fails_five_times_in_a_row_is_left_alone_for_a_while() -> None:
    for script, timeout_s, code in ((silent, 0.3, tf.errors.DEADLINE_EXCEEDED), (losing, 10.0, tf.errors.OK)):
        seen = [0]
        with peer(answering(OK)) as well, peer(functools.partial(script, seen=seen)) as ill:
            codes = [failure([ill.url, well.url], timeout_s=timeout_s)[0] for _ in range(60)]
        assert 5 <= seen[0] <= 8  # and once more when a second has passed, and two
        assert sorted(codes) == sorted([code] * seen[0] + [tf.errors.OK] * (60 - seen[0]))


def test_a_replica_that_does_not_answer_a_connect_leaves_time_for_another() -> None:
    with unreachable() as nobody, peer(answering(OK)) as server:
        for _ in range(2):
            assert ask([nobody, server.url], timeout_s=4.0).shape == (3, 4)


# --------------------------------------------------------------------------- when to try again, and how often


IN_BOTH = pytest.mark.parametrize("graph", [False, True])


@IN_BOTH
@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_heeded_and_not_waited_for_beyond_the_deadline(graph: bool, date: bool) -> None:
    later = email.utils.formatdate(time.time() + 60, usegmt=True) if date else "60"
    seen: list[Message] = []
    since = time.monotonic()
    with peer(answering(b"", "503 Unavailable", f"Retry-After: {later}", seen=seen)) as server:
        assert failure(server.url, graph=graph) == (UNAVAILABLE, f"{server.url} answered 503 (attempt 1 of 3)")
    assert len(seen) == 1
    assert time.monotonic() - since < 5


@IN_BOTH
def test_retry_after_is_waited_for_within_the_deadline(graph: bool) -> None:
    def script(conversation: Conversation) -> None:
        conversation.read()
        conversation.answer(b"", "429 Too Many Requests", "Retry-After: 1")
        conversation.read()
        conversation.answer(OK)

    with peer(script) as server:
        since = time.monotonic()
        assert (tf.function(ask) if graph else ask)(server.url).shape == (3, 4)
        assert time.monotonic() - since >= 1


@pytest.mark.parametrize("text", ["soon", "-1", "1.5", "", "\u00b2", "Thu, 99 Foo 2026 00:00:00 GMT", "0"])
def test_a_retry_after_that_is_none_changes_nothing(text: str) -> None:
    seen: list[Message] = []

    def script(conversation: Conversation) -> None:
        while (request := conversation.read()) is not None:
            seen.append(request)
            head = f"HTTP/1.1 503 X\r\nContent-Length: 0\r\nRetry-After: {text}\r\n\r\n"
            conversation.send(head.encode("latin-1"))

    with peer(script) as server:
        assert failure(server.url, timeout_s=1.9) == (UNAVAILABLE, f"{server.url} answered 503 (attempt 3 of 3)")
    assert len(seen) == 3


@pytest.mark.parametrize("text", ["9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_retry_after_of_any_length_is_read(text: str) -> None:
    seen: list[Message] = []
    with peer(answering(b"", "429 X", f"Retry-After: {text}", seen=seen)) as server:
        assert failure(server.url) == (EXHAUSTED, f"{server.url} answered 429 (attempt 1 of 3)")
    assert len(seen) == 1


def test_a_replica_that_asks_to_be_left_alone_is() -> None:
    seen: list[Message] = []
    full = answering(b"", "429 Too Many Requests", "Retry-After: 30", seen=seen)
    with peer(full) as one, peer(answering(OK)) as two:
        for _ in range(50):
            ask([one.url, two.url])
        assert len(seen) == 1
    seen.clear()
    since = time.monotonic()
    with peer(full) as one, peer(full) as two, pytest.raises(tf.errors.ResourceExhaustedError):
        ask([one.url, two.url])
    assert len(seen) == 2
    assert time.monotonic() - since < 5


@IN_BOTH
def test_a_thousand_calls_that_all_fail_send_at_most_a_fifth_more(graph: bool) -> None:
    def call() -> None:
        with pytest.raises(tf.errors.UnavailableError):
            once()

    seen: list[Message] = []
    with contextlib.ExitStack() as running:
        urls = [running.enter_context(peer(answering(b"", "503 X", seen=seen))).url for _ in range(3)]
        made = functools.partial(ask, urls, retry=Retry(base_s=0.001))
        once = tf.function(made) if graph else made
        threads = [threading.Thread(target=lambda: [call() for _ in range(250)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert 1100 < len(seen) <= 1200


@pytest.mark.parametrize(("budget", "sent"), [(0.2, range(11, 20)), (0.0, [1]), (math.inf, [99])])
def test_a_call_that_is_not_sent_again_for_want_of_budget_says_so(budget: float, sent: Collection[int]) -> None:
    seen: list[Message] = []
    with peer(answering(b"", "503 X", seen=seen)) as server:
        note = "" if 99 in sent else "; not sent again: retries have used up their share of the calls"
        found = failure(server.url, retry=Retry(attempts=99, base_s=0.0, budget=budget))
        assert found == (UNAVAILABLE, f"{server.url} answered 503 (attempt {len(seen)} of 99){note}")
    assert len(seen) in sent


def test_where_nobody_was_reached_another_replica_costs_nothing() -> None:
    with contextlib.ExitStack() as stack, peer(answering(OK)) as server:
        taken = [stack.enter_context(socket.socket()) for _ in range(30)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        for one in taken:
            dead = f"http://127.0.0.1:{one.getsockname()[1]}/m"
            for _ in range(2):
                assert ask([dead, server.url], retry=Retry(budget=0.0)).shape == (3, 4)
            with pytest.raises(tf.errors.UnavailableError, match=r"cannot connect .* not sent again"):
                ask(dead, retry=Retry(budget=0.0))


def test_a_graph_saved_before_there_was_a_budget_has_the_usual_one() -> None:
    seen: list[Message] = []
    with peer(answering(b"", "503 X", seen=seen)) as server:
        with tf.Graph().as_default() as graph:
            y = ask(server.url, retry=Retry(attempts=99, base_s=0.0, budget=math.inf))
        saved = graph.as_graph_def()
        (made,) = [node for node in saved.node if node.op == "RemoteOpsClient"]
        assert made.attr["retry_budget"].f == math.inf
        del made.attr["retry_budget"]
        with tf.Graph().as_default() as graph, tf.compat.v1.Session() as session:
            tf.import_graph_def(saved, name="")
            with pytest.raises(tf.errors.UnavailableError, match="not sent again"):
                session.run(y.name)
    assert len(seen) in range(11, 20)  # one more for each second that it took


# Inputs, outputs and attributes of the ops, as they were in the first SavedModels of users.
CLIENT = (
    ((), ("client",)),
    "kind urls endpoint header_names header_values ca cert key key_password verify attempts retry_base_s retry_max_s "
    "connect_timeout_s attempt_timeout_s",
)
INFER = (
    (("client", "timeout_s", "inputs"), ("outputs", "code", "message")),
    "input_types output_types output_shapes input_names output_names config on_error differentiable blocking",
)


@pytest.mark.parametrize(
    ("name", "first"), [("RemoteOpsClient", CLIENT), ("RemoteOpsInfer", INFER), ("RemoteOpsInferOrdered", INFER)]
)
def test_what_saved_graphs_name_stays_and_what_is_added_has_a_default(name: str, first: Any) -> None:
    rawop.load_ops()
    op, known = op_def_registry.get(name), first[1].split()
    assert tuple(tuple(one.name for one in side) for side in (op.input_arg, op.output_arg)) == first[0]
    assert {attr.name for attr in op.attr} >= set(known)
    assert [attr.name for attr in op.attr if attr.name not in known and not attr.HasField("default_value")] == []


BUDGET = """
#include "budget.h"
#include <cstdio>
#include <cstdlib>
int main(int, char** argv) {
  using remote_ops::Budget;
  const auto at = [](long ms) { return Budget::Instant(std::chrono::milliseconds(ms)); };
  Budget budget(std::atof(argv[1]), at(0));
  for (long now; std::scanf("%ld", &now) == 1;) {
    if (now < 0) budget.Earn();
    if (now >= 0) std::putchar(budget.Spend(at(now)) ? '1' : '0');
  }
}
"""


def test_the_budget_is_that_of_an_endpoint(tmp_path: Path) -> None:
    (tmp_path / "budget.cc").write_text(BUDGET)
    command = ["g++", "-std=c++17", f"-I{ROOT}/remote_ops/tf/kernel", "budget.cc", "-o", "budget"]
    subprocess.run(command, cwd=tmp_path, check=True)
    rng = random.Random(0)
    for ratio in (0.0, 0.05, 0.2, 1.0, 3.0, math.inf):
        budget, said, now = Budget(ratio), "", 0
        purse = budget.opened(0.0)
        script = [-1 if rng.random() < 0.6 else (now := now + rng.choice((0, 0, 1, 40, 900))) for _ in range(5000)]
        for at in script:
            if at < 0:
                purse = budget.earned(purse)
            else:
                spent = budget.spent(purse, at / 1000)
                purse, said = spent or purse, said + "01"[spent is not None]
        run = [str(tmp_path / "budget"), str(ratio)]
        done = subprocess.run(run, input=" ".join(map(str, script)), capture_output=True, text=True, check=True)
        assert done.stdout == said
        assert "1" in said or not ratio


# --------------------------------------------------------------------------- what may be sent once


@IN_BOTH
def test_a_request_that_was_on_its_way_when_the_server_went_is_not_said_to_be_unsent(graph: bool) -> None:
    def serve() -> None:
        sock, _ = listener.accept()
        conversation = Conversation(sock, 1)
        conversation.read()
        conversation.answer(OK)
        asked.append(conversation.read())
        listener.close()
        conversation.reset()

    asked: list[Message | None] = []
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/m"
    thread = threading.Thread(target=serve)
    thread.start()
    assert failure(url, graph=graph, retry=ONE)[0] == tf.errors.OK
    code, words = failure(url, graph=graph, retry=ONE)
    assert code == UNAVAILABLE
    assert re.fullmatch(rf"the connection ended while waiting for the first byte \(.*\) - at {url}", words), words
    thread.join()
    assert len(asked) == 1


# --------------------------------------------------------------------------- names of hosts


def test_an_ipv6_address_is_refused_where_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match=r"no IPv6: .*got 'http://\[::1\]:9000/m'"):
        ask("http://[::1]:9000/m")
    monkeypatch.setenv("RANKER_URL", "http://[::1]:9000/m")
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"RANKER_URL holds an IPv6 address.*'http://\[::1\]:9000"):
        ask(None, endpoint="RANKER_URL")


def test_a_host_that_has_a_name_is_called_by_it() -> None:
    with peer(answering(OK)) as server:
        for _ in range(3):
            assert ask(server.url.replace("127.0.0.1", "localhost")).shape == (3, 4)
        assert server.connections == 1


# Stands before the C library's: one name takes as long as it is told to, one is IPv6 for all who do not ask for IPv4.
LOOKUPS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
  int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
  real = dlsym(RTLD_NEXT, "getaddrinfo");
  // Whoever takes only numbers asks no name server.
  int numbers = hints && hints->ai_flags & AI_NUMERICHOST;
  if (node == NULL || !strstr(node, ".test") || numbers) return real(node, service, hints, found);
  FILE *log = fopen(getenv("LOOKUPS"), "a");
  fprintf(log, "%s\n", node);
  fclose(log);
  while (!strcmp(node, "slow.test") && access(getenv("RELEASE"), F_OK)) usleep(1000);
  if (!strcmp(node, "none.test")) return EAI_NONAME;
  if (!strcmp(node, "both.test") && hints->ai_family != AF_INET) return real("::1", service, hints, found);
  return real("127.0.0.1", service, hints, found);
}
"""

NAMES = """
import json, os, sys, threading, time
import numpy as np, tensorflow as tf
from pathlib import Path
from tensorflow.python.eager import cancellation
from remote_ops.tf.ops import remote_op

def ask(host, **options):
    url = sys.argv[1].replace("127.0.0.1", host)
    # In a function, whose calls share four loops.
    call = tf.function(lambda: remote_op(url, tf.zeros([1]), "x", "y", tf.float32, **options))
    return call().shape.as_list()

def failure(call):
    since = time.monotonic()
    try: call()
    except tf.errors.OpError as error:
        took = time.monotonic() - since
        assert took < 5, took
        return [type(error).__name__, error.message]

log, release = Path(os.environ["LOOKUPS"]), Path(os.environ["RELEASE"])
ask("127.0.0.1")
done = []
# One for each loop: each of them would stand still.
waiting = [threading.Thread(target=lambda: done.append(ask("slow.test"))) for _ in range(8)]
for thread in waiting: thread.start()
while not log.exists(): time.sleep(0.001)
for _ in range(40): ask("127.0.0.1", timeout_s=5.0)
late = failure(lambda: ask("slow.test", timeout_s=0.3))
manager = cancellation.CancellationManager()
run = manager.get_cancelable_function(
    tf.function(lambda: remote_op(sys.argv[1].replace("127.0.0.1", "slow.test"), tf.zeros([1]), "x", "y", tf.float32))
    .get_concrete_function()
)
timer = threading.Timer(0.2, manager.start_cancel)
timer.start()
cancelled = failure(run)
assert not done
release.touch()
for thread in waiting: thread.join()
assert done == [[3, 4]] * 8
unknown = failure(lambda: ask("none.test"))
assert ask("both.test") == ask("both.test") == [3, 4]
hosts = ("slow.test", "none.test", "both.test")
print(json.dumps([late, cancelled, unknown, *(log.read_text().split().count(host) for host in hosts)]))
"""


@pytest.mark.slow
def test_a_slow_name_server_holds_up_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lookups.c").write_text(LOOKUPS)
    shim = str(tmp_path / "lookups.so")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", shim, str(tmp_path / "lookups.c"), "-ldl"], check=True)
    monkeypatch.setenv("LD_PRELOAD", shim)
    monkeypatch.setenv("LOOKUPS", str(tmp_path / "log"))
    monkeypatch.setenv("RELEASE", str(tmp_path / "release"))
    with peer(answering(OK)) as server:
        done = python(NAMES, server.url)
    assert done.returncode == 0, done.stderr[-2000:]
    late, cancelled, unknown, *lookups = json.loads(done.stdout)
    assert (late[0], cancelled[0], unknown[0]) == ("DeadlineExceededError", "CancelledError", "UnavailableError")
    assert "resolving the host" in late[1]
    words = f"cannot resolve host 'none.test' (Name or service not known) - at http://none.test:{server.port}/m"
    assert words in unknown[1]
    assert lookups == [1, 3, 1]


# --------------------------------------------------------------------------- faults that the graph sees


KINDS = [tf.float32, tf.float64, tf.float16, tf.bfloat16, tf.dtypes.experimental.float8_e5m2, tf.int64, tf.bool,
         tf.string, tf.uint8]  # fmt: skip


def test_with_status_a_failed_call_gives_outputs_that_stand_for_it() -> None:
    words = {"output_types": KINDS, "output_shapes": [[None, 2, None]] * 2 + [[3]] + [None] * 6}

    def call(x: Any) -> Any:
        names = [dtype.name for dtype in KINDS]
        return remote_op_multi(server.url, [3, x], ["n", "x"], names, on_error="status", **words)

    with peer(answering(encode_error(8, "queue full"), "429 Too Many Requests")) as server:
        for function in (call, tf.function(call)):
            outputs, status = function(tf.constant(X))
            assert status.code.numpy() == tf.errors.RESOURCE_EXHAUSTED
            assert status.message.numpy().decode() == f"queue full - from {server.url} (attempt 3 of 3)"
            shapes = [tuple(output.shape) for output in outputs]
            assert shapes == [(3, 2, 0), (3, 2, 0), (3,), (), (), (), (), (), ()]
            assert np.isnan(outputs[2].numpy()).all()
            assert all(np.isnan(tf.cast(output, tf.float32).numpy()) for output in outputs[3:5])
            assert [output.numpy() for output in outputs[5:]] == [0, False, b"", 0]


def test_with_status_a_call_that_goes_well_says_so_and_every_fault_has_its_code() -> None:
    with peer(answering(OK)) as server:
        output, status = ask(server.url, on_error="status")
        assert (status.code.numpy(), status.message.numpy()) == (0, b"")
        np.testing.assert_array_equal(output, X)
        output, status = remote_op(server.url, X, "x", "y", tf.float32, [None, 5], on_error="status")
        assert status.code.numpy() == tf.errors.INTERNAL
        assert "breaks the model's own signature" in status.message.numpy().decode()
        assert output.shape == (3, 5)
        assert np.isnan(output).all()
    with peer(silent) as server:
        _, status = ask(server.url, timeout_s=0.1, on_error="status")
        assert status.code.numpy() == tf.errors.DEADLINE_EXCEEDED
    _, status = ask(None, endpoint="REMOTE_OPS_NOT_SET", on_error="status")
    assert status.code.numpy() == tf.errors.INVALID_ARGUMENT


@pytest.mark.parametrize("pure", [True, False])
def test_with_status_the_gradient_of_a_failed_call_is_zero_and_asks_nobody(pure: bool) -> None:
    requests: list[Any] = []

    def answer(conversation: Conversation, request: Message) -> None:
        requests.append(decode_request(request.body))
        if broken.is_set():
            conversation.answer(encode_error(13, "it broke"), "500 Internal")
        else:
            count = len(requests[-1].output_names)
            conversation.answer(b"".join(encode_response([2 * requests[-1].tensors[0]] * count)))

    def gradient(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, status = remote_op(server.url, x, pure=pure, on_error="status")
        return tape.gradient(y, x), status.code

    broken = threading.Event()
    with peer(serving(mix().signature, answer)) as server:
        for function in (gradient, tf.function(gradient)):
            broken.clear()
            found, code = function(tf.constant(X))
            assert code.numpy() == 0
            np.testing.assert_array_equal(found, 2 * X)
            assert requests.pop().output_names == ("gradient:x",)
            requests.clear()
            broken.set()
            found, code = function(tf.constant(X))
            assert code.numpy() == tf.errors.INTERNAL
            np.testing.assert_array_equal(found, np.zeros_like(X))
            assert [request.output_names for request in requests] == [("y",)]
            requests.clear()


def test_with_status_a_gradient_that_fails_is_an_error_all_the_same() -> None:
    def answer(conversation: Conversation, request: Message) -> None:
        if b"gradient:x" in request.body:
            conversation.answer(encode_error(12, "no gradient today"), "501 Not Implemented")
        else:
            conversation.answer(OK)

    with peer(serving(mix().signature, answer)) as server, tf.GradientTape() as tape:
        x = tf.constant(X)
        tape.watch(x)
        y, _ = remote_op(server.url, x, on_error="status")
        with pytest.raises(tf.errors.UnimplementedError, match="no gradient today"):
            tape.gradient(y, x)


# --------------------------------------------------------------------------- time


def silent(conversation: Conversation, seen: list[int] | None = None) -> None:
    while conversation.read() is not None:
        if seen is not None:
            seen[0] += 1


def losing(conversation: Conversation, seen: list[int]) -> None:
    if conversation.read() is not None:
        seen[0] += 1


def test_a_deadline_holds_in_every_phase() -> None:
    def stalling(conversation: Conversation) -> None:
        conversation.read()
        conversation.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", OK[:10])
        conversation.read()

    for script, phase in ((silent, "waiting for the first byte"), (stalling, "receiving the answer")):
        with peer(script) as server:
            since = time.monotonic()
            with pytest.raises(tf.errors.DeadlineExceededError, match=rf"in 0\.\d+ s \(attempt 1 of 3, .* {phase}\)"):
                ask(server.url, timeout_s=0.25)
            assert 0.24 < time.monotonic() - since < 1.5
    with unreachable() as url, pytest.raises(tf.errors.DeadlineExceededError, match="connecting"):
        ask(url, timeout_s=0.25)


def test_the_timeout_of_a_call_may_be_a_tensor() -> None:
    with peer(silent) as server:
        function = tf.function(lambda timeout_s: ask(server.url, timeout_s=timeout_s))
        for call in (function, lambda timeout_s: ask(server.url, timeout_s=timeout_s)):
            with pytest.raises(tf.errors.DeadlineExceededError, match=r"in 0\.\d+ s"):
                call(tf.constant(0.2, tf.float64))
        assert len(function._list_all_concrete_functions()) == 1
        with pytest.raises(tf.errors.InvalidArgumentError, match="timeout_s: expected one number of seconds"):
            function(tf.constant(np.nan, tf.float64))


@pytest.mark.parametrize("timeout_s", [0.0, -1e30, -np.inf])
def test_a_call_without_time_is_not_sent(timeout_s: float) -> None:
    with peer(answering(OK)) as server:
        with pytest.raises(tf.errors.DeadlineExceededError, match="waiting to be sent"):
            ask(server.url, timeout_s=tf.constant(timeout_s))
        assert server.connections == 0


def test_the_ambient_deadline_shortens_an_eager_call_and_its_metadata() -> None:
    with peer(silent) as server:
        with deadline(0.2), pytest.raises(tf.errors.DeadlineExceededError, match=r"in 0\.\d+ s"):
            ask(server.url)
        with deadline(0.0), pytest.raises(tf.errors.DeadlineExceededError, match="waiting to be sent"):
            ask(server.url)
        with deadline(0.2), pytest.raises(DeadlineExceeded, match="no answer from"):
            remote_op(server.url, X)
        with pytest.raises(DeadlineExceeded, match=r"no answer from .* in 0\.\d+ s"):
            remote_op(server.url, X, timeout_s=0.2)


def test_the_waits_between_sendings_are_those_of_the_retry() -> None:
    with peer(answering(b"", "503 Unavailable")) as server:
        since = time.monotonic()
        with pytest.raises(tf.errors.UnavailableError):
            ask(server.url, retry=Retry(attempts=200, base_s=0.0, budget=math.inf))
        assert time.monotonic() - since < 5  # with the usual waits it would be minutes
        with pytest.raises(tf.errors.UnavailableError):
            ask(server.url, retry=Retry(attempts=200, base_s=100.0, max_s=0.0, budget=math.inf))
        assert time.monotonic() - since < 10


def test_retries_end_with_the_deadline() -> None:
    with peer(answering(b"", "503 Unavailable")) as server:
        since = time.monotonic()
        with pytest.raises(tf.errors.OpError):
            ask(server.url, timeout_s=0.5, retry=Retry(attempts=1000, budget=math.inf))
        assert time.monotonic() - since < 2


# --------------------------------------------------------------------------- giving up


def cancelled(server_url: str, wait: Callable[[], object], **options: Any) -> None:
    manager = cancellation.CancellationManager()
    function = tf.function(lambda x: ask(server_url, x, **options)).get_concrete_function(tf.TensorSpec((3, 4)))
    run = manager.get_cancelable_function(function)
    caught: list[BaseException] = []

    def call() -> None:
        try:
            run(tf.constant(X))
        except tf.errors.OpError as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    wait()
    since = time.monotonic()
    manager.start_cancel()
    thread.join(10)
    assert not thread.is_alive()
    assert time.monotonic() - since < 1
    assert isinstance(caught[0], tf.errors.CancelledError)


@pytest.mark.parametrize("on_error", ["raise", "status"])
def test_a_cancelled_call_ends_at_once_and_closes_its_connection(on_error: str) -> None:
    with peer(silent) as server:
        cancelled(server.url, lambda: until(lambda: server.open == 1), on_error=on_error)
        assert until(lambda: server.open == 0)


@pytest.mark.slow
def test_a_thousand_calls_cancelled_at_any_moment_end_once_each() -> None:
    def slow(conversation: Conversation) -> None:
        while conversation.read() is not None:
            time.sleep(0.001)
            conversation.answer(OK)

    with peer(slow) as server:
        function = tf.function(lambda x: ask(server.url, x)).get_concrete_function(tf.TensorSpec((3, 4)))
        x, ends = tf.constant(X), {"answered": 0, "cancelled": 0}
        for n in range(1000):
            manager = cancellation.CancellationManager()
            run = manager.get_cancelable_function(function)
            timer = threading.Timer((n % 50) / 1e4, manager.start_cancel)
            timer.start()
            try:
                run(x)
                ends["answered"] += 1
            except tf.errors.CancelledError:
                ends["cancelled"] += 1
            timer.join()
        assert sum(ends.values()) == 1000
        assert min(ends.values()) > 10, ends
        assert ask(server.url).shape == (3, 4)


# --------------------------------------------------------------------------- headers, TLS, unix sockets


def test_a_header_is_read_from_the_environment_at_each_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Message] = []
    with peer(answering(OK, seen=seen)) as server:
        headers = {"Authorization": "Bearer ${REMOTE_OPS_TEST_TOKEN}"}
        function = tf.function(lambda x: ask(server.url, x, headers=headers))
        for token in ("first", "second"):
            monkeypatch.setenv("REMOTE_OPS_TEST_TOKEN", token)
            function(tf.constant(X))
            assert seen[-1].headers["authorization"] == f"Bearer {token}"
        graph = function.get_concrete_function(tf.TensorSpec((3, 4))).graph.as_graph_def().SerializeToString()
        assert b"second" not in graph
        assert b"${REMOTE_OPS_TEST_TOKEN}" in graph
        monkeypatch.setenv("REMOTE_OPS_TEST_TOKEN", "a\r\nX-Evil: 1")
        with pytest.raises(tf.errors.InvalidArgumentError, match="'Authorization' has a value with a line end"):
            function(tf.constant(X))
        monkeypatch.delenv("REMOTE_OPS_TEST_TOKEN")
        with pytest.raises(tf.errors.InvalidArgumentError, match="REMOTE_OPS_TEST_TOKEN, which is not set"):
            function(tf.constant(X))
    with pytest.raises(SpecError, match="'Authorization' has a literal value"):
        ask("http://127.0.0.1:1/m", headers={"Authorization": "Bearer secret"})


def test_the_url_is_read_from_the_environment_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def numbers(number: float) -> Script:
        return answering(b"".join(encode_response([np.float32([number])])))

    def call(x: Any) -> Any:
        return remote_op(None, x, "x", "y", tf.float32, endpoint="RANKER_URL", retry=ONE)

    function = tf.function(call)
    monkeypatch.delenv("RANKER_URL", raising=False)
    for ask_it in (call, function):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"environment variable RANKER_URL.* is not set"):
            ask_it(tf.constant(X))
    with peer(numbers(1)) as one, peer(numbers(2)) as two:
        for server, number in ((one, 1), (two, 2), (one, 1)):
            monkeypatch.setenv("RANKER_URL", f"{server.url}?key=secret")
            assert [float(ask_it(tf.constant(X))[0]) for ask_it in (call, function)] == [number] * 2
        monkeypatch.setenv("RANKER_URL", f" {one.url}  {two.url}")
        assert {float(function(tf.constant(X))[0]) for _ in range(4)} == {1, 2}
    monkeypatch.setenv("RANKER_URL", f"{one.url}?key=secret")
    with pytest.raises(tf.errors.UnavailableError, match=rf"cannot connect .* - at {one.url}") as caught:
        function(tf.constant(X))
    assert "secret" not in caught.value.message
    monkeypatch.setenv("RANKER_URL", "ftp://elsewhere")
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"RANKER_URL holds no URL of a model: .*'ftp://elsewhere'"
    ):
        function(tf.constant(X))


def test_metadata_comes_from_where_the_variable_says(
    served: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANKER_URL", raising=False)
    with pytest.raises(SpecError, match=r"environment variable RANKER_URL, .* is not set: set it, or give names"):
        remote_op(None, X, endpoint="RANKER_URL")
    monkeypatch.setenv("RANKER_URL", served("mix"))
    np.testing.assert_allclose(remote_op(None, X, endpoint="RANKER_URL"), np.sin(X) @ MATRIX, rtol=1e-6)
    monkeypatch.setenv("RANKER_URL", "http://[::1]:9000/m")
    with pytest.raises(SpecError, match=r"variable RANKER_URL holds .*no IPv6"):
        remote_op(None, X, endpoint="RANKER_URL")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


def test_https_trusts_the_given_authority_and_no_other(authority: trustme.CA, tmp_path: Path) -> None:
    ca, other = tmp_path / "ca.pem", tmp_path / "other.pem"
    authority.cert_pem.write_to_path(str(ca))
    trustme.CA().cert_pem.write_to_path(str(other))
    with peer(answering(OK), tls=server_context(authority)) as server:
        assert ask(server.url, tls=TLS(ca=str(ca))).shape == (3, 4)
        assert ask(server.url, tls=TLS(verify=False)).shape == (3, 4)
        for tls in (TLS(ca=str(other)), None):
            with pytest.raises(tf.errors.UnavailableError, match=r"cannot connect .*certificate"):
                ask(server.url, tls=tls)
        with pytest.raises(tf.errors.InvalidArgumentError, match="certificates do not load"):
            ask(server.url, tls=TLS(ca=str(tmp_path / "none.pem")))


def test_https_shows_the_client_certificate(authority: trustme.CA, tmp_path: Path) -> None:
    ca, cert, key = (tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem"))
    authority.cert_pem.write_to_path(str(ca))
    mine = authority.issue_cert("me@example.org")
    mine.cert_chain_pems[0].write_to_path(str(cert))
    mine.private_key_pem.write_to_path(str(key))
    context = server_context(authority)
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    with peer(answering(OK), tls=context) as server:
        assert ask(server.url, tls=TLS(ca=str(ca), cert=str(cert), key=str(key))).shape == (3, 4)
        with pytest.raises(tf.errors.UnavailableError):
            ask(server.url, tls=TLS(ca=str(ca)), retry=ONE)


def test_a_unix_socket_is_called_like_an_address(tmp_path: Path) -> None:
    paths = [tmp_path / "a.sock", tmp_path / "b.sock"]
    with contextlib.ExitStack() as stack:
        for path, factor in zip(paths, (1, 2), strict=True):
            model = FunctionServable(
                lambda x, factor=factor: x * np.float32(factor),
                [TensorSpec("x", "float32", (-1, 4))], [TensorSpec("y", "float32", (-1, 4))],
            )  # fmt: skip
            stack.enter_context(server_ref.running({"m": model}, f"unix:{path}"))
        for _ in range(3):
            for path, factor in zip(paths, (1, 2), strict=True):
                url = f"http+unix://{str(path).replace('/', '%2F')}/m"
                np.testing.assert_allclose(remote_op(url, X), factor * X)
    with pytest.raises(tf.errors.UnavailableError, match="cannot connect"):
        ask(f"http+unix://{str(tmp_path / 'none.sock').replace('/', '%2F')}/m")


# --------------------------------------------------------------------------- building


FIRST_CALL = """
import sys, numpy as np
from remote_ops.tf import op_library, remote_op
remote_op(sys.argv[1], np.zeros(1, np.float32), "x", "y", "float32", timeout_s=2.0)
print(op_library())
"""


@pytest.mark.slow
def test_processes_that_start_at_once_build_one_library_and_no_call_is_late_for_it(tmp_path: Path) -> None:
    environment = {**os.environ, "REMOTE_OPS_CACHE": str(tmp_path)}
    with peer(answering(OK)) as server:
        running = [
            subprocess.Popen(
                [sys.executable, "-c", FIRST_CALL, server.url],
                env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True,
            )
            for _ in range(3)
        ]  # fmt: skip
        paths = {process.communicate(timeout=110)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(paths) == 1
    assert sorted(path.suffix for path in (tmp_path / "ops").iterdir()) == [".lock", ".so"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "error"),
    [
        ("no-such-compiler", "CompilerMissing: .*expected 'no-such-compiler' on the PATH, got none; install g"),
        ("false", "remote_ops.tf.library.BuildError: .*does not build: false ended with 1"),
    ],
)
def test_a_compiler_that_is_missing_and_one_that_fails_are_two_clear_errors(
    tmp_path: Path, compiler: str, error: str
) -> None:
    code = "from remote_ops.tf.ops import load_ops; load_ops()"
    environment = {**os.environ, "REMOTE_OPS_CACHE": str(tmp_path), "CXX": compiler}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert re.search(error, done.stderr), done.stderr[-2000:]


def test_the_op_can_be_built_ahead_of_time() -> None:
    command = [sys.executable, "-m", "remote_ops.tf.build"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(op_library())
