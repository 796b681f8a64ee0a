"""What must hold of the GraphPipe codec for any bytes; the second opinion is the flatbuffers library's own reader."""

from __future__ import annotations

import math
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from flatbuffers import number_types
from flatbuffers.table import Table
from fuzz.claims import Array, assert_same, assert_sensible, bits, lies_inside, objects

from remote_ops import graphpipe
from remote_ops.errors import DecodeError
from remote_ops.graphpipe import InferRequest, InferResponse
from remote_ops.signature import DTYPES, MAX_RANK, STORED, STRING_TYPE, Signature, TensorSpec

CAPTURES = Path(__file__).parents[1] / "captures"
_U8, _I64, _U32 = number_types.Uint8Flags, number_types.Int64Flags, number_types.UOffsetTFlags

_FEATURES = re.compile(r"\s*\[features:[^\]]*\]\s*")
_TOKENS = (
    "dtype=bool", "dtype=bfloat16", "dtype=float8_e4m3fn", "dtype=float8_e5m2", "dtype=uint8", "dtype=any",
    "shape=any", "differentiable", "[features:", "[features: a]", "a,", ",", "]", "\u00e9\u3000\x1f", " ", "",
)  # fmt: skip
WORDS: tuple[bytes, ...] = (
    *(token.encode() for token in _TOKENS if token.strip()),
    *(b"\4\0\0\0", b"\x0c\0\x10\0\4\0\0\0\x08\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"),
)


def seeds() -> Iterator[tuple[str, bytes]]:
    """The recorded messages, and ours of the kinds that were never recorded."""
    yield from ((path.name, path.read_bytes()) for path in sorted(CAPTURES.glob("*.bin")))
    mixed = [np.arange(6, dtype=np.float32).reshape(2, 3), objects([b"ab", b""]), np.zeros((0, 2), np.int64)]
    yield "request", b"".join(graphpipe.encode_request(("a", "b", "c"), mixed, ("y",), b"cfg"))
    yield "response", b"".join(graphpipe.encode_response(mixed))
    yield "error", graphpipe.encode_error(13, "it broke")
    for dtype in ("float32", "bool", "bfloat16", "string", "any"):
        spec = TensorSpec("x", dtype, None if dtype == "any" else (-1, 3), "words", True)
        signature = Signature((spec,), (TensorSpec("y", "int8", None),), "model", "1", "server", "text", ("vjp",))
        yield f"metadata-{dtype}", graphpipe.encode_metadata(signature)
    yield "shared", _shared_string(700, 2000)


def _shared_string(count: int, size: int) -> bytes:
    """A small request that means a huge one: all names of outputs are the same bytes."""
    builder = flatbuffers.Builder(1 << 13)
    name = builder.CreateString("n" * size)
    builder.StartVector(4, count, 4)
    for _ in range(count):
        builder.PrependUOffsetTRelative(name)
    names = builder.EndVector()
    builder.StartObject(4)
    builder.PrependUOffsetTRelativeSlot(3, names, 0)
    infer = builder.EndObject()
    builder.StartObject(2)
    builder.PrependUint8Slot(0, graphpipe.INFER_REQUEST, 0)
    builder.PrependUOffsetTRelativeSlot(1, infer, 0)
    builder.Finish(builder.EndObject())
    return bytes(builder.Output())


def damaged(data: bytes, choose: random.Random) -> bytes:
    """Metadata with other words in a description: bytes changed at random hardly ever leave its length right."""
    try:
        signature = graphpipe.decode_metadata(data)
    except DecodeError:
        return data
    text = " ".join(choose.choices(_TOKENS, k=choose.randrange(6)))
    if choose.random() < 0.5 or not signature.inputs:
        return graphpipe.encode_metadata(replace(signature, description=text))
    first, *others = signature.inputs
    return graphpipe.encode_metadata(replace(signature, inputs=(replace(first, description=text), *others)))


def check(message: bytes) -> None:
    """Try the message as each of the three kinds.

    Raises:
        AssertionError: something that must hold does not; as does any exception that is no `DecodeError`.
    """
    request = _decoded(graphpipe.decode_request, message)
    if isinstance(request, InferRequest):
        texts = (*request.input_names, *request.output_names)
        _check_tensors(request.tensors, message, sum(8 + len(text.encode()) for text in texts))
        _check_request(request, message)
    response = _decoded(graphpipe.decode_response, message)
    if response is not None:
        _check_tensors(response.tensors, message, sum(len(error.message) for error in response.errors))
        _check_response(response, message)
    signature = _decoded(graphpipe.decode_metadata, message)
    if signature is not None:
        _check_metadata(signature, message)
    _check_memory(message)


def _decoded(decode: Callable[[Any], Any], message: bytes) -> Any:
    """The message, or None if it is refused: the same at any address, and whatever follows it."""
    graphpipe._REQUESTS.clear()
    graphpipe._RESPONSES.clear()
    found = _outcome(decode, message)
    shift = zlib.crc32(message) % 8
    assert_same(_outcome(decode, memoryview(bytes(shift) + message)[shift:]), found, "at another address")
    if not isinstance(found, str):
        assert_same(_outcome(decode, message + b"\xff" * 5), found, "with bytes behind it")
    return None if isinstance(found, str) else found


def _outcome(decode: Callable[[Any], Any], message: Any) -> Any:
    try:
        return decode(message)
    except DecodeError as error:
        assert_sensible(error, len(message))
        return str(error)


