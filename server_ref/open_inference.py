"""The Open Inference Protocol v2 over HTTP, with Triton's extensions: `/v2...`.

Messages are `remote_ops.oip`'s, running is `model`'s. Shared memory, traces, log settings, sequences and classification
are not offered, and say so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

import remote_ops
from remote_ops import oip
from remote_ops.deadline import Deadline
from remote_ops.errors import EncodeError, InvalidRequest, ModelUnavailable
from remote_ops.signature import DTYPES, Array, Signature, TensorSpec
from server_ref.answer import JSON, Answer
from server_ref.catalog import Chosen, Model
from server_ref.compression import compressed, wished_coding
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
from server_ref.json_text import check_json, load_json
from server_ref.model import Run, Version
from server_ref.repository import Entry
from server_ref.triton_json import configuration, index_row, metadata, statistics

__all__ = ["OpenInference"]

LARGE_TEXT_BYTES = 1 << 16
_MODEL = r"/v2/models/(?P<model>.+?)(?:/versions/(?P<version>[^/]+))?"
Found: TypeAlias = "dict[str, str]"


class OpenInference:
    """Answers what a path below `/v2` asks of a front.

    Args:
        host: the front.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        routes: list[tuple[str, str, Callable[[Exchange, Found], Answer | None]]] = [
            (_MODEL + "/infer", "POST", self._infer),
            ("/v2/?", "GET", self._server),
            ("/v2/health/live", "GET", self._live),
            ("/v2/health/ready", "GET", self._ready),
            ("/v2/models/?", "GET", self._models),
            ("/v2/models/stats", "GET", self._all_stats),
            (_MODEL + "/ready", "GET", self._model_ready),
            (_MODEL + "/config", "GET", self._config),
            (_MODEL + "/stats", "GET", self._stats),
            ("/v2/repository/index", "POST", self._index),
            (r"/v2/repository/models/(?P<model>.+)/(?P<verb>load|unload)", "POST", self._control),
            (r"/v2/(?P<what>(?:system|cuda)sharedmemory)(?:/.*)?", "", _not_offered),
            (rf"(?:/v2|{_MODEL})/(?P<what>trace/setting|logging|generate(?:_stream)?|infer_stream)", "", _not_offered),
            (_MODEL, "GET", self._metadata),
        ]
        self._routes = [(re.compile(pattern), method, answer) for pattern, method, answer in routes]

    def answer(self, exchange: Exchange) -> Answer | None:
        """Answer a request, or start what will; None if the answer comes later.

        Raises:
            RemoteOpsError: what is wrong with it.
        """
        for pattern, allowed, answer in self._routes:
            match = pattern.fullmatch(exchange.path)
            if match is None:
                continue
            if exchange.method != allowed and allowed and (exchange.method, allowed) != ("HEAD", "GET"):
                return wrong_method(exchange.method, allowed)
            return answer(exchange, match.groupdict(default=""))
        return refusal(404, f"no {exchange.path[:200]} in this protocol")

    def _named(self, found: Found) -> tuple[Model, Version]:
        model = self._host.catalog.model(found["model"])
        return model, model.version(found["version"])

    # the server

    def _server(self, exchange: Exchange, found: Found) -> Answer:
        extensions = ["binary_tensor_data", "model_configuration", "schedule_policy", "statistics"]
        if self._host.control is not None:
            extensions.insert(2, "model_repository")
        name, version = "remote-ops server_ref", remote_ops.__version__
        return json_answer({"name": name, "version": version, "extensions": extensions})

    @property
    def _takes_requests(self) -> bool:
        return self._host.ready and not self._host.draining

    @property
    def _is_ready(self) -> bool:
        return self._takes_requests and self._host.catalog.ready

    def _live(self, exchange: Exchange, found: Found) -> Answer:
        return json_answer({"live": True, "ready": self._is_ready})

    def _ready(self, exchange: Exchange, found: Found) -> Answer:
        return json_answer({"live": True, "ready": self._is_ready}, 200 if self._is_ready else 503)

    def _models(self, exchange: Exchange, found: Found) -> Answer:
        return json_answer({"models": list(self._host.catalog.models)})

    # one model

    def _metadata(self, exchange: Exchange, found: Found) -> Answer:
        model, version = self._named(found)
        try:
            return Answer(200, JSON, (metadata(version, [name for name in model.versions if name]),))
        except EncodeError as error:
            return refusal(501, f"model '{version.name}': {error}")

    def _model_ready(self, exchange: Exchange, found: Found) -> Answer:
        try:
            ready = self._named(found)[1].ready and self._takes_requests
        except ModelUnavailable:
            ready = False
        return json_answer({"name": found["model"], "ready": ready}, 200 if ready else 503)

    def _config(self, exchange: Exchange, found: Found) -> Answer:
        return json_answer(configuration(*self._named(found)))

    def _stats(self, exchange: Exchange, found: Found) -> Answer:
        model, version = self._named(found)
        asked = [version] if found["version"] else model.versions.values()
        return json_answer({"model_stats": [statistics(one) for one in asked]})

    def _all_stats(self, exchange: Exchange, found: Found) -> Answer:
        return json_answer({"model_stats": [statistics(version) for version in self._host.catalog]})

    # inference

    def _infer(self, exchange: Exchange, found: Found) -> Answer | None:
        chosen = self._host.catalog.model(found["model"]).choose(found["version"], exchange.head.headers)
        size = oip.parse_json_size(exchange.head.headers.get(oip.JSON_SIZE_HEADER.lower()))
        if size == 0:
            return self._begin(exchange, chosen, _raw(exchange.body, chosen.version.signature))
        if (len(exchange.body) if size is None else size) <= LARGE_TEXT_BYTES:
            return self._begin(exchange, chosen, _read(exchange.body, size))
        self._host.later(
            lambda: _read(exchange.body, size),
            lambda request: self._begin(exchange, chosen, request),
            exchange.connection,
        )
        return None

    def _begin(self, exchange: Exchange, chosen: Chosen, request: oip.InferRequest) -> Answer | None:
        version, parameters = chosen.version, request.parameters
        _refuse_sequence(parameters)
        arrays, wanted = checked(version, request.tensors, request.output_names)
        timeout_us = _whole(parameters, "timeout")
        deadline = deadline_of(exchange.head, exchange.connection.arrived_at)
        if timeout_us:
            deadline = Deadline(exchange.connection.arrived_at + timeout_us / 1e6).earlier(deadline)
        coding = wished_coding(exchange.head.headers.get("accept-encoding", ""))
        run = Run(
            version, arrays, wanted,
            config=request.config, deadline=deadline, priority=_whole(parameters, "priority"),
            write=lambda results: compressed(_written(results, version, request), coding),
            done=exchange.connection.finish,
            slow_write=bool(coding) or not all(request.wants_binary(spec.name) for spec in wanted),
        )  # fmt: skip
        return self._host.begin(run, exchange.connection, chosen.copy_to)

    # the repository

    def _index(self, exchange: Exchange, found: Found) -> Answer:
        only_ready = _parsed(exchange.body).get("ready") is True
        rows = [index_row(entry) for entry in self._entries()]
        return json_answer([row for row in rows if row["state"] == "READY" or not only_ready])

    def _entries(self) -> Iterable[Entry | Version]:
        return self._host.catalog if self._host.index is None else self._host.index()

    def _control(self, exchange: Exchange, found: Found) -> Answer | None:
        control, name, verb = self._host.control, found["model"], found["verb"]
        if control is None:
            return refusal(403, f"to {verb} models is not allowed here: the server was started without model control")
        if "origin" in exchange.head.headers:  # a page in somebody's browser
            return refusal(403, f"to {verb} models is not for pages of other origins")
        parameters = _parsed(exchange.body).get("parameters") or {}
        if extra := [key for key, value in parameters.items() if value is not False]:
            raise InvalidRequest(f"to {verb} a model with '{str(extra[0])[:64]}': this server does not offer that")
        awaited = control.load(name) if verb == "load" else control.unload(name)
        self._host.wait_for(awaited, lambda _: json_answer({}), exchange.connection)
        return None


