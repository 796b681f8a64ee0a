"""A SavedModel, a frozen graph or a Keras model as a servable, gradients included, on CPU or CUDA.

It computes; it does not batch, queue or limit how many calls run at once (`concurrency` says how many fit).
State: the function and the signature are constant, unless the graph itself assigns variables; TensorFlow takes calls
from any thread. So no lock.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import tensorflow as tf
from tensorflow.python.eager import context

from remote_ops.deadline import Deadline
from remote_ops.errors import InternalError, NotDifferentiable, RemoteOpsError, SignatureError, SpecError
from remote_ops.servable import run_checked, split_cotangents
from remote_ops.signature import Array, Signature, TensorSpec, describe
from remote_ops.tf.flow import Reach, reaches
from remote_ops.tf.graphs import Opened, open_graph, open_saved_model, reason_of
from remote_ops.tf.kerasfile import open_keras, open_keras_file
from remote_ops.tf.tensors import array_of, tensor_of

__all__ = ["TFModel"]

_CUDA_CONCURRENCY = 2  # while one run computes, the other's inputs and outputs move
_SERVING = "serving_default"


class TFModel:
    """A TensorFlow model as a servable.

    Args:
        model: a folder that holds a SavedModel, of TensorFlow 1 or 2; a frozen GraphDef (`.pb`); a Keras file (`.keras`
            or `.h5`); or a Keras model.
        signature: which signature of a SavedModel.
        inputs, outputs: names, in the order wanted; of a frozen graph any tensors, where `x` means `x:0`, and unless
            said the nodes that nothing goes into and those that nothing comes out of, as graphpipe-tf has them; of a
            SavedModel some of its signature's. A text is taken apart at commas.
        device: `cuda` or `cuda:N` for that GPU; `cpu`; `auto` for CUDA where TensorFlow has one, else the CPU.
        name: how the model names itself; the folder's or the file's unless said.

    Raises:
        SpecError: a file that is none of these; one that would run code of its own, or touch files or the network; no
            such signature or tensor; inputs or outputs that have no form here; no such device.
        ImportError: a Keras file, and keras is missing or too old; names the line to type.

    A name may be said with or without its `:0`, or as the tensor is called in the graph. Gradients are given of each
    float input that a float output hangs on in a way that TensorFlow can differentiate. Loading reads the whole file,
    and runs no model. On the CPU a large aligned input is not copied; outputs are, once.
    """

    never_waits: ClassVar[bool] = False

    def __init__(
        self,
        model: str | PathLike[str] | Any,
        *,
        signature: str | None = None,
        inputs: Sequence[str] | str | None = None,
        outputs: Sequence[str] | str | None = None,
        device: str = "auto",
        name: str | None = None,
    ) -> None:
        self._device, self._tf_device = _device(device)
        self.concurrency = _CUDA_CONCURRENCY if self._device != "cpu" else _cpu_count()
        with self._scope():
            opened = _open(model, signature, _names(inputs, "inputs"), _names(outputs, "outputs"))
        weakref.finalize(self, opened.close).atexit = False
        self._function, self._held = opened.function, opened.held
        self._place = opened.place
        found = reaches(opened.graph_inputs, opened.graph_outputs, opened.graph, opened.callees)
        self._reach = {spec.name: reach for spec, reach in zip(opened.outputs, found, strict=True)}
        self._bits = {spec.name: 1 << index for index, spec in enumerate(opened.inputs)}
        self._signature = self._signed(opened, name or opened.name)

    def __repr__(self) -> str:
        return f"TFModel({self._place!r}, device={self.device!r})"

    @property
    def signature(self) -> Signature:
        """Inputs and outputs; an open size is -1, an open rank no shape; `differentiable` where a gradient is given."""
        return self._signature

    @property
    def device(self) -> str:
        """Where it runs: `cpu` or `cuda:N`."""
        return self._device

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

        Returns:
            Arrays by the names asked for.

        Raises:
            SignatureError: names, dtypes or shapes do not fit the signature, or not each other.
            NotDifferentiable: an output with a cotangent hangs on an input whose gradient is asked for, but in no way
                that TensorFlow can differentiate; or none of them hangs on any such input.
            DeadlineExceeded: the deadline passed before the start.
            InternalError: the model failed, or gave something other than its signature says.

        Whatever graph or device scope of TensorFlow the calling thread is in makes no difference.
        """
        found = run_checked(self._signature, self._run, inputs, outputs, deadline)
        return found if outputs is None else dict(zip(outputs, found.values(), strict=True))

    def _signed(self, opened: Opened, name: str) -> Signature:
        given = 0
        for spec in opened.outputs:
            reach = self._reach[spec.name]
            given |= reach.flows & ~reach.unknown if spec.is_float else 0
        return _TFSignature(
            tuple(
                replace(spec, differentiable=spec.is_float and bool(given & self._bits[spec.name]))
                for spec in opened.inputs
            ),
            opened.outputs,
            name=name,
            input_aliases=opened.input_aliases,
            output_aliases=opened.output_aliases,
        )

    def _run(self, arrays: dict[str, Array], wanted: tuple[TensorSpec, ...]) -> Mapping[str, Array]:
        primals, cotangents = split_cotangents(arrays)
        sources = [spec.name.removeprefix("gradient:") for spec in wanted if spec.name.startswith("gradient:")]
        try:
            with self._scope():
                if sources:
                    found = self._gradients(primals, cotangents, sources, wanted)
                else:
                    found = self._call({name: tensor_of(array) for name, array in primals.items()})
                return {spec.name: array_of(found[spec.name]) for spec in wanted}
        except RemoteOpsError:
            raise
        except Exception as error:
            raise self._failure(error, arrays) from error

    def _gradients(
        self,
        primals: dict[str, Array],
        cotangents: dict[str, Array],
        sources: Sequence[str],
        wanted: Sequence[TensorSpec],
    ) -> dict[str, Any]:
        tensors = {name: tensor_of(array) for name, array in primals.items()}
        leaves = [tensors[name] for name in sources]
        zeros = {f"gradient:{name}": tf.zeros_like(leaf) for name, leaf in zip(sources, leaves, strict=True)}
        if not cotangents:
            return {**zeros, **(self._call(tensors) if len(sources) < len(wanted) else {})}
        flowing = self._flowing(sources, cotangents)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(leaves)
            found = self._call(tensors)
        seeds = {name: tensor_of(array) for name, array in cotangents.items()}
        for name, seed in seeds.items():
            _check_cotangent(name, found[name], seed)
        try:
            values = tape.gradient([found[name] for name in seeds], leaves, list(seeds.values()))
        except (LookupError, tf.errors.NotFoundError) as error:
            raise self._not_differentiable(seeds, sources, reason_of(error)) from error
        for name, value in zip(sources, values, strict=True):
            if name in flowing:
                if value is None:
                    raise self._not_differentiable(seeds, [name], "TensorFlow gives none")
                zeros[f"gradient:{name}"] = tf.convert_to_tensor(value)  # a gather gives it as slices
        return {**found, **zeros}

    def _flowing(self, sources: Sequence[str], cotangents: Iterable[str]) -> set[str]:
        """The inputs whose gradient is to come from TensorFlow; that of the others is zero.

        Raises:
            NotDifferentiable: it is neither.
        """
        reach = Reach()
        for name in cotangents:
            reach |= self._reach[name]
        flowing = {name for name in sources if reach.flows & self._bits[name]}
        if not flowing:
            raise self._not_differentiable(cotangents, sources, "no such output hangs on such an input in that way")
        for name in sources:
            if name not in flowing and reach.hangs_on & self._bits[name]:
                raise self._not_differentiable(
                    cotangents, [name], "what hangs on it has no derivative, such as a cast to integers"
                )
        return flowing

    def _not_differentiable(self, outputs: Iterable[str], inputs: Iterable[str], reason: str) -> NotDifferentiable:
        return NotDifferentiable(
            f"model '{self._signature.name}' gives no gradient of {_listed(outputs)} with respect to "
            f"{_listed(inputs)}: {reason}"
        )

    def _call(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        found = self._function(*tensors.values())
        return {spec.name: value for spec, value in zip(self._signature.outputs, found, strict=True)}

    @contextmanager
    def _scope(self) -> Iterator[None]:
        with context.eager_mode(), tf.device(self._tf_device):
            yield

    def _failure(self, error: Exception, arrays: Mapping[str, Array]) -> RemoteOpsError:
        """Say whose fault a failed run is: shapes that do not go together, and what it asserts, are the caller's."""
        reason = reason_of(error)
        got = ", ".join(f"'{name}' {describe(array)}" for name, array in arrays.items())
        is_open = any(spec.shape is None or -1 in spec.shape for spec in self._signature.inputs)
        theirs = isinstance(error, tf.errors.InvalidArgumentError | ValueError | TypeError)
        if theirs and ((is_open and _SHAPE_FAULT.search(reason)) or "assertion failed" in reason or _is_text(error)):
            return SignatureError(
                f"inputs of '{self._signature.name}': expected values that go together, got {got}: {reason}",
                name=next(iter(arrays), ""),
                expected="values that go together",
                got=got,
            )
        return InternalError(f"model '{self._signature.name}' failed on {got or 'no inputs'}: {reason}")


@dataclass(frozen=True)
class _TFSignature(Signature):
    """A signature that also knows its inputs and outputs by the names that TensorFlow gives tensors."""

    input_aliases: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    output_aliases: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def fit_inputs(self, values: Mapping[str, Any], *, at: str = "") -> dict[str, Array]:
        return super().fit_inputs(self._renamed(values, at), at=at)

    def view_inputs(self, arrays: Mapping[str, Array], *, at: str = "") -> dict[str, Array]:
        return super().view_inputs(self._renamed(arrays, at), at=at)

    def select_outputs(self, names: Sequence[str] | None, *, at: str = "") -> tuple[TensorSpec, ...]:
        if names is not None and not isinstance(names, str) and not all(name in self._outputs for name in names):
            names = [
                self._name(name, "gradient:", self._inputs, self.input_aliases)
                if name.startswith("gradient:")
                else self._name(name, "", self._outputs, self.output_aliases)
                for name in names
            ]
        return super().select_outputs(names, at=at)

    def _renamed(self, values: Mapping[str, Any], at: str) -> Mapping[str, Any]:
        if all(name in self._inputs for name in values):
            return values
        renamed: dict[str, Any] = {}
        for name, value in values.items():
            own = (
                self._name(name, "cotangent:", self._outputs, self.output_aliases)
                if name.startswith("cotangent:")
                else self._name(name, "", self._inputs, self.input_aliases)
            )
            if own in renamed:
                raise SignatureError(f"an input is given twice: '{own}', as '{name}' too", name=own, got=name, at=at)
            renamed[own] = value
        return renamed

    @staticmethod
    def _name(name: str, prefix: str, own: Mapping[str, TensorSpec], aliases: Mapping[str, str]) -> str:
        bare = name.removeprefix(prefix)
        return prefix + (bare if bare in own else aliases.get(bare, bare))


_NO_TEXT = re.compile(r"Unsupported object type|bytes or unicode string|expected bytes")
_SHAPE_FAULT = re.compile(
    r"\bsizes?\b|\bshapes?\b|dimension|\bdims?\b|broadcast|\brank\b|out of range|not in \[|must be equal", re.IGNORECASE
)


def _open(model: Any, signature: str | None, inputs: list[str] | None, outputs: list[str] | None) -> Opened:
    if not isinstance(model, str | PathLike):
        if not callable(getattr(model, "get_config", None)) or not hasattr(model, "inputs"):
            raise SpecError(f"expected a path or a Keras model, got a {type(model).__name__}", path="model")
        _refuse("a Keras model", signature=signature, inputs=inputs, outputs=outputs)
        return open_keras(model, str(model.name), type(model).__name__)
    path = Path(model)
    kind = path.suffix.lower()
    if path.is_dir():
        return open_saved_model(path, _SERVING if signature is None else signature, inputs, outputs)
    if kind in (".keras", ".h5"):
        _refuse("a Keras model", signature=signature, inputs=inputs, outputs=outputs)
        return open_keras_file(path)
    if kind == ".pb":
        _refuse("a frozen graph", signature=signature)
        return open_graph(path, inputs, outputs)
    if not path.exists():
        raise SpecError("no such file or folder", path=str(path))
    raise SpecError("expected the folder of a SavedModel, or a file ending in .pb, .keras or .h5", path=str(path))


def _refuse(kind: str, **given: Any) -> None:
    for option, value in given.items():
        if value is not None:
            raise SpecError(f"not for {kind}, which says its own: expected none", path=option)


def _names(given: Sequence[str] | str | None, path: str) -> list[str] | None:
    if given is None:
        return None
    names = [part.strip() for part in given.split(",")] if isinstance(given, str) else list(given)
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
        raise SpecError(f"expected names, each once, got {given!r}", path=path)
    return names


def _check_cotangent(name: str, output: Any, seed: Any) -> None:
    if output.shape != seed.shape:
        expected, got = (f"{tensor.dtype.name} {list(tensor.shape)}" for tensor in (output, seed))
        raise SignatureError(
            f"input 'cotangent:{name}': expected {expected}, as output '{name}' is, got {got}",
            name=f"cotangent:{name}",
            expected=expected,
            got=got,
        )


def _device(text: str) -> tuple[str, str]:
    """The device by our name and by TensorFlow's."""
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d{1,4}))?", text)
    if match is None:
        raise SpecError(f"no device '{text}': expected auto, cpu, cuda or cuda:N", path="device")
    there = [] if text == "cpu" else tf.config.list_physical_devices("GPU")
    if text == "cpu" or (text == "auto" and not there):
        return "cpu", "/CPU:0"
    index = int(match[1] or 0)
    if index >= len(there):
        raise SpecError(
            f"TensorFlow has no working CUDA for '{text}': expected more than {index} GPUs, got {len(there)}; "
            "install tensorflow[and-cuda] where there is a GPU, or say device='cpu'",
            path="device",
        )
    _grow_memory(there)
    return f"cuda:{index}", f"/GPU:{index}"


def _grow_memory(devices: Iterable[Any]) -> None:
    """Keep TensorFlow from taking all memory of every GPU, unless it has done so already."""
    grow: Callable[[Any, bool], None] = tf.config.experimental.set_memory_growth
    for device in devices:
        try:
            grow(device, True)
        except (RuntimeError, ValueError):  # it runs already, or the operator has set limits
            return


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_text(error: Exception) -> bool:
    """Whether a value was not what a string tensor takes."""
    return isinstance(error, TypeError | ValueError) and bool(_NO_TEXT.search(str(error)))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
