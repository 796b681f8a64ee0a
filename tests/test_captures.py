"""Recorded messages of other people's clients and servers decode to what they say, or give their documented error."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from remote_ops.errors import DecodeError
from remote_ops.graphpipe import (
    InferRequest,
    MetadataRequest,
    decode_metadata,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)

Array = npt.NDArray[Any]

CAPTURES = Path(__file__).parent / "captures"
MANIFEST: list[dict[str, Any]] = json.loads((CAPTURES / "manifest.json").read_text())

DOCUMENTED_ERRORS = {
    "req-batcher-01.bin": r"type 0 \(Null\)",
    "req-py-33.bin": "ends early",
    "req-py-34.bin": "ends early",
}
STRINGS_WITHOUT_ELEMENTS = {"req-py-22.bin"}  # the 2018 decoder shows them as float64


def entries(message: str) -> list[Any]:
    return [pytest.param(entry, id=entry["file"]) for entry in MANIFEST if entry.get("message", "").startswith(message)]


def read(entry: dict[str, Any]) -> bytes:
    message: bytes = (CAPTURES / entry["file"]).read_bytes()
    assert len(message) == entry["bytes"]
    return message


def assert_holds(array: Array, expected: dict[str, Any], file: str) -> None:
    assert list(array.shape) == expected["shape"]
    if "values_base64" in expected:
        assert array.dtype == object
        values = [base64.b64decode(value) for value in expected["values_base64"]]
        assert [item.rstrip(b"\0") for item in array.ravel().tolist()] == values
    elif file in STRINGS_WITHOUT_ELEMENTS:
        assert array.dtype == object
        assert array.size == 0
    else:
        assert array.dtype == np.dtype(expected["type"])
        assert array.tobytes() == base64.b64decode(expected["data_base64"])


def bits(tensors: list[Array]) -> list[Any]:
    """What can be compared even where a tensor holds a NaN."""
    return [
        (tensor.dtype, tensor.shape, tensor.tolist() if tensor.dtype == object else tensor.tobytes())
        for tensor in tensors
    ]


def test_every_recorded_message_is_in_the_manifest() -> None:
    assert {path.name for path in CAPTURES.glob("*.bin")} == {entry["file"] for entry in MANIFEST}
    assert len(MANIFEST) == 82


@pytest.mark.parametrize("entry", entries("InferRequest"))
def test_c38_a_recorded_request_decodes_to_what_its_client_sent(entry: dict[str, Any]) -> None:
    request = decode_request(read(entry))
    assert isinstance(request, InferRequest)
    assert request.config == base64.b64decode(entry["config_base64"])
    assert list(request.input_names) == entry["input_names"]
    assert list(request.output_names) == entry["output_names"]
    assert len(request.tensors) == len(entry["input_tensors"])
    for tensor, expected in zip(request.tensors, entry["input_tensors"], strict=True):
        assert_holds(tensor, expected, entry["file"])


@pytest.mark.parametrize("entry", entries("InferRequest"))
def test_a_recorded_request_that_we_write_again_says_the_same(entry: dict[str, Any]) -> None:
    first = decode_request(read(entry))
    assert isinstance(first, InferRequest)
    buffers = encode_request(first.input_names, first.tensors, first.output_names, first.config)
    again = decode_request(b"".join(buffers))
    assert isinstance(again, InferRequest)
    assert again[:2] == first[:2]
    assert again.output_names == first.output_names
    assert bits(again.tensors) == bits(first.tensors)


@pytest.mark.parametrize("entry", entries("MetadataRequest"))
def test_c09_a_recorded_metadata_request_is_known_as_one(entry: dict[str, Any]) -> None:
    assert decode_request(read(entry)) == MetadataRequest()


@pytest.mark.parametrize("entry", entries("InferResponse"))
def test_a_recorded_reply_decodes_to_what_its_server_sent(entry: dict[str, Any]) -> None:
    reply = decode_response(read(entry))
    assert reply.errors == []
    assert len(reply.tensors) == len(entry["output_tensors"])
    for tensor, expected in zip(reply.tensors, entry["output_tensors"], strict=True):
        assert_holds(tensor, expected, entry["file"])
    again = decode_response(b"".join(encode_response(reply.tensors)))
    assert bits(again.tensors) == bits(reply.tensors)


@pytest.mark.parametrize("entry", entries("MetadataResponse"))
def test_recorded_metadata_decodes_to_a_signature(entry: dict[str, Any]) -> None:
    signature = decode_metadata(read(entry))
    assert (signature.name, signature.server) == (entry["name"], entry["server"])
    assert [spec.name for spec in signature.inputs] == entry["inputs"]
    assert [spec.name for spec in signature.outputs] == entry["outputs"]


@pytest.mark.parametrize("file", DOCUMENTED_ERRORS)
def test_c03_recorded_bytes_that_are_no_message_give_their_documented_error(file: str) -> None:
    with pytest.raises(DecodeError, match=DOCUMENTED_ERRORS[file]):
        decode_request((CAPTURES / file).read_bytes())


def test_every_recorded_message_is_covered_by_one_of_these_promises() -> None:
    covered = sum(
        len(entries(kind)) for kind in ("InferRequest", "MetadataRequest", "InferResponse", "MetadataResponse")
    )
    assert covered + len(DOCUMENTED_ERRORS) == len(MANIFEST)


@pytest.mark.parametrize("file", [entry["file"] for entry in MANIFEST if entry["bytes"]])
@pytest.mark.parametrize("offset", range(1, 8))
def test_c37_recorded_messages_decode_alike_at_any_address(file: str, offset: int) -> None:
    message = (CAPTURES / file).read_bytes()
    decode: Any = {"req": decode_request, "reply": decode_response, "replymeta": decode_metadata}[file.split("-")[0]]
    moved = memoryview(bytearray(offset) + message)[offset:]
    assert outcome(decode, moved) == outcome(decode, message)


def outcome(decode: Any, message: bytes | memoryview) -> str:
    try:
        return repr(decode(message))
    except DecodeError as error:
        return str(error)
