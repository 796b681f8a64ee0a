"""The codec: what it writes it reads, what the 2018 client writes it reads, and no tensor byte is copied."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from remote_ops import graphpipe
from remote_ops.errors import DecodeError, EncodeError
from remote_ops.graphpipe import (
    METADATA_REQUEST,
    ErrorItem,
    InferRequest,
    InferResponse,
    MetadataRequest,
    decode_metadata,
    decode_request,
    decode_response,
    encode_error,
    encode_metadata,
    encode_request,
    encode_response,
)
from remote_ops.signature import DTYPES, Signature, TensorSpec

# How the 2018 code calls today's flatbuffers.
pytestmark = pytest.mark.filterwarnings("ignore:numElems is deprecated:DeprecationWarning")

Array = npt.NDArray[Any]

NUMERIC = [row for row in DTYPES.values() if row.name != "string"]
STORED_NAMES = [row.name for row in NUMERIC if not row.is_bit_view]
SHAPES: list[tuple[int, ...]] = [(), (1,), (5,), (2, 3), (0,), (0, 3), (3, 0, 2), (1,) * 32, (2, 1, 3, 1)]


def joined(buffers: Sequence[bytes | bytearray | memoryview]) -> bytearray:
    return bytearray(b"".join(buffers))


def request_of(message: bytes | bytearray | memoryview) -> InferRequest:
    request = decode_request(message)
    assert isinstance(request, InferRequest)
    return request


def sample(dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Bits that no two elements share, as far as the size of an element allows."""
    raw = np.arange(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8) * 37 % 251
    if dtype == np.bool_:
        raw %= 2
    return raw.astype(np.uint8).view(dtype).reshape(shape)


def objects(*items: Any) -> Array:
    array = np.empty(len(items), object)
    array[:] = items
    return array


def assert_same_bits(got: Array, sent: Array, stored: np.dtype[Any]) -> None:
    assert got.dtype == stored
    assert got.shape == sent.shape
    assert got.tobytes() == sent.tobytes()


# --------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("row", NUMERIC, ids=lambda row: row.name)
def test_c02_c03_every_numeric_dtype_round_trips_in_its_stored_type(row: Any, shape: tuple[int, ...]) -> None:
    array = sample(row.numpy, shape)
    request = request_of(joined(encode_request(("x",), [array])))
    assert_same_bits(request.tensors[0], array, row.stored)
    reply = decode_response(joined(encode_response([array])))
    assert_same_bits(reply.tensors[0], array, row.stored)
    assert reply.errors == []


def test_names_outputs_and_config_round_trip() -> None:
    arrays = [sample(np.dtype("f4"), (2, 2)), sample(np.dtype("i8"), (3,))]
    message = joined(encode_request(("größe", "b"), arrays, ("y", "", "日本"), b'{"k": 1}\x00\xff'))
    request = request_of(message)
    assert request.input_names == ("größe", "b")
    assert request.output_names == ("y", "", "日本")
    assert request.config == b'{"k": 1}\x00\xff'  # C18: any binary data
    assert [tensor.tolist() for tensor in request.tensors] == [array.tolist() for array in arrays]


def test_c08_absent_and_empty_vectors_decode_alike() -> None:
    written_empty = request_of(joined(encode_request((), [])))
    builder = flatbuffers.Builder(64)
    builder.StartObject(4)
    infer = builder.EndObject()
    absent = request_of(finish_request(builder, infer))
    assert absent == written_empty == InferRequest(b"", (), [], ())


def test_c09_a_metadata_request_is_told_from_an_infer_request() -> None:
    assert decode_request(METADATA_REQUEST) == MetadataRequest()
    assert not isinstance(request_of(joined(encode_request((), []))), MetadataRequest)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.array(["a", "bé", ""]), [b"a", "bé".encode(), b""]),
        (np.array([b"a", b"bcd\xff"]), [b"a", b"bcd\xff"]),
        (objects("str", b"bytes", "日本"), [b"str", b"bytes", "日本".encode()]),
        (objects(b"\x00in\x00side\x00", b"\xff\xfe\xfd", b""), [b"\x00in\x00side\x00", b"\xff\xfe\xfd", b""]),
        (objects(np.str_("s"), np.bytes_(b"b")), [b"s", b"b"]),
        (np.array([], dtype="U3"), []),
        (np.array([], dtype=object), []),
    ],
    ids=["U", "S", "object", "raw", "numpy scalars", "empty U", "empty object"],
)
def test_c04_strings_of_every_kind_arrive_as_bytes(value: Array, expected: list[bytes]) -> None:
    (got,) = decode_response(joined(encode_response([value]))).tensors
    assert got.dtype == object
    assert got.shape == value.shape
    assert got.tolist() == expected


