"""The server as one of the Open Inference Protocol: paths, both forms of tensors, compression, bounds, refusals."""

from __future__ import annotations

import gzip
import json
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from rawfront import Client, Reply, front_of
from rawpeer import WAIT_S, until

import server_ref
from remote_ops import Endpoint, FunctionServable, Retry, TensorSpec, graphpipe, http1, oip
from remote_ops.errors import (
    DecodeError,
    FramingError,
    InternalError,
    ModelNotFound,
    SpecError,
)
from remote_ops.signature import BY_NUMPY
from server_ref.batching import Batching
from server_ref.cache import Cached
from server_ref.compression import inflate, inflate_little, wished_coding
from server_ref.json_text import check_json, depth_of, load_json
from server_ref.model import Version
from server_ref.rowstore import MemoryRows

Array = npt.NDArray[Any]
X = TensorSpec("x", "float32", (-1, 2))
Y = TensorSpec("y", "float32", (-1, 2))
ONES = np.ones((3, 2), np.float32)
NO_RETRY = Retry(attempts=1)
INFER = "/v2/models/double/infer"
DATATYPES = {name: BY_NUMPY[dtype].name for name, dtype in oip.DATATYPES.items()}


def doubling(**options: Any) -> FunctionServable:
    return FunctionServable(lambda x: 2 * x, [X], [Y], **options)


def failing() -> FunctionServable:
    def fail(x: Array) -> Array:
        raise ValueError(f"no luck with {len(x)} rows\n  File /secret/place.py")

    return FunctionServable(fail, [X], [Y])


def both(a: Array, b: Array) -> dict[str, Array]:
    return {"sum": a + b, "difference": a - b}


def pair() -> FunctionServable:
    specs = [TensorSpec(name, "float32", (-1, 2)) for name in ("a", "b", "sum", "difference")]
    return FunctionServable(both, specs[:2], specs[2:], version="3")


def strings() -> FunctionServable:
    return FunctionServable(lambda s: s, [TensorSpec("s", "string", (-1,))], [TensorSpec("t", "string", (-1,))])


