"""Other people's Open Inference Protocol software, run by an interpreter of its own: see `make peers`.

`serve PORT` is a KServe model server whose models answer with what they get; `oracle` builds and parses messages with
`tritonclient`; `calls HOST:PORT` calls a server with `tritonclient` and the SDK of KServe: one JSON object a line in,
one out. It imports nothing of ours.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from typing import Any

import numpy as np

# BF16 is not KServe's: its codec knows no such type.
KSERVE = (
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BYTES",
)


def serve(port: int) -> None:
    """Serve an identity model per datatype, `pair` (two inputs, two outputs) and `fails`, until killed."""
    from kserve import InferOutput, InferResponse, Model, ModelServer
    from kserve.errors import InvalidInput

    class Served(Model):  # type: ignore[misc]
        def __init__(self, name: str, datatype: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
            super().__init__(name)
            self.datatype, self.inputs, self.outputs = datatype, inputs, outputs
            self.ready = True

        def rows(self, names: tuple[str, ...]) -> list[dict[str, Any]]:
            return [{"name": name, "datatype": self.datatype, "shape": [-1, 2]} for name in names]

        async def get_input_types(self) -> list[dict[str, Any]]:
            return self.rows(self.inputs)

        async def get_output_types(self) -> list[dict[str, Any]]:
            return self.rows(self.outputs)

        def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
            given = {tensor.name: tensor.as_numpy() for tensor in payload.inputs}
            if self.name == "fails":
                raise InvalidInput("no such thing")
            results = [given["x"]] if self.outputs == ("y",) else [given["a"] + given["b"], given["a"] - given["b"]]
            answers = []
            for name, array in zip(self.outputs, results, strict=True):
                answer = InferOutput(name, list(array.shape), self.datatype)
                answer.set_data_from_numpy(array, binary_data=True)
                answers.append(answer)
            return InferResponse(
                payload.id or "1",
                self.name,
                answers,
                use_binary_outputs=payload.use_binary_outputs,
                requested_outputs=payload.request_outputs,
            )

    models = [Served(datatype, datatype, ("x",), ("y",)) for datatype in KSERVE]
    models += [Served("pair", "FP32", ("a", "b"), ("sum", "difference")), Served("fails", "FP32", ("x",), ("y",))]
    ModelServer(http_port=port, enable_grpc=False, workers=1).start(models)


def unpacked(row: dict[str, Any]) -> np.ndarray[Any, Any]:
    """An array as the pipe carries it: its bytes, or a list of byte strings; base64."""
    if row["datatype"] == "BYTES":
        array = np.empty(len(row["items"]), object)
        array[:] = [base64.b64decode(item) for item in row["items"]]
        return array.reshape(row["shape"])
    from tritonclient.utils import triton_to_np_dtype

    return np.frombuffer(base64.b64decode(row["data"]), triton_to_np_dtype(row["datatype"])).reshape(row["shape"])


def packed(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"shape": list(array.shape)}
    if array.dtype == object:
        items = [item.encode() if isinstance(item, str) else item for item in array.ravel().tolist()]
        return row | {"items": [base64.b64encode(item).decode() for item in items]}
    return row | {"data": base64.b64encode(array.tobytes()).decode()}


def parts(question: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Inputs and wanted outputs as `tritonclient` takes them."""
    from tritonclient.http import InferInput, InferRequestedOutput

    inputs = []
    for row in question["inputs"]:
        tensor = InferInput(row["name"], row["shape"], row["datatype"])
        tensor.set_data_from_numpy(unpacked(row), binary_data=question["binary"])
        inputs.append(tensor)
    return inputs, [InferRequestedOutput(name, binary_data=question["binary"]) for name in question["outputs"]]