@pytest.mark.skipif(not hasattr(np.dtypes, "StringDType"), reason="numpy 2 has variable-width strings")
def test_numpy_variable_width_strings_encode() -> None:
    value = np.array(["a", "long " * 20], dtype=np.dtypes.StringDType())
    (got,) = decode_response(joined(encode_response([value]))).tensors
    assert got.tolist() == [b"a", b"long " * 20]


@pytest.mark.parametrize("shape", [(), (2, 2), (4, 1, 1)], ids=str)
def test_c05_c06_string_tensors_keep_their_shape(shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape))
    value = objects(*(b"x" * n for n in range(count))).reshape(shape)
    (got,) = decode_response(joined(encode_response([value]))).tensors
    assert got.shape == shape
    assert got.ravel().tolist() == value.ravel().tolist()


def test_a_large_tensor_of_short_strings_round_trips() -> None:
    value = objects(*([b"x", b""] * 150_000))
    (got,) = decode_response(joined(encode_response([value]))).tensors
    assert got.tolist() == value.tolist()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (2**20, 0)], ids=str)
@pytest.mark.parametrize("dtype", ["f4", "f8", "O"])
def test_c07_zero_size_dims_round_trip(dtype: str, shape: tuple[int, ...]) -> None:
    (got,) = decode_response(joined(encode_response([np.empty(shape, dtype)]))).tensors
    assert got.shape == shape
    assert got.dtype == np.dtype(dtype)


def test_c06_a_scalar_is_one_element_without_axes() -> None:
    (got,) = decode_response(joined(encode_response([np.array(1.5)]))).tensors
    assert got.shape == ()
    assert got == 1.5


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4).T,
        np.arange(12, dtype=np.float32)[::2],
        np.arange(12, dtype=np.float32)[::-1],
        np.asfortranarray(np.arange(12).reshape(3, 4)),
        np.broadcast_to(np.float64(2.5), (2, 3)),
        np.arange(6, dtype=">f8").reshape(2, 3),
        np.array(7, dtype=">i4"),
        np.array([["a", "b"], ["c", "d"]]).T,
        np.arange(4, dtype=np.uint8).astype(bool)[::-1],
    ],
    ids=[
        "transposed",
        "strided",
        "reversed",
        "fortran",
        "broadcast",
        "big-endian",
        "big-endian 0-d",
        "strings",
        "bool",
    ],
)
def test_c02_any_memory_layout_arrives_row_major_and_little_endian(array: Array) -> None:
    (got,) = decode_response(joined(encode_response([array]))).tensors
    expected = [str(item).encode() for item in array.ravel()] if array.dtype.kind == "U" else array.ravel().tolist()
    assert got.shape == array.shape
    assert got.ravel().tolist() == expected


def test_read_only_arrays_encode() -> None:
    array = sample(np.dtype("f4"), (3,))
    array.flags.writeable = False
    (got,) = decode_response(joined(encode_response([array]))).tensors
    assert got.tobytes() == array.tobytes()


def test_errors_round_trip_and_hold_no_outputs() -> None:
    message = encode_error(-5, "pourquoi: \ud800 日本")
    assert decode_response(message) == InferResponse([], [ErrorItem(-5, "pourquoi: ? 日本")])


def test_c15_errors_win_where_a_peer_sends_tensors_too() -> None:
    builder = flatbuffers.Builder(256)
    text = builder.CreateString("no")
    builder.StartObject(2)
    builder.PrependInt64Slot(0, 3, 0)
    builder.PrependUOffsetTRelativeSlot(1, text, 0)
    errors = build_offsets(builder, [builder.EndObject()])
    tensors = build_offsets(builder, [build_tensor(builder, np.zeros(2, np.float32))])
    builder.StartObject(2)
    builder.PrependUOffsetTRelativeSlot(0, tensors, 0)
    builder.PrependUOffsetTRelativeSlot(1, errors, 0)
    builder.Finish(builder.EndObject())
    assert decode_response(builder.Output()) == InferResponse([], [ErrorItem(3, "no")])