def _check_tensors(tensors: Sequence[Array], message: bytes, text_bytes: int) -> None:
    """They view the message, keep to the budget together with the text, and are no larger than the limits say."""
    assert len(tensors) <= graphpipe.MAX_TENSORS
    owned = text_bytes
    for tensor in tensors:
        assert tensor.ndim <= MAX_RANK
        if tensor.dtype == object:
            assert tensor.size <= graphpipe.MAX_STRINGS
            owned += sum(8 + len(item) for item in tensor.ravel())
        elif tensor.size:
            assert lies_inside(tensor, message), "a tensor reaches out of the message"
            owned += tensor.nbytes
        rest = math.prod(size for size in tensor.shape if size)
        assert tensor.size or rest * tensor.itemsize <= graphpipe.MAX_MESSAGE_BYTES
    assert owned <= 2 * len(message) + (1 << 20), f"{len(message)} bytes decode to {owned}"


def _check_request(request: InferRequest, message: bytes) -> None:
    root = _root(message)
    infer = _table_at(root, root.Pos + root.Offset(6))
    names = tuple(name.encode() for name in request.input_names), tuple(name.encode() for name in request.output_names)
    assert_same((request.config, *names), (_bytes(infer, 0), _all_bytes(infer, 1), _all_bytes(infer, 3)), "the texts")
    assert_same(request.tensors, _tensors(infer, 2), "the tensors")
    buffers = graphpipe.encode_request(request.input_names, request.tensors, request.output_names, request.config)
    assert_same(graphpipe.decode_request(b"".join(buffers)), request, "written and read again")


def _check_response(response: InferResponse, message: bytes) -> None:
    root = _root(message)
    if response.errors:
        (first, *_), rows = response.errors, list(_tables(root, 1))
        assert len(response.errors) == len(rows) <= graphpipe.MAX_TENSORS
        for error, row in zip(response.errors, rows, strict=True):
            assert error == (row.GetSlot(4, 0, _I64), _bytes(row, 1).decode(errors="replace"))
        again = graphpipe.decode_response(graphpipe.encode_error(*first)).errors
        assert again == [first], "an error written and read again"
    else:
        assert_same(response.tensors, _tensors(root, 0), "the tensors")
        again = graphpipe.decode_response(b"".join(graphpipe.encode_response(response.tensors)))
        assert_same(again, response, "written and read again")


def _check_metadata(signature: Signature, message: bytes) -> None:
    root = _root(message)
    texts = signature.name, signature.version, signature.server
    assert_same(texts, tuple(_bytes(root, field).decode() for field in range(3)), "the texts")
    rest = _bytes(root, 3).decode().removeprefix(signature.description)
    assert not rest or _FEATURES.fullmatch(rest), f"of a description {rest!r} is lost"
    for specs, field in ((signature.inputs, 4), (signature.outputs, 5)):
        rows = list(_tables(root, field))
        assert len(specs) == len(rows)
        for spec, row in zip(specs, rows, strict=True):
            wire_type = row.GetSlot(10, 0, _U8)
            assert spec.name == _bytes(row, 0).decode()
            assert (DTYPES[spec.dtype].wire_type if wire_type else spec.dtype) == (wire_type or "any")
            assert spec.shape in (None, _shape(row, 2))
            assert spec.shape is None or wire_type
    assert_same(graphpipe.decode_metadata(graphpipe.encode_metadata(signature)), signature, "written and read again")


def _check_memory(message: bytes) -> None:
    """What a codec remembers of a message never shows in the next one, however alike."""
    for decode, read in (
        (graphpipe.decode_request, graphpipe._read_request),
        (graphpipe.decode_response, graphpipe._read_response),
    ):
        for _ in range(2):
            _outcome(decode, message)
        for at in {0, len(message) // 2, len(message) - 1, zlib.crc32(message) % (len(message) or 1)}:
            other = bytearray(message)
            other[at : at + 1] = bytes([message[at] ^ 1]) if message else b""
            alone = _outcome(lambda data: read(memoryview(data)), other)  # noqa: B023 (called at once)
            assert_same(_outcome(decode, other), alone, "after one like it")


# --------------------------------------------------------------------------- the flatbuffers library's view of it


def _root(message: bytes) -> Any:
    return _table_at(Table(message, 0), 0)


def _table_at(table: Any, slot: int) -> Any:
    return Table(table.Bytes, table.Indirect(slot))


def _bytes(table: Any, field: int) -> bytes:
    offset = table.Offset(4 + 2 * field)
    return bytes(table.String(table.Pos + offset)) if offset else b""


def _items(table: Any, field: int, item_bytes: int) -> range:
    """Where the items of a vector begin."""
    offset = table.Offset(4 + 2 * field)
    if not offset:
        return range(0)
    start = table.Vector(offset)
    return range(start, start + item_bytes * table.VectorLen(offset), item_bytes)


def _all_bytes(table: Any, field: int) -> tuple[bytes, ...]:
    return tuple(bytes(table.String(at)) for at in _items(table, field, 4))


def _tables(table: Any, field: int) -> Iterator[Any]:
    return (_table_at(table, at) for at in _items(table, field, 4))


def _shape(table: Any, field: int) -> tuple[int, ...]:
    return tuple(table.Get(_I64, at) for at in _items(table, field, 8))


def _tensors(table: Any, field: int) -> list[Any]:
    """The tensors as `bits` gives them."""
    return [_tensor_bits(tensor) for tensor in _tables(table, field)]


def _tensor_bits(tensor: Any) -> Any:
    wire_type, shape = tensor.GetSlot(4, 0, _U8), _shape(tensor, 1)
    if wire_type == STRING_TYPE:
        return bits(objects(_all_bytes(tensor, 3)).reshape(shape))
    data = bytes(tensor.Bytes[at] for at in _items(tensor, 2, 1))
    return STORED[wire_type], shape, data
