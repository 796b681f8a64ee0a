"""`Endpoint` over several replicas, real ones: they die, lag, refuse and come back, and calls do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import gc
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from rawpeer import WAIT_S, Conversation, Message, Peer, peer, serving, until

import server_ref
from remote_ops import Endpoint, FunctionServable, Retry, Signature, TensorSpec, graphpipe
from remote_ops import addresses as remote_addresses
from remote_ops.deadline import Deadline, deadline
from remote_ops.errors import (
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    InvalidRequest,
    ModelUnavailable,
    Overloaded,
    RemoteOpsError,
    SpecError,
)
from remote_ops.policy import Breaker, Hedge
from remote_ops.replicas import Replicas
from remote_ops.url import Url

Array = npt.NDArray[Any]
X = TensorSpec("x", "float32", (-1,))
Y = TensorSpec("y", "float32", (-1,))
SIGNATURE = Signature((X,), (Y,), name="m")
ONE = np.ones(1, np.float32)
ANSWER = b"".join(graphpipe.encode_response([2 * ONE]))
QUICK = Retry(base_s=0.001)

Answer = Callable[[Conversation, Message], None]


async def _one_after_another(endpoint: Endpoint, calls: int) -> None:
    for _ in range(calls):
        await endpoint.ainfer({"x": ONE})


def infer(endpoint: Endpoint, calls: int = 1) -> None:
    for _ in range(calls):
        endpoint.infer({"x": ONE})


def ainfer(endpoint: Endpoint, calls: int = 1) -> None:
    asyncio.run(_one_after_another(endpoint, calls))


def submit(endpoint: Endpoint, calls: int = 1) -> None:
    """As many calls, sixteen of them under way at a time."""
    room = threading.Semaphore(16)
    futures: list[Future[Any]] = []
    for _ in range(calls):
        assert room.acquire(timeout=WAIT_S)
        futures.append(endpoint.submit({"x": ONE}))
        futures[-1].add_done_callback(lambda _: room.release())
    for future in futures:
        future.result(WAIT_S)


WAYS = [infer, ainfer, submit]


def good(conversation: Conversation, request: Message) -> None:
    conversation.answer(ANSWER)


def status(line: str, *headers: str) -> Answer:
    return lambda conversation, request: conversation.answer(b"", line, *headers)


class Counted:
    """An answer that counts how often it is given."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.count = 0
        self._lock = threading.Lock()

    def __call__(self, conversation: Conversation, request: Message) -> None:
        with self._lock:
            self.count += 1
        self.answer(conversation, request)


@contextlib.contextmanager
def replicas(*answers: Answer, **options: Any) -> Iterator[tuple[Endpoint, list[Peer]]]:
    """An endpoint whose replicas answer so, and which knows their signature already."""
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(peer(serving(SIGNATURE, answer))) for answer in answers]
        endpoint = stack.enter_context(Endpoint([there.url for there in peers], **{"timeout_s": 10, **options}))
        endpoint._signature = SIGNATURE
        yield endpoint, peers


