"""Whatever bytes come, a decoder of ours gives a valid message or a DecodeError, and in little memory."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import flatbuffers
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remote_ops import graphpipe
from remote_ops.errors import DecodeError
from remote_ops.graphpipe import (
    METADATA_REQUEST,
    InferRequest,
    InferResponse,
    decode_metadata,
    decode_request,
    decode_response,
    encode_error,
    encode_metadata,
    encode_request,
    encode_response,
)
from remote_ops.signature import Signature, TensorSpec

Array = npt.NDArray[Any]
Decode: TypeAlias = Callable[[Any], Any]

CAPTURES = Path(__file__).parent / "captures"
DECODERS: tuple[Decode, ...] = (decode_request, decode_response, decode_metadata)


def objects(*items: Any) -> Array:
    array = np.empty(len(items), object)
    array[:] = items
    return array


SIGNATURE = Signature(
    (TensorSpec("x", "float32", (-1, 3), "input", True), TensorSpec("m", "bool", ())),
    (TensorSpec("y", "string", (-1,)),),
    "model",
    "1",
    "server",
    "text",
    ("vjp",),
)
MIXED = [np.arange(6, dtype=np.float32).reshape(2, 3), objects(b"ab", b""), np.zeros((0, 2), np.int64)]
VALID: dict[str, tuple[Decode, bytes]] = {
    "request": (decode_request, b"".join(encode_request(("a", "b", "c"), MIXED, ("y",), b"cfg"))),
    "numeric request": (decode_request, b"".join(encode_request(("x",), [np.arange(3.0)], ("y",)))),
    "metadata request": (decode_request, METADATA_REQUEST),
    "response": (decode_response, b"".join(encode_response(MIXED))),
    "error": (decode_response, encode_error(13, "it broke")),
    "metadata": (decode_metadata, encode_metadata(SIGNATURE)),
}


def lies_inside(tensor: Array, message: bytes | bytearray) -> bool:
    """Whether a decoded tensor views the message only; one of strings, or without elements, owns its memory."""
    if tensor.dtype == object or not tensor.size:
        return True
    start = np.frombuffer(message, np.uint8).__array_interface__["data"][0]
    low, high = np.lib.array_utils.byte_bounds(tensor)
    return bool(start <= low and high <= start + len(message))


def try_decode(decode: Decode, message: bytes | bytearray) -> Any:
    """The decoded message, every tensor of it proven to lie inside, or None; any other exception is a failure."""
    try:
        decoded = decode(message)
    except DecodeError:
        return None
    if isinstance(decoded, InferRequest | InferResponse):
        for tensor in decoded.tensors:
            assert lies_inside(tensor, message)
            assert len(tensor.tobytes()) == tensor.nbytes  # every byte of it can be read
    return decoded


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most memory that `call` held beyond what was held before it."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def assert_refused(
    decode: Decode, message: bytes | bytearray, match: str | None = None, *, within_bytes: int = 20_000_000
) -> None:
    def refuse() -> None:
        with pytest.raises(DecodeError, match=match):
            decode(message)

    assert peak_bytes(refuse) < within_bytes


# --------------------------------------------------------------------------- messages with one thing wrong


class Layout:
    """Writes a message by hand, front to back, so that any offset, size or count can be wrong."""

    def __init__(self) -> None:
        self.bytes = bytearray(4)

    def point(self, slot: int, target: int | None = None) -> None:
        struct.pack_into("<I", self.bytes, slot, (len(self.bytes) if target is None else target) - slot)

    def table(self, slot: int, size: int, *fields: int) -> int:
        vtable = len(self.bytes)
        self.bytes += struct.pack(f"<{len(fields) + 2}H", 2 * len(fields) + 4, size, *fields)
        self.bytes += bytes(-len(self.bytes) % 4)
        self.point(slot)
        at = len(self.bytes)
        self.bytes += struct.pack("<i", at - vtable) + bytes(size - 4)
        return at

    def offsets(self, slot: int, count: int) -> range:
        self.point(slot)
        self.bytes += struct.pack("<I", count) + bytes(4 * count)
        return range(len(self.bytes) - 4 * count, len(self.bytes), 4)

    def data(self, slot: int, data: bytes, count: int | None = None) -> int:
        self.bytes += bytes(-len(self.bytes) % 4)
        self.point(slot)
        at = len(self.bytes)
        self.bytes += struct.pack("<I", len(data) if count is None else count) + data
        return at

    def shape(self, slot: int, *sizes: int) -> int:
        return self.data(slot, struct.pack(f"<{len(sizes)}q", *sizes), len(sizes))


def tensor_message(
    wire_type: int,
    shape: tuple[int, ...],
    data: bytes | None = None,
    strings: tuple[bytes, ...] | None = None,
) -> bytearray:
    """An InferResponse with one tensor that has exactly these fields."""
    layout = Layout()
    response = layout.table(0, 8, 4)
    (slot,) = layout.offsets(response + 4, 1)
    tensor = layout.table(slot, 20, 16, 4, 8 if data is not None else 0, 12 if strings is not None else 0)
    layout.bytes[tensor + 16] = wire_type
    layout.shape(tensor + 4, *shape)
    if data is not None:
        layout.data(tensor + 8, data)
    if strings is not None:
        for at, item in zip(layout.offsets(tensor + 12, len(strings)), strings, strict=True):
            layout.data(at, item)
    return layout.bytes


FLOAT32, STRING = 10, 12


def test_the_hand_written_layout_is_valid_where_nothing_is_wrong() -> None:
    (got,) = decode_response(tensor_message(FLOAT32, (2,), bytes(8))).tensors
    assert got.tolist() == [0, 0]
    (got,) = decode_response(tensor_message(STRING, (2,), strings=(b"a", b""))).tensors
    assert got.tolist() == [b"a", b""]


@pytest.mark.parametrize("wire_type", [0, 13, 14, 100, 127, 128, 255])
def test_c03_null_and_unknown_types_are_refused(wire_type: int) -> None:
    for message in (
        tensor_message(wire_type, (2,), bytes(8)),
        tensor_message(wire_type, (0,)),
        tensor_message(wire_type, (1,), strings=(b"a",)),
    ):
        assert_refused(decode_response, message, f"a tensor of type {wire_type} ")


def test_c03_a_tensor_without_any_field_is_refused() -> None:
    layout = Layout()
    (slot,) = layout.offsets(layout.table(0, 8, 4) + 4, 1)
    layout.table(slot, 4)
    assert_refused(decode_response, layout.bytes, r"a tensor of type 0 \(Null\)")


@pytest.mark.parametrize("wire_type", range(1, 12))
def test_c02_data_of_another_length_than_the_shape_says_is_refused(wire_type: int) -> None:
    size = graphpipe._SIZES[wire_type]
    for length in {0, 1, 6 * size - 1, 6 * size + 1, 7 * size} - {6 * size}:
        assert_refused(decode_response, tensor_message(wire_type, (2, 3), bytes(length)), "expected")
    assert_refused(decode_response, tensor_message(wire_type, (2, 3)), "expected")
    assert_refused(decode_response, tensor_message(wire_type, (0, 3), bytes(size)), "expected 0 bytes")
    assert_refused(decode_response, tensor_message(wire_type, (), bytes(size + 1)), "expected")
    assert_refused(decode_response, tensor_message(wire_type, ()), "expected")


@pytest.mark.parametrize("shape", [(-1,), (-1, -1), (2, -3), (0, -1), (-(2**63),), (-(2**63), 0), (-(2**63), -2, 4)])
def test_c02_negative_dims_are_refused(shape: tuple[int, ...]) -> None:
    for message in (
        tensor_message(FLOAT32, shape, b""),
        tensor_message(FLOAT32, shape, bytes(4)),
        tensor_message(STRING, shape, strings=()),
        tensor_message(STRING, shape, strings=(b"a",)),
    ):
        assert_refused(decode_response, message, "negative")


def test_c02_more_than_32_axes_are_refused() -> None:
    assert decode_response(tensor_message(FLOAT32, (1,) * 32, bytes(4))).tensors[0].ndim == 32
    for rank in (33, 64, 1000):
        assert_refused(decode_response, tensor_message(FLOAT32, (1,) * rank, bytes(4)), f"{rank} axes")
        assert_refused(decode_response, tensor_message(STRING, (1,) * rank, strings=(b"a",)), f"{rank} axes")


@pytest.mark.parametrize(
    "shape",
    [(2**32, 2**32), (2**62, 4), (2**63 - 1, 2**63 - 1), (2**16,) * 4, (2**63 - 1,) * 32, (2**61, 2, 2, 2)],
    ids=str,
)
def test_c02_shapes_whose_product_overflows_64_bits_are_refused(shape: tuple[int, ...]) -> None:
    for data in (b"", bytes(4), bytes(64)):
        assert_refused(decode_response, tensor_message(FLOAT32, shape, data), "expected")
    assert_refused(decode_response, tensor_message(STRING, shape, strings=()), "strings")


@pytest.mark.parametrize(
    "shape",
    [(0, 2**32, 2**32), (2**63 - 1, 0), (0, 2**63 - 1), (2**62, 4, 0), (2**40, 0), (2**63 - 1,) * 31 + (0,)],
    ids=str,
)
@pytest.mark.parametrize("wire_type", [1, 11, STRING])
def test_c07_sizes_beyond_any_message_are_refused_even_beside_a_zero_dim(
    wire_type: int, shape: tuple[int, ...]
) -> None:
    assert_refused(decode_response, tensor_message(wire_type, shape), "without elements", within_bytes=1_000_000)


def test_c01_both_data_and_strings_are_refused() -> None:
    both = tensor_message(FLOAT32, (1,), bytes(4), strings=(b"a",))
    assert_refused(decode_response, both, "with string_val")
    assert_refused(decode_response, tensor_message(STRING, (1,), bytes(4), strings=(b"a",)), "String with data")


def test_c08_an_empty_vector_beside_the_filled_one_is_tolerated() -> None:
    assert decode_response(tensor_message(FLOAT32, (1,), bytes(4), strings=())).tensors[0].tolist() == [0]
    assert decode_response(tensor_message(STRING, (1,), b"", strings=(b"a",))).tensors[0].tolist() == [b"a"]


@pytest.mark.parametrize(("shape", "count"), [((2,), 1), ((2,), 3), ((), 0), ((), 2), ((0,), 1), ((2, 2), 2)])
def test_c05_another_count_of_strings_than_the_shape_says_is_refused(shape: tuple[int, ...], count: int) -> None:
    message = tensor_message(STRING, shape, strings=(b"a",) * count)
    assert_refused(decode_response, message, f"got {count}")


@pytest.mark.parametrize("name", [b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80"])
def test_c21_names_that_are_not_utf8_are_refused(name: bytes) -> None:
    stand_in = b"Q" * len(name)
    request = b"".join(encode_request((stand_in.decode(),), [np.zeros(1)], ("other",)))
    assert_refused(decode_request, request.replace(stand_in, name), "not UTF-8")
    request = b"".join(encode_request(("other",), [np.zeros(1)], (stand_in.decode(),)))
    assert_refused(decode_request, request.replace(stand_in, name), "not UTF-8")
    metadata = encode_metadata(Signature((TensorSpec(stand_in.decode(), "float32", ()),), ()))
    assert_refused(decode_metadata, metadata.replace(stand_in, name), "not UTF-8")


def test_a_message_of_an_error_that_is_not_utf8_is_shown_as_far_as_it_can_be() -> None:
    assert decode_response(encode_error(3, "QQ").replace(b"QQ", b"a\xff")).errors[0].message == "a\ufffd"


def test_metadata_that_contradicts_itself_is_refused() -> None:
    twins = encode_metadata(Signature((TensorSpec("aa", "float32", ()), TensorSpec("bb", "float32", ())), ()))
    assert_refused(decode_metadata, twins.replace(b"bb", b"aa"), "share a name")
    below = encode_metadata(Signature((TensorSpec("x", "float32", (0x77777777,)),), ()))
    below = below.replace(struct.pack("<q", 0x77777777), struct.pack("<q", -2))
    assert_refused(decode_metadata, below, "no usable shape")


@pytest.mark.parametrize("sizes", [(), (0x77777777,)], ids=["twins", "below"])
def test_an_error_of_metadata_is_short_however_long_the_names(sizes: tuple[int, ...]) -> None:
    specs = (TensorSpec("a" * 10_000, "float32", sizes), TensorSpec("b" * 10_000, "float32", ()))
    message = encode_metadata(Signature(specs, ())).replace(b"b" * 10_000, b"a" * 10_000)
    with pytest.raises(DecodeError, match="contradicts itself") as caught:
        decode_metadata(message.replace(struct.pack("<q", 0x77777777), struct.pack("<q", -2)))
    assert len(str(caught.value)) < 500


# --------------------------------------------------------------------------- tables that are none


def rooted(vtable: bytes, table: bytes) -> bytes:
    """A message whose root is `table`, preceded by `vtable`."""
    at = 4 + len(vtable)
    return struct.pack("<I", at) + vtable + struct.pack("<i", len(vtable)) + table


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x00",
        bytes(3),
        bytes(4),
        bytes(64),
        b"\xff" * 64,
        b"\x04\x00\x00\x00",
        struct.pack("<Ii", 4, 5),  # a vtable before byte 0
        struct.pack("<Ii", 4, 2**31 - 1),
        struct.pack("<Ii", 4, -(2**31)),  # a vtable far behind the end
        struct.pack("<Ii", 4, -4),  # a vtable that begins where the message ends
        struct.pack("<Ii", 4, 0) + bytes(8),  # a table that is its own vtable
        struct.pack("<IiI", 4, 4, 0),  # its vtable is the root offset
        rooted(struct.pack("<2H", 0, 8), bytes(8)),
        rooted(struct.pack("<2H", 2, 8), bytes(8)),
        rooted(struct.pack("<2H", 3, 8), bytes(8)),
        rooted(struct.pack("<3H", 5, 8, 4), bytes(8)),
        rooted(struct.pack("<3H", 7, 8, 4), bytes(8)),
        rooted(struct.pack("<9H", 17, 8, *(4,) * 7), bytes(8)),
        rooted(struct.pack("<3H", 6, 8, 8), bytes(8)),  # a field behind its table
        rooted(struct.pack("<3H", 6, 8, 0xFFFF), bytes(8)),
        rooted(struct.pack("<3H", 6, 0xFFFF, 4), bytes(8)),  # a table behind the end
        rooted(struct.pack("<3H", 0xFFFE, 8, 4), bytes(8)),  # a vtable behind the end
        rooted(struct.pack("<2H", 4, 40), bytes(4)),
    ],
    ids=lambda message: message.hex()[:40] if isinstance(message, bytes) else None,
)
def test_a_table_that_does_not_fit_is_refused(decode: Decode, message: bytes) -> None:
    assert_refused(decode, message)


def test_a_request_whose_offset_points_at_itself_is_refused() -> None:
    for distance in (0, 1, 2, 3):
        layout = Layout()
        request = layout.table(0, 12, 8, 4)
        layout.bytes[request + 8] = 1
        struct.pack_into("<I", layout.bytes, request + 4, distance)
        assert_refused(decode_request, layout.bytes)


def test_a_vector_whose_offset_points_at_itself_ends_in_bounds() -> None:
    for distance in range(9):
        layout = Layout()
        response = layout.table(0, 8, 4)
        struct.pack_into("<I", layout.bytes, response + 4, distance)
        layout.bytes += bytes(32)
        try_decode(decode_response, layout.bytes)


def test_a_vector_longer_than_what_remains_is_refused() -> None:
    for count in (2, 100, 2**30, 2**32 - 1):
        layout = Layout()
        response = layout.table(0, 8, 4)
        layout.data(response + 4, bytes(4), count)
        assert_refused(decode_response, layout.bytes, "runs past the end")


def test_c36_trailing_bytes_are_tolerated() -> None:
    for decode, message in VALID.values():
        for more in (b"\0", b"\xff" * 7, bytes(1000)):
            assert repr(decode(message + more)) == repr(decode(message))


# --------------------------------------------------------------------------- small messages that mean huge ones


def test_500_offsets_to_one_string_of_a_megabyte_are_refused_in_little_memory() -> None:
    layout = Layout()
    (slot,) = layout.offsets(layout.table(0, 8, 4) + 4, 1)
    tensor = layout.table(slot, 20, 16, 4, 0, 12)
    layout.bytes[tensor + 16] = STRING
    layout.shape(tensor + 4, 500)
    slots = layout.offsets(tensor + 12, 500)
    target = layout.data(slots[0], b"x" * 1_000_000)
    for at in slots:
        layout.point(at, target)
    assert_refused(decode_response, layout.bytes, "decode to more than")


def test_250000_tensors_that_share_one_table_are_refused_in_little_memory() -> None:
    layout = Layout()
    slots = layout.offsets(layout.table(0, 8, 4) + 4, 250_000)
    target = layout.table(slots[0], 20, 16, 4, 8, 0)
    layout.bytes[target + 16] = FLOAT32
    layout.shape(target + 4, 0)
    layout.data(target + 8, b"")
    for at in slots:
        layout.point(at, target)
    assert_refused(decode_response, layout.bytes, "250000 tensors", within_bytes=1_000_000)


@pytest.mark.parametrize("item", [b"", b"x"])
def test_4000_tensors_that_share_one_long_vector_of_strings_are_refused_in_little_memory(item: bytes) -> None:
    layout = Layout()
    slots = layout.offsets(layout.table(0, 8, 4) + 4, 4000)
    target = layout.table(slots[0], 20, 16, 4, 0, 12)
    for at in slots:
        layout.point(at, target)
    layout.bytes[target + 16] = STRING
    layout.shape(target + 4, 100_000)
    strings = layout.offsets(target + 12, 100_000)
    text = layout.data(strings[0], item)
    for at in strings:
        layout.point(at, text)
    assert_refused(decode_response, layout.bytes, "decode to more than", within_bytes=40_000_000)


def test_4000_tensors_that_share_one_megabyte_of_data_are_refused() -> None:
    layout = Layout()
    slots = layout.offsets(layout.table(0, 8, 4) + 4, 4000)
    target = layout.table(slots[0], 20, 16, 4, 8, 0)
    for at in slots:
        layout.point(at, target)
    layout.bytes[target + 16] = 1
    layout.shape(target + 4, 1_000_000)
    layout.data(target + 8, bytes(1_000_000))
    assert_refused(decode_response, layout.bytes, "decode to more than", within_bytes=1_000_000)


def test_names_that_share_one_string_are_refused_in_little_memory() -> None:
    for field in (1, 3):
        layout = Layout()
        request = layout.table(0, 12, 8, 4)
        layout.bytes[request + 8] = 1
        infer = layout.table(request + 4, 20, 4, 8, 12, 16)
        struct.pack_into("<4I", layout.bytes, infer + 4, 0, 0, 0, 0)
        layout.data(infer + 4, b"")
        for other in {1, 2, 3} - {field}:
            layout.offsets(infer + 4 + 4 * other, 0)
        slots = layout.offsets(infer + 4 + 4 * field, 100_000)
        target = layout.data(slots[0], b"n" * 100_000)
        for at in slots:
            layout.point(at, target)
        assert_refused(decode_request, layout.bytes, "decode to more than")


def test_errors_that_share_one_message_are_refused_in_little_memory() -> None:
    layout = Layout()
    slots = layout.offsets(layout.table(0, 12, 4, 8) + 8, 4000)
    target = layout.table(slots[0], 8, 0, 4)
    layout.data(target + 4, b"e" * 1_000_000)
    for at in slots:
        layout.point(at, target)
    response = graphpipe._table(memoryview(layout.bytes), 0)[0]
    layout.offsets(response + 4, 0)
    assert_refused(decode_response, layout.bytes, "decode to more than")


def test_metadata_whose_inputs_share_one_table_is_refused_in_little_memory() -> None:
    layout = Layout()
    slots = layout.offsets(layout.table(0, 8, 0, 0, 0, 0, 4) + 4, 65_000)
    target = layout.table(slots[0], 12, 0, 0, 4, 8)
    layout.bytes[target + 8] = FLOAT32
    layout.shape(target + 4, *(10**12 + n for n in range(32)))
    for at in slots:
        layout.point(at, target)
    assert_refused(decode_metadata, layout.bytes, "decode to more than")


@pytest.mark.parametrize("text", [" " * 300_000, "[features:" * 30_000, "[features: x]" * 20_000 + " x", "]" * 300_000])
def test_a_description_made_to_confuse_the_search_for_features_costs_one_pass(text: str) -> None:
    assert decode_metadata(encode_metadata(Signature((), (), description=text))).features == ()


def test_no_budget_refuses_a_message_that_shares_nothing() -> None:
    for item in (b"", b"x", b"xyz", b"x" * 20):
        sent = objects(*([item] * 200_000))
        assert decode_response(b"".join(encode_response([sent]))).tensors[0].size == sent.size
    names = tuple(f"n{n}" for n in range(100_000))
    request = decode_request(b"".join(encode_request((), [], names)))
    assert isinstance(request, InferRequest)
    assert request.output_names == names
    specs = tuple(TensorSpec(f"n{n}", "float32", (-1,) * 32) for n in range(5_000))
    assert len(decode_metadata(encode_metadata(Signature(specs, ()))).inputs) == 5_000
    shared = objects(*([b""] * 300_000))
    builder = flatbuffers.Builder(1 << 20)
    nothing = builder.CreateString("")
    builder.StartVector(4, shared.size, 4)
    for _ in range(shared.size):
        builder.PrependUOffsetTRelative(nothing)
    strings = builder.EndVector()
    assert decode_strings(builder, strings, shared.size).tolist() == shared.tolist()


def decode_strings(builder: Any, strings: int, count: int) -> Array:
    builder.StartVector(8, 1, 8)
    builder.PrependInt64(count)
    shape = builder.EndVector()
    builder.StartObject(4)
    builder.PrependUint8Slot(0, STRING, 0)
    builder.PrependUOffsetTRelativeSlot(1, shape, 0)
    builder.PrependUOffsetTRelativeSlot(3, strings, 0)
    tensor = builder.EndObject()
    builder.StartVector(4, 1, 4)
    builder.PrependUOffsetTRelative(tensor)
    tensors = builder.EndVector()
    builder.StartObject(2)
    builder.PrependUOffsetTRelativeSlot(0, tensors, 0)
    builder.Finish(builder.EndObject())
    return decode_response(builder.Output()).tensors[0]


# --------------------------------------------------------------------------- messages like one read before


def request_named_by_its_data(name: bytes, *, whole: bool = False) -> bytearray:
    """A valid request whose input name is read out of its tensor's data, the tail of the message, or is all of it."""
    layout = Layout()
    request = layout.table(0, 12, 8, 4)
    layout.bytes[request + 8] = 1
    infer = layout.table(request + 4, 12, 0, 4, 8)
    (name_slot,) = layout.offsets(infer + 4, 1)
    (slot,) = layout.offsets(infer + 8, 1)
    tensor = layout.table(slot, 16, 12, 4, 8)
    layout.bytes[tensor + 12] = 1
    layout.shape(tensor + 4, len(name) if whole else 8)
    at = layout.data(tensor + 8, name if whole else struct.pack("<I", len(name)) + name.ljust(4, b"."))
    layout.point(name_slot, at if whole else at + 4)
    return layout.bytes


