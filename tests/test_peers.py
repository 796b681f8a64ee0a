"""The 2018 Python client, as it comes from the package index, against our server; and Go's recorded replies."""

from __future__ import annotations

import base64
import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from rawpeer import Conversation, Message, peer

import server_ref
from remote_ops import Endpoint, FunctionServable, Retry, Signature, TensorSpec, graphpipe
from remote_ops.errors import InternalError, InvalidRequest, SignatureError
from remote_ops.signature import DTYPES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from graphpipe import remote

# The 2018 client uses what numpy and flatbuffers have deprecated since.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

NUMBERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64")


def identity(dtype: str, shape: tuple[int, ...]) -> FunctionServable:
    return FunctionServable(lambda x: x, [TensorSpec("x", dtype, shape)], [TensorSpec("y", dtype, shape)], version="7")


def two(a: Any, b: Any, config: bytes) -> dict[str, Any]:
    return {"sum": a + b, "difference": a - b, "config": np.array([config], object)}


NUMBER = (-1,)
PAIR = FunctionServable(
    two,
    [TensorSpec("a", "float32", NUMBER), TensorSpec("b", "float32", NUMBER)],
    [
        TensorSpec("sum", "float32", NUMBER),
        TensorSpec("difference", "float32", NUMBER),
        TensorSpec("config", "string", (1,)),
    ],
)
A, B = np.array([1, 2], np.float32), np.array([10, 20], np.float32)


def fails(x: Any) -> Any:
    raise ValueError("no such thing")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    models = {dtype: identity(dtype, (-1, 2)) for dtype in (*NUMBERS, "string")}
    models |= {"scalar": identity("float64", ()), "pair": PAIR, "mask": identity("bool", (-1,))}
    models |= {"brain": identity("bfloat16", (-1,))}
    models["fails"] = FunctionServable(
        fails, [TensorSpec("x", "float32", NUMBER)], [TensorSpec("y", "float32", NUMBER)]
    )
    with server_ref.running(models) as url:
        yield url


@pytest.mark.parametrize("dtype", NUMBERS)
def test_c03_the_2018_client_sends_and_gets_every_number_type(url: str, dtype: str) -> None:
    x = np.array([[0, 1], [2, 3], [100, 127]], dtype)
    y = remote.execute(f"{url}{dtype}", x)
    assert y.dtype == x.dtype
    assert np.array_equal(y, x)


def test_c04_the_2018_client_sends_and_gets_strings(url: str) -> None:
    x = np.array([["a", "b\u00e9"], ["", "long " * 50]], object)
    y = remote.execute(f"{url}string", x)
    assert [item.decode() for item in y.ravel()] == x.ravel().tolist()


def test_c06_the_2018_client_sends_and_gets_scalars(url: str) -> None:
    y = remote.execute(f"{url}scalar", np.array(2.5))
    assert np.asarray(y).ravel().tolist() == [2.5]


@pytest.mark.parametrize("dtype", ["uint8", "float32", "int64"])
def test_c07_the_2018_client_sends_and_gets_empties(url: str, dtype: str) -> None:
    y = remote.execute(f"{url}{dtype}", np.empty((0, 2), dtype))
    assert (y.shape, y.dtype) == ((0, 2), np.dtype(dtype))


def test_c12_the_2018_client_names_inputs_and_outputs_in_any_order(url: str) -> None:
    difference, total = remote.execute_multi(f"{url}pair", [B, A], ["b", "a"], ["difference", "sum"])
    assert difference.tolist() == [-9, -18]
    assert total.tolist() == [11, 22]


def test_c13_the_2018_client_without_names_gets_all_outputs_by_position(url: str) -> None:
    results = remote.execute_multi(f"{url}pair", [A, B], None, None)
    assert [len(results), results[0].tolist(), results[1].tolist()] == [3, [11, 22], [-9, -18]]


def test_c17_the_config_of_the_2018_client_reaches_the_model(url: str) -> None:
    (config,) = remote.execute_multi(f"{url}pair", [A, B], None, ["config"], config='{"k": 1}')
    assert config.tolist() == [b'{"k": 1}']


def test_c19_the_2018_client_reads_our_metadata(url: str) -> None:
    assert remote.get_input_names(f"{url}pair") == ["a", "b"]
    assert remote.get_output_names(f"{url}pair") == ["sum", "difference", "config"]
    assert remote.get_input_types(f"{url}float32") == [np.dtype("float32")]
    assert remote.get_output_types(f"{url}float32") == [np.dtype("float32")]
    assert remote.get_input_shapes(f"{url}float32") == [[None, 2]]
    assert remote.get_output_shapes(f"{url}float32") == [[None, 2]]
    metadata = remote.metadata(f"{url}int8")
    assert (metadata.Version(), metadata.Server()) == (b"7", b"remote-ops server_ref")


def test_the_2018_client_sees_a_bool_as_the_bytes_that_it_knows(url: str) -> None:
    y = remote.execute(f"{url}mask", np.array([0, 1, 1], np.uint8))
    assert (y.dtype, y.tolist()) == (np.dtype("uint8"), [0, 1, 1])


