"""The acceptance checks of ensembles: each through YAML and the engine, and real servers where it speaks of servers.

They are those of the notes on ensembles, by number; the sections here are in their order. Elsewhere:

 1 bad documents            test_ensemble_golden (83 files; `five_faults*.yaml` report five), test_ensemble_spec
 2 dtypes without a run     test_ensemble_pairs (each pair, and that it runs once cast); test_ensemble_nodes_model
 3 cycles, 2,000 nodes      test_ensemble_graph: a_cycle_is_printed_..., a_chain_of_two_thousand_nodes_...; golden
 4 some outputs             here; test_ensemble_engine
 5 diamonds                 test_ensemble_engine: a_parent_of_two_runs_once
 6 combinations             here (a member that failed); test_ensemble_combine (scikit-learn, scipy, torch, TensorFlow)
 7 cascades                 here; test_ensemble_cascade
 8 switches per row         here (1,000 batches); test_ensemble_switch; golden `switch_without_a_default`
 9 maps                     here (0, 1, 7, 10,001 items; in one another; strings); test_ensemble_map
10 deadlines                here (three of 100 ms in 200 ms); test_ensemble_checks; times: bench x
11 cancellation             here (of runs, of siblings, 1,000 each: slow); test_ensemble_checks; times: bench x
12 quorums                  here (weights, who was left out); test_ensemble_checks; times: bench x
13 fallbacks, breakers      here; test_ensemble_checks, test_ensemble_fallback, test_ensemble_breaker
14 hedges                   here, by counts; times: bench y
15 splits, mirrors          here; test_ensemble_split (100,000 keys)
16 admission                here; test_ensemble_overload (slow), test_ensemble_engine (bytes, deadlines of those that
                            wait), test_ensemble_checks (429); times and memory: bench z
17 memory                   here; bench t, u
18 cost of nodes            bench q
19 critical path            here (no levels); bench r, s
20 throughput, hand-over    bench u, v
21 batching                 here; test_ensemble_engine
22 traces                   here (within 5 %); test_ensemble_checks (requests and their phases), test_ensemble_plot
23 hot reload               test_ensemble_checks: a_graph_is_replaced_while_it_answers_...
24 imports                  test_ensemble_spec: reading_imports_no_framework; test_ensemble_docs
25 offline; random graphs   test_ensemble_graph (`metadata`); test_ensemble_random (10,000 plans: slow); here
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from plans import node, plan
from plans import rows as some_rows
from rawpeer import Conversation, Message, peer, serving, until

import ensemble
import server_ref
from ensemble.route import route_of
from ensemble.serial import run_serial
from ensemble.steps import Missing
from remote_ops import Deadline, FunctionServable, Signature, TensorSpec, graphpipe
from remote_ops.errors import (
    ConnectError,
    DeadlineExceeded,
    InvalidRequest,
    NodeError,
    Overloaded,
    SpecError,
)

Array = npt.NDArray[Any]

MODELS = types.ModuleType("acceptance_models")  # what `kind: python` nodes find there
sys.modules["acceptance_models"] = MODELS
HEAD = "ensemble: 1\nname: graph\n"
ONE_INPUT = "{x: {dtype: float32, shape: [N, 4]}}"
X, Y = TensorSpec("x", "float32", (-1, 4)), TensorSpec("y", "float32", (-1, 4))
DECLARED = "{y: {dtype: float32, shape: [N, 4]}}"
SLACK_S = 5.0  # what a busy machine may add; measured times are in docs/benchmarks.md


def specs(*texts: str, differentiable: bool = False) -> list[TensorSpec]:
    """`x float32 -1 4` as a spec."""
    words = [text.split() for text in texts]
    return [
        TensorSpec(
            name, dtype, tuple(int(dim) for dim in dims), differentiable=differentiable and dtype.startswith("float")
        )
        for name, dtype, *dims in words
    ]


def model(
    fn: Callable[..., Any],
    inputs: Sequence[str] = ("x float32 -1 4",),
    outputs: Sequence[str] = ("y float32 -1 4",),
    vjp: Any = None,
) -> FunctionServable:
    """A function of arrays as a model; its parameters have the names of the inputs, in order."""
    takes = specs(*inputs, differentiable=vjp is not None)
    names = [spec.name for spec in takes]
    return FunctionServable(lambda **given: fn(*[given[name] for name in names]), takes, specs(*outputs), vjp=vjp)


def load(
    nodes: str,
    outputs: str = "{y: last}",
    inputs: str = ONE_INPUT,
    more: str = "",
    threads: int | None = None,
    **models: Any,
) -> ensemble.Ensemble:
    for name, one in models.items():
        setattr(MODELS, name, one)
    text = f"{HEAD}inputs: {inputs}\noutputs: {outputs}\n{more}\nnodes:\n{nodes}"
    return ensemble.load(text, file="graph.yaml", threads=threads)


def py(name: str, call: str, reads: str | None = "{x: $inputs.x}", more: str = "") -> str:
    """A node that is a model of `MODELS`; an owned one reads nothing."""
    fed = f", inputs: {reads}" if reads else ""
    return f"  {name}: {{kind: python, call: 'acceptance_models:{call}'{fed}{more}}}\n"


def remote(name: str, url: str, reads: str | None = "{x: $inputs.x}", more: str = "") -> str:
    fed = f", inputs: {reads}" if reads else ""
    return f"  {name}: {{kind: remote, url: '{url}'{fed}{more}}}\n"


def rows(count: int = 3, seed: int = 0) -> Array:
    return some_rows(count, seed)


def boom(x: Array) -> Array:
    raise ValueError("no such row")


class Counted:
    """A function that counts its calls and their rows, and how many there are at a time."""

    def __init__(self, fn: Callable[..., Any] = lambda x: x) -> None:
        self.fn = fn
        self.rows: list[int] = []
        self.now = self.most = 0
        self.lock = threading.Lock()

    def __call__(self, *arrays: Array) -> Any:
        with self.lock:
            self.rows.append(len(arrays[0]) if arrays[0].ndim else 1)
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            return self.fn(*arrays)
        finally:
            with self.lock:
                self.now -= 1


class Held:
    """A function that waits until it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.inside = threading.Semaphore(0)

    def __call__(self, x: Array) -> Array:
        self.inside.release()
        self.let_go.wait(60)
        return x


def bounded(run: Callable[[], Any], within_s: float = 20.0) -> Any:
    """What a call gives or raises; a failure, not a hang, if it does neither."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.append((run(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(within_s)
    assert found, f"still running after {within_s} s"
    result, error = found[0]
    if error is not None:
        raise error
    return result


# --------------------------------------------------------------------------- 4: only what the outputs need


def test_outputs_that_are_not_asked_for_may_feed_those_that_are_and_what_else_there_is_does_not_run() -> None:
    counted = {name: Counted(lambda x: x + 1) for name in "abc"}
    nodes = py("a", "a") + py("b", "b", "{x: a}") + py("c", "c", "{x: a}")
    with load(nodes, "{of_a: a, of_b: b, of_c: c}", **{name: model(one) for name, one in counted.items()}) as graph:
        np.testing.assert_array_equal(graph.infer({"x": rows()}, ["of_b"])["of_b"], rows() + 1 + 1)
        assert [len(counted[name].rows) for name in "abc"] == [1, 1, 0]


def test_a_server_is_asked_for_those_outputs_that_somebody_reads() -> None:
    asked: list[list[str]] = []

    def answer(conversation: Conversation, message: Message) -> None:
        names = list(graphpipe.decode_request(message.body).output_names)
        asked.append(names)
        conversation.answer(b"".join(graphpipe.encode_response([np.ones((3, 4), np.float32)] * (len(names) or 3))))

    signature = Signature((X,), tuple(specs(*[f"{name} float32 -1 4" for name in "pqr"])))
    with peer(serving(signature, answer)) as there:
        with load(remote("n", there.url), "{p: n.p, q: n.q}") as graph:
            graph.infer({"x": rows()}, ["q"])
            graph.infer({"x": rows()})
    assert asked == [["q"], ["p", "q"]]


# --------------------------------------------------------------------------- 6: combinations through the engine


def test_a_soft_vote_without_a_member_that_failed_is_that_of_scikit_learn() -> None:
    probas = [np.random.default_rng(seed).dirichlet(np.ones(4), 5).astype(np.float64) for seed in range(4)]
    doubled = ["y float64 -1 4"]
    members = {f"m{n}": model(lambda x, p=p: p, outputs=doubled) for n, p in enumerate(probas)}
    members["m1"] = model(boom, outputs=doubled)
    nodes = "".join(py(name, name, more=", on_error: skip") for name in members)
    nodes += "  last: {kind: combine, method: soft_vote, inputs: [m0, m1, m2, m3], weights: {m0: 2, m1: 9, m3: 0.5},"
    nodes += " quorum: {min: 3}}\n"
    with load(nodes, "{proba: last.proba, label: last.label}", **members) as graph:
        found = graph.infer({"x": rows(5)})
    kept = np.stack([probas[0], probas[2], probas[3]])
    expected = np.average(kept, axis=0, weights=[2, 1, 0.5])
    np.testing.assert_array_equal(found["proba"], expected)
    np.testing.assert_array_equal(found["label"], expected.argmax(1))


# --------------------------------------------------------------------------- 7: cascades


def cascade(big: Any, more: str = "", **models: Any) -> ensemble.Ensemble:
    nodes = py("small", "small", None) + py("big", "big", None)
    nodes += f"""  last:
    kind: cascade
    rows: N
    inputs: {{x: $inputs.x}}
    stages: [{{use: small, accept: {{score: max_prob, tensor: y, gte: 0.9}}, cost: 1}}, {{use: big, cost: 40}}]
    {more}
