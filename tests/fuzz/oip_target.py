"""What must hold of the Open Inference Protocol's codec for any bytes; the second opinion is plain `json` and numpy.

An input is the text of a message; a NUL, which no JSON text holds, ends the text where tensors in binary form follow.
"""

from __future__ import annotations

import base64
import json
import math
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.claims import Array, assert_same, assert_sensible, bits, lies_inside, objects

from remote_ops import oip
from remote_ops.errors import DecodeError, EncodeError
from remote_ops.oip import DATATYPES, InferRequest, InferResponse, Message
from remote_ops.signature import MAX_RANK, Signature, TensorSpec

CAPTURES = Path(__file__).parents[1] / "captures" / "oip"
_TEXT_BYTES = 24  # what is read as the value of the header too

_KEYS = (
    "name", "shape", "datatype", "data", "parameters", "binary_data_size", "binary_data", "binary_data_output",
    "inputs", "outputs", "id", "config", "content_type", "model_name", "model_version", "versions", "platform",
    "features", "description", "differentiable", "dtype", "classification", "shared_memory_region", "error", "detail",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    *DATATYPES, "base64", "any", "float8_e4m3fn", "/wA=", "", "x", "\ud800", "\ud83d\ude00", "\u00e9", "a, b",
    None, True, False, 0, 1, -1, 2, 4, 255, 65504, 2**31, 2**63, 2**64 - 1, 10**40, 1.5, -0.0, 1e39, 1e300,
    [], {}, [0], [-1], [2, 2], [[1, 2], [3, 4]], [["a"], ["b"]], {"binary_data_size": 4}, {"binary_data": True},
)  # fmt: skip
WORDS: tuple[bytes, ...] = (
    *(f'"{key}":'.encode() for key in _KEYS), b"\0", b"1e999", b"NaN", b"-Infinity", b"\\ud800", b",", b'"',
)  # fmt: skip


