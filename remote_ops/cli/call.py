"""`remote-ops call`: one call, and its outputs printed or saved."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from remote_ops.cli import npy, text
from remote_ops.cli.arguments import Input, Output
from remote_ops.client import Endpoint
from remote_ops.deadline import deadline
from remote_ops.signature import Signature, describe

__all__ = ["call"]

Array = npt.NDArray[Any]


def call(
    endpoint: Endpoint, inputs: Sequence[Input], outputs: Sequence[Output], config: bytes, *, timeout_s: float
) -> None:
    """Call the model once; print its outputs, or save them, and say on stderr how long it took.

    Args:
        endpoint: whom to call.
        inputs: all with a name, or all without, in the order of the model's.
        outputs: those to ask for; all if there are none.
        config: bytes for the model.
        timeout_s: seconds for the signature and the call together.

    Raises:
        SpecError: an output that is to be saved has no form in a file; nothing is printed or saved then.
        SignatureError: what is given does not fit the model, which was not called then.
    """
    with deadline(timeout_s):  # both requests together
        since = time.monotonic()
        signature = endpoint.signature
        asked = time.monotonic()
        values = _bound(signature, inputs, at=endpoint.url)
        results = endpoint.infer(values, [output.name for output in outputs] or None, config=config)
        done = time.monotonic()
    files = {output.name: output.file for output in outputs if output.file}
    storable = {name: npy.storable(results[name], at=f"--output {name}") for name in files}
    for name, array in results.items():
        title = text.printable(f"{name}: {describe(array)}")
        if name in files:
            _save(title, storable[name], files[name], as_is=array.dtype == storable[name].dtype)
        else:
            print(f"{title}\n{text.of_array(array)}", flush=True)  # before what stderr says
    before_ms, took_ms = (asked - since) * 1e3, (done - asked) * 1e3
    print(f"took {took_ms:.1f} ms, after {before_ms:.1f} ms to connect and learn the signature", file=sys.stderr)


def _bound(signature: Signature, inputs: Sequence[Input], *, at: str) -> dict[str, Any]:
    """The values by name, bits of a file in the dtype that the signature says they are."""
    named = not inputs or inputs[0].name
    values = dict(inputs) if named else signature.bind([given.value for given in inputs], at=at)
    specs = {spec.name: spec for spec in signature.inputs}
    specs |= {f"cotangent:{spec.name}": spec for spec in signature.outputs}
    return {
        name: npy.typed(value, specs[name]) if isinstance(value, np.ndarray) and name in specs else value
        for name, value in values.items()
    }


def _save(title: str, array: Array, file: str, *, as_is: bool) -> None:
    if file == "-":
        sys.stdout.buffer.write(npy.dump(array))
        sys.stdout.buffer.flush()
    else:
        Path(file).write_bytes(npy.dump(array))
    form = "" if as_is else f", as {array.dtype.str.lstrip('|') if array.dtype.kind == 'S' else array.dtype}"
    print(f"{title} -> {'stdout' if file == '-' else text.printable(file)}{form}", file=sys.stderr)
