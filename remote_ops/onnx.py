"""An ONNX file as a servable, through onnxruntime, on CPU or CUDA; the only file that imports onnxruntime.

It computes; it does not batch, queue or limit how many calls run at once (`concurrency` says how many fit).
State: the session and the signature are constant; onnxruntime's session takes calls from any thread, so no lock.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from remote_ops.deadline import Deadline
from remote_ops.errors import InternalError, RemoteOpsError, SignatureError, SpecError
from remote_ops.servable import run_checked
from remote_ops.signature import DTYPES, Array, Signature, TensorSpec, describe

try:
    import onnxruntime as ort
except ImportError as error:
    raise ImportError("remote_ops.onnx needs onnxruntime: pip install 'remote-ops[onnx]'") from error

__all__ = ["OnnxModel"]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

# onnxruntime's names for element types, where they are not ours.
_DTYPE_OF = {
    "float": "float32",
    "double": "float64",
    "float8e4m3fn": "float8_e4m3fn",
    "float8e4m3fnuz": "float8_e4m3fnuz",
    "float8e5m2": "float8_e5m2",
    "float8e5m2fnuz": "float8_e5m2fnuz",
}
# Element types that numpy lacks cross into onnxruntime as bits under their number in ONNX's TensorProto.DataType.
_AS_BITS = {
    "bfloat16": 16,
    "float8_e4m3fn": 17,
    "float8_e4m3fnuz": 18,
    "float8_e5m2": 19,
    "float8_e5m2fnuz": 20,
}
_UNSET_VERSION = (0, 2**63 - 1)
# Older ones follow `../../secret` and absolute paths of external data; Python 3.10 gets none newer.
_CONFINES_EXTERNAL_DATA = tuple(int(part) for part in ort.__version__.split(".")[:2]) >= (1, 24)


class OnnxModel:
    """A model in an ONNX file, run by onnxruntime.

    Args:
        model: a path, or the file's bytes (then without external data).
        device: `cuda` or `cuda:N` for that GPU; `cpu`; `auto` for CUDA where it really works, else the CPU.
        threads: CPU threads for one run, 1 or more; a quarter of the CPUs unless said, so that four runs fit.
        name: how the model names itself; the file's stem unless said.
        profile: the beginning of a path; onnxruntime writes a trace there, with a time and `.json` added, when
            `end_profile` is called.

    Raises:
        SpecError: no such file, no valid model, an input or output that is no tensor of a known dtype, external data
            outside the model's folder, no such device, or `threads` below 1.

    Loading reads the whole file. Strings are UTF-8: bytes or str go in, object arrays of bytes come out, as from an
    `Endpoint`. bfloat16 and float8 outputs are copied once; other arrays are not.
    """

    def __init__(
        self,
        model: str | PathLike[str] | bytes | bytearray | memoryview,
        *,
        device: str = "auto",
        threads: int | None = None,
        name: str | None = None,
        profile: str | PathLike[str] | None = None,
    ) -> None:
        cpus = _cpu_count()
        self.threads = max(1, cpus // 4) if threads is None else threads
        if self.threads < 1:
            raise SpecError(f"expected 1 thread or more, got {threads}", path="threads")
        self.concurrency = max(1, cpus // self.threads)
        in_memory = isinstance(model, bytes | bytearray | memoryview)
        source = bytes(model) if in_memory else os.fspath(model)  # type: ignore[arg-type]
        self._place = "bytes in memory" if in_memory else str(source)
        self._session = _open(source, self._place, device, self._options(in_memory, profile))
        self._signature = self._read_signature(source, name)
        self._symbols = {node.name: tuple(node.shape) for node in self._session.get_inputs()}
        self._strings = [spec for spec in self._signature.inputs if spec.dtype == "string"]
        self._gives_strings = any(spec.dtype == "string" for spec in self._signature.outputs)
        self._bits = {spec.name for spec in self._specs() if spec.dtype in _AS_BITS}
        if self._bits and self._strings:
            raise SpecError(
                f"cannot mix string inputs ('{self._strings[0].name}') with bfloat16 or float8 "
                f"('{min(self._bits)}'): onnxruntime has no call for both",
                path=self._place,
            )

    def __repr__(self) -> str:
        return f"OnnxModel({self._place!r}, device={self.device!r}, threads={self.threads})"

    @property
    def signature(self) -> Signature:
        """Inputs and outputs as the file declares them; a size that it leaves open is -1."""
        return self._signature

    @property
    def never_waits(self) -> bool:
        """Whether a run only computes, here: then a server need not give a quick one a thread of its own."""
        return self.device == "cpu"

    @property
    def device(self) -> str:
        """Where it really runs: `cpu` or `cuda:N`."""
        if self._session.get_providers()[0] != CUDA:
            return "cpu"
        return f"cuda:{self._session.get_provider_options()[CUDA].get('device_id', '0')}"

    @property
    def metadata(self) -> dict[str, str]:
        """The free key-value pairs that the file carries, such as class names."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def infer(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> dict[str, Array]:
        """Run the model, and give the outputs asked for (None: all); onnxruntime computes all of them in any case.

        Args:
            inputs: arrays by name, of the signature's dtypes and shapes; any alignment and strides.
            outputs: names, in the order wanted.
            config: ignored.
            deadline: checked before the start; a run that has begun is not stopped.

        Raises:
            SignatureError: names, dtypes or shapes do not fit the signature, or not each other.
            DeadlineExceeded: the deadline passed before the start.
            InternalError: onnxruntime failed, or gave something other than the file declares.
        """
        return run_checked(self._signature, self._run, inputs, outputs, deadline)

    def end_profile(self) -> Path:
        """Stop profiling, and give the path of the trace (for chrome://tracing).

        Raises:
            SpecError: the model was opened without `profile`.
        """
        if not self._profiling:
            raise SpecError("nothing was profiled: open the model with profile='...'", path="profile")
        return Path(self._session.end_profiling())

    def _specs(self) -> tuple[TensorSpec, ...]:
        return self._signature.inputs + self._signature.outputs

    def _options(self, in_memory: bool, profile: str | PathLike[str] | None) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        # A thread that spins takes 20 % off a lone run and as much from the throughput of two runs side by side: so
        # only where no other run is to have the CPUs.
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self.concurrency == 1)))
        # All that it would print it also raises.
        options.log_severity_level = 4
        if in_memory:
            # Bytes have no folder that their external data could be in; the working directory is not it.
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
        self._profiling = profile is not None
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = os.fspath(profile)
        return options

    def _read_signature(self, source: str | bytes, name: str | None) -> Signature:
        meta = self._session.get_modelmeta()
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        open_rank = _without_shape(source) if any(not node.shape for node in (*inputs, *outputs)) else set()
        stem = meta.graph_name if isinstance(source, bytes) else Path(source).stem
        return Signature(
            tuple(_spec_of(node, "input", open_rank, self._place) for node in inputs),
            tuple(_spec_of(node, "output", open_rank, self._place) for node in outputs),
            name=name or stem or "model",
            version="" if meta.version in _UNSET_VERSION else str(meta.version),
            description=meta.description or meta.graph_description,
        )

    def _run(self, arrays: dict[str, Array], wanted: tuple[TensorSpec, ...]) -> Mapping[str, Array]:
        if not wanted:
            return {}  # onnxruntime would take no names for all of them
        names = [spec.name for spec in wanted]
        for name, array in arrays.items():
            if not array.flags.aligned:
                arrays[name] = np.require(array, requirements="A")
        for spec in self._strings:
            arrays[spec.name] = _to_str(spec, arrays[spec.name])
        try:
            if self._bits:
                return self._run_bits(arrays, names)
            results = self._session.run(names, arrays)
        except Exception as error:
            raise self._failure(error, arrays) from error
        if self._gives_strings:
            kinds = [spec.dtype for spec in wanted]
            results = [
                _to_bytes(array) if kind == "string" else array for kind, array in zip(kinds, results, strict=True)
            ]
        return dict(zip(names, results, strict=True))

    def _run_bits(self, arrays: dict[str, Array], names: list[str]) -> dict[str, Array]:
        """The same for models with element types that numpy lacks."""
        values = {name: _to_ort(array) for name, array in arrays.items()}
        results = self._session.run_with_ort_values(names, values)
        specs = {spec.name: spec for spec in self._signature.outputs}
        return {name: _from_ort(specs[name].dtype, value) for name, value in zip(names, results, strict=True)}

    def _failure(self, error: Exception, arrays: Mapping[str, Array]) -> RemoteOpsError:
        """Say whose fault a failed run is: shapes that do not go together are the caller's."""
        reason = _reason(error)
        got = ", ".join(f"'{name}' {describe(array)}" for name, array in arrays.items())
        sizes: dict[str, set[int]] = {}
        for name, array in arrays.items():
            for symbol, size in zip(self._symbols[name], array.shape, strict=False):
                if isinstance(symbol, str):
                    sizes.setdefault(symbol, set()).add(size)
        unequal = [symbol for symbol, found in sizes.items() if len(found) > 1]
        about_shapes = _sizes_are_open(self._signature) and _SHAPE_FAULT.search(reason)
        if unequal or about_shapes or isinstance(error, UnicodeEncodeError):
            expected = f"one size for each of {', '.join(unequal)}" if unequal else "values that go together"
            return SignatureError(
                f"inputs of '{self._signature.name}': expected {expected}, got {got}: {reason}",
                name=next(iter(arrays), ""),
                expected=expected,
                got=got,
            )
        return InternalError(f"model '{self._signature.name}' failed on {got or 'no inputs'}: {reason}")


