"""A map: its body once for each item or chunk, for no items too, and what it says of tensors that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from controlled import Known, Run, built, drive, faults_of, form, forms, texts
from pydantic import ValidationError

import ensemble.spec  # noqa: F401 (it says what a node in a body may be)
from ensemble.forms import Form
from ensemble.nodes.map import MapSpec
from remote_ops.errors import ConnectError, SignatureError


def spec(**changes: Any) -> MapSpec:
    body = {"nodes": {}, "outputs": {"y": "age.y"}}
    return MapSpec.model_validate({"kind": "map", "over": {"x": "detect.crops"}, "body": body, **changes})


def known(x: str = "float32 [K, 3]", y: Mapping[str, Form] | None = None, **others: str) -> Known:
    """A scope whose body gives `y`, or what it is given as `y`."""
    inputs = {"x": form(x), **forms(**others)}
    return Known(inputs, body=lambda items: {"y": items["x"]} if y is None else y)


def body(function: Any) -> dict[str, Any]:
    return {"body": lambda inputs: {"y": np.asarray(function(**inputs))}}


def mapped(x: Any, function: Any, scope: Known | None = None, inputs: Any = None, **changes: Any) -> Run:
    return drive(built(spec(**changes), scope or known()), body(function), {"x": x, **(inputs or {})}, ["y"])


# --------------------------------------------------------------------------- items


@pytest.mark.parametrize("items", [0, 1, 7, 10_001])
@pytest.mark.parametrize("chunk", [1, 16])
def test_map_equals_a_loop_over_its_items(items: int, chunk: int) -> None:
    x = np.random.default_rng(0).normal(size=(items, 3, 2)).astype(np.float32)
    run = mapped(x, lambda x: x * 2, known("float32 [K, 3, 2]"), chunk=chunk)
    np.testing.assert_array_equal(run.outputs["y"], x * 2)
    assert (run.outputs["y"].dtype, run.outputs["y"].shape) == (np.float32, x.shape)
    assert len(run.calls) == -(-items // chunk)
    assert all(len(call.inputs["x"]) in (3, 3 * chunk, 3 * (items % chunk)) for call in run.calls)


def test_map_gives_its_body_items_without_the_axis() -> None:
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    run = mapped(x, lambda x: x.sum(), known(y=forms(y="float32 []")))
    assert [call.inputs["x"].tolist() for call in run.calls] == x.tolist()
    assert all(np.shares_memory(call.inputs["x"], x) for call in run.calls)
    assert run.outputs["y"].tolist() == x.sum(1).tolist()


def test_map_joins_the_items_of_a_chunk_along_their_own_axis_and_divides_the_answer() -> None:
    x = np.random.default_rng(0).normal(size=(7, 2, 5)).astype(np.float32)
    scope = known("float32 [K, 2, 5]", forms(y="float32 [?, 5]"))
    run = mapped(x, lambda x: np.repeat(x, 3, 0), scope, chunk=3)
    assert [call.inputs["x"].shape for call in run.calls] == [(6, 5), (6, 5), (2, 5)]
    np.testing.assert_array_equal(run.outputs["y"], np.repeat(x, 3, 1))


def test_map_gives_what_is_outside_to_every_call_as_it_is() -> None:
    x, w = np.ones((3, 2), np.float32), np.arange(3, dtype=np.float32)
    inputs = {"$inputs.w": w, "pre.t": w}
    controller = built(spec(), known("float32 [K, 2]"))
    run = drive(controller, {"body": lambda inputs: {"y": inputs["x"]}}, {"x": x, **inputs}, ["y"])
    assert all(call.inputs["$inputs.w"] is w and call.inputs["pre.t"] is w for call in run.calls)
    assert all(call.cut == ("x",) for call in run.calls)


@pytest.mark.parametrize("items", [0, 5])
def test_map_takes_strings_one_by_one(items: int) -> None:
    scope = known("string [K]", forms(y="string []"))
    run = mapped(texts(*"abcde"[:items]), lambda x: np.array(x.item().upper(), object), scope)
    assert (run.outputs["y"].dtype, run.outputs["y"].tolist()) == (object, list("ABCDE"[:items]))


def test_map_in_a_map_gives_an_axis_for_each() -> None:
    x = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    inner = built(spec(), known("float32 [L, 2]"))
    outer = built(spec(), known("float32 [K, L, 2]"))
    nested = {"body": lambda inputs: drive(inner, body(lambda x: x + 1), inputs, ["y"]).outputs}
    run = drive(outer, nested, {"x": x}, ["y"])
    np.testing.assert_array_equal(run.outputs["y"], x + 1)
    assert drive(outer, nested, {"x": x[:0]}, ["y"]).outputs["y"].shape == (0, 4, 2)
    assert drive(outer, nested, {"x": x[:, :0]}, ["y"]).outputs["y"].shape == (3, 0, 2)


def test_map_takes_its_calls_as_they_start_and_few_at_a_time() -> None:
    controller = built(spec(concurrency=3), known())
    asked = controller.steps({"x": np.zeros((10_001, 3), np.float32)}, ["y"]).send(None)
    assert asked.at_most == 3
    calls = iter(asked.calls)
    assert calls is asked.calls  # made one by one, not beforehand
    assert next(calls).rows == slice(0, 1)


def test_map_fails_with_the_first_item_that_fails() -> None:
    def third(x: Any) -> Any:
        if x[0] == 2:
            raise ConnectError("nobody is there")
        return x

    with pytest.raises(ConnectError):
        mapped(np.arange(5, dtype=np.float32)[:, None], third, known("float32 [K, 1]"))


# --------------------------------------------------------------------------- no items


@pytest.mark.parametrize(
    ("y", "shape", "dtype"),
    [
        ("float32 [4]", (0, 4), np.float32),
        ("string []", (0,), object),
        ("bool [?, 2]", (0, 0, 2), np.bool_),
        ("int64 [H]", (0, 6), np.int64),
    ],
)
def test_map_over_nothing_calls_nobody_and_gives_what_its_body_would(y: str, shape: Any, dtype: Any) -> None:
    scope = known("float32 [K, 3]", forms(y=y), w="float32 [H]")
    run = mapped(np.zeros((0, 3), np.float32), None, scope, {"w": np.zeros(6)})
    assert run.calls == []
    assert (run.outputs["y"].shape, run.outputs["y"].dtype) == (shape, dtype)


def test_map_over_nothing_in_chunks_knows_the_length_of_an_item() -> None:
    run = mapped(np.zeros((0, 2, 3), np.float32), None, known("float32 [K, 2, 3]"), chunk=16)
    assert run.outputs["y"].shape == (0, 2, 3)


# --------------------------------------------------------------------------- rows


@pytest.mark.parametrize("rows", [0, 1, 5, 8])
def test_map_by_rows_keeps_the_axis(rows: int) -> None:
    x = np.arange(rows, dtype=np.float32)
    run = mapped(x, lambda x: x + len(x), known("float32 [K]"), unit="rows", chunk=4)
    sizes = [4] * (rows // 4) + [rows % 4] * bool(rows % 4)
    assert [call.inputs["x"].shape for call in run.calls] == [(size,) for size in sizes]
    np.testing.assert_array_equal(run.outputs["y"], x + np.repeat(sizes, sizes).astype(np.float32))


def test_map_by_rows_refuses_an_answer_with_other_rows() -> None:
    with pytest.raises(SignatureError, match=r"output 'y': expected 2 rows, as many as were sent, got float32 \[1\]"):
        mapped(np.zeros(5, np.float32), lambda x: x[:1], known("float32 [K]"), unit="rows", chunk=2)


# --------------------------------------------------------------------------- what does not fit


def test_map_refuses_answers_of_different_shapes() -> None:
    x = np.array([1, 2], np.int64)
    with pytest.raises(SignatureError, match=r"differ in dtype or item: float32 \[1, 1\] and float32 \[1, 2\]"):
        mapped(x, lambda x: np.zeros(int(x), np.float32), known("int64 [K]", forms(y="float32 [?]")))


def test_map_refuses_a_chunk_whose_answer_cannot_be_divided() -> None:
    x = np.zeros((4, 2), np.float32)
    with pytest.raises(SignatureError, match=r"2 items were sent as one chunk, and float32 \[3\] came back"):
        mapped(x, lambda x: x[:3], known("float32 [K, 2]"), chunk=2)


def test_map_refuses_tensors_of_different_lengths() -> None:
    controller = built(spec(over={"x": "a.x", "z": "a.z"}), known(z="float32 [K]"))
    with pytest.raises(SignatureError, match=r"input 'z': expected 4 rows, as 'x' has, got float64 \[5\]"):
        drive(controller, {}, {"x": np.zeros((4, 3)), "z": np.zeros(5)}, ["y"])


@pytest.mark.parametrize(
    ("changes", "scope", "fault"),
    [
        ({"over": {"x": "a.x", "z": "a.z"}}, known(z="float32 []"), "E111 over.z: 'z (source.z)' has no axis to take"),
        (
            {"over": {"x": "a.x", "z": "a.z"}},
            known("float32 [3, 2]", z="float32 [4]"),
            "E111 over.z: x (source.x) is any [3], z (source.z) is any [4]",
        ),
        ({}, known(y=forms(y="any")), "E111 body.outputs.y: 'y' is any of any shape: a map over nothing needs"),
        ({"chunk": 2}, known("float32 [K]", forms(y="float32 [?]")), "E111 chunk: an item of 'x' is one value"),
        ({"chunk": 2}, known(y=forms(y="float32 []")), "E111 chunk: 'y' is one value, float32 []"),
        ({"unit": "rows"}, known("float32 [K]", forms(y="float32 []")), "E110 body.outputs: output 'y' is one value"),
    ],
)
def test_map_names_each_fault(changes: dict[str, Any], scope: Known, fault: str) -> None:
    found = faults_of(spec(**changes), scope)
    assert any(one.startswith(fault) for one in found), found


def fixed(length: int, own: str) -> Known:
    """A scope whose body takes items of one length only."""
    scope = known(f"float32 [K, {own}]")

    def run(items: Mapping[str, Form]) -> Mapping[str, Form]:
        item = scope.equal(items["x"], "$item.x", form(f"float32 [{length}]"), "model.x", "E107", ())
        return {"y": scope.resolve(item)}

    scope._body = run
    return scope


def test_map_warns_of_a_body_that_cannot_be_given_chunks_and_gives_it_items() -> None:
    (found,) = faults_of(spec(chunk=16), fixed(3, "3"))
    assert found.startswith("E111 chunk: the body takes a 'x' of length 3 only")
    x = np.zeros((20, 3), np.float32)
    run = mapped(x, lambda x: x, fixed(3, "3"), chunk=16)
    assert [call.inputs["x"].shape for call in run.calls] == [(3,)] * 20


def test_map_refuses_a_body_that_takes_items_of_another_length() -> None:
    scope = fixed(4, "3")
    faults_of(spec(chunk=16), scope)
    assert [fault.code for fault in scope.faults.errors] == ["E111"]


def test_map_tells_the_forms_of_what_it_gives() -> None:
    for changes, x, expected in (
        ({}, "float32 [K, 3]", "float32 [K, 3]"),
        ({"chunk": 4}, "float32 [K, 3]", "float32 [K, 3]"),
        ({"chunk": 4}, "float32 [K, R, 3]", "float32 [K, R, 3]"),
        ({"unit": "rows"}, "float32 [K, 3]", "float32 [K, 3]"),
    ):
        scope = known(x)
        assert spec(**changes).forms(scope.inputs, scope) == {"y": form(expected)}


def test_map_by_rows_does_not_take_the_rows_of_a_slice_for_all_of_them() -> None:
    scope, seen = known("float32 [K, 3]", z="int64 [K]"), []

    def run(items: Mapping[str, Form]) -> Mapping[str, Form]:
        seen.append(items)
        return {"y": items["x"]}

    scope._body = run
    over = {"x": "a.x", "z": "a.z"}
    assert spec(over=over, unit="rows", chunk=2).forms(scope.inputs, scope) == {"y": form("float32 [K, 3]")}
    ((x, z),) = [[items[name].dims for name in "xz"] for items in seen]
    assert x is not None
    assert z == x[:1] != ("K",)  # what the body reads from outside may have K rows


def test_map_by_rows_calls_the_rows_of_a_slice_what_its_body_calls_them() -> None:
    scope = known("float32 [K, 3]", forms(y="float32 [R, 3]"))
    assert spec(unit="rows", chunk=2).forms(scope.inputs, scope) == {"y": form("float32 [K, 3]")}
    assert scope.resolve(form("float32 [R]")) == form("float32 [R]")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"axis": 1}, "apply: transpose"),
        ({"over": {}}, "at least 1 item"),
        ({"chunk": 0}, "greater than 0"),
        ({"concurrency": 0}, "greater than 0"),
        ({"unit": "pieces"}, "'item' or 'rows'"),
        ({"body": {"nodes": {}, "outputs": {}}}, "at least 1 item"),
    ],
)
def test_map_that_cannot_be_read_says_why(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        spec(**changes)


def test_map_tells_its_edges_and_its_body() -> None:
    it = spec(over={"x": "a.x", "z": "a.z"})
    assert [(at.name, at.path) for at in it.edges()] == [("x", ("over", "x")), ("z", ("over", "z"))]
    (found,) = it.bodies()
    assert (found.name, found.path, found.items, list(found.outputs)) == ("body", ("body",), ("x", "z"), ["y"])
