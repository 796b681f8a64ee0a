"""Every error travels: through the table of codes, through pickle and copy, and as text that says what to do."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from remote_ops import errors
from remote_ops.errors import (
    ANSWERS,
    BadStatus,
    CodecError,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    DecodeError,
    EncodeError,
    FramingError,
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
    SpecError,
    TransportError,
    answer_of,
    code_of,
    from_answer,
)

AT = "http://gpu1:9000/resnet"
EXAMPLES: list[RemoteOpsError] = [
    RemoteOpsError("m"),
    SpecError("m", path="fraud.yaml:14"),
    SignatureError("m", name="x", expected="float32 [2]", got="uint8 [3]", at=AT),
    CodecError("m"),
    EncodeError("m", dtype="complex64", shape=(2, 3)),
    DecodeError("m", offset=7, limit=9),
    TransportError("m"),
    ConnectError("m"),
    ConnectionLost("m"),
    DeadlineExceeded("m"),
    FramingError("m", status=431),
    BadStatus("m", status=502),
    RemoteError("m", code=77, endpoint=AT),
    *(
        cls("m", endpoint=AT)
        for cls in (ModelNotFound, ModelUnavailable, Overloaded, InvalidRequest, NotDifferentiable, InternalError)
    ),
    NodeError("m", node="blend", graph="fraud"),
]
TREE: dict[type[RemoteOpsError], tuple[type[Exception], ...]] = {
    SpecError: (RemoteOpsError, ValueError),
    SignatureError: (RemoteOpsError, ValueError),
    CodecError: (RemoteOpsError, ValueError),
    EncodeError: (CodecError,),
    DecodeError: (CodecError,),
    TransportError: (RemoteOpsError,),
    ConnectError: (TransportError, ConnectionError),
    ConnectionLost: (TransportError, ConnectionError),
    DeadlineExceeded: (TransportError, TimeoutError),
    FramingError: (TransportError,),
    BadStatus: (TransportError,),
    RemoteError: (RemoteOpsError,),
    ModelNotFound: (RemoteError,),
    ModelUnavailable: (RemoteError,),
    Overloaded: (RemoteError,),
    InvalidRequest: (RemoteError,),
    NotDifferentiable: (RemoteError,),
    InternalError: (RemoteError,),
    NodeError: (RemoteOpsError,),
}


@pytest.mark.parametrize("cls", TREE, ids=lambda cls: cls.__name__)
def test_an_error_is_what_the_tree_says(cls: type[RemoteOpsError]) -> None:
    assert cls.__bases__ == TREE[cls]


def test_every_error_is_in_the_tree_public_and_has_an_example() -> None:
    assert {cls.__name__ for cls in TREE} | {"RemoteOpsError"} == set(errors.__all__)
    assert {type(error) for error in EXAMPLES} == {*TREE, RemoteOpsError}


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("how", ["pickle", "old pickle", "copy", "deepcopy"])
def test_every_error_survives_pickle_and_copy_with_all_it_says(error: RemoteOpsError, how: str) -> None:
    made: dict[str, Any] = {
        "pickle": lambda: pickle.loads(pickle.dumps(error)),
        "old pickle": lambda: pickle.loads(pickle.dumps(error, protocol=2)),
        "copy": lambda: copy.copy(error),
        "deepcopy": lambda: copy.deepcopy(error),
    }
    again = made[how]()
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.args == error.args
    assert vars(again) == vars(error)


@pytest.mark.skipif(not hasattr(BaseException, "add_note"), reason="Python 3.11 has notes")
def test_a_note_survives_pickle() -> None:
    error = SpecError("m")
    error.add_note("seen on replica 2")  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["seen on replica 2"]


def test_messages_end_in_the_place_they_are_about() -> None:
    assert str(SpecError("no input 'x'", path="fraud.yaml:14")) == "no input 'x' - at fraud.yaml:14"
    assert str(SpecError("no input 'x'")) == "no input 'x'"
    assert str(SignatureError("input 'x': expected a, got b", at=AT)) == f"input 'x': expected a, got b - at {AT}"
    assert str(DecodeError("bad vector", offset=12)) == "bad vector - at byte 12"
    assert str(ModelNotFound("no model 'x'", endpoint=AT)) == f"no model 'x' - from {AT}"
    assert ModelNotFound("no model 'x'", endpoint=AT).message == "no model 'x'"


def test_codes_and_statuses_are_unique_and_every_remote_error_has_one() -> None:
    for column in ("error", "code", "status"):
        assert len({getattr(answer, column) for answer in ANSWERS}) == len(ANSWERS)
    assert all(answer.code > 0 and 400 <= answer.status < 600 for answer in ANSWERS)
    assert {answer.error for answer in ANSWERS} == {*RemoteError.__subclasses__(), DeadlineExceeded}


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.error.__name__)
def test_an_answer_and_its_error_are_each_others_inverse(answer: errors.ErrorRow) -> None:
    error = from_answer(answer.code, "why", endpoint=AT)
    assert type(error) is answer.error
    assert str(error) == f"why - from {AT}"
    assert answer_of(error) == answer
    assert code_of(type(error)) == answer.code


def test_an_unknown_code_gives_a_plain_remote_error_that_keeps_it() -> None:
    for code in (0, 2, 77, -5, 2**62):
        error = from_answer(code, "why", endpoint=AT)
        assert type(error) is RemoteError
        assert (error.code, error.message, error.endpoint) == (code, "why", AT)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (SignatureError("m"), InvalidRequest),
        (DecodeError("m"), InvalidRequest),
        (SpecError("m"), InvalidRequest),
        (FramingError("m"), InvalidRequest),
        (DeadlineExceeded("m"), DeadlineExceeded),
        (Overloaded("m"), Overloaded),
        (RemoteError("m"), InternalError),
        (ConnectError("m"), InternalError),
        (NodeError("m", node="n"), InternalError),
        (ValueError("m"), InternalError),
        (TimeoutError("m"), InternalError),
        (KeyboardInterrupt(), InternalError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value.__name__,
)
def test_a_server_answers_each_error_as_the_table_says(error: BaseException, expected: type) -> None:
    assert answer_of(error).error is expected


def test_a_subclass_is_answered_as_its_nearest_listed_parent() -> None:
    class QueueFull(Overloaded):
        pass

    assert answer_of(QueueFull("m")).error is Overloaded


def test_only_what_may_succeed_on_another_try_is_retryable() -> None:
    retryable = {type(error) for error in EXAMPLES if error.retryable}
    assert retryable == {ConnectError, ConnectionLost, ModelUnavailable, Overloaded}


@pytest.mark.parametrize("cls", [errors.DeadlineExceeded, errors.Overloaded, errors.ModelUnavailable])
def test_a_node_that_is_late_or_busy_makes_its_graph_so(cls: type[errors.RemoteOpsError]) -> None:
    failed = errors.NodeError("node 'a' failed", node="a")
    assert errors.answer_of(failed).error is errors.InternalError
    failed.__cause__ = cls("busy")
    assert errors.answer_of(failed).error is cls
    failed.__cause__ = errors.InvalidRequest("a fault of the graph, not of the caller")
    assert errors.answer_of(failed).error is errors.InternalError
