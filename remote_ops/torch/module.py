"""`RemoteModule`: a servable as a `torch.nn.Module`.

It turns tensors into arrays and back, and says plainly what it cannot do; calling is the servable's work.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from remote_ops.client import Endpoint
from remote_ops.errors import NotDifferentiable, SignatureError, SpecError
from remote_ops.servable import Servable
from remote_ops.torch.tensors import array_of, tensor_of

__all__ = ["RemoteModule"]


class RemoteModule(nn.Module):
    """A model that lives elsewhere, as a layer of this one.

    It has no parameters: `state_dict()` is empty and `.to()` moves nothing. Copies share the servable.

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
            The output, or a tuple where the model has several, on the device of the first tensor given. Outputs hang
            on the graph if an input does, so that asking for a gradient through them is an error and not a silent zero.

        Raises:
            SignatureError: an input does not fit; nothing was sent.
            TransportError, RemoteError: as `Endpoint` raises them.
            NotDifferentiable: at the backward pass, for now.
        """
        names = [spec.name for spec in self.servable.signature.inputs]
        values = _named_inputs(names, inputs, named, at=getattr(self.servable, "url", ""))
        devices = [value.device for value in values.values() if isinstance(value, torch.Tensor)]
        device = devices[0] if devices else torch.device("cpu")
        results = _Call.apply(self.servable, device, tuple(values), *values.values())  # type: ignore[no-untyped-call]
        return results[0] if len(results) == 1 else tuple(results)

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteModule:
        made = self.__class__.__new__(self.__class__)
        memo[id(self)], memo[id(self.servable)] = made, self.servable
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def extra_repr(self) -> str:
        """What stands inside the parentheses of `repr`; it does not touch the network."""
        return repr(self.servable)


def _named_inputs(names: Sequence[str], inputs: tuple[Any, ...], named: dict[str, Any], *, at: str) -> dict[str, Any]:
    if len(inputs) > len(names):
        raise SignatureError(
            f"expected {len(names)} inputs ({', '.join(names)}), got {len(inputs)}",
            expected=str(len(names)), got=str(len(inputs)), at=at,
        )  # fmt: skip
    values = dict(zip(names, inputs, strict=False))
    if twice := values.keys() & named.keys():
        both = ", ".join(sorted(twice))
        raise SignatureError(f"given twice, by position and by name: {both}", name=min(twice), at=at)
    values |= named
    for name, value in values.items():
        if isinstance(value, list | tuple) and any(isinstance(item, torch.Tensor) for item in value):
            # numpy would make an array of it, and drop the gradient.
            raise SignatureError(
                f"input '{name}': expected a tensor, got a {type(value).__name__} of tensors; torch.stack them",
                name=name,
                at=at,
            )
    return values


class _Call(torch.autograd.Function):
    """The call as a node of the graph, whose backward refuses: gradients over the wire are not built yet."""

    @staticmethod
    def forward(
        ctx: Any, servable: Servable, device: torch.device, names: tuple[str, ...], *values: Any
    ) -> tuple[torch.Tensor, ...]:
        ctx.servable = servable
        arrays = [array_of(value) if isinstance(value, torch.Tensor) else value for value in values]
        results = servable.infer(dict(zip(names, arrays, strict=True)))
        return tuple([tensor_of(array, device) for array in _unshared(arrays, results.values())])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotDifferentiable(
            f"{ctx.servable!r} gives no gradients: call it under torch.no_grad(), or detach() its inputs"
        )


def _unshared(inputs: Sequence[Any], results: Iterable[npt.NDArray[Any]]) -> Iterator[npt.NDArray[Any]]:
    """Copy what a model in this process gave back of its inputs, or gave twice: torch may write to each."""
    seen = [array for array in inputs if isinstance(array, np.ndarray)]
    for array in results:
        own = array.copy() if any(np.may_share_memory(array, other) for other in seen) else array
        seen.append(own)
        yield own
