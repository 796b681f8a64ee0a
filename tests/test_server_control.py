"""The control plane: what it tells, what it changes and for whom, and that it is as its own document says."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import jsonschema
import numpy as np
import pytest
import trustme
from rawpeer import WAIT_S, until

import ensemble
import server_ref
from remote_ops import Endpoint, FunctionServable, Retry, SpecError, TensorSpec
from remote_ops.errors import ModelNotFound, RemoteOpsError
from server_ref import Access, Certificates, ControlPlane, api, control
from server_ref.__main__ import main
from server_ref.devices import devices, resident_bytes
from server_ref.graphs import Watched, watched

pytest.importorskip("uvicorn")
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

ROOT = Path(__file__).parents[1]
X, Y = TensorSpec("x", "float32", (-1, 2)), TensorSpec("y", "float32", (-1, 2))
ONES = np.ones((3, 2), np.float32)
NO_RETRY = Retry(attempts=1)
INFER, ADMIN = "infer-token-0123456789", "admin-token-0123456789"


def doubling(name: str = "double") -> FunctionServable:
    return FunctionServable(lambda x: 2 * x, [X], [Y], name=name, version="7")


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    url: str, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
) -> Reply:  # fmt: skip
    parts = urlsplit(url)
    assert parts.hostname
    connection: HTTPConnection = (
        HTTPSConnection(parts.hostname, parts.port, timeout=WAIT_S, context=tls)
        if parts.scheme == "https"
        else HTTPConnection(parts.hostname, parts.port, timeout=WAIT_S)
    )
    sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    with contextlib.closing(connection):
        connection.request(method, path, sent, dict(headers or {}))
        answer = connection.getresponse()
        return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())


class Row(NamedTuple):
    """One version, as a repository tells of it."""

    name: str
    version: str
    state: str
    reason: str = ""
    since: float = 12.0


class Shelf:
    """A repository of the test's: it has two versions of a model, loads and unloads one, and says who asks it."""

    def __init__(self) -> None:
        self.state = "unavailable"
        self.threads: set[str] = set()
        self.scaled: tuple[str, int, str] | None = None
        self._labels: dict[str, str] = {}
        self._weights: dict[str, float] = {}

    def index(self) -> Sequence[Row]:
        self.threads.add(threading.current_thread().name)
        return [Row("double", "7", "ready"), Row("new", "1", self.state, "not asked for")]

    async def load(self, name: str, *, version: str = "") -> Any:
        self._check(name)
        self.state = "ready"

    async def unload(self, name: str, *, version: str = "") -> Any:
        self._check(name)
        self.state = "unavailable"

    async def scale(self, name: str, count: int, *, version: str = "") -> Any:
        self._check(name)
        self.scaled = (name, count, version)

    def set_labels(self, name: str, labels: dict[str, str]) -> None:
        self._check(name)
        self._labels = labels

    def set_weights(self, name: str, weights: dict[str, float]) -> None:
        self._check(name)
        if any(weight < 0 for weight in weights.values()):
            raise SpecError("expected weights of 0 or more", path="weights")
        self._weights = weights

    def labels(self, name: str) -> Mapping[str, str]:
        return self._labels

    def weights(self, name: str) -> Mapping[str, float]:
        return self._weights

    def _check(self, name: str) -> None:
        self.threads.add(threading.current_thread().name)
        if name not in ("double", "new"):
            raise ModelNotFound(f"no model '{name}': there are double, new")


def threads_of_servers() -> int:
    return len([thread for thread in threading.enumerate() if thread.name.startswith("server_ref")])


@contextlib.contextmanager
def controlled(
    models: Mapping[str, Any] | None = None, *, access: Access | None = None, **options: Any
) -> Iterator[tuple[str, str]]:
    """A server with a control plane: the URL of each."""
    plane = ControlPlane("127.0.0.1:0", **options)
    with server_ref.running(models or {"double": doubling()}, access=access, control=plane) as url:
        yield url, plane.url


# --------------------------------------------------------------------------- told


@pytest.fixture(scope="module")
def urls() -> Iterator[tuple[str, str]]:
    """A server of two models, without tokens or changes."""
    with controlled({"double": doubling(), "plain": doubling("plain")}) as both:
        yield both


