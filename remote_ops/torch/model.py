"""A torch module, a TorchScript file or an exported program as a servable, gradients included, on CPU or CUDA.

It computes; it does not batch, queue or limit how many calls run at once (`concurrency` says how many fit).
State: the module and the signature are constant, unless the module itself keeps state; a stream of CUDA belongs to
one thread. So no lock.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from os import PathLike
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from remote_ops.deadline import Deadline
from remote_ops.errors import EncodeError, InternalError, NotDifferentiable, RemoteOpsError, SignatureError, SpecError
from remote_ops.servable import run_checked, split_cotangents
from remote_ops.signature import DTYPES, Array, Signature, TensorSpec, describe
from remote_ops.torch.files import reason_of
from remote_ops.torch.opened import (
    Opened,
    declared,
    dtype_name,
    in_dtype,
    named_outputs,
    on_device,
    open_model,
    spec_of,
    writes_to_inputs,
)
from remote_ops.torch.tensors import arrays_of, tensor_of

__all__ = ["TorchModel"]

Tensors = dict[str, torch.Tensor]

_MAX_TRIED = 1 << 24  # elements of all inputs together, in a dry run
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_COMPUTE: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
}
_AUTOGRAD = [
    torch._C.DispatchKey.AutogradFunctionality,
    torch._C.DispatchKey.AutogradOther,
    torch._C.DispatchKey.AutogradNestedTensor,
]
_CUDA_CONCURRENCY = 2  # while one run computes, the other's inputs and outputs move
# What the open sizes are in a dry run, twice: of axis 0, and of the others. A size that a model halves or needs a
# multiple of must still tell the two apart; where nothing fits, axis 0 may be no batch but a length.
_LENGTHS = ((32, 64), (4, 8), (256, 512), (1024, 2048), (16, 48))
_TRIES = (*(((2, 3), lengths) for lengths in _LENGTHS), *((lengths, lengths) for lengths in _LENGTHS))


class TorchModel:
    """A torch model as a servable.

    Args:
        model: a module; a TorchScript module or the path of one (`.pt`, `.pth`, `.jit`); an exported program, or the
            path of one (`.pt2`). A module is put in eval mode, and copied if it has to move to another device or
            dtype; nothing else about it changes.
        inputs: in the order of `forward`'s positional arguments, each a `TensorSpec` or text such as
            `x: float32 [-1, 1024]`; a program says them itself.
        outputs: in the order that `forward` returns them, or by the keys of the dict that it returns; learned from dry
            runs on zeros unless said. They are called `output`, or `output_0`, `output_1`, ... where the model gives
            no names.
        weights: a `.safetensors` file, or what `torch.save(module.state_dict(), path)` wrote; put into the module.
        device: `cuda` or `cuda:N` for that GPU; `cpu`; `auto` for CUDA where there is one, else the CPU.
        dtype: what to compute in: `bfloat16` (`bf16`), `float16` (`fp16`) or `float32`; callers see no difference but
            precision.
        compile: compile it with `torch.compile` before the first request.
        name: how the model names itself; the file's stem or the module's class unless said.

    Raises:
        SpecError: a file that is none of these, or that would run code of its own; weights that do not fit; inputs that
            are missing, or outputs that cannot be learned; no such device; a dtype that the model cannot compute in; or
            a model that cannot be compiled.

    Gradients of every float input are given, if an output is float too. Loading reads the whole file and runs the model
    a few times on zeros. On the CPU inputs are not copied, nor outputs that are the model's own; on CUDA each call
    copies both through pinned memory, on a stream of its thread, and waits once.
    """

    never_waits: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module | torch.export.ExportedProgram | str | PathLike[str],
        *,
        inputs: Sequence[TensorSpec | str] | TensorSpec | str | None = None,
        outputs: Sequence[TensorSpec | str] | TensorSpec | str | None = None,
        weights: str | PathLike[str] | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        compile: bool = False,
        name: str | None = None,
    ) -> None:
        self._device = _device(str(device))
        self._compute = _compute_dtype(None if dtype is None else str(dtype).removeprefix("torch."))
        self._casts = False
        self._streams = threading.local()
        self._differentiable = True
        self.concurrency = _CUDA_CONCURRENCY if self._device.type == "cuda" else _room_on_cpu()
        opened = open_model(model, weights)
        self._place = opened.place
        taken, given = declared(opened, inputs, outputs)
        opened = on_device(opened, self._device)
        self._use(opened)
        self._copies = opened.program is not None and writes_to_inputs(opened.program)
        sizes, given = self._dry_run(opened.for_trials(), name or opened.name, taken, given)
        self._signature = _signed(name or opened.name, taken, given)
        self._differentiable = any(spec.differentiable for spec in self._signature.inputs)
        if self._compute is not None:
            opened = in_dtype(opened, self._compute)
            self._use(opened)
            self._casts = True
            self._require_run(sizes, f"cannot compute in {dtype_name(self._compute)}", "dtype")
        if compile:
            self._forward = opened.calling(torch.compile(opened.module, dynamic=True))
            self._require_run(sizes, "cannot be compiled", "compile")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what the model keeps of its dry runs is for other streams too

    def __repr__(self) -> str:
        return f"TorchModel({self._place!r}, device={self.device!r})"

    @property
    def signature(self) -> Signature:
        """Inputs and outputs; a size that is open is -1, an input whose gradient is given is `differentiable`."""
        return self._signature

    @property
    def device(self) -> str:
        """Where it runs: `cpu` or `cuda:N`."""
        return str(self._device)

    def infer(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> dict[str, Array]:
        """Run the model, and give the outputs asked for (None: all); it computes all of them in any case.

        Args:
            inputs: arrays by name, of the signature's dtypes and shapes, and for gradients `cotangent:<output>` of the
                output's dtype and actual shape; a missing one is zero.
            outputs: names, in the order wanted; `gradient:<input>` for the vector-Jacobian product. Outputs asked for
                together with gradients come from the same forward run.
            config: ignored.
            deadline: checked before the start; a run that has begun is not stopped.

        Raises:
            SignatureError: names, dtypes or shapes do not fit the signature, or not each other.
            NotDifferentiable: no output with a cotangent hangs on an input whose gradient is asked for.
            DeadlineExceeded: the deadline passed before the start.
            InternalError: the model failed, or gave something other than its signature says.

        Parameters get no `.grad`; ambient modes of torch (no_grad, inference_mode, autocast) make no difference.
        """
        return run_checked(self._signature, self._run, inputs, outputs, deadline)

    def _run(self, arrays: dict[str, Array], wanted: tuple[TensorSpec, ...]) -> Mapping[str, Array]:
        primals, cotangents = split_cotangents(arrays)
        sources = [spec.name.removeprefix("gradient:") for spec in wanted if spec.name.startswith("gradient:")]
        try:
            if not sources:
                return self._outputs(primals, wanted)
            return self._gradients(primals, cotangents, sources, wanted)
        except RemoteOpsError:
            raise
        except Exception as error:
            raise self._failure(error, arrays) from error

    def _outputs(self, primals: dict[str, Array], wanted: Sequence[TensorSpec]) -> dict[str, Array]:
        with self._own_modes(grad=False):
            inputs = self._tensors(primals)
            found = self._call(inputs)
            return self._arrays(found, wanted, inputs.values())

    def _gradients(
        self,
        primals: dict[str, Array],
        cotangents: dict[str, Array],
        sources: Sequence[str],
        wanted: Sequence[TensorSpec],
    ) -> dict[str, Array]:
        with self._own_modes(grad=True):
            inputs, seeds = self._tensors(primals), self._tensors(cotangents)
            leaves = {name: inputs[name].requires_grad_() for name in sources}
            found: Tensors = {}
            if seeds or len(sources) < len(wanted):
                found = self._call(inputs)
            gradients = self._pull_back(found, seeds, leaves)
            return self._arrays({**found, **gradients}, wanted, (*inputs.values(), *seeds.values()))

    def _pull_back(self, found: Tensors, seeds: Tensors, leaves: Tensors) -> Tensors:
        """The gradients with respect to the leaves, as `gradient:<input>`; zeros where there is no cotangent."""
        values: Sequence[torch.Tensor | None] = [None] * len(leaves)
        for name, seed in seeds.items():
            self._check_cotangent(name, found, seed)
        reached = [name for name in seeds if found[name].requires_grad]
        if reached:
            values = torch.autograd.grad(
                [found[name] for name in reached],
                list(leaves.values()),
                [seeds[name] for name in reached],
                allow_unused=True,
            )
        if seeds and all(value is None for value in values):
            raise NotDifferentiable(
                f"model '{self._signature.name}' gives no gradient of {_listed(seeds)} with respect to "
                f"{_listed(leaves)}: no such output hangs on such an input in a way that torch can differentiate"
            )
        return {
            f"gradient:{name}": torch.zeros_like(leaf) if value is None else value
            for (name, leaf), value in zip(leaves.items(), values, strict=True)
        }

    def _check_cotangent(self, name: str, found: Tensors, seed: torch.Tensor) -> None:
        output = found.get(name)
        if output is None:
            raise InternalError(f"model '{self._signature.name}' gave no output '{name}'")
        if output.shape != seed.shape:
            expected, got = _described(output), _described(seed)
            raise SignatureError(
                f"input 'cotangent:{name}': expected {expected}, as output '{name}' is, got {got}",
                name=f"cotangent:{name}",
                expected=expected,
                got=got,
            )

    def _tensors(self, arrays: Mapping[str, Array]) -> Tensors:
        return {name: tensor_of(array, self._device) for name, array in arrays.items()}

    def _call(self, inputs: Tensors) -> Tensors:
        """The outputs by name; in the signature's dtypes, whatever it computes in."""
        values = list(inputs.values())
        if self._copies:
            values = [value.clone() for value in values]
        if self._casts:
            values = [value.to(self._compute) if value.is_floating_point() else value for value in values]
        specs = self._signature.outputs
        found = _by_name(self._forward(*values), specs, self._signature.name)
        if self._casts:
            declared = {spec.name: getattr(torch, spec.dtype) for spec in specs if spec.dtype in _FLOATS}
            found = {
                name: value.to(declared[name]) if name in declared and value.is_floating_point() else value
                for name, value in found.items()
            }
        return found

    def _arrays(self, found: Tensors, wanted: Sequence[TensorSpec], given: Any) -> dict[str, Array]:
        """The results asked for as arrays, none of which shares memory with an input, a weight or another result."""
        results = {spec.name: found[spec.name].detach() for spec in wanted if spec.name in found}
        if self._device.type == "cpu":
            taken = {_address(tensor) for tensor in given}
            for name, tensor in results.items():
                address = _address(tensor)
                if address in taken or address in self._own:
                    results[name] = tensor = tensor.clone()
                    address = _address(tensor)
                taken.add(address)
        try:
            return dict(zip(results, arrays_of(list(results.values())), strict=True))
        except EncodeError as error:
            raise InternalError(f"model '{self._signature.name}' broke its own signature: {error}") from error

    @contextmanager
    def _own_modes(self, *, grad: bool) -> Iterator[None]:
        """Whatever modes the calling thread is in, these hold inside; on CUDA, its own stream too.

        A model that gives gradients does not run in inference mode: what it keeps, such as a table that it fills at the
        first call, would become a tensor that autograd refuses.
        """
        with (
            _recording(),
            torch.inference_mode(not self._differentiable),
            torch.set_grad_enabled(grad),
            torch.autocast(self._device.type, enabled=False),
        ):
            if self._device.type != "cuda":
                yield
                return
            stream = getattr(self._streams, "stream", None)
            if stream is None:
                stream = self._streams.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            with torch.cuda.device(self._device), torch.cuda.stream(stream):
                yield

    def _use(self, opened: Opened) -> None:
        self._forward = opened.calling(opened.module)
        self._own = {_address(tensor) for tensor in opened.tensors()}
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # runs have streams of their own, which do not wait for this one

    def _dry_run(
        self, trial: Callable[..., Any], name: str, taken: Sequence[TensorSpec], given: tuple[TensorSpec, ...] | None
    ) -> tuple[tuple[int, int] | None, tuple[TensorSpec, ...]]:
        """Find sizes that the model runs with, learn its outputs if they are not said, and whether it writes to inputs.

        Returns:
            The size of axis 0 and of other open axes that worked, None if none did; and the outputs.
        """
        first: Exception | None = None
        for batches, lengths in _tries(taken):
            both = list(zip(batches, lengths, strict=True))
            try:
                results = [self._probe(trial, taken, sizes) for sizes in (both if given is None else both[:1])]
            except Exception as error:
                first = first or error
                continue
            if given is None:
                given = _learned(*results)
            _check_outputs(results[0], given, name)
            return both[0], given
        self._copies = True  # nobody knows that it leaves its inputs alone
        if given is not None:
            return None, given
        assert first is not None
        tried = ", ".join(f"'{spec.name}' {spec.dtype} {list(_filled(spec, (2, 32)))}" for spec in taken)
        raise SpecError(
            f"cannot learn the outputs of '{name}', which fails on zeros, first on {tried or 'no inputs'}: "
            f"{reason_of(first)}; if these inputs are right, say outputs=['output: float32 [-1, 10]']",
            path="outputs",
        ) from first

    def _probe(self, trial: Callable[..., Any], taken: Sequence[TensorSpec], sizes: tuple[int, int]) -> Any:
        with self._own_modes(grad=False):
            inputs = [
                torch.zeros(_filled(spec, sizes), dtype=getattr(torch, spec.dtype), device=self._device)
                for spec in taken
            ]
            result = trial(*inputs)
        self._copies = self._copies or any(tensor._version for tensor in inputs)
        return result

    def _require_run(self, sizes: tuple[int, int] | None, fault: str, path: str) -> None:
        """Run it as requests will, so that what fails or is slow once is so now."""
        if sizes is None:
            return
        for batch in (sizes[0], 1):
            zeros = {
                spec.name: np.zeros(_filled(spec, (batch, sizes[1])), DTYPES[spec.dtype].numpy)
                for spec in self._signature.inputs
            }
            try:
                found = self.infer(zeros)
            except RemoteOpsError as error:
                raise SpecError(f"model '{self._signature.name}' {fault}: {error.message}", path=path) from error
            sources = [f"gradient:{spec.name}" for spec in self._signature.inputs if spec.differentiable]
            if sources:
                seeds = {f"cotangent:{name}": found[name] for name in found if found[name].dtype.name in _FLOATS}
                with suppress(RemoteOpsError):  # it may give no gradients: whoever asks for one hears of it
                    self.infer({**zeros, **seeds}, sources)

    def _failure(self, error: Exception, arrays: Mapping[str, Array]) -> RemoteOpsError:
        """Say whose fault a failed run is: shapes that do not go together are the caller's."""
        reason = reason_of(error)
        got = ", ".join(f"'{name}' {describe(array)}" for name, array in arrays.items())
        if _is_open(self._signature.inputs) and _SHAPE_FAULT.search(reason):
            return SignatureError(
                f"inputs of '{self._signature.name}': expected values that go together, got {got}: {reason}",
                name=next(iter(arrays), ""),
                expected="values that go together",
                got=got,
            )
        return InternalError(f"model '{self._signature.name}' failed on {got or 'no inputs'}: {reason}")


