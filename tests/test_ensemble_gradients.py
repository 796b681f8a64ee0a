"""An ensemble answers gradients where every servable on the way does, and they are those of the whole function."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from plans import ROWS, function, node, plan, rows, wire
from test_ensemble_engine import Mean, Quorum, fails

import server_ref
from ensemble.ensemble import Ensemble
from ensemble.forms import Form
from ensemble.nodes.node import Batching, Default
from ensemble.steps import Assembly, Call, Calls, Piece
from remote_ops import Endpoint, FunctionServable, TensorSpec
from remote_ops.errors import NotDifferentiable

Array = npt.NDArray[Any]


def smooth(k: float) -> FunctionServable:
    """x -> tanh(k x), with its gradient."""
    return function(
        lambda x: np.tanh(np.float32(k) * x),
        vjp=lambda inputs, cotangents: {
            "x": (cotangents["y"] * np.float32(k) * (1 - np.tanh(np.float32(k) * inputs["x"]) ** 2)).astype(np.float32)
        },
    )


def product() -> FunctionServable:
    return function(
        lambda a, b: a * b,
        ("a", "b"),
        vjp=lambda inputs, cotangents: {"a": cotangents["y"] * inputs["b"], "b": cotangents["y"] * inputs["a"]},
    )


def diamond(place: str = "inline") -> Any:
    return plan(
        node("root", smooth(0.5), place=place),
        node("left", smooth(2.0), "root", place=place),
        node("right", smooth(-1.0), "root", place=place),
        node("joined", product(), {"a": "left", "b": "right"}, place=place),
    )


def oracle(x: Array, cotangent: Array) -> Array:
    torch = pytest.importorskip("torch")
    leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    root = torch.tanh(0.5 * leaf)
    (torch.tanh(2 * root) * torch.tanh(-root)).backward(torch.tensor(cotangent, dtype=torch.float64))
    return leaf.grad.numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("place", ["inline", "thread"])
def test_the_gradient_of_a_diamond_is_that_of_the_whole_function(place: str) -> None:
    x, cotangent = rows(), rows(seed=1)
    with Ensemble(diamond(place)) as ensemble:
        assert ensemble.signature.inputs[0].differentiable
        found = ensemble.infer({"x": x, "cotangent:y": cotangent}, ["gradient:x", "y"])
        assert list(found) == ["gradient:x", "y"]
        np.testing.assert_allclose(found["gradient:x"], oracle(x, cotangent), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found["y"], ensemble(x))


def test_a_remote_module_of_an_ensemble_trains_and_an_ensemble_behind_a_server_does_too() -> None:
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("remote_ops.torch").RemoteModule
    x, cotangent = rows(), rows(seed=1)
    with Ensemble(diamond("thread")) as ensemble, server_ref.running({"m": ensemble}) as url:
        for servable in (ensemble, url, Endpoint(url)):
            leaf = torch.tensor(x, requires_grad=True)
            module(servable)(leaf).backward(torch.tensor(cotangent))
            np.testing.assert_allclose(leaf.grad.numpy(), oracle(x, cotangent), rtol=1e-4, atol=1e-5)


def test_branches_answer_their_gradients_at_once() -> None:
    barrier = threading.Barrier(2, timeout=10)

    def meet(inputs: Any, cotangents: Any) -> Any:
        barrier.wait()
        return {"x": cotangents["y"]}

    branches = [node(name, function(lambda x: x, vjp=meet), place="thread") for name in "ab"]
    graph = plan(*branches, node("joined", product(), {"a": "a", "b": "b"}))
    with Ensemble(graph) as ensemble:
        x = rows()
        found = ensemble.infer({"x": x, "cotangent:y": np.ones_like(x)}, ["gradient:x"])
    np.testing.assert_allclose(found["gradient:x"], 2 * x, rtol=1e-6)


def test_gradients_keep_to_the_places_of_a_node() -> None:
    most, now, lock = [0], [0], threading.Lock()

    def counted(inputs: Any, cotangents: Any) -> Any:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.005)
        with lock:
            now[0] -= 1
        return {"x": cotangents["y"]}

    graph = plan(node("a", function(lambda x: x, vjp=counted), place="thread", max_inflight=2))
    with Ensemble(graph, threads=8) as ensemble:
        x = rows()
        runs = [ensemble.submit({"x": x, "cotangent:y": x}, ["gradient:x"]) for _ in range(12)]
        for run in runs:
            np.testing.assert_array_equal(run.result(10)["gradient:x"], x)
    assert most[0] == 2


def test_gradients_of_runs_at_one_node_share_calls() -> None:
    asked: list[int] = []

    def vjp(inputs: Any, cotangents: Any) -> Any:
        asked.append(len(inputs["x"]))
        return {"x": 2 * inputs["x"] * cotangents["y"]}

    model = function(lambda x: x**2, vjp=vjp)
    graph = plan(node("a", model, place="thread", batching=Batching(max_size=8, max_delay="5s")))
    with Ensemble(graph) as ensemble:
        given = [rows(1, seed) for seed in range(8)]
        runs = [ensemble.submit({"x": x, "cotangent:y": np.ones_like(x)}, ["gradient:x"]) for x in given]
        for x, run in zip(given, runs, strict=True):
            np.testing.assert_allclose(run.result(10)["gradient:x"], 2 * x, rtol=1e-6)
    assert asked == [8]


class Square:
    """An operation on an edge."""

    def run(self, array: Array) -> Array:
        return array**2

    def vjp(self, array: Array, result: Array, cotangent: Array) -> Array:
        return 2 * array * cotangent


def test_operations_on_edges_are_part_of_the_function() -> None:
    graph = plan(node("a", smooth(1.0), wires=[wire("x", "$inputs.x", Square(), Square())]))
    x = rows()
    with Ensemble(graph) as ensemble:
        found = ensemble.infer({"x": x, "cotangent:y": np.ones_like(x)}, ["gradient:x"])
    np.testing.assert_allclose(found["gradient:x"], 4 * x**3 * (1 - np.tanh(x**4) ** 2), rtol=1e-3, atol=1e-6)


def test_an_input_that_meets_a_model_without_gradients_has_none_and_says_why() -> None:
    graph = plan(node("a", lambda x: x), node("b", smooth(1.0), "a"))
    with Ensemble(graph) as ensemble:
        assert not ensemble.signature.inputs[0].differentiable
        with pytest.raises(NotDifferentiable):
            ensemble.infer({"x": rows(), "cotangent:y": rows()}, ["gradient:x"])


def test_only_ways_to_the_outputs_count() -> None:
    spare = node("spare", lambda x: x)
    graph = plan(spare, node("b", smooth(1.0)))
    with Ensemble(graph) as ensemble:
        assert ensemble.signature.inputs[0].differentiable


def test_an_input_that_nothing_came_of_has_zeros() -> None:
    graph = plan(
        node("a", smooth(1.0)),
        node("b", smooth(1.0), "$inputs.z"),
        inputs={"x": ROWS, "z": ROWS},
        outputs={"y": "a", "w": "b"},
    )
    x = rows()
    with Ensemble(graph) as ensemble:
        found = ensemble.infer({"x": x, "z": x, "cotangent:y": np.ones_like(x)}, ["gradient:x", "gradient:z"])
    assert not found["gradient:z"].any()
    np.testing.assert_allclose(found["gradient:x"], 1 - np.tanh(x) ** 2, rtol=1e-5)


def test_what_stands_in_for_a_node_that_failed_is_a_constant() -> None:
    broken = function(fails, vjp=lambda inputs, cotangents: {"x": cotangents["y"]})
    graph = plan(
        node("bad", broken, on_error=Default(default=2)),
        node("joined", product(), {"a": "bad", "b": "$inputs.x"}),
    )
    x = rows()
    with Ensemble(graph) as ensemble:
        found = ensemble.infer({"x": x, "cotangent:y": np.ones_like(x)}, ["gradient:x"])
    np.testing.assert_array_equal(found["gradient:x"], np.full_like(x, 2))


def test_members_that_did_not_answer_have_no_part_in_the_gradient() -> None:
    broken = function(fails, vjp=lambda inputs, cotangents: {"x": cotangents["y"]})
    members = [node("a", smooth(1.0)), node("bad", broken), node("c", smooth(2.0))]
    wires = [wire(one.name, one.name, needed=False) for one in members]
    graph = plan(*members, node("vote", Mean(), wires=wires, quorum=Quorum(2)))
    x = rows()
    with Ensemble(graph) as ensemble:
        found = ensemble.infer({"x": x, "cotangent:y": np.ones_like(x)}, ["gradient:x"])
    expected = ((1 - np.tanh(x) ** 2) + 2 * (1 - np.tanh(2 * x) ** 2)) / 2
    np.testing.assert_allclose(found["gradient:x"], expected, rtol=1e-4, atol=1e-6)


class Halves:
    """A controller: even rows to one node, odd ones to another."""

    def steps(self, inputs: Any, wanted: Any) -> Any:
        x = inputs["x"]
        found = [np.arange(len(x))[start::2] for start in range(2)]
        calls = [
            Call(name, {"x": x[rows]}, wanted, rows, cut=("x",))
            for name, rows in zip(("even", "odd"), found, strict=True)
        ]
        yield Calls(calls)
        return Assembly([Piece(number, None, rows) for number, rows in enumerate(found)], len(x))


def test_a_controller_gives_each_row_the_gradient_of_the_way_it_took() -> None:
    owned = [node("even", smooth(1.0)), node("odd", smooth(3.0), wires=[wire("x", "$inputs.x")])]
    graph = plan(node("root", smooth(0.5)), node("halves", Halves(), "root", children=owned))
    x = rows(7)
    with Ensemble(graph) as ensemble:
        assert ensemble.signature.inputs[0].differentiable
        found = ensemble.infer({"x": x, "cotangent:y": np.ones_like(x)}, ["y", "gradient:x"])
    k = np.where(np.arange(7) % 2, 3.0, 1.0)[:, None]
    root = np.tanh(0.5 * x)
    np.testing.assert_allclose(found["y"], np.tanh(k * root), rtol=1e-5)
    expected = k * (1 - np.tanh(k * root) ** 2) * 0.5 * (1 - root**2)
    np.testing.assert_allclose(found["gradient:x"], expected, rtol=1e-3, atol=1e-6)


def test_an_integer_output_has_no_cotangent_and_stops_nothing() -> None:
    label = FunctionServable(
        lambda x: x.argmax(1), [TensorSpec("x", "float32", (-1, 4))], [TensorSpec("y", "int64", (-1,))]
    )
    graph = plan(
        node("a", smooth(1.0)),
        node("label", label, "a", outputs={"y": Form("int64", ("N",))}),
        outputs={"y": "a", "label": "label"},
    )
    with Ensemble(graph) as ensemble:
        assert ensemble.signature.inputs[0].differentiable
        x = rows()
        found = ensemble.infer({"x": x, "cotangent:y": np.ones_like(x)}, ["gradient:x", "label"])
    np.testing.assert_allclose(found["gradient:x"], 1 - np.tanh(x) ** 2, rtol=1e-5)


def test_an_owned_node_need_not_take_all_that_its_owner_is_given_nor_by_its_name() -> None:
    owned = [node("even", smooth(1.0), "$inputs.pixels"), node("odd", smooth(3.0), "$inputs.pixels")]
    halves = node("halves", Halves(), {"pixels": "$inputs.x", "key": "$inputs.key"}, children=owned)
    with Ensemble(plan(halves, inputs={"x": ROWS, "key": ROWS})) as ensemble:
        x = ensemble.signature.inputs[0]
    assert x.differentiable
