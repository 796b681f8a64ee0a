"""The custom ops: a remote call as one node of a graph, in eager mode, compiled, exported and under vmap.

Each op has what really runs, what it looks like to a tracer (`_fake_*`), and how it runs on a batch (`_vmap_*`). Their
gradients are `autograd`'s.

    infer(handle, inputs)                  -> outputs
    vjp(handle, inputs, cotangents)        -> gradients
    start(handle, inputs)                  -> ticket       wait(tickets, inputs)          -> outputs
    start_vjp(handle, inputs, cotangents)  -> ticket       wait_vjp(ticket, inputs)       -> gradients

A ticket is a float64 tensor `(1,)`, so that autograd carries it as if it were a gradient; 0 stands for no call. `wait`
takes the tickets of all calls that were started together, so that no compiler moves it before another's start. Its
inputs say what shapes to expect, and stay alive while they are being sent. `number` keeps compilers from merging two
starts into one, whose answer would be waited for twice. Each op is there twice: compilers may merge and drop the plain
ones, but not those called `*_ordered`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch._compile import _disable_dynamo
from torch._library.effects import EffectType
from torch.library import _register_effectful_op

from remote_ops.errors import SignatureError
from remote_ops.signature import Array
from remote_ops.torch import started
from remote_ops.torch.autograd import kernels
from remote_ops.torch.opspec import TORCH_OF, OpSpec, has_rows
from remote_ops.torch.strings import unpack_strings
from remote_ops.torch.target import Target
from remote_ops.torch.tensors import arrays_of, tensor_of

__all__ = ["op"]

Tensor = torch.Tensor
Tensors = Sequence[torch.Tensor]
Dim = int | None
_CPU = torch.device("cpu")


def op(name: str, *, pure: bool) -> Any:
    """The op of that name; `pure` ones may be merged and dropped by compilers."""
    return getattr(torch.ops.remote_ops, name if pure else f"{name}_ordered").default


# --------------------------------------------------------------------------- what really runs


def _infer(handle: Tensor, inputs: Tensors, text: str) -> list[Tensor]:
    target, spec = Target.of(handle), OpSpec.read(text)
    arrays = _arrays(spec, inputs)
    results = target.infer(spec, arrays)
    found = spec.checked_outputs(results, _rows(spec, inputs), at=target.at)
    return _tensors(found, None if target.is_remote else arrays.values(), inputs)


def _vjp(
    handle: Tensor, inputs: Tensors, cotangents: Tensors, given: Sequence[int], wanted: Sequence[int], text: str
) -> list[Tensor]:
    target, spec = Target.of(handle), OpSpec.read(text)
    arrays = _arrays(spec, inputs, cotangents, given)
    results = target.gradients(spec, arrays, _names(spec, wanted))
    return _gradients(spec, results, arrays.values(), inputs, wanted, target.at)


def _start(handle: Tensor, inputs: Tensors, number: int, text: str) -> Tensor:
    target, spec = Target.of(handle), OpSpec.read(text)
    arrays = target.servable.signature.fit_inputs(_arrays(spec, inputs), at=target.at)
    return _ticket(target, target.submit(spec, arrays, spec.output_names))


def _wait(tickets: Tensor, index: int, number: int, handle: Tensor, inputs: Tensors, text: str) -> list[Tensor]:
    spec = OpSpec.read(text)
    results, at = started.take(int(tickets[index]))
    found = spec.checked_outputs(results, _rows(spec, inputs), at=at)
    return _tensors(found, _views(inputs), inputs)


def _start_vjp(
    handle: Tensor,
    inputs: Tensors,
    cotangents: Tensors,
    given: Sequence[int],
    wanted: Sequence[int],
    number: int,
    text: str,
) -> Tensor:
    with _all_or_none():
        target, spec = Target.of(handle), OpSpec.read(text)
        # A compiler may write something else into the memory of a cotangent, once this op has returned.
        arrays = _arrays(spec, inputs, [cotangent.clone() for cotangent in cotangents], given)
        return _ticket(target, target.submit(spec, arrays, target.wanted(_names(spec, wanted))))


def _wait_vjp(ticket: Tensor, inputs: Tensors, wanted: Sequence[int], text: str) -> list[Tensor]:
    spec, number = OpSpec.read(text), int(ticket[0])
    if not number:  # nothing depends on the outputs
        return [torch.zeros_like(inputs[index], memory_format=torch.contiguous_format) for index in wanted]
    with _all_or_none():
        results, at = started.take(number)
        gradients = _gradients(spec, results, _views(inputs), inputs, wanted, at)
    for device in {gradient.device for gradient in gradients if gradient.is_cuda}:
        torch.cuda.current_stream(device).synchronize()  # a ticket is on the CPU: autograd knows no stream of this node
    return gradients


@contextmanager
def _all_or_none() -> Iterator[None]:
    """Give up the other products of a backward pass when one fails: nobody will wait for them."""
    try:
        yield
    except BaseException:
        started.give_up_pass()
        raise


def _ticket(target: Target, future: Any) -> Tensor:
    number = started.start(future, target.at)
    return torch.tensor([number], dtype=torch.float64, device=_CPU)


def _names(spec: OpSpec, indexes: Sequence[int]) -> list[str]:
    return [spec.input_names[index] for index in indexes]


def _rows(spec: OpSpec, inputs: Tensors) -> int | None:
    shape = () if spec.rows_input is None else inputs[spec.rows_input].shape
    return shape[0] if shape else None


def _arrays(spec: OpSpec, inputs: Tensors, cotangents: Tensors = (), given: Sequence[int] = ()) -> dict[str, Array]:
    arrays = dict(zip(spec.input_names, arrays_of(inputs), strict=True))
    if cotangents:
        names = [f"cotangent:{spec.output_names[index]}" for index in given]
        arrays.update(zip(names, arrays_of(cotangents), strict=True))
    for name in spec.string_names:
        arrays[name] = unpack_strings(torch.from_numpy(arrays[name]))
    return arrays


def _views(inputs: Tensors) -> list[Array]:
    """What is shared with the memory of inputs: views of those on the CPU."""
    return arrays_of([tensor for tensor in inputs if tensor.is_cpu])


def _tensors(results: list[Array], sent: Iterable[Array] | None, inputs: Tensors) -> list[Tensor]:
    """Results as tensors; `sent` are the arrays that a model of this process may have given back, None if it cannot."""
    device = _device(inputs)
    return [tensor_of(array, device) for array in (results if sent is None else _unshared(list(sent), results))]


def _gradients(
    spec: OpSpec, results: Any, sent: Iterable[Array], inputs: Tensors, wanted: Sequence[int], at: str
) -> list[Tensor]:
    """Gradients as tensors like their inputs; a model of bfloat16 that took a float32 gives a bfloat16 back."""
    found = spec.checked_gradients(results, wanted, [tuple(inputs[index].shape) for index in wanted], at=at)
    arrays = _unshared(list(sent), found)
    return [
        tensor_of(array, inputs[index].device).to(inputs[index].dtype)
        for array, index in zip(arrays, wanted, strict=True)
    ]


def _device(inputs: Tensors) -> torch.device:
    """Where results go: to the first input that is not on the CPU, else there."""
    for tensor in inputs:
        if not tensor.is_cpu:
            return tensor.device
    return _CPU


def _unshared(inputs: list[Array], results: Iterable[Array]) -> list[Array]:
    """Copy what a model in this process gave back of its inputs, or gave twice, or laid out otherwise than in rows."""
    seen, found = inputs, []
    for array in results:
        shared = any(np.may_share_memory(array, other) for other in seen)
        own = array.copy(order="C") if shared or not array.flags.c_contiguous else array
        seen.append(own)
        found.append(own)
    return found


# --------------------------------------------------------------------------- what a tracer sees


def _fake_outputs(inputs: Tensors, text: str) -> list[Tensor]:
    spec = OpSpec.read(text)
    shapes = spec.output_shapes(inputs, lambda: torch.library.get_ctx().new_dynamic_size())
    return [
        torch.empty(shape, dtype=TORCH_OF[output.dtype], device=_device(inputs))
        for output, shape in zip(spec.outputs, shapes, strict=True)
    ]


def _fake_gradients(inputs: Tensors, wanted: Sequence[int]) -> list[Tensor]:
    return [torch.empty_like(inputs[index], memory_format=torch.contiguous_format) for index in wanted]


def _fake_ticket() -> Tensor:
    return torch.empty(1, dtype=torch.float64, device="cpu")


# --------------------------------------------------------------------------- how it runs on a batch


class _Batch:
    """The samples of a vmap as rows of one call, if the model has rows; else a call for each sample.

    A sample is laid out as the model wants it, `(rows, *item)`, or is an `(*item)` without the axis of rows, which the
    batch then stands for.
    """

    def __init__(self, spec: OpSpec, size: int, inputs: Tensors, dims: Sequence[Dim], wanted: Sequence[int]) -> None:
        self.size = size
        ranks = {
            tensor.dim() - (dim is not None) - len(input.shape or ())
            for input, tensor, dim in zip(spec.inputs, inputs, dims, strict=True)
            if has_rows(input)
        }
        self.supplies_rows = ranks == {-1}
        self.rows_each = 0  # where a sample has rows of its own
        self.folds = (
            spec.batched
            and ranks in ({0}, {-1})
            and all(has_rows(output) for output in spec.outputs)
            and all(has_rows(input) or dim is None for input, dim in zip(spec.inputs, dims, strict=True))
            and all(has_rows(spec.inputs[index]) for index in wanted)
        )
        self._row_inputs = [has_rows(input) for input in spec.inputs]
        index = spec.rows_input
        if self.folds and index is not None and not self.supplies_rows:
            self.rows_each = inputs[index].shape[1 if dims[index] == 0 else 0]

    def inputs(self, inputs: Tensors, dims: Sequence[Dim]) -> list[Tensor]:
        """The inputs of the one call."""
        return [
            self.rows(tensor, dim) if has_rows else tensor
            for tensor, dim, has_rows in zip(inputs, dims, self._row_inputs, strict=True)
        ]

    def rows(self, tensor: Tensor, dim: Dim) -> Tensor:
        """The samples of one tensor as rows: `(size * rows, *item)`."""
        samples = tensor.expand(self.size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return samples if self.supplies_rows else samples.flatten(0, 1)

    def samples(self, results: Tensors) -> tuple[list[Tensor], list[Dim]]:
        """Rows as samples again."""
        if not self.supplies_rows:
            results = [result.reshape(self.size, self.rows_each, *result.shape[1:]) for result in results]
        return list(results), [0] * len(results)


def _one(tensors: Tensors, dims: Sequence[Dim], sample: int) -> list[Tensor]:
    """One sample of each tensor."""
    return [
        tensor if dim is None else tensor.select(dim, sample) for tensor, dim in zip(tensors, dims, strict=True)
    ]  # fmt: skip


def _stacked(size: int, call: Callable[[int], Tensors]) -> tuple[list[Tensor], list[Dim]]:
    """A call for each sample."""
    if not size:
        raise SignatureError(
            "a vmap over no samples, of a model that wants a call for each: expected one sample or more",
            got="0 samples",
        )
    results = [torch.stack(tensors) for tensors in zip(*[call(sample) for sample in range(size)], strict=True)]
    return results, [0] * len(results)


def _tickets(ticket: Tensor, size: int) -> tuple[Tensor, int]:
    """The one ticket of all samples, as a batch: what waits must know that it is one."""
    return ticket.expand(size, *ticket.shape), 0


def _vmap_infer(op: Any) -> Any:
    def rule(info: Any, dims: Any, handle: Tensor, inputs: Tensors, text: str) -> Any:
        batch = _Batch(OpSpec.read(text), info.batch_size, inputs, dims[1], ())
        if batch.folds:
            return batch.samples(op(handle, batch.inputs(inputs, dims[1]), text))
        return _stacked(info.batch_size, lambda sample: op(handle, _one(inputs, dims[1], sample), text))

    return rule


def _vmap_vjp(op: Any) -> Any:
    def rule(
        info: Any, dims: Any, handle: Tensor, inputs: Tensors, cotangents: Tensors, given: Any, wanted: Any, text: str
    ) -> Any:
        batch = _Batch(OpSpec.read(text), info.batch_size, inputs, dims[1], wanted)
        if batch.folds:
            rows = [batch.rows(tensor, dim) for tensor, dim in zip(cotangents, dims[2], strict=True)]
            return batch.samples(op(handle, batch.inputs(inputs, dims[1]), rows, given, wanted, text))
        return _stacked(
            info.batch_size,
            lambda sample: op(
                handle, _one(inputs, dims[1], sample), _one(cotangents, dims[2], sample), given, wanted, text
            ),
        )

    return rule


def _vmap_start(op: Any) -> Any:
    def rule(info: Any, dims: Any, handle: Tensor, inputs: Tensors, number: int, text: str) -> Any:
        batch = _Batch(OpSpec.read(text), info.batch_size, inputs, dims[1], ())
        if batch.folds:
            return _tickets(op(handle, batch.inputs(inputs, dims[1]), number, text), info.batch_size)
        samples, _ = _stacked(info.batch_size, lambda sample: [op(handle, _one(inputs, dims[1], sample), number, text)])
        return samples[0], 0

    return rule


def _vmap_start_vjp(op: Any) -> Any:
    def rule(
        info: Any, dims: Any, handle: Tensor, inputs: Tensors, cotangents: Tensors, given: Any, wanted: Any, *rest: Any
    ) -> Any:
        batch = _Batch(OpSpec.read(rest[-1]), info.batch_size, inputs, dims[1], wanted)
        if batch.folds:
            rows = [batch.rows(tensor, dim) for tensor, dim in zip(cotangents, dims[2], strict=True)]
            return _tickets(op(handle, batch.inputs(inputs, dims[1]), rows, given, wanted, *rest), info.batch_size)

        def one(sample: int) -> list[Tensor]:
            seeds = _one(cotangents, dims[2], sample)
            return [op(handle, _one(inputs, dims[1], sample), seeds, given, wanted, *rest)]

        samples, _ = _stacked(info.batch_size, one)
        return samples[0], 0

    return rule


def _vmap_wait(op: Any) -> Any:
    def rule(
        info: Any, dims: Any, tickets: Tensor, index: int, number: int, handle: Tensor, inputs: Tensors, text: str
    ) -> Any:
        batch = _Batch(OpSpec.read(text), info.batch_size, inputs, dims[4], ())
        if batch.folds:
            (one,) = _one([tickets], [dims[0]], 0)
            return batch.samples(op(one, index, number, handle, batch.inputs(inputs, dims[4]), text))

        def one_of(sample: int) -> Any:
            (one,) = _one([tickets], [dims[0]], sample)
            return op(one, index, number, handle, _one(inputs, dims[4], sample), text)

        return _stacked(info.batch_size, one_of)

    return rule


def _vmap_wait_vjp(op: Any) -> Any:
    def rule(info: Any, dims: Any, ticket: Tensor, inputs: Tensors, wanted: Any, text: str) -> Any:
        batch = _Batch(OpSpec.read(text), info.batch_size, inputs, dims[1], wanted)
        if batch.folds:
            one = _one([ticket], [dims[0]], 0)[0]
            return batch.samples(op(one, batch.inputs(inputs, dims[1]), wanted, text))
        return _stacked(
            info.batch_size,
            lambda sample: op(*_one([ticket], [dims[0]], sample), _one(inputs, dims[1], sample), wanted, text),
        )

    return rule


# --------------------------------------------------------------------------- registration

_LIBRARY: Any = torch.library.Library("remote_ops", "DEF")  # type: ignore[no-untyped-call]
_VJP = "Tensor handle, Tensor[] inputs, Tensor[] cotangents, int[] given, int[] wanted"
_OPS: tuple[tuple[str, str, Any, Any, Any], ...] = (
    (
        "infer", "(Tensor handle, Tensor[] inputs, str text) -> Tensor[]",
        _infer, lambda handle, inputs, text: _fake_outputs(inputs, text), _vmap_infer,
    ),
    (
        "vjp", f"({_VJP}, str text) -> Tensor[]",
        _vjp, lambda handle, inputs, cotangents, given, wanted, text: _fake_gradients(inputs, wanted), _vmap_vjp,
    ),
    (
        "start", "(Tensor handle, Tensor[] inputs, int number, str text) -> Tensor",
        _start, lambda *_: _fake_ticket(), _vmap_start,
    ),
    (
        "wait", "(Tensor tickets, int index, int number, Tensor handle, Tensor[] inputs, str text) -> Tensor[]",
        _wait, lambda tickets, index, number, handle, inputs, text: _fake_outputs(inputs, text), _vmap_wait,
    ),
    (
        "start_vjp", f"({_VJP}, int number, str text) -> Tensor",
        _start_vjp, lambda *_: _fake_ticket(), _vmap_start_vjp,
    ),
    (
        "wait_vjp", "(Tensor ticket, Tensor[] inputs, int[] wanted, str text) -> Tensor[]",
        _wait_vjp, lambda ticket, inputs, wanted, text: _fake_gradients(inputs, wanted), _vmap_wait_vjp,
    ),
)  # fmt: skip


def _register(*, pure: bool) -> None:
    ops = {}
    for name, schema, run, fake, vmap in _OPS:
        called = name if pure else f"{name}_ordered"
        _LIBRARY.define(called + schema, tags=[torch.Tag.cudagraph_unsafe])
        ops[name] = getattr(torch.ops.remote_ops, called).default
        # Composite, so that a local model may use autograd in it; explicit, so that a tracer does not look inside.
        _LIBRARY.impl(called, _disable_dynamo(run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"remote_ops::{called}", fake, lib=_LIBRARY)
        torch.library.register_vmap(f"remote_ops::{called}", vmap(ops[name]), lib=_LIBRARY)
        if not pure:
            _register_effectful_op(ops[name], EffectType.ORDERED)
    for name, kernel in kernels(ops).items():
        _LIBRARY.impl(name if pure else f"{name}_ordered", kernel, "Autograd")


_register(pure=True)
_register(pure=False)
