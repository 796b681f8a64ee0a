"""What Prometheus is told of a server: numbers that add up, names that are documented, and labels that stay few."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import uvicorn
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as families
from rawpeer import WAIT_S, until
from starlette.applications import Starlette
from test_front import Raw, ask, request
from test_server_journal import observed

import remote_ops
import server_ref
from remote_ops import Endpoint, FunctionServable, Retry, TensorSpec
from remote_ops.errors import RemoteOpsError, SpecError
from server_ref.__main__ import main
from server_ref.batching import Batching
from server_ref.cache import Cached
from server_ref.devices import Device
from server_ref.lanes import QueueLimits
from server_ref.lifecycle import Server
from server_ref.metrics import Metrics, _of_devices, metrics_routes
from server_ref.model import Version
from server_ref.plane import ControlPlane
from server_ref.rowstore import MemoryRows

Array = npt.NDArray[Any]
X, Y = TensorSpec("x", "float32", (-1, 2)), TensorSpec("y", "float32", (-1, 2))
NO_RETRY = Retry(attempts=1)
PAGE = Path(__file__).parents[1] / "docs" / "server-metrics.md"
Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def rows(count: int, value: float = 1.0) -> Array:
    return np.full((count, 2), value, np.float32)


def doubling(**options: Any) -> FunctionServable:
    return FunctionServable(lambda x: 2 * x, [X], [Y], **options)


@contextlib.contextmanager
def mounted(server: Server, compat: Sequence[str] = ()) -> Iterator[str]:
    """The URL of its metrics, on a listener of their own."""
    app = Starlette(routes=metrics_routes(server, compat))
    listener = socket.create_server(("127.0.0.1", 0))
    runner = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
    thread = threading.Thread(target=runner.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/metrics"
    finally:
        runner.should_exit = True
        thread.join(WAIT_S)


def scraped(server: Server, *compat: str) -> list[Metric]:
    return list(families(Metrics(server, compat).render()[0].decode()))


def samples(found: Sequence[Metric]) -> Samples:
    return {(one.name, frozenset(one.labels.items())): one.value for family in found for one in family.samples}


def value(found: Samples, metric: str, **labels: str) -> float:
    return found[metric, frozenset(labels.items())]


def of_model(found: Samples, metric: str, **labels: str) -> float:
    return value(found, metric, model="m", version="3", **labels)


def of_triton(found: Samples, metric: str, **labels: str) -> float:
    """The library's parser gives every counter the ending that those of today have."""
    return of_model(found, f"{metric}_total", **labels)


# --------------------------------------------------------------------------- R20


class Fickle:
    """A model that doubles, fails where it is given -1, and waits to be released where it is given -2."""

    def __init__(self) -> None:
        self.held, self.release = threading.Event(), threading.Event()

    def __call__(self, x: Array) -> Array:
        if (x == -2).any():
            self.held.set()
            self.release.wait(WAIT_S)
        if (x == -1).any():
            raise ValueError("no")
        return 2 * x


class OneAtATime(FunctionServable):
    concurrency = 1