@pytest.fixture(scope="module")
def document(urls: tuple[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = ask(urls[1], "GET", "/openapi.json").json
    return found


def test_a_model_is_told_with_signature_queue_counters_and_percentiles(urls: tuple[str, str]) -> None:
    url, plane = urls
    with Endpoint(f"{url}plain") as endpoint:
        for _ in range(100):
            endpoint(ONES)
    (version,) = ask(plane, "GET", "/api/models/plain").json["versions"]
    assert (version["version"], version["state"], version["reason"]) == ("7", "ready", "")
    assert version["inputs"] == [{"name": "x", "dtype": "float32", "shape": [-1, 2], "description": ""}]
    assert version["signature"] == "(x: float32 [-1, 2]) -> (y: float32 [-1, 2])"
    counters, latencies = version["counters"], version["latencies"]
    assert (counters["requests"], counters["success"], counters["failure"]) == (100, 100, 0)
    assert (counters["rows"], counters["batches"], counters["pending"]) == (300, {"3": 100}, 0)
    assert latencies["requests"] == 100
    assert 0 < latencies["p50_ms"] <= latencies["p95_ms"] <= latencies["p99_ms"] < 10_000
    assert version["queue"] == {"requests": 0, "bytes": 0, "max_requests": 1024, "max_bytes": 1 << 30}


def test_every_model_is_listed_with_its_path(urls: tuple[str, str]) -> None:
    listed = ask(urls[1], "GET", "/api/models").json["models"]
    assert [(model["name"], model["path"], model["graph"]) for model in listed] == [
        ("double", "/double", False), ("plain", "/plain", False),
    ]  # fmt: skip


def test_a_model_that_there_is_not_is_404_and_those_near_are_named(urls: tuple[str, str]) -> None:
    for path in ("/api/models/dubble", "/api/graph/dubble"):
        reply = ask(urls[1], "GET", path)
        assert reply.status == 404
        assert reply.json["kind"] == "ModelNotFound"
        assert "did you mean" in reply.json["error"]


def test_the_server_tells_of_itself(urls: tuple[str, str]) -> None:
    url, plane = urls
    told = ask(plane, "GET", "/api/server").json
    assert (told["url"], told["control_url"], told["pid"]) == (url, plane, os.getpid())
    assert (told["ready"], told["draining"], told["allows_changes"]) == (True, False, False)
    assert told["memory_rss_bytes"] > 10_000_000
    assert told["uptime_s"] >= 0
    with Endpoint(f"{url}double") as endpoint:
        endpoint(ONES)
        assert ask(plane, "GET", "/api/server").json["connections"] >= 1


def test_resident_memory_is_what_the_system_says() -> None:
    import psutil

    assert resident_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)


def test_devices_are_listed_or_there_are_none() -> None:
    for device in devices():
        assert 0 <= device.used_bytes <= device.total_bytes


def test_the_latest_errors_are_told_without_what_was_sent() -> None:
    def fail(x: Any) -> Any:
        raise ValueError(f"the patient is {x}")

    model = FunctionServable(fail, [X], [Y])
    with controlled({"bad": model, "good": doubling()}) as (url, plane):
        for path in ("bad", "nothing", "nothing-2"):
            with Endpoint(url + path, retry=NO_RETRY, headers={"X-Request-Id": "r-1"}) as endpoint:
                with pytest.raises(RemoteOpsError):
                    endpoint(ONES)
        errors = ask(plane, "GET", "/api/errors").json["errors"]
    assert [error["model"] for error in errors if error["kind"] == "ModelNotFound"] == ["_unknown"] * 2
    (raised,) = [error for error in errors if error["model"] == "bad"]
    assert (raised["kind"], raised["message"]) == ("ValueError", "the model raised ValueError")
    assert raised["request_id"] == "r-1"
    assert abs(raised["at"] - time.time()) < 60


def test_at_most_fifty_errors_are_kept() -> None:
    with controlled({"a": doubling(), "b": doubling()}) as (url, plane):
        for index in range(60):
            assert ask(url, "GET", f"/none-{index}").status == 404
        errors = ask(plane, "GET", "/api/errors").json["errors"]
    assert len(errors) == 50
    assert "/none-59" in errors[0]["message"]


def test_health_says_when_the_data_plane_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_ANSWER_S", 0.2)
    entered, release = threading.Event(), threading.Event()

    class Blocking:
        signature = doubling().signature

        def infer(self, *_: Any, **__: Any) -> Any:
            raise AssertionError

        async def ainfer(self, inputs: Any, *_: Any, **__: Any) -> Any:
            entered.set()
            release.wait(WAIT_S)  # which holds up the loop, as nobody should
            return {"y": inputs["x"]}

    with controlled({"m": Blocking()}) as (url, plane):
        with Endpoint(url, 10, retry=NO_RETRY) as endpoint:
            assert ask(plane, "GET", "/healthz").status == 200
            assert endpoint.signature.inputs
            future = endpoint.submit({"x": ONES})
            assert entered.wait(WAIT_S)
            reply = ask(plane, "GET", "/healthz")
            assert (reply.status, reply.headers["retry-after"]) == (503, "1")
            assert "no answer from the data plane" in reply.json["error"]
            release.set()
            np.testing.assert_array_equal(future.result(WAIT_S)["y"], ONES)
            assert ask(plane, "GET", "/healthz").json == {"done": "ok"}


def test_questions_do_not_hold_up_answers_of_models(urls: tuple[str, str]) -> None:
    url, plane = urls
    over, errors = threading.Event(), []

    def call() -> None:
        with Endpoint(f"{url}double", 10, retry=NO_RETRY) as endpoint:
            while not over.is_set():
                try:
                    np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)
                except BaseException as error:
                    errors.append(error)
                    return

    thread = threading.Thread(target=call)
    thread.start()
    for _ in range(30):
        for path in ("/api/models", "/api/server", "/api/errors"):
            assert ask(plane, "GET", path).status == 200
    over.set()
    thread.join(WAIT_S)
    assert errors == []