def response_shaped_by_its_data(*shape: int) -> bytearray:
    """The same for a reply whose shape is read out of its tensor's data."""
    layout = Layout()
    (slot,) = layout.offsets(layout.table(0, 8, 4) + 4, 1)
    tensor = layout.table(slot, 16, 12, 4, 8)
    layout.bytes[tensor + 12] = 1
    at = layout.data(tensor + 8, struct.pack("<I2q", 2, *shape))
    layout.point(tensor + 4, at + 4)
    return layout.bytes


def test_a_message_is_read_from_its_own_bytes_however_alike_one_read_before() -> None:
    for name in (b"aaaa", b"bb", b"aaaa", b""):
        assert decode_request(request_named_by_its_data(name)).input_names == (name.decode(),)  # type: ignore[union-attr]
    for name in (b"aaaa", b"bbbb", b"cccc", b"dddd"):
        got = decode_request(request_named_by_its_data(name, whole=True))
        assert got.input_names == (name.decode(),)  # type: ignore[union-attr]
    with pytest.raises(DecodeError, match="not UTF-8"):
        decode_request(request_named_by_its_data(b"\xff"))
    for shape in ((4, 5), (2, 10), (20, 1), (4, 5)):
        assert decode_response(response_shaped_by_its_data(*shape)).tensors[0].shape == shape
    with pytest.raises(DecodeError, match="negative"):
        decode_response(response_shaped_by_its_data(-4, -5))


