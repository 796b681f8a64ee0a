"""The engine runs a plan as `run_serial` does, only sooner; and ends it when it must."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import pickle
import threading
import time
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from plans import ROWS, function, node, plan, rows, wire
from rawpeer import until

import server_ref
from ensemble.ensemble import Ensemble
from ensemble.forms import Form
from ensemble.nodes.node import Batching, Default
from ensemble.plan import Plan, PlanInput, PlanNode
from ensemble.serial import run_serial
from ensemble.steps import Assembly, Call, Calls, ModelStep, Piece
from ensemble.trace import trace_of
from remote_ops import Deadline, Endpoint, Retry
from remote_ops.deadline import deadline
from remote_ops.errors import (
    DeadlineExceeded,
    InternalError,
    ModelUnavailable,
    NodeError,
    Overloaded,
    RemoteOpsError,
    SignatureError,
    answer_of,
)

Array = npt.NDArray[Any]

PLACES = ["inline", "thread", "loop"]


class Awaited:
    """A model on the loop, which may take a while."""

    def __init__(self, fn: Any, lasts_s: float = 0.0, inputs: tuple[str, ...] = ("x",)) -> None:
        self._servable = function(fn, inputs)
        self.signature = self._servable.signature
        self.lasts_s = lasts_s
        self.calls = self.cancelled = 0
        self.wanted: list[Any] = []

    def infer(self, *args: Any, **options: Any) -> Any:
        return self._servable.infer(*args, **options)

    async def ainfer(self, inputs: Any, outputs: Any = None, *, config: bytes = b"", deadline: Any = None) -> Any:
        self.calls += 1
        self.wanted.append(outputs)
        try:
            await asyncio.sleep(self.lasts_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.infer(inputs, outputs, config=config, deadline=deadline)


def awaited(fn: Any = lambda x: x, lasts_s: float = 0.0) -> Any:

    return ModelStep(Awaited(fn, lasts_s), {}, "loop")


def add(a: Array, b: Array) -> Array:
    return a + b


def diamond(place: str = "inline") -> Plan:
    return plan(
        node("root", lambda x: x + 1, place=place),
        node("left", lambda x: 2 * x, "root", place=place),
        node("right", lambda x: 3 * x, "root", place=place),
        node("sum", add, {"a": "left", "b": "right"}, place=place),
    )


@pytest.mark.parametrize("place", PLACES)
def test_a_diamond_gives_what_run_serial_gives(place: str) -> None:
    graph, x = diamond(place), rows()
    with Ensemble(graph) as ensemble:
        for result in (ensemble.infer({"x": x}), ensemble.run({"x": x}), asyncio.run(ensemble.ainfer({"x": x}))):
            np.testing.assert_array_equal(result["y"], run_serial(graph, {"x": x})["y"])
        np.testing.assert_array_equal(ensemble(x), result["y"])
        np.testing.assert_allclose(ensemble.submit({"x": x}).result(5)["y"], 5 * (x + 1), rtol=1e-6)


@pytest.mark.parametrize("place", PLACES)
def test_a_parent_of_two_runs_once(place: str) -> None:
    ran = []

    def once(x: Array) -> Array:
        ran.append(1)
        return x

    shared = node("root", once, place=place)
    graph = plan(
        shared, *[node(name, lambda x: x, "root", place=place) for name in "ab"], node("s", add, {"a": "a", "b": "b"})
    )
    with Ensemble(graph) as ensemble:
        ensemble.infer({"x": rows()})
    assert ran == [1]


def test_what_the_outputs_do_not_need_does_not_run_even_if_it_feeds_what_they_need() -> None:
    ran: list[str] = []

    def noting(name: str) -> Any:
        def fn(x: Array) -> Array:
            ran.append(name)
            return x

        return fn

    graph = plan(
        node("a", noting("a")),
        node("b", noting("b"), "a"),
        node("c", noting("c"), "a"),
        outputs={"of_a": "a", "of_b": "b", "of_c": "c"},
    )
    with Ensemble(graph) as ensemble:
        assert list(ensemble.infer({"x": rows()}, ["of_b"])) == ["of_b"]
        assert ran == ["a", "b"]
        ensemble.infer({"x": rows()}, ["of_c", "of_a"])
    assert ran == ["a", "b", "a", "c"]


def test_any_order_of_outputs_comes_as_asked_and_what_is_kept_of_them_is_bounded() -> None:
    names = [f"o{index}" for index in range(9)]
    graph = plan(*[node(name, lambda x, k=k: x + k) for k, name in enumerate(names)], outputs={n: n for n in names})
    with Ensemble(graph) as ensemble:
        for order in itertools.permutations(names[:3]):
            assert list(ensemble.infer({"x": rows()}, order)) == list(order)
        assert ensemble._now.engine._routes.cache_info().currsize == 1
        for count in range(1, 9):
            for some in itertools.combinations(names, count):
                assert list(ensemble.infer({"x": rows(1)}, some)) == list(some)
        assert ensemble._now.engine._routes.cache_info().currsize == 256


def test_a_model_is_asked_only_for_the_outputs_that_are_read() -> None:
    model = Awaited(lambda x: x)
    two = {"y": ROWS, "z": ROWS}

    graph = plan(node("a", ModelStep(model, {"y": "y"}, "loop"), outputs=two), outputs={"y": "a.y"})
    with Ensemble(graph) as ensemble:
        ensemble.infer({"x": rows()})
    assert model.wanted == [("y",)]


def test_independent_nodes_run_at_once() -> None:
    barrier = threading.Barrier(4, timeout=10)

    def meet(x: Array) -> Array:
        barrier.wait()
        return x

    fan = [node(f"n{index}", meet, place="thread") for index in range(4)]
    graph = plan(*fan, outputs={f"o{index}": f"n{index}" for index in range(4)})
    with Ensemble(graph, threads=4) as ensemble:
        assert len(ensemble.infer({"x": rows()})) == 4


def test_a_chain_of_two_thousand_nodes_runs() -> None:
    chain = [node("n0", lambda x: x + 1)]
    chain += [node(f"n{index}", lambda x: x + 1, f"n{index - 1}") for index in range(1, 2000)]
    with Ensemble(plan(*chain)) as ensemble:
        np.testing.assert_array_equal(ensemble(np.zeros((1, 4), np.float32)), np.full((1, 4), 2000, np.float32))


# --------------------------------------------------------------------------- failures


def fails(x: Array) -> Array:
    raise InternalError("no such row")


def breaks(x: Array) -> Array:
    return x / np.zeros(3)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("fn", "words"), [(fails, "no such row"), (breaks, "ValueError")])
def test_a_node_that_fails_is_named_with_its_cause(place: str, fn: Any, words: str) -> None:
    graph = plan(node("a", lambda x: x), node("bad", fn, "a", place=place), node("c", lambda x: x, "bad"))
    with Ensemble(graph) as ensemble:
        with pytest.raises(NodeError, match=f"node 'bad' of 'graph' .plain. failed: .*{words}") as caught:
            ensemble.infer({"x": rows()})
        assert (caught.value.node, caught.value.graph) == ("bad", "graph")
        assert caught.value.__cause__ is not None
        with pytest.raises(NodeError, match="'bad'"):
            run_serial(graph, {"x": rows()})


def test_the_first_error_ends_a_run_and_cancels_what_is_awaited() -> None:
    slow = awaited(lasts_s=30)

    def soon(x: Array) -> Array:
        raise ModelUnavailable("loading")

    graph = plan(node("slow", slow), node("bad", soon, place="thread"), node("s", add, {"a": "slow", "b": "bad"}))
    with Ensemble(graph) as ensemble:
        since = time.monotonic()
        with pytest.raises(NodeError, match="'bad'"):
            ensemble.infer({"x": rows()})
        assert time.monotonic() - since < 10
        assert until(lambda: slow.servable.cancelled == 1)
        assert ensemble.stats().inflight == 0


@pytest.mark.parametrize("place", PLACES)
def test_on_error_default_stands_in(place: str) -> None:
    graph = plan(node("bad", fails, place=place, on_error=Default(default=0.5)), node("c", lambda x: x + 1, "bad"))
    with Ensemble(graph) as ensemble:
        result = ensemble.infer({"x": rows(5)})["y"]
    assert (result.dtype, result.tolist()) == (np.float32, [[1.5] * 4] * 5)
    np.testing.assert_array_equal(run_serial(graph, {"x": rows(5)})["y"], result)


def test_on_error_skip_leaves_an_output_missing_which_is_said() -> None:
    graph = plan(node("bad", fails, on_error="skip"), node("c", lambda x: x, "bad"))
    with Ensemble(graph) as ensemble, pytest.raises(NodeError, match=r"output 'y' .* 'bad' was skipped .no such row"):
        ensemble.infer({"x": rows()})


def test_inputs_that_do_not_fit_are_refused_before_anything_runs() -> None:
    ran: list[int] = []
    graph = plan(
        node("a", lambda a, b: ran.append(1) or a, {"a": "$inputs.a", "b": "$inputs.b"}), inputs={"a": ROWS, "b": ROWS}
    )
    with Ensemble(graph) as ensemble:
        with pytest.raises(SignatureError, match="input 'a': expected float32"):
            ensemble.infer({"a": rows().astype(np.float64), "b": rows()})
        with pytest.raises(SignatureError, match="input 'b': N is 3 by 'a', 4 by this float32"):
            ensemble.infer({"a": rows(3), "b": rows(4)})
        with pytest.raises(SignatureError, match="no input 'c'"):
            ensemble.infer({"a": rows(3), "c": rows(4)})
        with pytest.raises(SignatureError, match="no output 'z'"):
            ensemble.infer({"a": rows(3), "b": rows(3)}, ["z"])
    assert ran == []


def test_an_optional_input_has_its_default_or_is_missing() -> None:
    prior = PlanInput(Form("float32", ("N", 4)), True, 0.25)
    graph = plan(node("s", add, {"a": "$inputs.x", "b": "$inputs.prior"}), inputs={"x": ROWS, "prior": prior})
    with Ensemble(graph) as ensemble:
        x = rows()
        np.testing.assert_array_equal(ensemble.infer({"x": x})["y"], x + np.float32(0.25))
        np.testing.assert_array_equal(ensemble.infer({"x": x, "prior": x})["y"], 2 * x)


# --------------------------------------------------------------------------- deadlines


@pytest.mark.parametrize("how", ["deadline", "ambient", "graph", "timeout_s"])
def test_a_run_ends_at_its_deadline_and_says_who_was_at_it(how: str) -> None:
    chain = [node("a", awaited(lasts_s=0.05)), node("b", awaited(lasts_s=30), "a"), node("c", awaited(), "b")]
    graph = plan(*chain, deadline_s=0.2 if how == "graph" else None)
    with Ensemble(graph, timeout_s=0.2 if how == "timeout_s" else 30) as ensemble:
        since = time.monotonic()
        with pytest.raises(
            DeadlineExceeded, match=r"no answer from 'graph' in 0\.\d+ s: waiting for 'b' .plain, 0\.\d+ s"
        ):
            with deadline(0.2) if how == "ambient" else contextlib.nullcontext():
                ensemble.infer({"x": rows()}, deadline=Deadline.after(0.2) if how == "deadline" else None)
        assert 0.19 < time.monotonic() - since < 5
        assert until(lambda: chain[1].step.servable.cancelled == 1)  # type: ignore[union-attr]
        assert chain[2].step.servable.calls == 0  # type: ignore[union-attr]


def test_a_deadline_does_not_wait_for_a_thread_whose_result_is_dropped() -> None:
    release = threading.Event()
    graph = plan(node("a", lambda x: release.wait(30) and x, place="thread"))
    with Ensemble(graph) as ensemble:
        with pytest.raises(DeadlineExceeded, match="waiting for 'a'"):
            ensemble.infer({"x": rows()}, deadline=Deadline.after(0.1))
        release.set()
        assert until(lambda: ensemble.stats().dropped == 1)


@pytest.mark.parametrize("place", ["thread", "loop"])
def test_a_timeout_of_a_node_is_an_error_of_that_node(place: str) -> None:
    release = threading.Event()
    step: Any = awaited(lasts_s=30) if place == "loop" else lambda x: release.wait(30) and x
    graph = plan(node("a", step, place=place, timeout="50ms", on_error=Default(default=7)))
    with Ensemble(graph) as ensemble:
        assert ensemble.infer({"x": rows(1)})["y"].tolist() == [[7] * 4]
    release.set()


def test_every_node_is_told_what_is_left() -> None:
    told: list[float] = []

    class Asked(Awaited):
        async def ainfer(self, inputs: Any, outputs: Any = None, *, config: bytes = b"", deadline: Any = None) -> Any:
            told.append(deadline.remaining())
            return await super().ainfer(inputs, outputs, deadline=deadline)

    chain = [
        node("a", ModelStep(Asked(lambda x: x, 0.05), {}, "loop")),
        node("b", ModelStep(Asked(lambda x: x), {}, "loop"), "a"),
    ]
    with Ensemble(plan(*chain)) as ensemble:
        ensemble.infer({"x": rows()}, deadline=Deadline.after(5))
    assert 4 < told[1] <= told[0] - 0.05


# --------------------------------------------------------------------------- memory


def test_a_tensor_is_let_go_after_its_last_use() -> None:
    alive: list[weakref.ref[Any]] = []
    most = [0]

    class Big(np.ndarray[Any, Any]):
        pass

    def step(x: Array) -> Array:
        made = (x + 1).view(Big)
        alive.append(weakref.ref(made))
        gc.collect()
        most[0] = max(most[0], sum(one() is not None for one in alive))
        return made

    chain = [node("n0", step, place="thread")]
    chain += [node(f"n{index}", step, f"n{index - 1}", place="thread") for index in range(1, 20)]
    with Ensemble(plan(*chain)) as ensemble:
        ensemble.infer({"x": rows()})
    assert most[0] <= 3


def test_local_nodes_hand_arrays_on_without_a_copy() -> None:
    seen: list[Array] = []

    def keep(x: Array) -> Array:
        seen.append(x)
        return x

    x = rows()
    with Ensemble(plan(node("a", keep), node("b", keep, "a", place="thread"))) as ensemble:
        result = ensemble(x)
    assert all(np.shares_memory(one, x) for one in [*seen, result])


def test_code_that_writes_into_its_input_changes_nobody_elses() -> None:
    def writes(x: Array) -> Array:
        x += 1
        return x

    def step(mutates: bool) -> ModelStep:
        return ModelStep(function(writes), {}, "inline", mutates=mutates)

    x = rows()
    graph = plan(
        node("root", lambda x: x + 0),
        node("writer", step(True), "root"),
        node("again", step(True), "writer"),
        node("reader", add, {"a": "root", "b": "again"}),
    )
    for run in (Ensemble(graph).infer, lambda inputs: run_serial(graph, inputs)):
        np.testing.assert_allclose(run({"x": x})["y"], x + (x + 2), rtol=1e-6)  # type: ignore[operator]
    kept = x.copy()
    np.testing.assert_array_equal(Ensemble(plan(node("writer", step(True))))(x), x + 1)
    np.testing.assert_array_equal(x, kept)
    with pytest.raises(NodeError, match="read-only"):
        Ensemble(plan(node("writer", step(False))))(x)


# --------------------------------------------------------------------------- who may run


def test_the_door_lets_so_many_in_and_tells_the_rest_at_once() -> None:
    release, inside = threading.Event(), threading.Semaphore(0)

    def wait(x: Array) -> Array:
        inside.release()
        release.wait(30)
        return x

    class Admission:
        max_inflight, max_queued, max_bytes = 2, 3, None

    with Ensemble(plan(node("a", wait, place="thread"), admission=Admission), threads=8) as ensemble:
        runs = [ensemble.submit({"x": rows()}) for _ in range(5)]
        assert inside.acquire(timeout=10)
        assert inside.acquire(timeout=10)
        assert until(lambda: ensemble.stats()[:2] == (2, 3))
        with pytest.raises(Overloaded, match="'graph' has 2 runs in flight and 3 that wait"):
            ensemble.infer({"x": rows()})
        with pytest.raises(Overloaded):
            ensemble.infer({"x": rows()})
        assert ensemble.stats().refused == 2
        runs.pop().cancel()
        assert until(lambda: ensemble.stats().queued == 2)
        release.set()
        assert [run.result(10)["y"].shape for run in runs] == [(3, 4)] * 4
        assert until(lambda: ensemble.stats()[:2] == (0, 0))


def test_the_door_counts_bytes_and_a_waiting_run_keeps_its_deadline() -> None:
    release = threading.Event()

    class Admission:
        max_inflight, max_queued, max_bytes = 9, 9, 100

    graph = plan(node("a", lambda x: release.wait(30) and x, place="thread"), admission=Admission)
    with Ensemble(graph) as ensemble:
        first = ensemble.submit({"x": rows(100)})  # alone it may have more
        assert until(lambda: ensemble.stats().inflight == 1)
        with pytest.raises(DeadlineExceeded, match="no room"):
            ensemble.infer({"x": rows(1)}, deadline=Deadline.after(0.05))
        release.set()
        assert first.result(10)["y"].shape == (100, 4)
        assert ensemble.infer({"x": rows(1)})["y"].shape == (1, 4)


def test_max_inflight_holds_over_all_runs() -> None:
    most, now, lock = [0], [0], threading.Lock()

    def counted(x: Array) -> Array:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.005)
        with lock:
            now[0] -= 1
        return x

    with Ensemble(plan(node("a", counted, place="thread", max_inflight=2)), threads=8) as ensemble:
        for run in [ensemble.submit({"x": rows()}) for _ in range(20)]:
            run.result(10)
    assert most[0] == 2


@pytest.mark.parametrize("waiting", [0, 1])
def test_a_run_more_than_may_wait_at_a_node_is_refused_at_once(waiting: int) -> None:
    release, inside = threading.Event(), threading.Semaphore(0)

    def wait(x: Array) -> Array:
        inside.release()
        release.wait(30)
        return x

    one = node("a", wait, place="thread", max_inflight=1, max_queued=waiting)
    with Ensemble(plan(node("first", awaited()), one)) as ensemble:
        runs = [ensemble.submit({"x": rows()}) for _ in range(1 + waiting)]
        assert inside.acquire(timeout=10)
        assert until(lambda: len(ensemble._now.engine._slots[one]._waiting) == waiting)
        with pytest.raises(NodeError, match=f"'a' has 1 calls in flight and {waiting} runs that wait") as caught:
            ensemble.infer({"x": rows()})
        assert isinstance(caught.value.__cause__, Overloaded)
        assert answer_of(caught.value).status == 429
        release.set()
        assert [run.result(10)["y"].shape for run in runs] == [(3, 4)] * len(runs)
        assert ensemble.infer({"x": rows()})["y"].shape == (3, 4)


def test_calls_of_one_run_wait_for_each_other_where_no_other_run_may() -> None:
    body = plan(node("one", lambda x: x, place="thread", max_inflight=1, max_queued=0))
    graph = plan(node("each", Items(), children={"body": body}))
    with Ensemble(graph, threads=4) as ensemble:
        np.testing.assert_array_equal(ensemble(rows(20)), rows(20))


def test_runs_at_one_node_at_a_time_share_calls() -> None:
    calls: list[int] = []

    def model(x: Array) -> Array:
        calls.append(len(x))
        return 2 * x

    graph = plan(node("a", model, place="thread", batching=Batching(max_size=32, max_delay="5s")))
    with Ensemble(graph) as ensemble:
        runs = [ensemble.submit({"x": rows(1, seed)}) for seed in range(32)]
        for seed, run in enumerate(runs):
            np.testing.assert_array_equal(run.result(10)["y"], 2 * rows(1, seed))
        assert calls == [32]
        short = ensemble.infer({"x": rows(2)}, deadline=Deadline.after(1.0))  # it does not wait until it is late
        assert len(short["y"]) == 2


# --------------------------------------------------------------------------- quorums


class Quorum:
    def __init__(self, least: int, grace: float = 0.0, required: tuple[str, ...] = ()) -> None:
        self.min, self.grace, self.required = least, grace, required


class Mean:
    """The mean of those that answered."""

    def run(self, inputs: Any, wanted: Any) -> Any:
        from ensemble.steps import Missing

        there = [value for value in inputs.values() if not isinstance(value, Missing)]
        return {"y": (sum(there) / len(there)).astype(np.float32)}

    def vjp(self, inputs: Any, outputs: Any, cotangents: Any) -> Any:
        from ensemble.steps import Missing

        there = [name for name, value in inputs.items() if not isinstance(value, Missing)]
        return {name: cotangents["y"] / len(there) for name in there}


def vote(members: list[PlanNode], quorum: Quorum) -> Plan:
    wires = [wire(one.name, one.name, needed=one.name in quorum.required) for one in members]
    return plan(*members, node("vote", Mean(), wires=wires, quorum=quorum))


def test_a_quorum_goes_on_without_those_that_hang() -> None:
    members = [node(f"m{index}", lambda x, k=index: x + k) for index in range(3)]
    hung = [node(f"h{index}", awaited(lasts_s=30)) for index in range(2)]
    with Ensemble(vote([*hung, *members], Quorum(3, 0.02))) as ensemble:
        since = time.monotonic()
        np.testing.assert_allclose(ensemble(rows()), rows() + 1, rtol=1e-6)
        assert time.monotonic() - since < 5
        assert all(until(lambda one=one: one.step.servable.cancelled == 1) for one in hung)  # type: ignore[misc]


@pytest.mark.parametrize("place", ["thread", "loop"])
def test_a_quorum_without_a_grace_does_not_wait_for_those_that_hang(place: str) -> None:
    release = threading.Event()
    hangs: Any = awaited(lasts_s=30) if place == "loop" else lambda x: release.wait(30) and x
    members = [node("hung", hangs, place=place), node("quick", lambda x: x + 1)]
    try:
        with Ensemble(vote(members, Quorum(1))) as ensemble:
            found = ensemble.infer({"x": rows()}, deadline=Deadline.after(10))
            np.testing.assert_allclose(found["y"], rows() + 1, rtol=1e-6)
    finally:
        release.set()


def test_a_member_that_fails_is_forgiven_while_the_quorum_is_met() -> None:
    members = [node("a", lambda x: x), node("b", fails), node("c", lambda x: x + 2)]
    graph = vote(members, Quorum(2))
    with Ensemble(graph) as ensemble:
        np.testing.assert_allclose(ensemble(rows()), rows() + 1, rtol=1e-6)
    with Ensemble(vote(members, Quorum(3))) as ensemble:
        with pytest.raises(NodeError, match=r"'vote' .* answers of 3 members or more, got 2: 'b': no such row"):
            ensemble(rows())
    with Ensemble(vote(members, Quorum(1, required=("b",)))) as ensemble, pytest.raises(NodeError, match="node 'b'"):
        ensemble(rows())


def test_a_run_tells_which_members_a_vote_did_without() -> None:
    members = [node("a", fails), node("b", lambda x: x), node("hung", awaited(lasts_s=30))]
    with Ensemble(vote(members, Quorum(1))) as ensemble:
        assert ensemble.run({"x": rows()}).missing == {"vote": ("a", "hung")}
    with Ensemble(vote(members[1:2], Quorum(1))) as ensemble:
        result = ensemble.run({"x": rows()})
        assert result.missing == {}
        assert pickle.loads(pickle.dumps(result)).missing == {}


class Items:
    """A controller: its body runs for every row."""

    def steps(self, inputs: Any, wanted: Any) -> Any:
        x = inputs["x"]
        calls = [
            Call("body", {"x": x[one : one + 1]}, wanted, slice(one, one + 1), cut=("x",)) for one in range(len(x))
        ]
        yield Calls(calls, 2)
        return Assembly([Piece(one, put=slice(one, one + 1)) for one in range(len(x))], len(x))


def test_a_vote_in_a_body_tells_of_the_members_missing_for_any_item() -> None:
    def odd(x: Array) -> Array:
        return fails(x) if x[0, 0] % 2 else x

    def even(x: Array) -> Array:
        return x if x[0, 0] % 2 else fails(x)

    body = vote([node("odd", odd), node("all", lambda x: x), node("even", even)], Quorum(1))
    graph = plan(node("each", Items(), children={"body": body}))
    x = np.arange(4, dtype=np.float32)[:, None].repeat(4, 1)
    with Ensemble(graph) as ensemble:
        assert ensemble.run({"x": x}).missing == {"each/vote": ("odd", "even")}


# --------------------------------------------------------------------------- trace


def test_a_trace_says_of_every_node_when_it_was_ready_began_and_ended() -> None:
    graph = plan(
        node("a", awaited(lasts_s=0.02)), node("b", lambda x: x, "a", place="thread"), node("c", lambda x: x, "b")
    )
    with Ensemble(graph) as ensemble:
        result = ensemble.run({"x": rows()}, trace=True)
    trace = result.trace
    assert trace is not None
    assert [span.node for span in trace.spans] == ["a", "b", "c"]
    assert all(span.ready <= span.began <= span.ended <= trace.ended for span in trace.spans)
    assert [span.node for span in trace.critical_path()] == ["a", "b", "c"]
    assert [(span.bytes_in, span.bytes_out) for span in trace.spans] == [(48, 48)] * 3
    assert result.digest == graph.digest


@pytest.mark.parametrize("place", ["thread", "remote"])
@pytest.mark.parametrize("fn", [lambda x: 2 * x, fails])
def test_every_run_that_shared_a_call_has_it_in_its_trace(place: str, fn: Any) -> None:
    batching = Batching(max_size=3, max_delay="5s")
    with server_ref.running({"m": function(fn)}) as url, Endpoint(url, retry=Retry(attempts=1)) as endpoint:
        step = ModelStep(endpoint, {}, "loop") if place == "remote" else ModelStep(function(fn), {}, "thread")
        with Ensemble(plan(node("a", step, batching=batching))) as ensemble:
            runs = [ensemble.submit({"x": rows(1, seed)}, trace=True) for seed in range(3)]
            spans = [span_of(run) for run in runs]
    (shared,) = {span.sent for span in spans}
    (sent,) = shared
    assert sent.url == ("a call of 3 rows" if place == "thread" else url)
    assert (sent.outcome == "answered") == (fn is not fails)
    assert all(span.queue_s + span.compute_s + span.network_s < span.ended - span.ready + 1e-6 for span in spans)


def span_of(run: Any) -> Any:
    error = run.exception(10)
    trace = run.result().trace if error is None else trace_of(error)
    (span,) = trace.spans
    return span


@pytest.mark.parametrize("how", ["fails", "late"])
def test_a_run_that_fails_has_a_trace_of_all_that_it_began(how: str) -> None:
    ends = node("end", fails, "a") if how == "fails" else node("end", awaited(lasts_s=30), "a")
    graph = plan(
        node("a", lambda x: x), node("hung", awaited(lasts_s=30)), ends, node("s", add, {"a": "hung", "b": "end"})
    )
    with Ensemble(graph) as ensemble:
        with pytest.raises(RemoteOpsError) as caught:
            ensemble.run({"x": rows()}, trace=True, deadline=Deadline.after(0.3 if how == "late" else 30))
        trace = trace_of(caught.value)
        assert trace is not None
        assert trace.wall_s > 0
        outcomes = {span.node: span.outcome for span in trace.spans}
        assert outcomes == {"a": "ok", "hung": "cancelled", "end": "InternalError" if how == "fails" else "cancelled"}
        assert len(trace.spans) == 3
        with pytest.raises(RemoteOpsError) as plain:
            ensemble.run({"x": rows()}, deadline=Deadline.after(0.3))
        assert trace_of(plain.value) is None


def test_a_trace_has_the_members_that_a_quorum_did_not_wait_for() -> None:
    members = [node("hung", awaited(lasts_s=30)), node("quick", lambda x: x)]
    with Ensemble(vote(members, Quorum(1))) as ensemble:
        trace = ensemble.run({"x": rows()}, trace=True).trace
    assert trace is not None
    assert {span.node: span.outcome for span in trace.spans} == {"quick": "ok", "hung": "left out", "vote": "ok"}
    assert [span.node for span in trace.critical_path()] == ["hung", "vote"]  # which waited until the grace was over


def test_what_an_owner_does_not_wait_for_is_cancelled_in_the_trace() -> None:
    class Both:
        def steps(self, inputs: Any, wanted: Any) -> Any:
            yield Calls([Call(name, {"x": inputs["x"]}, wanted) for name in ("hung", "bad")])

    owned = [node("hung", awaited(lasts_s=30)), node("bad", fails)]
    with Ensemble(plan(node("both", Both(), children=owned))) as ensemble:
        with pytest.raises(NodeError) as caught:
            ensemble.run({"x": rows()}, trace=True)
    trace = trace_of(caught.value)
    assert trace is not None
    outcomes = {span.node: span.outcome for span in trace.spans}
    assert outcomes == {"both/hung": "cancelled", "both/bad": "InternalError", "both": "NodeError"}


def test_a_closed_ensemble_says_so() -> None:
    ensemble = Ensemble(plan(node("a", lambda x: x, place="thread")))
    ensemble.close()
    with pytest.raises(NodeError, match="this ensemble is closed"):
        ensemble(rows())