def square() -> FunctionServable:
    """`x * x`, and its gradient."""
    x = TensorSpec("x", "float32", (-1, 2), differentiable=True)
    return FunctionServable(
        lambda x: x * x, [x], [Y], vjp=lambda given, seeds: {"x": 2 * given["x"] * seeds.get("y", np.float32(1))}
    )


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server of several models; `double` has a version, and requests to `batched` go together."""
    models = {
        "double": doubling(version="7", description="twice"),
        "fails": failing(),
        "pair": pair(),
        "strings": strings(),
        "square": square(),
        "endless": FunctionServable(lambda x: x * np.float32(np.inf), [X], [Y]),
        "batched": Version("batched", [doubling()], version="2", batching=Batching(8, 0.001, (4,), priorities=3)),
    }
    with server_ref.running(models) as base:
        yield base


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    """A connection that must survive the test."""
    with Client(url) as connected:
        yield connected
        assert connected.get("/v2/health/live").status == 200
        assert connected.still(), "the server hung up"


def said(x: Array, *, datatype: str = "FP32", **more: Any) -> dict[str, Any]:
    """A request in JSON for a model that takes `x`."""
    return {"inputs": [{"name": "x", "shape": list(x.shape), "datatype": datatype, "data": x.tolist()}], **more}


def binary(x: Array = ONES, **parameters: Any) -> tuple[bytes, dict[str, str]]:
    """A request in binary form and its header."""
    row = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    text = json.dumps({"inputs": [row], "parameters": {"binary_data_output": True, **parameters}}).encode()
    return text + x.tobytes(), {"Inference-Header-Content-Length": str(len(text))}


def tensors(reply: Reply) -> dict[str, Array]:
    assert reply.status == 200, reply
    size = oip.parse_json_size(reply.headers.get("inference-header-content-length"))
    return oip.decode_response(reply.body, size).tensors


# --------------------------------------------------------------------------- health, metadata, configuration


def test_r19_live_and_ready_say_both_things(client: Client) -> None:
    for path in ("/v2/health/live", "/v2/health/ready"):
        reply = client.get(path)
        assert (reply.status, reply.json) == (200, {"live": True, "ready": True})


def test_r19_a_draining_server_is_live_and_not_ready_and_neither_are_its_models() -> None:
    with front_of({"double": doubling()}) as (url, front), Client(url) as client:
        assert client.get("/v2/models/double/ready").json == {"name": "double", "ready": True}
        front.ready = False
        for path in ("/v2/health/ready", "/v2/models/double/ready"):
            reply = client.get(path)
            assert (reply.status, reply.json["ready"]) == (503, False)
        assert client.get("/v2/health/live").json == {"live": True, "ready": False}
        np.testing.assert_array_equal(tensors(client.post(INFER, said(ONES)))["y"], 2 * ONES)


def test_r19_a_model_that_was_removed_is_not_ready() -> None:
    models = {"double": doubling(), "pair": pair()}
    with front_of(models) as (url, front), Client(url) as client:
        front.loop.call_soon_threadsafe(front.catalog.remove, "pair", "3")
        assert until(lambda: client.get("/v2/models/pair/ready").status == 404)
        assert client.get("/v2/health/ready").status == 200


@pytest.mark.parametrize("path", ["/v2", "/v2/", "/v2?a=b"])
def test_the_server_names_itself_and_what_it_can(client: Client, path: str) -> None:
    found = client.get(path).json
    assert found["name"] == "remote-ops server_ref"
    assert found["extensions"] == ["binary_tensor_data", "model_configuration", "schedule_policy", "statistics"]


def test_the_models_are_listed(client: Client) -> None:
    assert client.get("/v2/models").json["models"][:2] == ["double", "fails"]


@pytest.mark.parametrize("path", ["/v2/models/double", "/v2/models/double/versions/7"])
def test_metadata_are_what_our_client_reads(client: Client, path: str) -> None:
    signature = oip.decode_metadata(client.get(path).body)
    assert (signature.inputs, signature.outputs) == ((X,), (Y,))
    assert (signature.name, signature.version, signature.description) == ("double", "7", "twice")


def test_a_model_that_says_no_dtype_has_no_metadata_here() -> None:
    anything = FunctionServable(lambda x: x, [TensorSpec("x", "any", None)], [TensorSpec("y", "any", None)])
    with front_of({"m": anything}) as (url, _), Client(url) as client:
        reply = client.get("/v2/models/m")
        assert (reply.status, "no datatype" in reply.error) == (501, True)
        assert client.get("/v2/models/m/config").json["input"][0]["data_type"] == "TYPE_INVALID"
        np.testing.assert_array_equal(tensors(client.post("/v2/models/m/infer", said(ONES)))["y"], ONES)


def test_the_configuration_has_the_fields_of_triton(client: Client) -> None:
    found = client.get("/v2/models/batched/config").json
    assert found["name"] == "batched"
    assert found["max_batch_size"] == 8
    assert found["input"][0] | {"name": "x", "data_type": "TYPE_FP32", "dims": [2]} == found["input"][0]
    assert found["output"][0] | {"name": "y", "data_type": "TYPE_FP32", "dims": [2]} == found["output"][0]
    assert found["version_policy"] == {"specific": {"versions": [2]}}
    assert found["dynamic_batching"] == {
        "preferred_batch_size": [4],
        "max_queue_delay_microseconds": 1000,
        "preserve_ordering": False,
        "priority_levels": 3,
        "default_priority_level": 2,
        "priority_queue_policy": {},
    }
    (group,) = found["instance_group"]
    assert (group["kind"], group["gpus"], group["count"] > 0) == ("KIND_CPU", [], True)


def test_the_configuration_of_a_model_without_batching_has_whole_shapes(client: Client) -> None:
    found = client.get("/v2/models/double/versions/7/config").json
    assert (found["max_batch_size"], found["input"][0]["dims"]) == (0, [-1, 2])
    assert "dynamic_batching" not in found
    assert client.get("/v2/models/strings/config").json["input"][0]["data_type"] == "TYPE_STRING"


# --------------------------------------------------------------------------- statistics


def test_r20_statistics_add_up(url: str) -> None:
    with server_ref.running({"double": doubling(version="7"), "fails": failing()}) as own, Client(own) as client:
        for rows in (1, 2, 2):
            assert client.post(INFER, said(np.ones((rows, 2)))).status == 200
        assert client.post(INFER, said(np.ones((1, 3)))).status == 400
        assert client.post("/v2/models/fails/infer", said(ONES)).status == 500
        found = client.get("/v2/models/stats").json["model_stats"]
        assert [(row["name"], row["version"]) for row in found] == [("double", "7"), ("fails", "")]
        double = found[0]
        spent = double["inference_stats"]
        assert (spent["success"]["count"], spent["fail"]["count"]) == (3, 1)
        assert (double["inference_count"], double["execution_count"]) == (5, 3)
        assert {row["batch_size"]: row["compute_infer"]["count"] for row in double["batch_stats"]} == {1: 1, 2: 2}
        rows = [row["batch_size"] * row["compute_infer"]["count"] for row in double["batch_stats"]]
        assert sum(rows) == double["inference_count"]
        parts = ("queue", "compute_input", "compute_infer", "compute_output")
        assert sum(spent[part]["ns"] for part in parts) <= spent["success"]["ns"]
        assert spent.keys() == {"success", "fail", *parts, "cache_hit", "cache_miss"}
        assert double["last_inference"] > 1_600_000_000_000
        assert found[1]["inference_stats"]["fail"]["count"] == 1
        assert client.get("/v2/models/double/stats").json == {"model_stats": [double]}
        assert client.get("/v2/models/double/versions/7/stats").json == {"model_stats": [double]}


def test_r20_statistics_tell_what_the_cache_answered() -> None:
    cached = Version("m", [doubling()], awaited=lambda instances: Cached(instances, MemoryRows(1 << 20)))
    with front_of({"m": cached}) as (url, _), Client(url) as client:
        for _ in range(3):
            assert client.post("/v2/models/m/infer", said(ONES)).status == 200
        (found,) = client.get("/v2/models/m/stats").json["model_stats"]
    spent = found["inference_stats"]
    assert (spent["cache_hit"]["count"], spent["cache_miss"]["count"], found["execution_count"]) == (2, 1, 1)
    assert spent["success"]["count"] == 3
    assert spent["cache_hit"]["ns"] > 0


# --------------------------------------------------------------------------- inference


def test_json_in_and_out(client: Client) -> None:
    reply = client.post(INFER, said(ONES, id="42"), X_Request_Id="r")
    assert reply.json == {
        "model_name": "double",
        "model_version": "7",
        "id": "42",
        "outputs": [{"name": "y", "shape": [3, 2], "datatype": "FP32", "data": [2.0] * 6}],
    }


def test_data_may_be_flat_or_nested(client: Client) -> None:
    request = said(ONES)
    request["inputs"][0]["data"] = [1] * 6
    assert client.post(INFER, request).json == client.post(INFER, said(ONES)).json


def test_binary_in_and_out(client: Client) -> None:
    body, header = binary()
    reply = client.post("/v2/models/double/versions/7/infer", body, **header)
    assert reply.headers["content-type"] == "application/octet-stream"
    np.testing.assert_array_equal(tensors(reply)["y"], 2 * ONES)


def test_one_output_in_binary_and_one_in_json_in_the_order_asked_for(client: Client) -> None:
    rows = [{"name": name, "shape": [1, 2], "datatype": "FP32", "data": [3, 4]} for name in ("b", "a")]
    outputs = [{"name": "difference", "parameters": {"binary_data": True}}, {"name": "sum"}]
    reply = client.post("/v2/models/pair/infer", {"inputs": rows, "outputs": outputs})
    assert list(tensors(reply)) == ["difference", "sum"]
    assert b'"data":[6.0,8.0]' in reply.body
    np.testing.assert_array_equal(tensors(reply)["difference"], np.zeros((1, 2), np.float32))


def extremes(datatype: str) -> Array:
    dtype = oip.DATATYPES[datatype]
    if datatype == "BYTES":
        array = np.empty(4, object)
        array[:] = [b"ab", b"", "\u00e9".encode(), b"\xff\x00"]
        return array.reshape(2, 2)
    if datatype == "BOOL":
        return np.array([[True, False], [False, True]])
    if dtype.kind in "iu":
        return np.array([[np.iinfo(dtype).min, 0], [1, np.iinfo(dtype).max]], dtype)
    limits = ml_dtypes.finfo(dtype)
    return np.array([[limits.min, -0.0], [limits.smallest_subnormal, limits.max]]).astype(dtype)


@pytest.fixture(scope="module")
def typed() -> Iterator[str]:
    """A server with an identity model for every datatype, and for a float8."""

    def same(name: str) -> FunctionServable:
        return FunctionServable(lambda x: x, [TensorSpec("x", name, (-1, 2))], [TensorSpec("y", name, (-1, 2))])

    models = {datatype: same(name) for datatype, name in DATATYPES.items()}
    with server_ref.running(models | {"float8": same("float8_e4m3fn")}) as base:
        yield base


@pytest.mark.parametrize("datatype", DATATYPES)
def test_our_client_gets_every_datatype(typed: str, datatype: str) -> None:
    x = extremes(datatype)
    with Endpoint(f"{typed}v2/models/{datatype}", WAIT_S, retry=NO_RETRY) as endpoint:
        for y in (endpoint(x), endpoint(x[:0])):
            assert (y.dtype, y.tolist()) == (x.dtype, x[: len(y)].tolist())


@pytest.mark.parametrize("datatype", [datatype for datatype in DATATYPES if datatype != "BYTES"])
def test_every_datatype_travels_as_json(typed: str, datatype: str) -> None:
    x = extremes(datatype)
    message = oip.encode_request(("x",), [x], binary=False)
    with Client(typed) as client:
        found = client.post(f"/v2/models/{datatype}/infer", message.buffers[0]).json["outputs"][0]
    assert found == json.loads(message.buffers[0])["inputs"][0] | {"name": "y"}


def test_a_float8_travels_as_its_bits(typed: str) -> None:
    x = np.array([[1.5, -2.0]], ml_dtypes.float8_e4m3fn)
    with Endpoint(f"{typed}v2/models/float8", WAIT_S) as endpoint:
        assert endpoint(x).tolist() == x.tolist()
        assert endpoint(x).dtype == x.dtype


def test_our_client_gets_gradients(url: str) -> None:
    with Endpoint(f"{url}v2/models/square", WAIT_S) as endpoint:
        given = {"x": 3 * ONES, "cotangent:y": 10 * ONES}
        found = endpoint.infer(given, ["y", "gradient:x"])
    np.testing.assert_array_equal(found["y"], 9 * ONES)
    np.testing.assert_array_equal(found["gradient:x"], 60 * ONES)


def test_config_reaches_the_model() -> None:
    model = FunctionServable(lambda x, config: x * int(config or b"2"), [X], [Y])
    with server_ref.running({"m": model}) as base, Endpoint(f"{base}v2/models/m", WAIT_S) as endpoint:
        np.testing.assert_array_equal(endpoint.infer({"x": ONES}, config=b"5")["y"], 5 * ONES)


def test_a_body_without_a_text_is_the_only_input(client: Client) -> None:
    empty = {"Inference-Header-Content-Length": "0"}
    np.testing.assert_array_equal(tensors(client.post(INFER, ONES.tobytes(), **empty))["y"], 2 * ONES)
    assert tensors(client.post("/v2/models/strings/infer", b"\xff\x00 whole", **empty))["t"].tolist() == [
        b"\xff\x00 whole"
    ]
    assert "7 bytes are no float32 [-1, 2]" in client.post(INFER, b"1234567", **empty).error
    assert "the model has 2" in client.post("/v2/models/pair/infer", ONES.tobytes(), **empty).error


def test_a_model_elsewhere_is_answered_for_in_every_form(url: str) -> None:
    with Endpoint(f"{url}double", WAIT_S) as elsewhere:
        with server_ref.running({"far": elsewhere}) as near, Client(near) as client:
            x = np.ones((1000, 2), np.float32)
            body, header = binary(x)
            np.testing.assert_array_equal(tensors(client.post("/v2/models/far/infer", body, **header))["y"], 2 * x)
            reply = client.post("/v2/models/far/infer", said(x), Accept_Encoding="gzip")
            assert reply.headers["content-encoding"] == "gzip"
            assert json.loads(gzip.decompress(reply.body))["outputs"][0]["data"] == [2.0] * 2000
            assert client.post("/v2/models/far/infer", said(np.ones((1, 3)))).status == 400


def test_one_model_answers_both_protocols() -> None:
    with server_ref.running({"double": doubling()}) as url:
        with Endpoint(url, WAIT_S) as ours, Endpoint(f"{url}v2/models/double", WAIT_S) as theirs:
            np.testing.assert_array_equal(ours(ONES), theirs(ONES))
        with Client(url) as client:
            message = b"".join(graphpipe.encode_request(("x",), [ONES]))
            for path in ("/v2x", "/v1/anything", "/v1"):
                assert graphpipe.decode_response(client.post(path, message).body).tensors[0].shape == (3, 2)
            assert client.get("/v2/models/other").status == 404


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_no_model_of_several_may_have_the_name_of_a_protocol(name: str) -> None:
    with pytest.raises(SpecError, match=f"no model can be called '{name}'"):
        with server_ref.running({name: doubling(), "other": doubling()}):
            pass
    with server_ref.running({name: doubling()}) as url, Endpoint(f"{url}v2/models/{name}", WAIT_S) as endpoint:
        np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)


# --------------------------------------------------------------------------- deadlines, priority


class Gate:
    """A model that waits until it is let go, and keeps the first number of each request that it was given."""

    def __init__(self) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        self.seen: list[float] = []
        self.servable = FunctionServable(self._run, [X], [Y])
        self.servable.concurrency = 1  # type: ignore[attr-defined]

    def _run(self, x: Array) -> Array:
        self.seen.append(float(x[0, 0]))
        self.entered.set()
        assert self.open.wait(WAIT_S)
        return x


@pytest.mark.parametrize(
    ("parameters", "headers"),
    [
        ({"timeout": 20_000}, {}),
        ({}, {"X-Request-Timeout-Ms": "20"}),
        ({"timeout": 60_000_000}, {"X-Request-Timeout-Ms": "20"}),
    ],
    ids=["parameter", "header", "the earlier"],
)
def test_r3_a_request_that_expires_in_the_queue_never_runs(parameters: dict[str, int], headers: dict[str, str]) -> None:
    gate = Gate()
    with server_ref.running({"m": gate.servable}) as url, Client(url) as first, Client(url) as second:
        first.send("POST", "/v2/models/m/infer", json.dumps(said(ONES)).encode())
        assert gate.entered.wait(WAIT_S)
        reply = second.post("/v2/models/m/infer", said(2 * ONES, parameters=parameters), **headers)
        assert reply.status == 504
        assert "in the queue" in reply.error
        gate.open.set()
        assert first.read().status == 200
    assert gate.seen == [1.0]


def test_r3_the_time_that_a_body_takes_to_be_decompressed_counts() -> None:
    gate = Gate()
    text = json.dumps(said(ONES, parameters={"timeout": 1000})).encode() + b" " * (60 << 20)
    with server_ref.running({"m": gate.servable}) as url, Client(url) as client:
        reply = client.post("/v2/models/m/infer", gzip.compress(text, 1), Content_Encoding="gzip")
        assert reply.status == 504
    assert gate.seen == []


def test_a_request_of_higher_priority_runs_first() -> None:
    gate = Gate()
    version = Version("m", [gate.servable], batching=Batching(1, priorities=3))
    with front_of({"m": version}) as (url, _):
        clients = [Client(url) for _ in range(4)]
        clients[0].send("POST", "/v2/models/m/infer", json.dumps(said(ONES)).encode())
        assert gate.entered.wait(WAIT_S)
        for number, priority in ((1, 3), (2, 0), (3, 1)):
            body = said((10 + number) * ONES[:1], parameters={"priority": priority})
            clients[number].send("POST", "/v2/models/m/infer", json.dumps(body).encode())
            waiting = number + 1
            assert until(lambda: version.pending == waiting)  # noqa: B023 (called at once)
        gate.open.set()
        assert [client.read().status for client in clients] == [200] * 4
        for client in clients:
            client.close()
    assert gate.seen == [1.0, 13.0, 12.0, 11.0]


def test_r4_a_request_whose_client_has_gone_never_runs() -> None:
    gate = Gate()
    version = Version("m", [gate.servable])
    with front_of({"m": version}) as (url, _), Client(url) as first, Client(url) as second:
        first.send("POST", "/v2/models/m/infer", json.dumps(said(ONES)).encode())
        assert gate.entered.wait(WAIT_S)
        second.send("POST", "/v2/models/m/infer", json.dumps(said(2 * ONES)).encode())
        assert until(lambda: version.pending == 2)
        second.close()
        assert until(lambda: version.pending == 1)
        gate.open.set()
        assert first.read().status == 200
    assert gate.seen == [1.0]


# --------------------------------------------------------------------------- what is refused


def request_with(**changes: Any) -> dict[str, Any]:
    request = said(ONES)
    request["inputs"][0] |= changes
    return request


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "a text of 1 to 0 bytes"),
        (b"no", "not JSON"),
        (b"[]", "expected a JSON object"),
        (b"\xff{}", "not UTF-8"),
        (b'{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [NaN, 1]}]}', "NaN is not JSON"),
        ({}, "'inputs' of the message"),
        ({"inputs": []}, "missing input 'x'"),
        (said(ONES, outputs=[{"name": "z"}]), "no output 'z'"),
        (request_with(name="z"), "no input 'z'"),
        (request_with(datatype="FP99"), "datatype 'FP99'"),
        (request_with(datatype="INT32", data=[1] * 6), "expected float32 [-1, 2], got int32 [3, 2]"),
        (request_with(shape=[3, 3]), "nested otherwise"),
        (request_with(shape=[-1, 2]), "negative sizes"),
        (request_with(data=["1"] * 6), "its data holds string"),
        (request_with(parameters={"shared_memory_region": "r"}), "not supported"),
        (said(ONES, outputs=[{"name": "y", "parameters": {"classification": 3}}]), "not supported"),
        (said(ONES, parameters={"sequence_id": 5}), "keeps no state"),
        (said(ONES, parameters={"timeout": -1}), "parameter 'timeout'"),
        (said(ONES, parameters={"timeout": "5"}), "parameter 'timeout'"),
        (said(ONES, parameters={"priority": 1.5}), "parameter 'priority'"),
        (said(ONES, id=7), "'id' of the request"),
    ],
)
def test_a_wrong_request_is_400_with_words_in_json(client: Client, body: Any, words: str) -> None:
    reply = client.post(INFER, body)
    assert reply.status == 400
    assert words in reply.error


@pytest.mark.parametrize("size", ["x", "-1", "1.5", "999999", "99999999999999999999", "5", "1"])
def test_a_wrong_length_of_the_text_is_400_and_the_connection_survives(client: Client, size: str) -> None:
    body, header = binary()
    reply = client.post(INFER, body, Inference_Header_Content_Length=size)
    assert (reply.status, bool(reply.error)) == (400, True)
    np.testing.assert_array_equal(tensors(client.post(INFER, body, **header))["y"], 2 * ONES)


def test_bytes_that_nobody_announced_are_400(client: Client) -> None:
    body, header = binary()
    assert "bytes follow the last tensor" in client.post(INFER, body + b"\0", **header).error
    assert "expected 24 bytes" in client.post(INFER, body[:-1], **header).error


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/v2/models/dubble/infer", 404, "did you mean '/double'"),
        ("/v2/models/double/versions/8/infer", 404, "no version '8'"),
        ("/v2/models/fails/infer", 500, "the model raised ValueError: no luck with 3 rows"),
    ],
)
def test_an_error_has_the_status_of_our_table(client: Client, path: str, status: int, words: str) -> None:
    reply = client.post(path, said(ONES))
    assert reply.status == status
    assert words in reply.error


def test_s11_errors_tell_no_traces_and_no_places(client: Client) -> None:
    reply = client.post("/v2/models/fails/infer", said(ONES))
    assert b"/secret/place" not in reply.body
    assert b"Traceback" not in reply.body
    assert b"server_ref" not in reply.body


def test_our_client_reads_our_errors(url: str) -> None:
    for path, error in (("dubble", ModelNotFound), ("fails", InternalError)):
        with Endpoint(f"{url}v2/models/{path}", WAIT_S, retry=NO_RETRY) as endpoint, pytest.raises(error):
            endpoint(ONES)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", INFER, "POST"),
        ("PUT", INFER, "POST"),
        ("POST", "/v2/models/double", "GET"),
        ("POST", "/v2/health/ready", "GET"),
        ("DELETE", "/v2/models/double/stats", "GET"),
        ("GET", "/v2/repository/index", "POST"),
    ],
)
def test_another_method_is_405_and_says_which_there_is(client: Client, method: str, path: str, allowed: str) -> None:
    reply = client.ask(method, path)
    assert (reply.status, reply.headers["allow"]) == (405, f"{allowed}, OPTIONS")
    assert allowed in reply.error


def test_head_is_get_without_its_body(client: Client) -> None:
    reply = client.ask("HEAD", "/v2/health/ready")
    assert (reply.status, reply.body) == (200, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/v2/systemsharedmemory/status",
        "/v2/systemsharedmemory/region/r/register",
        "/v2/cudasharedmemory/region/r/unregister",
        "/v2/trace/setting",
        "/v2/models/double/trace/setting",
        "/v2/logging",
        "/v2/models/double/generate",
    ],
)
def test_what_is_not_offered_says_so(client: Client, path: str) -> None:
    for method in ("GET", "POST"):
        reply = client.ask(method, path, b"{}")
        assert (reply.status, "does not offer" in reply.error) == (501, True)


def test_an_unknown_path_is_404_in_json(client: Client) -> None:
    assert client.get("/v2/nothing").status == 404
    assert "/v2/nothing" in client.get("/v2/nothing").error


def test_s4_a_body_over_the_limit_is_refused_in_json_before_it_is_read() -> None:
    limits = http1.Limits(max_body_bytes=1000)
    with front_of({"double": doubling()}, limits=limits) as (url, _), Client(url) as client:
        client._connection.putrequest("POST", INFER)
        client._connection.putheader("Content-Length", "1001")
        client._connection.endheaders()
        reply = client.read()
        assert (reply.status, "expected at most 1000" in reply.error) == (413, True)


# --------------------------------------------------------------------------- S4: texts


def test_s4_a_text_nested_deeper_than_100_is_refused_and_one_of_100_is_not(client: Client) -> None:
    def nested(depth: int) -> bytes:
        inner = "[" * (depth - 2) + "]" * (depth - 2)
        return json.dumps(said(ONES)).encode()[:-1] + f', "parameters": {{"deep": {inner}}}}}'.encode()

    assert client.post(INFER, nested(100)).status == 200
    reply = client.post(INFER, nested(101))
    assert (reply.status, "nested 101 deep" in reply.error) == (400, True)
    assert client.post(INFER, nested(100_000)).status == 400


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        ("1", 0),
        ("[]", 1),
        ('{"a": [1, {"b": []}]}', 4),
        ('["[[[[", "]]]]", []]', 2),
        ('["\\"[[[", []]', 2),
        ('["\\\\", [[]], "\\\\\\"["]', 3),
        ("[" * 5 + "]" * 5 + " " * (1 << 20) + "x", 5),
        ("[" + " " * (1 << 20) + '"[' + "x" * (1 << 20) + '[" [ ] ]', 2),
    ],
)
def test_s4_brackets_in_strings_do_not_nest(text: str, depth: int) -> None:
    assert depth_of(text.encode()) == depth


def test_s4_depths_are_those_that_a_parser_finds() -> None:
    def depth(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    generator = np.random.default_rng(0)
    strings = ["", "[", "]}", '"', "\\", '\\"[', "a\\\\", "{" * 9]

    def value(levels: int) -> Any:
        kind = generator.integers(4) if levels else 3
        if kind == 0:
            return [value(levels - 1) for _ in range(generator.integers(4))]
        if kind == 1:
            return {strings[generator.integers(8)]: value(levels - 1) for _ in range(generator.integers(4))}
        return strings[generator.integers(8)]

    for _ in range(500):
        made = value(8)
        assert depth_of(json.dumps(made).encode()) == depth(made)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[" + b"[]," * (1 << 22) + b"[]]", "lists and objects"),
        (b"[" + b"1," * (1 << 24) + b"1,1]", "commas"),
    ],
    ids=["lists", "values"],
)
def test_s4_a_text_that_would_take_gigabytes_is_refused_unread(text: bytes, words: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match=words):
            load_json(text)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_s4_a_text_of_more_than_64_mib_is_413() -> None:
    with pytest.raises(FramingError, match="send binary") as caught:
        check_json(b" " * ((1 << 26) + 1))
    assert caught.value.status == 413


def test_a_large_text_is_read_as_well_as_a_small_one(client: Client) -> None:
    x = np.arange(60_000, dtype=np.float32).reshape(-1, 2)
    np.testing.assert_array_equal(tensors(client.post(INFER, said(x)))["y"], 2 * x)
    assert client.post(INFER, json.dumps(said(x)).encode()[:-1]).status == 400


def test_s4_whatever_is_sent_is_answered_in_json_and_never_by_a_crash(client: Client) -> None:
    generator = np.random.default_rng(3)
    whole, header = binary()
    size = int(header["Inference-Header-Content-Length"])
    rows = b'{"instances": [[1, 2], {"x": [3, 4]}]}'
    tokens = [b"{", b"}", b"[", b"]", b'"', b"\\", b"-", b"1e999", b"null", b"true", b"\xff", b"", b"99", b'"data":']
    for _ in range(400):
        for path, body, headers in ((INFER, whole, header), ("/v1/models/double:predict", rows, {})):
            at = int(generator.integers(min(size, len(body))))
            cut = int(generator.integers(4))
            damaged = body[:at] + tokens[generator.integers(len(tokens))] + body[at + cut :]
            reply = client.post(path, damaged, **headers)
            assert (reply.status == 400 and reply.error) or reply.status == 200, (damaged, reply)


# --------------------------------------------------------------------------- S5: compression


def zipped(data: bytes, coding: str) -> bytes:
    if coding == "raw deflate":
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        return packer.compress(data) + packer.flush()
    return gzip.compress(data) if "gzip" in coding else zlib.compress(data)


@pytest.mark.parametrize("rows", [3, 100_000], ids=["little", "large"])
@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "GZIP", "deflate", "raw deflate"])
def test_a_compressed_request_is_read(client: Client, coding: str, rows: int) -> None:
    x = np.arange(2 * rows, dtype=np.float32).reshape(-1, 2)
    body, header = binary(x)
    name = coding.removeprefix("raw ")
    reply = client.post(INFER, zipped(body, coding.lower()), Content_Encoding=name, **header)
    np.testing.assert_array_equal(tensors(reply)["y"], 2 * x)


@pytest.mark.parametrize("rows", [3, 100_000], ids=["little", "large"])
def test_a_compressed_graphpipe_request_is_read(client: Client, rows: int) -> None:
    x = np.arange(2 * rows, dtype=np.float32).reshape(-1, 2)
    body = gzip.compress(b"".join(graphpipe.encode_request(("x",), [x])))
    reply = client.post("/double", body, Content_Encoding="gzip")
    np.testing.assert_array_equal(graphpipe.decode_response(reply.body).tensors[0], 2 * x)


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "gzip, identity"])
def test_s5_an_unknown_coding_is_415(client: Client, coding: str) -> None:
    reply = client.post(INFER, b"x", Content_Encoding=coding)
    assert (reply.status, "expected gzip, deflate or none" in reply.error) == (415, True)
    assert client.post("/double", b"x", Content_Encoding=coding).status == 415


def test_a_request_without_a_body_has_no_coding(client: Client) -> None:
    assert client.get("/v2/models/double", Content_Encoding="gzip").status == 200
    assert "a text of 1 to 0 bytes" in client.post(INFER, b"", Content_Encoding="gzip").error


def test_identity_is_no_coding(client: Client) -> None:
    assert client.post(INFER, said(ONES), Content_Encoding="identity").status == 200


BODY = json.dumps(said(np.arange(2000.0).reshape(-1, 2))).encode()
LARGE = np.random.default_rng(1).bytes(1 << 20)


@pytest.mark.parametrize("body", [BODY, LARGE], ids=["little", "large"])
@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-1], "ends inside"),
        (lambda data: data[: len(data) // 2], "ends inside"),
        (lambda data: data[:-6] + bytes(6), "data"),
        (lambda data: b"\0" + data, "as its Content-Encoding says"),
        (lambda data: data + b"\0", "bytes follow the end"),
        (lambda data: data + data, "bytes follow the end"),
        (lambda data: data[:1], "ends inside"),
    ],
)
def test_s5_a_body_that_is_not_what_it_says_is_400(
    client: Client, coding: str, damage: Callable[[bytes], bytes], words: str, body: bytes
) -> None:
    reply = client.post(INFER, damage(zipped(body, coding)), Content_Encoding=coding)
    assert (reply.status, words in reply.error) == (400, True), reply.body


def bomb(coding: str, size: int) -> bytes:
    """A body that becomes `size` bytes of nothing: the same block over and over, which nobody had to compress."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31 if coding == "gzip" else 15)
    head = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + block * (size >> 20)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_s5_ten_megabytes_that_become_ten_gigabytes_are_413_in_no_memory(coding: str) -> None:
    body = bomb(coding, 10 << 30)
    assert 9 << 20 < len(body) < 12 << 20
    limits = http1.Limits(max_body_bytes=64 << 20)
    with front_of({"double": doubling()}, limits=limits) as (url, _), Client(url) as client:
        tracemalloc.start()
        try:
            reply = client.post(INFER, body, Content_Encoding=coding)
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert (reply.status, "once it is decompressed" in reply.error) == (413, True)
        assert most < 8 << 20
        assert client.post("/double", body, Content_Encoding=coding).status == 413
        np.testing.assert_array_equal(tensors(client.post(INFER, said(ONES)))["y"], 2 * ONES)
        assert client.still()


