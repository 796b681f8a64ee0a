"""What holds only where there is a GPU: `pytest -m gpu` on such a machine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import server_ref
from remote_ops import Endpoint, FunctionServable, SpecError, TensorSpec
from remote_ops.onnx import OnnxModel
from remote_ops.torch import RemoteModule
from remote_ops.torch.model import TorchModel
from remote_ops.torch.tensors import arrays_of, tensor_of

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


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 8))


@needs_torch_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7)])
def test_arrays_reach_cuda_and_come_back_as_they_were(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = [torch.ones(shape).to(dtype), torch.zeros(shape).to(dtype)]
    device = torch.device("cuda", 0)
    moved = [tensor_of(array, device) for array in arrays_of(tensors)]
    assert all(tensor.device == device and tensor.dtype == dtype for tensor in moved)
    for sent, array in zip(tensors, arrays_of([*moved, tensors[0]]), strict=False):
        assert array.shape == shape
        np.testing.assert_array_equal(array.astype(float), sent.double().numpy())


@needs_torch_cuda
def test_a_torch_model_on_cuda_answers_and_differentiates_as_on_the_cpu_from_many_threads() -> None:
    module = network()
    on_gpu, on_cpu = (TorchModel(module, inputs="x: float32 [-1, 64]", device=device) for device in ("cuda", "cpu"))
    assert (on_gpu.device, on_gpu.concurrency, on_gpu.never_waits) == ("cuda:0", 2, False)
    assert all(parameter.device.type == "cpu" for parameter in module.parameters())
    rng = np.random.default_rng(0)
    work = [
        {
            "x": rng.normal(size=(rows, 64)).astype(np.float32),
            "cotangent:output": rng.normal(size=(rows, 8)).astype(np.float32),
        }
        for rows in [0, 1, 3, 100] * 8
    ]
    wanted = ["output", "gradient:x"]
    on_gpu.concurrency = 8
    with server_ref.running({"m": on_gpu}) as url, ThreadPoolExecutor(8) as pool:
        endpoint = Endpoint(url)
        answers = list(pool.map(lambda sent: endpoint.infer(sent, wanted), work))
    for sent, answer in zip(work, answers, strict=True):
        expected = on_cpu.infer(sent, wanted)
        for name in wanted:
            np.testing.assert_allclose(answer[name], expected[name], rtol=1e-3, atol=1e-3)


@needs_torch_cuda
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_torch_model_on_cuda_computes_in_half_precision_and_nobody_sees_but_precision(dtype: str) -> None:
    module, x = network(), np.ones((4, 64), np.float32)
    half = TorchModel(module, inputs="x: float32 [-1, 64]", device="cuda", dtype=dtype)
    plain = TorchModel(module, inputs="x: float32 [-1, 64]", device="cpu")
    sent = {"x": x, "cotangent:output": np.ones((4, 8), np.float32)}
    got, expected = (model.infer(sent, ["output", "gradient:x"]) for model in (half, plain))
    for name, array in got.items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected[name], atol=0.05)


@needs_torch_cuda
def test_a_program_exported_on_the_cpu_runs_on_cuda(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.arange(4)  # which names its device

    program = torch.export.export(Counting(), (torch.ones(2, 4),))
    torch.export.save(program, tmp_path / "counting.pt2")
    for model in (TorchModel(tmp_path / "counting.pt2", device="cuda"), TorchModel(program, device="cuda")):
        assert model.device == "cuda:0"
        np.testing.assert_array_equal(model.infer({"x": np.zeros((2, 4), np.float32)})["output"][1], [0, 1, 2, 3])
    program.module()(torch.ones(2, 4))


@needs_torch_cuda
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(SpecError, match="no working CUDA for 'cuda:99'"):
        TorchModel(network(), inputs="x: float32 [-1, 64]", device="cuda:99")
