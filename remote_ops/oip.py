"""Open Inference Protocol v2 messages <-> arrays: verified, pure, and without copying a tensor byte in binary form.

It does no I/O and knows no signature. A message is a JSON text; with the binary tensor extension, which is what
`Inference-Header-Content-Length` announces, the bytes of the tensors follow it in the order of the text, little-endian.
A text of ours is padded with spaces to 64 bytes, so that the first tensor is as aligned as the message.

Datatypes are the protocol's, and BF16, which Triton adds. The float8 kinds travel as UINT8. What the protocol has no
word for goes into `parameters`, which every peer may ignore: `config` of a request; in metadata `differentiable`,
`description`, `dtype` (of a float8) and `shape` (`any`) of an input or output, and `features` and `description` of the
model.

Reading trusts nothing. JSON has no NaN and no infinity, and a text that names a key twice is refused.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from remote_ops.errors import DecodeError, EncodeError, SpecError
from remote_ops.signature import BY_NUMPY, DTYPES, MAX_RANK, Signature, TensorSpec, describe

__all__ = [
    "BINARY",
    "JSON",
    "JSON_SIZE_HEADER",
    "InferRequest",
    "InferResponse",
    "Message",
    "decode_error",
    "decode_metadata",
    "decode_request",
    "decode_response",
    "dump_json",
    "encode_error",
    "encode_metadata",
    "encode_request",
    "encode_response",
    "number_readers",
    "parse_json_size",
]

Array = npt.NDArray[Any]
Buffer: TypeAlias = "bytes | bytearray | memoryview"

JSON_SIZE_HEADER = "Inference-Header-Content-Length"
BINARY, JSON = "application/octet-stream", "application/json"
ALIGNMENT = 64
MAX_JSON_BYTES = 1 << 28
MAX_TENSORS = 4096
MAX_STRINGS = 10_000_000
MAX_EMPTY_BYTES = 2**31 - 1
_MAX_KEPT_BYTES = 1 << 10
_PIECE = 1 << 14
_LONG_BYTES = 1 << 16

_INTEGERS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
_NAMES = {name: name.upper() for name in ("bool", *_INTEGERS)}
_NAMES |= {"float16": "FP16", "float32": "FP32", "float64": "FP64", "bfloat16": "BF16", "string": "BYTES"}
DATATYPES = {datatype: DTYPES[name].numpy for name, datatype in _NAMES.items()}
_FLOATS = ("FP16", "FP32", "FP64", "BF16")
# By numpy dtype: the datatype, and the unsigned integers that its bytes are taken as.
_WRITTEN = {
    dtype: (_NAMES.get(row.name, "UINT8"), row.stored) for dtype, row in BY_NUMPY.items() if row.name != "string"
}


class Message(NamedTuple):
    """A body as buffers to be sent in order; `json_bytes` is the size of its text if tensors follow, else None."""

    json_bytes: int | None
    buffers: list[Buffer]

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """What the head of the HTTP message must say of the body, but for its type."""
        return () if self.json_bytes is None else ((JSON_SIZE_HEADER, str(self.json_bytes)),)

    @property
    def content_type(self) -> str:
        """The media type of the body."""
        return JSON if self.json_bytes is None else BINARY


class InferRequest(NamedTuple):
    """One call: tensors by name, the outputs wanted (none: all), and which of them in binary form."""

    tensors: dict[str, Array]
    output_names: tuple[str, ...]
    config: bytes
    id: str
    parameters: Mapping[str, Any]
    binary_output: bool
    binary_outputs: Mapping[str, bool]

    def wants_binary(self, name: str) -> bool:
        """Whether this output is to be answered in binary form."""
        return self.binary_outputs.get(name, self.binary_output)


class InferResponse(NamedTuple):
    """The reply to a call: tensors by name, in the order of the reply, and who says so."""

    tensors: dict[str, Array]
    model_name: str
    model_version: str
    id: str
    parameters: Mapping[str, Any]


# --------------------------------------------------------------------------- writing


# (name, datatype, shape, bytes in binary form)
_Key: TypeAlias = tuple[str, str, tuple[int, ...], int]


def _written(name: str, array: Array) -> tuple[_Key, Buffer]:
    """Give what the text must say of an array, and its bytes: a view wherever numpy can give one."""
    found = _WRITTEN.get(array.dtype)
    if found is None or not array.flags.c_contiguous:
        return _written_slowly(name, array)
    datatype, stored = found
    size = array.nbytes
    return (name, datatype, array.shape, size), array.view(stored).data.cast("B") if size else b""


def _written_slowly(name: str, array: Array) -> tuple[_Key, Buffer]:
    if array.dtype.kind in "OSUT":
        items = _string_items(array)
        blob = b"".join(chain.from_iterable((struct.pack("<I", len(item)), item) for item in items))
        return (name, "BYTES", array.shape, len(blob)), blob
    # ascontiguousarray would turn 0-d into 1-d.
    return _written(name, np.array(array, dtype=_known(array), order="C"))


def _known(array: Array) -> np.dtype[Any]:
    dtype: np.dtype[Any] = array.dtype.newbyteorder("=")
    if dtype not in _WRITTEN:
        raise EncodeError(
            f"{dtype.name} {list(array.shape)} has no form on the wire: expected one of {', '.join(DTYPES)}",
            dtype=dtype.name, shape=array.shape,
        )  # fmt: skip
    return dtype


def _string_items(array: Array) -> list[bytes]:
    return [_string_bytes(item, array) for item in array.ravel().tolist()]


def _string_bytes(item: Any, array: Array) -> bytes:
    if isinstance(item, str):
        return _utf8(item, "an element of a string tensor")
    if not isinstance(item, bytes):
        raise EncodeError(
            f"a string tensor holds str or bytes: got {type(item).__name__} in an object array {list(array.shape)}",
            dtype=array.dtype.name, shape=array.shape,
        )  # fmt: skip
    if len(item) >= 1 << 32:
        raise EncodeError("a string of 4 GiB or more: its length has 32 bits", dtype="string", shape=array.shape)
    return item


def _utf8(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise EncodeError(f"{what} has no UTF-8 form: {text[:64]!r} ({error.reason})", dtype="string") from error


def _plain(name: str, array: Array) -> dict[str, Any]:
    """An array as JSON says it: its elements in one list, row-major."""
    if array.dtype.kind in "OSUT":
        return _tensor(name, "BYTES", array.shape) | {"data": [_text(item, array) for item in _string_items(array)]}
    datatype, stored = _WRITTEN[_known(array)]
    if datatype in _FLOATS:
        with np.errstate(invalid="ignore"):  # a signalling NaN is one too
            finite = np.isfinite(array).all()
        if not finite:
            raise EncodeError(
                f"'{name}' holds NaN or infinity, which JSON has no form for: {describe(array)}; the server takes no"
                " binary tensors", dtype=array.dtype.name, shape=array.shape,
            )  # fmt: skip
        array = array.astype(np.float64)
    elif datatype == "UINT8":
        array = np.ascontiguousarray(array).view(stored).reshape(array.shape)
    return _tensor(name, datatype, array.shape) | {"data": array.ravel().tolist()}


def _text(item: bytes, array: Array) -> str:
    try:
        return item.decode()
    except UnicodeDecodeError as error:
        raise EncodeError(
            f"a string that is not UTF-8 has no form in JSON: {item[:64]!r}; the server takes no binary tensors",
            dtype="string", shape=array.shape,
        ) from error  # fmt: skip


def _tensor(name: str, datatype: str, shape: Sequence[int]) -> dict[str, Any]:
    return {"name": name, "shape": list(shape), "datatype": datatype}


def _sized(key: _Key) -> dict[str, Any]:
    return _tensor(*key[:3]) | {"parameters": {"binary_data_size": key[3]}}


_render = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def _pieces(value: Any) -> Iterator[str]:
    """The text of a value, a large one bit by bit: one call for all of it would let no other thread run meanwhile."""
    if not isinstance(value, dict | list) or (size := _count(value)) <= _PIECE:
        yield _render(value)
    elif isinstance(value, dict):
        for index, (key, item) in enumerate(value.items()):
            yield f"{',' if index else '{'}{_render(key)}:"
            yield from _pieces(item)
        yield "}"
    else:
        step = max(1, _PIECE * len(value) // size)
        for start in range(0, len(value), step):
            yield "," if start else "["
            yield from _pieces(value[start]) if step == 1 else [_render(value[start : start + step])[1:-1]]
        yield "]"


def _count(value: Any) -> int:
    """About how many values there are in a value, if lists are as long as the first of them."""
    if isinstance(value, dict):
        return 1 + sum(map(_count, value.values()))
    return len(value) * _count(value[0]) if isinstance(value, list) and value else 1


def dump_json(value: dict[str, Any]) -> bytes:
    """Write an object, with its keys as text, such that other threads run while it is written.

    Raises:
        EncodeError: a string in it has no UTF-8 form.
        ValueError: it holds NaN or infinity.
    """
    try:
        return "".join(_pieces(value)).encode()
    except UnicodeEncodeError as error:
        raise EncodeError(f"a name has no UTF-8 form ({error.reason})", dtype="string") from error


def _padded(text: bytes) -> bytes:
    return text + b" " * (-len(text) % ALIGNMENT)


def encode_request(
    input_names: tuple[str, ...],
    arrays: Sequence[Array],
    output_names: tuple[str, ...] = (),
    config: bytes = b"",
    *,
    binary: bool = True,
) -> Message:
    """Write an inference request; in binary form tensor bytes are views of `arrays`.

    Args:
        input_names: one per array.
        arrays: any shape `(*dims)`; contiguous little-endian ones are not copied.
        output_names: the outputs wanted, in order; none for all.
        config: bytes handed to the model as `parameters.config`: UTF-8.
        binary: False for a server without the binary tensor extension; then all is text.

    Raises:
        EncodeError: a dtype without a form, an object that is no string, a config that is no text; as text also NaN,
            infinity, and strings that are not UTF-8.

    Costs about 3 us in binary form, whatever the size: the text is kept per (names, dtypes, shapes).
    """
    if not binary:
        inputs = [_plain(name, array) for name, array in zip(input_names, arrays, strict=True)]
        return Message(None, [dump_json(_request(inputs, output_names, config, binary=False))])
    written = [_written(name, array) for name, array in zip(input_names, arrays, strict=True)]
    lay_out = _request_text if len(config) <= _MAX_KEPT_BYTES else _request_text.__wrapped__
    text = lay_out(tuple([key for key, _ in written]), output_names, config)
    return Message(len(text), [text, *[buffer for _, buffer in written]])


@lru_cache(maxsize=1024)
def _request_text(keys: tuple[_Key, ...], output_names: tuple[str, ...], config: bytes) -> bytes:
    return _padded(dump_json(_request([_sized(key) for key in keys], output_names, config, binary=True)))


def _request(
    inputs: list[dict[str, Any]], output_names: tuple[str, ...], config: bytes, *, binary: bool
) -> dict[str, Any]:
    parameters: dict[str, Any] = {}
    if config:
        try:
            parameters["config"] = config.decode()
        except UnicodeDecodeError as error:
            raise EncodeError(f"a config that is not UTF-8 has no form in this protocol: {config[:64]!r}") from error
    request: dict[str, Any] = {"inputs": inputs}
    if output_names:
        wish = {"parameters": {"binary_data": True}} if binary else {}
        request["outputs"] = [{"name": name, **wish} for name in output_names]
    elif binary:
        parameters["binary_data_output"] = True
    return request | ({"parameters": parameters} if parameters else {})


def encode_response(
    tensors: Mapping[str, Array],
    *,
    model_name: str,
    model_version: str = "",
    id: str = "",
    binary: Collection[str] = (),
) -> Message:
    """Write the reply to a call, as `encode_request` does; the outputs named in `binary` are sent in binary form."""
    sized = {name: _written(name, array) for name, array in tensors.items() if name in binary}
    rows = [_sized(sized[name][0]) if name in sized else _plain(name, array) for name, array in tensors.items()]
    who = {"model_name": model_name, "model_version": model_version, "id": id}
    text = dump_json({key: value for key, value in who.items() if value or key == "model_name"} | {"outputs": rows})
    if not sized:
        return Message(None, [text])
    text = _padded(text)
    return Message(len(text), [text, *[buffer for _, buffer in sized.values()]])


def encode_error(message: str) -> bytes:
    """Write the body of an answer whose HTTP status says that it is an error."""
    return json.dumps({"error": message.encode(errors="replace").decode()}).encode()


def encode_metadata(signature: Signature, versions: Sequence[str] | None = None) -> bytes:
    """Write what a model takes and gives; `versions` are those that can be asked for, its own unless said.

    Raises:
        EncodeError: an input or output of dtype `any`: the protocol has none.
    """
    own = (signature.version,) if signature.version else ()
    told = {"features": ", ".join(signature.features), "description": signature.description}
    parameters = {key: value for key, value in told.items() if value}
    metadata = {
        "name": signature.name,
        "versions": list(own if versions is None else versions),
        "platform": signature.server,
        "inputs": [_spec_row(spec) for spec in signature.inputs],
        "outputs": [_spec_row(spec) for spec in signature.outputs],
    }
    return dump_json(metadata | ({"parameters": parameters} if parameters else {}))


def _spec_row(spec: TensorSpec) -> dict[str, Any]:
    if spec.dtype == "any":
        raise EncodeError(f"'{spec.name}' is {spec}: the protocol has no datatype for that", dtype="any")
    parameters: dict[str, Any] = {"description": spec.description} if spec.description else {}
    parameters |= {"differentiable": True} if spec.differentiable else {}
    parameters |= {"dtype": spec.dtype} if spec.dtype not in _NAMES else {}
    parameters |= {"shape": "any"} if spec.shape is None else {}
    row = {
        "name": spec.name,
        "datatype": _NAMES.get(spec.dtype, "UINT8"),
        "shape": [-1] if spec.shape is None else list(spec.shape),
    }
    return row | ({"parameters": parameters} if parameters else {})


# --------------------------------------------------------------------------- reading


class _Row(NamedTuple):
    """A tensor as the text tells of it: `size` bytes follow the text, or -1 and it holds the `data`.

    `is_base64` is how MLServer says that its strings are bytes which are no text.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    size: int
    data: Any
    is_base64: bool

    def __str__(self) -> str:
        return f"tensor '{self.name[:64]}': {self.datatype} {list(self.shape)}"


