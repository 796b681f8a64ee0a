"""What the runs of a command line are given: values as JSON, arrays and pictures from files, a run for each of many.

It reads files, a run's when the run begins; whether they fit is for the graph to say.
"""

from __future__ import annotations

import glob
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ensemble.faults import meant
from ensemble.steps import Array
from remote_ops.cli import npy
from remote_ops.errors import SpecError
from remote_ops.signature import Signature, TensorSpec

__all__ = ["Feeds", "feeds_of"]

_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_ARRAYS = frozenset({".npy", ".npz", ".json"})


class Feeds(NamedTuple):
    """The inputs of all runs.

    Args:
        same: the values that are the same for every run.
        series: the inputs that differ, each with its files, as many for one as for another; none for a single run.
        specs: what the graph says of its inputs.
    """

    same: Mapping[str, Any]
    series: Mapping[str, Sequence[Path]]
    specs: Mapping[str, TensorSpec]

    @property
    def names(self) -> list[str]:
        """What each run is called: the names of its first input's files, without endings where that tells them apart.

        A single run has the name ''.
        """
        if not self.series:
            return [""]
        files = next(iter(self.series.values()))
        stems = [file.stem for file in files]
        return stems if len(set(stems)) == len(stems) else [file.name for file in files]

    @property
    def is_many(self) -> bool:
        """Whether there is a run for each of some files."""
        return bool(self.series)

    def inputs(self, number: int) -> dict[str, Any]:
        """Read what one run is given.

        Raises:
            SpecError: a file of it cannot be read, or holds something else than its name says.
            ImportError: it is a picture, and Pillow is not installed.
        """
        files = {name: files[number] for name, files in self.series.items()}
        read = {name: _read(file, self.specs[name], f"--input {name}") for name, file in files.items()}
        return {**self.same, **read}


def feeds_of(texts: Sequence[str], signature: Signature, optional: frozenset[str] = frozenset()) -> Feeds:
    """Read what `--input` says, each `[NAME=]VALUE`.

    A value is JSON, a file, `-` for a `.npy` file on stdin, or a folder or a pattern such as `'in/*.png'`, which make a
    run for each file, in the order of their names; where several do, each run takes the next file of each. Without
    names they go in the order of the inputs; a lone `.npz` file gives every input whose name an array of it has.

    Args:
        texts: one for each input.
        signature: of the graph.
        optional: the inputs that may be left out.

    Raises:
        SpecError: a name that is none, one twice or one left out; no file; or series of different lengths.
    """
    specs = {spec.name: spec for spec in signature.inputs}
    specs |= {f"cotangent:{spec.name}": spec for spec in signature.outputs}
    same: dict[str, Any] = {}
    series: dict[str, Sequence[Path]] = {}
    for name, text in _named(texts, [spec.name for spec in signature.inputs]):
        if not name:
            same |= _archive(text, specs)
        elif (files := _series(text, specs[name])) is not None:
            series[name] = files
        else:
            same[name] = _value(text, specs[name], f"--input {name}")
    left_out = [name for name in [spec.name for spec in signature.inputs] if name not in {*same, *series, *optional}]
    if left_out:
        expected = ", ".join(f"'{name}', {specs[name]}" for name in left_out)
        raise SpecError(f"the graph takes {expected}, which is not given: say --input {left_out[0]}=...")
    if len({len(files) for files in series.values()}) > 1:
        counts = ", ".join(f"{len(files)} for '{name}'" for name, files in series.items())
        raise SpecError(f"expected as many files for each input, got {counts}", path="--input")
    return Feeds(same, series, specs)