# --------------------------------------------------------------------------- what has no form on the wire


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "datetime64[s]", "timedelta64[s]", "V4", "f4,f4"])
def test_a_dtype_without_a_form_on_the_wire_is_refused_by_name(dtype: str) -> None:
    array = np.zeros((2, 3), dtype)
    with pytest.raises(EncodeError) as caught:
        encode_request(("x",), [array])
    assert f"{array.dtype.name} [2, 3]" in str(caught.value)
    assert caught.value.dtype == array.dtype.name
    assert caught.value.shape == (2, 3)


@pytest.mark.parametrize("item", [None, 3, ["a"], 2.5])
def test_an_object_that_is_no_string_is_refused(item: Any) -> None:
    array = np.empty(2, object)
    array[0], array[1] = "a", item
    with pytest.raises(EncodeError, match=rf"got {type(item).__name__} in an object array \[2\]"):
        encode_response([array])


def test_text_without_a_utf8_form_is_refused_in_our_words() -> None:
    lone = "a\ud800"
    for encode in (
        lambda: encode_request((lone,), [np.zeros(1)]),
        lambda: encode_request((), [np.zeros(1)], (lone,)),
        lambda: encode_response([objects(lone)]),
        lambda: encode_metadata(Signature((TensorSpec(lone, "float32", ()),), ())),
        lambda: encode_metadata(Signature((), (), description=lone)),
    ):
        with pytest.raises(EncodeError, match="no UTF-8 form"):
            encode()


@pytest.mark.parametrize("sizes", [[2**31 - 1], [5 << 30], [1 << 30, 1 << 30], [2**31 - 1] * 3])
def test_more_than_two_gibibytes_are_refused_before_they_are_touched(tmp_path: Path, sizes: list[int]) -> None:
    hollow = tmp_path / "hollow"
    with hollow.open("wb") as file:
        file.truncate(max(sizes))
    arrays = [np.memmap(hollow, np.uint8, "r", shape=(size,)) for size in sizes]
    with pytest.raises(EncodeError, match="2 GiB"):
        encode_response(arrays)


# --------------------------------------------------------------------------- where the bytes lie


@pytest.mark.parametrize("row", NUMERIC, ids=lambda row: row.name)
def test_no_tensor_byte_is_copied_either_way(row: Any) -> None:
    array = sample(row.numpy, (64, 3))
    buffers = encode_request(("x",), [array])
    assert any(np.shares_memory(np.frombuffer(buffer, np.uint8), array) for buffer in buffers)
    message = joined(buffers)
    assert np.shares_memory(request_of(message).tensors[0], np.frombuffer(message, np.uint8))


def test_decoded_arrays_are_writable_only_if_the_message_is() -> None:
    message = joined(encode_response([np.zeros(3)]))
    assert decode_response(message).tensors[0].flags.writeable
    assert not decode_response(bytes(message)).tensors[0].flags.writeable


