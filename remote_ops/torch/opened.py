"""What a torch model is before it is used: its module, on a device, in a dtype, and what it says of its signature.

It calls no model; `TorchModel` does.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from remote_ops.errors import SpecError
from remote_ops.signature import DTYPES, TensorSpec, did_you_mean, parse_spec
from remote_ops.torch.files import open_program, open_script, read_weights

__all__ = [
    "Opened",
    "declared",
    "dtype_name",
    "in_dtype",
    "named_outputs",
    "on_device",
    "open_model",
    "spec_of",
    "writes_to_inputs",
]

_Copied = TypeVar("_Copied")


@dataclass(frozen=True)
class Opened:
    """A model before it is used: its module, the program that this came from, and whether nobody else holds it."""

    module: nn.Module
    place: str
    name: str
    owned: bool
    program: torch.export.ExportedProgram | None = None

    def tensors(self) -> Iterator[torch.Tensor]:
        """Its parameters and buffers."""
        yield from self.module.parameters()
        yield from self.module.buffers()

    def for_trials(self) -> Callable[..., Any]:
        """The same function, but TorchScript as a copy: it may keep state from one call to the next."""
        scripted = isinstance(self.module, torch.jit.ScriptModule)
        return self.calling(copy.deepcopy(self.module) if scripted else self.module)

    def calling(self, module: Callable[..., Any]) -> Callable[..., Any]:
        """The module as a function of its tensor inputs, in order."""
        if self.program is None:
            return module
        slots = _program_slots(self.program)
        in_spec = self.program.call_spec.in_spec
        args, kwargs = pytree.tree_unflatten(list(range(len(slots))), in_spec)
        if not kwargs and args == tuple(range(len(slots))) and all(isinstance(slot, TensorArgument) for slot in slots):
            return module

        def call(*tensors: torch.Tensor) -> Any:
            given = iter(tensors)
            leaves = [next(given) if isinstance(slot, TensorArgument) else slot.value for slot in slots]
            args, kwargs = pytree.tree_unflatten(leaves, in_spec)
            return module(*args, **kwargs)

        return call


def open_model(model: Any, weights: str | PathLike[str] | None) -> Opened:
    """Open what `TorchModel` takes: a file, a program or a module, the last with its weights put into it.

    Raises:
        SpecError: none of these, a file that is refused, or weights that do not fit.
    """
    if isinstance(model, str | PathLike):
        path = Path(model)
        if path.suffix.lower() == ".safetensors":
            raise SpecError(
                "this file holds weights only: give the module that they are for, and the file as weights=",
                path=str(path),
            )
        is_program = path.suffix.lower() == ".pt2"
        opened = _of_program(open_program(path)) if is_program else _of_module(open_script(path))
        opened = replace(opened, module=_frozen(opened.module), place=str(path), name=path.stem, owned=True)
    elif isinstance(model, torch.export.ExportedProgram):
        opened = _of_program(model)
    elif isinstance(model, nn.Module):
        opened = _of_module(model)
    else:
        raise SpecError(
            f"expected a torch module, an exported program or the path of a model file, got a {type(model).__name__}",
            path="model",
        )
    if weights is not None:
        if isinstance(opened.module, torch.jit.ScriptModule) or opened.program is not None:
            raise SpecError("this model holds its own weights: expected none, or a torch module", path="weights")
        _load_weights(opened.module, Path(weights))
    return opened


def _of_module(module: nn.Module) -> Opened:
    name = str(getattr(module, "original_name", type(module).__name__))
    return Opened(module.eval(), name, name, owned=False)


def _of_program(program: torch.export.ExportedProgram) -> Opened:
    # Guards are Python text, and what they check the signature and a hook of the module check too.
    return Opened(program.module(check_guards=False), "ExportedProgram", "program", owned=False, program=program)


def _load_weights(module: nn.Module, path: Path) -> None:
    given, wanted = read_weights(path), module.state_dict()
    for what, names, others in (
        ("lack", [name for name in wanted if name not in given], given),
        ("hold", [name for name in given if name not in wanted], wanted),
    ):
        if names:
            shown = ", ".join(f"'{name}'" for name in names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            owner = "" if what == "lack" else ", which the module has not"
            raise SpecError(f"these weights {what} {shown}{owner}{did_you_mean(names[0], others)}", path=str(path))
    try:
        module.load_state_dict(given)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:500]
        raise SpecError(f"these weights do not fit the module: {reason}", path=str(path)) from error


def on_device(opened: Opened, device: torch.device) -> Opened:
    """The same on `device`; a copy, if it has to move and is somebody else's."""
    there = all(tensor.device == device for tensor in opened.tensors())
    if opened.program is None:
        return opened if there else replace(opened, module=_frozen(_unshared(opened).to(device)), owned=True)
    if there and device.type == "cpu":
        return opened
    from torch.export.passes import move_to_device_pass  # a program names devices in its operators too

    program = move_to_device_pass(opened.program if opened.owned else _copied(opened.program), device)
    return replace(opened, module=_frozen(_of_program(program).module), program=program, owned=True)


def in_dtype(opened: Opened, dtype: torch.dtype) -> Opened:
    """The same with floats of `dtype`; a copy, if it has others and is somebody else's."""
    if all(tensor.dtype == dtype for tensor in opened.tensors() if tensor.is_floating_point()):
        return opened
    return replace(opened, module=_frozen(_unshared(opened).to(dtype)), owned=True)


