"""What the kinds of node share that are a servable: `remote`, `onnx`, `torch`, `tf`, `python` and `graph`.

A kind only says how its servable is got; what flows in and out is the affair of all of them alike. Nothing is run here.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import ClassVar, Literal

from ensemble.faults import Path, meant
from ensemble.forms import UNKNOWN, Form
from ensemble.nodes.node import EdgeAt, Inputs, NodeSpec, Scope, TensorText
from ensemble.steps import ModelStep
from remote_ops.errors import SpecError
from remote_ops.servable import Servable
from remote_ops.signature import DTYPES, Signature, TensorSpec

__all__ = ["ServableSpec", "beside", "identity", "open_servable"]

_FLOATS_FROM_FLOAT32 = ("bfloat16", "float8")  # a servable takes float32 in their place


class ServableSpec(NodeSpec):
    """A node that is a servable."""

    inputs: Inputs | None = None
    """Where its inputs come from: by the model's names, or a list in its order; none for an owned node."""

    MODEL: ClassVar[Literal["local", "remote"] | None] = "local"
    OPENED_BY: ClassVar[tuple[str, ...]] = ()
    PLACE: ClassVar[str] = "thread"

    def open(self, file: str) -> Servable:
        """Get the servable; relative paths are relative to `file`."""
        raise NotImplementedError

    @property
    def what(self) -> str:
        """What the model is called in messages: its path, URL or name."""
        raise NotImplementedError

    @property
    def connected(self) -> tuple[str, ...] | int:
        """The names of the inputs that its servable is made for, or how many; of no matter to most kinds."""
        return 0

    @property
    def place(self) -> str:
        """Where it runs, as `ModelStep` says."""
        return self.PLACE

    @property
    def sent(self) -> bytes:
        """The `config` that goes with every call."""
        return b""

    @property
    def writes(self) -> bool | None:
        """Whether it writes into its inputs, as `ModelStep` says; None for models, which do not."""
        return None

    def edges(self) -> Iterator[EdgeAt]:
        """Every edge into this node."""
        named = self.inputs.items() if isinstance(self.inputs, dict) else enumerate(self.inputs or ())
        return (EdgeAt(name, edge, ("inputs", name)) for name, edge in named)

    def forms(self, inputs: Mapping[str | int, Form], scope: Scope) -> Mapping[str, Form]:
        """What comes out, by our names, given what goes in.

        Where the servable cannot be asked, what the outputs are declared to be.
        """
        servable = scope.servable(self)
        if servable is None:
            return {name: _declared(text) for name, text in (self.outputs or {}).items()}
        check = _Check(self, servable.signature, scope)
        check.inputs(inputs)
        return check.outputs()

    def step(self, scope: Scope) -> ModelStep:
        """The servable, and how our output names become its own."""
        servable = scope.servable(self)
        renames: Mapping[str, str] = {}
        if servable is None:  # it could not be asked, which was no fault; it may answer by the time of a run
            servable = open_servable(self, scope.file)
            renames = {name: text for name, text in (self.outputs or {}).items() if isinstance(text, str)}
        elif self.outputs is not None:
            renames = _renames(self.outputs, servable.signature)
        differing = {ours: theirs for ours, theirs in renames.items() if ours != theirs}
        return ModelStep(servable, differing, self.place, self.sent, self.writes)


def open_servable(spec: NodeSpec, file: str) -> Servable:
    """Open what a node is: a file is read, a module imported, an endpoint made but not asked.

    Args:
        spec: a node of one of the kinds here.
        file: the YAML file; relative paths are relative to its folder.

    Raises:
        SpecError: it is not there, is no such model, or an argument does not fit.
        TransportError: a download failed.
        ImportError: the framework that it needs is not installed.
    """
    if not isinstance(spec, ServableSpec):
        raise SpecError(f"a node of kind '{spec.kind}' is no servable", path="kind")
    return spec.open(file)


def identity(spec: NodeSpec, file: str = "") -> Hashable:
    """What two nodes have in common exactly if one servable serves both; `file` is the YAML file that they are in."""
    if not isinstance(spec, ServableSpec):
        raise SpecError(f"a node of kind '{spec.kind}' is no servable", path="kind")
    folder = str(FilePath(file).resolve().parent) if file else ""
    return folder, spec.kind, spec.model_dump_json(include=set(spec.OPENED_BY)), spec.connected


def beside(file: str, path: str) -> str:
    """A path relative to a file's folder."""
    return str(FilePath(file).parent / FilePath(path).expanduser())


def _declared(text: str | TensorText) -> Form:
    return text.form if isinstance(text, TensorText) else UNKNOWN


# --------------------------------------------------------------------------- what goes in and out


