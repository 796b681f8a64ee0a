"""A switch: its conditions, its faults, and that each row comes out as if it had run by itself."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from controlled import Known, built, drive, faults_of, form, forms, texts
from pydantic import ValidationError

from ensemble.nodes.switch import SwitchSpec
from ensemble.predicate import Predicate
from remote_ops.errors import SignatureError

# --------------------------------------------------------------------------- conditions


@pytest.mark.parametrize(
    ("written", "value", "holds"),
    [
        ("< 13", 12.5, True),
        ("< 13", 13, False),
        ("<= 13", 13, True),
        ("> -1e3", -1000.5, False),
        (">= .5", 0.5, True),
        ("== 3", 3, True),
        ("!= 3", 3, False),
        ("in [1, 2,3]", 3, True),
        ("not in [1, 2]", 2, False),
        (">= 13 and < 65", 13, True),
        (">= 13 and < 65", 65, False),
        ("< 13 or >= 65", 70, True),
        ("== 1 or > 5 and < 7", 6, True),
        ("== 1 or > 5 and < 7", 1, True),
        ("== 1 or > 5 and < 7", 8, False),
        (4, 4, True),
        (4.5, 4, False),
        (True, True, True),
        ("== false", True, False),
        ('== "cat"', "cat", True),
        ("== 'cat'", b"cat", True),
        ('!= "cat"', "dog", True),
        ("in ['a b', \"c\"]", "a b", True),
        ("not in ['a', 'b']", "é", True),
    ],
)
def test_condition_holds_as_it_reads(written: Any, value: Any, holds: bool) -> None:
    array = texts(value) if isinstance(value, str | bytes) else np.array([value])
    assert Predicate.parse(written).holds(array).tolist() == [holds]


@pytest.mark.parametrize(
    "written",
    ["", "13", "cat", "<", "< 13 65", "< 'a'", "<= true", "< 13 and", "or < 13", "in []", "in 3", "in [1", "in [1 2]",
     "=> 3", "= 3", "< 1 xor < 2", "== cat", "== 'cat", "< 0x1", "< 1.2.3", "not 3", "< 13;", None, [1], {"a": 1}],
)  # fmt: skip
def test_condition_that_is_none_is_refused_with_the_grammar(written: Any) -> None:
    with pytest.raises(ValueError, match=r"expected a comparison such as|only numbers have an order"):
        Predicate.parse(written)


def test_condition_says_how_to_write_a_text() -> None:
    with pytest.raises(ValueError, match="for a text write '== \"cat\"'"):
        Predicate.parse("cat")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.uint8, np.int64])
def test_condition_is_asked_in_the_dtype_of_the_tensor(dtype: Any) -> None:
    array = np.array([0, 1, 5, 100], dtype)
    assert Predicate.parse("> 1 and < 100").holds(array).tolist() == [False, False, True, False]
    assert Predicate.parse("< 1e6").holds(array).all()
    assert Predicate.parse("!= 300").holds(array).all()


def test_condition_equals_the_nearest_number_of_a_float_dtype() -> None:
    assert Predicate.parse("== 0.1").holds(np.array([0.1], np.float32)).all()


def test_nan_holds_for_inequality_alone() -> None:
    array = np.array([np.nan], np.float32)
    assert [bool(Predicate.parse(f"{sign} 1").holds(array)[0]) for sign in ("<", "<=", ">", ">=", "==", "!=")] == [
        False, False, False, False, False, True
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("written", "dtype", "word"),
    [
        ("< 13", "string", "text"),
        ("== 'a'", "int64", "a number"),
        ("== true", "float32", "a number"),
        (1, "bool", "true"),
    ],
)
def test_condition_that_does_not_fit_a_dtype_says_what_it_compares_with(written: Any, dtype: str, word: str) -> None:
    assert word in Predicate.parse(written).misfit(dtype)
    assert Predicate.parse(written).misfit(None) == ""


# --------------------------------------------------------------------------- faults

CHILDREN = {"child": forms(y="float32 [N, 2]"), "adult": forms(y="float32 [N, 2]"), "senior": forms(y="float32 [N, 2]")}
CASES = [{"if": "< 13", "use": "child"}, {"if": "< 65", "use": "adult"}]


def spec(**changes: Any) -> SwitchSpec:
    written = {"select": "age.years", "cases": CASES, "default": "senior", "inputs": {"x": "$inputs.x"}, **changes}
    return SwitchSpec.model_validate(
        {"kind": "switch", **{key: one for key, one in written.items() if one is not None}}
    )


def known(select: str = "float32 [N]", x: str = "float32 [N, 3]", z: str = "", **children: str) -> Known:
    inputs = {"$select": form(select), "x": form(x), **({"z": form(z)} if z else {})}
    return Known(inputs, {**CHILDREN, **{name: forms(y=one) for name, one in children.items()}})


def test_switch_tells_its_edges_and_each_node_that_it_owns_once() -> None:
    twice = spec(cases=[*CASES, {"if": "< 70", "use": "child"}])
    assert [(at.name, at.path) for at in twice.edges()] == [("$select", ("select",)), ("x", ("inputs", "x"))]
    assert [tuple(owned) for owned in twice.owned()] == [
        ("child", ("cases", 0, "use")), ("adult", ("cases", 1, "use")), ("senior", ("default",))
    ]  # fmt: skip


def test_switch_without_faults_gives_what_its_nodes_give() -> None:
    scope = known(senior="float32 [?, 2]")
    assert spec(scope="row").forms(scope.inputs, scope) == forms(y="float32 [N, 2]")
    assert scope.faults.all == []


def test_switch_per_row_takes_the_only_length_there_is_for_its_rows() -> None:
    children = dict.fromkeys(CHILDREN, "float32 [?, 2]")
    for z in ("", "float32 [N]", "float32 []"):
        controller = built(spec(scope="row"), known("float32 [M]", z=z, **children))
        assert controller.carrying == (("x", "z") if "[N]" in z else ("x",))


@pytest.mark.parametrize(
    ("changes", "scope", "fault"),
    [
        ({"default": None}, known(), "E110 : a switch needs a 'default'"),
        ({}, known("string []"), "E106 cases.0.if: '< 13' does not fit 'age.years'"),
        ({}, known("float32 [N, 3]"), "E107 select: 'age.years': expected one value to select by"),
        ({"scope": "row"}, known("float32 []"), "E107 select: 'age.years': expected one value for each row"),
        ({"scope": "row"}, known("float32 [N, 3]"), "E107 select: 'age.years': expected one value for each row"),
        ({"scope": "row"}, known("float32 [M]", z="int64 [L]"), "E107 select: no input has the rows of 'age.years'"),
        ({"scope": "row"}, known("float32 [7]", "float32 [5, 3]"), "E107 select: axis 0 of 'age.years' is any [7]"),
        ({}, known(adult="float64 [N, 2]"), "E110 cases.1.use: child.y is float32 [N, 2], adult.y is float64 [N, 2]"),
        ({}, known(senior="float32 [N, 4]"), "E110 default: child.y is float32 [N, 2], senior.y is float32 [N, 4]"),
        (
            {"scope": "row"},
            known(child="float32 []", adult="float32 []", senior="float32 []"),
            "E110 : output 'y' is one value",
        ),
    ],
)
def test_switch_names_each_fault(changes: dict[str, Any], scope: Known, fault: str) -> None:
    found = faults_of(spec(**changes), scope)
    assert any(one.startswith(fault) for one in found), found


def test_switch_names_both_alternatives_whose_outputs_differ() -> None:
    scope = known()
    scope._children = {**CHILDREN, "adult": forms(z="float32 [N, 2]")}
    (found,) = faults_of(spec(), scope)
    assert found.startswith("E110 cases.1.use")
    assert all(word in found for word in ("'child' gives 'y'", "'adult' gives 'z'", "outputs: {y: z}"))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"cases": []}, "at least 1 item"),
        ({"cases": [{"if": "13", "use": "child"}]}, "expected a comparison"),
        ({"scope": "batch"}, "'request' or 'row'"),
        ({"outputs": {"y": "z"}}, "rename and declare 'outputs' there"),
        ({"batching": {"max_size": 3}}, "write it there"),
        ({"inputs": {"$x": "$inputs.x"}}, "expected the name of an input"),
        ({"select": "$x"}, "expected a reference"),
    ],
)
def test_switch_that_cannot_be_read_says_why(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        spec(**changes)


def test_switch_has_a_json_schema() -> None:
    assert "if" in SwitchSpec.model_json_schema()["$defs"]["Case"]["required"]


# --------------------------------------------------------------------------- runs


def node(place: int) -> Any:
    """Computes each row by itself, and differently from the other nodes; what it gives has the whole `w` in it."""

    def run(inputs: Any) -> Any:
        y = inputs["x"] * (place + 1) + inputs["w"].sum()
        return {
            "y": y.astype(np.float32),
            "name": np.array([f"{place}:{one}" for one in inputs["s"]] + [None], object)[:-1],
        }

    return run


NODES = {name: node(place) for place, name in enumerate(("child", "adult", "senior"))}
OUTPUTS = forms(y="float32 [N, 3]", name="string [N]")


def row_switch() -> Any:
    inputs = {"$select": form("float32 [N]"), **forms(x="float32 [N, 3]", s="string [N]", w="float32 [M]")}
    return built(spec(scope="row"), Known(inputs, dict.fromkeys(NODES, OUTPUTS)))


def batch(rng: np.random.Generator, rows: int) -> dict[str, Any]:
    return {
        "$select": rng.integers(0, 90, rows).astype(np.float32),
        "x": rng.normal(size=(rows, 3)).astype(np.float32),
        "s": texts(*map(str, range(rows))),
        "w": rng.normal(size=4).astype(np.float32),
    }


def test_switch_per_row_equals_each_row_run_by_itself_on_1000_random_batches() -> None:
    rng, switch = np.random.default_rng(0), row_switch()
    for _ in range(1000):
        inputs = batch(rng, int(rng.integers(0, 13)))
        run = drive(switch, NODES, inputs, ["y", "name"])
        assert len(run.calls) <= 3
        expected = []
        for row, age in enumerate(inputs["$select"]):
            alone = {name: one if name == "w" else one[row : row + 1] for name, one in inputs.items()}
            expected.append(NODES["child" if age < 13 else "adult" if age < 65 else "senior"](alone))
        np.testing.assert_array_equal(
            run.outputs["y"], np.concatenate([np.zeros((0, 3), np.float32), *[e["y"] for e in expected]])
        )
        assert run.outputs["name"].tolist() == [e["name"][0] for e in expected]
        assert run.outputs["y"].dtype == np.float32


def test_switch_per_row_of_no_rows_calls_nobody_where_the_outputs_are_known() -> None:
    run = drive(row_switch(), {}, batch(np.random.default_rng(0), 0), ["y", "name"])
    assert run.calls == []
    assert (run.outputs["y"].shape, run.outputs["y"].dtype, run.outputs["name"].dtype) == ((0, 3), np.float32, object)


def test_switch_per_row_of_no_rows_asks_the_default_where_they_are_not() -> None:
    inputs = {"$select": form("float32 [N]"), **forms(x="float32 [N, 3]", s="string [N]", w="float32 [M]")}
    switch = built(spec(scope="row"), Known(inputs, dict.fromkeys(NODES, forms(y="float32 [N, ?]", name="string [N]"))))
    run = drive(switch, NODES, batch(np.random.default_rng(0), 0), ["y"])
    assert [call.node for call in run.calls] == ["senior"]
    assert run.outputs["y"].shape == (0, 3)


def test_switch_per_row_hands_on_without_a_copy_what_goes_one_way() -> None:
    inputs = {**batch(np.random.default_rng(0), 5), "$select": np.full((5, 1), 70, np.float32)}
    run = drive(row_switch(), NODES, inputs, ["y"])
    assert [call.node for call in run.calls] == ["senior"]
    assert run.calls[0].inputs["x"] is inputs["x"]
    assert run.outputs["y"] is run.outcomes[0]["y"]


def test_switch_per_row_cuts_neighbouring_rows_as_views() -> None:
    inputs = {**batch(np.random.default_rng(0), 4), "$select": np.array([5, 5, 30, 30], np.float32)}
    run = drive(row_switch(), NODES, inputs, ["y"])
    assert all(np.shares_memory(call.inputs["x"], inputs["x"]) for call in run.calls)
    assert all(call.inputs["w"] is inputs["w"] for call in run.calls)
    assert all(set(call.cut) == {"x", "s"} for call in run.calls)


def test_switch_per_row_with_other_rows_than_its_inputs_says_both() -> None:
    inputs = {**batch(np.random.default_rng(0), 4), "$select": np.zeros(3, np.float32)}
    with pytest.raises(SignatureError, match=r"input 'x': expected 3 rows, as 'select' has, got float32 \[4, 3\]"):
        drive(row_switch(), NODES, inputs, ["y"])
    with pytest.raises(SignatureError, match=r"one value for each row to select by, got float32 \[4, 2\]"):
        drive(row_switch(), NODES, {**inputs, "$select": np.zeros((4, 2), np.float32)}, ["y"])


def test_switch_per_row_whose_node_gives_other_rows_says_so() -> None:
    inputs = {**batch(np.random.default_rng(0), 4), "$select": np.array([5, 30, 5, 30], np.float32)}
    bad = {**NODES, "child": lambda inputs: {"y": np.zeros((3, 3), np.float32)}}
    with pytest.raises(
        SignatureError, match=r"output 'y': expected 2 rows, as many as were sent, got float32 \[3, 3\]"
    ):
        drive(row_switch(), bad, inputs, ["y"])


@pytest.mark.parametrize(("select", "taken"), [(5, "child"), ([30], "adult"), ([[70]], "senior"), (np.nan, "senior")])
def test_switch_per_request_runs_the_first_case_that_holds(select: Any, taken: str) -> None:
    switch = built(spec(), known("float32 [?]"))
    x = np.ones((2, 3), np.float32)
    run = drive(switch, {taken: lambda inputs: {"y": inputs["x"]}}, {"$select": np.array(select), "x": x}, ["y"])
    assert run.outputs["y"] is x
    assert run.calls[0].wanted == ["y"]


def test_switch_per_request_refuses_several_values() -> None:
    with pytest.raises(SignatureError, match=r"expects one value to select by, got float64 \[2\]; .* 'scope: row'"):
        drive(built(spec(), known("float32 [?]")), {}, {"$select": np.zeros(2), "x": np.zeros((2, 3))}, ["y"])


def test_switch_gives_on_what_is_for_the_nodes_it_owns_but_not_its_own() -> None:
    switch = built(spec(), known("float32 []"))
    inputs = {"$select": np.float32(5)[None], "x": np.zeros((2, 3)), "child.$sticky": texts("k")}
    run = drive(switch, {"child": lambda inputs: {"y": inputs["x"]}}, inputs, ["y"])
    assert set(run.calls[0].inputs) == {"x", "child.$sticky"}