_SHAPE_FAULT = re.compile(r"broadcast|dimension|\bdims?\b|shape|\brank\b|out of data bounds", re.IGNORECASE)


def _sizes_are_open(signature: Signature) -> bool:
    """Whether callers choose any size, so that what they send can be wrong beyond what the signature tells."""
    return any(spec.shape is None or -1 in spec.shape for spec in signature.inputs)


def _cpu_count() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open(source: str | bytes, place: str, device: str, options: Any) -> Any:
    """A session on the device asked for; it never moves to another one by itself."""
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d{1,4}))?", device)
    if match is None:
        raise SpecError(f"no device '{device}': expected auto, cpu, cuda or cuda:N", path="device")
    if isinstance(source, str) and not os.path.isfile(source):
        raise SpecError("no such file", path=place)
    if not _CONFINES_EXTERNAL_DATA:
        _refuse_external_data(source, place)
    there = ort.get_available_providers()
    on_cuda = [(CUDA, {"device_id": match[1] or "0"}), CPU]
    if device == "cpu" or (device == "auto" and CUDA not in there):
        return _session(source, place, options, [CPU])
    if CUDA not in there:
        raise _no_cuda(device, there)
    try:
        session = _session(source, place, options, on_cuda)
    except SpecError:
        if device != "auto":
            raise
        return _session(source, place, options, [CPU])
    if device != "auto" and session.get_providers()[0] != CUDA:
        raise _no_cuda(device, session.get_providers())
    return session