@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_numeric_tensor_starts_on_a_64_byte_boundary_of_the_message(count: int) -> None:
    arrays = [sample(row.numpy, (n % 5 + 1, 3)) for n, row in enumerate(NUMERIC[:count])]
    arrays.insert(count // 2, objects(b"a", b"bc"))
    message = joined(encode_request(tuple("x" * n for n in range(count + 1)), arrays, ("y",), b"cfg"))
    start = np.frombuffer(message, np.uint8).__array_interface__["data"][0]
    tensors = request_of(message).tensors
    for tensor, array in zip(tensors, arrays, strict=True):
        assert tensor.tobytes() == array.tobytes() or tensor.tolist() == array.tolist()
        if tensor.dtype != object:
            assert (tensor.__array_interface__["data"][0] - start) % 64 == 0


def test_the_int64_of_shapes_and_error_codes_is_aligned_as_a_strict_verifier_wants() -> None:
    for text in ("", "a", "abcdefg"):
        message = memoryview(encode_error(13, text))
        response, fields = graphpipe._table(message, 0)
        slot, _ = graphpipe._vector(message, response + fields[1], 4)
        error, fields = graphpipe._table(message, slot)
        assert (error + fields[0]) % 8 == 0
    for names in ((), ("a",), ("abcd",)):
        message = memoryview(joined(encode_request(names, [np.zeros((2, 3))] * 3)))
        request, fields = graphpipe._table(message, 0)
        infer, fields = graphpipe._table(message, request + fields[1])
        first, count = graphpipe._vector(message, infer + fields[2], 4)
        for slot in range(first, first + 4 * count, 4):
            tensor, fields = graphpipe._table(message, slot)
            assert graphpipe._vector(message, tensor + fields[1], 8)[0] % 8 == 0


@pytest.mark.parametrize("offset", range(8))
def test_c37_messages_at_any_address_decode(offset: int) -> None:
    arrays = [sample(np.dtype("f8"), (3,)), sample(np.dtype("i8"), (2, 2)), objects(b"s"), sample(np.dtype("u2"), (3,))]
    ours = joined(encode_request(("a", "b", "c", "d"), arrays))
    theirs = build_request(arrays, ["a", "b", "c", "d"])
    for message in (ours, theirs):
        room = bytearray(offset) + message
        got = request_of(memoryview(room)[offset:]).tensors
        assert [tensor.tolist() for tensor in got] == [array.tolist() for array in arrays]
        assert (got[0] + 1).tolist() == (arrays[0] + 1).tolist()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda m: np.frombuffer(m, np.int8)])
def test_any_buffer_of_bytes_decodes(kind: Callable[[bytes], Any]) -> None:
    message = bytes(joined(encode_response([np.arange(3)])))
    assert decode_response(kind(message)).tensors[0].tolist() == [0, 1, 2]


# --------------------------------------------------------------------------- messages laid out by others


def build_offsets(builder: Any, targets: Sequence[int]) -> int:
    builder.StartVector(4, len(targets), 4)
    for target in reversed(targets):
        builder.PrependUOffsetTRelative(target)
    return int(builder.EndVector())


def build_tensor(builder: Any, array: Array, *, slots: int = 4, order: Sequence[int] = (0, 1, 2)) -> int:
    """One Tensor table of `slots` vtable slots whose fields are written in `order`; slot 7 holds a future field."""
    builder.StartVector(8, array.ndim, 8)
    for size in reversed(array.shape):
        builder.PrependInt64(size)
    shape = builder.EndVector()
    is_string = array.dtype == object
    if is_string:
        data = build_offsets(builder, [builder.CreateString(item) for item in array.ravel().tolist()])
    else:
        data = builder.CreateByteVector(array.tobytes())
    wire_type = next(row.wire_type for row in DTYPES.values() if row.stored == array.dtype)
    builder.StartObject(slots)
    write: list[Callable[[], None]] = [
        lambda: builder.PrependUint8Slot(0, wire_type, 0),
        lambda: builder.PrependUOffsetTRelativeSlot(1, shape, 0),
        lambda: builder.PrependUOffsetTRelativeSlot(3 if is_string else 2, data, 0),
    ]
    for step in order:
        write[step]()
    if slots > 7:
        builder.PrependInt64Slot(7, 0x0123456789ABCDEF, 0)
    return int(builder.EndObject())


def finish_request(builder: Any, infer: int, *, tag: int = 1, slots: int = 2, tag_first: bool = True) -> bytearray:
    builder.StartObject(slots)
    if tag_first:
        builder.PrependUint8Slot(0, tag, 0)
    builder.PrependUOffsetTRelativeSlot(1, infer, 0)
    if not tag_first:
        builder.PrependUint8Slot(0, tag, 0)
    if slots > 7:
        builder.PrependUOffsetTRelativeSlot(7, infer, 0)
    builder.Finish(builder.EndObject())
    return bytearray(builder.Output())