_SHAPE_FAULT = re.compile(
    r"\bsizes?\b|\bshapes?\b|dimension|\bdims?\b|broadcast|\brank\b|expected input at|index out of range", re.IGNORECASE
)


def _signed(name: str, inputs: Sequence[TensorSpec], outputs: tuple[TensorSpec, ...]) -> Signature:
    can = any(spec.dtype in _FLOATS for spec in outputs)
    taken = [replace(spec, differentiable=can and spec.dtype in _FLOATS) for spec in inputs]
    return Signature(tuple(taken), tuple(outputs), name=name)


def _by_name(result: Any, specs: Sequence[TensorSpec], model: str) -> Tensors:
    """What a model returned, by the names of its signature."""
    if isinstance(result, torch.Tensor):
        result = (result,)
    if isinstance(result, tuple | list) and len(result) == len(specs):
        found = {spec.name: value for spec, value in zip(specs, result, strict=True)}
    elif isinstance(result, Mapping):
        found = {spec.name: result.get(spec.name) for spec in specs}
    else:
        got = len(result) if isinstance(result, tuple | list) else f"a {type(result).__name__}"
        raise InternalError(f"model '{model}': {_expected(specs)}, got {got}")
    for name, value in found.items():
        if not isinstance(value, torch.Tensor):
            raise InternalError(f"model '{model}': {_expected(specs)}, got {type(value).__name__} for '{name}'")
    return found