@pytest.mark.parametrize("kind", ["numeric request", "one output"])
def test_a_message_like_one_read_before_is_still_refused_where_its_head_is_damaged(kind: str) -> None:
    decode, message = {**VALID, "one output": (decode_response, b"".join(encode_response([np.arange(3.0)])))}[kind]
    for offset in range(len(message) - 24):
        decode(message)
        decode(message)
        damaged = bytearray(message)
        damaged[offset] ^= 0xFF
        outcomes = [outcome(decode, damaged) for _ in range(3)]
        decode(message)
        decode(message)
        assert {*outcomes, outcome(decode, damaged)} == {outcomes[0]}


def outcome(decode: Decode, message: bytes | bytearray) -> str:
    try:
        return repr(decode(message))
    except DecodeError as error:
        return str(error)


def test_a_message_like_one_read_before_gives_its_own_data() -> None:
    for n in range(4):
        message = bytearray(b"".join(encode_request(("x",), [np.full(3, float(n))])))
        request = decode_request(message)
        assert isinstance(request, InferRequest)
        assert request.tensors[0].tolist() == [n] * 3
        assert lies_inside(request.tensors[0], message)


# --------------------------------------------------------------------------- valid messages, damaged


@pytest.mark.parametrize("kind", VALID)
def test_a_message_cut_at_any_offset_is_refused_unless_only_padding_is_lost(kind: str) -> None:
    decode, message = VALID[kind]
    whole = repr(decode(message))
    survived = 0
    for end in range(len(message)):
        decoded = try_decode(decode, message[:end])
        if decoded is not None:
            survived += 1
            assert repr(decoded) == whole
    # A string's NUL, and the padding that a builder puts behind it, are all that nobody reads.
    assert survived <= 8


