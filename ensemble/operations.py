"""What `apply:` and `cast:` say, by name and arguments, as an operation.

The operations themselves are in `scalars`, `axes` and `moves`, what they have in common in `application`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ensemble.application import Applied
from ensemble.axes import Argmax, L2Normalise, LogSoftmax, Max, Mean, Min, OneHot, Softmax, Sum
from ensemble.forms import Form
from ensemble.moves import Expand, Flatten, Reshape, Slice, Squeeze, Take, Transpose
from ensemble.plan import Operation
from ensemble.scalars import Abs, Cast, Clip, Exp, Log, Normalise, Scale, Sigmoid, Threshold
from remote_ops.signature import did_you_mean

__all__ = ["NAMES", "OPERATIONS", "cast", "operation"]

OPERATIONS: Mapping[str, type[Applied]] = {
    kind.word: kind
    for kind in (
        *(Softmax, LogSoftmax, L2Normalise, Argmax, Max, Min, Sum, Mean, OneHot),
        *(Abs, Exp, Log, Sigmoid, Scale, Clip, Threshold, Normalise, Cast),
        *(Transpose, Squeeze, Expand, Flatten, Reshape, Slice, Take),
    )
}
NAMES: tuple[str, ...] = tuple(sorted(OPERATIONS))


def operation(text: str | Mapping[str, Any], form: Form) -> tuple[Operation, Form]:
    """The operation that `apply:` says, and the form of its result, given the form of what comes in.

    Args:
        text: `softmax`, or with arguments `{softmax: {axis: 1}}`; those of an operation may be given in order too:
            `{softmax: 1}`, `{clip: [0, 1]}`, `{transpose: [0, 3, 1, 2]}`.
        form: of what comes in; what it does not know is checked when an array comes.

    Raises:
        ValueError: no such operation, wrong arguments, or a form that it does not fit; says what would do.
    """
    name, arguments = _parts(text)
    if name not in OPERATIONS:
        call = name.partition("(")[0].strip()
        if call != name and call in OPERATIONS:
            raise ValueError(f"no operation {name!r}: arguments are written {{{call}: {{NAME: VALUE}}}}")
        raise ValueError(f"no operation {name!r}: expected one of {', '.join(NAMES)}{did_you_mean(call, NAMES)}")
    made = _made(OPERATIONS[name], arguments)
    return made, made.form(form)


def cast(dtype: str, form: Form) -> tuple[Operation, Form]:
    """The operation that `cast:` says, and the form of its result; raises `ValueError` as `operation` does."""
    return operation({"cast": dtype}, form)


def _parts(text: str | Mapping[str, Any]) -> tuple[str, Any]:
    if isinstance(text, str):
        return text, None
    if not isinstance(text, Mapping) or len(text) != 1:
        raise ValueError(f"expected an operation's name, or {{NAME: ARGUMENTS}}, got {text!r}")
    ((name, arguments),) = text.items()
    return str(name), arguments


def _made(kind: type[Applied], arguments: Any) -> Applied:
    named = arguments if isinstance(arguments, Mapping) else _named(kind, arguments)
    try:
        return kind.model_validate(dict(named))
    except ValidationError as error:
        raise ValueError("; ".join(_wrong(kind, dict(one)) for one in error.errors())) from None


def _parameters(kind: type[Applied]) -> list[str]:
    return [field.alias or name for name, field in kind.model_fields.items()]


def _named(kind: type[Applied], values: Any) -> Mapping[str, Any]:
    """Arguments given in order, or the one that is a list itself."""
    names = _parameters(kind)
    if values is None:
        return {}
    if not isinstance(values, list) or kind.takes_a_list:
        values = [values]
    if len(values) > len(names):
        raise ValueError(
            f"{kind.word}: expected at most {len(names)} arguments ({', '.join(names)}), got {len(values)}"
        )
    return dict(zip(names, values, strict=False))


def _wrong(kind: type[Applied], error: Mapping[str, Any]) -> str:
    """One thing that is wrong with arguments, in our words."""
    names, name = _parameters(kind), str((error["loc"] or ("",))[0])
    takes = f"expected {', '.join(names) or 'none'}"
    if error["type"] == "extra_forbidden":
        return f"{kind.word} has no argument '{name}': {takes}{did_you_mean(name, names)}"
    if error["type"] == "missing":
        return f"{kind.word} needs '{name}': {takes}, got no '{name}'"
    if error["type"] == "value_error":
        return f"{kind.word}: {error['ctx']['error']}"
    return f"{kind.word}: '{name}': {str(error['msg']).removeprefix('Input ')}, got {error['input']!r}"
