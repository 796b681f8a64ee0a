"""What the tests of the TensorFlow kernel share: models served over real sockets, and fresh processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rawpeer import Conversation, Message

from remote_ops import FunctionServable, Retry, TensorSpec
from remote_ops.graphpipe import encode_error, encode_response

ROOT = Path(__file__).parents[1]
MATRIX = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
X = np.arange(12, dtype=np.float32).reshape(3, 4) / 7
OK = b"".join(encode_response([X]))
ONE = Retry(attempts=1)
Script = Callable[[Conversation], None]


def mix() -> FunctionServable:
    """`sin(x) @ M`: a Jacobian that is neither diagonal nor constant."""
    return FunctionServable(
        lambda x: np.sin(x) @ MATRIX,
        [TensorSpec("x", "float32", (-1, 4), differentiable=True)],
        [TensorSpec("y", "float32", (-1, 4))],
        name="mix",
        vjp=lambda inputs, cotangents: {"x": (cotangents["y"] @ MATRIX.T) * np.cos(inputs["x"])},
    )


def scaled() -> FunctionServable:
    """`(x * n, x + w)`, from x, a whole number n and w."""

    def vjp(inputs: Any, cotangents: Any) -> Any:
        zero = np.zeros_like(inputs["x"])
        product, total = cotangents.get("product", zero), cotangents.get("total", zero)
        return {"x": product * np.float32(inputs["n"]) + total, "w": total}

    return FunctionServable(
        lambda x, n, w: (x * np.float32(n), x + w),
        [
            TensorSpec("x", "float32", (-1,), differentiable=True),
            TensorSpec("n", "int64", ()),
            TensorSpec("w", "float32", (-1,), differentiable=True),
        ],
        [TensorSpec("product", "float32", (-1,)), TensorSpec("total", "float32", (-1,))],
        name="scaled",
        vjp=vjp,
    )


def echo(dtype: str) -> FunctionServable:
    """What came in, of any shape of rank 1."""
    return FunctionServable(
        lambda x: x, [TensorSpec("x", dtype, (-1,))], [TensorSpec("y", dtype, (-1,))], name=f"echo-{dtype}"
    )


def answering(*parts: Any, seen: list[Message] | None = None) -> Script:
    """Answer every request with the body and the status given."""

    def script(conversation: Conversation) -> None:
        while (request := conversation.read()) is not None:
            if seen is not None:
                seen.append(request)
            conversation.answer(*parts)

    return script


def models() -> dict[str, FunctionServable]:
    """All of the above by name, and `echo` by its dtype."""
    echoed = ("bool", "bfloat16", "float8_e5m2", "string", "float16", "uint8", "int64", "float64", "uint32")
    return {"mix": mix(), "scaled": scaled(), **{dtype: echo(dtype) for dtype in echoed}}


def python(code: str, *argv: str, timeout_s: float = 90.0) -> subprocess.CompletedProcess[str]:
    """Run code in a new process."""
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)


# What a server answers, and what every form of the op makes of it: the class in tf.errors, a pattern of its words, and
# how often it is sent, of three times at most.
HTML = b"<html><h1>Bad gateway</h1></html>"
FAULTS = [
    ("code 3", (encode_error(3, "bad input"), "400 Bad Request"), "InvalidArgumentError", "bad input - from", 1),
    ("code 4", (encode_error(4, "too late"), "504 Gateway Timeout"), "DeadlineExceededError", "too late", 1),
    ("code 5", (encode_error(5, "no such model"), "404 Not Found"), "NotFoundError", "no such model", 1),
    ("code 8", (encode_error(8, "queue full"), "429 Too Many Requests"), "ResourceExhaustedError", "queue full", 3),
    ("code 12", (encode_error(12, "no gradient"), "501 Not Implemented"), "UnimplementedError", "no gradient", 1),
    ("code 13", (encode_error(13, "it broke"), "500 Internal"), "InternalError", "it broke", 1),
    ("code 14", (encode_error(14, "loading"), "503 Unavailable"), "UnavailableError", "loading", 3),
    ("code 14 at 200", (encode_error(14, "loading"),), "UnavailableError", "loading", 3),
    ("code 77", (encode_error(77, "what?"), "500 Internal"), "UnknownError", "what.*77", 1),
    ("502", (HTML, "502 Bad Gateway", "Content-Type: text/html"), "UnavailableError", "answered 502: Bad gateway", 3),
    ("503", (b"", "503 Unavailable"), "UnavailableError", "answered 503", 3),
    ("504", (b"", "504 Gateway Timeout"), "DeadlineExceededError", "answered 504", 1),
    ("429", (b"", "429 Too Many Requests"), "ResourceExhaustedError", "answered 429", 3),
    ("go", (b"no input", "400 Bad Request", "Content-Type: text/plain"), "InvalidArgumentError", "400: no input", 1),
    ("401", (b"", "401 Unauthorized"), "UnauthenticatedError", "headers=", 1),
    ("403", (b"", "403 Forbidden"), "PermissionDeniedError", "headers=", 1),
    ("404", (b"", "404 Not Found"), "NotFoundError", "answered 404", 1),
    ("301", (b"", "301 Moved", "Location: http://new/m?key=1"), "InternalError", "moved to 'http://new/m'", 1),
    ("empty", (b"",), "InternalError", "answered 200 with an empty body", 1),
    ("html", (HTML, "200 OK", "Content-Type: text/html"), "InternalError", "200: Bad gateway: expected a GraphPipe", 1),
    ("garbage", (b"\xff" * 64,), "InternalError", "is no GraphPipe message: .* at byte", 1),
    ("cut", (OK[:-1],), "InternalError", "is no GraphPipe message: .*runs past the end", 1),
    ("no outputs", (b"".join(encode_response([])),), "InternalError", "expected 1 outputs, got 0 - from", 1),
    ("dtype", (b"".join(encode_response([X.astype("f8")])),), "InternalError", r"float32 of any.* float64 \[3, 4\]", 1),
]
