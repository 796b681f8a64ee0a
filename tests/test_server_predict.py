"""The server as one of TensorFlow Serving's REST protocol: rows and columns, strings, versions, labels, and curl."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from rawfront import Client, front_of
from rawpeer import WAIT_S
from test_readme import blocks_of

import server_ref
from remote_ops import FunctionServable, Signature, TensorSpec
from remote_ops.errors import InternalError, InvalidRequest
from server_ref.model import Version
from server_ref.predict import read_predict, write_predict

ROOT = Path(__file__).parents[1]
Array = npt.NDArray[Any]
X = TensorSpec("x", "float32", (-1, 2))
Y = TensorSpec("y", "float32", (-1, 2))
PREDICT = "/v1/models/double:predict"


def scaling(factor: int, **options: Any) -> FunctionServable:
    return FunctionServable(lambda x: factor * x, [X], [Y], **options)


def pair() -> FunctionServable:
    def both(a: Array, n: Array) -> dict[str, Array]:
        return {"scaled": a * n[:, None].astype(np.float32), "n": n}

    return FunctionServable(
        both,
        [TensorSpec("a", "float32", (-1, 2)), TensorSpec("n", "int64", (-1,))],
        [TensorSpec("scaled", "float32", (-1, 2)), TensorSpec("n", "int64", (-1,))],
    )


def strings() -> FunctionServable:
    def same(s: Array) -> dict[str, Array]:
        return {"t": s, "t_bytes": s}

    s, *results = (TensorSpec(name, "string", (-1,)) for name in ("s", "t", "t_bytes"))
    return FunctionServable(same, [s], results)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server of several models, one with a version."""
    models = {
        "double": scaling(2, version="7"),
        "pair": pair(),
        "strings": strings(),
        "total": FunctionServable(lambda x: x.sum(), [X], [TensorSpec("sum", "float32", ())]),
    }
    with server_ref.running(models) as base:
        yield base


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    """A connection that must survive the test."""
    with Client(url) as connected:
        yield connected
        assert connected.get("/v1/models/double").status == 200
        assert connected.still(), "the server hung up"


# --------------------------------------------------------------------------- rows and columns


@pytest.mark.parametrize("rows", [[[1, 2], [3, 4.5]], [{"x": [1, 2]}, {"x": [3, 4.5]}]], ids=["values", "by name"])
def test_rows_give_predictions(client: Client, rows: Any) -> None:
    reply = client.post(PREDICT, {"instances": rows, "signature_name": "serving_default"})
    assert reply.json == {"predictions": [[2.0, 4.0], [6.0, 9.0]]}
    assert reply.headers["content-type"] == "application/json"


@pytest.mark.parametrize("values", [[[1, 2]], {"x": [[1, 2]]}], ids=["values", "by name"])
def test_columns_give_outputs(client: Client, values: Any) -> None:
    assert client.post(PREDICT, {"inputs": values}).json == {"outputs": [[2.0, 4.0]]}


def test_several_inputs_and_outputs_go_by_name(client: Client) -> None:
    rows = [{"a": [1, 2], "n": 10}, {"a": [3, 4], "n": 100}]
    assert client.post("/v1/models/pair:predict", {"instances": rows}).json == {
        "predictions": [{"scaled": [10.0, 20.0], "n": 10}, {"scaled": [300.0, 400.0], "n": 100}]
    }
    columns = {"a": [[1, 2], [3, 4]], "n": [10, 100]}
    assert client.post("/v1/models/pair:predict", {"inputs": columns}).json == {
        "outputs": {"scaled": [[10.0, 20.0], [300.0, 400.0]], "n": [10, 100]}
    }


def test_strings_that_are_no_text_are_base64(client: Client) -> None:
    odd = {"b64": base64.b64encode(b"\xff\x00").decode()}
    for body in ({"instances": ["\u00e9", odd]}, {"instances": [{"s": "\u00e9"}, {"s": odd}]}):
        assert client.post("/v1/models/strings:predict", body).json == {
            "predictions": [
                {"t": "\u00e9", "t_bytes": {"b64": base64.b64encode("\u00e9".encode()).decode()}},
                {"t": odd, "t_bytes": odd},
            ]
        }
    assert client.post("/v1/models/strings:predict", {"inputs": [odd]}).json["outputs"]["t"] == [odd]


