"""One call in every form that TensorFlow has: eager, `tf.function`, `tf.data`, and a SavedModel in another process.

That process loads the library of the kernel and nothing else of ours: it says so if it did.
"""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from remote_ops.tf import op_library

ROOT = Path(__file__).parents[1]
Call = Callable[[Any], Any]
Found = tuple[Any, Any]  # an output, and a gradient or None

# A tensor of every kind, whose dtype is the name of the model in `tfpeer` that gives it back.
VALUES = [
    tf.constant([True, False]),
    tf.cast([1.5, -2.0], tf.bfloat16),
    tf.cast([1.5, -2.0], tf.dtypes.experimental.float8_e5m2),
    tf.constant([b"a\0b\0", b"", b"\0", b"x" * 1000, "größe".encode()]),
    tf.constant([], tf.string),
    tf.constant([1.5, np.nan], tf.float16),
    tf.constant([0, 255], tf.uint8),
    tf.constant([-(2**63), 2**63 - 1]),
    tf.constant([], tf.float64),
    tf.constant([2**32 - 1], tf.uint32),
]

# Reads one request a line: the folder of a SavedModel, the name of a function, its inputs, and the cotangents of its
# outputs where gradients are wanted. Answers with outputs and gradients, or with the error's class and message.
_WORKER = """
import base64, json, sys
import tensorflow as tf

def packed(tensor):
    if tensor is not None:
        return [base64.b64encode(tf.io.serialize_tensor(tensor).numpy()).decode(), tensor.dtype.name]

def opened(pair):
    return tf.io.parse_tensor(base64.b64decode(pair[0]), pair[1])

def answer(folder, name, inputs, cotangents):
    if folder not in loaded:
        loaded[folder] = tf.saved_model.load(folder)
    inputs, function = [opened(pair) for pair in inputs], getattr(loaded[folder], name)
    if cotangents is None:
        outputs, gradients = tf.nest.flatten(function(*inputs)), []
    else:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = tf.nest.flatten(function(*inputs))
        gradients = tape.gradient(outputs, inputs, [opened(pair) for pair in cotangents])
    return {"outputs": [*map(packed, outputs)], "gradients": [*map(packed, gradients)]}

loaded = {}
if int(sys.argv[1]):
    tf.config.threading.set_inter_op_parallelism_threads(int(sys.argv[1]))
tf.load_op_library(sys.argv[2])
for line in sys.stdin:
    try:
        said = answer(*json.loads(line))
    except tf.errors.OpError as error:
        said = {"error": [type(error).__name__, error.message]}
    assert not any(name.partition(".")[0] in ("remote_ops", "server_ref") for name in sys.modules)
    print(json.dumps(said), flush=True)
"""


def _packed(tensor: Any) -> list[str]:
    return [base64.b64encode(tf.io.serialize_tensor(tensor).numpy()).decode(), tensor.dtype.name]


def _opened(pair: list[str] | None) -> Any:
    return None if pair is None else tf.io.parse_tensor(base64.b64decode(pair[0]), pair[1])


class Fresh:
    """A process that knows the kernel and SavedModels, and nothing of this project in Python."""

    def __init__(self, threads: int = 0) -> None:
        command = [sys.executable, "-c", _WORKER, str(threads), str(op_library())]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def run(self, folder: Path, name: str, *inputs: Any, cotangents: list[Any] | None = None) -> tuple[Any, Any]:
        """The outputs and gradients of a function of a SavedModel; raises what it raises there."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        given = None if cotangents is None else [*map(_packed, cotangents)]
        self._process.stdin.write(json.dumps([str(folder), name, [*map(_packed, inputs)], given]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(self._log.read()[-3000:])
        said = json.loads(line)
        if "error" in said:
            raise getattr(tf.errors, said["error"][0])(None, None, said["error"][1])
        return [*map(_opened, said["outputs"])], [*map(_opened, said["gradients"])]

    def close(self) -> None:
        self._process.communicate(timeout=20)
        self._log.close()


@contextlib.contextmanager
def fresh(threads: int = 0) -> Iterator[Fresh]:
    """A fresh process; with a number, TensorFlow has that many threads for operations there."""
    process = Fresh(threads)
    try:
        yield process
    finally:
        process.close()


def save(folder: Path, functions: Mapping[str, tuple[Call, Any]]) -> Path:
    """Write a SavedModel of functions of one tensor, each with the `tf.TensorSpec` of it, or None for no input."""
    module = tf.Module()
    for name, (call, spec) in functions.items():
        setattr(module, name, tf.function(call, input_signature=[] if spec is None else [spec]))
    tf.saved_model.save(module, str(folder))
    return folder


def loosened(x: Any) -> Any:
    """The spec of tensors like this one, with any number of rows."""
    return tf.TensorSpec([None, *x.shape[1:]], x.dtype)


def computed(call: Call, x: Any, cotangent: Any = None) -> Found:
    """The output for `x`, and the gradient with respect to it where there is a cotangent."""
    if cotangent is None:
        return call(x), None
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = call(x)
    return y, tape.gradient(y, x, cotangent)


def by_eager(call: Call, x: Any, cotangent: Any = None) -> Found:
    return computed(call, x, cotangent)


def by_function(call: Call, x: Any, cotangent: Any = None) -> Found:
    return computed(tf.function(call), x, cotangent)


def by_data(call: Call, x: Any, cotangent: Any = None) -> Found:
    """Eight elements alike, mapped side by side; they must come out alike."""
    if cotangent is None:
        data = tf.data.Dataset.from_tensors(x).repeat(8).map(lambda x: call(x), num_parallel_calls=8)
        found = [(y, None) for y in data]
    else:
        data = tf.data.Dataset.from_tensors((x, cotangent)).repeat(8)
        found = list(data.map(lambda x, cotangent: computed(call, x, cotangent), num_parallel_calls=8))
    assert len({tf.io.serialize_tensor(y).numpy() for y, _ in found}) == 1
    return tuple(found[0])


IN_PROCESS: dict[str, Callable[..., Found]] = {"eager": by_eager, "function": by_function, "data": by_data}