"""
    outputs = "{y: last.y, stage: last.stage_used, cost: last.cost}"
    return load(nodes, outputs, small=model(lambda x: x), big=model(big), **models)


def sure(count: int, unsure: Sequence[int]) -> Array:
    """Rows of probabilities, of which a few are even."""
    found = np.tile(np.array([0.97, 0.01, 0.01, 0.01], np.float32), (count, 1))
    found[list(unsure)] = 0.25
    return found


def test_a_cascade_of_64_rows_with_10_uncertain_calls_the_big_model_once_with_10_rows() -> None:
    big = Counted(lambda x: x + 1)
    unsure = sorted(random.Random(0).sample(range(64), 10))
    with cascade(big) as graph:
        found = graph.infer({"x": sure(64, unsure)})
        assert big.rows == [10]
        expected = sure(64, unsure)
        expected[unsure] += 1
        np.testing.assert_array_equal(found["y"], expected)
        assert np.flatnonzero(found["stage"]).tolist() == unsure
        assert found["cost"].tolist() == [41.0 if row in unsure else 1.0 for row in range(64)]
        graph.infer({"x": sure(64, [])})
        assert big.rows == [10]
        assert graph.infer({"x": sure(0, [])})["y"].shape == (0, 4)


def test_a_cascade_out_of_time_keeps_its_best_answers_so_far_even_at_the_deadline_of_the_run() -> None:
    held = Held()
    with cascade(held, "on_deadline: best_so_far") as graph:
        found = graph.infer({"x": sure(8, [2, 5])}, deadline=Deadline.after(1.0))
        assert found["stage"].tolist() == [0] * 8
        np.testing.assert_array_equal(found["y"], sure(8, [2, 5]))
        held.let_go.set()
    with cascade(Held()) as graph, pytest.raises(DeadlineExceeded, match="waiting for 'last'"):
        graph.infer({"x": sure(8, [2, 5])}, deadline=Deadline.after(0.2))


# --------------------------------------------------------------------------- 8: switches


def switch(**models: Any) -> ensemble.Ensemble:
    nodes = "".join(py(name, name, None) for name in ("low", "middle", "high"))
    nodes += """  last:
    kind: switch
    scope: row
    select: $inputs.age
    cases: [{if: "< 13", use: low}, {if: ">= 13 and < 65", use: middle}]
    default: high
    inputs: {x: $inputs.x}
"""
    return load(nodes, inputs="{x: {dtype: float32, shape: [N, 4]}, age: {dtype: int64, shape: [N]}}", **models)


def test_a_switch_per_row_equals_each_row_by_itself_on_a_thousand_random_batches() -> None:
    ways = {"low": lambda x: x + 1, "middle": lambda x: 2 * x, "high": lambda x: -x}
    rng = np.random.default_rng(0)
    with switch(**{name: model(fn) for name, fn in ways.items()}) as graph:
        for seed in range(1000):
            x, age = rows(int(rng.integers(0, 12)), seed), rng.integers(0, 100, 12)
            age = age[: len(x)] if seed % 10 else np.full(len(x), age[0])
            found = graph.infer({"x": x, "age": age})["y"]
            way = [ways["low" if one < 13 else "middle" if one < 65 else "high"] for one in age]
            expected = np.array([fn(row) for fn, row in zip(way, x, strict=True)], np.float32).reshape(-1, 4)
            np.testing.assert_array_equal(found, expected)


# --------------------------------------------------------------------------- 9: maps

ITEMS = "{x: {dtype: float32, shape: [K, 4]}}"


def mapped(fn: Any, more: str = "", takes: str = "x float32 4", gives: str = "y float32 4") -> ensemble.Ensemble:
    nodes = f"""  last:
    kind: map
    over: {{i: $inputs.x}}
    {more}
    body:
      nodes: {{one: {{kind: python, call: "acceptance_models:one", inputs: {{x: $item.i}}}}}}
      outputs: {{y: one}}
"""
    return load(nodes, inputs=ITEMS, one=model(fn, [takes], [gives]))


@pytest.mark.parametrize("items", [0, 1, 7, 10_001])
@pytest.mark.parametrize("how", ["chunk: 1", "{unit: rows, chunk: 16}"])
def test_a_map_gives_what_a_loop_gives_with_no_more_calls_at_a_time_than_it_says(items: int, how: str) -> None:
    counted = Counted(lambda x: 2 * x)
    in_rows = "rows" in how
    more = "concurrency: 3" + (", unit: rows, chunk: 16".replace(", ", "\n    ") if in_rows else "")
    with mapped(counted, more, *(("x float32 -1 4", "y float32 -1 4") if in_rows else ())) as graph:
        found = graph.infer({"x": rows(items)}, deadline=Deadline.after(120))["y"]
    assert (found.dtype, found.shape) == (np.float32, (items, 4))
    np.testing.assert_array_equal(found, 2 * rows(items))
    assert len(counted.rows) == (-(-items // 16) if in_rows else items)
    assert counted.most <= 3


def test_chunks_of_items_are_joined_and_their_answers_divided() -> None:
    counted = Counted(lambda x: x + 1)
    nodes = """  last:
    kind: map
    over: {i: $inputs.x}
    chunk: 4
    body: {nodes: {one: {kind: python, call: "acceptance_models:one", inputs: {x: $item.i}}}, outputs: {y: one}}
"""
    x = np.random.default_rng(0).normal(size=(10, 2, 4)).astype(np.float32)
    with load(nodes, inputs="{x: {dtype: float32, shape: [K, 2, 4]}}", one=model(counted)) as graph:
        np.testing.assert_array_equal(graph.infer({"x": x})["y"], x + 1)
        assert sorted(counted.rows) == [4, 8, 8]
        assert len(graph.infer({"x": x[:0]})["y"]) == 0


def test_a_map_in_a_map_gives_an_axis_for_each() -> None:
    nodes = """  last:
    kind: map
    over: {row: $inputs.x}
    body:
      nodes:
        inner:
          kind: map
          over: {one: $item.row}
          body: {nodes: {f: {kind: python, call: "acceptance_models:f", inputs: {x: $item.one}}}, outputs: {y: f}}
      outputs: {y: inner.y}
"""
    f = model(lambda x: np.stack([x, 10 * x]), ["x float32"], ["y float32 2"])
    x = rows(3)
    with load(nodes, inputs=ITEMS, f=f) as graph:
        np.testing.assert_array_equal(graph.infer({"x": x})["y"], np.stack([x, 10 * x], axis=-1))
        assert graph.infer({"x": x[:0]})["y"].shape == (0, 4, 2)


@pytest.mark.parametrize("items", [0, 3])
def test_a_map_takes_strings(items: int) -> None:
    nodes = """  last:
    kind: map
    over: {t: $inputs.x}
    body: {nodes: {f: {kind: python, call: "acceptance_models:f", inputs: {x: $item.t}}}, outputs: {y: f}}
"""
    f = model(lambda x: np.array(x.item() + b"!", object), ["x string"], ["y string"])
    with load(nodes, inputs="{x: {dtype: string, shape: [K]}}", f=f) as graph:
        found = graph.infer({"x": np.array([b"a", b"bb", b""][:items], object)})["y"]
    assert (found.tolist(), found.dtype) == ([b"a!", b"bb!", b"!"][:items], object)


def test_a_map_of_many_items_that_run_right_here_ends_at_its_deadline() -> None:
    nodes = """  last:
    kind: map
    over: {i: $inputs.x}
    body:
      nodes: {f: {kind: python, call: "acceptance_models:f", run_in: inline, inputs: {x: $item.i}}}
      outputs: {y: f}
