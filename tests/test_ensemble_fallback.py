"""A fallback: which failures lead to the next node, and which fail at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from controlled import Known, built, drive, faults_of, form, forms
from pydantic import ValidationError

from ensemble.nodes.fallback import FallbackSpec, failures_of
from ensemble.steps import Missing
from remote_ops.errors import (
    BadStatus,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    DecodeError,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    ModelUnavailable,
    NodeError,
    NotDifferentiable,
    Overloaded,
    RemoteError,
    RemoteOpsError,
    SignatureError,
)

CHILDREN = dict.fromkeys(("gpu", "cpu", "last"), forms(y="float32 [N]"))


def spec(**changes: Any) -> FallbackSpec:
    return FallbackSpec.model_validate({"kind": "fallback", "try": ["gpu", "cpu"], **changes})


def known() -> Known:
    return Known({"x": form("float32 [N]")}, CHILDREN)


def raising(error: RemoteOpsError) -> Any:
    def run(inputs: Any) -> Any:
        raise error

    return run


def answer(inputs: Any) -> Any:
    return {"y": inputs["x"]}


def of_node(error: RemoteOpsError) -> NodeError:
    outer = NodeError("'gpu' failed", node="gpu")
    outer.__cause__ = error
    return outer


LED_ON = [
    ConnectError("refused"),
    ConnectionLost("lost"),
    DeadlineExceeded("late"),
    Overloaded("full"),
    ModelUnavailable("loading"),
    BadStatus("no", status=429),
    BadStatus("no", status=502),
    BadStatus("no", status=503),
    BadStatus("no", status=504),
]
AT_ONCE = [
    InvalidRequest("bad input"),
    SignatureError("bad input"),
    ModelNotFound("which?"),
    NotDifferentiable("no"),
    InternalError("raised"),
    DecodeError("no message"),
    BadStatus("no", status=400),
    BadStatus("no", status=404),
    RemoteError("who knows", code=99),
]


@pytest.mark.parametrize("error", [*LED_ON, *map(of_node, LED_ON)], ids=repr)
def test_fallback_takes_the_next_node_where_one_is_down_late_or_busy(error: RemoteOpsError) -> None:
    x = np.zeros(3, np.float32)
    run = drive(built(spec(), known()), {"gpu": raising(error), "cpu": answer}, {"x": x}, ["y"])
    assert [call.node for call in run.calls] == ["gpu", "cpu"]
    assert run.outputs["y"] is x


@pytest.mark.parametrize("error", [*AT_ONCE, *map(of_node, AT_ONCE)], ids=repr)
def test_fallback_fails_at_once_where_another_node_would_fail_too(error: RemoteOpsError) -> None:
    with pytest.raises(type(error)) as caught:
        drive(built(spec(), known()), {"gpu": raising(error)}, {"x": np.zeros(3)}, ["y"])
    assert caught.value is error


def test_fallback_does_not_call_the_next_node_where_the_first_answers() -> None:
    run = drive(built(spec(), known()), {"gpu": answer}, {"x": np.zeros(3), "$own": np.zeros(1)}, ["y"])
    assert [(call.node, call.wanted, set(call.inputs)) for call in run.calls] == [("gpu", ["y"], {"x"})]


@pytest.mark.parametrize(
    ("when", "error", "leads_on"),
    [
        (["timeout", "overloaded", "connect"], BadStatus("no", status=503), True),
        (["timeout", "overloaded", "connect"], ConnectionLost("lost"), False),
        (["overloaded"], ModelUnavailable("loading"), True),
        (["unavailable"], Overloaded("full"), False),
        (["timeout"], ConnectError("refused"), False),
        (["internal"], InternalError("raised"), True),
        ([503], ModelUnavailable("loading"), True),
        ([503], Overloaded("full"), False),
        ([404, "connect"], ModelNotFound("which?"), True),
        ([504], DeadlineExceeded("late"), True),
    ],
)
def test_when_lists_what_leads_on(when: list[Any], error: RemoteOpsError, leads_on: bool) -> None:
    nodes = {"gpu": raising(error), "cpu": answer}
    if leads_on:
        drive(built(spec(when=when), known()), nodes, {"x": np.zeros(3)}, ["y"])
    else:
        with pytest.raises(type(error)):
            drive(built(spec(when=when), known()), nodes, {"x": np.zeros(3)}, ["y"])


def test_fallback_that_runs_out_of_nodes_raises_the_last_error_and_keeps_the_others() -> None:
    first, second, third = ConnectError("1"), Overloaded("2"), of_node(DeadlineExceeded("3"))
    nodes = {"gpu": raising(first), "cpu": raising(second), "last": raising(third)}
    with pytest.raises(NodeError) as caught:
        drive(built(spec(**{"try": ["gpu", "cpu", "last"]}), known()), nodes, {"x": np.zeros(3)}, ["y"])
    assert caught.value is third
    assert third.__cause__ is not None
    assert third.__cause__.__context__ is second
    assert second.__context__ is first


def test_fallback_takes_the_next_node_where_one_was_skipped() -> None:
    nodes = {"gpu": lambda inputs: {"y": Missing("gpu", "failed")}, "cpu": answer}
    x = np.zeros(3)
    assert drive(built(spec(), known()), nodes, {"x": x}, ["y"]).outputs["y"] is x


def test_fallback_whose_last_node_was_skipped_has_no_answer() -> None:
    gone = Missing("cpu", "failed")
    nodes = {"gpu": raising(ConnectError("refused")), "cpu": lambda inputs: {"y": gone}}
    assert drive(built(spec(), known()), nodes, {"x": np.zeros(3)}, ["y"]).outputs["y"] is gone


def test_failure_has_the_words_of_what_ended_it() -> None:
    assert failures_of(of_node(of_node(DeadlineExceeded("late")))) == {"timeout", 504}
    assert failures_of(NodeError("no cause", node="gpu")) == frozenset()


def test_fallback_names_alternatives_that_differ() -> None:
    scope = Known({}, {"gpu": forms(y="float32 [N]"), "cpu": forms(y="float16 [N]")})
    (found,) = faults_of(spec(), scope)
    assert found.startswith("E110 try.1: gpu.y is float32 [N], cpu.y is float16 [N]")


def test_fallback_agrees_with_a_node_of_which_nothing_is_known() -> None:
    scope = Known({}, {"gpu": {}, "cpu": forms(y="float16 [N]")})
    assert spec().forms({}, scope) == forms(y="float16 [N]")
    assert scope.faults.all == []


@pytest.mark.parametrize("changes", [{"try": ["gpu"]}, {"when": []}, {"when": ["slow"]}, {"when": [200]}])
def test_fallback_that_cannot_be_read_says_why(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        spec(**changes)


def test_fallback_is_read_as_the_notes_write_it() -> None:
    it = spec(when=["timeout", "overloaded", "connect"])
    assert [tuple(owned) for owned in it.owned()] == [("gpu", ("try", 0)), ("cpu", ("try", 1))]
