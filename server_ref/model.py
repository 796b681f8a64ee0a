"""One served model: what it says of itself, and one checked call of it.

It does not know connections or routes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy.typing as npt

from remote_ops import graphpipe
from remote_ops.deadline import Deadline
from remote_ops.errors import (
    CodecError,
    ConnectError,
    ConnectionLost,
    EncodeError,
    FramingError,
    InternalError,
    ModelUnavailable,
    SignatureError,
    SpecError,
)
from remote_ops.servable import Servable
from remote_ops.signature import DTYPES, Signature, TensorSpec
from server_ref.instances import Lanes, room_for

__all__ = ["Model", "Run", "name_inputs"]

Array = npt.NDArray[Any]
Buffer: TypeAlias = "bytes | bytearray | memoryview"
_QUICK_S = 100e-6
_QUICK_BYTES = 1 << 16


class Model:
    """One servable under its name, with what it answers about itself, built once."""

    def __init__(self, name: str, servable: Servable) -> None:
        self.name = name
        self.servable = servable
        self.signature = _served_signature(name, servable.signature)
        self.metadata = graphpipe.encode_metadata(self.signature)
        self.metadata_json = json.dumps(_json_metadata(self.signature), indent=4).encode()
        self.ainfer: Callable[..., Awaitable[dict[str, Array]]] | None = getattr(servable, "ainfer", None)
        self.lanes = Lanes(name or "model", room_for(servable))
        self.awaited = 0
        self._never_waits = bool(getattr(servable, "never_waits", False))
        self._recent_run_s = math.inf

    def ran(self, seconds: float) -> None:
        """Take note of how long a run took: the longest of late counts, and fades."""
        self._recent_run_s = max(seconds, min(self._recent_run_s * 0.9, 1.0))

    def fits_on_loop(self, request_bytes: int) -> bool:
        """Whether handing the run to a thread would cost more than the run: it only computes, and is known as quick."""
        return self._never_waits and self._recent_run_s < _QUICK_S and request_bytes < _QUICK_BYTES


def _served_signature(name: str, signature: Signature) -> Signature:
    features = signature.features
    if "vjp" not in features and any(spec.differentiable for spec in signature.inputs):
        features = (*features, "vjp")
    return replace(signature, name=signature.name or name, server="remote-ops server_ref", features=features)


def _json_metadata(signature: Signature) -> dict[str, Any]:
    """Metadata under the keys that the 2018 servers use; types are numbers."""

    def ios(specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
        return [
            {
                "Name": spec.name,
                "Description": spec.description,
                "Shape": None if spec.shape is None else list(spec.shape),
                "Type": DTYPES[spec.dtype].wire_type if spec.dtype in DTYPES else 0,
            }
            for spec in specs
        ]

    return {
        "Name": signature.name,
        "Version": signature.version,
        "Server": signature.server,
        "Description": signature.description,
        "Inputs": ios(signature.inputs),
        "Outputs": ios(signature.outputs),
    }


def name_inputs(signature: Signature, request: graphpipe.InferRequest) -> dict[str, Array]:
    """Give each tensor of a request its name: the one it goes by, else that of the input at its place.

    Raises:
        SignatureError: more names or tensors than can be told apart.
    """
    names, tensors = request.input_names, request.tensors
    if len(names) > len(tensors):
        # The Go batcher names every tensor twice.
        if names[: len(tensors)] * 2 != names:
            raise SignatureError(f"expected a name per tensor: got {len(names)} names for {len(tensors)} tensors")
        names = names[: len(tensors)]
    names = (*names, *[""] * (len(tensors) - len(names)))
    if not all(names[len(signature.inputs) :]):
        expected = ", ".join(spec.name for spec in signature.inputs)
        raise SignatureError(f"expected {len(signature.inputs)} inputs ({expected}), got {len(tensors)}")
    given = [name or signature.inputs[index].name for index, name in enumerate(names)]
    if len(set(given)) != len(given):
        raise SignatureError(f"an input is given twice: {', '.join(given)}")
    return dict(zip(given, tensors, strict=True))


class Run(NamedTuple):
    """One checked call of a model: what runs on a lane."""

    model: Model
    arrays: dict[str, Array]
    wanted: tuple[TensorSpec, ...]
    config: bytes
    deadline: Deadline

    @property
    def names(self) -> list[str]:
        """The outputs asked for, in order."""
        return [spec.name for spec in self.wanted]

    def outcome(self) -> list[Buffer] | BaseException:
        """The buffers of the answer, or what went wrong."""
        try:
            self.deadline.require(f"model '{self.model.name}'")
            since = time.perf_counter()
            results = self.model.servable.infer(self.arrays, self.names, config=self.config, deadline=self.deadline)
            self.model.ran(time.perf_counter() - since)
            return self.encoded(results)
        except BaseException as error:  # whatever a model raises, its lane and its caller go on
            return self.blamed(error)

    async def aoutcome(self) -> list[Buffer] | BaseException:
        """The same for a servable that can be awaited."""
        try:
            self.deadline.require(f"model '{self.model.name}'")
            assert self.model.ainfer is not None
            results = await self.model.ainfer(self.arrays, self.names, config=self.config, deadline=self.deadline)
            return self.encoded(results)
        except BaseException as error:
            return self.blamed(error)

    def blamed(self, error: BaseException) -> BaseException:
        """What a model failed with, as its caller should see it: bytes that it could not read were not the caller's."""
        if isinstance(error, CodecError | FramingError):
            return InternalError(f"model '{self.model.name}' got an answer it cannot read: {error}")
        if isinstance(error, ConnectError | ConnectionLost):
            return ModelUnavailable(f"model '{self.model.name}' is out of reach: {error}")
        if isinstance(error, SpecError):
            return InternalError(f"model '{self.model.name}' is not set up to run: {error}")
        return error

    def encoded(self, results: Any) -> list[Buffer]:
        if not isinstance(results, Mapping):
            got = type(results).__name__
            raise InternalError(
                f"model '{self.model.name}' breaks its own signature: expected a dict by name, got a {got}"
            )
        try:
            fitted = self.model.signature.fit_outputs(results, self.wanted)
            return graphpipe.encode_response(list(fitted.values()))
        except (SignatureError, EncodeError) as error:
            raise InternalError(f"model '{self.model.name}' breaks its own signature: {error}") from error
