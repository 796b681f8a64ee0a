"""`RemoteModule`: a servable as a `torch.nn.Module`, and `remote`, the same as a function.

They turn what a caller passes into tensors in the model's order; the call itself is `ops`'.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import secrets
import weakref
from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import fx, nn
from torch._compile import _disable_dynamo

from remote_ops.client import Endpoint
from remote_ops.deadline import deadline
from remote_ops.errors import RemoteOpsError, SignatureError, SpecError
from remote_ops.servable import Servable, construct
from remote_ops.signature import Signature, TensorSpec
from remote_ops.torch import started
from remote_ops.torch.ops import op
from remote_ops.torch.opspec import TORCH_OF, OpSpec, constant_while_tracing, has_rows
from remote_ops.torch.strings import pack_strings
from remote_ops.torch.target import Target, address_of, handle_at
from remote_ops.torch.tensors import tensor_of

__all__ = ["RemoteModule", "Started", "remote"]

Tensor = torch.Tensor
Where: TypeAlias = "RemoteModule | str"
_INTRODUCTION_S = 1.0


class RemoteModule(nn.Module):
    """A model that lives elsewhere, as a layer of this one; gradients with respect to its inputs included.

    It has no parameters: `state_dict()` is empty and `.to()` moves nothing. Copies share the servable.

    Args:
        servable: a URL, a list of URLs of replicas, or any servable.
        outputs: names of the outputs to ask for, in order; all of them unless said.
        config: bytes for the model, sent with every call.
        pure: whether a compiler may merge identical calls and drop unused ones. Say False for a model that answers
            the same inputs differently, or that does something.
        batched: whether axis 0, where the signature leaves it open, holds the rows of one batch: as many come out as
            went in. vmap, `max_rows` and shapes in compiled graphs rest on that.
        max_rows: most rows in one message, 1 or more; a larger batch is sent in pieces, eight at a time.
        options: what `Endpoint` takes besides the URL, such as `timeout_s` or `headers`.

    Raises:
        SpecError: no such servable, or an argument is wrong.

    It asks for the signature, for a second at most. If nobody answers, or with an error, the first call asks again and
    says so.
    """

    def __init__(
        self,
        servable: str | Sequence[str] | Servable,
        *,
        outputs: Sequence[str] | None = None,
        config: bytes = b"",
        pure: bool = True,
        batched: bool = True,
        max_rows: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if max_rows is not None and not (isinstance(max_rows, int) and max_rows >= 1):
            raise SpecError(f"expected a number of rows, 1 or more, got {max_rows!r}", path="max_rows")
        if max_rows is not None and not batched:
            raise SpecError("rows are sent in pieces: expected batched=True, got batched=False", path="max_rows")
        if isinstance(outputs, str):
            raise SpecError(f"expected a list of names, got {outputs!r}; say [{outputs!r}]", path="outputs")
        if not isinstance(config, bytes):
            raise SpecError(f"expected bytes, got a {type(config).__name__}", path="config")
        self.servable = _opened(servable, options)
        self.pure = pure
        self.batched = batched
        self._outputs = None if outputs is None else tuple(outputs)
        self._target = Target(self.servable, config, max_rows)
        self._handle = self._target.handle()
        self._text = ""
        self._key = _remember(self)
        signature = None
        with contextlib.suppress(RemoteOpsError), deadline(_INTRODUCTION_S):
            signature = self.servable.signature
        if signature is not None:
            self._learn(signature)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Call the model.

        Args:
            inputs: one tensor `(*dims)` per input, in order, on any device; or one dict of them by name.
            named: further inputs by name.

        Returns:
            The output, or a tuple where the model has several; a dict by name if the inputs came as one. On the device
            of the first input that is not on the CPU.

        Raises:
            SignatureError: an input does not fit; nothing was sent.
            TransportError, RemoteError: as `Endpoint` raises them.
            NotDifferentiable: at the backward pass, if the model gives no gradient for an input that wants one.

        Costs a round trip, and another in the backward pass if an input wants a gradient. Under autocast, float inputs
        are cast to the dtype of the signature; outputs have the dtype of the signature.
        """
        return _call(self._handle, self._text or _learned(self), self.pure, self, inputs, named)

    def start(self, *inputs: Any, **named: Any) -> Started:
        """Send the call and go on; `.wait()` on what comes back gives what calling would have given.

        Do not write to the inputs before that. A call that nobody waits for is given up with its `Started`.

        Raises:
            SignatureError: an input does not fit; nothing was sent.
        """
        spec = OpSpec.read(self._text or _learned(self))
        tensors, as_dict = _tensors(spec, inputs, named, self)
        if torch.compiler.is_compiling():
            number = _new_number()
        else:  # nobody can tell whether one of these is written to before it is sent
            number, tensors = 0, [tensor.clone() if tensor.is_inference() else tensor for tensor in tensors]
        ticket = op("start", pure=self.pure)(self._handle, tensors, number, spec.text)
        return Started(self, spec, number, ticket, tensors, as_dict)

    def extra_repr(self) -> str:
        """What stands inside the parentheses of `repr`; it does not touch the network."""
        return repr(self.servable)

    def _learn(self, signature: Signature | None = None) -> str:
        """Keep what the graph needs to know of the signature, which is asked for unless given."""
        self._text = self._spec(signature or self.servable.signature).text
        return self._text

    def _spec(self, signature: Signature) -> OpSpec:
        spec = OpSpec.of(signature, self._outputs, batched=self.batched, at=self._target.at)
        if self._target.max_rows is not None:
            _require_rows(spec)
        return spec

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteModule:
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        memo |= {id(kept): kept for kept in (self.servable, self._target, self._handle)}
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        made._key = _remember(made)
        return made

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_handle", "_key")}
        return {**kept, "_target": (self._target.config, self._target.max_rows)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._target = Target(self.servable, *state["_target"])
        self._handle = self._target.handle()
        self._key = _remember(self)


class Started:
    """A call that is on its way: `wait` for it, once."""

    def __init__(
        self, module: RemoteModule, spec: OpSpec, number: int, ticket: Tensor, inputs: list[Tensor], as_dict: bool
    ) -> None:
        self.ticket = ticket
        self._module = module
        self._spec = spec
        self._number = number
        self._inputs = inputs
        self._as_dict = as_dict
        self._guard = None if torch.compiler.is_compiling() else _Guard(ticket, inputs)

    def wait(self, tickets: Tensor | None = None, index: int = 0) -> Any:
        """Give what calling the module would have given.

        Args:
            tickets: in a graph that is compiled, those of all calls that were started together, `(calls,)`, of which
                this is number `index`: no wait then moves before another's start.

        Raises:
            SpecError: it was waited for already, or an input was written to meanwhile.
            TransportError, RemoteError: as `Endpoint` raises them.
        """
        if self._guard is not None:
            self._guard.check()
        module, spec = self._module, self._spec
        tickets = self.ticket if tickets is None else tickets
        arguments = (tickets, index, self._number, module._handle, self._inputs, spec.text)
        return _shown(spec, op("wait", pure=module.pure)(*arguments), self._as_dict)

    def give_up(self) -> None:
        """Cancel it, if it was not waited for; its connection is closed."""
        if self._guard is not None:
            self._guard.give_up()


class _Guard:
    """Gives a call up when nobody can wait for it any more, and sees to it that its inputs stay as they are."""

    __slots__ = ("inputs", "numbers", "versions")

    def __init__(self, ticket: Tensor, inputs: Sequence[Tensor]) -> None:
        self.numbers = _numbers(ticket)
        self.inputs = [tensor for tensor in inputs if not tensor.is_inference()]
        self.versions = [tensor._version for tensor in self.inputs]

    def check(self) -> None:
        """Raise if an input was written to since the start: what was sent may be either."""
        if [tensor._version for tensor in self.inputs] != self.versions:
            self.give_up()
            raise SpecError(
                "an input was written to while it was on its way: expected it to stay as it is from start() to wait(); "
                "clone() it before, or use out-of-place functions in the other branches",
                path="inputs",
            )

    def give_up(self) -> None:
        for number in self.numbers:
            started.give_up(number)

    def __del__(self) -> None:
        self.give_up()


def _numbers(ticket: Tensor) -> list[int]:
    """The numbers that a ticket holds, or, under vmap, all those of a batch."""
    with torch._C._DisableFuncTorch():
        while torch._C._functorch.is_functorch_wrapped_tensor(ticket):
            ticket = torch._C._functorch.get_unwrapped(ticket)
        return [int(number) for number in set(ticket.detach().flatten().tolist())]


_CALLS = itertools.count(1)


@constant_while_tracing
def _new_number() -> int:
    """A number for each place in a graph that starts a call: compilers merge what looks the same."""
    return next(_CALLS)


def remote(servable: str | Sequence[str] | Servable, *inputs: Any, **named: Any) -> Any:
    """Call a model: `RemoteModule(servable)(*inputs, **named)`, with one module kept per URL.

    Raises what the module raises. Costs what the module costs, for URLs; another servable is looked at at each call.
    """
    urls = (servable,) if isinstance(servable, str) else servable
    if not isinstance(urls, list | tuple):
        return RemoteModule(urls)(*inputs, **named)
    return _call(_handle_of(*urls), _text_of(*urls), True, urls[0].partition("?")[0], inputs, named)


@functools.lru_cache(maxsize=1024)
def _kept_module(*urls: str) -> RemoteModule:
    return RemoteModule(urls)


@constant_while_tracing
def _handle_of(*urls: str) -> Tensor:
    return _kept_module(*urls)._handle


@constant_while_tracing
def _text_of(*urls: str) -> str:
    module = _kept_module(*urls)
    return module._text or module._learn()


def _opened(servable: Any, options: Mapping[str, Any]) -> Servable:
    if isinstance(servable, str | list | tuple):
        return construct(Endpoint, servable, options)
    if options:
        raise SpecError(f"options are for URLs: got {', '.join(options)} with a servable", path=next(iter(options)))
    if not callable(getattr(servable, "infer", None)):
        hint = "; say TorchModel(module, inputs=...)" if isinstance(servable, nn.Module) else ""
        raise SpecError(f"expected a URL or a servable, got {type(servable).__name__}{hint}", path="servable")
    return servable  # type: ignore[no-any-return]


def _require_rows(spec: OpSpec) -> None:
    without = [output.name for output in spec.outputs if not has_rows(output)]
    if without or spec.rows_input is None:
        what = f"output '{without[0]}'" if without else "every input"
        raise SpecError(f"{what} has no rows: expected -1 on axis 0, to send a batch in pieces", path="max_rows")


# --------------------------------------------------------------------------- signatures, once they are needed

_MODULES: weakref.WeakValueDictionary[str, RemoteModule] = weakref.WeakValueDictionary()


def _remember(module: RemoteModule) -> str:
    """Keep a module under a name that a traced graph can hold."""
    key = secrets.token_hex(8)
    _MODULES[key] = module
    return key


def _learned(module: RemoteModule) -> str:
    """The text of a module whose server was not there when it was made."""
    return _learned_while_tracing(module._key) if torch.compiler.is_compiling() else module._learn()


@constant_while_tracing
def _learned_while_tracing(key: str) -> str:
    module = _MODULES[key]
    return module._spec(module.servable.signature).text


# --------------------------------------------------------------------------- inputs and outputs


def _call(handle: Tensor, text: str, pure: bool, where: Where, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    spec = OpSpec.read(text)
    tensors, as_dict = _tensors(spec, inputs, named, where)
    for tensor in tensors:
        if isinstance(tensor, fx.Proxy):
            return _traced(spec, as_dict, handle, pure, tensors)
    return _shown(spec, op("infer", pure=pure)(handle, tensors, text), as_dict)


def _place(where: Where) -> str:
    """What errors call the model. Asked for only in an error: what is read while tracing, a graph is bound to."""
    return where if isinstance(where, str) else where._target.at


def _tensors(spec: OpSpec, inputs: tuple[Any, ...], named: dict[str, Any], where: Where) -> tuple[list[Tensor], bool]:
    """What a caller passed as tensors in the model's order, and whether it came as a dict."""
    as_dict = len(inputs) == 1 and not named and isinstance(inputs[0], dict | UserDict)
    values = inputs[0] if as_dict else _by_name(spec.input_names, inputs, named, where)
    if len(values) != len(spec.inputs) or any(name not in values for name in spec.input_names):
        Signature(spec.inputs, spec.outputs).fit_inputs(values, at=_place(where))  # says which names are wrong
    return [_tensor(input, values[input.name], where) for input in spec.inputs], as_dict


def _by_name(names: Sequence[str], inputs: tuple[Any, ...], named: dict[str, Any], where: Where) -> dict[str, Any]:
    if len(inputs) > len(names):
        raise SignatureError(
            f"expected {len(names)} inputs ({', '.join(names)}), got {len(inputs)}",
            expected=str(len(names)), got=str(len(inputs)), at=_place(where),
        )  # fmt: skip
    values = dict(zip(names, inputs, strict=False))
    if twice := values.keys() & named.keys():
        both = ", ".join(sorted(twice))
        raise SignatureError(f"given twice, by position and by name: {both}", name=min(twice), at=_place(where))
    values.update(named)
    return values


def _tensor(spec: TensorSpec, value: Any, where: Where) -> Tensor:
    if isinstance(value, torch.Tensor):
        wanted = TORCH_OF.get(spec.dtype)
        if wanted != value.dtype and value.is_floating_point() and wanted is not None and wanted.is_floating_point:
            return value.to(wanted) if torch.is_autocast_enabled(value.device.type) else value
        return value
    if isinstance(value, fx.Proxy):
        return value  # type: ignore[return-value]
    if value is None:
        raise SignatureError(
            f"input '{spec.name}': expected {spec}, got None", name=spec.name, expected=str(spec), at=_place(where)
        )
    if isinstance(value, list | tuple) and any(isinstance(item, torch.Tensor) for item in value):
        # numpy would make an array of it, and drop the gradient.
        raise SignatureError(
            f"input '{spec.name}': expected a tensor, got a {type(value).__name__} of tensors; torch.stack them, "
            "or pass one for each input",
            name=spec.name,
            at=_place(where),
        )
    if spec.dtype == "string":
        return _packed(spec, value, where)
    if torch.compiler.is_compiling():
        return torch.as_tensor(value, dtype=TORCH_OF.get(spec.dtype))
    return tensor_of(np.asarray(spec.fit(value, at=_place(where))), torch.device("cpu"))


@_disable_dynamo  # a graph holds no strings: it breaks here
def _packed(spec: TensorSpec, value: Any, where: Where) -> Tensor:
    return pack_strings(spec.fit(value, at=_place(where)))


def _shown(spec: OpSpec, results: Sequence[Any], as_dict: bool) -> Any:
    if as_dict:
        return {output.name: result for output, result in zip(spec.outputs, results, strict=True)}
    return results[0] if len(results) == 1 else tuple(results)


def _traced(spec: OpSpec, as_dict: bool, handle: Tensor, pure: bool, inputs: Sequence[Any]) -> Any:
    """The call as a node of a graph that `torch.fx.symbolic_trace` makes."""
    tracer = next(value.tracer for value in inputs if isinstance(value, fx.Proxy))
    # As text: a handle would become part of the state_dict.
    arguments = (address_of(handle), list(inputs), spec.text, pure)
    results: Any = tracer.create_proxy("call_function", call_at, arguments, {})
    return _shown(spec, [results[index] for index in range(len(spec.outputs))], as_dict)


def call_at(address: str, inputs: list[Tensor], text: str, pure: bool) -> list[Tensor]:
    """Call the model that the text of a handle stands for; what graphs of `torch.fx.symbolic_trace` hold."""
    return op("infer", pure=pure)(handle_at(address), inputs, text)  # type: ignore[no-any-return]
