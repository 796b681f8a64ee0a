"""`RemoteModule`: a model elsewhere is a layer here, in all that can be done with a layer in eager mode."""

from __future__ import annotations

import copy
import io
import pickle
import socket
import subprocess
import sys
import time
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import server_ref  # noqa: E402
from remote_ops import (  # noqa: E402
    EncodeError,
    Endpoint,
    FunctionServable,
    InternalError,
    ModelNotFound,
    NotDifferentiable,
    Servable,
    SignatureError,
    SpecError,
    TensorSpec,
)
from remote_ops.deadline import deadline  # noqa: E402
from remote_ops.errors import DeadlineExceeded  # noqa: E402
from remote_ops.signature import DTYPES  # noqa: E402
from remote_ops.torch import Parallel, RemoteModule  # noqa: E402

ROOT = Path(__file__).parents[1]
TORCH_DTYPES = [name for name in DTYPES if hasattr(torch, name)]
FLOATS = ["bfloat16", "float16", "float32", "float64"]
NO_GRADIENT = [torch.no_grad, torch.inference_mode, torch.enable_grad]


def spec(name: str, dtype: str = "float32", shape: tuple[int, ...] | None = (-1, 4)) -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def copied(x: Any) -> Any:
    return np.array(x)


def fail(x: Any) -> Any:
    raise RuntimeError("no luck")