def build(question: dict[str, Any]) -> dict[str, Any]:
    """A request as `tritonclient` writes it."""
    from tritonclient.http import InferenceServerClient

    inputs, outputs = parts(question)
    body, size = InferenceServerClient.generate_request_body(
        inputs, outputs=outputs or None, request_id=question.get("id", ""), parameters=question.get("parameters")
    )
    return {"body": base64.b64encode(body).decode(), "json_bytes": size}


def parse(question: dict[str, Any]) -> dict[str, Any]:
    """A reply as `tritonclient` reads it."""
    from tritonclient.http import InferResult

    body = base64.b64decode(question["body"])
    result = InferResult.from_response_body(body, header_length=question["json_bytes"])
    names = [row["name"] for row in result.get_response()["outputs"]]
    return {name: packed(result.as_numpy(name)) for name in names}


def oracle() -> None:
    """Answer each line of the input: `build` for a question with inputs, `parse` for one with a body."""
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(build(question) if "inputs" in question else parse(question)), flush=True)


# --------------------------------------------------------------------------- calls


def answer_of(result: Any) -> Any:
    """What a call came to, as JSON: the reply to an inference with its tensors, or what the method gave."""
    if not hasattr(result, "as_numpy"):
        return result
    reply = result.get_response()
    tensors = {row["name"]: packed(result.as_numpy(row["name"])) for row in reply["outputs"]}
    return {key: value for key, value in reply.items() if key != "outputs"} | {"tensors": tensors}


def arguments_of(question: dict[str, Any]) -> dict[str, Any]:
    given = dict(question.get("arguments", {}))
    if "inputs" in question:
        inputs, outputs = parts(question)
        given |= {"inputs": inputs, "outputs": outputs or None}
    return given


def call_sync(url: str, question: dict[str, Any]) -> Any:
    from tritonclient.http import InferenceServerClient

    with InferenceServerClient(url) as client:
        result = getattr(client, question["method"])(**arguments_of(question))
        return answer_of(result.get_result() if question["method"] == "async_infer" else result)


async def call_aio(url: str, question: dict[str, Any]) -> Any:
    from tritonclient.http.aio import InferenceServerClient

    async with InferenceServerClient(url) as client:
        return answer_of(await getattr(client, question["method"])(**arguments_of(question)))


async def call_kserve(url: str, question: dict[str, Any]) -> Any:
    from kserve import InferenceRESTClient, InferInput, InferRequest
    from kserve.inference_client import RESTConfig
    from kserve.protocol.infer_type import RequestedOutput

    client = InferenceRESTClient(RESTConfig(protocol=question.get("protocol", "v2")))
    try:
        arguments = dict(question.get("arguments", {}))
        if "inputs" in question:
            inputs = []
            for row in question["inputs"]:
                tensor = InferInput(row["name"], row["shape"], row["datatype"])
                tensor.set_data_from_numpy(unpacked(row), binary_data=question["binary"])
                inputs.append(tensor)
            parameters = {"binary_data_output": question["binary"]}
            outputs = [RequestedOutput(name, {"binary_data": question["binary"]}) for name in question["outputs"]]
            arguments["data"] = InferRequest(
                arguments["model_name"], inputs, "7", parameters=parameters, request_outputs=outputs or None
            )
        result = await getattr(client, question["method"])(f"http://{url}/", **arguments)
    finally:
        await client.close()
    if not hasattr(result, "outputs"):
        return result
    tensors = {tensor.name: packed(tensor.as_numpy()) for tensor in result.outputs}
    return {"id": result.id, "model_name": result.model_name, "tensors": tensors}


def calls(url: str) -> None:
    """Make the call that each line of the input tells of, at `url`, and print what it came to or what it raised."""
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if question["client"] == "sync":
                said = {"gave": call_sync(url, question)}
            else:
                call = call_aio if question["client"] == "aio" else call_kserve
                said = {"gave": asyncio.run(call(url, question))}
        except Exception as error:
            said = {"raised": type(error).__name__, "message": str(error)}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    elif sys.argv[1] == "calls":
        calls(sys.argv[2])
    else:
        oracle()