# --------------------------------------------------------------------------- graphs

GRAPH = """
ensemble: 1
inputs: {x: {dtype: float32, shape: [N, 2]}}
outputs: {y: mix}
nodes:
  one: {kind: python, call: "control_models:double", inputs: {x: $inputs.x}}
  two: {kind: python, call: "control_models:double", inputs: {x: $inputs.x}}
  mix: {kind: combine, method: mean, inputs: {a: one.y, b: two.y}}
"""
MODELS = """
from remote_ops import FunctionServable, TensorSpec
X, Y = TensorSpec("x", "float32", (-1, 2)), TensorSpec("y", "float32", (-1, 2))
double = FunctionServable(lambda x: 2 * x, [X], [Y])

def double_model():
    return FunctionServable(lambda x: 2 * x, [X], [Y], name="double")
"""


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ensemble.Ensemble]:
    (tmp_path / "control_models.py").write_text(MODELS)
    (tmp_path / "graph.yaml").write_text(GRAPH)
    monkeypatch.syspath_prepend(tmp_path)
    with ensemble.load(tmp_path / "graph.yaml") as loaded:
        yield loaded


def test_a_graph_is_told_with_the_latency_of_each_node(graph: ensemble.Ensemble, document: dict[str, Any]) -> None:
    with controlled({"graph": graph, "double": doubling()}) as (url, plane):
        drawn = ask(plane, "GET", "/api/graph/graph").json
        keys = {node["key"]: node for node in drawn["nodes"]}
        assert {"one", "two", "mix"} < keys.keys()
        assert keys["one"]["median_ms"] is None
        with Endpoint(f"{url}graph") as endpoint:
            np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)
        reply = ask(plane, "GET", "/api/graph/graph")
        jsonschema.validate(reply.json, schema_of(document, "Graph"))
        keys = {node["key"]: node for node in reply.json["nodes"]}
        for node in ("one", "two", "mix"):
            assert keys[node]["calls"] == 1
            assert keys[node]["median_ms"] > 0
        edges = {(edge["source"], edge["target"]) for edge in reply.json["edges"]}
        assert {("one", "mix"), ("two", "mix")} <= edges
        assert all(source in keys and target in keys for source, target in edges)
        listed = ask(plane, "GET", "/api/models").json["models"]
        assert {model["name"]: model["graph"] for model in listed} == {"graph": True, "double": False}
        refused = ask(plane, "GET", "/api/graph/double")
        assert (refused.status, refused.json["error"]) == (400, "model 'double' is no graph of models")


