"""The raw ops of the kernel: loaded once, and differentiated in eager mode.

It knows names and tensors, and nothing of metadata, URLs or who calls. In a graph, whose gradient is to go into a
SavedModel, `callsite` spells the gradient out; an eager tape asks the one registered here, which costs a call nothing.

State: the loaded library, once, under `_LOCK`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from remote_ops.errors import NotDifferentiable
from remote_ops.tf.interrupt import arm
from remote_ops.tf.library import CompilerMissing, op_library

__all__ = ["has_kernel", "load_ops", "vjp_parts"]

Tensor = Any  # tf.Tensor: tensorflow has no types that mypy reads
_LOCK = threading.Lock()


def load_ops() -> Any:
    """The module of the raw ops; builds the kernel first if need be.

    Raises:
        BuildError: it could not be built; `CompilerMissing` where there is nothing to build it with.
    """
    with _LOCK:
        loaded = _load()
    if isinstance(loaded, CompilerMissing):
        raise loaded
    return loaded


def has_kernel() -> bool:
    """Whether there is a kernel, or a compiler that can build it.

    Raises:
        BuildError: the compiler failed.
    """
    with _LOCK:
        there = not isinstance(_load(), CompilerMissing)
    if there:
        arm(_path())
    return there


_path = functools.cache(op_library)


@functools.cache
def _load() -> Any:
    """The ops, or why there are none: who has no compiler now is not asked again at each call."""
    try:
        ops = tf.load_op_library(str(_path()))
    except CompilerMissing as error:
        return error
    for name, infer in (
        ("RemoteOpsInfer", ops.remote_ops_infer),
        ("RemoteOpsInferOrdered", ops.remote_ops_infer_ordered),
    ):
        tf.RegisterGradient(name)(functools.partial(_gradient, infer))
    with contextlib.suppress(ImportError, AttributeError):  # a private room of TensorFlow's, which it may move
        from tensorflow.python.ops.parallel_for import pfor

        pfor.RegisterPFor("RemoteOpsClient")(functools.partial(_one_client, pfor))
    return ops


def _one_client(pfor: Any, pfor_input: Any) -> Any:
    """One client for all rows of `tf.vectorized_map` and of a Jacobian; their calls TensorFlow makes in a loop."""
    op = pfor_input.op
    graph = tf.compat.v1.get_default_graph()
    client = graph.create_op(op.type, [], [op.outputs[0].dtype], attrs=dict(op.node_def.attr))
    return pfor.wrap(client.outputs[0], False)


def vjp_parts(
    input_types: Sequence[tf.DType],
    differentiable: Sequence[int],
    output_types: Sequence[tf.DType],
    cotangents: Sequence[Tensor | None],
) -> tuple[list[int], list[int]]:
    """Which inputs a vector-Jacobian product is to give a gradient for, and which outputs have a cotangent.

    A model that differentiates nothing is asked all the same: its answer says so by name.
    """
    floats = [i for i, dtype in enumerate(input_types) if dtype.is_floating]
    wanted = [i for i in floats if i in differentiable] or floats
    given = [i for i, dtype in enumerate(output_types) if dtype.is_floating and cotangents[i] is not None]
    return (wanted, given) if given else ([], given)


def _gradient(infer: Any, op: Any, *cotangents: Tensor) -> list[Tensor | None]:
    """The gradient of one call, as TensorFlow asks for it: nothing for its first two inputs, client and timeout."""
    client, timeout_s, *inputs = op.inputs
    input_names, output_names = _texts(op.get_attr("input_names")), _texts(op.get_attr("output_names"))
    if any(name.startswith("gradient:") for name in output_names):
        raise NotDifferentiable(
            "a remote model has no second derivative, and none in forward mode: expected one tape around it, got the "
            "gradient of a gradient; put tf.stop_gradient around the first"
        )
    types = [tensor.dtype for tensor in op.outputs[:-2]]
    wanted, given = vjp_parts([tensor.dtype for tensor in inputs], op.get_attr("differentiable"), types, cotangents)

    def ask() -> list[Tensor]:
        outputs, _, _ = infer(
            client=client,
            timeout_s=timeout_s,
            inputs=[*inputs, *(tf.cast(cotangents[i], types[i]) for i in given)],
            output_types=[inputs[i].dtype for i in wanted],
            output_shapes=[inputs[i].shape for i in wanted],
            input_names=[*input_names, *(f"cotangent:{output_names[i]}" for i in given)],
            output_names=[f"gradient:{input_names[i]}" for i in wanted],
            config=op.get_attr("config"),
            blocking=tf.executing_eagerly(),
        )
        return list(outputs)

    found: list[Tensor | None] = [None] * (2 + len(inputs))
    if wanted:
        gradients = unless_failed(op.outputs[-2], ask, [inputs[i] for i in wanted])
        for index, gradient in zip(wanted, gradients, strict=True):
            found[2 + index] = gradient
    return found


def unless_failed(code: Tensor, ask: Any, like: Sequence[Tensor]) -> list[Tensor]:
    """What `ask` gives; zeros, without asking, where the call that is being differentiated had failed."""
    gradients = tf.cond(tf.equal(code, 0), ask, lambda: [tf.zeros_like(tensor) for tensor in like])
    return list(gradients)


def _texts(names: Sequence[str | bytes]) -> list[str]:
    return [name.decode() if isinstance(name, bytes) else name for name in names]
