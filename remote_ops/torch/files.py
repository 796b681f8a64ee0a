"""Model files of torch, opened without running what they carry beside the model: programs, TorchScript, weights.

It refuses pickles that call anything, compiled code, and text in a program that torch would evaluate as Python. It
knows nothing of signatures or devices.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from remote_ops.errors import SpecError

__all__ = ["open_program", "open_script", "read_weights", "reason_of"]

WEIGHTS, CONSTANTS, MODELS = "data/weights/", "data/constants/", "models/"
_one_at_a_time = threading.Lock()  # torch reads one program at a time, and fails if it is asked for two
OLD_PROGRAM = "serialized_exported_program.json"  # the one of torch 2.7 and before


def open_program(path: Path) -> torch.export.ExportedProgram:
    """Open a `.pt2` file that `torch.export.save` wrote.

    Raises:
        SpecError: no such file, no such archive, one that is cut off, compiled code, a pickle that calls anything, an
            expression that is more than arithmetic, or an operator that nothing here defines.
    """
    _require_file(path)
    operators = _check_archive(path)
    with _one_at_a_time, _muted("torch.export"), _muted("torch.export.pt2_archive._package"):
        try:
            program = torch.export.load(path)
        except Exception as error:
            if missing := sorted(name for name in operators if not _is_defined(name)):
                raise SpecError(
                    f"the program calls {', '.join(missing)}, which nothing here defines: import the package that "
                    "registers it before the model is loaded",
                    path=str(path),
                ) from error
            raise SpecError(f"torch cannot read this program: {reason_of(error)}", path=str(path)) from error
    if not hasattr(program, "_guards_code"):
        raise SpecError(f"torch {torch.__version__} keeps the guards of a program elsewhere", path=str(path))
    program._guards_code = []  # Python text, which `module` would compile
    return program


def open_script(path: Path) -> torch.jit.ScriptModule:
    """Open a TorchScript file, on the CPU.

    Raises:
        SpecError: no such file, one that is cut off, or one that holds something else; says what, and what to do.
    """
    _require_file(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.load` is deprecated", DeprecationWarning)
            return torch.jit.load(path, map_location="cpu")  # type: ignore[no-any-return, no-untyped-call]
    except Exception as error:
        raise _no_script(path, error) from error


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read tensors by name, onto the CPU: `.safetensors`, or what `torch.save(model.state_dict(), path)` wrote.

    Raises:
        SpecError: no such file, one that is cut off or holds something else, or a pickle that calls anything.
        ImportError: a `.safetensors` file, and safetensors is not installed; names the line to type.
    """
    _require_file(path)
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    try:
        found = _load_tensors(path)
    except Exception as error:
        if wanted := _wants(error, path):
            raise _refused_pickle(path, wanted) from error
        if "with TorchScript archives" in str(error):
            raise SpecError("expected weights, got a TorchScript model: load it by itself", path=str(path)) from error
        raise SpecError(f"torch cannot read these weights: {reason_of(error)}", path=str(path)) from error
    weights = _tensors_in(found)
    if weights is None:
        raise SpecError(
            f"expected tensors by name, as in model.state_dict(), got a {type(found).__name__}", path=str(path)
        )
    return weights