def _refuse_external_data(source: str | bytes, place: str) -> None:
    """Raise `SpecError` where a file may have external data: however it is encoded, its key stands there as it is."""
    with _mapped(source) as data:
        if data.find(b"location") >= 0:
            raise SpecError(
                f"external data ('location' stands in the file) is read from anywhere by onnxruntime "
                f"{ort.__version__}: expected 1.24 or newer; pip install -U onnxruntime, or save the weights inside",
                path=place,
            )


def _session(source: str | bytes, place: str, options: Any, providers: list[Any]) -> Any:
    try:
        session = ort.InferenceSession(source, options, providers=providers)
    except Exception as error:
        raise SpecError(f"onnxruntime cannot load this model: {_reason(error)}", path=place) from error
    session.disable_fallback()
    return session


def _no_cuda(device: str, there: list[str]) -> SpecError:
    return SpecError(
        f"onnxruntime has no working CUDA for '{device}': expected {CUDA}, got {', '.join(there)}; "
        "pip install 'remote-ops[gpu]' where there is a GPU, or say device='cpu'",
        path="device",
    )


def _reason(error: Exception) -> str:
    """What onnxruntime says, on one line, without its own source paths."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error))
    return " ".join(re.sub(r"/onnxruntime_src/\S+:\d+ ", "", text).split())


def _spec_of(node: Any, kind: str, open_rank: set[str], place: str) -> TensorSpec:
    match = re.fullmatch(r"tensor\((\w+)\)", node.type)
    element = match[1].lower() if match else ""
    dtype = _DTYPE_OF.get(element, element)
    if dtype not in DTYPES:
        raise SpecError(
            f"{kind} '{node.name}': expected a tensor of {', '.join(DTYPES)}, got {node.type}; "
            "export the model with plain tensors only (scikit-learn: zipmap=False)",
            path=place,
        )
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in node.shape)
    return TensorSpec(node.name, dtype, None if not shape and node.name in open_rank else shape)


def _to_str(spec: TensorSpec, array: Array) -> Array:
    """Strings as onnxruntime takes them; it would send the `repr` of bytes, and read past the end of an `S` array."""
    values = array.ravel().tolist()
    for at, value in enumerate(values):
        if isinstance(value, bytes):
            try:
                values[at] = value.decode()
            except UnicodeDecodeError as error:
                raise _no_text(spec, at, f"bytes that are not UTF-8 ({error.reason})") from error
        elif not isinstance(value, str):
            raise _no_text(spec, at, f"a {type(value).__name__}")
    return _objects(values, array.shape)


def _no_text(spec: TensorSpec, at: int, got: str) -> SignatureError:
    return SignatureError(
        f"input '{spec.name}': expected {spec}, each UTF-8 text, got {got} at element {at}",
        name=spec.name,
        expected=str(spec),
        got=got,
    )


def _to_bytes(array: Array) -> Array:
    return _objects([value.encode() for value in array.ravel().tolist()], array.shape)


def _objects(values: list[Any], shape: tuple[int, ...]) -> Array:
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out.reshape(shape)


def _to_ort(array: Array) -> Any:
    """An array as a value of onnxruntime, without a copy; the value keeps the array alive."""
    number = _AS_BITS.get(array.dtype.name)
    array = np.ascontiguousarray(array).reshape(array.shape)  # the former alone makes 0-d arrays 1-d
    if number is None:
        return ort.OrtValue.ortvalue_from_numpy(array)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(f"u{array.itemsize}"), number)


def _from_ort(dtype: str, value: Any) -> Array:
    if dtype == "string":
        return _to_bytes(value.numpy())
    if dtype not in _AS_BITS:
        return value.numpy()  # type: ignore[no-any-return]
    out: Array = np.empty(value.shape(), DTYPES[dtype].numpy)
    if value.tensor_size_in_bytes() != out.nbytes or value.device_name() != "cpu":
        raise ValueError(
            f"expected {out.nbytes} bytes of {dtype} on cpu, got {value.tensor_size_in_bytes()} "
            f"on {value.device_name()}"
        )
    ctypes.memmove(out.ctypes.data, value.data_ptr(), out.nbytes)
    return out


def _without_shape(source: str | bytes) -> set[str]:
    """The inputs and outputs of which a model file does not tell the rank: onnxruntime shows them as scalars.

    Field numbers are those of onnx.proto: ModelProto.graph 7, GraphProto.input 11 and output 12, ValueInfoProto.name 1
    and type 2, TypeProto.tensor_type 1, TypeProto.Tensor.shape 2.
    """
    with _mapped(source) as data:
        return {
            _text(data, value)
            for graph in _children(data, (0, len(data)), 7)
            for number in (11, 12)
            for value in _children(data, graph, number)
            if not any(
                list(_children(data, tensor, 2))
                for kind in _children(data, value, 2)
                for tensor in _children(data, kind, 1)
            )
        }


@contextmanager
def _mapped(source: str | bytes) -> Iterator[Any]:
    if isinstance(source, bytes):
        yield source
        return
    if not os.path.getsize(source):
        yield b""  # mmap takes no empty file
        return
    with open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _text(data: Any, message: tuple[int, int]) -> str:
    start, end = next(_children(data, message, 1), (0, 0))
    return bytes(data[start:end]).decode("utf-8", "replace")


def _children(data: Any, message: tuple[int, int], number: int) -> Iterator[tuple[int, int]]:
    """The spans of the sub-messages or texts of that number in a message that onnxruntime has parsed before."""
    at, end = message
    while at < end:
        tag, at = _varint(data, at)
        if tag & 7 == 2:
            length, at = _varint(data, at)
            if tag >> 3 == number:
                yield at, at + length
            at += length
        elif tag & 7 == 0:
            _, at = _varint(data, at)
        else:
            at += {1: 8, 5: 4}[tag & 7]


def _varint(data: Any, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
