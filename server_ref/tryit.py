"""A call of one version of a model with values in JSON, for a person at a page: answers are summed up, not sent whole.

It waits in the model's queue as any call does. What a program should use is the data plane.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from remote_ops.deadline import Deadline
from remote_ops.errors import InvalidRequest, ModelNotFound, ModelUnavailable, Overloaded, RemoteOpsError
from remote_ops.signature import DTYPES, MAX_RANK, TensorSpec
from server_ref.answer import JSON, Answer, failure_of
from server_ref.model import Run, Version
from server_ref.names import without_places

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import BaseRoute

    from server_ref.control import Controlled

__all__ = ["MAX_BYTES", "array_of", "summed_up", "tryit_routes"]

Array = npt.NDArray[Any]
T = TypeVar("T")
MAX_BYTES = 16 << 20  # of a request, and of an input that it asks to be filled
_AT_ONCE = 4
_WAIT_S = 60.0
_FIRST = 256  # values that are told of an output
_BEST = 5
_EXACT = 1 << 53  # whole numbers up to it are what they are in a browser
_WORDS = ("alpha", "beta", "gamma", "delta")


def tryit_routes(server: Controlled) -> list[BaseRoute]:
    """`POST /api/models/<model>/versions/<version>/infer` for the control plane of a server.

    The body is `{"inputs": {name: value}}`, where a value is what `array_of` takes, and perhaps `"outputs": [names]`;
    the answer is `{"outputs": {name: summary}, "ms": time in the queue and the model, "version": name}`.
    """
    from starlette.routing import Route

    tries = _Tries(server)
    path = "/api/models/{model:path}/versions/{version:path}/infer"
    return [Route(path, tries.answer, methods=["POST"])]


class _Tries:
    """The calls that are under way; on the loop of the control plane."""

    def __init__(self, server: Controlled) -> None:
        self._server = server
        self._under_way = 0

    async def answer(self, request: Request) -> Response:
        from starlette.responses import Response

        try:
            answer = await self._within(request)
        except Exception as error:
            failure = failure_of(error)
            told = {"error": without_places(failure.message), "kind": type(error).__name__}
            answer = Answer(failure.status, JSON, (json.dumps(told).encode(),), failure.headers)
        headers = {**dict(answer.headers), "Cache-Control": "no-store"}
        return Response(b"".join(answer.body), answer.status, headers, media_type=answer.content_type)

    async def _within(self, request: Request) -> Answer:
        if self._under_way >= _AT_ONCE:
            raise Overloaded(f"{self._under_way} calls are being tried already: expected at most {_AT_ONCE}")
        self._under_way += 1
        try:
            return await self._tried(request)
        finally:
            self._under_way -= 1

    async def _tried(self, request: Request) -> Answer:
        name, asked_version = request.path_params["model"], request.path_params["version"]
        asked = await _asked(request)
        version = await self._there(lambda: self._version(name, asked_version))
        arrays, wanted = await asyncio.to_thread(_checked, version, asked)
        return await self._there(lambda: _ran(version, arrays, wanted))

    async def _version(self, name: str, asked: str) -> Version:
        versions = self._server.front.catalog.model(name).versions
        found = versions.get(asked)
        if found is None:
            there_are = ", ".join(versions) or "none"
            raise ModelNotFound(f"model '{name}' has no version '{asked}' that is served: there are {there_are}")
        return found

    async def _there(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Await what runs on the loop of the data plane, where all that belongs to a model is."""
        work = call()
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._server.front.loop)
        except RuntimeError as error:
            work.close()
            raise ModelUnavailable("the data plane has ended") from error
        waited = asyncio.wrap_future(future)
        done, _ = await asyncio.wait((waited,), timeout=_WAIT_S + 5.0)
        if not done:
            raise ModelUnavailable(f"no answer from the data plane in {_WAIT_S:g} s")
        return waited.result()


def _checked(version: Version, asked: Mapping[str, Any]) -> tuple[dict[str, Array], tuple[TensorSpec, ...]]:
    """What to give the model, and the outputs that are asked of it."""
    try:
        arrays = _arrays(version.signature.inputs, asked["inputs"])
        fitted = version.signature.fit_inputs(arrays, at=version.name)
        return fitted, version.signature.select_outputs(asked.get("outputs"), at=version.name)
    except RemoteOpsError as error:
        version.refused(error)
        raise


async def _ran(version: Version, arrays: Mapping[str, Array], wanted: tuple[TensorSpec, ...]) -> Answer:
    """Run it, on the loop of the data plane."""
    answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    write = partial(_written, version.version, time.perf_counter())
    done = partial(_settle, answered)
    run = Run(version, arrays, wanted, deadline=Deadline.after(_WAIT_S), write=write, done=done)
    answer = version.begin(run)
    return answer if answer is not None else await answered


def _settle(answered: asyncio.Future[Answer], outcome: Answer | BaseException) -> None:
    if answered.done():  # nobody waits any more
        return
    if isinstance(outcome, BaseException):
        answered.set_exception(outcome)
    else:
        answered.set_result(outcome)