@pytest.mark.parametrize("max_rows", [0, 8])
def test_r20_numbers_add_up_after_successes_rejections_cancels_timeouts_and_errors(max_rows: int) -> None:
    model = Fickle()
    limits = QueueLimits(max_requests=4)
    version = Version(
        "m", [OneAtATime(model, [X], [Y])], version="3", batching=Batching(max_rows=max_rows), limits=limits
    )
    with observed({"m": version}) as server, mounted(server, ["triton", "torchserve"]) as url:
        endpoint = Endpoint(server.url, retry=NO_RETRY)
        for count in (1, 3, 1, 4, 1):
            endpoint(rows(count))
        for _ in range(2):
            with pytest.raises(RemoteOpsError, match="ValueError"):
                endpoint(rows(1, -1))
        with Raw(server.url) as raw:
            assert raw.post(request(arrays=[np.ones((3, 5), np.float32)])).read().status == 400
        holding = Raw(server.url).post(request(arrays=[rows(1, -2)]))
        assert model.held.wait(WAIT_S)
        waiting = Raw(server.url).post(request(arrays=[rows(2)]))
        late = Raw(server.url).post(request(arrays=[rows(1)]), "/", "X-Request-Timeout-Ms: 1")
        assert late.read().status == 504
        leaving = [Raw(server.url).post(request(arrays=[rows(1)])) for _ in range(2)]
        filling = [Raw(server.url).post(request(arrays=[rows(1)]))]
        lanes = version.instances.lanes
        assert until(lambda: lanes.waiting == 4)
        seen = samples(list(families(_get(url))))
        assert of_model(seen, "remote_ops_running_requests") == 1
        assert of_model(seen, "remote_ops_queue_requests") == 4
        assert of_model(seen, "remote_ops_queue_bytes") == 5 * 8
        assert of_model(seen, "remote_ops_pending_requests") == 5
        for _ in range(2):
            with Raw(server.url) as raw:
                assert raw.post(request(arrays=[rows(1)])).read().status == 429
        for raw in leaving:
            raw.close()
        assert until(lambda: lanes.waiting == 2)
        model.release.set()
        assert [raw.read().status for raw in (holding, waiting, *filling)] == [200, 200, 200]
        for raw in (holding, waiting, late, *filling):
            raw.close()
        assert until(lambda: version.pending == 0)
        found = samples(list(families(_get(url))))

    success = of_model(found, "remote_ops_requests_total", outcome="success")
    failure = of_model(found, "remote_ops_requests_total", outcome="failure")
    reasons = {
        why: of_model(found, "remote_ops_failures_total", reason=why) for why in version.stats.snapshot().failures
    }
    assert (success, failure) == (8, 8)
    assert reasons == {"rejected": 2, "canceled": 2, "timeout": 1, "invalid": 1, "model": 2}
    assert of_model(found, "remote_ops_request_bytes_count") == success + failure
    assert of_model(found, "remote_ops_request_seconds_count") == success
    for gauge in ("pending_requests", "queue_requests", "queue_bytes", "running_requests"):
        assert of_model(found, f"remote_ops_{gauge}") == 0
    assert of_model(found, "remote_ops_batch_rows_sum") == of_model(found, "remote_ops_rows_total")
    assert of_model(found, "remote_ops_batch_rows_count") == of_model(found, "remote_ops_executions_total")
    assert of_model(found, "remote_ops_rows_total") == 10 + 2 + 1 + 2 + 1
    for histogram in ("request_seconds", "queue_seconds", "compute_seconds", "batch_rows", "request_bytes"):
        most = of_model(found, f"remote_ops_{histogram}_bucket", le="+Inf")
        assert most == of_model(found, f"remote_ops_{histogram}_count")
    answered = {one: value(found, "remote_ops_answers_total", status=one) for one in ("2xx", "4xx", "5xx")}
    assert (answered["4xx"], answered["5xx"]) == (1 + 2, 2 + 1)
    assert of_triton(found, "nv_inference_request_success") == success
    why = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
    assert [of_triton(found, "nv_inference_request_failure", reason=one) for one in why] == [3, 2, 2, 1]
    assert of_model(found, "nv_inference_pending_request_count") == 0
    average = of_triton(found, "nv_inference_count") / of_triton(found, "nv_inference_exec_count")
    assert average == of_model(found, "remote_ops_batch_rows_sum") / of_model(found, "remote_ops_batch_rows_count")
    total = {name: number for (name, _), number in found.items()}
    assert total["ts_inference_requests_total"] == success + failure
    assert [total[f"Requests{hundreds}XX_total"] for hundreds in (2, 4, 5)] == [answered["2xx"], 3, 3]


def _get(url: str, accept: str = "") -> str:
    asked = urllib.request.Request(url, headers={"Accept": accept} if accept else {})
    with urllib.request.urlopen(asked, timeout=WAIT_S) as answer:
        text: str = answer.read().decode()
    return text


# --------------------------------------------------------------------------- names and labels


def test_s14_requests_for_models_that_are_not_there_have_one_label() -> None:
    with observed({"m": doubling(version="3"), "n": doubling()}) as server:
        before = samples(scraped(server, "triton", "torchserve"))
        with Raw(server.url) as raw:
            for number in range(300):
                assert raw.post(path=f"/made-up-{number}").read().status == 404
            assert raw.post(path="/m/17").read().status == 404
        after = samples(scraped(server, "triton", "torchserve"))
    assert before.keys() == after.keys()
    assert value(after, "remote_ops_requests_total", model="_unknown", version="", outcome="failure") == 301
    assert of_model(after, "remote_ops_requests_total", outcome="failure") == 0


