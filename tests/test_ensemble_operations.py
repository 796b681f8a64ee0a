"""What is done to an array on an edge: the forms, the numbers and the gradients of every operation."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from scipy import special

from ensemble.forms import UNKNOWN, Form
from ensemble.operations import NAMES, cast, operation
from remote_ops.errors import NotDifferentiable, SignatureError

RNG = np.random.default_rng(6)
F = "float64"


def applied(text: Any, array: np.ndarray) -> np.ndarray:
    """Apply one operation, and check on the way that its form told what came."""
    made, form = operation(text, Form(str(array.dtype), array.shape))
    given = made.run(array)
    assert form.dtype == str(given.dtype)
    assert form.dims == given.shape
    return given


def of_torch(text: Any, x: torch.Tensor) -> torch.Tensor:
    """The same in torch."""
    ((name, a),) = text.items() if isinstance(text, dict) else ((text, {}),)
    a = a if isinstance(a, dict) else {"axis": a} if a is not None else {}
    axis = a.get("axis", -1)
    dims, keep = a.get("axis", tuple(range(x.ndim))), a.get("keepdims", False)
    return {
        "softmax": lambda: torch.softmax(x, axis),
        "log_softmax": lambda: torch.log_softmax(x, axis),
        "l2_normalise": lambda: torch.nn.functional.normalize(x, dim=axis),
        "sigmoid": lambda: torch.sigmoid(x),
        "abs": lambda: torch.abs(x),
        "exp": lambda: torch.exp(x),
        "log": lambda: torch.log(x),
        "max": lambda: torch.amax(x, dims, keep),
        "min": lambda: torch.amin(x, dims, keep),
        "sum": lambda: torch.sum(x, dims, keep),
        "mean": lambda: torch.mean(x, dims, keep),
        "scale": lambda: x * a["by"] + a["add"],
        "clip": lambda: torch.clamp(x, a.get("low"), a.get("high")),
        "normalise": lambda: (
            (x - torch.tensor(a["mean"], dtype=x.dtype)[:, None]) / torch.tensor(a["std"], dtype=x.dtype)[:, None]
        ),
        "cast": lambda: x * 1,
        "transpose": lambda: x.permute(a.get("axes", tuple(range(x.ndim))[::-1])),
        "squeeze": lambda: x.squeeze(axis),
        "expand": lambda: x.unsqueeze(axis),
        "flatten": lambda: x.flatten(a.get("start", 1)),
        "reshape": lambda: x.reshape(x.shape[0], -1, 2),
        "slice": lambda: x[:, a["start"] : a["stop"]],
        "take": lambda: x.select(axis, a["index"]),
    }[name]()


SMOOTH: list[Any] = [
    *("softmax", "log_softmax", "l2_normalise", "sigmoid", "abs", "exp", "flatten", "transpose", "max", "mean"),
    *({name: {"axis": 1}} for name in ("softmax", "log_softmax", "l2_normalise")),
    *({name: {"axis": axis}} for name in ("max", "min", "sum", "mean") for axis in (1, -1, [0, 2])),
    *({name: {"axis": [2, 0], "keepdims": True}} for name in ("max", "min", "sum", "mean")),
    {"scale": {"by": 0.5, "add": 3}},
    *({"clip": bounds} for bounds in ({"low": -0.5, "high": 0.25}, {"low": 0.0}, {"high": 1})),
    {"normalise": {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0], "axis": 1}},
    {"cast": {"dtype": "float64"}},
    {"transpose": {"axes": [1, 2, 0]}},
    {"transpose": {"axes": [-1, 0, 1]}},
    *({"expand": {"axis": axis}} for axis in (0, 2, -1)),
    *({"flatten": {"start": start}} for start in (0, 1, -1)),
    {"reshape": {"shape": [0, -1, 2]}},
    {"slice": {"start": 1, "stop": 3, "axis": 1}},
    *({"take": {"index": index, "axis": 1}} for index in (0, -1)),
]


@pytest.mark.parametrize("text", SMOOTH, ids=str)
def test_numbers_and_gradients_are_those_of_torch(text: Any) -> None:
    x = RNG.normal(size=(4, 3, 4))
    x[0, 0, :2] = 0.75  # equal ones
    there = torch.tensor(x, requires_grad=True)
    wanted = of_torch(text, there)
    made, _ = operation(text, Form(F, x.shape))
    y = applied(text, x)
    np.testing.assert_allclose(y, wanted.detach().numpy(), rtol=1e-14, atol=1e-15)
    g = RNG.normal(size=y.shape)
    wanted.backward(torch.tensor(g))
    assert there.grad is not None
    np.testing.assert_allclose(made.vjp(x, y, g), there.grad.numpy(), rtol=1e-12, atol=1e-14)


def test_squeeze_and_log_are_those_of_torch() -> None:
    for text, shape in (({"squeeze": 1}, (3, 1, 2)), ("log", (3, 2))):
        x = RNG.uniform(0.5, 2, size=shape)
        there = torch.tensor(x, requires_grad=True)
        wanted = of_torch(text, there)
        y = applied(text, x)
        g = RNG.normal(size=y.shape)
        wanted.backward(torch.tensor(g))
        assert there.grad is not None
        np.testing.assert_allclose(y, wanted.detach().numpy(), rtol=1e-14)
        np.testing.assert_allclose(operation(text, UNKNOWN)[0].vjp(x, y, g), there.grad.numpy(), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("text", ["log", {"squeeze": 0}, *SMOOTH], ids=str)
def test_a_float_stays_the_float_it_is_and_so_does_its_gradient(text: Any, dtype: str) -> None:
    if text in ({"cast": {"dtype": "float64"}},):
        return
    shape = (1, 3) if text == {"squeeze": 0} else (4, 3, 4)
    x = RNG.uniform(0.25, 1, size=shape).astype(getattr(ml_dtypes, dtype, dtype))
    y = applied(text, x)
    made, _ = operation(text, UNKNOWN)
    assert y.dtype == x.dtype
    exact = applied(text, x.astype(np.float64))
    np.testing.assert_allclose(y.astype(np.float64), exact, rtol={"float32": 1e-5, "float16": 2e-3}.get(dtype, 2e-2))
    gradient = made.vjp(x, y, np.ones_like(y))
    assert (gradient.dtype, gradient.shape) == (x.dtype, x.shape)


@pytest.mark.parametrize("text", ["argmax", {"one_hot": 4}, {"threshold": {"gt": 0.5}}, {"cast": "int64"}], ids=str)
def test_what_has_no_derivative_says_so(text: Any) -> None:
    x = np.array([[1, 2], [3, 0]], np.int64 if text == {"one_hot": 4} else np.float64)
    y = applied(text, x)
    with pytest.raises(NotDifferentiable):
        operation(text, UNKNOWN)[0].vjp(x, y, np.ones(y.shape))


def test_an_integer_has_no_gradient() -> None:
    x = np.arange(4)
    with pytest.raises(NotDifferentiable, match="only floats have gradients"):
        operation({"cast": "float32"}, UNKNOWN)[0].vjp(x, x.astype(np.float32), np.ones(4, np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_large_numbers_do_not_overflow(dtype: str) -> None:
    largest = {"float16": 6e4, "bfloat16": 3e38, "float32": 3e38, "float64": 1e308}[dtype]
    x = np.array([[largest, 0.0, -largest], [-largest] * 3]).astype(getattr(ml_dtypes, dtype, dtype))
    third = np.float64(np.ones(1).astype(x.dtype)[0] / 3)
    np.testing.assert_allclose(
        applied("softmax", x).astype(np.float64), [[1, 0, 0], [third] * 3], rtol=4e-3 if "16" in dtype else 1e-6
    )
    assert np.array_equal(applied("sigmoid", x)[0].astype(np.float64), [1, 0.5, 0])
    assert np.isfinite(applied("l2_normalise", x).astype(np.float64)).all()
    assert applied("log_softmax", x)[0, 0] == 0


def test_softmax_is_that_of_scipy() -> None:
    x = RNG.normal(size=(8, 10)).astype(np.float32) * 50
    np.testing.assert_allclose(applied("softmax", x), special.softmax(x, -1), rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(applied("log_softmax", x), special.log_softmax(x, -1), rtol=1e-5)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "l2_normalise", "sigmoid", "abs", "exp", "log", "flatten"])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_nothing_in_is_nothing_out(name: str, shape: tuple[int, ...]) -> None:
    assert applied(name, np.empty(shape, np.float32)).shape == shape


def test_the_edges_of_functions_warn_of_nothing() -> None:
    x = np.array([0.0, -1.0, np.inf, -np.inf, np.nan], np.float32)
    for name in ("log", "exp", "softmax", "log_softmax", "l2_normalise", "sigmoid", "abs", "max"):
        made, _ = operation(name, UNKNOWN)
        made.vjp(x, y := made.run(x), np.ones_like(y))
    assert operation({"cast": "uint8"}, UNKNOWN)[0].run(x).dtype == np.uint8
    assert operation({"cast": "float16"}, UNKNOWN)[0].run(np.array([1e30])) == np.inf


def test_choices() -> None:
    x = np.array([[1, 3, 3], [2, 0, 1]], np.float32)
    assert applied("argmax", x).tolist() == [1, 0]
    assert applied({"argmax": {"axis": 0, "keepdims": True}}, x).tolist() == [[1, 0, 0]]
    assert applied({"threshold": {"gt": 1}}, x).tolist() == [[False, True, True], [True, False, False]]
    assert applied({"threshold": 1}, x).tolist() == applied({"threshold": {"gt": 1}}, x).tolist()
    assert applied({"threshold": {"lte": 1}}, x).tolist() == [[True, False, False], [False, True, True]]
    assert applied({"one_hot": 3}, np.array([2, 0], np.uint8)).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert applied({"one_hot": {"n": 300, "dtype": "int8"}}, np.array([44], np.uint8)).sum() == 1
    assert applied({"clip": [1, 2]}, np.array([0, 1, 5], np.int32)).tolist() == [1, 1, 2]


def test_a_bound_is_compared_in_the_dtype_of_the_numbers() -> None:
    assert not applied({"threshold": {"gt": 0.1}}, np.array([0.1], np.float32))[0]
    assert applied({"threshold": {"gte": 2**62}}, np.array([2**62 - 1, 2**62], np.int64)).tolist() == [False, True]
    assert applied({"threshold": {"gt": 300}}, np.array([255], np.uint8)).tolist() == [False]


def test_sums_of_integers_do_not_wrap() -> None:
    assert applied("sum", np.full(300, 200, np.uint8)) == 60_000
    assert applied("mean", np.array([1, 2], np.int32)) == 1.5
    assert applied("sum", np.ones(3, bool)) == 3
    assert applied("max", np.array([1, 2], np.int8)).dtype == np.int8


@pytest.mark.parametrize(
    "text",
    [
        *("flatten", "transpose", {"squeeze": 1}, {"expand": 0}, {"reshape": [0, -1]}, {"slice": {"start": 1}}),
        *({"take": 0}, {"cast": "float32"}),
    ],
    ids=str,
)
def test_numbers_in_other_places_are_a_view(text: Any) -> None:
    x = RNG.normal(size=(4, 1, 6)).astype(np.float32)
    assert np.shares_memory(applied(text, x), x)


@pytest.mark.parametrize("text", SMOOTH, ids=str)
def test_no_operation_writes_into_what_it_is_given(text: Any) -> None:
    x = RNG.uniform(size=(4, 3, 4))
    x.flags.writeable = False
    made, _ = operation(text, UNKNOWN)
    g = np.ones_like(y := made.run(x))
    g.flags.writeable = False
    y.flags.writeable = False
    made.vjp(x, y, g)


def test_strings_move_as_numbers_do() -> None:
    x = np.array([["a", "b"], [b"c", "d"]], object)
    made, form = operation({"transpose": [1, 0]}, Form("string", ("N", 2)))
    assert form == Form("string", (2, "N"))
    assert made.run(x).tolist() == [["a", b"c"], ["b", "d"]]
    assert operation("flatten", UNKNOWN)[0].run(np.array([["a"]])).tolist() == [["a"]]


N4 = Form("float32", ("N", 4))
CHW = Form("float32", ("N", 3, "H", "W"))


@pytest.mark.parametrize(
    ("text", "form", "wanted"),
    [
        ("softmax", N4, N4),
        ("argmax", N4, Form("int64", ("N",))),
        ({"argmax": {"axis": 1, "keepdims": True}}, CHW, Form("int64", ("N", 1, "H", "W"))),
        ({"transpose": [0, 2, 3, 1]}, CHW, Form("float32", ("N", "H", "W", 3))),
        ("transpose", CHW, Form("float32", ("W", "H", 3, "N"))),
        ({"mean": {"axis": [2, 3]}}, CHW, Form("float32", ("N", 3))),
        ({"mean": [2, 3]}, CHW, Form("float32", ("N", 3))),
        ("sum", N4, Form("float32", ())),
        ("sum", Form("uint8", ("N",)), Form("uint64", ())),
        ("mean", Form("bool", ("N",)), Form("float64", ())),
        ({"one_hot": 5}, Form("int32", ("N",)), Form("float32", ("N", 5))),
        ({"squeeze": 1}, Form("string", ("N", 1)), Form("string", ("N",))),
        ({"squeeze": [1, -1]}, Form("int8", ("N", "K", 1)), Form("int8", ("N",))),
        ({"expand": -1}, N4, Form("float32", ("N", 4, 1))),
        ("flatten", CHW, Form("float32", ("N", None))),
        ("flatten", Form("float32", ("N", 1, "K")), Form("float32", ("N", "K"))),
        ("flatten", Form("float32", ("N",)), Form("float32", ("N", 1))),
        ("flatten", Form("float32", ("N", 3, 4)), Form("float32", ("N", 12))),
        ({"reshape": [0, 2, -1]}, N4, Form("float32", ("N", 2, 2))),
        ({"reshape": [-1, 2]}, N4, Form("float32", (None, 2))),
        ({"reshape": [0, -1]}, CHW, Form("float32", ("N", None))),
        ({"reshape": [0, 1, -1]}, Form("int8", ("N", "K")), Form("int8", ("N", 1, "K"))),
        ({"slice": {"stop": 2, "axis": 1}}, N4, Form("float32", ("N", 2))),
        ({"slice": {"start": -1, "axis": 1}}, N4, Form("float32", ("N", 1))),
        ({"slice": {"start": 1}}, N4, Form("float32", (None, 4))),
        ({"slice": {"start": 0}}, N4, Form("float32", ("N", 4))),
        ({"take": 1}, N4, Form("float32", ("N",))),
        ({"threshold": {"gt": 0.5}}, N4, Form("bool", ("N", 4))),
        ({"cast": "bfloat16"}, Form("uint8", ("N",)), Form("bfloat16", ("N",))),
        ("softmax", UNKNOWN, UNKNOWN),
        ("argmax", UNKNOWN, Form("int64", None)),
        ({"reshape": [2, 0, -1]}, UNKNOWN, Form(None, (2, None, None))),
        ({"normalise": [0.5, [0.1, 0.2, 0.3, 0.4]]}, N4, N4),
    ],
    ids=str,
)
def test_forms_keep_their_symbols(text: Any, form: Form, wanted: Form) -> None:
    assert operation(text, form)[1] == wanted


@pytest.mark.parametrize(
    ("text", "form", "words"),
    [
        ("sofmax", N4, ["no operation 'sofmax'", "did you mean 'softmax'?"]),
        ("softmax(axis=1)", N4, ["no operation 'softmax(axis=1)'", "{softmax: {NAME: VALUE}}"]),
        ({"softmax": {"axes": 1}}, N4, ["softmax has no argument 'axes'", "did you mean 'axis'?"]),
        ({"softmax": {"axis": "1"}}, N4, ["softmax: 'axis': should be a valid integer, got '1'"]),
        ({"softmax": {"axis": True}}, N4, ["softmax: 'axis'", "got True"]),
        ({"softmax": [1, 2]}, N4, ["expected at most 1 arguments (axis), got 2"]),
        ({"softmax": 2}, N4, ["softmax(axis=2): axis 2 is not in float32 [N, 4]"]),
        ({"a": 1, "b": 2}, N4, ["expected an operation's name, or {NAME: ARGUMENTS}"]),
        ("one_hot", Form("int64", ("N",)), ["one_hot needs 'n': expected n, dtype"]),
        ({"one_hot": 0}, Form("int64", ("N",)), ["'n': should be greater than 0, got 0"]),
        ({"one_hot": {"n": 2, "dtype": "float31"}}, Form("int8", ()), ["no dtype 'float31'", "'float32'?"]),
        ({"one_hot": 3}, N4, ["expected integers, got float32 [N, 4]"]),
        ("softmax", Form("int64", ("N", 4)), ["softmax: expected floats, got int64 [N, 4]", "cast first"]),
        ("abs", Form("string", ("N",)), ["abs: expected numbers other than bool, got string [N]"]),
        ({"transpose": [0, 1, 2]}, N4, ["expected 2 axes for float32 [N, 4], got 3"]),
        ({"transpose": [0, 0]}, N4, ["name one axis twice"]),
        ({"squeeze": 1}, N4, ["expected size 1 on axis 1, got float32 [N, 4]"]),
        ("squeeze", N4, ["squeeze needs 'axis'"]),
        ({"expand": 3}, N4, ["axis 3 is not in"]),
        ({"reshape": [0, 3]}, N4, ["has not the right size for shape [0, 3]"]),
        ({"reshape": [-1, -1]}, N4, ["-1 at most once"]),
        ({"reshape": [1, 1, 0]}, N4, ["keeps an axis that is not in"]),
        ({"take": 4}, N4, ["index 4 is not on axis -1 of float32 [N, 4]"]),
        ({"argmax": 0}, Form("float32", (0, 4)), ["expected one value or more along axis 0"]),
        ({"clip": {}}, N4, ["expected low, high or both"]),
        ({"clip": [2, 1]}, N4, ["expected low <= high, got low 2 and high 1"]),
        ({"clip": [0, 300]}, Form("uint8", ()), ["expected bounds that are uint8, got 300"]),
        ({"clip": [0.5, 1]}, Form("uint8", ()), ["expected bounds that are uint8, got 0.5"]),
        ({"threshold": {}}, N4, ["expected one of gt, gte, lt, lte, got none"]),
        ({"threshold": {"gt": 1, "lt": 2}}, N4, ["got gt, lt"]),
        ({"normalise": {"mean": [1, 2, 3], "std": 1}}, N4, ["expected 4 values for axis -1", "got 3"]),
        ({"normalise": {"mean": 0, "std": 0}}, N4, ["'std': should be greater than 0, got 0"]),
        ({"cast": "float31"}, N4, ["no dtype 'float31'", "did you mean 'float32'?"]),
        ({"cast": "string"}, N4, ["expected a string, got float32"]),
        ({"cast": "int8"}, Form("string", ("N",)), ["expected numbers, got string"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said_before_a_run(text: Any, form: Form, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        operation(text, form)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "array", "words"),
    [
        ("softmax", np.zeros((2, 3), np.int64), "softmax: expected floats, got int64 [2, 3]"),
        ({"softmax": 2}, np.zeros((2, 3), np.float32), "axis 2 is not in float32 [2, 3]"),
        ({"squeeze": 0}, np.zeros((2, 3)), "expected size 1 on axis 0, got float64 [2, 3]"),
        ({"reshape": [0, 2, -1]}, np.zeros((2, 3)), "not the right size"),
        ({"take": 3}, np.zeros((2, 3)), "index 3 is not on axis -1"),
        ({"one_hot": 3}, np.array([0, 3]), "one_hot(n=3): expected labels from 0 to 2, got 3"),
        ({"one_hot": 3}, np.array([-1, 3]), "got -1"),
        ("max", np.zeros((0, 3)), "expected one value or more"),
    ],
    ids=str,
)
def test_what_was_not_known_before_is_checked_when_it_comes(text: Any, array: np.ndarray, words: str) -> None:
    made, _ = operation(text, UNKNOWN)
    with pytest.raises(SignatureError) as caught:
        made.run(array)
    assert words in str(caught.value)


def test_a_cast_is_an_operation_too() -> None:
    made, form = cast("float16", N4)
    assert form == Form("float16", ("N", 4))
    assert str(made) == "cast(float16)"
    assert str(operation({"softmax": 1}, N4)[0]) == "softmax(axis=1)"
    assert str(operation("softmax", N4)[0]) == "softmax"


def test_every_operation_is_tried_here() -> None:
    tried = {text if isinstance(text, str) else next(iter(text)) for text in SMOOTH}
    assert set(NAMES) == tried | {"log", "squeeze", "argmax", "one_hot", "threshold"}