def test_s5_a_little_bomb_is_refused_at_once() -> None:
    with pytest.raises(FramingError, match="more than 1000 bytes"):
        inflate_little(gzip.compress(bytes(100_000)), "gzip", 1000)
    assert inflate_little(gzip.compress(bytes(1 << 20)), "gzip", 1 << 30) is None
    assert inflate_little(bytes((1 << 18) + 1), "gzip", 1 << 30) is None


def test_s5_nobody_inflates_what_nobody_waits_for() -> None:
    asked = iter([True, True, False])
    with pytest.raises(FramingError, match="gone"):
        inflate(bomb("gzip", 1 << 30), "gzip", 1 << 40, lambda size: pytest.fail("a buffer"), lambda: next(asked))


def test_s5_others_are_served_while_a_bomb_is_read() -> None:
    limits = http1.Limits(max_body_bytes=1 << 40)
    with front_of({"double": doubling()}, limits=limits) as (url, front), Client(url) as other:
        attacker = Client(url)
        attacker.send("POST", INFER, bomb("gzip", 100 << 30), Content_Encoding="gzip")
        assert until(lambda: front.in_flight == 1)
        np.testing.assert_array_equal(tensors(other.post(INFER, said(ONES)))["y"], 2 * ONES)
        attacker.close()
        assert until(lambda: front.in_flight == 0)
        large = gzip.compress(binary(np.ones((50_000, 2), np.float32))[0])
        assert other.post(INFER, large, Content_Encoding="gzip").status == 400


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("form", ["json", "binary"])
def test_an_answer_is_compressed_where_that_is_asked_for(client: Client, coding: str, form: str) -> None:
    x = np.ones((1000, 2), np.float32)
    body, header = binary(x) if form == "binary" else (json.dumps(said(x)).encode(), {})
    plain, packed = client.post(INFER, body, **header), client.post(INFER, body, Accept_Encoding=coding, **header)
    assert "content-encoding" not in plain.headers
    assert (packed.headers["content-encoding"], packed.headers["vary"]) == (coding, "Accept-Encoding")
    assert len(packed.body) < len(plain.body)
    assert (gzip.decompress if coding == "gzip" else zlib.decompress)(packed.body) == plain.body
    size = "inference-header-content-length"
    assert packed.headers.get(size) == plain.headers.get(size)