def _named(texts: Sequence[str], known: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The values with their names; no name for a lone archive."""
    pairs = [_pair(text) for text in texts]
    if sum(value == "-" for _, value in pairs) > 1:
        raise SpecError("stdin holds one array: got '-' twice", path="--input")
    names = [name for name, _ in pairs if name]
    if names and len(names) < len(pairs):
        raise SpecError("expected all inputs with a name, as in x=arr.npy, or none: got both", path="--input")
    if not names and len(pairs) == 1 and pairs[0][1].endswith(".npz"):
        yield pairs[0]
        return
    if len(pairs) > len(known) and not names:
        raise SpecError(f"the graph takes {len(known)} inputs, got {len(pairs)}", path="--input")
    for (name, value), place in zip(pairs, names or known, strict=False):
        if place not in known and not place.startswith("cotangent:"):
            raise SpecError(f"the graph has no input '{name}'{meant(name, known)}", path="--input")
        if names.count(place) > 1:
            raise SpecError(f"input '{place}' is given twice: for several runs, say a folder", path="--input")
        yield place, value


def _pair(text: str) -> tuple[str, str]:
    name, mark, value = text.partition("=")
    if not mark or text[0] in '["{':
        name, value = "", text
    if not value or (mark and not name and value != text):
        raise SpecError(f"expected NAME=VALUE, or VALUE, got {text!r}", path="--input")
    return name, value


# --------------------------------------------------------------------------- one value


def _value(text: str, spec: TensorSpec, at: str) -> Any:
    if text == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise SpecError("'-' reads a .npy file from stdin: expected a pipe or a file, not a terminal", path=at)
        return npy.typed(npy.parse(sys.stdin.buffer.read(), at=at), spec)
    if text[:1] in _JSON or _is_json(text):
        return _plain(text, spec, at)
    return _read(Path(text), spec, at)


_JSON = ("[", "{", '"')  # no file is called so


def _plain(text: str, spec: TensorSpec, at: str) -> Any:
    """Read JSON of the few kinds that can become an array; texts as the bytes that come over the wire."""
    try:
        value = json.loads(text)
        is_plain = _is_plain(value)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"this is no JSON: {error}", path=at) from error
    if not is_plain:
        raise SpecError("expected JSON of numbers, true and false, texts, and lists of them", path=at)
    return _encoded_texts(value) if spec.dtype == "string" else value


def _encoded_texts(value: Any) -> Any:
    if isinstance(value, list):
        return [*map(_encoded_texts, value)]
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, int | float | str)


def _archive(file: str, specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """Every array of a file, each for the input of its name."""
    at = f"--input {file}"
    arrays = _arrays(_bytes(Path(file), at), at)
    for name in arrays:
        if name not in specs:
            raise SpecError(f"the graph has no input '{name}'{meant(name, specs)}", path=at)
    return {name: npy.typed(array, specs[name]) for name, array in arrays.items()}


# --------------------------------------------------------------------------- many files


def _series(text: str, spec: TensorSpec) -> list[Path] | None:
    """The files of a folder or a pattern; None for anything else."""
    if text == "-" or text[:1] in _JSON or "\0" in text:
        return None
    path = Path(text)
    if path.is_dir():
        found = [file for file in path.iterdir() if file.is_file() and _is_readable(file, spec)]
    elif any(char in text for char in "*?[") and not path.exists():
        found = [Path(file) for file in glob.glob(text, recursive=True) if Path(file).is_file()]
    else:
        return None
    if not found:
        raise SpecError(f"no files in '{text}': expected {_expected(spec)}", path=f"--input {spec.name}")
    return sorted(found)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _is_readable(file: Path, spec: TensorSpec) -> bool:
    known = file.suffix.lower() in _PICTURES | _ARRAYS or spec.dtype == "string"
    return known and not file.name.startswith(".")


def _expected(spec: TensorSpec) -> str:
    return "files" if spec.dtype == "string" else "pictures (.png, .jpg, ...), .npy, .npz or .json files"


# --------------------------------------------------------------------------- one file


def _read(file: Path, spec: TensorSpec, at: str) -> Any:
    at = f"{at}, {file}"
    data = _bytes(file, at)
    suffix = file.suffix.lower()
    if suffix == ".npz":
        return _only(_arrays(data, at), spec, at)
    if suffix == ".json":
        return _plain(data.decode("utf-8", "replace"), spec, at)
    if suffix == ".npy":
        return npy.typed(npy.parse(data, at=at), spec)
    if (encoded := _encoded(data, spec)) is not None:
        return encoded
    if suffix not in _PICTURES:
        raise SpecError(f"cannot tell what '{file}' holds: expected a picture, .npy, .npz or .json", path=at)
    return _picture(data, spec.shape or (), at)


def _bytes(file: Path, at: str) -> bytes:
    try:
        return file.read_bytes()
    except (OSError, ValueError) as error:
        hint = "" if file.suffix else "; expected a file, a folder, or JSON, where a text has quotes: '\"abc\"'"
        reason = error.strerror if isinstance(error, OSError) else error
        raise SpecError(f"cannot read '{file}' ({reason}){hint}", path=at) from error


def _arrays(data: bytes, at: str) -> dict[str, Array]:
    """The arrays of a `.npz` file by name."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy's own and those of zipfile and zlib
        raise SpecError(f"expected a .npz file, as numpy.savez writes it: {error}", path=at) from error


def _only(arrays: Mapping[str, Array], spec: TensorSpec, at: str) -> Array:
    name = spec.name
    if name not in arrays and len(arrays) != 1:
        known = ", ".join(map(repr, arrays))
        raise SpecError(f"expected one array, or one called '{name}', got {known or 'none'}", path=at)
    array = arrays[name] if name in arrays else next(iter(arrays.values()))
    return npy.typed(array, spec)


def _encoded(data: bytes, spec: TensorSpec) -> Any:
    """What a file holds as it is, for a graph that reads it itself; None where the input is no such thing."""
    rank = None if spec.shape is None else len(spec.shape)
    if spec.dtype == "string":
        return [data] if rank == 1 else data
    return np.frombuffer(data, np.uint8) if spec.dtype == "uint8" and rank == 1 else None


_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def _picture(data: bytes, shape: Sequence[int], at: str) -> Array:
    """A picture as uint8 `(height, width, 3)`: 1 or 4 channels where the shape says so, and one row for 4 dims.

    Turned as its camera was held.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("reading pictures needs Pillow: pip install pillow") from error
    grey = len(shape) == 2
    mode = "L" if grey else _MODES.get(shape[-1] if shape else 3, "RGB")
    try:
        with Image.open(io.BytesIO(data)) as image:
            array: Array = np.asarray(ImageOps.exif_transpose(image).convert(mode), np.uint8)
    except Exception as error:  # every format of Pillow has errors of its own
        raise SpecError(f"cannot read the picture: {error}", path=at) from error
    if mode == "L" and not grey:
        array = array[..., None]
    return array[None] if len(shape) == 4 else array
