"""A signature says what fits before a byte is sent, and names what does not."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from remote_ops.errors import NotDifferentiable, SignatureError, SpecError
from remote_ops.signature import BY_NUMPY, DTYPES, STORED, Signature, TensorSpec, describe, parse_spec

AT = "http://gpu1:9000/resnet"
PIXELS = TensorSpec("pixels", "float32", (-1, 3, 4, 4))
SIGNATURE = Signature(
    (PIXELS, TensorSpec("mask", "bool", (-1,))),
    (TensorSpec("logits", "float32", (-1, 10)), TensorSpec("probs", "float64", ())),
    name="resnet",
)


# --------------------------------------------------------------------------- the table of dtypes


def test_the_table_holds_the_twelve_wire_types_and_the_bit_views() -> None:
    plain = {row.wire_type: row.name for row in DTYPES.values() if not row.is_bit_view}
    assert sorted(plain) == list(range(1, 13))
    assert set(STORED) == set(plain)
    for row in DTYPES.values():
        assert row.stored == STORED[row.wire_type]
        assert row.numpy.itemsize == row.stored.itemsize
        assert BY_NUMPY[row.numpy] is row
    views = {row.name for row in DTYPES.values() if row.is_bit_view}
    assert {"bool", "bfloat16", "float8_e4m3fn", "float8_e5m2"} <= views


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("float32", "float32"), (np.float32, "float32"), (np.dtype(">f4"), "float32"), ("<i8", "int64"), (bool, "bool"),
        (float, "float64"), (object, "string"), ("string", "string"), ("any", "any"), (ml_dtypes.bfloat16, "bfloat16"),
        (np.dtype(ml_dtypes.float8_e5m2), "float8_e5m2"), ("e", "float16"),
    ],
)  # fmt: skip
def test_a_dtype_may_be_a_name_or_what_numpy_takes_for_one(dtype: Any, name: str) -> None:
    assert TensorSpec("x", dtype, ()).dtype == name


@pytest.mark.parametrize(
    "dtype", [None, "float33", "complex64", "f4,,f4", "f4,f4", "(", {}, ["x"], 3, object(), "M8[s]", ""]
)
def test_what_is_no_dtype_of_the_wire_is_refused(dtype: Any) -> None:
    with pytest.raises(SpecError, match=r"no dtype .* expected one of uint8, int8"):
        TensorSpec("x", dtype, ())


@pytest.mark.parametrize(
    "shape", [("batch", 3), 5, (1.5,), (None, 3), (-2,), (2**63,), (2**70,), (1,) * 33, "abc", ((1, 2),)], ids=repr
)
def test_what_is_no_shape_is_refused(shape: Any) -> None:
    with pytest.raises(SpecError, match="'x' has no usable shape"):
        TensorSpec("x", "float32", shape)


def test_a_shape_may_hold_any_whole_numbers() -> None:
    assert TensorSpec("x", "float32", [np.int64(3), -1, 0]).shape == (3, -1, 0)  # type: ignore[arg-type]
    assert TensorSpec("x", "float32", (2**63 - 1,)).shape == (2**63 - 1,)
    assert TensorSpec("x", "float32", None).shape is None


def test_specs_and_signatures_print_as_people_write_them() -> None:
    assert str(PIXELS) == "float32 [-1, 3, 4, 4]"
    assert str(TensorSpec("x", "any", None)) == "any of any shape"
    expected = "(pixels: float32 [-1, 3, 4, 4], mask: bool [-1]) -> (logits: float32 [-1, 10], probs: float64 [])"
    assert str(SIGNATURE) == expected
    assert describe(np.zeros((8, 3), ml_dtypes.bfloat16)) == "bfloat16 [8, 3]"
    assert describe(np.zeros(2, np.complex64)) == "complex64 [2]"


@pytest.mark.parametrize("again", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_specs_and_signatures_survive_pickle_and_copy(again: Any) -> None:
    made = again(SIGNATURE)
    assert made == SIGNATURE
    assert made.fit_inputs({"pixels": np.zeros((1, 3, 4, 4), "f4"), "mask": [True]})["mask"].dtype == bool
    assert hash(again(PIXELS)) == hash(PIXELS)


def test_two_inputs_or_outputs_of_one_name_are_refused() -> None:
    twin = TensorSpec("x", "float32", ())
    with pytest.raises(SpecError, match="two inputs share a name: x, x"):
        Signature((twin, twin), ())
    with pytest.raises(SpecError, match="two outputs share a name"):
        Signature((), (twin, twin))
    assert Signature((twin,), (twin,)).inputs == (twin,)


# --------------------------------------------------------------------------- what a caller gives


@pytest.mark.parametrize(
    ("mine", "shape", "fits"),
    [
        ((), (), True), ((), (1,), False), ((-1,), (0,), True), ((-1,), (7,), True), ((-1,), (), False),
        ((2, -1), (2, 9), True), ((2, -1), (3, 9), False), ((2, -1), (2, 9, 1), False), (None, (4, 5), True),
    ],
)  # fmt: skip
def test_minus_one_is_any_size_and_none_is_any_shape(mine: Any, shape: tuple[int, ...], fits: bool) -> None:
    spec = TensorSpec("x", "float32", mine)
    array = np.zeros(shape, np.float32)
    assert spec.accepts_shape(shape) is fits
    if fits:
        assert spec.fit(array) is array
    else:
        with pytest.raises(SignatureError):
            spec.fit(array)


def test_a_misfit_names_the_input_what_was_expected_what_came_and_where() -> None:
    with pytest.raises(SignatureError) as caught:
        PIXELS.fit(np.zeros((8, 4, 4, 3), np.uint8), at=AT)
    error = caught.value
    assert str(error) == f"input 'pixels': expected float32 [-1, 3, 4, 4], got uint8 [8, 4, 4, 3] - at {AT}"
    assert (error.name, error.expected, error.got) == ("pixels", "float32 [-1, 3, 4, 4]", "uint8 [8, 4, 4, 3]")


def test_python_values_take_the_dtype_of_the_spec() -> None:
    assert TensorSpec("x", "uint8", (-1,)).fit([1, 2, 255]).tolist() == [1, 2, 255]
    assert TensorSpec("x", "bfloat16", ()).fit(1.5).dtype == ml_dtypes.bfloat16
    text = TensorSpec("x", "string", (-1,)).fit(["a", b"b"])
    assert (text.dtype, text.tolist()) == (np.dtype(object), ["a", b"b"])
    assert TensorSpec("x", "any", None).fit([1.5]).dtype == np.float64


@pytest.mark.parametrize("value", [[1, 256], [-1], ["a"], [[1], [1, 2]], object(), [None], float("nan")])
def test_python_values_that_are_no_such_array_are_refused(value: Any) -> None:
    with pytest.raises(SignatureError, match="'x': expected uint8"):
        TensorSpec("x", "uint8", None).fit(value)


@pytest.mark.parametrize("given", ["float64", "int32", "bool", "uint8", "complex64"])
def test_an_array_keeps_its_dtype_so_another_is_refused(given: str) -> None:
    with pytest.raises(SignatureError, match=rf"expected float32 \[-1\], got {given} \[2\]"):
        TensorSpec("x", "float32", (-1,)).fit(np.zeros(2, given))


def test_a_foreign_byte_order_is_the_same_dtype() -> None:
    got = TensorSpec("x", "float32", (-1,)).fit(np.array([1.5, 2], ">f4"))
    assert (got.dtype, got.tolist()) == (np.dtype("<f4"), [1.5, 2])


@pytest.mark.parametrize("dtype", [row.name for row in DTYPES.values() if row.is_bit_view and row.name != "bool"])
def test_float32_stands_in_for_the_types_that_old_peers_lack(dtype: str) -> None:
    spec = TensorSpec("x", dtype, (-1,))
    for got in (spec.fit(np.ones(2, np.float32)), spec.view(np.ones(2, np.float32))):
        assert got.dtype == DTYPES[dtype].numpy
        assert got.astype(np.float32).tolist() == [1, 1]
    with pytest.raises(SignatureError):
        TensorSpec("x", "bool", (-1,)).fit(np.ones(2, np.float32))


@pytest.mark.parametrize("kind", ["U", "S", "O"])
def test_strings_of_every_numpy_kind_fit_a_string_input(kind: str) -> None:
    array = np.array(["a", "bc"]).astype(kind)
    assert TensorSpec("x", "string", (2,)).fit(array) is array
    with pytest.raises(SignatureError):
        TensorSpec("x", "string", (2,)).fit(np.zeros(2))


# --------------------------------------------------------------------------- what comes off the wire


@pytest.mark.parametrize("dtype", [row.name for row in DTYPES.values() if row.is_bit_view])
def test_bits_off_the_wire_are_viewed_and_not_copied(dtype: str) -> None:
    row = DTYPES[dtype]
    stored = np.array([[0, 1], [1, 0]], row.stored)
    got = TensorSpec("x", dtype, (2, -1)).view(stored)
    assert got.dtype == row.numpy
    assert np.shares_memory(got, stored)
    assert TensorSpec("x", dtype, ()).view(np.array(1, row.stored)).shape == ()


def test_a_byte_that_is_neither_zero_nor_one_is_no_bool() -> None:
    with pytest.raises(SignatureError, match="expected bool, each 0 or 1, got a byte 2"):
        TensorSpec("x", "bool", (-1,)).view(np.array([0, 1, 2], np.uint8))
    assert TensorSpec("x", "bool", (-1,)).view(np.array([], np.uint8)).tolist() == []


def test_a_tensor_of_another_wire_type_or_shape_is_refused() -> None:
    for array in (np.zeros(2, np.int8), np.zeros(2, np.float64), np.zeros((2, 1), np.uint16)):
        with pytest.raises(SignatureError, match=r"expected bfloat16 \[-1\], got"):
            TensorSpec("x", "bfloat16", (-1,)).view(array)


# --------------------------------------------------------------------------- names


def test_positional_values_go_by_the_order_of_the_inputs() -> None:
    assert SIGNATURE.bind(["a", "b"]) == {"pixels": "a", "mask": "b"}
    for values in (["a"], ["a", "b", "c"], []):
        with pytest.raises(SignatureError, match=rf"expected 2 inputs \(pixels, mask\), got {len(values)}"):
            SIGNATURE.bind(values)


def test_named_inputs_come_out_in_the_order_of_the_signature() -> None:
    pixels, mask = np.zeros((1, 3, 4, 4), np.float32), np.array([True])
    assert list(SIGNATURE.fit_inputs({"mask": mask, "pixels": pixels})) == ["pixels", "mask"]
    viewed = SIGNATURE.view_inputs({"mask": mask.view(np.uint8), "pixels": pixels})
    assert list(viewed) == ["pixels", "mask"]
    assert viewed["mask"].dtype == bool


@pytest.mark.parametrize("check", [SIGNATURE.fit_inputs, SIGNATURE.view_inputs])
def test_missing_and_unknown_inputs_are_named(check: Any) -> None:
    pixels, mask = np.zeros((1, 3, 4, 4), np.float32), np.array([1], np.uint8)
    with pytest.raises(SignatureError, match=r"missing input 'mask' \(bool \[-1\]\)"):
        check({"pixels": pixels})
    with pytest.raises(SignatureError, match=r"no input 'pixel': expected pixels, mask; did you mean 'pixels'\?"):
        check({"pixel": pixels, "mask": mask})
    with pytest.raises(SignatureError, match=r"no input 'zzz': expected pixels, mask$"):
        check({"pixels": pixels, "mask": mask, "zzz": mask})


def test_outputs_are_given_in_the_order_asked_for() -> None:
    assert SIGNATURE.select_outputs(None) == SIGNATURE.outputs
    assert [spec.name for spec in SIGNATURE.select_outputs(["probs", "logits"])] == ["probs", "logits"]


@pytest.mark.parametrize("names", [[], (), "probs"])
def test_no_outputs_or_a_bare_name_are_refused(names: Any) -> None:
    with pytest.raises(SignatureError, match="expected a list of output names"):
        SIGNATURE.select_outputs(names)


def test_unknown_and_doubled_outputs_are_named() -> None:
    with pytest.raises(SignatureError, match=r"no output 'prob': expected one of logits, probs; did you mean 'probs'"):
        SIGNATURE.select_outputs(["logits", "prob"])
    with pytest.raises(SignatureError, match="asked for twice: logits, logits"):
        SIGNATURE.select_outputs(["logits", "logits"])


def test_gradients_of_a_model_that_gives_none_are_an_error_of_their_own() -> None:
    with pytest.raises(NotDifferentiable, match="'resnet' gives no gradient with respect to input 'pixels'"):
        SIGNATURE.select_outputs(["gradient:pixels"])
    with pytest.raises(NotDifferentiable, match="takes no 'cotangent:logits'"):
        SIGNATURE.fit_inputs({"pixels": 0, "mask": 0, "cotangent:logits": 0})


def test_outputs_that_break_their_own_signature_are_named() -> None:
    logits = np.zeros((2, 10), np.float32)
    wanted = SIGNATURE.select_outputs(["logits"])
    assert SIGNATURE.fit_outputs({"logits": logits, "extra": 1}, wanted) == {"logits": logits}
    with pytest.raises(SignatureError, match=r"output 'logits': expected float32 \[-1, 10\], got no such output but x"):
        SIGNATURE.fit_outputs({"x": logits}, wanted)
    with pytest.raises(SignatureError, match=r"output 'logits': expected float32 \[-1, 10\], got float32 \[2, 9\]"):
        SIGNATURE.fit_outputs({"logits": logits[:, 1:]}, wanted)


GIVES_GRADIENTS = Signature(
    (TensorSpec("x", "float32", (-1, 4), differentiable=True), TensorSpec("n", "int64", ())),
    (TensorSpec("y", "float32", (-1, 2)), TensorSpec("label", "int64", (-1,))),
    name="net",
)


def test_cotangents_are_inputs_like_their_outputs() -> None:
    values = {"x": np.zeros((3, 4), np.float32), "n": np.int64(1), "cotangent:y": np.ones((3, 2), np.float32)}
    assert [*GIVES_GRADIENTS.fit_inputs(values)] == ["x", "n", "cotangent:y"]
    with pytest.raises(SignatureError, match=r"input 'cotangent:y': expected float32 \[-1, 2\], got float64 \[3, 2\]"):
        GIVES_GRADIENTS.fit_inputs({**values, "cotangent:y": np.ones((3, 2))})
    with pytest.raises(SignatureError, match="missing input 'n'"):
        GIVES_GRADIENTS.fit_inputs({"x": values["x"], "cotangent:y": values["cotangent:y"]})


def test_gradients_are_outputs_like_their_inputs() -> None:
    both = GIVES_GRADIENTS.select_outputs(["gradient:x", "y"])
    assert both == (TensorSpec("gradient:x", "float32", (-1, 4)), GIVES_GRADIENTS.outputs[0])


def test_a_gradient_or_cotangent_that_there_is_not_says_which_there_are() -> None:
    values = {"x": np.zeros((3, 4), np.float32), "n": np.int64(1)}
    with pytest.raises(NotDifferentiable, match="with respect to input 'n', only with respect to x"):
        GIVES_GRADIENTS.select_outputs(["gradient:n"])
    with pytest.raises(SignatureError, match=r"no output 'gradient:z': .*did you mean 'gradient:x'"):
        GIVES_GRADIENTS.select_outputs(["gradient:z"])
    with pytest.raises(NotDifferentiable, match=r"output 'label' of model 'net' is int64 \[-1\]: only floats"):
        GIVES_GRADIENTS.fit_inputs({**values, "cotangent:label": np.zeros(3, np.int64)})
    with pytest.raises(SignatureError, match=r"no output for 'cotangent:yy': .*did you mean 'cotangent:y'"):
        GIVES_GRADIENTS.fit_inputs({**values, "cotangent:yy": np.zeros((3, 2), np.float32)})


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("x: float32 [-1, 1024]", TensorSpec("x", "float32", (-1, 1024))),
        ("  sample rate :int64[] ", TensorSpec("sample rate", "int64", ())),
        ("a:b: bool [2]", TensorSpec("a:b", "bool", (2,))),
    ],
)
def test_a_spec_is_read_as_it_is_printed(text: str, spec: TensorSpec) -> None:
    assert parse_spec(text) == spec
    assert parse_spec(f"{spec.name}: {spec}") == spec


@pytest.mark.parametrize(
    "text", ["", "x", "x: float32", "float32 [2]", "x: float32 [2", "x: float32 [a]", "x: f [1,,2]"]
)
def test_text_that_is_no_spec_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(SpecError, match=r"expected a spec such as 'x: float32 \[-1, 1024\]'|no dtype"):
        parse_spec(text)