@pytest.mark.parametrize(
    ("header", "coding"),
    [
        ("", ""),
        ("br", ""),
        ("gzip, deflate, br", "gzip"),
        ("deflate, gzip", "deflate"),
        ("gzip;q=0, deflate", "deflate"),
        ("gzip;q=0.5, deflate;q=0.8", "deflate"),
        ("gzip;q=x", ""),
        ("x-gzip", "gzip"),
    ],
)
def test_the_coding_is_the_one_that_the_client_likes_best(header: str, coding: str) -> None:
    assert wished_coding(header) == coding


def test_little_answers_metadata_and_what_would_grow_go_as_they_are(client: Client) -> None:
    assert "content-encoding" not in client.post(INFER, said(ONES), Accept_Encoding="gzip").headers
    assert "content-encoding" not in client.get("/v2/models/batched/config", Accept_Encoding="gzip").headers
    noise = np.frombuffer(np.random.default_rng(2).bytes(1 << 16), np.uint8)
    same = FunctionServable(lambda x: x, [TensorSpec("x", "uint8", (-1,))], [TensorSpec("y", "uint8", (-1,))])
    with front_of({"m": same}) as (url, _), Client(url) as own:
        empty = {"Inference-Header-Content-Length": "0"}
        reply = own.post("/v2/models/m/infer", noise.tobytes(), Accept_Encoding="gzip", **empty)
        assert "content-encoding" not in reply.headers
        np.testing.assert_array_equal(tensors(reply)["y"], noise)


