"""A cascade: only rows that a stage is not sure of go on, order is kept, and cost and stage are told."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from controlled import Known, Run, built, drive, faults_of, form, forms, texts
from pydantic import ValidationError

from ensemble.nodes.cascade import CascadeSpec, score_of
from ensemble.steps import Missing
from remote_ops.errors import ConnectError, DeadlineExceeded, NodeError, RemoteOpsError, SignatureError

STAGES: list[dict[str, Any]] = [
    {"use": "small", "accept": {"score": "max_prob", "tensor": "proba", "gte": 0.9}, "cost": 1},
    {"use": "big", "cost": 40},
]
CHILD = forms(proba="float32 [N, 2]", name="string [N]")
WANTED = ["proba", "name", "stage_used", "cost"]


def spec(**changes: Any) -> CascadeSpec:
    written = {"rows": "N", "stages": STAGES, "inputs": {"ids": "$inputs.ids", "table": "pre.table"}, **changes}
    return CascadeSpec.model_validate({"kind": "cascade", **written})


def known(**children: Any) -> Known:
    inputs = forms(ids="int64 [N]", table="float32 [4]")
    return Known(inputs, {"small": CHILD, "big": CHILD, "mid": CHILD, **children})


def node(place: int, certain: Any) -> Any:
    """Gives `[p, 1 - p]` of each id, `p` as `certain` says, and who answered."""

    def run(inputs: Any) -> Any:
        p = np.array([certain(one) for one in inputs["ids"]], np.float32)
        return {
            "proba": np.stack([p, 1 - p], 1).reshape(-1, 2),
            "name": texts(*[f"{place}:{one}" for one in inputs["ids"]]),
        }

    return run


def sixty_four(uncertain: int, **changes: Any) -> Run:
    chosen = set(np.random.default_rng(0).permutation(64)[:uncertain].tolist())
    nodes = {"small": node(0, lambda one: 0.6 if one in chosen else 0.95), "big": node(1, lambda one: 0.7)}
    cascade = built(spec(**changes), known())
    inputs = {"ids": np.arange(64), "table": np.ones(4, np.float32)}
    run = drive(cascade, nodes, inputs, WANTED)
    late = np.isin(np.arange(64), list(chosen))
    assert run.outputs["stage_used"].tolist() == late.astype(int).tolist()
    assert run.outputs["cost"].tolist() == np.where(late, 41.0, 1.0).tolist()
    assert run.outputs["name"].tolist() == [f"{int(one)}:{row}" for row, one in enumerate(late)]
    np.testing.assert_array_equal(run.outputs["proba"][:, 0], np.where(late, 0.7, 0.95).astype(np.float32))
    return run


# --------------------------------------------------------------------------- runs


def test_cascade_of_64_rows_with_10_uncertain_calls_the_big_model_once_with_10() -> None:
    run = sixty_four(10)
    assert [len(call.inputs["ids"]) for call in run.of("big")] == [10]
    assert len(run.of("small")) == 1
    assert (run.outputs["stage_used"].dtype, run.outputs["cost"].dtype) == (np.int64, np.float64)


def test_cascade_without_an_uncertain_row_never_calls_the_big_model_and_copies_nothing() -> None:
    run = sixty_four(0)
    assert run.of("big") == []
    assert run.outputs["proba"] is run.outcomes[0]["proba"]


def test_cascade_of_uncertain_rows_alone_sends_them_on_whole() -> None:
    run = sixty_four(64)
    assert run.of("big")[0].rows is None
    assert run.outputs["proba"] is run.outcomes[1]["proba"]


def test_cascade_cuts_what_has_its_rows_and_gives_on_the_rest_whole() -> None:
    (call,) = sixty_four(10).of("big")
    assert call.cut == ("ids",)
    assert call.inputs["table"].shape == (4,)


def test_cascade_equals_brute_force_over_three_stages() -> None:
    stages = [
        {"use": "small", "accept": {"score": "margin", "tensor": "proba", "gt": 0.5}, "cost": 1},
        {"use": "mid", "accept": {"score": "entropy", "tensor": "proba", "lte": 0.5}, "cost": 5},
        {"use": "big", "cost": 40},
    ]
    rng = np.random.default_rng(1)
    p = rng.uniform(0.5, 1, (3, 1000)).astype(np.float32)
    nodes = {
        name: node(place, lambda one, place=place: p[place, one]) for place, name in enumerate(("small", "mid", "big"))
    }
    cascade = built(spec(stages=stages), known())
    for _ in range(200):
        ids = rng.integers(0, 1000, int(rng.integers(1, 20)))
        run = drive(cascade, nodes, {"ids": ids, "table": np.ones(4, np.float32)}, WANTED)
        for row, one in enumerate(ids):
            q = p[:, one].astype(float)
            used = 0 if 2 * q[0] - 1 > 0.5 else 1 if -q[1] * np.log(q[1]) - (1 - q[1]) * np.log(1 - q[1]) <= 0.5 else 2
            assert run.outputs["name"][row] == f"{used}:{one}"
            assert run.outputs["stage_used"][row] == used
            assert run.outputs["cost"][row] == (1, 6, 46)[used]


def test_cascade_of_no_rows_calls_nobody() -> None:
    cascade = built(spec(), known())
    run = drive(cascade, {}, {"ids": np.arange(0), "table": np.ones(4, np.float32)}, WANTED)
    assert [run.outputs[name].shape for name in WANTED] == [(0, 2), (0,), (0,), (0,)]
    assert [run.outputs[name].dtype for name in WANTED] == [np.float32, object, np.int64, np.float64]


def test_cascade_of_no_rows_asks_its_first_stage_where_the_outputs_are_not_known() -> None:
    child = forms(proba="float32 [N, ?]", name="string [N]")
    cascade = built(spec(), known(small=child, big=child))
    nodes = {"small": lambda inputs: {"proba": np.zeros((0, 7), np.float32)}}
    run = drive(cascade, nodes, {"ids": np.arange(0), "table": np.ones(4, np.float32)}, ["proba", "cost"])
    assert run.outputs["proba"].shape == (0, 7)


def test_cascade_asks_a_stage_for_what_it_is_judged_by() -> None:
    cascade = built(spec(), known())
    nodes = {"small": node(0, lambda one: 0.1 * one), "big": node(1, lambda one: 1)}
    inputs = {"ids": np.arange(6), "table": np.ones(4, np.float32)}
    assert [call.wanted for call in drive(cascade, nodes, inputs, ["name", "cost"]).calls] == [
        ["name", "proba"],
        ["name"],
    ]
    assert [call.wanted for call in drive(cascade, nodes, inputs, ["stage_used"]).calls] == [["proba"], ["proba"]]


@pytest.mark.parametrize("bad", [np.zeros((5, 2), np.float32), np.zeros((), np.float32)])
def test_cascade_refuses_an_answer_with_other_rows(bad: Any) -> None:
    cascade = built(spec(), known())
    nodes = {"small": lambda inputs: {"proba": bad, "name": texts(*"abcdef")}}
    with pytest.raises(SignatureError, match="output 'proba' of 'small': expected 6 rows, as many as were sent"):
        drive(cascade, nodes, {"ids": np.arange(6), "table": np.ones(4)}, ["proba"])


def test_cascade_is_missing_where_a_stage_was_skipped() -> None:
    gone = Missing("big", "failed")
    nodes = {"small": node(0, lambda one: 0.6), "big": lambda inputs: {"proba": gone, "name": gone}}
    run = drive(built(spec(), known()), nodes, {"ids": np.arange(6), "table": np.ones(4)}, WANTED)
    assert [run.outputs[name] for name in WANTED] == [gone] * 4


def test_cascade_refuses_inputs_with_different_rows() -> None:
    scope = known()
    scope.inputs = {**scope.inputs, "more": form("int64 [N]")}
    with pytest.raises(SignatureError, match="input 'more': expected 6 rows, as 'ids' has, got int64"):
        drive(built(spec(), scope), {}, {"ids": np.arange(6), "more": np.arange(5)}, ["proba"])


# --------------------------------------------------------------------------- deadlines


def late(error: RemoteOpsError) -> Any:
    def run(inputs: Any) -> Any:
        raise error

    return run


@pytest.mark.parametrize("wrapped", [False, True])
def test_cascade_out_of_time_keeps_the_best_answers_so_far(wrapped: bool) -> None:
    error: RemoteOpsError = DeadlineExceeded("no time left")
    if wrapped:
        error, error.__cause__ = NodeError("'big' failed", node="big"), error
    cascade = built(spec(on_deadline="best_so_far"), known())
    nodes = {"small": node(0, lambda one: 0.95 if one % 2 else 0.6), "big": late(error)}
    run = drive(cascade, nodes, {"ids": np.arange(8), "table": np.ones(4)}, WANTED)
    assert run.outputs["name"].tolist() == [f"0:{one}" for one in range(8)]
    assert run.outputs["stage_used"].tolist() == [0] * 8
    assert run.outputs["cost"].tolist() == [1.0] * 8


def test_cascade_out_of_time_fails_unless_it_says_otherwise() -> None:
    nodes = {"small": node(0, lambda one: 0.6), "big": late(DeadlineExceeded("no time left"))}
    with pytest.raises(DeadlineExceeded):
        drive(built(spec(), known()), nodes, {"ids": np.arange(8), "table": np.ones(4)}, WANTED)


def test_cascade_fails_where_its_first_stage_is_out_of_time_or_a_later_one_fails_otherwise() -> None:
    cascade = built(spec(on_deadline="best_so_far"), known())
    inputs = {"ids": np.arange(8), "table": np.ones(4)}
    with pytest.raises(DeadlineExceeded):
        drive(cascade, {"small": late(DeadlineExceeded("no time left"))}, inputs, WANTED)
    with pytest.raises(ConnectError):
        drive(cascade, {"small": node(0, lambda one: 0.6), "big": late(ConnectError("gone"))}, inputs, WANTED)


# --------------------------------------------------------------------------- scores


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_scores_are_what_they_are_called(dtype: Any) -> None:
    p = np.array([[0.5, 0.25, 0.25], [0, 1, 0]], dtype)
    assert score_of("max_prob", p).tolist() == [0.5, 1.0]
    assert score_of("margin", p).tolist() == [0.25, 1.0]
    np.testing.assert_allclose(score_of("entropy", p).astype(float), [1.0397, 0], atol=2e-3)
    assert score_of("value", p[:, :1]).tolist() == [0.5, 0.0]


@pytest.mark.parametrize(("bound", "sure"), [("gte", "011"), ("gt", "001"), ("lte", "110"), ("lt", "100")])
def test_bounds_are_what_they_are_called_and_nan_is_never_sure(bound: str, sure: str) -> None:
    accept = spec(stages=[{"use": "small", "accept": {"score": "value", bound: 0.9}}, STAGES[1]]).stages[0].accept
    assert accept is not None
    assert accept.sure(np.array([0.1, 0.9, 1.5, np.nan], np.float32)).tolist() == [one == "1" for one in f"{sure}0"]


@pytest.mark.parametrize(
    ("score", "shape"), [("max_prob", (3,)), ("margin", (3, 1)), ("entropy", (3, 0)), ("value", (3, 2))]
)
def test_scores_refuse_shapes_that_have_none(score: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(SignatureError, match=f"score '{score}' has no meaning for float32"):
        score_of(score, np.zeros(shape, np.float32))


# --------------------------------------------------------------------------- faults


def stages(*, accept: Any = None, last: Any = None, first: Any = ...) -> dict[str, Any]:
    one = {**STAGES[0], "accept": first if first is not ... else {**STAGES[0]["accept"], **(accept or {})}}
    return {"stages": [one, {**STAGES[1], "accept": last}]}


@pytest.mark.parametrize(
    ("changes", "scope", "fault"),
    [
        (stages(first=None), known(), "E110 stages.0: stage 'small' needs an 'accept'"),
        (stages(last={"score": "value", "gt": 1}), known(), "E110 stages.1.accept: the last stage, 'big', takes every"),
        (stages(accept={"tensor": "prob"}), known(), "E103 stages.0.accept.tensor: 'small' has no output 'prob'; did"),
        (stages(accept={"tensor": None}), known(), "E103 stages.0.accept: 'small' gives proba, name: say which"),
        (stages(accept={"tensor": "name"}), known(), "E106 stages.0.accept: score 'max_prob' expects probabilities"),
        (stages(accept={"score": "value"}), known(), "E107 stages.0.accept: score 'value' expects [rows] or [rows, 1]"),
        ({"rows": "M"}, known(), "E107 rows: no input has 'M' on axis 0: there is ids: int64 [N], table"),
        ({}, known(big=forms(proba="float32 [N, 2]")), "E110 stages.1.use: alternatives must give the same"),
        ({}, known(big=forms(proba="float32 [N, 3]", name="string [N]")), "E110 stages.1.use: small.proba is"),
        (
            {},
            known(small={**CHILD, "cost": form("int64 [N]")}, big={**CHILD, "cost": form("int64 [N]")}),
            "E102 : output 'cost' is what a cascade tells",
        ),
    ],
)
def test_cascade_names_each_fault(changes: dict[str, Any], scope: Known, fault: str) -> None:
    found = faults_of(spec(**changes), scope)
    assert any(one.startswith(fault) for one in found), found


@pytest.mark.parametrize("bounds", [{}, {"gte": 0.5, "lt": 0.9}])
def test_accept_has_one_bound(bounds: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="expected one bound of gte, gt, lte and lt"):
        spec(stages=[{"use": "small", "accept": {"score": "value", **bounds}}, STAGES[1]])


def test_cascade_gives_its_stages_outputs_and_two_of_its_own() -> None:
    scope = known()
    assert spec().forms(scope.inputs, scope) == {**CHILD, **forms(stage_used="int64 [N]", cost="float64 [N]")}