def test_an_output_without_rows_goes_in_columns_only(client: Client) -> None:
    assert client.post("/v1/models/total:predict", {"inputs": [[1, 2]]}).json == {"outputs": 3.0}
    reply = client.post("/v1/models/total:predict", {"instances": [[1, 2]]})
    assert (reply.status, "ask by columns" in reply.error) == (500, True)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8"),
        (b'{"instances": [[NaN, 1]]}', "NaN is not JSON"),
        (b'{"instances": ' + b"[" * 101 + b"]" * 101 + b"}", "nested 102 deep"),
        (b'{"instances": ' + b"[" * 5000, "nested"),
        (b'{"instances": [[' + b"9" * 5000 + b", 1]]}", "nobody could mean"),
        ([], "expected a JSON object"),
        ({}, "either 'instances' (rows) or 'inputs' (columns)"),
        ({"instances": [[1, 2]], "inputs": [[1, 2]]}, "either 'instances'"),
        ({"instances": []}, "one row or more"),
        ({"instances": 3}, "one row or more"),
        ({"instances": [[1, 2]], "signature_name": "other"}, "no signature 'other'"),
        ({"instances": [[1, 2], [3]]}, "ragged"),
        ({"instances": [[1, None]]}, "null"),
        ({"instances": [["1", "2"]]}, "got strings [1, 2]"),
        ({"instances": [[True, False]]}, "got booleans [1, 2]"),
        ({"instances": [[1, 1e39]]}, "beyond the range of float32"),
        ({"instances": [[1, 2, 3]]}, "expected float32 [-1, 2], got float32 [1, 3]"),
        ({"instances": [{"x": [1, 2]}, {"z": [1, 2]}]}, "every row to name x"),
        ({"instances": [{"z": [1, 2]}]}, "no input 'z'"),
        ({"inputs": {"z": [1, 2]}}, "no input 'z'"),
        ({"inputs": {}}, "missing input 'x'"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_400_with_words_in_json(client: Client, body: Any, words: str) -> None:
    reply = client.post(PREDICT, body)
    assert reply.status == 400
    assert words in reply.error


def signature(dtype: str) -> Signature:
    return Signature((TensorSpec("x", dtype, (-1,)),), ())


@pytest.mark.parametrize(
    ("dtype", "values", "taken"),
    [
        ("float16", [1, 0.5], True),
        ("float16", [1e5], False),
        ("bfloat16", [1, 0.5], True),
        ("float64", [1e300], True),
        ("int8", [-128, 127], True),
        ("int8", [128], False),
        ("int8", [1.0], False),
        ("uint8", [-1], False),
        ("uint64", [2**64 - 1], True),
        ("uint64", [2**64], False),
        ("int64", [2**63], False),
        ("int64", [True], False),
        ("bool", [True, False], True),
        ("bool", [1, 0], False),
        ("string", ["a", "b"], True),
        ("string", [1], False),
        ("string", [None], False),
        ("string", [{"b64": "no base64"}], False),
        ("string", [{"b64": 3}], False),
        ("string", [["a"], ["b", "c"]], False),
        ("string", ["\ud800"], False),
        ("float32", [], True),
    ],
)
def test_values_are_taken_as_the_dtype_or_not_at_all(dtype: str, values: list[Any], taken: bool) -> None:
    text = json.dumps({"inputs": {"x": values}}).encode()
    if not taken:
        with pytest.raises(InvalidRequest, match="input 'x'"):
            read_predict(text, signature(dtype))
        return
    array = read_predict(text, signature(dtype)).arrays["x"]
    spec = signature(dtype).inputs[0]
    assert spec.fit(array) is array
    assert len(array) == len(values)
    if dtype != "string":
        assert array.tolist() == values


def test_nested_strings_keep_their_shape() -> None:
    spec = Signature((TensorSpec("x", "string", (-1, -1)),), ())
    array = read_predict(b'{"inputs": [["a", "b", "c"], ["d", "e", "f"]]}', spec).arrays["x"]
    assert array.tolist() == [[b"a", b"b", b"c"], [b"d", b"e", b"f"]]


def test_what_json_has_no_form_for_is_not_written() -> None:
    with pytest.raises(InvalidRequest, match="'y' holds NaN or infinity"):
        write_predict({"y": np.array([1.0, np.nan])}, in_rows=True)
    with pytest.raises(InternalError, match="no rows in common"):
        write_predict({"y": np.ones(2), "z": np.ones(3)}, in_rows=True)
    assert json.loads(write_predict({"y": np.ones((2, 0)), "z": np.ones(2, bool)}, in_rows=True)) == {
        "predictions": [{"y": [], "z": True}] * 2
    }


def test_a_large_request_is_answered_as_well_as_a_small_one(client: Client) -> None:
    x = np.arange(40_000.0).reshape(-1, 2)
    assert client.post(PREDICT, {"instances": x.tolist()}).json == {"predictions": (2 * x).tolist()}


def test_r3_a_request_that_expires_in_the_queue_never_runs() -> None:
    entered, opened, seen = threading.Event(), threading.Event(), []

    def wait(x: Array) -> Array:
        seen.append(len(x))
        entered.set()
        assert opened.wait(WAIT_S)
        return x

    model = FunctionServable(wait, [X], [Y])
    model.concurrency = 1  # type: ignore[attr-defined]
    with server_ref.running({"m": model}) as url, Client(url) as first, Client(url) as second:
        first.send("POST", "/v1/models/m:predict", b'{"instances": [[1, 2]]}')
        assert entered.wait(WAIT_S)
        reply = second.post("/v1/models/m:predict", {"instances": [[1, 2]] * 5}, X_Request_Timeout_Ms="20")
        assert (reply.status, "in the queue" in reply.error) == (504, True)
        opened.set()
        assert first.read().status == 200
    assert seen == [1]


# --------------------------------------------------------------------------- status, metadata, versions, labels


def test_the_status_of_a_model(client: Client) -> None:
    status = {"error_code": "OK", "error_message": ""}
    expected = {"model_version_status": [{"version": "7", "state": "AVAILABLE", "status": status}]}
    assert client.get("/v1/models/double").json == expected
    assert client.get("/v1/models/double/versions/7").json == expected


def test_the_metadata_of_a_model(client: Client) -> None:
    found = client.get("/v1/models/pair/metadata").json
    assert found["model_spec"]["name"] == "pair"
    default = found["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert default["inputs"]["n"] == {
        "dtype": "DT_INT64",
        "tensor_shape": {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False},
        "name": "n",
    }
    assert default["outputs"]["scaled"]["dtype"] == "DT_FLOAT"
    assert default["method_name"] == "tensorflow/serving/predict"


def test_versions_and_labels_choose() -> None:
    with front_of({"m": Version("m", [scaling(2)], version="1")}) as (url, front), Client(url) as client:
        done = threading.Event()

        def change() -> None:
            front.catalog.add("m", Version("m", [scaling(3)], version="2"))
            model = front.catalog.model("m")
            model.routes = model.routes.with_label("stable", "1")
            done.set()

        front.loop.call_soon_threadsafe(change)
        assert done.wait(WAIT_S)
        for path, factor in (("m", 3), ("m/versions/1", 2), ("m/versions/2", 3), ("m/labels/stable", 2)):
            reply = client.post(f"/v1/models/{path}:predict", {"instances": [[1, 1]]})
            assert reply.json == {"predictions": [[factor, factor]]}
        assert client.get("/v1/models/m/labels/stable").json["model_version_status"][0]["version"] == "1"
        states = client.get("/v1/models/m").json["model_version_status"]
        assert [row["version"] for row in states] == ["2", "1"]
        for path in ("m/versions/3", "m/labels/nope", "nope", "m/labels/1"):
            assert client.post(f"/v1/models/{path}:predict", {"instances": [[1, 1]]}).status == 404
            assert client.get(f"/v1/models/{path}").error


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", PREDICT, 405, "expected POST"),
        ("POST", "/v1/models/double", 405, "expected GET"),
        ("POST", "/v1/models/double/metadata", 405, "expected GET"),
        ("POST", "/v1/models/double:classify", 501, "does not offer"),
        ("POST", "/v1/models/double:regress", 501, "does not offer"),
        ("POST", "/v1/models/dubble:predict", 404, "did you mean '/double'"),
        ("GET", "/v1/models/", 404, "in this protocol"),
    ],
)
def test_what_is_wrong_is_said_in_json(client: Client, method: str, path: str, status: int, words: str) -> None:
    reply = client.ask(method, path, b"{}" if method == "POST" else None)
    assert reply.status == status
    assert words in reply.error


# --------------------------------------------------------------------------- the page


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_lines_of_the_page_run_as_they_stand(tmp_path: Path) -> None:
    """Each line of curl on the page, in order; what it prints is what the next line but one shows after `# `."""
    page = (ROOT / "docs" / "server-oip.md").read_text("utf-8")
    blocks = [block.code for block in blocks_of(page) if block.info == ("sh",)]
    lines = [line for code in blocks for line in code.splitlines()]
    assert sum(line.startswith("curl") for line in lines) > 5
    (tmp_path / "ones.f32").write_bytes(np.ones((3, 2), np.float32).tobytes())
    with server_ref.running({"double": scaling(2, version="7")}) as url:
        for line, after in zip(lines, [*lines[1:], ""], strict=True):
            if not line.startswith("curl"):
                continue
            command = line.replace("http://127.0.0.1:9000/", url)
            done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, line + done.stderr
            if after.startswith("# "):
                assert done.stdout.strip().startswith(after.removeprefix("# ").removesuffix("...")), line
