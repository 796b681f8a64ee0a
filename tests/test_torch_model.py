"""`TorchModel`: what a torch module answers through a servable, gradients included, against torch itself."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import server_ref  # noqa: E402
from remote_ops import (  # noqa: E402
    EncodeError,
    Endpoint,
    InternalError,
    NotDifferentiable,
    Servable,
    SignatureError,
    SpecError,
    TensorSpec,
)
from remote_ops.deadline import Deadline  # noqa: E402
from remote_ops.errors import DeadlineExceeded, InvalidRequest  # noqa: E402
from remote_ops.torch.model import TorchModel  # noqa: E402
from remote_ops.torch.tensors import arrays_of  # noqa: E402

X4 = "x: float32 [-1, 4]"
FLOATS = ["float16", "bfloat16", "float32", "float64"]
RNG = np.random.default_rng(0)


class Mixed(nn.Module):
    """Two float inputs, one of integers; two float outputs by name, one of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Any, word: Any, scale: Any) -> dict[str, Any]:
        mixed = torch.tanh(self.linear(x)) * scale + self.table(word)
        return {"mixed": mixed, "norm": (x * x).sum(1), "best": mixed.argmax(1)}


class Of(nn.Module):
    """A module of a function."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *inputs: Any) -> Any:
        return self.fn(*inputs)


MIXED_INPUTS = [X4, "word: int64 [-1]", "scale: float32 [-1, 1]"]


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return make()


def floats(*shape: int, dtype: str = "float32") -> Any:
    return RNG.normal(size=shape).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def mixed_inputs(rows: int) -> dict[str, Any]:
    return {"x": floats(rows, 4), "word": RNG.integers(0, 5, rows), "scale": floats(rows, 1)}


def local_gradients(model: Any, inputs: Mapping[str, Any], seeds: Mapping[str, Any], of: list[str]) -> dict[str, Any]:
    """What autograd itself says."""
    tensors = {name: torch.tensor(array) for name, array in inputs.items()}
    for name in of:
        tensors[name].requires_grad_()
    found = model(*tensors.values())
    total = sum((found[name] * torch.tensor(seed)).sum() for name, seed in seeds.items())
    gradients = torch.autograd.grad(total, [tensors[name] for name in of], allow_unused=True)
    return {
        name: np.zeros_like(inputs[name]) if gradient is None else gradient.numpy()
        for name, gradient in zip(of, gradients, strict=True)
    }


def test_it_is_a_servable_that_says_what_it_takes_and_gives() -> None:
    model = TorchModel(seeded(Mixed), inputs=MIXED_INPUTS)
    assert isinstance(model, Servable)
    assert str(model.signature) == (
        "(x: float32 [-1, 4], word: int64 [-1], scale: float32 [-1, 1])"
        " -> (mixed: float32 [-1, 3], norm: float32 [-1], best: int64 [-1])"
    )
    assert [spec.differentiable for spec in model.signature.inputs] == [True, False, True]
    assert model.signature.name == "Mixed"
    assert TorchModel(nn.Linear(4, 3), inputs=X4, name="mine").signature.name == "mine"
    assert repr(TorchModel(nn.Linear(4, 3), inputs=X4, device="cpu")) == "TorchModel('Linear', device='cpu')"
    assert model.never_waits is False
    assert model.concurrency >= 1
    model.concurrency = 3  # as --engine-count does


@pytest.mark.parametrize(
    ("fn", "names"),
    [
        (lambda x: x + 1, ["output"]),
        (lambda x: (x + 1,), ["output_0"]),
        (lambda x: [x + 1, x.sum()], ["output_0", "output_1"]),
        (lambda x: {"b": x + 1, "a": x}, ["b", "a"]),
    ],
)
def test_outputs_are_named_by_what_forward_returns(fn: Any, names: list[str]) -> None:
    model = TorchModel(Of(fn), inputs=X4)
    assert [spec.name for spec in model.signature.outputs] == names
    np.testing.assert_array_equal(model.infer({"x": np.ones((1, 4), np.float32)})[names[0]], np.full((1, 4), 2))


def test_sizes_of_outputs_that_follow_the_inputs_are_open() -> None:
    convolution = TorchModel(nn.Conv2d(3, 8, 3, stride=2), inputs="x: float32 [-1, 3, -1, -1]")
    assert convolution.signature.outputs == (TensorSpec("output", "float32", (-1, 8, -1, -1)),)
    pooled = TorchModel(nn.AdaptiveAvgPool2d(2), inputs="x: float32 [-1, 3, -1, -1]")
    assert pooled.signature.outputs == (TensorSpec("output", "float32", (-1, 3, 2, 2)),)
    needs_many = TorchModel(Of(lambda x: x.unfold(1, 200, 1).sum(2)), inputs="x: float32 [-1, -1]")
    assert needs_many.signature.outputs == (TensorSpec("output", "float32", (-1, -1)),)
    sound = TorchModel(Of(lambda x: x.unfold(0, 200, 1).sum(1)), inputs="x: float32 [-1]")
    assert sound.signature.outputs == (TensorSpec("output", "float32", (-1,)),)
    assert TorchModel(nn.Linear(4, 3), inputs="x: float32 [2, 4]").signature.outputs[0].shape == (2, 3)


def test_a_model_that_never_runs_on_zeros_is_given_up_before_it_takes_all_memory() -> None:
    def fail(x: Any) -> Any:
        sizes.append(x.numel())
        raise ValueError("not zeros")

    sizes: list[int] = []
    with pytest.raises(
        SpecError, match=r"fails on zeros, first on 'x' float32 \[2, 3, 32, 32\]: ValueError: not zeros; if"
    ):
        TorchModel(Of(fail), inputs="x: float32 [-1, 3, -1, -1]")
    assert max(sizes) <= 1 << 24


def test_outputs_can_be_said_in_order_and_by_any_name() -> None:
    model = TorchModel(Of(lambda x: (x, x.sum(1))), inputs=X4, outputs=["y: float32 [-1, 4]", "total: float32 [-1]"])
    answer = model.infer({"x": np.ones((2, 4), np.float32)}, ["total"])
    np.testing.assert_array_equal(answer["total"], [4, 4])
    by_key = TorchModel(Of(lambda x: {"a": x, "b": -x}), inputs=X4, outputs="b: float32 [-1, 4]")
    assert [spec.name for spec in by_key.signature.outputs] == ["b"]
    np.testing.assert_array_equal(by_key.infer({"x": np.ones((1, 4), np.float32)})["b"], -np.ones((1, 4)))


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (lambda: nn.Linear(4, 3), {}, r"as in inputs=\['input: float32 \[-1, 3\]'\] - at inputs"),
        (Mixed, {}, r"inputs=\['x: float32 \[-1, 3\]', 'word: float32 \[-1, 3\]', 'scale: float32 \[-1, 3\]'\]"),
        (lambda: nn.Linear(4, 3), {"inputs": "x: string [-1]"}, "expected a dtype that torch has"),
        (lambda: nn.Linear(4, 3), {"inputs": [7]}, "expected a TensorSpec or text"),
        (lambda: nn.Linear(4, 3), {"inputs": "x: float32 [-1, 5]"}, "cannot be multiplied.*say outputs="),
        (lambda: nn.Linear(4, 3), {"inputs": X4, "outputs": []}, "one output or more"),
        (lambda: nn.Linear(4, 3), {"inputs": [TensorSpec("x", "float32", None)]}, "of any shape: expected a shape"),
        (lambda: nn.Linear(4, 3), {"inputs": X4, "outputs": ["a: float32 []", "b: float32 []"]}, "expected 2 outputs"),
        (lambda: nn.Linear(4, 3), {"inputs": X4, "device": "tpu"}, "expected auto, cpu, cuda or cuda:N - at device"),
        (lambda: nn.Linear(4, 3), {"inputs": X4, "device": "cuda:77"}, "no working CUDA for 'cuda:77'.* - at device"),
        (lambda: nn.Linear(4, 3), {"inputs": X4, "dtype": "int8"}, "expected one of bfloat16, bf16, .* - at dtype"),
        (lambda: Of(lambda x: [x, [x]]), {"inputs": X4}, "output 'output_1' is a list: expected a model that returns"),
        (lambda: Of(lambda x: None), {"inputs": X4}, "is a NoneType"),
        (lambda: Of(lambda x: ()), {"inputs": X4}, "returns no tensor"),
        (lambda: Of(lambda x: x.to(torch.complex64)), {"inputs": X4}, "got torch.complex64"),
        (
            lambda: Of(lambda x: x @ torch.ones(4)),
            {"inputs": X4, "dtype": "bf16"},
            "cannot compute in bfloat16: .* - at d",
        ),
        (lambda: 7, {}, "expected a torch module, .*, got a int"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_with_what_to_do(model: Any, options: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        TorchModel(model(), **options)


def test_a_module_is_put_in_eval_mode_and_otherwise_left_alone() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = TorchModel(module, inputs=X4, dtype="bf16")
    assert not module.training
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in module.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    x = floats(3, 4)
    np.testing.assert_array_equal(model.infer({"x": x})["output"], model.infer({"x": x})["output"])


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_gradients_over_the_wire_are_those_of_autograd(rows: int) -> None:
    module = seeded(Mixed)
    inputs = mixed_inputs(rows)
    seeds = {"mixed": floats(rows, 3), "norm": floats(rows)}
    with server_ref.running({"mixed": TorchModel(module, inputs=MIXED_INPUTS)}) as url:
        endpoint = Endpoint(url)
        assert "vjp" in endpoint.signature.features
        for given in (["mixed"], ["norm"], ["mixed", "norm"]):
            chosen = {name: seeds[name] for name in given}
            sent = {**inputs, **{f"cotangent:{name}": seed for name, seed in chosen.items()}}
            for of in (["x"], ["scale", "x"]):
                got = endpoint.infer(sent, [f"gradient:{name}" for name in of])
                expected = local_gradients(module, inputs, chosen, of)
                for name in of:
                    assert got[f"gradient:{name}"].dtype == np.float32
                    np.testing.assert_allclose(got[f"gradient:{name}"], expected[name], rtol=1e-5, atol=1e-6)


def test_outputs_and_gradients_of_one_request_come_from_one_forward_run() -> None:
    runs: list[int] = []

    def noted(x: Any) -> Any:
        runs.append(1)
        return x * x

    model = TorchModel(Of(noted), inputs=X4)
    runs.clear()
    x = floats(2, 4)
    answer = model.infer({"x": x, "cotangent:output": np.ones_like(x)}, ["gradient:x", "output"])
    assert list(answer) == ["gradient:x", "output"]
    np.testing.assert_allclose(answer["gradient:x"], 2 * x)
    np.testing.assert_allclose(answer["output"], x * x)
    assert len(runs) == 1


def test_a_cotangent_that_is_missing_is_zero() -> None:
    module = seeded(Mixed)
    model, inputs = TorchModel(module, inputs=MIXED_INPUTS), mixed_inputs(3)
    np.testing.assert_array_equal(model.infer(inputs, ["gradient:x"])["gradient:x"], np.zeros((3, 4)))
    both = model.infer({**inputs, "cotangent:mixed": floats(3, 3), "cotangent:norm": np.zeros(3, np.float32)}, ["norm"])
    np.testing.assert_allclose(both["norm"], (inputs["x"] ** 2).sum(1), rtol=1e-5)


def test_a_cotangent_of_another_shape_than_the_output_is_refused_by_name() -> None:
    model = TorchModel(seeded(Mixed), inputs=MIXED_INPUTS)
    with pytest.raises(
        SignatureError, match=r"'cotangent:mixed': expected float32 \[3, 3\].*got float32 \[2, 3\]"
    ) as caught:
        model.infer({**mixed_inputs(3), "cotangent:mixed": floats(2, 3)}, ["gradient:x"])
    assert (caught.value.name, caught.value.expected, caught.value.got) == (
        "cotangent:mixed",
        "float32 [3, 3]",
        "float32 [2, 3]",
    )


def test_what_has_no_gradient_is_refused_and_never_a_silent_zero() -> None:
    linear = nn.Linear(4, 3)  # its parameters want gradients, which must not hide that the input is cut off
    with server_ref.running(
        {
            "cut": TorchModel(Of(lambda x: x.detach() * 2), inputs=X4),
            "cut-linear": TorchModel(nn.Sequential(Of(torch.detach), linear), inputs=X4),
            "mixed": TorchModel(seeded(Mixed), inputs=MIXED_INPUTS),
            "counts": TorchModel(Of(lambda x: (x > 0).sum(1)), inputs=X4),
        }
    ) as url:
        x = floats(2, 4)
        for name, seed in (("cut", floats(2, 4)), ("cut-linear", floats(2, 3))):
            with pytest.raises(NotDifferentiable, match="no gradient of 'output' with respect to 'x'"):
                Endpoint(f"{url}{name}").infer({"x": x, "cotangent:output": seed}, ["gradient:x"])
        with pytest.raises(NotDifferentiable, match="'word'"):
            Endpoint(f"{url}mixed").infer(mixed_inputs(2), ["gradient:word"])
        with pytest.raises(NotDifferentiable):
            Endpoint(f"{url}counts").infer({"x": x}, ["gradient:x"])
    model = TorchModel(Of(lambda x: x.detach() * 2), inputs=X4)
    with pytest.raises(NotDifferentiable, match="model 'Of'"):
        model.infer({"x": x, "cotangent:output": x}, ["gradient:x", "output"])


def test_an_input_that_the_output_does_not_hang_on_has_gradient_zero_beside_one_that_it_does() -> None:
    model = TorchModel(Of(lambda a, b: (2 * a, 3 * b)), inputs=["a: float32 [-1]", "b: float32 [-1]"])
    ones = np.ones(2, np.float32)
    got = model.infer({"a": ones, "b": ones, "cotangent:output_0": ones}, ["gradient:a", "gradient:b"])
    np.testing.assert_array_equal(got["gradient:a"], [2, 2])
    np.testing.assert_array_equal(got["gradient:b"], [0, 0])


def test_eight_threads_get_their_own_gradients_and_parameters_get_none() -> None:
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)))
    model = TorchModel(module, inputs=X4)
    model.concurrency = 8
    work = [(floats(3, 4), floats(3, 3)) for _ in range(64)]
    barrier = threading.Barrier(8)
    with server_ref.running({"m": model}) as url, ThreadPoolExecutor(8, initializer=barrier.wait) as pool:
        endpoint = Endpoint(url)
        call = lambda pair: endpoint.infer({"x": pair[0], "cotangent:output": pair[1]}, ["gradient:x"])  # noqa: E731
        answers = list(pool.map(call, work))
    for (x, seed), answer in zip(work, answers, strict=True):
        expected = local_gradients(Of(lambda value: {"y": module(value)}), {"x": x}, {"y": seed}, ["x"])
        np.testing.assert_allclose(answer["gradient:x"], expected["x"], rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in module.parameters())


@contextlib.contextmanager
def no_mode() -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    "mode",
    [no_mode, torch.no_grad, torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["none", "no_grad", "inference_mode", "enable_grad", "autocast"],
)
def test_ambient_modes_of_torch_make_no_difference(mode: Any) -> None:
    module = seeded(Mixed)
    model, inputs = TorchModel(module, inputs=MIXED_INPUTS), mixed_inputs(3)
    sent = {**inputs, "cotangent:mixed": floats(3, 3)}
    expected, gradients = model.infer(inputs), model.infer(sent, ["gradient:x"])
    with mode():
        for name, array in model.infer(inputs).items():
            np.testing.assert_array_equal(array, expected[name])
        np.testing.assert_array_equal(model.infer(sent, ["gradient:x"])["gradient:x"], gradients["gradient:x"])


def test_gradients_are_given_inside_a_custom_op_too_where_autograd_is_off() -> None:
    model = TorchModel(Of(lambda x: x * x), inputs=X4)

    @torch.library.custom_op("made_for_test::pull_back", mutates_args=())
    def pull_back(x: torch.Tensor) -> torch.Tensor:
        array = x.numpy()
        gradient = model.infer({"x": array, "cotangent:output": np.ones_like(array)}, ["gradient:x"])["gradient:x"]
        return torch.from_numpy(gradient)

    x = torch.ones(2, 4)
    torch.testing.assert_close(torch.ops.made_for_test.pull_back(x), 2 * x)


def test_a_module_that_keeps_a_table_from_its_first_call_still_gives_gradients() -> None:
    class Rotary(nn.Module):
        table: Any = None

        def forward(self, x: Any) -> Any:
            if self.table is None or len(self.table) != len(x):
                self.table = torch.arange(1, len(x) + 1)[:, None] * torch.ones(4)
            return x * self.table

    model, x = TorchModel(Rotary(), inputs=X4), floats(7, 4)
    model.infer({"x": x})
    got = model.infer({"x": x, "cotangent:output": np.ones_like(x)}, ["gradient:x"])["gradient:x"]
    np.testing.assert_array_equal(got[:, 0], np.arange(1, 8))


@pytest.mark.parametrize("dtype", FLOATS)
def test_models_of_every_float_answer_and_differentiate_in_it(dtype: str) -> None:
    module = seeded(lambda: nn.Linear(4, 3)).to(getattr(torch, dtype))
    model = TorchModel(module, inputs=f"x: {dtype} [-1, 4]")
    x, seed = floats(5, 4, dtype=dtype), floats(5, 3, dtype=dtype)
    with server_ref.running({"m": model}) as url:
        answer = Endpoint(url).infer({"x": x, "cotangent:output": seed}, ["output", "gradient:x"])
    weight, bias = (tensor.detach().double().numpy() for tensor in (module.weight, module.bias))
    tolerance = {"float16": 1e-2, "bfloat16": 5e-2, "float32": 1e-5, "float64": 1e-12}[dtype]
    assert answer["output"].dtype == answer["gradient:x"].dtype == x.dtype
    wide = x.astype("float64"), seed.astype("float64")
    np.testing.assert_allclose(answer["output"].astype("float64"), wide[0] @ weight.T + bias, atol=tolerance)
    np.testing.assert_allclose(answer["gradient:x"].astype("float64"), wide[1] @ weight, atol=tolerance)


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", "float32"])
def test_a_model_that_computes_in_another_dtype_differs_in_precision_only(dtype: str) -> None:
    module = seeded(Mixed)
    plain, other = (TorchModel(module, inputs=MIXED_INPUTS, dtype=kind) for kind in (None, dtype))
    assert other.signature == plain.signature
    inputs = mixed_inputs(4)
    sent = {**inputs, "cotangent:mixed": floats(4, 3)}
    wanted = ["mixed", "norm", "gradient:x", "gradient:scale"]
    expected, got = plain.infer(sent, wanted), other.infer(sent, wanted)
    for name in wanted:
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], expected[name], atol=0.15, rtol=0.05)
    if dtype != "float32":
        assert any((got[name] != expected[name]).any() for name in wanted)


def test_shapes_that_do_not_go_together_are_the_callers_fault() -> None:
    model = TorchModel(Of(lambda a, b: a + b), inputs=["a: float32 [-1]", "b: float32 [-1]"])
    with server_ref.running({"add": model}) as url:
        with pytest.raises(InvalidRequest, match="size of tensor a"):
            Endpoint(url).infer({"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)})
    with pytest.raises(SignatureError, match=r"'a' float32 \[2\], 'b' float32 \[3\]"):
        model.infer({"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)})


def test_a_model_that_fails_or_breaks_its_signature_is_an_internal_error_of_one_line() -> None:
    def moody(x: Any) -> Any:
        if x.sum() > 0:
            raise KeyError("no luck\nat all")
        return x

    model = TorchModel(Of(moody), inputs=X4)
    with pytest.raises(InternalError, match=r"model 'Of' failed on 'x' float32 \[2, 4\]: KeyError: 'no luck") as caught:
        model.infer({"x": np.ones((2, 4), np.float32)})
    assert "\n" not in str(caught.value)
    shrinks = TorchModel(Of(lambda x: x[x > 0]), inputs="x: float32 [4]")
    with pytest.raises(InternalError, match="broke its own signature"):
        shrinks.infer({"x": np.ones(4, np.float32)})
    fickle = TorchModel(Of(lambda x: x if x.sum() <= 0 else (x, x)), inputs=X4)
    with pytest.raises(InternalError, match="expected 1 outputs"):
        fickle.infer({"x": np.ones((2, 4), np.float32)})
    sparse = TorchModel(Of(lambda x: x if x.sum() <= 0 else x.to_sparse()), inputs=X4)
    with pytest.raises(InternalError, match="sparse"):
        sparse.infer({"x": np.ones((2, 4), np.float32)})


def test_a_deadline_that_has_passed_starts_nothing() -> None:
    ran: list[int] = []
    model = TorchModel(Of(lambda x: ran.append(1) or x), inputs=X4)
    ran.clear()
    with pytest.raises(DeadlineExceeded):
        model.infer({"x": floats(1, 4)}, deadline=Deadline.after(0))
    assert ran == []


@pytest.mark.parametrize("said", [None, ["y: float32 [-1, 4]"]])
def test_a_module_that_writes_to_its_input_does_not_write_to_the_callers(said: Any) -> None:
    model = TorchModel(nn.ReLU(inplace=True), inputs=X4, outputs=said)
    name = model.signature.outputs[0].name
    x = np.full((2, 4), -1, np.float32)
    np.testing.assert_array_equal(model.infer({"x": x})[name], np.zeros((2, 4)))
    np.testing.assert_array_equal(x, np.full((2, 4), -1))
    got = model.infer({"x": -x, f"cotangent:{name}": -x}, ["gradient:x"])["gradient:x"]
    np.testing.assert_array_equal(got, np.ones((2, 4)))


def test_results_share_no_memory_with_inputs_weights_or_each_other() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 4))

        def forward(self, x: Any) -> Any:
            total = x + self.weight
            return x, self.weight, total, total.T

    module = Leaky()
    model = TorchModel(module, inputs="x: float32 [2, 4]")
    x = np.ones((2, 4), np.float32)
    results = list(model.infer({"x": x}).values())
    for index, result in enumerate(results):
        result += 1
        assert not any(np.shares_memory(result, other) for other in [x, *results[:index]])
    assert (x == 1).all()
    assert bool((module.weight == 1).all())
    seed = np.ones((2, 4), np.float32)
    gradient = model.infer({"x": x, "cotangent:output_0": seed}, ["gradient:x"])["gradient:x"]
    assert not np.shares_memory(gradient, seed)


def test_an_array_that_is_read_only_strided_or_of_foreign_byte_order_is_taken() -> None:
    model = TorchModel(Of(lambda x: x + 1), inputs=X4)
    x = floats(6, 4)
    frozen = x.copy()
    frozen.flags.writeable = False
    for sent in (frozen, np.asfortranarray(x), x[::1], x.astype(">f4")):
        np.testing.assert_array_equal(model.infer({"x": sent})["output"], x + 1)


def test_tensors_on_the_cpu_are_arrays_without_a_copy() -> None:
    tensors = [torch.ones(2, 3), torch.ones(4, dtype=torch.bfloat16), torch.ones((), requires_grad=True)]
    arrays = arrays_of(tensors)
    assert [(array.shape, array.dtype.name) for array in arrays] == [
        ((2, 3), "float32"),
        ((4,), "bfloat16"),
        ((), "float32"),
    ]
    tensors[0][0, 0] = 7
    assert arrays[0][0, 0] == 7
    assert arrays_of([]) == []
    with pytest.raises(EncodeError, match="sparse"):
        arrays_of([torch.ones(2), torch.eye(2).to_sparse()])


@pytest.mark.slow
def test_a_compiled_model_answers_and_differentiates_as_the_plain_one_for_any_batch() -> None:
    module = seeded(Mixed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor imports what is deprecated
        model = TorchModel(module, inputs=MIXED_INPUTS, compile=True)
        plain = TorchModel(module, inputs=MIXED_INPUTS)
        for rows in (1, 2, 5):
            sent = {**mixed_inputs(rows), "cotangent:mixed": floats(rows, 3)}
            wanted = ["mixed", "best", "gradient:x"]
            expected = plain.infer(sent, wanted)
            for name, array in model.infer(sent, wanted).items():
                np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_model_that_cannot_be_compiled_is_refused_with_the_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch._inductor import config

        with config.patch({"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True}):
            with pytest.raises(SpecError, match=r"model 'Of' cannot be compiled: .*[Cc]ompiler.* - at compile"):
                TorchModel(Of(lambda x: torch.sin(x) * 1.2345), inputs=X4, compile=True)