double = FunctionServable(lambda x: 2 * x, [spec("x")], [spec("y")])
polar = FunctionServable(
    lambda radius, angle: (radius * np.cos(angle), radius * np.sin(angle)),
    [spec("radius"), spec("angle")],
    [spec("x"), spec("y")],
)
MODELS: dict[str, Servable] = {
    "double": double,
    "polar": polar,
    "image": FunctionServable(copied, [spec("x", shape=(-1, 3, -1, -1))], [spec("y", shape=(-1, 3, -1, -1))]),
    "scalar": FunctionServable(copied, [spec("x", shape=())], [spec("y", shape=())]),
    "seven": FunctionServable(lambda: np.float32([7]), [], [spec("y", shape=(1,))]),
    "words": FunctionServable(lambda x: np.array([b"a"], object), [spec("x")], [spec("y", "string", (1,))]),
    "count": FunctionServable(lambda x: (x > 0).sum(1), [spec("x")], [spec("n", "int64", (-1,))]),
    "fail": FunctionServable(fail, [spec("x")], [spec("y")]),
    **{
        f"same-{name}": FunctionServable(copied, [spec("x", name, None)], [spec("y", name, None)])
        for name in TORCH_DTYPES
    },
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A real server of all `MODELS`; each at `<url><name>`."""
    with server_ref.running(MODELS) as url:
        yield url


def closed_url() -> str:
    """A URL where nobody listens: whoever touches the network there fails."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}/double"


# one promise for every framework


@pytest.fixture(params=["numpy", "torch"])
def framework(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def caller(framework: str, urls: str | Sequence[str]) -> Callable[..., Any]:
    """The same call, array to array, through numpy or through torch."""
    if framework == "numpy":
        return Endpoint(urls)
    module = RemoteModule(urls)

    def call(*arrays: Any) -> Any:
        results = module(*[torch.from_numpy(array) for array in arrays])
        return tuple(result.numpy() for result in results) if isinstance(results, tuple) else results.numpy()

    return call


def test_a_model_at_a_url_takes_and_gives_what_its_signature_says(framework: str, url: str) -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(caller(framework, f"{url}double")(x), 2 * x)


def test_replicas_are_one_model(framework: str, url: str) -> None:
    call = caller(framework, [f"{url}double", f"{url}double?replica=2"])
    for value in range(4):
        x = np.full((1, 4), value, np.float32)
        np.testing.assert_array_equal(call(x), 2 * x)


def test_several_outputs_are_a_tuple_in_order(framework: str, url: str) -> None:
    radius, angle = np.float32([[1, 2, 3, 4]]), np.float32([[0, 1, 2, 3]])
    results = caller(framework, f"{url}polar")(radius, angle)
    assert isinstance(results, tuple)
    np.testing.assert_allclose(results, (radius * np.cos(angle), radius * np.sin(angle)), rtol=1e-6)


def test_no_rows_are_a_batch_too(framework: str, url: str) -> None:
    assert caller(framework, f"{url}double")(np.empty((0, 4), np.float32)).shape == (0, 4)


def test_an_array_without_axes_keeps_having_none(framework: str, url: str) -> None:
    result = caller(framework, f"{url}scalar")(np.array(3, np.float32))
    assert (result.shape, result.item()) == ((), 3.0)


def test_a_wrong_dtype_names_both_dtypes_and_shapes(framework: str, url: str) -> None:
    expected = r"input 'x': expected float32 \[-1, 4\], got float64 \[2, 4\]"
    with pytest.raises(SignatureError, match=expected):
        caller(framework, f"{url}double")(np.ones((2, 4)))


def test_too_many_inputs_are_counted_and_named(framework: str, url: str) -> None:
    x = np.ones((1, 4), np.float32)
    with pytest.raises(SignatureError, match=r"expected 2 inputs \(radius, angle\), got 3"):
        caller(framework, f"{url}polar")(x, x, x)


def test_an_input_that_is_missing_is_named(framework: str, url: str) -> None:
    with pytest.raises(SignatureError, match="angle"):
        caller(framework, f"{url}polar")(np.ones((1, 4), np.float32))


def test_errors_of_the_server_arrive_as_their_class(framework: str, url: str) -> None:
    x = np.ones((1, 4), np.float32)
    with pytest.raises(ModelNotFound, match="did you mean '/double'"):
        caller(framework, f"{url}doubel")(x)
    with pytest.raises(InternalError, match="no luck"):
        caller(framework, f"{url}fail")(x)


def test_the_surrounding_deadline_bounds_the_call(framework: str, url: str) -> None:
    call = caller(framework, f"{url}double")
    with deadline(0), pytest.raises(DeadlineExceeded):
        call(np.ones((1, 4), np.float32))


# what it may hold, and how it is called


@pytest.mark.parametrize("servable", [double, pytest.param(None, id="endpoint")])
def test_module_holds_any_servable(servable: Servable | None, url: str) -> None:
    module = RemoteModule(servable or Endpoint(f"{url}double", timeout_s=5.0))
    assert module(torch.ones(1, 4)).tolist() == [[2.0] * 4]


def test_module_is_a_layer_between_layers(url: str) -> None:
    model = nn.Sequential(nn.ReLU(), RemoteModule(f"{url}double"), nn.Flatten(0))
    assert model(torch.tensor([[-1.0, 0, 1, 2]])).tolist() == [0, 0, 2, 4]


def test_inputs_go_by_position_and_by_name(url: str) -> None:
    module = RemoteModule(f"{url}polar")
    radius, angle = torch.rand(2, 4), torch.rand(2, 4)
    expected = module(radius, angle)
    for results in (module(angle=angle, radius=radius), module(radius, angle=angle)):
        for result, right in zip(results, expected, strict=True):
            torch.testing.assert_close(result, right)


def test_an_input_given_twice_is_named(url: str) -> None:
    x = torch.ones(1, 4)
    with pytest.raises(SignatureError, match="given twice, by position and by name: radius"):
        RemoteModule(f"{url}polar")(x, x, radius=x)


def test_an_input_that_does_not_exist_is_named(url: str) -> None:
    with pytest.raises(SignatureError, match="no input 'angel': expected radius, angle; did you mean 'angle'"):
        RemoteModule(f"{url}polar")(torch.ones(1, 4), angel=torch.ones(1, 4))


def test_a_model_without_inputs_is_called_without(url: str) -> None:
    assert RemoteModule(f"{url}seven")().tolist() == [7.0]


@pytest.mark.parametrize("value", [[[1, 2, 3, 4]], np.float32([[1, 2, 3, 4]]), ((1.0, 2.0, 3.0, 4.0),)])
def test_what_is_no_tensor_goes_in_and_comes_out_as_one(value: Any, url: str) -> None:
    result = RemoteModule(f"{url}double")(value)
    assert isinstance(result, torch.Tensor)
    assert result.tolist() == [[2, 4, 6, 8]]


def test_outputs_are_on_the_device_of_the_first_tensor(url: str) -> None:
    module = RemoteModule(f"{url}polar")
    assert [result.device.type for result in module(torch.ones(1, 4), torch.ones(1, 4))] == ["cpu", "cpu"]
    if torch.cuda.is_available():
        on_gpu = torch.ones(1, 4, device="cuda")
        for inputs in ((on_gpu, on_gpu), (np.ones((1, 4), np.float32), on_gpu), (on_gpu, torch.ones(1, 4))):
            assert [result.device for result in module(*inputs)] == [on_gpu.device] * 2


@pytest.mark.parametrize("servable", [Path("model.onnx"), None, 3, nn.ReLU()])
def test_what_is_no_servable_is_refused_by_its_type(servable: Any) -> None:
    with pytest.raises(SpecError, match=f"expected a URL or a servable, got {type(servable).__name__}"):
        RemoteModule(servable)


def test_options_are_for_urls() -> None:
    assert RemoteModule("http://gpu1:9000/", timeout_s=3.0).servable.timeout_s == 3.0
    with pytest.raises(SpecError, match="options are for URLs: got timeout_s with a servable"):
        RemoteModule(double, timeout_s=3.0)


# a good citizen among modules


def test_module_has_no_parameters_and_leaves_those_of_its_parent_alone(url: str) -> None:
    remote, linear = RemoteModule(f"{url}double"), nn.Linear(4, 2)
    model = nn.Sequential(remote, linear)
    assert (dict(remote.state_dict()), [*remote.parameters()], [*remote.buffers()]) == ({}, [], [])
    assert [*model.state_dict()] == ["1.weight", "1.bias"]
    assert [*model.parameters()] == [*linear.parameters()]
    nn.Sequential(RemoteModule(f"{url}double"), nn.Linear(4, 2)).load_state_dict(model.state_dict(), strict=True)


def test_a_module_can_be_made_shown_moved_and_copied_before_its_server_is_there() -> None:
    model = nn.Sequential(RemoteModule(closed_url(), timeout_s=0.5), nn.Linear(4, 2))
    text = repr(model)
    assert "RemoteModule(Endpoint('http://127.0.0.1:" in text
    model.to(torch.float64).train().eval().requires_grad_(False).cpu()
    copied_model = copy.deepcopy(pickle.loads(pickle.dumps(model)))
    assert repr(copied_model) == text
    assert [*copied_model.state_dict()] == ["1.weight", "1.bias"]
    with pytest.raises(ConnectionError):
        model(torch.ones(1, 4, dtype=torch.float64))


class Unpicklable:
    """A servable that can be neither pickled nor copied, as one that holds a session."""

    signature = double.signature
    infer = staticmethod(double.infer)

    def __reduce__(self) -> Any:
        raise TypeError("cannot be copied")


def test_copies_share_the_servable(url: str) -> None:
    for servable in (Endpoint(f"{url}double"), Unpicklable()):
        model = nn.Sequential(RemoteModule(servable), nn.Linear(4, 4))
        twin = copy.deepcopy(model)
        assert twin[0] is not model[0]
        assert twin[0].servable is model[0].servable
        assert twin[1].weight is not model[1].weight
        assert twin[0](torch.ones(1, 4)).tolist() == [[2.0] * 4]


def test_pickled_module_calls_the_same_model(url: str) -> None:
    module = RemoteModule([f"{url}double", f"{url}double"], timeout_s=7.0)
    module(torch.ones(1, 4))
    twin = pickle.loads(pickle.dumps(module))
    assert twin.servable.timeout_s == 7.0
    assert twin(torch.ones(1, 4)).tolist() == [[2.0] * 4]


def test_saved_parent_loads_with_its_remote_layer(url: str) -> None:
    model = nn.Sequential(RemoteModule(f"{url}double"), nn.Linear(4, 2))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.rand(3, 4)
    torch.testing.assert_close(loaded(x), model(x))


def test_a_literal_header_is_neither_shown_nor_pickled(url: str) -> None:
    module = RemoteModule(f"{url}double", headers={"Authorization": "Bearer s3cr3t"})
    assert module(torch.ones(1, 4)).tolist() == [[2.0] * 4]
    file = io.BytesIO()
    torch.save(nn.Sequential(module), file)
    for text in (repr(nn.Sequential(module)), str(vars(module)), pickle.dumps(module), file.getvalue()):
        assert "s3cr3t" not in (text if isinstance(text, str) else text.decode("latin-1"))
    with pytest.raises(SpecError, match=r"header 'Authorization' had a literal value, which is not pickled"):
        pickle.loads(pickle.dumps(module))(torch.ones(1, 4))


def test_a_header_from_the_environment_survives_pickling(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOTE_TOKEN", "s3cr3t")
    module = RemoteModule(f"{url}double", headers={"Authorization": "Bearer ${REMOTE_TOKEN}"})
    pickled = pickle.dumps(module)
    assert b"s3cr3t" not in pickled
    assert pickle.loads(pickled)(torch.ones(1, 4)).tolist() == [[2.0] * 4]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", NO_GRADIENT)
def test_module_works_in_every_mode(mode: Any, training: bool, url: str) -> None:
    model = nn.Sequential(RemoteModule(f"{url}double"), nn.Dropout(0.0)).train(training)
    with mode():
        assert model(torch.ones(1, 4)).tolist() == [[2.0] * 4]


# dtypes and layouts


def some(dtype: str, *shape: int) -> Any:
    """A tensor of any dtype that is not all one value."""
    values = torch.arange(int(np.prod(shape))).reshape(shape) % 3
    return values.to(getattr(torch, dtype))


def bits(tensor: Any) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy()) if tensor.dim() else tensor.reshape(1).numpy().tobytes()


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_every_dtype_travels_bit_for_bit(dtype: str, url: str) -> None:
    module = RemoteModule(f"{url}same-{dtype}")
    for x in (some(dtype, 2, 4), some(dtype, 5), some(dtype, 0, 4), some(dtype, 3, 4).T, some(dtype, 1).reshape(())):
        y = module(x)
        assert (y.dtype, y.shape) == (x.dtype, x.shape)
        assert bits(y.reshape(-1)) == bits(x.reshape(-1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_that_are_no_numbers_travel_too(dtype: str, url: str) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], dtype=getattr(torch, dtype))
    assert bits(RemoteModule(f"{url}same-{dtype}")(x)) == bits(x)


LAYOUTS = {
    "transposed": lambda x: x.transpose(2, 3),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every other": lambda x: x[::2, :, 1::2, ::2],
    "a slice": lambda x: x[1:3, :, 2:, :-1],
    "permuted": lambda x: x.permute(3, 1, 0, 2),
    "expanded": lambda x: x[:1].expand(5, -1, -1, -1),
    "flipped": lambda x: x.flip(0),
    "from an odd address": lambda x: x.flatten()[1:].as_strided((2, 3, 2, 2), (12, 4, 2, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_do_not_depend_on_the_layout_in_memory(layout: str, url: str) -> None:
    x = LAYOUTS[layout](torch.rand(4, 3, 6, 8))
    torch.testing.assert_close(RemoteModule(f"{url}image")(x), x, rtol=0, atol=0)


def test_a_negation_that_is_still_pending_is_done(url: str) -> None:
    z = torch.tensor([[1 + 2j, 3 + 4j, 5 + 6j, 7 + 8j]])
    pending = z.conj().imag
    assert pending.is_neg()
    assert RemoteModule(f"{url}double")(pending).tolist() == [[-4, -8, -12, -16]]


@pytest.mark.parametrize(
    "z", [torch.ones(2, 4, dtype=torch.complex64), torch.ones(2, 4, dtype=torch.complex128).conj()]
)
def test_complex_numbers_are_refused_by_name(z: Any, url: str) -> None:
    with pytest.raises(EncodeError, match=rf"{z.dtype} \[2, 4\] has no form on the wire") as caught:
        RemoteModule(f"{url}double")(z)
    assert (caught.value.dtype, caught.value.shape) == (str(z.dtype), (2, 4))


def test_strings_have_no_tensor(url: str) -> None:
    with pytest.raises(EncodeError, match="has no torch tensor"):
        RemoteModule(f"{url}words")(torch.ones(1, 4))


# memory


@pytest.mark.parametrize("where", ["remote", "local"])
def test_outputs_are_writable_and_share_nothing(where: str, url: str) -> None:
    module = RemoteModule(f"{url}polar" if where == "remote" else polar)
    radius, angle = torch.ones(300, 4), torch.zeros(300, 4)
    first, second = module(radius, angle)
    again, _ = module(radius, angle)
    first.fill_(9)
    assert second.eq(0).all()
    assert again.eq(1).all()
    assert radius.eq(1).all()


ALIASES = {
    "its input": lambda x: (x, x.copy()),
    "a part of its input": lambda x: (x[::-1], x.copy()),
    "one array twice": lambda x: [x.copy()] * 2,
    "what it may not write to": lambda x: (np.broadcast_to(np.float32(1), x.shape), x.copy()),
    "foreign byte order": lambda x: (x.astype(">f4"), x.copy()),
}


@pytest.mark.parametrize("given", ALIASES)
def test_a_local_model_may_give_back_any_memory(given: str) -> None:
    module = RemoteModule(FunctionServable(ALIASES[given], [spec("x")], [spec("a"), spec("b")]))
    x = torch.ones(2, 4)
    a, b = module(x)
    a.add_(1)
    assert (x.unique().tolist(), a.unique().tolist(), b.unique().tolist()) == ([1], [2], [1])


# gradients: refused, and never silently zero


def inputs_that_want_a_gradient() -> dict[str, Callable[[Any], Any]]:
    x = torch.ones(1, 4, requires_grad=True)
    return {
        "a leaf": lambda module: module(x),
        "by name": lambda module: module(x=x),
        "a parameter in front": lambda module: nn.Sequential(nn.Linear(4, 4), module)(torch.ones(1, 4)),
        "a local layer behind": lambda module: nn.Sequential(module, nn.Linear(4, 1))(x),
        "written to afterwards": lambda module: module(x).mul_(2),
    }


@pytest.mark.parametrize("how", inputs_that_want_a_gradient())
@pytest.mark.parametrize("where", ["remote", "local"])
def test_a_gradient_is_refused_at_backward(how: str, where: str, url: str) -> None:
    y = inputs_that_want_a_gradient()[how](RemoteModule(f"{url}double" if where == "remote" else double))
    assert y.requires_grad
    with pytest.raises(
        NotDifferentiable, match=r"no gradient with respect to input 'x'; call it under torch.no_grad\(\), or detach"
    ):
        y.sum().backward()


def test_a_gradient_asked_for_by_grad_is_refused_too(url: str) -> None:
    x = torch.ones(1, 4, requires_grad=True)
    y = RemoteModule(f"{url}double")(x)
    with pytest.raises(NotDifferentiable):
        torch.autograd.grad(y.sum(), x, allow_unused=True)


def test_a_list_of_tensors_is_refused_since_its_gradient_would_be_lost(url: str) -> None:
    with pytest.raises(SignatureError, match=r"input 'x': expected a tensor, got a list of tensors; torch.stack them"):
        RemoteModule(f"{url}double")([torch.ones(4, requires_grad=True)])


def test_without_a_gradient_asked_for_training_goes_on_around_it(url: str) -> None:
    frozen, head = RemoteModule(f"{url}double"), nn.Linear(4, 1)
    head(frozen(torch.ones(3, 4))).sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.tolist() == [[6.0] * 4]


def test_whole_numbers_have_no_gradient_to_refuse(url: str) -> None:
    assert not RemoteModule(f"{url}count")(torch.ones(2, 4, requires_grad=True)).requires_grad


@pytest.mark.parametrize("detach", [torch.Tensor.detach, torch.Tensor.clone])
def test_detached_or_under_no_grad_there_is_nothing_to_refuse(detach: Any, url: str) -> None:
    x = torch.ones(1, 4, requires_grad=True)
    with torch.no_grad():
        assert not RemoteModule(f"{url}double")(detach(x)).requires_grad
    assert not RemoteModule(f"{url}double")(x.detach()).requires_grad


# processes


class Rows(torch.utils.data.Dataset):
    """Rows that pass through a module, in whichever process they are asked for."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return self.module(torch.full((1, 4), float(index)))[0]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_forked_workers_use_a_module_that_the_parent_has_used(url: str) -> None:
    module = RemoteModule(f"{url}double")
    module(torch.ones(1, 4))
    module.servable.submit({"x": np.ones((1, 4), np.float32)}).result()
    loader = torch.utils.data.DataLoader(Rows(module), batch_size=3, num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        rows = torch.cat([*loader])
        torch.testing.assert_close(rows[:, 0], 2.0 * torch.arange(12))
        assert module(torch.ones(1, 4)).tolist() == [[2.0] * 4]


# without torch

WITHOUT_TORCH = """
import sys
import time


class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


sys.meta_path.insert(0, Block())
import remote_ops
assert not any(name.partition(".")[0] == "torch" for name in sys.modules)
import remote_ops.torch
"""


def test_without_torch_the_error_says_what_to_type() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ImportError: remote_ops.torch needs torch: pip install 'remote-ops[torch]'"


def test_a_tensor_without_dense_data_says_so(url: str) -> None:
    with pytest.raises(EncodeError, match="expected dense data"):
        RemoteModule(f"{url}double")(torch.eye(4).to_sparse())


def test_a_tensor_without_data_gives_shapes_without_a_call(url: str) -> None:
    result = RemoteModule(f"{url}double")(torch.ones(3, 4, device="meta"))
    assert (result.device.type, result.shape, result.dtype) == ("meta", (3, 4), torch.float32)


def test_an_error_about_inputs_names_the_url(url: str) -> None:
    with pytest.raises(SignatureError, match=f"at {url}double"):
        RemoteModule(f"{url}double")(torch.ones(1, 4), torch.ones(1, 4))


def test_a_bfloat16_model_takes_float32_and_gives_its_gradient_back_as_one() -> None:
    spec = TensorSpec("x", "bfloat16", (-1, 4), differentiable=True)
    model = FunctionServable(
        lambda x: 2 * x,
        [spec],
        [TensorSpec("y", "bfloat16", (-1, 4))],
        vjp=lambda inputs, cotangents: {"x": (2 * cotangents["y"]).astype(inputs["x"].dtype)},
    )
    x = torch.ones(2, 4, requires_grad=True)
    with server_ref.running({"double": model}) as url:
        y = RemoteModule(url)(x)
        y.float().sum().backward()
    assert (y.dtype, x.grad.dtype, x.grad.tolist()) == (torch.bfloat16, torch.float32, [[2.0] * 4] * 2)


def test_config_is_bytes() -> None:
    with pytest.raises(SpecError, match="expected bytes, got a str"):
        RemoteModule("http://gpu1:9000/", config="beam=4")


def test_the_pieces_of_a_batch_have_one_deadline(url: str) -> None:
    slow = FunctionServable(lambda x: (time.sleep(0.1), x)[1], [spec("x")], [spec("y")])
    with server_ref.running({"slow": slow}) as slow_url:
        module = RemoteModule(slow_url, max_rows=1, timeout_s=0.3)
        with pytest.raises(DeadlineExceeded):
            module(torch.ones(100, 4))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"outputs": "y"}, "expected a list of names, got 'y'"),
        ({"max_rows": "8"}, "expected a number of rows, 1 or more, got '8'"),
        ({"max_rows": 8, "batched": False}, "expected batched=True"),
        ({"timeout": 5}, "no option 'timeout': .* did you mean 'timeout_s'"),
    ],
)
def test_an_option_that_cannot_be_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        RemoteModule("http://gpu1:9000/", **options)


def test_a_torch_module_is_told_how_to_become_a_servable() -> None:
    with pytest.raises(SpecError, match=r"got ReLU; say TorchModel\(module, inputs=...\)"):
        RemoteModule(nn.ReLU())


def test_branches_that_are_no_modules_are_refused() -> None:
    with pytest.raises(SpecError, match="without the list"):
        Parallel([nn.ReLU()])
    with pytest.raises(SpecError, match=r"say RemoteModule\(URL\)"):
        Parallel("http://gpu1:9000/")


def test_a_forward_of_its_own_is_what_parallel_calls() -> None:
    branch = nn.Sequential(nn.Identity())
    branch.forward = lambda x: 0 * x
    assert Parallel(branch)(torch.ones(2))[0].tolist() == [0, 0]
    assert Parallel(nn.Sequential())(torch.ones(2))[0].tolist() == [1, 1]


def test_nothing_is_no_tensor(url: str) -> None:
    with pytest.raises(SignatureError, match=r"input 'x': expected float32 \[-1, 4\], got None"):
        RemoteModule(f"{url}double")(None)


def test_what_behaves_like_a_dict_is_taken_as_one(url: str) -> None:
    result = RemoteModule(f"{url}double")(UserDict(x=torch.ones(1, 4)))
    assert result["y"].tolist() == [[2.0] * 4]


def test_models_that_start_models_of_this_process_end(url: str) -> None:
    """More of them than there are threads for models of this process, each waiting for two others."""
    twice = RemoteModule(double)

    def both(x: Any) -> Any:
        one, other = Parallel(twice, twice)(torch.from_numpy(x))
        return (one + other).numpy()

    nested = RemoteModule(FunctionServable(both, [spec("x")], [spec("y")]))
    results = Parallel(*[nested] * 70)(torch.ones(1, 4))
    assert {result.sum().item() for result in results} == {16.0}


def test_what_marks_constants_of_a_trace_is_what_torch_reads() -> None:
    import torch._dynamo

    from remote_ops.torch.opspec import constant_while_tracing

    theirs, ours = torch._dynamo.assume_constant_result(lambda: 1), constant_while_tracing(lambda: 1)
    assert vars(theirs) == vars(ours) != {}
