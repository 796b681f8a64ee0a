"""The gradients of the ops: they come over the wire, and what has none says so.

Each op has a kernel for autograd, as torch's own ops do. So one form serves eager mode, compiled and exported graphs
and `torch.func`, nested or not. What `torch.library.register_autograd` makes would fail in `torch.func`, and give
silent zeros in forward mode. Here is no I/O.

In a pair of start and wait, the backward of wait starts the remote product and hands its ticket down as the gradient of
the forward ticket; the backward of start waits for it. So all calls that were started together are on their way
together in both directions, though autograd runs one node at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from remote_ops.errors import NotDifferentiable

__all__ = ["kernels"]

Tensor = torch.Tensor
Tensors = Sequence[torch.Tensor]
Op = Callable[..., Any]


def kernels(ops: dict[str, Op]) -> dict[str, Op]:
    """The autograd kernel of each op.

    Args:
        ops: the six ops by name, with the names of `ops`.
    """

    def infer(handle: Tensor, inputs: Tensors, text: str) -> list[Tensor]:
        if not _is_recorded(inputs):
            return _below(None, ops["infer"], handle, inputs, text)  # type: ignore[no-any-return]
        return list(_apply(_Infer, ops, handle, text, *inputs))

    def start(handle: Tensor, inputs: Tensors, number: int, text: str) -> Tensor:
        return _apply(_Start, ops, handle, number, text, *inputs)  # type: ignore[no-any-return]

    def wait(tickets: Tensor, index: int, number: int, handle: Tensor, inputs: Tensors, text: str) -> list[Tensor]:
        return list(_apply(_Wait, ops, tickets, index, number, handle, text, *inputs))

    def vjp(handle: Tensor, inputs: Tensors, cotangents: Tensors, given: Any, wanted: Any, text: str) -> list[Tensor]:
        return list(_apply(_Vjp, ops, handle, len(inputs), given, wanted, text, *inputs, *cotangents))

    def start_vjp(
        handle: Tensor, inputs: Tensors, cotangents: Tensors, given: Any, wanted: Any, number: int, text: str
    ) -> Tensor:
        return _apply(  # type: ignore[no-any-return]
            _StartVjp, ops, handle, len(inputs), given, wanted, number, text, *inputs, *cotangents
        )

    def wait_vjp(ticket: Tensor, inputs: Tensors, wanted: Any, text: str) -> list[Tensor]:
        return list(_apply(_WaitVjp, ops, ticket, wanted, text, *inputs))

    found: tuple[Op, ...] = (infer, vjp, start, wait, start_vjp, wait_vjp)
    # Where a graph broke and they run by themselves, dynamo would trace into them.
    return {kernel.__name__: _disable_dynamo(kernel) for kernel in found}


def _is_recorded(inputs: Tensors) -> bool:
    """Whether any kind of derivative may be asked for: if not, a call needs no node."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


def _apply(function: Any, *args: Any) -> Any:
    if forward_ad._current_level >= 0 and any(_has_tangent(arg) for arg in args):
        raise _reverse_only()  # before anything is sent
    if not torch._C._are_functorch_transforms_active():
        return function.apply(None, *args)
    # What `torch.autograd.Function` would do here is for functions that compute; ours only call ops.
    with enable_single_level_autograd_function():
        return function.apply(torch.is_grad_enabled(), *args)


