"""What the graph knows of a model: names, dtypes and shapes, as text, because text is what an op takes.

It works out shapes and checks answers; it calls nothing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from remote_ops.errors import InternalError, SignatureError, SpecError
from remote_ops.signature import DTYPES, Array, Signature, TensorSpec, describe

__all__ = ["OpSpec", "constant_while_tracing"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_while_tracing(function: _Function) -> _Function:
    """Have dynamo run a function while it traces, and keep the result as a constant.

    What `torch._dynamo.assume_constant_result` does, without a second of importing it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Part of the text, and so of every graph: compilers keep graphs on disk, and must not find those of other semantics.
_VERSION = 1
Size = Any  # an int, or a torch.SymInt while a graph is traced
TORCH_OF: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES if hasattr(torch, name)}


class OpSpec(NamedTuple):
    """The inputs and outputs of a call, and whether axis 0, where open, holds the rows of one batch.

    `text` says the same; it is equal for models that look alike, so that they share a compiled graph. `string_names`
    are the inputs that are strings; `rows_input` is the input that tells how many rows a call has, None if none does.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool
    text: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    string_names: tuple[str, ...]
    rows_input: int | None

    @classmethod
    def of(cls, signature: Signature, outputs: Sequence[str] | None, *, batched: bool, at: str) -> OpSpec:
        """What a call for these outputs (None: all) looks like."""
        wanted = signature.select_outputs(outputs, at=at)
        fields = [_VERSION, _written(signature.inputs), _written(wanted), batched]
        return cls.read(json.dumps(fields, separators=(",", ":")))

    @staticmethod
    def read(text: str) -> OpSpec:
        """Read what `text` wrote; a constant while a graph is traced."""
        return _read(text)

    # shapes

    def output_shapes(self, inputs: Sequence[torch.Tensor], new_size: Callable[[], Size]) -> list[list[Size]]:
        """The shapes of the outputs for these inputs: fixed, as many rows as went in, or a size only the call tells.

        Raises:
            SpecError: an output of unknown dtype or rank, which cannot be part of a graph.
        """
        index = self.rows_input
        shapes = []
        for spec in self.outputs:
            if spec.shape is None or spec.dtype not in TORCH_OF:
                raise SpecError(
                    f"output '{spec.name}' is {spec}: a graph that is compiled or exported needs its dtype and rank; "
                    "ask for other outputs with outputs=[...], or call this model outside of it",
                    path="outputs",
                )
            shape: list[Size] = list(spec.shape)
            for axis, size in enumerate(shape):
                if size == -1 and axis == 0 and self.batched and index is not None:
                    shape[axis] = inputs[index].shape[0]
                elif size == -1:
                    shape[axis] = new_size()
            shapes.append(shape)
        return shapes

    # answers

    def checked_outputs(self, results: Mapping[str, Any], rows: int | None, *, at: str) -> list[Array]:
        """The outputs in order, each with the dtype and the shape that the graph was built for.

        Raises:
            InternalError: one is missing, or is something else: torch would read it as if it were what it expects.
        """
        found = []
        for spec in self.outputs:
            array = self._checked(spec, results, at)
            if rows is not None and self.batched and has_rows(spec) and array.shape[0] != rows:
                raise InternalError(
                    f"output '{spec.name}': expected {rows} rows, as many as went in, got {describe(array)}; "
                    "if axis 0 of this model is no batch, say RemoteModule(..., batched=False)",
                    endpoint=at,
                )
            found.append(array)
        return found

    def checked_gradients(
        self, results: Mapping[str, Any], wanted: Sequence[int], shapes: Sequence[tuple[int, ...]], *, at: str
    ) -> list[Array]:
        """The gradients with respect to the inputs of these numbers, each of the dtype of its input.

        Args:
            results: by name, such as `gradient:x`.
            wanted: which inputs, and `shapes`, what shapes these have.

        Raises:
            InternalError: one is missing, or is something else.
        """
        found = []
        for index, shape in zip(wanted, shapes, strict=True):
            spec = self.inputs[index]
            expected = TensorSpec(f"gradient:{spec.name}", spec.dtype, tuple(shape))
            found.append(self._checked(expected, results, at))
        return found

    @staticmethod
    def _checked(spec: TensorSpec, results: Mapping[str, Any], at: str) -> Array:
        try:
            return spec.fit(results[spec.name], kind="output")
        except KeyError:
            got = ", ".join(results) or "nothing"
            raise InternalError(
                f"output '{spec.name}': expected {spec}, got no such output but {got}", endpoint=at
            ) from None
        except SignatureError as error:
            raise InternalError(f"the answer is not what the graph was built for: {error}", endpoint=at) from error


def has_rows(spec: TensorSpec) -> bool:
    """Whether axis 0 is of any size, so that it may hold the rows of a batch."""
    return bool(spec.shape) and spec.shape[0] == -1  # type: ignore[index]  # None is false


def _written(specs: Sequence[TensorSpec]) -> list[Any]:
    return [[spec.name, spec.dtype, spec.shape, spec.differentiable] for spec in specs]


def _specs(rows: Sequence[Any]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name, dtype, None if shape is None else tuple(shape), differentiable=differentiable)
        for name, dtype, shape, differentiable in rows
    )


@functools.lru_cache(maxsize=4096)
def _read_once(text: str) -> OpSpec:
    version, inputs, outputs, batched = json.loads(text)
    if version != _VERSION:
        raise SpecError(
            f"a graph of another version of remote-ops: expected version {_VERSION}, got {version}; export it again",
            path="spec",
        )
    taken, given = _specs(inputs), _specs(outputs)
    rows = [i for i, spec in enumerate(taken) if batched and has_rows(spec) and spec.dtype != "string"]
    return OpSpec(
        taken,
        given,
        batched,
        text,
        input_names=tuple(spec.name for spec in taken),
        output_names=tuple(spec.name for spec in given),
        string_names=tuple(spec.name for spec in taken if spec.dtype == "string"),
        rows_input=rows[0] if rows else None,
    )


@constant_while_tracing
def _read(text: str) -> OpSpec:
    return _read_once(text)