"""
    f = model(lambda x: time.sleep(0.01) or x, ["x float32 4"], ["y float32 4"])
    with load(nodes, inputs=ITEMS, f=f) as graph:
        since = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            graph.infer({"x": rows(3000)}, deadline=Deadline.after(0.2))
        assert time.monotonic() - since < 20


# --------------------------------------------------------------------------- 10, 11: deadlines and cancellation


def test_three_servers_of_100_ms_within_200_ms_end_in_time_and_name_the_third() -> None:
    told: list[float] = []

    def answer(conversation: Conversation, message: Message) -> None:
        told.append(float(message.headers["x-request-timeout-ms"]))
        time.sleep(0.1)
        conversation.answer(b"".join(graphpipe.encode_response([np.ones((3, 4), np.float32)])))

    with peer(serving(Signature((X,), (Y,)), answer)) as there:
        nodes = remote("a", there.url) + remote("b", there.url, "{x: a}") + remote("c", there.url, "{x: b}")
        with load(nodes, "{y: c}") as graph:
            graph.infer({"x": rows()}, deadline=Deadline.after(30))
            assert told[1] <= told[0] - 100
            assert told[2] <= told[1] - 100
            told.clear()
            with pytest.raises(DeadlineExceeded, match=r"waiting for .*'c' .remote, (not started|0\.0.. s at it)"):
                graph.infer({"x": rows()}, deadline=Deadline.after(0.2))
            assert len(told) < 3 or told[2] <= 5


def test_a_server_that_is_asked_when_little_time_is_left_is_told_how_little() -> None:
    told: list[float] = []

    def most_of_it(conversation: Conversation, message: Message) -> None:
        time.sleep(float(message.headers["x-request-timeout-ms"]) / 1e3 - 0.004)
        conversation.answer(b"".join(graphpipe.encode_response([np.ones((3, 4), np.float32)])))

    def hang(conversation: Conversation, message: Message) -> None:
        told.append(float(message.headers["x-request-timeout-ms"]))
        conversation.read()

    signature = Signature((X,), (Y,))
    with peer(serving(signature, most_of_it)) as first, peer(serving(signature, hang)) as second:
        with load(remote("a", first.url) + remote("b", second.url, "{x: a}"), "{y: b}") as graph:
            for _ in range(20):  # in which a busy machine may be too late to ask
                with pytest.raises(DeadlineExceeded, match=r"waiting for .*'b' .remote"):
                    graph.infer({"x": rows()}, deadline=Deadline.after(0.1))
                if told:
                    break
    assert all(left_ms <= 5 for left_ms in told)


@pytest.mark.parametrize("owner", ["fallback", "switch", "map", "graph"])
def test_the_deadline_reaches_servers_through_owners_and_graphs_in_graphs(owner: str, tmp_path: Path) -> None:
    told: list[float] = []

    def answer(conversation: Conversation, message: Message) -> None:
        told.append(float(message.headers["x-request-timeout-ms"]))
        conversation.answer(b"".join(graphpipe.encode_response([np.ones((3, 4), np.float32)])))

    with peer(serving(Signature((X,), (Y,)), answer)) as there:
        inner = f"{HEAD}inputs: {ONE_INPUT}\noutputs: {{y: n}}\nnodes:\n{remote('n', there.url)}"
        (tmp_path / "inner.yaml").write_text(inner)
        fed = "inputs: {x: $inputs.x}"
        owned = remote("a", there.url, None) + remote("b", there.url, None)
        nodes = {
            "fallback": f"{owned}  last: {{kind: fallback, try: [a, b], {fed}}}\n",
            "switch": f"{owned}  last: {{kind: split, weights: {{a: 1, b: 0}}, {fed}}}\n",
            "map": "  last: {kind: map, unit: rows, chunk: 3, over: {i: $inputs.x}, body: {nodes: {n: {kind: remote, "
            f"url: '{there.url}', inputs: {{x: $item.i}}}}}}, outputs: {{y: n}}}}}}\n",
            "graph": f"  last: {{kind: graph, ref: {tmp_path}/inner.yaml, {fed}}}\n",
        }[owner]
        with load(nodes) as graph:
            graph.infer({"x": rows()}, deadline=Deadline.after(3.0))
    assert 500 < told[0] <= 3000


class Hang:
    """A server that answers nothing, and knows who has gone."""

    def __init__(self) -> None:
        self.asked = self.gone = 0
        self.lock = threading.Lock()

    def __call__(self, conversation: Conversation, message: Message) -> None:
        with self.lock:
            self.asked += 1
        with contextlib.suppress(ConnectionError):
            conversation.read()  # which ends when the caller hangs up
        with self.lock:
            self.gone += 1


def held_by_us() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("times", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_run_that_is_cancelled_hangs_up_and_leaves_no_task_thread_or_descriptor(times: int) -> None:
    hang = Hang()
    with peer(serving(Signature((X,), (Y,)), hang)) as there:
        owned = remote("a", there.url, None) + remote("b", there.url, None)
        nodes = owned + remote("c", there.url) + "  last: {kind: fallback, try: [a, b], inputs: {x: $inputs.x}}\n"
        with load(nodes, "{y: last, c: c}") as graph:

            async def once() -> None:
                asked = hang.asked
                run = asyncio.ensure_future(graph.arun({"x": rows()}))
                while hang.asked < asked + 2:
                    await asyncio.sleep(0.001)
                run.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await run

            asyncio.run(once())
            assert until(lambda: hang.gone == hang.asked)
            before = held_by_us()

            async def many() -> None:
                for _ in range(times):
                    await once()
                assert len(asyncio.all_tasks()) == 1

            asyncio.run(many())
            assert until(lambda: hang.gone == hang.asked)
            assert until(lambda: all(now <= then + 2 for now, then in zip(held_by_us(), before, strict=True)))
            assert until(lambda: graph.stats()[:2] == (0, 0))


class Awaits:
    """A model that waits for ever, and knows how often it was called and cancelled."""

    signature = Signature((X,), (Y,))

    def __init__(self) -> None:
        self.asked = self.gone = 0

    def infer(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    async def ainfer(self, *_: Any, **__: Any) -> Any:
        self.asked += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.gone += 1
            raise


@pytest.mark.parametrize("times", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_server_sees_that_the_sibling_of_a_failure_is_given_up_and_nothing_is_left_behind(times: int) -> None:
    slow = Awaits()
    with server_ref.running({"slow": slow, "bad": model(boom)}) as url:
        nodes = remote("a", f"{url}slow") + remote("b", f"{url}bad")
        nodes += "  last: {kind: combine, method: mean, inputs: [a, b]}\n"
        with load(nodes) as graph:

            async def many(times: int) -> None:
                for _ in range(times):
                    with pytest.raises(NodeError, match=r"node 'b' of 'graph' .remote. failed: .*no such row"):
                        await graph.arun({"x": rows()})
                assert len(asyncio.all_tasks()) == 1

            asyncio.run(many(3))
            assert until(lambda: slow.gone == slow.asked)
            before = held_by_us()
            asyncio.run(many(times))
            assert until(lambda: slow.gone == slow.asked)
            assert until(lambda: all(now <= then + 2 for now, then in zip(held_by_us(), before, strict=True)))
            assert until(lambda: graph.stats()[:2] == (0, 0))


# --------------------------------------------------------------------------- 12: quorums


def test_a_quorum_goes_on_without_members_that_hang_on_threads_or_servers_and_renormalises() -> None:
    held, hang = Held(), Hang()
    with peer(serving(Signature((X,), (Y,)), hang)) as there:
        nodes = "".join(py(f"m{n}", f"m{n}") for n in range(3)) + py("held", "held") + remote("hung", there.url)
        nodes += "  last: {kind: combine, method: mean, inputs: [m0, m1, m2, held, hung],\n"
        nodes += "    weights: {m0: 2, held: 7, hung: 5}, quorum: {min: 3, grace: 20ms}}\n"
        members = {f"m{n}": model(lambda x, n=n: x + n) for n in range(3)}
        with load(nodes, threads=8, held=model(held), **members) as graph:
            since = time.monotonic()
            run = graph.run({"x": rows()}, trace=True)
            np.testing.assert_allclose(run["y"], rows() + (0 * 2 + 1 + 2) / 4, rtol=1e-5, atol=1e-6)
            assert time.monotonic() - since < SLACK_S
            assert run.trace is not None
            assert {span.node: span.outcome for span in run.trace.spans if span.outcome != "ok"} == {
                "held": "left out",
                "hung": "left out",
            }
            assert [span.node for span in run.trace.critical_path()][1:] == ["last"]  # they kept it for its grace
            assert until(lambda: hang.gone == hang.asked == 1)
            held.let_go.set()
            assert until(lambda: graph.stats().dropped == 1)


def test_a_required_member_of_a_quorum_is_waited_for() -> None:
    held = Held()
    nodes = py("a", "a") + py("b", "held") + "  last: {kind: combine, method: mean, inputs: [a, b],"
    nodes += " quorum: {min: 1, grace: 0ms, required: [b]}}\n"
    with load(nodes, a=model(lambda x: x), held=model(held)) as graph:
        run = graph.submit({"x": rows()})
        assert held.inside.acquire(timeout=10)
        assert not run.done()
        held.let_go.set()
        np.testing.assert_allclose(run.result(10)["y"], rows(), rtol=1e-6)


# --------------------------------------------------------------------------- 13: fallbacks


def test_a_bad_input_does_not_go_to_the_second_of_a_fallback() -> None:
    second = Counted()

    def refuses(x: Array) -> Array:
        raise InvalidRequest("row 2 is no picture")

    with server_ref.running({"m": model(refuses)}) as url:
        nodes = remote("first", url, None) + py("second", "second", None)
        nodes += "  last: {kind: fallback, try: [first, second], inputs: {x: $inputs.x}}\n"
        with load(nodes, second=model(second)) as graph:
            with pytest.raises(NodeError, match=r"node 'first' of 'graph' .remote. failed: .*row 2 is no picture"):
                graph(rows())
    assert second.rows == []


def test_a_breaker_opens_after_five_failures_and_asks_again_when_its_time_is_over() -> None:
    asked: list[bool] = []
    works = threading.Event()

    def answer(conversation: Conversation, message: Message) -> None:
        asked.append(works.is_set())
        if works.is_set():
            return conversation.answer(b"".join(graphpipe.encode_response([np.zeros((3, 4), np.float32)])))
        return conversation.answer(b"", "503 Unavailable")

    with peer(serving(Signature((X,), (Y,)), answer)) as there:
        breaker = ", breaker: {failures: 5, reset: 300ms}, retry: {attempts: 1}"
        nodes = remote("first", there.url, None, breaker) + py("second", "second", None)
        nodes += "  last: {kind: fallback, try: [first, second], inputs: {x: $inputs.x}}\n"
        with load(nodes, second=model(lambda x: 7 * x)) as graph:
            for _ in range(12):
                np.testing.assert_array_equal(graph(rows()), 7 * rows())
            opened = len(asked)
            assert 5 <= opened < 12
            works.set()
            assert until(lambda: not graph(rows()).any())
            assert asked[-1]
            np.testing.assert_array_equal(graph(rows()), 0 * rows())


# --------------------------------------------------------------------------- 14: hedges


def test_a_hedge_at_30_ms_cuts_a_tail_of_one_in_twenty_with_six_more_in_a_hundred() -> None:
    sent, slow, lock = [0], [0], threading.Lock()

    def answer(conversation: Conversation, message: Message) -> None:
        with lock:
            sent[0] += 1
            is_slow = sent[0] % 20 == 10
            slow[0] += is_slow
        if is_slow:
            conversation.sock.settimeout(0.5)
            with contextlib.suppress(OSError):
                if conversation.read() is None:  # the copy was answered
                    return
            conversation.sock.settimeout(None)
        found = np.full((3, 4), is_slow, np.float32)
        conversation.answer(b"".join(graphpipe.encode_response([found])))

    with peer(serving(Signature((X,), (Y,)), answer)) as there:
        with load(remote("n", there.url, more=", hedge: {after: 30ms, budget: 6%}"), "{y: n}") as graph:
            late = sum(graph(rows()).any() for _ in range(400))
    assert slow[0] >= 20
    assert 1 <= sent[0] - 400 <= 400 * 0.06
    assert late <= 400 * 0.01  # none, where the machine is not so busy that other calls are late too


def test_hedges_of_a_server_that_is_slow_all_over_stay_within_their_budget() -> None:
    sent, lock = [0], threading.Lock()

    def answer(conversation: Conversation, message: Message) -> None:
        with lock:
            sent[0] += 1
        time.sleep(0.03)
        conversation.answer(b"".join(graphpipe.encode_response([np.zeros((3, 4), np.float32)])))

    with peer(serving(Signature((X,), (Y,)), answer)) as there:
        with load(remote("n", there.url, more=", hedge: {after: 1ms, budget: 5%}"), "{y: n}") as graph:
            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                list(pool.map(lambda _: graph(rows()), range(400)))
    assert 1 <= sent[0] - 400 <= 400 * 0.05


# --------------------------------------------------------------------------- 15: splits


SPLIT = """
  last:
    kind: split
    weights: {a: 90, b: 10}
    sticky: $inputs.user
    inputs: {x: $inputs.x}
"""
USERS = "{x: {dtype: float32, shape: [N, 4]}, user: {dtype: string, shape: [N]}}"


def test_a_split_by_key_sends_a_key_the_same_way_in_every_process() -> None:
    keys = [f"user-{n}".encode() for n in range(2000)]
    nodes = py("a", "a", None) + py("b", "b", None) + SPLIT
    with load(nodes, inputs=USERS, a=model(lambda x: 0 * x), b=model(lambda x: 0 * x + 1)) as graph:
        x = np.zeros((len(keys), 4), np.float32)
        here = graph.infer({"x": x, "user": np.array(keys, object)})["y"][:, 0]
    assert 0.08 < here.mean() < 0.12
    code = f"""
import sys, hashlib, numpy as np
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_ensemble_acceptance as t
nodes = t.py("a", "a", None) + t.py("b", "b", None) + t.SPLIT
with t.load(nodes, inputs=t.USERS, a=t.model(lambda x: 0 * x), b=t.model(lambda x: 0 * x + 1)) as graph:
    keys = np.array([f"user-{{n}}".encode() for n in range(2000)], object)
    print(graph.infer(dict(x=np.zeros((2000, 4), np.float32), user=keys))["y"][:, 0].astype(int).tolist())