def reason_of(error: BaseException) -> str:
    """What torch says, on one line: TorchScript's last one, and otherwise the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    line = lines[-1] if "TorchScript" in lines[0] else lines[0]
    line = line.removeprefix("RuntimeError: ").partition(" This is an internal miniz error")[0][:300]
    return line if type(error) is RuntimeError else f"{type(error).__name__}: {line}".removesuffix(": ")


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise SpecError("expected a file, got a folder" if path.is_dir() else "no such file", path=str(path))


@contextmanager
def _muted(name: str) -> Iterator[None]:
    """Keep a logger of torch quiet on this thread: what it would print is raised too."""
    logger, here = logging.getLogger(name), threading.get_ident()

    def elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != here

    logger.addFilter(elsewhere)
    try:
        yield
    finally:
        logger.removeFilter(elsewhere)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"'{path}' needs safetensors: pip install 'remote-ops[torch]'") from error
    try:
        return load_file(path)
    except Exception as error:
        raise SpecError(f"safetensors cannot read these weights: {reason_of(error)}", path=str(path)) from error


def _load_tensors(source: Path | io.BytesIO) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what fails, fails with an exception too
        return torch.load(source, map_location="cpu", weights_only=True)


def _tensors_in(found: Any) -> dict[str, torch.Tensor] | None:
    """A state dict, or the one inside a checkpoint; None if there is none."""
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        return None
    return dict(found)


def _wants(error: Exception, path: Path | None = None) -> str:
    """What a pickle calls that is not a tensor, by what torch says of it; '' where the file is no pickle at all."""
    text = str(error)
    if "eights only load failed" not in text or (path is not None and not _is_pickle(path)):
        return ""
    if found := re.search(r"GLOBAL ([\w.]+)|Unsupported class ([\w.]+)|function <[\w-]+ (?:\w+ )?([\w.]+)", text):
        return f"'{next(filter(None, found.groups()))}'"
    return "more than tensors"


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\x80" or zipfile.is_zipfile(path)


def _refused_pickle(path: Path, wanted: str) -> SpecError:
    return SpecError(
        f"the file holds a pickle that wants {wanted}, and unpickling that runs code from the file, so it is refused: "
        "save weights alone, with torch.save(model.state_dict(), ...) or safetensors",
        path=str(path),
    )


def _no_script(path: Path, error: Exception) -> SpecError:
    """Say what a file is that is no TorchScript."""
    try:
        found = _load_tensors(path)
    except Exception as second:
        if wanted := _wants(second, path):
            refused = _refused_pickle(path, wanted)
            return SpecError(
                f"{refused.message.removesuffix(f' - at {path}')}, or torch.jit.save a scripted model", path=str(path)
            )
        return SpecError(f"no TorchScript file: {reason_of(error)}", path=str(path))
    if _tensors_in(found) is None:
        return SpecError(f"expected TorchScript, got a file that holds a {type(found).__name__}", path=str(path))
    return SpecError(
        f"this file holds weights only: load them with load('package.module:factory', weights='{path}', "
        "inputs=['x: float32 [-1, 3]']), where factory returns the torch module",
        path=str(path),
    )


def _check_archive(path: Path) -> set[str]:
    """Refuse a `.pt2` file whose loading runs code of its own; give the names of the operators that it calls.

    torch reads one through its own reader of zip files or, from torch 2.7 and before, through Python's: what either
    would see is checked.
    """
    operators: set[str] = set()
    views = 0
    try:
        for names, read in _views(path):
            views += 1
            if any("aotinductor/" in name for name in names):
                raise SpecError(
                    "it holds native code, compiled by AOTInductor: expected a program saved by torch.export.save"
                )
            _check_pickles(names, read)
            for name in names:
                if name.startswith(MODELS) or name == OLD_PROGRAM:
                    _check_text(json.loads(read(name)), operators)
    except SpecError as error:
        raise SpecError(f"this program is refused: {error.message}", path=str(path)) from error
    except Exception as error:
        raise SpecError(f"no .pt2 file: {reason_of(error)}", path=str(path)) from error
    if not views:
        raise SpecError("no .pt2 file, or one that is cut off: expected what torch.export.save wrote", path=str(path))
    return operators


def _views(path: Path) -> Iterator[tuple[list[str], Callable[[str], bytes]]]:
    try:
        reader = torch._C.PyTorchFileReader(os.fspath(path))
        yield reader.get_all_records(), reader.get_record
    except RuntimeError:
        pass
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if OLD_PROGRAM in names or any("aotinductor/" in name for name in names):
                yield names, archive.read
    except (zipfile.BadZipFile, OSError, ValueError):
        pass


def _check_pickles(names: list[str], read: Callable[[str], bytes]) -> None:
    """Refuse pickles of anything but tensors: torch would fall back to unpickling whatever stands there."""
    for name in names:
        if name.endswith(".pt"):
            _check_pickle(name, read(name))
        folder = next((folder for folder in (WEIGHTS, CONSTANTS) if name.startswith(folder)), None)
        if folder is None or not name.endswith("_config.json"):
            continue
        for payload in json.loads(read(name))["config"].values():
            target = payload["path_name"]
            if not target.startswith(("weight_", "tensor_")):
                raise SpecError(f"'{target}' is a pickled object: expected tensors only")
            if payload["use_pickle"]:
                _check_pickle(folder + target, read(folder + target))


def _check_pickle(name: str, data: bytes) -> None:
    if not data:
        return
    try:
        _load_tensors(io.BytesIO(data))
    except Exception as error:
        wanted = _wants(error) or "more than tensors"  # or it is no pickle: torch would try all the same
        raise SpecError(f"its '{name}' holds a pickle that wants {wanted}, and unpickling that runs code") from error


# Keys of a program under which text is data, which torch prints as a literal or only shows to people; guards are
# Python that is never compiled here.
_DATA = frozenset({"as_string", "as_strings", "guards_code"})
# What names look like: Python text that does anything needs a quote, a parenthesis, an equals sign or a new line.
_NAME = re.compile(r"[\w.\-/:#+<>\[\]$*| ]*")
# The functions that a node may call, or be handed: operators, and arithmetic on sizes.
_OPERATOR = re.compile(
    r"torch\.ops\.(?!(load_library|import_module|loaded_libraries)\b)(?P<name>\w+\.\w+)(\.\w+)?"
    r"|torch\.sym_\w+|torch\._sym_\w+|_operator\.[a-z]+_?|math\.[a-z]+"
)
_CONTAINERS = frozenset({"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None})
_ARITHMETIC = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.keyword),
    *(ast.operator, ast.unaryop, ast.cmpop, ast.boolop, ast.Call),
)
_FUNCTIONS = frozenset({
    "Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Abs", "Max", "Min", "Mod", "floor", "ceiling",
    "Piecewise", "ExprCondPair", "And", "Or", "Not", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality",
    "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "FloorDiv", "ModularIndexing", "Where",
    "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "LShift", "RShift", "PowByNatural", "FloatPow",
    "FloatTrueDiv", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt",
    "RoundDecimal", "ToFloat", "Identity",
})  # fmt: skip
_SYMBOL = re.compile(r"[a-z]{1,5}\d+|oo|int_oo|zoo|nan|true|false")


def _check_text(node: Any, operators: set[str], key: str = "") -> None:
    """Refuse text in the JSON of a program that torch would evaluate as more than names and arithmetic."""
    if isinstance(node, dict):
        if key == "metadata" and all(isinstance(value, str) for value in node.values()):
            return
        for name, value in node.items():
            _check_text(name, operators)
            _check_text(value, operators, name)
    elif isinstance(node, list):
        for value in node:
            _check_text(value, operators, key)
    elif not isinstance(node, str) or key in _DATA:
        return
    elif key in ("in_spec", "out_spec"):
        if node:
            _check_tree(json.loads(node)[1])
    elif key == "expr_str":
        _check_expression(node)
    elif key in ("target", "as_operator"):
        match = _OPERATOR.fullmatch(node)
        if match is None:
            _odd("a call of", node)
        if match["name"] and match["name"].startswith("remote_ops."):
            raise SpecError(
                "it calls another model over the network, at a URL and with headers of the file's choosing: expected a "
                "program that computes by itself"
            )
        if match["name"]:
            operators.add(match["name"])
    elif not _NAME.fullmatch(node):
        _odd("the name", node)


def _check_tree(spec: Any) -> None:
    """Refuse arguments and results that are nested in anything but tuples, lists and dicts of plain keys."""
    context = spec["context"]
    keys = json.loads(context) if isinstance(context, str) else context
    plain = keys is None or (isinstance(keys, list) and all(isinstance(key, str | int) for key in keys))
    if spec["type"] not in _CONTAINERS or not plain:
        _odd("a container", str(spec["type"]))
    for child in spec["children_spec"]:
        _check_tree(child)


def _check_expression(text: str) -> None:
    for node in ast.walk(ast.parse(text, mode="eval")):
        called = isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS)
        named = isinstance(node, ast.Name) and not (node.id in _FUNCTIONS or _SYMBOL.fullmatch(node.id))
        quoted = isinstance(node, ast.Constant) and isinstance(node.value, str) and not _SYMBOL.fullmatch(node.value)
        if not isinstance(node, _ARITHMETIC) or called or named or quoted:
            _odd("the size", text)


def _odd(what: str, text: str) -> NoReturn:
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    raise SpecError(f"{what} {shown!r} is none that torch.export writes, and reading it could run code")


def _is_defined(name: str) -> bool:
    namespace, operator = name.split(".")
    return namespace == "higher_order" or hasattr(getattr(torch.ops, namespace), operator)
