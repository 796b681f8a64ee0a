"""`tritonclient` as the oracle of our codec, KServe's server for our client, and their clients for our server.

All of that runs in another environment.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from oippeer import KSERVE, packed
from rawpeer import until

import server_ref
from remote_ops import Endpoint, FunctionServable, Retry, TensorSpec
from remote_ops.errors import InternalError, InvalidRequest, ModelNotFound, SignatureError
from remote_ops.oip import DATATYPES, decode_request, encode_request, encode_response
from remote_ops.signature import BY_NUMPY

ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("REMOTE_OPS_PEERS", ROOT / ".venv-peers")) / "bin" / "python"
PEER = [str(PYTHON), str(Path(__file__).parent / "oippeer.py")]

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(
        not PYTHON.exists(), reason=f"needs kserve and tritonclient at {PYTHON}: 'make peers' installs them there"
    ),
]

Array = npt.NDArray[Any]
Ask = Callable[[dict[str, Any]], dict[str, Any]]


@contextlib.contextmanager
def peer(*arguments: str) -> Iterator[Ask]:
    """Their software in a process of its own, which answers one question a line."""
    with subprocess.Popen([*PEER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def asked(question: dict[str, Any]) -> dict[str, Any]:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            return answer

        yield asked
        process.stdin.close()


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Have `tritonclient` build or parse a message."""
    with peer("oracle") as asked:
        yield asked


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=1).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def kserve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL, up to the name of a model, of a KServe model server."""
    port = free_port()
    log = tmp_path_factory.mktemp("kserve") / "log"
    with log.open("w") as file, subprocess.Popen([*PEER, "serve", str(port)], stdout=file, stderr=file) as process:
        try:
            base = f"http://127.0.0.1:{port}/v2"
            ready = until(lambda: process.poll() is not None or answers(f"{base}/health/ready"), 90)
            assert ready, log.read_text()[-2000:]
            assert process.poll() is None, log.read_text()[-2000:]
            yield f"{base}/models/"
        finally:
            process.kill()


def objects(*items: Any) -> Array:
    array = np.empty(len(items), object)
    array[:] = items
    return array


def extremes(datatype: str) -> Array:
    dtype = DATATYPES[datatype]
    if datatype == "BYTES":
        return objects(b"ab", b"", "\u00e9".encode(), b"\x00 in \x00side").reshape(2, 2)
    if datatype == "BOOL":
        return np.array([[True, False], [False, True]])
    if dtype.kind in "iu":
        return np.array([[np.iinfo(dtype).min, 0], [1, np.iinfo(dtype).max]], dtype)
    limits = ml_dtypes.finfo(dtype)
    return np.array([[limits.min, -0.0], [limits.smallest_subnormal, limits.max]]).astype(dtype)


# --------------------------------------------------------------------------- tritonclient


@pytest.mark.parametrize("shape", [(2, 2), (4,), (1, 4, 1), (0, 3), ()], ids=str)
@pytest.mark.parametrize("datatype", DATATYPES)
def test_our_requests_are_those_of_tritonclient(ask: Ask, datatype: str, shape: tuple[int, ...]) -> None:
    x = extremes(datatype).ravel()[: int(np.prod(shape))].reshape(shape)
    ours = encode_request(("x",), [x], ("y",))
    theirs = ask({"inputs": [{"name": "x", "datatype": datatype, **packed(x)}], "outputs": ["y"], "binary": True})
    body, size = base64.b64decode(theirs["body"]), theirs["json_bytes"]
    assert json.loads(ours.buffers[0]) == json.loads(body[:size])
    assert b"".join(ours.buffers[1:]) == body[size:]
    read = decode_request(body, size).tensors["x"]
    assert (read.dtype, read.shape, read.tolist()) == (x.dtype, x.shape, x.tolist())


@pytest.mark.parametrize("datatype", [datatype for datatype in DATATYPES if datatype != "BF16"])
def test_tritonclients_json_is_read_as_it_was_meant(ask: Ask, datatype: str) -> None:
    x = extremes(datatype)
    theirs = ask({"inputs": [{"name": "x", "datatype": datatype, **packed(x)}], "outputs": [], "binary": False})
    assert theirs["json_bytes"] is None
    read = decode_request(base64.b64decode(theirs["body"])).tensors["x"]
    assert (read.dtype, read.tolist()) == (x.dtype, x.tolist())


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("shape", [(2, 2), (4,), (0, 3), ()], ids=str)
@pytest.mark.parametrize("datatype", DATATYPES)
def test_tritonclient_reads_our_replies(ask: Ask, datatype: str, shape: tuple[int, ...], binary: bool) -> None:
    y = extremes(datatype).ravel()[: int(np.prod(shape))].reshape(shape)
    reply = encode_response({"y": y, "n": np.arange(3)}, model_name="m", binary=["y", "n"] if binary else [])
    body = base64.b64encode(b"".join(reply.buffers)).decode()
    assert ask({"body": body, "json_bytes": reply.json_bytes}) == {"y": packed(y), "n": packed(np.arange(3))}


# --------------------------------------------------------------------------- KServe


@pytest.mark.parametrize("datatype", KSERVE)
def test_a_kserve_model_answers_for_every_datatype(kserve: str, datatype: str) -> None:
    x = extremes(datatype)
    with Endpoint(kserve + datatype, 10) as endpoint:
        for y in (
            endpoint(x),
            endpoint.infer({"x": x}, ["y"])["y"],
            asyncio.run(endpoint.ainfer({"x": x}))["y"],
            endpoint.submit({"x": x}).result(10)["y"],
            endpoint(x[:0]),
        ):
            assert (y.dtype, y.tolist()) == (x.dtype, x[: len(y)].tolist())
            assert y.tobytes() == x[: len(y)].tobytes() or datatype == "BYTES"


@pytest.mark.parametrize("datatype", [datatype for datatype in KSERVE if datatype != "FP16"])
def test_a_kserve_model_answers_in_json(kserve: str, datatype: str) -> None:
    x = extremes(datatype)
    message = encode_request(("x",), [x], ("y",), binary=False)
    request = urllib.request.Request(
        f"{kserve}{datatype}/infer", b"".join(message.buffers), {"Content-Type": message.content_type}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        found = json.load(answer)
    assert found["outputs"][0]["data"] == json.loads(message.buffers[0])["inputs"][0]["data"]


def test_a_kserve_model_answers_by_names(kserve: str) -> None:
    a, b = np.float32([[1, 2]]), np.float32([[10, 20]])
    with Endpoint(f"{kserve}pair", 10) as endpoint:
        assert str(endpoint.signature).startswith("(a: float32 [-1, 2], b: float32 [-1, 2]) -> (sum:")
        assert {n: y.tolist() for n, y in endpoint.infer({"b": b, "a": a}, ["difference"]).items()} == {
            "difference": [[-9, -18]]
        }
        assert [y.tolist() for y in endpoint(a, b)] == [[[11, 22]], [[-9, -18]]]


def test_what_kserve_refuses_has_its_words(kserve: str) -> None:
    x, once = np.ones((1, 2), np.float32), Retry(attempts=1)
    with Endpoint(f"{kserve}fails", 10, retry=once) as endpoint, pytest.raises(InvalidRequest, match="no such thing"):
        endpoint(x)
    with Endpoint(f"{kserve}nope", 10, retry=once) as endpoint, pytest.raises(ModelNotFound, match="nope"):
        endpoint(x)
    with Endpoint(f"{kserve}FP32/versions/3", 10, retry=once) as endpoint:
        with pytest.raises(InvalidRequest, match="versioning not supported"):
            endpoint(x)
    with Endpoint(f"{kserve}FP32", 10) as endpoint, pytest.raises(SignatureError):
        endpoint(x.astype(int))


def test_kserve_has_no_strings_that_are_no_text(kserve: str) -> None:
    with Endpoint(f"{kserve}BYTES", 10) as endpoint, pytest.raises(InternalError, match="UTF-8"):
        endpoint(objects(b"\xff", b"").reshape(1, 2))


def test_a_torch_module_holds_a_kserve_model(kserve: str) -> None:
    import torch

    from remote_ops.torch import RemoteModule

    module = torch.nn.Sequential(RemoteModule(f"{kserve}FP32"), torch.nn.Linear(2, 1))
    assert module(torch.ones(3, 2)).shape == (3, 1)


# --------------------------------------------------------------------------- their clients at our server


TRITON = ("sync", "aio")
CLIENTS = (*TRITON, "kserve")


def same(datatype: str) -> FunctionServable:
    name = BY_NUMPY[DATATYPES[datatype]].name
    return FunctionServable(
        lambda x: x, [TensorSpec("x", name, (-1, 2))], [TensorSpec("y", name, (-1, 2))], version="1"
    )


def pair() -> FunctionServable:
    def both(a: Array, b: Array) -> dict[str, Array]:
        return {"sum": a + b, "difference": a - b}

    specs = {name: TensorSpec(name, "float32", (-1, 2)) for name in ("a", "b", "sum", "difference")}
    return FunctionServable(both, [specs["a"], specs["b"]], [specs["sum"], specs["difference"]], version="3")


@pytest.fixture(scope="module")
def calls() -> Iterator[Ask]:
    """Have one of their clients call a server of ours: an identity model per datatype, and `pair`."""
    models = {datatype: same(datatype) for datatype in DATATYPES} | {"pair": pair()}
    with server_ref.running(models) as url, peer("calls", url.removeprefix("http://").strip("/")) as asked:
        yield asked


def gave(calls: Ask, client: str, method: str, **question: Any) -> Any:
    said = calls({"client": client, "method": method, **question})
    assert "gave" in said, said
    return said["gave"]


def infer(calls: Ask, client: str, model: str, x: Array, *, binary: bool, **arguments: Any) -> Any:
    inputs = [{"name": "x", "datatype": model, **packed(x)}]
    given = {"model_name": model, **arguments}
    return gave(calls, client, "infer", inputs=inputs, outputs=["y"], binary=binary, arguments=given)


# tritonclient has no BF16 as text; KServe has none at all, and FP16 only in binary form.
LACKING = {(client, "BF16", False) for client in CLIENTS} | {("kserve", "BF16", True), ("kserve", "FP16", False)}
FORMS = [(client, datatype, binary) for client in CLIENTS for datatype in DATATYPES for binary in (True, False)]


@pytest.mark.parametrize(("client", "datatype", "binary"), [form for form in FORMS if form not in LACKING])
def test_their_clients_get_every_datatype_from_our_server(calls: Ask, client: str, datatype: str, binary: bool) -> None:
    x = extremes(datatype)
    reply = infer(calls, client, datatype, x, binary=binary)
    assert reply["tensors"] == {"y": packed(x)}
    assert reply["model_name"] == datatype


@pytest.mark.parametrize("asked", ["gzip", "deflate", None])
@pytest.mark.parametrize("sent", ["gzip", "deflate", None])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("client", TRITON)
def test_tritonclient_may_compress_both_ways(
    calls: Ask, client: str, binary: bool, sent: str | None, asked: str | None
) -> None:
    x = np.arange(80_000, dtype=np.int32).reshape(-1, 2)
    coding = {"request_compression_algorithm": sent, "response_compression_algorithm": asked}
    reply = infer(calls, client, "INT32", x, binary=binary, request_id="7", timeout=5_000_000, priority=1, **coding)
    assert reply["tensors"] == {"y": packed(x)}
    assert reply["id"] == "7"


@pytest.mark.parametrize("client", CLIENTS)
def test_their_clients_ask_for_all_outputs_and_for_one(calls: Ask, client: str) -> None:
    a, b = np.float32([[1, 2]]), np.float32([[10, 20]])
    rows = [{"name": name, "datatype": "FP32", **packed(array)} for name, array in (("b", b), ("a", a))]
    for outputs in (["difference"], []):
        reply = gave(
            calls, client, "infer", inputs=rows, outputs=outputs, binary=True, arguments={"model_name": "pair"}
        )
        expected = {"difference": packed(a - b)} | ({} if outputs else {"sum": packed(a + b)})
        assert reply["tensors"] == expected


def test_tritonclient_infers_in_the_background(calls: Ask) -> None:
    x = extremes("FP32")
    rows = [{"name": "x", "datatype": "FP32", **packed(x)}]
    reply = gave(calls, "sync", "async_infer", inputs=rows, outputs=[], binary=True, arguments={"model_name": "FP32"})
    assert reply["tensors"] == {"y": packed(x)}


@pytest.mark.parametrize("client", CLIENTS)
def test_their_clients_see_that_we_are_live_and_ready(calls: Ask, client: str) -> None:
    assert gave(calls, client, "is_server_live") is True
    assert gave(calls, client, "is_server_ready") is True
    assert gave(calls, client, "is_model_ready", arguments={"model_name": "pair"}) is True


@pytest.mark.parametrize("client", TRITON)
def test_tritonclient_reads_metadata_config_and_index(calls: Ask, client: str) -> None:
    pair = {"model_name": "pair", "model_version": "3"}
    assert "binary_tensor_data" in gave(calls, client, "get_server_metadata")["extensions"]
    metadata = gave(calls, client, "get_model_metadata", arguments=pair)
    assert (metadata["name"], metadata["versions"]) == ("pair", ["3"])
    assert metadata["inputs"][1] == {"name": "b", "datatype": "FP32", "shape": [-1, 2]}
    config = gave(calls, client, "get_model_config", arguments=pair)
    assert (config["name"], config["max_batch_size"]) == ("pair", 0)
    assert [row["data_type"] for row in config["output"]] == ["TYPE_FP32", "TYPE_FP32"]
    index = gave(calls, client, "get_model_repository_index")
    assert {"name": "pair", "version": "3", "state": "READY", "reason": ""} in index
    assert len(index) == len(DATATYPES) + 1
    assert gave(calls, client, "is_model_ready", arguments={"model_name": "nope"}) is False


@pytest.mark.parametrize("client", TRITON)
def test_tritonclient_reads_statistics_that_add_up(calls: Ask, client: str) -> None:
    def told() -> dict[str, Any]:
        (row,) = gave(calls, client, "get_inference_statistics", arguments={"model_name": "UINT8"})["model_stats"]
        return dict(row)

    before = told()
    for _ in range(3):
        infer(calls, client, "UINT8", extremes("UINT8"), binary=True)
    after = told()
    spent = after["inference_stats"]
    assert after["inference_count"] - before["inference_count"] == 6
    assert after["execution_count"] - before["execution_count"] == 3
    assert spent["success"]["count"] - before["inference_stats"]["success"]["count"] == 3
    assert all(spent[part]["count"] == after["execution_count"] for part in ("queue", "compute_infer"))
    assert sum(row["compute_infer"]["count"] for row in after["batch_stats"]) == after["execution_count"]
    everything = gave(calls, client, "get_inference_statistics")["model_stats"]
    assert len(everything) == len(DATATYPES) + 1


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        ("load_model", {"model_name": "pair"}, "not allowed here"),
        ("unload_model", {"model_name": "pair"}, "not allowed here"),
        ("get_system_shared_memory_status", {}, "does not offer"),
        ("get_cuda_shared_memory_status", {}, "does not offer"),
        ("unregister_system_shared_memory", {}, "does not offer"),
        ("get_trace_settings", {"model_name": "pair"}, "does not offer"),
        ("get_log_settings", {}, "does not offer"),
        ("get_model_metadata", {"model_name": "nope"}, "no model '/nope'"),
        ("get_model_metadata", {"model_name": "pair", "model_version": "9"}, "no version '9'"),
    ],
)
@pytest.mark.parametrize("client", TRITON)
def test_tritonclient_reads_our_refusals(
    calls: Ask, client: str, method: str, arguments: dict[str, Any], words: str
) -> None:
    said = calls({"client": client, "method": method, "arguments": arguments})
    assert said["raised"] == "InferenceServerException"
    assert words in said["message"]


@pytest.mark.parametrize("client", CLIENTS)
def test_their_clients_read_what_is_wrong_with_a_request(calls: Ask, client: str) -> None:
    rows = [{"name": "x", "datatype": "FP32", **packed(np.ones((1, 3), np.float32))}]
    said = calls(
        {"client": client, "method": "infer", "inputs": rows, "outputs": [], "binary": True,
         "arguments": {"model_name": "FP32"}}
    )  # fmt: skip
    assert "expected float32 [-1, 2], got float32 [1, 3]" in said["message"]


def test_the_sdk_of_kserve_predicts_by_the_first_protocol_too(calls: Ask) -> None:
    data = {"instances": [[1, 2], [3, 4]]}
    reply = gave(calls, "kserve", "infer", protocol="v1", arguments={"model_name": "FP32", "data": data, "headers": {}})
    assert reply == {"predictions": [[1.0, 2.0], [3.0, 4.0]]}
