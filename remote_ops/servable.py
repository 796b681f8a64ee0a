"""Anything with a signature that can be inferred, Python functions among them, and `load`, which opens any by name.

It calls models in this process; it moves no bytes, and imports a framework only when `load` is asked for one.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable
from urllib.parse import unquote, urlsplit

import numpy as np

from remote_ops.deadline import Deadline, within
from remote_ops.errors import InternalError, SignatureError, SpecError
from remote_ops.signature import Array, Signature, TensorSpec, did_you_mean

__all__ = ["FunctionServable", "Servable", "construct", "load", "run_checked", "split_cotangents"]


@runtime_checkable
class Servable(Protocol):
    """Anything that says what it takes and gives, and does it."""

    @property
    def signature(self) -> Signature:
        """The ordered, named, typed inputs and outputs."""
        ...

    def infer(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> dict[str, Array]:
        """Compute the named `outputs` (None: all) of the named `inputs`."""
        ...


def run_checked(
    signature: Signature,
    run: Callable[[dict[str, Array], tuple[TensorSpec, ...]], Mapping[str, Any]],
    inputs: Mapping[str, Any],
    outputs: Sequence[str] | None,
    deadline: Deadline | None,
) -> dict[str, Array]:
    """Check inputs, run a model in this process, check its outputs: the body of `infer` of most servables.

    Args:
        signature: what the model promises to take and give.
        run: takes the checked arrays in the order of the inputs, and the specs asked for; gives results by name.
        inputs: a caller's values by name.
        outputs: the names asked for; None for all.
        deadline: past it, nothing is started; remote calls that the model makes end by then too.

    Raises:
        SignatureError: the inputs or the names asked for do not fit.
        DeadlineExceeded: the deadline passed before the start.
        InternalError: the model gave something other than its signature says.

    Costs about 1 us for each input and output; copies only for a cast.
    """
    arrays = signature.fit_inputs(inputs)
    wanted = signature.select_outputs(outputs)
    if deadline is None or deadline.at == math.inf:
        results = run(arrays, wanted)
    else:
        deadline.require(f"model '{signature.name}'")
        with within(deadline):  # a model may call others
            results = run(arrays, wanted)
    try:
        return signature.fit_outputs(results, wanted)
    except SignatureError as error:
        raise InternalError(f"model '{signature.name}' broke its own signature: {error}") from error


def split_cotangents(arrays: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Take the arrays of a call apart: the inputs by name, and the cotangents by the name of their output."""
    primals: dict[str, Array] = {}
    cotangents: dict[str, Array] = {}
    for name, array in arrays.items():
        output = name.removeprefix("cotangent:")
        (primals if output == name else cotangents)[output] = array
    return primals, cotangents