async def _asked(request: Request) -> Mapping[str, Any]:
    """The body, which may not be too large, and is read apart from the loop."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise InvalidRequest(f"expected a body of at most {MAX_BYTES >> 20} MiB; call the data plane for more")
    try:
        asked = await asyncio.to_thread(json.loads, bytes(body), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"expected JSON: {error}") from error
    if not isinstance(asked, dict) or not isinstance(asked.get("inputs"), dict):
        raise InvalidRequest('expected {"inputs": {name: value}}')
    return asked


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON; write it as the text '{name}'")


# --------------------------------------------------------------------------- in


def _arrays(specs: Sequence[TensorSpec], values: Mapping[str, Any]) -> dict[str, Any]:
    known = {spec.name: spec for spec in specs}
    return {name: array_of(known[name], value) if name in known else value for name, value in values.items()}


def array_of(spec: TensorSpec, value: Any) -> Array:
    """An input as an array.

    Args:
        spec: what it must be.
        value: a number, text or nested lists of them; `{"data": flat or nested, "shape": sizes}`;
            `{"fill": "zeros" or "random", "shape": sizes}`; or `{"base64": little-endian items, "shape": sizes}`.

    Raises:
        SignatureError: it does not fit the spec.
        InvalidRequest: it is none of these forms, or is larger than 16 MiB.
    """
    try:
        return spec.fit(_given(spec, value) if isinstance(value, dict) else _numbers(value, spec))
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, RemoteOpsError):
            raise
        raise InvalidRequest(f"input '{spec.name}': expected {spec}: {error}") from error


def _given(spec: TensorSpec, value: Mapping[str, Any]) -> Array:
    """The array of a value that says its shape."""
    shape = _shape(spec.name, value.get("shape"))
    if "fill" in value:
        return _filled(spec, str(value["fill"]), shape)
    if "base64" in value:
        return _bits(spec, value["base64"]).reshape(shape)
    if "data" in value:
        return _unshaped(spec).fit(_numbers(value["data"], spec)).reshape(shape)
    raise InvalidRequest(f"input '{spec.name}': expected data, fill or base64, and shape")


def _numbers(value: Any, spec: TensorSpec) -> Any:
    """The value, with the words for what is no number in JSON as numbers."""
    if not spec.is_float or spec.dtype == "any":
        return value
    if isinstance(value, list):
        return [_numbers(item, spec) for item in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _shape(name: str, sizes: Any) -> tuple[int, ...]:
    usable = isinstance(sizes, list) and len(sizes) <= MAX_RANK and all(type(size) is int for size in sizes)
    if not usable or not all(0 <= size <= MAX_BYTES for size in sizes):
        raise InvalidRequest(f"input '{name}': expected a shape of whole numbers, 0 or more, got {str(sizes)[:80]}")
    return tuple(sizes)


def _filled(spec: TensorSpec, fill: str, shape: tuple[int, ...]) -> Array:
    dtype = DTYPES["float32" if spec.dtype == "any" else spec.dtype].numpy
    if math.prod(shape) * dtype.itemsize > MAX_BYTES:
        raise InvalidRequest(f"input '{spec.name}': expected at most {MAX_BYTES >> 20} MiB, got shape {list(shape)}")
    if fill == "zeros":
        return np.full(shape, "", object) if dtype.kind == "O" else np.zeros(shape, dtype)
    if fill != "random":
        raise InvalidRequest(f"input '{spec.name}': expected zeros or random, got {fill[:32]!r}")
    chance = np.random.default_rng()
    if dtype.kind == "O":
        return np.array([*chance.choice(_WORDS, math.prod(shape)).tolist(), None], object)[:-1].reshape(shape)
    if dtype.kind in "iu":
        return chance.integers(0, 256 if spec.dtype == "uint8" else 10, shape).astype(dtype)
    if dtype.kind == "b":
        return chance.random(shape) < 0.5
    return chance.random(shape, np.float32).astype(dtype)


def _bits(spec: TensorSpec, text: Any) -> Array:
    dtype = DTYPES["float32" if spec.dtype == "any" else spec.dtype]
    if spec.dtype == "string" or not isinstance(text, str):
        raise InvalidRequest(f"input '{spec.name}': expected its values as data")
    stored = np.frombuffer(base64.b64decode(text, validate=True), dtype.stored.newbyteorder("<"))
    return _unshaped(spec).view(stored) if dtype.is_bit_view else stored


def _unshaped(spec: TensorSpec) -> TensorSpec:
    """The same input with any shape, for items that are not yet in theirs."""
    return TensorSpec(spec.name, spec.dtype, None)


# --------------------------------------------------------------------------- out


def _written(version: str, began: float, results: Mapping[str, Array]) -> Answer:
    outputs = {name: summed_up(array) for name, array in results.items()}
    told = {"version": version, "ms": 1e3 * (time.perf_counter() - began), "outputs": outputs}
    return Answer(200, JSON, (json.dumps(told, allow_nan=False).encode(),))


def summed_up(array: Array) -> dict[str, Any]:
    """What a page tells of an output: its form, its first 256 values, and of numbers the largest five of its first row.

    Numbers that JSON or a browser cannot hold are texts.
    """
    flat = array.reshape(-1)
    dtype = next((name for name, row in DTYPES.items() if row.numpy == array.dtype), array.dtype.name)
    told: dict[str, Any] = {
        "dtype": dtype, "shape": list(array.shape), "size": int(array.size),
        "first": [_value(value) for value in flat[:_FIRST].tolist()],
    }  # fmt: skip
    if array.dtype.kind == "O" or not array.size:
        return told
    if array.dtype.kind != "b":
        wide = flat.astype(np.float64)
        with np.errstate(all="ignore"):  # infinities have no mean
            told |= {name: _value(float(getattr(wide, name)())) for name in ("min", "max", "mean")}
    row = flat[: array.shape[-1] if array.shape else 1]
    if len(row) > 1 and array.ndim < 3 and array.dtype.kind != "b":
        told["best"] = [{"at": index, "value": _value(row[index].item())} for index in _largest(row)]
    return told


def _largest(row: Array) -> list[int]:
    found: list[int] = np.argsort(-row.astype(np.float64), kind="stable")[:_BEST].tolist()
    return found


def _value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, int) and abs(value) > _EXACT:
        return str(value)
    return value if isinstance(value, bool | int | float | str) else str(value)
