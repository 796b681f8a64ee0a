"""Batches: which requests go together and when, that each gets its own answer, and that a bad one fails alone."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rawpeer import WAIT_S, read_message, until

import server_ref
from remote_ops import Endpoint, FunctionServable, Retry, SpecError, TensorSpec, graphpipe
from remote_ops.deadline import Deadline
from remote_ops.errors import (
    BadStatus,
    ConnectError,
    DeadlineExceeded,
    InternalError,
    ModelUnavailable,
    Overloaded,
    RemoteOpsError,
)
from remote_ops.signature import Signature
from server_ref.batching import Batching, Queue, choose
from server_ref.instances import Instances, Request
from server_ref.lanes import Lanes, Pending, QueueLimits, _Seat
from server_ref.model import Version
from server_ref.stacking import Call, group_of, infer_apart, infer_together, is_out_of_memory, rows_of

Array = npt.NDArray[Any]
X, Y = TensorSpec("x", "float32", (-1, 2)), TensorSpec("y", "float32", (-1, 2))
NO_RETRY = Retry(attempts=1)
LONG_S = 30.0  # never waited for: what a test waits for comes first


@dataclass(eq=False)
class Item:
    """A request, as the policy sees it."""

    rows: int = 1
    group: Any = "g"
    arrived_at: float = 0.0
    due_at: float = math.inf


# --------------------------------------------------------------------------- the policy

POLICY = [
    # rules, rows of the candidates, now, complete -> taken, look at
    ({"max_rows": 8}, [1], 0.0, False, (1, math.inf)),
    ({"max_rows": 8}, [1, 2, 3], 0.0, False, (3, math.inf)),
    ({"max_rows": 8, "max_delay_s": 1.0}, [1, 2], 0.0, False, (0, 1.0)),
    ({"max_rows": 8, "max_delay_s": 1.0}, [1, 2], 0.999, False, (0, 1.0)),
    ({"max_rows": 8, "max_delay_s": 1.0}, [1, 2], 1.0, False, (2, math.inf)),
    ({"max_rows": 8, "max_delay_s": 1.0}, [4, 4], 0.0, False, (2, math.inf)),
    ({"max_rows": 8, "max_delay_s": 1.0}, [4, 3], 0.0, True, (2, math.inf)),
    ({"max_rows": 8, "max_delay_s": 1.0}, [50], 0.0, False, (1, math.inf)),
    ({"max_rows": 8, "max_delay_s": 1.0, "preferred_rows": (4,)}, [2, 2, 1], 0.0, False, (2, math.inf)),
    ({"max_rows": 8, "max_delay_s": 1.0, "preferred_rows": (2, 4)}, [2, 2, 1], 0.0, False, (2, math.inf)),
    ({"max_rows": 8, "max_delay_s": 1.0, "preferred_rows": (4,)}, [3, 2], 0.0, False, (0, 1.0)),
    ({"max_rows": 8, "max_delay_s": 1.0, "preferred_rows": (4,)}, [3, 2], 1.0, False, (2, math.inf)),
]


@pytest.mark.parametrize(("rules", "rows", "now", "complete", "expected"), POLICY)
def test_a_batch_goes_when_the_rules_say_so(
    rules: dict[str, Any], rows: list[int], now: float, complete: bool, expected: tuple[int, float]
) -> None:
    items = [Item(count) for count in rows]
    assert choose(items, Batching(**rules), now=now, run_s=0.0, complete=complete) == expected


@pytest.mark.parametrize(
    ("due_at", "run_s", "look_at"),
    [(math.inf, 5.0, 10.0), (100.0, 1.0, 10.0), (4.0, 0.0, 3.0), (4.0, 0.25, 3.0), (4.0, 1.5, 1.0), (4.0, 9.0, -14.0)],
)
def test_a_batch_closes_early_enough_for_the_most_urgent_request_in_it(
    due_at: float, run_s: float, look_at: float
) -> None:
    items, rules = [Item(), Item(due_at=due_at), Item()], Batching(max_rows=8, max_delay_s=10.0)
    before = choose(items, rules, now=look_at - 0.001, run_s=run_s, complete=False)
    assert before.taken == 0
    assert before.look_at == pytest.approx(look_at)
    assert choose(items, rules, now=look_at, run_s=run_s, complete=False).taken == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_rows": -1}, {"max_rows": 4, "preferred_rows": (5,)}, {"max_rows": 4, "preferred_rows": (0,)},
        {"max_rows": 4, "allowed_rows": (2,)}, {"max_rows": 4, "max_delay_s": -0.1}, {"max_delay_s": math.nan},
        {"priorities": 0}, {"priorities": 2, "default_priority": 3}, {"preferred_rows": (1,)},
    ],
)  # fmt: skip
def test_rules_that_contradict_themselves_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="batching"):
        Batching(**wrong)


@pytest.mark.parametrize(("rows", "padded"), [(1, 2), (2, 2), (3, 8), (8, 8), (9, 9), (100, 100)])
def test_rows_are_padded_to_the_next_size_that_is_allowed(rows: int, padded: int) -> None:
    assert Batching(max_rows=8, allowed_rows=(2, 8)).padded(rows) == padded


def taken(queue: Queue[Item], now: float = 0.0) -> list[Item]:
    return queue.take(now=now)[0]


def test_a_higher_level_is_served_first_and_a_level_that_there_is_not_is_the_default() -> None:
    queue: Queue[Item] = Queue(Batching(priorities=3, default_priority=2))
    items = {name: Item() for name in ("low", "default", "unknown", "high", "high again")}
    for name, level in zip(items, (3, 0, 7, 1, 1), strict=True):
        queue.add(items[name], level)
    order = [taken(queue)[0] for _ in items]
    assert order == [items[name] for name in ("high", "high again", "default", "unknown", "low")]
    assert taken(queue) == []


def test_requests_of_a_lower_level_fill_the_batch_of_a_higher_one() -> None:
    queue: Queue[Item] = Queue(Batching(max_rows=3, priorities=2))
    low, other, high = Item(), Item(group="h"), Item()
    for item, level in ((low, 2), (other, 2), (high, 1)):
        queue.add(item, level)
    assert taken(queue) == [high, low]
    assert taken(queue) == [other]


def test_a_group_that_waits_lets_another_one_go_that_is_full() -> None:
    queue: Queue[Item] = Queue(Batching(max_rows=2, max_delay_s=5.0))
    first, full = Item(), [Item(group="h"), Item(group="h")]
    for item in (first, *full):
        queue.add(item)
    assert taken(queue) == full
    assert queue.take(now=0.0) == ([], 5.0)
    assert taken(queue, 5.0) == [first]


def test_a_request_that_fits_no_group_goes_alone_and_at_once() -> None:
    queue: Queue[Item] = Queue(Batching(max_rows=8, max_delay_s=5.0))
    alone = [Item(group=None), Item(group=None)]
    for item in (Item(), *alone):
        queue.add(item)
    assert [taken(queue), taken(queue), taken(queue)] == [[alone[0]], [alone[1]], []]


def test_those_whose_time_has_passed_are_given_up_and_the_others_keep_their_order() -> None:
    queue: Queue[Item] = Queue(Batching(priorities=2))
    items = [Item(due_at=float(at)) for at in (5, 1, 9, 2, 7)]
    for index, item in enumerate(items):
        queue.add(item, 1 + index % 2)
    assert sorted(item.due_at for item in queue.overdue(5.0)) == [1, 2, 5]
    assert [item.due_at for item in queue] == [9, 7]
    assert queue.overdue(5.0) == []


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_every_request_leaves_the_queue_once_in_a_batch_that_fits(data: st.DataObject) -> None:
    rules = Batching(
        max_rows=data.draw(st.integers(0, 9)), max_delay_s=data.draw(st.sampled_from([0.0, 2.0])),
        priorities=data.draw(st.integers(1, 3)),
    )  # fmt: skip
    queue: Queue[Item] = Queue(rules)
    now, waiting, left = 0.0, [], []
    for _ in range(data.draw(st.integers(1, 25))):
        now += data.draw(st.sampled_from([0.0, 0.5, 3.0]))
        if data.draw(st.booleans()):
            item = Item(data.draw(st.integers(1, 12)), data.draw(st.sampled_from(["a", "b", None])), now)
            queue.add(item, data.draw(st.integers(0, 4)))
            waiting.append(item)
        elif batch := taken(queue, now):
            assert len({item.group for item in batch}) == 1
            assert len(batch) == 1 or (
                batch[0].group is not None and sum(item.rows for item in batch) <= rules.max_rows
            )
            left += batch
        assert len(queue) == len(waiting) - len(left)
    while len(queue):
        found, look_at = queue.take(now=now)
        assert found or now < look_at < math.inf  # nobody waits for ever
        left += found
        now = now if found else look_at
    assert sorted(map(id, left)) == sorted(map(id, waiting))
    in_order = [item for item in left if item.group == "a"]
    if rules.priorities == 1:
        assert in_order == sorted(in_order, key=waiting.index)


# --------------------------------------------------------------------------- rows


class Broken(Exception):
    """What a model raises of its own."""


def model_of(
    seen: list[int], *, memory_rows: int = 10**9, by_row: bool = True
) -> Callable[[Call], Mapping[str, Array]]:
    """A model that fails where a row is 13, and where there are more rows than memory for them."""

    def infer(call: Call) -> Mapping[str, Array]:
        x = call.arrays["x"]
        seen.append(len(x))
        if len(x) > memory_rows:
            raise MemoryError
        if (x == 13).any():
            raise Broken("13")
        return {"y": 2 * x if by_row else x.sum(0)}

    return infer


def calls_of(*arrays: Sequence[float]) -> list[Call]:
    return [Call({"x": np.array(array, np.float32)}, ["y"]) for array in arrays]


def answers_of(outcomes: Sequence[Any]) -> list[Any]:
    """Outputs as lists, errors as their classes."""
    return [type(one) if isinstance(one, BaseException) else one["y"].tolist() for one in outcomes]


calls = st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=5), min_size=1, max_size=10)


@given(calls, st.sampled_from([(), (4, 16), (64,)]), st.sampled_from([3, 7, 10**9]))
@settings(max_examples=300, deadline=None)
def test_every_request_gets_what_it_would_get_alone(
    given_rows: list[list[int]], allowed: tuple[int, ...], memory_rows: int
) -> None:
    """By brute force, over poisoned rows, padding and too little memory; with padding, memory counts the padded."""
    asked = calls_of(*given_rows)
    rules = Batching(max_rows=max(allowed, default=64), allowed_rows=allowed)
    alone = [infer_together([call], model_of([], memory_rows=memory_rows), padded_rows=rules.padded) for call in asked]
    found = infer_together(asked, model_of([], memory_rows=memory_rows), padded_rows=rules.padded)
    assert answers_of(found) == answers_of([outcome for (outcome,) in alone])
    if memory_rows == 10**9:
        plain = [infer_apart(call, model_of([])) for call in asked]
        assert answers_of(found) == answers_of(plain)


def test_one_bad_request_of_eight_costs_a_run_for_each_half_it_is_in() -> None:
    seen: list[int] = []
    found = infer_together(calls_of(*[[n] for n in (0, 1, 2, 13, 4, 5, 6, 7)]), model_of(seen))
    assert answers_of(found) == [[0], [2], [4], Broken, [8], [10], [12], [14]]
    assert seen == [8, 4, 2, 2, 1, 1, 4]


@pytest.mark.parametrize(
    "error",
    [
        DeadlineExceeded("late"), ModelUnavailable("down"), Overloaded("full"), ConnectError("nobody"),
        BadStatus("gateway", status=502), BadStatus("busy", status=503),
    ],
)  # fmt: skip
def test_what_fails_whoever_is_in_the_batch_is_not_tried_in_parts(error: RemoteOpsError) -> None:
    runs = []

    def infer(call: Call) -> Mapping[str, Array]:
        runs.append(call)
        raise error

    assert infer_together(calls_of([1], [2], [3]), infer) == [error] * 3
    assert len(runs) == 1


def test_outputs_that_have_no_row_for_each_row_are_computed_for_each_request_by_itself() -> None:
    seen: list[int] = []
    found = infer_together(calls_of([1, 2], [3], [4, 5, 6]), model_of(seen, by_row=False), padded_rows=lambda rows: 8)
    assert answers_of(found) == [3, 3, 15]
    assert seen == [8, 2, 1, 3]


def test_a_request_whose_outputs_cannot_be_cut_is_computed_without_padding() -> None:
    seen: list[int] = []
    found = infer_together(calls_of([1, 2]), model_of(seen, by_row=False), padded_rows=lambda rows: 8)
    assert answers_of(found) == [3]
    assert seen == [8, 2]


def test_padding_is_not_seen_in_the_answer_and_adds_no_row_that_the_model_cannot_bear() -> None:
    given_rows: list[Array] = []

    def infer(call: Call) -> Mapping[str, Array]:
        given_rows.append(call.arrays["x"])
        return {"y": call.arrays["x"] + 1}

    assert answers_of(infer_together(calls_of([5], [6]), infer, padded_rows=lambda rows: 4)) == [[6], [7]]
    assert [rows.tolist() for rows in given_rows] == [[5, 6, 6, 6]]


@pytest.mark.parametrize(
    ("rows", "memory_rows", "expected"), [(8, 4, "served"), (8, 3, MemoryError), (1, 0, MemoryError)]
)
def test_a_request_that_is_too_large_for_the_memory_is_tried_once_more_in_two_halves(
    rows: int, memory_rows: int, expected: Any
) -> None:
    seen: list[int] = []
    array = list(range(20, 20 + rows))
    (found,) = answers_of(infer_together(calls_of(array), model_of(seen, memory_rows=memory_rows)))
    assert found == ([2 * n for n in array] if expected == "served" else expected)
    assert len(seen) <= 3


def test_a_batch_that_is_too_large_for_the_memory_is_served_in_smaller_ones() -> None:
    seen: list[int] = []
    found = infer_together(calls_of(*[[n, n] for n in range(8)]), model_of(seen, memory_rows=4))
    assert answers_of(found) == [[2 * n, 2 * n] for n in range(8)]
    assert seen == [16, 8, 4, 4, 8, 4, 4]


class OutOfMemoryError(RuntimeError):
    """As torch has one."""


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True), (OutOfMemoryError("x"), True), (RuntimeError("CUDA out of memory. Tried"), True),
        (RuntimeError("std::bad_alloc"), True), (InternalError("ResourceExhaustedError: OOM"), True),
        (ValueError("memory of an elephant"), False), (KeyboardInterrupt(), False),
    ],
)  # fmt: skip
def test_running_out_of_memory_is_told_by_the_words_of_each_framework(error: BaseException, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one
    outer = RuntimeError("it failed")
    outer.__cause__ = error
    assert is_out_of_memory(outer) is is_one


def test_rows_are_what_all_inputs_have_in_common() -> None:
    a, b, scalar = np.zeros((3, 2)), np.zeros(3), np.zeros(())
    assert rows_of({"a": a, "b": b}) == 3
    assert rows_of({"a": a, "b": b[:2]}) is None
    assert rows_of({"a": a, "s": scalar}) is None
    assert rows_of({}) is None


def test_only_calls_of_one_config_one_form_and_the_same_outputs_may_be_served_together() -> None:
    signature = Signature((TensorSpec("x", "any", None),), (TensorSpec("y", "float32", (-1,)),))
    x = np.zeros((2, 3), np.float32)

    def group(array: Array = x, names: Sequence[str] = ("y",), config: bytes = b"") -> Any:
        return group_of(signature, Call({"x": array}, names, config), signature.outputs)

    assert group() == group(np.ones((7, 3), np.float32)) is not None
    others = [group(np.zeros((2, 4), np.float32)), group(x.astype("f8")), group(names=()), group(config=b"c")]
    assert len({group(), *others}) == 5
    assert group(np.zeros((0, 3), np.float32)) is None
    assert group(np.zeros(())) is None


def test_calls_whose_rows_are_fixed_or_whose_outputs_have_none_are_served_by_themselves() -> None:
    fixed = Signature((TensorSpec("x", "float32", (2, 3)),), (TensorSpec("y", "float32", (-1,)),))
    loss = Signature((TensorSpec("x", "float32", (-1,), differentiable=True),), (TensorSpec("l", "float32", (4,)),))
    x = np.zeros((2, 3), np.float32)
    assert group_of(fixed, Call({"x": x}, ["y"]), fixed.outputs) is None
    assert group_of(loss, Call({"x": x}, ["l"]), loss.outputs) is None
    gradient = loss.select_outputs(["gradient:x"])
    four = np.zeros(4, np.float32)
    assert group_of(loss, Call({"x": four, "cotangent:l": four}, ["gradient:x"]), gradient) is None


def test_a_model_that_is_not_by_row_is_neither_padded_nor_halved() -> None:
    """What it computes of half its rows is another thing."""
    seen: list[int] = []

    def run(x: Array) -> Array:
        seen.append(len(x))
        if len(x) == 6:
            raise MemoryError
        return x.sum(0)

    mean = FunctionServable(run, [X], [TensorSpec("y", "float32", (2,))])
    with Instances([mean], batching=Batching(max_rows=8, allowed_rows=(8,))) as instances:
        assert instances.infer({"x": np.ones((3, 2), np.float32)})["y"].tolist() == [3, 3]
        with pytest.raises(MemoryError):
            instances.infer({"x": np.ones((6, 2), np.float32)})
    assert seen == [3, 6]


# --------------------------------------------------------------------------- copies behind a queue


class Gate:
    """A model that keeps the sizes of its batches, and lets no run through while it is shut."""

    def __init__(self, *, concurrency: int = 1) -> None:
        self.began: list[list[float]] = []
        self.open = threading.Event()
        self.open.set()
        self.servable = FunctionServable(self.run, [X], [Y], name="gate")
        self.servable.concurrency = concurrency  # type: ignore[attr-defined]

    def run(self, x: Array, config: bytes) -> Array:
        self.began.append(x[:, 0].tolist())
        assert self.open.wait(WAIT_S)
        if np.isnan(x).any():
            raise ValueError("not a number")
        return 2 * x

    @contextlib.contextmanager
    def shut(self) -> Iterator[None]:
        """Hold whatever runs until the end of the block."""
        self.open.clear()
        try:
            yield
        finally:
            self.open.set()


def row(value: float, count: int = 1) -> Array:
    return np.full((count, 2), value, np.float32)


def test_a_batch_is_what_queued_while_the_instance_was_busy() -> None:
    gate = Gate()
    with Instances([gate.servable], batching=Batching(max_rows=4)) as instances, ThreadPoolExecutor(8) as pool:
        with gate.shut():
            first = pool.submit(instances.infer, {"x": row(0)})
            assert until(lambda: len(gate.began) == 1)
            others = []
            for value in range(1, 7):
                others.append(pool.submit(instances.infer, {"x": row(value)}))
                assert until(lambda value=value: instances.lanes.waiting == value)  # type: ignore[misc]
        for value, future in enumerate([first, *others]):
            assert future.result(WAIT_S)["y"].tolist() == [[2 * value] * 2]
    assert gate.began == [[0], [1, 2, 3, 4], [5, 6]]


def test_a_request_that_is_alone_waits_for_nobody_unless_told_to() -> None:
    gate = Gate()
    with Instances([gate.servable], batching=Batching(max_rows=64)) as instances:
        for value in range(20):
            instances.infer({"x": row(value)})
    assert len(gate.began) == 20


def test_a_delay_that_ends_lets_a_batch_go_that_is_not_full() -> None:
    gate = Gate()
    with Instances([gate.servable], batching=Batching(max_rows=64, max_delay_s=0.05)) as instances:
        with ThreadPoolExecutor(3) as pool:
            futures = [pool.submit(instances.infer, {"x": row(value)}) for value in range(3)]
            assert [future.result(WAIT_S)["y"][0, 0] for future in futures] == [0, 2, 4]
    assert sum(map(len, gate.began)) == 3


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 15), st.sampled_from([b"", b"c"])), min_size=1, max_size=24),
    st.sampled_from([{}, {"max_rows": 1}, {"max_rows": 7}, {"max_rows": 8, "allowed_rows": (2, 8)},
                     {"max_rows": 6, "max_delay_s": 0.001, "preferred_rows": (3,), "priorities": 2}]),
    st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_whatever_the_rules_every_caller_gets_its_own_rows(
    asked: list[tuple[int, int, bytes]], rules: dict[str, Any], copies: int
) -> None:
    def run(x: Array, config: bytes) -> Array:
        if (x == 13).any():
            raise Broken
        return 2 * x + len(config)

    model = FunctionServable(run, [X], [Y])
    model.concurrency = 1  # type: ignore[attr-defined]
    arrays = [row(value, count) + np.arange(count, dtype=np.float32)[:, None] / 8 for count, value, _ in asked]
    with Instances([model] * copies, batching=Batching(**rules)) as instances:
        answers: list[Future[Any]] = [Future() for _ in asked]
        wanted = model.signature.outputs
        for index, (array, (*_, config), answer) in enumerate(zip(arrays, asked, answers, strict=True)):
            request = Request(
                Call({"x": array}, ["y"], config), Deadline.never(),
                done=answer.set_result, priority=index % 3,
            )  # fmt: skip
            instances.submit(request, wanted)
        for array, (_, value, config), answer in zip(arrays, asked, answers, strict=True):
            outcome = answer.result(WAIT_S)
            if value == 13:
                assert isinstance(outcome, Broken)
            else:
                np.testing.assert_array_equal(outcome["y"], 2 * array + len(config))


def test_a_later_request_of_the_first_level_overtakes() -> None:
    gate = Gate()
    with Instances([gate.servable], batching=Batching(priorities=2, default_priority=2)) as instances:
        order: list[str] = []
        with gate.shut():
            for name, priority in (("running", 0), ("waits", 0), ("urgent", 1)):
                submit(instances, row(0), priority=priority, done=lambda _, name=name: order.append(name))
                assert until(lambda: len(gate.began) == 1)
        assert until(lambda: len(order) == 3)
    assert order == ["running", "urgent", "waits"]


def submit(instances: Instances, array: Array, *, done: Any, priority: int = 0, deadline: Any = None) -> Request:
    request = Request(
        Call({"x": array}, ["y"]), deadline or Deadline.never(), done=done,
        priority=priority,
    )  # fmt: skip
    instances.submit(request, instances.signature.outputs)
    return request


def test_what_was_handed_to_a_thread_before_the_stop_is_run_and_told() -> None:
    """Stopping must not lose a batch between the queue and the thread that it woke."""
    for _ in range(50):
        gate = Gate(concurrency=4)
        instances = Instances([gate.servable]).start()
        told: list[Any] = []
        for value in range(8):
            submit(instances, row(value), done=told.append)
        instances.stop()
        assert until(lambda told=told: len(told) == 8)  # type: ignore[misc]
        assert {type(outcome) for outcome in told} <= {dict, ModelUnavailable}


def test_gradients_are_batched() -> None:
    batches: list[int] = []

    def vjp(inputs: Mapping[str, Array], cotangents: Mapping[str, Array]) -> Mapping[str, Array]:
        batches.append(len(inputs["x"]))
        return {"x": 2 * inputs["x"] * cotangents["y"]}

    square = FunctionServable(
        lambda x: x * x, [TensorSpec("x", "float32", (-1, 2), differentiable=True)], [Y], vjp=vjp
    )  # fmt: skip
    version = Version("square", [square], batching=Batching(max_rows=4, max_delay_s=LONG_S))
    with server_ref.running({"square": version}) as url, Endpoint(url, 20) as endpoint, ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(endpoint.infer, {"x": row(n), "cotangent:y": row(10 * n)}, ["gradient:x"]) for n in range(4)
        ]
        for n, future in enumerate(futures):
            assert future.result(WAIT_S)["gradient:x"].tolist() == [[20 * n * n] * 2]
    assert batches == [4]


def test_gradients_of_a_torch_model_are_batched() -> None:
    torch = pytest.importorskip("torch")
    from remote_ops.torch.model import TorchModel

    layer = torch.nn.Linear(3, 2)
    model = TorchModel(layer, inputs=["x: float32 [-1, 3]"])
    version = Version("m", [model], batching=Batching(max_rows=4, max_delay_s=LONG_S))
    rng = np.random.default_rng(0)
    arrays = [rng.random((1, 3), np.float32) for _ in range(4)]
    cotangents = [rng.random((1, 2), np.float32) for _ in range(4)]
    (output,) = model.signature.outputs
    expected = [
        model.infer({"x": x, f"cotangent:{output.name}": c}, ["gradient:x"])["gradient:x"]
        for x, c in zip(arrays, cotangents, strict=True)
    ]
    with server_ref.running({"m": version}) as url, Endpoint(url, 20) as endpoint, ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(endpoint.infer, {"x": x, f"cotangent:{output.name}": c}, ["gradient:x"])
            for x, c in zip(arrays, cotangents, strict=True)
        ]
        for future, gradient in zip(futures, expected, strict=True):
            np.testing.assert_allclose(future.result(WAIT_S)["gradient:x"], gradient, rtol=1e-5)
    assert version.stats.snapshot().executions == 1


def test_strings_are_batched_and_padded() -> None:
    sizes: list[int] = []

    def run(s: Array) -> Array:
        sizes.append(len(s))
        return np.array([*[text[::-1] for text in s], None], object)[:-1]

    model = FunctionServable(run, [TensorSpec("s", "string", (-1,))], [TensorSpec("t", "string", (-1,))])
    version = Version("m", [model], batching=Batching(max_rows=4, max_delay_s=0.2, allowed_rows=(4,)))
    texts = [b"", b"abc", b"\xff" * 1000]
    with server_ref.running({"m": version}) as url, Endpoint(url, 20) as endpoint, ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(endpoint.infer, {"s": np.array([text], object)}) for text in texts]
        assert [future.result(WAIT_S)["t"].tolist() for future in futures] == [[text[::-1]] for text in texts]
    assert set(sizes) == {4}


def test_requests_of_different_configs_are_not_batched() -> None:
    seen: list[tuple[int, bytes]] = []

    def run(x: Array, config: bytes) -> Array:
        seen.append((len(x), config))
        return x

    version = Version("m", [FunctionServable(run, [X], [Y])], batching=Batching(max_rows=2, max_delay_s=LONG_S))
    with server_ref.running({"m": version}) as url, Endpoint(url, 20) as endpoint, ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(endpoint.infer, {"x": row(n)}, config=b"ab"[n % 2 :][:1]) for n in range(4)]
        assert [future.result(WAIT_S)["y"][0, 0] for future in futures] == [0, 1, 2, 3]
    assert sorted(seen) == [(2, b"a"), (2, b"b")]


# --------------------------------------------------------------------------- threads that hang


def lanes_of(run: Any, delivered: list[Any], **options: Any) -> Lanes[Pending]:
    return Lanes("m", ["servable"], run, lambda batch, outcome: delivered.append((batch, outcome)), **options)


def test_a_thread_that_hangs_is_replaced_at_once_and_four_are_the_most() -> None:
    release, began, delivered = threading.Event(), [], []

    def run(servable: str, batch: list[Pending]) -> str:
        began.append(batch)
        release.wait(WAIT_S)
        return "done"

    lanes = lanes_of(run, delivered, response_timeout_s=0.01)
    lanes.start()
    lost: list[Pending] = []

    def given_up(count: int) -> bool:
        lost.extend(lanes.lost())
        return len(lost) == count

    for number in range(1, 5):
        lanes.submit(Pending())
        assert until(lambda number=number: given_up(number))  # type: ignore[misc]
        assert len(began) == number
    assert lanes.healthy_servables == 0
    with pytest.raises(ModelUnavailable, match="every instance of model 'm' hangs"):
        lanes.submit(Pending())
    release.set()
    assert until(lambda: bool(lanes.lost() or lanes.healthy_servables))
    lanes.submit(Pending())
    assert until(lambda: len(delivered) == 1)
    assert delivered[0][1] == "done"
    assert lanes.stop() == []


def test_the_place_of_a_thread_that_hangs_is_free_later_and_later_and_again_once_one_returns() -> None:
    seat = _Seat("servable")
    waits = []
    for _ in range(4):
        seat.lost(100.0)
        waits.append(seat.free_at - 100.0)
    assert waits == pytest.approx([0.0, 0.1, 0.2, math.inf])
    seat.returned(200.0)
    assert seat.free_at == pytest.approx(200.2)
    seat.free_at = math.inf  # another sits down
    seat.returned(300.0)
    assert seat.free_at == math.inf


def test_what_waits_behind_threads_that_all_hang_is_given_up_too() -> None:
    release, delivered = threading.Event(), list[Any]()
    lanes = lanes_of(lambda *_: release.wait(WAIT_S), delivered, response_timeout_s=0.01)
    lanes.start()
    waiting = [Pending() for _ in range(9)]
    for pending in waiting:
        lanes.submit(pending)
    lost: list[Pending] = []
    assert until(lambda: lost.extend(lanes.lost()) or len(lost) == 9)  # type: ignore[func-returns-value]
    assert (lanes.waiting, lanes.waiting_bytes) == (0, 0)
    release.set()
    lanes.stop()


def test_a_run_that_ends_after_it_was_given_up_is_not_told_twice() -> None:
    gate, told = Gate(), list[Any]()
    with Instances([gate.servable], response_timeout_s=0.01) as instances:
        with gate.shut():
            submit(instances, row(1), done=told.append)
            assert until(lambda: instances.sweep() or len(told) == 1)
            assert isinstance(told[0], ModelUnavailable)
        assert instances.infer({"x": row(2)})["y"].tolist() == [[4, 4]]
    assert len(told) == 1


# --------------------------------------------------------------------------- R2 to R5, against a real server


class Client:
    """A raw connection: what it posts, it may or may not read the answer of."""

    def __init__(self, url: str) -> None:
        import socket

        parts = urlsplit(url)
        self.sock = socket.create_connection((parts.hostname, parts.port), WAIT_S)
        self.file = self.sock.makefile("rb")

    def post(self, array: Array, *headers: str) -> Client:
        body = b"".join(graphpipe.encode_request(("x",), [array]))
        lines = "".join(f"{header}\r\n" for header in headers)
        head = f"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n{lines}\r\n".encode()
        self.sock.sendall(head + body)
        return self

    def read(self) -> Any:
        message = read_message(self.file)
        assert message is not None
        return message

    def close(self) -> None:
        self.file.close()
        self.sock.close()


@contextlib.contextmanager
def clients(url: str, count: int) -> Iterator[list[Client]]:
    made = [Client(url) for _ in range(count)]
    try:
        yield made
    finally:
        for client in made:
            client.close()


@pytest.mark.parametrize("batching", [Batching(), Batching(max_rows=1)], ids=["plain", "batched"])
def test_r2_one_slow_worker_and_a_queue_of_four_serve_five_of_twenty_and_refuse_the_others(batching: Batching) -> None:
    gate = Gate()
    version = Version("m", [gate.servable], batching=batching, limits=QueueLimits(4))
    with server_ref.running({"m": version}) as url, clients(url, 20) as posts:
        with gate.shut():
            posts[0].post(row(0))
            assert until(lambda: len(gate.began) == 1)
            for number, client in enumerate(posts[1:], 1):
                client.post(row(number))
            assert until(lambda: version.stats.snapshot().failures["rejected"] == 15)
            assert version.stats.pending == 5
        answers = [client.read() for client in posts]
    assert sorted(answer.status for answer in answers) == [200] * 5 + [429] * 15
    refused = [answer for answer in answers if answer.status == 429]
    assert {answer.headers["retry-after"] for answer in refused} == {"1"}
    assert "expected at most 4" in graphpipe.decode_response(refused[0].body).errors[0].message
    assert len(gate.began) == 5
    counts = version.stats.snapshot()
    assert (counts.requests, counts.success.times, counts.pending) == (20, 5, 0)


def test_r2_the_queue_is_bounded_by_bytes_too() -> None:
    gate = Gate()
    version = Version("m", [gate.servable], limits=QueueLimits(max_bytes=1000))
    with server_ref.running({"m": version}) as url, clients(url, 4) as (first, second, third, fourth):
        with gate.shut():
            first.post(row(0, 1000))  # it does not wait
            assert until(lambda: len(gate.began) == 1)
            second.post(row(1, 100))  # 800 bytes
            assert until(lambda: version.stats.pending == 2)
            assert third.post(row(2, 100)).read().status == 429
            fourth.post(row(3, 25))  # 200 bytes
            assert until(lambda: version.stats.pending == 3)
            assert version.instances.lanes.waiting_bytes == 1000
        assert [client.read().status for client in (first, second, fourth)] == [200] * 3
    assert version.instances.lanes.waiting_bytes == 0


@pytest.mark.parametrize("limits", [QueueLimits(max_requests=3), QueueLimits(max_bytes=24)])
def test_r2_what_waits_for_company_goes_before_anybody_is_refused(limits: QueueLimits) -> None:
    """The instance is idle: a batch larger than the queue cannot come, so the queue is the batch."""
    gate, told = Gate(), list[Any]()
    rules = Batching(max_rows=8, max_delay_s=LONG_S)
    with Instances([gate.servable], batching=rules, limits=limits) as instances:
        with gate.shut():
            for value in range(4):
                submit(instances, row(value), done=told.append)
            assert until(lambda: gate.began == [[0, 1, 2]])
            assert instances.lanes.waiting == 1
        assert until(lambda: len(told) == 3)


@pytest.mark.slow
def test_r2_refusing_takes_no_memory() -> None:
    gate = Gate()
    version = Version("m", [gate.servable], limits=QueueLimits(4))
    large = row(1, 20_000)  # 160 kB
    with server_ref.running({"m": version}) as url, gate.shut(), clients(url, 25) as posts:
        posts[0].post(large)
        assert until(lambda: len(gate.began) == 1)
        for client in posts[1:5]:
            client.post(large)
        assert until(lambda: version.stats.pending == 5)

        def refuse(rounds: int) -> None:
            for _ in range(rounds):
                for client in posts[5:]:
                    client.post(large)
                assert {client.read().status for client in posts[5:]} == {429}

        refuse(5)
        before = psutil.Process().memory_info().rss
        refuse(50)  # 160 MB
        assert psutil.Process().memory_info().rss - before < 20 << 20
        gate.open.set()


def test_r3_a_request_that_expires_in_the_queue_is_504_and_the_model_is_not_called() -> None:
    gate = Gate()
    version = Version("m", [gate.servable])
    with server_ref.running({"m": version}) as url, clients(url, 3) as (first, late, patient):
        with gate.shut():
            first.post(row(0))
            assert until(lambda: len(gate.began) == 1)
            patient.post(row(2), "X-Request-Timeout-Ms: 60000")
            answer = late.post(row(1), "X-Request-Timeout-Ms: 30").read()  # it comes while the first still runs
            assert answer.status == 504
            assert "still in the queue" in graphpipe.decode_response(answer.body).errors[0].message
        assert [client.read().status for client in (first, patient)] == [200, 200]
    assert gate.began == [[0], [2]]
    assert version.stats.snapshot().failures["timeout"] == 1


def test_r4_clients_that_vanish_take_their_requests_with_them() -> None:
    gate = Gate()
    version = Version("m", [gate.servable])
    with server_ref.running({"m": version}) as url, clients(url, 101) as (first, *others):
        with gate.shut():
            first.post(row(0))
            assert until(lambda: len(gate.began) == 1)
            for number, client in enumerate(others, 1):
                client.post(row(number))
            assert until(lambda: version.stats.pending == 101)
            for client in others:
                client.close()
            assert until(lambda: version.stats.snapshot().failures["canceled"] == 100)
            assert version.instances.lanes.waiting == 0
        assert first.read().status == 200
    assert gate.began == [[0]]
    counts = version.stats.snapshot()
    assert (counts.requests, counts.success.times, counts.pending) == (101, 1, 0)


def test_r5_a_row_that_makes_the_model_raise_fails_alone_of_eight() -> None:
    gate = Gate()
    version = Version("m", [gate.servable], batching=Batching(max_rows=8, max_delay_s=LONG_S))
    with server_ref.running({"m": version}) as url, clients(url, 8) as posts:
        for number, client in enumerate(posts):
            client.post(row(math.nan if number == 5 else number))
        answers = [client.read() for client in posts]
    assert [answer.status for answer in answers] == [500 if n == 5 else 200 for n in range(8)]
    assert "ValueError: not a number" in graphpipe.decode_response(answers[5].body).errors[0].message
    for number in (0, 1, 2, 3, 4, 6, 7):
        assert graphpipe.decode_response(answers[number].body).tensors[0].tolist() == [[2 * number] * 2]
    assert len(gate.began[0]) == 8
    assert len(gate.began) == 7


def test_r5_fifty_requests_of_wrong_shapes_among_good_ones_fail_none_of_those() -> None:
    gate = Gate()
    version = Version("m", [gate.servable], batching=Batching(max_rows=16))
    with server_ref.running({"m": version}) as url, clients(url, 100) as posts:
        for number, client in enumerate(posts):
            client.post(row(number) if number % 2 else np.ones((1, 3 + number), np.float32))
        answers = [client.read() for client in posts]
    assert [answer.status for answer in answers] == [200 if number % 2 else 400 for number in range(100)]
    for number in range(1, 100, 2):
        assert graphpipe.decode_response(answers[number].body).tensors[0].tolist() == [[2 * number] * 2]
    assert not any(math.isnan(value) for batch in gate.began for value in batch)
    counts = version.stats.snapshot()
    assert (counts.success.times, counts.failures["invalid"], counts.rows) == (50, 50, 50)


def test_r7_a_run_that_hangs_is_503_and_the_next_one_is_served() -> None:
    gate = Gate()
    version = Version("m", [gate.servable], response_timeout_s=0.1)
    with server_ref.running({"m": version}) as url, clients(url, 2) as (hung, good), gate.shut():
        answer = hung.post(row(1)).read()
        assert answer.status == 503
        assert "in 0.1 s: its run is given up" in graphpipe.decode_response(answer.body).errors[0].message
        gate.open.set()
        assert good.post(row(2)).read().status == 200
