"""Differentiable models that note what they are asked, served over real sockets, each beside its twin in torch."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import server_ref
from remote_ops import Deadline, FunctionServable, TensorSpec

ROOT = Path(__file__).parents[1]
_MATRIX = np.random.default_rng(0).standard_normal((4, 4))


class Asked(NamedTuple):
    """One call, as the model saw it: the names of what came, the names of what was wanted, and the rows."""

    given: tuple[str, ...]
    wanted: tuple[str, ...]
    rows: int


class Noted(FunctionServable):
    """A function as a servable, with `calls`: what it was asked, in order."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.calls: list[Asked] = []

    def infer(
        self,
        inputs: Mapping[str, Any],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> dict[str, Any]:
        wanted = tuple(outputs or [output.name for output in self.signature.outputs])
        first = next(iter(inputs.values()), np.empty(()))
        self.calls.append(Asked(tuple(inputs), wanted, first.shape[0] if first.ndim else 0))
        return super().infer(inputs, outputs, config=config, deadline=deadline)

    @property
    def counts(self) -> tuple[int, int]:
        """How many calls for outputs came, and how many for gradients."""
        backwards = sum(asked.wanted[0].startswith("gradient:") for asked in self.calls)
        return len(self.calls) - backwards, backwards


def spec(name: str, dtype: str = "float32", shape: tuple[int, ...] | None = (-1, 4), **options: Any) -> TensorSpec:
    return TensorSpec(name, dtype, shape, **options)


def mix(dtype: str = "float32", **options: Any) -> Noted:
    """`sin(x) @ M`: a Jacobian that is neither diagonal nor constant."""

    def forward(x: Any) -> Any:
        return (np.sin(x.astype(np.float64)) @ _MATRIX).astype(x.dtype)

    def vjp(inputs: Any, cotangents: Any) -> Any:
        x = inputs["x"].astype(np.float64)
        return {"x": (cotangents["y"].astype(np.float64) @ _MATRIX.T * np.cos(x)).astype(inputs["x"].dtype)}

    return Noted(
        forward, [spec("x", dtype, differentiable=True)], [spec("y", dtype)], name="mix", **{"vjp": vjp, **options}
    )


def mix_twin(x: torch.Tensor) -> torch.Tensor:
    """The same in torch."""
    return torch.sin(x) @ torch.from_numpy(_MATRIX).to(x)


def pair(dtype: str = "float32") -> Noted:
    """`(a * b, a + sin(b))`, from a and b."""

    def vjp(inputs: Any, cotangents: Any) -> Any:
        a, b = inputs["a"], inputs["b"]
        product, total = cotangents.get("product", np.zeros_like(a)), cotangents.get("total", np.zeros_like(a))
        return {"a": product * b + total, "b": product * a + total * np.cos(b)}

    return Noted(
        lambda a, b: (a * b, a + np.sin(b)),
        [spec("a", dtype, differentiable=True), spec("b", dtype, differentiable=True)],
        [spec("product", dtype), spec("total", dtype)],
        name="pair",
        vjp=vjp,
    )


def pair_twin(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in torch."""
    return a * b, a + torch.sin(b)


def matmul(dtype: str = "float32") -> Noted:
    """`x @ w`, where w has no rows: its gradient sums over those of x."""
    return Noted(
        lambda x, w: x @ w,
        [spec("x", dtype, differentiable=True), spec("w", dtype, (4, 3), differentiable=True)],
        [spec("y", dtype, (-1, 3))],
        name="matmul",
        vjp=lambda inputs, cotangents: {
            "x": cotangents["y"] @ inputs["w"].T,
            "w": inputs["x"].T @ cotangents["y"],
        },
    )


class Served:
    """Models behind a server: `url(name)` and `model(name)`."""

    def __init__(self, base: str, models: Mapping[str, Any]) -> None:
        self._base = base
        self._models = models

    def url(self, name: str) -> str:
        return f"{self._base}{name}"

    def __getitem__(self, name: str) -> Any:
        return self._models[name]

    def forget(self) -> None:
        """Forget the calls so far."""
        for model in self._models.values():
            model.calls.clear()


@contextlib.contextmanager
def served(models: Mapping[str, Any], listen: str = "127.0.0.1:0") -> Iterator[Served]:
    """Serve two models or more."""
    with server_ref.running(models, listen) as base:
        yield Served(base, models)


def free_address() -> str:
    """An address where nobody listens yet."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def value_and_gradients(call: Callable[..., Any], *inputs: torch.Tensor) -> tuple[list[Any], list[Any]]:
    """The outputs for these inputs, and the gradients of a weighted sum of all of them."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = call(*leaves)
    outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    loss = sum((y * torch.linspace(1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum() for y in outputs)
    loss.backward()
    return [y.detach() for y in outputs], [x.grad for x in leaves]


def agree(got: Callable[..., Any], right: Callable[..., Any], *inputs: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Check that two functions have the same values and gradients for these inputs."""
    for mine, twin in zip(value_and_gradients(got, *inputs), value_and_gradients(right, *inputs), strict=True):
        torch.testing.assert_close(mine, twin, rtol=tolerance, atol=tolerance)


def python(code: str, *argv: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run code in a new process."""
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