def test_names_units_and_types_are_those_that_a_linter_of_prometheus_wants() -> None:
    with observed({"m": doubling()}) as server:
        found = [one for one in scraped(server) if one.name.startswith("remote_ops_")]
        text = Metrics(server).render("application/openmetrics-text; version=1.0.0")[0].decode()
    assert len({one.name for one in found}) == len(found)
    for one in found:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", one.name)
        assert one.documentation.endswith(".")
        assert one.type in ("counter", "gauge", "histogram")
        assert not re.search(r"_(ms|us|milliseconds|microseconds|kb|mb)(_|$)", one.name)
        if one.type == "gauge":
            assert not one.name.endswith(("_total", "_count", "_sum", "_bucket"))
        for sample in one.samples:
            assert sample.name.endswith("_total") == (one.type == "counter")
            assert not any(label.startswith("__") for label in sample.labels)
    assert {one.name for one in openmetrics(text)} >= {one.name for one in found}


def test_the_page_lists_every_metric_with_its_type_and_labels_and_no_other() -> None:
    cached = Cached(doubling(), MemoryRows())
    with observed({"m": cached}) as server:
        Endpoint(server.url)(rows(1))
        found = [one for one in scraped(server, "triton", "torchserve") if not one.name.startswith("process_")]
    told = re.findall(r"^\| `(\w+)` \| (\w+) \|([^|]*)\|", PAGE.read_text("utf-8"), re.MULTILINE)
    stated = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in told}
    for one in found:
        exact = not one.name.startswith("remote_ops_") and one.name != "ts_inference_requests"
        name = one.name if exact or one.type != "counter" else f"{one.name}_total"
        kind, labels = stated.pop(name)
        assert kind == one.type, name
        if one.samples:
            assert labels == set(one.samples[0].labels) - {"le"}, name
    assert not stated


def test_a_text_of_prometheus_is_given_unless_openmetrics_is_asked_for() -> None:
    with observed({"m": doubling()}) as server, mounted(server) as url:
        assert list(families(_get(url)))
        text = _get(url, "application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
        assert text.endswith("# EOF\n")
        assert list(openmetrics(text))
        assert list(families(_get(url, "text/html, nonsense;;=,")))


def test_the_names_of_triton_are_exact_and_of_the_type_that_it_gives_them() -> None:
    with observed({"m": Cached(doubling(), MemoryRows())}) as server:
        for _ in range(2):
            Endpoint(server.url)(rows(1))
        text = Metrics(server, ["triton"]).render()[0].decode()
    assert "# TYPE nv_inference_request_success counter\n" in text
    assert "# TYPE nv_inference_pending_request_count gauge\n" in text
    assert 'nv_inference_request_success{model="m",version="1"} 2.0\n' in text
    assert 'nv_cache_num_hits_per_model{model="m",version="1"} 1.0\n' in text
    assert 'nv_cache_num_misses_per_model{model="m",version="1"} 1.0\n' in text
    assert "\nts_" not in text


def test_the_control_plane_tells_them_under_the_names_that_it_is_asked_for() -> None:
    plane = ControlPlane("127.0.0.1:0", metrics_compat=["triton"])
    with server_ref.running({"m": doubling(version="3")}, control=plane) as url:
        Endpoint(url)(rows(2))
        found = samples(list(families(_get(f"{plane.url}metrics"))))
    assert of_model(found, "remote_ops_rows_total") == of_triton(found, "nv_inference_count") == 2
    assert of_model(found, "remote_ops_model_ready") == 1


def test_the_names_of_others_are_nowhere_without_a_control_plane(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "m.onnx", "--metrics-compat", "triton"]) == 2
    assert "expected --control HOST:PORT with it - at --metrics-compat" in capsys.readouterr().err


def test_unknown_names_of_other_servers_are_refused() -> None:
    with observed({"m": doubling()}) as server, pytest.raises(SpecError, match="triton, torchserve, got 'tgi'"):
        Metrics(server, ["tgi"])


