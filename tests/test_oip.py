"""The codec of the Open Inference Protocol: what it writes it reads, what others write it reads, or a DecodeError."""

from __future__ import annotations

import base64
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from remote_ops import oip
from remote_ops.errors import DecodeError, EncodeError
from remote_ops.oip import (
    DATATYPES,
    Message,
    decode_error,
    decode_metadata,
    decode_request,
    decode_response,
    dump_json,
    encode_error,
    encode_metadata,
    encode_request,
    encode_response,
    parse_json_size,
)
from remote_ops.signature import DTYPES, Signature, TensorSpec

Array = npt.NDArray[Any]

NUMERIC = [row for row in DTYPES.values() if row.name != "string"]
SHAPES: list[tuple[int, ...]] = [(), (1,), (5,), (2, 3), (0,), (0, 3), (3, 0, 2), (1,) * 32, (2, 1, 3, 1)]


def joined(message: Message) -> bytearray:
    return bytearray(b"".join(message.buffers))


def sample(dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Numbers that no two elements share, as far as the dtype allows, and that JSON has a form for."""
    return (np.arange(int(np.prod(shape))) % 7).reshape(shape).astype(dtype)


def objects(*items: Any) -> Array:
    array = np.empty(len(items), object)
    array[:] = items
    return array


def sent(array: Array, *, binary: bool) -> Array:
    """An array after both directions: as an input, and the same as an output."""
    request = encode_request(("x",), [array], binary=binary)
    got = decode_request(joined(request), request.json_bytes).tensors["x"]
    reply = encode_response({"x": array}, model_name="m", binary=["x"] if binary else [])
    again = decode_response(joined(reply), reply.json_bytes).tensors["x"]
    assert (got.dtype, got.shape) == (again.dtype, again.shape)
    assert got.tolist() == again.tolist() if got.dtype == object else got.tobytes() == again.tobytes()
    return got


WHOLE = hnp.integer_dtypes() | hnp.unsigned_integer_dtypes() | hnp.boolean_dtypes()
BOTH = pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])


# --------------------------------------------------------------------------- round trips


@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("row", NUMERIC, ids=lambda row: row.name)
def test_every_numeric_dtype_round_trips(row: Any, shape: tuple[int, ...], binary: bool) -> None:
    array = sample(row.numpy, shape)
    got = sent(array, binary=binary)
    assert got.dtype == (np.uint8 if row.name.startswith("float8") else row.numpy)
    assert (got.shape, got.tobytes()) == (array.shape, array.tobytes())


@BOTH
@given(array=hnp.arrays(WHOLE, hnp.array_shapes(min_dims=0, min_side=0)))
@settings(max_examples=60, deadline=None)
def test_whole_numbers_of_any_value_round_trip(array: Array, binary: bool) -> None:
    got = sent(array, binary=binary)
    assert got.dtype == array.dtype.newbyteorder("=")
    assert got.tolist() == array.tolist()


@BOTH
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "bfloat16"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_every_finite_float_round_trips_bit_by_bit(dtype: str, binary: bool, data: Any) -> None:
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    raw = data.draw(st.binary(max_size=64))
    array = np.frombuffer(raw[: len(raw) // dtype.itemsize * dtype.itemsize], dtype)
    with np.errstate(invalid="ignore"):
        array = array[np.isfinite(array)]
    assert sent(array, binary=binary).tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ml_dtypes.bfloat16])
def test_nan_and_infinity_travel_in_binary_form(dtype: Any) -> None:
    array = np.array([np.nan, np.inf, -np.inf, -0.0]).astype(dtype)
    assert sent(array, binary=True).tobytes() == array.tobytes()


STRINGS: list[tuple[Array, list[bytes]]] = [
    (np.array(["a", "b\u00e9", ""]), [b"a", "b\u00e9".encode(), b""]),
    (np.array([b"a", b"bcd"]), [b"a", b"bcd"]),
    (objects("str", b"bytes", "\u65e5\u672c"), [b"str", b"bytes", "\u65e5\u672c".encode()]),
    (objects(b"\x00in\x00side\x00", '"\\\n\u2028'), [b"\x00in\x00side\x00", '"\\\n\u2028'.encode()]),
    (np.array([], dtype="U3"), []),
    (np.array([], dtype=object), []),
    (np.array([["a", "b"], ["c", "d"]]).T, [b"a", b"c", b"b", b"d"]),
    (objects(b"x").reshape(()), [b"x"]),
]


@BOTH
@pytest.mark.parametrize(("value", "expected"), STRINGS)
def test_strings_of_every_kind_arrive_as_bytes(value: Array, expected: list[bytes], binary: bool) -> None:
    got = sent(value, binary=binary)
    assert (got.dtype, got.shape, got.ravel().tolist()) == (object, value.shape, expected)


def test_strings_that_are_no_text_travel_in_binary_form() -> None:
    assert sent(objects(b"\xff\xfe", b""), binary=True).tolist() == [b"\xff\xfe", b""]


@BOTH
@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4).T,
        np.arange(12, dtype=np.float32)[::-2],
        np.broadcast_to(np.float64(2.5), (2, 3)),
        np.arange(6, dtype=">f8").reshape(2, 3),
        np.array(7, dtype=">i4"),
        np.arange(4, dtype=np.uint8).astype(bool)[::-1],
    ],
    ids=["transposed", "strided", "broadcast", "big-endian", "big-endian 0-d", "bool"],
)
def test_any_memory_layout_arrives_row_major_and_little_endian(array: Array, binary: bool) -> None:
    got = sent(array, binary=binary)
    assert (got.shape, got.tolist()) == (array.shape, array.tolist())


def test_a_request_says_all_that_was_asked() -> None:
    arrays = [sample(np.dtype("f4"), (2, 2)), sample(np.dtype("i8"), (3,)), objects(b"s")]
    message = encode_request(("gr\u00f6\u00dfe", "cotangent:y", "c"), arrays, ("y", "gradient:x"), b"k=\xc3\xa9")
    request = decode_request(joined(message), message.json_bytes)
    assert list(request.tensors) == ["gr\u00f6\u00dfe", "cotangent:y", "c"]
    assert request.output_names == ("y", "gradient:x")
    assert request.config == b"k=\xc3\xa9"
    assert [request.wants_binary(name) for name in ("y", "gradient:x", "other")] == [True, True, False]
    assert message.headers == (("Inference-Header-Content-Length", str(message.json_bytes)),)
    assert message.content_type == "application/octet-stream"


def test_a_request_without_output_names_wants_all_in_its_own_form() -> None:
    x = sample(np.dtype("f4"), (2,))
    for binary in (True, False):
        message = encode_request(("x",), [x], binary=binary)
        request = decode_request(joined(message), message.json_bytes)
        assert (request.output_names, request.wants_binary("y")) == ((), binary)
    assert (message.headers, message.content_type) == ((), "application/json")


def test_a_reply_may_mix_both_forms() -> None:
    tensors = {"a": np.arange(3), "b": objects(b"s"), "c": np.float32([[1.5]])}
    message = encode_response(tensors, model_name="m", model_version="3", id="42", binary=["a", "c"])
    response = decode_response(joined(message), message.json_bytes)
    assert {name: got.tolist() for name, got in response.tensors.items()} == {"a": [0, 1, 2], "b": [b"s"], "c": [[1.5]]}
    assert (response.model_name, response.model_version, response.id) == ("m", "3", "42")


def test_an_error_says_what_was_wrong() -> None:
    assert decode_error(encode_error('it "broke"\ud800')) == 'it "broke"?'
    assert decode_error(b'{"detail": "no such page"}') == "no such page"
    assert [decode_error(body) for body in (b"", b"<html>", b"[]", b'{"error": 3}', b'{"detail": [{}]}')] == [None] * 5


# --------------------------------------------------------------------------- no copies


def test_tensor_bytes_are_neither_copied_to_be_sent_nor_when_they_came() -> None:
    x, b, h = np.ones((100, 100), np.float32), np.zeros(1000, bool), np.ones(1000, ml_dtypes.bfloat16)
    message = encode_request(("x", "b", "h"), [x, b, h])
    for buffer, array in zip(message.buffers[1:], (x, b, h), strict=True):
        assert np.shares_memory(np.frombuffer(buffer, np.uint8), array.view(np.uint8))
    body = joined(message)
    for got in decode_request(body, message.json_bytes).tensors.values():
        assert np.shares_memory(got.view(np.uint8), np.frombuffer(body, np.uint8))
        assert got.flags.writeable


@pytest.mark.parametrize("name", ["x", "longer", "x" * 63])
def test_the_first_tensor_is_as_aligned_as_the_message(name: str) -> None:
    message = encode_request((name,), [np.arange(3.0)], ("y",))
    assert message.json_bytes is not None
    assert message.json_bytes % 64 == 0
    json.loads(joined(message)[: message.json_bytes])


def test_a_text_that_was_read_before_gives_the_tensors_of_its_own_message() -> None:
    for value in (1.0, 2.0, 3.0):
        message = encode_request(("x",), [np.full(3, value)], ("y",))
        request = decode_request(joined(message), message.json_bytes)
        assert request.tensors["x"].tolist() == [value] * 3
        request.tensors.clear()
        with pytest.raises(TypeError):
            request.parameters["kept"] = 1  # type: ignore[index]


# --------------------------------------------------------------------------- metadata


def test_metadata_round_trip_with_all_that_we_know() -> None:
    signature = Signature(
        (
            *[TensorSpec(row.name, row.name, (-1, 3), "words", row.name == "float32") for row in DTYPES.values()],
            TensorSpec("scalar", "float32", ()),
            TensorSpec("free", "int8", None),
        ),
        (TensorSpec("y", "bfloat16", (0, 2**40)),),
        "m\u00f6del",
        "3",
        "a server",
        "what it does",
        ("vjp", "batch=0"),
    )
    assert decode_metadata(encode_metadata(signature)) == signature
    assert decode_metadata(encode_metadata(signature, ["1", "3"])).version == ""


def test_a_plain_model_has_plain_metadata() -> None:
    signature = Signature((TensorSpec("x", "float32", (-1, 3)),), (TensorSpec("y", "string", (-1,)),), "m")
    assert json.loads(encode_metadata(signature)) == {
        "name": "m",
        "versions": [],
        "platform": "",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
        "outputs": [{"name": "y", "datatype": "BYTES", "shape": [-1]}],
    }


def test_metadata_of_a_dtype_that_nobody_knows_cannot_be_written() -> None:
    with pytest.raises(EncodeError, match="'x' is any"):
        encode_metadata(Signature((TensorSpec("x", "any", None),), ()))


# --------------------------------------------------------------------------- recorded messages

CAPTURES = Path(__file__).parent / "captures" / "oip"
MANIFEST: list[dict[str, Any]] = json.loads((CAPTURES / "manifest.json").read_text())


def of_kind(kind: str, **having: Any) -> Any:
    having["kind"] = kind
    found = [entry for entry in MANIFEST if all(entry.get(key) == value for key, value in having.items())]
    return pytest.mark.parametrize("entry", found, ids=lambda entry: entry["file"])


def recorded(entry: dict[str, Any]) -> bytes:
    return (CAPTURES / entry["file"]).read_bytes()


def array_of(row: dict[str, Any]) -> Array:
    if "items" in row:
        return objects(*map(base64.b64decode, row["items"])).reshape(row["shape"])
    return np.frombuffer(base64.b64decode(row["data"]), DATATYPES[row["datatype"]]).reshape(row["shape"])


def assert_holds(tensors: dict[str, Array], rows: list[dict[str, Any]]) -> None:
    assert list(tensors) == [row["name"] for row in rows]
    for row in rows:
        got, expected = tensors[row["name"]], array_of(row)
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert got.tolist() == expected.tolist()


@of_kind("request")
def test_every_recorded_request_is_read(entry: dict[str, Any]) -> None:
    request = decode_request(recorded(entry), entry["json_bytes"])
    assert_holds(request.tensors, entry["inputs"])
    assert list(request.output_names) == entry["outputs"]
    assert request.wants_binary(entry["outputs"][0] if entry["outputs"] else "y") == entry["binary"]
    assert request.id == entry.get("id", "")
    assert request.config.decode() == entry.get("parameters", {}).get("config", "")


@of_kind("request", binary=True, id=None)
def test_what_we_write_is_what_tritons_client_writes(entry: dict[str, Any]) -> None:
    names = tuple(row["name"] for row in entry["inputs"])
    message = encode_request(names, [array_of(row) for row in entry["inputs"]], tuple(entry["outputs"]))
    theirs, size = recorded(entry), entry["json_bytes"]
    assert json.loads(message.buffers[0]) == json.loads(theirs[:size])
    assert b"".join(message.buffers[1:]) == theirs[size:]


@of_kind("reply")
def test_every_recorded_reply_is_read(entry: dict[str, Any]) -> None:
    response = decode_response(recorded(entry), entry["json_bytes"])
    assert_holds(response.tensors, entry["outputs"])
    assert response.model_name


@of_kind("metadata")
def test_recorded_metadata_is_read(entry: dict[str, Any]) -> None:
    signature = decode_metadata(recorded(entry))
    assert (signature.name, str(signature)) == (entry["model"], entry["signature"])


@of_kind("error")
def test_recorded_errors_are_read(entry: dict[str, Any]) -> None:
    assert decode_error(recorded(entry)) == entry["said"]


# --------------------------------------------------------------------------- JSON as others write it


def text(tensor: dict[str, Any], **more: Any) -> bytes:
    row = {"name": "x", "datatype": "FP32", "shape": [2, 2], **tensor}
    return json.dumps({"inputs": [{key: value for key, value in row.items() if value is not ...}], **more}).encode()


BASE64 = {"parameters": {"content_type": "base64"}}


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        ({"data": [1, 2, 3, 4]}, [[1, 2], [3, 4]]),
        ({"data": [[1, 2.5], [3, 4e0]]}, [[1, 2.5], [3, 4]]),
        ({"shape": [], "data": 1.5}, 1.5),
        ({"shape": [], "data": [1.5]}, 1.5),
        ({"shape": [2, 0], "data": [[], []]}, [[], []]),
        ({"shape": [0, 2], "data": []}, []),
        ({"shape": [2, 1, 1], "data": [[[1]], [[2]]]}, [[[1]], [[2]]]),
        ({"datatype": "BYTES", "shape": [1, 2], "data": [["a", "\u00e9"]]}, [[b"a", "\u00e9".encode()]]),
        ({"datatype": "BOOL", "shape": [2], "data": [True, False], "parameters": None}, [True, False]),
        ({"datatype": "UINT64", "shape": [1], "data": [2**64 - 1]}, [2**64 - 1]),
        ({"datatype": "BYTES", "shape": [1], "data": ["/wA="], **BASE64}, [b"\xff\0"]),
        ({"datatype": "BYTES", "shape": [2, 1], "data": [["/wA="], [""]], **BASE64}, [[b"\xff\0"], [b""]]),
        ({"datatype": "BYTES", "shape": [], "data": "/wA=", **BASE64}, b"\xff\0"),
        ({"data": [[1, 2], [3, 4]], **BASE64}, [[1, 2], [3, 4]]),
    ],
)
def test_data_is_read_flat_and_nested(tensor: dict[str, Any], expected: Any) -> None:
    assert decode_request(text(tensor)).tensors["x"].tolist() == expected


@pytest.mark.parametrize(("value", "expected"), [(None, None), ("0", 0), ("123", 123)])
def test_the_size_of_the_text_is_a_number(value: str | None, expected: int | None) -> None:
    assert parse_json_size(value) == expected


# --------------------------------------------------------------------------- what has no form


@pytest.mark.parametrize(
    ("array", "binary", "match"),
    [
        (np.zeros((2,), np.complex64), True, r"complex64 \[2\] has no form"),
        (np.zeros((2,), np.complex64), False, r"complex64 \[2\] has no form"),
        (np.zeros((2,), "M8[s]"), True, "has no form"),
        (objects(1, 2), True, "holds str or bytes: got int"),
        (objects(None), False, "holds str or bytes: got NoneType"),
        (np.array(["\ud800"]), True, "no UTF-8 form"),
        (objects(b"\xff"), False, "not UTF-8"),
        (np.array([0x7F81], np.uint16).view(ml_dtypes.bfloat16), False, "NaN or infinity"),
        (np.array([np.nan]), False, "NaN or infinity"),
        (np.array([np.inf], np.float16), False, "NaN or infinity"),
        (np.array([1, np.inf]).astype(ml_dtypes.bfloat16), False, "NaN or infinity"),
    ],
)
def test_a_value_without_a_form_is_an_encode_error(array: Array, binary: bool, match: str) -> None:
    with pytest.raises(EncodeError, match=match):
        encode_request(("x",), [array], binary=binary)


def test_names_and_configs_are_text() -> None:
    with pytest.raises(EncodeError, match="no UTF-8 form"):
        encode_request(("\ud800",), [np.zeros(1)])
    with pytest.raises(EncodeError, match="config that is not UTF-8"):
        encode_request(("x",), [np.zeros(1)], (), b"\xff")


# --------------------------------------------------------------------------- hostile messages

SIZED = {"parameters": {"binary_data_size": 16}}


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (b"", "a text of 1 to 0 bytes"),
        (b"\xff\xfe", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b"{", "not JSON"),
        (b"[]", "expected a JSON object, got a list"),
        (b"null", "got a null"),
        (b"{}", "'inputs' of the message: expected a list, got none"),
        (b'{"inputs": [], "inputs": []}', "names a key twice"),
        (b'{"inputs": [3]}', "a list of objects"),
        (b'{"inputs": {}}', "expected a list, got a object"),
        (b'{"inputs": [{}]}', "'name' of an input"),
        (b'{"inputs": [' + b"[" * 100_000 + b"]" * 100_000 + b"]}", "nested too deeply"),
        (b'{"inputs": [], "id": 3}', "'id' of the request: expected a string, got a number"),
        (b'{"inputs": [], "outputs": [{"name": "y"}, {"name": "y"}]}', "two outputs share a name"),
        (b'{"inputs": [], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}', "expected a bool"),
        (b'{"inputs": [], "outputs": [{"name": "y", "parameters": {"classification": 3}}]}', "not supported"),
        (b'{"inputs": [], "parameters": {"binary_data_output": "yes"}}', "expected a bool"),
        (b'{"inputs": [], "parameters": {"config": "\\ud800"}}', "no UTF-8 form"),
        (b'{"inputs": [], "parameters": {"n": ' + b"9" * 5000 + b"}}", "nobody could mean"),
        (b'{"inputs": [' + b",".join([b"{}"] * 4097) + b"]}", "4097 inputs in one message"),
        (text({"name": 3}), "'name' of an input"),
        (text({"datatype": "FP8"}), "datatype 'FP8'"),
        (text({"datatype": ...}), "'datatype' of input 'x'"),
        (text({"shape": ...}), "'shape' of input 'x'"),
        (text({"shape": [2.0, 2]}), "whole numbers"),
        (text({"shape": [True, 2]}), "whole numbers"),
        (text({"shape": ["2", 2]}), "whole numbers"),
        (text({"shape": [-1, 2], "data": [1, 2]}), "negative sizes have no data"),
        (text({"shape": [-2]}), "whole numbers"),
        (text({"shape": [2**63]}), "whole numbers"),
        (text({"shape": [1] * 33, "data": [1]}), "33 axes"),
        (text({}), "either data or a binary_data_size"),
        (text({"data": [1, 2, 3, 4], **SIZED}), "either data or a binary_data_size"),
        (text({"parameters": {"binary_data_size": -4}}), "either data or a binary_data_size"),
        (text({"parameters": {"binary_data_size": True}}), "expected a number, got a bool"),
        (text({"parameters": {"binary_data_size": 16.0}}), "binary_data_size"),
        (text({"parameters": {"shared_memory_region": "r"}}), "not supported"),
        (text({"parameters": []}), "'parameters' of input 'x': expected a object"),
        (text(SIZED), "expected 16 bytes after the text, got 0"),
        (text({"data": "1234"}), "expected a list of data, got a string"),
        (text({"data": {}}), "expected a list of data, got a object"),
        (text({"data": [1, 2, 3]}), "expected 4 elements, got 3"),
        (text({"data": [[1, 2], [3]]}), "nested otherwise at axis 1"),
        (text({"data": [[1, 2], 3]}), "nested otherwise at axis 1"),
        (text({"data": [[1, 2]]}), "1 rows"),
        (text({"data": [[[1], [2]], [[3], [4]]]}), "its data holds list"),
        (text({"data": [1, 2, 3, "4"]}), "its data holds number, string"),
        (text({"data": [1, 2, 3, None]}), "its data holds null, number"),
        (text({"data": [True, False, True, True]}), "its data holds bool"),
        (text({"data": [1, 2, 3, float("nan")]}), "NaN is not JSON"),
        (text({"data": [1, 2, 3, float("inf")]}), "Infinity is not JSON"),
        (text({"data": [1, 2, 3, 4]}).replace(b"4]", b"1e999]"), "beyond the range"),
        (text({"data": [1, 2, 3, 1e39]}), "beyond the range"),
        (text({"data": [1, 2, 3, 10**400]}), "beyond the range"),
        (text({"datatype": "FP16", "data": [1, 2, 3, 65520]}), "beyond the range"),
        (text({"datatype": "BF16", "data": [1, 2, 3, 1e39]}), "beyond the range"),
        (text({"datatype": "INT8", "data": [1, 2, 3, 128]}), "expected numbers from -128 to 127"),
        (text({"datatype": "UINT64", "data": [1, 2, 3, -1]}), "expected numbers from 0"),
        (text({"datatype": "INT32", "data": [1, 2, 3, 4.0]}), "its data holds number"),
        (text({"datatype": "BOOL", "data": [0, 1, 0, 1]}), "its data holds number"),
        (text({"datatype": "BYTES", "data": ["a", "b", "c", "\ud800"]}), "no UTF-8 form"),
        (text({"datatype": "BYTES", "shape": [1], "data": ["?"], **BASE64}), "base64"),
        (text({"datatype": "BYTES", "shape": [1, 1], "data": [["\u00e9"]], **BASE64}), "base64"),
        (text({"datatype": "BYTES", "shape": [1], "data": [3], **BASE64}), "its data holds number"),
        (text({"shape": [2**62, 0, 2**62], "data": []}), "beyond any message"),
        (text({"shape": [2**62, 2**62], "data": [1]}), "expected 21267647932558653966460912964485513216 elements"),
    ],
)
def test_one_thing_wrong_is_a_decode_error(message: bytes, match: str) -> None:
    refused(lambda: decode_request(message), match)


def refused(decode: Callable[[], Any], match: str) -> None:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        with pytest.raises(DecodeError, match=match):
            decode()
        assert tracemalloc.get_traced_memory()[1] - before < 20_000_000
    finally:
        tracemalloc.stop()


HALF = "\\ud800"  # of a pair, escaped: as raw bytes it is no UTF-8, and refused for that


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (decode_request, text({"name": "?", "data": [1, 2, 3, 4]})),
        (decode_request, text({"data": [1, 2, 3, 4]}, id="?")),
        (decode_request, text({"data": [1, 2, 3, 4]}, outputs=[{"name": "?"}])),
        (decode_request, text({"data": [1, 2, 3]}, parameters={"?": {"deep": ["?"]}})),
        (decode_request, text({"name": "?", "data": [1]})),  # whose error would name it
        (decode_response, b'{"model_name": "?", "outputs": []}'),
        (decode_metadata, b'{"name": "?", "inputs": [], "outputs": []}'),
        (decode_metadata, b'{"versions": ["?"], "inputs": [], "outputs": []}'),
    ],
)
def test_text_without_a_utf8_form_is_refused_wherever_it_stands(decode: Callable[[bytes], Any], message: bytes) -> None:
    for half in (HALF, HALF.upper().replace("U", "u"), "\\udfff", "\\udc00\\ud800"):
        with pytest.raises(DecodeError, match="no UTF-8 form") as caught:
            decode(message.replace(b"?", half.encode()))
        str(caught.value).encode()
    assert decode_error(b'{"error": "' + HALF.encode() + b'"}') is None


def test_a_text_that_is_not_json_says_at_which_byte() -> None:
    message = '{"id": "\u00e9\u65e5\u672c", ?}'.encode()
    with pytest.raises(DecodeError, match="not JSON") as caught:
        decode_request(message)
    assert caught.value.offset == message.index(b"?")


def test_an_error_is_short_however_long_the_names() -> None:
    rows = [{"name": "x" * 10_000, "datatype": "FP32", "shape": []}] * 2
    for decode, message in (
        (decode_request, json.dumps({"inputs": [rows[0] | {"data": []}]}).encode()),
        (decode_metadata, json.dumps({"inputs": rows, "outputs": []}).encode()),
        (decode_request, text({"parameters": {"binary_data_size": 10**4000}})),
    ):
        with pytest.raises(DecodeError) as caught:
            decode(message)
        assert len(str(caught.value)) < 500


def test_escaped_pairs_and_escaped_backslashes_are_text() -> None:
    message = text({"name": "?", "data": [1, 2, 3, 4]}, id="!")
    request = decode_request(message.replace(b"?", b"\\uD83D\\ude00").replace(b"!", b"\\\\ud800"))
    assert (list(request.tensors), request.id) == (["\U0001f600"], "\\ud800")


@pytest.mark.parametrize(
    ("tensors", "tail", "match"),
    [
        ([{**SIZED}], b"1" * 15, "expected 16 bytes after the text, got 15"),
        ([{**SIZED}], b"1" * 17, "1 bytes follow the last tensor"),
        ([{"parameters": {"binary_data_size": 12}}], b"1" * 12, "expected a binary_data_size of 16, got 12"),
        ([{"parameters": {"binary_data_size": 2**62}}], b"", "after the text, got 0"),
        ([{"parameters": {"binary_data_size": 10**4000}}], b"", "below 2\\*\\*63"),
        ([{"shape": [2**40, 2**40], **SIZED}], b"1" * 16, "expected a binary_data_size of 4835703278458516698824704"),
        ([{"shape": [2**62, 0, 2**62], "parameters": {"binary_data_size": 0}}], b"", "beyond any message"),
        ([SIZED, SIZED], b"1" * 32, "two inputs share a name"),
        ([SIZED, {"name": "b", **SIZED}], b"1" * 31, "expected 16 bytes after the text, got 15"),
        ([{"datatype": "BOOL", "shape": [16], **SIZED}], b"\0" * 15 + b"\2", "bytes 0 and 1, got 2"),
        ([{"datatype": "BYTES", "shape": [5], **SIZED}], bytes(16), "expected 20 bytes or more, got 16"),
        ([{"datatype": "BYTES", "shape": [3], **SIZED}], bytes(16), "4 bytes follow the last string"),
        ([{"datatype": "BYTES", "shape": [0], **SIZED}], bytes(16), "16 bytes follow the last string"),
        ([{"datatype": "BYTES", "shape": [4], **SIZED}], bytes(12) + b"\xff" * 4, "a string runs past the end"),
        (
            [{"datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 3}}],
            b"abc",
            "4 bytes or more, got 3",
        ),
        ([{"datatype": "BYTES", "shape": [2**40], **SIZED}], bytes(16), "1099511627776 strings in one tensor"),
        ([{"datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": 8}}], b"\1\0\0\0aaaa", "runs past"),
    ],
)
def test_sizes_that_do_not_fit_are_decode_errors(tensors: list[dict[str, Any]], tail: bytes, match: str) -> None:
    rows = [{"name": "x", "datatype": "FP32", "shape": [2, 2], **tensor} for tensor in tensors]
    head = json.dumps({"inputs": rows}).encode()
    refused(lambda: decode_request(head + tail, len(head)), match)


@pytest.mark.parametrize("size", [0, -1, 3, 2**63])
def test_a_size_of_the_text_that_does_not_fit_is_a_decode_error(size: int) -> None:
    with pytest.raises(DecodeError, match=f"which is the size of the body, got {size}"):
        decode_request(b"{}", size)


@pytest.mark.parametrize("value", ["", "-1", "1.0", "0x10", "1" * 20, "\u0661", " 1", "1,1"])
def test_a_size_of_the_text_that_is_no_number_is_a_decode_error(value: str) -> None:
    with pytest.raises(DecodeError, match="expected a number of bytes"):
        parse_json_size(value)


def test_a_text_longer_than_any_is_refused_before_it_is_read() -> None:
    message = memoryview(bytearray(oip.MAX_JSON_BYTES + 1))
    refused(lambda: decode_request(message), f"a text of {len(message)} bytes")


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (b'{"inputs": {}}', "'inputs' of the metadata"),
        (b'{"inputs": [], "outputs": 1}', "'outputs' of the metadata"),
        (b'{"inputs": [{"name": "x", "datatype": "FP32"}], "outputs": []}', "'shape' of input 'x'"),
        (b'{"inputs": [{"name": "x", "datatype": "?", "shape": []}], "outputs": []}', "datatype"),
        (b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [-2]}], "outputs": []}', "whole numbers"),
        (b'{"inputs": [], "outputs": [], "versions": 3}', "'versions' of the metadata"),
        (b'{"inputs": [], "outputs": [], "parameters": {"features": 1}}', "'features'"),
        (
            json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": []}] * 2, "outputs": []}).encode(),
            "two inputs share a name",
        ),
    ],
)
def test_metadata_with_one_thing_wrong_is_a_decode_error(message: bytes, match: str) -> None:
    with pytest.raises(DecodeError, match=match):
        decode_metadata(message)


MIXED = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "s": objects(b"ab", b""), "b": np.array([True])}
FORMS = {
    "binary": encode_request(tuple(MIXED), list(MIXED.values()), ("y",), b"cfg"),
    "json": encode_request(tuple(MIXED), list(MIXED.values()), ("y",), b"cfg", binary=False),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_request_cut_anywhere_is_a_decode_error(form: str) -> None:
    whole, size = bytes(joined(FORMS[form])), FORMS[form].json_bytes
    for length in range(len(whole)):
        with pytest.raises(DecodeError):
            decode_request(whole[:length], size)


def survives(decode: Callable[..., Any], *arguments: Any) -> None:
    """Give a message or a DecodeError; every byte of every tensor can be read."""
    try:
        decoded = decode(*arguments)
    except DecodeError:
        return
    for tensor in getattr(decoded, "tensors", {}).values():
        assert len(tensor.tobytes()) == tensor.nbytes


@settings(deadline=None)
@given(body=st.binary(max_size=200), size=st.none() | st.integers(-1, 250))
def test_any_bytes_give_a_message_or_a_decode_error(body: bytes, size: int | None) -> None:
    survives(decode_request, body, size)
    survives(decode_response, body, size)
    survives(decode_metadata, body)
    decode_error(body)


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None)
@given(data=st.data())
def test_a_message_with_bytes_changed_gives_a_message_or_a_decode_error(form: str, data: Any) -> None:
    body = joined(FORMS[form])
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(body) - 1), st.integers(0, 255)), max_size=4)):
        body[at] = value
    survives(decode_request, body, FORMS[form].json_bytes)


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(sorted(DATATYPES)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["x", "y"]) | ODD,
        "datatype": st.sampled_from(sorted(DATATYPES)) | ODD,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | ODD,
        "data": st.lists(st.integers(-1, 300) | st.booleans() | st.text(max_size=2), max_size=8) | ODD,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 20) | ODD}) | ODD,
    },
)


MORE = st.dictionaries(st.sampled_from(["id", "outputs", "parameters"]), ODD)


@given(rows=st.lists(TENSOR, max_size=3) | ODD, more=MORE, tail=st.binary(max_size=40))
@settings(max_examples=300, deadline=None)
def test_odd_json_in_any_place_gives_a_message_or_a_decode_error(rows: Any, more: dict[str, Any], tail: bytes) -> None:
    head = json.dumps({"inputs": rows, "outputs": rows, **more}).encode()
    survives(decode_request, head + tail, len(head))
    survives(decode_request, json.dumps({"inputs": rows, **more}).encode())
    survives(decode_response, head + tail, len(head))
    survives(decode_metadata, head)


def test_strings_are_not_multiplied() -> None:
    """A length that every string shares is no way to make a small message large."""
    body = struct.pack("<I", 2**32 - 1) * 4
    head = json.dumps({"inputs": [{"name": "x", "datatype": "BYTES", "shape": [4], **SIZED}]}).encode()
    refused(lambda: decode_request(head + body, len(head)), "runs past the end")


# --------------------------------------------------------------------------- long texts


def test_a_text_written_bit_by_bit_is_what_json_writes() -> None:
    generator = np.random.default_rng(0)

    def value(depth: int) -> Any:
        kind = generator.integers(5) if depth else 4
        if kind == 0:
            return [value(depth - 1) for _ in range(generator.integers(4))]
        if kind == 1:
            return {f"\u00e9{index}": value(depth - 1) for index in range(generator.integers(4))}
        if kind == 2:
            return generator.random(generator.integers(40_000)).tolist()
        if kind == 3:
            return [list(range(generator.integers(6))) for _ in range(generator.integers(9000))]
        return [None, True, 1, -1.5, '"\u00e9'][generator.integers(5)]

    made = [{"a": value(4), "b": value(3)} for _ in range(60)]
    made += [{}, {"a": []}, {"a": [[], [1] * 50_000]}, {"a": [[1] * 50_000, []]}, {"a": [[[list(range(50_000))]]] * 2}]
    for one in made:
        assert dump_json(one) == json.dumps(one, ensure_ascii=False, separators=(",", ":")).encode()


def test_a_long_text_is_read_as_a_short_one_is() -> None:
    x = np.array([[0.1, -1e-300], [5e300, 2.0]] * 5000)
    long = b"".join(encode_request(("x", "n"), [x, np.arange(20_000)], binary=False).buffers)
    assert len(long) > 1 << 16
    read = decode_request(long).tensors
    np.testing.assert_array_equal(read["x"], x)
    assert (read["n"].dtype, read["n"].tolist()) == (np.dtype("i8"), list(range(20_000)))
    with pytest.raises(DecodeError, match="beyond the range"):
        decode_request(long.replace(b"5e+300", b"5e+400", 1))
