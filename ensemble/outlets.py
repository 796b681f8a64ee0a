"""Where the outputs of runs go: to people as text, or to files as arrays, one file for each run or one for all.

It writes what it is given, in the order in which it is given it, and at once: what was written stays if a later run
fails.
"""

from __future__ import annotations

import json
import math
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import numpy as np

from ensemble.steps import Array
from remote_ops.cli import npy, text
from remote_ops.cli.arguments import Output
from remote_ops.errors import RemoteOpsError, SpecError
from remote_ops.signature import describe

__all__ = ["Archive", "Folder", "Lines", "Outlet", "Shown", "as_sent", "writable"]


class Outlet(Protocol):
    """Takes what came of each run, in order. A run without a file has the name ''."""

    def add(self, run: str, outputs: Mapping[str, Array]) -> None:
        """Write the outputs of a run."""

    def add_error(self, run: str, error: Exception) -> None:
        """Note that a run failed."""

    def close(self) -> None:
        """Write what is left."""


def writable(file: str, at: str) -> str:
    """The file, if its folder is there.

    Raises:
        SpecError: it is not, or the file is a folder.
    """
    if Path(file).is_dir() or not Path(file).parent.is_dir():
        raise SpecError(f"cannot write '{file}': expected a file in a folder that exists", path=at)
    return file


def as_sent(array: Array) -> Array:
    """The array as it goes over the wire: texts of a node of this process as bytes."""
    if array.dtype.kind not in "OUT":
        return array
    items = [item.encode() if isinstance(item, str) else item for item in array.flat]
    return np.array(items, object).reshape(array.shape)


class _Closing:
    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is left to write."""

    def add_error(self, run: str, error: Exception) -> None:
        """Nothing is written of it."""


class Shown(_Closing):
    """Prints outputs, or saves them where a file is said: of one run, as `remote-ops call` does.

    Args:
        outputs: what is asked for, with files; all are printed if there are none.
    """

    def __init__(self, outputs: Sequence[Output]) -> None:
        self._files = {output.name: output.file for output in outputs if output.file}

    def add(self, run: str, outputs: Mapping[str, Array]) -> None:
        """Print them, under the name of the run if it has one."""
        storable = {name: npy.storable(outputs[name], at=f"--output {name}") for name in self._files}
        if run:
            print(text.printable(f"== {run}"))
        for name, array in outputs.items():
            title = text.printable(f"{name}: {describe(array)}")
            if name in storable:
                self._save(title, storable[name], self._files[name])
            else:
                print(f"{title}\n{text.of_array(array)}", flush=True)

    def _save(self, title: str, array: Array, file: str) -> None:
        if file == "-":
            sys.stdout.buffer.write(npy.dump(array))
            sys.stdout.buffer.flush()
        else:
            Path(file).write_bytes(npy.dump(array))
        print(f"{title} -> {'stdout' if file == '-' else text.printable(file)}", file=sys.stderr)


class Folder(_Closing):
    """Saves each run to a `.npz` file of its name: `outputs.npz` of a run without one. Makes the folder."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpecError(f"cannot make the folder ({error.strerror})", path=f"--output-dir {path}") from error

    def add(self, run: str, outputs: Mapping[str, Array]) -> None:
        """Write one file."""
        with Archive(str(self._path / f"{run or 'outputs'}.npz")) as archive:
            archive.add("", outputs)


class Archive(_Closing):
    """Saves all runs to one `.npz` file, whose arrays are called `RUN/OUTPUT`, or `OUTPUT` for a run without a name."""

    def __init__(self, path: str) -> None:
        self._at = f"--out {path}"
        self._zip = zipfile.ZipFile(writable(path, "--out"), "w")

    def add(self, run: str, outputs: Mapping[str, Array]) -> None:
        """Write their arrays; none, if one cannot be."""
        storable = {name: npy.storable(array, at=self._at) for name, array in outputs.items()}
        for name, array in storable.items():
            self._zip.writestr(f"{run}/{name}.npy" if run else f"{name}.npy", npy.dump(array))

    def close(self) -> None:
        """Write the list of what is in it."""
        self._zip.close()


class Lines(_Closing):
    """Writes a line of JSON for each run: `{"run": NAME, "outputs": {...}}`, or `{"run": NAME, "error": "..."}`.

    Arrays are lists of lists; what is no number is null there, and bytes that are no UTF-8 are escaped.
    """

    def __init__(self, path: str) -> None:
        self._file: IO[str] = open(writable(path, "--out"), "w", encoding="utf-8")  # noqa: SIM115 (closed by `close`)

    def add(self, run: str, outputs: Mapping[str, Array]) -> None:
        """Write a line."""
        self._write(run, {"outputs": {name: _listed(array) for name, array in outputs.items()}})

    def add_error(self, run: str, error: Exception) -> None:
        """Write a line that says why."""
        said = f"{type(error).__name__}: {error}" if isinstance(error, RemoteOpsError) else str(error)
        self._write(run, {"error": said})

    def _write(self, run: str, told: Mapping[str, Any]) -> None:
        line = {"run": run, **told} if run else told
        print(json.dumps(line, ensure_ascii=False, allow_nan=False), file=self._file, flush=True)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _listed(array: Array) -> Any:
    if array.dtype == object or array.dtype.kind == "S":
        return _each(array.tolist(), lambda item: item.decode("utf-8", "backslashreplace"))
    plain = array if array.dtype.kind in "biuf" else array.astype(np.float32)
    if plain.dtype in (np.float16, np.float32):
        plain = plain.astype("U").astype(np.float64)  # as few digits as tell it from its neighbours
    if plain.dtype.kind != "f" or np.isfinite(plain).all():
        return plain.tolist()
    return _each(plain.tolist(), lambda item: item if math.isfinite(item) else None)


def _each(value: Any, change: Any) -> Any:
    return [_each(item, change) for item in value] if isinstance(value, list) else change(value)