def _expected(specs: Sequence[TensorSpec]) -> str:
    return f"expected {len(specs)} outputs ({', '.join(spec.name for spec in specs)})"


def _check_outputs(result: Any, specs: Sequence[TensorSpec], model: str) -> None:
    try:
        _by_name(result, specs, model)
    except InternalError as error:
        raise SpecError(error.message, path="outputs") from error


def _learned(result: Any, other: Any) -> tuple[TensorSpec, ...]:
    """Outputs by what two runs gave: a size that is not the same in both is open."""
    first, second = named_outputs(result, "outputs"), named_outputs(other, "outputs")
    specs = []
    for name, tensor in first.items():
        twin = second.get(name)
        if twin is None or twin.dim() != tensor.dim():
            raise SpecError(f"output '{name}' is not always there, or not always of one rank: say it", path="outputs")
        shape = [size if size == again else -1 for size, again in zip(tensor.shape, twin.shape, strict=True)]
        specs.append(spec_of(name, tensor, "outputs", shape))
    if not specs:
        raise SpecError("the model returns no tensor", path="outputs")
    return tuple(specs)


def _filled(spec: TensorSpec, sizes: tuple[int, int]) -> tuple[int, ...]:
    """A shape with a size in each open place: the first for axis 0, the second for the others."""
    if spec.shape is None:
        raise SpecError(f"input '{spec.name}' is {spec}: expected a shape", path="inputs")
    return tuple(size if size >= 0 else sizes[axis > 0] for axis, size in enumerate(spec.shape))