def test_only_some_runs_of_a_graph_are_traced(graph: ensemble.Ensemble) -> None:
    now = 100.0
    noted = Watched(graph, every_s=1.0, clock=lambda: now)
    for _ in range(3):
        np.testing.assert_array_equal(noted.infer({"x": ONES})["y"], 2 * ONES)
    assert {node: latency.calls for node, latency in noted.latencies().items()} == {"one": 1, "two": 1, "mix": 1}
    now = 101.5
    noted.infer({"x": ONES})
    assert noted.latencies()["mix"].calls == 2
    assert noted.signature == graph.signature


def test_only_graphs_are_watched(graph: ensemble.Ensemble) -> None:
    plain = doubling()
    assert watched(plain) is plain
    noted = watched(graph)
    assert isinstance(noted, Watched)
    assert watched(noted) is noted


# --------------------------------------------------------------------------- as the document says


def schema_of(document: Mapping[str, Any], form: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{form}", "components": document["components"]}


def test_the_document_describes_every_route_once_and_holds_together(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(names) == len(set(names)) == 15
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for ref in re.findall(r'"\$ref": "([^"]+)"', json.dumps(document)):
        assert ref.removeprefix("#/components/schemas/") in schemas
    for path, methods in document["paths"].items():
        for operation in methods.values():
            named = [parameter["name"] for parameter in operation.get("parameters", [])]
            assert named == re.findall(r"\{(\w+)\}", path)
            assert {"200", "default"} <= operation["responses"].keys()


@pytest.mark.parametrize("path", ["/api/models", "/api/server", "/api/errors", "/api/log-level", "/healthz"])
def test_every_answer_has_the_form_that_the_document_gives(
    urls: tuple[str, str], document: dict[str, Any], path: str
) -> None:
    reply = ask(urls[1], "GET", path)
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    schema = document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.validate(reply.json, {**schema, "components": document["components"]})


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/models/none", 404), ("GET", "/nothing", 404), ("DELETE", "/api/models", 403),
        ("POST", "/api/drain", 403), ("GET", "/api/drain", 405), ("GET", "/api/", 404),
    ],
)  # fmt: skip
def test_every_error_has_the_form_that_the_document_gives(
    urls: tuple[str, str], document: dict[str, Any], method: str, path: str, status: int
) -> None:
    reply = ask(urls[1], method, path)
    assert reply.status == status
    jsonschema.validate(reply.json, schema_of(document, "Told"))


# --------------------------------------------------------------------------- changed


def test_a_repository_is_asked_on_the_loop_of_the_data_plane_and_what_it_says_is_told() -> None:
    shelf = Shelf()
    with controlled(models={"double": doubling()}, allow_changes=True) as _:
        pass
    plane = ControlPlane("127.0.0.1:0", allow_changes=True, models=shelf)
    with server_ref.running({"double": doubling()}, control=plane):
        new = ask(plane.url, "GET", "/api/models/new").json["versions"][0]
        assert (new["state"], new["reason"], new["since"], new["counters"]) == (
            "unavailable", "not asked for", 12.0, None,
        )  # fmt: skip
        assert ask(plane.url, "POST", "/api/models/new/load").json == {"done": "'new' is loaded"}
        assert ask(plane.url, "GET", "/api/models/new").json["versions"][0]["state"] == "ready"
        assert ask(plane.url, "POST", "/api/models/new/unload", {"version": "1"}).status == 200
        assert shelf.state == "unavailable"
        assert ask(plane.url, "POST", "/api/models/double/scale", {"count": 3, "version": "7"}).status == 200
        assert shelf.scaled == ("double", 3, "7")
        assert ask(plane.url, "PUT", "/api/models/double/labels", {"stable": "7"}).json == {"stable": "7"}
        assert ask(plane.url, "PUT", "/api/models/double/weights", {"7": 0.9, "8": 0.1}).json == {"7": 0.9, "8": 0.1}
        told = ask(plane.url, "GET", "/api/models/double").json
        assert (told["labels"], told["weights"]) == ({"stable": "7"}, {"7": 0.9, "8": 0.1})
        refused = ask(plane.url, "PUT", "/api/models/double/weights", {"7": -1})
        assert (refused.status, refused.json["kind"]) == (400, "SpecError")
        assert ask(plane.url, "POST", "/api/models/none/load").status == 404
    assert shelf.threads == {"server_ref"}