# --------------------------------------------------------------------------- forms that JSON lacks


def test_infinity_has_no_json_and_the_answer_says_what_has(client: Client) -> None:
    reply = client.post("/v2/models/endless/infer", said(ONES))
    assert reply.status == 400
    assert "'y' holds NaN or infinity" in reply.error
    assert "binary_data_output" in reply.error
    asked = client.post("/v2/models/endless/infer", said(ONES, parameters={"binary_data_output": True}))
    assert np.isinf(tensors(asked)["y"]).all()


def test_bytes_that_are_no_text_have_no_json(client: Client) -> None:
    row = {"name": "s", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 5}}
    text = json.dumps({"inputs": [row]}).encode()
    body, header = text + struct.pack("<I", 1) + b"\xff", {"Inference-Header-Content-Length": str(len(text))}
    assert "binary_data_output" in client.post("/v2/models/strings/infer", body, **header).error


# --------------------------------------------------------------------------- the repository


class Row(NamedTuple):
    name: str
    version: str
    state: str
    reason: str = ""


class Control:
    """What loads and unloads, for a test."""

    def __init__(self) -> None:
        self.did: list[str] = []

    async def load(self, name: str, *, version: str = "") -> None:
        if name == "nope":
            raise ModelNotFound("no folder 'nope'")
        self.did.append(f"load {name}")

    async def unload(self, name: str, *, version: str = "") -> None:
        self.did.append(f"unload {name}")