def damaged(data: bytes, choose: random.Random) -> bytes:
    """The same with one value of the text changed: bytes changed at random hardly ever leave it JSON."""
    text, mark, tail = data.partition(b"\0")
    try:
        places = list(_places(message := json.loads(text)))
    except (ValueError, RecursionError):
        return data
    if not places:
        return data
    container, key = choose.choice(places)
    how = choose.randrange(6)
    if how == 0:
        del container[key]
    elif how == 1:
        other, other_key = choose.choice(places)
        container[key] = json.loads(json.dumps(other[other_key]))
    elif how == 2 and isinstance(container, list):
        container.insert(key, container[key])
    elif how == 3 and isinstance(container, dict):
        container[choose.choice(_KEYS)] = container[key] if choose.random() < 0.5 else choose.choice(_VALUES)
    elif how == 4 and type(container[key]) is int:
        container[key] += choose.choice((-1, 1, -4, 4))
    else:
        container[key] = choose.choice(_VALUES)
    return json.dumps(message, ensure_ascii=True).encode() + mark + tail


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every value in a text, as the object or list that holds it, and its key there."""
    if isinstance(value, dict | list):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(item)


def seeds() -> Iterator[tuple[str, bytes]]:
    """The recorded messages, and ours of the kinds that were never recorded."""
    for entry in json.loads((CAPTURES / "manifest.json").read_text("utf-8")):
        yield entry["file"], _as_input((CAPTURES / entry["file"]).read_bytes(), entry.get("json_bytes"))
    tensors = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "s": objects([b"ab", b""]), "b": np.array([True])}
    for binary in (True, False):
        request = oip.encode_request(tuple(tensors), list(tensors.values()), ("y",), b"cfg", binary=binary)
        yield f"request-{binary}", _as_input(b"".join(request.buffers), request.json_bytes)
        names = list(tensors)[:2] if binary else []
        reply = oip.encode_response(tensors, model_name="m", model_version="1", id="i", binary=names)
        yield f"reply-{binary}", _as_input(b"".join(reply.buffers), reply.json_bytes)
    specs = tuple(TensorSpec(name, name, (-1, 3), "words", True) for name in ("float32", "float8_e4m3fn", "string"))
    free = (TensorSpec("y", "int8", None),)
    yield "metadata", oip.encode_metadata(Signature(specs, free, "m", "3", "server", "text", ("vjp", "batch=0")))
    nested = {"name": "x", "datatype": "BYTES", "shape": [2, 1], "data": [["/wA="], [""]]}
    yield "base64", json.dumps({"inputs": [nested | {"parameters": {"content_type": "base64"}}]}).encode()


def _as_input(body: bytes, json_bytes: int | None) -> bytes:
    return body if json_bytes is None else body[:json_bytes] + b"\0" + body[json_bytes:]


def check(data: bytes) -> None:
    """Try the message as each of the kinds, and its first bytes as the value of the header.

    Raises:
        AssertionError: something that must hold does not; as does any exception that is no `DecodeError`.
    """
    text, mark, tail = data.partition(b"\0")
    body, size = text + tail, len(text) if mark else None
    request = _decoded(oip.decode_request, body, size)
    if request is not None:
        _check_tensors(request.tensors, body, size, "inputs")
        _check_request(request)
    response = _decoded(oip.decode_response, body, size)
    if response is not None:
        _check_tensors(response.tensors, body, size, "outputs")
        _check_response(response)
    signature = _outcome(oip.decode_metadata, body)
    if isinstance(signature, Signature):
        assert_same(oip.decode_metadata(oip.encode_metadata(signature)), signature, "metadata, written and read again")
    said = oip.decode_error(body)
    if said:
        assert_same(oip.decode_error(oip.encode_error(said)), said, "an error, written and read again")
    _check_header(data[:_TEXT_BYTES].decode("latin-1"))


def _outcome(decode: Callable[..., Any], body: bytes | bytearray, *size: int | None) -> Any:
    try:
        return decode(body, *size)
    except DecodeError as error:
        assert_sensible(error, len(body))
        return str(error)


def _decoded(decode: Callable[..., Any], body: bytes, size: int | None) -> Any:
    """The message, or None if it is refused: the same again, whatever was done to the first; at other sizes, any."""
    _outcome(decode, body, zlib.crc32(body) % (len(body) + 2))
    own = bytearray(body)
    first = _outcome(decode, own, size)
    found = bits(first)
    for tensor in getattr(first, "tensors", {}).values():
        if tensor.flags.writeable:
            tensor[...] = b"changed" if tensor.dtype == object else np.zeros((), tensor.dtype)
    again = _outcome(decode, body, size)
    assert_same(again, found, "after what the first one gave was changed")
    return None if isinstance(again, str) else again


def _check_header(value: str) -> None:
    try:
        size = oip.parse_json_size(value)
    except DecodeError as error:
        return assert_sensible(error, len(value))
    assert size == int(value) >= 0
    assert str(size) == (value.lstrip("0") or "0")
    return None


def _check_tensors(tensors: Mapping[str, Array], body: bytes, size: int | None, key: str) -> None:
    """They hold what plain `json` and numpy read, and are no larger than the limits say."""
    assert len(tensors) <= oip.MAX_TENSORS
    at = len(body) if size is None else size
    rows = json.loads(body[:at], object_pairs_hook=_once, parse_constant=_never)[key]
    assert list(tensors) == [row["name"] for row in rows]
    for row, tensor in zip(rows, tensors.values(), strict=True):
        assert tensor.ndim <= MAX_RANK
        rest = math.prod(extent for extent in tensor.shape if extent)
        assert tensor.size or rest * tensor.itemsize <= oip.MAX_EMPTY_BYTES
        in_bytes = (row.get("parameters") or {}).get("binary_data_size")
        if in_bytes is None:
            expected = _from_data(row)
        else:
            expected = _from_bytes(row, body[at : at + in_bytes])
            at += in_bytes
            assert tensor.dtype == object or not tensor.size or lies_inside(tensor, body), "a tensor out of the message"
        assert_same(tensor, expected, f"tensor {row['name']!r}")
    assert at == len(body), "bytes that belong to no tensor"
    assert sum(tensor.nbytes for tensor in tensors.values()) <= 8 * len(body)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), "accepted with a key that is there twice"
    return dict(pairs)


def _never(token: str) -> Any:
    raise AssertionError(f"accepted though {token} is not JSON")


def _from_bytes(row: dict[str, Any], data: bytes) -> Array:
    if row["datatype"] != "BYTES":
        return np.frombuffer(data, DATATYPES[row["datatype"]]).reshape(row["shape"])
    items = []
    while data:
        end = 4 + int.from_bytes(data[:4], "little")
        assert end <= len(data), "a string longer than what came"
        items.append(data[4:end])
        data = data[end:]
    return objects(items).reshape(row["shape"])


def _from_data(row: dict[str, Any]) -> Array:
    items, dtype = list(_leaves(row["data"])), DATATYPES[row["datatype"]]
    if dtype.kind == "O":
        is_base64 = (row.get("parameters") or {}).get("content_type") == "base64"
        items = [base64.b64decode(item) if is_base64 else item.encode() for item in items]
        return objects(items).reshape(row["shape"])
    if row["datatype"] in ("FP16", "FP32", "FP64", "BF16"):
        array = np.array([float(item) for item in items], np.float64).astype(dtype).reshape(row["shape"])
        assert np.isfinite(array).all(), "a number that its datatype cannot hold"
        return array
    assert all(type(item) is (bool if dtype.kind == "b" else int) for item in items)
    return np.array(items, dtype).reshape(row["shape"])  # which refuses what is out of range


def _leaves(data: Any) -> Iterator[Any]:
    if isinstance(data, list):
        for item in data:
            yield from _leaves(item)
    else:
        yield data


# --------------------------------------------------------------------------- written and read again


def _read(decode: Callable[..., Any], message: Message) -> Any:
    return decode(b"".join(message.buffers), message.json_bytes)


def _has_text_form(tensor: Array) -> bool:
    """Whether JSON has a form for it."""
    if tensor.dtype == object:
        return all(item.decode(errors="replace").encode() == item for item in tensor.ravel())
    return tensor.dtype.kind not in "fV" or bool(np.isfinite(tensor.astype(np.float64)).all())


def _check_request(request: InferRequest) -> None:
    assert all(type(request.wants_binary(name)) is bool for name in request.output_names)
    for binary in (True, False):
        sent = tuple(request.tensors), list(request.tensors.values()), request.output_names, request.config
        try:
            again = _read(oip.decode_request, oip.encode_request(*sent, binary=binary))
        except EncodeError:
            assert not binary, "a request that was read cannot be written"
            assert not all(map(_has_text_form, request.tensors.values())), "nor as text"
            continue
        assert_same(again[:3], request[:3], "a request, written and read again")


def _check_response(response: InferResponse) -> None:
    who = {"model_name": response.model_name, "model_version": response.model_version, "id": response.id}
    in_text = {name for name, tensor in response.tensors.items() if _has_text_form(tensor)}
    for binary in (set(response.tensors), set(response.tensors) - in_text):
        again = _read(oip.decode_response, oip.encode_response(response.tensors, **who, binary=binary))
        assert_same(again[:4], response[:4], "a reply, written and read again")
