"""What holds only where there is a GPU: `pytest -m gpu` on such a machine."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import onnxruntime
import pytest
import torch

import server_ref
from remote_ops import Endpoint, FunctionServable, TensorSpec
from remote_ops.onnx import OnnxModel
from remote_ops.torch import RemoteModule

pytestmark = pytest.mark.gpu

needs_torch_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"
)
needs_onnx_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs an NVIDIA GPU and onnxruntime-gpu",
)


@needs_torch_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_a_remote_module_takes_cuda_tensors_and_answers_on_their_device(dtype: torch.dtype) -> None:
    spec = str(dtype).removeprefix("torch.")
    same = FunctionServable(lambda x: x, [TensorSpec("x", spec, (-1, 4))], [TensorSpec("y", spec, (-1, 4))])
    x = torch.tensor([[0, 1, 2, 3]], device="cuda").to(dtype)
    with server_ref.running({"same": same}) as url:
        y = RemoteModule(url)(x)
    assert (y.device, y.dtype) == (x.device, dtype)
    assert torch.equal(x, y)


@needs_onnx_cuda
def test_a_model_on_cuda_says_so_and_agrees_with_the_cpu() -> None:
    path = files("magika") / "models/standard_v3_3/model.onnx"
    on_cpu, on_gpu = OnnxModel(str(path), device="cpu"), OnnxModel(str(path), device="cuda")
    assert on_gpu.device == "cuda:0"
    rows = np.random.default_rng(0).integers(0, 256, (5, 2048), np.int32)
    with server_ref.running({"magika": on_gpu}) as url:
        served = Endpoint(url)(rows)
    np.testing.assert_allclose(served, on_cpu.infer({"bytes": rows})["target_label"], atol=1e-4)