def parse_json_size(value: str | None) -> int | None:
    """Read the value of `Inference-Header-Content-Length`; None where the header is absent.

    Raises:
        DecodeError: no whole number of bytes.
    """
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) < 20):
        raise DecodeError(f"{JSON_SIZE_HEADER}: expected a number of bytes, got {value[:64]!r}")
    return int(value)


def _bytes_of(message: Any) -> memoryview:
    view = message if type(message) is memoryview else memoryview(message)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def _head_of(data: memoryview, json_bytes: int | None) -> memoryview:
    """The text of a message."""
    size = len(data) if json_bytes is None else json_bytes
    if not 0 < size <= len(data):
        raise DecodeError(f"expected a text of 1 to {len(data)} bytes, which is the size of the body, got {size}")
    if size > MAX_JSON_BYTES:
        raise DecodeError(f"a text of {size} bytes", limit=MAX_JSON_BYTES)
    return data[:size]


def number_readers(size: int) -> tuple[Callable[[str], float] | None, Callable[[str], int] | None]:
    """What `json.loads` should read the floats and integers of a text of `size` bytes with: Python, if it is long.

    Its own reading lets no other thread run before the end; this takes a tenth longer and does.
    """
    return (_float, _int) if size > _LONG_BYTES else (None, None)


def _float(token: str) -> float:
    return float(token)


