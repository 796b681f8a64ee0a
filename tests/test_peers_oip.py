"""`tritonclient` as the oracle of our codec, and a KServe model server for our client; both in another environment."""

from __future__ import annotations

import asyncio
import base64
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

from remote_ops import Endpoint, Retry
from remote_ops.errors import InternalError, InvalidRequest, ModelNotFound, SignatureError
from remote_ops.oip import DATATYPES, decode_request, encode_request, encode_response

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


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Have `tritonclient` build or parse a message."""
    with subprocess.Popen([*PEER, "oracle"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def asked(question: dict[str, Any]) -> dict[str, Any]:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            return answer

        yield asked
        process.stdin.close()


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
