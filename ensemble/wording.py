"""Pydantic's errors in our words: where in a document each of them stands, and what it says.

It knows no format; `spec` has that of graphs.
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic import BaseModel

from ensemble.faults import CODES, Path, meant

__all__ = ["field_names", "is_meant", "models_in", "near", "path_of", "shown", "worded"]


def path_of(loc: Iterable[int | str], value: Any, *, lacking: bool) -> Path:
    """Where an error is in the document: pydantic's own path also names the ways of unions."""
    *above, last = loc = tuple(loc)
    path: Path = ()
    for step in above if lacking else loc:
        below = _below(value, step)
        if below is not _NOTHING:
            path, value = (*path, step), below
    return (*path, last) if lacking else path


_NOTHING = object()


def _below(value: Any, step: int | str) -> Any:
    if isinstance(value, dict):
        return value.get(step, _NOTHING)
    return value[step] if isinstance(value, list) and isinstance(step, int) else _NOTHING


def is_meant(name: str, unknown: Iterable[str]) -> bool:
    """Whether a key that is missing is there under a name that is misspelt."""
    return any(difflib.get_close_matches(one, [name]) for one in unknown)


_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
    "literal_error": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "too_short": "{min_length} or more",
    "string_too_short": "{min_length} characters or more",
    "finite_number": "a number that is finite",
}


def worded(subject: str, errors: list[Any]) -> tuple[str, str]:
    """The code of a fault and its text, from the errors that pydantic has for one place, which is called `subject`."""
    for one in errors:
        if one["type"] == "value_error":
            text = str(one["ctx"]["error"])
            return "E101", f"{subject}: {text}"
        if one["type"] in CODES:
            return one["type"], f"{subject}: {one['msg']}"
    expected = " or ".join(dict.fromkeys(map(_expected, errors)))
    got = errors[0]["input"]
    return "E101", f"{subject}: expected {expected}, got {shown(got)}{_hint(errors, got)}"


def _expected(error: Any) -> str:
    template = _EXPECTED.get(error["type"])
    if template is None:
        return str(error["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    return template.format(**{key: _plain(bound) for key, bound in error.get("ctx", {}).items()})


def _plain(bound: Any) -> Any:
    return int(bound) if isinstance(bound, float) and bound.is_integer() else bound


def _hint(errors: list[Any], got: Any) -> str:
    kinds = {one["type"] for one in errors}
    if isinstance(got, str):
        if "bool_type" in kinds:
            return "; only true and false are booleans here"
        choices = [
            choice for one in errors for choice in re.findall(r"'([^']*)'", one.get("ctx", {}).get("expected", ""))
        ]
        return near(got, choices)
    return "; put it in quotes" if "string_type" in kinds and isinstance(got, bool | int | float) else ""


def near(name: str, known: Iterable[str]) -> str:
    """What was perhaps meant, as `meant` says it; nothing where nothing is like it."""
    hint = meant(name, known)
    return hint if hint.startswith(";") else ""


def shown(value: Any) -> str:
    """A value as messages show it, in 60 characters at most."""
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = json.dumps(value) if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def field_names(model: type[BaseModel]) -> Iterator[str]:
    """The keys of a model, as they are written."""
    return (field.alias or name for name, field in model.model_fields.items())


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation names, those of its parts included."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for part in get_args(annotation) for model in models_in(part)]