def test_the_index_lists_what_is_served(client: Client) -> None:
    rows = client.post("/v2/repository/index").json
    assert {"name": "double", "version": "7", "state": "READY", "reason": ""} in rows
    assert client.post("/v2/repository/index", {"ready": True}).json == rows
    assert client.post("/v2/repository/index", b"[1]").status == 400


def test_the_index_lists_what_is_not_served_too_where_somebody_knows() -> None:
    rows = [
        Row("double", "7", "ready"),
        Row("a", "1", "warming"),
        Row("b", "1", "draining"),
        Row("c", "", "failed", "no"),
    ]
    with front_of({"double": doubling()}) as (url, front), Client(url) as client:
        front.index = lambda: rows
        states = {row["name"]: row["state"] for row in client.post("/v2/repository/index").json}
        assert states == {"double": "READY", "a": "LOADING", "b": "UNLOADING", "c": "UNAVAILABLE"}
        assert client.post("/v2/repository/index").json[3]["reason"] == "no"
        assert [row["name"] for row in client.post("/v2/repository/index", {"ready": True}).json] == ["double"]


@pytest.mark.parametrize("verb", ["load", "unload"])
def test_s10_nobody_loads_or_unloads_unless_the_server_was_started_so(client: Client, verb: str) -> None:
    reply = client.post(f"/v2/repository/models/double/{verb}")
    assert (reply.status, "started without model control" in reply.error) == (403, True)