def test_models_that_were_handed_over_are_labelled_and_unloaded_but_not_opened_again() -> None:
    with controlled({"double": doubling(), "other": doubling()}, allow_changes=True) as (url, plane):
        for verb, body in (("load", None), ("scale", {"count": 2})):
            reply = ask(plane, "POST", f"/api/models/double/{verb}", body)
            assert (reply.status, reply.json["kind"]) == (400, "SpecError")
            assert "was handed over open" in reply.json["error"]
        assert ask(plane, "PUT", "/api/models/double/labels", {"stable": "7"}).json == {"stable": "7"}
        np.testing.assert_array_equal(Endpoint(f"{url}double/stable")(ONES), 2 * ONES)
        assert ask(plane, "PUT", "/api/models/double/labels", {"stable": "8"}).status in (400, 404)
        assert ask(plane, "POST", "/api/models/double/unload").status == 200
        assert ask(plane, "GET", "/api/models/double").json["versions"][0]["state"] == "unavailable"
        with Endpoint(f"{url}double", retry=NO_RETRY) as endpoint, pytest.raises(ModelNotFound):
            endpoint(ONES)  # which the other one does not answer, although it is alone now
        np.testing.assert_array_equal(Endpoint(f"{url}other")(ONES), 2 * ONES)
        np.testing.assert_array_equal(Endpoint(f"{url}any")(ONES), 2 * ONES)
        for verb in ("load", "unload"):
            assert ask(plane, "POST", f"/api/models/none/{verb}").status == 404


def test_a_cache_is_told_with_its_counters(tmp_path: Path) -> None:
    onnx_model(tmp_path / "double" / "1" / "model.onnx")
    (tmp_path / "double" / "model.yaml").write_text("cache: {max_mb: 1}\n")
    plane = ControlPlane("127.0.0.1:0")
    with server_ref.running(tmp_path, control=plane) as url, Endpoint(url) as endpoint:
        for _ in range(2):
            np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)
        cache = ask(plane.url, "GET", "/api/models/double").json["versions"][0]["cache"]
        assert (cache["lookups"], cache["answered"], cache["bypassed"]) == (2, 1, 0)


@pytest.mark.parametrize(
    ("listen", "allowed", "tokens", "status"),
    [
        ("127.0.0.1:0", False, False, 403),
        ("127.0.0.1:0", True, False, 200),
        ("127.0.0.1:0", True, True, 200),
        ("0.0.0.0:0", True, False, 403),
        ("0.0.0.0:0", True, True, 200),
    ],
)
def test_s10_clients_of_the_data_plane_unload_models_only_where_the_control_plane_may(
    listen: str, allowed: bool, tokens: bool, status: int
) -> None:
    plane = ControlPlane("127.0.0.1:0", allow_changes=allowed)
    access = Access(admin=[ADMIN]) if tokens else None
    with server_ref.running({"double": doubling()}, listen, access=access, control=plane) as url:
        path = "/v2/repository/models/double/unload"
        if tokens:
            assert ask(url, "POST", path, {}).status == 401
        assert ask(url, "POST", path, {}, bearer(ADMIN)).status == status


def test_a_drain_of_a_server_inside_a_program_is_refused() -> None:
    with controlled(allow_changes=True) as (_, plane):
        drained = ask(plane, "POST", "/api/drain")
        assert (drained.status, drained.json["kind"]) == (400, "InvalidRequest")


def onnx_model(path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))