class FunctionServable:
    """A Python function as a servable.

    Args:
        fn: takes the inputs by name as keyword arguments, and `config` (bytes) or `deadline` where it has a parameter
            of that name that is no input; returns an array, a tuple or list in the order of `outputs`, or a dict by
            name. It must bear being called from several threads at once. What it raises reaches the caller.
        inputs, outputs: in order; an input name that is no identifier reaches `fn` through its `**kwargs`.
        name, version, description: free text; the name is the function's own unless given.
        vjp: gives the gradients, for inputs that are `differentiable`: takes a dict of the inputs and a dict of the
            cotangents, by input and by output name (one that is missing is zero); returns a dict of the gradients, by
            input name, each of the dtype and shape of its input.

    Raises:
        SpecError: two inputs or outputs share a name, no outputs, `fn` does not take these inputs, or one of `vjp` and
            a differentiable input is there without the other.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        name: str = "",
        version: str = "",
        description: str = "",
        vjp: Callable[[Mapping[str, Array], Mapping[str, Array]], Mapping[str, Any]] | None = None,
    ) -> None:
        if not outputs:
            raise SpecError("a servable needs one output or more", path="outputs")
        if (vjp is not None) != any(spec.differentiable for spec in inputs):
            raise SpecError(
                "a vjp goes with inputs that are differentiable=True: got one without the other", path="vjp"
            )
        own_name = str(getattr(fn, "__name__", type(fn).__name__))
        name = name or ("function" if own_name == "<lambda>" else own_name)
        self._fn = fn
        self._vjp = vjp
        self._signature = Signature(tuple(inputs), tuple(outputs), name=name, version=version, description=description)
        self._extras = _extras(fn, [spec.name for spec in inputs])

    def __repr__(self) -> str:
        return f"FunctionServable({self._signature.name}{self._signature})"

    @property
    def signature(self) -> Signature:
        """What the function takes and gives."""
        return self._signature

    def infer(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> dict[str, Array]:
        """Call the function, and give the outputs asked for (None: all); it computes all of them in any case.

        Where gradients are asked for, `vjp` is called, and the function only if outputs are asked for too.

        Raises:
            SignatureError: the inputs or the names asked for do not fit.
            DeadlineExceeded: the deadline passed before the start.
            InternalError: the function returned something other than its outputs.
        """
        extras = {"config": config, "deadline": deadline}
        passed = {name: extras[name] for name in self._extras}

        def run(arrays: dict[str, Array], wanted: tuple[TensorSpec, ...]) -> Mapping[str, Any]:
            primals, cotangents = split_cotangents(arrays)
            gradients = self._gradients(primals, cotangents, wanted)
            if len(gradients) == len(wanted):
                return gradients
            return {**self._by_name(self._fn(**primals, **passed)), **gradients}

        return run_checked(self._signature, run, inputs, outputs, deadline)

    def _gradients(
        self, primals: dict[str, Array], cotangents: dict[str, Array], wanted: Sequence[TensorSpec]
    ) -> dict[str, Any]:
        names = [spec.name for spec in wanted if spec.name.startswith("gradient:")]
        if not names or self._vjp is None:
            return {}
        found = self._vjp(primals, cotangents)
        return {f"gradient:{name}": gradient for name, gradient in found.items()}

    def _by_name(self, result: Any) -> Mapping[str, Any]:
        if isinstance(result, Mapping):
            return result
        if isinstance(result, np.ndarray | np.generic | int | float | str | bytes):
            result = (result,)
        names = [spec.name for spec in self._signature.outputs]
        expected = f"function '{self._signature.name}': expected {len(names)} outputs ({', '.join(names)})"
        if not isinstance(result, tuple | list):
            kind = type(result).__name__
            raise InternalError(f"{expected} as an array, a tuple or list of them or a dict, got a {kind}")
        if len(result) != len(names):
            raise InternalError(f"{expected}, got {len(result)}")
        return dict(zip(names, result, strict=True))


def _extras(fn: Callable[..., Any], names: list[str]) -> list[str]:
    """Which of `config` and `deadline` a function takes beyond its inputs."""
    try:
        parameters = inspect.signature(fn)
    except (TypeError, ValueError):  # a builtin that does not say
        return []
    extras = [name for name in ("config", "deadline") if name in parameters.parameters and name not in names]
    try:
        parameters.bind(**dict.fromkeys([*names, *extras]))
    except TypeError as error:
        raise SpecError(
            f"the function takes {parameters}, which does not fit inputs named {', '.join(names)}: {error}",
            path="inputs",
        ) from error
    return extras


def load(
    what: str | PathLike[str],
    *,
    sha256: str | None = None,
    name: str | None = None,
    device: str = "auto",
    **options: Any,
) -> Servable:
    """Open a model by its path, its URL or the name of a Python object.

    Args:
        what: `model.onnx`; `model.pt2`, `.pt`, `.pth` or `.jit` of torch; the folder of a SavedModel, `model.pb`,
            `.keras` or `.h5` of TensorFlow; `graph.yaml`, an ensemble; `https://host/model.onnx`, which is downloaded
            once and kept; any other http, https or http+unix URL, an endpoint; or `package.module:thing`, a servable,
            a torch module, or a function without arguments that returns one. Importing a module runs its code.
        sha256: 64 hex digits that a model file must have, or the file of weights; a URL may carry them as
            `#sha256=...`.
        name: how a model file or a torch module names itself, instead of its file name or class.
        device: where it runs: `auto`, `cpu`, `cuda` or `cuda:N`.
        options: for the class that the model becomes, such as `threads=2` for `OnnxModel`, `timeout_s=5.0` for
            `Endpoint`, `inputs=["x: float32 [-1, 3]"]` or `weights="x.safetensors"` for `TorchModel`, or
            `signature="predict"` for `TFModel`.

    Raises:
        SpecError: nothing is there, it is of no supported kind, the digest differs, or an option is not for this kind.
        TransportError: a download failed.
        ImportError: the framework that the file needs is not installed; names the line to type.

    Reads a whole file where a digest is to be checked; an endpoint is opened without asking it anything.
    """
    text = str(what)
    only_files = {"sha256": sha256, "name": name, "device": None if device == "auto" else device}
    if "://" in text:
        if not _is_model_url(text):
            _refuse(text, "an endpoint", only_files)
            return _open_endpoint(text, options)
        path, stem = _download(text, sha256)
        return _open_file(path, name=name or stem, device=device, options=options)
    if isinstance(what, str) and (found := _OBJECT.fullmatch(text)) and not Path(text).exists():
        return _open_object(found["module"], found["thing"], text, only_files, options)
    path = Path(what)
    if path.suffix.lower() in (".yaml", ".yml"):
        _refuse(text, "a graph", only_files)
        return _open_graph(path, options)
    _require_file(path)
    if path.is_dir():
        _refuse(text, "a folder", {"sha256": sha256})
    if sha256 is not None:
        _check_sha256(path, sha256)
    return _open_file(path, name=name, device=device, options=options)


def _onnx_model() -> type[Servable]:
    from remote_ops.onnx import OnnxModel

    return OnnxModel


def _torch_model() -> type[Servable]:
    from remote_ops.torch.model import TorchModel

    return TorchModel


def _tf_model() -> type[Servable]:
    from remote_ops.tf import TFModel

    return TFModel


# The kinds of model file: a new one is a line here and a function above. A folder may only be a SavedModel.
SAVED_MODEL = "saved_model.pb"
_KINDS: dict[str, Callable[[], type[Servable]]] = {
    ".onnx": _onnx_model,
    **dict.fromkeys((".pt2", ".pt", ".pth", ".jit"), _torch_model),
    **dict.fromkeys((".pb", ".keras", ".h5"), _tf_model),
}
MODEL_FILES = tuple(_KINDS)
_SUPPORTED = (
    f"a file ending in {', '.join(_KINDS)} or .yaml, a folder with a {SAVED_MODEL}, 'package.module:thing', or a URL"
)
_ARCHIVE = re.compile(r"\.(mar|zip|7z|rar|tar|tgz|gz|bz2|xz|zst)$", re.IGNORECASE)
_OBJECT = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<thing>[^\W\d]\w*(\.[^\W\d]\w*)*)")


def _open_file(path: Path, *, name: str | None, device: str, options: Mapping[str, Any]) -> Servable:
    kind = _tf_model if path.is_dir() else _KINDS[path.suffix.lower()]
    return construct(kind(), path, {"name": name, "device": device, **options})


def _open_object(
    module: str, thing: str, what: str, only_files: Mapping[str, Any], options: Mapping[str, Any]
) -> Servable:
    """Open what a Python name stands for; a torch module takes the options of `TorchModel`, a servable none."""
    sha256, weights = only_files["sha256"], options.get("weights")
    if weights is None:
        _refuse(what, "a Python object", {"sha256": sha256})
    elif sha256 is not None:
        _check_sha256(Path(weights), sha256)
    found = _import(module, thing, what)
    given = {name: value for name, value in {**only_files, **options}.items() if value is not None and name != "sha256"}
    if _is_servable(found):
        _refuse(what, "a Python object", given)
        return found
    return construct(_torch_model(), found, given)


def _open_graph(path: Path, options: Mapping[str, Any]) -> Servable:
    from ensemble.ensemble import load as open_graph

    return construct(open_graph, path, options)  # type: ignore[arg-type]


def _open_endpoint(url: str, options: Mapping[str, Any]) -> Servable:
    scheme = url.partition("://")[0].lower()
    if scheme not in ("http", "https", "http+unix"):
        raise SpecError(f"no way to open a URL of scheme '{scheme}': expected http, https or http+unix")
    from remote_ops.client import Endpoint

    return construct(Endpoint, url, options)


def construct(kind: type[Servable], source: Any, options: Mapping[str, Any]) -> Servable:
    """Make a servable of `source` and options by name.

    Raises:
        SpecError: an option that the class lacks; says which it has, and what was perhaps meant.
    """
    _, *known = inspect.signature(kind).parameters
    if unknown := [option for option in options if option not in known]:
        hint = did_you_mean(unknown[0], known)
        raise SpecError(
            f"{kind.__name__} has no option '{unknown[0]}': expected some of {', '.join(known)}{hint}",
            path="options",
        )
    made: Callable[..., Servable] = kind
    return made(source, **options)


def _refuse(what: str, kind: str, given: Mapping[str, Any]) -> None:
    """Raise rather than ignore an argument that has no effect, a digest above all."""
    if names := [name for name, value in given.items() if value is not None]:
        shown = re.sub(r"://[^/]*@|[?#].*", lambda found: "://" if found[0].startswith(":") else "", what)
        raise SpecError(f"{', '.join(names)}: not for {kind} such as '{shown}', only for model files and torch modules")


def _is_model_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:  # its text may hold what the URL holds
        raise SpecError("cannot load from this URL: it is malformed") from None
    return parts.scheme in ("http", "https") and parts.path.lower().endswith(tuple(_KINDS))


def _download(url: str, sha256: str | None) -> tuple[Path, str]:
    from remote_ops.download import fetch

    return fetch(url, sha256=sha256), Path(unquote(urlsplit(url).path)).stem


def _check_sha256(path: Path, sha256: str) -> None:
    from remote_ops.download import check_sha256

    if not path.is_file():
        raise SpecError("no such file", path=str(path))
    check_sha256(path, sha256)


def _require_file(path: Path) -> None:
    """Raise `SpecError`, with what was perhaps meant, unless a model file of a known kind is there."""
    if not path.exists():
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, near, n=1)
        hint = f"did you mean '{path.parent / close[0]}'?" if close else f"expected {_SUPPORTED}"
        raise SpecError(f"no such model '{path}'; {hint}")
    if not (path / SAVED_MODEL).is_file() if path.is_dir() else path.suffix.lower() not in _KINDS:
        kind = "a folder without one" if path.is_dir() else f"a file ending in '{path.suffix}'"
        raise SpecError(f"cannot load '{path}': expected {_SUPPORTED}, got {kind}{about_archives([path.name])}")


def about_archives(names: Iterable[str]) -> str:
    """What to do with the archives among files that are no models, to be added to a message; empty without any."""
    found = [name for name in names if _ARCHIVE.search(name)]
    if not found:
        return ""
    return f"; nothing is unpacked here: unpack {', '.join(found)} yourself, if you trust it, and name the model in it"


def _import(module: str, thing: str, what: str) -> Any:
    """Import a servable, a torch module, or a function without arguments that returns one; a class counts as such."""
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise SpecError(f"cannot import '{module}': {error}", path=what) from error
    for attribute in thing.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError as error:
            hint = did_you_mean(attribute, dir(found))
            raise SpecError(f"'{module}' has no '{attribute}'{hint}", path=what) from error
    if _is_servable(found) or _is_torch_model(found):
        return found
    made = _call_factory(found, what)
    if not _is_servable(made) and not _is_torch_model(made):
        raise SpecError(
            f"expected '{thing}' to return a servable, got {_describe(made)}, which lacks signature or infer",
            path=what,
        )
    return made


def _call_factory(factory: Any, what: str) -> Any:
    expected = "expected a servable, or a function without arguments that returns one"
    if not callable(factory):
        raise SpecError(f"{expected}, got {_describe(factory)}", path=what)
    try:
        parameters = inspect.signature(factory)
    except (TypeError, ValueError):  # a builtin that does not say
        return factory()
    try:
        parameters.bind()
    except TypeError as error:
        name = getattr(factory, "__name__", type(factory).__name__)
        raise SpecError(f"{expected}, got {name}{parameters}; wrap it in a FunctionServable", path=what) from error
    return factory()


def _describe(thing: Any) -> str:
    return f"a {type(thing).__name__}" if thing is not None else "None"


def _is_servable(thing: Any) -> TypeGuard[Servable]:
    """Whether a thing has both parts of a servable; `signature` is not read, for that may ask the network."""
    has_both = all(inspect.getattr_static(thing, part, None) is not None for part in ("signature", "infer"))
    return has_both and not isinstance(thing, type)


def _is_torch_model(thing: Any) -> bool:
    """Whether a thing is a torch module or an exported program; if torch was never imported, it is not."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(thing, torch.nn.Module | torch.export.ExportedProgram)