def build_request(
    arrays: Sequence[Array],
    names: Sequence[str],
    *,
    slots: tuple[int, int, int] = (2, 4, 4),
    build_order: Sequence[str] = ("config", "tensors", "inputs", "outputs"),
    field_order: Sequence[str] = ("config", "tensors", "inputs", "outputs"),
    tensor_order: Sequence[int] = (0, 1, 2),
    tag_first: bool = True,
) -> bytearray:
    """A request as another language's builder would lay it out: which child is built first, which field added first."""
    builder = flatbuffers.Builder(1024)
    build: dict[str, Callable[[], int]] = {
        "config": lambda: builder.CreateString("cfg"),
        "tensors": lambda: build_offsets(
            builder, [build_tensor(builder, array, slots=slots[2], order=tensor_order) for array in arrays]
        ),
        "inputs": lambda: build_offsets(builder, [builder.CreateString(name) for name in names]),
        "outputs": lambda: build_offsets(builder, [builder.CreateString("y")]),
    }
    built = {part: build[part]() for part in build_order}
    place = {"config": 0, "inputs": 1, "tensors": 2, "outputs": 3}
    builder.StartObject(slots[1])
    for part in field_order:
        builder.PrependUOffsetTRelativeSlot(place[part], built[part], 0)
    if slots[1] > 7:
        builder.PrependUOffsetTRelativeSlot(7, built["config"], 0)
    return finish_request(builder, builder.EndObject(), slots=slots[0], tag_first=tag_first)