@pytest.mark.parametrize(
    ("model", "x", "status"),
    [
        ("float32", np.zeros((1, 3), np.float32), "400"),
        ("float32", np.zeros((1, 2)), "400"),
        ("fails", A, "500"),
        ("none", A, "404"),
    ],
)
def test_c30_the_2018_client_fails_loudly_and_the_next_call_works(url: str, model: str, x: Any, status: str) -> None:
    with pytest.raises(Exception, match=status):
        remote.execute(f"{url}{model}", x)
    assert remote.execute(f"{url}float32", np.ones((1, 2), np.float32)).tolist() == [[1, 1]]


def test_both_clients_agree(url: str) -> None:
    x = np.random.default_rng(0).random((5, 2), np.float32)
    assert np.array_equal(remote.execute(f"{url}float32", x), Endpoint(f"{url}float32")(x))


def test_the_2018_client_sends_float32_where_we_want_bfloat16_and_gets_its_bits(url: str) -> None:
    y = remote.execute(f"{url}brain", np.array([1, -2], np.float32))
    assert (y.dtype, y.tolist()) == (np.dtype("uint16"), [0x3F80, 0xC000])


# --------------------------------------------------------------------------- a server of 2018, our client

CAPTURES = Path(__file__).parent / "captures"
MANIFEST: list[dict[str, Any]] = json.loads((CAPTURES / "manifest.json").read_text())
REPLIES = [entry for entry in MANIFEST if entry.get("message", "").startswith("InferResponse")]
GO_METADATA = (CAPTURES / "replymeta-go.bin").read_bytes()
# What the Go batcher says of its inputs and outputs: names, and neither dtype nor shape.
UNTYPED = graphpipe.encode_metadata(Signature((TensorSpec("x", "any", None),), (TensorSpec("y", "any", None),)))


@contextlib.contextmanager
def go_server(answer: Callable[[Conversation], None], metadata: bytes) -> Iterator[tuple[Endpoint, list[Message]]]:
    """A server that answers with recorded bytes; and the calls that it saw."""
    seen: list[Message] = []

    def script(conversation: Conversation) -> None:
        while (request := conversation.read()) is not None:
            if request.body == graphpipe.METADATA_REQUEST:
                conversation.answer(metadata, "200 OK", "Content-Type: text/plain; charset=utf-8")
            else:
                seen.append(request)
                answer(conversation)

    with peer(script) as there, Endpoint(there.url, 10, retry=Retry(attempts=1)) as endpoint:
        yield endpoint, seen


def replay(file: str) -> Callable[[Conversation], None]:
    """Answer as Go does: in chunks, and without a word on what they are."""
    recorded = (CAPTURES / file).read_bytes()
    head = b"HTTP/1.1 200 OK\r\nDate: Mon, 01 Oct 2018 00:00:00 GMT\r\nTransfer-Encoding: chunked\r\n\r\n"
    return lambda conversation: conversation.send(head, b"%x\r\n" % len(recorded), recorded, b"\r\n0\r\n\r\n")


def test_our_client_reads_what_a_go_server_says_of_its_model() -> None:
    with go_server(replay("reply-go-f32.bin"), GO_METADATA) as (endpoint, _):
        signature = endpoint.signature
    (entry,) = [entry for entry in MANIFEST if entry["file"] == "replymeta-go.bin"]
    assert (signature.name, signature.server) == (entry["name"], entry["server"])
    assert [spec.name for spec in signature.inputs] == entry["inputs"]
    assert [spec.name for spec in signature.outputs] == entry["outputs"]


@pytest.mark.parametrize("entry", REPLIES, ids=lambda entry: entry["file"])
def test_our_client_takes_every_recorded_reply_for_the_tensor_that_it_holds(entry: dict[str, Any]) -> None:
    (expected,) = entry["output_tensors"]
    with go_server(replay(entry["file"]), UNTYPED) as (endpoint, seen):
        y = endpoint(A)
    assert len(seen) == 1
    assert list(y.shape) == expected["shape"]
    if "values_base64" in expected:
        assert [item.rstrip(b"\0") for item in y.ravel()] == [base64.b64decode(v) for v in expected["values_base64"]]
    else:
        assert y.tobytes() == base64.b64decode(expected["data_base64"])


def zeros(spec: TensorSpec) -> npt.NDArray[Any]:
    return np.zeros([max(size, 1) for size in spec.shape or ()], DTYPES[spec.dtype].numpy)


def test_a_recorded_reply_that_breaks_its_servers_own_metadata_is_an_internal_error() -> None:
    with go_server(replay("reply-go-str3.bin"), GO_METADATA) as (endpoint, _):
        inputs = {spec.name: zeros(spec) for spec in endpoint.signature.inputs}
        with pytest.raises(InternalError, match=r"expected .* got"):
            endpoint.infer(inputs, [endpoint.signature.outputs[0].name])


def test_our_client_shows_the_words_of_a_go_servers_error() -> None:
    said = "Content-Type: text/plain; charset=utf-8", "X-Content-Type-Options: nosniff"
    with (
        go_server(lambda conversation: conversation.answer(b"no output 'q'\n", "400 X", *said), UNTYPED) as (ep, _),
        pytest.raises(InvalidRequest, match="no output 'q'"),
    ):
        ep(A)


def test_our_client_refuses_a_name_that_a_go_server_does_not_have() -> None:
    with go_server(replay("reply-go-f32.bin"), GO_METADATA) as (endpoint, seen):
        with pytest.raises(SignatureError, match="no input 'nope'"):
            endpoint.infer({"nope": A})
        assert seen == []