def test_models_are_loaded_and_unloaded_where_that_is_allowed() -> None:
    control = Control()
    with front_of({"double": doubling()}) as (url, front), Client(url) as client:
        front.control = control
        assert "model_repository" in client.get("/v2").json["extensions"]
        assert client.post("/v2/repository/models/a%20b/load").status == 200
        assert client.post("/v2/repository/models/m/unload", {"parameters": {"unload_dependents": False}}).status == 200
        assert client.post("/v2/repository/models/nope/load").status == 404
        for parameters in ({"file:1/model.onnx": "AA=="}, {"config": "{}"}, {"unload_dependents": True}, {1: []}):
            reply = client.post("/v2/repository/models/m/load", {"parameters": parameters})
            assert (reply.status, "does not offer" in reply.error) == (400, True)
        page = client.post("/v2/repository/models/m/load", Origin="http://evil.example")
        assert page.status == 403
    assert control.did == ["load a b", "unload m"]


# --------------------------------------------------------------------------- S15: pages in browsers


PAGE = "https://app.example"


def allowed(reply: Reply) -> str | None:
    return reply.headers.get("access-control-allow-origin")


def test_s15_no_page_of_another_site_may_read_an_answer_unless_said(client: Client) -> None:
    for reply in (
        client.get("/v2", Origin=PAGE),
        client.post(INFER, said(ONES), Origin=PAGE),
        client.ask("OPTIONS", INFER, Origin=PAGE, Access_Control_Request_Method="POST"),
    ):
        assert reply.status in (200, 204)
        assert not [name for name in reply.headers if name.startswith("access-control")]


