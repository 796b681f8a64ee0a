"""Pieces put together, and gradients taken apart and together again, against sums row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ensemble.assembly import assemble, gather, scatter
from ensemble.rows import apart, call_of, joined
from ensemble.steps import Array, Assembly, Call, Missing, Piece
from remote_ops.errors import SignatureError

DTYPES = [np.float32, np.float64, np.int64, np.bool_, ml_dtypes.bfloat16, object]


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Array:
    numbers = rng.integers(0, 9, shape)
    if dtype is object:
        return np.array([*map(str, numbers.ravel()), None], object)[:-1].reshape(shape)
    return numbers.astype(dtype)


def parts_of(rng: np.random.Generator, rows: int, parts: int) -> list[Array]:
    """Rows dealt out to at most so many parts, each in ascending order."""
    owner = rng.integers(0, parts, rows)
    return [found for part in range(parts) if (found := np.flatnonzero(owner == part)).size]


# --------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("dtype", DTYPES)
def test_assemble_equals_a_loop_over_rows(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows, item = int(rng.integers(1, 12)), tuple(rng.integers(0, 4, int(rng.integers(0, 3))).tolist())
        puts = parts_of(rng, rows, 3)
        outcomes, pieces, expected = [], [], [None] * rows
        for number, put in enumerate(puts):
            more = int(rng.integers(0, 3))  # rows that are answered and not taken
            take = np.sort(rng.permutation(len(put) + more)[: len(put)])
            outcomes.append({"theirs": random(rng, (len(put) + more, *item), dtype)})
            pieces.append(Piece(number, take if more else None, put, {"y": "theirs"}))
            for row, source in zip(put, take, strict=True):
                expected[row] = outcomes[-1]["theirs"][source].tolist() if item else outcomes[-1]["theirs"][source]
        found: Any = assemble(Assembly(pieces, rows), outcomes, ["y"])["y"]
        assert (found.shape, found.dtype) == ((rows, *item), np.dtype(dtype))
        assert found.tolist() == expected


@pytest.mark.parametrize("rows", [None, 4])
def test_assemble_hands_on_one_whole_piece_without_a_copy(rows: int | None) -> None:
    y = np.zeros((4, 2))
    found = assemble(Assembly([Piece(1)], rows), [{}, {"y": y}], ["y"])
    assert found["y"] is y


def test_assemble_gives_extra_outputs_and_those_of_nothing() -> None:
    stage, empty = np.zeros(0, np.int64), np.zeros((0, 3), np.float32)
    found = assemble(Assembly((), 0, {"stage": stage}, {"y": empty}), [], ["stage", "y"])
    assert found["stage"] is stage
    assert found["y"] is empty


def test_assemble_is_missing_where_a_piece_is() -> None:
    gone = Missing("a", "failed")
    pieces = [Piece(0, put=slice(0, 1)), Piece(1, put=slice(1, 2))]
    assert assemble(Assembly(pieces, 2), [{"y": np.zeros(1)}, {"y": gone}], ["y"])["y"] is gone


def test_assemble_passes_over_the_answers_of_mirrors_and_errors() -> None:
    y = np.arange(2)
    pieces = [Piece(1, put=slice(0, 1)), Piece(3, put=slice(1, 2))]
    outcomes = [SignatureError("no"), {"y": y[:1]}, {}, {"y": y[1:]}]
    assert assemble(Assembly(pieces, 2), outcomes, ["y"])["y"].tolist() == [0, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("pieces", "values", "words"),
    [
        ([Piece(0)], [np.zeros(3)], r"expected 4 rows, as many as were sent, got float64 \[3\]"),
        ([Piece(0)], [np.zeros(())], r"expected 4 rows, as many as were sent, got float64 \[\]"),
        ([Piece(0, put=slice(0, 2))], [np.zeros(2)], "expected 4 rows, got 2"),
        ([Piece(0, np.array([0, 5]), np.array([0, 1]))], [np.zeros(4)], "expected 2 rows, as many as were sent"),
        (
            [Piece(0, put=slice(0, 2)), Piece(1, put=slice(2, 4))],
            [np.zeros(2), np.zeros(2, np.float32)],
            r"differ in dtype or item: float64 \[2\] and float32 \[2\]",
        ),
        (
            [Piece(0, put=slice(0, 2)), Piece(1, put=slice(2, 4))],
            [np.zeros((2, 3)), np.zeros((2, 4))],
            r"differ in dtype or item: float64 \[2, 3\] and float64 \[2, 4\]",
        ),
        ([Piece(0, put=slice(0, 4), items=True)], [np.zeros(6)], "4 items were sent as one chunk"),
    ],
)
def test_assemble_names_an_output_whose_pieces_do_not_fit(pieces: Any, values: Sequence[Array], words: str) -> None:
    with pytest.raises(SignatureError, match=words) as caught:
        assemble(Assembly(pieces, 4), [{"y": value} for value in values], ["y"])
    assert isinstance(caught.value, ValueError)


def test_assemble_takes_texts_of_any_width() -> None:
    pieces = [Piece(0, put=slice(0, 1)), Piece(1, put=slice(1, 2))]
    found: Any = assemble(Assembly(pieces, 2), [{"y": np.array(["a"])}, {"y": np.array(["long"])}], ["y"])["y"]
    assert (found.dtype, found.tolist()) == (object, ["a", "long"])


# --------------------------------------------------------------------------- items


@pytest.mark.parametrize("shape", [(1,), (1, 3), (1, 0, 2), (4, 3), (4, 1, 2), (4, 0, 2), (3, 2, 0)])
def test_items_joined_come_apart_again(shape: tuple[int, ...]) -> None:
    part = np.arange(np.prod(shape)).reshape(shape)
    whole = joined(part)
    assert whole.shape == (shape[1:] if shape[0] == 1 else (shape[0] * shape[1], *shape[2:]))
    np.testing.assert_array_equal(apart(whole, shape[0]), part)


def test_items_of_one_value_cannot_be_joined() -> None:
    with pytest.raises(SignatureError, match="chunk: 1"):
        joined(np.zeros(3))
    assert joined(np.zeros(1)).shape == ()


# --------------------------------------------------------------------------- gradients

# Each call computes y = A(call) x_rows * w for rows x and a whole w, so that every gradient is known in closed form.


def forward(call: Call, scale: float) -> dict[str, Array]:
    return {"y": call.inputs["x"] * scale * call.inputs["w"]}


def backward(call: Call, scale: float, cotangents: Mapping[str, Array]) -> dict[str, Array]:
    if "y" not in cotangents:
        return {}
    dy = cotangents["y"]
    assert dy.shape == call.inputs["x"].shape
    dw = (dy * scale * call.inputs["x"]).reshape(-1, 3).sum(0)
    return {"x": dy * scale * call.inputs["w"], "w": dw}


def check(calls: list[Call], assembly: Assembly, inputs: Mapping[str, Array], scales: Array, used: Array) -> None:
    """Forward and backward through the pieces against the same rows by hand; `used` has the call of each row."""
    rng = np.random.default_rng(1)
    found: Any = assemble(assembly, [forward(call, scales[n]) for n, call in enumerate(calls)], ["y"])["y"]
    by_row = scales[used].reshape(-1, *[1] * (inputs["x"].ndim - 1))
    np.testing.assert_allclose(found, inputs["x"] * by_row * inputs["w"])
    dy = rng.normal(size=found.shape)
    apart_ = scatter(assembly, calls, {"y": dy, **{name: np.ones(len(dy)) for name in assembly.extra}})
    gradients = [backward(call, scales[n], apart_[n]) for n, call in enumerate(calls)]
    whole = gather(calls, gradients, inputs)
    np.testing.assert_allclose(whole["x"], dy * by_row * inputs["w"])
    np.testing.assert_allclose(whole["w"], (dy * by_row * inputs["x"]).reshape(-1, 3).sum(0))


def data(rng: np.random.Generator, rows: int) -> dict[str, Array]:
    return {"x": rng.normal(size=(rows, 3)), "w": rng.normal(size=3)}


def test_gradients_of_rows_that_went_their_own_ways_equal_a_loop() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        rows = int(rng.integers(1, 12))
        inputs, puts = data(rng, rows), parts_of(rng, rows, 4)
        calls = [call_of("n", inputs, ["x"], put, None) for put in puts]
        used = np.zeros(rows, int)
        for number, put in enumerate(puts):
            used[put] = number
        pieces = [Piece(number, put=put) for number, put in enumerate(puts)]
        check(calls, Assembly(pieces, rows), inputs, rng.normal(size=4), used)


def test_gradients_of_a_cascade_flow_to_the_stage_that_answered_each_row() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        rows = int(rng.integers(1, 12))
        inputs, stage = data(rng, rows), rng.integers(0, 3, rows)
        calls, pieces, left = [], [], np.arange(rows)
        for place in range(3):
            cut = None if len(left) == rows else left
            calls.append(call_of("n", inputs, ["x"], cut, None))
            sure = np.flatnonzero(stage[left] == place)
            if sure.size:
                pieces.append(Piece(place, sure, left[sure]))
            left = left[stage[left] != place]
            if not left.size:
                break
        extra = {"stage": stage}
        check(calls, Assembly(pieces, rows, extra), inputs, rng.normal(size=3), stage)


def test_gradients_of_a_call_in_two_pieces_add_up() -> None:
    inputs = data(np.random.default_rng(0), 5)
    calls = [call_of("n", inputs, ["x"], None, None)]
    pieces = [Piece(0, np.array([0, 3]), np.array([0, 3])), Piece(0, np.array([1, 2, 4]), np.array([1, 2, 4]))]
    check(calls, Assembly(pieces, 5), inputs, np.array([2.0]), np.zeros(5, int))


@pytest.mark.parametrize("chunk", [1, 3, 20])
@pytest.mark.parametrize("items", [True, False])
def test_gradients_of_a_map_equal_a_loop(chunk: int, items: bool) -> None:
    rng = np.random.default_rng(0)
    for rows in (1, 2, 7, 9):
        inputs = {"x": rng.normal(size=(rows, 2, 3)), "w": rng.normal(size=3)}
        spans = [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]
        calls = [call_of("body", inputs, ["x"], span, None, items=items) for span in spans]
        pieces = [Piece(number, put=span, items=items) for number, span in enumerate(spans)]
        check(calls, Assembly(pieces, rows), inputs, rng.normal(size=len(spans)), np.arange(rows) // chunk)


def test_gradients_of_one_whole_call_are_handed_on_without_a_copy() -> None:
    inputs, dy = data(np.random.default_rng(0), 4), np.zeros((4, 3))
    calls = [Call("mirror", inputs, waits=False), Call("n", inputs)]
    apart_ = scatter(Assembly([Piece(1, names={"y": "theirs"})]), calls, {"y": dy})
    assert apart_[0] == {}
    assert apart_[1]["theirs"] is dy
    assert gather(calls, [{}, {"x": dy}], inputs)["x"] is dy


def test_gather_never_writes_into_what_it_was_given() -> None:
    rng = np.random.default_rng(0)
    inputs = data(rng, 4)
    calls = [Call("a", inputs), call_of("b", inputs, ["x"], np.array([1, 3]), None), Call("c", inputs)]
    given = [{"x": np.ones((4, 3)), "w": np.ones(3)}, {"x": np.ones((2, 3)), "w": np.ones(3)}, {"x": np.ones((4, 3))}]
    for gradients in given:
        for gradient in gradients.values():
            gradient.flags.writeable = False
    whole = gather(calls, given, inputs)
    assert whole["x"][:, 0].tolist() == [2, 3, 2, 3]
    assert whole["w"].tolist() == [2, 2, 2]


def test_gather_leaves_out_inputs_that_have_no_gradient() -> None:
    assert gather([Call("a", {"x": np.zeros(3)})], [{}], {"x": np.zeros(3)}) == {}
    assert gather([], [], {"x": np.zeros((0, 3))}) == {}


def test_gradients_keep_the_dtype_of_bfloat16() -> None:
    x = np.zeros((3, 2), ml_dtypes.bfloat16)
    calls = [call_of("a", {"x": x}, ["x"], np.array([0, 2]), None), call_of("b", {"x": x}, ["x"], slice(1, 2), None)]
    pieces = [Piece(0, put=np.array([0, 2])), Piece(1, put=slice(1, 2))]
    apart_ = scatter(Assembly(pieces, 3), calls, {"y": x + 1})
    assert gather(calls, [{"x": one["y"]} for one in apart_], {"x": x})["x"].tolist() == [[1, 1]] * 3
