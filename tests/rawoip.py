"""A server of the Open Inference Protocol for tests, written by hand: without a line of our codec."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from rawpeer import Conversation, Message

Array = npt.NDArray[Any]
Answer = Callable[[Conversation, Message], None]

WHOLE = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
NUMPY: dict[str, Any] = {name.upper(): np.dtype(name) for name in ("bool", *WHOLE)}
NUMPY |= {"FP16": np.dtype("f2"), "FP32": np.dtype("f4"), "FP64": np.dtype("f8"), "BYTES": np.dtype(object)}
NUMPY |= {"BF16": np.dtype(ml_dtypes.bfloat16)}
JSON, BINARY = "application/json", "application/octet-stream"


def tensors_of(message: Message) -> tuple[dict[str, Any], dict[str, Array]]:
    """The text of a request and its tensors, in whichever form."""
    size = int(message.headers.get("inference-header-content-length", len(message.body)))
    text, at, found = json.loads(message.body[:size]), size, {}
    for row in text["inputs"]:
        dtype, count = NUMPY[row["datatype"]], row.get("parameters", {}).get("binary_data_size")
        if count is None:
            array = np.array([item.encode() for item in row["data"]] if dtype.hasobject else row["data"], dtype)
        elif dtype.hasobject:
            array = np.array(split(message.body[at : at + count]), object)
        else:
            array = np.frombuffer(message.body[at : at + count], dtype)
        found[row["name"]], at = array.reshape(row["shape"]), at + (count or 0)
    assert at == len(message.body)
    return text, found


def split(data: bytes) -> list[bytes]:
    items = []
    while data:
        size = int.from_bytes(data[:4], "little")
        items.append(data[4 : 4 + size])
        data = data[4 + size :]
    return items


def reply(conversation: Conversation, results: dict[str, tuple[str, Array]], *, binary: bool) -> None:
    rows, tail = [], b""
    for name, (datatype, array) in results.items():
        row: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        items = array.ravel().tolist()
        if binary:
            data = array.tobytes()
            if datatype == "BYTES":
                data = b"".join(len(item).to_bytes(4, "little") + item for item in items)
            row["parameters"], tail = {"binary_data_size": len(data)}, tail + data
        elif datatype == "BYTES":
            row["data"] = [item.decode() for item in items]
        else:
            row["data"] = array.astype("f8").ravel().tolist() if datatype == "BF16" else items
        rows.append(row)
    head = json.dumps({"model_name": "m", "outputs": rows}).encode()
    more = [f"Inference-Header-Content-Length: {len(head)}"] if binary else []
    conversation.answer(head + tail, "200 OK", f"Content-Type: {BINARY if binary else JSON}", *more)


class Model:
    """A model at a peer: what it says of itself, what it makes of tensors, and what it saw."""

    def __init__(self, rows: dict[str, Any], answer: Answer) -> None:
        self.metadata = json.dumps({"name": "m", "versions": ["1"], "platform": "test", **rows}).encode()
        self.answer = answer
        self.seen: list[Message] = []

    def __call__(self, conversation: Conversation) -> None:
        while (message := conversation.read()) is not None:
            self.seen.append(message)
            if message.first_line.startswith("GET"):
                conversation.answer(self.metadata, "200 OK", f"Content-Type: {JSON}")
            else:
                self.answer(conversation, message)

    @property
    def lines(self) -> list[str]:
        return [message.first_line.removesuffix(" HTTP/1.1") for message in self.seen]

    @property
    def kinds(self) -> list[str]:
        """The types of the bodies that were posted."""
        return [message.headers["content-type"] for message in self.seen if message.first_line.startswith("POST")]


def sides(datatype: str, **parameters: Any) -> dict[str, Any]:
    row = {"datatype": datatype, "shape": [-1, 2], **({"parameters": parameters} if parameters else {})}
    return {"inputs": [{"name": "x", **row}], "outputs": [{"name": "y", "datatype": datatype, "shape": [-1, 2]}]}


def echo(datatype: str = "FP32", *, binary: bool = True) -> Answer:
    return lambda conversation, message: reply(
        conversation, {"y": (datatype, tensors_of(message)[1]["x"])}, binary=binary
    )


def doubling(conversation: Conversation, message: Message) -> None:
    text, given = tensors_of(message)
    results = {"y": given["x"] * 2, "gradient:x": given.get("cotangent:y", given["x"]) * 2}
    wanted = [row["name"] for row in text["outputs"]]
    reply(conversation, {name: ("FP32", results[name]) for name in wanted}, binary=True)