def _not_offered(exchange: Exchange, found: Found) -> Answer:
    return not_offered(found["what"])


def _parsed(body: memoryview | bytes) -> dict[str, Any]:
    """What the small text of a request says; nothing where there is none."""
    said = load_json(bytes(body)) if len(body) else {}
    if not isinstance(said, dict) or not isinstance(said.get("parameters") or {}, dict):
        raise InvalidRequest("expected a JSON object, and parameters that are one")
    return said


def _read(body: memoryview | bytes, size: int | None) -> oip.InferRequest:
    check_json(bytes(body[:size]))
    return oip.decode_request(body, size)


def _raw(body: memoryview | bytes, signature: Signature) -> oip.InferRequest:
    """A request whose body is the bytes of the only input, without a text: one string, or so many numbers."""
    if len(signature.inputs) != 1:
        raise InvalidRequest(f"a body without a text is one input: the model has {len(signature.inputs)}")
    spec = signature.inputs[0]
    array = np.array([bytes(body)], object) if spec.dtype == "string" else _numbers(body, spec)
    shape = (1,) * len(spec.shape or (1,)) if spec.dtype == "string" else array.shape
    return oip.InferRequest({spec.name: array.reshape(shape)}, (), b"", "", MappingProxyType({}), True, {})


def _numbers(body: memoryview | bytes, spec: TensorSpec) -> Array:
    """Bytes in the dtype and shape of an input; the size of one axis follows from how many there are."""
    row, shape = DTYPES.get(spec.dtype), list(spec.shape or ())
    if row is None or spec.shape is None:
        raise InvalidRequest(f"a body without a text: the model does not say what '{spec.name}' is: {spec}")
    if shape.count(-1) > 1 and shape[0] == -1:
        shape[0] = 1
    known = math.prod(size for size in shape if size >= 0) * row.stored.itemsize
    if shape.count(-1) > 1 or not known or len(body) % known or (-1 not in shape and len(body) != known):
        raise InvalidRequest(f"a body without a text: {len(body)} bytes are no {spec}")
    sizes = [len(body) // known if size == -1 else size for size in shape]
    return np.frombuffer(body, row.stored).reshape(sizes)


def _refuse_sequence(parameters: Mapping[str, Any]) -> None:
    if parameters.get("sequence_id"):
        raise InvalidRequest("a request of a sequence: this server keeps no state between requests")


def _whole(parameters: Mapping[str, Any], key: str) -> int:
    value = parameters.get(key, 0)
    if type(value) is not int or not 0 <= value < 2**63:
        raise InvalidRequest(f"parameter '{key}': expected a whole number, 0 or more, got {str(value)[:64]!r}")
    return value


def _written(results: Mapping[str, Array], version: Version, request: oip.InferRequest) -> Answer:
    binary = {name for name in results if request.wants_binary(name)}
    try:
        message = oip.encode_response(
            results, model_name=version.name, model_version=version.version, id=request.id, binary=binary
        )
    except EncodeError as error:
        # Not the model's fault: what has no form in JSON has one in binary.
        said = str(error).partition("; the server takes")[0]
        raise InvalidRequest(f"{said}; ask for outputs in binary form: binary_data_output") from error
    return Answer(200, message.content_type, message.buffers, message.headers)
