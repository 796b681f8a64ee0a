"""What the benchmarks serve: as little computing as can be, so that what is measured is the way there and back."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from remote_ops import FunctionServable, TensorSpec
from remote_ops.onnx import OnnxModel

IMAGE = (224, 224, 3)
FEATURES = (7, 7, 512)
ROWS = 128
FAR_S = 0.2


def headline() -> FunctionServable:
    """128 pictures up (77.07 MB), 128 feature maps down (12.85 MB); the answer is ready beforehand."""
    answer = np.random.default_rng(0).random((ROWS, *FEATURES), np.float32)
    return FunctionServable(
        lambda images: answer,
        inputs=[TensorSpec("images", "float32", (-1, *IMAGE))],
        outputs=[TensorSpec("features", "float32", (-1, *FEATURES))],
    )


def echo() -> FunctionServable:
    """64 bytes up and down, through a Python function: it may wait for anything, so it runs on a thread."""
    spec = TensorSpec("x", "float32", (-1, 16))
    return FunctionServable(lambda x: x, inputs=[spec], outputs=[TensorSpec("y", "float32", (-1, 16))])


def far() -> FunctionServable:
    """64 bytes up and down, and as many back again as a gradient, 200 ms each."""

    def square(x: np.ndarray) -> np.ndarray:
        time.sleep(FAR_S)
        return x * x

    def vjp(inputs: Mapping[str, np.ndarray], cotangents: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(FAR_S)
        return {"x": 2 * inputs["x"] * cotangents["y"]}

    x = TensorSpec("x", "float32", (-1, 16), differentiable=True)
    servable = FunctionServable(square, [x], [TensorSpec("y", "float32", (-1, 16))], vjp=vjp)
    servable.concurrency = 16  # type: ignore[attr-defined]
    return servable


def convolution() -> object:
    """A stack of 7 x 7 convolutions over 64 x 64 pictures, on CUDA."""
    from remote_ops.torch import TorchModel

    return TorchModel(convolution_module(), inputs="pictures: float32 [-1, 3, 64, 64]", device="cuda")


def convolution_module() -> object:
    """The same as a module."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = [layer for size in (3, 64, 64, 64) for layer in (nn.Conv2d(size, 64, 7, padding=3), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


def double() -> OnnxModel:
    """64 bytes up and down, through an ONNX model: it only computes, so a quick run stays on the server's loop."""
    from onnx import TensorProto, helper

    def value(name: str) -> object:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 16])

    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [value("x")], [value("y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return OnnxModel(model.SerializeToString(), name="double", threads=1)


def magika() -> OnnxModel:
    """The trained file-type model, one thread a run."""
    from importlib.resources import files

    return OnnxModel(files("magika") / "models/standard_v3_3/model.onnx", threads=1)