LAYOUTS: dict[str, dict[str, Any]] = {
    "go": {
        "build_order": ("config", "inputs", "outputs", "tensors"),
        "field_order": ("config", "inputs", "tensors", "outputs"),
    },
    "python": {"tag_first": True, "tensor_order": (1, 0, 2)},
    "java": {
        "build_order": ("tensors", "outputs", "inputs", "config"),
        "field_order": ("outputs", "tensors", "inputs", "config"),
        "tensor_order": (2, 1, 0),
        "tag_first": False,
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_c38_the_order_of_fields_does_not_matter(layout: str) -> None:
    arrays = [sample(np.dtype("f4"), (2, 3)), objects(b"a", b"\x00\xff"), sample(np.dtype("i8"), (0, 2))]
    request = request_of(build_request(arrays, ["p", "q", "r"], **LAYOUTS[layout]))
    assert request.config == b"cfg"
    assert request.input_names == ("p", "q", "r")
    assert request.output_names == ("y",)
    assert [tensor.tolist() for tensor in request.tensors] == [array.tolist() for array in arrays]


def test_c39_unknown_extra_fields_are_ignored() -> None:
    array = sample(np.dtype("f8"), (2, 3))
    request = request_of(build_request([array], ["p"], slots=(8, 8, 8)))
    assert request.config == b"cfg"
    assert request.tensors[0].tolist() == array.tolist()


def test_c11_a_request_of_no_or_unknown_kind_is_refused() -> None:
    for tag in (0, 3, 255):
        builder = flatbuffers.Builder(64)
        builder.StartObject(4)
        with pytest.raises(DecodeError, match=f"a request of type {tag}"):
            decode_request(finish_request(builder, builder.EndObject(), tag=tag))


def test_strings_without_their_nul_decode() -> None:
    message = joined(encode_response([objects(b"abcd")]))
    end = bytes(message).index(b"abcd") + 4
    assert decode_response(message[:end]).tensors[0].tolist() == [b"abcd"]


# --------------------------------------------------------------------------- metadata


def spec(name: str, dtype: str, shape: tuple[int, ...], **more: Any) -> TensorSpec:
    return TensorSpec(name, dtype, shape, **more)


SIGNATURE = Signature(
    inputs=(
        *(spec(row.name, row.name, (-1, 3), description=f"takes {row.name}") for row in DTYPES.values()),
        spec("mask", "bool", (), differentiable=False),
        spec("weights", "bfloat16", (-1, -1), description="the weights", differentiable=True),
    ),
    outputs=(spec("größe", "float32", (-1,)), spec("label", "string", (-1, 5), description="of the row")),
    name="resnet",
    version="3",
    server="server-ref",
    description="A model [with brackets], and a comma.",
    features=("vjp", "batch=0"),
)


def test_c19_c20_metadata_round_trips_with_dtypes_gradients_and_features() -> None:
    assert decode_metadata(encode_metadata(SIGNATURE)) == SIGNATURE


@pytest.mark.parametrize(
    "description",
    [
        *("", "plain", "ends in a bracket]", "[features", "a [features: x] in the middle", "open [features:"),
        *("[features: x]", "listed [features: x, y]", "none [features:]", "twice [features: x] [features: ]"),
    ],
)
@pytest.mark.parametrize("features", [(), ("vjp",), ("vjp", "batch=0")])
def test_features_are_told_from_the_description(description: str, features: tuple[str, ...]) -> None:
    signature = Signature((), (), description=description, features=features)
    assert decode_metadata(encode_metadata(signature)) == signature


def test_bit_views_and_gradients_are_told_by_tokens_an_old_peer_can_ignore() -> None:
    signature = Signature((spec("w", "bfloat16", (2,), description="weights", differentiable=True),), ())
    message = encode_metadata(signature)
    assert b"weights dtype=bfloat16 differentiable" in message


@pytest.mark.parametrize("first", ["bool", "float8_e5m2"])
def test_a_dtype_is_not_taken_from_the_words_of_a_description(first: str) -> None:
    mine = spec("x", "float8_e4m3fn", (2,), description=f"like dtype={first}")
    got = decode_metadata(encode_metadata(Signature((mine,), ()))).inputs[0]
    assert (got.dtype, got.description) == (mine.dtype, mine.description)


def test_a_token_that_the_wire_type_contradicts_is_no_token() -> None:
    signature = Signature((spec("x", "float32", (2,), description="dtype=bool"),), ())
    assert decode_metadata(encode_metadata(signature)).inputs[0].dtype == "float32"


def test_an_input_of_type_null_fits_any_dtype_and_shape() -> None:
    signature = decode_metadata(encode_metadata(Signature((TensorSpec("x", "any", None),), ())))
    assert signature.inputs == (TensorSpec("x", "any", None),)


# --------------------------------------------------------------------------- the 2018 code as the oracle


@pytest.mark.peers
@pytest.mark.parametrize("dtype", [*STORED_NAMES, "string"])
def test_the_2018_code_reads_what_we_write(dtype: str) -> None:
    from graphpipe import convert

    stored = DTYPES[dtype].stored
    arrays = [objects(b"a", b"", b"xyz")] if dtype == "string" else [sample(stored, (2, 3)), sample(stored, (4,))]
    names = tuple("in" * (n + 1) for n in range(len(arrays)))
    request = convert.deserialize_request(joined(encode_request(names, arrays, ("y", "z"), b"cfg")))
    assert request.config == b"cfg"
    assert request.input_names == [name.encode() for name in names]
    assert request.output_names == [b"y", b"z"]
    assert [got.tolist() for got in request.input_tensors] == [array.tolist() for array in arrays]
    outputs, errors = convert.deserialize_infer_response(joined(encode_response(arrays)))
    assert [got.tolist() for got in outputs] == [array.tolist() for array in arrays]
    assert errors == []


def reply_of_2018(arrays: Sequence[Array]) -> bytearray:
    """Its own `serialize_infer_response` miscounts the errors with today's flatbuffers; the rest of it is right."""
    from graphpipe import convert
    from graphpipe.graphpipefb import InferResponse as fb

    builder = flatbuffers.Builder(1024)
    tensors = build_offsets(builder, [convert.make_tensor(builder, array) for array in arrays])
    fb.InferResponseStart(builder)
    fb.InferResponseAddOutputTensors(builder, tensors)
    return bytearray(convert.output(builder, fb.InferResponseEnd(builder)))


@pytest.mark.peers
@pytest.mark.parametrize("dtype", [*STORED_NAMES, "string"])
def test_we_read_what_the_2018_code_writes(dtype: str) -> None:
    from graphpipe import convert

    stored = DTYPES[dtype].stored
    arrays = [objects("a", "", "xyz")] if dtype == "string" else [sample(stored, (2, 3)), sample(stored, (4, 0))]
    expected = [[b"a", b"", b"xyz"]] if dtype == "string" else [array.tolist() for array in arrays]
    names = ["in" * (n + 1) for n in range(len(arrays))]
    request = request_of(convert.serialize_infer_request(convert.InferReq("cfg", arrays, names, ["y"])))
    assert request.config == b"cfg"
    assert request.input_names == tuple(names)
    assert request.output_names == ("y",)
    assert [got.tolist() for got in request.tensors] == expected
    reply = decode_response(reply_of_2018(arrays))
    assert [got.tolist() for got in reply.tensors] == expected


@pytest.mark.peers
def test_the_2018_code_reads_our_errors_and_finds_no_outputs() -> None:
    from graphpipe import convert

    assert convert.deserialize_infer_response(encode_error(429, "busy")) == ([], [{"code": 429, "message": b"busy"}])


@pytest.mark.peers
def test_the_2018_code_reads_our_metadata() -> None:
    from graphpipe import convert

    metadata = convert.deserialize_metadata_response(encode_metadata(SIGNATURE))
    assert metadata.Name() == b"resnet"
    assert metadata.Description() == b"A model [with brackets], and a comma. [features: vjp, batch=0]"
    assert metadata.InputsLength() == len(SIGNATURE.inputs)
    for n, each in enumerate(SIGNATURE.inputs):
        assert metadata.Inputs(n).Name().decode() == each.name
        assert metadata.Inputs(n).Type() == DTYPES[each.dtype].wire_type
        assert metadata.Inputs(n).ShapeAsNumpy().tolist() == list(each.shape or ()) or each.shape == ()
    assert metadata.Outputs(0).Name().decode() == "größe"


@pytest.mark.peers
def test_we_read_the_metadata_that_the_2018_code_writes() -> None:
    from graphpipe import convert

    io = {"name": "x", "description": "an input", "shape": [-1, 3], "type": np.dtype("float32")}
    fields = {"name": "m", "version": "1", "server": "s", "description": "d", "inputs": [io], "outputs": [io]}
    expected = TensorSpec("x", "float32", (-1, 3), "an input")
    assert decode_metadata(convert.serialize_metadata_response(fields)) == Signature(
        (expected,), (expected,), "m", "1", "s", "d"
    )
    sparse: dict[str, Any] = {"inputs": [], "outputs": []}
    assert decode_metadata(convert.serialize_metadata_response(sparse)) == Signature((), ())


@pytest.mark.peers
def test_metadata_requests_are_understood_both_ways() -> None:
    from graphpipe import convert

    assert convert.deserialize_request(METADATA_REQUEST) is None
    assert decode_request(convert.serialize_metadata_request()) == MetadataRequest()


# --------------------------------------------------------------------------- any message


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMERIC_ARRAYS = st.sampled_from(STORED_NAMES).flatmap(
    lambda name: hnp.arrays(np.dtype(name), hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4))
)
STRING_ARRAYS = st.lists(st.binary(max_size=20), max_size=8).map(lambda items: objects(*items))


@settings(max_examples=150, deadline=None)
@given(
    tensors=st.lists(st.one_of(NUMERIC_ARRAYS, STRING_ARRAYS), max_size=5),
    names=st.lists(NAMES, max_size=5),
    outputs=st.lists(NAMES, max_size=4),
    config=st.binary(max_size=40),
    trailing=st.binary(max_size=9),
)
def test_c36_any_request_round_trips_whatever_bytes_follow_it(
    tensors: list[Array], names: list[str], outputs: list[str], config: bytes, trailing: bytes
) -> None:
    message = joined(encode_request(tuple(names), tensors, tuple(outputs), config)) + trailing
    request = request_of(message)
    assert (request.config, request.input_names, request.output_names) == (config, tuple(names), tuple(outputs))
    assert len(request.tensors) == len(tensors)
    for got, sent in zip(request.tensors, tensors, strict=True):
        assert got.dtype == sent.dtype
        assert got.shape == sent.shape
        assert got.tolist() == sent.tolist() if sent.dtype == object else got.tobytes() == sent.tobytes()


def test_c36_a_size_prefixed_message_is_refused() -> None:
    request = joined(encode_request(("x",), [np.ones(4, np.float32)]))
    reply = joined(encode_response([np.ones(4, np.float32)]))
    for decode, message in (
        (decode_request, request),
        (decode_request, METADATA_REQUEST),
        (decode_response, reply),
        (decode_response, encode_error(3, "no")),
        (decode_metadata, encode_metadata(SIGNATURE)),
    ):
        with pytest.raises(DecodeError):
            decode(struct.pack("<I", len(message)) + bytes(message))