def test_nothing_is_registered_for_the_whole_process() -> None:
    from prometheus_client import REGISTRY

    with observed({"m": doubling()}) as server:
        scraped(server)
        scraped(server, "triton")
        assert not [one.name for one in REGISTRY.collect() if one.name.startswith(("remote_ops", "nv_"))]


# --------------------------------------------------------------------------- what else is told


def test_a_cache_tells_what_it_saved() -> None:
    with observed({"m": Cached(doubling(version="3"), MemoryRows())}) as server:
        endpoint = Endpoint(server.url)
        endpoint(rows(2, 5))
        endpoint(np.concatenate([rows(1, 5), rows(1, 6)]))
        endpoint(rows(1, 6))
        found = samples(scraped(server))
    told = {
        name: of_model(found, f"remote_ops_cache_{name}") for name in ("hits_total", "misses_total", "answers_total")
    }
    assert told == {"hits_total": 3, "misses_total": 2, "answers_total": 1}
    assert of_model(found, "remote_ops_cache_entries") == 2
    assert of_model(found, "remote_ops_cache_bytes") > 0
    assert of_model(found, "remote_ops_cache_lookup_seconds_total") > 0


def test_a_version_that_goes_is_not_ready_and_has_no_numbers_any_more() -> None:
    with observed({"m": doubling(version="3"), "n": doubling(version="1")}) as server:
        assert of_model(samples(scraped(server)), "remote_ops_model_ready") == 1
        asyncio.run_coroutine_threadsafe(server.repository.unload("m"), server.front.loop).result(WAIT_S)
        found = samples(scraped(server))
    assert of_model(found, "remote_ops_model_ready") == 0
    assert value(found, "remote_ops_model_ready", model="n", version="1") == 1
    assert not [labels for name, labels in found if name == "remote_ops_rows_total" and ("model", "m") in labels]


class Restarted(FunctionServable):
    starts, available = 4, True


def test_copies_that_are_down_or_were_started_again_are_told() -> None:
    up, down = Restarted(lambda x: x, [X], [Y]), Restarted(lambda x: x, [X], [Y])
    with observed({"m": Version("m", [up, down], version="3")}) as server:
        down.available = False
        found = samples(scraped(server))
    assert of_model(found, "remote_ops_instances") == 2
    assert of_model(found, "remote_ops_instances_healthy") == 1
    assert of_model(found, "remote_ops_instance_restarts_total") == 6


def test_devices_tell_their_memory_each_by_itself() -> None:
    found = samples(list(_of_devices([Device(0, "H200", 3, 10, 50), Device(1, "H200", 4, 10, None)])))
    assert value(found, "remote_ops_device_memory_used_bytes", device="1", name="H200") == 4
    assert value(found, "remote_ops_device_memory_bytes", device="0", name="H200") == 10


def test_the_server_tells_of_itself() -> None:
    with observed({"m": doubling()}) as server, Raw(server.url) as raw:
        assert raw.post().read().status == 200
        found = samples(scraped(server))
        told = {name: number for (name, _), number in found.items()}
        assert told["remote_ops_connections"] == 1
        assert told["remote_ops_in_flight_requests"] == 0
        assert told["remote_ops_ready"] == 1
        assert told["process_resident_memory_bytes"] > 1 << 20
        assert told["process_cpu_seconds_total"] > 0
        (labels,) = (dict(labels) for name, labels in found if name == "remote_ops_build_info")
        assert labels["version"] == remote_ops.__version__


def test_a_scrape_holds_while_models_come_and_go_and_clients_connect() -> None:
    with observed({"m": doubling(), "n": doubling()}) as server:
        over = threading.Event()

        async def change() -> None:
            number = 0
            while not over.is_set():
                number += 1
                server.front.catalog.add("n", Version("n", [doubling()], version=str(number)))
                server.front.catalog.remove("n", str(number)).stop()
                await asyncio.sleep(0)

        changing = asyncio.run_coroutine_threadsafe(change(), server.front.loop)
        for _ in range(30):
            assert ask(server.url, "GET", "/m").status == 200
            assert scraped(server)
        over.set()
        changing.result(WAIT_S)