@pytest.mark.parametrize("value", [0x00, 0x80, 0xFF])
@pytest.mark.parametrize("kind", VALID)
def test_a_message_with_any_one_byte_changed_decodes_or_is_refused(kind: str, value: int) -> None:
    _, message = VALID[kind]
    for offset in range(len(message)):
        damaged = bytearray(message)
        damaged[offset] = value
        for decode in DECODERS:
            try_decode(decode, damaged)


def mutations(seeds: list[bytes], count: int) -> Iterator[bytearray]:
    """`count` damaged messages, the same every time: bytes, words, cuts, doublings and swaps."""
    choose = random.Random(20180901)
    words = (0, 1, 2, 3, 4, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 4)
    for _ in range(count):
        message = bytearray(choose.choice(seeds))
        for _ in range(choose.choice((1, 1, 2, 3, 8))):
            at = choose.randrange(len(message))
            how = choose.randrange(6)
            if how == 0:
                message[at] = choose.randrange(256)
            elif how == 1:
                message[at] ^= 1 << choose.randrange(8)
            elif how == 2:
                struct.pack_into("<I", message, at - at % 4, choose.choice(words)) if len(message) - at >= 4 else None
            elif how == 3:
                del message[at + 1 :]
            elif how == 4:
                message[at:at] = message[at : at + choose.randrange(1, 40)]
            else:
                other = choose.choice(seeds)
                start = choose.randrange(len(other))
                message[at : at + 8] = other[start : start + 8]
        yield message


def test_only_decode_errors_leave_the_codec_for_20000_damaged_recordings() -> None:
    seeds = [path.read_bytes() for path in sorted(CAPTURES.glob("*.bin"))]
    seeds = [seed for seed in seeds if seed] + [message for _, message in VALID.values()]
    decoded = 0
    for message in mutations(seeds, 20_000):
        for decode in DECODERS:
            decoded += try_decode(decode, message) is not None
    assert decoded > 1_000  # the damage must not be so crude that nothing deep is ever reached


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200))
def test_only_decode_errors_leave_the_codec_for_any_bytes(message: bytes) -> None:
    for decode in DECODERS:
        try_decode(decode, message)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(sorted(VALID)),
    changes=st.lists(st.tuples(st.integers(0, 511), st.integers(-(2**31), 2**32 - 1)), min_size=1, max_size=6),
)
def test_only_decode_errors_leave_the_codec_for_any_changed_words(kind: str, changes: list[tuple[int, int]]) -> None:
    message = bytearray(VALID[kind][1]) + bytes(4)
    for at, word in changes:
        struct.pack_into("<I", message, at % (len(message) - 3), word & 0xFFFFFFFF)
    for decode in DECODERS:
        try_decode(decode, message)
