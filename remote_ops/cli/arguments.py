"""What the words of a command line mean: inputs, outputs, headers, numbers. It reads files and stdin, no network."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt

from remote_ops.cli import npy
from remote_ops.errors import SpecError

__all__ = ["Input", "Output", "config_of", "headers_of", "inputs_of", "outputs_of", "seconds", "whole"]

Array = npt.NDArray[Any]


def inputs_of(texts: Sequence[str]) -> list[Input]:
    """Read all inputs of a call.

    Raises:
        SpecError: one is none, some have names and some have not, a name comes twice, or two come from stdin.
    """
    if sum(text == "-" or text.endswith("=-") for text in texts) > 1:
        raise SpecError("stdin holds one array: got '-' twice", path="--input")
    inputs = [Input.parse(text) for text in texts]
    names = [given.name for given in inputs if given.name]
    if names and len(names) < len(inputs):
        raise SpecError("expected all inputs with a name, as in x=arr.npy, or none: got both", path="--input")
    if len(set(names)) < len(names):
        raise SpecError(f"an input is given twice: {', '.join(names)}", path="--input")
    return inputs


def outputs_of(texts: Sequence[str]) -> list[Output]:
    """Read all outputs asked for.

    Raises:
        SpecError: one is none, two go to one file, or `-` is beside outputs that are printed.
    """
    outputs = [Output.parse(text) for text in texts]
    files = [output.file for output in outputs if output.file]
    if len(set(files)) < len(files):
        raise SpecError(f"two outputs for one file: {', '.join(files)}", path="--output")
    if "-" in files and len(files) < len(outputs):
        raise SpecError("'-' takes all of stdout: save the other outputs to files too", path="--output")
    return outputs


class Input(NamedTuple):
    """A value for the model: an array, or what JSON can say. No name: its place tells which input it is."""

    name: str
    value: Any

    @classmethod
    def parse(cls, text: str) -> Input:
        """Read `[NAME=]VALUE`, where the value is a `.npy` file, `-` for one on stdin, or JSON.

        Raises:
            SpecError: there is no such file, or it holds no array; or this is no JSON of numbers, texts and lists.
        """
        name, mark, value = text.partition("=")
        if not mark or text[0] in '["':
            name, value = "", text
        if not value or (mark and not name and value != text):
            raise SpecError(f"expected NAME=VALUE, or VALUE, got {text!r}", path="--input")
        return cls(name, _value(value, f"--input {name}".rstrip()))


def _value(text: str, at: str) -> Any:
    if text == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise SpecError(
                "'-' reads a .npy file from stdin: expected a pipe or a file there, not a terminal", path=at
            )
        return npy.parse(sys.stdin.buffer.read(), at=at)
    try:
        value = json.loads(text)
        plain = _is_plain(value)
    except (ValueError, RecursionError) as error:
        if text[:1] in ("[", "{", '"'):
            raise SpecError(f"this is no JSON: {error}", path=at) from error
        return _load(text, at)
    if not plain:
        raise SpecError("expected JSON of numbers, true and false, texts, and lists of them", path=at)
    return value


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, int | float | str)


def _load(file: str, at: str) -> Array:
    try:
        data = Path(file).read_bytes()
    except (OSError, ValueError) as error:
        hint = "" if file.endswith(".npy") else "; expected a .npy file, or JSON, where a text has quotes: '\"abc\"'"
        reason = error.strerror if isinstance(error, OSError) else error
        raise SpecError(f"cannot read '{file}' ({reason}){hint}", path=at) from error
    return npy.parse(data, at=f"{at}, {file}")


class Output(NamedTuple):
    """An output to ask for, and the file to save it to: empty to print it, `-` for stdout."""

    name: str
    file: str

    @classmethod
    def parse(cls, text: str) -> Output:
        """Read `NAME`, `NAME=FILE` or `NAME=-`.

        Raises:
            SpecError: no name or no file, a folder that does not exist, or stdout is a terminal.
        """
        name, mark, file = text.partition("=")
        at = f"--output {name}".rstrip()
        if not name or (mark and not file):
            raise SpecError(f"expected NAME, NAME=FILE or NAME=-, got {text!r}", path=at)
        if file == "-" and (sys.stdout is None or sys.stdout.isatty()):
            raise SpecError(
                "'-' writes a .npy file to stdout: expected a pipe or a file there, not a terminal", path=at
            )
        if file and (Path(file).is_dir() or not Path(file).parent.is_dir()):
            raise SpecError(f"cannot write '{file}': expected a file in a folder that exists", path=at)
        return cls(name, file)


def headers_of(texts: Sequence[str]) -> dict[str, str]:
    """Read headers, each `NAME: VALUE`.

    Raises:
        SpecError: one has no colon, or a name comes twice. What is wrong is not shown: it may be a secret.
    """
    headers: dict[str, str] = {}
    for text in texts:
        name, mark, value = text.partition(":")
        if not mark:
            raise SpecError("expected 'NAME: VALUE', got no colon", path="--header")
        if name.strip() in headers:
            raise SpecError(f"header '{name.strip()}' is given twice", path="--header")
        headers[name.strip()] = value.strip()
    return headers


def config_of(text: str) -> bytes:
    """Read `TEXT`, or `@FILE` for what is in a file.

    Raises:
        SpecError: there is no such file.
    """
    if not text.startswith("@"):
        return os.fsencode(text)
    try:
        return Path(text[1:]).read_bytes()
    except OSError as error:
        raise SpecError(f"cannot read '{text[1:]}' ({error.strerror})", path="--config") from error


_MOST_S = 1e6


def seconds(text: str) -> float:
    """Read a length of time, for argparse."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= _MOST_S:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number of seconds, 0 to {_MOST_S:,.0f}, got '{text}'")


def whole(least: int) -> Callable[[str], int]:
    """What reads a whole number from `least`, for argparse."""

    def read(text: str) -> int:
        if text.isdecimal() and len(text) < 10 and int(text) >= least:
            return int(text)
        raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more, got '{text}'")

    return read
