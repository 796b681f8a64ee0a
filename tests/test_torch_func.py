"""Gradients through a remote model: what autograd, `torch.func` and autocast make of it, and what each one costs.

The numbers in comments are those of the acceptance checks in the notes on remote ops.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.autograd import forward_ad, functional  # noqa: E402
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap  # noqa: E402
from torchpeer import (  # noqa: E402
    Noted,
    Served,
    agree,
    matmul,
    mix,
    mix_twin,
    pair,
    pair_twin,
    served,
    spec,
    value_and_gradients,
)

import server_ref  # noqa: E402
from remote_ops import FunctionServable, NotDifferentiable, RemoteOpsError, SignatureError, SpecError  # noqa: E402
from remote_ops.torch import RemoteModule  # noqa: E402

# What torch itself deprecates and still uses, in forward mode and in inductor.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]*. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning"),
]
BACKENDS = ["aot_eager", "inductor"]


def half() -> Noted:
    return Noted(lambda x: x * 2, [spec("x", "bfloat16", differentiable=True)], [spec("y", "bfloat16")], vjp=doubled)


def doubled(inputs: Any, cotangents: Any) -> Any:
    return {"x": cotangents["y"] * 2}


def mean() -> Noted:
    return Noted(
        lambda x: x.mean(0),
        [spec("x", differentiable=True)],
        [spec("y", shape=(4,))],
        vjp=lambda inputs, cotangents: {"x": np.repeat(cotangents["y"][None] / len(inputs["x"]), len(inputs["x"]), 0)},
    )


@pytest.fixture(scope="module")
def all_served() -> Iterator[Served]:
    models = {
        "mix": mix(), "mix64": mix("float64"), "pair": pair(), "pair64": pair("float64"), "matmul": matmul(),
        "half": half(), "mean": mean(),
        "plain": Noted(lambda x: np.tanh(x), [spec("x")], [spec("y")]),
        "partial": Noted(
            lambda x, n: x * n, [spec("x", differentiable=True), spec("n")], [spec("y")],
            vjp=lambda inputs, cotangents: {"x": cotangents["y"] * inputs["n"]},
        ),
        "gather": Noted(
            lambda x, at: np.take_along_axis(x, at, 1),
            [spec("x", differentiable=True), spec("at", "int64", (-1, 1))],
            [spec("y", shape=(-1, 1))],
            vjp=scattered,
        ),
    }  # fmt: skip
    with served(models) as server:
        yield server


def scattered(inputs: Any, cotangents: Any) -> Any:
    gradient = np.zeros_like(inputs["x"])
    np.put_along_axis(gradient, inputs["at"], cotangents["y"], 1)
    return {"x": gradient}


@pytest.fixture
def server(all_served: Served) -> Served:
    all_served.forget()
    return all_served


def rows(*shape: int, seed: int = 0, dtype: Any = torch.float32) -> Any:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# 2: the gradient is the one a local model would give


def test_gradcheck_holds_through_a_real_socket(server: Served) -> None:
    module = RemoteModule(server.url("mix64"))
    assert torch.autograd.gradcheck(module, rows(3, 4, dtype=torch.float64).requires_grad_())
    both = [rows(2, 4, seed=seed, dtype=torch.float64).requires_grad_() for seed in (1, 2)]
    assert torch.autograd.gradcheck(RemoteModule(server.url("pair64")), both)


@pytest.mark.parametrize("where", ["remote", "local"])
@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (0, 4)])
def test_a_gradient_equals_that_of_a_local_copy(shape: tuple[int, ...], where: str, server: Served) -> None:
    module = RemoteModule(server.url("mix") if where == "remote" else mix())
    agree(module, mix_twin, rows(*shape), tolerance=1e-6)


def test_gradients_of_several_inputs_and_outputs_are_each_their_own(server: Served) -> None:
    agree(RemoteModule(server.url("pair")), pair_twin, rows(3, 4), rows(3, 4, seed=1), tolerance=1e-6)


def test_an_input_used_twice_gets_the_sum_of_both_gradients(server: Served) -> None:
    module = RemoteModule(server.url("pair"))
    agree(lambda x: module(x, x), lambda x: pair_twin(x, x), rows(3, 4), tolerance=1e-6)


def test_an_input_of_whole_numbers_needs_no_gradient_beside_one_that_does(server: Served) -> None:
    module, at = RemoteModule(server.url("gather")), torch.tensor([[1], [3]])
    agree(lambda x: module(x, at), lambda x: x.gather(1, at), rows(2, 4), tolerance=1e-6)


@pytest.mark.parametrize("layout", [lambda x: x.T, lambda x: x[:, :1].expand(-1, 4), lambda x: x[::2]])
def test_a_gradient_does_not_depend_on_the_layout_in_memory(layout: Callable[[Any], Any], server: Served) -> None:
    module = RemoteModule(server.url("mix"))
    agree(lambda x: module(layout(x)), lambda x: mix_twin(layout(x)), rows(4, 4), tolerance=1e-6)


def test_a_cotangent_of_any_layout_is_read_right(server: Served) -> None:
    module = RemoteModule(server.url("mix"))
    agree(lambda x: module(x).T.contiguous(), lambda x: mix_twin(x).T.contiguous(), rows(3, 4), tolerance=1e-6)
    agree(lambda x: module(x).sum(), lambda x: mix_twin(x).sum(), rows(3, 4), tolerance=1e-6)


def test_a_graph_that_is_retained_goes_backward_twice(server: Served) -> None:
    x = rows(2, 4).requires_grad_()
    y = RemoteModule(server.url("mix"))(x).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert server["mix"].counts == (1, 2)


def test_hooks_on_the_module_see_its_gradients(server: Served) -> None:
    module, seen = RemoteModule(server.url("mix")), []
    module.register_full_backward_hook(lambda _, inner, outer: seen.append((inner[0].shape, outer[0].shape)))
    module(rows(2, 4).requires_grad_()).sum().backward()
    assert seen == [((2, 4), (2, 4))]


def test_a_checkpoint_calls_the_model_again_instead_of_keeping(server: Served) -> None:
    module = RemoteModule(server.url("mix"))
    agree(lambda x: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False), mix_twin, rows(2, 4))
    assert server["mix"].counts == (2, 1)


def test_an_input_written_to_between_forward_and_backward_is_refused(server: Served) -> None:
    x = rows(2, 4).requires_grad_()
    inner = x * 1
    y = RemoteModule(server.url("mix"))(inner)
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_graph_keeps_the_model_that_it_has_to_go_back_through() -> None:
    x = rows(2, 4).requires_grad_()
    y = RemoteModule(mix())(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, value_and_gradients(lambda x: mix_twin(x).sum(), x)[1][0])


# 3: torch.func


def test_func_grad_is_the_gradient(server: Served) -> None:
    module, x = RemoteModule(server.url("mix")), rows(3, 4)
    right = grad(lambda x: mix_twin(x).square().sum())(x)
    torch.testing.assert_close(grad(lambda x: module(x).square().sum())(x), right)
    assert server["mix"].counts == (1, 1)


def test_func_grad_asks_for_the_argument_it_is_told_to(server: Served) -> None:
    module, a, b = RemoteModule(server.url("pair")), rows(2, 4), rows(2, 4, seed=1)
    got = grad(lambda a, b: module(a, b)[0].sum(), argnums=1)(a, b)
    torch.testing.assert_close(got, a)
    assert server["pair"].calls[-1].wanted == ("gradient:b",)


def test_func_vjp_is_the_product(server: Served) -> None:
    module, a, b = RemoteModule(server.url("pair")), rows(2, 4), rows(2, 4, seed=1)
    values, pull = vjp(module, a, b)
    right, pull_twin = vjp(pair_twin, a, b)
    torch.testing.assert_close(values, right)
    cotangents = (rows(2, 4, seed=2), rows(2, 4, seed=3))
    torch.testing.assert_close(pull(cotangents), pull_twin(cotangents))


def test_jacrev_is_the_jacobian_in_one_request_each_way(server: Served) -> None:
    x = rows(2, 4)
    torch.testing.assert_close(jacrev(RemoteModule(server.url("mix")))(x), jacrev(mix_twin)(x))
    assert server["mix"].counts == (1, 1)


def test_autograd_functional_jacobian_is_the_jacobian(server: Served) -> None:
    module, x = RemoteModule(server.url("mix")), rows(2, 4)
    torch.testing.assert_close(functional.jacobian(module, x), jacrev(mix_twin)(x))


def test_the_vmap_that_torch_func_replaced_is_refused_by_the_name_of_the_op(server: Served) -> None:
    x = rows(2, 4).requires_grad_()
    y = RemoteModule(server.url("mix"))(x)
    with pytest.raises(RuntimeError, match="Batching rule not implemented for remote_ops::vjp"):
        torch.autograd.grad(y, x, rows(5, 2, 4, seed=1), is_grads_batched=True)


def test_a_backward_that_no_cotangent_reaches_asks_for_nothing(server: Served) -> None:
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Any) -> Any:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, cotangent: Any) -> Any:
            return None

    x = rows(2, 4).requires_grad_()
    Cut.apply(RemoteModule(server.url("mix"))(x)).sum().backward()
    assert x.grad is None or not x.grad.any()
    assert server["mix"].counts == (1, 0)


@pytest.mark.parametrize("shape", [(5, 1, 4), (5, 4), (5, 3, 4)])
def test_vmap_is_one_request(shape: tuple[int, ...], server: Served) -> None:
    x = rows(*shape)
    torch.testing.assert_close(vmap(RemoteModule(server.url("mix")))(x), mix_twin(x))
    assert server["mix"].counts == (1, 0)


@pytest.mark.parametrize(("shape", "in_dim"), [((4, 5), 1), ((1, 5, 4), 1), ((1, 4, 5), -1)])
def test_vmap_over_another_axis_is_one_request(shape: tuple[int, ...], in_dim: int, server: Served) -> None:
    x = rows(*shape)
    got = vmap(RemoteModule(server.url("mix")), in_dims=in_dim)(x)
    torch.testing.assert_close(got, vmap(mix_twin, in_dims=in_dim)(x))
    assert server["mix"].counts == (1, 0)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 4)])
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0)])
def test_vmap_with_an_input_that_all_samples_share_is_one_request(
    in_dims: tuple[int | None, int | None], shape: tuple[int, ...], server: Served
) -> None:
    batched, shared = rows(5, *shape), rows(*shape, seed=1)
    inputs = (batched, shared) if in_dims[0] == 0 else (shared, batched)
    got = vmap(RemoteModule(server.url("pair")), in_dims=in_dims)(*inputs)
    torch.testing.assert_close(got, vmap(pair_twin, in_dims=in_dims)(*inputs))
    assert server["pair"].counts == (1, 0)


def test_vmap_shares_an_input_that_has_no_rows(server: Served) -> None:
    x, w = rows(5, 2, 4), rows(4, 3, seed=1)
    torch.testing.assert_close(vmap(RemoteModule(server.url("matmul")), in_dims=(0, None))(x, w), x @ w)
    assert server["matmul"].counts == (1, 0)


def test_vmap_over_an_input_that_has_no_rows_is_a_request_for_each(server: Served) -> None:
    x, w = rows(5, 2, 4), rows(5, 4, 3, seed=1)
    torch.testing.assert_close(vmap(RemoteModule(server.url("matmul")))(x, w), x @ w)
    assert server["matmul"].counts == (5, 0)


def test_vmap_of_a_model_whose_output_has_no_rows_is_a_request_for_each(server: Served) -> None:
    module, x = RemoteModule(server.url("mean")), rows(5, 2, 4)
    torch.testing.assert_close(vmap(module)(x), x.mean(1))
    right = vmap(grad(lambda x: x.mean(0).square().sum()))(x)
    torch.testing.assert_close(vmap(grad(lambda x: module(x).square().sum()))(x), right)
    assert server["mean"].counts == (10, 5)


def test_vmap_where_axis_0_is_no_batch_is_a_request_for_each(server: Served) -> None:
    x = rows(5, 2, 4)
    torch.testing.assert_close(vmap(RemoteModule(server.url("mix"), batched=False))(x), mix_twin(x))
    assert server["mix"].counts == (5, 0)


@pytest.mark.parametrize("shape", [(0, 4), (0, 1, 4)])
def test_vmap_over_no_samples_gives_none(shape: tuple[int, ...], server: Served) -> None:
    assert vmap(RemoteModule(server.url("mix")))(torch.empty(shape)).shape == shape


def test_vmap_over_no_samples_where_axis_0_is_no_batch_is_refused(server: Served) -> None:
    """No call is made, so nobody can tell how large an output would be."""
    with pytest.raises(RemoteOpsError):
        vmap(RemoteModule(server.url("mix"), batched=False))(torch.empty(0, 2, 4))


def test_vmap_inside_vmap_is_one_request(server: Served) -> None:
    module, x = RemoteModule(server.url("mix")), rows(2, 3, 4)
    torch.testing.assert_close(vmap(vmap(module))(x), mix_twin(x))
    assert server["mix"].counts == (1, 0)


def test_vmap_in_chunks_is_a_request_for_each_chunk(server: Served) -> None:
    x = rows(5, 4)
    torch.testing.assert_close(vmap(RemoteModule(server.url("mix")), chunk_size=2)(x), mix_twin(x))
    assert server["mix"].counts == (3, 0)


def test_vmap_of_an_input_without_samples_is_one_request_for_all(server: Served) -> None:
    module, shared = RemoteModule(server.url("mix")), rows(1, 4)
    got = vmap(lambda x: module(shared) + x)(rows(5, 1, 4, seed=1))
    torch.testing.assert_close(got, mix_twin(shared) + rows(5, 1, 4, seed=1))
    assert server["mix"].counts == (1, 0)


@pytest.mark.parametrize("shape", [(5, 4), (5, 1, 4), (5, 3, 4)])
def test_vmap_of_grad_is_one_request_each_way(shape: tuple[int, ...], server: Served) -> None:
    module, x = RemoteModule(server.url("mix")), rows(*shape)
    right = vmap(grad(lambda x: mix_twin(x).square().sum()))(x)
    torch.testing.assert_close(vmap(grad(lambda x: module(x).square().sum()))(x), right)
    assert server["mix"].counts == (1, 1)


def test_vmap_of_grad_where_axis_0_is_no_batch_is_a_request_for_each(server: Served) -> None:
    module, x = RemoteModule(server.url("mix"), batched=False), rows(3, 2, 4)
    right = vmap(grad(lambda x: mix_twin(x).sum()))(x)
    torch.testing.assert_close(vmap(grad(lambda x: module(x).sum()))(x), right)
    assert server["mix"].counts == (3, 3)


def test_vmap_of_grad_of_what_all_samples_share_gives_each_its_own(server: Served) -> None:
    """Per-sample gradients of a weight that is an input: here one request would sum over the samples."""
    module, x, w = RemoteModule(server.url("matmul")), rows(5, 2, 4), rows(4, 3, seed=1)
    per_sample = vmap(grad(lambda w, x: module(x, w).square().sum()), in_dims=(None, 0))
    right = vmap(grad(lambda w, x: (x @ w).square().sum()), in_dims=(None, 0))
    torch.testing.assert_close(per_sample(w, x), right(w, x))


@pytest.mark.parametrize("shape", [(4,), (1, 4)])
def test_vmap_of_grad_of_an_input_with_rows_that_all_samples_share(shape: tuple[int, ...], server: Served) -> None:
    module, a, b = RemoteModule(server.url("pair")), rows(5, *shape), rows(*shape, seed=1)
    mine = vmap(grad(lambda b, a: sum(y.square().sum() for y in module(a, b))), in_dims=(None, 0))
    twin = vmap(grad(lambda b, a: sum(y.square().sum() for y in pair_twin(a, b))), in_dims=(None, 0))
    torch.testing.assert_close(mine(b, a), twin(b, a))


def test_grad_of_vmap_is_one_request_each_way(server: Served) -> None:
    module, x = RemoteModule(server.url("mix")), rows(5, 4)
    right = grad(lambda x: vmap(mix_twin)(x).square().sum())(x)
    torch.testing.assert_close(grad(lambda x: vmap(module)(x).square().sum())(x), right)
    assert server["mix"].counts == (1, 1)


def test_backward_through_vmap_is_the_gradient(server: Served) -> None:
    agree(vmap(RemoteModule(server.url("mix"))), vmap(mix_twin), rows(5, 4))
    assert server["mix"].counts == (1, 1)


def test_a_derivative_of_second_order_around_the_model_is_right(server: Served) -> None:
    """The model stands outside of what is differentiated twice."""
    module, x = RemoteModule(server.url("mix")), rows(2, 4)

    def around(call: Callable[[Any], Any]) -> Any:
        constant = call(x)
        return grad(lambda z: grad(lambda z: (z**3 * constant).sum())(z).sum())(x)

    torch.testing.assert_close(around(module), around(mix_twin))


def test_a_gradient_of_what_was_made_of_a_local_gradient_is_right(server: Served) -> None:
    """grad(local gradient -> model): first order through the model, second through the local function."""
    module, x = RemoteModule(server.url("mix")), rows(2, 4)

    def nested(call: Callable[[Any], Any]) -> Any:
        return grad(lambda x: call(grad(lambda z: (z**3).sum())(x)).square().sum())(x)

    torch.testing.assert_close(nested(module), nested(mix_twin))


def test_per_sample_gradients_of_a_layer_before_the_model_are_right(server: Served) -> None:
    layer, module, x = nn.Linear(4, 4), RemoteModule(server.url("mix")), rows(5, 4)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(call: Callable[[Any], Any], parameters: Any, x: Any) -> Any:
        return call(torch.func.functional_call(layer, parameters, (x,))).square().sum()

    mine = vmap(grad(functools.partial(loss, module)), in_dims=(None, 0))(parameters, x)
    right = vmap(grad(functools.partial(loss, mix_twin)), in_dims=(None, 0))(parameters, x)
    torch.testing.assert_close(mine, right)
    assert server["mix"].counts == (1, 1)


def test_functional_call_sees_a_module_without_parameters(server: Served) -> None:
    module, x = RemoteModule(server.url("mix")), rows(2, 4)
    torch.testing.assert_close(torch.func.functional_call(module, {}, (x,)), mix_twin(x))


def test_vmap_names_the_samples_that_fit_no_input(server: Served) -> None:
    with pytest.raises(SignatureError, match=r"input 'x': expected float32 \[-1, 4\], got float32 \["):
        vmap(RemoteModule(server.url("mix")))(rows(5, 3))
    assert server["mix"].calls == []


# 3: what there is no derivative of says so, and is never zero

NO_FORWARD = "no forward-mode derivative"
NO_SECOND = "no second derivative"


def forward_dual(call: Any, x: Any) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def backward_twice(call: Any, x: Any) -> Any:
    x = x.requires_grad_()
    (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    first.square().sum().backward()


def gradient_penalty(call: Any, x: Any) -> Any:
    layer = nn.Linear(4, 4, dtype=x.dtype)
    x = x.requires_grad_()
    (first,) = torch.autograd.grad(call(layer(x)).sum(), x, create_graph=True)
    first.norm().backward()


def of_sum(of: Any, call: Any, x: Any) -> Any:
    directions = () if of is functional.hessian else (torch.ones_like(x),)
    return of(lambda x: call(x).sum(), x, *directions)


REFUSED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "jvp": (lambda call, x: jvp(call, (x,), (torch.ones_like(x),)), NO_FORWARD),
    "jvp of vmap": (lambda call, x: jvp(vmap(call), (x,), (torch.ones_like(x),)), NO_FORWARD),
    "vmap of jvp": (lambda call, x: vmap(lambda x: jvp(call, (x,), (torch.ones_like(x),)))(x), NO_FORWARD),
    "forward_ad": (forward_dual, NO_FORWARD),
    "jacfwd": (lambda call, x: jacfwd(call)(x), NO_FORWARD),
    "hessian": (lambda call, x: hessian(lambda x: call(x).sum())(x), NO_FORWARD),
    "jvp of grad": (lambda call, x: jvp(grad(lambda x: call(x).sum()), (x,), (torch.ones_like(x),)), NO_FORWARD),
    "double backward": (backward_twice, NO_SECOND),
    "gradient penalty": (gradient_penalty, NO_SECOND),
    "jvp of vmap of grad": (
        lambda call, x: jvp(vmap(grad(lambda x: call(x).sum())), (x,), (torch.ones_like(x),)), NO_FORWARD,
    ),
    "jvp of grad of what is around": (
        lambda call, x: jvp(lambda x: grad(lambda z: (call(x) * z).sum())(x), (x,), (torch.ones_like(x),)), NO_FORWARD,
    ),
    "jacrev of grad": (lambda call, x: jacrev(grad(lambda x: call(x).square().sum()))(x), NO_SECOND),
    "grad of grad": (lambda call, x: grad(lambda x: grad(lambda x: call(x).square().sum())(x).sum())(x), NO_SECOND),
    "backward of grad": (
        lambda call, x: grad(lambda x: call(x).square().sum())(x.requires_grad_()).sum().backward(), NO_SECOND,
    ),
    "linearize": (lambda call, x: linearize(call, x)[1](torch.ones_like(x)), NO_FORWARD),
    **{
        f"autograd.functional.{of.__name__}": (functools.partial(of_sum, of), NO_SECOND)
        for of in (functional.jvp, functional.hvp, functional.vhp, functional.hessian)
    },
    "gradgradcheck": (
        lambda call, x: torch.autograd.gradgradcheck(call, x.requires_grad_()), NO_SECOND,
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED)
def test_a_derivative_that_there_is_none_of_is_refused_and_never_zero(how: str, server: Served) -> None:
    attempt, message = REFUSED[how]
    with pytest.raises(NotDifferentiable, match=message):
        attempt(RemoteModule(server.url("mix64")), rows(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("how", ["jvp", "forward_ad", "jacfwd"])
def test_a_model_without_any_gradient_refuses_forward_mode_too(how: str, server: Served) -> None:
    with pytest.raises(NotDifferentiable):
        REFUSED[how][0](RemoteModule(server.url("plain")), rows(2, 4))


def test_create_graph_alone_is_no_second_derivative(server: Served) -> None:
    x = rows(2, 4).requires_grad_()
    (first,) = torch.autograd.grad(RemoteModule(server.url("mix"))(x).sum(), x, create_graph=True)
    torch.testing.assert_close(first, grad(lambda x: mix_twin(x).sum())(x.detach()))


@pytest.mark.parametrize("take", [grad, jacrev, lambda f: lambda x: vjp(f, x)[1](torch.tensor(1.0))])
def test_a_model_without_gradients_says_so_in_torch_func(take: Any, server: Served) -> None:
    module = RemoteModule(server.url("plain"))
    taken = take(lambda x: module(x).sum())
    with pytest.raises(NotDifferentiable, match=r"no gradient with respect to input 'x'; call it under torch.no_grad"):
        taken(rows(2, 4))


def test_the_one_input_without_a_gradient_is_named(server: Served) -> None:
    x, n = rows(2, 4).requires_grad_(), rows(2, 4, seed=1).requires_grad_()
    module = RemoteModule(server.url("partial"))
    module(x, n.detach()).sum().backward()
    torch.testing.assert_close(x.grad, n.detach())
    with pytest.raises(NotDifferentiable, match="no gradient with respect to input 'n', only with respect to x"):
        module(x, n).sum().backward()


# 3: torch.func, compiled


def make_grad(call: Any) -> Any:
    return grad(lambda x: call(x).square().sum())


def make_vmap(call: Any) -> Any:
    return vmap(call)


def make_vmap_of_grad(call: Any) -> Any:
    return vmap(grad(lambda x: call(x).square().sum()))


def make_vjp(call: Any) -> Any:
    def value_and_product(x: Any) -> Any:
        value, pull = vjp(call, x)
        return value, pull(x)[0]

    return value_and_product


def make_jacrev(call: Any) -> Any:
    return jacrev(call)


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_grad, make_vmap, make_vmap_of_grad, make_vjp, make_jacrev])
@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_func_compiled_equals_eager(backend: str, make: Any, server: Served) -> None:
    torch._dynamo.reset()
    x, call = rows(5, 4), make(RemoteModule(server.url("mix")))
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), make(mix_twin)(x))
    assert server["mix"].counts in ({(1, 0)} if make is make_vmap else {(1, 1), (0, 1)})  # a value may go unused


@pytest.mark.slow
@pytest.mark.parametrize("how", ["jvp", "jvp of vmap", "jacfwd", "hessian", "jvp of grad", "jacrev of grad"])
def test_a_derivative_that_there_is_none_of_is_refused_when_compiled_too(how: str, server: Served) -> None:
    torch._dynamo.reset()
    module, attempt = RemoteModule(server.url("mix")), REFUSED[how][0]
    compiled = torch.compile(lambda x: attempt(module, x), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=f"{NO_FORWARD}|{NO_SECOND}|NotDifferentiable"):
        compiled(rows(2, 4))


@pytest.mark.slow
def test_a_second_backward_through_a_compiled_model_is_refused(server: Served) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(RemoteModule(server.url("mix")), backend="aot_eager", fullgraph=True)
    with pytest.raises((NotDifferentiable, RuntimeError), match=r"second derivative|double backward"):
        backward_twice(compiled, rows(2, 4))


# 10: autocast and narrow floats


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_under_autocast_a_float32_model_stays_float32(kind: Any, server: Served) -> None:
    layer, module = nn.Linear(4, 4), RemoteModule(server.url("mix"))
    x = rows(3, 4)
    with torch.autocast("cpu", kind):
        hidden = layer(x)
        assert hidden.dtype == kind
        y = module(hidden)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, mix_twin(hidden.float()))
    y.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.abs().sum() > 0


def test_under_autocast_a_bfloat16_model_takes_float32(server: Served) -> None:
    module, x = RemoteModule(server.url("half")), rows(3, 4).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.tolist() == [[2.0] * 4] * 3


def test_under_autocast_whole_numbers_are_left_alone(server: Served) -> None:
    module, x = RemoteModule(server.url("gather")), rows(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x.bfloat16(), torch.tensor([[1], [3]])).dtype == torch.float32
        with pytest.raises(SignatureError, match="input 'at': expected int64"):
            module(x, torch.tensor([[1], [3]], dtype=torch.int32))


@pytest.mark.parametrize("around", [contextlib.nullcontext, lambda: torch.autocast("cpu", enabled=False)])
def test_without_autocast_bfloat16_does_not_fit_a_float32_model(around: Any, server: Served) -> None:
    module = RemoteModule(server.url("mix"))
    with around(), pytest.raises(SignatureError, match=r"input 'x': expected float32 \[-1, 4\], got bfloat16 \[2, 4\]"):
        module(rows(2, 4).bfloat16())
    assert server["mix"].calls == []


def test_a_bfloat16_gradient_travels_bit_for_bit(server: Served) -> None:
    x = rows(3, 4).bfloat16().requires_grad_()
    cotangent = torch.tensor([[1.0, -0.0, float("inf"), 3e-39]] * 3, dtype=torch.bfloat16)
    RemoteModule(server.url("half"))(x).backward(cotangent)
    assert torch.equal(x.grad.view(torch.int16), (cotangent * 2).view(torch.int16))


# 11: what is not needed is not asked for


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_no_gradient_is_asked_for(mode: Any, server: Served) -> None:
    x = rows(2, 4).requires_grad_()
    with mode():
        assert not RemoteModule(server.url("mix"))(x).requires_grad
    assert server["mix"].counts == (1, 0)


def test_without_an_input_that_needs_it_no_gradient_is_asked_for(server: Served) -> None:
    head = nn.Linear(4, 1)
    head(RemoteModule(server.url("mix"))(rows(2, 4))).sum().backward()
    assert head.weight.grad is not None
    assert server["mix"].counts == (1, 0)


@pytest.mark.parametrize("needed", ["a", "b"])
def test_only_the_gradient_that_is_needed_is_asked_for(needed: str, server: Served) -> None:
    inputs = {"a": rows(2, 4), "b": rows(2, 4, seed=1)}
    inputs[needed].requires_grad_()
    product, total = RemoteModule(server.url("pair"))(**inputs)
    (product + total).sum().backward()
    assert server["pair"].calls[-1].wanted == (f"gradient:{needed}",)
    assert server["pair"].counts == (1, 1)


def test_an_output_that_nothing_was_made_of_gets_no_cotangent(server: Served) -> None:
    a, b = rows(2, 4).requires_grad_(), rows(2, 4, seed=1).requires_grad_()
    product, _ = RemoteModule(server.url("pair"))(a, b)
    product.sum().backward()
    assert server["pair"].calls[-1].given == ("a", "b", "cotangent:product")
    torch.testing.assert_close((a.grad, b.grad), (b.detach(), a.detach()))


def test_outputs_that_were_not_asked_for_are_not_differentiated_either(server: Served) -> None:
    a, b = rows(2, 4).requires_grad_(), rows(2, 4, seed=1).requires_grad_()
    RemoteModule(server.url("pair"), outputs=["total"])(a, b).sum().backward()
    assert [asked.wanted for asked in server["pair"].calls] == [("total",), ("gradient:a", "gradient:b")]
    assert server["pair"].calls[-1].given == ("a", "b", "cotangent:total")


# batches in pieces


def test_a_large_batch_is_sent_in_pieces(server: Served) -> None:
    module = RemoteModule(server.url("mix"), max_rows=3)
    agree(module, mix_twin, rows(10, 4))
    assert server["mix"].counts == (4, 4)
    assert sorted(asked.rows for asked in server["mix"].calls) == [1, 1, 3, 3, 3, 3, 3, 3]


def test_pieces_share_what_has_no_rows_and_sum_its_gradient(server: Served) -> None:
    module = RemoteModule(server.url("matmul"), max_rows=3)
    agree(module, torch.matmul, rows(10, 4), rows(4, 3, seed=1))
    assert server["matmul"].counts == (4, 4)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_batch_that_fits_is_one_message(count: int, server: Served) -> None:
    agree(RemoteModule(server.url("mix"), max_rows=3), mix_twin, rows(count, 4))
    assert server["mix"].counts == (1, 1)


def test_vmap_keeps_to_the_most_rows_in_a_message(server: Served) -> None:
    x = rows(10, 4)
    torch.testing.assert_close(vmap(RemoteModule(server.url("mix"), max_rows=3))(x), mix_twin(x))
    assert server["mix"].counts == (4, 0)


@pytest.mark.parametrize("where", ["remote", "local"])
def test_pieces_are_on_their_way_at_the_same_time(where: str) -> None:
    together = threading.Barrier(2)  # a server runs as many calls at once as there are cores, and at least two

    def meet(x: Any) -> Any:
        together.wait(20)
        return np.sin(x)

    model = FunctionServable(meet, [spec("x")], [spec("y")])
    with server_ref.running({"meet": model}) as url:
        x = rows(10, 4)
        torch.testing.assert_close(RemoteModule(url if where == "remote" else model, max_rows=3)(x), torch.sin(x))


def test_a_piece_that_fails_is_the_failure_of_the_call() -> None:
    def picky(x: Any) -> Any:
        if (x < 0).any():
            raise ValueError("no negative numbers")
        return x

    x = torch.ones(10, 4)
    x[7] = -1
    with server_ref.running({"picky": FunctionServable(picky, [spec("x")], [spec("y")])}) as url:
        module = RemoteModule(url, max_rows=3)
        with pytest.raises(Exception, match="no negative numbers"):
            module(x)
        assert torch.equal(module(x.abs()), torch.ones(10, 4))


def test_inputs_of_different_row_counts_are_refused_before_they_are_cut_in_pieces(server: Served) -> None:
    with pytest.raises(SignatureError, match="rows"):
        RemoteModule(server.url("pair"), max_rows=3)(rows(9, 4), rows(7, 4))
    assert server["pair"].calls == []


@pytest.mark.parametrize("options", [{"max_rows": 0}, {"max_rows": -1}, {"max_rows": 3, "batched": False}])
def test_most_rows_that_make_no_sense_are_refused(options: Any, server: Served) -> None:
    with pytest.raises(SpecError, match="max_rows"):
        RemoteModule(server.url("mix"), **options)