def _tries(specs: Sequence[TensorSpec]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """The sizes to try, of axis 0 and of the others, each twice; after the first, none that would be huge."""
    yield _TRIES[0]
    for batches, lengths in _TRIES[1:] if _is_open(specs) else ():
        shapes = [_filled(spec, (batches[1], lengths[1])) for spec in specs if spec.shape is not None]
        if sum(math.prod(shape) for shape in shapes) <= _MAX_TRIED:
            yield batches, lengths


def _is_open(specs: Sequence[TensorSpec]) -> bool:
    return any(spec.shape is None or -1 in spec.shape for spec in specs)


def _device(text: str) -> torch.device:
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d{1,4}))?", text)
    if match is None:
        raise SpecError(f"no device '{text}': expected auto, cpu, cuda or cuda:N", path="device")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "cpu" or (text == "auto" and not there):
        return torch.device("cpu")
    index = int(match[1] or 0)
    if index >= there:
        raise SpecError(
            f"torch has no working CUDA for '{text}': expected more than {index} GPUs, got {there}; "
            "install a CUDA build of torch where there is a GPU, or say device='cpu'",
            path="device",
        )
    return torch.device("cuda", index)


def _compute_dtype(text: str | None) -> torch.dtype | None:
    if text is None:
        return None
    found = _COMPUTE.get(text)
    if found is None:
        raise SpecError(f"no dtype '{text}' to compute in: expected one of {', '.join(_COMPUTE)}", path="dtype")
    return found


def _room_on_cpu() -> int:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // torch.get_num_threads())


def _recording() -> Any:
    """Let autograd record on this thread, also inside an operator of torch, where it is off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD:
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def _described(tensor: torch.Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(f"'{name}'" for name in names)