"""
    there = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run([sys.executable, "-c", code], env=there, capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) == here.astype(int).tolist()


@pytest.mark.parametrize("shadow", ["held", "boom", "server"])
def test_a_mirror_neither_delays_nor_fails_an_answer(shadow: str) -> None:
    held, hang = Held(), Hang()
    with peer(serving(Signature((X,), (Y,)), hang)) as there:
        aside = remote("s", there.url, None) if shadow == "server" else py("s", shadow, None)
        nodes = f"{py('a', 'a', None)}{aside}"
        nodes += "  last: {kind: split, weights: {a: 1}, mirror: {to: s, sample: 100%}, inputs: {x: $inputs.x}}\n"
        models = {"a": model(lambda x: x), "held": model(held), "boom": model(boom)}
        with load(nodes, threads=1, **models) as graph:
            for seed in range(100):
                np.testing.assert_array_equal(bounded(lambda: graph(rows(3, seed))), rows(3, seed))  # noqa: B023
            assert hang.asked <= 64  # more of them at a time are left out
        held.let_go.set()
        assert until(lambda: hang.gone == hang.asked)


# --------------------------------------------------------------------------- 16: admission


def test_64_runs_are_let_in_128_wait_and_the_193rd_is_refused() -> None:
    held = Held()
    more = "admission: {max_inflight: 64, max_queued: 128}"
    with load(py("last", "held"), more=more, threads=64, held=model(held)) as graph:
        runs = [graph.submit({"x": rows(1)}) for _ in range(192)]
        assert until(lambda: graph.stats()[:2] == (64, 128))
        with pytest.raises(Overloaded, match="64 runs in flight and 128 that wait"):
            bounded(lambda: graph(rows(1)))
        with pytest.raises(Overloaded):
            bounded(lambda: asyncio.run(graph.arun({"x": rows(1)})))
        held.let_go.set()
        assert [run.result(60)["y"].shape for run in runs] == [(1, 4)] * 192
        assert graph.stats()[:3] == (0, 0, 2)


def test_a_large_run_that_gives_up_waiting_lets_in_the_small_ones_behind_it() -> None:
    held = Held()
    more = "admission: {max_inflight: 8, max_queued: 8, max_bytes: 160}"
    with load(py("last", "held"), more=more, held=model(held)) as graph:
        first = graph.submit({"x": rows(8)})
        assert held.inside.acquire(timeout=10)
        large = graph.submit({"x": rows(9)})
        assert until(lambda: graph.stats().queued == 1)
        small = graph.submit({"x": rows(1)})
        assert until(lambda: graph.stats().queued == 2)
        large.cancel()
        assert held.inside.acquire(timeout=10)
        held.let_go.set()
        assert [len(run.result(10)["y"]) for run in (first, small)] == [8, 1]


def test_a_place_at_a_node_is_held_until_its_thread_is_done_whoever_still_waits() -> None:
    held = Held()
    counted = Counted(held)
    with load(py("last", "held", more=", max_inflight: 1"), threads=8, held=model(counted)) as graph:
        with pytest.raises(DeadlineExceeded):
            graph.infer({"x": rows()}, deadline=Deadline.after(0.2))
        with pytest.raises(DeadlineExceeded):
            graph.infer({"x": rows()}, deadline=Deadline.after(0.2))
        assert len(counted.rows) == 1
        held.let_go.set()
        np.testing.assert_array_equal(bounded(lambda: graph(rows())), rows())
    assert counted.most == 1


def test_so_many_runs_at_a_time_are_at_a_node_that_owns_others() -> None:
    counted = Counted(lambda x: time.sleep(0.01) or x)
    nodes = (
        "  last: {kind: map, max_inflight: 1, concurrency: 1, over: {i: $inputs.x}, body: {nodes: {one: {kind: python,"
    )
    nodes += " call: 'acceptance_models:one', inputs: {x: $item.i}}}, outputs: {y: one}}}\n"
    with load(nodes, inputs=ITEMS, threads=8, one=model(counted, ["x float32 4"], ["y float32 4"])) as graph:
        for run in [graph.submit({"x": rows(3)}) for _ in range(6)]:
            np.testing.assert_array_equal(run.result(30)["y"], rows(3))
    assert counted.most == 1


# --------------------------------------------------------------------------- 17: memory


def test_a_chain_of_twenty_nodes_keeps_three_tensors_at_most_alive() -> None:
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

    class Step:
        """Hands its array on as it is."""

        signature = Signature((X,), (Y,))

        def infer(self, inputs: Any, outputs: Any = None, **_: Any) -> Any:
            return {"y": step(inputs["x"])}

    nodes = py("n0", "step") + "".join(py(f"n{n}", "step", f"{{x: n{n - 1}}}") for n in range(1, 20))
    with load(nodes, "{y: n19}", step=Step()) as graph:
        np.testing.assert_allclose(graph(rows()), rows() + 20, rtol=1e-5)
    assert most[0] <= 3


def test_local_edges_and_the_items_of_a_map_are_views() -> None:
    seen: list[Array] = []

    def keep(x: Array) -> Array:
        seen.append(x)
        return x

    x = rows(4)
    with load(py("a", "keep") + py("last", "keep", "{x: a}"), keep=model(keep)) as graph:
        assert np.shares_memory(graph(x), x)
    with mapped(keep) as graph:
        graph(x)
    assert len(seen) == 6
    assert all(np.shares_memory(one, x) for one in seen)


@pytest.mark.parametrize("owner", ["", "fallback", "map"])
def test_a_node_that_writes_into_its_input_changes_nobody_elses(owner: str) -> None:
    def writes(x: Array) -> Array:
        x += 1
        return x

    x = rows(4)
    fed = "inputs: {x: root}"
    writer = py("w", "writes", None if owner else "{x: root}", ", mutates: true")
    last = {"": "", "fallback": f"  o: {{kind: fallback, try: [w, spare], {fed}}}\n"}.get(owner, "")
    if owner == "map":
        writer = (
            "  o: {kind: map, unit: rows, over: {i: root}, body: {nodes: {w: {kind: python, mutates: true, "
            "call: 'acceptance_models:writes', inputs: {x: $item.i}}}, outputs: {y: w}}}\n"
        )
    nodes = py("root", "root") + writer + last + (py("spare", "root", None) if owner == "fallback" else "")
    nodes += f"  last: {{kind: combine, method: stack, inputs: [root, {'o' if owner else 'w'}]}}\n"
    with load(nodes, writes=model(writes), root=model(lambda x: x)) as graph:
        found = graph(x.copy())
    assert sorted(found.shape) == [2, 4, 4]
    both = np.moveaxis(found, found.shape.index(2), 0)
    np.testing.assert_allclose(both, np.stack([x, x + 1]), rtol=1e-6)


# --------------------------------------------------------------------------- 19: as soon as possible


def test_a_node_starts_as_soon_as_what_it_reads_is_there_whatever_is_beside_that() -> None:
    """The first node of one arm waits for the second of the other: level by level, neither would end."""
    begun = threading.Event()
    begins, waits = model(lambda x: begun.set() or x), model(lambda x: x + begun.wait(10))
    nodes = py("a", "quick") + py("b", "begins", "{x: a}") + py("c", "waits") + py("d", "quick", "{x: c}")
    nodes += "  last: {kind: combine, method: mean, inputs: [b, d]}\n"
    with load(nodes, quick=model(lambda x: x), begins=begins, waits=waits) as graph:
        np.testing.assert_allclose(bounded(lambda: graph(rows())), rows() + 0.5, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------- 21: batching


def test_32_runs_at_a_time_share_two_calls_at_most() -> None:
    counted = Counted(lambda x: 2 * x)
    more = ", batching: {max_size: 32, max_delay: 1s}"
    with load(py("last", "counted", more=more), counted=model(counted)) as graph:
        runs = [graph.submit({"x": rows(1, seed)}) for seed in range(32)]
        for seed, run in enumerate(runs):
            np.testing.assert_allclose(run.result(30)["y"], 2 * rows(1, seed), rtol=1e-6)
    assert len(counted.rows) <= 2
    assert sum(counted.rows) == 32


def test_a_run_with_little_time_neither_waits_for_others_nor_fails_those_it_is_with() -> None:
    held = Held()
    more = ", batching: {max_size: 32, max_delay: 10s}"
    with load(py("last", "held", more=more), held=model(held)) as graph:
        patient = graph.submit({"x": rows(2)}, deadline=Deadline.after(30))
        assert until(lambda: graph.stats().inflight == 1)
        hasty = graph.submit({"x": rows(1)}, deadline=Deadline.after(1.5))
        assert held.inside.acquire(timeout=8)  # and not after 10 s
        with pytest.raises(DeadlineExceeded):
            hasty.result(10)
        held.let_go.set()
        np.testing.assert_array_equal(patient.result(10)["y"], rows(2))


# --------------------------------------------------------------------------- 22: traces


def unaccounted(trace: ensemble.Trace) -> float:
    """The share of a run that is not in its critical path."""
    total_s = sum(span.queue_s + span.compute_s + span.network_s for span in trace.critical_path())
    return abs(total_s - trace.wall_s) / trace.wall_s


def test_the_critical_path_of_a_trace_adds_up_to_the_time_that_was_taken() -> None:
    def sleeps(lasts_s: float) -> FunctionServable:
        return model(lambda *arrays: time.sleep(lasts_s) or arrays[0])

    nodes = py("a", "a") + py("b", "b", "{x: a}") + py("c", "c", "{x: a}")
    nodes += "  last: {kind: combine, method: mean, inputs: [b, c]}\n"
    with load(nodes, a=sleeps(0.1), b=sleeps(0.2), c=sleeps(0.02)) as graph:
        graph(rows())
        traces: list[ensemble.Trace] = []

        def adds_up() -> bool:
            traces.extend([trace] if (trace := graph.run({"x": rows()}, trace=True).trace) else [])
            return unaccounted(traces[-1]) < 0.05

        assert until(adds_up)  # at once, but where the machine does something else in between
    trace = traces[-1]
    assert [span.node for span in trace.critical_path()] == ["a", "b", "last"]
    events = json.loads(trace.to_chrome())["traceEvents"]
    assert {event["name"] for event in events if event["ph"] == "X"} >= {"a", "b", "c", "last"}
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")


# --------------------------------------------------------------------------- nothing hangs


class Raw:
    """A servable that checks nothing: what it gives is what its function gives."""

    def __init__(self, fn: Callable[[Mapping[str, Array]], Any]) -> None:
        self.fn = fn
        self.signature = Signature((X,), (Y,))

    def infer(self, inputs: Mapping[str, Array], outputs: Any = None, **_: Any) -> Any:
        return self.fn(inputs)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


def unspeakable(x: Array) -> Array:
    raise Unspeakable


def leaves(x: Array) -> Array:
    raise SystemExit(3)


PLACES = ["thread", "inline"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize(
    ("given", "words"),
    [({"y": [[1.0]]}, "got a list"), ({"z": 1}, "got a dict of 'z'"), (None, "got a NoneType"), ([], "got a list")],
)
def test_a_model_that_gives_no_array_by_the_name_that_it_promised_is_an_error_of_its_node(
    place: str, trace: bool, given: Any, words: str
) -> None:
    nodes = py("a", "raw", more=f", run_in: {place}") + py("last", "last", "{x: a}")
    with load(nodes, raw=Raw(lambda inputs: given), last=model(lambda x: x)) as graph:
        with pytest.raises(NodeError, match=f"node 'a' .* expected an array as output 'y', {words}"):
            bounded(lambda: graph.run({"x": rows()}, trace=trace))


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("fn", "words"), [(unspeakable, "Unspeakable"), (leaves, "SystemExit: 3")])
def test_whatever_a_model_raises_is_an_error_of_its_node_and_the_next_run_is_fine(
    fn: Any, words: str, place: str, owned: bool
) -> None:
    more = f", run_in: {place}"
    nodes = py("a", "a", None if owned else "{x: $inputs.x}", more)
    nodes += "  last: {kind: split, weights: {a: 1}, inputs: {x: $inputs.x}}\n" if owned else py("last", "b", "{x: a}")
    with load(nodes, a=model(fn), b=model(lambda x: x)) as graph:
        for _ in range(2):
            with pytest.raises(NodeError, match=f"node 'a' of 'graph' .python. failed: {words}"):
                bounded(lambda: graph(rows()))
    with load(py("last", "b")) as graph:
        np.testing.assert_array_equal(bounded(lambda: graph(rows())), rows())


class Awaited:
    """A model on the loop."""

    def __init__(self, fn: Callable[[Array], Any]) -> None:
        self.fn = fn
        self.signature = Signature((X,), (Y,))

    def infer(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    async def ainfer(self, inputs: Any, outputs: Any = None, *, config: bytes = b"", deadline: Any = None) -> Any:
        return {"y": await self.fn(inputs["x"])}


def on_loop(name: str, fn: Callable[[Array], Any], **spec: Any) -> Any:
    return node(name, Awaited(fn), place="loop", **spec)


def test_a_model_that_cancels_itself_is_an_error_of_its_node() -> None:
    async def cancels(x: Array) -> Array:
        raise asyncio.CancelledError

    with ensemble.Ensemble(plan(on_loop("a", cancels))) as graph:
        with pytest.raises(NodeError, match=r"node 'a' .* it was cancelled, and not by this run"):
            bounded(lambda: graph(rows()))


@pytest.mark.parametrize("timeout", [None, "100ms"])
def test_a_model_that_does_not_heed_being_cancelled_does_not_keep_a_run(timeout: str | None) -> None:
    over = threading.Event()

    async def deaf(x: Array) -> Array:
        while not over.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        return x

    with ensemble.Ensemble(plan(on_loop("a", deaf, timeout=timeout))) as graph:
        wanted = NodeError if timeout else DeadlineExceeded
        with pytest.raises(wanted, match="no answer"):
            bounded(lambda: graph.infer({"x": rows()}, deadline=Deadline.after(0.3 if timeout is None else 60)))
    over.set()


def test_an_owned_model_that_does_not_heed_its_timeout_leaves_the_answer_to_the_next_one() -> None:
    from test_ensemble_gradients import Halves

    over = threading.Event()

    async def deaf(x: Array) -> Array:
        while not over.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        return x

    owned = [on_loop("even", deaf, timeout="100ms"), node("odd", lambda x: x)]
    with ensemble.Ensemble(plan(node("halves", Halves(), children=owned))) as graph:
        with pytest.raises(NodeError, match=r"node 'even' .* no answer in 0.1"):
            bounded(lambda: graph.infer({"x": rows()}, deadline=Deadline.after(60)))
    over.set()


@pytest.mark.parametrize("owned", [False, True])
def test_closing_ends_the_runs_in_flight_and_those_that_wait_for_a_thread(owned: bool) -> None:
    held = Held()
    nodes = py("last", "held")
    if owned:
        nodes = py("a", "held", None) + "  last: {kind: split, weights: {a: 1}, inputs: {x: $inputs.x}}\n"
    graph = load(nodes, threads=1, held=model(held))
    runs = [graph.submit({"x": rows()}) for _ in range(3)]
    assert held.inside.acquire(timeout=10)
    assert until(lambda: graph.stats().inflight == 3)
    graph.close()
    graph.close()
    for run in runs:
        with pytest.raises((SpecError, NodeError), match="this ensemble is closed"):
            bounded(lambda: run.result(20))  # noqa: B023
    held.let_go.set()
    with pytest.raises(NodeError, match="this ensemble is closed"):
        bounded(lambda: graph(rows()))
    assert graph.stats().inflight == 0


def test_a_node_that_runs_an_ensemble_does_so_from_a_thread_and_is_told_to_where_it_would_block_the_loop() -> None:
    inner = load(py("last", "inner"), inner=model(lambda x: x + 1))
    with inner, load(py("last", "outer"), outer=model(lambda x: inner(x))) as graph:
        np.testing.assert_array_equal(bounded(lambda: graph(rows())), rows() + 1)
    with inner, load(py("last", "outer", more=", run_in: inline")) as graph:
        with pytest.raises(NodeError, match="'run_in: thread' of a python node"):
            bounded(lambda: graph(rows()))
        with pytest.raises(NodeError, match="'run_in: thread' of a python node"):
            bounded(lambda: graph(rows()))


def test_a_node_may_run_the_ensemble_that_it_is_in() -> None:
    def countdown(x: Array) -> Array:
        return x if x[0, 0] <= 0 else graph(x - 1)  # type: ignore[no-any-return]

    with load(py("last", "countdown"), threads=8, countdown=model(countdown)) as graph:
        np.testing.assert_array_equal(bounded(lambda: graph(np.full((1, 4), 3, np.float32))), np.zeros((1, 4)))


def test_a_forked_child_runs_its_parents_ensemble() -> None:
    held = Held()
    nodes = py("a", "a") + py("last", "b", "{x: a}", ", max_inflight: 1, batching: {max_size: 2}")
    more = "admission: {max_inflight: 1, max_queued: 1}"
    with load(nodes, more=more, a=model(lambda x: held(x) if x[0, 0] else x), b=model(lambda x: x)) as graph:
        zeros = np.zeros((1, 4), np.float32)
        graph(zeros)
        run = graph.submit({"x": zeros + 1})  # which the child knows nothing of
        assert held.inside.acquire(timeout=10)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                answers = [bounded(lambda: graph(zeros), 30) for _ in range(2)]
                code = 0 if all(np.array_equal(one, zeros) for one in answers) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        held.let_go.set()
        assert run.result(10)["y"].shape == (1, 4)


def test_ctrl_c_ends_the_wait_and_cancels_the_run() -> None:
    hang = Hang()
    with peer(serving(Signature((X,), (Y,)), hang)) as there, load(remote("n", there.url), "{y: n}") as graph:

        def press() -> None:
            until(lambda: hang.asked == 1)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=press)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            graph(rows())
        thread.join()
        assert until(lambda: hang.gone == 1)
        assert until(lambda: graph.stats().inflight == 0)


def test_sixteen_threads_with_two_hundred_runs_each_get_their_own_answers() -> None:
    nodes = py("a", "a") + py("b", "b", "{x: a}", ", run_in: inline") + py("c", "c", None) + py("d", "d", None)
    nodes += (
        "  sw: {kind: switch, select: {from: $inputs.x, apply: [{slice: {axis: 1, start: 0, stop: 1}}]}, scope: row,"
    )
    nodes += " cases: [{if: '> 0', use: c}], default: d, inputs: {x: b}}\n"
    nodes += "  last: {kind: combine, method: mean, inputs: [a, b, sw]}\n"
    models = {
        "a": model(lambda x: x + 1),
        "b": model(lambda x: 2 * x),
        "c": model(lambda x: x),
        "d": model(lambda x: -x),
    }
    with load(nodes, **models) as graph:
        wrong: list[Any] = []

        def work(seed: int) -> None:
            try:
                for turn in range(200):
                    x = rows(1 + (seed + turn) % 5, 1000 * seed + turn)
                    a = x + 1
                    sw = np.where(x[:, :1] > 0, 2 * a, -2 * a)
                    np.testing.assert_allclose(graph(x), (a + 2 * a + sw) / 3, rtol=1e-4, atol=1e-5)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not wrong
        assert not any(thread.is_alive() for thread in threads)
        assert until(lambda: graph.stats() == (0, 0, 0, 0))


def test_two_event_loops_run_one_ensemble_at_once() -> None:
    barrier = threading.Barrier(2, timeout=20)

    def meet(x: Array) -> Array:
        barrier.wait()
        return x

    with load(py("last", "meet"), threads=4, meet=model(meet)) as graph:
        found: list[Array] = []

        async def runs(seed: int) -> None:
            for turn in range(50):
                answer = await graph.arun({"x": rows(2, seed + turn)})
                found.append(answer["y"] - rows(2, seed + turn))

        threads = [threading.Thread(target=lambda seed=seed: asyncio.run(runs(seed))) for seed in (0, 100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(found) == 100
    assert not any(one.any() for one in found)


# --------------------------------------------------------------------------- failures of nodes, and what follows


def owners(owner: str) -> str:
    return {
        "fallback": "  last: {kind: fallback, try: [a, b], inputs: {x: $inputs.x}}\n",
        "split": "  last: {kind: split, weights: {a: 1, b: 0}, inputs: {x: $inputs.x}}\n",
    }[owner]


def test_an_owned_node_that_is_skipped_leaves_the_answer_to_the_next_one() -> None:
    nodes = py("a", "a", None, ", on_error: skip") + py("b", "b", None) + owners("fallback")
    with load(nodes, a=model(boom), b=model(lambda x: 2 * x)) as graph:
        np.testing.assert_array_equal(graph(rows()), 2 * rows())


@pytest.mark.parametrize("owner", ["fallback", "split"])
def test_a_default_stands_in_for_an_owned_node(owner: str) -> None:
    more = f", on_error: {{default: 7}}, outputs: {DECLARED}"
    nodes = py("a", "a", None, more) + py("b", "b", None) + owners(owner)
    with load(nodes, a=model(boom), b=model(lambda x: 2 * x)) as graph:
        np.testing.assert_array_equal(graph(rows(5)), np.full((5, 4), 7, np.float32))


def test_a_default_has_as_many_rows_as_its_node_was_given() -> None:
    more = f", on_error: {{default: 7}}, outputs: {DECLARED}"
    x, age = rows(4), np.array([1, 20, 2, 70])
    nodes = py("low", "low", None, more) + py("middle", "middle", None) + py("high", "high", None)
    nodes += "  last: {kind: switch, scope: row, select: $inputs.age, default: high, inputs: {x: $inputs.x},"
    nodes += " cases: [{if: '< 13', use: low}, {if: '< 65', use: middle}]}\n"
    inputs = "{x: {dtype: float32, shape: [N, 4]}, age: {dtype: int64, shape: [N]}}"
    models = {"low": model(boom), "middle": model(lambda x: 2 * x), "high": model(lambda x: 3 * x)}
    with load(nodes, inputs=inputs, **models) as graph:
        expected = np.stack([np.full(4, 7, np.float32), 2 * x[1], np.full(4, 7, np.float32), 3 * x[3]])
        np.testing.assert_array_equal(graph.infer({"x": x, "age": age})["y"], expected)
        np.testing.assert_array_equal(run_serial(graph.plan, {"x": x, "age": age})["y"], expected)


def test_an_owned_node_has_its_own_timeout_on_a_thread_too() -> None:
    held = Held()
    nodes = py("a", "a", None, ", timeout: 100ms") + py("b", "b", None) + owners("fallback")
    with load(nodes, a=model(held), b=model(lambda x: 2 * x)) as graph:
        np.testing.assert_array_equal(bounded(lambda: graph(rows())), 2 * rows())
        held.let_go.set()
        assert until(lambda: graph.stats().dropped == 1)


def test_an_optional_input_that_is_left_out_is_a_member_that_does_not_vote() -> None:
    inputs = "{x: {dtype: float32, shape: [N, 4]}, prior: {dtype: float32, shape: [N, 4], optional: true}}"
    nodes = py("a", "a") + py("b", "b", more=", on_error: skip")
    nodes += "  last: {kind: combine, method: mean, inputs: {a: a, b: b, prior: $inputs.prior}, quorum: {min: 1}}\n"
    with load(nodes, inputs=inputs, a=model(lambda x: x), b=model(boom)) as graph:
        np.testing.assert_array_equal(graph.infer({"x": rows()})["y"], rows())
        both = graph.infer({"x": rows(), "prior": 3 * rows()})["y"]
        np.testing.assert_allclose(both, 2 * rows(), rtol=1e-6)


def nested(tmp_path: Path, nodes: str, more: str = "", name: str = "inner", **models: Any) -> ensemble.Ensemble:
    for key, one in models.items():
        setattr(MODELS, key, one)
    text = f"ensemble: 1\nname: {name}\ninputs: {ONE_INPUT}\noutputs: {{y: bad}}\nnodes:\n{nodes}"
    (tmp_path / "inner.yaml").write_text(text)
    return load(f"  outer: {{kind: graph, ref: {tmp_path}/inner.yaml, inputs: {{x: $inputs.x}}{more}}}\n", "{y: outer}")


@pytest.mark.parametrize("name", ["inner", "graph"])
def test_the_error_of_a_graph_in_a_graph_names_both_nodes(tmp_path: Path, name: str) -> None:
    with nested(tmp_path, py("bad", "bad"), name=name, bad=model(boom)) as graph:
        words = (
            f"node 'outer' of 'graph' .graph. failed: node 'bad' of '{name}' .python. failed: ValueError: no such row"
        )
        with pytest.raises(NodeError, match=words) as caught:
            graph(rows())
    assert (caught.value.node, caught.value.graph) == ("outer", "graph")
    inner = caught.value.__cause__
    assert isinstance(inner, NodeError)
    assert (inner.node, inner.graph) == ("bad", name)
    assert isinstance(inner.__cause__, ValueError)


def test_the_error_of_a_body_names_its_map_and_its_node() -> None:
    with mapped(boom) as graph, pytest.raises(NodeError, match=r"node 'last' of 'graph' .map. failed: node 'last/one'"):
        graph(rows())


def test_a_graph_in_a_graph_ends_at_the_deadline_of_the_outer_one_and_at_the_timeout_of_its_node(
    tmp_path: Path,
) -> None:
    held = Held()
    with nested(tmp_path, py("bad", "held"), held=model(held)) as graph:
        with pytest.raises(DeadlineExceeded, match=r"no answer from 'graph' .* waiting for 'outer'"):
            bounded(lambda: graph.infer({"x": rows()}, deadline=Deadline.after(0.2)))
    with nested(tmp_path, py("bad", "held"), ", timeout: 100ms", held=model(held)) as graph:
        with pytest.raises(NodeError, match=r"node 'outer' of 'graph' .graph. failed: no answer"):
            bounded(lambda: graph.infer({"x": rows()}, deadline=Deadline.after(60)))
    held.let_go.set()


def test_a_fallback_sees_through_a_graph_in_a_graph(tmp_path: Path) -> None:
    inner = f"{HEAD}inputs: {ONE_INPUT}\noutputs: {{y: n}}\nnodes:\n"
    inner += remote("n", "http://127.0.0.1:1/m", more=f", retry: {{attempts: 1}}, outputs: {DECLARED}")
    (tmp_path / "inner.yaml").write_text(inner.replace("nodes:", "metadata: warn\nnodes:"))
    nodes = f"  a: {{kind: graph, ref: {tmp_path}/inner.yaml}}\n" + py("b", "b", None) + owners("fallback")
    with load(nodes, b=model(lambda x: 2 * x)) as graph:
        np.testing.assert_array_equal(graph(rows()), 2 * rows())


# --------------------------------------------------------------------------- gradients through YAML


def differentiable(fn: Callable[..., Any], takes: Sequence[str] = ("x float32 -1 4",), **options: Any) -> Any:
    """A function of torch tensors as a model with gradients by autograd."""
    torch = pytest.importorskip("torch")
    gives = options.get("gives", ["y float32 -1 4"])
    (gives_name, *_), *_ = [text.split() for text in gives]

    def forward(*arrays: Array) -> Any:
        return fn(*[torch.tensor(array) for array in arrays]).numpy()

    def vjp(inputs: Mapping[str, Array], cotangents: Mapping[str, Array]) -> dict[str, Array]:
        leaves = {name: torch.tensor(array, requires_grad=array.dtype.kind == "f") for name, array in inputs.items()}
        asked = [leaf for leaf in leaves.values() if leaf.requires_grad]
        result = fn(*leaves.values())
        found = torch.autograd.grad(result, asked, torch.tensor(cotangents[gives_name]), allow_unused=True)
        named = [name for name, leaf in leaves.items() if leaf.requires_grad]
        return {
            name: np.zeros_like(inputs[name]) if gradient is None else gradient.numpy()
            for name, gradient in zip(named, found, strict=True)
        }

    return model(forward, takes, gives, vjp=vjp)


def pulled(graph: ensemble.Ensemble, oracle: Callable[..., Any], **inputs: Array) -> dict[str, Array]:
    """What a graph gives, once that and its gradients are found to be those of a function of torch."""
    torch = pytest.importorskip("torch")
    leaves = {name: torch.tensor(array, requires_grad=array.dtype.kind == "f") for name, array in inputs.items()}
    floats = [name for name, leaf in leaves.items() if leaf.requires_grad]
    plain = graph.infer(inputs)
    cotangent = np.random.default_rng(9).normal(size=plain["y"].shape).astype(plain["y"].dtype)
    names = [*plain, *[f"gradient:{name}" for name in floats]]
    found = bounded(lambda: graph.infer({**inputs, "cotangent:y": cotangent}, names))
    expected = oracle(**leaves, given=plain)
    np.testing.assert_allclose(found["y"], expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(expected, [leaves[name] for name in floats], torch.tensor(cotangent))
    for name, gradient in zip(floats, gradients, strict=True):
        assert found[f"gradient:{name}"].dtype == inputs[name].dtype
        np.testing.assert_allclose(found[f"gradient:{name}"], gradient.numpy(), rtol=1e-3, atol=1e-5)
    return found


def tanhs() -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    return {
        "a": differentiable(lambda x: torch.tanh(0.5 * x)),
        "b": differentiable(lambda x: torch.tanh(-2 * x) * x),
        "c": differentiable(lambda x: x**2 + x),
    }


COMBINED: dict[str, tuple[str, Callable[..., Any]]] = {
    "soft_vote": ("softmax", lambda t, m: (2 * m[0] + m[1] + 0.5 * m[2]) / 3.5),
    "mean": ("", lambda t, m: (2 * m[0] + m[1] + 0.5 * m[2]) / 3.5),
    "gmean": ("sigmoid", lambda t, m: t.exp((2 * m[0].log() + m[1].log() + 0.5 * m[2].log()) / 3.5)),
    "max": ("", lambda t, m: t.stack(m).max(0).values),
    "min": ("", lambda t, m: t.stack(m).min(0).values),
    "concat": ("", lambda t, m: t.cat(m, 1)),
    "stack": ("", lambda t, m: t.stack(m, 1)),
}


@pytest.mark.parametrize("method", COMBINED)
@pytest.mark.parametrize("count", [0, 5])
def test_gradients_of_a_combination_are_those_of_torch(method: str, count: int) -> None:
    torch = pytest.importorskip("torch")
    apply, combine = COMBINED[method]
    edges = ", ".join(f"{n}: {{from: {n}{', apply: ' + apply if apply else ''}}}" for n in "abc")
    more = {"concat": ", axis: 1", "stack": ", axis: 1", "max": "", "min": ""}.get(method, ", weights: {a: 2, c: 0.5}")
    nodes = "".join(py(name, name) for name in "abc")
    nodes += f"  last: {{kind: combine, method: {method}, inputs: {{{edges}}}{more}}}\n"

    def oracle(x: Any, given: Any) -> Any:
        members = [torch.tanh(0.5 * x), torch.tanh(-2 * x) * x, x**2 + x]
        through = {"softmax": lambda m: torch.softmax(m, -1), "sigmoid": torch.sigmoid, "": lambda m: m}[apply]
        return combine(torch, [through(member) for member in members])

    with load(nodes, "{y: last.proba}" if method == "soft_vote" else "{y: last}", **tanhs()) as graph:
        pulled(graph, oracle, x=rows(count))


@pytest.mark.parametrize("count", [0, 1, 7])
def test_gradients_of_a_switch_per_row_are_those_of_the_ways_that_rows_took(count: int) -> None:
    torch = pytest.importorskip("torch")
    nodes = py("root", "c") + py("a", "a", None) + py("b", "b", None)
    nodes += "  last: {kind: switch, scope: row, select: $inputs.age, default: b, cases: [{if: '< 13', use: a}],"
    nodes += " inputs: {x: root}}\n"
    inputs = "{x: {dtype: float32, shape: [N, 4]}, age: {dtype: int64, shape: [N]}}"
    age = np.array([1, 50, 3, 4, 80, 90, 7])[:count]

    def oracle(x: Any, age: Any, given: Any) -> Any:
        root = x**2 + x
        return torch.where((age < 13)[:, None], torch.tanh(0.5 * root), torch.tanh(-2 * root) * root)

    with load(nodes, inputs=inputs, **tanhs()) as graph:
        pulled(graph, oracle, x=rows(count), age=age)


@pytest.mark.parametrize("key", ["request", "row"])
def test_gradients_of_a_split_are_those_of_the_ways_that_were_taken(key: str) -> None:
    torch = pytest.importorskip("torch")
    nodes = py("root", "c") + py("a", "a", None) + py("b", "b", None) + py("m", "c", None)
    sticky = "sticky: $inputs.user, " if key == "row" else ""
    nodes += f"  last: {{kind: split, weights: {{a: 1, b: 1}}, {sticky}mirror: {{to: m}}, record: way, "
    nodes += "inputs: {x: root}}\n"
    inputs = USERS if key == "row" else ONE_INPUT
    user = {"user": np.array([f"u{n}".encode() for n in range(9)], object)} if key == "row" else {}
    plain = {"weights": "{a: 1, b: 1}", "fixed": "{a: 1, b: 0}"}
    nodes = nodes if key == "row" else nodes.replace(plain["weights"], plain["fixed"])
    if key == "request":
        nodes = nodes.replace(", record: way", "")

    with load(nodes, "{y: last.y, way: last.way}" if key == "row" else "{y: last}", inputs=inputs, **tanhs()) as graph:
        x = rows(9)
        plainly = graph.infer({"x": x, **user})
        way = plainly["way"] == np.array("a", object) if key == "row" else np.ones(9, bool)
        if key == "row":
            assert 0 < way.sum() < 9
        names = ["y", "gradient:x"]
        found = graph.infer({"x": x, **user, "cotangent:y": np.ones_like(x)}, names)
    leaf = torch.tensor(x, requires_grad=True)
    root = leaf**2 + leaf
    expected = torch.where(torch.tensor(way)[:, None], torch.tanh(0.5 * root), torch.tanh(-2 * root) * root)
    np.testing.assert_allclose(found["y"], expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    expected.sum().backward()
    np.testing.assert_allclose(found["gradient:x"], leaf.grad.numpy(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("how", ["item", "rows", "chunk"])
def test_gradients_of_a_map_reach_its_items_and_what_is_outside(how: str, count: int) -> None:
    torch = pytest.importorskip("torch")
    item = {"item": "4", "rows": "-1 4", "chunk": "-1 4"}[how]
    shape = "[K, 3, 4]" if how == "chunk" else "[K, 4]"
    keys = {"item": "", "rows": "unit: rows, chunk: 2, ", "chunk": "chunk: 2, "}[how]
    nodes = py("root", "root") + f"  last: {{kind: map, over: {{i: root}}, {keys}concurrency: 2, body: {{nodes: {{"
    nodes += "f: {kind: python, call: 'acceptance_models:f', inputs: {x: $item.i, w: $inputs.w}}}, outputs: {y: f}}}\n"
    x = np.random.default_rng(0).normal(size=(count, 3, 4) if how == "chunk" else (count, 4)).astype(np.float32)
    inputs = f"{{x: {{dtype: float32, shape: {shape}}}, w: {{dtype: float32, shape: [4]}}}}"
    full = "-1 3 4" if how == "chunk" else "-1 4"
    models = {
        "root": differentiable(lambda x: torch.sin(x), [f"x float32 {full}"], gives=[f"y float32 {full}"]),
        "f": differentiable(
            lambda x, w: torch.tanh(x * w) + w, [f"x float32 {item}", "w float32 4"], gives=[f"y float32 {item}"]
        ),
    }
    with load(nodes, inputs=inputs, **models) as graph:
        if how == "chunk" and not count:
            return
        pulled(graph, lambda x, w, given: torch.tanh(torch.sin(x) * w) + w + 0 * x, x=x, w=rows(1)[0])


def test_gradients_of_a_cascade_are_those_of_the_stages_that_answered() -> None:
    torch = pytest.importorskip("torch")
    nodes = py("small", "small", None) + py("big", "big", None)
    nodes += "  last: {kind: cascade, rows: N, inputs: {x: $inputs.x}, stages: [{use: small, accept: {score: max_prob,"
    nodes += " tensor: y, gte: 0.6}}, {use: big}]}\n"
    models = {
        "small": differentiable(lambda x: torch.softmax(2 * x, -1)),
        "big": differentiable(lambda x: torch.softmax(3 * x + 1, -1) ** 2),
    }

    def oracle(x: Any, given: Any) -> Any:
        stage = torch.tensor(given["stage"])[:, None]
        assert 0 < given["stage"].sum() < len(given["stage"])
        return torch.where(stage == 0, torch.softmax(2 * x, -1), torch.softmax(3 * x + 1, -1) ** 2)

    with load(nodes, "{y: last.y, stage: last.stage_used}", **models) as graph:
        pulled(graph, oracle, x=rows(12))


def test_gradients_of_a_fallback_are_those_of_the_node_that_answered() -> None:
    torch = pytest.importorskip("torch")
    dead = remote("a", "http://127.0.0.1:1/m", None, f", retry: {{attempts: 1}}, outputs: {DECLARED}")
    for first in (dead, py("a", "broken", None, ", on_error: skip")):
        nodes = py("root", "a") + first + py("b", "b", None)
        nodes += "  last: {kind: fallback, try: [a, b], inputs: {x: root}}\n"
        broken = FunctionServable(
            lambda x: boom(x), specs("x float32 -1 4", differentiable=True), [Y], vjp=lambda i, c: {}
        )
        with load(nodes, more="metadata: warn", broken=broken, **tanhs()) as graph:
            if first is dead:  # what cannot be asked does not say that it has a gradient
                assert not graph.signature.inputs[0].differentiable
                continue

            def oracle(x: Any, given: Any) -> Any:
                root = torch.tanh(0.5 * x)
                return torch.tanh(-2 * root) * root

            pulled(graph, oracle, x=rows(5))


def test_what_stands_in_for_an_owned_node_is_a_constant() -> None:
    more = f", on_error: {{default: 7}}, outputs: {DECLARED}"
    nodes = py("low", "low", None, more) + py("high", "c", None)
    nodes += "  last: {kind: switch, scope: row, select: $inputs.age, default: high, inputs: {x: $inputs.x},"
    nodes += " cases: [{if: '< 13', use: low}]}\n"
    inputs = "{x: {dtype: float32, shape: [N, 4]}, age: {dtype: int64, shape: [N]}}"
    broken = FunctionServable(lambda x: boom(x), specs("x float32 -1 4", differentiable=True), [Y], vjp=lambda i, c: {})
    x, age = rows(3), np.array([1, 50, 2])
    with load(nodes, inputs=inputs, low=broken, **tanhs()) as graph:
        found = graph.infer({"x": x, "age": age, "cotangent:y": np.ones_like(x)}, ["y", "gradient:x"])
    np.testing.assert_array_equal(found["y"][::2], np.full((2, 4), 7))
    np.testing.assert_array_equal(found["gradient:x"][::2], np.zeros((2, 4)))
    np.testing.assert_allclose(found["gradient:x"][1], 2 * x[1] + 1, rtol=1e-6)


def test_operations_and_casts_on_edges_are_part_of_the_gradient() -> None:
    torch = pytest.importorskip("torch")
    f = differentiable(lambda x: x**3, ["x float64 -1 4"], gives=["y float64 -1 4"])
    nodes = "  a: {kind: python, call: 'acceptance_models:f', inputs: {x: {from: $inputs.x, apply: [softmax, "
    nodes += "{scale: {by: 3.0}}], cast: float64}}}\n"
    with load(nodes, "{y: {from: a, apply: [{transpose: [1, 0]}, sigmoid], cast: float32}}", f=f) as graph:
        pulled(
            graph,
            lambda x, given: torch.sigmoid((3 * torch.softmax(x, -1)).double() ** 3).T.float().contiguous(),
            x=rows(5),
        )


def test_gradients_go_through_a_graph_in_a_graph(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    with nested(tmp_path, py("r", "a") + py("bad", "c", "{x: r}"), **tanhs()) as graph:
        assert graph.signature.inputs[0].differentiable
        pulled(graph, lambda x, given: torch.tanh(0.5 * x) ** 2 + torch.tanh(0.5 * x), x=rows(5))


def test_an_ensemble_of_torch_models_trains_what_is_before_it_as_the_models_themselves_do() -> None:
    torch = pytest.importorskip("torch")
    remote_module = pytest.importorskip("remote_ops.torch").RemoteModule
    nodes = py("a", "a") + py("b", "b")
    nodes += "  last: {kind: combine, method: mean, inputs: {a: a, b: {from: b, apply: sigmoid}}, weights: {a: 3}}\n"

    def direct(x: Any) -> Any:
        return (3 * torch.tanh(0.5 * x) + torch.sigmoid(torch.tanh(-2 * x) * x)) / 4

    def trained(head: Any) -> list[float]:
        torch.manual_seed(0)
        body = torch.nn.Linear(4, 4)
        adam = torch.optim.Adam(body.parameters(), 0.05)
        x, losses = torch.tensor(rows(16)), []
        for _ in range(10):
            adam.zero_grad()
            loss = (head(body(x)) - 0.3).pow(2).mean()
            loss.backward()
            adam.step()
            losses.append(loss.item())
        return losses

    with load(nodes, **tanhs()) as graph, server_ref.running({"m": graph}) as url:
        expected = trained(direct)
        assert expected[-1] < expected[0]
        for servable in (graph, url):
            np.testing.assert_allclose(trained(remote_module(servable)), expected, rtol=1e-4)


def test_a_reverse_pass_ends_at_its_deadline_and_names_the_node_that_fails() -> None:
    ask = {"x": rows(), "cotangent:y": rows()}
    release = threading.Event()
    takes = specs("x float32 -1 4", differentiable=True)
    slow = FunctionServable(lambda x: x, takes, [Y], vjp=lambda i, c: {"x": c["y"]} if release.wait(60) else {})
    with load(py("a", "slow") + py("last", "b", "{x: a}"), slow=slow, b=tanhs()["b"]) as graph:
        with pytest.raises(DeadlineExceeded, match="no gradients from 'graph' in time: waiting for 'a'"):
            bounded(lambda: graph.infer(ask, ["gradient:x"], deadline=Deadline.after(0.5)))
        release.set()
    broken = FunctionServable(lambda x: x, takes, [Y], vjp=lambda i, c: boom(c["y"]))
    with load(py("a", "broken") + py("last", "b", "{x: a}"), broken=broken) as graph:
        with pytest.raises(NodeError, match=r"node 'a' of 'graph' .python. failed: ValueError: no such row"):
            bounded(lambda: graph.infer(ask, ["gradient:x"]))


def test_gradients_reach_what_the_body_of_an_owned_map_reads_from_outside() -> None:
    torch = pytest.importorskip("torch")
    nodes = "  m: {kind: map, over: {i: $inputs.x}, body: {nodes: {f: {kind: python, call: 'acceptance_models:f', "
    nodes += "inputs: {x: $item.i, w: $inputs.w}}}, outputs: {y: f}}}\n"
    outer = (
        "  last: {kind: map, unit: rows, over: {j: $inputs.x}, chunk: 2, body: {nodes: {\n"
        + nodes.replace("$inputs.x", "$item.j").replace("\n", "")
        + "}, outputs: {y: m.y}}}\n"
    )
    f = differentiable(lambda x, w: torch.tanh(x * w) + w, ["x float32 4", "w float32 4"], gives=["y float32 4"])
    inputs = "{x: {dtype: float32, shape: [K, 4]}, w: {dtype: float32, shape: [4]}}"
    with load(outer, inputs=inputs, f=f) as graph:
        pulled(graph, lambda x, w, given: torch.tanh(x * w) + w, x=rows(5), w=rows(1)[0])


def test_a_model_in_a_body_without_gradients_by_what_is_outside_says_so() -> None:
    nodes = "  last: {kind: map, over: {i: $inputs.x}, body: {nodes: {f: {kind: python, call: 'acceptance_models:f', "
    nodes += "inputs: {x: $item.i, w: $inputs.w}}}, outputs: {y: f}}}\n"
    f = model(lambda x, w: x * w, ["x float32 4", "w float32 4"], ["y float32 4"])
    with load(nodes, inputs="{x: {dtype: float32, shape: [K, 4]}, w: {dtype: float32, shape: [4]}}", f=f) as graph:
        assert [spec.differentiable for spec in graph.signature.inputs] == [False, False]


# --------------------------------------------------------------------------- 25: random documents


def fails_to_connect(x: Array) -> Array:
    raise ConnectError("nobody there")


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "plus": lambda x: x + 1,
    "twice": lambda x: 2 * x,
    "minus": lambda x: -x,
    "squashed": lambda x: np.tanh(x),
    "gone": fails_to_connect,
    "broken": boom,
}
WIDE = "{x: {dtype: float32, shape: [N, 4]}, age: {dtype: int64, shape: [N]}, user: {dtype: string, shape: [N]}}"


class Writer:
    """Writes a random document: nodes of every kind that owns others, some of them owned by one another."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.lines: list[str] = []
        self.there = ["$inputs.x"]

    def document(self) -> str:
        for _ in range(self.rng.randint(2, 7)):
            name = f"n{len(self.lines)}"
            self.there.append(self.top(name))
        wanted = self.rng.sample(self.there[1:], min(2, len(self.there) - 1))
        outputs = ", ".join(f"o{place}: {source}" for place, source in enumerate(wanted))
        return f"{HEAD}inputs: {WIDE}\noutputs: {{{outputs}}}\nnodes:\n{''.join(self.lines)}"

    def source(self) -> str:
        return self.rng.choice(self.there)

    def top(self, name: str) -> str:
        kind = self.rng.choice(["model", "model", "combine", "map", "owner", "owner"])
        if kind == "model":
            self.lines.append(self.model(name, f"{{x: {self.source()}}}"))
            return f"{name}.y"
        if kind == "combine":
            members = ", ".join(f"m{place}: {self.source()}" for place in range(3))
            self.lines.append(f"  {name}: {{kind: combine, method: mean, inputs: {{{members}}}}}\n")
            return name
        if kind == "map":
            body = self.model("f", "{x: $item.i}").strip()
            self.lines.append(
                f"  {name}: {{kind: map, unit: rows, chunk: {self.rng.randint(1, 3)}, concurrency: 2, over: {{i: "
                f"{self.source()}}}, body: {{nodes: {{{body}}}, outputs: {{y: f}}}}}}\n"
            )
            return f"{name}.y"
        self.owner(name, f", inputs: {{x: {self.source()}}}", 2)
        return f"{name}.y"

    def model(self, name: str, reads: str | None, skips: bool = False) -> str:
        call = self.rng.choices(list(FUNCTIONS), [4, 4, 4, 4, 2, 2])[0]
        on_error = self.rng.choice(["", f", on_error: {{default: 0.5}}, outputs: {DECLARED}"])
        more = f", run_in: {self.rng.choice(PLACES)}{', on_error: skip' if skips else on_error}"
        return py(name, call, reads, more)

    def owner(self, name: str, fed: str, deep: int) -> None:
        kinds = ["switch", "split", "fallback", *(["cascade"] if fed else [])]  # which gives more than its stages do
        kind = self.rng.choice(kinds)
        owned = [f"{name}{letter}" for letter in "ab"]
        for place, one in enumerate(owned):
            if deep and self.rng.random() < 0.3:
                self.owner(one, "", deep - 1)
            else:
                skips = kind == "fallback" and not place and self.rng.random() < 0.3
                self.lines.append(self.model(one, None, skips))
        a, b = owned
        said = {
            "switch": f"kind: switch, scope: row, select: $inputs.age, cases: [{{if: '< 50', use: {a}}}], default: {b}",
            "split": f"kind: split, sticky: $inputs.user, weights: {{{a}: 1, {b}: 2}}",
            "fallback": f"kind: fallback, try: [{a}, {b}]",
            "cascade": f"kind: cascade, rows: N, stages: [{{use: {a}, accept: {{score: margin, tensor: y, gte: 0.5}}}},"
            f" {{use: {b}}}]",
        }[kind]
        self.lines.append(f"  {name}: {{{said}{fed}}}\n")


