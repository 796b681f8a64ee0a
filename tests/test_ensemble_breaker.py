"""A node's circuit breaker: what is down is not asked, and asked again after a while, by one call at a time."""

from __future__ import annotations

import asyncio
import pickle
import threading

import numpy as np
import pytest

import server_ref
from ensemble.breaker import Guarded
from remote_ops.client import Endpoint
from remote_ops.errors import ConnectError, InternalError, ModelUnavailable, RemoteOpsError, SignatureError
from remote_ops.policy import Breaker, Retry
from remote_ops.servable import FunctionServable
from remote_ops.signature import Array, TensorSpec

X = {"x": np.ones(2, np.float32)}
SPEC = [TensorSpec("x", "float32", (-1,))]


class Model:
    """A model that fails while it is told to, and counts its calls."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.calls = 0
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def __call__(self, x: Array) -> Array:
        self.calls += 1
        self.entered.set()
        self.go_on.wait(10)
        if self.error is not None:
            raise self.error
        return x


class Clock:
    """A clock that stands still until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def guarded(url: str, clock: Clock) -> Guarded:
    """An endpoint that is left alone for 10 s after three failures in a row."""
    return Guarded(Endpoint(url, retry=Retry(attempts=1)), Breaker(3, 10.0), clock)


def outcome(node: Guarded) -> str:
    """What comes of a call: `answer`, or the class of the error."""
    try:
        node.infer(X)
    except RemoteOpsError as error:
        return type(error).__name__
    return "answer"


def test_after_failures_in_a_row_it_is_not_asked_until_the_time_is_over_and_then_once() -> None:
    model, clock = Model(), Clock()
    with server_ref.running({"m": FunctionServable(model, SPEC, SPEC)}) as url:
        node = guarded(url, clock)
        assert outcome(node) == "answer"
        model.error = ModelUnavailable("down")
        assert [outcome(node) for _ in range(5)] == ["ModelUnavailable"] * 3 + ["ConnectError"] * 2
        assert model.calls == 4
        with pytest.raises(ConnectError, match=r"was not asked: 3 failures in a row, it is asked again in 10 s"):
            node.infer(X)
        clock.now = 10.0
        assert [outcome(node) for _ in range(2)] == ["ModelUnavailable", "ConnectError"]  # one probe, twice as long
        clock.now = 29.9
        assert outcome(node) == "ConnectError"
        clock.now, model.error = 30.0, None
        assert [outcome(node) for _ in range(4)] == ["answer"] * 4


def test_one_failure_between_answers_opens_nothing() -> None:
    model, clock = Model(), Clock()
    with server_ref.running({"m": FunctionServable(model, SPEC, SPEC)}) as url:
        node = guarded(url, clock)
        for _ in range(5):
            model.error = ModelUnavailable("down")
            assert outcome(node) == "ModelUnavailable"
            model.error = None
            assert outcome(node) == "answer"


def test_errors_of_the_request_or_of_the_model_itself_open_nothing() -> None:
    model, clock = Model(), Clock()
    with server_ref.running({"m": FunctionServable(model, SPEC, SPEC)}) as url:
        node = guarded(url, clock)
        model.error = ValueError("the model raises")
        for _ in range(5):
            with pytest.raises(InternalError):
                node.infer(X)
            with pytest.raises(SignatureError):
                node.infer({"z": X["x"]})
        model.error = None
        assert outcome(node) == "answer"


def test_while_a_call_probes_it_others_are_refused() -> None:
    model, clock = Model(), Clock()
    with server_ref.running({"m": FunctionServable(model, SPEC, SPEC)}) as url:
        node = guarded(url, clock)
        model.error = ModelUnavailable("down")
        assert [outcome(node) for _ in range(3)] == ["ModelUnavailable"] * 3
        clock.now, model.error = 10.0, None
        model.go_on.clear()
        model.entered.clear()
        probe: list[str] = []
        thread = threading.Thread(target=lambda: probe.append(outcome(node)))
        thread.start()
        assert model.entered.wait(10)
        with pytest.raises(ConnectError, match="a call is probing it"):
            node.infer(X)
        model.go_on.set()
        thread.join(10)
        assert probe == ["answer"]
        assert outcome(node) == "answer"


def test_a_probe_that_is_cancelled_leaves_the_next_call_to_probe() -> None:
    model, clock = Model(), Clock()

    async def cancelled(node: Guarded) -> None:
        task = asyncio.ensure_future(node.ainfer(X))
        await asyncio.to_thread(model.entered.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with server_ref.running({"m": FunctionServable(model, SPEC, SPEC)}) as url:
        node = guarded(url, clock)
        model.error = ModelUnavailable("down")
        assert [outcome(node) for _ in range(3)] == ["ModelUnavailable"] * 3
        clock.now, model.error = 10.0, None
        model.go_on.clear()
        model.entered.clear()
        asyncio.run(cancelled(node))
        model.go_on.set()
        assert outcome(node) == "answer"


def test_a_copy_starts_anew() -> None:
    node = guarded("http://127.0.0.1:1/m", Clock())
    assert [outcome(node) for _ in range(4)] == ["ConnectError"] * 4
    copy = pickle.loads(pickle.dumps(node))
    with pytest.raises(ConnectError, match="refused"):
        copy.infer(X)