def test_s15_the_pages_that_are_named_may_and_no_others() -> None:
    with front_of({"double": doubling(), "fails": failing()}, cors_origins=[PAGE]) as (url, _), Client(url) as client:
        for path in (INFER, "/v2/models/fails/infer", "/v2/models/nope/infer", "/double"):
            assert allowed(client.post(path, said(ONES), Origin=PAGE)) == PAGE
            other = client.post(path, said(ONES), Origin="https://evil.example")
            assert (allowed(other), other.headers["vary"]) == (None, "Origin")
            assert allowed(client.post(path, said(ONES))) is None
        before = client.ask("OPTIONS", INFER, Origin=PAGE, Access_Control_Request_Method="POST")
        assert (before.status, allowed(before)) == (204, PAGE)
        assert "Inference-Header-Content-Length" in before.headers["access-control-allow-headers"]
        assert "POST" in before.headers["access-control-allow-methods"]
        evil = client.ask("OPTIONS", INFER, Origin="https://evil.example", Access_Control_Request_Method="POST")
        assert allowed(evil) is None
        assert "access-control-allow-methods" not in evil.headers


def test_s15_a_star_lets_every_page() -> None:
    with front_of({"double": doubling()}, cors_origins=["*"]) as (url, _), Client(url) as client:
        assert allowed(client.get("/v2", Origin="https://any.example")) == "*"
        assert client.ask("OPTIONS", "/v2", Origin="https://any.example").headers["access-control-max-age"] == "600"


@pytest.mark.parametrize("origins", ["*", ["app.example"], ["https://app.example/"], ["https://"]])
def test_s15_an_origin_that_no_browser_sends_is_no_option(origins: Any) -> None:
    with pytest.raises(SpecError, match="origin"):
        with front_of({"double": doubling()}, cors_origins=origins):
            pass