def nobody() -> str:
    """A URL at which a connection is refused."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}/m"


def in_flight(endpoint: Endpoint) -> int:
    return sum(replica.in_flight for replica in endpoint.stats())


@contextlib.contextmanager
def running_elsewhere(count: int) -> Iterator[list[tuple[str, subprocess.Popen[str]]]]:
    """Servers, each in a process of its own."""
    code = (
        "import sys, server_ref; from remote_ops import FunctionServable, TensorSpec\n"
        "xs, ys = ([TensorSpec(n, 'float32', (-1,))] for n in 'xy')\n"
        "with server_ref.running({'m': FunctionServable(lambda x: 2 * x, xs, ys)}) as url:\n"
        "    print(url, flush=True); sys.stdin.read()\n"
    )
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        servers = []
        for process in processes:
            assert process.stdout is not None
            servers.append((process.stdout.readline().strip(), process))
        yield servers


# --------------------------------------------------------------------------- how often a call is sent


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_a_refused_connection_is_tried_as_often_as_asked(way: Any, attempts: int) -> None:
    with Endpoint(nobody(), retry=Retry(attempts, 0.001)) as endpoint:
        endpoint._signature = SIGNATURE
        with pytest.raises(ConnectError):
            way(endpoint)
        assert endpoint.stats()[0].sent == attempts
        assert endpoint.stats()[0].failures == attempts


@pytest.mark.parametrize("way", WAYS)
def test_a_black_hole_is_tried_once_and_left_at_the_deadline(way: Any) -> None:
    over = threading.Event()
    hole = Counted(lambda conversation, request: over.wait(WAIT_S) and None)
    with replicas(hole, retry=QUICK, timeout_s=0.2) as (endpoint, _):
        since = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"attempt 1 of 3"):
            way(endpoint)
        assert time.monotonic() - since < 0.6
        over.set()
        assert hole.count == 1
        assert in_flight(endpoint) == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("answer", "error", "sent"),
    [
        (status("503 X"), ModelUnavailable, 1),
        (lambda conversation, request: conversation.hang_up(), ConnectionLost, 1),
    ],
)
def test_a_call_that_must_not_happen_twice_is_sent_once(
    way: Any, answer: Answer, error: type[RemoteOpsError], sent: int
) -> None:
    counted = Counted(answer)
    with replicas(counted, counted, retry=Retry(5, 0.001, idempotent=False)) as (endpoint, _):
        with pytest.raises(error):
            way(endpoint)
        assert counted.count == sent


def test_a_call_that_must_not_happen_twice_goes_elsewhere_where_it_was_not_heard() -> None:
    with peer(serving(SIGNATURE, good)) as there:
        endpoint = Endpoint([nobody(), there.url], retry=Retry(idempotent=False))
        endpoint._signature = SIGNATURE
        infer(endpoint, 20)
        endpoint.close()


def test_a_kept_connection_that_ends_is_replaced_once_within_a_sending() -> None:
    """A peer that hangs up on every request, having answered the first of each of two connections."""
    seen: list[int] = []
    met = threading.Barrier(2)

    def answer(conversation: Conversation, request: Message) -> None:
        if conversation.number not in seen and len(set(seen)) < 2:
            seen.append(conversation.number)
            met.wait(WAIT_S)
            return conversation.answer(ANSWER)
        seen.append(conversation.number)
        return conversation.hang_up()

    with replicas(answer, retry=Retry(2, 0.001)) as (endpoint, _):
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda _: infer(endpoint), range(2)))
        with pytest.raises(ConnectionLost):
            infer(endpoint)
    # first sending: a kept connection, and the new one for it; second sending: the other kept one, and its own
    assert len(seen) - 2 <= 4


@pytest.mark.parametrize("date", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_retry_after_is_heeded_and_not_waited_for_beyond_the_deadline(way: Any, date: bool) -> None:
    later = email.utils.formatdate(time.time() + 60, usegmt=True) if date else "60"
    busy = Counted(status("503 X", f"Retry-After: {later}"))
    with replicas(busy, retry=QUICK, timeout_s=5) as (endpoint, _):
        since = time.monotonic()
        with pytest.raises(ModelUnavailable) as caught:
            way(endpoint)
        assert time.monotonic() - since < 2
        assert busy.count == 1
        assert caught.value.retry_after_s == pytest.approx(60, abs=3)


def test_retry_after_is_waited_for_within_the_deadline() -> None:
    answers = iter([status("429 X", "Retry-After: 1"), good])
    with replicas(lambda *both: next(answers)(*both), retry=QUICK) as (endpoint, _):
        since = time.monotonic()
        infer(endpoint)
        assert time.monotonic() - since > 0.9


@pytest.mark.parametrize("text", ["soon", "-1", "1.5", "", "\u00b2", "Thu, 99 Foo 2026 00:00:00 GMT", "9" * 400])
def test_a_retry_after_that_is_none_is_no_error_of_its_own(text: str) -> None:
    with replicas(lambda conversation, _: conversation.send(
        b"HTTP/1.1 503 X\r\nContent-Length: 0\r\nRetry-After: " + text.encode("latin-1", "replace") + b"\r\n\r\n"
    ), retry=QUICK, timeout_s=5) as (endpoint, _):  # fmt: skip
        with pytest.raises(ModelUnavailable):
            infer(endpoint)


@pytest.mark.parametrize("way", WAYS)
def test_a_replica_that_asks_to_be_left_alone_is_while_another_answers(way: Any) -> None:
    full, other = Counted(status("429 X", "Retry-After: 30")), Counted(good)
    with replicas(full, other, retry=QUICK) as (endpoint, _):
        since = time.monotonic()
        way(endpoint, 50)
        assert time.monotonic() - since < 5
        assert other.count == 50
        assert full.count <= 16


# --------------------------------------------------------------------------- budget


@pytest.mark.parametrize("way", WAYS)
def test_a_thousand_calls_that_all_fail_send_at_most_a_fifth_more(way: Any) -> None:
    busy = Counted(status("503 X"))
    with replicas(busy, busy, busy, retry=QUICK) as (endpoint, _):

        def call(_: int) -> None:
            with pytest.raises(ModelUnavailable):
                way(endpoint)

        if way is ainfer:

            async def calls() -> None:
                for _ in range(1000):
                    with pytest.raises(ModelUnavailable):
                        await endpoint.ainfer({"x": ONE})

            asyncio.run(calls())
        else:
            with ThreadPoolExecutor(4) as threads:
                list(threads.map(call, range(1000)))
        assert 1100 < busy.count <= 1200
        assert sum(replica.sent for replica in endpoint.stats()) == busy.count


def test_a_call_that_is_not_sent_again_for_want_of_budget_says_so() -> None:
    with replicas(status("503 X"), retry=Retry(attempts=99, base_s=0.0)) as (endpoint, _):
        with pytest.raises(ModelUnavailable, match=r"503 \(attempt 11 of 99\); not sent again: retries have used up"):
            infer(endpoint)
        assert endpoint.stats()[0].sent == 11
    with replicas(status("503 X"), retry=Retry(attempts=2, base_s=0.0)) as (endpoint, _):
        with pytest.raises(ModelUnavailable, match=r"503 \(attempt 2 of 2\)$"):
            infer(endpoint)


# --------------------------------------------------------------------------- replicas that die and come back


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_of_a_thousand_calls_none_fails_when_one_of_two_replicas_is_killed(way: Any) -> None:
    with running_elsewhere(2) as ((first, doomed), (second, other)), Endpoint([first, second], 10) as endpoint:
        way(endpoint, 300)
        timer = threading.Timer(0.02, doomed.kill)  # while calls are on their way
        timer.start()
        way(endpoint, 700)
        timer.join()
        assert doomed.wait(WAIT_S) == -signal.SIGKILL
        way(endpoint, 20)
        dead, alive = endpoint.stats()
        assert (alive.state, in_flight(endpoint)) == ("up", 0)
        assert dead.state == "ejected"
        assert dead.failures >= 5
        other.kill()
        other.wait(WAIT_S)
        with pytest.raises(ConnectError) as caught:
            way(endpoint)
        assert first in str(caught.value)
        assert second in str(caught.value)


@pytest.mark.parametrize("way", WAYS)
def test_a_call_that_no_replica_answers_names_them_all(way: Any) -> None:
    first, second = nobody(), nobody()
    with Endpoint([first, second], retry=QUICK) as endpoint:
        endpoint._signature = SIGNATURE
        for _ in range(20):  # ejected or not
            with pytest.raises(ConnectError, match="1 more failed") as caught:
                way(endpoint)
            assert first in str(caught.value)
            assert second in str(caught.value)


def test_an_error_of_the_request_says_nothing_of_replicas_that_failed() -> None:
    refuses = serving(
        SIGNATURE, lambda conversation, _: conversation.answer(b"no", "400 X", "Content-Type: text/plain")
    )
    with peer(refuses) as there, Endpoint([nobody(), there.url], retry=QUICK) as endpoint:
        endpoint._signature = SIGNATURE
        for _ in range(4):
            with pytest.raises(InvalidRequest) as caught:
                infer(endpoint)
            assert "more failed" not in str(caught.value)


@pytest.mark.parametrize("way", WAYS)
def test_a_replica_is_ejected_after_five_faults_then_probed_and_comes_back(way: Any) -> None:
    ill = threading.Event()
    ill.set()
    first = Counted(lambda *both: status("503 X")(*both) if ill.is_set() else good(*both))
    with replicas(first, good, good, retry=QUICK, breaker=Breaker(base_s=0.3)) as (endpoint, _):
        infer(endpoint, 40)
        assert first.count == 5
        assert [replica.state for replica in endpoint.stats()] == ["ejected", "up", "up"]
        assert until(lambda: endpoint.stats()[0].state == "probing")
        infer(endpoint, 1)
        assert first.count == 6
        assert endpoint.stats()[0].state == "ejected"
        ill.clear()
        assert until(lambda: endpoint.stats()[0].state == "probing")
        way(endpoint, 40)
        assert endpoint.stats()[0].state == "up"
        assert first.count > 6


@pytest.mark.parametrize("way", WAYS)
def test_a_replica_that_was_ejected_is_asked_once_the_other_has_gone(way: Any) -> None:
    ill = threading.Event()
    ill.set()
    first = Counted(lambda *both: status("503 X")(*both) if ill.is_set() else good(*both))
    with replicas(first, good, retry=QUICK, breaker=Breaker(base_s=60)) as (endpoint, peers):
        infer(endpoint, 40)
        assert [replica.state for replica in endpoint.stats()] == ["ejected", "up"]
        ill.clear()
        peers[1].close()
        way(endpoint, 40)
        assert first.count == 5 + 40


def test_deadlines_that_leave_no_time_eject_nobody() -> None:
    with replicas(good, good) as (endpoint, _):
        infer(endpoint, 10)
        for _ in range(20):
            with pytest.raises(DeadlineExceeded):
                endpoint.infer({"x": ONE}, deadline=Deadline.after(0.0))
        assert [(replica.state, replica.failures) for replica in endpoint.stats()] == [("up", 0)] * 2


@pytest.mark.parametrize("way", WAYS)
def test_a_replica_that_never_answers_is_left_alone_after_five_calls(way: Any) -> None:
    over = threading.Event()
    hole = Counted(lambda conversation, request: over.wait(WAIT_S) and None)
    with replicas(hole, good, timeout_s=0.05, breaker=Breaker(base_s=60)) as (endpoint, _):
        failed = 0
        for _ in range(40):
            try:
                way(endpoint)
            except DeadlineExceeded:
                failed += 1
        over.set()
        assert failed == hole.count == 5
        assert [replica.state for replica in endpoint.stats()] == ["ejected", "up"]


# --------------------------------------------------------------------------- replicas that lag


@pytest.mark.parametrize("threads", [1, 16])
def test_a_replica_ten_times_slower_gets_few_of_the_calls(threads: int) -> None:
    def after(delay_s: float) -> Counted:
        return Counted(lambda conversation, request: (time.sleep(delay_s), conversation.answer(ANSWER))[1])

    quick, slow = after(0.002), after(0.02)
    with replicas(quick, slow) as (endpoint, _), ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: infer(endpoint), range(600)))
    assert quick.count + slow.count == 600
    assert slow.count < 60


def laggard(slow_s: float, seed: int) -> Counted:
    """One reply in twenty takes this long; the others are sent at once."""
    rng = np.random.default_rng(seed)
    late = iter(np.concatenate([rng.permutation(20) == 0 for _ in range(1000)]).tolist())
    lock = threading.Lock()

    def answer(conversation: Conversation, request: Message) -> None:
        with lock:
            is_late = next(late)
        if is_late:
            time.sleep(slow_s)
        conversation.answer(ANSWER)

    return Counted(answer)


def p99_of(hedge: Hedge | None) -> tuple[float, int]:
    """The 99th percentile of 1,000 calls that lag now and then, in seconds, and how many copies were sent."""
    first, second = laggard(0.2, 1), laggard(0.2, 2)
    with replicas(first, second, hedge=hedge) as (endpoint, _):
        took = []
        for _ in range(1000):
            since = time.perf_counter()
            infer(endpoint)
            took.append(time.perf_counter() - since)
        assert in_flight(endpoint) == 0
    return float(np.quantile(took, 0.99)), first.count + second.count


@pytest.mark.slow
def test_hedging_cuts_p99_where_one_reply_in_twenty_is_slow() -> None:
    plain, _ = p99_of(None)
    for after_s in (None, 0.01):
        hedged, load = p99_of(Hedge(after_s=after_s))
        assert hedged * 5 < plain, after_s
        assert load < 1080, after_s


def hangs_once(over: threading.Event) -> Counted:
    def answer(conversation: Conversation, request: Message) -> None:
        if counted.count == 1:
            over.wait(WAIT_S)
            conversation.hang_up()
        else:
            conversation.answer(ANSWER)

    counted = Counted(answer)
    return counted


@pytest.mark.parametrize("way", WAYS)
def test_a_hedge_that_is_lost_hangs_up_at_once_and_leaves_the_pool_whole(way: Any) -> None:
    gone = threading.Event()

    def hangs(conversation: Conversation, request: Message) -> None:
        assert conversation.read() is None  # nothing, until the caller hangs up
        gone.set()

    answers = iter([hangs])
    with replicas(
        lambda *both: next(answers, good)(*both), good, hedge=Hedge(after_s=0.05)
    ) as (endpoint, peers):  # fmt: skip
        way(endpoint, 5)
        assert gone.wait(WAIT_S)
        assert in_flight(endpoint) == 0
        way(endpoint, 20)
        assert until(lambda: sum(there.open for there in peers) <= 20)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_answers_for_a_replica_that_hangs(way: Any) -> None:
    over = threading.Event()
    with replicas(hangs_once(over), good, hedge=Hedge(after_s=0.05), retry=Retry(1)) as (endpoint, _):
        since = time.monotonic()
        way(endpoint, 4)
        assert time.monotonic() - since < 2
        over.set()


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_goes_to_the_same_server_where_there_is_no_other(way: Any) -> None:
    over = threading.Event()
    with replicas(hangs_once(over), hedge=Hedge(after_s=0.05), retry=Retry(1)) as (endpoint, _):
        way(endpoint, 4)
        over.set()
        assert endpoint.stats()[0].sent == 5


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_that_fails_leaves_the_first_to_answer(way: Any) -> None:
    slow: Answer = lambda conversation, request: (time.sleep(0.2), conversation.answer(ANSWER))[1]  # noqa: E731
    with replicas(slow, status("503 X"), hedge=Hedge(after_s=0.02), retry=Retry(1)) as (endpoint, _):
        endpoint._replicas._turn = -1  # the slow one's turn
        way(endpoint)
        assert in_flight(endpoint) == 0


@pytest.mark.parametrize("after_s", [1e9, float("inf")])
def test_a_copy_may_be_put_off_for_ever(after_s: float) -> None:
    with replicas(good, hedge=Hedge(after_s=after_s)) as (endpoint, _):
        infer(endpoint, 5)
        ainfer(endpoint, 5)
        assert endpoint.stats()[0].sent == 10


def test_copies_stay_within_their_budget_when_everything_is_slow() -> None:
    slow = Counted(lambda conversation, request: (time.sleep(0.005), conversation.answer(ANSWER))[1])
    with replicas(slow, slow, hedge=Hedge(after_s=0.0)) as (endpoint, _):
        submit(endpoint, 300)
        assert until(lambda: in_flight(endpoint) == 0)
        assert 300 < sum(replica.sent for replica in endpoint.stats()) <= 300 + 0.07 * 300 + 5


def test_a_hedged_call_made_on_the_background_loop_does_not_wait_for_itself() -> None:
    from remote_ops.background import background_loop

    async def call() -> None:
        infer(endpoint)

    with replicas(good, hedge=Hedge(after_s=0.0)) as (endpoint, _):
        asyncio.run_coroutine_threadsafe(call(), background_loop()).result(WAIT_S)


# --------------------------------------------------------------------------- giving up


@contextlib.contextmanager
def waiting() -> Iterator[tuple[Endpoint, threading.Event, threading.Event]]:
    """An endpoint whose first call is never answered; events for its arrival, and for its hanging up."""
    arrived, gone = threading.Event(), threading.Event()

    def answer(conversation: Conversation, request: Message) -> None:
        if arrived.is_set():
            return good(conversation, request)
        arrived.set()
        assert conversation.read() is None
        gone.set()
        return None

    with replicas(answer) as (endpoint, peers):
        yield endpoint, arrived, gone
        assert gone.wait(WAIT_S)
        assert until(lambda: in_flight(endpoint) == 0)
        infer(endpoint, 3)
        ainfer(endpoint, 3)
        submit(endpoint, 3)
        assert peers[0].connections <= 6


def test_a_cancelled_task_hangs_up_at_once() -> None:
    async def cancel(endpoint: Endpoint, arrived: threading.Event) -> None:
        task = asyncio.ensure_future(endpoint.ainfer({"x": ONE}))
        while not arrived.is_set():
            await asyncio.sleep(0.002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with waiting() as (endpoint, arrived, _):
        asyncio.run(cancel(endpoint, arrived))


def test_a_cancelled_future_hangs_up_at_once() -> None:
    with waiting() as (endpoint, arrived, _):
        future = endpoint.submit({"x": ONE})
        assert arrived.wait(WAIT_S)
        assert future.cancel()
        assert future.cancelled()


def test_a_dropped_future_hangs_up_at_once() -> None:
    with waiting() as (endpoint, arrived, _):
        future = endpoint.submit({"x": ONE})
        assert arrived.wait(WAIT_S)
        del future
        gc.collect()


def test_a_future_that_is_dropped_before_its_call_begins_is_no_fault() -> None:
    with replicas(good) as (endpoint, _):
        for _ in range(200):
            endpoint.submit({"x": ONE})
        submit(endpoint, 5)
        assert until(lambda: in_flight(endpoint) == 0)


def test_a_dropped_future_with_a_callback_still_calls_it() -> None:
    done = threading.Event()
    with replicas(good) as (endpoint, _):
        endpoint.submit({"x": ONE}).add_done_callback(lambda _: done.set())
        gc.collect()
        assert done.wait(WAIT_S)


def test_a_future_is_awaited_like_any_other() -> None:
    async def call(endpoint: Endpoint) -> Any:
        return await asyncio.wrap_future(endpoint.submit({"x": ONE}))

    with replicas(good) as (endpoint, _):
        assert asyncio.run(call(endpoint))["y"].tolist() == [2.0]


@pytest.mark.parametrize("hedge", [None, Hedge(after_s=5.0)])
def test_ctrl_c_hangs_up_at_once(hedge: Hedge | None) -> None:
    with waiting() as (endpoint, arrived, gone):
        endpoint._hedge = hedge

        def press() -> None:
            arrived.wait(WAIT_S)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        presser = threading.Thread(target=press)
        presser.start()
        since = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            infer(endpoint)
        assert time.monotonic() - since < 5
        presser.join(WAIT_S)
        assert gone.wait(WAIT_S)
        endpoint._hedge = None


@pytest.mark.parametrize("way", WAYS)
def test_the_ambient_deadline_holds_over_replicas(way: Any) -> None:
    over = threading.Event()
    hole: Answer = lambda conversation, request: over.wait(WAIT_S) and None  # noqa: E731
    with replicas(hole, hole, hedge=Hedge(after_s=0.05)) as (endpoint, _):
        since = time.monotonic()
        with deadline(0.3), pytest.raises(DeadlineExceeded):
            way(endpoint)
        assert time.monotonic() - since < 0.8
        assert until(lambda: in_flight(endpoint) == 0)
        over.set()


# --------------------------------------------------------------------------- threads, processes


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_every_answer_of_sixteen_threads_belongs_to_its_request(count: int) -> None:
    def answer(conversation: Conversation, request: Message) -> None:
        x = graphpipe.decode_request(request.body).tensors[0]
        conversation.answer(b"".join(graphpipe.encode_response([2 * x])))

    with replicas(*[answer] * count) as (endpoint, peers):

        def calls(thread: int) -> int:
            wrong = 0
            for index in range(1000):
                x = np.float32([thread, index])
                wrong += not np.array_equal(endpoint(x), 2 * x)
            return wrong

        with ThreadPoolExecutor(16) as threads:
            assert sum(threads.map(calls, range(16))) == 0
        assert all(there.connections <= 16 for there in peers)
        assert in_flight(endpoint) == 0


@pytest.mark.parametrize("took_s", [(0.01, 0.01, 0.01), (0.01, 0.02, 0.029)], ids=["alike", "nearly alike"])
def test_replicas_that_answer_alike_take_exact_turns(took_s: tuple[float, ...]) -> None:
    now = 0.0
    urls = [Url.parse(f"http://gpu{number}/m") for number in range(3)]
    replicas = Replicas(urls, Retry(), None, Breaker(), clock=lambda: now)
    for _ in range(30):
        replica = replicas.next(())
        since = replicas.begin(replica, first=True)
        now += took_s[urls.index(replica.url)]
        replicas.answered(replica, since)
    assert [one.sent for one in replicas.stats()] == [10, 10, 10]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("hedge", [None, Hedge(after_s=0.05)])
def test_a_fork_with_calls_in_flight_harms_neither_side(hedge: Hedge | None) -> None:
    arrived, release = threading.Barrier(3), threading.Event()
    calls = Counted(good)

    def answer(conversation: Conversation, request: Message) -> None:
        if graphpipe.decode_request(request.body).tensors[0][0] == 7:
            with contextlib.suppress(threading.BrokenBarrierError):
                arrived.wait(WAIT_S)
            release.wait(WAIT_S)
        calls(conversation, request)

    held = np.float32([7])
    with replicas(answer, answer, hedge=None) as (endpoint, _):
        infer(endpoint, 4)
        submit(endpoint, 4)
        submitted = endpoint.submit({"x": held})
        with ThreadPoolExecutor(1) as threads:
            blocking = threads.submit(endpoint.infer, {"x": held})
            arrived.wait(WAIT_S)  # both calls are with a server
            endpoint._hedge = hedge
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    assert in_flight(endpoint) == 0
                    del submitted, blocking
                    gc.collect()
                    infer(endpoint, 10)
                    submit(endpoint, 10)
                    ainfer(endpoint, 10)
                    os._exit(0 if in_flight(endpoint) == 0 else 1)
                os._exit(2)
            codes: list[int] = []

            def reaped() -> bool:
                pid, code = os.waitpid(child, os.WNOHANG)
                codes.extend([os.waitstatus_to_exitcode(code)] if pid else [])
                return bool(pid)

            assert until(reaped)
            assert codes == [0]
            release.set()
            assert blocking.result(WAIT_S)["y"].tolist() == [2.0]
            assert submitted.result(WAIT_S)["y"].tolist() == [2.0]
        assert in_flight(endpoint) == 0


# --------------------------------------------------------------------------- names


@pytest.fixture
def two_machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, list[str], list[str]]]:
    """A port, the addresses that the name `models` has for now, and where requests arrived."""
    real = socket.getaddrinfo
    addresses, seen = ["127.0.0.1", "127.0.0.2"], []

    def getaddrinfo(host: str, port: int, *args: Any, flags: int = 0, **options: Any) -> list[Any]:
        if host != "models" or flags & socket.AI_NUMERICHOST:
            return real(host, port, *args, flags=flags, **options)
        return [found for address in addresses for found in real(address, port, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    def answer(conversation: Conversation, request: Message) -> None:
        seen.append(conversation.sock.getsockname()[0])
        conversation.answer(ANSWER)

    with peer(serving(SIGNATURE, answer), host="0.0.0.0") as there:
        yield there.port, addresses, seen


@pytest.mark.parametrize("way", WAYS)
def test_a_name_with_several_addresses_stands_for_several_replicas(way: Any, two_machines: Any) -> None:
    port, _, seen = two_machines
    url = f"http://models:{port}/m"
    with Endpoint(url) as endpoint:
        way(endpoint, 40)
        assert {"127.0.0.1", "127.0.0.2"} == set(seen)
        assert [replica.url for replica in endpoint.stats()] == [f"{url} [127.0.0.1]", f"{url} [127.0.0.2]"]
        assert endpoint.url == url


def test_a_name_is_looked_up_again_and_keeps_what_is_known_of_its_replicas(two_machines: Any) -> None:
    port, addresses, _ = two_machines
    now = 0.0
    replicas = Replicas(
        [Url.parse(f"http://models:{port}/m")], Retry(), None, Breaker(), expand=True, clock=lambda: now
    )  # fmt: skip
    assert replicas.unsettled
    for lookup in replicas.look_up():
        lookup.result(WAIT_S)
    assert until(lambda: len(replicas.stats()) == 2)
    assert not replicas.unsettled
    kept = replicas.next(())
    replicas.answered(kept, replicas.begin(kept, first=True))
    addresses.append("127.0.0.3")
    addresses[:] = [address for address in addresses if address in (kept.url.address, "127.0.0.3")]
    now = 31.0
    remote_addresses._lookups.clear()  # a look-up of the last second would be used again
    replicas.begin(kept, first=True)
    assert until(lambda: any("127.0.0.3" in replica.url for replica in replicas.stats()))
    sent = {replica.url.partition(" ")[2]: replica.sent for replica in replicas.stats()}
    assert sent == {f"[{kept.url.address}]": 2, "[127.0.0.3]": 0}


def test_a_name_that_nobody_knows_is_a_connect_error_like_any_other() -> None:
    with Endpoint("http://no-such-host.invalid/m", retry=Retry(2, 0.001)) as endpoint:
        endpoint._signature = SIGNATURE
        with pytest.raises(ConnectError):
            infer(endpoint)


# --------------------------------------------------------------------------- what is told, what is kept


def test_stats_say_of_each_replica_how_it_does() -> None:
    with replicas(good, status("503 X"), retry=QUICK) as (endpoint, peers):
        assert [(r.sent, r.p50_s, r.p99_s) for r in endpoint.stats()] == [(0, None, None)] * 2
        infer(endpoint, 30)
        up, ejected = endpoint.stats()
        assert (up.url, up.state, up.in_flight, up.sent, up.failures) == (peers[0].url, "up", 0, 30, 0)
        assert up.p50_s is not None
        assert up.p99_s is not None
        assert 0 < up.p50_s <= up.p99_s < 5
        assert (ejected.url, ejected.state, ejected.failures, ejected.p50_s) == (peers[1].url, "ejected", 5, None)


def test_stats_count_what_is_under_way() -> None:
    over = threading.Event()
    with replicas(lambda *both: (over.wait(WAIT_S), good(*both))[1]) as (endpoint, _):
        futures = [endpoint.submit({"x": ONE}) for _ in range(5)]
        assert until(lambda: in_flight(endpoint) == 5)
        over.set()
        for future in futures:
            future.result(WAIT_S)
        assert in_flight(endpoint) == 0


OPTIONS: dict[str, Any] = {
    "retry": Retry(4, 0.01, 0.1, budget=0.5),
    "hedge": Hedge(after_s=0.5, budget=0.1),
    "breaker": Breaker(3, 0.5, 5.0),
}


@pytest.mark.parametrize(
    "copied",
    [
        lambda endpoint: pickle.loads(pickle.dumps(endpoint)),
        lambda endpoint: Endpoint.from_description(json.loads(json.dumps(endpoint.describe()))),
    ],
)
def test_a_copy_in_another_process_has_the_same_replicas_and_policies(copied: Any) -> None:
    with replicas(good, good, **OPTIONS) as (endpoint, _):
        infer(endpoint, 3)
        again = copied(endpoint)
        assert {name: getattr(again, f"_{name}") for name in OPTIONS} == OPTIONS
        assert [replica.url for replica in again.stats()] == [replica.url for replica in endpoint.stats()]
        assert sum(replica.sent for replica in again.stats()) == 0
        infer(again, 3)
        again.close()


def test_a_description_from_before_there_were_hedges_is_still_read() -> None:
    description = {"url": ["http://h/"], "timeout_s": 3.0, "headers": {}, "tls": None}
    made = Endpoint.from_description({**description, "retry": {"attempts": 2, "base_s": 0.1, "max_s": 1.0}})
    assert (made._hedge, made._breaker, made._retry) == (None, Breaker(), Retry(2, 0.1, 1.0))


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"hedge": 0.1}, "hedge"),
        ({"hedge": Hedge(), "retry": Retry(idempotent=False)}, "hedge"),
        ({"breaker": None}, "breaker"),
        ({"retry": None}, "retry"),
    ],
)
def test_a_policy_that_is_none_is_refused(options: dict[str, Any], place: str) -> None:
    with pytest.raises(SpecError) as caught:
        Endpoint("http://h/", **options)
    assert caught.value.path == place


def test_a_module_over_replicas_survives_pickling_and_a_replica_that_dies() -> None:
    torch = pytest.importorskip("torch")
    from remote_ops.torch import RemoteModule

    with server_ref.running({"m": FunctionServable(lambda x: 2 * x, [X], [Y])}) as url:
        module = RemoteModule([nobody(), url], hedge=Hedge(after_s=0.5), retry=QUICK)
        again = pickle.loads(pickle.dumps(module))
        for one in (module, again):
            for _ in range(10):
                assert one(torch.ones(1)).tolist() == [2.0]


def run_all(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result(WAIT_S) for future in [threads.submit(call) for call in calls]]


def test_overload_is_refused_for_now_and_no_fault() -> None:
    with replicas(status("429 X"), good, retry=QUICK) as (endpoint, _):
        run_all([lambda: infer(endpoint, 10)] * 4)
        first, _ = endpoint.stats()
        assert first.state == "up"
        assert first.failures > 0
    with replicas(status("429 X"), retry=Retry(1)) as (endpoint, _), pytest.raises(Overloaded):
        endpoint.infer({"x": ONE}, deadline=Deadline.after(5))