def test_a_folder_of_models_is_unloaded_loaded_and_scaled(tmp_path: Path) -> None:
    onnx_model(tmp_path / "double" / "1" / "model.onnx")
    plane = ControlPlane("127.0.0.1:0", allow_changes=True)
    with server_ref.running(tmp_path, control=plane) as url:

        def version() -> Any:
            return ask(plane.url, "GET", "/api/models/double").json["versions"][0]

        assert (version()["version"], version()["state"], version()["instances"]) == ("1", "ready", 1)
        assert ask(plane.url, "POST", "/api/models/double/scale", {"count": 2}).status == 200
        assert (version()["instances"], version()["state"]) == (2, "ready")
        assert ask(plane.url, "POST", "/api/models/double/unload").status == 200
        assert (version()["state"], version()["counters"]) == ("unavailable", None)
        assert ask(plane.url, "POST", "/api/models/double/load").status == 200
        np.testing.assert_array_equal(Endpoint(url)(ONES), 2 * ONES)
        assert version()["state"] == "ready"
        (tmp_path / "double" / "1" / "model.onnx").write_bytes(b"no model")
        failed = ask(plane.url, "POST", "/api/models/double/load")
        assert failed.status >= 400
        assert str(tmp_path) not in failed.json["error"]
        assert (version()["state"], "still served" in version()["reason"]) == ("ready", True)
        np.testing.assert_array_equal(Endpoint(url)(ONES), 2 * ONES)


def test_a_model_from_the_web_is_loaded_only_from_where_the_operator_allows_and_by_its_digest(tmp_path: Path) -> None:
    onnx_model(tmp_path / "double" / "1" / "model.onnx")
    wanted = {"url": "https://models.example/far.onnx", "sha256": "0" * 64}
    plane = ControlPlane("127.0.0.1:0", allow_changes=True)
    with server_ref.running(tmp_path, control=plane):
        refused = ask(plane.url, "POST", "/api/models/far/load", wanted)
        assert (refused.status, "--allow-model-url" in refused.json["error"]) == (400, True)
    plane = ControlPlane("127.0.0.1:0", allow_changes=True)
    with server_ref.running(tmp_path, control=plane, model_urls=["https://other.example/"]):
        refused = ask(plane.url, "POST", "/api/models/far/load", wanted)
        assert (refused.status, "not on the list of model URLs" in refused.json["error"]) == (400, True)
        refused = ask(plane.url, "POST", "/api/models/far/load", {"url": wanted["url"]})
        assert (refused.status, "digest" in refused.json["error"]) == (400, True)


@pytest.fixture
def levels() -> Iterator[None]:
    """Log levels are put back."""
    loggers = [logging.getLogger(name) for name in ("server_ref", "remote_ops", "ensemble")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.mark.usefixtures("levels")
def test_the_log_level_is_told_and_changed() -> None:
    with controlled(allow_changes=True) as (_, plane):
        assert ask(plane, "PUT", "/api/log-level", {"level": "DEBUG"}).json == {"level": "DEBUG"}
        assert ask(plane, "GET", "/api/log-level").json == {"level": "DEBUG"}
        assert logging.getLogger("server_ref").isEnabledFor(logging.DEBUG)
        assert ask(plane, "PUT", "/api/log-level", {"level": "LOUD"}).status == 400
        assert logging.getLogger("server_ref").isEnabledFor(logging.DEBUG)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("scale", b"{", "Invalid JSON"),
        ("scale", b"[]", "the body: "),
        ("scale", {}, "count: Field required"),
        ("scale", {"count": -1}, "count: "),
        ("scale", {"count": "hunter2"}, "count: "),
        ("scale", {"count": 1, "hunter2": 1}, "hunter2: "),
        ("load", {"version": 3}, "version: "),
        ("labels", b"[1]", "the body: "),
        ("weights", {"7": "much"}, "7: "),
        ("load", b'"' + b"x" * 70_000 + b'"', "expected a body of at most 65,536 bytes"),
    ],
)
def test_a_body_that_is_not_of_its_form_is_refused_by_place(path: str, body: Any, words: str) -> None:
    with controlled(allow_changes=True) as (_, plane):
        method = "PUT" if path in ("labels", "weights") else "POST"
        reply = ask(plane, method, f"/api/models/double/{path}", body)
        assert reply.status == 400
        assert words in reply.json["error"]
        assert len(reply.body) < 500


# --------------------------------------------------------------------------- who may