class _Check:
    """Holds a node against the signature of its model, and notes what does not fit."""

    def __init__(self, spec: ServableSpec, signature: Signature, scope: Scope) -> None:
        self.spec = spec
        self.signature = signature
        self.scope = scope
        self.node = str(scope.path[-1]) if scope.path else spec.kind
        self.edges = {edge.name: edge for edge in spec.edges()}
        self.misspelt: set[str] = set()  # inputs that were meant by a name that is not there

    def inputs(self, given: Mapping[str | int, Form]) -> None:
        """Whether every input of the model is fed, and by what fits."""
        known = {spec.name: spec for spec in self.signature.inputs}
        fed = set()
        for name, form in given.items():
            bound = self._bound(name, list(known.values()), len(given))
            if bound is not None:
                fed.add(bound.name)
                self._fit(name, bound, form)
        for spec in [spec for name, spec in known.items() if name not in fed | self.misspelt]:
            self._note("E105", ("inputs",), f"node '{self.node}' lacks input '{spec.name}': {self._whose} takes {spec}")

    def outputs(self) -> dict[str, Form]:
        """What comes out by our names: as the model says, and as is declared."""
        theirs = {spec.name: spec for spec in self.signature.outputs}
        if self.spec.outputs is None:
            return {name: Form.of(spec) for name, spec in theirs.items()}
        renames = _renames(self.spec.outputs, self.signature)
        found = {}
        for ours, text in self.spec.outputs.items():
            spec = theirs.get(renames[ours])
            if spec is None:
                what = f"output '{ours}' of '{self.node}' is '{renames[ours]}'"
                self._note(
                    "E103", ("outputs", ours), f"{what}, which {self._whose} lacks{meant(renames[ours], theirs)}"
                )
            found[ours] = _declared(text) if spec is None else self._agreed(ours, text, spec)
        return found

    @property
    def _whose(self) -> str:
        return f"{self.spec.kind} '{self.spec.what}'"

    def _note(self, code: str, path: Path, text: str) -> None:
        self.scope.faults.add(code, (*self.scope.path, *path), text)

    def _path(self, name: str | int) -> Path:
        return self.edges[name].path if name in self.edges else ()

    def _bound(self, name: str | int, known: Sequence[TensorSpec], count: int) -> TensorSpec | None:
        """The input of the model that is meant by a name, or by a place in a list."""
        if isinstance(name, int):
            if name < len(known):
                return known[name]
            self._note_beyond(name, known, count)
            return None
        for spec in known:
            if spec.name == name:
                return spec
        names = [spec.name for spec in known]
        self.misspelt |= set(difflib.get_close_matches(name, names, 1))
        text = f"node '{self.node}': {self._whose} has no input '{name}'{meant(name, names)}"
        self._note("E105", self._path(name), text)
        return None

    def _note_beyond(self, place: int, known: Sequence[TensorSpec], count: int) -> None:
        names = ", ".join(spec.name for spec in known)
        text = f"node '{self.node}': {self._whose} takes {len(known)} inputs ({names}), got {count}"
        self._note("E105", self._path(place), f"{text}; '{self.scope.source(place)}' is one too many")

    def _fit(self, name: str | int, spec: TensorSpec, form: Form) -> None:
        wanted, source = Form.of(spec), self.scope.source(name)
        target = f"{self.node}.{spec.name} ({self._whose})"
        if self._is_formless(form.dtype, wanted.dtype):
            text = f"edge {source} -> {target}: expected {wanted}, got {form}, which has no form on the wire there"
            self._note("E108", self._path(name), f"{text}; write {spec.name}: {{from: {source}, cast: {wanted.dtype}}}")
            wanted = wanted._replace(dtype=form.dtype)
        elif form.dtype == "float32" and wanted.dtype and wanted.dtype.startswith(_FLOATS_FROM_FLOAT32):
            wanted = wanted._replace(dtype="float32")
        self.scope.equal(form, source, wanted, target, "E106", (*self.scope.path, *self._path(name)))

    def _is_formless(self, dtype: str | None, wanted: str | None) -> bool:
        """Whether a dtype crosses the wire only as the bits of another one, and the server takes neither."""
        if self.spec.MODEL != "remote" or dtype is None or wanted is None or dtype == wanted:
            return False
        return dtype not in DTYPES or DTYPES[dtype].is_bit_view

    def _agreed(self, ours: str, text: str | TensorText, spec: TensorSpec) -> Form:
        form = Form.of(spec)
        if isinstance(text, str):
            return form
        declared = text.form
        if form.dtype is not None and declared.dtype != form.dtype:
            what = f"output '{ours}' of '{self.node}' is declared {declared}"
            self._note("E106", ("outputs", ours), f"{what}, but {self._whose} gives {form}; declare {form.dtype}")
        path = (*self.scope.path, "outputs", ours)
        given = form._replace(dtype=declared.dtype)
        by = f"'{ours}' of '{self.node}' as declared"
        return self.scope.equal(given, f"'{spec.name}' of {self._whose}", declared, by, "E107", path)


def _renames(outputs: Mapping[str, str | TensorText], signature: Signature) -> dict[str, str]:
    """The model's name of each output of ours.

    One that is declared has the model's own name. Where none of them has, they are as many as the model's and in order.
    """
    theirs = [spec.name for spec in signature.outputs]
    named = {ours: text if isinstance(text, str) else ours for ours, text in outputs.items()}
    if len(named) == len(theirs) and not set(named.values()) & set(theirs) and _all_declared(outputs):
        return dict(zip(named, theirs, strict=True))
    return named


def _all_declared(outputs: Mapping[str, str | TensorText]) -> bool:
    return all(isinstance(text, TensorText) for text in outputs.values())
