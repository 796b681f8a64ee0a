"""Names what a model is asked: equal keys mean the same model, config, names, dtypes, shapes and bytes.

It hashes; it keeps nothing and calls nothing. Constant: the hash that every key begins with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import numpy as np

from remote_ops.errors import SpecError
from remote_ops.signature import Array, Signature
from server_ref.rowvalues import dtype_of, payloads

__all__ = ["KEY_BYTES", "RowKeys", "fingerprint"]

KEY_BYTES = 32  # as many as it takes that nobody can make two requests of one key: no answer needs a second look
_FORMAT = b"remote-ops rows 1"
_OUTPUT_BYTES = 16
_READ_BYTES = 1 << 20
_SMALL_BYTES = 1024
_Described: TypeAlias = tuple[str, str, tuple[int, ...]]


class RowKeys:
    """The keys of what one model is asked.

    Args:
        model_hash: what tells the model from every other; 0 bytes or more.
        signature: of the model; another one makes other keys.

    A key costs about 1 us and 1.3 ns for each byte (0.75 GB/s on one core).
    """

    def __init__(self, model_hash: bytes, signature: Signature) -> None:
        self._seed = hashlib.blake2b(_framed(_FORMAT, model_hash, str(signature).encode()), digest_size=KEY_BYTES)
        self._outputs: dict[str, bytes] = {}
        self._begun = lru_cache(256)(self._begin)

    def of_rows(self, arrays: Mapping[str, Array], config: bytes) -> list[bytes]:
        """One key for each row of `arrays`, each `(rows, *item)`, in order.

        Raises:
            EncodeError: an array of no dtype of ours, or strings that are none.
        """
        return self._keys(b"row", arrays, config)

    def of_whole(self, arrays: Mapping[str, Array], config: bytes) -> bytes:
        """One key for all of `arrays`, of any shapes, none included; never that of a row.

        Raises:
            EncodeError: as in `of_rows`.
        """
        return self._keys(b"whole", {name: array[np.newaxis] for name, array in arrays.items()}, config)[0]

    def of_output(self, name: str) -> bytes:
        """What to add to a key for the output `name` of it."""
        if name not in self._outputs:  # as many as the model has outputs
            self._outputs[name] = hashlib.blake2b(name.encode(), digest_size=_OUTPUT_BYTES).digest()
        return self._outputs[name]

    def _keys(self, kind: bytes, arrays: Mapping[str, Array], config: bytes) -> list[bytes]:
        names = sorted(arrays)
        described = tuple([(name, dtype_of(arrays[name]), arrays[name].shape[1:]) for name in names])
        begun = (self._begun if len(config) <= _SMALL_BYTES else self._begin)(kind, config, described)
        columns = [payloads(arrays[name]) for name in names]
        if not columns:
            return [begun.copy().digest()]
        keys = []
        for row in zip(*columns, strict=True):
            digest = begun.copy()
            for payload in row:
                digest.update(payload)
            keys.append(digest.digest())
        return keys

    def _begin(self, kind: bytes, config: bytes, described: tuple[_Described, ...]) -> hashlib.blake2b:
        parts = [
            part for name, *rest in described for part in (name.encode("utf-8", "surrogatepass"), repr(rest).encode())
        ]
        digest = self._seed.copy()
        digest.update(_framed(kind, config, *parts))
        return digest


def _framed(*parts: bytes) -> bytes:
    """The parts, each after its length: no two lists of parts give the same bytes."""
    return b"".join(piece for part in parts for piece in (len(part).to_bytes(8, "little"), part))


def fingerprint(path: str | PathLike[str]) -> str:
    """Hash a model file, or every file below a folder with its place in it: 64 hex digits.

    Raises:
        SpecError: nothing is there.

    Reads all of it, at about 0.75 GB/s. A file that keeps its weights in others beside it goes by its folder.
    """
    root = Path(path)
    if not root.exists():
        raise SpecError("no such file or folder", path=str(root))
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
        if file.is_file():
            inside = file.relative_to(root).as_posix() if file != root else ""
            digest.update(_framed(inside.encode("utf-8", "surrogatepass"), _digest(file)))
    return digest.hexdigest()


def _digest(file: Path) -> bytes:
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for piece in _pieces(file):
        digest.update(piece)
    return digest.digest()


def _pieces(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while piece := opened.read(_READ_BYTES):
            yield piece