# What changes, and what is answered where it may.
CHANGES = (
    ("POST", "/api/models/double/load", None, 400),
    ("POST", "/api/models/double/scale", {"count": 1}, 400),
    ("PUT", "/api/models/double/labels", {}, 200),
    ("PUT", "/api/models/double/weights", {}, 200),
    ("POST", "/api/drain", None, 400),
    ("PUT", "/api/log-level", {"level": "no level"}, 400),
    ("POST", "/api/models/double/unload", None, 200),
)


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("tokens", ["none", "infer", "admin", "both"])
def test_s10_changes_want_the_flag_and_the_admin_token(allowed: bool, tokens: str) -> None:
    access = {
        "none": None,
        "infer": Access([INFER]),
        "admin": Access(admin=[ADMIN]),
        "both": Access([INFER], [ADMIN]),
    }[tokens]
    with controlled(access=access, allow_changes=allowed) as (_, plane):
        for method, path, body, status in CHANGES:
            statuses = [
                ask(plane, method, path, body, headers).status
                for headers in ({}, bearer("nobody-knows-this-one"), bearer(INFER), bearer(ADMIN))
            ]
            reached = status if allowed else 403
            assert (
                statuses
                == {
                    "none": [reached] * 4,
                    "infer": [403] * 4,
                    "admin": [401, 401, 401, reached],
                    "both": [401, 401, 403, reached],
                }[tokens]
            ), path
        assert ask(plane, "GET", "/api/models").status == 200


def other_address() -> str | None:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.connect(("192.0.2.1", 9))
        address: str = sock.getsockname()[0]
        return None if address.startswith("127.") else address
    return None


@pytest.mark.parametrize("access", [None, Access([INFER])], ids=["no token", "an infer token"])
def test_s10_beyond_this_machine_it_wants_an_admin_token_to_begin_with(access: Access | None) -> None:
    before = threads_of_servers()
    plane = ControlPlane("0.0.0.0:0")
    with pytest.raises(SpecError, match=r"0\.0\.0\.0:0 can be reached from other machines.*--admin-token-file"):
        with server_ref.running({"m": doubling()}, access=access, control=plane):
            pass
    assert until(lambda: threads_of_servers() <= before)


def test_s10_beyond_this_machine_reading_wants_a_token_too() -> None:
    plane = ControlPlane("0.0.0.0:0")
    for access, reader in ((Access([INFER], [ADMIN]), INFER), (Access(admin=[ADMIN]), ADMIN)):
        with server_ref.running({"m": doubling()}, access=access, control=plane):
            url = plane.url.replace("127.0.0.1", other_address() or "127.0.0.1")
            for path in ("/api/models", "/api/server", "/api/errors", "/api/log-level", "/metrics"):
                assert ask(url, "GET", path).status == 401
            assert ask(url, "GET", "/api/models", headers=bearer(reader)).status == 200
            assert ask(url, "GET", "/api/models", headers=bearer(ADMIN)).status == 200
            for path in ("/healthz", "/openapi.json"):
                assert ask(url, "GET", path).status == 200


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", {"Host": "evil.example"}, 403),
        ("GET", {"Host": "127.0.0.1.evil.example"}, 403),
        ("GET", {"Host": "localhost.evil.example:80"}, 403),
        ("GET", {"Host": "localhost:1"}, 200),
        ("GET", {"Host": "[::1]:9001"}, 200),
        ("GET", {"Host": "127.0.0.9"}, 200),
        ("POST", {"Origin": "http://evil.example"}, 403),
        ("POST", {"Origin": "null"}, 403),
        ("POST", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("POST", {"Sec-Fetch-Site": "same-origin"}, 400),
        ("POST", {"Host": "localhost:9001", "Origin": "http://localhost:9001"}, 400),
        ("POST", {"Host": "evil.example", "Origin": "http://evil.example"}, 403),
    ],
)
def test_a_page_of_another_site_neither_reads_nor_changes(method: str, headers: dict[str, str], status: int) -> None:
    with controlled(allow_changes=True) as (_, plane):
        path = "/api/models" if method == "GET" else "/api/models/double/load"
        assert ask(plane, method, path, headers=headers).status == status


def test_extra_routes_are_served_and_guarded() -> None:
    async def page(request: Request) -> PlainTextResponse:
        return PlainTextResponse(f"this is {request.url.path}")

    async def broken(request: Request) -> PlainTextResponse:
        raise OSError(2, "No such file", "/srv/secret/page.html")

    routes = [Route("/", page), Route("/metrics", page), Route("/broken", broken)]
    plane = ControlPlane("0.0.0.0:0", extra_routes=routes)
    with server_ref.running({"m": doubling()}, access=Access(admin=[ADMIN]), control=plane):
        assert ask(plane.url, "GET", "/").body == b"this is /"
        assert ask(plane.url, "GET", "/metrics").status == 401
        assert ask(plane.url, "GET", "/metrics", headers=bearer(ADMIN)).body == b"this is /metrics"
        reply = ask(plane.url, "GET", "/broken", headers=bearer(ADMIN))
        assert reply.status == 500
        assert b"secret" not in reply.body


