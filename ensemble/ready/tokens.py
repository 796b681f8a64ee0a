"""Texts as tokens. Needs tokenizers, which is imported when the tokeniser is made.

Use: `{kind: python, call: ensemble.ready.tokens:tokenise, options: {file: tokenizer.json}, inputs: {text: $inputs.x}}`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from remote_ops.errors import InvalidRequest, SpecError
from remote_ops.servable import FunctionServable
from remote_ops.signature import Array, TensorSpec

__all__ = ["tokenise"]


def tokenise(*, file: Path | str = "", max_length: int | None = None, padding: str = "longest") -> FunctionServable:
    """A servable that tokenises: text string `[N]` to ids int64 `[N, S]`, and mask int64 `[N, S]`, 1 where a token is.

    Args:
        file: a JSON file of the library tokenizers (`tokenizer.json`); in a graph relative to its YAML file.
        max_length: most tokens of a text, special ones among them; what is longer is cut. None: as the file says.
        padding: shorter texts are filled up to the `longest` of the batch, or to `max_length`.

    Raises:
        SpecError: no such file or padding.
        ImportError: tokenizers is not there.
    """
    if padding not in ("longest", "max_length") or (padding == "max_length" and max_length is None):
        raise SpecError(f"expected 'longest', or 'max_length' and a max_length, got {padding!r}", path="padding")
    length = max_length if padding == "max_length" else None
    tokeniser = _opened(file, max_length, length)

    def encode(text: Array) -> tuple[Array, Array]:
        found = tokeniser.encode_batch(_texts(text))
        shape = (len(found), len(found[0].ids) if found else length or 0)
        ids = np.array([one.ids for one in found], np.int64).reshape(shape)
        return ids, np.array([one.attention_mask for one in found], np.int64).reshape(shape)

    size = -1 if length is None else length
    return FunctionServable(
        encode,
        inputs=[TensorSpec("text", "string", (-1,))],
        outputs=[TensorSpec("ids", "int64", (-1, size)), TensorSpec("mask", "int64", (-1, size))],
        name="tokenise",
    )


def _opened(file: Path | str, max_length: int | None, length: int | None) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("ensemble.ready.tokens needs tokenizers: pip install 'remote-ops[ready]'") from error
    if not file:
        raise SpecError("tokenise needs a file: write options: {file: tokenizer.json}", path="file")
    try:
        tokeniser = Tokenizer.from_file(str(file))
        if max_length is not None:
            tokeniser.enable_truncation(max_length)
    except Exception as error:  # the library raises a bare Exception
        raise SpecError(f"cannot open the tokeniser: {error}", path=str(file)) from error
    tokeniser.enable_padding(**{**_padding(tokeniser), "length": length})
    return tokeniser


def _padding(tokeniser: Any) -> dict[str, Any]:
    """How the file pads, or else with the token that is called so."""
    if tokeniser.padding is not None:
        return dict(tokeniser.padding)
    known = [name for name in ("[PAD]", "<pad>") if tokeniser.token_to_id(name) is not None]
    return {"pad_id": tokeniser.token_to_id(known[0]), "pad_token": known[0]} if known else {}


def _texts(array: Array) -> list[str]:
    try:
        return [text.decode() if isinstance(text, bytes) else str(text) for text in array.tolist()]
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"input 'text': expected UTF-8, got other bytes: {error}") from error
