"""TensorFlow Serving's REST protocol, for `curl` and for clients of that server: `/v1/models/<model>...`.

Bodies are plain JSON, row by row (`instances`) or input by input (`inputs`); it reads and writes them and knows no
batching. `:classify` and `:regress` are not offered, and say so.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from remote_ops import oip
from remote_ops.errors import InternalError, InvalidRequest
from remote_ops.signature import DTYPES, Array, Signature, TensorSpec
from server_ref.answer import JSON, Answer
from server_ref.catalog import Chosen, Model
from server_ref.exchange import (
    Exchange,
    Host,
    checked,
    deadline_of,
    json_answer,
    not_offered,
    refusal,
    wrong_method,
)
from server_ref.json_text import load_json
from server_ref.model import Run, Version

__all__ = ["Predict", "read_predict", "write_predict"]

LARGE_TEXT_BYTES = 1 << 16
SIGNATURE = "serving_default"
_PATH = re.compile(
    r"/v1/models/(?P<model>.+?)(?:/versions/(?P<version>[^/:]+)|/labels/(?P<label>[^/:]+))?"
    r"(?P<verb>/metadata|:\w+)?"
)
_DT = {
    "float16": "DT_HALF", "float32": "DT_FLOAT", "float64": "DT_DOUBLE", "bfloat16": "DT_BFLOAT16", "bool": "DT_BOOL",
    "string": "DT_STRING", "any": "DT_INVALID",
}  # fmt: skip


class Predict:
    """Answers what a path below `/v1/models` asks of a front.

    Args:
        host: the front.
    """

    def __init__(self, host: Host) -> None:
        self._host = host

    def answer(self, exchange: Exchange) -> Answer | None:
        """Answer a request, or start what will; None if the answer comes later.

        Raises:
            RemoteOpsError: what is wrong with it.
        """
        match = _PATH.fullmatch(exchange.path)
        if match is None:
            return refusal(404, f"no {exchange.path[:200]} in this protocol")
        verb = match["verb"] or ""
        if verb not in ("", "/metadata", ":predict"):
            return not_offered(verb)
        allowed = "POST" if verb == ":predict" else "GET"
        if exchange.method != allowed and (exchange.method, allowed) != ("HEAD", "GET"):
            return wrong_method(exchange.method, allowed)
        model = self._host.catalog.model(match["model"])
        asked = match["version"] or _labelled(model, match["label"])
        if verb == ":predict":
            return self._predict(exchange, model.choose(asked, exchange.head.headers))
        return self._metadata(model.version(asked)) if verb else self._status(model, asked)

    def _status(self, model: Model, asked: str) -> Answer:
        names = [asked] if asked else list(reversed(model.routes.versions))
        return json_answer({"model_version_status": [self._version_status(model, name) for name in names]})

    def _version_status(self, model: Model, name: str) -> dict[str, Any]:
        if name not in model.routes.versions:
            name = model.version(name).version
        state = "UNLOADING" if self._host.draining else "AVAILABLE" if name in model.routes.ready else "LOADING"
        return {"version": name, "state": state, "status": {"error_code": "OK", "error_message": ""}}

    def _metadata(self, version: Version) -> Answer:
        spec = {"name": version.name, "signature_name": "", "version": version.version}
        return json_answer({"model_spec": spec, "metadata": {"signature_def": _signature_def(version.signature)}})

    def _predict(self, exchange: Exchange, chosen: Chosen) -> Answer | None:
        version = chosen.version
        if len(exchange.body) <= LARGE_TEXT_BYTES:
            return self._begin(exchange, chosen, read_predict(bytes(exchange.body), version.signature))
        self._host.later(
            lambda: read_predict(bytes(exchange.body), version.signature),
            lambda request: self._begin(exchange, chosen, request),
            exchange.connection,
        )
        return None

    def _begin(self, exchange: Exchange, chosen: Chosen, request: PredictRequest) -> Answer | None:
        version = chosen.version
        arrays, wanted = checked(version, request.arrays, ())
        run = Run(
            version, arrays, wanted,
            deadline=deadline_of(exchange.head, exchange.connection.arrived_at),
            write=lambda results: Answer(200, JSON, (write_predict(results, in_rows=request.in_rows),)),
            done=exchange.connection.finish,
            slow_write=True,
        )  # fmt: skip
        return self._host.begin(run, exchange.connection, chosen.copy_to)


def _labelled(model: Model, label: str | None) -> str:
    """The version that a label stands for; empty for no label."""
    return model.routes.choose(label=label).version if label else ""


def _signature_def(signature: Signature) -> dict[str, Any]:
    sides = {"inputs": _tensor_infos(signature.inputs), "outputs": _tensor_infos(signature.outputs)}
    return {"signature_def": {SIGNATURE: sides | {"method_name": "tensorflow/serving/predict"}}}


def _tensor_infos(specs: Iterable[TensorSpec]) -> dict[str, Any]:
    return {
        spec.name: {
            "dtype": _DT.get(spec.dtype, f"DT_{spec.dtype.upper()}"),
            "tensor_shape": {
                "dim": [{"size": str(size), "name": ""} for size in spec.shape or ()],
                "unknown_rank": spec.shape is None,
            },
            "name": spec.name,
        }
        for spec in specs
    }


# --------------------------------------------------------------------------- reading


class PredictRequest(NamedTuple):
    """One call: arrays by name, and whether it came row by row, as its answer then goes."""

    arrays: dict[str, Array]
    in_rows: bool


def read_predict(text: bytes, signature: Signature) -> PredictRequest:
    """Read `{"instances": ...}` or `{"inputs": ...}`, numbers in the dtypes of the signature.

    Raises:
        InvalidRequest: it is neither, or its values are no tensors of those dtypes.
        DecodeError, FramingError: it is no JSON that anybody would read.
    """
    said = load_json(text)
    if not isinstance(said, dict) or ("instances" in said) == ("inputs" in said):
        raise InvalidRequest("expected a JSON object with either 'instances' (rows) or 'inputs' (columns)")
    if (name := said.get("signature_name") or SIGNATURE) != SIGNATURE:
        raise InvalidRequest(f"no signature {str(name)[:64]!r}: there is {SIGNATURE!r}")
    if "instances" in said:
        return PredictRequest(_arrays(_columns(said["instances"], signature.inputs), signature), in_rows=True)
    given, names = said["inputs"], {spec.name for spec in signature.inputs}
    by_name = isinstance(given, dict) and not (_is_bytes(given) and "b64" not in names)
    return PredictRequest(_arrays(given if by_name else _alone(given, signature.inputs), signature), in_rows=False)


def _columns(rows: Any, specs: Sequence[TensorSpec]) -> dict[str, Any]:
    """What each input is given, of rows that are objects by name, or the values of the only input."""
    if not isinstance(rows, list) or not rows:
        raise InvalidRequest("'instances': expected a list of one row or more")
    names = {spec.name for spec in specs}
    if not isinstance(rows[0], dict) or (_is_bytes(rows[0]) and "b64" not in names):
        return _alone(rows, specs)
    if any(not isinstance(row, dict) or row.keys() != rows[0].keys() for row in rows):
        raise InvalidRequest(f"'instances': expected every row to name {', '.join(rows[0])}"[:300])
    return {name: [row[name] for row in rows] for name in rows[0]}


def _alone(values: Any, specs: Sequence[TensorSpec]) -> dict[str, Any]:
    if len(specs) != 1:
        names = ", ".join(spec.name for spec in specs)
        raise InvalidRequest(f"the model has {len(specs)} inputs: expected values by name ({names})")
    return {specs[0].name: values}


def _arrays(values: Mapping[str, Any], signature: Signature) -> dict[str, Array]:
    """Values as arrays; those that the model does not know by name are left to its signature."""
    specs = {spec.name: spec for spec in signature.inputs}
    return {name: _array(value, specs[name]) if name in specs else np.empty(0) for name, value in values.items()}


def _array(value: Any, spec: TensorSpec) -> Array:
    if spec.dtype == "string":
        return _strings(value, spec)
    try:
        natural = np.asarray(value)
    except (ValueError, OverflowError):
        natural = np.empty(0, object)
    dtype = natural.dtype if spec.dtype == "any" else DTYPES[spec.dtype].numpy
    if natural.dtype.kind not in _ACCEPTED.get(dtype.kind, "fiu") and natural.size + (natural.dtype.kind == "O"):
        raise InvalidRequest(f"input '{spec.name}': expected {spec}, got {_described(natural)}")
    with np.errstate(over="ignore"):
        array = natural.astype(dtype)
    if not _kept(natural, array):
        raise InvalidRequest(f"input '{spec.name}': a number beyond the range of {spec.dtype}")
    return array


_ACCEPTED = {"b": "b", "i": "iu", "u": "iu"}
_WORDS = {"b": "booleans", "i": "whole numbers", "u": "whole numbers", "f": "numbers", "U": "strings"}


def _described(natural: Array) -> str:
    """What a list holds, in the words of JSON."""
    if natural.dtype.kind not in _WORDS:
        return "a list that is ragged, or holds null or objects"
    return f"{_WORDS[natural.dtype.kind]} {list(natural.shape)}"


def _kept(natural: Array, array: Array) -> bool:
    """Whether a cast has kept what numbers are, but for their precision."""
    if array.dtype.kind in "iu" and natural.size:
        limits = np.iinfo(array.dtype)
        return limits.min <= int(natural.min()) and int(natural.max()) <= limits.max
    return array.dtype.kind == "b" or bool(np.isfinite(array).all())


def _is_bytes(value: Any) -> bool:
    """Whether it is `{"b64": "..."}`, which is how JSON holds bytes that are no text."""
    return isinstance(value, dict) and value.keys() == {"b64"}


def _strings(value: Any, spec: TensorSpec) -> Array:
    """A tensor of strings; its shape is that of the lists, which may not be ragged."""
    shape: list[int] = []
    items = [value]
    while items and isinstance(items[0], list):
        size = len(items[0])
        if any(not isinstance(item, list) or len(item) != size for item in items):
            raise InvalidRequest(f"input '{spec.name}': expected {spec}, got lists of unequal sizes")
        shape.append(size)
        items = [inner for item in items for inner in item]
    array = np.empty(len(items), object)
    array[:] = [_string(item, spec) for item in items]
    return array.reshape(shape)


def _string(item: Any, spec: TensorSpec) -> bytes:
    try:
        if isinstance(item, str):
            return item.encode()
        if _is_bytes(item) and isinstance(item["b64"], str):
            return base64.b64decode(item["b64"], validate=True)
    except ValueError:
        raise InvalidRequest(f"input '{spec.name}': a string that is neither UTF-8 nor base64") from None
    raise InvalidRequest(f"input '{spec.name}': expected strings, or {{\"b64\": ...}}, got {str(item)[:64]}")


# --------------------------------------------------------------------------- writing


def write_predict(results: Mapping[str, Array], *, in_rows: bool) -> bytes:
    """Write `{"predictions": ...}` for rows, `{"outputs": ...}` for columns; the only output goes without its name.

    Strings that are not UTF-8, and all of an output whose name ends in `_bytes`, become `{"b64": ...}`.

    Raises:
        InvalidRequest: NaN or infinity, which JSON has no form for.
        InternalError: outputs of unequal numbers of rows, where rows were asked for.
    """
    values = {name: _listed(name, array) for name, array in results.items()}
    columns: Any = next(iter(values.values())) if len(values) == 1 else values
    said = {"predictions": _rows(results, values)} if in_rows else {"outputs": columns}
    return oip.dump_json(said)


def _rows(results: Mapping[str, Array], values: Mapping[str, Any]) -> list[Any]:
    sizes = {array.shape[:1] for array in results.values()}
    if len(sizes) > 1 or () in sizes:
        raise InternalError("the outputs have no rows in common: ask by columns, with 'inputs'")
    if len(values) == 1:
        return list(next(iter(values.values())))
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def _listed(name: str, array: Array) -> Any:
    if array.dtype.kind in "OSUT":
        as_bytes = name.endswith("_bytes")
        return _mapped(array.astype(object).tolist(), lambda item: _text(item, as_bytes=as_bytes))
    if array.dtype.kind in "biu":
        return array.tolist()
    wide = array.astype(np.float64)
    if not np.isfinite(wide).all():
        raise InvalidRequest(
            f"output '{name}' holds NaN or infinity, which JSON has no form for: ask over /v2, in binary"
        )
    return wide.tolist()


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    return [_mapped(item, function) for item in value] if isinstance(value, list) else function(value)


def _text(item: Any, *, as_bytes: bool) -> Any:
    data = item.encode() if isinstance(item, str) else bytes(item)
    try:
        if not as_bytes:
            return data.decode()
    except UnicodeDecodeError:
        pass
    return {"b64": base64.b64encode(data).decode()}