# --------------------------------------------------------------------------- the listener


def test_it_ends_with_the_server_and_gives_its_port_back() -> None:
    before = threads_of_servers()
    for _ in range(2):
        with controlled() as (_, plane):
            assert ask(plane, "GET", "/healthz").status == 200
        with pytest.raises(ConnectionError):
            ask(plane, "GET", "/healthz")
    assert until(lambda: threads_of_servers() <= before)


def test_a_port_that_is_taken_is_named_and_leaves_nothing_behind() -> None:
    before = threads_of_servers()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        plane = ControlPlane(f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(SpecError, match=r"cannot listen on 127\.0\.0\.1:\d+: .*in use.* - at --control"):
            with server_ref.running({"m": doubling()}, control=plane):
                pass
    assert until(lambda: threads_of_servers() <= before)


def test_with_tls_it_speaks_tls_too(tmp_path: Path) -> None:
    ca = trustme.CA()
    ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    trusting = ssl.create_default_context(cadata=ca.cert_pem.bytes().decode())
    plane = ControlPlane("127.0.0.1:0")
    with server_ref.running({"m": doubling()}, tls=Certificates(str(tmp_path / "server.pem")), control=plane):
        assert plane.url.startswith("https://")
        assert ask(plane.url, "GET", "/healthz", tls=trusting).status == 200


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--allow-model-control"], "expected --control HOST:PORT with it"),
        (["--control", "nowhere"], "expected host:port"),
        (["--control", "unix:/tmp/c.sock"], "expected host:port, got 'unix:/tmp/c.sock'"),
        (["--control", "0.0.0.0:0"], "expected an admin token with it; pass --admin-token-file FILE"),
    ],
)
def test_flags_that_do_not_fit_exit_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    (tmp_path / "control_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("REMOTE_OPS_ADMIN_TOKEN", "REMOTE_OPS_INFER_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert main(["-m", "control_models:double_model", "-l", "127.0.0.1:0", *argv]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_of_its_own_is_looked_after_and_drained_by_its_control_plane(tmp_path: Path) -> None:
    (tmp_path / "control_models.py").write_text(MODELS)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GP_", "REMOTE_OPS_"))}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "server_ref", "-m", "control_models:double_model", "-l", "127.0.0.1:0",
         "--control", "127.0.0.1:0", "--allow-model-control", "--drain-grace-s", "0"],
        cwd=tmp_path,
        env={**inherited, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "REMOTE_OPS_ADMIN_TOKEN": ADMIN},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")))  # type: ignore[union-attr]
    reader.start()
    try:
        assert until(lambda: "control plane at" in "".join(lines) or process.poll() is not None, 30)
        said = "".join(lines)
        url, plane = re.search(r" at (http\S+) on ", said), re.search(r"control plane at (http\S+)", said)
        assert url, said
        assert plane, said
        with Endpoint(url[1]) as endpoint:
            np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)
        told = ask(plane[1], "GET", "/api/server").json
        assert (told["pid"], told["allows_changes"]) == (process.pid, True)
        assert ask(plane[1], "GET", "/api/models/double_model").json["versions"][0]["counters"]["requests"] == 1
        assert ask(plane[1], "POST", "/api/drain").status == 401
        assert ask(plane[1], "POST", "/api/drain", headers=bearer(ADMIN)).json == {"done": "draining"}
        assert process.wait(WAIT_S) == 0
        reader.join(WAIT_S)
        assert "draining after shutdown" in "".join(lines)
        assert "Traceback" not in "".join(lines)
    finally:
        process.kill()
        process.wait(WAIT_S)
        reader.join(WAIT_S)
        process.stderr.close()


def test_forms_take_what_they_tell() -> None:
    told: Callable[..., api.ModelView] = api.ModelView
    view = told(name="m", path="/", graph=False, versions=[], labels={}, weights={})
    assert api.ModelView.model_validate_json(view.model_dump_json()) == view
