"""A split: how often each node runs, that a key sticks to its node in any process, and that a mirror is unminded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from controlled import Known, Run, built, drive, faults_of, form, forms, texts
from pydantic import ValidationError

from ensemble.nodes.split import SplitSpec, Wheel
from ensemble.steps import Missing
from remote_ops.errors import ConnectError, SignatureError

CHILDREN = {"v1": forms(y="float32 [N]"), "v2": forms(y="float32 [N]"), "v3": forms(z="int64 []")}
NODES = {"v1": lambda inputs: {"y": inputs["x"] + 1}, "v2": lambda inputs: {"y": inputs["x"] + 2}}


def spec(**changes: Any) -> SplitSpec:
    written = {"kind": "split", "weights": {"v1": 90, "v2": 10}, "inputs": {"x": "$inputs.x"}, **changes}
    return SplitSpec.model_validate(written)


def known(key: str | None = None, x: str = "float32 [N]") -> Known:
    return Known({"x": form(x), **({"$sticky": form(key)} if key else {})}, CHILDREN)


def by_key(**changes: Any) -> Any:
    return built(spec(sticky="$inputs.user", **changes), known("string [N]"))


def keyed(controller: Any, keys: Any, wanted: Any = ("y",)) -> Run:
    x = np.zeros(len(keys), np.float32)
    return drive(controller, NODES, {"x": x, "$sticky": keys}, list(wanted))


# --------------------------------------------------------------------------- shares


def test_split_of_100000_sticky_keys_keeps_to_its_weights_within_half_a_percent() -> None:
    run = keyed(by_key(), texts(*[f"user-{number}" for number in range(100_000)]))
    assert abs(np.mean(run.outputs["y"] == 1) - 0.9) < 0.005
    assert [call.node for call in run.calls] == ["v1", "v2"]


def test_split_sends_a_key_the_same_way_in_another_process() -> None:
    code = (
        "from ensemble.nodes.split import Wheel\n"
        "wheel = Wheel({'v1': 1, 'v2': 1, 'v3': 2}, 7)\n"
        "print([wheel.of_key(f'user-{n}') for n in range(200)])"
    )
    wheel = Wheel({"v1": 1, "v2": 1, "v3": 2}, 7)
    here = str([wheel.of_key(f"user-{number}") for number in range(200)])
    for seed in ("0", "1234"):
        there = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        answer = subprocess.run([sys.executable, "-c", code], env=there, capture_output=True, text=True, check=True)
        assert answer.stdout.strip() == here


def test_split_sends_a_key_one_way_however_it_is_written() -> None:
    wheel = Wheel({"v1": 1, "v2": 1}, 0)
    for number in range(50):
        assert len({wheel.of_key(number), wheel.of_key(str(number)), wheel.of_key(str(number).encode())}) == 1


def test_split_of_another_seed_sends_keys_other_ways() -> None:
    keys = [f"user-{number}" for number in range(1000)]
    ways = [[Wheel({"v1": 1, "v2": 1}, seed).of_key(key) for key in keys] for seed in (0, 1)]
    assert 400 < sum(one != other for one, other in zip(*ways, strict=True)) < 600


def test_split_never_runs_a_node_of_weight_0() -> None:
    wheel = Wheel({"v1": 0, "v2": 3, "v3": 0}, 0)
    assert {wheel.at(point) for point in (0.0, 0.5, 1 - 2**-53, 1.0)} == {1}


def test_split_without_a_key_keeps_to_its_weights_and_repeats_by_seed() -> None:
    def ways(seed: int) -> list[str]:
        split = built(spec(seed=seed), known())
        return [drive(split, NODES, {"x": np.zeros(1)}, ["y"]).calls[0].node for _ in range(2000)]

    assert ways(3) == ways(3) != ways(4)
    assert abs(Counter(ways(3))["v1"] / 2000 - 0.9) < 0.03


def test_split_without_a_key_loses_no_request_between_threads() -> None:
    def ways(threads: int) -> Counter[int]:
        wheel = Wheel({"v1": 1, "v2": 1}, 0)
        with ThreadPoolExecutor(threads) as pool:
            return Counter(pool.map(lambda _: wheel.at_random(), range(4000)))

    assert ways(8) == ways(1)


# --------------------------------------------------------------------------- keys


def test_split_by_row_equals_each_row_run_by_itself() -> None:
    split, rng = by_key(weights={"v1": 1, "v2": 1}), np.random.default_rng(0)
    for rows in range(20):
        keys = texts(*map(str, rng.integers(0, 50, rows)))
        alone = [keyed(split, keys[row : row + 1]).outputs["y"][0] for row in range(rows)]
        assert keyed(split, keys).outputs["y"].tolist() == alone


@pytest.mark.parametrize("key", ["string []", "string [1]", "int64 [M]"])
def test_split_by_one_key_sends_a_whole_request(key: str) -> None:
    split = built(spec(sticky="$inputs.user"), known(key))
    x, one = np.zeros(3, np.float32), np.array(7 if "int" in key else "u", np.int64 if "int" in key else object)
    run = drive(split, NODES, {"x": x, "$sticky": one if key.endswith("[]") else one[None]}, ["y"])
    assert len(run.calls) == 1
    assert run.calls[0].inputs["x"] is x
    assert run.outputs["y"] is run.outcomes[0]["y"]


def test_split_by_one_key_refuses_several() -> None:
    split = built(spec(sticky="$inputs.user"), known("int64 [M]"))
    with pytest.raises(SignatureError, match=r"one key for a request whose inputs have no rows, got int64 \[2\]"):
        drive(split, NODES, {"x": np.zeros(3), "$sticky": np.arange(2)}, ["y"])


def test_split_by_row_refuses_other_rows_than_its_inputs() -> None:
    with pytest.raises(SignatureError, match="input 'x': expected 2 rows, as 'sticky' has"):
        drive(by_key(), NODES, {"x": np.zeros(3), "$sticky": texts("a", "b")}, ["y"])
    with pytest.raises(SignatureError, match=r"one key for each row, got string \[2, 2\]"):
        drive(by_key(), NODES, {"x": np.zeros(2), "$sticky": np.full((2, 2), "a", object)}, ["y"])


@pytest.mark.parametrize("inputs", [{}, {"$sticky": Missing("$inputs.user", "left out")}])
def test_split_whose_key_is_left_out_goes_one_way_at_random(inputs: dict[str, Any]) -> None:
    split = by_key(weights={"v1": 1, "v2": 1}, record="arm")
    runs = [drive(split, NODES, {"x": np.zeros(3), **inputs}, ["y", "arm"]) for _ in range(50)]
    assert {call.node for run in runs for call in run.calls} == {"v1", "v2"}
    assert all(run.outputs["arm"].tolist() == [run.calls[0].node] * 3 for run in runs)


def test_split_of_no_rows_calls_nobody() -> None:
    run = keyed(by_key(record="arm", mirror={"to": "v3"}), texts(), ["y", "arm"])
    assert run.calls == []
    assert (run.outputs["y"].shape, run.outputs["y"].dtype, run.outputs["arm"].shape) == ((0,), np.float32, (0,))


# --------------------------------------------------------------------------- record


def test_split_records_which_node_answered_where_it_is_asked_to() -> None:
    split = by_key(weights={"v1": 1, "v2": 1}, record="arm")
    run = keyed(split, texts(*map(str, range(20))), ["arm", "y"])
    assert run.outputs["arm"].tolist() == ["v1" if y == 1 else "v2" for y in run.outputs["y"]]
    assert set(run.outputs["arm"]) == {"v1", "v2"}
    assert all(call.wanted == ["y"] for call in run.calls)


def test_split_records_one_node_of_a_whole_request() -> None:
    scope = known()
    split = built(spec(record="arm"), scope)
    assert spec(record="arm").forms(scope.inputs, scope)["arm"] == form("string []")
    run = drive(split, NODES, {"x": np.zeros(3)}, ["arm"])
    assert (run.outputs["arm"].shape, run.outputs["arm"].item()) == ((), run.calls[0].node)


# --------------------------------------------------------------------------- mirror


def test_mirror_gets_its_share_of_requests_and_is_not_waited_for() -> None:
    split = built(spec(mirror={"to": "v3", "sample": "20%"}), known())
    calls = []
    for _ in range(2000):
        asked = split.steps({"x": np.zeros(3)}, ["y"]).send(None)
        calls += [call for call in asked.calls if call.node == "v3"]
    assert abs(len(calls) / 2000 - 0.2) < 0.03
    assert not any(call.waits for call in calls)


def test_mirror_that_fails_fails_nothing_and_its_answer_goes_nowhere() -> None:
    def broken(inputs: Any) -> Any:
        raise ConnectError("nobody is there")

    for sticky in (None, "$inputs.user"):
        split = built(spec(mirror={"to": "v3"}, sticky=sticky), known("string [N]" if sticky else None))
        for shadow in (broken, lambda inputs: {"z": np.zeros(99)}):
            inputs = {"x": np.zeros(30), **({"$sticky": texts(*map(str, range(30)))} if sticky else {})}
            run = drive(split, {**NODES, "v3": shadow}, inputs, ["y"])
            assert set(run.outputs["y"]) <= {1.0, 2.0}
            assert [len(call.inputs["x"]) for call in run.of("v3")] == [30]


def test_mirror_does_not_change_which_way_requests_go() -> None:
    ways = []
    for mirror in (None, {"to": "v3", "sample": 0.5}):
        split = built(spec(mirror=mirror), known())
        nodes = {**NODES, "v3": lambda inputs: {}}
        ways.append([drive(split, nodes, {"x": np.zeros(1)}, ["y"]).calls[0].node for _ in range(200)])
    assert ways[0] == ways[1]


# --------------------------------------------------------------------------- faults


def test_split_tells_its_edges_and_what_it_owns() -> None:
    it = spec(sticky="$inputs.user", mirror={"to": "v3"})
    assert [(at.name, at.needed) for at in it.edges()] == [("$sticky", False), ("x", True)]
    assert [tuple(owned) for owned in it.owned()] == [
        ("v1", ("weights", "v1")), ("v2", ("weights", "v2")), ("v3", ("mirror", "to"))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "scope", "fault"),
    [
        ({"sticky": "$inputs.user"}, known("float32 [N]"), "E106 sticky: '$inputs.user': expected a key of text"),
        ({"sticky": "$inputs.user"}, known("string [N, 2]"), "E107 sticky: '$inputs.user': expected one key"),
        ({"record": "y"}, known(), "E102 record: the alternatives have an output 'y' too"),
        ({"weights": {"v1": 1, "v3": 1}}, known(), "E110 weights.v3: alternatives must give the same"),
    ],
)
def test_split_names_each_fault(changes: dict[str, Any], scope: Known, fault: str) -> None:
    (found,) = faults_of(spec(**changes), scope)
    assert found.startswith(fault)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"weights": {"v1": 1, "v2": -1}}, "E112"),
        ({"weights": {"v1": 0, "v2": 0}}, "E112"),
        ({"weights": {"v1": float("inf")}}, "E112"),
        ({"weights": {}}, "E112"),
        ({"mirror": {"to": "v3", "sample": "120%"}}, "value_error"),
        ({"mirror": {"to": "v3", "sample": "many"}}, "value_error"),
    ],
)
def test_split_that_cannot_be_read_says_why(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(ValidationError) as caught:
        spec(**changes)
    assert caught.value.errors()[0]["type"] == code