def _has_tangent(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None  # type: ignore[no-untyped-call]


def _reverse_only() -> NotDifferentiable:
    return NotDifferentiable(
        "a remote model has no forward-mode derivative: expected backward(), torch.func.grad, vjp or jacrev, "
        "got forward_ad or torch.func.jvp"
    )


def _below(grad: bool | None, op: Op, *args: Any) -> Any:
    """Call an op beneath this level of autograd; `grad` is the mode of the levels around this one, if there are any."""
    with torch._C._AutoDispatchBelowAutograd():
        if grad is None:
            return op(*args)
        # A function's forward runs with both modes off: that is for this level, and not for those around it.
        with torch.set_grad_enabled(grad), forward_ad._set_fwd_grad_enabled(True):
            return op(*args)


def _wanted(needs: Sequence[bool]) -> list[int]:
    return [index for index, need in enumerate(needs) if need]


def _given(cotangents: Sequence[Tensor | None]) -> list[int]:
    """The outputs that take part in a product: floats that something was computed from."""
    return [i for i, given in enumerate(cotangents) if given is not None and given.dtype.is_floating_point]


def _spread(gradients: Tensors, wanted: Sequence[int], size: int) -> list[Tensor | None]:
    found: list[Tensor | None] = [None] * size
    for index, gradient in zip(wanted, gradients, strict=True):
        found[index] = gradient
    return found


class _ReverseOnly(_SingleLevelFunction):
    """What has a backward, and no forward-mode derivative; the names of its parts are torch's."""

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _reverse_only()


class _Infer(_ReverseOnly):
    @staticmethod
    def forward(grad: bool | None, ops: dict[str, Op], handle: Tensor, text: str, *inputs: Tensor) -> Any:
        return tuple(_below(grad, ops["infer"], handle, list(inputs), text))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.ops, handle, ctx.text, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(handle, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        handle, *inputs = ctx.saved_tensors
        wanted, given = _wanted(ctx.needs_input_grad[4:]), _given(cotangents)
        if not given:
            return (None,) * (4 + len(inputs))
        gradients = ctx.ops["vjp"](handle, inputs, [cotangents[index] for index in given], given, wanted, ctx.text)
        return (*[None] * 4, *_spread(gradients, wanted, len(inputs)))


class _Start(_ReverseOnly):
    @staticmethod
    def forward(grad: bool | None, ops: dict[str, Op], handle: Tensor, number: int, text: str, *inputs: Tensor) -> Any:
        return _below(grad, ops["start"], handle, list(inputs), number, text)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.ops, _, _, ctx.text, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, ticket: Any) -> Any:
        inputs, wanted = list(ctx.saved_tensors), _wanted(ctx.needs_input_grad[5:])
        gradients = ctx.ops["wait_vjp"](ticket, inputs, wanted, ctx.text)
        return (*[None] * 5, *_spread(gradients, wanted, len(inputs)))


class _Wait(_ReverseOnly):
    @staticmethod
    def forward(
        grad: bool | None,
        ops: dict[str, Op],
        tickets: Tensor,
        index: int,
        number: int,
        handle: Tensor,
        text: str,
        *inputs: Tensor,
    ) -> Any:
        return tuple(_below(grad, ops["wait"], tickets, index, number, handle, list(inputs), text))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.ops, tickets, ctx.index, ctx.number, handle, ctx.text, *tensors = inputs
        ctx.size = len(tickets)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(handle, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        handle, *inputs = ctx.saved_tensors
        wanted, given = _wanted(ctx.needs_input_grad[7:]), _given(cotangents)
        tickets = None
        if wanted and given:
            seeds = [cotangents[index] for index in given]
            ticket = ctx.ops["start_vjp"](handle, inputs, seeds, given, wanted, ctx.number, ctx.text)
            tickets = torch.nn.functional.pad(ticket, (ctx.index, ctx.size - ctx.index - 1))
        return (None, None, tickets, None, None, None, None, *[None] * len(inputs))


class _Once(_ReverseOnly):
    """What runs in a backward: it has no gradient of its own, and says so."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotDifferentiable(
            "a remote model has no second derivative: expected one backward through it, got the backward of a "
            "gradient; leave out create_graph=True, or detach() the gradient"
        )


class _Vjp(_Once):
    @staticmethod
    def forward(
        grad: bool | None,
        ops: dict[str, Op],
        handle: Tensor,
        count: int,
        given: Any,
        wanted: Any,
        text: str,
        *tensors: Tensor,
    ) -> Any:
        return tuple(_below(grad, ops["vjp"], handle, tensors[:count], tensors[count:], given, wanted, text))


class _StartVjp(_Once):
    @staticmethod
    def forward(
        grad: bool | None,
        ops: dict[str, Op],
        handle: Tensor,
        count: int,
        given: Any,
        wanted: Any,
        number: int,
        text: str,
        *tensors: Tensor,
    ) -> Any:
        return _below(grad, ops["start_vjp"], handle, tensors[:count], tensors[count:], given, wanted, number, text)


class _WaitVjp(_Once):
    @staticmethod
    def forward(grad: bool | None, ops: dict[str, Op], ticket: Tensor, wanted: Any, text: str, *inputs: Tensor) -> Any:
        return tuple(_below(grad, ops["wait_vjp"], ticket, inputs, wanted, text))
