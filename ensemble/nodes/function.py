"""A Python function by its name, as a servable: what it takes and gives is read from its parameters and annotations.

It imports the function's module, which runs the code there, and never the function itself.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeGuard, get_args, get_origin

from remote_ops.errors import SpecError
from remote_ops.servable import FunctionServable, Servable
from remote_ops.signature import TensorSpec, did_you_mean

__all__ = ["imported", "modules_in", "open_function"]

_EXTRAS = ("config", "deadline")  # what a FunctionServable hands on besides inputs


def open_function(
    call: str,
    folder: str,
    options: Mapping[str, Any],
    connected: Sequence[str] | int,
    outputs: Sequence[TensorSpec],
) -> Servable:
    """Open `package.module:thing` as a servable.

    Args:
        call: a servable; a function whose parameters are the inputs; or a class or a function without inputs that
            makes either of them.
        folder: where modules are looked for too.
        options: keyword arguments of the function, or of what makes it; text for a parameter that is annotated as a
            `Path` becomes one, relative to the folder.
        connected: the inputs that are fed, or how many; a parameter with a default is an input only if it is.
        outputs: what it gives, where its annotations do not say. These do with `Annotated[np.ndarray, TensorSpec(...)]`
            for a parameter or the return value, and a tuple, a NamedTuple or a TypedDict of them.

    Raises:
        SpecError: no such thing, an option that it does not take, or outputs that nobody tells.
    """
    found = imported(call, folder)
    if _is_servable(found):
        _refuse(call, options)
        return found
    if not callable(found):
        raise SpecError(f"expected a function or a servable, got a {type(found).__name__}", path=call)
    _check_options(call, found, options)
    options = _placed(found, options, folder)
    names = [] if isinstance(found, type) else _inputs(call, found, options, connected)
    if not names:
        found, options = _made(call, found, options), {}
        if _is_servable(found):
            return found
        names = _inputs(call, found, options, connected)
    return _servable(call, found, options, names, outputs)


def _servable(
    call: str, fn: Callable[..., Any], options: Mapping[str, Any], names: Sequence[str], outputs: Sequence[TensorSpec]
) -> Servable:
    hints = _hints(fn)
    inputs = [_spec(name, hints.get(name)) or TensorSpec(name, "any", None) for name in names]
    given = _returned(hints.get("return")) or outputs
    if not given:
        raise SpecError(
            "its outputs are not known: declare them in the node, outputs: {NAME: {dtype: ..., shape: [...]}}, "
            "or annotate the function, -> Annotated[np.ndarray, TensorSpec(...)]",
            path=call,
        )
    return FunctionServable(partial(fn, **options) if options else fn, inputs, given, name=call.rpartition(":")[2])


# --------------------------------------------------------------------------- finding it


@contextmanager
def modules_in(folder: str) -> Iterator[None]:
    """Look for modules in a folder too, after everywhere else, while the block runs."""
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def imported(call: str, folder: str) -> Any:
    """Import what `package.module:thing` names, also from a folder; raises `SpecError`."""
    module, _, thing = call.partition(":")
    try:
        with modules_in(folder):
            found: Any = importlib.import_module(module)
    except Exception as error:  # the module may raise anything
        raise SpecError(f"cannot import '{module}': {type(error).__name__}: {error}", path=call) from error
    for attribute in thing.split("."):
        if not hasattr(found, attribute):
            raise SpecError(f"'{module}' has no '{attribute}'{did_you_mean(attribute, dir(found))}", path=call)
        found = getattr(found, attribute)
    return found


def _is_servable(thing: Any) -> TypeGuard[Servable]:
    """Whether a thing has both parts of a servable; `signature` is not read, for that may ask the network."""
    has_both = all(inspect.getattr_static(thing, part, None) is not None for part in ("signature", "infer"))
    return has_both and not isinstance(thing, type)


def _refuse(call: str, options: Mapping[str, Any]) -> None:
    if options:
        raise SpecError(f"options {', '.join(options)}: not for a servable, which is made already", path=call)


def _made(call: str, maker: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    try:
        made = maker(**options)
    except Exception as error:  # a maker may raise anything
        raise SpecError(f"making it failed: {type(error).__name__}: {error}", path=call) from error
    if not _is_servable(made) and not callable(made):
        raise SpecError(
            f"it has no inputs, so it was taken for what makes a servable or a function: got a {type(made).__name__}",
            path=call,
        )
    return made


# --------------------------------------------------------------------------- what it takes


def _parameters(call: str, fn: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    if inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(getattr(fn, "__call__", None)):  # noqa: B004
        raise SpecError("an async function cannot be a node: write a plain one, or a servable with ainfer", path=call)
    try:
        return inspect.signature(fn).parameters
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"it does not say what it takes ({error}): wrap it in a function that does", path=call
        ) from error


def _check_options(call: str, fn: Callable[..., Any], options: Mapping[str, Any]) -> None:
    parameters = _parameters(call, fn)
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return
    if unknown := [name for name in options if name not in parameters]:
        known = ", ".join(parameters) or "none"
        hint = did_you_mean(unknown[0], parameters)
        raise SpecError(f"no option '{unknown[0]}': expected some of {known}{hint}", path=call)


def _placed(fn: Callable[..., Any], options: Mapping[str, Any], folder: str) -> Mapping[str, Any]:
    """The options, with those that are paths relative to a folder."""
    maker: Any = fn
    hints = _hints(maker.__init__ if isinstance(fn, type) else maker) if options else {}
    return {name: _in(folder, value) if _is_path(hints.get(name), value) else value for name, value in options.items()}


def _is_path(hint: Any, value: Any) -> bool:
    return isinstance(value, str) and Path in (hint, *get_args(hint))


def _in(folder: str, path: str) -> Path:
    return Path(folder) / Path(path).expanduser()


def _inputs(call: str, fn: Callable[..., Any], options: Mapping[str, Any], connected: Sequence[str] | int) -> list[str]:
    """The parameters that are inputs: those without a default, and those with one that are fed."""
    parameters = _parameters(call, fn)
    named, takes_any = [], False
    for one in parameters.values():
        if one.kind is one.VAR_KEYWORD:
            takes_any = True
        elif one.kind is one.POSITIONAL_ONLY:
            raise SpecError(f"parameter '{one.name}' is positional only: inputs are passed by name", path=call)
        elif one.kind is not one.VAR_POSITIONAL and one.name not in options and one.name not in _EXTRAS:
            named.append(one)
    by_place = [one.name for one in named if one.kind is not one.KEYWORD_ONLY]
    fed = by_place[:connected] if isinstance(connected, int) else list(connected)
    names = [one.name for one in named if one.default is one.empty or one.name in fed]
    return [*names, *(name for name in fed if takes_any and name not in parameters)]


# --------------------------------------------------------------------------- what annotations say


def _hints(fn: Any) -> Mapping[str, Any]:
    while isinstance(fn, partial):
        fn = fn.func
    plain = fn if inspect.isroutine(fn) else type(fn).__call__
    try:
        return typing.get_type_hints(plain, include_extras=True)
    except (NameError, TypeError, AttributeError):  # annotations for people, or for type checkers only
        return {}


def _spec(name: str | None, hint: Any) -> TensorSpec | None:
    """The spec in `Annotated[np.ndarray, TensorSpec(...)]`, under the name of what is annotated, if it has one."""
    if get_origin(hint) is not Annotated:
        return None
    for part in get_args(hint)[1:]:
        if isinstance(part, TensorSpec):
            return part if name is None else replace(part, name=name)
    return None


def _returned(hint: Any) -> list[TensorSpec]:
    """The outputs that an annotation tells; none if it does not."""
    if spec := _spec(None, hint):
        return [spec]
    if isinstance(hint, type) and (hasattr(hint, "_fields") or typing.is_typeddict(hint)):
        fields = typing.get_type_hints(hint, include_extras=True)
        return [_spec(name, field) or TensorSpec(name, "any", None) for name, field in fields.items()]
    if get_origin(hint) is tuple:
        specs = [_spec(None, item) for item in get_args(hint)]
        return [spec for spec in specs if spec is not None] if None not in specs else []
    return []