def outcome_of(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except NodeError as error:
        return error


@pytest.mark.parametrize("seeds", [range(200), pytest.param(range(1000, 2500), marks=pytest.mark.slow)])
def test_random_documents_answer_as_one_node_after_the_other_would(seeds: range) -> None:
    told = {"answers": 0, "errors": 0}
    for name, fn in FUNCTIONS.items():
        setattr(MODELS, name, model(fn))
    for seed in seeds:
        text = Writer(random.Random(seed)).document()
        graph = ensemble.load(text, file="graph.yaml", threads=2)
        rng, count = np.random.default_rng(seed), seed % 6
        inputs = {
            "x": rows(count, seed),
            "age": rng.integers(0, 100, count),
            "user": np.array([str(one).encode() for one in rng.integers(0, 9, count)], object),
        }
        needed = dataclasses.replace(graph.plan, nodes=route_of(graph.plan, None).nodes)
        plain = outcome_of(lambda: run_serial(needed, inputs))  # noqa: B023
        with graph:
            found = outcome_of(lambda: bounded(lambda: graph.infer(inputs)))  # noqa: B023
        if isinstance(plain, NodeError) or any(isinstance(value, Missing) for value in plain.values()):
            assert isinstance(found, NodeError), (seed, text, plain, found)
            told["errors"] += 1
        else:
            assert not isinstance(found, NodeError), (seed, text, found)
            for name in plain:
                np.testing.assert_array_equal(plain[name], found[name], err_msg=f"{seed}\n{text}")
            told["answers"] += 1
    assert min(told["answers"], told["errors"]) > len(seeds) / 10, told


# --------------------------------------------------------------------------- defaults are checked before a run


@pytest.mark.parametrize(
    ("default", "outputs", "fault"),
    [
        ("7", "", "E107 .* output 'y' of 'last' is float32 .*, 4., .* needs a size on each axis: declare its shape"),
        (
            "word",
            f", outputs: {DECLARED}",
            "E106 .* output 'y' of 'last' is float32 .N, 4., which cannot be filled with",
        ),
        ("true", f", outputs: {DECLARED}", "E106"),
        ("7", f", outputs: {DECLARED}", ""),
    ],
)
def test_a_default_that_can_never_stand_in_is_a_fault(default: str, outputs: str, fault: str) -> None:
    nodes = py("last", "a", more=f", on_error: {{default: {default}}}{outputs}")
    if not fault:
        load(nodes, a=model(boom)).close()
        return
    with pytest.raises(ensemble.GraphFaults, match=fault):
        load(nodes, a=model(boom))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{dtype: float32, shape: [N, 4], optional: true, default: word}", "E106 .* input 'x' is float32"),
        ("{dtype: uint8, shape: [N, 4], optional: true, default: 256}", "E106"),
        ("{dtype: int64, shape: [N, 4], optional: true, default: 0.5}", "E106"),
        ("{dtype: float32, shape: ['?', 4], optional: true, default: 1}", "E107"),
    ],
)
def test_a_default_of_an_input_that_can_never_stand_in_is_a_fault(text: str, fault: str) -> None:
    takes = text.split("dtype: ")[1].split(",")[0]
    with pytest.raises(ensemble.GraphFaults, match=fault):
        load(py("last", "a"), inputs=f"{{x: {text}}}", a=model(lambda x: x, [f"x {takes} -1 4"], [f"y {takes} -1 4"]))


def test_a_trace_counts_the_wait_for_a_slot_and_for_a_batch() -> None:
    slots, batch = ", max_inflight: 1", ", batching: {max_size: 9, max_delay: 100ms}"
    with server_ref.running({"m": model(lambda x: time.sleep(0.1) or x)}) as url:
        with load(remote("n", url, more=slots), "{y: n}") as one, load(remote("n", url, more=batch), "{y: n}") as many:
            one(rows())
            many(rows())

            def traces() -> list[ensemble.Trace]:
                with concurrent.futures.ThreadPoolExecutor(3) as pool:
                    runs = [*pool.map(lambda _: one.run({"x": rows()}, trace=True), range(3))]
                return [run.trace for run in (*runs, many.run({"x": rows()}, trace=True)) if run.trace is not None]

            found: list[ensemble.Trace] = []

            def add_up() -> bool:
                found[:] = traces()
                return all(unaccounted(trace) < 0.05 for trace in found)

            assert until(add_up)  # at once, but where the machine does something else in between
    assert [len(trace.spans) for trace in found] == [1] * 4
    assert max(trace.spans[0].queue_s for trace in found) > 0.15