def _frozen(module: nn.Module) -> nn.Module:
    """A module that nobody trains: its parameters cost no graph when gradients of inputs are asked for."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def _unshared(opened: Opened) -> nn.Module:
    return opened.module if opened.owned else _copied(opened.module)


def _copied(thing: _Copied) -> _Copied:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what exported programs hold, in torch itself
        return copy.deepcopy(thing)


def declared(opened: Opened, inputs: Any, outputs: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...] | None]:
    """The inputs, and the outputs if they are known without a run.

    Raises:
        SpecError: inputs are missing, or said though a program says its own; or no usable spec.
    """
    if opened.program is None:
        if inputs is None:
            raise _inputs_missing(opened)
        taken, given = _specs(inputs, "inputs"), None if outputs is None else _specs(outputs, "outputs")
    else:
        for option, value in (("inputs", inputs), ("outputs", outputs)):
            if value is not None:
                raise SpecError(f"an exported program says its own {option}: expected none", path=option)
        taken, given = _program_inputs(opened), _program_outputs(opened)
    if given == ():
        raise SpecError("a model needs one output or more", path="outputs")
    return taken, given


def _specs(given: Any, path: str) -> tuple[TensorSpec, ...]:
    listed = [given] if isinstance(given, str | TensorSpec) else list(given)
    specs = tuple(parse_spec(spec) if isinstance(spec, str) else spec for spec in listed)
    for spec in specs:
        if not isinstance(spec, TensorSpec):
            raise SpecError(f"expected a TensorSpec or text such as 'x: float32 [-1, 3]', got {spec!r}", path=path)
        if not isinstance(getattr(torch, spec.dtype, None), torch.dtype):
            raise SpecError(f"'{spec.name}' is {spec}: expected a dtype that torch has", path=path)
    return specs


def _inputs_missing(opened: Opened) -> SpecError:
    try:
        forward = inspect.signature(opened.module.forward)
        names = [name for name, parameter in forward.parameters.items() if parameter.default is parameter.empty]
    except (TypeError, ValueError):
        names = []
    if isinstance(opened.module, torch.jit.ScriptModule):
        names = [argument.name for argument in opened.module.forward.schema.arguments[1:]]  # type: ignore[attr-defined]
    example = ", ".join(f"'{name}: float32 [-1, 3]'" for name in names or ["x"])
    return SpecError(
        f"'{opened.name}' does not say what it takes: say it in the order of its forward, with dtypes and shapes that "
        f"are right (-1 is any size), as in inputs=[{example}]",
        path="inputs",
    )


def _program_slots(program: torch.export.ExportedProgram) -> list[Any]:
    return [spec.arg for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]


def _program_inputs(opened: Opened) -> tuple[TensorSpec, ...]:
    assert opened.program is not None
    values = _values_of(opened.program)
    slots = _program_slots(opened.program)
    return tuple(
        spec_of(slot.name, values[slot.name], opened.place) for slot in slots if not isinstance(slot, ConstantArgument)
    )


def _program_outputs(opened: Opened) -> tuple[TensorSpec, ...]:
    assert opened.program is not None
    values = _values_of(opened.program)
    specs = opened.program.graph_signature.output_specs
    leaves = [values.get(spec.arg.name) for spec in specs if spec.kind is OutputKind.USER_OUTPUT]
    named = named_outputs(pytree.tree_unflatten(leaves, opened.program.call_spec.out_spec), opened.place)
    return tuple(spec_of(name, value, opened.place) for name, value in named.items())


def _values_of(program: torch.export.ExportedProgram) -> dict[str, Any]:
    return {node.name: node.meta.get("val") for node in program.graph.nodes}


def writes_to_inputs(program: torch.export.ExportedProgram) -> bool:
    """Whether a program says that it changes what it is given."""
    return any(spec.kind is OutputKind.USER_INPUT_MUTATION for spec in program.graph_signature.output_specs)


def named_outputs(result: Any, place: str) -> dict[str, torch.Tensor]:
    """What a model returned, by the names that its outputs have unless they are said."""
    named: Mapping[Any, Any] = {"output": result}
    if isinstance(result, Mapping):
        named = result
    elif isinstance(result, tuple | list):
        named = {f"output_{index}": value for index, value in enumerate(result)}
    for name, value in named.items():
        if not isinstance(value, torch.Tensor) or not isinstance(name, str):
            raise SpecError(
                f"output {name!r} is a {type(value).__name__}: expected a model that returns a tensor, or a tuple, a "
                "list or a dict by name of tensors",
                path=place,
            )
    return dict(named)


def spec_of(name: str, value: Any, place: str, shape: Sequence[int] | None = None) -> TensorSpec:
    """The spec of a tensor, real or of a program; a size that is a symbol is open."""
    if not isinstance(value, torch.Tensor) or dtype_name(value.dtype) not in DTYPES:
        got = value.dtype if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        raise SpecError(f"'{name}': expected a tensor of {', '.join(DTYPES)}, got {got}", path=place)
    sizes = [size if isinstance(size, int) else -1 for size in (value.shape if shape is None else shape)]
    return TensorSpec(name, dtype_name(value.dtype), tuple(sizes))


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype of torch by its name here."""
    return str(dtype).removeprefix("torch.")
