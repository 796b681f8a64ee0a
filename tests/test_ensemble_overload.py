"""A graph that is asked for ten times what it has room for: it keeps nothing, and answers those that it lets in."""

from __future__ import annotations

import sys
import threading
import time
import types
from collections import Counter
from concurrent.futures import Future
from typing import Any

import numpy as np
import psutil
import pytest
from rawpeer import until

import ensemble
from remote_ops import Deadline, Signature, TensorSpec
from remote_ops.errors import DeadlineExceeded

OVERLOAD_S = 12.0
LASTS_S, INSIDE, WAITING = 0.25, 64, 128
ROW = 1 << 14  # float32: 64 KiB
SLACK_S = 1.0  # a busy machine's; what was measured is in docs/benchmarks.md

MODELS = types.ModuleType("overload_models")  # what `kind: python` nodes find there
sys.modules["overload_models"] = MODELS
GRAPH = f"""ensemble: 1
name: graph
inputs: {{x: {{dtype: float32, shape: [1, {ROW}]}}}}
outputs: {{y: n}}
admission: {{max_inflight: {INSIDE}, max_queued: {WAITING}}}
nodes:
  n: {{kind: python, call: "overload_models:slow", inputs: {{x: $inputs.x}}}}
"""


class Slow:
    """A model that takes a while, any number of calls at a time; it knows how much time each run had left."""

    signature = Signature((TensorSpec("x", "float32", (1, ROW)),), (TensorSpec("y", "float32", (1, ROW)),))

    def __init__(self) -> None:
        self.now = self.most = 0
        self.left_s: list[float] = []
        self.lock = threading.Lock()

    def infer(self, inputs: Any, outputs: Any = None, *, deadline: Any = None, **_: Any) -> Any:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.left_s.append(deadline.remaining())
        time.sleep(LASTS_S)
        with self.lock:
            self.now -= 1
        return {"y": inputs["x"]}


class Ends:
    """What became of runs: how many ended how, and by how much the latest was told after its deadline."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.late_s = 0.0

    def of(self, run: Future[Any], sent: int, bound: Deadline) -> None:
        run.add_done_callback(lambda run: self._note(run, sent, bound))

    def _note(self, run: Future[Any], sent: int, bound: Deadline) -> None:
        error = run.exception()
        kind = type(error).__name__ if error is not None else "ok" if run.result()["y"][0, 0] == sent else "mixed up"
        self.kinds[kind] += 1
        if isinstance(error, DeadlineExceeded):
            self.late_s = max(self.late_s, -bound.remaining())


@pytest.mark.slow
def test_ten_times_as_many_runs_as_there_is_room_for_take_no_memory_and_none_waits_past_its_deadline() -> None:
    slow, ends, every_s = Slow(), Ends(), LASTS_S / INSIDE / 10
    MODELS.slow = slow  # type: ignore[attr-defined]
    resident, queued, sent = [], 0, 0
    with ensemble.load(GRAPH, file="graph.yaml", threads=INSIDE) as graph:
        since = time.monotonic()
        while (now := time.monotonic() - since) < OVERLOAD_S:
            if sent >= now / every_s:
                time.sleep(every_s)
                continue
            bound = Deadline.after(0.3 if sent % 2 else 30)  # some of these are over before there is room
            ends.of(graph.submit({"x": np.full((1, ROW), sent, np.float32)}, deadline=bound), sent, bound)
            sent += 1
            if sent % 100 == 0:
                queued = max(queued, graph.stats().queued)
                resident.append(psutil.Process().memory_info().rss)
        assert until(lambda: sum(ends.kinds.values()) == sent, 30)
    assert set(ends.kinds) == {"ok", "Overloaded", "DeadlineExceeded"}
    assert slow.most <= INSIDE
    assert queued <= WAITING
    assert min(slow.left_s) > -SLACK_S
    assert ends.late_s < SLACK_S
    quarter = resident[len(resident) // 4 :]
    offered = sent * 3 // 4 * ROW * 4
    assert max(quarter) - quarter[0] < max(offered / 10, 64 << 20)