def _int(token: str) -> int:
    return int(token)


def _no_constant(token: str) -> Any:
    raise DecodeError(f"{token} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise DecodeError("a JSON object names a key twice")
    return found


# What may be half of a pair: the other half may follow, or be missing.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _loads(data: Buffer) -> dict[str, Any]:
    try:
        text = str(data, "utf-8")
        read_float, read_int = number_readers(len(data))
        value = json.loads(
            text, parse_constant=_no_constant, object_pairs_hook=_unique, parse_float=read_float, parse_int=read_int
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except DecodeError:
        raise
    except UnicodeDecodeError as error:
        raise DecodeError(f"a text that is not UTF-8 ({error.reason})", offset=error.start) from None
    except UnicodeEncodeError as error:
        raise DecodeError(f"a text with a string that has no UTF-8 form ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise DecodeError(f"a text that is not JSON ({error.msg})", offset=len(text[: error.pos].encode())) from None
    except RecursionError:
        raise DecodeError("a text nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise DecodeError(f"a text with a number that nobody could mean ({error})"[:160]) from None
    if type(value) is not dict:
        raise DecodeError(f"expected a JSON object, got a {_kind(value)}")
    return value


_KINDS = {dict: "object", list: "list", str: "string", int: "number", float: "number", bool: "bool", type(None): "null"}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def _field(row: dict[str, Any], key: str, kind: type, of: str, *absent: Any) -> Any:
    """The value under a key, of that very type; where it is missing or null, the value given for that, if one is."""
    value = row.get(key)
    if type(value) is kind:
        return value
    if value is None and absent:
        return absent[0]
    got = f"a {_kind(value)}" if key in row else "none"
    raise DecodeError(f"'{key}' of {of}: expected a {_KINDS[kind]}, got {got}")


def _objects(row: dict[str, Any], key: str, of: str, *absent: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = _field(row, key, list, of, *absent)
    if len(found) > MAX_TENSORS:
        raise DecodeError(f"{len(found)} {key} in one message", limit=MAX_TENSORS)
    if any(type(item) is not dict for item in found):
        raise DecodeError(f"'{key}' of {of}: expected a list of objects")
    return found


def _whole(values: list[Any], of: str) -> tuple[int, ...]:
    if len(values) > MAX_RANK:
        raise DecodeError(f"{of}: {len(values)} axes", limit=MAX_RANK)
    if not {type(value) for value in values} <= {int} or any(not -1 <= value < 2**63 for value in values):
        raise DecodeError(f"'shape' of {of}: expected whole numbers below 2**63")
    return tuple(values)


def _datatype(row: dict[str, Any], of: str) -> str:
    datatype: str = _field(row, "datatype", str, of)
    if datatype not in DATATYPES:
        raise DecodeError(f"{of} has datatype {datatype[:64]!r}: expected one of {', '.join(DATATYPES)}")
    return datatype


_REFUSED = ("shared_memory_region", "classification")


def _parameters(row: dict[str, Any], of: str) -> dict[str, Any]:
    found: dict[str, Any] = _field(row, "parameters", dict, of, {})
    for key in _REFUSED:
        if found.get(key) is not None:
            raise DecodeError(f"{of} has the parameter '{key}', which is not supported")
    return found


def _rows(message: dict[str, Any], key: str) -> tuple[_Row, ...]:
    rows = tuple([_row(item, key[:-1]) for item in _objects(message, key, "the message")])
    _distinct([row.name for row in rows], key)
    return rows


def _distinct(names: Collection[str], key: str) -> None:
    if len(set(names)) != len(names):
        raise DecodeError(f"two {key} share a name")


def _row(item: dict[str, Any], kind: str) -> _Row:
    name: str = _field(item, "name", str, f"an {kind}")
    of = f"{kind} '{name[:64]}'"
    datatype = _datatype(item, of)
    shape = _whole(_field(item, "shape", list, of), of)
    if shape and min(shape) < 0:
        raise DecodeError(f"{of} has shape {list(shape)}: negative sizes have no data")
    parameters = _parameters(item, of)
    size: int = _field(parameters, "binary_data_size", int, of, -1)
    if (size >= 0) == (item.get("data") is not None) or not -1 <= size < 2**63:
        raise DecodeError(f"{of}: expected either data or a binary_data_size of 0 or more, below 2**63")
    return _Row(name, datatype, shape, size, item.get("data"), parameters.get("content_type") == "base64")


def _tensors(rows: Sequence[_Row], data: memoryview, json_bytes: int | None) -> dict[str, Array]:
    at = len(data) if json_bytes is None else json_bytes
    found = {}
    for row in rows:
        if row.size < 0:
            found[row.name] = _from_json(row)
            continue
        if row.size > len(data) - at:
            raise DecodeError(f"{row}: expected {row.size} bytes after the text, got {len(data) - at}", offset=at)
        found[row.name] = _from_bytes(row, data, at)
        at += row.size
    if at != len(data):
        raise DecodeError(f"{len(data) - at} bytes follow the last tensor", offset=at)
    return found


def _from_bytes(row: _Row, data: memoryview, at: int) -> Array:
    if row.datatype == "BYTES":
        return _from_strings(row, bytes(data[at : at + row.size]), at)
    dtype = DATATYPES[row.datatype]
    expected = math.prod(row.shape) * dtype.itemsize
    if row.size != expected:
        raise DecodeError(f"{row}: expected a binary_data_size of {expected}, got {row.size}", offset=at)
    if not expected:
        return _empty(row, dtype)
    array: Array = np.ndarray(row.shape, dtype, data, at)
    if row.datatype == "BOOL" and (most := array.view(np.uint8).max()) > 1:
        raise DecodeError(f"{row}: expected bytes 0 and 1, got {most}", offset=at)
    return array


def _from_strings(row: _Row, data: bytes, at: int) -> Array:
    """Strings in binary form: the length of each, in 4 bytes, before it."""
    count = math.prod(row.shape)
    _check_count(row, count)
    if not count and not data:
        return _empty(row, np.dtype(object))
    if 4 * count > len(data):
        raise DecodeError(f"{row}: expected {4 * count} bytes or more, got {len(data)}", offset=at)
    items, start = [], 0
    for _ in range(count):
        end = start + 4 + int.from_bytes(data[start : start + 4], "little")
        if end > len(data):
            raise DecodeError(f"{row}: a string runs past the end", offset=at + start)
        items.append(data[start + 4 : end])
        start = end
    if start != len(data):
        raise DecodeError(f"{row}: {len(data) - start} bytes follow the last string", offset=at + start)
    return _objects_array(items, row)


def _objects_array(items: list[bytes], row: _Row) -> Array:
    array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(row.shape)


def _check_count(row: _Row, count: int) -> None:
    if count > MAX_STRINGS:
        raise DecodeError(f"{row}: {count} strings in one tensor", limit=MAX_STRINGS)


def _empty(row: _Row, dtype: np.dtype[Any]) -> Array:
    """An array without elements, whose other sizes are still such as a message could have."""
    if math.prod(size for size in row.shape if size) * dtype.itemsize > MAX_EMPTY_BYTES:
        raise DecodeError(f"{row}: no elements, and sizes beyond any message", limit=MAX_EMPTY_BYTES)
    return np.empty(row.shape, dtype)


def _from_json(row: _Row) -> Array:
    dtype = DATATYPES[row.datatype]
    items = _flat(row)
    if not items:
        return _empty(row, dtype)
    kinds = {type(item) for item in items}
    if dtype.kind == "O" and kinds == {str}:
        _check_count(row, len(items))
        return _objects_array([_unbase64(item, row) if row.is_base64 else item.encode() for item in items], row)
    if dtype.kind == "b" and kinds == {bool}:
        return np.array(items, dtype).reshape(row.shape)
    if dtype.kind in "iu" and kinds == {int}:
        limits = np.iinfo(dtype)
        if limits.min <= min(items) and max(items) <= limits.max:
            return np.array(items, dtype).reshape(row.shape)
        raise DecodeError(f"{row}: expected numbers from {limits.min} to {limits.max}")
    if row.datatype in _FLOATS and kinds <= {int, float}:
        return _floats(items, dtype, row)
    raise DecodeError(f"{row}: its data holds {', '.join(sorted(_KINDS.get(kind, 'object') for kind in kinds))}")


def _unbase64(item: str, of: Any) -> bytes:
    try:
        return base64.b64decode(item, validate=True)
    except ValueError:
        raise DecodeError(f"{of}: an element that is not base64, as its content_type says") from None


def _floats(items: list[Any], dtype: np.dtype[Any], row: _Row) -> Array:
    try:
        with np.errstate(over="ignore"):
            array = np.array(items, np.float64).astype(dtype).reshape(row.shape)
    except OverflowError:
        array = np.array(np.inf)
    if not np.isfinite(array).all():
        raise DecodeError(f"{row}: a number beyond the range of its datatype")
    return array


def _flat(row: _Row) -> list[Any]:
    """The elements in one list, whether the text nests them or not."""
    items = row.data if type(row.data) is list or row.shape else [row.data]
    if type(items) is not list:
        raise DecodeError(f"{row}: expected a list of data, got a {_kind(items)}")
    if items and type(items[0]) is list and row.shape:
        if len(items) != row.shape[0]:
            raise DecodeError(f"{row}: its data has {len(items)} rows")
        for axis, size in enumerate(row.shape[1:], 1):
            if any(type(item) is not list or len(item) != size for item in items):
                raise DecodeError(f"{row}: its data is nested otherwise at axis {axis}")
            items = list(chain.from_iterable(items))
    if len(items) != math.prod(row.shape):
        raise DecodeError(f"{row}: expected {math.prod(row.shape)} elements, got {len(items)}")
    return items


def decode_request(message: Buffer, json_bytes: int | None = None) -> InferRequest:
    """Read an inference request; tensors in binary form are views of `message`, which they keep alive.

    Args:
        message: all bytes of the body.
        json_bytes: how many of them are text: what `parse_json_size` gives. None: all.

    Returns:
        An `InferRequest`; BYTES are object arrays of bytes, BOOL and BF16 have their own dtypes.

    Raises:
        DecodeError: anything but a valid request; and those with shared memory, classification, or tensors without a
            text, which are not supported.

    Costs about 5 us, whatever the size, for a text in binary form that was read before; 20 us otherwise.
    """
    data = _bytes_of(message)
    head = _head_of(data, json_bytes)
    keep = json_bytes is not None and json_bytes <= _MAX_KEPT_BYTES
    rows, request = (_read_request if keep else _read_request.__wrapped__)(bytes(head))
    return request._replace(tensors=_tensors(rows, data, json_bytes))


@lru_cache(maxsize=256)
def _read_request(text: bytes) -> tuple[tuple[_Row, ...], InferRequest]:
    """What the text says, without the tensors; nobody may write to it, since it is kept."""
    message = _loads(text)
    parameters = _parameters(message, "the request")
    outputs = _objects(message, "outputs", "the request", [])
    wishes = {}
    for item in outputs:
        name: str = _field(item, "name", str, "an output")
        wish = _field(_parameters(item, f"output '{name[:64]}'"), "binary_data", bool, f"output '{name[:64]}'", None)
        wishes[name] = wish
    names = tuple(wishes)
    if len(names) != len(outputs):
        raise DecodeError("two outputs share a name")
    config: str = _field(parameters, "config", str, "the parameters", "")
    request = InferRequest(
        {},
        names,
        config.encode(),
        _field(message, "id", str, "the request", ""),
        MappingProxyType(parameters),
        _field(parameters, "binary_data_output", bool, "the parameters", False),
        MappingProxyType({name: wish for name, wish in wishes.items() if wish is not None}),
    )
    return _rows(message, "inputs"), request


def decode_response(message: Buffer, json_bytes: int | None = None) -> InferResponse:
    """Read the reply to a call; tensors as in `decode_request`.

    Raises:
        DecodeError: anything but a valid reply.
    """
    data = _bytes_of(message)
    head = _head_of(data, json_bytes)
    keep = json_bytes is not None and json_bytes <= _MAX_KEPT_BYTES
    rows, response = (_read_response if keep else _read_response.__wrapped__)(bytes(head))
    return response._replace(tensors=_tensors(rows, data, json_bytes))


@lru_cache(maxsize=256)
def _read_response(text: bytes) -> tuple[tuple[_Row, ...], InferResponse]:
    message = _loads(text)
    name, version, number = (
        _field(message, key, str, "the reply", "") for key in ("model_name", "model_version", "id")
    )
    parameters = MappingProxyType(_parameters(message, "the reply"))
    return _rows(message, "outputs"), InferResponse({}, name, version, number, parameters)


def decode_error(message: Buffer) -> str | None:
    """What a server says in the body of an error: its `error`, or `detail`; None where it says neither."""
    try:
        found = _loads(_head_of(_bytes_of(message), None))
    except DecodeError:
        return None
    said = found.get("error") or found.get("detail")
    return said if isinstance(said, str) else None


def decode_metadata(message: Buffer) -> Signature:
    """Read what a model takes and gives; its `version` is known where the server names one only.

    Some servers say neither of a model that does not declare it: then there are no inputs and no outputs.

    Raises:
        DecodeError: anything but valid metadata of a model.
    """
    found = _loads(_head_of(_bytes_of(message), None))
    parameters = _parameters(found, "the metadata")
    versions: list[Any] = _field(found, "versions", list, "the metadata", [])
    features: str = _field(parameters, "features", str, "the parameters", "")
    try:
        return Signature(
            tuple([_spec(row, "input") for row in _objects(found, "inputs", "the metadata", [])]),
            tuple([_spec(row, "output") for row in _objects(found, "outputs", "the metadata", [])]),
            _field(found, "name", str, "the metadata", ""),
            str(versions[0])[:256] if len(versions) == 1 and isinstance(versions[0], str | int) else "",
            _field(found, "platform", str, "the metadata", ""),
            _field(parameters, "description", str, "the parameters", ""),
            tuple(filter(None, (token.strip() for token in features.split(",")))),
        )
    except SpecError as error:
        raise DecodeError(f"metadata that contradicts itself: {str(error)[:300]}") from error


def _spec(row: dict[str, Any], kind: str) -> TensorSpec:
    name: str = _field(row, "name", str, f"an {kind}")
    of = f"{kind} '{name[:64]}'"
    datatype = _datatype(row, of)
    parameters = _parameters(row, of)
    shape = _whole(_field(row, "shape", list, of), of)
    return TensorSpec(
        name,
        _described_dtype(parameters.get("dtype"), datatype),
        None if parameters.get("shape") == "any" else shape,
        _field(parameters, "description", str, of, ""),
        _field(parameters, "differentiable", bool, of, False),
    )


_BY_DATATYPE = {datatype: name for name, datatype in _NAMES.items()}


def _described_dtype(claim: Any, datatype: str) -> str:
    """The float8 that the parameters claim, if the datatype is what carries its bits; else the datatype's own."""
    row = DTYPES.get(claim) if isinstance(claim, str) else None
    return row.name if row and row.name not in _NAMES and datatype == "UINT8" else _BY_DATATYPE[datatype]
