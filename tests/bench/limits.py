"""Do graphs keep to their limits: deadlines, hedges, who may run? (figures x to z)

`python tests/bench/limits.py 60` overloads for 60 seconds; `make bench` for ten.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import graph_nodes
import numpy as np
import psutil
from timing import HERE, median

sys.path.insert(0, str(HERE.parent))

from rawpeer import Conversation, Message, peer, serving

import ensemble
from remote_ops import Deadline, Signature, TensorSpec, graphpipe
from remote_ops.errors import DeadlineExceeded, NodeError, Overloaded

X, Y = TensorSpec("x", "float32", (-1, -1)), TensorSpec("y", "float32", (-1, -1))
ONE = np.ones((1, 4), np.float32)
ANSWER = b"".join(graphpipe.encode_response([ONE]))
HEAD = "ensemble: 1\nname: bench\ninputs: {x: {dtype: float32, shape: [N, M]}}\n"
GIVES = "outputs: {y: {dtype: float32, shape: [N, M]}}"
CALLS, RUNS = 1000, 20


def load(nodes: str, outputs: str, more: str = "", threads: int | None = None) -> ensemble.Ensemble:
    """A graph of nodes and outputs in YAML."""
    return ensemble.load(f"{HEAD}outputs: {outputs}\n{more}\nnodes:\n{nodes}", file=__file__, threads=threads)


def remote(name: str, url: str, reads: str = "$inputs.x", more: str = "") -> str:
    """A node behind a server, in YAML."""
    return f"  {name}: {{kind: remote, url: '{url}', inputs: {{x: {reads}}}{more}}}\n"


def after(seconds: float) -> Callable[[Conversation, Message], None]:
    """What answers after a while."""

    def answer(conversation: Conversation, message: Message) -> None:
        time.sleep(seconds)
        conversation.answer(ANSWER)

    return answer


def hang(conversation: Conversation, message: Message) -> None:
    """Answers nothing, until the caller hangs up."""
    with contextlib.suppress(ConnectionError):
        conversation.read()


def fail(conversation: Conversation, message: Message) -> None:
    """Fails after 20 ms."""
    time.sleep(0.02)
    conversation.answer(b"", "500 Internal Server Error")


def served(answer: Callable[[Conversation, Message], None]) -> Any:
    """A server that answers like that."""
    return peer(serving(Signature((X,), (Y,)), answer))


def took_ms(call: Callable[[], object], *errors: type[Exception]) -> float:
    """Milliseconds of a call, which ends with one of these errors if there are any."""
    since = time.perf_counter()
    try:
        call()
    except errors:
        pass
    else:
        assert not errors
    return (time.perf_counter() - since) * 1e3


def told(what: str, times: list[float], aim: str) -> None:
    """Print the least, the median and the most."""
    least, middle, most = min(times), median(times), max(times)
    print(f"{what:70} {least:8.1f} {middle:8.1f} {most:8.1f} ms  ({aim})", flush=True)


def in_time() -> None:
    """Three calls of 100 ms within 200 ms; a failure after 20 ms beside a call that hangs; a quorum of 3 of 5."""
    with served(after(0.1)) as slow, served(hang) as hung, served(fail) as bad, served(after(0.0)) as quick:
        chain = remote("a", slow.url) + remote("b", slow.url, "a") + remote("c", slow.url, "b")
        with load(chain, "{y: c}") as graph:
            graph.infer({"x": ONE})

            def late() -> None:
                graph.infer({"x": ONE}, deadline=Deadline.after(0.2))

            told("x  three calls of 100 ms with 200 ms", [took_ms(late, DeadlineExceeded) for _ in range(RUNS)],
                 "200 +/- 15")  # fmt: skip
        more = ", retry: {attempts: 1}"
        with load(remote("a", hung.url) + remote("b", bad.url, more=more), "{a: a, b: b}") as graph:

            def failed() -> None:
                asyncio.run(graph.arun({"x": ONE}, deadline=Deadline.after(5)))

            told("x  a failure after 20 ms beside a call of 5 s", [took_ms(failed, NodeError) for _ in range(RUNS)],
                 "at most 60")  # fmt: skip
        members = [quick.url] * 3 + [hung.url] * 2
        nodes = "".join(remote(f"n{index}", url) for index, url in enumerate(members))
        nodes += "  v: {kind: combine, method: mean, inputs: [n0, n1, n2, n3, n4], quorum: {min: 3, grace: 20ms}}\n"
        with load(nodes, "{y: v}") as graph:
            told("x  3 of 5 members answer at once, two hang, grace 20 ms",
                 [took_ms(lambda: graph.infer({"x": ONE})) for _ in range(RUNS)], "20 to 35")  # fmt: skip


class Tail:
    """A server of which one answer in so many takes long; `sent` is how often it was asked."""

    def __init__(self, one_in: int, lasts_s: float) -> None:
        self.one_in = one_in
        self.lasts_s = lasts_s
        self.sent = self._slow = 0
        self._rng, self._lock = random.Random(0), threading.Lock()

    def __call__(self, conversation: Conversation, message: Message) -> None:
        with self._lock:
            if self.sent % self.one_in == 0:
                self._slow = self.sent + self._rng.randrange(self.one_in)
            is_slow = self.sent == self._slow
            self.sent += 1
        time.sleep(self.lasts_s if is_slow else 0.01)
        with contextlib.suppress(OSError):
            conversation.answer(ANSWER)


def hedged() -> None:
    """Calls of 10 ms of which one in twenty takes 500 ms; and calls that are all slow."""
    for tail in (Tail(20, 0.5), Tail(1, 0.1)):
        with served(tail) as there:
            for more in ("", ", hedge: {after: 30ms, budget: 6%}"):
                with load(remote("n", there.url, more=more), "{y: n}") as graph, ThreadPoolExecutor(4) as pool:
                    call = functools.partial(took_ms, functools.partial(graph.infer, {"x": ONE}))
                    call()
                    tail.sent = 0
                    times = sorted(pool.map(lambda _, call=call: call(), range(CALLS)))  # type: ignore[misc]
                what = f"y  one in {tail.one_in} of {CALLS} takes {1e3 * tail.lasts_s:.0f} ms"
                what += ", hedged at 30 ms" if more else ""
                told = f"p50 {times[CALLS // 2]:.1f}  p99 {times[CALLS * 99 // 100]:.1f} ms, {tail.sent - CALLS} more"
                print(f"{what:62} {told}  (at most 60 ms, 60 more)", flush=True)


def full() -> None:
    """64 runs inside and 128 that wait: how soon the next one is told."""
    graph_nodes.LASTS_S[0] = 1.0
    admission = "admission: {max_inflight: 64, max_queued: 128}"
    nodes = f"  n: {{kind: python, call: 'graph_nodes:sleeping', inputs: {{x: $inputs.x}}, {GIVES}}}\n"
    with load(nodes, "{y: n}", admission, threads=64) as graph:
        runs = [graph.submit({"x": ONE}) for _ in range(192)]
        while graph.stats()[:2] != (64, 128):
            time.sleep(0.001)
        told("z  the 193rd run, with 64 inside and 128 that wait",
             [took_ms(lambda: graph.infer({"x": ONE}), Overloaded) for _ in range(RUNS)], "at most 5")  # fmt: skip
        for run in runs:
            run.cancel()


def overloaded(seconds: float) -> None:
    """Ten times as many runs as there is room for, each with 64 KiB of its own; every other one has 0.3 s."""
    lasts_s, inside = 0.25, 64
    graph_nodes.LASTS_S[0] = lasts_s
    admission = f"admission: {{max_inflight: {inside}, max_queued: 128}}"
    nodes = f"  n: {{kind: python, call: 'graph_nodes:sleeping', inputs: {{x: $inputs.x}}, {GIVES}}}\n"
    kinds: dict[str, int] = {}
    late: list[float] = [0.0]
    resident: list[float] = []
    me = psutil.Process()

    def ended(until: float) -> Callable[[Future[Any]], None]:
        def note(run: Future[Any]) -> None:
            kind = type(run.exception()).__name__
            kinds[kind] = kinds.get(kind, 0) + 1
            if kind == "DeadlineExceeded":
                late[0] = max(late[0], time.monotonic() - until)

        return note

    with load(nodes, "{y: n}", admission, threads=inside) as graph:
        every_s, since, sent = lasts_s / inside / 10, time.monotonic(), 0
        while (now := time.monotonic()) < since + seconds:
            if sent > (now - since) / every_s:
                time.sleep(every_s)
                continue
            bound = Deadline.after(0.3 if sent % 2 else 2.0)
            run = graph.submit({"x": np.full((1, 1 << 14), sent, np.float32)}, deadline=bound)
            run.add_done_callback(ended(bound.at))
            sent += 1
            if len(resident) < (now - since):
                resident.append(me.memory_info().rss / 1e6)
        while sum(kinds.values()) < sent:
            time.sleep(0.01)
    print(f"z  {sent} runs in {seconds:.0f} s, room for {seconds * inside / lasts_s:.0f}: {kinds}; past its deadline at"
          f" most {late[0] * 1e3:.1f} ms; memory after a tenth {resident[len(resident) // 10]:.1f} MB, at the end"
          f" {resident[-1]:.1f} MB, most {max(resident):.1f} MB", flush=True)  # fmt: skip


def main(seconds: float = 10.0) -> None:
    """Print figures x to z."""
    in_time()
    hedged()
    full()
    overloaded(seconds)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
