"""`RemoteModule`: a servable as a `torch.nn.Module`.

It turns tensors into arrays and back, and says plainly what it cannot do; calling is the servable's work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from remote_ops.client import Endpoint
from remote_ops.errors import NotDifferentiable, SpecError
from remote_ops.servable import Servable
from remote_ops.torch.tensors import array_of, tensor_of

__all__ = ["RemoteModule"]


class RemoteModule(nn.Module):
    """A model that lives elsewhere, as a layer of this one.

    It has no parameters: `state_dict()` is empty and `.to()` moves nothing. The endpoint is shared by copies.

    Args:
        servable: a URL, a list of URLs of replicas, or any servable.
        options: what `Endpoint` takes besides the URL, such as `timeout_s` or `headers`.

    Raises:
        SpecError: no such servable. The network is not touched before the first call.
    """

    def __init__(self, servable: str | Sequence[str] | Servable, **options: Any) -> None:
        super().__init__()
        if isinstance(servable, str) or (isinstance(servable, Sequence) and not isinstance(servable, Servable)):
            servable = Endpoint(servable, **options)
        elif options:
            raise SpecError(f"options are for URLs: got {', '.join(options)} with a servable", path=next(iter(options)))
        if not callable(getattr(servable, "infer", None)):
            raise SpecError(f"expected a URL or a servable, got {type(servable).__name__}", path="servable")
        self.servable = servable

    def forward(self, *inputs: torch.Tensor, **named: torch.Tensor) -> Any:
        """Call the model.

        Args:
            inputs: one tensor `(*dims)` per input, in order; any device.
            named: further inputs by name.

        Returns:
            The output, or a tuple where the model has several, on the device of the first input. Outputs hang on the
            graph if an input does, so that asking for a gradient through them is an error and not a silent zero.

        Raises:
            SignatureError: an input does not fit; nothing was sent.
            TransportError, RemoteError: as `Endpoint` raises them.
            NotDifferentiable: at the backward pass, for now.
        """
        names = [spec.name for spec in self.servable.signature.inputs]
        values = _named_inputs(names, inputs, named)
        first = next(iter(values.values()), None)
        device = first.device if isinstance(first, torch.Tensor) else torch.device("cpu")
        results = _Call.apply(  # type: ignore[no-untyped-call]
            self.servable, device, tuple(values), *values.values())
        return results[0] if len(results) == 1 else tuple(results)

    def extra_repr(self) -> str:
        """What stands inside the parentheses of `repr`; it does not touch the network."""
        return repr(self.servable)


def _named_inputs(names: Sequence[str], inputs: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    if len(inputs) > len(names):
        raise SpecError(f"expected {len(names)} inputs ({', '.join(names)}), got {len(inputs)}", path="inputs")
    values = dict(zip(names, inputs, strict=False))
    if twice := values.keys() & named.keys():
        raise SpecError(f"given twice, by position and by name: {', '.join(sorted(twice))}", path="inputs")
    return {**values, **named}


class _Call(torch.autograd.Function):
    """The call as a node of the graph, whose backward refuses: gradients over the wire are not built yet."""

    @staticmethod
    def forward(
        ctx: Any, servable: Servable, device: torch.device, names: tuple[str, ...], *values: Any
    ) -> tuple[torch.Tensor, ...]:
        ctx.who = repr(servable)
        arrays = [array_of(value) if isinstance(value, torch.Tensor) else value for value in values]
        results = servable.infer(dict(zip(names, arrays, strict=True)))
        return tuple([tensor_of(array, device) for array in results.values()])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotDifferentiable(f"{ctx.who} gives no gradients: call it under torch.no_grad(), or detach() its inputs")
