"""A folder of models behind a server: loaded, warmed, swapped under load, watched, split between versions, drained."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import http.server
import json
import os
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from rawpeer import WAIT_S, until

import server_ref
from remote_ops import Endpoint, FunctionServable, Retry, TensorSpec
from remote_ops.connection import new_loop
from remote_ops.errors import ModelNotFound, ModelUnavailable, RemoteOpsError, SpecError
from remote_ops.servable import Servable
from server_ref.lifecycle import Server
from server_ref.repository import Entry, Repository
from server_ref.sources import Sources

ONE = np.ones((1, 2), np.float32)
NO_RETRY = Retry(attempts=1)


def write_model(path: Path, factor: float) -> None:
    """An ONNX file that multiplies `x` by a number; it comes by a rename, whole."""
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 2])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 2])
    weight = onnx.numpy_helper.from_array(np.array([factor], np.float32), "w")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Mul", ["x", "w"], ["y"])], "g", [x, y][:1], [y], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    onnx.save(model, beside)
    os.replace(beside, path)


def factor_at(url: str) -> float:
    with Endpoint(url, retry=NO_RETRY) as endpoint:
        return float(endpoint(ONE)[0, 0])


class Running:
    """A server of a folder on a loop of its own, whose repository the test may speak to."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.loop = new_loop()
        self.server = Server(folder, **options)
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(WAIT_S)

    def call(self, function: Any, *args: Any) -> Any:
        async def do() -> Any:
            return function(*args)

        return self.do(do())

    @property
    def repository(self) -> Repository:
        return self.server.repository

    def states(self) -> dict[tuple[str, str], str]:
        return {(entry.name, entry.version): entry.state for entry in self.call(self.repository.index)}

    def url(self, path: str = "") -> str:
        return self.server.url + path

    def close(self) -> None:
        async def end() -> None:
            self.server.close()
            await self.repository.close()
            await asyncio.sleep(0)

        self.do(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        assert until(lambda: not self.loop.is_running())
        self.loop.close()


@contextlib.contextmanager
def running(folder: Path, **options: Any) -> Iterator[Running]:
    it = Running(folder, **options)
    try:
        it.do(it.server.start())
        it.do(it.server.load())
        yield it
    finally:
        it.close()


@contextlib.contextmanager
def load_on(url: str, clients: int = 4) -> Iterator[list[BaseException]]:
    """Clients that call in a loop while the block runs, and what they failed with."""
    failures: list[BaseException] = []
    over = threading.Event()

    def call() -> None:
        with Endpoint(url, retry=NO_RETRY) as endpoint:
            while not over.is_set():
                try:
                    endpoint(ONE)
                except Exception as error:
                    failures.append(error)

    with ThreadPoolExecutor(clients) as pool:
        done = [pool.submit(call) for _ in range(clients)]
        try:
            yield failures
        finally:
            over.set()
    for one in done:
        one.result()


# --------------------------------------------------------------------------- a folder is served


def test_a_folder_of_files_is_served_by_name(tmp_path: Path) -> None:
    write_model(tmp_path / "double.onnx", 2)
    write_model(tmp_path / "triple" / "model.onnx", 3)
    with server_ref.running(tmp_path) as url:
        assert factor_at(f"{url}double") == 2
        assert factor_at(f"{url}triple") == 3
        assert factor_at(f"{url}triple/1") == 3
        with pytest.raises(ModelNotFound, match="there are "):
            factor_at(f"{url}tripel")


def test_the_newest_version_answers_and_others_by_number_or_label(tmp_path: Path) -> None:
    for version in (1, 2, 10):
        write_model(tmp_path / "m" / str(version) / "model.onnx", version)
    (tmp_path / "m" / "model.yaml").write_text("versions: {policy: all, labels: {stable: 2}}\n")
    with server_ref.running(tmp_path) as url:
        assert factor_at(url) == 10
        assert [factor_at(f"{url}m/{version}") for version in (1, 2, 10)] == [1, 2, 10]
        assert factor_at(f"{url}m/stable") == 2


def test_the_latest_policy_loads_the_newest_and_those_with_a_label(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        write_model(tmp_path / "m" / str(version) / "model.onnx", version)
    (tmp_path / "m" / "model.yaml").write_text("versions: {labels: {stable: 1}}\n")
    with running(tmp_path) as it:
        assert it.states() == {("m", "1"): "ready", ("m", "2"): "unavailable", ("m", "3"): "ready"}
        with pytest.raises(ModelUnavailable, match="version '2' of model 'm', which is not ready"):
            factor_at(it.url("m/2"))


def test_a_graph_in_the_folder_is_a_model(tmp_path: Path) -> None:
    write_model(tmp_path / "double.onnx", 2)
    (tmp_path / "twice.yaml").write_text(
        "ensemble: 1\nname: twice\ninputs: {x: {dtype: float32, shape: [N, 2]}}\n"
        "nodes:\n  first: {kind: onnx, path: double.onnx, inputs: {x: $inputs.x}}\n"
        "outputs: {y: first.y}\n"
    )
    with server_ref.running(tmp_path) as url:
        assert factor_at(f"{url}twice") == 2


def test_every_model_that_cannot_be_opened_is_named_at_once(tmp_path: Path) -> None:
    write_model(tmp_path / "good.onnx", 2)
    for name in ("bad", "worse"):
        (tmp_path / f"{name}.onnx").write_bytes(b"no model")
    with pytest.raises(SpecError) as caught, server_ref.running(tmp_path):
        pass
    assert "model 'bad'" in str(caught.value)
    assert "model 'worse'" in str(caught.value)


def test_settings_that_name_a_version_that_is_not_there_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "m" / "1" / "model.onnx", 1)
    (tmp_path / "m" / "model.yaml").write_text("versions: {labels: {stable: 7}}\n")
    with pytest.raises(SpecError, match="name version 7: there are 1"), server_ref.running(tmp_path):
        pass


def test_weights_split_the_requests_and_a_sticky_header_keeps_a_caller(tmp_path: Path) -> None:
    for version in (1, 2):
        write_model(tmp_path / "m" / str(version) / "model.onnx", version)
    (tmp_path / "m" / "model.yaml").write_text('versions: {policy: all, weights: {"1": 50, "2": 50}, sticky: X-User}\n')
    with server_ref.running(tmp_path) as url:
        seen: dict[str, set[float]] = {}
        for user in range(24):
            with Endpoint(url, headers={"X-User": str(user)}) as endpoint:
                seen[str(user)] = {float(endpoint(ONE)[0, 0]) for _ in range(4)}
        assert all(len(factors) == 1 for factors in seen.values())
        assert {factor for factors in seen.values() for factor in factors} == {1.0, 2.0}


def test_a_mirror_gets_a_copy_of_each_request_and_its_failures_hurt_nobody(tmp_path: Path) -> None:
    for version in (1, 2):
        write_model(tmp_path / "m" / str(version) / "model.onnx", version)
    (tmp_path / "m" / "model.yaml").write_text('versions: {policy: all, weights: {"1": 1}, mirror: 2}\n')
    with running(tmp_path) as it:
        assert [factor_at(it.url()) for _ in range(5)] == [1.0] * 5
        versions = it.server.front.catalog.models["m"].versions
        assert until(lambda: versions["2"].stats.snapshot().success.times == 5)
        assert versions["1"].stats.snapshot().requests == 5


# --------------------------------------------------------------------------- ready and warm


def test_r9_a_server_is_not_ready_before_its_models_are_warm(tmp_path: Path) -> None:
    write_model(tmp_path / "m" / "model.onnx", 2)
    (tmp_path / "m" / "model.yaml").write_text("warmup: {rows: [1, 8]}\n")
    ready_then: list[bool] = []
    steps: list[tuple[str, str, int, int]] = []

    def told(entry: Entry, step: str, done: int, of: int) -> None:
        steps.append((entry.name, step, done, of))
        ready_then.append(it.server.front.ready)

    it = Running(tmp_path, told=told)
    try:
        it.do(it.server.start())
        it.call(it.repository.declare, it.server._sources)
        with pytest.raises(ModelUnavailable, match="not ready"):
            factor_at(it.url("m"))
        it.do(it.server.load())
        assert it.server.front.ready
        assert steps == [("m", "load", 0, 1), ("m", "load", 1, 1), *[("m", "warm", done, 2) for done in range(3)]]
        assert ready_then == [False] * 5
        assert it.repository.entry("m").load_s > 0
    finally:
        it.close()


def test_a_model_that_fails_while_it_is_warmed_is_not_served(tmp_path: Path) -> None:
    write_model(tmp_path / "m" / "model.onnx", 2)
    (tmp_path / "m" / "model.yaml").write_text("warmup: {inputs: {z: zeros}}\n")
    with pytest.raises(SpecError, match="no input is called 'z': expected some of x"), server_ref.running(tmp_path):
        pass


# --------------------------------------------------------------------------- changes


def test_r8_twenty_good_reloads_and_a_corrupt_one_under_load_fail_no_request(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    write_model(path, 1)
    with running(tmp_path) as it, load_on(it.url()) as failures:
        for factor in range(2, 22):
            write_model(path, factor)
            it.do(it.repository.load("m"))
            assert factor_at(it.url()) == factor
        path.write_bytes(b"corrupt")
        with pytest.raises(RemoteOpsError):
            it.do(it.repository.load("m"))
        assert factor_at(it.url()) == 21
        entry = it.call(it.repository.entry, "m")
        assert entry.state == "ready"
        assert "the one before it is still served" in entry.reason
    assert failures == []


def test_r8_a_folder_that_is_watched_is_followed(tmp_path: Path) -> None:
    write_model(tmp_path / "m" / "1" / "model.onnx", 1)
    with running(tmp_path, watch_s=0.05) as it, load_on(it.url("m")) as failures:
        write_model(tmp_path / "m" / "2" / "model.onnx", 2)
        assert until(lambda: factor_at(it.url("m")) == 2)
        assert until(lambda: it.states()["m", "1"] == "unavailable")
        write_model(tmp_path / "n.onnx", 5)
        assert until(lambda: it.states().get(("n", "1")) == "ready")
        assert factor_at(it.url("n")) == 5
        (tmp_path / "n.onnx").unlink()
        assert until(lambda: ("n", "1") not in it.states())
        shutil.rmtree(tmp_path / "m" / "2")
        assert until(lambda: factor_at(it.url("m")) == 1)
    assert failures == []


def test_a_graph_is_opened_anew_when_a_model_that_it_names_has_changed(tmp_path: Path) -> None:
    write_model(tmp_path / "double.onnx", 2)
    (tmp_path / "also.yaml").write_text(
        "ensemble: 1\nname: also\ninputs: {x: {dtype: float32, shape: [N, 2]}}\n"
        "nodes:\n  first: {kind: onnx, path: double.onnx, inputs: {x: $inputs.x}}\n"
        "outputs: {y: first.y}\n"
    )
    with running(tmp_path, watch_s=0.05) as it:
        assert [(entry.name, factor_at(it.url(entry.name))) for entry in it.call(it.repository.index)] == [
            ("also", 2.0),
            ("double", 2.0),
        ]
        write_model(tmp_path / "double.onnx", 7)
        assert until(lambda: factor_at(it.url("double")) == 7)
        assert until(lambda: factor_at(it.url("also")) == 7)


@pytest.mark.slow
def test_a_folder_of_onnx_torch_and_tensorflow_models_and_a_graph_is_served(tmp_path: Path) -> None:
    tensorflow = pytest.importorskip("tensorflow", reason="to run this: pip install tensorflow-cpu")
    torch = pytest.importorskip("torch", reason="to run this: pip install torch")
    write_model(tmp_path / "two.onnx", 2)

    class Three(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return 3 * x

    rows = torch.export.Dim("rows")
    program = torch.export.export(Three(), (torch.ones(2, 2),), dynamic_shapes={"x": {0: rows}})
    (tmp_path / "three").mkdir()
    torch.export.save(program, tmp_path / "three" / "net.pt2")

    class Five(tensorflow.Module):  # type: ignore[misc, name-defined]
        @tensorflow.function(input_signature=[tensorflow.TensorSpec([None, 2], tensorflow.float32, name="x")])  # type: ignore[untyped-decorator]
        def __call__(self, x: Any) -> Any:
            return {"y": 5 * x}

    five = Five()
    signatures = {"serving_default": five.__call__.get_concrete_function()}
    tensorflow.saved_model.save(five, str(tmp_path / "five" / "1"), signatures=signatures)
    (tmp_path / "mean.yaml").write_text(
        "ensemble: 1\nname: mean\ninputs: {x: {dtype: float32, shape: [N, 2]}}\n"
        "nodes:\n"
        "  a: {kind: onnx, path: two.onnx, inputs: {x: $inputs.x}}\n"
        "  b: {kind: tf, path: five/1, inputs: {x: $inputs.x}}\n"
        "  mean: {kind: combine, method: mean, inputs: {a: a.y, b: b.y}}\n"
        "outputs: {y: mean}\n"
    )
    with server_ref.running(tmp_path) as url:
        assert {name: factor_at(f"{url}{name}") for name in ("two", "three", "five", "mean")} == {
            "two": 2.0,
            "three": 3.0,
            "five": 5.0,
            "mean": 3.5,
        }


def test_r8_a_file_that_is_still_being_copied_is_not_loaded(tmp_path: Path) -> None:
    write_model(tmp_path / "m.onnx", 1)
    whole = tmp_path.parent / f"{tmp_path.name}-whole.onnx"
    write_model(whole, 2)
    data = whole.read_bytes()
    with running(tmp_path, watch_s=0.05) as it:
        with (tmp_path / "m.onnx").open("r+b") as file:
            for end in range(1, 12):  # each look finds another time of change
                file.seek(0)
                file.write(data[: len(data) * end // 12])
                file.flush()
                threading.Event().wait(0.03)
        entry = it.call(it.repository.entry, "m")
        assert (entry.state, entry.reason) == ("ready", "")
        assert factor_at(it.url()) == 1


def test_an_unloaded_model_is_not_ready_and_one_that_is_loaded_again_answers(tmp_path: Path) -> None:
    write_model(tmp_path / "m.onnx", 2)
    write_model(tmp_path / "n.onnx", 3)
    with running(tmp_path) as it:
        it.do(it.repository.unload("m"))
        assert it.states() == {("m", "1"): "unavailable", ("n", "1"): "ready"}
        with pytest.raises(ModelUnavailable, match="model 'm' is not ready"):
            factor_at(it.url("m"))
        it.do(it.repository.load("m"))
        assert factor_at(it.url("m")) == 2
        with pytest.raises(ModelNotFound, match="no model 'mm'"):
            it.do(it.repository.load("mm"))


def test_scaling_changes_how_many_run_at_a_time(tmp_path: Path) -> None:
    write_model(tmp_path / "m.onnx", 2)
    with running(tmp_path) as it:
        before = it.server.front.catalog.models["m"].versions["1"].instances.lanes.concurrency
        it.do(it.repository.scale("m", 3))
        assert it.server.front.catalog.models["m"].versions["1"].instances.lanes.concurrency == 3 * before
        assert factor_at(it.url()) == 2
        with pytest.raises(SpecError, match="1 to 64"):
            it.do(it.repository.scale("m", 0))


def test_labels_and_weights_can_be_moved_while_it_serves(tmp_path: Path) -> None:
    for version in (1, 2):
        write_model(tmp_path / "m" / str(version) / "model.onnx", version)
    (tmp_path / "m" / "model.yaml").write_text("versions: {policy: all, labels: {stable: 1}}\n")
    with running(tmp_path) as it:
        it.call(it.repository.set_labels, "m", {"stable": "2"})
        it.call(it.repository.set_weights, "m", {"1": 1.0})
        assert factor_at(it.url("m/stable")) == 2
        assert factor_at(it.url("m")) == 1
        assert it.call(it.repository.labels, "m") == {"stable": "2"}
        with pytest.raises(ModelNotFound):
            it.call(it.repository.set_labels, "m", {"stable": "3"})
        assert it.call(it.repository.labels, "m") == {"stable": "2"}


def test_the_old_version_finishes_what_it_has_begun_before_it_goes(tmp_path: Path) -> None:
    write_model(tmp_path / "m.onnx", 1)
    started, release = threading.Event(), threading.Event()

    class Slow(FunctionServable):
        concurrency = 1

    def run(x: Any) -> Any:
        started.set()
        release.wait(WAIT_S)
        return 7 * x

    spec = TensorSpec("x", "float32", (-1, 2)), TensorSpec("y", "float32", (-1, 2))
    slow = Slow(run, [spec[0]], [spec[1]])
    models: list[Sequence[Servable]] = [[slow]]

    def opened(source: Any, progress: Any) -> Any:
        from server_ref.model import Version
        from server_ref.opening import open_version

        return Version(source.name, models.pop(), version="1") if models else open_version(source, progress)

    it = Running(tmp_path)
    it.server.repository._opened = opened
    try:
        it.do(it.server.start())
        it.do(it.server.load())
        with Endpoint(it.url(), retry=NO_RETRY) as endpoint:
            held = endpoint.submit({"x": ONE})
            assert started.wait(WAIT_S)
            it.do(it.repository.load("m"))
            assert factor_at(it.url()) == 1
            release.set()
            assert float(held.result(WAIT_S)["y"][0, 0]) == 7
    finally:
        release.set()
        it.close()


def test_r1_a_graph_in_flight_that_calls_a_model_of_the_same_server_ends_before_the_server_does(tmp_path: Path) -> None:
    gate = threading.Event()
    began = threading.Event()
    spec = TensorSpec("x", "float32", (-1, 2)), TensorSpec("y", "float32", (-1, 2))
    inner = FunctionServable(lambda x: 2 * x, [spec[0]], [spec[1]])

    class Outer:
        """Calls the other model of its server only once it is let."""

        signature = inner.signature
        url = ""

        def infer(self, *args: Any, **options: Any) -> Any:
            raise AssertionError("it is awaited")

        async def ainfer(self, inputs: Any, outputs: Any = None, *, config: bytes = b"", deadline: Any = None) -> Any:
            began.set()
            while not gate.is_set():
                await asyncio.sleep(0.005)
            with Endpoint(f"{self.url}inner", retry=NO_RETRY) as endpoint:
                return await endpoint.ainfer(inputs, deadline=deadline)

    outer = Outer()
    loop = new_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = Server({"inner": inner, "outer": outer})
    asyncio.run_coroutine_threadsafe(server.start(), loop).result(WAIT_S)
    outer.url = server.url
    with Endpoint(f"{server.url}outer", retry=NO_RETRY) as endpoint:
        held = endpoint.submit({"x": ONE})
        assert began.wait(WAIT_S)
        drained = asyncio.run_coroutine_threadsafe(server.drain(grace_s=0, exit_timeout_s=WAIT_S), loop)
        with Endpoint(f"{server.url}outer", retry=NO_RETRY) as late:
            assert until(lambda: not server.front.ready)
            with pytest.raises(RemoteOpsError, match=r"takes no more requests|cannot connect"):
                until(lambda: late(ONE) is None, 1.0)
        gate.set()
        assert float(held.result(WAIT_S)["y"][0, 0]) == 2
    assert drained.result(WAIT_S)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(WAIT_S)
    loop.close()


def test_a_model_that_was_handed_over_open_is_open_when_the_server_has_ended() -> None:
    class Closable(FunctionServable):
        closed = False

        def close(self) -> None:
            self.closed = True

    x, y = TensorSpec("x", "float32", (-1, 2)), TensorSpec("y", "float32", (-1, 2))
    double = Closable(lambda x: 2 * x, [x], [y])
    with server_ref.running({"double": double}) as url:
        assert factor_at(url) == 2
    assert not double.closed


def test_a_model_that_was_handed_over_open_is_listed_and_cannot_be_opened_again() -> None:
    x, y = TensorSpec("x", "float32", (-1, 2)), TensorSpec("y", "float32", (-1, 2))
    server = Server({"double": FunctionServable(lambda x: 2 * x, [x], [y], version="3")})
    assert [(entry.name, entry.version, entry.state) for entry in server.repository.index()] == [
        ("double", "3", "ready")
    ]
    with pytest.raises(SpecError, match="handed over open"):
        asyncio.run(server.repository.load("double"))


@pytest.mark.slow
def test_a_model_that_is_isolated_batched_and_cached_by_its_settings_answers(tmp_path: Path) -> None:
    write_model(tmp_path / "m" / "model.onnx", 2)
    (tmp_path / "m" / "model.yaml").write_text(
        "isolate: process\ninstances: {count: 2}\nbatching: {max_rows: 8}\ncache: {max_mb: 1}\nwarmup: {rows: [8]}\n"
    )
    with running(tmp_path) as it:
        assert [factor_at(it.url()) for _ in range(3)] == [2.0] * 3
        version = it.server.front.catalog.models["m"].versions["1"]
        assert version.stats.snapshot().executions == 1  # the others were known
        assert len(version.instances.servables) == 2


# --------------------------------------------------------------------------- changes by clients


def ask(url: str, path: str, body: Any = None) -> tuple[int, Any]:
    """The status and the JSON of a POST."""
    data = json.dumps(body or {}).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}{path}", data), timeout=WAIT_S) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_clients_of_the_open_inference_protocol_load_and_unload_where_that_is_allowed(tmp_path: Path) -> None:
    write_model(tmp_path / "m.onnx", 2)
    write_model(tmp_path / "n.onnx", 3)
    with running(tmp_path) as closed:
        assert ask(closed.url(), "v2/repository/models/m/unload")[0] == 403
    with running(tmp_path, allow_changes=True) as it:
        assert ask(it.url(), "v2/repository/models/m/unload")[0] == 200
        listed = {row["name"]: row["state"] for row in ask(it.url(), "v2/repository/index")[1]}
        assert listed == {"m": "UNAVAILABLE", "n": "READY"}
        assert ask(it.url(), "v2/repository/models/m/load")[0] == 200
        assert factor_at(it.url("m")) == 2
        status, told = ask(it.url(), "v2/repository/models/mm/load")
        assert (status, "no model 'mm'" in told["error"]) == (404, True)


def test_a_model_from_the_web_is_loaded_by_its_digest_from_where_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMOTE_OPS_CACHE", str(tmp_path / "kept"))
    write_model(tmp_path / "models" / "m.onnx", 2)
    write_model(tmp_path / "web" / "far.onnx", 5)
    sha256 = hashlib.sha256((tmp_path / "web" / "far.onnx").read_bytes()).hexdigest()
    shown = functools.partial(Quiet, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), shown) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{web.server_port}/"
        with running(tmp_path / "models") as it:
            with pytest.raises(SpecError, match="model URLs are refused here: expected --allow-model-url"):
                it.do(it.repository.fetch("far", f"{base}far.onnx", sha256))
        with running(tmp_path / "models", model_urls=[base]) as it:
            with pytest.raises(SpecError, match="private, local or reserved"):
                it.do(it.repository.fetch("far", f"{base}far.onnx", sha256))
            it.repository._fetched = Sources([base], allow_private=True).fetch
            with pytest.raises(SpecError, match="expected 64 hex digits"):
                it.do(it.repository.fetch("far", f"{base}far.onnx", ""))
            it.do(it.repository.fetch("far", f"{base}far.onnx", sha256))
            assert factor_at(it.url("far")) == 5
        web.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass
