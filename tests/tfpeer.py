"""What the tests of the TensorFlow kernel share: models served over real sockets, and fresh processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from remote_ops import FunctionServable, TensorSpec

ROOT = Path(__file__).parents[1]
MATRIX = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)


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


def python(code: str, *argv: str, timeout_s: float = 90.0) -> subprocess.CompletedProcess[str]:
    """Run code in a new process."""
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
