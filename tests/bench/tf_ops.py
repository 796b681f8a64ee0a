"""What does a TensorFlow op cost beyond the call, do calls overlap, and how long is it built? (figures m, n, o, p)"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from models import FEATURES, IMAGE, ROWS
from timing import HERE, ROOT, bare_exchange, in_turn, median, row, server

from remote_ops import Endpoint

FEW_THREADS = 2


def branches(threads: int = 0) -> None:
    """Eight calls of 200 ms in one function against one of them, forward and with the gradient."""
    import tensorflow as tf

    from remote_ops.tf import remote_op

    where = f", {threads} threads" if threads else ""
    with server("far", "echo") as (url, _):

        def calls(count: int) -> Callable[[Any], Any]:
            return lambda x: tf.add_n([remote_op(url + "far", n * x) for n in range(1, count + 1)])

        def gradient(count: int) -> Callable[[Any], Any]:
            def of(x: Any) -> Any:
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    y = tf.reduce_sum(calls(count)(x) ** 2)  # so that the way back waits for the way there
                return tape.gradient(y, x)

            return of

        def mapped(count: int) -> Callable[[Any], Any]:
            data = tf.data.Dataset.range(count).map(
                lambda n: remote_op(url + "far", tf.cast(n, tf.float32) * tf.ones((1, 16))), num_parallel_calls=8
            )
            return lambda x: [*data]

        x = tf.ones((1, 16))
        for what, made in (("forward", calls), ("forward and backward", gradient), ("tf.data", mapped)):
            functions = [made(count) if made is mapped else tf.function(made(count)) for count in (1, 8)]
            several = [lambda function=function: function(x) for function in functions]
            in_turn(several, 1)
            bare_s, ours_s = (median(times) for times in in_turn(several, 5))
            row(f"m  8 calls of 200 ms, {what}{where} / one", f"{ours_s * 1e3:.1f} ms", f"{bare_s * 1e3:.1f} ms",
                ours_s / bare_s, "1.3")  # fmt: skip


def headline() -> None:
    """77.07 MB up, 12.85 MB down: `Endpoint` and two bare sockets beside the op."""
    import tensorflow as tf

    from remote_ops.tf import remote_op

    images = np.random.default_rng(0).random((ROWS, *IMAGE), np.float32)
    tensor = tf.constant(images)
    with (
        server("headline", "echo") as (url, _),
        Endpoint(url + "headline") as endpoint,
        bare_exchange(images.nbytes, 4 * ROWS * int(np.prod(FEATURES))) as exchange,
    ):
        eager = lambda: remote_op(url + "headline", tensor)  # noqa: E731
        function = tf.function(lambda x: remote_op(url + "headline", x))
        calls = [exchange, lambda: endpoint(images), lambda: function(tensor), eager]
        in_turn(calls, 5)
        sockets_s, bare_s, *ours = (median(times) for times in in_turn(calls, 40))
    for what, ours_s in zip(("tf.function", "eager"), ours, strict=True):
        row(f"n  headline through remote_op, {what} / Endpoint", f"{ours_s * 1e3:.1f} ms", f"{bare_s * 1e3:.1f} ms",
            ours_s / bare_s, "1.5")  # fmt: skip
        row(f"n  headline through remote_op, {what} / two sockets", f"{ours_s * 1e3:.1f} ms",
            f"{sockets_s * 1e3:.1f} ms", ours_s / sockets_s, "")  # fmt: skip


def small() -> None:
    """64 bytes each way: the op, and what TensorFlow takes for an op and for a function that do nothing."""
    import tensorflow as tf

    from remote_ops.tf import remote_op

    x = np.ones((1, 16), np.float32)
    tensor = tf.constant(x)
    with server("echo", "double") as (url, _), Endpoint(url + "double") as endpoint:
        target = url + "double"
        named = {"input_name": "x", "output_name": "y", "output_type": tf.float32, "output_shape": [None, 16]}
        function = tf.function(lambda x: remote_op(target, x))
        concrete = function.get_concrete_function(tensor)
        empty = tf.function(lambda x: x + x)
        inputs = {"x": x}
        calls = [
            lambda: endpoint.infer(inputs),
            lambda: remote_op(target, tensor),
            lambda: remote_op(target, tensor, **named),
            lambda: function(tensor),
            lambda: concrete(tensor),
            lambda: empty(tensor),
        ]
        in_turn(calls, 300)
        bare_s, *ours = (median(times) for times in in_turn(calls, 3000))
    for what, ours_s, bound in zip(
        ("eager", "eager, all named", "tf.function", "its concrete function", "a tf.function that calls nothing"),
        ours, ("3", "3", "3", "3", ""), strict=True,
    ):  # fmt: skip
        row(f"o  64 B, {what} / Endpoint", f"{ours_s * 1e6:.0f} us", f"{bare_s * 1e6:.0f} us", ours_s / bare_s, bound)


# Prints the seconds that the library takes from nothing, and those of a file that only includes TensorFlow's header.
_BUILD = """
import subprocess, sys, time
import tensorflow as tf
from remote_ops.tf.library import op_library
since = time.perf_counter()
op_library()
between = time.perf_counter()
flags = ["-O2", "-shared", "-fPIC", "-w", *tf.sysconfig.get_compile_flags(), *tf.sysconfig.get_link_flags()]
source = '#include "tensorflow/core/framework/op_kernel.h"'
subprocess.run(["g++", *flags, "-xc++", "-", "-o", sys.argv[1] + "/bare.so"], input=source, text=True, check=True)
print(between - since, time.perf_counter() - between)
"""


def building() -> None:
    """The library of the kernel from nothing, against the compiler's time for TensorFlow's header alone."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "REMOTE_OPS_CACHE": cache, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", _BUILD, cache]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    ours_s, bare_s = map(float, done.stdout.split())
    row("p  build the op from nothing / a file that is one include", f"{ours_s:.1f} s", f"{bare_s:.1f} s",
        ours_s / bare_s, "15 s")  # fmt: skip


def main() -> None:
    """Print figures m to p, or why there are none."""
    if find_spec("tensorflow") is None:
        print("m  the TensorFlow op: not measured, tensorflow is not installed", flush=True)
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    building()
    branches()
    subprocess.run([sys.executable, __file__, str(FEW_THREADS)], cwd=HERE, check=True)
    headline()
    small()


def with_threads(threads: int) -> None:
    """Figure m where TensorFlow has that many threads for operations: it takes no more once it runs."""
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(threads)
    branches(threads)


if __name__ == "__main__":
    with_threads(int(sys.argv[1])) if len(sys.argv) > 1 else main()
